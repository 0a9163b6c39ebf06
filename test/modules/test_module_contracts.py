"""What TorchRL and its users expect of any module: keywords, selections, errors about shapes."""

from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepModel,
    OneStepPolicy,
    PolicyActor,
    build,
    describe,
)

OBS, G, H, A, N = 4, 2, 3, 2, 5
D = H * A
CELLS = [8]


def make_policy(kind=OneStepPolicy, goal=False, **kwargs):
    size = OBS + D + (kind is FlowMatchingPolicy) + (G if goal else 0)
    if goal:
        kwargs["in_keys"] = ["observation", "goal", "noise"]
    return kind(NormedMLP(size, D, CELLS), D, **kwargs)


def make_qvalue(goal=False, out_features=1, **kwargs):
    keys = ["observation", *(["goal"] if goal else []), "action"]
    network = NormedMLP(OBS + D + (G if goal else 0), out_features, CELLS)
    return ValueOperator(network, in_keys=keys, **kwargs)


def make_actor(goal=False, **kwargs):
    return FlowRejectionActor(
        make_policy(goal=goal), make_qvalue(goal), num_candidates=N, chunk_size=H, **kwargs
    )


def make_model(features=(OBS, 1, 1), goal=False, **kwargs):
    sizes = [OBS + D, *([OBS + D + (G if goal else 0)] * 2)]
    networks = (NormedMLP(size, n, CELLS) for size, n in zip(sizes, features, strict=True))
    return ChunkedWorldModel(*networks, goal_key="goal" if goal else None, **kwargs)


def state(batch=(5,), goal=False):
    return {
        "observation": torch.randn(*batch, OBS),
        **({"goal": torch.randn(*batch, G)} if goal else {}),
    }


class TestKeywords:
    """``module(observation=..., goal=...)`` returns tensors, in the order of ``out_keys``."""

    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
    @pytest.mark.parametrize("goal", [False, True])
    def test_rejection_actor(self, goal, batch):
        actor, inputs = make_actor(goal), state(batch, goal)
        inputs["noise"] = torch.randn(*batch, N, D)
        td = actor(TensorDict(inputs, batch_size=batch))
        action, value = actor(**inputs)
        assert action.shape == (*batch, H, A) and value.shape == (*batch, 1)
        assert torch.equal(action, td["action"]) and torch.equal(value, td["chosen_action_value"])
        assert torch.equal(actor(*inputs.values())[0], action)  # by position as well
        del inputs["noise"]
        assert actor(**inputs)[0].shape == action.shape  # drawn

    @pytest.mark.parametrize("goal", [False, True])
    def test_policy_actor(self, goal):
        actor, inputs = PolicyActor(make_policy(goal=goal), chunk_size=H), state(goal=goal)
        inputs["noise"] = torch.randn(5, D)
        action = actor(**inputs)
        assert torch.equal(action, actor(TensorDict(inputs, batch_size=[5]))["action"])

    @pytest.mark.parametrize("kind", [FlowMatchingPolicy, OneStepPolicy])
    @pytest.mark.parametrize("goal", [False, True])
    def test_policies(self, kind, goal):
        policy, inputs = make_policy(kind, goal), state(goal=goal)
        assert policy(**inputs).shape == (5, D)
        inputs["noise"] = torch.randn(5, D)
        action = policy(**inputs)
        assert torch.equal(action, policy(TensorDict(inputs, batch_size=[5]))["action"])
        condition = torch.cat([inputs[key] for key in policy.in_keys[:-1]], -1)
        assert torch.equal(action, policy(condition, inputs["noise"]))
        assert torch.equal(action, policy(condition, noise=inputs["noise"]))

    def test_nested_names_and_further_arguments(self):
        policy = OneStepPolicy(
            NormedMLP(OBS + D, D, CELLS), D, in_keys=[("o", "x"), ("n", "z")], low=-1e-3, high=1e-3
        )
        observation, noise = torch.randn(5, OBS), torch.randn(5, D)
        free = policy(o_x=observation, n_z=noise, clamp=False)
        assert torch.equal(policy(o_x=observation, n_z=noise), free.clamp(-1e-3, 1e-3))
        assert not torch.equal(free, free.clamp(-1e-3, 1e-3))

    @pytest.mark.parametrize("goal", [False, True])
    def test_world_model(self, goal):
        model = make_model(goal=goal)
        inputs = {**state(goal=goal), "action": torch.randn(5, H, A)}
        outputs = model(**inputs)
        td = model(TensorDict(inputs, batch_size=[5]))
        assert len(outputs) == len(model.out_keys) == 5
        for key, value in zip(model.out_keys, outputs, strict=True):
            assert torch.equal(td[key], value), key


