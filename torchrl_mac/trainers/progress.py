"""How far training has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchrl_mac.trainers.phase import Phase

__all__ = ["Progress"]


class Progress:
    """The updates that were made, in all and of each phase, and the time they took.

    Args:
        phases (sequence of Phase): what is to be trained in all.

    Keyword Args:
        first_update (int, optional): the count of all updates begins there. Defaults to 0.

    Examples:
        >>> from torchrl_mac.trainers import Phase
        >>> from torchrl_mac.trainers.progress import Progress
        >>> progress = Progress([Phase("model", ["loss_dynamics"], num_updates=2, batch_size=8)])
        >>> for phase in progress.remaining():
        ...     while not progress.phase_is_over:
        ...         progress.advance()
        >>> progress.updates, progress.is_over
        (2, True)
    """

    def __init__(self, phases: Sequence[Phase], *, first_update: int = 0) -> None:
        self.phases = list(phases)
        self.updates = first_update
        self.skipped_updates = 0
        self.train_seconds = 0.0
        self._past: list[dict[str, Any]] = []  # the phases that were begun

    @property
    def phase(self) -> Phase:
        """The current phase, or the last one that was."""
        return self.phases[max(0, len(self._past) - 1)]

    @property
    def has_begun(self) -> bool:
        """Whether a phase is, or was, the current one."""
        return bool(self._past)

    @property
    def phase_updates(self) -> int:
        """The number of updates that the current phase has made."""
        return self._past[-1]["updates"] if self._past else 0

    @property
    def later_phases(self) -> list[Phase]:
        """The phases after the current one."""
        return self.phases[len(self._past) :]

    @property
    def phase_is_over(self) -> bool:
        """Whether the current phase has made all of its updates, or was stopped."""
        return _is_over(self._past[-1], self.phase)

    @property
    def is_over(self) -> bool:
        """Whether all phases are over."""
        return len(self._past) == len(self.phases) and (not self._past or self.phase_is_over)

    @property
    def done(self) -> int:
        """The number of updates of all phases so far."""
        return sum(past["updates"] for past in self._past)

    def beginning(self, phase: str) -> int | None:
        """The number of updates of all phases before the first of this name, if it has begun."""
        names = [past["name"] for past in self._past]
        if phase not in names:
            return None
        return sum(past["updates"] for past in self._past[: names.index(phase)])

    def remaining(self) -> Iterator[Phase]:
        """The phases that are not over, each as it becomes the current one."""
        for k, phase in enumerate(self.phases):
            if k == len(self._past):
                self._past.append({"name": phase.name, "updates": 0, "stopped": False})
            self._past[k]["num_updates"] = phase.num_updates
            if not _is_over(self._past[k], phase):
                yield phase

    def advance(self) -> None:
        """Counts an update of the current phase."""
        self.updates += 1
        self._past[-1]["updates"] += 1

    def stop_phase(self) -> None:
        """Ends the current phase before its last update."""
        self._past[-1]["stopped"] = True

    def state_dict(self) -> dict[str, Any]:
        """All counts."""
        return {
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
            "train_seconds": self.train_seconds,
            "phases": [dict(past) for past in self._past],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: if another sequence of phases has led to it. The phase that was trained last
                may have another number of updates now, as long as they are enough.
        """
        past = [dict(entry) for entry in state_dict["phases"]]
        now = [(phase.name, phase.num_updates) for phase in self.phases]
        for k, entry in enumerate(past):
            is_last = k == len(past) - 1
            if (
                k >= len(now)
                or now[k][0] != entry["name"]
                or (now[k][1] < entry["updates"] if is_last else now[k][1] != entry["num_updates"])
            ):
                made = [(entry["name"], entry["updates"]) for entry in past]
                raise ValueError(
                    f"The checkpoint has made the updates {made}; it cannot go on with {now}."
                )
        self._past = past
        self.updates = state_dict["updates"]
        self.skipped_updates = state_dict["skipped_updates"]
        self.train_seconds = state_dict["train_seconds"]


def _is_over(past: Mapping[str, Any], phase: Phase) -> bool:
    return past["stopped"] or past["updates"] >= phase.num_updates
