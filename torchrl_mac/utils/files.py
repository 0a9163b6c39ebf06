"""Files that are either complete and safe on disk, or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "SEAL",
    "DamagedError",
    "publish",
    "read_json",
    "recover",
    "replaced",
    "seal",
    "sha256",
    "sync",
    "verify",
    "write_json",
]

SEAL = "hashes.json"
_BLOCK = 1 << 20


class DamagedError(ValueError):
    """A file is not as it was when it was written."""


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


@contextlib.contextmanager
def replaced(path: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Makes a file or a folder anew beside the old one, and puts it in its place when it is whole.

    If the block fails, what it has made is removed and the old content stays. A process that is
    killed leaves the old content or the new, never a mixture: the next use, or :func:`recover`,
    tidies up after it. Only one process at a time may replace the same path.

    Args:
        path (Path): the file or folder, in a folder that exists.

    Keyword Args:
        resumable (bool, optional): keeps what an earlier block, failed or killed, has made, for
            this one to go on from. Defaults to ``False``.

    Yields:
        Path: where to make it, ``.{path.name}.partial``; nothing is there yet, unless
        ``resumable``.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "notes.txt"
        ...     for text in ("old", "new"):
        ...         with replaced(path) as aside:
        ...             _ = aside.write_text(text)
        ...     try:
        ...         with replaced(path) as aside:
        ...             _ = aside.write_text("half")
        ...             raise InterruptedError
        ...     except InterruptedError:
        ...         pass
        ...     path.read_text(), len(list(path.parent.iterdir()))
        ('new', 1)
    """
    aside = _beside(path, "partial")
    _bring_back(path)
    if not resumable:
        _remove(aside)
    try:
        yield aside
        publish(aside, path)
    except BaseException:
        if not resumable:
            _remove(aside)
        raise


def publish(made: Path, path: Path) -> None:
    """Moves a file or folder to its place, once it is safe on disk, in place of the old one.

    Args:
        made (Path): where it is, on the same disk.
        path (Path): its place. A folder that is there already stands aside for a moment; should
            the process be killed just then, :func:`recover` brings it back.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made, path = Path(folder) / "made", Path(folder) / "path"
        ...     _ = made.write_text("content")
        ...     publish(made, path)
        ...     made.exists(), path.read_text()
        (False, 'content')
    """
    for part in [*made.rglob("*"), made]:
        sync(part)
    _bring_back(path)
    old = _beside(path, "old")
    try:
        if path.is_dir():
            os.replace(path, old)
        os.replace(made, path)
    except BaseException:
        _bring_back(path)
        raise
    sync(path.parent)
    _remove(old)


def recover(path: Path) -> None:
    """Tidies up after a process that was killed while it replaced something.

    Args:
        path (Path): what was to be replaced; it is whole then, or not there if it never was.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in (".weights.old", ".weights.partial"):
        ...         (Path(folder) / name).mkdir()
        ...     recover(Path(folder) / "weights")
        ...     [path.name for path in Path(folder).iterdir()]
        ['weights']
    """
    _bring_back(path)
    _remove(_beside(path, "partial"))


def _bring_back(path: Path) -> None:
    old = _beside(path, "old")
    if not path.exists() and old.exists():
        os.replace(old, path)
    _remove(old)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    with replaced(path) as aside:
        aside.write_text(_encode(value), encoding="utf-8")


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
