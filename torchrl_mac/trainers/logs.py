"""Logs that know only what has happened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.record import CSVLogger
from torchrl.record.loggers import Logger

__all__ = ["rewind"]


def rewind(logger: Logger, state: Mapping[str, Any] | None = None) -> None:
    """Takes a logger back to the state that its ``state_dict()`` returned.

    The files of a :class:`~torchrl.record.CSVLogger` lose the rows that were written after it, and
    get back those that were lost with the machine. Other loggers restore what they can:
    Weights & Biases goes on with the same run and ignores steps that it has already.

    Args:
        logger (Logger): a TorchRL logger.
        state (mapping, optional): its state. Defaults to that of a logger that has logged nothing.
    """
    if state is not None:
        logger.load_state_dict(state)
    if isinstance(logger, CSVLogger):
        _rewrite(logger)


def _rewrite(logger: CSVLogger) -> None:
    experiment = logger.experiment
    while experiment.files:
        experiment.files.popitem()[1].close()
    folder = Path(experiment.log_dir) / "scalars"
    expected = {
        folder / f"{name}.csv": "".join(f"{step},{value}\n" for step, value in points)
        for name, points in experiment.scalars.items()
    }
    for path in folder.rglob("*.csv"):
        if path not in expected:
            path.unlink()
    for path, text in expected.items():
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text(text)
            os.replace(aside, path)
