"""SHARSA, for about 20 updates, on a real environment."""

from __future__ import annotations

import json

import pytest
from running import ONE_EPISODE, ROOT

from torchrl_mac import load_policy
from torchrl_mac.modules import SubgoalActor

TERMS = ("high.loss_flow", "low.loss_flow", "loss_value", "loss_qvalue")
PHASE = f"name: joint, terms: [{','.join(TERMS)}], num_updates: 20, batch_size: 8"
OVERRIDES = ["preset=cpu_goal", "task=cube-single-oraclerep", f"phases=[{{{PHASE}}}]", *ONE_EPISODE]


@pytest.mark.slow
def test_sharsa(data, tmp_path, fork):
    settings = ["chunk_size=4", "replan_interval=4"]
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings, example="sharsa")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 20
    assert 0 <= summary["success_rate"] <= 1
    for actor in (load_policy(tmp_path / "run"), load_policy(tmp_path / "run/policy")):
        assert isinstance(actor, SubgoalActor)
        assert (actor.chunk_size, actor.num_candidates) == (4, 16)
    curves = (tmp_path / "run/logs/scalars/train").rglob("loss_*.csv")
    assert sorted(path.stem for path in curves) == sorted(t.rpartition(".")[2] for t in TERMS)
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings, "n_steps=9", example="sharsa")
    assert code == 1
    assert "cannot go on with another n_steps: 25 -> 9" in said


def test_a_single_task_has_no_subgoals(tmp_path, fork):
    single = ["preset=cpu_goal", "task=cube-single-oraclerep", "task_id=2"]
    single.append("dataset=cube-single-play-singletask-task2-v0")
    code, said = fork.wait(tmp_path / "run", *single, example="sharsa")
    assert code == 1
    assert "goals= belong to names such as cube-single-play-oraclerep-v0" in said


def test_the_script_is_short_and_configs_cover_the_paper():
    tasks = {
        method: {path.stem for path in (ROOT / f"configs/{method}/task").glob("*.yaml")}
        for method in ("sharsa", "mac")
    }
    goals = {task for task in tasks["mac"] if task.endswith("-oraclerep")}
    assert tasks["sharsa"] == goals | {"puzzle-4x6-oraclerep"}
    presets = {path.stem for path in (ROOT / "configs/sharsa/preset").glob("*.yaml")}
    assert presets == {"cpu_goal", "paper"}
    assert len((ROOT / "examples/sharsa.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
