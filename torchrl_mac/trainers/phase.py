"""What a stretch of training trains, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Phase", "check_past"]


@dataclass(frozen=True)
class Phase:
    """A number of updates that train chosen loss terms with one batch size and learning rate.

    The reference implementation of MAC trains everything jointly, which is one phase. With
    little compute it pays to learn the behaviour policy and the world model first and the
    values on top of them, frozen.

    Args:
        name (str): names the phase in logs.
        losses (sequence of str): the loss terms to train, such as ``"loss_flow"``.
        num_updates (int): the number of updates.
        batch_size (int): the number of samples in an update.
        lr (float, optional): Adam's learning rate. Defaults to ``3e-4``.
        schedule (str, optional): ``"constant"``, or ``"cosine"`` from ``lr`` down to 0 at the
            phase's end. Defaults to ``"constant"``.
        warmup_updates (int, optional): the number of updates over which the learning rate rises
            linearly to ``lr``. Defaults to 0.
        num_candidates (int, optional): how many candidates the losses' actors choose from in this
            phase. Default: as many as they were made with.
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
    losses: Sequence[str]
    num_updates: int
    batch_size: int
    lr: float = 3e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = 0
    num_candidates: int | None = None
    eval_interval: int = 0

    def __post_init__(self) -> None:
        least_of = {"num_updates": 1, "batch_size": 1, "warmup_updates": 0, "eval_interval": 0}
        if self.num_candidates is not None:
            least_of["num_candidates"] = 1
        for key, least in least_of.items():
            if getattr(self, key) < least:
                raise ValueError(
                    f"Phase {self.name!r}: {key} must be at least {least}, "
                    f"got {getattr(self, key)}."
                )
        if not self.lr > 0:
            raise ValueError(f"Phase {self.name!r}: lr must be positive, got {self.lr}.")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(
                f"Phase {self.name!r}: schedule must be 'constant' or 'cosine', "
                f"got {self.schedule!r}."
            )
        if not self.losses:
            raise ValueError(f"Phase {self.name!r} trains nothing: name at least one loss.")

    def lr_factor(self, update: int) -> float:
        """What ``lr`` is multiplied with at ``update``, counted from 0 in this phase."""
        if update < self.warmup_updates:
            return (update + 1) / self.warmup_updates
        if self.schedule == "constant":
            return 1.0
        length = max(1, self.num_updates - self.warmup_updates)
        progress = min(1.0, (update - self.warmup_updates) / length)
        return 0.5 * (1 + math.cos(math.pi * progress))


def check_past(
    phases: Sequence[Phase], trained: Sequence[tuple[str, int]], num_updates: int
) -> None:
    """Checks that what has been trained is the beginning of ``phases``.

    Args:
        phases (sequence of Phase): what is to be trained in all.
        trained (sequence of tuple): name and number of updates of the phases in mind before.
        num_updates (int): how many updates of those have been made. The phase that was trained
            last may have another number of updates now, as long as they are enough.

    Raises:
        ValueError: if it is not.

    Examples:
        >>> from torchrl_mac.trainers import Phase
        >>> check_past([Phase("values", ["loss_value"], 200, 256)], [("values", 100)], 100)
    """
    now = [(phase.name, phase.num_updates) for phase in phases]
    left = num_updates
    for k, (name, planned) in enumerate(trained):
        if left <= 0:
            return
        done = min(left, planned)
        is_last = left <= planned
        if (
            k >= len(now)
            or now[k][0] != name
            or now[k][1] < done
            or not (is_last or now[k][1] == planned)
        ):
            raise ValueError(
                f"The checkpoint has made {num_updates} updates of the phases {list(trained)}; it "
                f"cannot go on with {now}."
            )
        left -= planned
