"""Fetches OGBench's public dataset files: resumed, checked, and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock
from torchrl._utils import logger
from tqdm import tqdm

from torchrl_mac.data.files import sha256, sync
from torchrl_mac.data.names import OGBenchName

__all__ = ["download_dataset"]

_MIRRORS = ("https://rail.eecs.berkeley.edu/datasets/ogbench",)
_BACKOFF = 1.0  # seconds before the second try, twice as many before each further one
_BLOCK = 1 << 16
_MAX_SUMS = 1 << 24
_HANDLERS = (  # those of urllib.request.build_opener that speak http and https
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)


def download_dataset(
    name: str,
    out: str | Path,
    *,
    files: Iterable[str] | None = None,
    mirrors: Iterable[str] | None = None,
    checksums: Mapping[str, str] | None = None,
    retries: int = 3,
    timeout: float = 30.0,
    progress: bool = True,
) -> list[Path]:
    """Downloads an OGBench dataset, training and validation files, from its public mirror.

    A file appears under its name when it is complete, has the right checksum and is a sound npz
    archive; files already there are left alone. What an interrupted download has fetched stays in
    the hidden file ``.{file}.part``, and the next call continues it if the mirror still has the
    same file. Processes that want the same file take turns.

    Args:
        name (str): the dataset, such as ``"cube-single-play-v0"``; the mode and task in a name
            such as ``"cube-single-play-singletask-task2-v0"`` make no difference.
        out (str or Path): the folder to write to.

    Keyword Args:
        files (iterable of str, optional): the files' names, for a dataset in several parts.
            Default: ``{dataset}.npz`` and ``{dataset}-val.npz``.
        mirrors (iterable of str, optional): http(s) addresses of folders with the files, the
            first one that works is used. Default: the environment variable ``OGBENCH_MIRRORS``,
            separated by commas, or OGBench's own server.
        checksums (mapping of str to str, optional): the SHA-256 of files, in hexadecimal. Default:
            what the mirror has in ``SHA256SUMS``, if anything.
        retries (int, optional): tries per mirror after a first one that fails. Defaults to 3.
        timeout (float, optional): seconds without a byte after which a try has failed. Defaults
            to 30.
        progress (bool, optional): shows progress bars on stderr. Defaults to ``True``.

    Returns:
        list of Path: the files.

    Raises:
        ValueError: if an argument makes no sense, or a file already there does not have the given
            checksum.
        ConnectionError: if no mirror delivers a sound file.
        OSError: if the folder cannot be written or the disk is too small.

    Examples:
        >>> import functools, http.server, tempfile, threading
        >>> import numpy as np
        >>> from torchrl_mac.data.download import download_dataset
        >>> with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{source}/cube-single-play-v0-000.npz", actions=np.zeros((7, 5)))
        ...     handler = functools.partial(
        ...         http.server.SimpleHTTPRequestHandler, directory=source
        ...     )
        ...     with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        ...         threading.Thread(target=server.serve_forever).start()
        ...         paths = download_dataset(
        ...             "cube-single-play-v0",
        ...             folder,
        ...             files=["cube-single-play-v0-000.npz"],
        ...             mirrors=[f"http://127.0.0.1:{server.server_port}"],
        ...             progress=False,
        ...         )
        ...         server.shutdown()
        ...     [(path.name, np.load(path)["actions"].shape) for path in paths]
        [('cube-single-play-v0-000.npz', (7, 5))]
    """
    dataset = OGBenchName.parse(name).dataset
    files = [f"{dataset}.npz", f"{dataset}-val.npz"] if files is None else dict.fromkeys(files)
    if mirrors is None:
        named = os.environ.get("OGBENCH_MIRRORS", "").split(",")
        mirrors = [mirror.strip() for mirror in named if mirror.strip()] or _MIRRORS
    mirrors = [mirror.rstrip("/") for mirror in mirrors]
    checksums = {file: checksum.lower() for file, checksum in (checksums or {}).items()}
    out = Path(out).expanduser()
    _check_arguments(files, mirrors, checksums)
    if retries < 0 or timeout <= 0:
        raise ValueError(f"{retries=} must not be negative and {timeout=} must be positive.")
    targets = [out / file for file in files]
    for target in targets:
        for path in (target, *(_hidden(target, end) for end in ("part", "part.json", "lock"))):
            if path.is_symlink():
                raise ValueError(f"{path} is a link; delete it or choose another folder.")
    for target in targets:
        checksum = checksums.get(target.name)
        if _is_there(target, checksum):
            continue
        try:
            out.mkdir(parents=True, exist_ok=True)
            with FileLock(_hidden(target, "lock")):
                if not _is_there(target, checksum):  # another process may have fetched it
                    _download(target, mirrors, checksum, retries, timeout, progress)
        except _Failure as err:
            raise ConnectionError(
                f"{target.name} could not be downloaded:\n{err}\nPass other mirrors= (--mirror), "
                f"make the dataset with `torchrl-mac-data generate {dataset}`, or put the file at "
                f"{target} by hand. Calling again continues what has arrived."
            ) from err
        except OSError as err:
            raise OSError(
                err.errno,
                f"Cannot write {target} ({err.strerror or err}); free some space or choose "
                "another folder",
            ) from err
    return targets


def _check_arguments(files: Iterable[str], mirrors: list[str], checksums: dict[str, str]) -> None:
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.npz", file):
            raise ValueError(f"files: {file!r} is not the plain name of an npz file.")
    for mirror in mirrors:
        if not re.fullmatch(r"https?://[!-~]+", mirror):
            raise ValueError(f"mirrors: {mirror!r} is not an address http://... or https://...")
    if not mirrors:
        raise ValueError("mirrors is empty; pass the address of a folder with the files.")
    for file, checksum in checksums.items():
        if not re.fullmatch("[0-9a-f]{64}", checksum):
            raise ValueError(f"checksums: {checksum!r} of {file} is not a SHA-256, 64 hex digits.")


class _Failure(Exception):
    """A try, a mirror or all mirrors did not deliver the file."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether another try would end the same way."""
        return 400 <= self.status < 500 and self.status not in (408, 416, 425, 429)


