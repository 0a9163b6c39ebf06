"""What a converted dataset says of itself, in ``metadata.json``; it is whole if that is there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from torchrl_mac.utils.files import DamagedError, read_json

__all__ = [
    "DEFAULT_ROOT",
    "FORMAT",
    "METADATA",
    "column_file",
    "converted_splits",
    "damaged",
    "digest_of",
    "is_complete",
    "load_metadata",
    "load_split",
]

DEFAULT_ROOT = Path("~/.cache/torchrl/ogbench")
"""Where conversions are kept, as those of TorchRL's own datasets."""

FORMAT = 3
"""Version of the layout on disk; one more for each change that old readers cannot read."""

METADATA = "metadata.json"

_COLUMN = re.compile(r"[a-z_]+(/[a-z_]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = ("<f4", "<i4", "<i8", "|b1")


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds finished columns."""
    return (folder / METADATA).is_file()


def column_file(folder: Path, name: str) -> Path:
    """The file of a column, such as ``"next/reward"``: its numbers, row after row, and no more."""
    return folder / "rows" / f"{name}.memmap"


def digest_of(shards: list[dict[str, Any]]) -> str:
    """The digest of a split, from the checksums of the files that it was converted from."""
    return hashlib.sha256("\n".join(shard["sha256"] for shard in shards).encode()).hexdigest()


def damaged(path: Path, problem: str, folder: Path) -> DamagedError:
    """An error that says what is wrong with a file of a conversion, and what to do."""
    return DamagedError(f"{path} is damaged: {problem}. Delete {folder} and convert again.")


def load_metadata(folder: Path) -> dict[str, Any]:
    """Reads the ``metadata.json`` of a group of columns, and checks that its parts fit together.

    Raises:
        ValueError: if a different version of the package wrote it, or it is damaged.
    """
    metadata = read_json(folder / METADATA)
    about = _Checked(folder, metadata)
    if about.found.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was converted by another version of torchrl_mac (layout "
            f"{about.found.get('format')}, expected {FORMAT}); delete it and convert again."
        )
    rows = about.count("rows")
    columns = about.of_type("columns", dict)
    about.demand(columns, "it lists no columns")
    for name, column in columns.items():
        entry = about.part(column, f"columns[{name!r}]")
        shape = entry.of_type("shape", list)
        about.demand(
            _COLUMN.fullmatch(name)
            and entry.found.get("dtype") in _DTYPES
            and all(type(size) is int and size > 0 for size in shape),
            f"there is no column {name!r} of {column}",
        )
    shards = about.shards()
    for shard in shards:
        shard.count("rows")
        hashes = shard.of_type("columns", dict)
        about.demand(
            hashes.keys() == columns.keys() and all(map(_is_sha256, hashes.values())),
            f"{shard.name} has no SHA-256 of each column",
        )
    about.total("rows", rows, shards)
    return metadata


def load_split(folder: Path) -> dict[str, Any]:
    """Reads the ``metadata.json`` of a split, as :func:`load_metadata`, and checks the rest of it.

    Raises:
        ValueError: if a different version of the package wrote it, or it is damaged.
    """
    metadata = load_metadata(folder)
    about = _Checked(folder, metadata)
    for key in ("observation", "action"):
        width, column = about.count(f"{key}_dim"), metadata["columns"].get(key, {})
        about.demand(
            column.get("shape") == [width],
            f"'{key}_dim' is {width}, but the column {key!r} is {column or 'not listed'}",
        )
    shards = about.shards()
    for shard in shards:
        shard.count("episodes")
        shard.of_type("file", str)
        shard.of_type("ranges", dict)
        shard.of_type("identity", dict)
        about.demand(_is_sha256(shard.found.get("sha256")), f"{shard.name} has no 'sha256'")
    about.total("episodes", about.count("episodes"), shards)
    digest = digest_of(metadata["shards"])
    about.demand(
        metadata.get("digest") == digest,
        f"'digest' is {metadata.get('digest')!r}, that of its shards is {digest!r}",
    )
    return metadata


class _Checked:
    """Part of a manifest, the entries of which are checked when they are asked for."""

    def __init__(self, folder: Path, found: Any, name: str = "it") -> None:
        self.folder, self.found, self.name = folder, found, name
        self.demand(isinstance(found, dict), f"{name} is {found!r:.60}, not a dictionary")

    def demand(self, condition: Any, problem: str) -> None:
        if not condition:
            raise damaged(self.folder / METADATA, problem, self.folder)

    def part(self, found: Any, name: str) -> _Checked:
        return _Checked(self.folder, found, name)

    def of_type(self, key: str, kind: type) -> Any:
        value = self.found.get(key)
        self.demand(isinstance(value, kind), f"{self.name} has {key!r} = {value!r:.60}")
        return value

    def count(self, key: str) -> int:
        value = self.found.get(key)
        self.demand(
            type(value) is int and value > 0,
            f"{self.name} has {key!r} = {value!r:.60}, which must be a whole number from 1 on",
        )
        return value

    def shards(self) -> list[_Checked]:
        parts = self.of_type("shards", list)
        return [self.part(part, f"shards[{i}]") for i, part in enumerate(parts)]

    def total(self, key: str, expected: int, shards: list[_Checked]) -> None:
        total = sum(shard.count(key) for shard in shards)
        self.demand(total == expected, f"{key!r} is {expected}, but its shards have {total}")


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def converted_splits(name: str, root: str | Path | None = None) -> list[Path]:
    """The folders of the splits of a dataset that have been converted, training first.

    Args:
        name (str): the dataset, such as ``"cube-single-play-v0"``.
        root (str or Path, optional): where conversions are kept.

    Examples:
        >>> converted_splits("cube-single-play-v0", "/nowhere")
        []
    """
    folder = Path(root or DEFAULT_ROOT).expanduser() / name
    return [folder / split for split in ("train", "val") if is_complete(folder / split)]
