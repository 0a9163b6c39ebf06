from __future__ import annotations

import pytest
import torch
from assembly import Size, make_batch, make_mac
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchrl_mac.modules import FlowMatchingModel, NormedMLP, fused
from torchrl_mac.modules.fused import frozen_weights, through

# of outputs of size one: some roundings of float32, or of bfloat16's eight bits
TOLERANCE = {None: 2e-5, torch.bfloat16: 0.2}
needs_onednn = pytest.mark.skipif(not fused.AVAILABLE, reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What is asked of oneDNN: the activations of products, and layouts of weights."""
    operators, seen = torch.ops.mkldnn, []

    class Seen:
        def _linear_pointwise(self, x, weight, bias, name, *args):
            seen.append((name, weight.is_mkldnn))
            return operators._linear_pointwise(x, weight, bias, name, *args)

        def _reorder_linear_weight(self, weight):
            seen.append("layout")
            return operators._reorder_linear_weight(weight)

    monkeypatch.setattr(fused, "OPERATORS", Seen())
    return seen


def autocast(dtype):
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def one_by_one(network, x):
    for layer in network.layers:
        x = layer(x)
    return x


@needs_onednn
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"layer_norm": False}, {"norm_first": True}])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_same_without_a_gradient(calls, activation, options, dtype):
    torch.manual_seed(0)
    network = NormedMLP(9, 3, [64, 48, 32], activation_class=activation, **options)
    x = torch.randn(2, 5, 9)
    with autocast(dtype):
        expected = network(x).detach()
        assert not calls
        with torch.no_grad():
            found = network(x)
    assert found.dtype == torch.float32 and found.shape == (2, 5, 3)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
    name = "none" if options.get("norm_first") else activation
    hidden = [name] * 3 if (dtype or torch.float32) in fused.DTYPES else []  # not every CPU's bf16
    assert [call[0] for call in calls] == [*hidden, "none"]


@needs_onednn
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    transposed=st.booleans(),
)
def test_any_shape_and_layout(shape, sizes, transposed):
    first, *cells = sizes
    # not normalised, which may blow up roundings
    network = NormedMLP(first, 2, cells, layer_norm=False)
    x = torch.randn(*shape, first)
    if transposed:
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), one_by_one(network.double(), x.double()).float())


@needs_onednn
def test_weights_are_laid_out_when_they_are_used_much(calls, monkeypatch):
    network, x = NormedMLP(4, 4, [8]), torch.randn(3, 4)
    monkeypatch.setattr(fused, "PAYS_FROM", 2 * 3 * 32)  # those of one use
    with torch.no_grad():
        expected = [network(x), network(network(x)), network(network(network(x)))]
        calls.clear()
        with frozen_weights():
            found = [x := network(x)]
            with frozen_weights():
                found.append(x := network(x))
            found.append(network(x))
    torch.testing.assert_close(found, expected)
    first, second, third = [("gelu", False), ("none", False)], [], [("gelu", True), ("none", True)]
    second = ["layout", ("gelu", True), "layout", ("none", True)]
    assert calls == [*first, *second, *third]
    monkeypatch.setattr(fused, "PAYS_FROM", 2 * 3 * 32 + 1)
    calls.clear()
    with torch.no_grad(), frozen_weights():
        network(network(network(x)))
    assert calls == [*first, *first, *second]


@needs_onednn
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_weights_may_change_outside_of_the_context(dtype, monkeypatch):
    monkeypatch.setattr(fused, "PAYS_FROM", 1)
    model = FlowMatchingModel(NormedMLP(4 + 3 + 1, 3, [8]), 3, num_steps=4, low=-9, high=9)
    x, noise = torch.randn(5, 4), torch.randn(5, 3)
    for _ in range(2):
        with autocast(dtype):
            expected = model(x, noise).detach()
            with torch.no_grad():
                found = model(x, noise)
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=0)
        for parameter in model.parameters():
            parameter.data.mul_(-1.7)


def test_left_alone(calls):
    """Where a gradient flows, in other numbers, in graphs, under vmap and with hooks."""
    network, x = NormedMLP(4, 2, [8]), torch.randn(3, 4)
    network(x)
    seen = []
    with torch.no_grad():
        NormedMLP(4, 2, [8]).double()(x.double())
        torch.jit.trace(network, x, check_trace=False)
        torch.export.export(network, (x,))
        torch.compile(network, backend="eager", fullgraph=True)(x)
        torch.func.vmap(network)(x.unsqueeze(0))
        assert not calls
        # as nn.Linear's own subclasses are, and an activation that is looked at
        through([nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)], x)
        network.layers[1].register_forward_hook(lambda *args: seen.append(args))
        network.layers[3].register_forward_hook(lambda *args: seen.append(args))
        network(x)
    assert len(seen) == 2
    assert [name for name, _ in calls] == (["none"] if fused.AVAILABLE else [])


@needs_onednn
def test_losses_are_the_same(calls, monkeypatch):
    """All that MAC's update computes without a gradient."""
    monkeypatch.setattr(fused, "PAYS_FROM", 1)
    size = Size([32], 16, 3, 3, 3, 5, 2, 4)
    torch.manual_seed(0)
    losses, batch = make_mac(size), make_batch(size, seed=1)
    found = {name: loss(batch) for name, loss in losses.items()}
    assert "layout" in calls
    calls.clear()
    monkeypatch.setattr(fused, "AVAILABLE", False)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss(batch), atol=1e-5, rtol=1e-5)
    assert not calls
