"""Small files of OGBench's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ogbench_files import LENGTHS, VAL_LENGTHS, make_arrays


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``tmp_path/source/{name}.npz`` and ``-val.npz``; keyword arguments replace arrays.

    An array replaced by ``None`` is left out.
    """

    def write(
        name: str = "cube-single-play-v0",
        lengths: Sequence[int] = LENGTHS,
        val_lengths: Sequence[int] | None = VAL_LENGTHS,
        **replaced: np.ndarray | None,
    ) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        arrays = {**make_arrays(name, lengths, seed=0), **replaced}
        np.savez_compressed(
            folder / f"{name}.npz", **{key: a for key, a in arrays.items() if a is not None}
        )
        if val_lengths is not None:
            np.savez_compressed(
                folder / f"{name}-val.npz", **make_arrays(name, val_lengths, seed=1)
            )
        return folder

    return write
