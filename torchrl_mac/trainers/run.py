"""The output folder of a run."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock, Timeout
from torchrl._utils import logger as torchrl_logger

from torchrl_mac.utils.files import read_json, write_json

__all__ = ["RunFolder"]

_IDENTITY = "run.json"
_OTHERS = (".hydra", ".lock")  # not of the run, or of all runs


class RunFolder(contextlib.AbstractContextManager):
    """The output folder of a run, for this process alone.

    A run has an ``id`` and keeps it as long as it is resumed. What lies in the folder is never
    overwritten by another run: it is moved to ``earlier-1``, ``earlier-2`` and so on.

    Args:
        path (str or Path): the folder.

    Keyword Args:
        resume (str or Path, optional): ``"auto"`` (default) goes on with the run that is in the
            folder, if any; ``"never"`` begins a new one; a path goes on with that checkpoint.

    Raises:
        RuntimeError: when entered, if another process runs in the folder.
        FileExistsError: if the folder is not a run's and not empty.
        FileNotFoundError: if ``resume`` is a path and there is no checkpoint.

    Under ``torchrun`` the first process does this and the others wait for it.

    Examples:
        >>> import tempfile
        >>> from torchrl_mac.trainers import RunFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunFolder(folder) as run:
        ...         first = run.id
        ...     with RunFolder(folder) as run:
        ...         again = run.id
        ...     with RunFolder(folder, resume="never") as run:
        ...         new = run.id
        >>> first == again, first == new
        (True, False)
    """

    id: str

    def __init__(self, path: str | Path, *, resume: str | Path = "auto") -> None:
        self.path = Path(path).absolute()
        self.resume = resume
        self._lock = FileLock(self.path / ".lock")

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on with, if one was named."""
        return None if self.resume in ("auto", "never") else Path(self.resume)

    def __enter__(self) -> RunFolder:
        if self.checkpoint is not None and not self.checkpoint.is_dir():
            raise FileNotFoundError(
                f"resume={self.resume}: there is no such checkpoint. Name a folder such as "
                f"{self.path / 'checkpoints' / 'checkpoint-000000001000'}, or 'auto' or 'never'."
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._enter()
        if dist.is_initialized():
            dist.barrier()
        self.id = read_json(self.path / _IDENTITY)["id"]
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _enter(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RuntimeError(
                f"Another process runs in {self.path}. Wait for it, stop it, or choose another "
                "folder (hydra.run.dir=...)."
            ) from None
        known = (self.path / _IDENTITY).is_file()
        if not known and (others := self._content()):
            self._lock.release()
            raise FileExistsError(
                f"{self.path} is not a run, but has {sorted(path.name for path in others)[:5]}: "
                "choose a folder that is empty or not there (hydra.run.dir=...)."
            )
        if self.resume == "never" or not known:
            self._set_aside()
            write_json(self.path / _IDENTITY, {"id": uuid.uuid4().hex})

    def _content(self) -> list[Path]:
        """What is in the folder, but for what Hydra writes and earlier runs."""
        return [
            path
            for path in self.path.iterdir()
            if path.name not in _OTHERS and path.suffix != ".log" and path != self.checkpoint
            if not path.name.startswith("earlier-")
        ]

    def _set_aside(self) -> None:
        if not (found := self._content()):
            return
        number = 1
        while (earlier := self.path / f"earlier-{number}").exists():
            number += 1
        earlier.mkdir()
        for path in found:
            os.replace(path, earlier / path.name)
        torchrl_logger.info(f"What was in {self.path} is now in {earlier.name}")
