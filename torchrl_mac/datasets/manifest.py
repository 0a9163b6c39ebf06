"""What a converted dataset says of itself, in ``metadata.json``; it is whole if that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchrl_mac.utils.files import read_json

__all__ = ["DEFAULT_ROOT", "FORMAT", "METADATA", "converted_splits", "is_complete", "load_metadata"]

DEFAULT_ROOT = Path("~/.cache/torchrl/ogbench")
"""Where conversions are kept, as those of TorchRL's own datasets."""

FORMAT = 2
"""Version of the layout on disk; one more for each change that old readers cannot read."""

METADATA = "metadata.json"


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds finished columns."""
    return (folder / METADATA).is_file()


def load_metadata(folder: Path) -> dict[str, Any]:
    """Reads ``metadata.json``.

    Raises:
        ValueError: if a different version of the package wrote it.
    """
    metadata = read_json(folder / METADATA)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was converted by another version of torchrl_mac (layout "
            f"{metadata.get('format')}, expected {FORMAT}); delete it and convert again."
        )
    return metadata


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
