from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from test_checkpoints import PHASES, rows, same, trained
from test_trainer import OBS, TERMS, A, H, make_trainer, parameters
from torchrl.record import CSVLogger

from torchrl_mac.data import ActionChunkExperienceReplay
from torchrl_mac.trainers import JSONLinesLogger, Phase, RunCheckpoints, RunFolder, rewind
from torchrl_mac.trainers.signals import StopSignals


def _stay(folder, pipe):
    with RunFolder(folder):
        pipe.send("in")
        pipe.recv()


class TestRunFolder:
    def test_a_second_run_refuses(self, tmp_path, processes):
        ours, theirs = processes.Pipe()
        other = processes.Process(target=_stay, args=(tmp_path, theirs))
        other.start()
        assert ours.recv() == "in"
        with pytest.raises(RuntimeError, match=r"Another process runs in .*hydra.run.dir"):
            RunFolder(tmp_path).__enter__()
        other.kill()  # a dead process holds nothing
        other.join()
        with RunFolder(tmp_path):
            pass

    def test_never_sets_the_earlier_run_aside(self, tmp_path):
        (tmp_path / ".hydra").mkdir()
        (tmp_path / "mac.log").touch()
        with RunFolder(tmp_path) as run:
            first = run.id
            (tmp_path / "logs").mkdir()
        with RunFolder(tmp_path) as run:
            assert run.id == first
            assert (tmp_path / "logs").is_dir()
        with RunFolder(tmp_path, resume="never") as run:
            assert run.id != first
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".hydra", ".lock", "earlier-1", "mac.log", "run.json"]
        assert json.loads((tmp_path / "earlier-1/run.json").read_text())["id"] == first
        with RunFolder(tmp_path, resume="never"):
            assert (tmp_path / "earlier-2/run.json").is_file()

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_what_is_no_run_is_left_alone(self, tmp_path, resume):
        (tmp_path / ".git").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / ".hydra").mkdir()  # Hydra has been there already
        (tmp_path / "mac.log").touch()
        for _ in range(2):  # nor is the lock kept
            with (
                pytest.raises(FileExistsError, match=r"is not a run, but has \['\.git', 'notes"),
                RunFolder(tmp_path, resume=resume),
            ):
                pass
        assert (tmp_path / "notes.txt").read_text() == "mine"
        assert not list(tmp_path.glob("earlier-*")) and not (tmp_path / "run.json").exists()

    def test_a_checkpoint_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            RunFolder(tmp_path, resume=tmp_path / "checkpoint-1").__enter__()


class TestSettings:
    def checkpoints(self, folder, **config):
        return RunCheckpoints(
            folder / "checkpoints", config=config, fixed=["cells", "phases"], interval=1
        )

    def test_changes_are_listed(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "torchrl_mac.trainers.run_checkpoints.torchrl_logger.warning", seen.append
        )
        trained(tmp_path, 5, checkpoints=self.checkpoints(tmp_path, cells=[8], goals={"p": 0.1}))
        trained(tmp_path, checkpoints=self.checkpoints(tmp_path, cells=[8], goals={"p": 0.2}))
        assert seen == ["Changed since the checkpoint: goals.p: 0.1 -> 0.2"]

    def test_those_that_break_the_run_are_refused_by_name(self, tmp_path):
        trained(tmp_path, 5, checkpoints=self.checkpoints(tmp_path, cells=[8], gamma=0.9))
        before = rows(tmp_path)
        with pytest.raises(ValueError, match=r"cannot go on with another cells: \[8\] -> \[16\]\."):
            trained(tmp_path, checkpoints=self.checkpoints(tmp_path, cells=[16], gamma=0.9))
        assert rows(tmp_path) == before
        trained(tmp_path, checkpoints=self.checkpoints(tmp_path, cells=[8], gamma=0.99))

    @pytest.mark.parametrize(
        "phases",
        [
            PHASES[::-1],
            PHASES[:1],
            [Phase("model", ["loss_flow"], 5, 8), PHASES[1]],
            [PHASES[0], Phase("values", ["loss_value"], 1, 8)],
        ],
    )
    def test_another_past_is_refused(self, tmp_path, phases):
        trained(tmp_path, 6)
        with pytest.raises(ValueError, match=r"has made the updates .*; it cannot go on with"):
            trained(tmp_path, phases=phases)

    def test_the_last_phase_may_become_longer(self, tmp_path):
        trained(tmp_path)
        longer = [PHASES[0], Phase("values", ["loss_value", "loss_qvalue"], 8, 8)]
        assert trained(tmp_path, phases=longer).updates == 12


