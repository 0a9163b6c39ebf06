"""The checkpoints of a run: written in the background, the right ones kept."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import CheckpointError, CheckpointRotation

from torchrl_mac.modules import ChunkActor
from torchrl_mac.modules.export import describe_policy
from torchrl_mac.trainers.checkpoint import (
    HeldState,
    PolicyAdapter,
    SealedCheckpoint,
    is_finite,
    on_host,
)
from torchrl_mac.trainers.policies import SCORES, read_scores
from torchrl_mac.trainers.state_files import num_bytes
from torchrl_mac.utils.files import recover, write_json

__all__ = ["RunCheckpoints"]

_SPARE = 16 << 20  # bytes that a checkpoint leaves free on the disk


class RunCheckpoints:
    """A folder of checkpoints, of which the newest, and the best, are kept.

    Training waits only while its state is copied to the host; a thread writes it. A checkpoint
    that cannot be written, because the disk is full or parameters are not finite, is reported and
    takes no other with it.

    Args:
        folder (str or Path): where the checkpoints are, as ``checkpoint-000000001000``.

    Keyword Args:
        actor (ChunkActor, optional): saved in each checkpoint for
            :func:`~torchrl_mac.load_policy`.
        config (mapping, optional): the run's settings, JSON-compatible, saved in each checkpoint
            and beside the actor. Changes are listed when a run goes on with another.
        fixed (sequence of str, optional): settings that a run cannot go on without.
        keep_last (int, optional): how many of the newest to keep. Defaults to 2.
        keep_best (str, optional): the metric by whose highest value one more is kept. Defaults to
            ``"success_rate"``.
        interval_seconds (float, optional): the time between two checkpoints. Defaults to 300.
        interval (int, optional): the number of updates between two, beside that. Defaults to none.

    Raises:
        ValueError: if a number is out of range.
        TypeError: if a part of ``actor`` is of a class that cannot be described.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl_mac.trainers import RunCheckpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = RunCheckpoints(folder)
        ...     for updates in (10, 20, 30):
        ...         _ = checkpoints.save(updates, {"losses": {"weight": torch.ones(2)}})
        ...     checkpoints.close()
        ...     path, state = checkpoints.load()
        >>> path.name, state
        ('checkpoint-000000000030', {'losses': {'weight': tensor([1., 1.])}})
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        actor: ChunkActor | None = None,
        config: Mapping[str, Any] | None = None,
        fixed: Sequence[str] = (),
        keep_last: int = 2,
        keep_best: str = "success_rate",
        interval_seconds: float = 300.0,
        interval: int | None = None,
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f"interval must be at least 1 update, or None, got {interval}.")
        if interval_seconds <= 0:
            raise ValueError(f"interval_seconds must be positive, got {interval_seconds}.")
        self.folder = Path(folder).absolute()
        self.actor = actor
        if actor is not None:
            describe_policy(actor)  # or an error, before training
        self.config = dict(config or {})
        self.fixed = list(fixed)
        self.keep_best = keep_best
        self.interval_seconds = interval_seconds
        self.interval = interval
        self._rotation = _Rotation(self.folder, keep_last)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._last_time = time.monotonic()

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first, whole or not."""
        return list(self._rotation.checkpoints())

    def expect(self, updates: int) -> None:
        """Keeps the checkpoint after ``updates`` updates until :meth:`record` tells its score."""
        with self._rotation.lock:
            self._rotation.expected.add(updates)

    def best(self) -> Path | None:
        """The checkpoint that has been evaluated to be the best, if any has."""
        return self._rotation.best()

    def due(self, updates: int) -> bool:
        """Whether it is time for a checkpoint after ``updates`` updates."""
        if self.interval is not None and updates % self.interval == 0:
            return True
        idle = self._writing is None or self._writing.done()
        return idle and time.monotonic() - self._last_time >= self.interval_seconds

    def save(
        self,
        updates: int,
        state: Mapping[str, Any],
        *,
        parameters: Iterable[Tensor] = (),
        wait: bool = False,
    ) -> bool:
        """Copies ``state`` to the host and writes it in the background.

        Args:
            updates (int): the number of updates that have led to it.
            state (mapping of str to state dict): the components.

        Keyword Args:
            parameters (iterable of Tensor, optional): nothing is saved if one of them has a number
                that is not finite.
            wait (bool, optional): return when the checkpoint is safe on disk, or has failed.

        Returns:
            ``False`` if the checkpoint is known to have failed.
        """
        self.wait()
        self._last_time = time.monotonic()
        if not is_finite(list(parameters)):
            torchrl_logger.warning(
                f"No checkpoint after {updates} updates: the parameters are not finite."
            )
            return False
        copy = on_host(dict(state))
        policy = None if self.actor is None else describe_policy(self.actor, self.config)
        self._writing = self._thread.submit(self._write, updates, copy, policy)
        return self.wait() if wait else True

    def _write(self, updates: int, state: dict[str, Any], policy: Any) -> bool:
        checkpoint = SealedCheckpoint(**{name: HeldState(part) for name, part in state.items()})
        if policy is not None:
            checkpoint.register("policy", policy, adapter=PolicyAdapter())
        needed, free = num_bytes(state), shutil.disk_usage(self._existing()).free
        try:
            if free < needed + _SPARE:
                raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed, {free >> 20} are free")
            for path in self.paths():  # another run's, that went on from an older one
                if path.name > self._rotation.path(updates).name:
                    self._rotation.set_aside(path, f"Newer than the one after {updates} updates.")
            self._rotation.save(checkpoint, step=updates, metadata={"config": self.config})
        except Exception as error:
            torchrl_logger.warning(
                f"The checkpoint after {updates} updates cannot be written ({error}); training "
                f"goes on, the older ones in {self.folder} are kept."
            )
            return False
        return True

    def _existing(self) -> Path:
        """The folder, or what there is of its path."""
        return next(path for path in (self.folder, *self.folder.parents) if path.exists())

    def record(self, updates: int, metrics: Mapping[str, float]) -> None:
        """Notes what an evaluation of the parameters after ``updates`` updates has measured."""
        self.wait()
        with self._rotation.lock:
            self._rotation.expected.discard(updates)
        if self.keep_best in metrics:
            self._rotation.record(updates, metrics[self.keep_best])

    def load(self, path: str | Path | None = None) -> tuple[Path, dict[str, Any]] | None:
        """Reads a checkpoint.

        What a killed run has left unfinished is removed, and newer checkpoints, which have another
        future or are damaged, are set aside under another name.

        Args:
            path (str or Path, optional): the checkpoint. Defaults to the newest that is whole.

        Returns:
            its path and the state dicts of its components, or ``None`` if there is none.

        Raises:
            CheckpointError: if the checkpoint at ``path`` is not whole.
            ValueError: if a ``fixed`` setting has changed.
        """
        self._rotation.sweep()
        path = self._newest() if path is None else Path(path).absolute()
        if path is None:
            return None
        state = SealedCheckpoint.load_states(path)
        self._compare(SealedCheckpoint.manifest(path)["metadata"].get("config", {}))
        if path.parent == self.folder:
            for newer in self.paths():
                if newer.name > path.name:
                    self._rotation.set_aside(newer, "Newer than the one that the run goes on with.")
        return path, state

    def _newest(self) -> Path | None:
        whole = [path for path in self.paths() if self._is_whole(path)]
        if dist.is_initialized():  # the newest that all processes have
            names: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(names, [path.name for path in whole])
            whole = [path for path in whole if all(path.name in found for found in names)]
        return whole[-1] if whole else None

    def _is_whole(self, path: Path) -> bool:
        try:
            SealedCheckpoint.verify(path)
        except CheckpointError as error:
            self._rotation.set_aside(path, str(error))
            return False
        return True

    def _compare(self, before: Mapping[str, Any]) -> None:
        old, new = _flat(before), _flat(self.config)
        changed = {
            key: f"{key}: {old.get(key)} -> {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        }
        refused = [text for key, text in changed.items() if key.split(".")[0] in self.fixed]
        if refused:
            raise ValueError(
                f"The run in {self.folder.parent} cannot go on with another {', '.join(refused)}. "
                "Undo that, choose another output folder, or begin anew (resume=never)."
            )
        if changed:
            torchrl_logger.warning(f"Changed since the checkpoint: {', '.join(changed.values())}")

    def wait(self) -> bool:
        """Waits for what is being written, if anything; whether it is now safe on disk."""
        return self._writing is None or self._writing.result()

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown()


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted names."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config)
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = isinstance(value, Mapping) or (
            isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value)
        )
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


class _Rotation(CheckpointRotation):
    """Keeps the best by scores that are known only after a checkpoint was saved."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        super().__init__(directory, keep_last=keep_last)
        self._scores = self.directory / SCORES
        self.expected: set[int] = set()  # updates whose score will be known later
        self.lock = threading.RLock()  # of what two threads touch

    def checkpoints(self) -> tuple[Path, ...]:
        folders = (path for path in self.directory.glob(f"{self.prefix}-*") if path.is_dir())
        return tuple(sorted(folders))

    def path(self, step: int) -> Path:
        return self.directory / f"{self.prefix}-{step:012d}"

    def scores(self) -> dict[str, float]:
        return read_scores(self.directory)

    def best(self) -> Path | None:
        scores = self.scores()
        known = {path: scores[path.name] for path in self.checkpoints() if path.name in scores}
        return max(known, key=lambda path: (known[path], path.name)) if known else None

    def record(self, step: int, score: float) -> None:
        path = self.path(step)
        if path.is_dir():
            write_json(self._scores, {**self.scores(), path.name: score})
            self.prune()

    def prune(self) -> tuple[Path, ...]:
        with self.lock:
            kept = {self.best(), *map(self.path, self.expected)}
        removed = [path for path in self.checkpoints()[: -self.keep_last] if path not in kept]
        for path in removed:
            aside = path.with_name(f".{path.name}.removed")
            os.replace(path, aside)
            shutil.rmtree(aside, ignore_errors=True)
        if removed and self._scores.is_file():
            scores = self.scores()
            names = {path.name for path in self.checkpoints()} & scores.keys()
            write_json(self._scores, {name: scores[name] for name in sorted(names)})
        return tuple(removed)

    def sweep(self) -> None:
        """Tidies up after a run that was killed while it wrote, replaced or removed something."""
        for path in self.directory.glob(f".{self.prefix}-*.old"):
            recover(path.with_name(path.name[1 : -len(".old")]))
        for path in self.directory.glob(f".*{self.prefix}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, path: Path, reason: str) -> None:
        aside = path.with_name(f"unused-{path.name}")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"unused-{number}-{path.name}")
        torchrl_logger.warning(f"{path.name}: {reason} It is now {aside.name} and not used.")
        os.replace(path, aside)
