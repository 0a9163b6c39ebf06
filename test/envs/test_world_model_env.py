from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import ValueOperator

from torchrl_mac.envs import ChunkedWorldModelEnv, OGBenchEnv
from torchrl_mac.modules import ChunkedWorldModel, FlowRejectionActor, NormedMLP, OneStepPolicy

CHUNK_SIZE = 5
ACTION = Bounded(-1, 1, shape=(2,))
SUCCESS = Categorical(2, shape=(1,), dtype=torch.bool)


def make_env(world_model: ChunkedWorldModel, **kwargs) -> ChunkedWorldModelEnv:
    return ChunkedWorldModelEnv(
        world_model, Unbounded(2), ACTION, **{"chunk_size": CHUNK_SIZE, **kwargs}
    )


def make_actor(num_candidates: int = 4) -> FlowRejectionActor:
    torch.manual_seed(1)
    dim = CHUNK_SIZE * 2
    return FlowRejectionActor(
        OneStepPolicy(NormedMLP(2 + dim, dim, num_cells=(16,)), dim),
        ValueOperator(NormedMLP(2 + dim, 1, num_cells=(16,)), in_keys=["observation", "action"]),
        num_candidates=num_candidates,
        chunk_size=CHUNK_SIZE,
    )


def step_loop(env: EnvBase, actor: FlowRejectionActor, start: TensorDict, noise: torch.Tensor):
    """The loop that goes inside a loss; ``noise`` is ``[steps, *, N, D]``."""
    td, steps = start, []
    for step_noise in noise.unbind(0):
        td = env.step(actor(td.set("noise", step_noise)))
        steps.append(td)
        td = env.step_mdp(td)
    return torch.stack([step["next", "observation"] for step in steps], -2), torch.stack(
        [step["next", "reward"] for step in steps], -2
    )


class TestSpecs:
    @pytest.mark.parametrize("batch_size", [(), (3,), (2, 3)])
    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_specs(self, make_world_model, batch_size, device):
        env = make_env(make_world_model(), batch_size=batch_size, device=device)
        check_env_specs(env)
        assert env.action_spec.shape == (*batch_size, CHUNK_SIZE, 2)
        assert (env.action_spec.space.high == 1).all()

    @pytest.mark.parametrize("batch_size", [(), (3,)])
    def test_nested_keys(self, make_world_model, nested_keys, batch_size):
        spec = Composite(
            {("agent", "state"): Unbounded(2), "goal": Unbounded(3), ("agent", "won"): SUCCESS}
        )
        env = ChunkedWorldModelEnv(
            make_world_model(ends=True, **nested_keys),
            spec,
            ACTION,
            chunk_size=CHUNK_SIZE,
            success_key=("agent", "won"),
            batch_size=batch_size,
        )
        check_env_specs(env)
        assert env.action_keys == [("agent", "chunk")]
        rollout = env.rollout(2)
        assert rollout.shape == (*batch_size, 1)  # ended at once
        torch.testing.assert_close(rollout["next", "goal"], rollout["goal"])
        assert rollout["next", "agent", "won"].all()
        assert not rollout["agent", "won"].any()

    def test_serial(self, make_world_model):
        check_env_specs(SerialEnv(2, partial(make_env, make_world_model())))

    @pytest.mark.skipif(importlib.util.find_spec("ogbench") is None, reason="needs OGBench")
    @pytest.mark.parametrize("batched", [False, True])
    def test_from_env(self, make_world_model, batched):
        make = partial(OGBenchEnv, "pointmaze-medium-navigate-v0")
        real = SerialEnv(2, make) if batched else make()
        env = ChunkedWorldModelEnv.from_env(
            make_world_model(ends=False), real, chunk_size=CHUNK_SIZE
        )
        check_env_specs(env)
        start = real.reset()
        imagined = env.rollout(3, tensordict=start.clone(), set_state=True)
        torch.testing.assert_close(imagined["observation"][..., 0, :], start["observation"])
        for step in range(3):
            torch.testing.assert_close(imagined["next", "goal"][..., step, :], start["goal"])
        assert not imagined["next", "success"].any()

    def test_errors(self, make_world_model):
        with pytest.raises(ValueError, match="chunk_size"):
            make_env(make_world_model(), chunk_size=0)
        with pytest.raises(KeyError, match="state"):
            ChunkedWorldModelEnv(
                make_world_model(observation_key="state"),
                Composite(observation=Unbounded(2)),
                ACTION,
                chunk_size=CHUNK_SIZE,
            )


