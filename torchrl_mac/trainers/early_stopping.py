"""Stopping when validation gets no better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["EarlyStopping", "StoppingState"]


@dataclass(frozen=True)
class EarlyStopping:
    """When a phase of training ends before its last update.

    Args:
        interval (int): the number of updates between two validations.
        patience (int): how many validations in a row may be no better than the best one.
        metric (str, optional): what is validated: a loss or metric, the smaller the better.
            Default: the sum of the phase's loss terms.
        num_batches (int, optional): how many batches a validation is the mean of. Defaults to 1.

    Raises:
        ValueError: if a number is smaller than 1.

    Examples:
        >>> from torchrl_mac.trainers import EarlyStopping, Phase
        >>> stopping = EarlyStopping(interval=500, patience=5, num_batches=10)
        >>> phase = Phase("model", ["loss_dynamics"], 50_000, 256, early_stopping=stopping)
    """

    interval: int
    patience: int
    metric: str | None = None
    num_batches: int = 1

    def __post_init__(self) -> None:
        for key in ("interval", "patience", "num_batches"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}.")


class StoppingState:
    """The validations of a phase so far, and a copy of the parameters with the best one."""

    def __init__(self, settings: EarlyStopping) -> None:
        self.settings = settings
        self.best, self.worse = math.inf, 0
        self._parameters: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, value: float, parameters: Mapping[str, Tensor]) -> bool:
        """Notes a validation; whether the phase ends here."""
        if value < self.best:
            self.best, self.worse = value, 0
            self._parameters = {name: p.detach().clone() for name, p in parameters.items()}
        else:
            self.worse += 1
        return self.has_stopped

    @property
    def has_stopped(self) -> bool:
        """Whether patience is at an end."""
        return self.worse >= self.settings.patience

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Gives the parameters the values that they had at the best validation."""
        for name, value in self._parameters.items():
            parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The best value, how many have been worse since, and the copy."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "worse": self.worse, "parameters": self._parameters}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        best = state_dict["best"]
        self.best, self.worse = math.inf if best is None else best, state_dict["worse"]
        self._parameters = dict(state_dict["parameters"])
