"""What a checkpoint costs: how long training waits for it, how long it takes, how large it is.

    python benchmarks/checkpoint.py --preset paper --json

Saves the whole state of a training run with the networks of ``benchmarks/update.py``. The share of
training time is that of waiting and writing together, as if training stood still for both, at the
default interval of ``RunCheckpoints``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from assembly import Size, make_mac
from torchrl.objectives import SoftUpdate
from update import SIZES, make_buffer

from torchrl_mac.trainers import Phase, PhaseTrainer, RunCheckpoints


def measure(size: Size, folder: Path, repeats: int) -> dict[str, float]:
    """Medians over several checkpoints of a run after its first update."""
    device = torch.device("cpu")
    losses = make_mac(size, device)
    terms = [term for loss in losses.values() for term in loss.out_keys]
    checkpoints = RunCheckpoints(folder, actor=losses["values"].actor_network)
    waits, writes, mebibytes = [], [], []
    trainer = PhaseTrainer(
        losses,
        make_buffer(size, device),
        [Phase("joint", terms, 1, size.batch)],
        target_updaters=SoftUpdate(losses["values"], tau=0.005),
        evaluate=lambda: measured(),
        progress_bar=False,
    )

    def measured() -> dict[str, float]:  # in the middle of training: with the optimizer's state
        for k in range(repeats):
            begun = time.perf_counter()
            checkpoints.save(k, trainer.state_dict())
            waits.append(time.perf_counter() - begun)
            checkpoints.wait()
            writes.append(time.perf_counter() - begun - waits[-1])
            files = checkpoints.paths()[-1].rglob("*")
            mebibytes.append(sum(f.stat().st_size for f in files if f.is_file()) / 2**20)
        return {}

    trainer.train()
    checkpoints.close()
    wait, write = statistics.median(waits), statistics.median(writes)
    return {
        "mebibytes": round(mebibytes[-1], 1),
        "training_waits_ms": round(1e3 * wait, 1),
        "background_ms": round(1e3 * write, 1),
        "interval_s": checkpoints.interval_seconds,
        "share_of_training_at_most": round((wait + write) / checkpoints.interval_seconds, 6),
    }


def main() -> None:
    """Prints the costs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=SIZES, default="small", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="in one line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(SIZES[args.preset], Path(folder), args.repeats)
    result = {"preset": args.preset, **result, "machine": f"{platform.machine()}, {os.cpu_count()}"}
    sys.stdout.write(json.dumps(result, indent=None if args.json else 1) + "\n")


if __name__ == "__main__":
    main()
