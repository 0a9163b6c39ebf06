from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from assembly import Size, make_batch, make_mac
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import NormedMLP
from torchrl_mac.trainers import LossUpdate, make_adam
from torchrl_mac.trainers.compilation import networks_of

OBS, H, A, N, K, B = 3, 2, 2, 4, 2, 8
EAGER = {"backend": "aot_eager"}  # one graph and its gradient, without generated code


def size_of(width=16, batch=B):
    return Size([width], batch, N, K, 2, OBS, A, H)


def make_update(width=16, **switches):
    torch.manual_seed(0)
    losses = make_mac(size_of(width))
    optimizer = make_adam(losses, 1e-2)
    return LossUpdate(losses, optimizer, SoftUpdate(losses["values"], tau=0.1), **switches)


def batch(seed, size=B):
    """All noise is given."""
    return make_batch(size_of(batch=size), seed=seed)


def parameters(update):
    return {
        f"{name}.{key}": value.clone()
        for name, loss in update.losses.items()
        for key, value in loss.state_dict().items()
    }


def gradients(update, td):
    update.optimizer.zero_grad()
    update.total(td)[0].backward()
    return torch.cat([p.grad.flatten() for p in update.optimizer.param_groups[0]["params"]])


def test_compiled_equals_eager_and_compiles_once():
    torch._dynamo.reset()
    eager, compiled = make_update(), make_update(compile=EAGER)
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            metrics = compiled(batch(step))
        torch.testing.assert_close(metrics, eager(batch(step)), atol=1e-5, rtol=1e-4)
    assert compiled.is_compiled and not eager.is_compiled
    torch.testing.assert_close(parameters(compiled), parameters(eager), atol=1e-5, rtol=1e-4)


