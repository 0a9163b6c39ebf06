"""Evaluations that go on beside training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchrl._utils import logger as torchrl_logger

__all__ = ["PendingEvaluations"]


class PendingEvaluations:
    """Evaluations that were begun and whose results are yet to come, oldest first.

    Args:
        report (callable): called with the metrics of an evaluation, empty if it has failed, and the
            number of updates it was begun at.
    """

    def __init__(self, report: Callable[[Mapping[str, float], int], None]) -> None:
        self._report = report
        self._pending: list[tuple[int, Any]] = []

    def add(self, updates: int, evaluation: Any) -> None:
        """Notes an :class:`~torchrl_mac.trainers.Evaluation` begun after so many updates."""
        self._pending.append((updates, evaluation))

    def collect(self, *, wait: bool) -> None:
        """Reports those that are finished; with ``wait`` all of them, as they finish."""
        while self._pending and (wait or self._pending[0][1].done()):
            updates, evaluation = self._pending[0]
            metrics: Mapping[str, float] = {}
            try:
                metrics = evaluation.result()
            except Exception as error:
                torchrl_logger.warning(f"The evaluation after {updates} updates failed: {error!r}")
            del self._pending[0]
            self._report(metrics, updates)

    def state(self) -> list[dict[str, Any]]:
        """What it takes to begin them anew: the updates, and the actor's parameters."""
        return [{"updates": updates, "state": it.state} for updates, it in self._pending]
