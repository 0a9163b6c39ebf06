"""Workers that are Ray's do what processes of this machine do."""

from __future__ import annotations

from functools import partial

import pytest
import ray
from test_workers import Task
from torchrl.modules import ValueOperator

from torchrl_mac.datasets import generate_dataset
from torchrl_mac.datasets.cli import main
from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy
from torchrl_mac.trainers import EpisodeEvaluator
from torchrl_mac.utils import ray_worker
from torchrl_mac.utils.workers import WorkerError, WorkerPool

MAZE = "pointmaze-medium-navigate-v0"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield
    ray.shutdown()


@pytest.mark.slow
def test_tasks_that_fail_and_actors_that_die(tmp_path):
    with WorkerPool(2, Task, engine="ray") as pool:
        assert [answer[0] for answer in pool.map(range(5))] == list(range(5))
        assert pool.submit("die once", tmp_path).result()[:2] == ("die once", 1)
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            pool.submit("fail").result()
        with pytest.raises(WorkerError, match="has died"):
            pool.submit("die").result()
        pool.timeout, pool.attempts = 1, 1
        with pytest.raises(WorkerError, match="not answered for 1 s"):
            pool.submit("hang").result()
        pool.timeout = None
        assert pool.submit("a").result()[:2] == ("a", 1)
    with pytest.raises(RuntimeError):
        pool.submit("a")


@pytest.mark.slow
def test_a_dataset_has_the_same_bytes(tmp_path):
    quick = {"episodes": 3, "val_episodes": 1, "steps": 40, "progress": False}
    generate_dataset(MAZE, tmp_path / "here", workers=1, **quick)
    command = f"generate {MAZE} --out {tmp_path / 'ray'} --episodes 3 --val-episodes 1 --steps 40"
    assert main([*command.split(), "--engine", "ray", "--workers", "2", "--quiet"]) == 0
    for name in (f"{MAZE}.npz", f"{MAZE}-val.npz", f"{MAZE}.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


@pytest.mark.slow
def test_episodes_are_the_same():
    policy = OneStepPolicy(NormedMLP(2 + 6, 6, [4]), action_dim=6)
    qvalue = ValueOperator(NormedMLP(2 + 6, 1, [4]), in_keys=["observation", "action"])
    actor = FlowRejectionActor(policy, qvalue, num_candidates=3, chunk_size=3)
    make_env = partial(
        OGBenchEnv,
        MAZE.replace("-v0", "-singletask-v0"),
        env_kwargs={"max_episode_steps": 20},
    )
    settings = {"num_episodes": 3, "num_envs": 2, "replan_interval": 2}
    metrics = []
    for place in ({}, {"num_workers": 2, "engine": "ray"}):
        evaluator = EpisodeEvaluator(make_env, actor, **settings, **place)
        metrics.append(evaluator())
        evaluator.close()
    assert metrics[0] == metrics[1]


def test_what_is_no_engine(monkeypatch):
    with pytest.raises(ValueError, match="engine='threads' is none of processes, ray"):
        WorkerPool(1, Task, engine="threads")
    monkeypatch.setattr(ray_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl_mac\[ray\]'"):
        WorkerPool(1, Task, engine="ray")


if __name__ == "__main__":
    pytest.main([__file__])
