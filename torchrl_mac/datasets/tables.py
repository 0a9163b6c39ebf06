"""Columns on disk, opened: files of plain numbers, mapped. Nothing in them is ever unpickled."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_mac.datasets.manifest import METADATA, column_file, damaged, load_metadata
from torchrl_mac.datasets.statistics import ObservationStatistics

__all__ = ["Schema", "column_name", "described", "load_statistics", "open_columns"]

Schema = dict[NestedKey, tuple[np.dtype, tuple[int, ...]]]
"""The dtype and row shape of each column."""

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def column_name(key: NestedKey) -> str:
    """A key as it is written in JSON: ``"next/reward"``."""
    return key if isinstance(key, str) else "/".join(key)


def described(schema: Schema) -> dict[str, Any]:
    """A schema as it is written in JSON.

    Examples:
        >>> described({("next", "reward"): (np.dtype(np.float32), (1,))})
        {'next/reward': {'dtype': '<f4', 'shape': [1]}}
    """
    return {
        column_name(key): {"dtype": np.dtype(dtype).str, "shape": list(shape)}
        for key, (dtype, shape) in schema.items()
    }


def open_columns(folder: Path, schemas: Iterable[Schema]) -> TensorDict:
    """Maps the columns of a folder that :func:`~torchrl_mac.datasets.columns.write_columns` made.

    The files are not written to: what is assigned to the rows stays in this process.

    Args:
        folder (Path): the folder.
        schemas (iterable of dict): what its columns may be.

    Returns:
        TensorDict: all rows.

    Raises:
        ValueError: if the manifest is damaged or lists other columns, or if a file is not there or
            not of the size that the manifest says.
    """
    metadata = load_metadata(folder)
    listed = metadata["columns"]
    schemas = list(schemas)
    schema = next((schema for schema in schemas if described(schema) == listed), None)
    if schema is None:
        raise damaged(folder / METADATA, f"it lists {listed}, not {described(schemas[0])}", folder)
    rows = metadata["rows"]
    columns = {
        key: _mapped(column_file(folder, column_name(key)), dtype, (rows, *shape), folder)
        for key, (dtype, shape) in schema.items()
    }
    return TensorDict(columns, batch_size=[rows])


def load_statistics(folder: Path, column: dict[str, Any]) -> ObservationStatistics:
    """The statistics in the manifest of a folder.

    Args:
        folder (Path): the folder.
        column (dict): the entry of a manifest for the column that they are to be of.

    Raises:
        ValueError: if they cannot be those of such a column.
    """
    try:
        statistics = ObservationStatistics.from_dict(load_metadata(folder).get("statistics"))
    except ValueError as err:
        raise damaged(folder / METADATA, str(err), folder) from err
    if list(statistics.mean.shape) != column["shape"]:
        problem = f"its statistics are of {len(statistics.mean)} numbers, not {column['shape']}"
        raise damaged(folder / METADATA, problem, folder)
    return statistics


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], folder: Path) -> Tensor:
    expected = dtype.itemsize * int(np.prod(shape, dtype=object))
    if not path.is_file():
        raise damaged(path, "it is not there", folder)
    with path.open("rb") as file:
        size = path.stat().st_size
        if size != expected:
            raise damaged(
                path, f"it has {size} bytes instead of {expected} ({shape[0]} rows)", folder
            )
        # Pages are shared with the file's cache until they are written to. Memory is not reserved
        # for that: files may be larger than it.
        content = mmap.mmap(
            file.fileno(),
            expected,
            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    kind = torch.from_numpy(np.zeros(0, dtype)).dtype
    return torch.frombuffer(content, dtype=kind).reshape(shape)
