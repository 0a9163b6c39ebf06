"""Decoupled Q-chunking and its special cases, for about 20 updates, on real environments."""

from __future__ import annotations

import json

import pytest
from running import ONE_EPISODE, ROOT

from torchrl_mac import load_policy

TERMS = ["loss_flow", "loss_value", "loss_qvalue", "loss_chunk_qvalue"]
PHASE = f"{{name: joint, terms: [{','.join(TERMS)}], num_updates: 20, batch_size: 8}}"
OVERRIDES = [
    *(f"phases=[{PHASE}]", "preset=cpu_goal", "task=cube-single-oraclerep"),
    *("eval_num_candidates=2", "chunk_size=10", *ONE_EPISODE),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "chunk_size"),
    [
        ([], 5),
        (["chunk_critic=false", "policy_chunk_size=1", "chunk_size=1"], 1),
    ],
    ids=["dqc", "os"],
)
def test_dqc(tmp_path, fork, settings, chunk_size):
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings, example="dqc")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 20
    rates = [summary[f"task{k}/success_rate"] for k in range(1, 6)]
    assert summary["success_rate"] == pytest.approx(sum(rates) / 5)
    assert load_policy(tmp_path / "run").chunk_size == chunk_size
    assert load_policy(tmp_path / "run/policy").num_candidates == 2
    curves = {path.stem for path in (tmp_path / "run/logs/scalars/train").glob("loss_*.csv")}
    assert curves == {*(TERMS if not settings else TERMS[:3])}
    if not settings:
        changed = [*OVERRIDES, "policy_chunk_size=1"]
        code, said = fork.wait(tmp_path / "run", *changed, example="dqc")
        assert code == 1
        assert "cannot go on with another policy_chunk_size: 5 -> 1" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["policy_chunk_size=26"],
            "policy_chunk_size=26 cannot be: a chunk has only chunk_size=25",
        ),
        (["replan_interval=6"], "replan_interval=6 cannot be: a choice is made by only"),
        (["backup=median"], "backup=median cannot be: it must be one of expectile, quantile"),
        (["dataset=cube-single-play-singletask-task2-v0", "task_id=2"], "choose an oraclerep name"),
    ],
)
def test_settings_are_checked(tmp_path, fork, settings, message):
    more = ("preset=cpu_goal", "task=cube-single-oraclerep")
    code, said = fork.wait(tmp_path / "run", *more, *settings, example="dqc")
    assert code == 1
    assert message in said


def test_the_script_is_short_and_configs_cover_the_paper():
    tasks = {path.stem for path in (ROOT / "configs/dqc/task").glob("*.yaml")}
    cubes = (f"cube-{number}" for number in ("triple", "quadruple", "octuple"))
    others = ("puzzle-4x5", "puzzle-4x6", "humanoidmaze-giant", "pointmaze-medium")
    assert tasks >= {f"{env}-oraclerep" for env in (*cubes, *others)}
    assert {path.stem for path in (ROOT / "configs/dqc/preset").glob("*.yaml")} == {
        *("cpu_goal", "paper")
    }
    assert len((ROOT / "examples/dqc.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
