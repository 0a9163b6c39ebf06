"""Converted datasets of one's own files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torchrl_mac.datasets.converted import ConvertedDataset
from torchrl_mac.datasets.robomimic import LOW_DIM_KEYS, RobomimicSource, is_robomimic
from torchrl_mac.datasets.sources import validation_file
from torchrl_mac.datasets.trajectories import TrajectorySource

__all__ = ["RobomimicDataset", "TrajectoryDataset"]


class TrajectoryDataset(ConvertedDataset[TrajectorySource]):
    """A dataset of one's own, from files of :class:`TrajectorySource` or robomimic's.

    Args:
        dataset_id (str): a name for the dataset: letters, digits, ``.``, ``_`` and ``-``.
        **kwargs: see :class:`ConvertedDataset`.

    Raises:
        ValueError: if the name is not valid.

    Examples:
        >>> import tempfile, numpy as np
        >>> from torchrl_mac.datasets import TrajectoryDataset
        >>> folder = tempfile.TemporaryDirectory()
        >>> np.savez(  # two episodes of 20 steps, as in D4RL
        ...     f"{folder.name}/robot.npz",
        ...     observations=np.random.rand(40, 3).astype(np.float32),
        ...     actions=np.zeros((40, 2), np.float32),
        ...     rewards=np.ones(40, np.float32),
        ...     terminals=np.zeros(40, bool),
        ...     timeouts=np.arange(40) % 20 == 19,
        ... )
        >>> dataset = TrajectoryDataset(
        ...     "robot", root=folder.name, source=f"{folder.name}/robot.npz"
        ... )
        >>> len(dataset), dataset.episode_ends, dataset.load()["action"].shape
        (40, tensor([19, 39]), torch.Size([40, 2]))
        >>> folder.cleanup()
    """

    def __init__(self, dataset_id: str, **kwargs: Any) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", dataset_id):
            raise ValueError(
                f"{dataset_id!r} cannot name a dataset: use letters, digits, '.', '_', '-'."
            )
        super().__init__(dataset_id, dataset_id, **kwargs)

    def _find(self, source: Sequence[Path]) -> list[Path]:
        files = [path for part in source for path in TrajectorySource.find(part)]
        return [path for path in files if not path.stem.endswith("-val")]

    _masks = True  # whether robomimic's files are divided by their own lists
    _observations: Sequence[str] = LOW_DIM_KEYS

    def _open(self, path: Path, split: str) -> TrajectorySource:
        if not is_robomimic(path):
            return TrajectorySource(path)
        whole = not self._masks or path.stem.endswith("-val")
        part = None if whole else cast("Literal['train', 'val']", split)
        return RobomimicSource(path, split=part, observations=self._observations)

    def _validation_file(self, path: Path) -> Path:
        return path if self._masks and is_robomimic(path, "valid") else validation_file(path)


class RobomimicDataset(TrajectoryDataset):
    """Demonstrations of :class:`~torchrl_mac.datasets.robomimic.RobomimicSource`, with a choice.

    Args:
        dataset_id (str): a name for the dataset, see :class:`TrajectoryDataset`, which opens such
            files as well, with these defaults.

    Keyword Args:
        observations (sequence of str, optional): the arrays that are put one after another to be
            the state. Defaults to :data:`~torchrl_mac.datasets.robomimic.LOW_DIM_KEYS`.
        masks (bool, optional): whether the file's lists ``mask/train`` and ``mask/valid`` make the
            splits. Without them, or with ``False``, all demonstrations are for training, and a
            file ``{stem}-val{suffix}`` is for validation. Defaults to ``True``.
        **kwargs: see :class:`ConvertedDataset`.

    Examples:
        >>> import h5py, tempfile, numpy as np
        >>> from torchrl_mac.datasets import RobomimicDataset
        >>> folder = tempfile.TemporaryDirectory()
        >>> with h5py.File(f"{folder.name}/low_dim_v15.hdf5", "w") as file:
        ...     demo = file.create_group("data/demo_0")
        ...     demo["actions"], demo["rewards"] = np.zeros((4, 7)), np.array([0, 0, 0, 1.0])
        ...     demo["dones"], demo["obs/object"] = np.array([0, 0, 0, 1]), np.zeros((4, 10))
        >>> dataset = RobomimicDataset(
        ...     "lift-mh",
        ...     root=folder.name,
        ...     source=f"{folder.name}/low_dim_v15.hdf5",
        ...     observations=["object"],
        ... )
        >>> len(dataset), dataset.load()["observation"].shape
        (5, torch.Size([5, 10]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        dataset_id: str,
        *,
        observations: Sequence[str] = LOW_DIM_KEYS,
        masks: bool = True,
        **kwargs: Any,
    ) -> None:
        self._observations, self._masks = observations, masks
        super().__init__(dataset_id, **kwargs)
