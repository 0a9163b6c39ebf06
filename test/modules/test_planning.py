"""Models of the next h observations, and the actor that plans with one."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, ObservationNorm
from torchrl.modules import ValueOperator

from torchrl_mac import load_policy
from torchrl_mac.modules import (
    FlowFutureModel,
    FlowMatchingPolicy,
    FuturePlanningActor,
    MLPFutureModel,
    NormedMLP,
    build,
    describe,
    save_policy,
)

B, OBS, G, A, C, H, N = 5, 4, 2, 3, 2, 6, 7
D, FUTURE = C * A, H * OBS
CELLS = [8]


def flow_model(**kwargs):
    network = NormedMLP(OBS + D + FUTURE + 1, FUTURE, CELLS)
    return FlowFutureModel(network, FUTURE, 3, **kwargs)


def mlp_model(**kwargs):
    return MLPFutureModel(NormedMLP(OBS + D, FUTURE, CELLS), H, **kwargs)


def planner(make_model=flow_model, goal=True, **kwargs):
    goals = ["goal"] if goal else []
    width = G if goal else 0
    policy = FlowMatchingPolicy(
        NormedMLP(OBS + width + D + 1, D, CELLS), D, 2, in_keys=["observation", *goals, "noise"]
    )
    qvalue = ValueOperator(
        NormedMLP(FUTURE + width + D, 1, CELLS),
        in_keys=[("future", "observation"), *goals, "action"],
    )
    return FuturePlanningActor(
        policy, qvalue, make_model(), num_candidates=N, chunk_size=C, **kwargs
    )


def state(batch=(B,), goal=True):
    td = TensorDict(
        observation=torch.randn(*batch, OBS),
        noise=torch.randn(*batch, N, D),
        future_noise=torch.randn(*batch, N, FUTURE),
        batch_size=batch,
    )
    return td.set("goal", torch.randn(*batch, G)) if goal else td


class TestModels:
    @pytest.mark.parametrize("batch", [(), (B,), (2, 3)])
    def test_a_flow_is_integrated_and_not_clipped(self, batch):
        model = flow_model()
        s, a = torch.randn(*batch, OBS), torch.rand(*batch, C, A)
        x = noise = 30 * torch.randn(*batch, FUTURE)
        for i in range(3):
            time = torch.full((*batch, 1), i / 3)
            inputs = torch.cat([s, a.flatten(-2), x, time], -1)
            x = x + model.module.velocity_network(inputs) / 3
        td = model(TensorDict(observation=s, action=a, future_noise=noise, batch_size=batch))
        torch.testing.assert_close(td["future", "observation"], x)
        assert x.abs().max() > 1

    @pytest.mark.parametrize("batch", [(), (B,), (2, 3)])
    def test_an_mlp_predicts_changes(self, batch):
        model = mlp_model()
        s, a = torch.randn(*batch, OBS), torch.rand(*batch, C, A)
        change = model.network(torch.cat([s, a.flatten(-2)], -1)).unflatten(-1, (H, OBS))
        expected = (s.unsqueeze(-2) + change).flatten(-2)
        torch.testing.assert_close(model(observation=s, action=a), expected)

    def test_a_network_of_another_width_is_no_model(self):
        model = MLPFutureModel(NormedMLP(OBS + D, 1, CELLS), H)
        with pytest.raises(ValueError, match=rf"\[{B}, {FUTURE}\], but has \[{B}, 1\]"):
            model(observation=torch.randn(B, OBS), action=torch.randn(B, D))

    @pytest.mark.parametrize("make", [flow_model, mlp_model])
    def test_nested_keys(self, make):
        noise = [("z", "future")] if make is flow_model else []
        torch.manual_seed(0)
        model = make(in_keys=[("x", "state"), ("x", "chunk"), *noise], out_keys=[("y", "future")])
        torch.manual_seed(0)
        plain, s, a, z = make(), torch.randn(B, OBS), torch.rand(B, D), torch.randn(B, FUTURE)
        td = model(TensorDict(x=TensorDict(state=s, chunk=a), z=TensorDict(future=z)))
        expected = plain(TensorDict(observation=s, action=a, future_noise=z))
        assert torch.equal(td["y", "future"], expected["future", "observation"])


class TestPlanner:
    @pytest.mark.parametrize("batch", [(), (B,), (2, 3)])
    @pytest.mark.parametrize("goal", [False, True])
    @pytest.mark.parametrize("make", [flow_model, mlp_model])
    def test_chooses_by_the_value_of_its_own_future(self, make, goal, batch):
        actor, td = planner(make, goal), state(batch, goal)
        out = actor(td.clone())
        flat = td.reshape(-1)
        for row, chosen in zip(flat, out.reshape(-1), strict=True):
            goals, values, actions = ([row["goal"]] if goal else []), [], []
            for noise, z in zip(row["noise"], row["future_noise"], strict=True):
                action = actor.policy(torch.cat([row["observation"], *goals]), noise)
                inputs = {"observation": row["observation"], "action": action}
                future = actor.future_model(TensorDict({**inputs, "future_noise": z}))
                future = future["future", "observation"]
                value = actor.qvalue_network.module(torch.cat([future, *goals, action]))
                values.append(value)
                actions.append(action)
            best = max(range(N), key=lambda n: values[n].item())
            torch.testing.assert_close(chosen["action"].flatten(), actions[best])
            torch.testing.assert_close(chosen["chosen_action_value"], values[best])

    def test_reads_what_it_needs_and_writes_no_more(self):
        actor, td = planner(), state().exclude("noise", "future_noise")
        assert actor.in_keys == ["observation", "goal"]
        out = actor(td.clone())
        assert set(out.keys()) == {"observation", "goal", "action", "chosen_action_value"}
        assert out["action"].shape == (B, C, A)
        assert not torch.equal(out["action"], actor(td)["action"])  # noise is drawn

    def test_takes_tensors(self):
        actor, td = planner(), state()
        action, value = actor(**td.to_dict())
        out = actor(td)
        assert torch.equal(action, out["action"])
        assert torch.equal(value, out["chosen_action_value"])

    @pytest.mark.parametrize("key", ["noise", "future_noise"])
    def test_noise_is_of_all_candidates(self, key):
        td = state()
        td[key] = td[key][:, :-1]
        with pytest.raises(ValueError, match=f"'{key}' has shape .* num_candidates={N}"):
            planner()(td)

    def test_nested_keys(self):
        keys = {"in_keys": ["observation", "action", ("z", "future")]}
        torch.manual_seed(0)
        actor = planner(lambda: flow_model(**keys), future_noise_key=("z", "future"))
        torch.manual_seed(0)
        plain, td = planner(), state()
        expected = plain(td.clone())["action"]
        td["z", "future"] = td.pop("future_noise")
        assert torch.equal(actor(td)["action"], expected)

    @pytest.mark.parametrize("make", [flow_model, mlp_model])
    def test_is_exported(self, make, tmp_path):
        norm = ObservationNorm(torch.randn(OBS), torch.rand(OBS) + 0.5, in_keys=["observation"])
        actor, td = planner(make, transform=Compose(norm)), state()
        config = json.loads(json.dumps(describe(actor)))
        assert json.loads(json.dumps(describe(build(config)))) == config
        again = load_policy(save_policy(actor, tmp_path / "policy"))
        assert again.in_keys == actor.in_keys
        assert torch.equal(again(td.clone())["action"], actor(td.clone())["action"])

    @pytest.mark.parametrize("make", [flow_model, mlp_model])
    def test_compiles_as_one_graph(self, make):
        torch._dynamo.reset()
        actor, td = planner(make), state()
        compiled = torch.compile(actor, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(td.clone())["action"], actor(td.clone())["action"])


if __name__ == "__main__":
    pytest.main([__file__])
