"""How long an update waits for its batch.

    python benchmarks/pipeline.py --rows 1000000 --prefetch 0 1 --json

Trains on a synthetic memory map of cube-single's widths with the networks of ``--preset`` (see
``benchmarks/update.py``) and reports the share of the time that goes by between asking for a batch
and having it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from sampling import CHUNK, make_rows
from torchrl.data import TensorDictReplayBuffer
from update import SIZES, make_update

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage


def share_of_waiting(
    buffer: TensorDictReplayBuffer, preset: str, updates: int, device: torch.device
) -> dict[str, float]:
    """The share, and the medians behind it."""
    torch.manual_seed(0)
    update = make_update(SIZES[preset], device)
    waiting = 0.0
    for step in range(updates + 3):
        if step == 3:
            waiting, begin = 0.0, time.perf_counter()
        start = time.perf_counter()
        batch = buffer.sample().to(device, non_blocking=True)
        waiting += time.perf_counter() - start
        update(batch)
    total = time.perf_counter() - begin
    return {
        "waiting_share": waiting / total,
        "waiting_ms": 1e3 * waiting / updates,
        "update_ms": 1e3 * total / updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--preset", choices=SIZES, default="small")
    parser.add_argument("--prefetch", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = []
    with tempfile.TemporaryDirectory() as folder:
        rows, ends = make_rows(Path(folder), args.rows)
        for prefetch in args.prefetch:
            buffer = TensorDictReplayBuffer(
                storage=ActionChunkStorage(rows, gamma=0.999, episode_ends=ends),
                sampler=ActionChunkSampler(CHUNK, seed=0),
                batch_size=SIZES[args.preset].batch,
                prefetch=prefetch or None,
            )
            if prefetch:  # as in ActionChunkExperienceReplay: one thread keeps the order
                buffer._prefetch_executor = ThreadPoolExecutor(max_workers=1)
            figures = share_of_waiting(buffer, args.preset, args.updates, args.device)
            report.append({"preset": args.preset, "prefetch": prefetch, **figures})
    if args.json:
        print(json.dumps(report))
        return
    for row in report:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
