"""How fast OGBench's oracles make data, and what the full sets take: a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/generation.py

Makes one episode of every dataset that can be generated, in one process, and takes its CPU time.
"""

from __future__ import annotations

import argparse
import time

from torchrl_mac.datasets.names import MANIPULATION_ENVS, OGBenchName
from torchrl_mac.datasets.rollouts import OfficialSettings, OracleRollout

_100M = ("cube-double", "cube-octuple", "puzzle-3x3", "puzzle-4x5")


def datasets() -> list[str]:
    """Every set with a scripted oracle, as OGBench publishes them, and the paper's of 100M rows."""
    sets = [f"{env}-play-v0" for env in MANIPULATION_ENVS if env != "cube-octuple"]
    sets += [f"{env}-play-100m-v0" for env in _100M]
    sets += [f"pointmaze-{size}-navigate-v0" for size in ("medium", "large", "giant", "teleport")]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=501, help="rows of the episode that is timed")
    args = parser.parse_args()
    print("| dataset | rows | memory map | rows per CPU-second | CPU hours |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rates: dict[str, tuple[float, int]] = {}
    for dataset in datasets():
        name = OGBenchName.parse(dataset)
        settings = OfficialSettings.of(name)
        if name.env not in rates:
            rollout = OracleRollout.make(name)
            rollout.episode(seed=0, split=0, index=0, steps=50)
            start = time.process_time()
            episode = rollout.episode(seed=0, split=0, index=1, steps=args.steps)
            rate = args.steps / (time.process_time() - start)
            widths = sum(episode[key].shape[1] for key in ("observations", "actions"))
            rates[name.env] = rate, 4 * widths + 4 + 3  # and episode number and three flags
        rate, row_bytes = rates[name.env]
        episodes = settings.episodes * (1 if name.size is None else int(name.size[:-1]))
        rows = episodes * settings.steps
        size = rows * row_bytes / 2**30
        print(
            f"| {dataset} | {rows / 1e6:.1f}M | {size:.2f} GiB | {rate:.0f} "
            f"| {rows / rate / 3600:.1f} |"
        )


if __name__ == "__main__":
    main()
