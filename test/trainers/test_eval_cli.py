from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchrl.modules import ValueOperator

from torchrl_mac.evaluate import main
from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy, save_policy
from torchrl_mac.trainers import RunCheckpoints

TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def make_actor(bias):
    network = NormedMLP(2 + 20, 20, [4])
    torch.nn.init.constant_(network.layers[-1].bias, bias)
    qvalue = ValueOperator(NormedMLP(2 + 20, 1, [4]), in_keys=["observation", "action"])
    return FlowRejectionActor(OneStepPolicy(network, 20), qvalue, num_candidates=2, chunk_size=10)


@pytest.fixture
def run(tmp_path):
    """A run whose better checkpoint is its older one."""
    for updates, rate in ((1, 0.9), (2, 0.1)):
        checkpoints = RunCheckpoints(
            tmp_path / "checkpoints",
            actor=make_actor(rate),
            config={"dataset": TASK, "replan_interval": 10},
        )
        checkpoints.save(updates, {"losses": {}}, wait=True)
        checkpoints.record(updates, {"success_rate": rate})
        checkpoints.close()
    return tmp_path


def returns(capsys, *argv):
    settings = ("--episodes", "1", "--num-envs", "1")
    assert main([*map(str, argv), *settings]) == 0
    return json.loads(capsys.readouterr().out)["episode_return"]


@pytest.mark.slow
def test_newest_best_and_by_name(run, capsys):
    newest = returns(capsys, run)
    assert newest == returns(capsys, run / "checkpoints/checkpoint-000000000002")
    exported = run / "exported"
    best = returns(capsys, run, "--best", "--export", exported)
    assert best == returns(capsys, run / "checkpoints/checkpoint-000000000001", "--seed", 0)
    assert best == returns(capsys, exported, "--num-candidates", 2)
    assert json.loads((exported / "policy.json").read_text())["metadata"]["dataset"] == TASK


def test_a_damaged_checkpoint_is_skipped(run, capsys):
    weights = next(run.glob("checkpoints/checkpoint-000000000002/**/policy.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    argv = [str(run), "--export", str(run / "exported"), "--task", "nonsense"]
    assert main(argv) == 2  # after it was found
    assert "'nonsense' is not an OGBench dataset name" in capsys.readouterr().err
    assert main([str(weights.parents[2])]) == 2
    assert "policy.safetensors is not as it was saved" in capsys.readouterr().err


def test_errors(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "neither policy.json nor checkpoints" in capsys.readouterr().err
    save_policy(make_actor(0.0), tmp_path / "policy")
    assert main([str(tmp_path / "policy")]) == 2
    assert "give --task" in capsys.readouterr().err
    assert main([str(tmp_path / "policy"), "--task", TASK, "--episodes", "-1"]) == 2
    assert "num_episodes must be at least 1" in capsys.readouterr().err
    assert main(["--nonsense"]) == 2


@pytest.mark.parametrize("harm", ["weights", "another actor", "keys", "device"])
def test_whatever_is_wrong_ends_in_one_line(tmp_path, capsys, harm):
    folder = save_policy(make_actor(0.0), tmp_path / "policy")
    (folder / "hashes.json").unlink()  # it cannot tell
    config, arguments = json.loads((folder / "policy.json").read_text()), []
    if harm == "weights":
        (folder / "policy.safetensors").write_bytes(b"{")
    elif harm == "another actor":
        config["actor"]["class"] = "Nonsense"
    elif harm == "keys":
        del config["actor"]["policy"]["network"]["num_cells"]
        config["actor"]["policy"]["network"]["in_features"] = 1
    elif torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    else:
        arguments = ["--device", "cuda"]
    (folder / "policy.json").write_text(json.dumps(config))
    assert main([str(folder), "--task", TASK, *arguments]) in (1, 2)
    assert capsys.readouterr().err.startswith("torchrl-mac-eval: ")


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs an off-screen renderer")
def test_the_program_renders_off_screen():
    program = Path(sys.executable).with_name("torchrl-mac-eval")
    assert "torchrl_mac.evaluate" in program.read_text()
    code = "import torchrl_mac.evaluate; from mujoco import GLContext; print(GLContext.__module__)"
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert result.stdout.split()[-1] == "mujoco.egl"
