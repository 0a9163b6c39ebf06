"""Memory-mapped columns, written shard by shard: checked, resumable, and all or nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tensordict.utils import NestedKey
from tqdm import tqdm

from torchrl_mac.datasets.manifest import FORMAT, METADATA, column_file, is_complete
from torchrl_mac.datasets.tables import Schema, column_name, described
from torchrl_mac.utils.files import DamagedError, read_json, replaced, write_json

__all__ = ["ColumnWriter", "Part", "write_columns"]


@dataclass(frozen=True)
class Part:
    """A shard's share of the columns.

    Args:
        name (str): what to call it in messages.
        identity (dict): changes with what the rows are made from; can be written as JSON.
        rows (int): the number of rows.
    """

    name: str
    identity: dict[str, Any]
    rows: int


class ColumnWriter:
    """Writes one part's rows, column by column, each from first to last.

    Rows are written, not assigned through the map: a full disk is then an error, not a signal
    that ends the process.
    """

    def __init__(
        self,
        paths: dict[NestedKey, Path],
        first: int,
        rows: int,
        on_write: Callable[[NestedKey, int], None],
    ) -> None:
        self._files = {key: path.open("r+b") for key, path in paths.items()}
        self._first, self._rows, self._on_write = first, rows, on_write
        self._written = dict.fromkeys(paths, 0)
        self._hashes = {key: hashlib.sha256() for key in paths}

    def write(self, key: NestedKey, block: np.ndarray) -> None:
        """Appends rows to a column."""
        data = np.ascontiguousarray(block)
        file = self._files[key]
        if self._written[key] == 0 and len(data):
            file.seek(self._first * (data.nbytes // len(data)))
        file.write(data.data)
        self._hashes[key].update(data.data)
        self._written[key] += len(data)
        self._on_write(key, len(data))

    def finish(self) -> dict[str, str]:
        """Brings the rows to the disk and returns the SHA-256 of each column's."""
        for key, written in self._written.items():
            if written != self._rows:
                raise ValueError(f"{key!r} has {written} rows; the others have {self._rows}.")
            self._files[key].flush()
            os.fsync(self._files[key].fileno())
        return {column_name(key): digest.hexdigest() for key, digest in self._hashes.items()}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def write_columns(
    folder: Path,
    parts: list[Part],
    schema: Schema,
    fill: Callable[[int, ColumnWriter], dict[str, Any]],
    finish: Callable[[Path, list[dict[str, Any]]], dict[str, Any]],
    *,
    workers: int = 1,
    progress: bool | None = None,
) -> None:
    """Makes ``folder/rows``, a file for each column, and ``folder/metadata.json``.

    Everything is written to the sibling ``.{folder.name}.partial``, which is renamed at the end:
    a reader never sees half a folder. A part that is finished stays there if a later one fails
    or the process is killed, and the next call goes on from it. A lock file makes concurrent
    processes wait for the one that is writing.

    Args:
        folder (Path): what to make, unless it is complete already.
        parts (list of Part): the shards, in order.
        schema (dict): the columns.
        fill (callable): writes the part of a number with a :class:`ColumnWriter` and returns a
            record of it, for JSON. Several are called at once, in threads.
        finish (callable): given the temporary folder and all records, returns the metadata.

    Keyword Args:
        workers (int, optional): threads. Defaults to 1.
        progress (bool, optional): shows a progress bar. Default: on a terminal.

    Raises:
        OSError: if the folder cannot be written, or the disk cannot hold the columns.
        FileExistsError: if ``folder`` exists but was not made by this function.
    """
    if is_complete(folder):
        return
    with _locked(folder):
        if is_complete(folder):
            return
        if folder.exists():
            raise FileExistsError(
                f"{folder} exists but is not a converted dataset; move it away or pass another "
                "root=."
            )
        rows = sum(part.rows for part in parts)
        with replaced(folder, resumable=True) as partial:
            try:
                paths = _prepare(partial, parts, schema)
                records = _fill(partial, paths, parts, fill, workers, progress)
                metadata = {
                    "format": FORMAT,
                    "rows": rows,
                    "columns": described(schema),
                    **finish(partial, records),
                }
                (partial / "plan.json").unlink()
                shutil.rmtree(partial / "parts")
                write_json(partial / METADATA, metadata)
            except BaseException as err:
                if not any((partial / "parts").glob("*.json")):
                    shutil.rmtree(partial, ignore_errors=True)  # there is nothing to go on from
                if isinstance(err, OSError) and err.errno == errno.ENOSPC:
                    raise _disk_full(folder, _row_size(schema) * rows) from err
                raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
        except OSError as err:
            raise OSError(
                err.errno, f"Cannot write to {folder.parent} ({err.strerror}); pass another root=."
            ) from err
        yield


