from __future__ import annotations

import copy
import json

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs import Compose, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules import MultiStepActorWrapper

from torchrl_mac.envs import OGBenchEnv, ResumableEpisodes

POINTMAZE = "pointmaze-medium-navigate-singletask-v0"
KEYS = ["observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done")]


def make_env(name=POINTMAZE, seed=3, length=9, **kwargs):
    def make():
        limit = {"max_episode_steps": length}
        return OGBenchEnv(name, env_kwargs={**limit, **kwargs})

    transforms = Compose(InitTracker(), ResumableEpisodes(seed))
    return TransformedEnv(SerialEnv(1, make), transforms)


def make_policy(env, h=4):
    """Chunks that depend on where they begin, with noise."""
    width = env.action_spec.shape[-1]

    def chunk(observation):
        noise = torch.rand(*observation.shape[:-1], h, width)
        return (observation.sum(-1)[..., None, None] * 7 + noise).sin()

    actor = TensorDictModule(chunk, ["observation"], ["action"])
    return MultiStepActorWrapper(actor, n_steps=h, action_keys=["action"])


def steps(env, policy, count, state=None):
    """So many steps, over the ends of episodes; and what comes then."""
    state, found = env.reset() if state is None else state, []
    for _ in range(count):
        step, state = env.step_and_maybe_reset(policy(state))
        found.append(step.select(*KEYS).clone())
    return torch.stack(found), state


def through_a_file(state):
    """As a checkpoint holds it: tensors, and what JSON knows."""
    json.dumps(state["episode"])
    assert all(isinstance(value, torch.Tensor) for value in state["actions"])
    assert all(isinstance(value, torch.Tensor) for value in state["kept"].values())
    return copy.deepcopy(state)


# in an episode and chunk, between chunks, at an episode's beginning, and in a later one
@pytest.mark.parametrize("left_after", [1, 4, 9, 14, 21])
def test_it_goes_on_bit_equal(left_after):
    torch.manual_seed(0)
    env = make_env()
    policy = make_policy(env)
    _, state = steps(env, policy, left_after)
    kept, rng = through_a_file(env.transform[1].state_dict()), torch.get_rng_state()
    expected, _ = steps(env, policy, 15, state)

    other = make_env()
    other.transform[1].load_state_dict(kept)
    torch.set_rng_state(rng)
    resumed = other.reset()
    assert "action" not in resumed.keys() and bool(resumed["is_init"]) == (left_after % 9 == 0)
    found, _ = steps(other, make_policy(other), 15, resumed)
    assert (found == expected).all()
    assert other.transform[1].episode == env.transform[1].episode == (left_after + 15) // 9


@pytest.mark.slow
def test_it_goes_on_bit_equal_in_mujoco():
    name = "cube-single-play-singletask-task2-v0"
    torch.manual_seed(0)
    env = make_env(name, length=30)
    policy = make_policy(env, 5)
    _, state = steps(env, policy, 47)
    kept, rng = env.transform[1].state_dict(), torch.get_rng_state()
    expected, _ = steps(env, policy, 30, state)
    other = make_env(name, length=30)
    other.transform[1].load_state_dict(kept)
    torch.set_rng_state(rng)
    found, _ = steps(other, make_policy(other, 5), 30)
    assert (found == expected).all()


def test_an_episode_does_not_depend_on_those_before():
    def start_of_third(actions):
        env = make_env()
        state, episode = env.reset(), env.transform[1]
        while episode.episode < 2:
            state = env.step_and_maybe_reset(state.set("action", actions(state)))[1]
        return state["observation"]

    still = start_of_third(lambda state: torch.zeros(1, 2))
    torch.manual_seed(1)
    moving = start_of_third(lambda state: torch.rand(1, 2) * 2 - 1)
    assert torch.equal(still, moving)
    assert not torch.equal(make_env(seed=3).reset()["observation"], still)
    assert not torch.equal(make_env(seed=4).reset()["observation"], still)


def test_a_state_that_was_not_taken_up_is_kept():
    env = make_env()
    torch.manual_seed(0)
    steps(env, make_policy(env), 6)
    kept = env.transform[1].state_dict()
    other = make_env()
    other.transform[1].load_state_dict(kept)
    again = other.transform[1].state_dict()
    assert again["episode"] == kept["episode"]
    assert all(torch.equal(a, b) for a, b in zip(again["actions"], kept["actions"], strict=True))
    assert again["kept"].keys() == kept["kept"].keys() == {"action_orig", "counter"}


def test_resets_leave_the_random_numbers_alone():
    env = make_env()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    env.reset()
    assert torch.equal(torch.rand(3), expected)


def test_specs_hold():
    transforms = Compose(InitTracker(), ResumableEpisodes())
    check_env_specs(TransformedEnv(OGBenchEnv(POINTMAZE), transforms))


def test_a_batch_of_several_is_refused():
    env = TransformedEnv(SerialEnv(2, lambda: OGBenchEnv(POINTMAZE)), ResumableEpisodes())
    with pytest.raises(ValueError, match="takes one environment"):
        env.reset()


if __name__ == "__main__":
    pytest.main([__file__])