class TestSignals:
    @pytest.fixture(autouse=True)
    def _heeded(self):
        """Tests that run in the background may have been told to ignore Ctrl-C."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_run_stops_after_the_update_and_goes_on_later(self, tmp_path, number, code):
        whole = trained(tmp_path / "whole")
        checkpoints = RunCheckpoints(tmp_path / "parts/checkpoints")
        torch.manual_seed(0)
        csv = CSVLogger("logs", log_dir=str(tmp_path / "parts"))
        trainer = make_trainer(PHASES, checkpoints=checkpoints, loggers=[csv], log_interval=1)
        sample = trainer.buffer.sample

        def kill(size):
            if trainer.updates == 6:
                signal.raise_signal(number)
            return sample(size)

        trainer.buffer.sample = kill
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(SystemExit) as caught:
            trainer.train()
        assert caught.value.code == code
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert [path.name[-1] for path in checkpoints.paths()] == ["7"]
        assert same(parameters(whole), parameters(trained(tmp_path / "parts")))
        assert rows(tmp_path / "whole") == rows(tmp_path / "parts")

    @pytest.mark.parametrize("where", ["work", "cleanup", "another error"])
    def test_what_cleanup_makes_of_a_signal_does_not_escape(self, where):
        def evaluate():
            try:
                if where != "cleanup":
                    signal.raise_signal(signal.SIGTERM)
            except BaseException as stopped:
                if where == "another error":
                    raise RuntimeError("the environments could not be closed") from stopped
                raise
            finally:
                if where == "cleanup":
                    signal.raise_signal(signal.SIGTERM)

        with StopSignals() as stop:
            assert stop.interruptible(evaluate) is None
            assert stop.exit_code == 143
            assert stop.interruptible(lambda: 1) is None  # there is no more time for that

    def test_errors_without_a_signal_are_errors(self):
        with StopSignals() as stop, pytest.raises(ZeroDivisionError):
            stop.interruptible(lambda: 1 / 0)
        assert not stop

    def test_an_evaluation_is_left_at_once(self, tmp_path):
        def evaluate():
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
            time.sleep(30)
            return {"success_rate": 0.0}

        begun = time.monotonic()
        with pytest.raises(SystemExit):
            trained(tmp_path, evaluate=evaluate)
        assert time.monotonic() - begun < 20
        trained(tmp_path, evaluate=lambda: {"success_rate": 0.5})
        assert rows(tmp_path)["eval/success_rate.csv"] == "10,0.5\n"

    def test_without_checkpoints_signals_are_what_they_were(self):
        trainer = make_trainer(PHASES)
        sample = trainer.buffer.sample
        trainer.buffer.sample = lambda size: signal.raise_signal(signal.SIGINT) or sample(size)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    def test_a_second_signal_is_not_held_back(self):
        with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            assert stop and stop.exit_code == 130
            signal.raise_signal(signal.SIGINT)

    def test_what_is_ignored_stays_ignored(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def test_in_another_thread(self):
        def run():
            with StopSignals() as stop:
                seen.append(bool(stop))

        seen = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == [False]


class TestRewind:
    def test_rows_are_cut_and_lost_ones_come_back(self, tmp_path):
        logger = CSVLogger("logs", log_dir=str(tmp_path))
        logger.log_scalar("a/x", 1.0, step=1)
        logger.log_scalar("b", 2.0, step=1)
        state = logger.state_dict()
        state = json.loads(json.dumps(state))
        logger.log_scalar("a/x", 3.0, step=2)
        logger.log_scalar("new", 4.0, step=2)
        (tmp_path / "logs/scalars/b.csv").write_text("")  # lost with the machine
        again = CSVLogger("logs", log_dir=str(tmp_path))
        rewind(again, state)
        assert rows(tmp_path) == {"a/x.csv": "1,1.0\n", "b.csv": "1,2.0\n"}
        again.log_scalar("a/x", 5.0, step=2)
        assert rows(tmp_path)["a/x.csv"] == "1,1.0\n2,5.0\n"
        assert [tuple(point) for point in again.experiment.scalars["a/x"]] == [(1, 1.0), (2, 5.0)]

    def test_lines_of_json(self, tmp_path):
        logger = JSONLinesLogger("logs", str(tmp_path))
        logger.log_metrics({"a": torch.tensor(1.5), "b/c": 2}, step=1)
        logger.log_scalar("a", float("inf"), step=2)
        state = json.loads(json.dumps(logger.state_dict()))
        logger.log_metrics(TensorDict(d=TensorDict(e=torch.ones(()))).flatten_keys("/"), step=3)
        path = tmp_path / "logs/metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{"step": 1, "a": 1.5, "b/c": 2.0}, {"step": 2, "a": None}]
        assert lines == [*kept, {"step": 3, "d/e": 1.0}]
        with path.open("a") as file:
            file.write('{"step": 4, "hal')  # a line that was being written
        again = JSONLinesLogger("logs", str(tmp_path))
        rewind(again, state)
        again.log_scalar("a", 3.5, step=3)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines == [*kept, {"step": 3, "a": 3.5}]
        rewind(again)
        assert path.read_text() == ""
        with pytest.raises(NotImplementedError, match="Videos are not lines"):
            again.log_video("v", torch.zeros(1))

    def test_to_nothing(self, tmp_path):
        CSVLogger("logs", log_dir=str(tmp_path)).log_scalar("a", 1.0, step=1)
        rewind(CSVLogger("logs", log_dir=str(tmp_path)))
        assert rows(tmp_path) == {}


def seeded_hash(seed, prefetch):
    """What 50 updates make of all parameters, a digest."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        np.savez(
            f"{folder}/robot.npz",
            observations=rng.normal(size=(200, OBS)).astype(np.float32),
            actions=rng.uniform(-1, 1, (200, A)).astype(np.float32),
            rewards=rng.normal(size=200).astype(np.float32),
            terminals=np.zeros(200, bool),
            timeouts=np.arange(200) % 50 == 49,
        )
        buffer = ActionChunkExperienceReplay(
            "robot",
            PHASES[0].batch_size,
            root=folder,
            source=f"{folder}/robot.npz",
            chunk_size=H,
            prefetch=prefetch or None,
            generator=torch.Generator().manual_seed(seed),
        )
        joint = Phase("joint", list(TERMS.values()), 50, PHASES[0].batch_size)
        trainer = make_trainer([joint])
        trainer.buffer = buffer
        trainer.train()
    digest = hashlib.sha256()
    for name, value in sorted(parameters(trainer).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_a_seed_fixes_everything():
    """In two processes, and with batches drawn ahead in a thread."""
    expected = seeded_hash(0, 0)
    folder = os.path.dirname(__file__)
    benchmarks = os.path.join(folder, "../../benchmarks")
    code = (
        f"import sys; sys.path[:0] = [{folder!r}, {benchmarks!r}]; "
        "from test_run import seeded_hash; "
        "print(*(seeded_hash(0, prefetch) for prefetch in (0, 1, 2)))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert result.stdout.split()[-3:] == [expected] * 3
    assert seeded_hash(1, 0) != expected
