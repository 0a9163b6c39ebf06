"""Replays the reference implementations' updates through this package and compares them.

    python test/parity/replay.py FIXTURE.npz

A fixture holds, for one or more cases (a method with its settings), initial parameters, batches,
all noises, and the losses, gradients and parameters that the authors' own agent computed from them.
Every size is read from the fixture. One JSON line tells the largest error of each kind; the exit
code is 1 if any is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import replay_fmpc
import replay_goal_critics
import replay_goal_windows
import replay_leq
import replay_leq_original
import replay_mac
import replay_mbpo
import replay_qc
import replay_sharsa
import replay_variants
import replay_windows
from fixture import configs
from torchrl._utils import logger

FAMILIES = (
    replay_mac,
    replay_variants,
    replay_mbpo,
    replay_leq,
    replay_leq_original,
    replay_fmpc,
    replay_goal_critics,
    replay_qc,
    replay_windows,
    replay_sharsa,
    replay_goal_windows,
)


def cases_of(path: str | Path) -> dict[str, ModuleType]:
    """The cases of a file, each with the module that replays it."""
    cases = {
        case: family
        for case, config in configs(path).items()
        for family in FAMILIES
        if family.accepts(case, config)
    }
    if not cases:
        raise SystemExit(f"{path} has no case of a known agent: it is not a parity fixture.")
    return cases


def verdict(errors: dict[str, dict[str, float]], tolerances: dict[str, float]) -> dict:
    """Whether all errors are within their tolerances, and the largest of each kind."""
    largest = {}
    for kind, by_name in errors.items():
        if by_name:
            worst = max(by_name, key=by_name.get)
            largest[kind] = {"error": by_name[worst], "of": worst, "tolerance": tolerances[kind]}
    passed = bool(largest) and all(
        entry["error"] <= entry["tolerance"] for entry in largest.values()
    )
    return {"passed": passed, "largest_relative_error": largest, "all": errors}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="a file such as mac.npz")
    path = parser.parse_args(argv).fixture
    logger.setLevel("WARNING")  # nothing but the report on standard output
    report = {
        case: verdict(family.replay(path, case), family.TOLERANCES)
        for case, family in cases_of(path).items()
    }
    print(json.dumps({"fixture": path.name, **report}))
    return 0 if all(case["passed"] for case in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
