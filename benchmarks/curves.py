"""Draws the logs of several runs side by side.

    python benchmarks/curves.py curves.png fp32=outputs/a,outputs/b bf16=outputs/c,outputs/d

Each group has a colour of its own; each of its runs, such as one per seed, a line.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

METRICS = (
    *("validation/loss_distillation", "validation/loss_dynamics"),
    *("validation/loss_value", "validation/loss_qvalue"),
)


def read(run: Path, metric: str) -> tuple[list[int], list[float]]:
    """Updates and values of a run's metric."""
    with (run / f"logs/scalars/{metric}.csv").open() as file:
        rows = [(int(step), float(value)) for step, value in csv.reader(file)]
    return [step for step, _ in rows], [value for _, value in rows]


def draw(path: Path, groups: dict[str, list[Path]], metrics: list[str]) -> None:
    """One plot for each metric."""
    figure = Figure(figsize=(3.2 * len(metrics), 2.6), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for k, (name, runs) in enumerate(groups.items()):
            for i, run in enumerate(runs):
                label = name if i == 0 else None
                axis.plot(*read(run, metric), color=f"C{k}", alpha=0.7, linewidth=1, label=label)
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=7)
        if "loss" in metric:
            axis.set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN,...", help="folders of runs")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), help="names in the logs")
    args = parser.parse_args()
    groups = dict(group.split("=", 1) for group in args.groups)
    runs = {name: [Path(run) for run in of.split(",")] for name, of in groups.items()}
    draw(args.picture, runs, args.metrics)


if __name__ == "__main__":
    main()
