"""Stopping between two updates instead of within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from torchrl._utils import logger as torchrl_logger

__all__ = ["StopSignals"]

_T = TypeVar("_T")


class _Stopped(BaseException):
    """Raised by a signal where stopping at once does no harm."""


class StopSignals:
    """Notes SIGINT and SIGTERM, which would otherwise end the process anywhere.

    A second signal of the same kind does what it always does, and one that is ignored, as under
    ``nohup``, stays ignored. Only the main thread of a process can note signals; in another this
    does nothing.

    Examples:
        >>> import signal
        >>> from torchrl_mac.trainers.signals import StopSignals
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.exit_code
        143
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._before: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in self._SIGNALS}
            self._before = {n: old for n, old in before.items() if old != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self.exit_code is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 128 + number
        signal.signal(number, self._before[number])
        torchrl_logger.info(f"{signal.Signals(number).name}: stopping after this update.")
        if self._raises:
            raise _Stopped

    def interruptible(self, function: Callable[[], _T]) -> _T | None:
        """Calls what a signal may cut off; ``None`` if one has come."""
        try:
            try:
                self._raises = True
                return None if self else function()
            finally:
                self._raises = False
        except BaseException:
            if self:  # whatever the cleanup of what was cut off has made of it
                return None
            raise
