"""Worker processes that may die or hang."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing import connection, get_all_start_methods, get_context, spawn
from typing import Any

__all__ = ["WorkerError", "WorkerPool", "number_of_workers", "require_main_guard"]

logger = logging.getLogger("torchrl")  # TorchRL's, which takes seconds to import


class WorkerError(RuntimeError):
    """A task failed in a worker process, every time it was tried."""


def number_of_workers(workers: int | None) -> int:
    """How many workers an argument ``workers`` asks for.

    Args:
        workers (int or None): at least 1, or ``None`` for the number of CPU cores.

    Raises:
        ValueError: if it is neither.

    Examples:
        >>> number_of_workers(3), number_of_workers(None) >= 1
        (3, True)
    """
    if workers is None:
        return os.cpu_count() or 1
    if type(workers) is not int or workers < 1:
        raise ValueError(
            f"workers={workers} is too small or no whole number; it must be 1 or more, or absent "
            "for the number of CPU cores."
        )
    return workers


class WorkerPool(contextlib.AbstractContextManager):
    """Runs tasks in processes of one thread each, and starts those anew that die or hang.

    Args:
        num_workers (int): the number of processes.
        make_task (callable): called once in each process, returns what runs a task; pickled.

    Keyword Args:
        timeout (float, optional): seconds after which a task is taken to hang. A process's first
            task has the time of its start as well. Default: never.
        attempts (int, optional): how often a task is tried. Defaults to 2.
        preload (sequence of str, optional): modules that a server imports, once for all processes,
            which are forked from it where the system can do that. Default: each process starts on
            its own.

    Examples:
        >>> from functools import partial
        >>> from math import hypot
        >>> from torchrl_mac.utils.workers import WorkerPool
        >>> with WorkerPool(1, partial(partial, hypot, 3), timeout=60) as pool:
        ...     pool.submit(4).result()
        5.0
    """

    def __init__(
        self,
        num_workers: int,
        make_task: Callable[[], Callable[..., Any]],
        *,
        timeout: float | None = None,
        attempts: int = 2,
        preload: Sequence[str] = (),
    ) -> None:
        self.num_workers = num_workers
        self.make_task = make_task
        self.timeout = timeout
        self.attempts = attempts
        forks = preload and "forkserver" in get_all_start_methods()
        self._context: Any = get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(list(preload))
        self._threads = ThreadPoolExecutor(num_workers, "worker")  # each owns one process
        self._local = threading.local()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, *args: Any) -> Future:
        """Runs a task with these arguments; the future may raise a :class:`WorkerError`."""
        return self._threads.submit(self._run, args)

    def map(self, tasks: Iterable[Any], *, ahead: int = 4) -> Generator[Any, None, None]:
        """Runs tasks of one argument each.

        Args:
            tasks (iterable): the arguments.

        Keyword Args:
            ahead (int, optional): how many tasks of each process may be begun, or finished, before
                they are asked for; more cost memory. Defaults to 4.

        Yields:
            the results, in the order of the tasks.

        Raises:
            WorkerError: in place of the result of a task that failed.
        """
        tasks = iter(tasks)
        futures = deque(map(self.submit, islice(tasks, ahead * self.num_workers)))
        while futures:
            result = futures.popleft().result()
            futures.extend(map(self.submit, islice(tasks, 1)))
            yield result

    def _run(self, args: tuple[Any, ...]) -> Any:
        for attempt in range(1, self.attempts + 1):
            worker = self._worker()
            try:
                return worker.ask(args, self.timeout)
            except WorkerError as error:
                self._workers.discard(worker)
                worker.kill()
                self._local.worker = None
                if self._closed or attempt == self.attempts:
                    raise
                logger.warning(f"{error} Trying again in a new one.")
        raise AssertionError("unreachable")

    def _worker(self) -> _Worker:
        """This thread's process."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:  # so that none is started behind the back of close()
                if self._closed:
                    raise WorkerError("The worker processes have been closed.")
                worker = self._local.worker = _Worker(self._context, self.make_task)
                self._workers.add(worker)
        return worker

    def close(self) -> None:
        """Ends all processes, whatever they do."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
        self._threads.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


def require_main_guard() -> None:
    """Raises an error in a worker process that imports the script which has started it.

    A script that starts processes must do so below ``if __name__ == "__main__":``. Without it each
    worker would do all over again, such as wait for a lock that the script holds.

    Raises:
        RuntimeError: if so.

    Examples:
        >>> require_main_guard()  # this is no worker
    """
    spawn.get_preparation_data("")  # Python's own check, which Process.start makes too late


class _Worker:
    def __init__(self, context: Any, make_task: Callable[[], Callable[..., Any]]) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_task), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._ending = threading.Lock()  # the exit code can be read only once

    def ask(self, args: tuple[Any, ...], timeout: float | None) -> Any:
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
