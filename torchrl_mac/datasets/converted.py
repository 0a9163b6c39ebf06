"""Converted datasets: found on disk, or made from the files that they are of."""

from __future__ import annotations

import abc
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tensordict import TensorDict
from torch import Tensor

from torchrl_mac.datasets.conversion import convert_rows, load_episode_ends, open_rows
from torchrl_mac.datasets.labels import (
    STATE_KEYS,
    column_folder,
    convert_columns,
    label_of,
    open_labels,
    task_of,
)
from torchrl_mac.datasets.manifest import (
    DEFAULT_ROOT,
    is_complete,
    load_metadata,
    load_split,
)
from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.sources import (
    OGBenchSource,
    Source,
    find_shards,
    refuse_twice,
    validation_file,
)
from torchrl_mac.datasets.statistics import ObservationStatistics
from torchrl_mac.datasets.tables import load_statistics
from torchrl_mac.utils.workers import number_of_workers

__all__ = ["ConvertedDataset", "OGBenchDataset"]

_OGBENCH_FOLDER = Path("~/.ogbench/data")  # where ogbench.download_datasets puts files

FileType = TypeVar("FileType", bound=Source)


class ConvertedDataset(abc.ABC, Generic[FileType]):
    """One split of a dataset as a memory map, ``{root}/{name}/{split}``.

    What is missing of it, and of the validation split, which normalisation is based on, is
    converted first. Subclasses know the files.

    Args:
        dataset_id (str): what messages call it.
        name (str): the name of the dataset's folder.

    Keyword Args:
        root (Path or str, optional): where conversions are kept. Defaults to
            ``~/.cache/torchrl/ogbench``.
        source (Path, str or a sequence of them, optional): the files, or folders of them.
        split (str, optional): ``"train"`` or ``"val"``. Defaults to ``"train"``.
        workers (int, optional): files converted at a time, at least 1. Default: the number of
            CPU cores.

    Attributes:
        observation_keys (sequence of str): the columns that are observations.
        goal_source (str): the column that goals are taken from.
        metadata (dict): the manifest.

    Raises:
        ValueError: if an argument, or the content of a file, is not valid; if a file is given
            twice, or the splits have other widths; if what is converted is damaged.
        FileNotFoundError: if something must be converted and there is no source.
        OSError: if ``root`` cannot be written or the disk is too small.
    """

    observation_keys: Sequence[str] = ("observation",)
    goal_source = "observation"
    _labels: Sequence[str] = ()  # groups of columns beside the rows
    _default_source: Sequence[Path] = ()
    _remedy = "Pass source= the file, or a folder of files."

    def __init__(
        self,
        dataset_id: str,
        name: str,
        *,
        root: str | Path | None = None,
        source: str | Path | Sequence[str | Path] | None = None,
        split: str = "train",
        workers: int | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}.")
        self.dataset_id = dataset_id
        self.split = split
        self.root = Path(DEFAULT_ROOT if root is None else root).expanduser()
        self.path_root = self.root / name
        self.path = self.path_root / split
        self._workers = number_of_workers(workers)
        if self.path_root.is_symlink() or self.path_root.resolve().parent != self.root.resolve():
            raise ValueError(
                f"{self.path_root} leads out of {self.root}; remove the link, or rename."
            )
        if source is not None or not self._is_converted():
            files = self._find(_paths(source) or self._default_source)
            refuse_twice(files)
            self._refuse_other_widths(files)
            for part in dict.fromkeys((split, "val")):
                self._convert(part, files)
        else:
            self._refuse_other_widths()
        self.metadata = load_split(self.path)

    @abc.abstractmethod
    def _find(self, source: Sequence[Path]) -> list[Path]:
        """The training files in a source."""

    @abc.abstractmethod
    def _open(self, path: Path, split: str) -> FileType:
        """A file of a split."""

    def _validation_file(self, path: Path) -> Path:
        """The file that holds the validation split of a training file."""
        return validation_file(path)

    def _describe(self) -> dict[str, Any]:
        """What the manifest says of the dataset beside its name."""
        return {}

    def _convert_label(self, label: str, sources: list[FileType], folder: Path) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        """The number of rows."""
        return self.metadata["rows"]

    @property
    def digest(self) -> str:
        """A SHA-256 digest of all files that the split was converted from."""
        return self.metadata["digest"]

    @property
    def episode_ends(self) -> Tensor:
        """The row number of the last row of each episode, ``[E]`` int64."""
        return load_episode_ends(self.path)

    def load(self) -> TensorDict:
        """All rows and the columns beside them, memory-mapped."""
        rows = open_rows(self.path)
        columns = dict(rows.items())
        for label in self._labels:
            columns.update(open_labels(self.path, label).items())
        for key in dict.fromkeys(("observation", self.goal_source)):
            self._statistics(key)  # so that an error comes now
        return TensorDict(columns, batch_size=rows.batch_size).lock_()

    @functools.cached_property
    def statistics(self) -> ObservationStatistics:
        """Statistics of the observations: the validation split's or, without one, the split's."""
        return self._statistics("observation")

    @functools.cached_property
    def goal_statistics(self) -> ObservationStatistics:
        """Statistics of the goals, from the same split as :attr:`statistics`."""
        return self._statistics(self.goal_source)

    def _statistics(self, key: str) -> ObservationStatistics:
        def folder_of(split: str) -> Path:
            folder = self.path_root / split
            return column_folder(folder, key) if key in self._labels else folder

        folder = folder_of("val")
        if not is_complete(folder):
            folder = folder_of(self.split)
        return load_statistics(folder, load_metadata(folder_of(self.split))["columns"][key])

    def _is_converted(self) -> bool:
        folders = [self.path, *(column_folder(self.path, label) for label in self._labels)]
        return all(map(is_complete, folders))

    def _refuse_other_widths(self, train: Sequence[Path] = ()) -> None:
        """Compares the splits: one may be converted and the other be a file yet."""
        known: dict[Path, tuple[int, ...]] = {}
        for split, paths in (("train", train), ("val", map(self._validation_file, train))):
            folder, files = self.path_root / split, [path for path in paths if path.is_file()]
            if is_complete(folder):
                about = load_split(folder)
                known[folder] = about["observation_dim"], about["action_dim"]
            elif files:
                shapes = self._open(files[0], split).shapes
                known[files[0]] = shapes["observation"] + shapes["action"]
        if len(set(known.values())) > 1:
            found = " but ".join(f"{path} has {widths}" for path, widths in known.items())
            raise ValueError(
                f"The widths of observations and actions differ: {found}. They are not of the same "
                "environment."
            )

    def _convert(self, split: str, train: Sequence[Path]) -> None:
        """Converts what is missing of a split; only :attr:`split` must have a source then."""
        paths = list(map(self._validation_file, train)) if split == "val" else list(train)
        missing = [path for path in paths if not path.is_file()]
        if split == "val" and self.split == "train":
            paths, missing = [path for path in paths if path.is_file()], []
            if not paths:
                return
        if missing or not paths:
            if self._is_converted():
                return
            where = f"{missing[0]} does not exist" if missing else "there is no file of it"
            raise FileNotFoundError(
                f"{self.dataset_id!r} ({split}) is not yet converted in {self.root} and {where}. "
                f"{self._remedy}"
            )
        sources, folder = [self._open(path, split) for path in paths], self.path_root / split
        if is_complete(folder):
            found = [shard["identity"] for shard in load_split(folder)["shards"]]
            if found != [source.identity for source in sources]:
                raise ValueError(
                    f"{_listed(paths)} not what {folder} was converted from; delete that folder, "
                    "or pass another root=."
                )
        else:
            metadata = {"dataset": self.path_root.name, **self._describe(), "split": split}
            convert_rows(sources, folder, metadata, workers=self._workers)
        for label in self._labels:
            if split == self.split or label == self.goal_source:  # goals are normalised by "val"
                self._convert_label(label, sources, folder)


