"""GCIQL and n-step GCSAC+BC, for about 20 updates."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_dir
from running import ROOT

from torchrl_mac import load_policy
from torchrl_mac.datasets import generate_dataset

TERMS = {
    "gciql": ["loss_value", "loss_qvalue", "loss_actor"],
    "gcsac_bc": ["loss_actor", "loss_qvalue", "loss_alpha"],
}


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maze")
    sizes = {"episodes": 3, "val_episodes": 1, "steps": 81, "workers": 1, "progress": False}
    generate_dataset("pointmaze-medium-navigate-v0", folder, **sizes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("example", "chunk_size"), [("gciql", 1), ("gcsac_bc", 5)])
def test_one_agent_for_all_tasks(example, chunk_size, maze, tmp_path, fork):
    phase = f"{{name: joint, terms: [{','.join(TERMS[example])}], num_updates: 20, batch_size: 8}}"
    overrides = [f"data_dir={maze}", "preset=cpu_goal", "task=pointmaze-medium-oraclerep"]
    overrides += [f"phases=[{phase}]", f"chunk_size={chunk_size}", "eval_episodes=1"]
    overrides += [f"replan_interval={chunk_size}"]
    code, said = fork.wait(tmp_path / "run", *overrides, example=example)
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 20
    rates = [summary[f"task{k}/success_rate"] for k in range(1, 6)]
    assert summary["success_rate"] == pytest.approx(sum(rates) / 5)
    for term in TERMS[example]:
        rows = (tmp_path / f"run/logs/scalars/train/{term}.csv").read_text().splitlines()
        assert len(rows) == 4
    policy = load_policy(tmp_path / "run")
    assert policy.deterministic and "goal" in policy.in_keys and policy.chunk_size == chunk_size


@pytest.mark.parametrize("example", TERMS)
def test_scripts_are_short_and_configs_cover_the_paper(example):
    assert len((ROOT / f"examples/{example}.py").read_text().splitlines()) <= 150
    tasks = {path.stem for path in (ROOT / f"configs/{example}/task").glob("*.yaml")}
    assert tasks == {path.stem for path in (ROOT / "configs/mac/task").glob("*-oraclerep.yaml")}
    presets = {path.stem for path in (ROOT / f"configs/{example}/preset").glob("*.yaml")}
    assert presets == {"cpu_goal", "paper"}


@pytest.mark.parametrize(
    ("example", "environment", "expected"),
    [
        ("gciql", "cube-octuple", {"alpha": 10.0, "trajectory": 1, "near": 0.999}),
        ("gciql", "puzzle-4x5", {"alpha": 1.0, "trajectory": 0.5, "near": 0.999}),
        ("gciql", "humanoidmaze-giant", {"alpha": 0.3, "trajectory": 1, "near": None}),
        ("gcsac_bc", "cube-octuple", {"n_steps": 50, "bc_alpha": 0.1, "q_aggregation": "min"}),
        ("gcsac_bc", "puzzle-4x5", {"n_steps": 25, "trajectory": 0.5, "q_aggregation": "min"}),
        (
            "gcsac_bc",
            "humanoidmaze-giant",
            {"n_steps": 50, "bc_alpha": 0.03, "q_aggregation": "mean", "near": None},
        ),
    ],
)
def test_settings_of_the_authors(example, environment, expected):
    with initialize_config_dir(str(ROOT / f"configs/{example}"), version_base="1.3"):
        cfg = compose(example, [f"task={environment}-oraclerep"])
    goal = cfg.goals.actor_goal
    found = {**cfg, "trajectory": goal.trajectory, "near": goal.gamma}
    assert {key: found[key] for key in expected} == expected


if __name__ == "__main__":
    pytest.main([__file__])
