"""What TorchRL expects of environments and transforms, where a world model answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    ParallelEnv,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from torchrl_mac.envs import ChunkedWorldModelEnv, ChunkedWorldModelTransform, imagine
from torchrl_mac.modules import ChunkedWorldModel, NormedMLP, OneStepPolicy, PolicyActor

OBS, A, H = 2, 2, 5
ACTION = Bounded(-1, 1, shape=(A,))
ALL = {"observation", "reward", "done", "terminated", "termination_logit"}


def make_env(world_model, observation=None, **kwargs) -> ChunkedWorldModelEnv:
    spec = Unbounded(OBS) if observation is None else observation
    return ChunkedWorldModelEnv(world_model, spec, ACTION, chunk_size=H, **kwargs)


class Real(EnvBase):
    """A simulator with bounds on all it says."""

    def __init__(self, dtype=torch.float32, device=None, batch_size=()):
        super().__init__(device=device, batch_size=batch_size)
        shape = self.batch_size
        self.observation_spec = Composite(
            observation=Bounded(-1, 1, (*shape, OBS), dtype=dtype), shape=shape
        )
        self.action_spec = Bounded(-1, 1, (*shape, A))
        self.reward_spec = Bounded(0, 1, (*shape, 1), dtype=torch.float32)

    def _reset(self, tensordict=None, **kwargs):
        return self.full_observation_spec.rand().update(self.full_done_spec.zero())

    def _step(self, tensordict):
        out = self.full_observation_spec.rand().update(self.full_done_spec.zero())
        return out.update(self.full_reward_spec.rand())

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class TestSelection:
    """Rollouts need all that a model predicts, whichever of it a call of the model returns."""

    KEPT = ("next", "observation"), ("next", "terminated")

    def test_environment(self, make_world_model):
        model = make_world_model(ends=False)
        env, start = make_env(model), TensorDict(observation=torch.randn(3, OBS), batch_size=[3])
        step = env.rand_action(env.reset(start.clone(), set_state=True))
        whole = env.step(step.clone())
        model.select_out_keys(*self.KEPT)
        check_env_specs(env)
        assert (env.step(step.clone()) == whole).all()
        model.reset_out_keys()
        assert (env.step(step.clone()) == whole).all()

    def test_transform(self, make_world_model):
        model = make_world_model(ends=False)
        model.select_out_keys(*self.KEPT)
        env = TransformedEnv(Real(), ChunkedWorldModelTransform(model, chunk_size=H))
        check_env_specs(env)
        step = env.rollout(1)[0]
        inputs = torch.cat([step["observation"], step["action"].flatten()], -1)
        torch.testing.assert_close(step["next", "reward"], model.reward_network(inputs))

    def test_imagination(self, make_world_model):
        """As with a call of the model, what was not chosen is not there."""
        model = make_world_model(ends=False)
        actor = PolicyActor(OneStepPolicy(NormedMLP(OBS + H * A, H * A, [8]), H * A), chunk_size=H)
        start = TensorDict(observation=torch.randn(3, OBS), extra=torch.ones(3), batch_size=[3])
        noise = torch.randn(3, 4, H * A)
        whole = imagine(actor, model, start, 4, noise=noise)
        assert set(whole["next"].keys()) == ALL
        for kept in (["observation", "reward"], ["reward"]):
            model.select_out_keys(*(("next", key) for key in kept))
            part = imagine(actor, model, start, 4, noise=noise)
            assert set(part["next"].keys()) == set(kept)
            for key in ("observation", "action", "extra", *(("next", key) for key in kept)):
                torch.testing.assert_close(part[key], whole[key])
            model.reset_out_keys()
        assert set(imagine(actor, model, start, 4)["next"].keys()) == ALL

    def test_imagination_with_any_module(self):
        """TorchRL's own selection drops the entries of others; the rollout keeps them."""
        model = TensorDictModule(
            lambda s, a: (s + a, a), ["observation", "action"], [("next", "observation"), "more"]
        )
        model.select_out_keys(("next", "observation"))
        actor = TensorDictModule(lambda s, g: g - s, ["observation", "goal"], ["action"])
        start = TensorDict(observation=torch.zeros(3, 2), goal=torch.ones(3, 2), batch_size=[3])
        rollout = imagine(actor, model, start, 2)
        assert (rollout["next", "observation"] == 1).all()
        assert "more" not in rollout.keys() and (rollout["goal"] == 1).all()


class TestSeed:
    def test_random_starts(self, make_world_model):
        for batch_size in ((), (3,)):
            env = make_env(make_world_model(), batch_size=batch_size)
            starts = []
            for seed in (0, 0, 1):
                torch.rand(seed + 2)
                env.set_seed(seed)
                before = torch.get_rng_state()
                starts.append([env.reset()["observation"] for _ in range(2)])
                assert torch.equal(torch.get_rng_state(), before)
            assert all(map(torch.equal, starts[0], starts[1]))
            assert not torch.equal(starts[0][0], starts[0][1])
            assert not torch.equal(starts[0][0], starts[2][0])

    @pytest.mark.parametrize("stored", [False, True])
    def test_without_a_seed_the_global_generator_counts(self, make_world_model, stored):
        states = TensorDict(observation=torch.randn(100, OBS), batch_size=[100])
        starts = []
        for seed in (0, 0, 1):
            env = make_env(make_world_model(), reset_from=states if stored else None)
            torch.manual_seed(seed)
            starts.append(env.reset(TensorDict(batch_size=[8]))["observation"])
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])

    def test_in_a_batched_environment(self, make_world_model):
        env = SerialEnv(2, partial(make_env, make_world_model()))
        starts = []
        for _ in range(2):
            env.set_seed(3)
            starts.append(env.reset()["observation"])
        assert torch.equal(*starts) and not torch.equal(*starts[0])


