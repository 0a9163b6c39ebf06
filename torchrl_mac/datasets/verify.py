"""Checks datasets that have been on disk for a while: files, and what they were converted to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tensordict import TensorDict

from torchrl_mac.datasets.columns import column_name
from torchrl_mac.datasets.conversion import load_episode_ends
from torchrl_mac.datasets.manifest import is_complete, load_metadata
from torchrl_mac.datasets.sources import BLOCK_ROWS, OGBenchSource
from torchrl_mac.utils.files import sha256

__all__ = ["verify_conversion", "verify_files"]

Report = Callable[[str], None]


def verify_files(paths: list[Path], report: Report = lambda line: None) -> None:
    """Reads OGBench npz files as a conversion would, and compares what their recipe says of them.

    Args:
        paths (list of Path): the files.
        report (callable, optional): called with a line for each sound file.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: naming the first file that is damaged, has NaN, wrong shapes, no end of the
            last episode, actions beyond [-1, 1], another shape than the first file, or another
            checksum than the recipe beside it.
    """
    shapes = None
    for path in paths:
        source = OGBenchSource(path)
        shapes = shapes or source.shapes
        if source.shapes != shapes:
            raise ValueError(
                f"{path} has rows of shape {source.shapes}, but {paths[0]} of {shapes}: they are "
                "not of the same environment."
            )
        for key in source.checksums:
            shape = source.shape(key, "fiub", ndim=1 if key == "terminals" else 2)
            if shape[0] != source.rows:
                raise ValueError(f"{path}: {key!r} has {shape[0]} rows, 'terminals' {source.rows}.")
            for block in source.blocks(key, "fiub", len(shape)):
                if key == "actions" and np.abs(block).max() > 1:
                    raise ValueError(f"{path}: 'actions' are not within [-1, 1].")
        expected = source.recipe().get("file")
        if expected is not None and sha256(path) != expected["sha256"]:
            raise ValueError(
                f"{path} is not what its recipe says (SHA-256 {expected['sha256']}); generate it "
                "again."
            )
        checked = "" if expected is None else ", as its recipe says"
        report(f"{path}: {source.rows} rows, {len(source.ends)} episodes{checked}")


def verify_conversion(folder: Path, report: Report = lambda line: None) -> None:
    """Hashes the rows of a converted split, and of all columns beside them, shard by shard.

    Args:
        folder (Path): the converted split, such as ``{root}/cube-single-play-v0/train``.
        report (callable, optional): called with a line for each sound group of columns.

    Raises:
        FileNotFoundError: if the folder is not a conversion.
        ValueError: naming the first file and shard that are not what was written, and the remedy.
    """
    if not is_complete(folder):
        raise FileNotFoundError(f"{folder} is not a converted dataset.")
    shards = load_metadata(folder)["shards"]
    ends = load_episode_ends(folder).numpy()
    rows = sum(shard["rows"] for shard in shards)
    episodes = sum(shard["episodes"] for shard in shards)
    if len(ends) != episodes or ends[-1] != rows - 1 or (np.diff(ends, prepend=-1) < 1).any():
        raise ValueError(
            f"{folder}: the episodes' ends are not those of its rows. {_remedy(folder)}"
        )
    for group in [folder, *sorted(path for path in folder.glob("columns/*") if is_complete(path))]:
        _verify_columns(group, load_metadata(group)["shards"], shards)
        report(f"{group}: {rows} rows, {episodes} episodes, {len(shards)} files")


def _verify_columns(folder: Path, records: list[dict], shards: list[dict]) -> None:
    columns = TensorDict.load_memmap(folder / "rows")
    first = 0
    for record, shard in zip(records, shards, strict=True):
        for key in columns.keys(True, True):
            column = columns.get(key).numpy()[first : first + shard["rows"]]
            digest = hashlib.sha256()
            for block in _blocks(column):
                digest.update(np.ascontiguousarray(block).data)
            if digest.hexdigest() != record["columns"][column_name(key)]:
                raise ValueError(
                    f"{folder}: {column_name(key)!r} is not what was made from {shard['file']} "
                    f"(rows {first} to {first + shard['rows'] - 1}). {_remedy(folder)}"
                )
        first += shard["rows"]


def _blocks(column: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(column), BLOCK_ROWS):
        yield column[start : start + BLOCK_ROWS]


def _remedy(folder: Path) -> str:
    return f"Delete {folder} and convert again."
