"""A process of this machine that runs tasks."""

from __future__ import annotations

import contextlib
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

__all__ = ["ProcessWorker", "WorkerError"]


class WorkerError(RuntimeError):
    """A task failed in a worker process, every time it was tried."""


class ProcessWorker:
    """A process that runs tasks one after the other.

    Args:
        context (multiprocessing.context): how it is started.
        make_task (callable): called there once, returns what runs a task.
    """

    def __init__(self, context: Any, make_task: Callable[[], Callable[..., Any]]) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_task), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._ending = threading.Lock()  # the exit code can be read only once

    def ask(self, args: tuple[Any, ...], timeout: float | None) -> Any:
        """Runs a task.

        Raises:
            WorkerError: if it fails, takes longer than ``timeout`` seconds, or the process dies.
        """
        try:
            self._pipe.send_bytes(pickle.dumps(args))  # copies: no memory is shared
            if not connection.wait([self._pipe], timeout):
                raise WorkerError(
                    f"A worker process has not answered for {timeout:g} s and was ended."
                )
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            with self._ending:
                self._process.join(1)
                code = self._process.exitcode
            raise WorkerError(
                f"A worker process has died (exit code {code}). If it was killed for its memory, "
                "use fewer workers (--workers); if it could not import the calling script, "
                'protect that script with `if __name__ == "__main__":`.'
            ) from error
        if not succeeded:
            raise WorkerError(f"A worker process has failed: {answer}")
        return answer

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        with self._ending:
            self._process.kill()
            self._process.join()
            self._pipe.close()


def _serve(pipe: connection.Connection, make_task: Callable[[], Callable[..., Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if "torch" in sys.modules:  # it came with make_task; it is not imported for this
        sys.modules["torch"].set_num_threads(1)
    task = None
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            args = pickle.loads(pipe.recv_bytes())
            try:
                task = make_task() if task is None else task
                answer = True, task(*args)
            except Exception:
                answer = False, traceback.format_exc()
            pipe.send(answer)
