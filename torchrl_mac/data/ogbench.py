"""OGBench datasets as memory-mapped, immutable TorchRL replay buffers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torchrl_mac.data.goals import GoalDistribution
from torchrl_mac.data.replay import ActionChunkExperienceReplay
from torchrl_mac.datasets.converted import OGBenchDataset
from torchrl_mac.datasets.names import OGBenchName

__all__ = ["OGBenchExperienceReplay"]

_MAC_GOALS = {
    "value_goal": GoalDistribution(current=0.2, trajectory=0.5, random=0.3),
    "actor_goal": GoalDistribution(current=0.0, trajectory=0.5, random=0.5, gamma=0.999),
}


class OGBenchExperienceReplay(ActionChunkExperienceReplay):
    r"""An OGBench dataset (https://arxiv.org/abs/2410.20092), sampled in action chunks.

    The npz file, or the shards that make up a large set, are converted once into a memory map,
    ``{root}/cube-single-play-v0/{train,val}/{rows,columns,metadata.json}``, and not needed again
    until another task is asked for. A conversion that is interrupted goes on at the shard where
    it was. There is one row per stored state and no copy of next observations:

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
    ``"oracle_rep"``           ``[G]``       goal representation of :math:`s_t`; oraclerep only
    =========================  ============  ==================================================

    OGBench's single-task rewards speak of :math:`s_t`, not of :math:`s_{t+1}`. Its terminations
    do not end the recorded episodes, which go on after a task is solved. A dataset without a
    task has no reward and never terminates.

    Samples are the transitions of :class:`~torchrl_mac.data.ActionChunkStorage`. Names with
    ``oraclerep`` have goals, by default MAC's: ``"value_goal"`` (the current state with
    probability 0.2, a uniform later one of the trajectory with 0.5, any with 0.3) and
    ``"actor_goal"`` (a geometric later one or any, 0.5 each).

    Args:
        dataset_id (str): an OGBench name, such as ``"cube-single-play-v0"``,
            ``"cube-single-play-singletask-v0"`` (the environment's default task) or
            ``"cube-single-play-singletask-task2-v0"``.
        batch_size (int, optional): the number of chunks in a sample.

    Keyword Args:
        source (Path, str or a sequence of them, optional): the training npz file; a folder that
            holds it, or its shards ``{dataset}-*.npz``; or several of these. Each file has its
            ``-val.npz`` beside it. Defaults to ``~/.ogbench/data``, where OGBench downloads to.
        columns (sequence of str, optional): further arrays of the files to have in rows and, at
            both ends of the chunk, in samples: ``"qpos"``, ``"qvel"``, ``"button_states"``.
        **kwargs: the others of :class:`~torchrl_mac.data.ActionChunkExperienceReplay`: ``root``,
            ``split``, ``chunk_size``, ``gamma``, ``ignore_terminated``, ``goals``, ``device``,
            ``workers``, ``prefetch``, ``generator``, ...

    Raises:
        ValueError: if the name, or the content of the source, is not OGBench's.
        FileNotFoundError: if something must be converted and there is no source.
        ImportError: if labels must be converted and OGBench is not installed.
        OSError: if ``root`` cannot be written.

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

    dataset: OGBenchDataset

    def __init__(
        self,
        dataset_id: str,
        batch_size: int | None = None,
        *,
        root: str | Path | None = None,
        source: str | Path | Sequence[str | Path] | None = None,
        split: Literal["train", "val"] = "train",
        columns: Sequence[str] = (),
        workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        name = OGBenchName.parse(dataset_id)
        if name.mode == "singletask" and kwargs.get("goals"):
            raise ValueError(
                f"{dataset_id!r} is a single task, which has its own rewards; goals= belong to "
                f"names such as {name.env}-{name.behaviour}-oraclerep-v0."
            )
        if name.mode == "oraclerep":
            kwargs.setdefault("goals", _MAC_GOALS)
        dataset = OGBenchDataset(
            dataset_id, root=root, source=source, split=split, columns=columns, workers=workers
        )
        super().__init__(dataset, batch_size, **kwargs)

    @property
    def name(self) -> OGBenchName:
        """What the dataset's name says."""
        return self.dataset.name

    @property
    def task_id(self) -> int | None:
        """The number of the task, resolved for the default one; ``None`` without a task."""
        return self.dataset.task_id
