"""Writes an OGBench npz file as a memory map, once, checked, and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tensordict import TensorDict
from torchrl._utils import logger

from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.statistics import ObservationStatistics

__all__ = [
    "ACTION_BOUND",
    "SourceFile",
    "convert_rows",
    "is_complete",
    "load_metadata",
    "publish",
    "save_metadata",
    "write_rows",
]

ACTION_BOUND = 1 - 1e-5
"""Stored actions are clipped to plus or minus this, as by MAC's authors."""

FORMAT = 1
"""Version of the layout on disk; one more for each change that old readers cannot read."""

_METADATA = "metadata.json"
_BLOCK = 1 << 16


class SourceFile:
    """An OGBench npz file whose arrays are checked as they are read.

    Args:
        path (Path): the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an npz archive, or an array is missing, damaged or not what
            OGBench writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Pass source= the OGBench npz file.")
        try:
            with zipfile.ZipFile(path) as archive:
                self.checksums = {
                    item.filename.removesuffix(".npy"): item.CRC for item in archive.infolist()
                }
        except zipfile.BadZipFile as err:
            raise ValueError(
                f"{path} is not an npz file, or was cut short; download or generate it again."
            ) from err

    def __contains__(self, key: str) -> bool:
        return key in self.checksums

    def read(self, key: str, kind: str, ndim: int = 2) -> np.ndarray:
        """Reads an array.

        Args:
            key (str): its name in the file.
            kind (str): the NumPy kinds its dtype may have, such as ``"f"``.
            ndim (int, optional): its number of dimensions. Defaults to 2.
        """
        if key not in self:
            raise ValueError(
                f"{self.path} has no {key!r} (it has {sorted(self.checksums)}); "
                "it is not an OGBench dataset file, download or generate it again."
            )
        try:
            with np.load(self.path, allow_pickle=False) as file:
                array = file[key]
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as err:
            raise ValueError(
                f"{self.path}: {key!r} cannot be read ({err}); download or generate it again."
            ) from err
        if array.dtype.kind not in kind or array.ndim != ndim:
            raise ValueError(
                f"{self.path}: {key!r} is {array.dtype} of shape {array.shape}; expected {ndim} "
                f"dimensions of {' or '.join(_KINDS[k] for k in kind)}."
            )
        if array.dtype.kind == "f":
            array = array.astype(np.float32, copy=False)
            finite = np.isfinite(array).all(axis=tuple(range(1, ndim)))
            if not finite.all():
                raise ValueError(
                    f"{self.path}: {key!r} has NaN or infinite values in {(~finite).sum()} rows, "
                    f"the first is row {finite.argmin()}; generate the file again."
                )
        return array


_KINDS = {"f": "floats", "b": "booleans", "i": "integers", "u": "unsigned integers"}


def convert_rows(source: SourceFile, folder: Path, name: OGBenchName, split: str) -> None:
    """Converts a source file into ``folder``, unless that is there already.

    Writes ``rows``, a memory-mapped TensorDict with ``"observation"``, ``"action"``,
    ``"episode"`` and the end-of-episode flags under ``"next"``, and ``metadata.json``.

    Args:
        source (SourceFile): the npz file.
        folder (Path): what to make; appears complete or not at all.
        name (OGBenchName): the dataset, for the metadata.
        split (str): ``"train"`` or ``"val"``, for the metadata.

    Raises:
        ValueError: if the source's content is not what OGBench writes.
        OSError: if the folder cannot be written.
    """

    def write(partial: Path) -> None:
        logger.info(f"Converting {source.path} to {folder}")
        observation = source.read("observations", "f")
        action = source.read("actions", "f")
        boundary = source.read("terminals", "biuf", ndim=1).astype(bool)
        lengths = [len(observation), len(action), len(boundary)]
        if len(set(lengths)) > 1 or lengths[0] == 0:
            raise ValueError(
                f"{source.path}: 'observations', 'actions' and 'terminals' have {lengths} rows; "
                "they must have the same number, at least one."
            )
        if not boundary[-1]:
            raise ValueError(
                f"{source.path}: 'terminals' does not end the last episode (its last value is "
                "False), so the file was cut short; generate it again."
            )
        largest = np.abs(action).max()
        if largest > 1:
            raise ValueError(
                f"{source.path}: 'actions' reach {largest:g} in absolute value, outside [-1, 1]; "
                "rescale them."
            )
        end = np.expand_dims(boundary, -1)
        columns: dict[Any, np.ndarray] = {
            "observation": observation,
            "action": action.clip(-ACTION_BOUND, ACTION_BOUND),
            "episode": (boundary.cumsum() - boundary).astype(np.int32),
            ("next", "terminated"): np.zeros_like(end),
            ("next", "truncated"): end,
            ("next", "done"): end,
        }
        write_rows(partial / "rows", columns)
        metadata = {
            "dataset": name.dataset,
            "env": name.env,
            "behaviour": name.behaviour,
            "split": split,
            "rows": len(observation),
            "episodes": int(boundary.sum()),
            "observation_dim": observation.shape[1],
            "action_dim": action.shape[1],
            "statistics": ObservationStatistics.from_rows(observation).to_dict(),
            "source": {"file": source.path.name, "checksums": source.checksums},
        }
        save_metadata(partial, metadata)

    publish(folder, write)


def write_rows(folder: Path, columns: dict[Any, np.ndarray]) -> None:
    """Writes columns of equal length as a memory-mapped TensorDict.

    Args:
        folder (Path): where to, to be read with :meth:`~tensordict.TensorDict.load_memmap`.
        columns (dict): an array of ``N`` rows for each key.

    Raises:
        OSError: naming the space needed, if the disk is full.
    """
    arrays = {key: np.ascontiguousarray(column) for key, column in columns.items()}
    num_rows = len(next(iter(arrays.values())))
    needed = sum(array.nbytes for array in arrays.values())
    try:
        if shutil.disk_usage(folder.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        like = TensorDict(
            {key: torch.from_numpy(array[:1]).expand(array.shape) for key, array in arrays.items()},
            batch_size=[num_rows],
        ).memmap_like(folder)
        for key, array in arrays.items():
            _write_array(Path(like.get(key).filename), array)
    except OSError as err:
        if err.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk of {folder.parent.parent} is full: {needed / 2**20:.0f} MiB are needed. "
            "Free some space or pass another root=.",
        ) from err


def _write_array(path: Path, array: np.ndarray) -> None:
    """Fills a file by writing, not through the map: a full disk is then an error, not a SIGBUS."""
    with path.open("r+b") as file:
        for start in range(0, len(array), _BLOCK):
            file.write(array[start : start + _BLOCK].data)


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes ``folder`` by calling ``write`` on a temporary sibling, unless it is complete.

    The sibling ``.{folder.name}.partial`` is renamed at the end, so that a reader never sees half
    a folder; what a killed process left there is removed first. A lock file makes concurrent
    processes wait for the one that is writing.

    Args:
        folder (Path): what to make. It is complete if it holds a ``metadata.json``.
        write (callable): fills the temporary folder it is given.

    Raises:
        OSError: if the parent folder cannot be written.
        FileExistsError: if ``folder`` exists but was not made by this function.
    """
    if is_complete(folder):
        return
    partial = folder.with_name(f".{folder.name}.partial")
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
        except OSError as err:
            raise OSError(
                err.errno, f"Cannot write to {folder.parent} ({err.strerror}); pass another root=."
            ) from err
        if is_complete(folder):
            return
        if folder.exists():
            raise FileExistsError(
                f"{folder} exists but is not a converted dataset; move it away or pass another "
                "root=."
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a finished conversion."""
    return (folder / _METADATA).is_file()


def save_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Writes ``metadata.json``, with the version of the layout."""
    (folder / _METADATA).write_text(json.dumps({"format": FORMAT, **metadata}, indent=1))


def load_metadata(folder: Path) -> dict[str, Any]:
    """Reads ``metadata.json``.

    Raises:
        ValueError: if a different version of the package wrote it.
    """
    metadata = json.loads((folder / _METADATA).read_text())
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was converted by another version of torchrl_mac (layout "
            f"{metadata.get('format')}, expected {FORMAT}); delete it and convert again."
        )
    return metadata
