from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    InitTracker,
    MultiAction,
    ObservationNorm,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs
from torchrl.modules import ValueOperator

from torchrl_mac.envs import ChunkedWorldModelEnv, ChunkedWorldModelTransform, OGBenchEnv
from torchrl_mac.modules import ChunkedWorldModel, FlowRejectionActor, NormedMLP, OneStepPolicy

pytest.importorskip("ogbench")

CHUNK_SIZE = 5
NAME = "pointmaze-medium-navigate-v0"

make_real = partial(OGBenchEnv, NAME)
Fork = partial(ParallelEnv, mp_start_method="fork")


def make_transform(world_model: ChunkedWorldModel, **kwargs) -> ChunkedWorldModelTransform:
    return ChunkedWorldModelTransform(world_model, chunk_size=CHUNK_SIZE, **kwargs)


def imagine(real: EnvBase | Callable[[], EnvBase], world_model: ChunkedWorldModel, **kwargs):
    real = real if isinstance(real, EnvBase) else real()
    return TransformedEnv(real, make_transform(world_model, **kwargs))


def forbid_steps(env: OGBenchEnv) -> OGBenchEnv:
    """An environment that may be reset, but whose simulator fails when stepped by the wrapper."""

    def fail(*args) -> None:
        raise AssertionError("the simulator was stepped")

    env._env.step = fail
    return env


def expected(world_model: ChunkedWorldModel, observation: torch.Tensor, chunk: torch.Tensor):
    inputs = torch.cat([observation, chunk.flatten(-2)], -1)
    delta, reward = world_model.dynamics_network(inputs), world_model.reward_network(inputs)
    return observation + delta, reward, world_model.termination_network(inputs) > 0


def test_a_goal_rides_along():
    sizes = {"num_cells": (16,)}
    model = ChunkedWorldModel(
        NormedMLP(2 + 2 * CHUNK_SIZE, 2, **sizes),
        *(NormedMLP(2 + 2 + 2 * CHUNK_SIZE, 1, **sizes) for _ in range(2)),
        goal_key="goal",
        negative_reward=True,
    )
    # the goal decides: the task ends in every chunk but where it is far away
    model.termination_network.forward = lambda s, g, a: 50 - g.abs().max(-1, keepdim=True).values
    real = OGBenchEnv("pointmaze-medium-navigate-oraclerep-v0", task_id=2)
    env = imagine(forbid_steps(real), model)
    check_env_specs(env)
    rollout = env.rollout(3, break_when_any_done=False)
    assert torch.equal(rollout["goal"], rollout["next", "goal"])
    assert rollout["next", "success"].all() and not rollout["next", "reward"].any()
    other = ChunkedWorldModelEnv.from_env(model, real, chunk_size=CHUNK_SIZE)
    check_env_specs(other)
    start = rollout[0].select("observation", "goal")
    far = start.clone().set("goal", torch.full((2,), 99.0))
    for state, reached in ((start, True), (far, False)):
        step = other.reset(state, set_state=True).set("action", rollout[0]["action"])
        step = other.step(step)["next"]
        assert torch.equal(step["goal"], state["goal"])
        assert step["success"] == step["terminated"] == reached
        assert step["reward"] == float(reached) - 1
        torch.testing.assert_close(step["observation"], rollout[0]["next", "observation"])


