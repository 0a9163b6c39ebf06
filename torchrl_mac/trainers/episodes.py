"""Episodes of several environments side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MultiStepActorWrapper

from torchrl_mac.modules import ChunkActor

__all__ = ["EpisodeRunner"]

_MAX_STEPS = 10_000  # every OGBench episode is truncated long before; others may not be


class EpisodeRunner:
    """Runs one episode in each of several environments, with an actor that plans in chunks.

    Args:
        make_env (callable): builds one environment.
        actor (ChunkActor): writes chunks of ``actor.chunk_size`` actions.
        num_envs (int): how many environments step side by side; they are built when needed.
        replan_interval (int): how many actions of a chunk are executed before the actor is asked
            again.

    Raises:
        ValueError: if ``replan_interval`` is not between 1 and the chunk size.
    """

    def __init__(
        self,
        make_env: Callable[[], EnvBase],
        actor: ChunkActor,
        num_envs: int,
        replan_interval: int,
    ) -> None:
        chunk_size = actor.chunk_size or 1
        if not 1 <= replan_interval <= chunk_size:
            raise ValueError(
                f"replan_interval must be between 1 and the chunk size {chunk_size}, "
                f"got {replan_interval}."
            )
        self.make_env = make_env
        self.actor = actor
        self.num_envs = num_envs
        self.replan_interval = replan_interval
        self._env: EnvBase | None = None

    def on_cpu(self) -> EpisodeRunner:
        """The same with a copy of the actor on the CPU."""
        actor = copy.deepcopy(self.actor).cpu()
        return EpisodeRunner(self.make_env, actor, self.num_envs, self.replan_interval)

    def run(
        self, seed: int, task_id: int | None = None, actor: ChunkActor | None = None
    ) -> list[TensorDictBase]:
        """One episode of each environment, of shape ``[T]``; with another actor, if given."""
        actor = self.actor if actor is None else actor
        if self._env is None:
            self._env = TransformedEnv(SerialEnv(self.num_envs, self.make_env), InitTracker())
        policy = MultiStepActorWrapper(
            actor,
            n_steps=actor.chunk_size or 1,
            action_keys=[actor.action_key],
            replan_interval=self.replan_interval,
        )
        self._env.set_seed(seed)
        devices = {parameter.device for parameter in actor.parameters()}
        with (
            torch.no_grad(),
            torch.random.fork_rng([device for device in devices if device.type == "cuda"]),
            set_exploration_type(ExplorationType.DETERMINISTIC),
        ):
            torch.manual_seed(seed)
            start = self._env.reset(
                **({} if task_id is None else {"options": {"task_id": task_id}})
            )
            rollout = self._env.rollout(
                _MAX_STEPS, policy, auto_reset=False, tensordict=start, break_when_all_done=True
            )
        # An environment that is done waits, repeating itself, for the others.
        done = rollout["next", "done"].squeeze(-1)
        lengths = torch.where(done.any(-1), done.int().argmax(-1) + 1, done.shape[-1])
        return [episode[:n] for episode, n in zip(rollout.unbind(0), lengths.tolist(), strict=True)]

    def measure(
        self, seed: int, task_id: int | None = None, actor: ChunkActor | None = None
    ) -> list[dict[str, float]]:
        """Return and length of each episode, and success, if the environment speaks of it."""
        return [_measured(episode) for episode in self.run(seed, task_id, actor)]

    def close(self) -> None:
        """Closes the environments; they are built again when needed."""
        if self._env is not None:
            self._env.close()
            self._env = None


def _measured(episode: TensorDictBase) -> dict[str, float]:
    success = episode.get(("next", "success"), None)
    return {
        **({} if success is None else {"success_rate": float(success.any())}),
        "episode_return": float(episode.get(("next", "reward")).sum()),
        "episode_length": float(len(episode)),
    }
