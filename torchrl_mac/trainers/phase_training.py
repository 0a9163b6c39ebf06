"""A phase at work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_mac.modules import FlowRejectionActor
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.update import LossUpdate

__all__ = ["PhaseTraining"]


class PhaseTraining(contextlib.AbstractContextManager):
    """The optimizer, schedule and update of a phase.

    In its context the losses have the phase's terms alone, and actors its number of candidates.

    Args:
        phase (Phase): what to train.
        losses (mapping of LossModule): the objectives, by name.
        target_updater (TargetNetUpdater, optional): used if the phase trains its loss.

    Keyword Args:
        **switches: of :class:`~torchrl_mac.trainers.LossUpdate`.
    """

    def __init__(
        self,
        phase: Phase,
        losses: Mapping[str, LossModule],
        target_updater: TargetNetUpdater | None,
        **switches: Any,
    ) -> None:
        self.phase = phase
        self.losses = {
            loss: [term for term in loss.out_keys if term in phase.losses]
            for loss in losses.values()
        }
        trained = [loss for loss, terms in self.losses.items() if terms]
        updater = target_updater
        if updater is not None and not any(updater.loss_module is loss for loss in trained):
            updater = None
        parameters = [parameter for loss in trained for parameter in loss.parameters()]
        captured = bool(switches.get("cudagraphs"))
        lr = torch.tensor(phase.lr, device=parameters[0].device) if captured else phase.lr
        optimizer = torch.optim.Adam(parameters, lr=lr, fused=True, capturable=captured)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.lr_factor)
        self.update = LossUpdate(trained, optimizer, updater, **switches)
        self._num_candidates: dict[FlowRejectionActor, int] = {}

    def __enter__(self) -> PhaseTraining:
        for loss, terms in self.losses.items():
            if terms:
                loss.select_out_keys(*terms)
        if self.phase.num_candidates is not None:
            actors = {getattr(loss, "actor_network", None) for loss in self.losses}
            for actor in actors:
                if isinstance(actor, FlowRejectionActor):
                    self._num_candidates[actor] = actor.num_candidates
                    actor.num_candidates = self.phase.num_candidates
        return self

    def __exit__(self, *_: object) -> None:
        for loss in self.losses:
            loss.reset_out_keys()
        while self._num_candidates:
            actor, num_candidates = self._num_candidates.popitem()
            actor.num_candidates = num_candidates

    def step(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update and returns the losses."""
        losses = self.update(batch)
        self.schedule.step()
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The state of the update and the schedule; losses have their own."""
        return {"update": self.update.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.update.load_state_dict(state_dict["update"])
        self.schedule.load_state_dict(state_dict["schedule"])
