"""Measuring an actor in the real environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl._utils import logger as torchrl_logger
from torchrl.envs import EnvBase

from torchrl_mac.modules import ChunkActor
from torchrl_mac.trainers.episodes import EpisodeRunner
from torchrl_mac.utils.workers import Engine, WorkerPool

__all__ = ["EpisodeEvaluator", "Evaluation"]


class EpisodeEvaluator:
    """Runs seeded episodes of an environment and reports success, return and length.

    Episodes are run in rounds of several environments side by side, so that the actor is asked
    for a batch at a time. Each round has random numbers of its own, drawn from ``seed``: the same
    episodes, starts and noise alike, repeat in any number of processes, and training's random
    state is left as it was.

    A round that fails is run once more, in new environments and, if it was in a worker process that
    died or hung, in a new one. If it fails again, the evaluation goes on without it and says how
    many ``missing_episodes`` it has.

    Args:
        make_env (callable): builds one environment.
        actor (ChunkActor): writes chunks of ``actor.chunk_size`` actions.

    Keyword Args:
        task_ids (sequence of int, optional): tasks to evaluate, one after the other; the
            environment is told by ``reset(options={"task_id": ...})``. Defaults to its own task.
        num_episodes (int, optional): of each task. Defaults to 50.
        num_envs (int, optional): how many environments step side by side. Defaults to 10.
        replan_interval (int, optional): how many actions of a chunk are executed before the
            actor is asked again, from 1 (as the reference implementation) to ``chunk_size``
            (open loop). Defaults to 1.
        num_workers (int, optional): how many processes share the rounds, each with ``num_envs``
            environments and a copy of the actor on the CPU; ``make_env`` and the actor are pickled.
            Defaults to 0, the calling process.
        engine (str, optional): where these processes are, see
            :class:`~torchrl_mac.utils.workers.WorkerPool`. Defaults to ``"processes"``.
        timeout (float, optional): the seconds after which a round in a worker process is taken to
            hang. Defaults to 600.
        seed (int, optional): defaults to 0.

    Raises:
        ValueError: if a number is out of range.
        RuntimeError: if no round of an evaluation succeeds.

    Examples:
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.envs import OGBenchEnv
        >>> from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.trainers import EpisodeEvaluator
        >>> policy = OneStepPolicy(NormedMLP(2 + 20, 20, num_cells=(32,)), action_dim=20)
        >>> qvalue = ValueOperator(
        ...     NormedMLP(2 + 20, 1, num_cells=(32,)), in_keys=["observation", "action"]
        ... )
        >>> evaluator = EpisodeEvaluator(
        ...     lambda: OGBenchEnv("pointmaze-medium-navigate-singletask-v0"),
        ...     FlowRejectionActor(policy, qvalue, num_candidates=4, chunk_size=10),
        ...     num_episodes=2, num_envs=2, replan_interval=10,
        ... )
        >>> metrics = evaluator()
        >>> sorted(metrics)
        ['episode_length', 'episode_return', 'success_rate']
        >>> metrics == evaluator()
        True
    """

    def __init__(
        self,
        make_env: Callable[[], EnvBase],
        actor: ChunkActor,
        *,
        task_ids: Sequence[int] | None = None,
        num_episodes: int = 50,
        num_envs: int = 10,
        replan_interval: int = 1,
        num_workers: int = 0,
        engine: Engine = "processes",
        timeout: float = 600.0,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_episodes", num_episodes, 1),
            ("num_envs", num_envs, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.task_ids: list[int | None] = [None] if task_ids is None else list(task_ids)
        self.num_episodes = num_episodes
        self.num_envs = min(num_envs, num_episodes)
        self.num_workers = num_workers
        self.engine: Engine = engine
        self.timeout = timeout
        self.seed = seed
        self.actor = actor
        self._runner = EpisodeRunner(make_env, actor, self.num_envs, replan_interval)
        self._pool: WorkerPool | None = None

    def __call__(self, num_episodes: int | None = None) -> dict[str, float]:
        """Runs all episodes, or the first ``num_episodes`` of them, of each task.

        Returns:
            the means ``episode_return``, ``episode_length`` and, where the environment writes
            ``"success"``, ``success_rate``; of several tasks those of each, as
            ``task1/success_rate``, and their means over the tasks.
        """
        return self.submit(num_episodes).result()

    def submit(
        self, num_episodes: int | None = None, *, state: dict[str, Any] | None = None
    ) -> Evaluation:
        """Begins an evaluation of the actor as it is now.

        With ``num_workers`` it goes on beside whatever this process does next; without, it is
        finished on return.

        Args:
            num_episodes (int, optional): as many, the first of all.

        Keyword Args:
            state (dict, optional): the actor's state dict to evaluate instead:
                :attr:`Evaluation.state` of one that was cut off.
        """
        num_episodes = self.num_episodes if num_episodes is None else num_episodes
        seeds = np.random.SeedSequence(self.seed).generate_state(-(-num_episodes // self.num_envs))
        if self.num_workers and state is None:  # a copy: it is sent later, and training goes on
            state = {key: value.cpu().clone() for key, value in self.actor.state_dict().items()}
        tasks = {
            "" if task_id is None else f"task{task_id}/": [
                self._run(int(seed), task_id, state) for seed in seeds
            ]
            for task_id in self.task_ids
        }
        return Evaluation(tasks, num_episodes, self.num_envs, state)

    def _run(self, seed: int, task_id: int | None, state: dict[str, Any] | None) -> Future:
        if self.num_workers == 0:
            return self._run_here(seed, task_id, state)
        if self._pool is None:
            self._pool = WorkerPool(
                self.num_workers,
                partial(_Measure, self._runner.on_cpu()),
                timeout=self.timeout,
                engine=self.engine,
            )
        return self._pool.submit(seed, task_id, state)

    def _run_here(self, seed: int, task_id: int | None, state: dict[str, Any] | None) -> Future:
        future: Future = Future()
        actor = self.actor
        if state is not None:
            actor = copy.deepcopy(actor)
            actor.load_state_dict(state)
        for is_last in (False, True):
            try:
                future.set_result(self._runner.measure(seed, task_id, actor))
                break
            except Exception as error:
                self._runner.close()
                if is_last:
                    future.set_exception(error)
                else:
                    torchrl_logger.warning(f"Episodes have failed and are run again: {error!r}")
        return future

    def record(self, make_env: Callable[[], EnvBase], num_episodes: int) -> list[torch.Tensor]:
        """Runs ``num_episodes`` of each task one by one, in environments that write ``"pixels"``.

        Returns:
            for each episode its frames, uint8 ``[T, H, W, 3]``; where the environment writes
            ``"goal_pixels"``, ``[T, H, 2 * W, 3]`` with the goal at the right.
        """
        runner = EpisodeRunner(make_env, self.actor, 1, self._runner.replan_interval)
        seeds = np.random.SeedSequence(self.seed).generate_state(num_episodes).tolist()
        episodes: list[TensorDictBase] = []
        try:
            for task_id in self.task_ids:
                for seed in seeds:
                    episodes += runner.run(seed, task_id)
        finally:
            runner.close()
        pictures = [key for key in ("pixels", "goal_pixels") if key in episodes[0].keys()]
        return [torch.cat([episode[key] for key in pictures], 2) for episode in episodes]

    def close(self) -> None:
        """Closes environments and processes; they are made again when needed."""
        self._runner.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class Evaluation:
    """An evaluation that has begun; :meth:`EpisodeEvaluator.submit` makes it."""

    def __init__(
        self,
        tasks: dict[str, list[Future]],
        num_episodes: int,
        num_envs: int,
        state: dict[str, Any] | None,
    ) -> None:
        self.state = state
        self._tasks = tasks
        self._num_episodes = num_episodes
        self._num_envs = num_envs

    def done(self) -> bool:
        """Whether :meth:`result` would return at once."""
        return all(future.done() for futures in self._tasks.values() for future in futures)

    def result(self) -> dict[str, float]:
        """The metrics of :meth:`EpisodeEvaluator.__call__`, as soon as they are there.

        ``missing_episodes`` is one of them if some could not be run.
        """
        metrics: dict[str, float] = {}
        missing = 0
        for prefix, rounds in self._tasks.items():
            firsts = range(0, self._num_episodes, self._num_envs)
            wait(rounds)
            errors = [error for future in rounds if (error := future.exception())]
            episodes = [
                episode
                for first, future in zip(firsts, rounds, strict=True)
                if not future.exception()
                for episode in future.result()[: self._num_episodes - first]
            ]
            if errors:
                if not episodes:
                    raise RuntimeError(f"No episode could be run: {errors[0]}") from errors[0]
                missing += self._num_episodes - len(episodes)
                torchrl_logger.warning(f"The evaluation is incomplete: {errors[0]!r}")
            for name in episodes[0]:
                metrics[prefix + name] = fmean(episode[name] for episode in episodes)
        if "" not in self._tasks:
            names = dict.fromkeys(name.split("/")[1] for name in metrics)
            metrics = {
                name: fmean(metrics[prefix + name] for prefix in self._tasks) for name in names
            } | metrics
        return metrics | ({"missing_episodes": missing} if missing else {})


class _Measure:
    """What a worker process does."""

    def __init__(self, runner: EpisodeRunner) -> None:
        self.runner = runner

    def __call__(
        self, seed: int, task_id: int | None, state: dict[str, Any]
    ) -> list[dict[str, float]]:
        self.runner.actor.load_state_dict(state)
        return self.runner.measure(seed, task_id)
