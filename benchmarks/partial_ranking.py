"""Chunks ranked by all of their actions, or by the first: a table and a figure.

    python benchmarks/reproduce.py --suite ranking --workers 2
    python benchmarks/partial_ranking.py results/ranking

Both kinds imagine as many steps and execute as many actions before they choose again; all else is
the preset's. Those whose Q learns an expectile (`kappa_d=0.7`) have a row of their own. The figure
is `partial_ranking.png`, beside the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure


class Arm(NamedTuple):
    """What runs that differ by their seed have in common."""

    chunk_size: int
    ranked_by: int
    kappa_d: float | None
    replan_interval: int

    @property
    def ranking(self) -> str:
        """How candidates are ranked."""
        by = "whole chunks" if self.ranked_by == self.chunk_size else f"first {self.ranked_by}"
        return by if self.kappa_d is None else f"{by}, expectile {self.kappa_d:g}"


def read(folder: Path) -> dict[Arm, dict[int, dict]]:
    """The results of finished cells, by seed."""
    arms: dict[Arm, dict[int, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        of = result["settings"]
        ranked_by = of["policy_chunk_size"] or of["chunk_size"]
        arm = Arm(of["chunk_size"], ranked_by, of["kappa_d"] or None, of["replan_interval"])
        rate = fmean(result["success_rates"].values())
        arms.setdefault(arm, {})[result["seed"]] = {**result, "success_rate": rate}
    if not arms:
        raise SystemExit(f"{folder} has no result of mac.py.")
    return dict(sorted(arms.items(), key=lambda item: (item[0].ranking, item[0])))


def table(arms: dict[Arm, dict[int, dict]]) -> str:
    """Rows of Markdown, one for each arm."""
    head = ("h", "ranked by", "executed", "success of seeds", "mean", "training")
    rows = [head, ("---",) * len(head)]
    for arm, runs in arms.items():
        rates = [run["success_rate"] for _, run in sorted(runs.items())]
        seconds = fmean(run["train_seconds"] for run in runs.values())
        rows.append(
            (
                *(str(arm.chunk_size), arm.ranking, str(arm.replan_interval)),
                ", ".join(f"{rate:.2f}" for rate in rates),
                *(f"{fmean(rates):.2f}", f"{seconds:.0f} s"),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(path: Path, arms: dict[Arm, dict[int, dict]]) -> None:
    """The rates of success over h: each seed's as a point, the means as lines."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axis = figure.subplots()
    for k, ranking in enumerate(dict.fromkeys(arm.ranking for arm in arms)):
        points = sorted(
            (arm.chunk_size, [run["success_rate"] for run in runs.values()])
            for arm, runs in arms.items()
            if arm.ranking == ranking
        )
        for h, rates in points:
            axis.plot([h] * len(rates), rates, "o", color=f"C{k}", markersize=4, alpha=0.6)
        lines = [h for h, _ in points], [fmean(rates) for _, rates in points]
        axis.plot(*lines, color=f"C{k}", label=ranking)
    axis.set_xlabel("actions in a chunk")
    axis.set_ylabel("success rate")
    axis.set_ylim(0, 1)
    axis.legend(title="ranked by", fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of results: results/ranking")
    folder = parser.parse_args().folder
    arms = read(folder)
    print(table(arms))
    draw(folder / "partial_ranking.png", arms)


if __name__ == "__main__":
    main()
