from __future__ import annotations

import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import ValueOperator

from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy
from torchrl_mac.trainers import EpisodeEvaluator, Evaluation

H, A = 4, 2


class Walk(EnvBase):
    """Ends with success once the actions add up to its length; is truncated after 9 steps."""

    def __init__(self, length=1.0):
        super().__init__()
        self.length = length
        flag = Categorical(2, shape=(1,), dtype=torch.bool)
        self.observation_spec = Composite(observation=Unbounded(2), success=flag)
        self.action_spec = Bounded(-1, 1, (A,))
        self.reward_spec = Unbounded(1)
        self.full_done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone()
        )
        self.generator = torch.Generator()
        self.seen = []

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _reset(self, tensordict=None, **kwargs):
        self.steps = 0
        self.end = self.length * kwargs.get("options", {}).get("task_id", 1)
        self.at = torch.rand(1, generator=self.generator)
        self.seen.append(self.at.item())
        return TensorDict(
            observation=torch.cat([self.at, torch.zeros(1)]), success=torch.zeros(1).bool()
        )

    def _step(self, tensordict):
        self.steps += 1
        self.at = self.at + tensordict["action"][..., :1]
        success = self.at >= self.end
        return TensorDict(
            observation=torch.cat([self.at, torch.tensor([self.steps / 10])]),
            success=success,
            reward=success.float() - 1,
            terminated=success,
            truncated=torch.tensor([self.steps == 9]),
            done=success | (self.steps == 9),
        )


class Stub(nn.Module):
    """A policy that always writes the same chunk, and counts how often it is asked."""

    def __init__(self, pace):
        super().__init__()
        self.pace, self.asked = pace, 0

    def forward(self, x):
        self.asked += 1
        return torch.full((*x.shape[:-1], H * A), self.pace)


