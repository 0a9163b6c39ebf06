"""Files that are either complete and safe on disk, or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = [
    "SEAL",
    "DamagedError",
    "read_json",
    "seal",
    "sha256",
    "sync",
    "verify",
    "write_json",
]

SEAL = "hashes.json"
_BLOCK = 1 << 20


class DamagedError(ValueError):
    """A file of a sealed folder is not as it was."""


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
    aside.write_text(_encode(value), encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """Reads what :func:`write_json` wrote.

    Args:
        path (Path): the file.

    Raises:
        DamagedError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}.") from None


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


def seal(folder: Path) -> None:
    """Syncs all files in a folder and then lists their sizes and SHA-256 checksums in one more.

    Args:
        folder (Path): the folder. Its files must not change any more.
    """
    identities = {}
    for file in _files(folder):
        sync(file)
        identities[file.relative_to(folder).as_posix()] = _identity(file)
    for part in folder.rglob("*"):
        if part.is_dir():
            sync(part)
    write_json(folder / SEAL, identities)
    sync(folder.parent)


def verify(folder: Path) -> None:
    """Checks that a folder is as it was when it was sealed.

    Args:
        folder (Path): the folder.

    Raises:
        DamagedError: that names the first file which is missing, changed or not listed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name) / "weights"
        ...     folder.mkdir()
        ...     _ = (folder / "a.bin").write_bytes(b"12")
        ...     seal(folder)
        ...     verify(folder)
        ...     _ = (folder / "a.bin").write_bytes(b"13")
        ...     try:
        ...         verify(folder)
        ...     except DamagedError as error:
        ...         str(error).endswith("a.bin is not as it was saved.")
        True
    """
    try:
        text = (folder / SEAL).read_text(encoding="utf-8")
        listed = json.loads(text)
    except FileNotFoundError:
        raise DamagedError(f"{folder} is not whole: it has no {SEAL}, written last.") from None
    except ValueError:
        raise DamagedError(f"{folder / SEAL} is damaged.") from None
    if not isinstance(listed, dict) or _encode(listed) != text:
        raise DamagedError(f"{folder / SEAL} is damaged.")
    found = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    for name in sorted(found.keys() ^ listed.keys()):
        problem = "does not belong there" if name in found else "is missing"
        raise DamagedError(f"{folder / name} {problem}.")
    for name, file in found.items():
        if _identity(file) != listed[name]:
            raise DamagedError(f"{file} is not as it was saved.")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)


def _identity(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _encode(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
