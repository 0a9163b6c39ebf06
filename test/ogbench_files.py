"""Arrays of small files of OGBench's layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTHS = (23, 14, 31)
VAL_LENGTHS = (12, 9)

# observation, action and qpos dimensions of the environments used in the tests
DIMS = {"cube-single-play-v0": (28, 5, 21), "pointmaze-medium-navigate-v0": (2, 2, 2)}


def make_arrays(name: str, lengths: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """Random rows as OGBench stores them; the last rows of the episodes are terminal."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    observation_dim, action_dim, qpos_dim = DIMS[name]
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(lengths) - 1] = True
    return {
        "observations": rng.normal(size=(rows, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "terminals": terminals,
        "qpos": rng.uniform(-2, 22, (rows, qpos_dim)).astype(np.float32),
        "qvel": np.zeros((rows, qpos_dim), np.float32),
    }
