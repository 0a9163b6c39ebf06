"""LEQ's example, for about 20 updates."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import ONE_EPISODE, ROOT

from torchrl_mac import load_policy
from torchrl_mac.datasets import generate_dataset
from torchrl_mac.trainers import Phase

MODEL = "{name: model, terms: [loss_dynamics, loss_reward, loss_termination], num_updates: 8, \
    batch_size: 8, early_stopping: {interval: 2, patience: 2}}"
POLICY = "{name: policy, terms: [loss_actor, loss_qvalue, loss_expansion], num_updates: 10, \
    batch_size: 8, optim: {actor_network: {lr: 1.0e-4}}, eval_interval: 10}"
OVERRIDES = [
    f"phases=[{MODEL},{POLICY}]",
    "dynamics_cells=[16]",
    "head_cells=[16]",
    "num_members=3",
]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_the_model_and_then_the_policy(chunk_size, tmp_path, fork):
    overrides = [*OVERRIDES, f"chunk_size={chunk_size}", *ONE_EPISODE]
    code, said = fork.wait(tmp_path / "run", *overrides, example="leq")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 10 < summary["updates"] <= 18  # the model's phase may have stopped early
    assert 0 <= summary["success_rate"] <= 1
    scalars = {path.stem for path in (tmp_path / "run/logs/scalars/train").glob("loss_*.csv")}
    assert scalars >= {"loss_dynamics", "loss_actor", "loss_qvalue", "loss_expansion"}
    assert load_policy(tmp_path / "run").chunk_size == chunk_size
    before = (tmp_path / "run/policy/policy.safetensors").read_bytes()
    code, said = fork.wait(tmp_path / "again", *overrides, example="leq")
    assert (tmp_path / "again/policy/policy.safetensors").read_bytes() == before


@pytest.mark.slow
def test_one_agent_for_all_tasks(tmp_path, fork):
    name, sizes = "pointmaze-medium-navigate-v0", {"episodes": 3, "val_episodes": 1, "steps": 81}
    generate_dataset(name, tmp_path, **sizes, workers=1, progress=False)
    overrides = ["preset=cpu_goal", "task=pointmaze-medium-oraclerep", f"data_dir={tmp_path}"]
    overrides += [*OVERRIDES, "eval_episodes=1", "policy_cells=[16]", "value_cells=[16]"]
    code, said = fork.wait(tmp_path / "run", *overrides, example="leq")
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    rates = [summary[f"task{k}/success_rate"] for k in range(1, 6)]
    assert summary["success_rate"] == pytest.approx(sum(rates) / 5)


@pytest.mark.parametrize("preset", ["cpu", "cpu_goal", "original", "paper", "pendulum"])
def test_the_model_comes_first_but_for_the_paper(preset):
    with initialize_config_dir(str(ROOT / "configs/leq"), version_base="1.3"):
        cfg = OmegaConf.to_container(compose("leq", [f"preset={preset}"]))
    stops = [Phase(**phase).early_stopping is not None for phase in cfg["phases"]]
    assert stops == ([False] if preset == "paper" else [True, False])
    if preset == "paper":  # MAC's flags
        settings = [cfg[key] for key in ("lmbda", "expectile", "model_batch_ratio", "gamma")]
        assert settings == [1.0, 0.5, 0.95, 0.999]


def test_the_script_is_short_and_its_configs_cover_the_paper():
    tasks = {path.stem for path in (ROOT / "configs/leq/task").glob("*.yaml")}
    assert tasks == {path.stem for path in (ROOT / "configs/mac/task").glob("*.yaml")}
    assert len((ROOT / "examples/leq.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
