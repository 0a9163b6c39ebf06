"""The npz files of a generated dataset: how they are written, and which of them are complete."""

from __future__ import annotations

import errno
import logging
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from torchrl_mac.utils.files import publish, read_json, sha256, write_json

__all__ = ["Catalog", "RowFiles", "ShardFile", "scratch_folder"]

logger = logging.getLogger("torchrl")  # TorchRL's, which takes seconds to import
_BLOCK = 1 << 20
_REMEDY = "replace it with overwrite=True (--overwrite)"


class ShardFile(NamedTuple):
    """One of the files of a dataset.

    Args:
        name (str): the file's name.
        shard (int): the number of its shard.
        split (int): 0 for training and 1 for validation.
        episodes (int): how many it holds.
    """

    name: str
    shard: int
    split: int
    episodes: int


class Catalog:
    """The JSON file beside a dataset: its recipe, and those of its files that are complete.

    At any time what it lists is on disk, complete and of its recipe, even if the process is
    killed.

    Args:
        out (Path): the folder of the dataset.
        recipe (dict): what determines the files' content, as JSON has it, with the dataset's
            ``"name"`` and the ``"steps"`` of an episode.
        files (list of ShardFile): the files that there should be.

    Examples:
        >>> import tempfile
        >>> recipe, file = {"name": "maze-v0", "steps": 50}, ShardFile("maze-v0.npz", 0, 0, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     catalog = Catalog(Path(folder), recipe, [file])
        ...     before = catalog.missing()
        ...     rows = Path(folder) / "rows.npz"
        ...     _ = rows.write_bytes(b"...")
        ...     catalog.publish({file: rows})
        ...     before, Catalog(Path(folder), recipe, [file]).missing()
        ([ShardFile(name='maze-v0.npz', shard=0, split=0, episodes=2)], [])
    """

    def __init__(self, out: Path, recipe: dict[str, Any], files: list[ShardFile]) -> None:
        self.out = out
        self.path = out / f"{recipe['name']}.json"
        self.recipe = recipe
        self.files = files
        self._complete: dict[str, dict[str, Any]] = {}
        self._is_other = False

    def missing(self, overwrite: bool = False) -> list[ShardFile]:
        """Looks which files are yet to be made.

        Args:
            overwrite (bool, optional): accepts to replace files of another recipe and damaged
                ones; all checksums are verified then. Defaults to ``False``.

        Raises:
            FileExistsError: if there is a file to be replaced and ``overwrite`` is ``False``.
        """
        found = self._read()
        difference = self._difference(found)
        self._is_other = bool(difference)
        if self._is_other and not overwrite and (existing := self._existing()):
            raise _exists(f"{existing[0]} {difference}. Choose another folder")
        self._complete = {
            entry["file"]: entry
            for entry in ([] if self._is_other else found["files"])
            if self._is_intact(entry, overwrite)
        }
        return [file for file in self.files if file.name not in self._complete]

    def publish(self, packed: dict[ShardFile, Path]) -> None:
        """Moves complete files to their place and lists them, each at once.

        What there is of another recipe ceases to be listed first; those of its files that this
        recipe has no replacement for are deleted.

        Args:
            packed (dict): where each file is now.
        """
        if self._is_other:
            self.path.unlink(missing_ok=True)
            for path in set(self._existing()) - {self.out / file.name for file in self.files}:
                path.unlink()
            self._is_other = False
        # A file that is about to be replaced is not listed, and all the others are.
        self._write()
        for file, path in packed.items():
            entry = {
                "file": file.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "rows": file.episodes * self.recipe["steps"],
                "episodes": file.episodes,
            }
            publish(path, self.out / file.name)
            self._complete[file.name] = entry
            self._write()

    def _write(self) -> None:
        # Training files first, in the order of their shards, whichever was made first.
        names = sorted(
            self._complete, key=lambda name: (name.endswith("-val.npz"), len(name), name)
        )
        write_json(self.path, {**self.recipe, "files": [self._complete[name] for name in names]})

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self.path)
            is_whole = all({"file", "bytes", "sha256"} <= entry.keys() for entry in found["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return found if is_whole else {}

    def _existing(self) -> list[Path]:
        name = self.recipe["name"]
        pattern = re.compile(rf"{re.escape(name)}(-\d{{3,}})?(-val)?\.npz")
        return sorted(path for path in self.out.glob("*.npz") if pattern.fullmatch(path.name))

    def _difference(self, found: dict[str, Any]) -> str | None:
        if not found:
            return f"has no readable recipe beside it ({self.path.name})"
        differences = [
            f"{key}={found.get(key)!r} instead of {value!r}"
            for key, value in self.recipe.items()
            if found.get(key) != value
        ]
        return f"was made with {', '.join(differences)}" if differences else None

    def _is_intact(self, entry: dict[str, Any], overwrite: bool) -> bool:
        path = self.out / entry["file"]
        if not path.exists():
            return False
        size = path.stat().st_size
        if size != entry["bytes"] and not overwrite:
            raise _exists(f"{path} has {size} bytes instead of {entry['bytes']}. Delete it")
        return not overwrite or sha256(path) == entry["sha256"]


def _exists(problem: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, f"{problem}, or {_REMEDY}")


@contextmanager
def scratch_folder(out: Path, dataset: str) -> Iterator[Path]:
    """Makes an empty folder for the only process that works on a dataset, and removes it.

    Args:
        out (Path): where the dataset's files are; made if need be. Another process that works on
            the same dataset there is waited for.
        dataset (str): its name.

    Yields:
        Path: the folder, in ``out``.

    Raises:
        OSError: if ``out`` cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as out:
        ...     with scratch_folder(Path(out), "maze-v0") as folder:
        ...         folder.name, list(folder.iterdir())
        ('.maze-v0.partial', [])
    """
    folder = out / f".{dataset}.partial"
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            # The lock's file stays: to remove it could give two processes a lock each.
            lock = FileLock(out / f".{dataset}.lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                logger.info(f"Waiting for another process that is making {dataset} in {out}")
                stack.enter_context(lock)
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir()
        except OSError as err:
            raise OSError(
                err.errno, f"Cannot write to {out} ({err.strerror}); choose another folder"
            ) from err
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


class RowFiles:
    """Collects the rows of one npz file in flat files, so that memory does not grow with them.

    Args:
        folder (Path): a new folder, for the flat files and the result.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = RowFiles(Path(folder) / "rows")
        ...     for _ in range(2):
        ...         rows.append({"actions": np.zeros((50, 5), np.float32)})
        ...     np.load(rows.pack())["actions"].shape
        (100, 5)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._columns: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        folder.mkdir()

    def append(self, episode: dict[str, np.ndarray]) -> None:
        """Adds rows.

        Args:
            episode (dict[str, np.ndarray]): the rows' columns.
        """
        for key, column in episode.items():
            _, shape = self._columns.get(key, (None, (0,)))
            self._columns[key] = column.dtype, (shape[0] + len(column), *column.shape[1:])
            with open(self.folder / key, "ab") as file:
                file.write(np.ascontiguousarray(column).data)

    def pack(self, stopped: threading.Event | None = None) -> Path:
        """Makes the npz file that :func:`numpy.savez_compressed` makes of the columns.

        Args:
            stopped (threading.Event, optional): when another thread sets it, this one gives up.

        Returns:
            Path: the file. The flat files are gone.

        Raises:
            InterruptedError: if ``stopped`` is set.
        """
        path = self.folder / "rows.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for key, (dtype, shape) in self._columns.items():
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                with (
                    open(self.folder / key, "rb") as rows,
                    archive.open(f"{key}.npy", "w", force_zip64=True) as file,
                ):
                    np.lib.format.write_array_header_1_0(file, header)
                    while block := rows.read(_BLOCK):
                        if stopped is not None and stopped.is_set():
                            raise InterruptedError(f"Packing {path} was stopped.")
                        file.write(block)
                (self.folder / key).unlink()
        return path
