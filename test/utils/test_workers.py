from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from torchrl_mac.utils.workers import WorkerError, WorkerPool, number_of_workers


class Task:
    """Runs in a worker process; remembers in a folder what it has been asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, what, folder=None):
        self.asked += 1
        first = folder is not None and not (folder / str(what)).exists()
        if first:
            (folder / str(what)).touch()
        if what == "die" or (what == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang" or (what == "hang once" and first):
            time.sleep(60)
        if what == "slow":
            time.sleep(0.2)
        if what == "fail":
            raise ZeroDivisionError("in the task")
        return what, self.asked, os.getpid()


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(1, Task, timeout=60)
    yield pool
    pool.close()


def test_the_number_of_workers():
    assert number_of_workers(1) == 1 and number_of_workers(None) == os.cpu_count()
    for workers in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match=rf"workers={workers} .*1 or more, or absent"):
            number_of_workers(workers)


def test_tasks_share_a_process(pool):
    answers = [future.result() for future in [pool.submit("a"), pool.submit("b")]]
    assert [answer[0] for answer in answers] == ["a", "b"]
    assert answers[1][1] == answers[0][1] + 1
    assert answers[0][2] == answers[1][2] != os.getpid()


@pytest.mark.parametrize("fault", ["die once", "hang once"])
def test_a_task_is_tried_again_in_a_new_process(pool, fault, tmp_path):
    before = pool.submit("a").result()
    pool.timeout = 2 if fault == "hang once" else 60
    begun = time.monotonic()
    future = pool.submit(fault, tmp_path)
    while not (tmp_path / fault).exists():
        time.sleep(0.01)
    pool.timeout = 60  # has time to start
    answer = future.result()
    assert answer[:2] == (fault, 1)
    assert answer[2] != before[2]
    assert time.monotonic() - begun < 50
    with pytest.raises(ProcessLookupError):
        os.kill(before[2], 0)


def test_it_fails_in_the_end_and_others_go_on(pool):
    bad, worse, good = (pool.submit(what) for what in ("fail", "die", "a"))
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        bad.result()
    with pytest.raises(WorkerError, match=r"has died \(exit code -9\)"):
        worse.result()
    assert good.result()[0] == "a"


def test_closing_does_not_wait_for_what_hangs():
    pool = WorkerPool(1, Task, timeout=600)
    process = pool.submit("a").result()[2]
    pool.submit("hang")
    time.sleep(0.5)
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 10
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_after_closing_nothing_runs():
    before = multiprocessing.active_children()
    pool = WorkerPool(1, Task)
    futures = [pool.submit("hang"), pool.submit("hang")]
    time.sleep(0.2)  # its process is about to start, or has
    pool.close()
    assert set(multiprocessing.active_children()) <= set(before)
    with pytest.raises(WorkerError):
        futures[0].result(0)
    assert futures[1].cancelled()
    with pytest.raises(RuntimeError):
        pool.submit("a")


def test_map_keeps_the_order_and_takes_no_more_than_it_may(tmp_path):
    taken = []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield "slow" if number % 3 == 0 else number

    with WorkerPool(2, Task, preload=[__name__]) as pool:
        results = pool.map(tasks(), ahead=2)
        assert next(results)[0] == "slow"
        assert taken == list(range(5))
        answers = [answer[0] for answer in results]
    assert answers == ["slow" if number % 3 == 0 else number for number in range(1, 20)]


def test_map_left_early_ends_the_processes():
    before = multiprocessing.active_children()
    with WorkerPool(2, Task, attempts=1) as pool:
        for _ in pool.map(["a", "hang", "hang", "hang"], ahead=1):
            break
    assert set(multiprocessing.active_children()) <= set(before)


def test_map_raises_in_the_place_of_the_result():
    with WorkerPool(1, Task, attempts=1) as pool:
        results = pool.map(["a", "fail", "b"])
        assert next(results)[0] == "a"
        with pytest.raises(WorkerError, match="ZeroDivisionError"):
            next(results)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the libraries in /proc")
def test_a_process_imports_no_torch_for_it():
    with WorkerPool(1, _Libraries) as pool:
        libraries = pool.submit().result()
    assert "python" in libraries and "libtorch" not in libraries


class _Libraries:
    """All that a process has loaded."""

    def __call__(self):
        return Path("/proc/self/maps").read_text()


def test_ctrl_c_is_the_parents_business(pool):
    process = pool.submit("a").result()[2]
    os.kill(process, signal.SIGINT)
    assert pool.submit("b").result()[2] == process