class TestStep:
    @pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
    def test_matches_hand_loop(self, make_world_model, batch_size):
        world_model = make_world_model(ends=False)
        start = TensorDict(observation=torch.randn(*batch_size, 2), batch_size=batch_size)
        imagined = make_env(world_model).rollout(
            6, make_actor(), tensordict=start.clone(), set_state=True
        )
        assert imagined.shape == (*batch_size, 6)
        observation = start["observation"]
        for step in imagined.unbind(-1):
            chunk = step["action"]
            inputs = torch.cat([observation, chunk.flatten(-2)], -1)
            reward = world_model.reward_network(inputs)
            observation = observation + world_model.dynamics_network(inputs)
            torch.testing.assert_close(step["next", "observation"], observation)
            torch.testing.assert_close(step["next", "reward"], reward)

    def test_rollout_equals_step_loop(self, make_world_model):
        env, actor = make_env(make_world_model(ends=False)), make_actor()
        start = TensorDict(observation=torch.randn(3, 2), batch_size=[3])
        noise = torch.randn(4, 3, 4, CHUNK_SIZE * 2)
        steps = iter(noise)

        def policy(td: TensorDict) -> TensorDict:
            return actor(td.set("noise", next(steps)))

        td = env.reset(start.clone(), set_state=True)
        imagined = env.rollout(4, policy, tensordict=td, auto_reset=False)
        observation, reward = step_loop(env, actor, start.clone(), noise)
        torch.testing.assert_close(imagined["next", "observation"], observation)
        torch.testing.assert_close(imagined["next", "reward"], reward)

    def test_compiles_without_breaks(self, make_world_model):
        env, actor = make_env(make_world_model()), make_actor()
        start = TensorDict(observation=torch.randn(3, 2), batch_size=[3])
        noise = torch.randn(2, 3, 4, CHUNK_SIZE * 2)
        compiled = torch.compile(step_loop, fullgraph=True, backend="eager")
        imagined = compiled(env, actor, start.clone(), noise)
        torch.testing.assert_close(imagined, step_loop(env, actor, start.clone(), noise))

    def test_termination(self, make_world_model):
        env = make_env(make_world_model(ends=True))
        start = TensorDict(observation=torch.randn(3, 2), batch_size=[3])
        imagined = env.rollout(5, tensordict=start, set_state=True)
        assert imagined.shape == (3, 1)
        assert imagined["next", "terminated"].all() and imagined["next", "done"].all()

    def test_shares_and_trains_the_model(self, make_world_model):
        world_model = make_world_model(ends=False)
        env = make_env(world_model)
        assert env.world_model is world_model
        env.rollout(2)["next", "reward"].sum().backward()
        for name, parameter in world_model.named_parameters():
            assert (parameter.grad is None) == name.startswith("termination"), name


class TestReset:
    def test_stored_states(self, make_world_model):
        states = TensorDict(observation=torch.arange(20.0).view(10, 2), batch_size=[10])
        env = make_env(make_world_model(), reset_from=states)
        check_env_specs(env)
        draws = []
        for seed in (0, 0, 1):
            env.set_seed(seed)
            torch.rand(seed + 3)  # the draw is the environment's own
            start = env.reset(TensorDict(batch_size=[6]))["observation"]
            assert (start[:, None] == states["observation"]).all(-1).any(-1).all()
            draws.append(start)
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert env.reset().shape == ()

    @pytest.mark.parametrize("batch_size", [(), (3,), (2, 3)])
    def test_replay_buffer(self, make_world_model, batch_size):
        buffer = ReplayBuffer(storage=LazyTensorStorage(5))
        buffer.extend(
            TensorDict(
                observation=torch.full((5, 2), 7.0), reward=torch.zeros(5, 1), batch_size=[5]
            )
        )
        env = make_env(make_world_model(), reset_from=buffer.sample, batch_size=batch_size)
        check_env_specs(env)
        start = env.reset()
        assert (start["observation"] == 7).all()
        assert start.shape == batch_size
        assert "reward" not in start

    def test_partial(self, make_world_model):
        env = make_env(make_world_model(ends=False), batch_size=(2,))
        before = env.step_mdp(env.rand_step(env.reset()))
        asked = before.clone().set("_reset", torch.tensor([[True], [False]]))
        after = env.reset(asked, set_state=False)
        kept = (after["observation"] == before["observation"]).all(-1)
        assert kept.tolist() == [False, True]

    def test_start_must_be_complete(self, make_world_model):
        with pytest.raises(KeyError, match="observation"):
            make_env(make_world_model()).reset(TensorDict(batch_size=[2]), set_state=True)


if __name__ == "__main__":
    pytest.main([__file__])