class TestSelection:
    """``select_out_keys`` leaves out what was not asked for and ``reset_out_keys`` undoes it."""

    def test_world_model(self):
        model = make_model()
        inputs = {**state(), "action": torch.randn(5, H, A)}
        whole, keys = model(TensorDict(inputs, batch_size=[5])), list(model.out_keys)
        chosen = [("next", "observation"), ("next", "reward")]
        assert model.select_out_keys(*chosen) is model
        assert model.out_keys == chosen and model.out_keys_source == keys
        part = model(TensorDict(inputs, batch_size=[5]))
        assert set(part["next"].keys()) == {"observation", "reward"}
        for key, value in zip(chosen, model(**inputs), strict=True):
            assert torch.equal(value, whole[key]) and torch.equal(part[key], whole[key])
        # the two parts of a prediction, which rollouts are made of, say all they know
        td = model.predict_outcome(model.predict_state(TensorDict(inputs, batch_size=[5])))
        assert set(td["next"].keys()) == set(whole["next"].keys())
        model.reset_out_keys()
        assert model.out_keys == keys
        assert set(model(TensorDict(inputs, batch_size=[5]))["next"].keys()) == set(
            whole["next"].keys()
        )
        with pytest.raises(ValueError, match="non existent key"):
            model.select_out_keys("reward")

    def test_actors(self):
        for actor in (make_actor(), PolicyActor(make_policy(), chunk_size=H)):
            keys = list(actor.out_keys)
            actor.select_out_keys("action")
            td = actor(TensorDict(state(), batch_size=[5]))
            assert set(td.keys()) == {"observation", "action"}
            assert actor(**state()).shape == (5, H, A)
            actor.reset_out_keys()
            assert actor.out_keys == keys
            assert set(actor(TensorDict(state(), batch_size=[5])).keys()) > set(keys)


class Twins(nn.Module):
    """Two values of a chunk; the first is to be misled by."""

    def forward(self, observation, action):
        total = action.sum((-2, -1)).unsqueeze(-1)
        return -total, total


def twins(*names):
    pair = TensorDictModule(Twins(), ["observation", "action"], list(names[:2]))
    least = TensorDictModule(lambda a, b: torch.minimum(a, b + 100), list(names[:2]), [names[2]])
    return TensorDictSequential(pair, least)


class TestQValueKey:
    @pytest.mark.parametrize(
        ("names", "key"),
        [
            (("state_action_value_0", "state_action_value_1", "state_action_value"), None),
            (("a", "b", "least"), "b"),
            (("a", ("q", "b"), "least"), ("q", "b")),
        ],
    )
    def test_which_value_ranks(self, names, key):
        network = twins(*names)
        actor = FlowRejectionActor(
            make_policy(), network, num_candidates=N, chunk_size=H, qvalue_key=key
        )
        td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, N, D))
        td.auto_batch_size_(1)
        out, candidates = actor(td.clone()), actor.candidates(td.clone())
        value = candidates[key or "state_action_value"]
        assert torch.equal(out["chosen_action_value"], value.max(1).values)
        best = value.squeeze(-1).argmax(1)
        assert torch.equal(out["action"], candidates["action"][torch.arange(5), best])

    def test_default_of_a_single_output(self):
        actor = FlowRejectionActor(make_policy(), make_qvalue(out_keys=["mine"]))
        assert actor.qvalue_key == "mine"
        assert make_actor().qvalue_key == "state_action_value"

    def test_is_exported(self):
        actor = FlowRejectionActor(
            make_policy(), make_qvalue(out_keys=[("q", "x")]), qvalue_key=("q", "x")
        )
        config = json.loads(json.dumps(describe(actor)))
        assert config["qvalue_key"] == ["q", "x"]
        assert build(config).qvalue_key == ("q", "x")

    def test_errors(self):
        with pytest.raises(ValueError, match=r"\['a', 'b', 'least'\].*qvalue_key"):
            FlowRejectionActor(make_policy(), twins("a", "b", "least"))
        with pytest.raises(ValueError, match=r"'c' is not among.*'least'"):
            FlowRejectionActor(make_policy(), twins("a", "b", "least"), qvalue_key="c")

    @pytest.mark.parametrize("shape", [(2,), (), (1, 1)])
    def test_a_value_is_one_number_per_candidate(self, shape):
        class Wrong(nn.Module):
            def forward(self, observation, action):
                return action.new_zeros(*action.shape[:-2], *shape)

        qvalue = TensorDictModule(Wrong(), ["observation", "action"], ["state_action_value"])
        actor = FlowRejectionActor(make_policy(), qvalue, num_candidates=N, chunk_size=H)
        seen = rf"'state_action_value'.*\[5, {N}, 1\].*\{[5, N, *shape]}"
        with pytest.raises(ValueError, match=seen):
            actor(TensorDict(state(), batch_size=[5]))


