"""Evaluations during and after training, some of which go on beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl._utils import logger as torchrl_logger

from torchrl_mac.trainers.signals import StopSignals

__all__ = ["Monitor"]


class Monitor:
    """Calls for evaluations and reports each for the update that it was begun at.

    Args:
        evaluate (callable, optional): called after the last update; returns metrics.
        monitor (callable, optional): called before that; returns metrics, or an
            :class:`~torchrl_mac.trainers.Evaluation` that goes on. Defaults to ``evaluate``.
        report (callable): called with the metrics of an evaluation, empty if it has failed, and the
            number of updates.
    """

    def __init__(
        self,
        evaluate: Callable[[], Mapping[str, float]] | None,
        monitor: Callable[..., Any] | None,
        report: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self._evaluate = evaluate
        self._monitor: Callable[..., Any] | None = evaluate if monitor is None else monitor
        self._report = report
        self._pending: list[tuple[int, Any]] = []

    def run(self, updates: int, *, is_last: bool, stop: StopSignals) -> dict[str, float]:
        """Evaluates, until a signal comes; the metrics, if they are there at once."""
        evaluate = self._evaluate if is_last else self._monitor
        found: Any = {}
        try:
            if evaluate is not None:
                found = stop.interruptible(evaluate)
        except Exception as error:
            if is_last:
                raise
            torchrl_logger.warning(f"Training goes on without an evaluation: {error!r}")
        if stop:
            return {}
        if isinstance(found, Mapping):
            self._report(found, updates)
            return dict(found)
        self._pending.append((updates, found))
        self.collect(wait=False)
        return {}

    def collect(self, *, wait: bool) -> None:
        """Reports those that have finished; with ``wait`` all of them, as they finish."""
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
        """What it takes to begin pending ones anew: the updates, and the actor's parameters."""
        return [{"updates": updates, "state": it.state} for updates, it in self._pending]

    def begin_again(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Begins those anew that :meth:`state` has listed."""
        if self._monitor is not None:
            for saved in state:
                self._pending.append((saved["updates"], self._monitor(state=saved["state"])))
