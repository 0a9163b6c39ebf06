"""OGBench datasets and one's own as files: made, fetched, converted, labelled, verified.

What is here, and why no library does it:

- ``names``: OGBench splits its dataset names at dashes; here they are checked, and explained.
- ``rollouts``: OGBench's scripts make a set in one process and one stream of random numbers; here
  an episode is a function of its seed, so that any number of processes makes the same set.
- ``episodes``, ``generate``, ``shards``: sets larger than memory, in parallel, resumed when killed.
- ``download``: OGBench's own download, behind checks and a lock.
- ``sources``: OGBench's npz files, read in blocks and checked; NumPy loads whole arrays.
- ``trajectories``: one's own files in the layouts of D4RL and Minari; TorchRL's datasets of these
  names open only what a hub has.
- ``robomimic``: robomimic's demonstrations, as the Q-chunking paper reads them.
- ``columns``, ``conversion``: many files into one memory map, resumable, in bounded memory and
  without a copy of next observations, which TorchRL's datasets store.
- ``labels``: OGBench's rewards and goal representations as columns beside the rows.
- ``statistics``: what normalisation needs, gathered during the conversion.
- ``manifest``, ``converted``, ``own``: a converted dataset on disk: its record, its splits, its
  columns.
- ``verify``: files and conversions held against what they were when they were made.
- ``cli``: ``torchrl-mac-data``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchrl_mac.datasets.generate import generate_dataset
from torchrl_mac.datasets.names import NUM_TASKS, OGBenchName

if TYPE_CHECKING:
    from torchrl_mac.datasets.converted import OGBenchDataset
    from torchrl_mac.datasets.download import download_dataset
    from torchrl_mac.datasets.own import RobomimicDataset, TrajectoryDataset
    from torchrl_mac.datasets.statistics import ObservationStatistics
    from torchrl_mac.datasets.verify import verify_conversion, verify_files

__all__ = [
    "NUM_TASKS",
    "OGBenchDataset",
    "OGBenchName",
    "ObservationStatistics",
    "RobomimicDataset",
    "TrajectoryDataset",
    "download_dataset",
    "generate_dataset",
    "verify_conversion",
    "verify_files",
]

_WITH_TORCH = {
    "OGBenchDataset": "converted",
    "ObservationStatistics": "statistics",
    "RobomimicDataset": "own",
    "TrajectoryDataset": "own",
    "download_dataset": "download",
    "verify_conversion": "verify",
    "verify_files": "verify",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:  # imported when asked for: processes that make episodes need no torch
        return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
