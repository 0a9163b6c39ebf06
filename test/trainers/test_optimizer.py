from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.trainers import LossUpdate, make_adam, parameter_groups
from torchrl_mac.trainers.optimizer import parameter_names


class Regression(LossModule):
    """A network, with a target, that is pulled towards a number."""

    def __init__(self, network, number, out_keys=("loss_x", "alpha")):
        super().__init__()
        module = TensorDictModule(network, ["x"], ["y"])
        self.convert_to_functional(module, "network", create_target_params=True)
        self.number = number
        self.out_keys = list(out_keys)

    @property
    def in_keys(self):
        return ["x"]

    def forward(self, tensordict):
        with self.network_params.to_module(self.network):
            y = self.network(tensordict.select("x"))["y"]
        values = ((y - self.number).square().mean(), torch.tensor(float(self.number)))
        return TensorDict(dict(zip(self.out_keys, values, strict=True)))

    def _forward_value_estimator_keys(self, **kwargs):
        pass


def network():
    return nn.Linear(1, 1, bias=False)


def batch():
    return TensorDict(x=torch.ones(4, 1), batch_size=[4])


def weight(loss):
    return next(iter(loss.network_params.values(True, True)))


def target(loss):
    return next(iter(loss.target_network_params.values(True, True)))


def test_a_shared_parameter_is_stepped_once():
    shared = network()
    losses = {"a": Regression(shared, 1.0), "b": Regression(shared, 3.0)}
    assert list(parameter_names(losses)) == ["a.network.module.weight"]
    before = weight(losses["a"]).item()
    optimizer = make_adam(losses, 0.1)
    LossUpdate(losses, optimizer)(batch())
    assert weight(losses["a"]) is weight(losses["b"])
    # Adam's first step has the size of its learning rate, whatever the gradient
    assert abs(weight(losses["a"]).item() - before) == pytest.approx(0.1, rel=1e-4)
    gradient = 2 * (before - 1) + 2 * (before - 3)
    assert weight(losses["a"]).grad.item() == pytest.approx(gradient, rel=1e-5)


def test_settings_of_the_most_specific_name_count():
    losses = {"a": Regression(nn.Linear(1, 1), 1.0), "b": Regression(nn.Linear(1, 1), 1.0)}
    settings = {
        "network": {"lr": 1.0},
        "b.network": {"lr": 2.0},
        "b.network.module.bias": {"lr": 3.0, "betas": (0.5, 0.9)},
    }
    groups = parameter_groups(losses, settings)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = parameter_names(losses)
    assert {name: rates[id(p)] for name, p in names.items()} == {
        "a.network.module.weight": 1.0,
        "a.network.module.bias": 1.0,
        "b.network.module.weight": 2.0,
        "b.network.module.bias": 3.0,
    }
    adam = make_adam(losses, 1e-3, {"b": {"weight_decay": 0.1}})
    assert [(g["lr"], g["weight_decay"]) for g in adam.param_groups] == [(1e-3, 0), (1e-3, 0.1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": {"lr": 1.0}}, r"named \['critic'\]; choose among \['a\.network'\]"),
        ({"net": {"lr": 1.0}}, "nothing to optimize"),  # a part of a name is not a name
        ({"network": {"rate": 1.0}}, r"no option \['rate'\]"),
        ({"network": {"lr": 0.0}}, "must be positive, got 0"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make_adam({"a": Regression(network(), 1.0)}, 1e-3, settings)


@pytest.mark.parametrize("order", ["before", "after"])
def test_targets_move_in_the_order_that_was_asked_for(order):
    losses = {name: Regression(network(), 1.0) for name in ("a", "b")}
    taus = {"a": 0.25, "b": 0.5}
    updaters = [SoftUpdate(losses[name], tau=tau) for name, tau in taus.items()]
    old = {name: weight(loss).item() for name, loss in losses.items()}
    for name, loss in losses.items():
        target(loss).data.fill_({"a": 7.0, "b": -7.0}[name])
    LossUpdate(losses, make_adam(losses, 0.1), updaters, target_order=order)(batch())
    for name, loss in losses.items():
        source = old[name] if order == "before" else weight(loss).item()
        expected = taus[name] * source + (1 - taus[name]) * {"a": 7.0, "b": -7.0}[name]
        assert target(loss).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="target_order must be one of"):
        LossUpdate(losses, make_adam(losses, 0.1), updaters, target_order="never")


def test_outputs_of_one_name_are_all_kept():
    losses = {name: Regression(network(), number) for name, number in (("a", 1.0), ("b", 3.0))}
    update = LossUpdate(losses, make_adam(losses, 0.1))
    total, metrics = update.total(batch())
    assert metrics["a/alpha"] == 1.0 and metrics["b/alpha"] == 3.0
    assert total.item() == pytest.approx((metrics["a/loss_x"] + metrics["b/loss_x"]).item())
    assert set(metrics.keys()) == {"a/alpha", "b/alpha", "a/loss_x", "b/loss_x"}
    unlike = LossUpdate([losses["a"]], make_adam({"a": losses["a"]}, 0.1))
    assert set(unlike(batch()).keys()) == {"loss_x", "alpha", "grad_norm"}


if __name__ == "__main__":
    pytest.main([__file__])
