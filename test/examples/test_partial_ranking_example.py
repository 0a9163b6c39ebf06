"""MAC that ranks chunks by their first actions, for about 20 updates."""

from __future__ import annotations

import json

import pytest
from running import ONE_EPISODE, ROOT, TERMS

from torchrl_mac import load_policy

PHASE = f"{{name: joint, terms: [{','.join(TERMS)}], num_updates: 20, batch_size: 8}}"
OVERRIDES = [f"phases=[{PHASE}]", "policy_chunk_size=3", "kappa_d=0.7", *ONE_EPISODE]


@pytest.mark.slow
def test_mac(tmp_path, fork):
    settings = ["replan_interval=3", "task=cube-single-oraclerep", "preset=cpu_goal"]
    overrides = [*OVERRIDES, *settings]
    code, said = fork.wait(tmp_path / "run", *overrides)
    assert code == 0, said[-3000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 20
    for path in (tmp_path / "run", tmp_path / "run/policy"):
        actor = load_policy(path)
        assert actor.chunk_size == 10
        assert actor.qvalue_network.module.first_actions == 3
    code, said = fork.wait(tmp_path / "run", *overrides, "policy_chunk_size=4")
    assert code == 1
    assert "cannot go on with another policy_chunk_size: 3 -> 4" in said


@pytest.mark.slow
def test_several_tasks(tmp_path, fork):
    overrides = [*OVERRIDES, "replan_interval=3", "task_ids=[1,3]"]
    code, said = fork.wait(tmp_path / "run", *overrides, example="mac_multitask")
    assert code == 0, said[-3000:]
    for path in (tmp_path / "run/policies").iterdir():
        assert load_policy(path).qvalue_network.module.first_actions == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "replan_interval=8 cannot be: a choice is made by only policy_chunk_size=3 actions"),
        (
            ["policy_chunk_size=11"],
            "policy_chunk_size=11 cannot be: a chunk has only chunk_size=10",
        ),
        (["replan_interval=3", "online.frames=9999"], "chunks are executed whole there"),
    ],
)
def test_settings_are_checked(tmp_path, fork, settings, message):
    code, said = fork.wait(tmp_path / "run", *OVERRIDES, *settings)
    assert code == 1
    assert message in said


def test_the_script_is_short():
    assert len((ROOT / "examples/mac.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
