"""Files to convert: what they hold, checked as it is read, block by block."""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.utils.files import DamagedError, read_json

__all__ = [
    "BLOCK_ROWS",
    "NpzFile",
    "OGBenchSource",
    "Source",
    "find_shards",
    "refuse_twice",
    "validation_file",
]

BLOCK_ROWS = 1 << 15
"""Rows that are held in memory at a time."""

_PARSING = threading.Lock()  # Python's parser, which reads headers, may fail in parallel (3.11)
_UNREADABLE = (
    ValueError,
    EOFError,
    OSError,
    RuntimeError,  # encrypted, or a method that is not implemented
    zipfile.BadZipFile,
    zlib.error,
)
_KINDS = {"f": "floats", "b": "booleans", "i": "integers", "u": "unsigned integers"}


class Source(abc.ABC):
    """One file, or shard, of a dataset: rows in time order, episode after episode.

    Attributes:
        path (Path): the file.
        identity (dict): changes with the file's content; can be written as JSON.
        rows (int): the number of stored states.
        ends (np.ndarray): the number of the last row of each episode, int64.
        shapes (dict): the row shape of each column: ``"observation"``, ``"action"`` and, for data
            with rewards of their own, ``"reward"`` and ``"terminated"``.
    """

    path: Path
    identity: dict[str, Any]
    rows: int
    ends: np.ndarray
    shapes: dict[str, tuple[int, ...]]

    @abc.abstractmethod
    def blocks(self, column: str) -> Iterator[np.ndarray]:
        """The rows of a column in blocks: float32, or bool for ``"terminated"``."""

    def versions(self) -> dict[str, str] | None:
        """The versions of the packages that made the file, if they are known."""
        return None


