"""Measuring an actor in the real environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiStepActorWrapper

from torchrl_mac.modules import FlowRejectionActor

__all__ = ["Evaluator"]

MakeEnv = Callable[[], EnvBase] | Mapping[str, Callable[[], EnvBase]]
_MAX_STEPS = 10_000  # every OGBench episode is truncated long before


class Evaluator:
    """Runs seeded episodes of an environment and reports success, return and length.

    Several environments step side by side, so that the actor is asked for a batch at a time. The
    same seed repeats the same episodes, starts and noise alike, and training's random state is
    left as it was.

    Args:
        make_env (callable or dict of callables): builds one environment, which reports
            ``"success"``. Several, by the name of their task, are evaluated one after the other.
        actor (FlowRejectionActor): writes chunks of ``actor.chunk_size`` actions.

    Keyword Args:
        num_episodes (int, optional): of each task. Defaults to 50.
        num_envs (int, optional): how many environments step side by side. Defaults to 10.
        replan_interval (int, optional): how many actions of a chunk are executed before the
            actor is asked again, from 1 (as the reference implementation) to ``chunk_size``
            (open loop). Defaults to 1.
        seed (int, optional): defaults to 0.

    Raises:
        ValueError: if ``num_episodes``, ``num_envs`` or ``replan_interval`` is out of range.

    Examples:
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.envs import OGBenchEnv
        >>> from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.trainers import Evaluator
        >>> policy = OneStepPolicy(NormedMLP(2 + 20, 20, num_cells=(32,)), action_dim=20)
        >>> qvalue = ValueOperator(
        ...     NormedMLP(2 + 20, 1, num_cells=(32,)), in_keys=["observation", "action"]
        ... )
        >>> evaluator = Evaluator(
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
        make_env: MakeEnv,
        actor: FlowRejectionActor,
        *,
        num_episodes: int = 50,
        num_envs: int = 10,
        replan_interval: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_episodes", num_episodes), ("num_envs", num_envs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        chunk_size = actor.chunk_size or 1
        if not 1 <= replan_interval <= chunk_size:
            raise ValueError(
                f"replan_interval must be between 1 and the chunk size {chunk_size}, "
                f"got {replan_interval}."
            )
        self.num_episodes = num_episodes
        self.num_envs = min(num_envs, num_episodes)
        self.seed = seed
        self.make_env = make_env
        self.policy = MultiStepActorWrapper(
            actor,
            n_steps=chunk_size,
            action_keys=[actor.action_key],
            replan_interval=replan_interval,
        )
        self._envs: dict[str, EnvBase] = {}

    def __call__(self, num_episodes: int | None = None) -> dict[str, float]:
        """Runs all episodes, or the first ``num_episodes`` of them, of each task.

        Returns:
            the means ``success_rate``, ``episode_return`` and ``episode_length``; of several tasks
            those of each, as ``{task}/success_rate``, and their means over the tasks.
        """
        num_episodes = self.num_episodes if num_episodes is None else num_episodes
        if not isinstance(self.make_env, Mapping):
            return self._evaluate("", self.make_env, num_episodes)
        by_task = {
            task: self._evaluate(task, make_env, num_episodes)
            for task, make_env in self.make_env.items()
        }
        names = next(iter(by_task.values()))
        means = {name: fmean(metrics[name] for metrics in by_task.values()) for name in names}
        for task, metrics in by_task.items():
            means.update({f"{task}/{name}": value for name, value in metrics.items()})
        return means

    def record(self, make_env: MakeEnv, num_episodes: int) -> list[torch.Tensor]:
        """Runs ``num_episodes`` of each task one by one, in environments that write ``"pixels"``.

        Returns:
            for each episode its frames, uint8 ``[T, H, W, 3]``; where the environment writes
            ``"goal_pixels"``, ``[T, H, 2 * W, 3]`` with the goal at the right.
        """
        tasks = make_env.values() if isinstance(make_env, Mapping) else [make_env]
        episodes: list[TensorDictBase] = []
        for make in tasks:
            env = self._make(make, 1)
            try:
                episodes += self._run(env, num_episodes)
            finally:
                env.close()
        pictures = [key for key in ("pixels", "goal_pixels") if key in episodes[0].keys()]
        return [torch.cat([episode[key] for key in pictures], 2) for episode in episodes]

    def close(self) -> None:
        """Closes the environments; they are built again when needed."""
        while self._envs:
            self._envs.popitem()[1].close()

    def _evaluate(
        self, task: str, make_env: Callable[[], EnvBase], num_episodes: int
    ) -> dict[str, float]:
        if task not in self._envs:
            self._envs[task] = self._make(make_env, self.num_envs)
        rounds = -(-num_episodes // self.num_envs)
        episodes = self._run(self._envs[task], rounds)[:num_episodes]
        success, total, length = torch.stack(
            [torch.stack(_summary(episode)) for episode in episodes]
        ).unbind(-1)
        return {
            "success_rate": success.mean().item(),
            "episode_return": total.mean().item(),
            "episode_length": length.mean().item(),
        }

    @staticmethod
    def _make(make_env: Callable[[], EnvBase], num_envs: int) -> EnvBase:
        return TransformedEnv(SerialEnv(num_envs, make_env), InitTracker())

    def _run(self, env: EnvBase, rounds: int) -> list[TensorDictBase]:
        env.set_seed(self.seed)
        episodes: list[TensorDictBase] = []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            set_exploration_type(ExplorationType.DETERMINISTIC),
        ):
            torch.manual_seed(self.seed)
            for _ in range(rounds):
                rollout = env.rollout(_MAX_STEPS, self.policy, break_when_all_done=True)
                for episode in rollout.unbind(0):
                    # An environment that is done waits, repeating itself, for the others.
                    length = int(episode["next", "done"].squeeze(-1).int().argmax()) + 1
                    episodes.append(episode[:length])
        return episodes


def _summary(episode: TensorDictBase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        episode["next", "success"].any().float(),
        episode["next", "reward"].sum(),
        torch.tensor(float(len(episode))),
    )
