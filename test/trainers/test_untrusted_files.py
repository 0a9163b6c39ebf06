"""Files that somebody has changed, and sealed again as if nothing had happened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tensordict import NonTensorData, TensorDict
from test_checkpoints import parameters, same, trained
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import CheckpointError

from torchrl_mac.trainers import RunCheckpoints, SealedCheckpoint
from torchrl_mac.trainers.policies import read_scores
from torchrl_mac.trainers.state_files import StateAdapter
from torchrl_mac.utils.files import seal


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.fixture
def checkpoint(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"losses": {"weight": torch.ones(2)}}, wait=True)
    checkpoints.close()
    return checkpoints.paths()[0]


def component(checkpoint):
    return next((checkpoint / "components").iterdir())


def memory_map(folder, trace):
    TensorDict(weight=torch.zeros(2), evil=NonTensorData(Payload(trace))).save(folder / "state")


def state_pt(folder, trace):
    torch.save({"weight": torch.zeros(2)}, folder / "state.pt")


def more_weights(folder, trace):
    save_file({"0": torch.zeros(2)}, folder / "other.safetensors")


def a_pickle_instead(folder, trace):
    (folder / "state.json").write_bytes(pickle.dumps(Payload(trace)))


def a_link(folder, trace):
    (folder / "state.json").rename(folder.parent.parent.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent.parent.parent / "elsewhere.json")


def another_kind(folder, trace):
    manifest = folder.parent.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    for record in content["components"].values():
        record["adapter"] = "torchrl.state_dict"
    manifest.write_text(json.dumps(content))
    memory_map(folder, trace)


def outside(folder, trace):
    manifest = folder.parent.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    shutil.copytree(folder, folder.parent.parent.parent / "elsewhere")
    for record in content["components"].values():
        record["path"] = "../elsewhere"
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "harm",
    [memory_map, state_pt, more_weights, a_pickle_instead, a_link, another_kind, outside],
    ids=lambda harm: harm.__name__,
)
def test_nothing_but_a_checkpoints_own_files_is_read(checkpoint, tmp_path, harm):
    trace = tmp_path / "trace"
    harm(component(checkpoint), trace)
    (checkpoint / "hashes.json").unlink()
    seal(checkpoint)
    with pytest.raises(CheckpointError):
        SealedCheckpoint.load_states(checkpoint)
    assert not trace.exists()


def test_the_payload_would_have_left_its_trace(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace"))).close()
    assert (tmp_path / "trace").exists()


def test_states_come_back_as_they_were(tmp_path):
    state = {
        "weights": {"a": torch.randn(3), "b": torch.zeros(0, 2), "c": torch.tensor(True)},
        0: [1, 2.5, None, "text", (torch.arange(3), False)],
        "infinite": float("inf"),
        "array": torch.arange(3).numpy(),
    }

    class Held:
        def state_dict(self):
            return state

        def load_state_dict(self, found):
            self.found = found

    held = Held()
    settings = {"args": (), "kwargs": {}}
    StateAdapter().save(held, tmp_path / "state", **settings)
    StateAdapter().load(
        held, tmp_path / "state", map_location=None, tensor_load_kwargs={}, **settings
    )
    assert (held.found.pop("array") == state.pop("array")).all()
    assert same(held.found, state)
    modes = {path.stat().st_mode for path in (tmp_path / "state").iterdir()}
    assert len(modes) == 1  # whoever may read the one may read the other
    state["object"] = object()
    with pytest.raises(TypeError, match="A object cannot be saved"):
        StateAdapter().save(held, tmp_path / "other", **settings)


@pytest.mark.parametrize("content", ["{", "[1]", '{"checkpoint-000000000002": "NaN"}', "{}"])
def test_scores_that_cannot_be_read_stop_nothing(tmp_path, content):
    trained(tmp_path, 5)
    (tmp_path / "checkpoints/scores.json").write_text(content)
    trainer = trained(tmp_path, evaluate=lambda: {"success_rate": 0.5})
    assert trainer.updates == 10
    assert trainer.checkpoints.best().name.endswith("10")


def test_scores_speak_of_checkpoints_that_are_there(tmp_path):
    (tmp_path / "checkpoint-000000000001").mkdir()
    scores = {"checkpoint-000000000001": 0.5, "../elsewhere": 1.0, "checkpoint-000000000009": 1.0}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert read_scores(tmp_path) == {"checkpoint-000000000001": 0.5}


def test_newer_ones_of_another_future_are_set_aside(tmp_path):
    trained(tmp_path)
    names = [path.name[-2:] for path in RunCheckpoints(tmp_path / "checkpoints").paths()]
    assert names == ["08", "09", "10"]
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", keep_last=2)
    checkpoints.save(5, {"losses": {}}, wait=True)  # without having loaded one of them
    assert [path.name[-2:] for path in checkpoints.paths()] == ["05"]
    assert checkpoints.load()[0].name.endswith("05")
    assert len(list((tmp_path / "checkpoints").glob("unused-*"))) == 3


DISK_FULL = """
import sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
from torchrl_mac.trainers import RunCheckpoints
import torchrl_mac.trainers.run_checkpoints as module
module._SPARE = {spare}
checkpoints = RunCheckpoints({folder!r})
print([checkpoints.save(n, {{"losses": {{"weight": torch.ones(k)}}}}, wait=True)
       for n, k in ((1, 1 << 16), (2, 1 << 22), (3, 1 << 16))])
print([path.name[-1] for path in checkpoints.paths()])
"""


@pytest.mark.parametrize("spare", [0, -(1 << 40)], ids=["seen before", "met while writing"])
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full(tmp_path, spare):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a disk here")
    try:
        code = DISK_FULL.format(path=sys.path, folder=str(disk / "checkpoints"), spare=spare)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert result.returncode == 0, result.stderr[-2000:]  # no SIGBUS
    lines = result.stdout.splitlines()
    assert "[True, False, True]" in lines and "['1', '3']" in lines
    assert "cannot be written" in result.stdout + result.stderr


def test_an_infinite_constant_is_no_reason_not_to_save(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torchrl_logger, "warning", lambda message, *_: seen.append(message))
    trainer = trained(tmp_path, 3)
    trainer.losses["loss"].register_buffer("bound", torch.tensor(float("inf")))
    state = trainer.state_dict()
    checkpoints = RunCheckpoints(tmp_path / "more")
    assert checkpoints.save(1, state, parameters=trainer.parameters(), wait=True)
    weight = next(iter(trainer.losses["loss"].parameters()))
    weight.data.fill_(float("nan"))
    assert not checkpoints.save(2, state, parameters=trainer.parameters(), wait=True)
    assert "not finite" in seen[-1]
    assert parameters(trainer)


if __name__ == "__main__":
    pytest.main([__file__])