def make(pace, **kwargs):
    stub = Stub(pace)
    qvalue = ValueOperator(NormedMLP(2 + H * A, 1, [4]), in_keys=["observation", "action"])
    actor = FlowRejectionActor(OneStepPolicy(stub, H * A), qvalue, num_candidates=3, chunk_size=H)
    return EpisodeEvaluator(Walk, actor, **kwargs), stub


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_success_return_and_length(num_envs):
    evaluator, _ = make(0.25, num_episodes=5, num_envs=num_envs, seed=3)
    metrics = evaluator()
    rounds = -(-5 // num_envs)
    starts = [env.seen[-rounds:] for env in evaluator._runner._env.base_env._envs]
    starts = [start for group in zip(*starts, strict=True) for start in group][:5]
    lengths = torch.tensor([-(-(1 - start) // 0.25) for start in starts])
    assert metrics["success_rate"] == 1.0
    assert metrics["episode_length"] == pytest.approx(lengths.mean().item())
    assert metrics["episode_return"] == pytest.approx((1 - lengths).mean().item())


def test_several_tasks():
    evaluator, _ = make(0.25, num_episodes=4, num_envs=2, seed=3)
    alone = evaluator()
    evaluator.task_ids = [1, 4]
    metrics = evaluator()
    assert {f"task1/{name}" for name in alone} < set(metrics)
    assert all(metrics[f"task1/{name}"] == value for name, value in alone.items())
    assert metrics["task4/success_rate"] == 0.0 and metrics["success_rate"] == 0.5
    assert metrics["episode_length"] == (metrics["task1/episode_length"] + 9) / 2
    assert evaluator() == metrics


def random_actor():
    network = NormedMLP(2 + H * A, H * A, [4])
    torch.nn.init.constant_(network.layers[-1].bias, 0.4)  # walks, mostly ahead
    policy = OneStepPolicy(network, H * A)
    qvalue = ValueOperator(NormedMLP(2 + H * A, 1, [4]), in_keys=["observation", "action"])
    return FlowRejectionActor(policy, qvalue, num_candidates=3, chunk_size=H)


def test_the_parameters_of_another_time_can_be_measured():
    evaluator, _ = make(0.25, num_episodes=4, num_envs=2)
    actor = evaluator.actor = evaluator._runner.actor = random_actor()
    then, before = evaluator(), {k: v.clone() for k, v in actor.state_dict().items()}
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(-1)
    now = evaluator()
    assert now != then
    assert evaluator.submit(state=before).result() == then
    assert evaluator() == now  # the actor is what it was


def test_an_episode_that_is_never_done_has_all_its_steps(monkeypatch):
    monkeypatch.setattr("torchrl_mac.trainers.episodes._MAX_STEPS", 4)
    evaluator, _ = make(0.0, num_episodes=2, num_envs=2)  # does not get anywhere
    metrics = evaluator()
    assert metrics["episode_length"] == 4 and metrics["episode_return"] == -4


def test_workers_run_the_same_episodes():
    actor = random_actor()
    settings = {"task_ids": [1, 2], "num_episodes": 5, "num_envs": 2, "replan_interval": 2}
    expected = EpisodeEvaluator(Walk, actor, **settings)()
    evaluator = EpisodeEvaluator(Walk, actor, num_workers=2, **settings)
    try:
        running = evaluator.submit()
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.zero_()  # training goes on: what was submitted is evaluated
        assert running.result() == expected
        assert running.done()
        assert evaluator() != expected
    finally:
        evaluator.close()


@pytest.mark.slow
def test_five_tasks_of_ogbench_repeat_exactly():
    policy = OneStepPolicy(
        NormedMLP(2 + 2 + H * A, H * A, [4]), H * A, in_keys=["observation", "goal", "noise"]
    )
    qvalue = ValueOperator(
        NormedMLP(2 + 2 + H * A, 1, [4]), in_keys=["observation", "goal", "action"]
    )
    actor = FlowRejectionActor(policy, qvalue, num_candidates=3, chunk_size=H)
    make_env = partial(
        OGBenchEnv, "pointmaze-medium-navigate-oraclerep-v0", env_kwargs={"max_episode_steps": 30}
    )
    settings = {"task_ids": range(1, 6), "num_episodes": 3, "num_envs": 2, "replan_interval": H}
    starts = {}
    evaluator = EpisodeEvaluator(make_env, actor, **settings)
    for task_id in settings["task_ids"]:
        episodes = evaluator._runner.run(0, task_id)
        starts[task_id] = episodes[0]["goal"][0]
        assert not torch.equal(episodes[0]["observation"][0], episodes[1]["observation"][0])
    assert torch.stack(list(starts.values())).unique(dim=0).shape[0] == 5  # five goals
    metrics = evaluator()
    assert [f"task{k}/success_rate" in metrics for k in range(1, 6)] == [True] * 5
    assert evaluator() == metrics
    assert EpisodeEvaluator(make_env, actor, **settings)() == metrics
    evaluator.close()


def test_failures_are_counted():
    metrics = make(0.0, num_episodes=4, num_envs=2)[0]()
    assert metrics == {"success_rate": 0.0, "episode_return": -9.0, "episode_length": 9.0}


def test_a_part_of_the_episodes():
    evaluator, _ = make(0.25, num_episodes=6, num_envs=2, seed=1)
    assert evaluator(2) == evaluator(2)
    assert evaluator(2) != evaluator()


@pytest.mark.parametrize(("interval", "asked"), [(1, 9), (2, 5), (H, 3)])
def test_replanning(interval, asked):
    evaluator, stub = make(0.0, num_episodes=1, num_envs=1, replan_interval=interval)
    evaluator()
    assert stub.asked == asked  # nine steps


def test_repeats_and_leaves_training_alone():
    evaluator = EpisodeEvaluator(Walk, random_actor(), num_episodes=8, num_envs=4, seed=1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = evaluator()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(10)
    assert evaluator() == first
    evaluator.close()
    assert evaluator() == first


class Faulty(Walk):
    """Fails, dies or hangs in the third episode, the first time or always."""

    def __init__(self, fault, folder, always=False):
        super().__init__()
        self.fault, self.folder, self.always = fault, folder, always

    def _reset(self, tensordict=None, **kwargs):
        out = super()._reset(tensordict, **kwargs)
        mark = self.folder / "third"
        if abs(self.at - THIRD) < 1e-6 and (self.always or not mark.exists()):
            mark.touch()
            if self.fault == "fail":
                raise ConnectionError("the simulator is gone")
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(100)
        return out


def third_start():
    """Where the third episode of ``seed=3`` begins."""
    evaluator, _ = make(0.25, num_episodes=4, num_envs=1, seed=3)
    evaluator()
    return evaluator._runner._env.base_env._envs[0].seen[-2]


THIRD = third_start()


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr("torchrl_mac.trainers.evaluation.torchrl_logger.warning", seen.append)
    return seen


def test_a_failed_round_is_run_again(tmp_path, warnings):
    expected = make(0.25, num_episodes=4, num_envs=1, seed=3)[0]()
    evaluator, _ = make(0.25, num_episodes=4, num_envs=1, seed=3)
    evaluator._runner.make_env = partial(Faulty, "fail", tmp_path)
    assert evaluator() == expected
    assert len(warnings) == 1 and "the simulator is gone" in warnings[0]


def test_an_incomplete_evaluation_says_so(tmp_path, warnings):
    evaluator, _ = make(0.25, num_episodes=4, num_envs=1, seed=3)
    evaluator._runner.make_env = partial(Faulty, "fail", tmp_path, always=True)
    metrics = evaluator()
    assert metrics["missing_episodes"] == 1
    assert metrics["success_rate"] == 1.0
    assert "incomplete" in warnings[-1]


def test_without_any_episode_there_is_an_error(tmp_path, warnings):
    evaluator, _ = make(0.25, num_episodes=4, num_envs=4, seed=3)
    evaluator._runner.make_env = partial(Faulty, "fail", tmp_path, always=True)
    evaluator._runner.num_envs = 1
    evaluator.num_episodes = 1
    seeds = np.random.SeedSequence(3).generate_state(4)
    evaluator._run_here(int(seeds[2]), None, None).exception()
    evaluation = Evaluation({"": [evaluator._run_here(int(seeds[2]), None, None)]}, 1, 1, None)
    with pytest.raises(RuntimeError, match=r"No episode could be run: the simulator is gone"):
        evaluation.result()


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_worker_that_dies_or_hangs_is_replaced(tmp_path, fault, warnings):
    settings = {"num_episodes": 4, "num_envs": 1, "seed": 3}
    actor = random_actor()
    expected = EpisodeEvaluator(Walk, actor, **settings)()
    make_env = partial(Faulty, fault, tmp_path)
    evaluator = EpisodeEvaluator(make_env, actor, num_workers=1, timeout=20, **settings)
    try:
        assert evaluator() == expected
        assert (tmp_path / "third").exists()
    finally:
        evaluator.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"replan_interval": 0}, "between 1 and the chunk size 4, got 0"),
        ({"replan_interval": 5}, "between 1 and the chunk size 4, got 5"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make(0.0, **settings)


if __name__ == "__main__":
    pytest.main([__file__])