def _prepare(partial: Path, parts: list[Part], schema: Schema) -> dict[NestedKey, Path]:
    """Makes room for the columns, or finds what an earlier call has left."""
    rows = [part.rows for part in parts]
    plan = {"format": FORMAT, "rows": rows, "columns": described(schema)}
    paths = {key: column_file(partial, column_name(key)) for key in schema}
    sizes = {key: _row_size({key: schema[key]}) * sum(rows) for key in schema}
    goes_on = _found(partial / "plan.json") == plan and all(
        path.is_file() and path.stat().st_size == sizes[key] for key, path in paths.items()
    )
    if goes_on:
        allocated = sum(path.stat().st_blocks * 512 for path in paths.values())
    else:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "parts").mkdir(parents=True)
        allocated = 0
    needed = sum(sizes.values()) - allocated
    if shutil.disk_usage(partial).free < needed:
        raise _disk_full(partial, needed)
    if not goes_on:
        for key, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(sizes[key])
        write_json(partial / "plan.json", plan)
    return paths


def _fill(
    partial: Path,
    paths: dict[NestedKey, Path],
    parts: list[Part],
    fill: Callable[[int, ColumnWriter], dict[str, Any]],
    workers: int,
    progress: bool | None,
) -> list[dict[str, Any]]:
    """Fills the parts that are not yet filled and returns the records of all."""
    first = np.cumsum([0, *(part.rows for part in parts)])
    saved = [partial / "parts" / f"{i:06}.json" for i in range(len(parts))]
    records: dict[int, dict[str, Any]] = {}
    for i, part in enumerate(parts):
        found = _found(saved[i])
        if isinstance(found, dict) and found.get("identity") == part.identity:
            records[i] = found["record"]
    longest = next(iter(paths))  # its rows are those the progress bar counts
    stop = threading.Event()
    bar = tqdm(
        desc=f"Converting to {partial.parent.name}",
        total=int(first[-1]),
        initial=sum(parts[i].rows for i in records),
        unit="row",
        unit_scale=True,
        disable=None if progress is None else not progress,
    )

    def on_write(key: NestedKey, rows: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")
        if key == longest:
            bar.update(rows)

    def run(i: int) -> dict[str, Any]:
        writer = ColumnWriter(paths, int(first[i]), parts[i].rows, on_write)
        try:
            record = fill(i, writer)
            return {"rows": parts[i].rows, **record, "columns": writer.finish()}
        finally:
            writer.close()

    with bar, ThreadPoolExecutor(workers) as executor:
        futures: dict[Future, int] = {}
        try:
            for i in range(len(parts)):
                if i not in records:
                    futures[executor.submit(run, i)] = i
            for future in as_completed(futures):
                i = futures[future]
                records[i] = future.result()
                write_json(saved[i], {"identity": parts[i].identity, "record": records[i]})
                bar.set_postfix_str(f"{len(records)}/{len(parts)} files", refresh=False)
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)
            raise
    return [records[i] for i in range(len(parts))]


def _row_size(schema: Schema) -> int:
    return sum(
        np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        for dtype, shape in schema.values()
    )


def _disk_full(folder: Path, needed: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"The disk of {folder.parent} is full: {needed / 2**20:.0f} MiB are needed. "
        "Free some space or pass another root=.",
    )


def _found(path: Path) -> Any:
    """What an earlier call has saved, if it has."""
    try:
        return read_json(path)
    except (FileNotFoundError, DamagedError):
        return None
