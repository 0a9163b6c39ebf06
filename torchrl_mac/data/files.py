"""Files that are either complete and safe on disk, or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["sha256", "sync", "write_json"]

_BLOCK = 1 << 20


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, is safe on disk.

    Args:
        path (Path): the file or folder.

    Examples:
        >>> sync(Path("."))
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    r"""Writes a JSON file, replacing an old one at once: no reader sees half a file.

    Args:
        path (Path): the file.
        value (Any): what to write.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "recipe.json"
        ...     write_json(path, {"seed": 0})
        ...     path.read_text()
        '{\n "seed": 0\n}\n'
    """
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sha256(path: Path) -> str:
    """Returns a file's SHA-256 checksum, in hexadecimal digits.

    Args:
        path (Path): the file; read in blocks, so it may be larger than the memory.

    Examples:
        >>> sha256(Path(os.devnull))[:16]
        'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
