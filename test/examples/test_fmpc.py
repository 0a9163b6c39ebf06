"""FMPC, for about 20 updates, on real environments."""

from __future__ import annotations

import json

import pytest
from running import ONE_EPISODE, ROOT

from torchrl_mac import load_policy

TERMS = "loss_flow,loss_dynamics,loss_value,loss_qvalue"
PHASE = f"{{name: joint, terms: [{TERMS}], num_updates: 20, batch_size: 8}}"
OVERRIDES = [f"phases=[{PHASE}]", "dynamics_cells=[16,16]", "horizon=8", *ONE_EPISODE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "chunk_size"),
    [
        (["eval_num_candidates=2", "average_rewards=true", "chunk_size=1", "replan_interval=1"], 1),
        (["dynamics=mlp"], 8),
        (["task=cube-single-oraclerep", "preset=cpu_goal"], 8),
    ],
    ids=["flow", "mlp", "goals"],
)
def test_fmpc(data, tmp_path, fork, settings, chunk_size):
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings, example="fmpc")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 20
    assert 0 <= summary["success_rate"] <= 1
    assert load_policy(tmp_path / "run").chunk_size == chunk_size
    assert load_policy(tmp_path / "run/policy").chunk_size == chunk_size
    curves = {path.stem for path in (tmp_path / "run/logs/scalars/train").glob("loss_*.csv")}
    assert curves == set(TERMS.split(","))
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings, "horizon=9", example="fmpc")
    assert code == 1
    assert "cannot go on with another horizon: 8 -> 9" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["chunk_size=33"], "chunk_size=33 cannot be: a window has only horizon=32 actions"),
        (["dynamics=diffusion"], "dynamics=diffusion cannot be: it must be one of flow, mlp"),
        (["horizon=0"], "horizon=0 cannot be"),
        (["return_gamma=1.5"], "return_gamma=1.5 cannot be"),
    ],
)
def test_settings_are_checked(tmp_path, fork, settings, message):
    code, said = fork.wait(tmp_path / "run", *settings, example="fmpc")
    assert code == 1
    assert message in said


def test_the_script_is_short_and_configs_cover_the_paper():
    tasks = {
        method: {path.stem for path in (ROOT / f"configs/{method}/task").glob("*.yaml")}
        for method in ("fmpc", "mac")
    }
    assert tasks["fmpc"] == tasks["mac"]
    presets = {path.stem for path in (ROOT / "configs/fmpc/preset").glob("*.yaml")}
    assert presets == {"cpu", "cpu_goal", "paper"}
    assert len((ROOT / "examples/fmpc.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
