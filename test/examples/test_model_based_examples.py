"""MAC's ablations and Dreamer, for about 20 updates; online they are with the other examples."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_dir
from running import ONE_EPISODE, ROOT, TERMS

from torchrl_mac import load_policy
from torchrl_mac.datasets import generate_dataset

MODEL = ["loss_dynamics", "loss_reward", "loss_termination"]
SCRIPTS = {
    "mac_gaussian": ["loss_bc", *MODEL, "loss_value", "loss_qvalue"],
    "mac_fql": ["loss_flow", *MODEL, "loss_value", "loss_qvalue", "loss_actor"],
    "dreamer": [*MODEL, "loss_actor", "loss_value"],
}


def joint(terms):
    settings = "num_updates: 20, batch_size: 8"
    return [f"phases=[{{name: joint, terms: [{','.join(terms)}], {settings}}}]", *ONE_EPISODE]


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maze")
    sizes = {"episodes": 3, "val_episodes": 1, "steps": 81, "workers": 1, "progress": False}
    generate_dataset("pointmaze-medium-navigate-v0", folder, **sizes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("example", SCRIPTS)
def test_one_agent_for_all_tasks(example, maze, tmp_path, fork):
    overrides = [f"data_dir={maze}", "preset=cpu_goal", "task=pointmaze-medium-oraclerep"]
    overrides += ["replan_interval=10", *joint(SCRIPTS[example])]
    code, said = fork.wait(tmp_path / "run", *overrides, example=example)
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    rates = [summary[f"task{k}/success_rate"] for k in range(1, 6)]
    assert summary["success_rate"] == pytest.approx(sum(rates) / 5)
    for term in SCRIPTS[example]:
        rows = (tmp_path / f"run/logs/scalars/train/{term}.csv").read_text().splitlines()
        assert len(rows) == 4
    assert "goal" in load_policy(tmp_path / "run").in_keys


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flow", "one_step"])
def test_what_makes_mac_s_candidates(policy, tmp_path, fork):
    overrides = [f"policy={policy}", "replan_interval=10", *joint(TERMS)]
    code, said = fork.wait(tmp_path / "run", *overrides)
    assert code == 0, said[-3000:]
    kind = "FlowMatchingPolicy" if policy == "flow" else "OneStepPolicy"
    assert type(load_policy(tmp_path / "run").policy).__name__ == kind


@pytest.mark.parametrize("method", SCRIPTS)
def test_scripts_are_short_and_configs_are_those_of_mac(method):
    tasks = [
        sorted(p.name for p in (ROOT / f"configs/{of}/task").iterdir()) for of in (method, "mac")
    ]
    assert tasks[0] == tasks[1]
    presets = {path.stem for path in (ROOT / f"configs/{method}/preset").iterdir()}
    assert presets == {"cpu", "cpu_goal", "paper", "pendulum"}
    assert len((ROOT / f"examples/{method}.py").read_text().splitlines()) <= 150
    with initialize_config_dir(str(ROOT / f"configs/{method}"), version_base="1.3"):
        paper = compose(method)
    assert paper.chunk_size == {"mac_gaussian": 10, "mac_fql": 5, "dreamer": 1}[method]
    assert [term for phase in paper.phases for term in phase.terms] == SCRIPTS[method]


if __name__ == "__main__":
    pytest.main([__file__])