class TestDtype:
    def test_environment(self, make_world_model):
        model = make_world_model().double()
        for reward in ({}, {"negative_reward": True}):
            model.negative_reward = reward.get("negative_reward")
            env = make_env(model, Unbounded(OBS, dtype=torch.float64))
            check_env_specs(env)
            assert env.reward_spec.dtype == torch.float64
            assert env.rollout(2)["next", "reward"].dtype == torch.float64

    def test_transform(self, make_world_model):
        """The reward keeps the type that it has in reality."""
        real = Real(dtype=torch.float64)
        transform = ChunkedWorldModelTransform(make_world_model().double(), chunk_size=H)
        env = TransformedEnv(real, transform)
        check_env_specs(env)
        step = env.rollout(2)["next"]
        assert step["reward"].dtype == torch.float32 and step["observation"].dtype == torch.float64

    def test_transform_behind_a_cast(self, make_world_model):
        transform = ChunkedWorldModelTransform(make_world_model(), chunk_size=H)
        env = TransformedEnv(
            Real(dtype=torch.float64), Compose(DoubleToFloat(["observation"]), transform)
        )
        check_env_specs(env)


class TestBounds:
    """A prediction may leave the bounds of reality, so the specs do not promise them."""

    @pytest.mark.parametrize("batch_size", [(), (3,)])
    def test_environment(self, make_world_model, batch_size):
        bounded = Bounded(-0.1, 0.1, shape=(OBS,))
        env = make_env(make_world_model(), bounded, batch_size=batch_size)
        check_env_specs(env)
        shape = (*batch_size, OBS)
        for spec in (env.full_observation_spec, env.full_state_spec):
            assert spec["observation"] == Unbounded(shape, dtype=torch.float32)
        rollout = env.rollout(20, break_when_any_done=False)
        assert (rollout["next", "observation"].abs() > 0.1).any()
        for _ in range(10):
            assert (env.reset()["observation"].abs() <= 0.1).all()  # starts are as they were

    def test_what_is_not_predicted_keeps_its_bounds(self, make_world_model):
        spec = Composite(observation=Bounded(-1, 1, (OBS,)), goal=Bounded(-1, 1, (3,)))
        env = make_env(make_world_model(), spec)
        check_env_specs(env)
        assert env.observation_spec["goal"] == spec["goal"]

    @pytest.mark.parametrize("batch_size", [(), (3,)])
    def test_transform(self, make_world_model, batch_size):
        real = Real(batch_size=batch_size)
        env = TransformedEnv(real, ChunkedWorldModelTransform(make_world_model(), chunk_size=H))
        check_env_specs(env)
        assert env.observation_spec["observation"] == Unbounded((*batch_size, OBS))
        assert env.reward_spec == Unbounded((*batch_size, 1))
        assert isinstance(real.observation_spec["observation"], Bounded)

    @pytest.mark.parametrize("kind", ["env", "transform", "serial", "parallel"])
    def test_pendulum(self, make_world_model, kind):
        model = make_world_model(3, 1, ends=False)
        make = partial(GymEnv, "Pendulum-v1")
        if kind == "env":
            env = ChunkedWorldModelEnv.from_env(model, make(), chunk_size=H)
        else:
            real = make() if kind == "transform" else SerialEnv(2, make)
            if kind == "parallel":
                real = ParallelEnv(2, make, mp_start_method="fork")
            env = TransformedEnv(real, ChunkedWorldModelTransform(model, chunk_size=H))
        try:
            check_env_specs(env)
            assert env.rollout(4, break_when_any_done=False).shape[-1] == 4
        finally:
            env.close(raise_if_closed=False)


class TestOutsideAnEnvironment:
    def test_a_call_is_refused(self, make_world_model):
        data = TensorDict(
            observation=torch.randn(3, OBS), action=torch.randn(3, H, A), batch_size=[3]
        )
        for wrap in (lambda it: it, Compose):
            transform = wrap(ChunkedWorldModelTransform(make_world_model(), chunk_size=H))
            for use in (transform, transform.inv):
                with pytest.raises(RuntimeError, match="without a parent environment"):
                    use(data.clone())

    def test_a_replay_buffer_stores_nothing_private(self, make_world_model):
        data = TensorDict(
            observation=torch.randn(3, OBS), action=torch.randn(3, H, A), batch_size=[3]
        )
        for wrap in (lambda it: it, lambda it: Compose(StepCounter(), it)):
            transform = wrap(ChunkedWorldModelTransform(make_world_model(), chunk_size=H))
            buffer = ReplayBuffer(storage=LazyTensorStorage(10), transform=transform, batch_size=2)
            with pytest.raises(RuntimeError, match="without a parent environment"):
                buffer.extend(data)
            assert len(buffer) == 0

    def test_even_when_it_has_been_in_one(self, make_world_model):
        transform = ChunkedWorldModelTransform(make_world_model(), chunk_size=H)
        env = TransformedEnv(Real(), transform)
        step = env.rollout(1)
        with pytest.raises(RuntimeError, match="without a parent environment"):
            transform(step)
        assert not any(str(key).startswith("_") for key in step.keys(True))


def test_a_reward_of_another_type(make_world_model):
    """A subclass may say its reward in another type than its state."""

    class Half(ChunkedWorldModel):
        def predict_outcome(self, tensordict):
            out = super().predict_outcome(tensordict)
            return out.set(("next", "reward"), out["next", "reward"].half())

    base = make_world_model()
    model = Half(base.dynamics_network, base.reward_network, base.termination_network)
    check_env_specs(make_env(model))


if __name__ == "__main__":
    pytest.main([__file__])
