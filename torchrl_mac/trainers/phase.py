"""Phases: a number of updates that train chosen loss terms, described and at work."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from torchrl_mac.trainers.distributed import mean_of_processes
from torchrl_mac.trainers.early_stopping import EarlyStopping, StoppingState
from torchrl_mac.trainers.optimizer import make_adam, parameter_groups, parameter_names
from torchrl_mac.trainers.update import LossUpdate

__all__ = ["Phase", "PhaseTraining", "check_phase"]


@dataclass(frozen=True)
class Phase:
    """A number of updates that train chosen loss terms with one batch size and schedule.

    The reference implementation of MAC trains everything jointly, which is one phase. With
    little compute it pays to learn the behaviour policy and the world model first and the
    values on top of them, frozen: what no term of a phase trains stays as it is.

    Args:
        name (str): names the phase in logs.
        terms (sequence of str): the loss terms to train, such as ``"loss_flow"``; where several
            losses have it, with the loss's name: ``"behaviour.loss_flow"``.
        num_updates (int): the number of updates.
        batch_size (int): the number of samples in an update.
        lr (float, optional): Adam's learning rate. Defaults to ``3e-4``.
        schedule (str, optional): ``"constant"``, or ``"cosine"`` from the learning rates down to 0
            at the phase's end. Defaults to ``"constant"``.
        warmup_updates (int, optional): the number of updates over which the learning rates rise
            linearly. Defaults to 0.
        optim (dict, optional): Adam's settings (``lr``, ``betas``, ``eps``, ``weight_decay``, ...)
            for some modules, see :func:`~torchrl_mac.trainers.parameter_groups`:
            ``{"log_alpha": {"lr": 1e-4}}``.
        keep_moments (bool, optional): whether Adam goes on with the moments that parameters have
            from earlier phases, instead of from zero. Defaults to ``False``.
        overrides (dict, optional): attributes of the losses, or of their parts, that have another
            value in this phase: ``{"values.actor_network.num_candidates": 2}``.
        early_stopping (EarlyStopping or dict, optional): ends the phase when validation gets no
            better, with the best parameters. Defaults to none.
        eval_interval (int, optional): the number of updates between two evaluations in this
            phase; 0 (default) for none.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> from torchrl_mac.trainers import Phase
        >>> phase = Phase("values", ["loss_value", "loss_qvalue"], 100, 256, schedule="cosine")
        >>> phase.lr_factor(0), round(phase.lr_factor(50), 3), phase.lr_factor(100)
        (1.0, 0.5, 0.0)
    """

    name: str
    terms: Sequence[str]
    num_updates: int
    batch_size: int
    lr: float = 3e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = 0
    optim: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keep_moments: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    early_stopping: EarlyStopping | None = None
    eval_interval: int = 0

    def __post_init__(self) -> None:
        least_of = {"num_updates": 1, "batch_size": 1, "warmup_updates": 0, "eval_interval": 0}
        for key, least in least_of.items():
            value = getattr(self, key)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"Phase {self.name!r}: {key} must be at least {least} and a whole number, "
                    f"got {value}."
                )
        if not self.lr > 0:
            raise ValueError(f"Phase {self.name!r}: lr must be positive, got {self.lr}.")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(
                f"Phase {self.name!r}: schedule must be 'constant' or 'cosine', "
                f"got {self.schedule!r}."
            )
        if not self.terms:
            raise ValueError(f"Phase {self.name!r} trains nothing: name at least one term.")
        if isinstance(self.early_stopping, Mapping):
            object.__setattr__(self, "early_stopping", EarlyStopping(**self.early_stopping))

    def lr_factor(self, update: int) -> float:
        """What learning rates are multiplied with at ``update``, counted from 0 in this phase."""
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        if self.schedule == "constant":
            return 1.0
        length = max(1, self.num_updates - self.warmup_updates)
        progress = min(1.0, (update - self.warmup_updates) / length)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def only(self, terms: Sequence[str], batch_scale: float = 1.0) -> Phase | None:
        """This phase with those of its terms that are among ``terms``; ``None`` without any.

        Its batches are ``batch_scale`` times as large.
        """
        kept = [term for term in self.terms if term in terms]
        size = max(1, round(batch_scale * self.batch_size))
        return replace(self, terms=kept, batch_size=size) if kept else None


def terms_of(phase: Phase, losses: Mapping[str, LossModule]) -> dict[str, list[str]]:
    """The terms that a phase trains, of each loss.

    Raises:
        ValueError: if it names a term that no loss has, or that several have.
    """
    having: dict[str, list[tuple[str, str]]] = {}
    for name, loss in losses.items():
        for term in loss.out_keys:
            if term.startswith("loss_"):
                for key in (term, f"{name}.{term}"):
                    having.setdefault(key, []).append((name, term))
    found: dict[str, list[str]] = {name: [] for name in losses}
    for key in phase.terms:
        owners = having.get(key, [])
        if len(owners) != 1:
            problem = "which no loss has" if not owners else f"of {[name for name, _ in owners]}"
            choices = sorted(key for key, owners in having.items() if len(owners) == 1)
            raise ValueError(
                f"Phase {phase.name!r} trains {key!r}, {problem}; choose among {choices}."
            )
        name, term = owners[0]
        found[name].append(term)
    return found


def overrides_of(phase: Phase, losses: Mapping[str, LossModule]) -> list[tuple[Any, str, Any]]:
    """The objects, attributes and values of a phase's overrides.

    Raises:
        ValueError: if there is no such attribute.
    """
    found = []
    for path, value in phase.overrides.items():
        name, *parts = path.split(".")
        owner: Any = losses.get(name)
        for part in parts[:-1]:
            owner = getattr(owner, part, None)
        if not parts or not hasattr(owner, parts[-1]):
            raise ValueError(
                f"Phase {phase.name!r} overrides {path!r}, which does not exist: name one of the "
                f"losses {list(losses)} and an attribute, such as 'values.imagination_horizon'."
            )
        found.append((owner, parts[-1], value))
    return found


def check_phase(phase: Phase, losses: Mapping[str, LossModule]) -> None:
    """Checks that all that a phase names exists.

    Raises:
        ValueError: if it does not.
    """
    terms = terms_of(phase, losses)
    parameter_groups({name: losses[name] for name in losses if terms[name]}, phase.optim)
    overrides_of(phase, losses)


class PhaseTraining(contextlib.AbstractContextManager):
    """The optimizer, schedule and update of a phase.

    In its context the losses have the phase's terms alone, beside their metrics, and the phase's
    overrides are in force.

    Args:
        phase (Phase): what to train.
        losses (mapping of LossModule): the objectives, by name.
        target_updaters (sequence of TargetNetUpdater): those of the losses that are trained step.

    Keyword Args:
        **switches: of :class:`~torchrl_mac.trainers.LossUpdate`.
    """

    def __init__(
        self,
        phase: Phase,
        losses: Mapping[str, LossModule],
        target_updaters: Sequence[TargetNetUpdater] = (),
        **switches: Any,
    ) -> None:
        self.phase = phase
        self.losses = dict(losses)
        self.terms = terms_of(phase, losses)
        trained = {name: loss for name, loss in losses.items() if self.terms[name]}
        self.parameters = parameter_names(trained)
        optimizer = make_adam(
            trained, phase.lr, phase.optim, capturable=bool(switches.get("cudagraphs"))
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.lr_factor)
        updaters = [
            updater
            for updater in target_updaters
            if any(updater.loss_module is loss for loss in trained.values())
        ]
        self.update = LossUpdate(trained, optimizer, updaters, **switches)
        self.stopping = StoppingState(phase.early_stopping) if phase.early_stopping else None
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> PhaseTraining:
        for name, terms in self.terms.items():
            loss = self.losses[name]
            if terms:
                metrics = [key for key in loss.out_keys if not key.startswith("loss_")]
                loss.select_out_keys(*terms, *metrics)
        for owner, attribute, value in overrides_of(self.phase, self.losses):
            self._replaced.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
        return self

    def __exit__(self, *_: object) -> None:
        for loss in self.losses.values():
            loss.reset_out_keys()
        while self._replaced:
            setattr(*self._replaced.pop())

    def step(self, batch: TensorDictBase) -> TensorDictBase:
        """Makes one update and returns the losses and metrics."""
        metrics = self.update(batch)
        self.schedule.step()
        return metrics

    @torch.no_grad()
    def validate(self, buffer: Any) -> tuple[list[torch.Tensor], TensorDictBase]:
        """The terms and metrics of another buffer's batch; training's random numbers stay."""
        devices = {p.device for p in self.parameters.values() if p.is_cuda}
        with torch.random.fork_rng(devices):
            return self.update.compute(buffer.sample(self.phase.batch_size))

    def stops(self, updates: int, validation_buffer: Any) -> bool:
        """Validates, if it is time after ``updates`` of them; whether the phase stops early."""
        settings, stopping = self.phase.early_stopping, self.stopping
        if settings is None or stopping is None or updates % settings.interval:
            return False
        values = []
        for _ in range(settings.num_batches):
            terms, metrics = self.validate(validation_buffer)
            value = sum(terms) if settings.metric is None else metrics[settings.metric]
            values.append(float(value))
        device = self.update.guard.counts.device
        value = torch.tensor(fmean(values), dtype=torch.float64, device=device)
        return stopping.note(float(mean_of_processes(value)), self.parameters)

    def moments(self) -> dict[str, dict[str, Any]]:
        """Adam's state of each parameter that has one, by name."""
        state = self.update.optimizer.state
        return {name: dict(state[p]) for name, p in self.parameters.items() if state.get(p)}

    def load_moments(self, moments: Mapping[str, Mapping[str, Any]]) -> None:
        """Lets Adam go on with what :meth:`moments` returned, where names agree."""
        for name, parameter in self.parameters.items():
            if name in moments:
                self.update.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True)
                    for key, value in moments[name].items()
                }

    def state_dict(self) -> dict[str, Any]:
        """The state of the update, the schedule and early stopping; losses have their own."""
        return {
            "update": self.update.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stopping": self.stopping.state_dict() if self.stopping else {},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.update.load_state_dict(state_dict["update"])
        self.schedule.load_state_dict(state_dict["schedule"])
        if self.stopping and state_dict["stopping"]:
            self.stopping.load_state_dict(state_dict["stopping"])
