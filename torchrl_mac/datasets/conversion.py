"""The rows of a dataset: many files become one memory map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_mac.datasets.columns import ColumnWriter, Part, write_columns
from torchrl_mac.datasets.manifest import damaged, digest_of, load_split
from torchrl_mac.datasets.sources import Source
from torchrl_mac.datasets.statistics import ObservationStatistics, RunningStatistics
from torchrl_mac.datasets.tables import Schema, open_columns
from torchrl_mac.utils.files import sha256

__all__ = [
    "ACTION_BOUND",
    "EPISODE_ENDS",
    "FLAGS",
    "convert_rows",
    "end_flags",
    "load_episode_ends",
    "open_rows",
    "parts_of",
]

ACTION_BOUND = 1 - 1e-5
"""Stored actions are clipped to plus or minus this, as by MAC's authors."""

EPISODE_ENDS = "episode_ends.npy"
FLAGS = ("terminated", "truncated", "done")


def convert_rows(
    sources: Sequence[Source],
    folder: Path,
    metadata: dict[str, Any],
    *,
    workers: int = 1,
    progress: bool | None = None,
) -> None:
    """Converts files into ``folder``, unless that is there already.

    Writes ``rows``, with a file for each of the columns ``"observation"``, ``"action"``,
    ``"episode"`` and the end-of-episode flags under ``"next"``; ``episode_ends.npy``; and the
    manifest ``metadata.json``.

    Args:
        sources (sequence of Source): the files, in order.
        folder (Path): what to make; appears complete or not at all.
        metadata (dict): entries to add to the manifest.

    Keyword Args:
        workers (int, optional): files converted at a time. Defaults to 1.
        progress (bool, optional): shows a progress bar. Default: on a terminal.

    Raises:
        ValueError: if the content of a file is not valid, or differs in shape from the first's.
        OSError: if the folder cannot be written.
    """
    shapes = sources[0].shapes
    for source in sources:
        if source.shapes != shapes:
            raise ValueError(
                f"{source.path} has rows of shape {source.shapes}, but {sources[0].path} of "
                f"{shapes}: they are not of the same environment."
            )
    for column, shape in shapes.items():
        if 0 in shape:
            raise ValueError(f"{sources[0].path}: rows of {column!r} are empty, of shape {shape}.")
    first_episode = np.cumsum([0, *(len(source.ends) for source in sources)])
    first_row = np.cumsum([0, *(source.rows for source in sources)])

    def fill(i: int, writer: ColumnWriter) -> dict[str, Any]:
        source = sources[i]
        running, ranges = RunningStatistics(), {}
        for block in source.blocks("observation"):
            running.update(block)
            writer.write("observation", block)
        ranges["observation"] = [float(running.min.min()), float(running.max.max())]
        low, high = np.inf, -np.inf
        for block in source.blocks("action"):
            low, high = min(low, block.min()), max(high, block.max())
            if max(-low, high) > 1:
                raise ValueError(
                    f"{source.path}: 'actions' reach {max(-low, high):g} in absolute value, "
                    "outside [-1, 1]; rescale them."
                )
            writer.write("action", block.clip(-ACTION_BOUND, ACTION_BOUND))
        ranges["action"] = [float(low), float(high)]
        lengths = np.diff(source.ends, prepend=-1)
        numbers = np.arange(first_episode[i], first_episode[i + 1], dtype=np.int32)
        writer.write("episode", np.repeat(numbers, lengths))
        boundary = np.zeros((source.rows, 1), dtype=bool)
        boundary[source.ends] = True
        terminated = np.zeros_like(boundary)
        if "terminated" in shapes:
            terminated = np.concatenate(list(source.blocks("terminated")))
        for flag, values in zip(FLAGS, end_flags(boundary, terminated), strict=True):
            writer.write(("next", flag), values)
        if "reward" in shapes:
            for block in source.blocks("reward"):
                writer.write(("next", "reward"), block)
        return {
            "bytes": source.path.stat().st_size,
            "sha256": sha256(source.path),
            "ranges": ranges,
            "versions": source.versions(),
            "running": running.to_dict(),
        }

    def finish(partial: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
        ends = [source.ends + first for source, first in zip(sources, first_row, strict=False)]
        np.save(partial / EPISODE_ENDS, np.concatenate(ends).astype(np.int64))
        statistics = ObservationStatistics.from_running([r.pop("running") for r in records])
        return {
            **metadata,
            "episodes": int(first_episode[-1]),
            "observation_dim": shapes["observation"][0],
            "action_dim": shapes["action"][0],
            "digest": digest_of(records),
            "statistics": statistics.to_dict(),
            "shards": [
                {
                    "file": source.path.name,
                    "episodes": len(source.ends),
                    **record,
                    "identity": source.identity,
                }
                for source, record in zip(sources, records, strict=True)
            ],
        }

    widths = shapes["observation"][0], shapes["action"][0]
    schema = _row_schema(*widths, "reward" in shapes)
    write_columns(
        folder, parts_of(sources), schema, fill, finish, workers=workers, progress=progress
    )


def parts_of(sources: Sequence[Source]) -> list[Part]:
    """The shards as :func:`~torchrl_mac.datasets.columns.write_columns` wants them."""
    return [Part(source.path.name, source.identity, source.rows) for source in sources]


def end_flags(boundary: np.ndarray, terminated: np.ndarray) -> tuple[np.ndarray, ...]:
    """Whether rows are terminated, truncated and done, from their episodes' last rows."""
    return terminated, boundary & ~terminated, boundary | terminated


def _row_schema(observation_dim: int, action_dim: int, has_reward: bool) -> Schema:
    float32, boolean = np.dtype(np.float32), np.dtype(bool)
    schema: Schema = {
        "observation": (float32, (observation_dim,)),
        "action": (float32, (action_dim,)),
        "episode": (np.dtype(np.int32), ()),
        **{("next", flag): (boolean, (1,)) for flag in FLAGS},
    }
    if has_reward:
        schema["next", "reward"] = (float32, (1,))
    return schema


def open_rows(folder: Path) -> TensorDict:
    """The rows of a converted split, mapped.

    Raises:
        ValueError: if the manifest is damaged, or a file is not what it says.
    """
    about = load_split(folder)
    widths = about["observation_dim"], about["action_dim"]
    return open_columns(folder, [_row_schema(*widths, reward) for reward in (False, True)])


def load_episode_ends(folder: Path) -> Tensor:
    """The row number of the last row of each episode, ``[E]`` int64.

    Raises:
        ValueError: if they are not those of the manifest's rows and episodes.
    """
    path, about = folder / EPISODE_ENDS, load_split(folder)
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # looks at the size first
    except (OSError, ValueError, EOFError) as err:
        raise damaged(path, f"it cannot be read ({err})", folder) from err
    if stored.dtype != np.int64 or stored.shape != (about["episodes"],):
        raise damaged(
            path,
            f"the episodes' ends are {stored.dtype} of shape {stored.shape}, not int64 of "
            f"shape ({about['episodes']},)",
            folder,
        )
    ends = np.array(stored)
    if ends[-1] != about["rows"] - 1 or (np.diff(ends, prepend=-1) < 1).any():
        raise damaged(
            path, f"the episodes' ends do not ascend to the last of {about['rows']} rows", folder
        )
    return torch.from_numpy(ends)