class TestSpecs:
    @pytest.mark.parametrize("name", [NAME, NAME.replace("-v0", "-singletask-v0")])
    def test_single(self, make_world_model, name):
        real = OGBenchEnv(name)
        env = imagine(real, make_world_model())
        check_env_specs(env)
        assert env.action_spec == real.action_spec.expand(CHUNK_SIZE, 2)
        assert env.output_spec == real.output_spec

    def test_cube(self, make_world_model):
        real = OGBenchEnv("cube-single-play-singletask-task2-v0")
        env = imagine(forbid_steps(real), make_world_model(28, 5, ends=False))
        check_env_specs(env)
        start = env.reset()
        time = real._env.unwrapped.data.time
        env.rollout(3, tensordict=start, auto_reset=False)
        assert real._env.unwrapped.data.time == time

    @pytest.mark.parametrize("batched", [SerialEnv, Fork], ids=["serial", "parallel"])
    @pytest.mark.parametrize("inside", [False, True])
    def test_batched(self, make_world_model, batched, inside):
        world_model = make_world_model(ends=False)

        def make_resting() -> OGBenchEnv:
            return forbid_steps(make_real())

        if inside:
            env = batched(2, partial(imagine, make_resting, world_model))
        else:
            env = imagine(batched(2, make_resting), world_model)
        try:
            check_env_specs(env)
            assert env.action_spec.shape == (2, CHUNK_SIZE, 2)
            rollout = env.rollout(3)
        finally:
            env.close(raise_if_closed=False)
        assert rollout.shape == (2, 3)
        for step in rollout.unbind(-1):
            observation, reward, _ = expected(world_model, step["observation"], step["action"])
            torch.testing.assert_close(step["next", "observation"], observation)
            torch.testing.assert_close(step["next", "reward"], reward)

    def test_nested_keys(self, make_world_model, nested_keys):
        real = _NestedEnv()
        env = imagine(real, make_world_model(**nested_keys), success_key=("agent", "won"))
        check_env_specs(env)
        assert env.full_action_spec["agent", "chunk"].shape == (CHUNK_SIZE, 2)
        env = imagine(
            real, make_world_model(ends=True, **nested_keys), success_key=("agent", "won")
        )
        assert env.rollout(2)["next", "agent", "won"].all()
        assert real.steps == 0

    def test_errors(self, make_world_model):
        with pytest.raises(ValueError, match="chunk_size"):
            ChunkedWorldModelTransform(make_world_model(), chunk_size=0)
        transform = make_transform(make_world_model(observation_key="state"))
        with pytest.raises(KeyError, match="state"):
            transform.transform_output_spec(make_real().output_spec)
        transform = make_transform(make_world_model(action_key="chunk"))
        with pytest.raises(KeyError, match="chunk"):
            transform.transform_input_spec(make_real().input_spec)


