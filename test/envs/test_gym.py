from __future__ import annotations

import pickle

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from torchrl_mac.envs import GymnasiumEnv, OGBenchEnv, env_maker
from torchrl_mac.modules import NormedMLP, OneStepPolicy, PolicyActor
from torchrl_mac.trainers import EpisodeEvaluator


def test_specs():
    env = GymnasiumEnv("Pendulum-v1")
    check_env_specs(env)
    assert env.observation_spec["observation"].dtype == torch.float32
    assert env.action_spec.space.low == -1 and env.action_spec.space.high == 1
    assert "success" not in env.observation_spec.keys()


def test_actions_are_fractions_of_the_environments_bounds():
    raw, env = gymnasium.make("Pendulum-v1"), GymnasiumEnv("Pendulum-v1")
    first, _ = raw.reset(seed=3)
    env.set_seed(3)
    td = env.reset(seed=3)
    assert np.array_equal(first, td["observation"].numpy())
    for action in (0.25, -1.0, 1.0):
        td["action"] = torch.tensor([action])
        following = env.step(td)["next"]
        observation, reward, *_ = raw.step(np.array([2 * action], np.float32))
        np.testing.assert_allclose(following["observation"].numpy(), observation, rtol=1e-5)
        np.testing.assert_allclose(following["reward"].item(), reward, rtol=1e-5)
        td = following


def test_observations_of_double_precision():
    env = GymnasiumEnv("MountainCarContinuous-v0", env_kwargs={"max_episode_steps": 2})
    assert env.rollout(5)["next", "observation"].dtype == torch.float32
    assert len(env.rollout(5)) == 2


def test_what_evaluates_a_dataset():
    name = "pointmaze-medium-navigate-singletask-task1-v0"
    make = pickle.loads(pickle.dumps(env_maker(name)))
    assert isinstance(make(), OGBenchEnv)
    make = pickle.loads(pickle.dumps(env_maker("pendulum-replay", "Pendulum-v1")))
    assert isinstance(make(), GymnasiumEnv)


def test_episodes_have_a_return_and_no_success():
    policy = OneStepPolicy(NormedMLP(3 + 1, 1, [8]), 1)
    actor = PolicyActor(policy, chunk_size=1)
    settings = {"num_episodes": 3, "num_envs": 2}
    evaluator = EpisodeEvaluator(env_maker("", "Pendulum-v1"), actor, **settings)
    metrics = evaluator()
    assert metrics.keys() == {"episode_return", "episode_length"}
    assert metrics["episode_length"] == 200 and -2000 < metrics["episode_return"] < 0
    assert evaluator() == metrics
    evaluator.close()


if __name__ == "__main__":
    pytest.main([__file__])
