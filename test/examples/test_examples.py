"""Every example, for about 20 updates, on real environments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time

import pytest
from running import ONE_EPISODE, ROOT, TERMS, newest, run

from torchrl_mac import load_policy
from torchrl_mac.datasets import generate_dataset
from torchrl_mac.evaluate import main as eval_main


@pytest.mark.slow
def test_mac(data, tmp_path, capsys):
    phase = "{{name: {}, terms: [{}], num_updates: 10, batch_size: 8, eval_interval: 10}}"
    joint, alone = phase.format("joint", ",".join(TERMS)), phase.format("alone", "loss_qvalue")
    phases = f"phases=[{joint},{alone}]"
    result = run(data, tmp_path / "run", phases, "wandb=offline")
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    expected = {"success_rate", "episodes", "updates", "train_seconds", "seed", "task", "versions"}
    assert expected <= set(summary)
    assert summary["updates"] == 20
    assert summary["episodes"] == 2
    assert summary["task"] == "cube-single-play-singletask-task2-v0"
    assert 0 <= summary["success_rate"] <= 1
    assert (tmp_path / "run/curves.png").stat().st_size > 10_000
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["checkpoint-000000000010", "checkpoint-000000000020", "scores.json"]
    scalars = tmp_path / "run/logs/scalars"
    assert len((scalars / "train/loss_qvalue.csv").read_text().splitlines()) == 4
    assert len((scalars / "eval/success_rate.csv").read_text().splitlines()) == 2
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))

    # The exported actor and the checkpoints act as the run did, without its data.
    settings = ["--episodes", "2", "--num-envs", "2"]
    for command in (
        [tmp_path / "run", *settings, "--export", tmp_path / "exported"],
        [tmp_path / "exported", *settings, "--task", summary["task"]],
        [tmp_path / "run/policy", *settings],
    ):
        assert eval_main([str(part) for part in command]) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["task"] == summary["task"]
        for key in ("success_rate", "episode_return", "episode_length"):
            assert metrics[key] == summary[key]


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on(data, tmp_path, fork):
    phase = "{{name: {}, terms: [{}], num_updates: {}, batch_size: 8}}"
    phases = [phase.format("flow", "loss_flow", 200), phase.format("joint", ",".join(TERMS), 20)]
    overrides = [f"phases=[{','.join(phases)}]", "log_interval=20", "replan_interval=10"]
    overrides += ["checkpoint_interval=50", "wandb=offline", *ONE_EPISODE]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fork.wait(whole, *overrides)[0] == 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = newest(parts)
        process = fork(parts, *overrides)
        while newest(parts) == before and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code
    code, said = fork.wait(parts, *overrides, "value_cells=[8]")
    assert code == 1
    assert "cannot go on with another value_cells: [16] -> [8]" in said
    code, said = fork.wait(parts, *overrides)
    assert code == 0, said[-3000:]
    files = [*(whole / "logs").rglob("*.csv"), whole / "logs/metrics.jsonl"]
    assert len(files) > 10
    for path in files:
        assert (parts / path.relative_to(whole)).read_text() == path.read_text()
    weights = "policy/policy.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    first, again = (json.loads((p / "summary.json").read_text()) for p in (whole, parts))
    assert first["success_rate"] == again["success_rate"]
    assert first["updates"] == again["updates"] == 220
    ids = {path.name.split("-")[-1] for path in (parts / "wandb").glob("offline-run-*")}
    assert ids == {json.loads((parts / "run.json").read_text())["id"]}


@pytest.mark.slow
def test_one_agent_for_all_tasks(tmp_path):
    generate_dataset(
        "pointmaze-medium-navigate-v0",
        tmp_path,
        episodes=3,
        val_episodes=1,
        steps=81,
        workers=1,
        progress=False,
    )
    settings = "num_updates: 20, batch_size: 8, eval_interval: 10"
    phase = f"{{name: joint, terms: [{','.join(TERMS)}], {settings}}}"
    task = "task=pointmaze-medium-oraclerep"
    evaluation = ("eval_episodes=1", "replan_interval=10", "eval_workers=1")
    overrides = (f"phases=[{phase}]", task, *evaluation)
    result = run(tmp_path, tmp_path / "run", *overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    rates = [summary[f"task{k}/success_rate"] for k in range(1, 6)]
    assert summary["success_rate"] == pytest.approx(sum(rates) / 5)
    assert summary["updates"] == 20
    rows = (tmp_path / "run/logs/scalars/eval/success_rate.csv").read_text().splitlines()
    assert sorted(int(row.split(",")[0]) for row in rows) == [10, 20]


@pytest.mark.slow
def test_several_tasks_at_once(data, tmp_path, fork):
    joint = f"{{name: joint, terms: [{','.join(TERMS)}], num_updates: 10, batch_size: 8}}"
    overrides = (f"phases=[{joint}]", "task_ids=[1,3]", "replan_interval=10", *ONE_EPISODE)
    result = run(data, tmp_path / "run", *overrides, example="mac_multitask")
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    names = [f"cube-single-play-singletask-task{k}-v0" for k in (1, 3)]
    assert list(summary["success_rates"]) == names
    assert summary["updates"] == 20  # of what all tasks share, then of each task's own
    assert summary["train_seconds"] > 0
    assert [load_policy(tmp_path / "run/policies" / name).chunk_size for name in names] == [10, 10]
    weights = [(tmp_path / f"run/policies/{k}/policy.safetensors").read_bytes() for k in names]
    for folder in (tmp_path / "run/checkpoints/own").iterdir():
        shutil.rmtree(folder)  # as if killed at the end of what is shared
    shared = f"resume={newest(tmp_path / 'run', 'shared/')}"
    code, said = fork.wait(tmp_path / "run", *overrides, shared, example="mac_multitask")
    assert code == 0, said[-3000:]
    again = [(tmp_path / f"run/policies/{k}/policy.safetensors").read_bytes() for k in names]
    assert again == weights


@pytest.mark.slow
def test_two_processes(data, tmp_path, fork):
    phase = "{{name: {}, terms: [{}], num_updates: 5, batch_size: 8}}"
    phases = [phase.format("joint", ",".join(TERMS)), phase.format("alone", "loss_qvalue")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = [f"phases=[{','.join(phases)}]", "device=cpu", "replan_interval=10"]
    overrides += ["checkpoint_interval=3", "keep_checkpoints=3", *ONE_EPISODE]
    result = run(data, tmp_path / "run", *overrides, launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 10
    # Killed while the second process was writing: all go on with what all have.
    weights = (tmp_path / "run/policy/policy.safetensors").read_bytes()
    (tmp_path / "run/checkpoints-rank1/checkpoint-000000000010/hashes.json").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # what the launcher tells them
    ranks = [fork(tmp_path / "run", *overrides, RANK=rank, LOCAL_RANK=rank, **env) for rank in "01"]
    for rank in ranks:
        rank.join()
    said = (tmp_path / "said").read_text()
    assert [rank.exitcode for rank in ranks] == [0, 0], said[-3000:]
    assert said.count("Going on after 9 updates") == 2
    assert (tmp_path / "run/policy/policy.safetensors").read_bytes() == weights
    assert len(list((tmp_path / "run/logs/scalars/train").glob("loss_*.csv"))) == len(TERMS)


@pytest.mark.slow
def test_a_sweep_over_seeds_in_parallel(data, tmp_path):
    phase = f"{{name: joint, terms: [{','.join(TERMS)}], num_updates: 10, batch_size: 8}}"
    sweep = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    overrides = [f"phases=[{phase}]", "replan_interval=10", f"hydra.sweep.dir={tmp_path}/sweep"]
    overrides += ONE_EPISODE
    result = run(data, tmp_path / "unused", *overrides, *sweep, flags=["--multirun"])
    assert result.returncode == 0, result.stderr[-3000:]
    summaries = [json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/summary.json")]
    assert sorted(summary["seed"] for summary in summaries) == [0, 1]
    assert all(summary["updates"] == 10 for summary in summaries)


def test_mac_says_what_is_missing(tmp_path, fork):
    code, said = fork.wait(tmp_path / "run", "task=scene")
    assert code == 1
    assert "scene-play-v0.npz" in said
    code, said = fork.wait(tmp_path / "run", "dataset=cube-single-play-v0")
    assert code == 1
    assert "neither rewards nor oracle representations" in said


@pytest.mark.parametrize(
    ("example", "overrides", "message"),
    [
        ("mac", ["task=puzzle-3x3-oraclerep", "task_id=2"], "leave it out"),
        ("mac", ["dataset=cube-single-play-singletask-task4-v0"], "choose by task_id alone"),
        ("mac", ["task_id=all"], "taskall"),
        ("mac_multitask", ["task=puzzle-3x3-oraclerep"], "choose a single-task configuration"),
    ],
)
def test_tasks_and_goals_are_not_mixed_up(tmp_path, fork, example, overrides, message):
    code, said = fork.wait(tmp_path / "run", *overrides, example=example)
    assert code == 1
    assert message in said


def test_configs_cover_the_paper():
    tasks = {path.stem for path in (ROOT / "configs/mac/task").glob("*.yaml")}
    assert tasks >= {"cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4"}
    goals = ("cube-double", "cube-octuple", "puzzle-3x3", "puzzle-4x5")
    mazes = ("humanoidmaze-medium", "humanoidmaze-giant", "pointmaze-medium")
    assert tasks >= {f"{env}-oraclerep" for env in (*goals, *mazes)}


if __name__ == "__main__":
    pytest.main([__file__])
