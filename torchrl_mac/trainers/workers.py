"""Worker processes that may die or hang."""

from __future__ import annotations

import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, get_context
from typing import Any

import torch
from torchrl._utils import logger as torchrl_logger

__all__ = ["WorkerError", "WorkerPool"]


class WorkerError(RuntimeError):
    """A task failed in a worker process, every time it was tried."""


class WorkerPool:
    """Runs tasks in processes of one thread each, and starts those anew that die or hang.

    Args:
        num_workers (int): the number of processes.
        make_task (callable): called once in each process, returns what runs a task; pickled.

    Keyword Args:
        timeout (float): seconds after which a task is taken to hang. A process's first task has
            the time of its start as well.
        attempts (int, optional): how often a task is tried. Defaults to 2.

    Examples:
        >>> from functools import partial
        >>> from math import hypot
        >>> from torchrl_mac.trainers.workers import WorkerPool
        >>> pool = WorkerPool(1, partial(partial, hypot, 3), timeout=60)
        >>> pool.submit(4).result()
        5.0
        >>> pool.close()
    """

    def __init__(
        self,
        num_workers: int,
        make_task: Callable[[], Callable[..., Any]],
        *,
        timeout: float,
        attempts: int = 2,
    ) -> None:
        self.make_task = make_task
        self.timeout = timeout
        self.attempts = attempts
        self._threads = ThreadPoolExecutor(num_workers, "worker")  # each owns one process
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._closed = False

    def submit(self, *args: Any) -> Future:
        """Runs a task with these arguments; the future may raise a :class:`WorkerError`."""
        return self._threads.submit(self._run, args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        for attempt in range(1, self.attempts + 1):
            worker = getattr(self._local, "worker", None)
            if worker is None:
                worker = self._local.worker = _Worker(self.make_task)
                self._workers.add(worker)
            try:
                return worker.ask(args, self.timeout)
            except WorkerError as error:
                self._workers.discard(worker)
                worker.kill()
                self._local.worker = None
                if self._closed or attempt == self.attempts:
                    raise
                torchrl_logger.warning(f"{error} Trying again in a new one.")
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in list(self._workers):  # started meanwhile
            worker.kill()


class _Worker:
    def __init__(self, make_task: Callable[[], Callable[..., Any]]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_task), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, args: tuple[Any, ...], timeout: float) -> Any:
        try:
            self._pipe.send_bytes(pickle.dumps(args))  # copies: no memory is shared
            if not connection.wait([self._pipe], timeout):
                raise WorkerError(
                    f"A worker process has not answered for {timeout:g} s and was ended."
                )
            succeeded, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            code = self._process.exitcode
            raise WorkerError(f"A worker process has died (exit code {code}).") from error
        if not succeeded:
            raise WorkerError(f"A worker process has failed: {answer}")
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: connection.Connection, make_task: Callable[[], Callable[..., Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)
    task = None
    while True:
        try:
            args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            task = make_task() if task is None else task
            answer = True, task(*args)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
