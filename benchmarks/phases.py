"""What the updates of a script's phases cost, measured in runs of the script itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
IGNORED = ("eval_interval", "early_stopping", "warmup_updates", "num_updates")


def phase_times(method: str, data_dir: str, updates: int, settings: Sequence[str]) -> dict:
    """Milliseconds of an update of each phase, sampling included, and the phase's seconds.

    Each phase is trained alone, ``updates`` times, by ``examples/{method}.py``.
    """
    family = "mac" if method == "mac_multitask" else method
    with initialize_config_dir(str(ROOT / "configs" / family), version_base="1.3"):
        phases = OmegaConf.to_container(compose(method, overrides=list(settings)).phases)
    figures: dict = {"method": method, "settings": list(settings), "updates": updates}
    for phase in phases:
        alone = {key: value for key, value in phase.items() if key not in IGNORED}
        ms = _milliseconds(method, data_dir, {**alone, "num_updates": updates}, settings)
        seconds = ms * phase["num_updates"] / 1e3
        figures[phase["name"]] = {"ms": round(ms, 2), "seconds": round(seconds, 1)}
    figures["seconds"] = sum(figures[phase["name"]]["seconds"] for phase in phases)
    return figures


def _milliseconds(method: str, data_dir: str, phase: dict, settings: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(ROOT / "examples" / f"{method}.py"), *settings),
            *(f"phases=[{_written(phase)}]", f"data_dir={data_dir}", f"hydra.run.dir={folder}"),
            *("eval_episodes=1", "eval_num_envs=1", "video_episodes=0", "log_interval=1000000"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return 1e3 * summary["train_seconds"] / summary["updates"]


def _written(value: object) -> str:
    """A setting as Hydra's command line takes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
