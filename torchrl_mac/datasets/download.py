"""Fetches OGBench's public dataset files: what arrives is checked before it stands there."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import ogbench.utils

from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.shards import scratch_folder
from torchrl_mac.datasets.verify import verify_files
from torchrl_mac.utils.files import publish, sha256

__all__ = ["download_dataset"]

_SECONDS = 60.0  # of silence, after which a server is given up


def download_dataset(
    name: str, out: str | Path, *, checksums: Mapping[str, str] | None = None
) -> list[Path]:
    """Downloads an OGBench dataset, training and validation file, from OGBench's server.

    Files that are there already are checked like those that arrive, and left alone.

    Args:
        name (str): the dataset, such as ``"cube-single-play-v0"``; the mode and task in a name
            such as ``"cube-single-play-singletask-task2-v0"`` make no difference.
        out (str or Path): the folder to write to.

    Keyword Args:
        checksums (mapping of str to str, optional): the SHA-256 of files, by their names, in
            hexadecimal digits.

    Returns:
        list of Path: the files.

    Raises:
        ValueError: if a file, there already or just arrived, is not sound or not that of the
            checksum; what has arrived is not kept then.
        ConnectionError: if the server does not deliver, or says nothing for a minute.
        OSError: if the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from torchrl_mac.datasets import download_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for end in ("", "-val"):  # they are there already
        ...         np.savez(
        ...             f"{folder}/cube-single-play-v0{end}.npz",
        ...             observations=np.zeros((7, 28), np.float32),
        ...             actions=np.zeros((7, 5), np.float32),
        ...             terminals=np.arange(7) == 6,
        ...         )
        ...     [path.name for path in download_dataset("cube-single-play-v0", folder)]
        ['cube-single-play-v0.npz', 'cube-single-play-v0-val.npz']
    """
    dataset = OGBenchName.parse(name).dataset
    paths = [Path(out).expanduser() / f"{dataset}{end}.npz" for end in ("", "-val")]
    checksums = dict(checksums or {})
    if unknown := checksums.keys() - {path.name for path in paths}:
        raise ValueError(f"checksums: {sorted(unknown)} are not files of {dataset}.")

    def check(path: Path, problem: str) -> None:
        try:
            verify_files([path])
            expected, found = checksums.get(path.name), sha256(path)
            if expected is not None and found != expected.lower():
                raise ValueError(f"its SHA-256 is {found}, not {expected}.")
        except ValueError as err:
            raise ValueError(f"{problem}: {err}") from err

    with scratch_folder(paths[0].parent, dataset) as scratch:
        for path in filter(Path.exists, paths):
            check(path, f"{path} is there but not sound, delete it to download it again")
            (scratch / path.name).symlink_to(path.absolute())  # OGBench leaves it alone
        try:
            with contextlib.redirect_stdout(sys.stderr), _silence_at_most(_SECONDS):
                ogbench.utils.download_datasets([dataset], str(scratch))
        except (URLError, HTTPException, ConnectionError, TimeoutError) as err:
            raise ConnectionError(
                f"{dataset} could not be downloaded from {ogbench.utils.DATASET_URL} ({err}). Try "
                f"again, make it with `torchrl-mac-data generate {dataset}`, or put the files in "
                f"{paths[0].parent} by hand."
            ) from err
        arrived = [scratch / path.name for path in paths if not path.exists()]
        for path in arrived:
            check(path, f"What came from {ogbench.utils.DATASET_URL}/{path.name} is not kept")
        for path in arrived:
            publish(path, paths[0].parent / path.name)
    return paths


@contextlib.contextmanager
def _silence_at_most(seconds: float) -> Iterator[None]:
    """Gives up connections on which nothing comes for so long."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
