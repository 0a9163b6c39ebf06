"""Every example that learns on a buffer of imagined transitions: whole, and killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pendulum
import pytest
import torch
from running import ONE_EPISODE, ROOT, newest

from torchrl_mac import load_policy
from torchrl_mac.evaluate import main as eval_main
from torchrl_mac.trainers import SealedCheckpoint

MODEL = "loss_dynamics,loss_reward,loss_termination"
SAC = "loss_actor,loss_qvalue,loss_alpha"
STOPPING = "early_stopping: {interval: 2, patience: 1, num_batches: 2}"
PHASE = (
    "{{name: {name}, terms: [{terms}], num_updates: {updates}, batch_size: 8, lr: 1.0e-2{more}}}"
)
PHASES = [
    PHASE.format(name="model", terms=MODEL, updates=6, more=f", {STOPPING}"),
    PHASE.format(name="policy", terms=SAC, updates=14, more=", eval_interval: 7"),
]
JOINT = [PHASE.format(name="joint", terms=f"{MODEL},{SAC}", updates=14, more="")]
KINDS = {
    "mopo": ("mopo", PHASES, ["chunk_size=5", "replan_interval=5"]),
    "mopo_goal": ("mopo", PHASES, ["task=cube-single-oraclerep", "chunk_size=2"]),
    "mobile_goal": ("mobile", JOINT, ["task=cube-single-oraclerep"]),
}
ROLLOUTS = ["rollout_interval=5", "rollout_batch=10", "rollout_length=3", "rollout_keep=2"]


def overrides_of(kind):
    example, phases, more = KINDS[kind]
    settings = [f"phases=[{','.join(phases)}]", "num_members=4", "num_elites=2", *ROLLOUTS]
    return example, [*settings, "checkpoint_interval=1", "log_interval=2", *more, *ONE_EPISODE]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_with_what_it_has_imagined(kind, tmp_path, fork):
    example, overrides = overrides_of(kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = fork.wait(whole, *overrides, example=example)
    assert code == 0, said[-3000:]
    process = fork(parts, *overrides, example=example)
    # between two rollouts, so that what comes next depends on the one before
    border = f"checkpoint-{(8 if KINDS[kind][1] is PHASES else 3):012d}"
    while process.is_alive() and (newest(parts) is None or newest(parts).name < border):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -9
    code, said = fork.wait(parts, *overrides, example=example)
    assert code == 0, said[-3000:]
    assert "Going on after" in said
    for path in (whole / "logs").rglob("*.csv"):
        assert (parts / path.relative_to(whole)).read_text() == path.read_text()
    weights = "policy/policy.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    first, again = (SealedCheckpoint.load_states(newest(path)) for path in (whole, parts))
    stored = [rows_of(state) for state in (first, again)]
    assert 10 < len(stored[0]["observation"]) <= 2 * 10 * 3
    for key, value in stored[0].items():
        assert torch.equal(value, stored[1][key]), key
    goals = {"value_goal", "actor_goal"} if kind.endswith("goal") else set()
    assert goals <= stored[0].keys()
    elites = [elites_of(state) for state in (first, again)]
    assert torch.equal(*elites) and len(elites[0]) == 2
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["updates"] <= 20
    assert not any("before" in key for key in summary)  # nothing is measured before the policy
    assert load_policy(whole).deterministic


def rows_of(state):
    imagined = state["buffers"]["train"]["buffers"]["imagined"]["_storage"]["data"]["entries"]
    return {key: value for key, value in imagined.items() if isinstance(value, torch.Tensor)}


def elites_of(state):
    (found,) = (v for k, v in state["losses"]["world_model"].items() if k.endswith("elites"))
    return found


@pytest.mark.slow
def test_an_environment_of_gymnasium(tmp_path, monkeypatch, capsys, fork):
    monkeypatch.setattr(sys, "argv", ["pendulum.py", "--out", str(tmp_path), "--episodes", "6"])
    pendulum.main()
    assert "Returns of the data: mean -" in capsys.readouterr().out
    _, overrides = overrides_of("mopo")
    overrides += ["task=pendulum", f"data_dir={tmp_path}"]
    code, said = fork.wait(tmp_path / "run", *overrides, example="mopo")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert "success_rate" not in summary
    assert -2000 < summary["episode_return"] < 0 and summary["transitions"] == 5 * 201
    scores = json.loads((tmp_path / "run/checkpoints/scores.json").read_text())
    assert summary["episode_return"] in scores.values()
    assert eval_main([str(tmp_path / "run"), "--episodes", "1", "--num-envs", "1"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["episode_return"] == summary["episode_return"]


@pytest.mark.parametrize("method", ["mopo", "mobile"])
def test_scripts_are_short_and_configs_cover_the_paper(method):
    tasks = {path.stem for path in (ROOT / f"configs/{method}/task").glob("*.yaml")}
    assert tasks == {path.stem for path in (ROOT / "configs/mac/task").glob("*.yaml")}
    assert "pendulum" in tasks
    presets = {path.stem for path in (ROOT / f"configs/{method}/preset").glob("*.yaml")}
    assert presets == {"cpu", "cpu_goal", "paper", "pendulum"}
    assert len((ROOT / f"examples/{method}.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
