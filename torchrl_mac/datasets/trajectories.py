"""Datasets in the layouts of D4RL and Minari: rewards and terminations of their own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_mac.datasets.sources import BLOCK_ROWS, NpzFile, Source
from torchrl_mac.utils.files import sha256

__all__ = ["TrajectorySource", "has_h5py"]

_has_h5py = importlib.util.find_spec("h5py") is not None
_SUFFIXES = (".npz", ".hdf5", ".h5")
_MINARI = Path("data/main_data.hdf5")  # in the folder of a Minari dataset

Columns = dict[str, np.ndarray]


class TrajectorySource(Source):
    """A file of trajectories, read as a whole.

    - D4RL's layout, HDF5 or npz: ``observations`` ``[N, O]``, ``actions`` ``[N, A]``, ``rewards``
      ``[N]``, ``terminals`` ``[N]`` and, where episodes are cut off, ``timeouts`` ``[N]``;
      ``next_observations`` ``[N, O]`` if there are any. Rewards may be left out.
    - Minari's layout, HDF5: groups ``episode_0``, ``episode_1``, ... with one more of
      ``observations`` than of ``actions``, ``rewards``, ``terminations`` and ``truncations``. Of
      dictionary observations, the entry ``observation`` is taken.

    The state after an episode's last action becomes a row, too, with action 0. Where D4RL does
    not tell that state it is left out, and the last action with it; but for an episode that
    terminates, the state before stands in for it: its value is never asked for. An episode of
    Minari's may go on after terminations: they are those of their rows.

    Args:
        path (Path): the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if an HDF5 file is to be read and h5py is not installed.
        ValueError: if its content is not of these layouts: the file and the array are named.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "robot.npz"
        >>> np.savez(
        ...     path,
        ...     observations=np.zeros((5, 3)),
        ...     actions=np.zeros((5, 2)),
        ...     rewards=np.ones(5),
        ...     terminals=np.array([0, 0, 1, 0, 0], bool),
        ...     timeouts=np.array([0, 0, 0, 0, 1], bool),
        ... )
        >>> source = TrajectorySource(path)
        >>> source.rows, source.ends
        (6, array([3, 5]))
        >>> folder.cleanup()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Pass source= the dataset's file.")

    @staticmethod
    def find(source: Path) -> list[Path]:
        """The files in a folder, sorted by name, or the file itself."""
        if source.suffix in _SUFFIXES:
            return [source]
        if (source / _MINARI).is_file():
            return [source / _MINARI]
        return sorted(path for path in source.glob("*") if path.suffix in _SUFFIXES)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]
        """The file's checksum."""
        return {"sha256": sha256(self.path)}

    @functools.cached_property
    def _columns(self) -> Columns:
        columns = self._read()
        for key, column in columns.items():
            if column.dtype.kind == "f" and not np.isfinite(column.sum(dtype=np.float64)):
                bad = ~np.isfinite(column).all(axis=1)
                if bad.any():
                    raise ValueError(
                        f"{self.path}: {key!r} has NaN or infinite values in {bad.sum()} rows."
                    )
        return columns

    @functools.cached_property
    def ends(self) -> np.ndarray:  # type: ignore[override]
        """The number of the last row of each episode, int64."""
        return np.flatnonzero(self._columns["end"])

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The number of states."""
        return len(self._columns["end"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """The row shape of each column."""
        return {key: column.shape[1:] for key, column in self._columns.items() if key != "end"}

    def blocks(self, column: str) -> Iterator[np.ndarray]:
        """The rows of a column in blocks."""
        for start in range(0, self.rows, BLOCK_ROWS):
            yield self._columns[column][start : start + BLOCK_ROWS]

    def _read(self) -> Columns:
        if self.path.suffix == ".npz":
            file = NpzFile(self.path)
            return self._flat(
                lambda key: file.read(key, _KINDS[key], 2 if key in _WIDE else 1), file.checksums
            )

        def read(file: Any) -> Columns:
            if any(key.startswith("episode_") for key in file):
                return self._minari(file)
            return self._flat(lambda key: self._array(file, key), file)

        return self._hdf5(read)

    def _hdf5(self, read: Callable[[Any], Columns]) -> Columns:
        """What is read from the open file."""
        if not has_h5py():
            raise ImportError(f"{self.path} is an HDF5 file: pip install h5py to read it.")
        import h5py

        try:
            with h5py.File(self.path) as file:
                return read(file)
        except (OSError, RuntimeError, KeyError) as err:  # what HDF5 raises if it is damaged
            raise ValueError(
                f"{self.path} cannot be read as HDF5 ({err}); download it again."
            ) from err

    def _array(self, group: Any, key: str, name: str | None = None) -> np.ndarray:
        """An array of an HDF5 file, which must be what an entry of that name is to be."""
        stored, where = group.get(key), f"{group.name.strip('/')}/{key}".lstrip("/")
        name = key if name is None else name
        ndim = 2 if name in _WIDE else 1
        dtype, shape = getattr(stored, "dtype", None), getattr(stored, "shape", None)
        if dtype is None or dtype.kind not in _KINDS[name] or len(shape or ()) != ndim:
            found = "no array" if dtype is None else f"{dtype} of shape {shape}"
            raise ValueError(
                f"{self.path}: {where!r} is {found}; expected {ndim} dimensions of numbers"
                f"{' or booleans' if 'b' in _KINDS[name] else ''}."
            )
        return stored[()]

    def _flags(self, array: np.ndarray, name: str) -> np.ndarray:
        """Numbers that stand for booleans."""
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{self.path}: {name!r} has values other than 0 and 1.")
        return array.astype(bool)

    def _floats(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # infinite values are looked for at the end
            return array.astype(np.float32)

    def _flat(self, read: Callable[[str], np.ndarray], keys: Any) -> Columns:
        """D4RL's layout: one array per key."""
        self._demand("observations" in keys and "actions" in keys, keys)
        self._demand("terminals" in keys or "timeouts" in keys, keys)
        arrays = {key: read(key) for key in _KINDS if key in keys and key not in _OF_MINARI}
        lengths = {key: len(array) for key, array in arrays.items()}
        rows = lengths["observations"]
        if len(set(lengths.values())) > 1 or rows == 0:
            raise ValueError(f"{self.path} has arrays of {lengths} rows; they must be equal.")
        after, states = arrays.get("next_observations"), arrays["observations"]
        if after is not None and after.shape != states.shape:
            raise ValueError(
                f"{self.path}: 'next_observations' have {after.shape[1]} numbers a row, "
                f"'observations' {states.shape[1]}; they must be equal."
            )
        nowhere = np.zeros(rows, bool)
        terminal, timeout = (
            self._flags(arrays.get(key, nowhere), key) for key in ("terminals", "timeouts")
        )
        boundary = terminal | timeout
        boundary[-1] = True
        ends = np.flatnonzero(boundary)
        finals = ends if after is not None else np.flatnonzero(terminal)
        states = states if after is None else after

        def extended(array: np.ndarray, extra: Any) -> np.ndarray:
            return np.insert(array, finals + 1, extra, axis=0)

        is_end = boundary.copy()
        is_end[finals] = False  # the row that is inserted after it is the last
        columns = {
            "observation": self._floats(extended(arrays["observations"], states[finals])),
            "action": self._floats(extended(arrays["actions"], 0)),
            "terminated": np.expand_dims(extended(terminal, terminal[finals]), -1),
            "end": extended(is_end, True),
        }
        if "rewards" in arrays:
            columns["reward"] = np.expand_dims(self._floats(extended(arrays["rewards"], 0)), -1)
        return columns

    def _minari(self, file: Any) -> Columns:
        """Minari's layout: one group per episode."""
        numbers = {
            name: name.removeprefix("episode_") for name in file if name.startswith("episode_")
        }
        for name, number in numbers.items():
            if not number.isdecimal() or not hasattr(file.get(name), "keys"):
                raise ValueError(f"{self.path}: {name!r} is not an episode, 'episode_0' and so on.")
        parts: dict[str, list[np.ndarray]] = {}
        first = ""
        for name in sorted(numbers, key=lambda name: int(numbers[name])):
            episode = self._episode(file[name], name)
            first = first or name
            kinds = [
                {key: array.shape[1:] for key, array in columns.items()}
                for columns in (episode, {key: arrays[0] for key, arrays in parts.items()})
            ]
            if parts and kinds[0] != kinds[1]:
                raise ValueError(
                    f"{self.path}: {name!r} has rows of {kinds[0]}, {first!r} of {kinds[1]}; they "
                    "must be the same."
                )
            for key, array in episode.items():
                parts.setdefault(key, []).append(array)
        return {key: np.concatenate(arrays) for key, arrays in parts.items()}

    def _episode(self, group: Any, name: str) -> Columns:
        self._demand("observations" in group and "actions" in group, group)
        if hasattr(group.get("observations"), "keys"):  # a dictionary
            self._demand("observation" in group["observations"], group["observations"])
            observations = self._array(group["observations"], "observation", "observations")
        else:
            observations = self._array(group, "observations")
        actions = self._array(group, "actions")
        steps = len(actions)
        if len(observations) != steps + 1:
            raise ValueError(
                f"{self.path}: {name!r} has {len(observations)} observations for {steps} actions; "
                "Minari has one more."
            )
        arrays = {
            key: self._array(group, key)
            for key in ("rewards", "terminations", "truncations")
            if key in group
        }
        for key, array in arrays.items():
            if len(array) != steps:
                raise ValueError(
                    f"{self.path}: '{name}/{key}' has {len(array)} rows for {steps} actions; they "
                    "must be equal."
                )
        nowhere = np.zeros(steps, bool)
        terminal, truncated = (
            self._flags(arrays.get(key, nowhere), f"{name}/{key}")
            for key in ("terminations", "truncations")
        )
        if truncated[:-1].any():
            raise ValueError(
                f"{self.path}: '{name}/truncations' are true before the last step; an episode ends "
                "there."
            )
        columns: Columns = {
            "observation": self._floats(observations),
            "action": self._floats(np.pad(actions, ((0, 1), (0, 0)))),
            "terminated": np.expand_dims(np.append(terminal, terminal[-1:].any()), -1),
            "end": np.arange(steps + 1) == steps,
        }
        if "rewards" in arrays:
            columns["reward"] = np.expand_dims(self._floats(np.pad(arrays["rewards"], (0, 1))), -1)
        return columns

    def _demand(self, condition: bool, keys: Any) -> None:
        if not condition:
            where = getattr(keys, "name", "/").strip("/")
            raise ValueError(
                f"{self.path}{f': {where!r}' if where else ''} has {sorted(keys)}; needed are "
                "'observations', 'actions' and 'terminals' or 'timeouts' (D4RL), or Minari's "
                "'episode_0', ... with these."
            )


def has_h5py() -> bool:
    """Whether HDF5 files can be read."""
    return _has_h5py


_WIDE = ("observations", "actions", "next_observations")
_OF_MINARI = ("terminations", "truncations")
_KINDS = {
    **dict.fromkeys((*_WIDE, "rewards"), "fiu"),
    **dict.fromkeys(("terminals", "timeouts", *_OF_MINARI), "biuf"),
}
"""The NumPy kinds that arrays may have."""
