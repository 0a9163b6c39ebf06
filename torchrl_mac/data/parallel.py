"""Worker processes that make the episodes of a dataset, each in an environment of its own."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import numpy as np

from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.rollouts import OracleRollout

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
    name: OGBenchName, jobs: list[Job], *, seed: int, steps: int, workers: int
) -> Generator[tuple[Job, Episode], None, None]:
    """Makes episodes in parallel.

    Args:
        name (OGBenchName): the dataset.
        jobs (list of Job): the episodes.

    Keyword Args:
        seed (int): the dataset's seed.
        steps (int): rows per episode.
        workers (int): processes; 1 means this very process.

    Yields:
        tuple: a job and its episode, in the order of ``jobs``. Closing the generator kills the
        workers.

    Raises:
        RuntimeError: if a worker fails or dies.
    """
    if workers == 1:
        rollout = OracleRollout.make(name)
        for job in jobs:
            yield job, rollout.episode(seed=seed, steps=steps, **vars(job))
        return

    # A fork server imports the heavy packages once for all workers, and has no threads to fork.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([__name__])
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, name, seed, steps), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            processes[ours] = process
        waiting = deque(jobs)
        for connection in processes:
            _ask(connection, waiting.popleft())
        busy = set(processes)
        finished: dict[Job, Episode] = {}
        for job in jobs:
            while job not in finished:
                for connection in cast("list[Connection]", wait(busy)):
                    done, episode = _receive(connection, processes[connection])
                    finished[done] = episode
                    if waiting:
                        _ask(connection, waiting.popleft())
                    else:
                        busy.remove(connection)
            yield job, finished.pop(job)
    finally:
        for connection, process in processes.items():
            process.terminate()
            process.join()
            connection.close()


def _ask(connection: Connection, job: Job) -> None:
    with suppress(ConnectionError):  # a dead worker is reported when its answer is missing
        connection.send(job)


def _receive(connection: Connection, process: Any) -> tuple[Job, Episode]:
    try:
        job, episode, error = connection.recv()
    except (EOFError, ConnectionError) as err:
        process.join()
        raise RuntimeError(
            f"A worker process ended with exit code {process.exitcode}. If it was killed for its "
            "memory, use fewer workers (--workers); if it could not import the calling script, "
            'protect that script with `if __name__ == "__main__":`.'
        ) from err
    if error is not None:
        raise RuntimeError(f"Making {job} failed in a worker:\n{error}")
    return job, episode


def _work(connection: Connection, name: OGBenchName, seed: int, steps: int) -> None:
    """Makes the episodes asked for, until killed or until the asking process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which kills us
    rollout = None
    with suppress(EOFError, ConnectionError):
        while True:
            job = connection.recv()
            episode, error = None, None
            try:
                rollout = rollout or OracleRollout.make(name)
                episode = rollout.episode(seed=seed, steps=steps, **vars(job))
            except Exception:
                error = traceback.format_exc()
            connection.send((job, episode, error))
