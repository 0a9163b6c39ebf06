"""Collecting experience in the simulator, between updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torchrl.collectors import Collector
from torchrl.data import ReplayBuffer
from torchrl.envs import Compose, EnvBase, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MultiStepActorWrapper

from torchrl_mac.data import ActionChunkStorage
from torchrl_mac.envs import ResumableEpisodes
from torchrl_mac.modules import ChunkActor
from torchrl_mac.trainers.hooks import TrainerHook
from torchrl_mac.trainers.progress import Progress

__all__ = ["CollectionHook"]

_RECENT = 20  # episodes that the success rate is of


class CollectionHook(TrainerHook):
    r"""Acts in the simulator before each update, and writes what happens to a replay buffer.

    Chunks are executed whole, one action after the other, by TorchRL's
    :class:`~torchrl.modules.MultiStepActorWrapper`; an episode that ends drops the rest of its
    chunk. (:class:`~torchrl.envs.transforms.MultiAction` would make one step of a chunk, with as
    many rewards as it lived; here each row is a step of the environment.)

    A phase's F steps are spread evenly over its U updates, but for the w of the warm-up, which come
    first: before update u, counted from 0, there have been :math:`w + \lceil (u + 1) (F - w) / U
    \rceil`. Episodes are those of :class:`~torchrl_mac.envs.ResumableEpisodes`: a run that was
    interrupted goes on in the middle of one.

    Args:
        make_env (callable): builds the environment, which reports ``"success"``.
        actor (ChunkActor): acts on the environment's observations, exploring; its parameters are
            read where they are.
        buffer (ReplayBuffer): gets the steps, over an
            :class:`~torchrl_mac.data.ActionChunkStorage`.

    Keyword Args:
        frames (dict of str to int): how many steps, by the names of the phases in which they are
            made, in order.
        warmup_frames (int, optional): the steps before the first update of the first of these.
            Defaults to 0.
        random_frames (int, optional): of these, the first so many are uniformly random, and what is
            left of a chunk then. Defaults to 0.
        seed (int, optional): of the episodes. Defaults to 0.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        make_env: Callable[[], EnvBase],
        actor: ChunkActor,
        buffer: ReplayBuffer,
        *,
        frames: Mapping[str, int],
        warmup_frames: int = 0,
        random_frames: int = 0,
        seed: int = 0,
    ) -> None:
        first = next(iter(frames.values()), 0)
        if min(frames.values(), default=0) < 1 or not 0 <= warmup_frames < first:
            raise ValueError(
                "frames must be at least 1 in each phase, and warmup_frames fewer than those of "
                f"the first, got frames={dict(frames)} and {warmup_frames=}."
            )
        if random_frames < 0:
            raise ValueError(f"random_frames must not be negative, got {random_frames}.")
        self.make_env = make_env
        self.actor = actor
        self.buffer = buffer
        self.frames = dict(frames)
        self.warmup_frames = warmup_frames
        self.random_frames = random_frames
        self.collected = 0
        self._return = 0.0
        self._recent: deque[tuple[bool, float, int]] = deque(maxlen=_RECENT)
        self._length = 0
        self._episodes = ResumableEpisodes(seed)
        self._steps: Iterator[TensorDictBase] | None = None
        self._collector: Collector | None = None

    def due(self, progress: Progress) -> int:
        """How many steps there must have been before the next update."""
        phases = list(self.frames)
        if progress.phase.name not in phases:
            return self.collected
        place = phases.index(progress.phase.name)
        before = sum(self.frames[name] for name in phases[:place])
        frames, warmup = self.frames[phases[place]], self.warmup_frames if place == 0 else 0
        spread = -(-(progress.phase_updates + 1) * (frames - warmup) // progress.phase.num_updates)
        return before + min(frames, warmup + spread)

    def before_update(self, progress: Progress) -> None:
        """Collects what is due."""
        while self.collected < self.due(progress):
            self._collect()

    def end_phase(self, progress: Progress) -> None:
        """Closes the environment after the last phase that collects."""
        if progress.phase.name == list(self.frames)[-1]:
            self._close()

    def _close(self) -> None:
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = self._steps = None

    def buffers(self) -> dict[str, ReplayBuffer]:
        """Where the steps go."""
        return {"buffer": self.buffer}

    def metrics(self) -> dict[str, float]:
        """The steps so far and, of the last finished episodes, success, return and length."""
        if not self.collected:
            return {}
        found: dict[str, float] = {"frames": self.collected}
        if self._recent:
            names = ("success_rate", "episode_return", "episode_length")
            for name, values in zip(names, zip(*self._recent, strict=True), strict=True):
                found[name] = sum(values) / len(values)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the episode in progress."""
        return {
            "collected": self.collected,
            "return": self._return,
            "length": self._length,
            "recent": [list(episode) for episode in self._recent],
            "episodes": self._episodes.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if not state_dict:  # of a run that had not yet begun to collect
            return
        self._close()
        self.collected = state_dict["collected"]
        self._return, self._length = state_dict["return"], state_dict["length"]
        self._recent.clear()
        self._recent.extend(tuple(episode) for episode in state_dict["recent"])
        self._episodes.load_state_dict(state_dict["episodes"])

    def _collect(self) -> None:
        """One step of the environment."""
        if self._steps is None:
            self._steps = self._begin()
        step = next(self._steps).reshape(-1).cpu()
        self.buffer.extend(self._row(step))
        self.collected += 1
        following = step.get("next")
        self._return += float(following.get("reward"))
        self._length += 1
        if following.get("done").any():
            self._recent.append((bool(following.get("success")), self._return, self._length))
            self._return, self._length = 0.0, 0

    def _begin(self) -> Iterator[TensorDictBase]:
        # with a state to go on from, the first reset takes it up
        transforms = Compose(InitTracker(), self._episodes)
        env = TransformedEnv(SerialEnv(1, self.make_env), transforms)
        device = next(self.actor.parameters()).device
        chunk_size = self.actor.chunk_size or 1
        policy = MultiStepActorWrapper(
            _Exploration(self), n_steps=chunk_size, action_keys=[self.actor.action_key]
        )
        # a collector tries the policy out: the random numbers are those of before
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._collector = Collector(
                env,
                policy,
                frames_per_batch=1,
                total_frames=-1,
                policy_device=device,
                env_device="cpu",
                storing_device="cpu",
                exploration_type=ExplorationType.RANDOM,
            )
        return self._collector.iterator()

    def _row(self, step: TensorDictBase) -> TensorDictBase:
        storage = self.buffer.storage
        assert isinstance(storage, ActionChunkStorage)
        ends = ("reward", "terminated", "truncated", "done")
        following = [*storage.observation_keys, *ends]
        keys = [unravel_key(("next", key)) for key in following]
        row = step.select(*storage.observation_keys, storage.action_key, *keys)
        number = self._episodes.episode - int(step.get(("next", "done")).any())  # it is the next's
        return row.set(storage.traj_key, torch.full(row.shape, number, dtype=torch.int64))


class _Exploration(TensorDictModuleBase):
    """The actor, or chunks of uniformly random actions as long as these are due."""

    def __init__(self, hook: CollectionHook) -> None:
        super().__init__()
        actor = hook.actor
        self.actor = actor
        self.in_keys, self.out_keys = list(actor.in_keys), [actor.action_key]
        self.__dict__["hook"] = hook

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        with torch.no_grad():
            acted = self.actor(tensordict.select(*self.in_keys))
        action = acted.get(self.actor.action_key)
        if self.hook.collected < self.hook.random_frames:
            action = torch.rand_like(action) * 2 - 1
        return TensorDict({}, tensordict.batch_size).set(self.actor.action_key, action)
