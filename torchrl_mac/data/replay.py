"""Offline datasets as memory-mapped, immutable TorchRL replay buffers of action chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import NestedKey
from torchrl.data import Bounded, Composite, ImmutableDatasetWriter, Unbounded
from torchrl.data.datasets.common import BaseDatasetExperienceReplay
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.writers import Writer
from torchrl.envs.transforms import ObservationNorm, Transform

from torchrl_mac.data.goals import GoalDistribution
from torchrl_mac.data.sampler import ActionChunkSampler
from torchrl_mac.data.storage import ActionChunkStorage
from torchrl_mac.datasets.converted import ConvertedDataset
from torchrl_mac.datasets.own import TrajectoryDataset
from torchrl_mac.datasets.statistics import ObservationStatistics

__all__ = ["ActionChunkExperienceReplay"]


class ActionChunkExperienceReplay(BaseDatasetExperienceReplay):
    r"""A dataset of one's own, sampled in action chunks.

    Files (see :class:`~torchrl_mac.datasets.trajectories.TrajectorySource`: D4RL's HDF5 or npz,
    Minari's or robomimic's HDF5) are converted once into a memory map,
    ``{root}/{dataset_id}/{train,val}/{rows,metadata.json}``, and not needed again. Several files
    make one dataset. A conversion that is interrupted goes on at the file where it was.
    There is one row per state and no copy of next observations:

    =========================  ============  ==================================================
    key                        row shape     value
    =========================  ============  ==================================================
    ``"observation"``          ``[O]``       :math:`s_t`, float32, not normalised
    ``"action"``               ``[A]``       :math:`a_t`, float32, within :math:`\pm (1-10^{-5})`
    ``"episode"``              ``[]``        the episode's number, int32
    ``("next", "reward")``     ``[1]``       :math:`r_t`, float32
    ``("next", "terminated")`` ``[1]``       whether the task ends with :math:`a_t`
    ``("next", "truncated")``  ``[1]``       last row of the episode and not terminated
    ``("next", "done")``       ``[1]``       terminated or truncated
    =========================  ============  ==================================================

    Samples are the transitions of :class:`~torchrl_mac.data.ActionChunkStorage` and, with
    ``chunk_size=1``, TorchRL's usual ones. ``buffer[i]`` and ``buffer[:]`` are rows.

    Batches depend on the sampler's seed and on how many were taken before, with and without
    ``prefetch``; ``state_dict`` holds both.

    Args:
        dataset_id (str or ConvertedDataset): a name for the dataset: letters, digits, ``.``, ``_``
            and ``-``; or the dataset itself, which has settled ``root``, ``source``, ``split`` and
            ``workers``.
        batch_size (int, optional): the number of chunks in a sample.

    Keyword Args:
        root (Path or str, optional): where conversions are kept. Defaults to
            ``~/.cache/torchrl/ogbench``.
        source (Path, str or a sequence of them, optional): the files, or folders of them. A file
            ``{stem}-val{suffix}`` beside ``{stem}{suffix}`` belongs to the validation split.
            Needed for the first conversion.
        split (str, optional): ``"train"`` or ``"val"``. Defaults to ``"train"``.
        chunk_size (int, optional): the number of actions in a chunk. Defaults to 1.
        gamma (float, optional): discount per environment step in the sum of a chunk's rewards.
            Defaults to 1.
        ignore_terminated (bool, optional): if ``True``, samples are never terminated.
            Defaults to ``False``.
        goals (dict of NestedKey to GoalDistribution, optional): goals to sample, see
            :class:`~torchrl_mac.data.ActionChunkSampler`; rewards and ends then speak of
            ``"value_goal"``.
        negative_reward (bool, optional): whether rewards for goals are -1 and 0, or else 0 and 1.
            Defaults to ``True``.
        n_steps (int, optional): the most steps from a state to the next one; see
            :class:`~torchrl_mac.data.ActionChunkStorage`. Default: those of the chunk.
        truncation_is_success (bool, optional): see there as well. Defaults to ``False``.
        subgoals (bool, optional): whether samples have subgoals on the way to their goals, see
            there as well. Defaults to ``False``.
        cross_episodes (bool, optional): whether windows run on from one episode into the next; see
            :class:`~torchrl_mac.data.ActionChunkSampler`. Defaults to ``False``.
        sparse_rewards (bool, optional): whether rewards that are not 0 count as -1. Defaults to
            ``False``.
        future (bool, optional): whether samples have all states on the way to the next one; see
            :class:`~torchrl_mac.data.ActionChunkStorage`. Defaults to ``False``.
        return_gamma (float, optional): the discount per step of the returns to go that samples
            have; see there as well. Default: samples have none.
        flat_index (bool, optional): whether the index of a batch is ``[B]``, for a
            :class:`~torchrl.data.ReplayBufferEnsemble`; see
            :class:`~torchrl_mac.data.ActionChunkSampler`. Defaults to ``False``.
        device (torch.device or str, optional): ``"cpu"`` (default) samples from the memory map;
            any other device holds the whole dataset in its memory and samples there.
        workers (int, optional): files converted at a time, at least 1. Default: the number of
            CPU cores.
        sampler (Sampler, optional): defaults to an
            :class:`~torchrl_mac.data.ActionChunkSampler` of ``chunk_size``, ``n_steps`` and
            ``goals``. One that is given decides what they are.
        writer (Writer, optional): defaults to :class:`~torchrl.data.ImmutableDatasetWriter`.
        collate_fn (callable, optional): see :class:`~torchrl.data.ReplayBuffer`, like the
            following.
        pin_memory (bool, optional): pins the memory of samples. Defaults to ``False``.
        prefetch (int, optional): the number of batches to prepare ahead, in one thread.
        transform (Transform, optional): applied to samples, see also :meth:`observation_norm`.
        generator (torch.Generator, optional): what the sampler's seed is drawn from.

    Raises:
        ValueError: if the name, or the content of a file, is not valid.
        FileNotFoundError: if something must be converted and there is no source.
        OSError: if ``root`` cannot be written or the disk is too small.

    Examples:
        >>> import tempfile, numpy as np
        >>> from torchrl_mac.data import ActionChunkExperienceReplay
        >>> folder = tempfile.TemporaryDirectory()
        >>> np.savez(  # two episodes of 20 steps, as in D4RL
        ...     f"{folder.name}/robot.npz",
        ...     observations=np.random.rand(40, 3).astype(np.float32),
        ...     actions=np.zeros((40, 2), np.float32),
        ...     rewards=np.ones(40, np.float32),
        ...     terminals=np.zeros(40, bool),
        ...     timeouts=np.arange(40) % 20 == 19,
        ... )
        >>> buffer = ActionChunkExperienceReplay(
        ...     "robot", 32, root=folder.name, source=f"{folder.name}/robot.npz", chunk_size=10
        ... )
        >>> chunk = buffer.sample()
        >>> chunk["action"].shape, chunk["next", "reward"][0]
        (torch.Size([32, 10, 2]), tensor([10.]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        dataset_id: str | ConvertedDataset,
        batch_size: int | None = None,
        *,
        root: str | Path | None = None,
        source: str | Path | Sequence[str | Path] | None = None,
        split: Literal["train", "val"] = "train",
        chunk_size: int = 1,
        gamma: float = 1.0,
        ignore_terminated: bool = False,
        goals: Mapping[NestedKey, GoalDistribution] | None = None,
        negative_reward: bool = True,
        n_steps: int | None = None,
        truncation_is_success: bool = False,
        subgoals: bool = False,
        cross_episodes: bool = False,
        sparse_rewards: bool = False,
        future: bool = False,
        return_gamma: float | None = None,
        flat_index: bool = False,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        sampler: Sampler | None = None,
        writer: Writer | None = None,
        collate_fn: Callable | None = None,
        pin_memory: bool = False,
        prefetch: int | None = None,
        transform: Transform | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(dataset_id, str):
            dataset_id = TrajectoryDataset(
                dataset_id, root=root, source=source, split=split, workers=workers
            )
        dataset = self.dataset = dataset_id
        self.root = dataset.root
        if sampler is None:
            sampler = ActionChunkSampler(
                chunk_size,
                n_steps=n_steps,
                cross_episodes=cross_episodes,
                goals=goals,
                flat_index=flat_index,
            )
        storage = _DatasetStorage(
            dataset,
            gamma=gamma,
            ignore_terminated=ignore_terminated,
            observation_keys=dataset.observation_keys,
            **getattr(sampler, "layout", {}),
            goal_source=dataset.goal_source,
            negative_reward=negative_reward,
            truncation_is_success=truncation_is_success,
            subgoals=subgoals,
            sparse_rewards=sparse_rewards,
            future=future,
            return_gamma=return_gamma,
            episode_ends=dataset.episode_ends,
            device=device,
        )
        super().__init__(
            batch_size=batch_size,
            storage=storage,
            sampler=sampler,
            writer=ImmutableDatasetWriter() if writer is None else writer,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch=prefetch,
            transform=transform,
            generator=generator,
        )
        if prefetch:  # several threads would take the sampler's turns in any order
            self._prefetch_executor: ThreadPoolExecutor = ThreadPoolExecutor(max_workers=1)

    @property
    def dataset_id(self) -> str:
        """The name that the dataset was opened by."""
        return self.dataset.dataset_id

    @property
    def split(self) -> str:
        """The split: ``"train"`` or ``"val"``."""
        return self.dataset.split

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest of the converted split."""
        return self.dataset.metadata

    @property
    def data_path(self) -> Path:
        """The folder of the converted split."""
        return self.dataset.path

    @property
    def data_path_root(self) -> Path:
        """The folder of the converted dataset, with all its splits and columns."""
        return self.dataset.path_root

    @property
    def digest(self) -> str:
        """A SHA-256 digest of all files that the split was converted from."""
        return self.dataset.digest

    @property
    def statistics(self) -> ObservationStatistics:
        """Statistics of the observations: the validation split's or, without one, the split's."""
        return self.dataset.statistics

    @property
    def goal_statistics(self) -> ObservationStatistics:
        """Statistics of the goals, from the same split as :attr:`statistics`."""
        return self.dataset.goal_statistics

    def observation_norm(
        self,
        kind: Literal["min_max", "mean_std"] = "min_max",
        in_keys: Sequence[NestedKey] | None = None,
    ) -> ObservationNorm:
        """A transform that normalises observations with :attr:`statistics`.

        Args:
            kind (str, optional): see :meth:`ObservationStatistics.loc_scale`. Defaults to
                ``"min_max"``, MAC's normalisation.
            in_keys (sequence of NestedKey, optional): what to normalise. Defaults to the
                observations of a sample; for an environment pass ``["observation"]``.
        """
        if in_keys is None:
            in_keys = ["observation", ("next", "observation")]
            in_keys += [("future", "observation")] if self.storage.future else []
        loc, scale = self.statistics.loc_scale(kind)
        return ObservationNorm(loc, scale, in_keys=list(in_keys), standard_normal=True)

    def goal_norm(
        self,
        kind: Literal["min_max", "mean_std"] = "min_max",
        in_keys: Sequence[NestedKey] | None = None,
    ) -> ObservationNorm:
        """A transform that normalises goals with :attr:`goal_statistics`.

        Args:
            kind (str, optional): see :meth:`observation_norm`.
            in_keys (sequence of NestedKey, optional): what to normalise. Defaults to the goals
                that are sampled, and subgoals; for an environment pass ``["goal"]``.
        """
        if in_keys is None:
            in_keys = [*self.storage.goal_keys, *self.storage.subgoal_keys]
        loc, scale = self.goal_statistics.loc_scale(kind)
        return ObservationNorm(loc, scale, in_keys=list(in_keys), standard_normal=True)

    @property
    def observation_spec(self) -> Composite:
        """The environment's observations."""
        return Composite(observation=Unbounded((self.metadata["observation_dim"],)))

    @property
    def goal_spec(self) -> Unbounded:
        """The environment's goals, if goals are sampled."""
        return Unbounded(tuple(self.storage._storage.get(self.dataset.goal_source).shape[1:]))

    @property
    def action_spec(self) -> Bounded:
        """The environment's actions (a chunk holds several)."""
        return Bounded(-1.0, 1.0, (self.metadata["action_dim"],))

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Draws a batch, as any replay buffer."""
        size = self._batch_size if batch_size is None else batch_size
        if self._prefetch and size != self._prefetched_size:
            self.load_state_dict(self.state_dict())  # those ahead have another size: draw them anew
            self._prefetched_size = size
        return super().sample(batch_size, return_info)

    _prefetched_size: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state, without prefetched batches: they are drawn again."""
        state = super().state_dict()
        ahead = len((state.pop("_prefetch_state") or {}).get("queue", ()))
        if "step" in state["_sampler"]:
            state["_sampler"]["step"] -= ahead
        return {**state, "_prefetch_state": None}


class _DatasetStorage(ActionChunkStorage):
    """Rows that are on disk for good: not to be written, nor to be copied into checkpoints.

    Another process that is given them opens the files itself.
    """

    def __init__(
        self, dataset: ConvertedDataset, *, device: torch.device | str, **kwargs: Any
    ) -> None:
        rows = dataset.load()
        if torch.device(device).type != "cpu":
            rows = rows.to(device)
        super().__init__(rows, device=device, rows_in_state=False, **kwargs)
        self._dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.device.type == "cpu":
            state["_storage"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state["_storage"] is None:
            self._storage: Any = self._dataset.load()

    def set(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(ImmutableDatasetWriter.WRITING_ERR)

    def dumps(self, path: str | Path) -> None:
        pass

    def loads(self, path: str | Path) -> None:
        pass
