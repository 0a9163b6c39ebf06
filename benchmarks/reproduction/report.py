"""Tables and pictures of a suite's results; they depend on the files in its folder alone."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from reproduction.cell import Cell, Folders, name_of
from scipy.stats import bootstrap, trim_mean

__all__ = ["report"]

HERE = Path(__file__).parent
PUBLISHED = OmegaConf.to_container(OmegaConf.load(HERE / "published.yaml"))
THRESHOLDS = OmegaConf.to_container(OmegaConf.load(HERE / "thresholds.yaml"))
RESAMPLES = 2_000
Rates = dict[str, np.ndarray]  # by task: of each seed


def report(suite: str, cells: list[Cell], folders: Folders) -> int:
    """Writes ``report.md`` and ``curves.png`` beside the results of the cells.

    Returns:
        how many thresholds are not reached.

    Raises:
        ValueError: if no cell is finished.
    """
    results = [found for cell in cells if (found := cell.result(folders))]
    if not results:
        raise ValueError(f"{folders.results} has no finished cell of the suite {suite}.")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["method"], result["environment"]].append(result)
    missed = list(_missed(suite, groups))
    command = f"python benchmarks/reproduce.py --suite {suite}"
    parts = [
        f"# Results of the suite `{suite}`",
        f"Made by `{command}`, and this page by `{command.replace(' --', ' report --')}`. "
        f"{len(results)} of {len(cells)} cells are finished. Each evaluates {_episodes(results)} "
        "episodes of each task, with seeds that no setting was chosen by.",
        "## Success",
        "Percent; the mean over tasks, and its mean and standard deviation over seeds. The "
        "interquartile mean over all tasks and seeds has an interval of 95 %, of a bootstrap that "
        "draws seeds anew for each task; with one seed there is none.",
        _table(groups),
        "## Beside the papers",
        "Their means and standard deviations, of networks, data and times many times as large.",
        _beside(groups),
        "## By task",
        _tasks(groups),
        "## What was run",
        _runs(results),
    ]
    if missed:
        parts[2:2] = ["**Thresholds that are not reached:** " + "; ".join(missed) + "."]
    _curves(folders.results / "curves.png", groups, folders.results)
    (folders.results / "report.md").write_text("\n\n".join(parts) + "\n")
    return len(missed)


def _rates(results: list[dict[str, Any]]) -> Rates:
    tasks = results[0]["success_rates"]
    return {task: np.array([result["success_rates"][task] for result in results]) for task in tasks}


def _means(results: list[dict[str, Any]]) -> list[float]:
    """Of each seed, over tasks."""
    return [fmean(result["success_rates"].values()) for result in results]


def _interquartile_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    return trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def _interval(rates: Rates) -> str:
    tasks = list(rates.values())
    middle = f"{100 * _interquartile_mean(*tasks):.0f}"
    if len(tasks[0]) < 2:
        return middle
    found = bootstrap(
        tasks,
        _interquartile_mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return f"{middle} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _percent(means: list[float]) -> str:
    spread = f" ± {100 * stdev(means):.0f}" if len(means) > 1 else ""
    return f"{100 * fmean(means):.0f}{spread}"


def _table(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    rows = [
        (
            *(method, environment, str(len(results))),
            *(_percent(_means(results)), _interval(_rates(results))),
            f"{fmean(result['train_seconds'] for result in results) / 60:.0f} min",
        )
        for (method, environment), results in groups.items()
    ]
    head = ("method", "environment", "seeds", "success", "interquartile mean", "training")
    return _markdown(head, rows)


def _beside(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    rows = []
    for (method, environment), results in groups.items():
        theirs = PUBLISHED.get(method, {}).get(environment)
        if theirs is not None:
            ours = 100 * fmean(_means(results))
            row = (method, environment, _percent(_means(results)))
            rows.append((*row, f"{theirs[0]} ± {theirs[1]}", f"{ours - theirs[0]:+.0f}"))
    if not rows:
        return "The papers have none of these."
    return _markdown(("method", "environment", "here", "there", "difference"), rows)


def _tasks(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    rows = []
    for (method, environment), results in groups.items():
        rates = [_percent(list(of)) for of in _rates(results).values()]
        tasks = [task[-5:] for task in results[0]["success_rates"]]
        rows.append((method, environment, ", ".join(map(": ".join, zip(tasks, rates)))))
    return _markdown(("method", "environment", "success of each task"), rows)


def _runs(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        recipe = ", ".join(f"{key}={value}" for key, value in result["recipe"].items())
        hardware = result["hardware"]
        device = hardware["accelerator"] or f"{hardware['processor']}, {hardware['cores']} cores"
        rows.append(
            (
                *(result["method"], result["environment"], str(result["seed"])),
                f"`{result['command']}`",
                f"{result['dataset']} ({recipe or 'as official'})",
                device,
            )
        )
    return _markdown(("method", "environment", "seed", "command", "data", "machine"), rows)


def _missed(suite: str, groups: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    missed = []
    for (method, environment), results in groups.items():
        least = THRESHOLDS.get(suite, {}).get(method, {}).get(environment, 0)
        if (mean := 100 * fmean(_means(results))) < least:
            missed.append(f"{method} on {environment} has {mean:.0f} of {least}")
    return missed


def _episodes(results: list[dict[str, Any]]) -> str:
    return " or ".join(map(str, sorted({result["episodes"] for result in results})))


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _curves(path: Path, groups: dict[tuple[str, str], list[dict[str, Any]]], folder: Path) -> None:
    """Success over updates where runs evaluate on the way, its end as a point where not."""
    environments = list(dict.fromkeys(environment for _, environment in groups))
    figure = Figure(figsize=(4.8 * len(environments), 3.4), layout="constrained")
    axes = figure.subplots(1, len(environments), squeeze=False).flat
    methods = list(dict.fromkeys(method for method, _ in groups))
    for environment, axis in zip(environments, axes, strict=True):
        for (method, of), results in groups.items():
            if of != environment:
                continue
            color = f"C{methods.index(method) % 10}"
            for k, result in enumerate(results):
                updates, rates = _points(folder, result)
                label = method if k == 0 else None
                axis.plot(updates, rates, ".-", color=color, label=label, alpha=0.8)
        axis.set_title(environment)
        axis.set_xlabel("updates")
        axis.set_ylim(-0.02, 1.02)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("success rate")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _points(folder: Path, result: dict[str, Any]) -> tuple[list[int], list[float]]:
    name = name_of(result["method"], result["environment"], result["seed"])
    with (folder / f"{name}.csv").open(newline="") as file:
        found = {
            int(row["update"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["name"] == "eval/success_rate"
        }
    found[result["updates"]] = fmean(result["success_rates"].values())
    points = sorted(found.items())
    return [update for update, _ in points], [rate for _, rate in points]
