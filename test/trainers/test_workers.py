from __future__ import annotations

import os
import signal
import time

import pytest

from torchrl_mac.trainers.workers import WorkerError, WorkerPool


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
        if what == "fail":
            raise ZeroDivisionError("in the task")
        return what, self.asked, os.getpid()


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(1, Task, timeout=60)
    yield pool
    pool.close()


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


def test_ctrl_c_is_the_parents_business(pool):
    process = pool.submit("a").result()[2]
    os.kill(process, signal.SIGINT)
    assert pool.submit("b").result()[2] == process
