"""Robomimic's low-dimensional HDF5 files: demonstrations, one group each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchrl_mac.datasets.trajectories import TrajectorySource, has_h5py
from torchrl_mac.utils.files import sha256

__all__ = ["LOW_DIM_KEYS", "RobomimicSource", "is_robomimic"]

LOW_DIM_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""The observations that a state is made of, in this order."""

_MASKS = {"train": "train", "val": "valid"}  # what a split is called in the files
_PREFIX = "demo_"

Arrays = dict[str, np.ndarray]


class RobomimicSource(TrajectorySource):
    """Demonstrations of robomimic (https://robomimic.github.io), read as a whole.

    A group ``data/demo_k`` has ``actions`` ``[T, A]``, ``rewards`` ``[T]`` and ``dones`` ``[T]``,
    and groups ``obs`` and, optionally, ``next_obs`` of arrays ``[T, *]``. Demonstrations are in
    the order of their numbers. Rewards become :math:`r_t - 1`, 0 where the task is solved and -1
    elsewhere; a step with ``dones`` terminates, and its episode ends there, as
    https://arxiv.org/abs/2507.07969 has it. Another demonstration or rest of one is another
    episode.

    The state after an episode's last action is that of ``next_obs``. Without ``next_obs`` nobody
    knows it: as for D4RL's files the last action is left out then, unless it terminates, where
    the state before stands in for the one that is never asked for.

    Lists ``mask/train`` and ``mask/valid`` of demonstrations divide the file into the splits.

    Args:
        path (Path): the file.

    Keyword Args:
        split (str, optional): ``"train"`` or ``"val"``, the demonstrations of the list or, where
            there is none, those that no list gives to the other. Default: all demonstrations.
        observations (sequence of str, optional): the arrays that are put one after another to be
            the state. Defaults to :data:`LOW_DIM_KEYS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if h5py is not installed.
        ValueError: if its content is not of this layout: the file and the array are named.

    Examples:
        >>> import h5py, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "low_dim_v15.hdf5"
        >>> with h5py.File(path, "w") as file:
        ...     demo = file.create_group("data/demo_0")
        ...     demo["actions"], demo["rewards"] = np.zeros((4, 7)), np.array([0, 0, 0, 1.0])
        ...     demo["dones"] = np.array([0, 0, 0, 1])
        ...     for group in ("obs", "next_obs"):
        ...         for name, width in zip(LOW_DIM_KEYS, (3, 4, 2, 10)):
        ...             demo[f"{group}/{name}"] = np.zeros((4, width))
        >>> source = RobomimicSource(path)
        >>> source.rows, source.ends, source.shapes["observation"]
        (5, array([4]), (19,))
        >>> next(source.blocks("reward")).flatten()
        array([-1., -1., -1.,  0.,  0.], dtype=float32)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: Path,
        *,
        split: Literal["train", "val"] | None = None,
        observations: Sequence[str] = LOW_DIM_KEYS,
    ) -> None:
        super().__init__(path)
        self.split = split
        self.observations = list(observations)
        if not self.observations:
            raise ValueError("observations= must name at least one array.")

    @functools.cached_property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]
        """The file's checksum, and what is taken from it."""
        taken = {"split": self.split, "observations": self.observations}
        return {"sha256": sha256(self.path), **taken}

    def _read(self) -> Arrays:
        return self._hdf5(self._demonstrations)

    def _demonstrations(self, file: Any) -> Arrays:
        names = self._names(file)
        demos = [self._demonstration(file["data"], name) for name in names]
        keys = list(demos[0])
        for name, demo in zip(names, demos, strict=True):
            for key in dict.fromkeys([*keys, *demo]):
                widths = [each[key].shape[1:] if key in each else None for each in (demos[0], demo)]
                if widths[0] != widths[1]:
                    raise ValueError(
                        f"{self.path}: {key!r} of 'data/{name}' has rows of shape {widths[1]}, of "
                        f"'data/{names[0]}' {widths[0]}; they must be the same."
                    )
        arrays = {key: np.concatenate([demo[key] for demo in demos]) for key in keys}
        return self._flat(arrays.__getitem__, arrays)

    def _names(self, file: Any) -> list[str]:
        """The demonstrations of the split, in the order of their numbers."""
        found = {name for name in file["data"] if name.startswith(_PREFIX)}
        for name in found:
            if not name.removeprefix(_PREFIX).isdecimal():
                raise ValueError(f"{self.path}: 'data/{name}' is no demonstration, 'demo_0' etc.")
        if self.split is not None:
            masks = {split: self._mask(file, mask, found) for split, mask in _MASKS.items()}
            listed, others = masks.pop(self.split), next(iter(masks.values()))
            found = found - (others or set()) if listed is None else listed
        if not found:
            of = f" of the split {self.split!r}" if self.split else ""
            raise ValueError(f"{self.path} has no demonstrations 'data/demo_0', ...{of}.")
        return sorted(found, key=lambda name: int(name.removeprefix(_PREFIX)))

    def _mask(self, file: Any, mask: str, known: set[str]) -> set[str] | None:
        if f"mask/{mask}" not in file:
            return None
        stored = np.asarray(file["mask"][mask]).ravel()
        names = {name.decode() if isinstance(name, bytes) else str(name) for name in stored}
        if unknown := names - known:
            raise ValueError(
                f"{self.path}: 'mask/{mask}' lists {min(unknown)!r}, which is not in 'data'."
            )
        return names

    def _demonstration(self, data: Any, name: str) -> Arrays:
        """The arrays of a demonstration, as D4RL would call them."""
        demo = data[name]
        arrays = {
            "actions": self._array(demo, "actions"),
            "rewards": self._array(demo, "rewards"),
            "terminals": self._array(demo, "dones", "terminals"),
            "observations": self._states(demo, "obs"),
        }
        if "next_obs" in demo:
            arrays["next_observations"] = self._states(demo, "next_obs")
        lengths = {key: len(array) for key, array in arrays.items()}
        steps = demo.attrs.get("num_samples", lengths["actions"])
        if set(lengths.values()) != {steps} or steps == 0:
            raise ValueError(
                f"{self.path}: 'data/{name}' has arrays of {lengths} rows; they must be equal, at "
                f"least 1, and num_samples, {steps}."
            )
        arrays["rewards"] = arrays["rewards"] - 1.0
        arrays["timeouts"] = np.arange(steps) == steps - 1
        return arrays

    def _states(self, demo: Any, group: str) -> np.ndarray:
        """The observations one after another, ``[T, O]``."""
        stored = demo.get(group)
        if not hasattr(stored, "keys") or not set(self.observations) <= set(stored):
            found = sorted(stored) if hasattr(stored, "keys") else "no group"
            raise ValueError(
                f"{self.path}: '{demo.name.strip('/')}/{group}' is {found}; needed are "
                f"{self.observations}."
            )
        parts = [self._array(stored, key, "observations") for key in self.observations]
        lengths = {key: len(part) for key, part in zip(self.observations, parts, strict=True)}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"{self.path}: '{demo.name.strip('/')}/{group}' has arrays of {lengths} rows; they "
                "must be equal."
            )
        return np.concatenate(parts, 1)


def is_robomimic(path: Path, mask: str | None = None) -> bool:
    """Whether a file can be read and has robomimic's layout and, if one is named, a mask.

    Args:
        path (Path): the file.
        mask (str, optional): a list of demonstrations, such as ``"valid"``.
    """
    if not has_h5py() or path.suffix not in (".hdf5", ".h5"):
        return False
    import h5py

    try:
        with h5py.File(path) as file:
            demos = file.get("data")
            has_demos = hasattr(demos, "keys") and any(key.startswith(_PREFIX) for key in demos)
            return has_demos and (mask is None or f"mask/{mask}" in file)
    except (OSError, RuntimeError, KeyError):  # to be read, and named, as another layout
        return False