class TestStep:
    def test_agrees_with_env_and_hand_loop(self, make_world_model):
        world_model = make_world_model(ends=False)
        real = make_real()
        env = imagine(forbid_steps(real), world_model)
        env.set_seed(0)
        imagined = env.rollout(6)
        model_env = ChunkedWorldModelEnv.from_env(world_model, real, chunk_size=CHUNK_SIZE)
        td = model_env.reset(imagined[0].exclude("next", "action"), set_state=True)
        observation = imagined["observation"][0]
        for step in imagined.unbind(0):
            td = model_env.step(td.set("action", step["action"]))
            observation, reward, _ = expected(world_model, observation, step["action"])
            for key, value in (("observation", observation), ("reward", reward)):
                torch.testing.assert_close(step["next", key], value, atol=1e-6, rtol=0)
                torch.testing.assert_close(td["next", key], value, atol=1e-6, rtol=0)
            torch.testing.assert_close(step["next", "goal"], td["next", "goal"])
            td = model_env.step_mdp(td)
        start = make_real()
        start.set_seed(0)
        assert torch.equal(start.reset()["observation"], imagined["observation"][0])

    @pytest.mark.parametrize("ends", [False, True])
    def test_ends(self, make_world_model, ends):
        env = imagine(make_real, make_world_model(ends=ends))
        step = env.rollout(1)[0]["next"]
        for key in ("terminated", "done", "success"):
            assert step[key].item() is ends, key
        assert not step["truncated"]

    def test_no_time_limit(self, make_world_model):
        real = OGBenchEnv(NAME, env_kwargs={"max_episode_steps": 2})
        assert len(imagine(real, make_world_model(ends=False)).rollout(6)) == 6

    def test_resets_in_reality_when_imagination_ends(self, make_world_model):
        real = make_real()
        rollout = imagine(real, make_world_model(ends=True)).rollout(3, break_when_any_done=False)
        starts = rollout["observation"]
        assert not torch.equal(starts[1], rollout["next", "observation"][0])
        assert len(starts.unique(dim=0)) == 3

    def test_partial_reset(self, make_world_model):
        env = imagine(SerialEnv(2, make_real), make_world_model(ends=False))
        before = env.step_mdp(env.rand_step(env.reset()))
        after = env.reset(before.clone().set("_reset", torch.tensor([[True], [False]])))
        kept = (after["observation"] == before["observation"]).all(-1)
        assert kept.tolist() == [False, True]

    def test_acts_with_rejection_sampling(self, make_world_model):
        dim, num_candidates = CHUNK_SIZE * 2, 4
        actor = FlowRejectionActor(
            OneStepPolicy(NormedMLP(2 + dim, dim, num_cells=(16,)), dim),
            ValueOperator(
                NormedMLP(2 + dim, 1, num_cells=(16,)), in_keys=["observation", "action"]
            ),
            num_candidates=num_candidates,
            chunk_size=CHUNK_SIZE,
        )
        world_model = make_world_model(ends=False)
        real = make_real()
        start = real.reset().set("noise", torch.randn(num_candidates, dim))
        rollouts = [
            env.rollout(4, actor, tensordict=start.clone(), auto_reset=False)
            for env in (
                imagine(real, world_model),
                ChunkedWorldModelEnv.from_env(world_model, real, chunk_size=CHUNK_SIZE),
            )
        ]
        for key in ("action", "chosen_action_value", ("next", "observation"), ("next", "reward")):
            torch.testing.assert_close(rollouts[0][key], rollouts[1][key])
        seeded = []
        for _ in range(2):
            torch.manual_seed(0)
            td = start.exclude("noise")
            seeded.append(
                imagine(real, world_model).rollout(4, actor, tensordict=td, auto_reset=False)
            )
        assert (seeded[0] == seeded[1]).all()


