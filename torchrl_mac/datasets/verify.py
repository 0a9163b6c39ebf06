"""Checks datasets that have been on disk for a while: files, and what they were converted to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from torchrl_mac.datasets.conversion import (
    ACTION_BOUND,
    EPISODE_ENDS,
    FLAGS,
    end_flags,
    load_episode_ends,
    open_rows,
)
from torchrl_mac.datasets.labels import open_labels, task_of
from torchrl_mac.datasets.manifest import (
    METADATA,
    column_file,
    damaged,
    is_complete,
    load_metadata,
    load_split,
)
from torchrl_mac.datasets.sources import BLOCK_ROWS, OGBenchSource
from torchrl_mac.datasets.statistics import ObservationStatistics, RunningStatistics
from torchrl_mac.datasets.tables import column_name, load_statistics
from torchrl_mac.utils.files import DamagedError, sha256

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
    """Reads a converted split, and all columns beside it, and compares all that is said of them.

    Rows are hashed shard by shard; sizes, shapes, episodes, flags, value ranges, statistics and
    the digest are worked out again; and there must be no other files.

    Args:
        folder (Path): the converted split, such as ``{root}/cube-single-play-v0/train``.
        report (callable, optional): called with a line for each sound group of columns.

    Raises:
        FileNotFoundError: if the folder is not a conversion.
        ValueError: naming the first file and shard that are not what was written, and the remedy.
    """
    if not is_complete(folder):
        raise FileNotFoundError(f"{folder} is not a converted dataset.")
    about = load_split(folder)
    _check_names(folder, about)
    labels = _labels(folder)
    _check_files(folder, about, {METADATA, EPISODE_ENDS}, {"columns"} if labels else set())
    ends = load_episode_ends(folder).numpy()
    _check_shards(folder, about, ends)
    groups = {folder: open_rows(folder)}
    for label in labels:
        group = folder / "columns" / label
        _check_files(group, load_metadata(group), {METADATA})
        groups[group] = open_labels(folder, label)
    for group, columns in groups.items():
        _Group(group, columns, about["shards"], ends).verify()
        report(
            f"{group}: {about['rows']} rows, {about['episodes']} episodes, "
            f"{len(about['shards'])} files"
        )


def _check_names(folder: Path, about: dict[str, Any]) -> None:
    for key, expected in (("split", folder.name), ("dataset", folder.parent.name)):
        if about.get(key) != expected:
            raise damaged(
                folder / METADATA, f"{key!r} is {about.get(key)!r}, its folder {expected!r}", folder
            )
    for split in ("train", "val"):
        other = folder.parent / split
        if is_complete(other):
            for key in ("observation_dim", "action_dim"):
                if (found := load_split(other)[key]) != about[key]:
                    raise ValueError(
                        f"{key!r} is {about[key]} in {folder} but {found} in {other}: they are not "
                        "of the same environment. Delete them and convert again."
                    )


def _labels(folder: Path) -> list[str]:
    """The groups of columns beside the rows; hidden files there are locks and unfinished ones."""
    groups = sorted(path for path in folder.glob("columns/*") if not path.name.startswith("."))
    for group in groups:
        if not is_complete(group):
            raise damaged(group, f"it has no {METADATA}", group)
    return [group.name for group in groups]


def _check_files(
    folder: Path, about: dict[str, Any], names: set[str], more: set[str] | None = None
) -> None:
    """Looks for files that the manifest does not speak of."""
    known = {folder / name for name in names}
    known |= {column_file(folder, name) for name in about["columns"]}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts[0] in (more or ())
        if not inside and path not in known and (not path.is_dir() or path.is_symlink()):
            raise ValueError(f"{path} does not belong there; move it away.")


def _check_shards(folder: Path, about: dict[str, Any], ends: np.ndarray) -> None:
    """Each shard must end with an episode, and hold as many as it says."""
    rows = np.cumsum([shard["rows"] for shard in about["shards"]])
    episodes = np.cumsum([shard["episodes"] for shard in about["shards"]])
    for shard, last, number in zip(about["shards"], rows - 1, episodes - 1, strict=True):
        if ends[number] != last:
            raise damaged(
                folder / EPISODE_ENDS,
                f"the episodes' ends are not those of {shard['file']}, whose last row is {last}",
                folder,
            )


class _Group:
    """The columns in one folder: a split's rows, or those of a label beside them."""

    def __init__(
        self, folder: Path, columns: TensorDictBase, shards: list[dict], ends: np.ndarray
    ) -> None:
        self.folder, self.shards, self.ends = folder, shards, ends
        self.about = load_metadata(folder)
        self.columns = {column_name(key): value.numpy() for key, value in columns.items(True, True)}
        self.measured = next((key for key in ("observation", "oracle_rep") if key in columns), None)
        self.is_task = "observation" not in columns and "next/done" in self.columns

    def verify(self) -> None:
        records = self.about["shards"]
        if [record["rows"] for record in records] != [shard["rows"] for shard in self.shards]:
            raise self._damaged(METADATA, "its files have not as many rows as those of the rows")
        running, solved, first = RunningStatistics(), 0, 0
        for record, shard in zip(records, self.shards, strict=True):
            span = range(first, first + shard["rows"])
            where = f"{shard['file']} (rows {first} to {span[-1]})"
            for name, column in self.columns.items():
                self._check_column(name, column, span, record, where, running)
            if "next/done" in self.columns:
                count = self._check_flags(span, where)
                if self.is_task and record.get("solved_rows") != count:
                    raise self._damaged(METADATA, f"'solved_rows' of {where} must be {count}")
                solved += count
            first = span.stop
        if self.is_task:
            task_of(self.folder)
            if self.about.get("solved_rows") != solved:
                raise self._damaged(METADATA, f"'solved_rows' must be {solved}")
        if self.measured is not None:
            self._check_statistics(self.measured, running)

    def _check_column(
        self,
        name: str,
        column: np.ndarray,
        span: range,
        record: dict[str, Any],
        where: str,
        running: RunningStatistics,
    ) -> None:
        digest, wrong, low, high = hashlib.sha256(), "", np.inf, -np.inf
        for start in range(span.start, span.stop, BLOCK_ROWS):
            block = column[start : min(start + BLOCK_ROWS, span.stop)]
            digest.update(np.ascontiguousarray(block).data)
            low, high = min(low, block.min()), max(high, block.max())
            if not self._is_sound(name, start, block):
                wrong = f"{name!r} has values that cannot be in {where}"
            elif name == self.measured:
                running.update(block)
        file = f"rows/{name}.memmap"
        if digest.hexdigest() != record["columns"][name]:
            raise self._damaged(file, f"{name!r} is not what was made from {where}")
        if wrong:
            raise self._damaged(file, wrong)
        if name in ("observation", "action"):
            stated = record["ranges"].get(name)
            bound = np.float32(ACTION_BOUND if name == "action" else np.inf)
            if not _is_range(stated) or not np.array_equal(
                np.asarray(stated, np.float32).clip(-bound, bound),
                np.asarray([low, high], np.float32),
            ):
                raise self._damaged(
                    METADATA, f"the range of {name!r} is {stated}, in {where} {[low, high]}"
                )

    def _is_sound(self, name: str, start: int, block: np.ndarray) -> bool:
        if name == "episode":
            rows = np.arange(start, start + len(block))
            return np.array_equal(block, np.searchsorted(self.ends, rows))
        if block.dtype.kind == "b":
            return bool(block.view(np.uint8).max() <= 1)
        if name == "action" and np.abs(block).max() > np.float32(ACTION_BOUND):
            return False
        return block.dtype.kind != "f" or bool(np.isfinite(block).all())

    def _check_flags(self, span: range, where: str) -> int:
        """Compares the ends with the episodes'; returns how many rows are terminated."""
        part = slice(span.start, span.stop)
        boundary = np.zeros((len(span), 1), dtype=bool)
        boundary[self.ends[(self.ends >= span.start) & (self.ends < span.stop)] - span.start] = True
        terminated = self.columns["next/terminated"][part]
        for name, expected in zip(FLAGS, end_flags(boundary, terminated), strict=True):
            if not np.array_equal(self.columns[f"next/{name}"][part], expected):
                raise self._damaged(
                    f"rows/next/{name}.memmap", f"it does not fit the episodes' ends in {where}"
                )
        return int(terminated.sum())

    def _check_statistics(self, key: str, running: RunningStatistics) -> None:
        stated = load_statistics(self.folder, self.about["columns"][key])
        found = ObservationStatistics.from_running([running.to_dict()])
        slack = 1e-5 * torch.maximum(found.min.abs(), found.max.abs())
        for name, value in vars(found).items():
            off = (getattr(stated, name) - value).abs()
            # sums may be rounded in another order
            if (off > (slack if name in ("mean", "std") else 0)).any():
                raise self._damaged(METADATA, f"the statistics' {name!r} is not that of {key!r}")

    def _damaged(self, file: str, problem: str) -> DamagedError:
        return damaged(self.folder / file, problem, self.folder)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) in (int, float) for number in value)
    )