class TestShapes:
    """What would broadcast in silence is an error that names the network and both shapes."""

    @pytest.mark.parametrize("shape", [(5, 1), (1,), (5, D + 1), (1, D)])
    @pytest.mark.parametrize("kind", [FlowMatchingPolicy, OneStepPolicy])
    def test_noise(self, kind, shape):
        policy = make_policy(kind)
        with pytest.raises(ValueError, match=rf"noise.*\[5, {D}\].*\{list(shape)}"):
            policy.module(torch.randn(5, OBS), torch.randn(shape))

    def test_outputs_of_policies(self):
        flow = FlowMatchingModel(NormedMLP(OBS + D + 1, 1, CELLS), D)
        with pytest.raises(ValueError, match=rf"velocity_network.*\[5, {D}\].*\[5, 1\]"):
            flow(torch.randn(5, OBS))
        with pytest.raises(ValueError, match="velocity_network"):  # as the loss calls it
            flow.velocity(torch.randn(5, OBS), torch.randn(5, D), torch.rand(5, 1))
        one = OneStepModel(NormedMLP(OBS + D, 1, CELLS), D)
        with pytest.raises(ValueError, match=rf"network.*\[5, {D}\].*\[5, 1\]"):
            one(torch.randn(5, OBS), clamp=False)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ((1, 1, 1), rf"dynamics_network.*\[5, {OBS}\].*\[5, 1\]"),
            ((OBS, 2, 1), r"reward_network.*\[5, 1\].*\[5, 2\]"),
            ((OBS, 1, OBS), rf"termination_network.*\[5, 1\].*\[5, {OBS}\]"),
        ],
    )
    def test_world_model(self, features, message):
        td = TensorDict(observation=torch.randn(5, OBS), action=torch.randn(5, H, A))
        with pytest.raises(ValueError, match=message):
            make_model(features)(td)

    def test_heads_without_a_last_dimension(self):
        model = make_model()
        model.reward_network = nn.Sequential()
        model.reward_network.forward = lambda observation, action: observation.sum(-1)
        td = TensorDict(observation=torch.randn(5, OBS), action=torch.randn(5, H, A))
        with pytest.raises(ValueError, match=r"reward_network.*\[5, 1\].*\[5\]"):
            model(td)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_they_cost_no_break_in_a_graph(self, dynamic):
        torch._dynamo.reset()
        actor, model = make_actor(), make_model()

        def step(td):
            return model(actor(td))["next", "observation"]

        compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=dynamic)
        for batch in (5, 7):
            td = TensorDict(observation=torch.randn(batch, OBS), noise=torch.randn(batch, N, D))
            td.auto_batch_size_(1)
            torch.testing.assert_close(compiled(td.clone()), step(td.clone()))


class TestBounds:
    @pytest.mark.parametrize("kind", [FlowMatchingModel, OneStepModel])
    @pytest.mark.parametrize(
        ("low", "high"),
        [(1.0, -1.0), (0.5, 0.5), (torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0]))],
    )
    def test_low_must_be_below_high(self, kind, low, high):
        with pytest.raises(ValueError, match="low must be smaller than high"):
            kind(nn.Identity(), 2, low=low, high=high)

    def test_a_description_builds_bounds_of_any_shape(self):
        policy = make_policy(low=torch.full((D,), -2.0), high=3.0)
        assert build(describe(policy)).module.low.shape == (D,)


if __name__ == "__main__":
    pytest.main([__file__])
