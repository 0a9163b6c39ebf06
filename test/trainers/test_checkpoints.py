from __future__ import annotations

import contextlib
import json
import pickle
import sys
import threading
import time

import pytest
import torch
from test_trainer import TERMS, make_trainer, parameters
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import CheckpointError
from torchrl.objectives import HardUpdate
from torchrl.record import CSVLogger

from torchrl_mac.trainers import (
    Phase,
    RunCheckpoints,
    SealedCheckpoint,
)

PHASES = [
    Phase("model", [TERMS["flow_policy"], TERMS["dynamics_network"]], 4, 8),
    Phase("values", ["loss_value", "loss_qvalue"], 6, 8, lr=1e-2, schedule="cosine"),
]


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr(torchrl_logger, "warning", lambda message, *_: seen.append(message))
    return seen


def trained(folder, updates=None, evaluate=None, **kwargs):
    """A run in ``folder`` that ends, as if killed, after so many updates."""
    torch.manual_seed(0)
    csv = CSVLogger("logs", log_dir=str(folder))
    kwargs.setdefault(
        "checkpoints", RunCheckpoints(folder / "checkpoints", interval=1, keep_last=3)
    )
    trainer = make_trainer(
        kwargs.pop("phases", PHASES), loggers=[csv], log_interval=1, evaluate=evaluate, **kwargs
    )
    trainer.resume()
    until_killed(trainer, updates)
    return trainer


def until_killed(trainer, updates):
    """Trains as if the process were killed after so many updates, if it is ever."""
    sample = trainer.buffer.sample

    def limited(size):
        if trainer.updates == updates:
            raise _Killed
        return sample(size)

    trainer.buffer.sample = limited
    with contextlib.suppress(_Killed):
        trainer.train()
    trainer.checkpoints.close()


class _Killed(Exception):
    pass


def moments(trainer):
    newest = trainer.checkpoints.paths()[-1]
    return SealedCheckpoint.load_states(newest)["training"]["update"]["optimizer"]["state"]


def rows(folder):
    scalars = folder / "logs/scalars"
    return {
        path.relative_to(scalars).as_posix(): path.read_text() for path in scalars.rglob("*.csv")
    }


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


class TestResume:
    @pytest.mark.parametrize("killed_after", [1, 3, 4, 5, 9])
    def test_equals_an_uninterrupted_run_bit_for_bit(self, tmp_path, killed_after):
        whole = trained(tmp_path / "whole", evaluate=lambda: {"success_rate": 0.5})
        trained(tmp_path / "parts", killed_after)
        torch.manual_seed(99)  # nothing may depend on what is restored
        parts = trained(tmp_path / "parts", evaluate=lambda: {"success_rate": 0.5})
        assert parts.updates == 10
        assert same(parameters(whole), parameters(parts))
        assert same(moments(whole), moments(parts))
        assert rows(tmp_path / "whole") == rows(tmp_path / "parts")

    def test_several_times(self, tmp_path):
        whole = trained(tmp_path / "whole")
        for killed_after in (2, 5, 7):
            trained(tmp_path / "parts", killed_after)
        assert same(parameters(whole), parameters(trained(tmp_path / "parts")))
        assert rows(tmp_path / "whole") == rows(tmp_path / "parts")

    def test_a_target_that_moves_now_and_then(self, tmp_path):
        def run(folder, updates=None):
            torch.manual_seed(0)
            trainer = make_trainer(
                [Phase("values", ["loss_value", "loss_qvalue"], 7, 8, lr=1e-2)],
                checkpoints=RunCheckpoints(folder, interval=1),
            )
            loss = trainer.losses["loss"]
            trainer.target_updaters = [HardUpdate(loss, value_network_update_interval=3)]
            trainer.resume()
            step = trainer.checkpoints.save
            trainer.checkpoints.save = lambda n, state, **_: (
                step(n, state, wait=True) and (n != updates or sys.exit())
            )
            try:
                trainer.train()
            except SystemExit:
                return None
            return parameters(trainer)

        whole = run(tmp_path / "whole")
        run(tmp_path / "parts", 2)
        assert same(whole, run(tmp_path / "parts"))

    def test_without_a_checkpoint_the_logs_begin_anew(self, tmp_path):
        trained(tmp_path, 3, checkpoints=RunCheckpoints(tmp_path / "checkpoints"))
        assert rows(tmp_path)
        trained(tmp_path)
        lines = rows(tmp_path)["train/loss_flow.csv"].splitlines()
        assert [line.split(",")[0] for line in lines] == ["1", "2", "3", "4"]

    def test_a_finished_run_trains_no_more(self, tmp_path):
        first = trained(tmp_path, evaluate=lambda: {"success_rate": 0.5})
        again = trained(tmp_path, evaluate=lambda: {"success_rate": 0.5})
        assert again.updates == first.updates == 10
        assert same(parameters(first), parameters(again))

    def test_an_older_checkpoint_can_be_chosen(self, tmp_path, warnings):
        whole = trained(tmp_path)
        older = whole.checkpoints.paths()[0]
        assert older.name.endswith("8")
        torch.manual_seed(0)
        trainer = make_trainer(PHASES, checkpoints=RunCheckpoints(tmp_path / "checkpoints"))
        trainer.logs.loggers = [CSVLogger("logs", log_dir=str(tmp_path))]
        assert trainer.resume(older)
        assert trainer.updates == 8
        assert len(rows(tmp_path)["train/loss_value.csv"].splitlines()) == 4
        assert len([text for text in warnings if "Newer than the one" in text]) == 2
        trainer.train()
        assert same(parameters(whole), parameters(trainer))
        assert [path.name[-1] for path in trainer.checkpoints.paths()] == ["8", "0"]

    def test_an_evaluation_that_was_cut_off_is_made_up_for(self, tmp_path):
        def killed():
            raise _Killed

        trained(tmp_path, evaluate=killed)
        trainer = trained(tmp_path, evaluate=lambda: {"success_rate": 0.75})
        assert rows(tmp_path)["eval/success_rate.csv"] == "10,0.75\n"
        assert trainer.checkpoints.best().name.endswith("10")

    def test_an_evaluation_beside_training_is_begun_anew(self, tmp_path):
        class Pending:
            def __init__(self, finished, value):
                self.finished, self.value = finished, value
                self.state = {"weight": torch.ones(1)}

            def done(self):
                return self.finished

            def result(self):
                return {"success_rate": self.value}

        phases = [Phase("flow", ["loss_flow"], 6, 8, eval_interval=2)]
        monitor = {"monitor": lambda state=None: Pending(False, 0.1), "phases": phases}
        trained(tmp_path, 3, **monitor)
        asked = []

        def again(state=None):
            asked.append(state)
            return Pending(True, 0.25 if state else 0.5)

        trained(tmp_path, phases=phases, monitor=again, evaluate=lambda: {"success_rate": 1.0})
        assert asked == [{"weight": torch.ones(1)}, None]
        assert rows(tmp_path)["eval/success_rate.csv"] == "2,0.25\n4,0.5\n6,1.0\n"

    def test_compiled(self, tmp_path):
        phases = [Phase("model", ["loss_dynamics"], 6, 8)]
        switches = {"compile": {"backend": "eager"}, "phases": phases}
        whole = trained(tmp_path / "whole", **switches)
        trained(tmp_path / "parts", 3, **switches)
        assert same(parameters(whole), parameters(trained(tmp_path / "parts", **switches)))