def test_networks_compiled_alone_equal_eager_and_stay_eager_elsewhere():
    torch._dynamo.reset()
    eager, compiled = make_update(), make_update(compile={"scope": "networks", **EAGER})
    networks = networks_of(compiled.losses.values())
    assert len(networks) == 7  # flow, student, three of the world model, V and Q
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            metrics = compiled(batch(step))
        torch.testing.assert_close(metrics, eager(batch(step)), atol=1e-5, rtol=1e-4)
        assert not any(network._compiled_call_impl for network in networks)
    assert compiled.is_compiled
    torch.testing.assert_close(parameters(compiled), parameters(eager), atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(networks)


def test_networks_that_cannot_be_compiled_go_on_without(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    warnings = []
    monkeypatch.setattr("torchrl_mac.trainers.compilation.torchrl_logger.warning", warnings.append)
    torch._dynamo.reset()
    eager, update = make_update(), make_update(compile={"scope": "networks", "backend": broken})
    for step in range(2):
        torch.testing.assert_close(update(batch(step)), eager(batch(step)))
    assert len(warnings) == 1 and "no compiler here" in warnings[0]
    assert not update.is_compiled


def test_what_is_compiled_is_checked():
    with pytest.raises(ValueError, match="got 'layers'"):
        make_update(compile="layers")


@pytest.mark.parametrize("order", ["before", "after"])
def test_targets_move_as_the_updater_moves_them(order):
    update, twin = (make_update(target_order=order) for _ in range(2))
    updater = twin.target_updaters[0]
    twin._target_steps = [updater.step]
    for step in range(3):
        update(batch(step))
        twin(batch(step))
        mine, its = parameters(update), parameters(twin)
        assert all(torch.equal(mine[key], its[key]) for key in its)


def test_a_failed_compile_falls_back_with_one_warning(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    warnings = []
    monkeypatch.setattr("torchrl_mac.trainers.compilation.torchrl_logger.warning", warnings.append)
    torch._dynamo.reset()
    eager, update = (
        LossUpdate([loss], torch.optim.Adam(loss.parameters()), compile=compile)
        for compile in (False, {"backend": broken})
        for loss in [make_update().losses["world_model"]]  # traced in seconds
    )
    for step in range(3):
        torch.testing.assert_close(update(batch(step)), eager(batch(step)))
    assert len(warnings) == 1 and "no compiler here" in warnings[0]
    assert not update.is_compiled


def test_errors_of_the_losses_are_those_of_eager():
    torch._dynamo.reset()
    update = make_update(compile=EAGER)
    with pytest.raises(KeyError, match=r"The loss needs .*terminated"):
        update(batch(0).exclude(("next", "terminated")))


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_reduced_precision_is_close(precision):
    reference, reduced = make_update(width=64), make_update(width=64, precision=precision)
    expected, got = gradients(reference, batch(0, 64)), gradients(reduced, batch(0, 64))
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    assert torch.cosine_similarity(got, expected, dim=0) > 0.97
    # a weight cast without a gradient must not be handed to a pass that needs one
    for loss in reduced.losses.values():
        for name, parameter in loss.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.any(), name


def test_bf16_is_for_what_no_gradient_goes_through():
    reference, reduced = make_update(width=64), make_update(width=64, precision="bf16")
    expected, got = reference.compute(batch(0, 64))[1], reduced.compute(batch(0, 64))[1]
    for key in ("loss_flow", "loss_dynamics", "loss_reward", "loss_termination"):
        assert torch.equal(got[key], expected[key])
    for key in ("loss_distillation", "loss_value", "loss_qvalue"):
        assert not torch.equal(got[key], expected[key])
        torch.testing.assert_close(got[key], expected[key], atol=0.05, rtol=0.05)


def test_values_of_candidates_stay_apart_in_bf16():
    """Values near -50 that differ by 0.01: bfloat16 itself has steps of 0.25 there."""
    network = NormedMLP(4, 1, [64])
    torch.nn.init.constant_(network.layers[-1].bias, -50.0)
    inputs = torch.randn(1, 4) + 0.05 * torch.randn(256, 4)
    exact = network(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = network(inputs)
    assert reduced.dtype == torch.float32
    assert exact.bfloat16().unique().numel() <= 4
    assert reduced.unique().numel() > 200
    assert torch.corrcoef(torch.stack([exact[:, 0], reduced[:, 0]]))[0, 1] > 0.98


def test_compiled_bf16_equals_eager_bf16():
    torch._dynamo.reset()
    eager = make_update(width=64, precision="bf16")
    compiled = make_update(width=64, precision="bf16", compile=EAGER)
    torch.testing.assert_close(compiled(batch(0)), eager(batch(0)), atol=2e-2, rtol=2e-2)


def test_matmul_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    make_update(precision="tf32")(batch(0))
    assert torch.get_float32_matmul_precision() == before


def test_errors():
    with pytest.raises(ValueError, match=r"precision must be one of .*'fp64'"):
        make_update(precision="fp64")
    with pytest.raises(ValueError, match="capturable=True"):
        make_update(cudagraphs=True)
    with pytest.raises(ValueError, match="do not go together"):
        make_update(cudagraphs=True, distributed=True)


def _rank(rank, port, path, compile):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    update = make_update(distributed=True, compile=compile)
    for step in range(5):
        update(batch(step, 2 * B)[rank * B : (rank + 1) * B])
    if rank == 0:
        torch.save(parameters(update), path)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, EAGER])
def test_two_processes_equal_one_with_the_joined_batch(tmp_path, processes, compile):
    args = _free_port(), tmp_path / "parameters.pt", compile
    ranks = [processes.Process(target=_rank, args=(rank, *args)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    alone = make_update()
    for step in range(5):
        alone(batch(step, 2 * B))
    together = torch.load(tmp_path / "parameters.pt", weights_only=True)
    torch.testing.assert_close(together, parameters(alone), atol=1e-5, rtol=1e-5)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_captured_equals_eager(compile):
    def on_cuda(**switches):
        torch.manual_seed(0)
        losses = make_mac(size_of(), "cuda")
        optimizer = make_adam(losses, 1e-2, capturable=True)
        return LossUpdate(losses, optimizer, SoftUpdate(losses["values"], tau=0.1), **switches)

    eager, captured = on_cuda(), on_cuda(cudagraphs=True, compile=compile)
    for step in range(6):
        eager(batch(step).cuda())
        captured(batch(step).cuda())
    torch.testing.assert_close(parameters(captured), parameters(eager), atol=1e-4, rtol=1e-3)


if __name__ == "__main__":
    pytest.main([__file__])
