"""What it costs to turn OGBench's npz files into a memory map: seconds, rows/s and peak memory.

    python benchmarks/conversion.py --json

Converts compressed npz files of synthetic trajectories, smooth as the real ones and compressed by
as much: a whole cube-single set of a million rows, and puzzle-4x5 (99 numbers a row) in sets of 2
and of 20 shards. Every conversion runs in a process of its own, whose peak resident memory is read
at its end; ``anonymous`` leaves out the mapped file pages, which the kernel may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

NAMES = {"cube-single": "cube-single-play-v0", "puzzle-4x5": "puzzle-4x5-play-v0"}
WIDTHS = {"cube-single": (28, 21, 20), "puzzle-4x5": (99, 35, 34)}
EPISODE = 1001
CHILD = """
import json, sys, threading, time
from torchrl_mac.data import OGBenchExperienceReplay

def anonymous():
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

name, source, root, workers = sys.argv[1:]
base, peak, stop = anonymous(), 0.0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
buffer = OGBenchExperienceReplay(name, root=root, source=source, workers=int(workers))
seconds = time.perf_counter() - start
stop.set()
thread.join()
status = open("/proc/self/status").read().splitlines()
high = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
print(json.dumps({
    "rows": len(buffer), "seconds": seconds, "rows_per_s": len(buffer) / seconds,
    "peak_mib": high, "anonymous_peak_mib": peak, "anonymous_base_mib": base,
}))
"""


def write_shard(path: Path, env: str, rows: int, seed: int) -> None:
    """Random walks at float32's full precision, as compressed npz."""
    rng = np.random.default_rng(seed)
    obs_dim, nq, nv = WIDTHS[env]

    def walk(width: int) -> np.ndarray:
        steps = rng.standard_normal((rows, width), dtype=np.float32) * 0.01
        # a part of every observation rests, as unmoved objects do
        steps[:, rng.random(width) < 0.3] = 0
        return np.cumsum(steps, 0, dtype=np.float32) + rng.random(width, dtype=np.float32)

    terminals = np.zeros(rows, dtype=bool)
    terminals[EPISODE - 1 :: EPISODE] = True
    terminals[-1] = True
    np.savez_compressed(
        path,
        observations=walk(obs_dim),
        actions=rng.uniform(-1, 1, (rows, 5)).astype(np.float32),
        terminals=terminals,
        qpos=walk(nq),
        qvel=walk(nv),
    )


def convert(name: str, source: Path, workers: int) -> dict:
    with tempfile.TemporaryDirectory(dir=source, prefix="root-") as root:
        command = [sys.executable, "-c", CHILD, name, str(source), root, str(workers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of cube-single's one file")
    parser.add_argument("--shard-rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 20])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the synthetic files")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    report: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "workers": args.workers,
        "results": [],
    }
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="conversion-") as folder:
        single = Path(folder) / "single"
        single.mkdir()
        name = NAMES["cube-single"]
        write_shard(single / f"{name}.npz", "cube-single", args.rows, 0)
        runs = [convert(name, single, args.workers) for _ in range(args.repeats)]
        median = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        report["results"].append({"dataset": name, "files": 1, **median})

        name = NAMES["puzzle-4x5"]
        first = Path(folder) / "shard.npz"
        write_shard(first, "puzzle-4x5", args.shard_rows, 1)
        for shards in args.shards:
            several = Path(folder) / f"shards{shards}"
            several.mkdir()
            for k in range(shards):  # the same bytes under several names
                os.link(first, several / f"{name}-{k:03}.npz")
            result = convert(name, several, args.workers)
            report["results"].append({"dataset": name, "files": shards, **result})
    peaks = [result["anonymous_peak_mib"] for result in report["results"][1:]]
    if len(peaks) > 1:
        report["memory_growth"] = peaks[-1] / peaks[0]
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for result in report["results"]:
        print(
            f"{result['dataset']:20} {result['files']:3} files {result['rows']:10,} rows "
            f"{result['seconds']:6.1f} s {result['rows_per_s']:10,.0f} rows/s "
            f"{result['anonymous_peak_mib']:6.0f} MiB"
        )


if __name__ == "__main__":
    main()
