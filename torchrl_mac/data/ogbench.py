"""OGBench datasets as memory-mapped, immutable TorchRL replay buffers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict
from torchrl.data import Bounded, Composite, ImmutableDatasetWriter, Unbounded
from torchrl.data.datasets.common import BaseDatasetExperienceReplay
from torchrl.data.datasets.utils import _get_root_dir
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import Writer
from torchrl.envs.transforms import ObservationNorm, Transform

from torchrl_mac.data.conversion import SourceFile, convert_rows, is_complete, load_metadata
from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.sampler import ActionChunkSampler
from torchrl_mac.data.statistics import ObservationStatistics
from torchrl_mac.data.storage import ActionChunkStorage
from torchrl_mac.data.tasks import convert_task, task_folder

__all__ = ["OGBenchExperienceReplay"]

_SOURCE_FOLDER = Path("~/.ogbench/data")  # where ogbench.download_datasets puts files


class OGBenchExperienceReplay(BaseDatasetExperienceReplay):
    r"""An OGBench dataset (https://arxiv.org/abs/2410.20092), sampled in action chunks.

    The npz file is converted once into a memory map,
    ``{root}/cube-single-play-v0/{train,val}/{rows,tasks,metadata.json}``, and not needed again
    until another task is asked for. There is one row per stored state and no copy of next
    observations:

    =========================  ============  ==================================================
    key                        row shape     value
    =========================  ============  ==================================================
    ``"observation"``          ``[O]``       :math:`s_t`, float32, not normalised
    ``"action"``               ``[A]``       :math:`a_t`, float32, within :math:`\pm (1-10^{-5})`
    ``"episode"``              ``[]``        the episode's number, int32
    ``("next", "reward")``     ``[1]``       :math:`r_t`, float32; single tasks only
    ``("next", "terminated")`` ``[1]``       the task is solved in :math:`s_t`, else ``False``
    ``("next", "truncated")``  ``[1]``       last row of the episode and not terminated
    ``("next", "done")``       ``[1]``       terminated or truncated
    =========================  ============  ==================================================

    OGBench's single-task rewards speak of :math:`s_t`, not of :math:`s_{t+1}`. Its terminations
    do not end the recorded episodes, which go on after a task is solved. A dataset without a
    task has no reward and never terminates.

    Samples are the transitions of :class:`~torchrl_mac.data.ActionChunkStorage` and, with
    ``chunk_size=1``, TorchRL's usual ones. ``buffer[i]`` and ``buffer[:]`` are rows.

    Args:
        dataset_id (str): an OGBench name, such as ``"cube-single-play-v0"``,
            ``"cube-single-play-singletask-v0"`` (the environment's default task) or
            ``"cube-single-play-singletask-task2-v0"``.
        batch_size (int, optional): the number of chunks in a sample.

    Keyword Args:
        root (Path or str, optional): where conversions are kept. Defaults to
            ``~/.cache/torchrl/ogbench``.
        source (Path or str, optional): the training npz file, with its ``-val.npz`` beside it,
            or the folder that holds both. Defaults to ``~/.ogbench/data``, where OGBench
            downloads to.
        split (str, optional): ``"train"`` or ``"val"``. Defaults to ``"train"``.
        chunk_size (int, optional): the number of actions in a chunk. Defaults to 1.
        gamma (float, optional): discount per environment step in the sum of a chunk's rewards.
            Defaults to 1.
        ignore_terminated (bool, optional): if ``True``, samples are never terminated.
            Defaults to ``False``.
        sampler (Sampler, optional): defaults to an
            :class:`~torchrl_mac.data.ActionChunkSampler` of ``chunk_size``.
        writer (Writer, optional): defaults to :class:`~torchrl.data.ImmutableDatasetWriter`.
        collate_fn (callable, optional): see :class:`~torchrl.data.ReplayBuffer`, like the
            following.
        pin_memory (bool, optional): pins the memory of samples. Defaults to ``False``.
        prefetch (int, optional): the number of batches to prepare ahead. Reproducible up to 1.
        transform (Transform, optional): applied to samples, see also :meth:`observation_norm`.
        generator (torch.Generator, optional): where the sampler draws from.

    Raises:
        ValueError: if the name, or the content of the source, is not OGBench's.
        FileNotFoundError: if something must be converted and there is no source.
        ImportError: if a task must be converted and OGBench is not installed.
        OSError: if ``root`` cannot be written.
        NotImplementedError: for ``"oraclerep"`` names.

    Examples:
        >>> import tempfile, numpy as np
        >>> from torchrl_mac.data import OGBenchExperienceReplay
        >>> folder = tempfile.TemporaryDirectory()
        >>> for split in ("", "-val"):  # two episodes of 20 states, as OGBench writes them
        ...     np.savez(
        ...         f"{folder.name}/cube-single-play-v0{split}.npz",
        ...         observations=np.random.rand(40, 28).astype(np.float32),
        ...         actions=np.zeros((40, 5), np.float32),
        ...         terminals=np.arange(40) % 20 == 19,
        ...     )
        >>> buffer = OGBenchExperienceReplay(
        ...     "cube-single-play-v0", 32, root=folder.name, source=folder.name, chunk_size=10
        ... )
        >>> buffer.append_transform(buffer.observation_norm())  # doctest: +ELLIPSIS
        OGBenchExperienceReplay(...
        >>> chunk = buffer.sample()
        >>> chunk["action"].shape, chunk["next", "observation"].shape
        (torch.Size([32, 10, 5]), torch.Size([32, 28]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        dataset_id: str,
        batch_size: int | None = None,
        *,
        root: str | Path | None = None,
        source: str | Path | None = None,
        split: Literal["train", "val"] = "train",
        chunk_size: int = 1,
        gamma: float = 1.0,
        ignore_terminated: bool = False,
        sampler: Sampler | None = None,
        writer: Writer | None = None,
        collate_fn: Callable | None = None,
        pin_memory: bool = False,
        prefetch: int | None = None,
        transform: Transform | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.dataset_id = dataset_id
        self.name = OGBenchName.parse(dataset_id)
        if self.name.mode == "oraclerep":
            raise NotImplementedError(
                f"{dataset_id!r}: goals as oracle representations are not available yet; use "
                f"{self.name.dataset!r} or a singletask name."
            )
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}.")
        self.split = split
        self.root = _get_root_dir("ogbench") if root is None else Path(root).expanduser()
        self._source = None if source is None else Path(source)

        if source is not None or not self._is_downloaded():
            for part in dict.fromkeys((split, "val")):  # normalisation is based on "val"
                self._convert(part)
        self.metadata = load_metadata(self.data_path)
        super().__init__(
            batch_size=batch_size,
            storage=_DatasetStorage(self._load(), gamma=gamma, ignore_terminated=ignore_terminated),
            sampler=ActionChunkSampler(chunk_size) if sampler is None else sampler,
            writer=ImmutableDatasetWriter() if writer is None else writer,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch=prefetch,
            transform=transform,
            generator=generator,
        )

    @property
    def data_path(self) -> Path:
        """The folder of the converted split."""
        return self.data_path_root / self.split

    @property
    def data_path_root(self) -> Path:
        """The folder of the converted dataset, with all its splits and tasks."""
        return self.root / self.name.dataset

    @property
    def task_id(self) -> int | None:
        """The number of the task, resolved for the default one; ``None`` without a task."""
        if self.name.mode != "singletask":
            return None
        return load_metadata(task_folder(self.data_path, self.name))["task_id"]

    @functools.cached_property
    def statistics(self) -> ObservationStatistics:
        """Statistics of the observations of the validation split.

        Warns and falls back to the training split if there is no validation split.
        """
        folder = self.data_path_root / "val"
        if not is_complete(folder):
            warnings.warn(
                f"{self.name.dataset} has no validation split in {self.root}: statistics are those "
                "of the training split.",
                stacklevel=2,
            )
            folder = self.data_path
        return ObservationStatistics.from_dict(load_metadata(folder)["statistics"])

    def observation_norm(
        self,
        kind: Literal["min_max", "mean_std"] = "min_max",
        in_keys: Sequence[NestedKey] = ("observation", ("next", "observation")),
    ) -> ObservationNorm:
        """A transform that normalises observations with :attr:`statistics`.

        Args:
            kind (str, optional): see :meth:`ObservationStatistics.loc_scale`. Defaults to
                ``"min_max"``, MAC's normalisation.
            in_keys (sequence of NestedKey, optional): what to normalise. Defaults to the
                observations of a sample; for an environment pass ``["observation"]``.
        """
        loc, scale = self.statistics.loc_scale(kind)
        return ObservationNorm(loc, scale, in_keys=list(in_keys), standard_normal=True)

    @property
    def observation_spec(self) -> Composite:
        """The environment's observations."""
        return Composite(observation=Unbounded((self.metadata["observation_dim"],)))

    @property
    def action_spec(self) -> Bounded:
        """The environment's actions (a chunk holds several)."""
        return Bounded(-1.0, 1.0, (self.metadata["action_dim"],))

    def _is_downloaded(self) -> bool:
        has_task = self.name.mode == "singletask"
        folders = [self.data_path, *([task_folder(self.data_path, self.name)] if has_task else [])]
        return all(map(is_complete, folders))

    def _source_path(self, split: str) -> Path:
        path = (self._source or _SOURCE_FOLDER).expanduser()
        if path.suffix != ".npz":
            path = path / f"{self.name.dataset}.npz"
        return path if split == "train" else path.with_name(f"{path.stem}-val.npz")

    def _convert(self, split: str) -> None:
        """Converts what is missing of a split; only :attr:`split` must have a source then."""
        path = self._source_path(split)
        if not path.is_file():
            if split == self.split and not self._is_downloaded():
                raise FileNotFoundError(
                    f"{self.dataset_id!r} ({split}) is not yet converted in {self.root} and {path} "
                    "does not exist. Pass source=, or get the file with ogbench.download_datasets "
                    "or torchrl_mac.data.generate_dataset."
                )
            return
        source, folder = SourceFile(path), self.data_path_root / split
        if not is_complete(folder):
            convert_rows(source, folder, self.name, split)
        elif source.checksums != load_metadata(folder)["source"]["checksums"]:
            raise ValueError(
                f"{path} is not the file that {folder} was converted from; delete that folder, or "
                "pass another root=."
            )
        if split == self.split and self.name.mode == "singletask":
            convert_task(source, folder, self.name)

    def _load(self) -> TensorDict:
        rows = TensorDict.load_memmap(self.data_path / "rows")
        if self.name.mode == "singletask":
            task = TensorDict.load_memmap(task_folder(self.data_path, self.name) / "rows")
            rows = TensorDict({**rows.exclude("next"), **task}, batch_size=rows.batch_size)
        return rows.lock_()


class _DatasetStorage(ActionChunkStorage):
    """Rows that are on disk for good: not to be written, nor to be copied into checkpoints."""

    def set(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(ImmutableDatasetWriter.WRITING_ERR)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["rows"] != len(self):
            raise ValueError(
                f"The checkpoint is of a dataset of {state_dict['rows']} rows, this one has "
                f"{len(self)}."
            )

    def dumps(self, path: str | Path) -> None:
        pass

    def loads(self, path: str | Path) -> None:
        pass
