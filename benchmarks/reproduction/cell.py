"""A cell of the grid: one method, one environment, one seed; data, training, evaluation, files."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import os
import platform
import re
import runpy
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch

from torchrl_mac.datasets import generate_dataset
from torchrl_mac.utils.files import read_json, replaced, write_json

__all__ = ["Cell", "Folders", "name_of", "run_cell", "write_result"]

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Folders:
    """Where results, runs (logs, checkpoints) and datasets are."""

    results: Path
    runs: Path
    data: Path


@dataclass(frozen=True)
class Cell:
    """What is run: a script with settings, on a dataset that is made if it is not there."""

    method: str
    environment: str
    seed: int
    script: str
    overrides: tuple[str, ...]
    dataset: str
    recipe: tuple[tuple[str, int], ...]  # of generate_dataset

    @property
    def name(self) -> str:
        """The name of its files."""
        return name_of(self.method, self.environment, self.seed)

    @property
    def command(self) -> str:
        """What makes it again, but for the folders."""
        settings = [*self.overrides, f"seed={self.seed}"]
        return shlex.join(["python", f"examples/{self.script}.py", *settings])

    def result(self, folders: Folders) -> dict[str, Any] | None:
        """Its result, if it is finished.

        Raises:
            ValueError: if the file there is that of another command or dataset.
        """
        path = folders.results / f"{self.name}.json"
        if not path.exists():
            return None
        found = read_json(path)
        expected = {"command": self.command, "recipe": dict(self.recipe)}
        for key, value in expected.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path} has {key} {found.get(key)!r} where the suite has {value!r}: move it "
                    "away, or choose another folder with --results."
                )
        return found


def name_of(method: str, environment: str, seed: int) -> str:
    """The name of a cell's files."""
    method = re.sub(r"[^a-z0-9]+", "_", method.lower()).strip("_")
    return f"{method}-{environment}-seed{seed}"


def run_cell(cell: Cell, folders: Folders) -> str:
    """Runs a cell, going on where it was interrupted, and writes its JSON and its CSV.

    Returns:
        its name.

    Raises:
        RuntimeError: if the script fails, with the last lines of what it has said.
    """
    begun = time.monotonic()
    run = folders.runs / cell.name
    log = run.with_suffix(".log")
    run.parent.mkdir(parents=True, exist_ok=True)
    processes = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    processes.set_forkserver_preload(["torchrl_mac.trainers.experiment"])  # once for all cells
    process = processes.Process(target=_work, args=(cell, folders, run, log))
    process.start()
    process.join()
    if process.exitcode:
        last = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-15:]
        raise RuntimeError(
            f"{cell.name} has ended with {process.exitcode}; all of {log} ends in\n"
            + "\n".join(last)
        )
    write_result(cell, folders, run, time.monotonic() - begun)
    return cell.name


def write_result(cell: Cell, folders: Folders, run: Path, seconds: float) -> None:
    """Writes the files of a cell whose run has finished."""
    summary, metadata = read_json(run / "summary.json"), _metadata(run)
    with replaced(folders.results / f"{cell.name}.csv") as path:
        path.write_text(_curve(run / "logs/metrics.jsonl"))
    result = {
        "method": cell.method,
        "environment": cell.environment,
        "seed": cell.seed,
        "command": cell.command,
        "dataset": cell.dataset,
        "recipe": dict(cell.recipe),
        "success_rates": _success_rates(summary),
        **{key: summary[key] for key in ("episodes", "updates", "train_seconds")},
        "seconds": seconds,
        "summary": summary,
        "settings": {key: metadata[key] for key in sorted(metadata) if key not in _PLACES},
        "hardware": hardware(),
    }
    write_json(folders.results / f"{cell.name}.json", result)


_PLACES = ("data_dir", "root")  # settings that say nothing of the result


def _work(cell: Cell, folders: Folders, run: Path, log: Path) -> None:
    """What a cell's process does: the data, and then the script as if it had been started."""
    if sys.platform == "linux":  # to be interrupted when the grid is: the script then saves
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    recipe = dict(cell.recipe)
    generate_dataset(cell.dataset, folders.data, workers=1, progress=False, **recipe)
    places = [f"data_dir={folders.data.absolute()}", f"hydra.run.dir={run.absolute()}"]
    sys.argv = [*shlex.split(cell.command)[1:], *places]
    os.chdir(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _metadata(run: Path) -> dict[str, Any]:
    """The settings that a run exports with its policy, or with the first of them."""
    path = next(iter(sorted(run.glob("polic*/**/policy.json"))))
    return read_json(path)["metadata"]


def _success_rates(summary: dict[str, Any]) -> dict[str, float]:
    """By task: of one agent for all tasks, of several agents, or of one for one."""
    if "success_rates" in summary:
        return summary["success_rates"]
    tasks = {key: rate for key, rate in summary.items() if key.endswith("/success_rate")}
    if tasks:
        return {key.split("/")[0]: rate for key, rate in sorted(tasks.items())}
    found = re.search(r"task\d", summary["task"])
    return {found[0] if found else "task": summary["success_rate"]}


def _curve(path: Path) -> str:
    """What was logged, as lines of update, name and value."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["update", "name", "value"])
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        update = entry.pop("step")
        rows.writerows(
            [update, name, f"{value:.6g}"]
            for name, value in entry.items()
            if isinstance(value, int | float)
        )
    return text.getvalue()


def hardware() -> dict[str, Any]:
    """What it was run on."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
