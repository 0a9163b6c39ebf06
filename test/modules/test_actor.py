from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import Compose, ObservationNorm
from torchrl.modules import ValueOperator

from torchrl_mac import load_policy
from torchrl_mac.modules import (
    ChunkedWorldModel,
    Configurable,
    FlowMatchingPolicy,
    FlowRejectionActor,
    GaussianEnsemble,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
    build,
    describe,
    register_config,
    save_policy,
)
from torchrl_mac.modules.config import _Registry

OBS, H, A = 3, 4, 2
D = H * A


def make_norm(key="observation"):
    return ObservationNorm(torch.randn(OBS), torch.rand(OBS) + 0.5, in_keys=[key])


def policy(kind=OneStepPolicy, **kwargs):
    extra = 1 if kind is FlowMatchingPolicy else 0
    return kind(NormedMLP(OBS + D + extra, D, [8], activation_class="relu"), D, **kwargs)


class TestPolicyActor:
    @pytest.mark.parametrize("kind", [OneStepPolicy, FlowMatchingPolicy])
    def test_acts_as_the_policy_on_what_the_transform_makes(self, kind):
        inner, norm = policy(kind), make_norm()
        actor = PolicyActor(inner, chunk_size=H, transform=Compose(norm))
        td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, D), batch_size=[5])
        scaled = td["observation"] * norm.scale + norm.loc
        expected = inner(scaled, td["noise"])
        out = actor(td.clone())
        torch.testing.assert_close(out["action"], expected.unflatten(-1, (H, A)))
        assert torch.equal(out["observation"], td["observation"])
        assert actor.in_keys == ["observation"] and actor.out_keys == ["action"]

    def test_any_policy_with_any_keys(self):
        inner = TensorDictModule(nn.Linear(OBS, D), [("o", "x")], [("a", "raw")])
        actor = PolicyActor(inner, action_key=("a", "chunk"), chunk_size=H)
        td = actor(TensorDict(o=TensorDict(x=torch.randn(5, OBS)), batch_size=[5]))
        assert td["a", "chunk"].shape == (5, H, A)
        flat = PolicyActor(inner, action_key=("a", "flat"))
        assert flat(td)["a", "flat"].shape == (5, D)

    def test_the_mode_of_a_gaussian(self, tmp_path):
        network = NormedMLP(OBS, 2 * D, [8])
        inner, norm = TanhGaussianPolicy(network, D), make_norm()
        actor = PolicyActor(inner, chunk_size=H, deterministic=True, transform=norm)
        td = TensorDict(observation=torch.randn(5, OBS), batch_size=[5])
        mean = network(td["observation"] * norm.scale + norm.loc)[:, :D]
        torch.testing.assert_close(actor(td.clone())["action"].flatten(1), mean.tanh())
        noisy = actor(td.clone().set("noise", torch.ones(5, D)))["action"]
        assert not torch.equal(noisy, actor(td.clone())["action"])  # noise that is given counts
        again = load_policy(save_policy(actor, tmp_path / "policy"))
        assert torch.equal(again(td.clone())["action"], actor(td.clone())["action"])

    def test_is_exported(self, tmp_path):
        actor = PolicyActor(policy(low=-0.5, high=0.25), chunk_size=H, transform=make_norm())
        again = load_policy(save_policy(actor, tmp_path / "policy", {"dataset": "x"}))
        td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, D), batch_size=[5])
        assert torch.equal(again(td.clone())["action"], actor(td.clone())["action"])
        assert again(td.clone())["action"].max() <= 0.25

    def test_errors(self):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            PolicyActor(policy(), chunk_size=0)


def all_modules():
    sizes = {"in_features": OBS + D, "num_cells": (8,)}
    qvalue = ValueOperator(
        StackedMLP(2, out_features=1, **sizes), in_keys=["observation", ("a", "chunk")]
    )
    return [
        NormedMLP(5, 2, [7, 6], activation_class="relu", layer_norm=False),
        StackedMLP(3, 5, 2, [7], broadcast=True, layer_norm=False),
        QValueEnsemble(
            StackedMLP(3, OBS + D, 1, [7], broadcast=True, norm_first=True),
            q_aggregation="min",
            in_keys=["observation", ("a", "chunk")],
            out_keys=["q", ("q", "s")],
        ),
        TanhGaussianPolicy(NormedMLP(OBS, 2 * D, [7]), D, log_std_bounds=(-5, 2)),
        GaussianEnsemble(StackedMLP(4, 5, 6, [7], broadcast=True), num_elites=2),
        policy(FlowMatchingPolicy, num_steps=3, low=-2.0, high=torch.full((D,), 3.0)),
        policy(in_keys=[("o", "x"), "noise"]),
        ChunkedWorldModel(
            *(NormedMLP(out_features=n, **sizes) for n in (OBS, 1, 1)),
            goal_key=("task", "goal"),
            negative_reward=True,
            reward_key=("r", "x"),
        ),
        FlowRejectionActor(
            policy(), qvalue, num_candidates=3, chunk_size=H, action_key=("a", "chunk")
        ),
        Compose(make_norm(), make_norm("goal")),
    ]


@pytest.mark.parametrize("module", all_modules(), ids=lambda module: type(module).__name__)
def test_described_and_built_again(module):
    config = json.loads(json.dumps(describe(module)))  # through a file
    again = build(config)
    assert type(again) is type(module)
    assert json.loads(json.dumps(describe(again))) == config
    again.load_state_dict(module.state_dict())
    for name in ("in_keys", "out_keys"):
        assert getattr(again, name, None) == getattr(module, name, None)


def test_bounds_are_those_of_the_weights():
    module = policy(FlowMatchingPolicy, num_steps=3, low=-2.0, high=torch.full((D,), 3.0))
    again = build(describe(module))
    again.load_state_dict(module.state_dict())
    assert again.module.low == -2 and (again.module.high == 3).all() and again.module.num_steps == 3


def test_classes_of_ones_own():
    class Shift(nn.Module, Configurable):
        def __init__(self, by, inner=None):
            super().__init__()
            self.by, self.inner = by, inner

        def config(self):
            return {"by": self.by, "inner": self.inner}

    config = describe(Shift(2, NormedMLP(3, 1, [4])))
    assert config["inner"]["class"] == "NormedMLP"
    assert build(config).inner.num_cells == (4,)
    with pytest.raises(TypeError, match="A Linear cannot be exported"):
        describe(Shift(2, nn.Linear(2, 2)))
    register_config(nn.Linear, lambda it: {"n": it.in_features}, lambda it: nn.Linear(it["n"], 1))
    try:
        assert build(describe(Shift(2, nn.Linear(2, 1)))).inner.in_features == 2
    finally:
        del _Registry.describe[nn.Linear], _Registry.build["Linear"]
    with pytest.raises(ValueError, match="'Unknown' is not a known class"):
        build({"class": "Unknown"})
    with pytest.raises(NotImplementedError, match="does not say what it was made with"):
        Configurable().config()


if __name__ == "__main__":
    pytest.main([__file__])
