"""What happens beside the updates: hooks, and the one that fills a buffer with imagination."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torchrl.data import ReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_mac.envs import imagine
from torchrl_mac.trainers.progress import Progress

__all__ = ["ModelRolloutHook", "TrainerHook"]


class TrainerHook:
    """Does something before or after updates, or at the end of phases.

    A hook is told where training stands (``progress.updates``, ``progress.phase`` and
    ``progress.phase_updates``, those of the current phase) and holds what it works on itself. Its
    state is saved and restored with the trainer's; random numbers are PyTorch's, which are as well.

    Examples:
        >>> from torchrl_mac.trainers import TrainerHook
        >>> class Count(TrainerHook):
        ...     seen = 0
        ...
        ...     def after_update(self, progress, batch, metrics):
        ...         self.seen += len(batch)
        ...
        ...     def state_dict(self):
        ...         return {"seen": self.seen}
        ...
        ...     def load_state_dict(self, state_dict):
        ...         self.seen = state_dict["seen"]
    """

    def before_update(self, progress: Progress) -> None:
        """Called before the batch of an update is drawn."""

    def after_update(
        self, progress: Progress, batch: TensorDictBase, metrics: TensorDictBase
    ) -> None:
        """Called with the batch of an update, and its losses and metrics, detached."""

    def end_phase(self, progress: Progress) -> None:
        """Called after the last update of a phase."""

    def metrics(self) -> dict[str, float]:
        """What is logged with the losses, and shown by the progress bar."""
        return {}

    def buffers(self) -> dict[str, ReplayBuffer]:
        """The replay buffers that the hook draws from or writes to; saved with the trainer's."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the hook goes on with: tensors and values that JSON knows."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""


class ModelRolloutHook(TrainerHook):
    """Imagines rollouts from real states, every so many updates, into a second buffer.

    Transitions after the imagined end of a task are left out. Training then samples from a
    :class:`~torchrl_mac.data.MixedReplayBuffer` of real and imagined data (MBPO,
    https://arxiv.org/abs/1906.08253; MOPO, https://arxiv.org/abs/2005.13239).

    Args:
        actor (TensorDictModule): acts in imagination, sampling.
        world_model (TensorDictModule): see :func:`~torchrl_mac.envs.imagine`.
        source (ReplayBuffer): start states are from its samples.
        buffer (ReplayBuffer): gets the transitions ``[N]``.

    Keyword Args:
        interval (int): the number of updates between two; the first is before the phase's first
            update.
        num_starts (int): the number of rollouts.
        horizon (int): their length.
        phases (collection of str, optional): the names of the phases in which this is done.
            Defaults to all.
        process (callable, optional): changes a rollout ``[num_starts, horizon]`` before it is
            stored, such as a penalty on its rewards. Defaults to none.
        chunk (int, optional): how many rollouts are imagined at a time. Defaults to ``num_starts``.
        goals (sequence of NestedKey, optional): the goals of samples, which their transitions have
            as well. Actor and model pursue the first one, as the model's ``goal_key``. Defaults to
            none.

    Raises:
        ValueError: if a number is smaller than 1.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        world_model: TensorDictModuleBase,
        source: ReplayBuffer,
        buffer: ReplayBuffer,
        *,
        interval: int,
        num_starts: int,
        horizon: int,
        phases: Collection[str] | None = None,
        process: Callable[[TensorDictBase], TensorDictBase] | None = None,
        chunk: int | None = None,
        goals: Sequence[NestedKey] = (),
    ) -> None:
        chunk = num_starts if chunk is None else chunk
        numbers = {"interval": interval, "num_starts": num_starts, "horizon": horizon}
        for name, number in {**numbers, "chunk": chunk}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        self.actor = actor
        self.world_model = world_model
        self.source = source
        self.buffer = buffer
        self.interval = interval
        self.num_starts = num_starts
        self.horizon = horizon
        self.phases = phases
        self.process = process
        self.chunk = chunk
        self.goals = list(goals)

    def before_update(self, progress: Progress) -> None:
        """Imagines, if it is time."""
        due = progress.phase_updates % self.interval == 0
        if due and (self.phases is None or progress.phase.name in self.phases):
            for first in range(0, self.num_starts, self.chunk):
                self._imagine(min(self.chunk, self.num_starts - first))

    def buffers(self) -> dict[str, ReplayBuffer]:
        """Where start states come from, and where the rollouts go."""
        return {"source": self.source, "buffer": self.buffer}

    @torch.no_grad()
    def _imagine(self, num_starts: int) -> None:
        batch = self.source.sample(num_starts)
        if self.goals:
            batch.set(self.world_model.goal_key, batch.get(self.goals[0]))
        written = {*self.actor.out_keys, *self.world_model.out_keys}
        read = dict.fromkeys([*self.actor.in_keys, *self.world_model.in_keys])
        start = batch.select(*(key for key in read if key not in written), *self.goals)
        with set_exploration_type(ExplorationType.RANDOM):
            rollout = imagine(self.actor, self.world_model, start, self.horizon)
        if self.process is not None:
            rollout = self.process(rollout)
        done = rollout.get(("next", "terminated")).squeeze(-1)
        alive = (done.cumsum(-1) - done.long()) == 0  # no end before this step
        self.buffer.extend(rollout[alive])