class OGBenchDataset(ConvertedDataset[OGBenchSource]):
    """An OGBench dataset, with the rewards or goal representations that its name asks for.

    Args:
        dataset_id (str): an OGBench name, such as ``"cube-single-play-singletask-task2-v0"``.

    Keyword Args:
        columns (sequence of str, optional): further arrays of the files: ``"qpos"``, ``"qvel"``,
            ``"button_states"``.
        **kwargs: see :class:`ConvertedDataset`; the source defaults to ``~/.ogbench/data``, where
            OGBench downloads to.

    Attributes:
        name (OGBenchName): what the name says.

    Raises:
        ValueError: if there is no such name or column.
        ImportError: if labels must be converted and OGBench is not installed.

    Examples:
        >>> import tempfile, numpy as np
        >>> from torchrl_mac.datasets import OGBenchDataset
        >>> folder = tempfile.TemporaryDirectory()
        >>> for split in ("", "-val"):  # two episodes of 20 states, as OGBench writes them
        ...     np.savez(
        ...         f"{folder.name}/cube-single-play-v0{split}.npz",
        ...         observations=np.random.rand(40, 28).astype(np.float32),
        ...         actions=np.zeros((40, 5), np.float32),
        ...         terminals=np.arange(40) % 20 == 19,
        ...     )
        >>> dataset = OGBenchDataset(
        ...     "cube-single-play-v0", root=folder.name, source=folder.name, split="val"
        ... )
        >>> len(dataset), dataset.metadata["episodes"], dataset.load()["observation"].shape
        (40, 2, torch.Size([40, 28]))
        >>> folder.cleanup()
    """

    _remedy = (
        "Pass source=, or get the files with `torchrl-mac-data generate` or `torchrl-mac-data "
        "download`."
    )

    def __init__(self, dataset_id: str, *, columns: Sequence[str] = (), **kwargs: Any) -> None:
        self.name = OGBenchName.parse(dataset_id)
        unknown = set(columns) - set(STATE_KEYS)
        if unknown:
            raise ValueError(f"columns={sorted(unknown)} do not exist; choose among {STATE_KEYS}.")
        label = label_of(self.name)
        self._labels = [*([label] if label else []), *columns]
        self.observation_keys = ["observation", *columns]
        if self.name.mode == "oraclerep":
            self.goal_source = "oracle_rep"
        self._default_source = [_OGBENCH_FOLDER.expanduser()]
        super().__init__(dataset_id, self.name.dataset, **kwargs)

    @property
    def task_id(self) -> int | None:
        """The number of the task, resolved for the default one; ``None`` without a task."""
        if self.name.mode != "singletask":
            return None
        return task_of(column_folder(self.path, self._labels[0]))

    @functools.cached_property
    def statistics(self) -> ObservationStatistics:
        """Statistics of the observations of the validation split.

        Warns and falls back to the training split if there is no validation split.
        """
        if not is_complete(self.path_root / "val"):
            warnings.warn(
                f"{self.name.dataset} has no validation split in {self.root}: statistics are those "
                "of the training split.",
                stacklevel=3,
            )
        return super().statistics

    def _find(self, source: Sequence[Path]) -> list[Path]:
        return find_shards(source, self.name.dataset)

    def _open(self, path: Path, split: str) -> OGBenchSource:
        return OGBenchSource(path)

    def _describe(self) -> dict[str, Any]:
        return {"env": self.name.env, "behaviour": self.name.behaviour}

    def _convert_label(self, label: str, sources: list[OGBenchSource], folder: Path) -> None:
        convert_columns(sources, folder, self.name, label, workers=self._workers)


def _paths(source: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if source is None:
        return []
    if isinstance(source, str | Path):
        source = [source]
    return [Path(part).expanduser() for part in source]


def _listed(paths: list[Path]) -> str:
    return f"{paths[0]} is" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more are"
