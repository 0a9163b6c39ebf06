"""The tables, made again: a grid of methods, environments and seeds, and reports of it.

    python benchmarks/reproduce.py --suite smoke                 # every method, minutes
    python benchmarks/reproduce.py --suite goals --workers 2     # the methods for goals, an hour
    python benchmarks/reproduce.py --suite goals --methods MAC SHARSA --seeds 0
    RAY_ADDRESS=auto python benchmarks/reproduce.py --suite goals --engine ray --workers 10
    python benchmarks/reproduce.py report --suite goals          # tables and pictures

Each cell makes its data if it is not there, trains, evaluates, and leaves in results/SUITE a JSON
with what it was and what came of it, and a CSV of its curves. Finished cells are skipped,
interrupted ones go on, and the order does not matter: the grid can be spread over days, processes
and machines that share these folders. What a suite has stands in reproduction/suites.yaml.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import get_args

from reproduction.cell import ROOT, Cell, Folders, run_cell
from reproduction.report import report
from reproduction.suite import SUITES, cells

from torchrl_mac.utils.workers import Engine, WorkerPool


def run(found: list[Cell], folders: Folders, workers: int, engine: Engine) -> int:
    """Runs what is not finished.

    Returns:
        how many cells have failed; the others are there.
    """
    todo = [cell for cell in found if cell.result(folders) is None]
    folders.results.mkdir(parents=True, exist_ok=True)
    print(f"{len(found)} cells, {len(found) - len(todo)} of them finished", flush=True)
    failed = 0
    with contextlib.ExitStack() as stack:
        submit = _submitter(stack, workers, engine)
        futures = [submit(cell, folders) for cell in todo]
        for k, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            failed += error is not None
            said = sys.stdout if error is None else sys.stderr
            print(f"{k}/{len(todo)} {error or future.result()}", file=said, flush=True)
    return failed


def _submitter(stack: contextlib.ExitStack, workers: int, engine: Engine) -> Callable[..., Future]:
    """What runs a cell, in a process of its own in either case."""
    if engine == "ray":
        pool = WorkerPool(workers, partial(partial, run_cell), attempts=1, engine=engine)
        return stack.enter_context(pool).submit
    threads = stack.enter_context(ThreadPoolExecutor(workers))
    return partial(threads.submit, run_cell)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--methods", nargs="+", default=(), help="default: all of the suite")
    parser.add_argument("--environments", nargs="+", default=())
    parser.add_argument("--seeds", nargs="+", type=int, default=())
    parser.add_argument("--engine", choices=get_args(Engine), default="processes")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--results", type=Path, help="default: results/SUITE")
    parser.add_argument("--runs", type=Path, help="default: outputs/reproduce/SUITE")
    parser.add_argument("--data", type=Path, help="default: data/SUITE")
    args = parser.parse_args()
    folders = Folders(
        args.results or ROOT / "results" / args.suite,
        args.runs or ROOT / "outputs/reproduce" / args.suite,
        args.data or ROOT / "data" / args.suite,
    )
    try:
        found = cells(args.suite, args.methods, args.environments, args.seeds)
        if args.command == "report":
            return report(args.suite, found, folders)
        return int(run(found, folders, args.workers, args.engine) > 0)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
