"""Worker processes that may die or hang."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, spawn
from typing import Any, Literal, get_args

from torchrl_mac.utils.process_worker import ProcessWorker, WorkerError
from torchrl_mac.utils.ray_worker import RayWorker

__all__ = ["Engine", "WorkerError", "WorkerPool", "number_of_workers", "require_main_guard"]

Engine = Literal["processes", "ray"]

logger = logging.getLogger("torchrl")  # TorchRL's, which takes seconds to import


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

    They are processes of this machine or, with ``engine="ray"``, actors of a Ray cluster
    (https://docs.ray.io): the one at the address in the environment variable ``RAY_ADDRESS``, or
    one that Ray starts on this machine. A task is the same in either.

    Args:
        num_workers (int): the number of processes.
        make_task (callable): called once in each process, returns what runs a task; pickled.

    Keyword Args:
        timeout (float, optional): seconds after which a task is taken to hang. A process's first
            task has the time of its start as well. Default: never.
        attempts (int, optional): how often a task is tried. Defaults to 2.
        preload (sequence of str, optional): modules that a server imports, once for all processes,
            which are forked from it where the system can do that. Default: each process starts on
            its own. An actor of Ray always does.
        engine (str, optional): ``"processes"`` or ``"ray"``. Defaults to ``"processes"``.

    Raises:
        ImportError: if Ray is asked for and not installed.
        ValueError: if the engine is neither.

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
        engine: Engine = "processes",
    ) -> None:
        if engine not in get_args(Engine):
            raise ValueError(f"engine={engine!r} is none of {', '.join(get_args(Engine))}.")
        self.num_workers = num_workers
        self.make_task = make_task
        self.timeout = timeout
        self.attempts = attempts
        self._start: Callable[..., ProcessWorker | RayWorker]
        if engine == "ray":
            RayWorker.connect(num_workers)
            self._start = RayWorker
        else:
            forks = preload and "forkserver" in get_all_start_methods()
            context = get_context("forkserver" if forks else "spawn")
            if forks:
                context.set_forkserver_preload(list(preload))
            self._start = partial(ProcessWorker, context)
        self._threads = ThreadPoolExecutor(num_workers, "worker")  # each owns one process
        self._local = threading.local()
        self._workers: set[ProcessWorker | RayWorker] = set()
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

    def _worker(self) -> ProcessWorker | RayWorker:
        """This thread's process."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:  # so that none is started behind the back of close()
                if self._closed:
                    raise WorkerError("The worker processes have been closed.")
                worker = self._local.worker = self._start(self.make_task)
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
