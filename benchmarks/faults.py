"""Kills training at random moments, again and again, and compares what it leaves in the end.

    python benchmarks/faults.py --kills 30 --json

The same small run of ``examples/mac.py`` is made twice: undisturbed, and with SIGKILL while it
trains, while it writes a checkpoint, and at any time since its start, in turns; each time the same
command goes on. In the end parameters, moments, targets and logs must be equal, each step must be
in the logs once, and no checkpoint may have been lost but the one being written. Exits with 1 if
anything is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from torchrl_mac.datasets import generate_dataset
from torchrl_mac.trainers import SealedCheckpoint

ROOT = Path(__file__).parents[1]
TERMS = ("flow", "distillation", "dynamics", "reward", "termination", "value", "qvalue")
MOMENTS = ("training", "writing", "any")


class Run:
    """A run of two phases that saves its state again and again."""

    def __init__(self, output: Path, data: Path, updates: int) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        phase = "{{name: {}, terms: [{}], num_updates: {}, batch_size: 32, schedule: cosine}}"
        terms = ",".join(f"loss_{term}" for term in TERMS)
        flow = phase.format("flow", "loss_flow", updates // 2)
        joint = phase.format("joint", terms, updates - updates // 2)
        self.command = [
            *(sys.executable, str(ROOT / "examples/mac.py"), "preset=cpu", f"data_dir={data}"),
            *(f"hydra.run.dir={output}", "num_threads=1", "log_interval=10", "video_episodes=0"),
            *("policy_cells=[128,128]", "dynamics_cells=[128,128]", "head_cells=[32]"),
            *("value_cells=[32]", f"phases=[{flow},{joint}]", "checkpoint_seconds=0.5"),
            *("eval_episodes=1", "replan_interval=10"),
        ]

    def start(self) -> subprocess.Popen:
        """Starts it, or lets it go on."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=env)

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted((self.output / "checkpoints").glob("checkpoint-*"))

    def whole(self) -> list[str]:
        """The names of all of them; an error if one is not whole."""
        for path in self.checkpoints():
            SealedCheckpoint.verify(path)
        return [path.name for path in self.checkpoints()]

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.output / "checkpoints").glob(".checkpoint-*.partial*"))

    def kill(self, process: subprocess.Popen, moment: str, rng: random.Random) -> bool:
        """Kills the run at such a moment; ``False`` if it ended before."""
        begun, known = time.monotonic(), set(self.checkpoints())
        wait = rng.uniform(0, 15) if moment == "any" else rng.uniform(0, 2)
        while process.poll() is None:
            if moment != "any" and set(self.checkpoints()) <= known:
                begun = time.monotonic()  # it has not begun to train
            due = time.monotonic() - begun > wait
            if due and (moment != "writing" or self.is_writing()):
                process.kill()
                return True
            time.sleep(0.001)
        return False

    def rows(self) -> dict[str, list[str]]:
        """The rows of all logs."""
        folder = self.output / "logs/scalars"
        return {
            path.relative_to(folder).as_posix(): path.read_text().splitlines()
            for path in folder.rglob("*.csv")
        }

    def state(self) -> dict[str, Any]:
        """What the last checkpoint holds."""
        return SealedCheckpoint.load_states(self.checkpoints()[-1])


def measure(kills: int, updates: int, seed: int, folder: Path) -> dict[str, Any]:
    """Makes both runs and compares them."""
    sizes = {"episodes": 4, "val_episodes": 1, "steps": 201}
    generate_dataset("cube-single-play-v0", folder, **sizes, workers=1, progress=False)
    plain, killed = (Run(folder / name, folder, updates) for name in ("plain", "killed"))
    begun = time.monotonic()
    if plain.start().wait():
        raise RuntimeError(plain.log.read_text()[-3000:])
    seconds, rng = time.monotonic() - begun, random.Random(seed)
    moments, resumed, lost, failed = [], [], 0, []
    for k in range(kills + 1):
        before = killed.whole()
        process, moment = killed.start(), MOMENTS[k % len(MOMENTS)]
        was_killed = k < kills and killed.kill(process, moment, rng)
        process.wait()
        output = killed.log.read_text()
        if "Going on after " in output:
            resumed.append(int(output.split("Going on after ")[1].split()[0]))
        if before and max(before) > max(killed.whole(), default=""):
            lost += 1
        if not was_killed:
            failed += [output[-3000:]] if process.returncode else []
            break
        moments.append(moment)
    rows, states = killed.rows(), [run.state() for run in (plain, killed)]
    steps = {name: [row.split(",")[0] for row in of] for name, of in rows.items()}
    return {
        "kills": len(moments),
        "while_writing": moments.count("writing"),
        "resumed_after_updates": resumed,
        "updates": states[1]["progress"]["updates"],
        "failures": failed,
        "checkpoints_lost": lost,
        "parameters_equal": equal(states[0]["losses"], states[1]["losses"]),
        "optimizers_equal": equal(states[0]["training"], states[1]["training"]),
        "logs_equal": rows == plain.rows(),
        "steps_logged_twice": sum(len(of) - len(set(of)) for of in steps.values()),
        "undisturbed_seconds": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def equal(left: Any, right: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    (a, structure), (b, other) = tree_flatten(left), tree_flatten(right)
    return structure == other and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def main() -> int:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--updates", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default: %(default)s")
    parser.add_argument("--json", action="store_true", help="in one line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.kills, args.updates, args.seed, Path(folder))
    sys.stdout.write(json.dumps(result, indent=None if args.json else 1) + "\n")
    good = all(value for name, value in result.items() if name.endswith("_equal"))
    bad = result["failures"] or result["checkpoints_lost"] or result["steps_logged_twice"]
    return 0 if good and not bad and result["kills"] == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