def _hidden(target: Path, end: str) -> Path:
    return target.with_name(f".{target.name}.{end}")


def _is_there(target: Path, checksum: str | None) -> bool:
    if not target.is_file():
        return False
    if checksum and sha256(target) != checksum:
        raise ValueError(
            f"{target} does not have the SHA-256 {checksum}; delete it to download it again, or "
            "correct checksums=."
        )
    return True


def _download(
    target: Path,
    mirrors: list[str],
    checksum: str | None,
    retries: int,
    timeout: float,
    progress: bool,
) -> None:
    failures = []
    for mirror in mirrors:
        url = f"{mirror}/{target.name}"
        logger.info(f"Downloading {url} to {target}")
        reasons: dict[str, None] = {}
        for wait in (0, *(_BACKOFF * 2**i for i in range(retries))):
            time.sleep(wait)
            try:
                _receive(url, target, timeout, progress)
                _verify(target, checksum or _published_checksum(mirror, target.name, timeout))
                return _publish(target)
            except _Failure as err:
                logger.warning(f"{url}: {err}")
                reasons[str(err)] = None
                if err.is_final:
                    break
        failures.append(f"  {url}: {'; '.join(reasons)}")
    raise _Failure("\n".join(failures))


def _receive(url: str, target: Path, timeout: float, progress: bool) -> None:
    """Fetches what the partial file lacks, all of it unless that is a part of this very file."""
    part = _hidden(target, "part")
    offset, validator, length = _resumable(target, url)
    if offset and offset == length:
        return
    headers = {"Range": f"bytes={offset}-", "If-Range": validator} if offset else {}
    try:
        response = _open(url, timeout, headers)
    except _Failure as err:
        if err.status == 416:
            part.unlink(missing_ok=True)
        raise
    with response:
        if response.status == 200:
            offset, length = 0, response.length
        elif not _continues(response, offset, validator, length):
            part.unlink(missing_ok=True)
            raise _Failure(f"HTTP {response.status} with other bytes than asked for")
        here = part.stat().st_size if part.exists() else 0
        needed, free = (length or 0) - here, shutil.disk_usage(target.parent).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free",
            )
        if not offset:
            part.unlink(missing_ok=True)
            origin = {"url": url, "validator": _validator(response), "length": length}
            _hidden(target, "part.json").write_text(json.dumps(origin), encoding="utf-8")
        with part.open("ab") as file, _progress_bar(target, offset, length, progress) as bar:
            for block in _blocks(response):
                file.write(block)
                bar.update(len(block))
    size = part.stat().st_size
    if length is not None and size != length:
        raise _Failure(f"the connection was closed after {size} of {length} bytes")