class TestRunCheckpoints:
    def save(self, folder, *steps, **kwargs):
        checkpoints = RunCheckpoints(folder, **kwargs)
        for step in steps:
            assert checkpoints.save(step, {"losses": {"weight": torch.full((2,), step)}}, wait=True)
        return checkpoints

    def test_the_newest_and_the_best_are_kept(self, tmp_path):
        checkpoints = RunCheckpoints(tmp_path, keep_last=2)
        for step, score in (
            (1, 0.1),
            (2, 0.9),
            (3, None),
            (4, 0.9),
            (5, 0.3),
            (6, None),
            (7, None),
        ):
            checkpoints.save(step, {"losses": {"step": step}}, wait=True)
            if score is not None:
                checkpoints.record(step, {"success_rate": score})
        assert [path.name[-1] for path in checkpoints.paths()] == ["4", "6", "7"]
        assert checkpoints.best().name[-1] == "4"
        assert json.loads((tmp_path / "scores.json").read_text()) == {
            "checkpoint-000000000004": 0.9
        }

    def test_one_whose_score_is_not_known_yet_is_kept(self, tmp_path):
        checkpoints = self.save(tmp_path, 1, keep_last=1)
        checkpoints.expect(1)
        for step in (2, 3):
            checkpoints.save(step, {"losses": {}}, wait=True)
        assert [path.name[-1] for path in checkpoints.paths()] == ["1", "3"]
        checkpoints.record(1, {"success_rate": 1.0})
        assert checkpoints.best().name[-1] == "1"

    def test_due_by_updates_and_by_time(self, tmp_path, monkeypatch):
        checkpoints = RunCheckpoints(tmp_path, interval=10, interval_seconds=60)
        assert [step for step in range(1, 31) if checkpoints.due(step)] == [10, 20, 30]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        assert checkpoints.due(11)

    def test_training_does_not_wait_for_the_disk(self, tmp_path, monkeypatch):
        free = threading.Event()
        save = SealedCheckpoint.save

        def slow(self, *args, **kwargs):
            free.wait(30)
            return save(self, *args, **kwargs)

        monkeypatch.setattr(SealedCheckpoint, "save", slow)
        checkpoints = RunCheckpoints(tmp_path, interval_seconds=1e-9)
        weight = torch.zeros(2)
        assert checkpoints.due(1)
        checkpoints.save(1, {"losses": {"weight": weight}})
        weight.fill_(7)  # training goes on in place
        assert not checkpoints.due(2)  # while one is being written
        free.set()
        checkpoints.close()
        assert torch.equal(checkpoints.load()[1]["losses"]["weight"], torch.zeros(2))

    @pytest.mark.parametrize("number", range(6))
    def test_any_flipped_bit_is_found(self, tmp_path, warnings, number):
        checkpoints = self.save(tmp_path, 1, 2)
        newest = checkpoints.paths()[-1]
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        assert len(files) >= 3
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        content[(number * 31) % len(content)] ^= 1 << number
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"as it was saved|damaged|is missing|belong"):
            SealedCheckpoint.verify(newest)
        path, state = checkpoints.load()
        assert path.name[-1] == "1"
        assert torch.equal(state["losses"]["weight"], torch.full((2,), 1))
        assert len(warnings) == 1
        assert "not used" in warnings[0]
        assert (tmp_path / f"unused-{newest.name}").is_dir()

    def test_every_bit_of_every_small_file(self, tmp_path):
        newest = self.save(tmp_path, 1).paths()[-1]
        for file in (path for path in newest.rglob("*") if path.is_file()):
            content = file.read_bytes()
            for position in range(0, len(content), max(1, len(content) // 40)):
                changed = bytearray(content)
                changed[position] ^= 1 << position % 8
                file.write_bytes(changed)
                with pytest.raises(CheckpointError):
                    SealedCheckpoint.verify(newest)
            file.write_bytes(content)
        SealedCheckpoint.verify(newest)

    @pytest.mark.parametrize("harm", ["no seal", "no file", "one more file", "no manifest"])
    def test_torn_ones_are_skipped(self, tmp_path, warnings, harm):
        checkpoints = self.save(tmp_path, 1, 2)
        newest = checkpoints.paths()[-1]
        if harm == "one more file":
            (newest / "components/evil.pickle").write_bytes(b"")
        else:
            pattern = {
                "no seal": "hashes.json",
                "no file": "*.safetensors",
                "no manifest": "manifest.json",
            }
            next(newest.rglob(pattern[harm])).unlink()
        assert checkpoints.load()[0].name[-1] == "1"
        assert len(warnings) == 1
        with pytest.raises(CheckpointError):
            checkpoints.load(tmp_path / f"unused-{newest.name}")

    def test_what_was_being_written_is_swept_away(self, tmp_path):
        checkpoints = self.save(tmp_path, 1)
        for name in (
            "..checkpoint-000000000002.partial.stage-abc",
            ".checkpoint-000000000002.removed",
        ):
            (tmp_path / name / "components").mkdir(parents=True)
        assert checkpoints.load()[0].name[-1] == "1"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001"]

    def test_what_was_being_replaced_comes_back(self, tmp_path):
        newest = self.save(tmp_path, 1).paths()[0]
        newest.rename(tmp_path / f".{newest.name}.old")
        assert RunCheckpoints(tmp_path).load()[0] == newest

    def test_the_same_step_twice(self, tmp_path):
        checkpoints = self.save(tmp_path, 1, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001"]
        assert checkpoints.load() is not None

    @pytest.mark.parametrize("when", ["tensors", "seal"])
    def test_a_full_disk_keeps_the_old_one_and_training_goes_on(
        self, tmp_path, warnings, monkeypatch, when
    ):
        trained(tmp_path, 5)
        names = [path.name for path in (tmp_path / "checkpoints").iterdir()]

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        target = {
            "tensors": "torchrl_mac.trainers.state_files.save_file",
            "seal": "torchrl_mac.trainers.checkpoint.seal",
        }
        monkeypatch.setattr(target[when], full)
        trainer = trained(tmp_path)
        assert trainer.updates == 10
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == names
        assert any("No space left on device" in text and "goes on" in text for text in warnings)
        monkeypatch.undo()
        assert same(parameters(trainer), parameters(trained(tmp_path)))

    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path, warnings):
        checkpoints = self.save(tmp_path, 1)
        weight = torch.tensor([1.0, torch.inf])
        assert not checkpoints.save(2, {"losses": {"weight": weight}}, parameters=[weight])
        checkpoints.close()
        assert [path.name[-1] for path in checkpoints.paths()] == ["1"]
        assert "not finite" in warnings[0]

    def test_nothing_is_unpickled(self, tmp_path, monkeypatch):
        trained(tmp_path, 5)

        def refuse(*_, **__):
            raise AssertionError("unpickled")

        for module in (pickle, torch):
            for name in ("load", "loads", "Unpickler"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, refuse)
        assert trained(tmp_path).updates == 10

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="keep_last must be greater"):
            RunCheckpoints(tmp_path, keep_last=0)
        with pytest.raises(ValueError, match="interval must be at least 1"):
            RunCheckpoints(tmp_path, interval=0)
        with pytest.raises(ValueError, match="interval_seconds must be positive"):
            RunCheckpoints(tmp_path, interval_seconds=0)
        with pytest.raises(ValueError, match="Only a trainer with checkpoints"):
            make_trainer(PHASES).resume()