class TestChain:
    def test_same_calls_as_reality(self, make_world_model):
        # One transform is swapped and nothing else, neither the policy nor what reads the result.
        chunks = torch.rand(3, CHUNK_SIZE, 2)
        rollouts = []
        for transform in (
            MultiAction(dim=1, stack_rewards=False),
            make_transform(make_world_model(ends=False)),
        ):
            env = TransformedEnv(make_real(), Compose(transform, RewardSum(), StepCounter()))
            env.set_seed(0)
            policy = TensorDictModule(partial(next, iter(chunks)), in_keys=[], out_keys=["action"])
            rollouts.append(env.rollout(3, policy))
        real, imagined = rollouts
        assert set(real.keys(True)) == set(imagined.keys(True))
        assert torch.equal(real[0]["observation"], imagined[0]["observation"])
        for key, value in real.items(True, True):
            assert imagined[key].shape == value.shape and imagined[key].dtype == value.dtype

    def test_on_both_sides(self, make_world_model):
        world_model = make_world_model(ends=False)
        env = TransformedEnv(
            forbid_steps(make_real()),
            Compose(
                ObservationNorm(loc=1.0, scale=0.1, in_keys=["observation"]),
                StepCounter(max_steps=4),
                make_transform(world_model),
                RewardSum(),
                InitTracker(),
            ),
        )
        check_env_specs(env)
        env.set_seed(0)
        rollout = env.rollout(10)
        assert len(rollout) == 4  # the truncation of a transform before this one counts
        assert rollout["next", "truncated"][-1] and rollout["next", "done"][-1]
        real = make_real()
        real.set_seed(0)
        observation = real.reset()["observation"] * 0.1 + 1
        rewards = []
        for step in rollout.unbind(0):
            torch.testing.assert_close(step["observation"], observation)
            observation, reward, _ = expected(world_model, observation, step["action"])
            rewards.append(reward)
        torch.testing.assert_close(
            rollout["next", "episode_reward"], torch.stack(rewards).cumsum(0)
        )

    def test_model_sees_the_policys_action(self, make_world_model):
        # An action transform before this one speaks to the simulator, not to the model.
        world_model = make_world_model(ends=False)

        class Halve(Transform):
            def _inv_call(self, tensordict: TensorDict) -> TensorDict:
                return tensordict.set("action", tensordict["action"] / 2)

        env = TransformedEnv(make_real(), Compose(Halve(), make_transform(world_model)))
        step = env.rollout(1)[0]
        observation, _, _ = expected(world_model, step["observation"], step["action"])
        torch.testing.assert_close(step["next", "observation"], observation)

    @pytest.mark.parametrize("how", ["append", "insert", "append_to_one", "wrap", "clone", "deep"])
    def test_attached(self, make_world_model, how):
        real, transform = forbid_steps(make_real()), make_transform(make_world_model(ends=False))
        if how == "append":
            env = TransformedEnv(real, Compose(StepCounter())).append_transform(transform)
        elif how == "insert":
            env = TransformedEnv(real, Compose(StepCounter())).insert_transform(0, transform)
        elif how == "append_to_one":
            env = TransformedEnv(real, transform).append_transform(StepCounter())
        elif how == "wrap":
            env = TransformedEnv(TransformedEnv(real, transform), StepCounter(), auto_unwrap=True)
        elif how == "clone":
            first = TransformedEnv(real, transform)
            env = TransformedEnv(real, Compose(first.transform.clone(), StepCounter()))
        else:
            env = TransformedEnv(real, Compose(Compose(transform), StepCounter()))
        check_env_specs(env)
        assert env.rollout(3)["action"].shape == (3, CHUNK_SIZE, 2)

    @pytest.mark.parametrize("how", ["replace", "pop"])
    def test_removed(self, make_world_model, how):
        real = make_real()
        env = TransformedEnv(real, Compose(StepCounter(), make_transform(make_world_model())))
        env.rollout(2)
        if how == "replace":
            env.transform = StepCounter()
        else:
            env.transform.pop()
        env.empty_cache()
        check_env_specs(env)
        td = env.reset()
        moved = env.step(td.clone().set("action", torch.ones(2)))["next", "observation"]
        torch.testing.assert_close(
            moved - td["observation"], torch.full((2,), 0.2), atol=1e-4, rtol=0
        )

    def test_leaves_the_real_env_alone(self, make_world_model):
        real = make_real()
        env = imagine(real, make_world_model())
        env.rollout(2)
        check_env_specs(real)
        assert real.rollout(2)["action"].shape == (2, 2)
        assert env.task_id == real.task_id

    def test_leaves_the_model_alone(self, make_world_model):
        world_model = make_world_model(ends=False).train()
        transform = make_transform(world_model)
        env = TransformedEnv(make_real(), transform)
        assert transform.world_model is world_model
        assert transform.clone().world_model is world_model
        assert world_model.training
        assert not list(env.parameters())
        with torch.no_grad():  # trained weights count from the next step on
            world_model.reward_network.layers[-1].weight.zero_()
            world_model.reward_network.layers[-1].bias.fill_(3.0)
        assert (env.rollout(2)["next", "reward"] == 3).all()

    def test_closes_the_real_env(self, make_world_model):
        real = make_real()
        imagine(real, make_world_model()).close()
        assert real.is_closed


class _NestedEnv(EnvBase):
    """An environment all of whose entries are nested; it counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.steps = 0
        self.observation_spec = Composite(agent=Composite(state=Unbounded(2), won=flag))
        self.full_action_spec = Composite(agent=Composite(chunk=Bounded(-1, 1, shape=(2,))))
        self.full_reward_spec = Composite(agent=Composite(gain=Unbounded(1)))
        self.full_done_spec = Composite(
            agent=Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone())
        )

    def _reset(self, tensordict: TensorDict | None = None, **kwargs) -> TensorDict:
        return self.full_observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDict) -> TensorDict:
        self.steps += 1
        return self.full_observation_spec.rand().update(self.full_done_spec.zero())

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed)


if __name__ == "__main__":
    pytest.main([__file__])