def _resumable(target: Path, url: str) -> tuple[int, str, int | None]:
    """How many bytes of ``url`` are here, and the validator and length it had then."""
    try:
        origin = json.loads(_hidden(target, "part.json").read_text(encoding="utf-8"))
        size, length = _hidden(target, "part").stat().st_size, origin["length"]
        if origin["url"] == url and origin["validator"] and (length is None or size <= length):
            return size, origin["validator"], length
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        pass  # no partial file, or killed before its origin was written
    return 0, "", None


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What tells this version of a file from others; a weak ETag does not (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _continues(
    response: http.client.HTTPResponse, offset: int, validator: str, length: int | None
) -> bool:
    content = re.fullmatch(
        r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    return bool(
        response.status == 206
        and offset
        and content
        and int(content[1]) == offset
        and (length is None or content[2] in ("*", str(length)))
        and _validator(response) in (None, validator)
    )


def _open(url: str, timeout: float, headers: dict[str, str]) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    with _network():
        request = urllib.request.Request(url, headers={"User-Agent": "torchrl_mac", **headers})
        return opener.open(request, timeout=timeout)


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with _network():
        while block := response.read1(_BLOCK):  # what has come, so that none of it is lost
            yield block


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Tells errors of the network from those of the disk."""
    try:
        yield
    except urllib.error.HTTPError as err:
        with err:
            raise _Failure(f"HTTP {err.code} {err.reason}", err.code) from err
    except (OSError, http.client.HTTPException, ValueError) as err:
        reason = err.reason if isinstance(err, urllib.error.URLError) else err
        raise _Failure(str(reason) or type(reason).__name__) from err


def _published_checksum(mirror: str, file: str, timeout: float) -> str | None:
    try:
        with _open(f"{mirror}/SHA256SUMS", timeout, {}) as response, _network():
            text = response.read(_MAX_SUMS).decode(errors="replace")
            if response.length:  # of the bytes still to come
                raise ConnectionError("cut short")
    except _Failure as err:
        if err.is_final:
            return None
        raise _Failure(f"SHA256SUMS: {err}") from err
    line = re.search(rf"^([0-9a-fA-F]{{64}}) [ *](?:\./)?{re.escape(file)}\r?$", text, re.M)
    return line[1].lower() if line else None


def _verify(target: Path, checksum: str | None) -> None:
    """Deletes the partial file if it is damaged."""
    part = _hidden(target, "part")
    try:
        if checksum and (found := sha256(part)) != checksum:
            raise ValueError(f"its SHA-256 is {found} instead of {checksum}")
        with zipfile.ZipFile(part) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged!r} in it is damaged")
    except Exception as err:  # zipfile and zlib have many kinds for bytes that make no sense
        part.unlink()
        raise _Failure(f"the file is damaged: {err}") from err


def _publish(target: Path) -> None:
    part = _hidden(target, "part")
    sync(part)
    _hidden(target, "part.json").unlink(missing_ok=True)
    os.replace(part, target)
    sync(target.parent)


def _progress_bar(target: Path, initial: int, total: int | None, progress: bool) -> tqdm:
    return tqdm(
        desc=target.name,
        initial=initial,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
