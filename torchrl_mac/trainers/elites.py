"""Choosing the best members of an ensemble of dynamics, once they are trained."""

from __future__ import annotations

from collections.abc import Collection

import torch
from tensordict.utils import unravel_key
from torchrl.data import ReplayBuffer

from torchrl_mac.modules import EnsembleWorldModel
from torchrl_mac.trainers.distributed import mean_of_processes
from torchrl_mac.trainers.hooks import TrainerHook
from torchrl_mac.trainers.progress import Progress

__all__ = ["EliteHook"]


class EliteHook(TrainerHook):
    """Makes those members the elites that predict validation data best, at the end of phases.

    The error of a member is the squared one of its mean, as in MBPO
    (https://arxiv.org/abs/1906.08253) and MOPO (https://arxiv.org/abs/2005.13239). The elites are
    a buffer of the model's, and saved with its parameters.

    Args:
        world_model (EnsembleWorldModel): the model.
        validation_buffer (ReplayBuffer): samples have the states and actions that it reads and,
            under ``"next"``, the state that follows.

    Keyword Args:
        phases (collection of str, optional): the names of the phases after which they are chosen.
            Defaults to all.
        batch_size (int, optional): of a sample. Defaults to 256.
        num_batches (int, optional): the number of samples. Defaults to 10.
    """

    def __init__(
        self,
        world_model: EnsembleWorldModel,
        validation_buffer: ReplayBuffer,
        *,
        phases: Collection[str] | None = None,
        batch_size: int = 256,
        num_batches: int = 10,
    ) -> None:
        self.world_model = world_model
        self.validation_buffer = validation_buffer
        self.phases = phases
        self.batch_size = batch_size
        self.num_batches = num_batches

    @torch.no_grad()
    def end_phase(self, progress: Progress) -> None:
        """Chooses, after the early stopping of the phase has had its say."""
        if self.phases is not None and progress.phase.name not in self.phases:
            return
        model, errors = self.world_model, []
        keys = (model.observation_key, model.action_key, ("next", model.observation_key))
        for _ in range(self.num_batches):
            batch = self.validation_buffer.sample(self.batch_size)
            read = (batch.get(unravel_key(key)) for key in keys)
            errors.append(model.member_errors(*read).mean(-1))
        model.dynamics_network.choose_elites(mean_of_processes(torch.stack(errors).mean(0)))

    def buffers(self) -> dict[str, ReplayBuffer]:
        """What members are judged by."""
        return {"validation": self.validation_buffer}
