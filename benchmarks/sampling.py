"""What a batch of action chunks costs, by the size of the dataset.

    python benchmarks/sampling.py --rows 1000000 10000000 100000000 --json

Makes a synthetic memory map of each size (cube-single's widths, episodes of 1000 rows) and draws
batches of 1024 chunks of 10 actions, with and without goals. Beside them, in the same run: a bare
NumPy gather of the same bytes from the same files, and TorchRL's ``SliceSampler`` on the same rows.
``sampler`` is the cost of everything but the gather: drawing starts and goals, looking up episodes,
relabelling. Each size runs in a process of its own.

The columns are sparse files: their holes are read as zeros through the page cache like any other
file, so that 100 million rows need 14 GB of cache but no disk. Where the cache is smaller than that
the gathers at this size are those of a cold file; the sampler's own cost is not affected.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import SliceSampler, TensorDictReplayBuffer, TensorStorage

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, GoalDistribution

EPISODE = 1000
CHUNK = 10
WARM_ROWS = 10_000_000  # larger files are not read through before
GOALS = {
    "value_goal": GoalDistribution(0.2, 0.5, 0.3),
    "actor_goal": GoalDistribution(0.0, 0.5, 0.5, gamma=0.999),
}


def make_rows(folder: Path, rows: int) -> tuple[TensorDict, torch.Tensor]:
    """A memory-mapped dataset of zeros, but for the episode numbers and the ends."""
    widths = {"observation": 28, "action": 5, "oracle_rep": 3}
    example = TensorDict(
        {key: torch.zeros(1, width).expand(rows, width) for key, width in widths.items()},
        batch_size=[rows],
    )
    example["episode"] = torch.zeros(1, dtype=torch.int32).expand(rows)
    example["next", "reward"] = torch.zeros(1, 1).expand(rows, 1)
    example["next", "terminated"] = torch.zeros(1, 1, dtype=torch.bool).expand(rows, 1)
    columns = example.memmap_like(folder)
    block = 1_000_000
    for start in range(0, rows, block):
        part = torch.arange(start, min(start + block, rows), dtype=torch.int64) // EPISODE
        columns["episode"][start : start + block] = part.to(torch.int32)
    ends = torch.arange(EPISODE - 1, rows, EPISODE)
    if len(ends) == 0 or ends[-1] != rows - 1:
        ends = torch.cat([ends, torch.tensor([rows - 1])])
    return columns.lock_(), ends


def flat_rows(rows: TensorDict) -> TensorDict:
    """The same rows, all of them the first one: a gather from them always hits the cache."""
    return rows.apply(lambda column: column[:1].clone().expand(column.shape)).lock_()


def median_ms(sample: Callable[[], object], repeats: int) -> float:
    """After a few calls to warm up."""
    times = []
    for _ in range(5 + repeats):
        start = time.perf_counter()
        sample()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[5:])


def interleaved_ms(samples: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of several candidates taken in turns, so that a noisy moment hits all of them."""
    turns = 10
    rounds = [
        {name: median_ms(sample, repeats // turns) for name, sample in samples.items()}
        for _ in range(turns)
    ]
    return {name: statistics.median(ms[name] for ms in rounds) for name in samples}


def numpy_gather(rows: TensorDict, batch_size: int, goals: int) -> Callable[[], object]:
    """The bytes of a batch, gathered by NumPy at known places."""
    observation, action, reward, rep = (
        np.memmap(rows[key].filename, dtype=np.float32, mode="r").reshape(rows[key].shape)
        for key in ("observation", "action", ("next", "reward"), "oracle_rep")
    )
    terminated = np.memmap(rows["next", "terminated"].filename, dtype=bool, mode="r")
    generator = np.random.default_rng(0)
    steps = np.arange(CHUNK)
    places = itertools.cycle(
        generator.integers(0, len(rows) - CHUNK, (1000, 1 + goals, batch_size))
    )

    def gather() -> object:
        start, *goal_rows = next(places)
        chunk = start[:, None] + steps
        batch = [observation[start], observation[start + CHUNK], action[chunk]]
        if goals:
            return batch + [rep[goal] for goal in goal_rows]
        return [*batch, reward[chunk], terminated[chunk]]

    return gather


def private_mib() -> float:
    """Resident memory that belongs to the process alone: no pages of mapped files."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def measure(rows: int, args: argparse.Namespace) -> dict:
    """All figures of one size."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="sampling-") as folder:
        table, ends = make_rows(Path(folder), rows)
        if rows <= WARM_ROWS:
            for column in table.values(True, True):
                column.as_subclass(torch.Tensor).sum()
        sampling(table[:EPISODE], ends[:1], GOALS, args.batch_size)()  # PyTorch's own start-up
        before = private_mib()
        samples = {
            "plain": sampling(table, ends, {}, args.batch_size),
            "goals": sampling(table, ends, GOALS, args.batch_size),
        }
        for sample in samples.values():
            sample()
        memory = private_mib() - before
        flat = flat_rows(table)
        samples["sampler"] = sampling(flat, ends, {}, args.batch_size)
        samples["sampler goals"] = sampling(flat, ends, GOALS, args.batch_size)
        samples["numpy"] = numpy_gather(table, args.batch_size, 0)
        samples["numpy goals"] = numpy_gather(table, args.batch_size, len(GOALS))
        ms = interleaved_ms(samples, args.repeats)
        result = {
            "rows": rows,
            "episodes": len(ends),
            "batch_ms": ms["plain"],
            "numpy_ms": ms["numpy"],
            "ratio": ms["plain"] / ms["numpy"],
            "goals_batch_ms": ms["goals"],
            "goals_numpy_ms": ms["numpy goals"],
            "goals_ratio": ms["goals"] / ms["numpy goals"],
            "sampler_ms": ms["sampler"],
            "goals_sampler_ms": ms["sampler goals"],
            "sampler_mib": memory,
            "data": "synthetic, sparse files" + ("" if rows <= WARM_ROWS else ", cold"),
        }
        result["slice_sampler_ms"] = slice_sampler_ms(table, args)
        return result


def sampling(
    rows: TensorDict, ends: torch.Tensor, goals: dict, batch_size: int
) -> Callable[[], TensorDict]:
    """Ours: draws the next batch."""
    storage = ActionChunkStorage(
        rows, gamma=0.999, goal_keys=list(goals), goal_source="oracle_rep", episode_ends=ends
    )
    sampler = ActionChunkSampler(CHUNK, goals=goals, seed=0)
    return lambda: storage.get(sampler.sample(storage, batch_size)[0])


def slice_sampler_ms(table: TensorDict, args: argparse.Namespace) -> float:
    buffer = TensorDictReplayBuffer(
        storage=TensorStorage(table.select("observation", "action", "episode", "next")),
        sampler=SliceSampler(
            slice_len=CHUNK, traj_key="episode", strict_length=True, cache_values=True
        ),
        batch_size=args.batch_size * CHUNK,
    )
    return median_ms(buffer.sample, max(5, args.repeats // 20))


def table_of(sizes: list[dict]) -> str:
    """A Markdown table."""
    names = [name for name in sizes[0] if name != "data"]
    lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
    for size in sizes:
        cells = [size[name] for name in names]
        cells = [f"{cell:,}" if isinstance(cell, int) else f"{cell:.2f}" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the synthetic files")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.rows[0], args)))
        return
    results = []
    for rows in args.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(rows)]
        for name in ("batch_size", "repeats", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        if args.folder:
            command += ["--folder", str(args.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    first, last = results[0], results[-1]
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "batch_size": args.batch_size,
        "chunk_size": CHUNK,
        "sampler_growth": last["sampler_ms"] / first["sampler_ms"],
        "goals_sampler_growth": last["goals_sampler_ms"] / first["goals_sampler_ms"],
        "sizes": results,
    }
    print(json.dumps(report, indent=2) if args.json else table_of(results))


if __name__ == "__main__":
    main()