class NpzFile:
    """An npz file whose arrays are checked as they are read; nothing is ever unpickled.

    Args:
        path (Path): the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an npz archive, or an array is missing, damaged or not what is
            expected.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Pass source= the dataset's npz file.")
        try:
            with zipfile.ZipFile(path) as archive:
                self.checksums = {
                    item.filename.removesuffix(".npy"): item.CRC for item in archive.infolist()
                }
        except zipfile.BadZipFile as err:
            raise ValueError(
                f"{path} is not an npz file, or was cut short; download or generate it again."
            ) from err
        except OSError as err:  # which names the file only if it cannot be opened
            raise OSError(err.errno, err.strerror, str(path)) from err

    def __contains__(self, key: str) -> bool:
        return key in self.checksums

    def shape(self, key: str, kind: str, ndim: int = 2) -> tuple[int, ...]:
        """The shape of an array, from its header alone.

        Args:
            key (str): its name in the file.
            kind (str): the NumPy kinds its dtype may have, such as ``"f"``.
            ndim (int, optional): its number of dimensions. Defaults to 2.
        """
        return self._header(key, kind, ndim)[0]

    def read(self, key: str, kind: str, ndim: int = 2) -> np.ndarray:
        """A whole array; see :meth:`shape` for the arguments. Floats become float32."""
        blocks = list(self.blocks(key, kind, ndim))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def blocks(self, key: str, kind: str, ndim: int = 2) -> Iterator[np.ndarray]:
        """An array in blocks of rows; see :meth:`shape` for the arguments."""
        shape, dtype, in_order = self._header(key, kind, ndim)
        first = 0
        for block in self._raw_blocks(key, shape, dtype, in_order):
            if dtype.kind == "f":
                block = block.astype(np.float32, copy=False)
                # One sum tells whether all are finite; the rows are looked for if not.
                if not np.isfinite(block.sum(dtype=np.float64)):
                    bad = ~np.isfinite(block).all(axis=tuple(range(1, ndim)))
                    if bad.any():
                        raise ValueError(
                            f"{self.path}: {key!r} has NaN or infinite values, the first in row "
                            f"{first + bad.argmax()}; generate the file again."
                        )
            yield block
            first += len(block)

    def _raw_blocks(
        self, key: str, shape: tuple[int, ...], dtype: np.dtype, in_order: bool
    ) -> Iterator[np.ndarray]:
        size = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as file:
                if not in_order or size * shape[0] == 0:  # Fortran's order: NumPy untangles it
                    with _PARSING:
                        array = np.lib.format.read_array(file, allow_pickle=False)
                    yield array
                    return
                _read_header(file)
                for start in range(0, shape[0], BLOCK_ROWS):
                    rows = min(BLOCK_ROWS, shape[0] - start)
                    data = file.read(rows * size)
                    if len(data) < rows * size:
                        raise EOFError("it ends too early")
                    yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])
                if file.read(1):  # the end must be reached for the checksum to be compared
                    raise ValueError("it is longer than its header says")
        except _UNREADABLE as err:
            raise ValueError(
                f"{self.path}: {key!r} cannot be read ({err}); download or generate it again."
            ) from err

    def _header(self, key: str, kind: str, ndim: int) -> tuple[tuple[int, ...], np.dtype, bool]:
        if key not in self:
            raise ValueError(
                f"{self.path} has no {key!r} (it has {sorted(self.checksums)}); "
                "it is not an OGBench dataset file, download or generate it again."
            )
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as file:
                shape, fortran_order, dtype = _read_header(file)
        except _UNREADABLE as err:
            raise ValueError(
                f"{self.path}: {key!r} cannot be read ({err}); download or generate it again."
            ) from err
        if dtype.kind not in kind or len(shape) != ndim:
            raise ValueError(
                f"{self.path}: {key!r} is {dtype} of shape {shape}; expected {ndim} "
                f"dimensions of {' or '.join(_KINDS[k] for k in kind)}."
            )
        return shape, dtype, not fortran_order


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    with _PARSING:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)


class OGBenchSource(NpzFile, Source):
    """An OGBench npz file: ``observations``, ``actions``, ``terminals``.

    ``terminals`` marks the last row of each episode.

    Args:
        path (Path): the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its content is not what OGBench writes.
    """

    _KEYS = {"observation": "observations", "action": "actions"}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.identity = dict(self.checksums)

    @functools.cached_property
    def ends(self) -> np.ndarray:  # type: ignore[override]
        """The number of the last row of each episode, int64."""
        boundary = self.read("terminals", "biuf", ndim=1).astype(bool)
        lengths = [*(self.shape(key, "f")[0] for key in self._KEYS.values()), len(boundary)]
        if len(set(lengths)) > 1 or lengths[0] == 0:
            raise ValueError(
                f"{self.path}: 'observations', 'actions' and 'terminals' have {lengths} rows; "
                "they must have the same number, at least one."
            )
        if not boundary[-1]:
            raise ValueError(
                f"{self.path}: 'terminals' does not end the last episode (its last value is "
                "False), so the file was cut short; generate it again."
            )
        return np.flatnonzero(boundary)

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The number of stored states."""
        return int(self.ends[-1]) + 1

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """The row shapes of ``"observation"`` and ``"action"``."""
        return {column: self.shape(key, "f")[1:] for column, key in self._KEYS.items()}

    def blocks(self, column: str, kind: str = "f", ndim: int = 2) -> Iterator[np.ndarray]:
        """The rows of a column, or of any array of the file, in blocks."""
        return super().blocks(self._KEYS.get(column, column), kind, ndim)

    def versions(self) -> dict[str, str] | None:
        """The versions in the file's recipe; see :meth:`recipe`."""
        return self.recipe().get("versions")

    def recipe(self) -> dict[str, Any]:
        """What ``torchrl-mac-data generate`` has recorded beside its files, empty if nothing.

        The entry ``"file"`` is the record of this very file.
        """
        for path in self.path.parent.glob("*-v0.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # another's file
                recipe = read_json(path)
                for file in recipe["files"]:
                    if file["file"] == self.path.name:
                        return {**recipe, "file": file}
        return {}


def validation_file(path: Path) -> Path:
    """The validation file that belongs to a training file, by its name."""
    return path.with_name(f"{path.stem}-val{path.suffix}")


def find_shards(source: Path | Sequence[Path], dataset: str) -> list[Path]:
    """The training files of an OGBench dataset, in order.

    Args:
        source (Path or sequence of Path): an npz file; a folder; or several of either. In a
            folder the dataset is ``{dataset}.npz``; else the shards ``{dataset}-*.npz``; else the
            same in its subfolder ``{dataset}``; else all files, if none is named after another
            dataset.
        dataset (str): such as ``"cube-single-play-v0"``.

    Returns:
        the files, sorted by name within a folder; validation files (``-val``) are left out. Where
        there are none, the file that should have been there.

    Raises:
        FileNotFoundError: if a recipe ``{dataset}.json`` beside the files lists one that is not
            there, or was to have one: of a folder any, of a file the one that belongs to it.
        ValueError: if the recipe is damaged.
    """
    if not isinstance(source, Path):
        return [path for part in source for path in find_shards(Path(part), dataset)]
    if source.suffix == ".npz":
        if source.is_file():
            _demand_listed(source.parent, dataset, {source.name, validation_file(source).name})
        return [source]
    found = _find_in(source, dataset)
    if any(path.is_file() for path in found):
        _demand_listed(found[0].parent, dataset)
    return found


def refuse_twice(paths: Sequence[Path]) -> None:
    """Compares files, whatever their names.

    Raises:
        ValueError: if two of them are the same one.
    """
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        if path.is_file():
            identity = path.stat().st_dev, path.stat().st_ino
            if identity in seen:
                raise ValueError(f"{path} is given twice, first as {seen[identity]}; give it once.")
            seen[identity] = path


def _demand_listed(folder: Path, dataset: str, names: set[str] | None = None) -> None:
    """Looks for the files that a recipe lists, and for the other one of each pair."""
    recipe = folder / f"{dataset}.json"
    if not recipe.is_file():
        return
    content = read_json(recipe)
    entries = content.get("files") if isinstance(content, dict) else None
    try:
        train = {file["file"].removesuffix(".npz").removesuffix("-val") for file in entries or ()}
    except (TypeError, KeyError, AttributeError):
        entries = None
    if entries is None:
        raise DamagedError(f"{recipe} is damaged: it does not list files; generate them again.")
    listed = {f"{stem}{end}.npz" for stem in train for end in ("", "-val")}
    for name in sorted(listed if names is None else listed & names):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: {recipe.name} beside it lists it, or its pair. "
                f"Generate {dataset} again, which makes what is missing, or delete {recipe.name} "
                "to use what there is."
            )


def _find_in(source: Path, dataset: str) -> list[Path]:
    if (whole := source / f"{dataset}.npz").is_file():
        return [whole]
    files = sorted(path for path in source.glob("*.npz") if not path.stem.endswith("-val"))
    named = [path for path in files if path.stem.startswith(f"{dataset}-")]
    if named:
        return named
    if (source / dataset).is_dir():
        return _find_in(source / dataset, dataset)
    foreign = not files or any(_is_of_another(path.stem, dataset) for path in files)
    return [whole] if foreign else files


def _is_of_another(stem: str, dataset: str) -> bool:
    name = stem.partition("-v0")[0] + "-v0"
    try:
        return OGBenchName.parse(name).dataset != dataset
    except ValueError:
        return False
