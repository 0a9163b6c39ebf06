from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torchrl._utils import logger as torchrl_logger

from torchrl_mac.trainers import experiment
from torchrl_mac.trainers.online import online_phases
from torchrl_mac.trainers.settings import _RULES, check_settings

CONFIGS = Path(__file__).parents[2] / "configs"


SCRIPTS = {"mac_multitask": "mac"}
SCRIPTS |= {script: script for script in ("mac", "fmpc", "qc", "qc_fql", "rlpd")}
PRESETS = [
    (script, path.stem)
    for script, method in SCRIPTS.items()
    for path in sorted((CONFIGS / method / "preset").glob("*.yaml"))
]


def settings_of(*overrides, script="mac"):
    with initialize_config_dir(str(CONFIGS / SCRIPTS[script]), version_base="1.3"):
        cfg = compose(script, overrides=list(overrides))
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(("script", "preset"), PRESETS)
def test_presets_are_valid(script, preset):
    settings = settings_of(f"preset={preset}", script=script)
    check_settings(settings)
    if script not in ("mac_multitask", "fmpc"):  # which are offline alone
        online = online_phases({**settings, "online": {**settings["online"], "frames": 20_000}})
        assert sum(online.frames.values()) == 20_000


@pytest.mark.parametrize("method", ["mac", "fmpc", "qc", "qc_fql", "rlpd"])
def test_tasks_are_valid(method):
    for path in sorted((CONFIGS / method / "task").glob("*.yaml")):
        check_settings(settings_of(f"task={path.stem}", script=method))


def test_every_rule_is_of_a_setting():
    settings = [settings_of(script=script) for script in SCRIPTS]
    assert set(_RULES) == {key for of in settings for key in of} & set(_RULES)
    of_run = ("seed", "precision", "eval_seed", "log_interval", "resume")
    assert all(key in of for of in settings for key in of_run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("gamma", value) for value in (2, -1, 0, math.nan, "x", True)),
        *(("lmbda", value) for value in (2, -1, math.nan)),
        *(("tau", value) for value in (0, 1.5)),
        *(("value_cells", value) for value in ([], [0], [1.5], 256, [-4])),
        *(("log_interval", value) for value in (0, -1, 0.5, math.nan, None)),
        *(("checkpoint_seconds", value) for value in (0, -1, math.nan)),
        *(("checkpoint_interval", value) for value in (0, -5, 1.5)),
        *(("eval_episodes", value) for value in (0, 1.5, True)),
        *(("num_threads", value) for value in (0, -1)),
        ("wandb", "foo"),
        ("activation", "tanh"),
        ("precision", "fp64"),
        ("resume", None),
        ("device", "gpu"),
        ("cudagraphs", True),
        ("max_grad_norm", 0),
        ("phases", []),
        ("replan_interval", 11),
        ("prefetch", -1),
        ("seed", -1),
        ("compile", "yes"),
        ("num_candidates", 0),
        ("imagination_horizon", 0),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(key, value):
    settings = {**settings_of("device=cpu"), key: value}
    with pytest.raises(ValueError, match=rf"{key}=.* cannot be.*: \w+ ") as caught:
        check_settings(settings)
    assert str(value).lower() in str(caught.value).lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"device=cuda cannot be.*no CUDA device"):
        check_settings({"device": "cuda"})


def test_data_of_another_width_is_refused():
    run = object.__new__(experiment.Experiment)
    run.cfg = OmegaConf.create({"dataset": "pointmaze-medium-navigate-singletask-task1-v0"})

    class Data:
        data_path = "data/memmap"
        metadata = {"observation_dim": 2, "action_dim": 2}  # noqa: RUF012

    run._check_widths(Data)
    for name in ("observation", "action"):
        Data.metadata = {"observation_dim": 2, "action_dim": 2, f"{name}_dim": 1}
        with pytest.raises(ValueError, match=rf"data/memmap has {name}s of 1 numbers.* have 2"):
            run._check_widths(Data)


@pytest.mark.slow
def test_nothing_is_written_before_settings_are_valid(tmp_path):
    """Nor is what lies in the folder moved, whatever is wrong."""
    (tmp_path / "mine.txt").write_text("mine")
    mac = CONFIGS.parent / "examples" / "mac.py"
    for override, message in (("gamma=2", "gamma=2"), ("data_dir=nowhere", "nowhere")):
        command = [sys.executable, mac, override, f"hydra.run.dir={tmp_path}"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"mine.txt", ".hydra", "mac.log"}


def test_wandb_goes_on_without_a_network(tmp_path, monkeypatch):
    made, seen = [], []

    class Logger:
        def __init__(self, name, offline=False, **settings):
            if not offline:
                raise TimeoutError("no network")
            made.append(settings)

        def log_hparams(self, cfg):
            pass

        def close(self):
            pass

    monkeypatch.setattr(experiment, "WandbLogger", Logger)
    monkeypatch.setattr(torchrl_logger, "warning", lambda message, *_: seen.append(message))
    run = object.__new__(experiment.Experiment)
    run.cfg = OmegaConf.create({"wandb": "online", "project": "p", "resume": "auto"})
    run.folder = type("Folder", (), {"path": tmp_path, "id": "1"})()
    run._wandb(tmp_path)
    assert made and "no network" in seen[0] and "wandb=offline" in seen[0]


if __name__ == "__main__":
    pytest.main([__file__])
