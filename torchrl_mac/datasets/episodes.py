"""The episodes of a dataset, made one by one or in several processes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

import numpy as np

from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.rollouts import OracleRollout
from torchrl_mac.utils.workers import Engine, WorkerPool

__all__ = ["Episode", "Job", "make_episodes"]

Episode = dict[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """An episode to make.

    Args:
        shard (int): the number of its shard.
        split (int): 0 for training and 1 for validation.
        index (int): its number within the split of the shard.

    Examples:
        >>> str(Job(shard=2, split=1, index=0))
        'validation episode 0 of shard 2'
    """

    shard: int
    split: int
    index: int

    def __str__(self) -> str:
        split = ("training", "validation")[self.split]
        return f"{split} episode {self.index} of shard {self.shard}"


def make_episodes(
    name: OGBenchName,
    jobs: list[Job],
    *,
    seed: int,
    steps: int,
    workers: int,
    engine: Engine = "processes",
) -> Generator[tuple[Job, Episode], None, None]:
    """Makes episodes in parallel.

    Args:
        name (OGBenchName): the dataset.
        jobs (list of Job): the episodes.

    Keyword Args:
        seed (int): the dataset's seed.
        steps (int): rows per episode.
        workers (int): processes; 1 means this very process.
        engine (str, optional): see :class:`~torchrl_mac.utils.workers.WorkerPool`.

    Yields:
        tuple: a job and its episode, in the order of ``jobs``. Closing the generator kills the
        workers.

    Raises:
        WorkerError: if a worker fails or dies.
    """
    if workers == 1 and engine == "processes":
        rollout = OracleRollout.make(name)
        for job in jobs:
            yield job, rollout.episode(seed=seed, steps=steps, **vars(job))
        return
    with WorkerPool(
        min(workers, len(jobs)),
        partial(_Maker, name, seed, steps),
        attempts=1,  # an episode is a function of its job: a second time it would fail as well
        preload=[__name__, "ogbench"],
        engine=engine,
    ) as pool:
        yield from zip(jobs, pool.map(jobs), strict=True)


class _Maker:
    """What a worker process does."""

    def __init__(self, name: OGBenchName, seed: int, steps: int) -> None:
        self.rollout = OracleRollout.make(name)
        self.seed, self.steps = seed, steps

    def __call__(self, job: Job) -> Episode:
        try:
            return self.rollout.episode(seed=self.seed, steps=self.steps, **vars(job))
        except Exception as error:
            raise RuntimeError(f"Making {job} failed: {error!r}") from error
