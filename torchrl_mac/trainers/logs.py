"""Logs that know only what has happened."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.record import CSVLogger
from torchrl.record.loggers import Logger

from torchrl_mac.utils.files import replaced

__all__ = ["JSONLinesLogger", "Logs", "means", "rewind"]


class JSONLinesLogger(Logger):
    r"""Writes what is logged together as one line of JSON: ``{"step": 500, "train/loss": 0.1}``.

    Values that are not finite, which JSON does not have, are written as ``null``.

    Args:
        exp_name (str): the folder's name in ``log_dir``; it gets ``metrics.jsonl``.
        log_dir (str): the folder of the run.

    Examples:
        >>> import tempfile
        >>> from torchrl_mac.trainers import JSONLinesLogger
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = JSONLinesLogger("logs", folder)
        ...     _ = logger.log_metrics({"train/loss": 0.1, "train/norm": 2.0}, step=500)
        ...     logger.close()
        ...     open(f"{folder}/logs/metrics.jsonl").read()
        '{"step": 500, "train/loss": 0.1, "train/norm": 2.0}\n'
    """

    experiment: TextIO

    def _create_experiment(self) -> TextIO:
        self.path = Path(self.log_dir) / self.exp_name / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", encoding="utf-8")

    def _write(self, row: Mapping[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self.experiment.write(json.dumps(finite) + "\n")
        self.experiment.flush()

    def log_metrics(
        self, metrics: Any, step: int | None = None, *, keys_sep: str = "/"
    ) -> dict[str, Any]:
        """Writes one line."""
        values = {
            keys_sep.join(key) if isinstance(key, tuple) else key: float(value)
            for key, value in metrics.items()
        }
        self._write({"step": step, **values})
        return values

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Writes a line with one value."""
        self._write({"step": step, name: float(value)})

    def log_video(self, name: str, video: Tensor, step: int | None = None, **kwargs: Any) -> None:
        """Is not supported."""
        raise NotImplementedError("Videos are not lines of JSON.")

    def log_histogram(self, name: str, data: Any, **kwargs: Any) -> None:
        """Is not supported."""
        raise NotImplementedError("Histograms are not lines of JSON.")

    def log_hparams(self, cfg: Any) -> None:
        """Does nothing: a line has metrics of one step."""

    def _checkpoint_state(self) -> dict[str, Any]:
        os.fsync(self.experiment.fileno())
        return {"bytes": self.experiment.tell()}

    def _load_checkpoint_state(self, state_dict: Mapping[str, Any]) -> None:
        # another run's file, which this one goes on from, has lines that this one has not
        size = os.fstat(self.experiment.fileno()).st_size
        self.experiment.truncate(min(state_dict.get("bytes", 0), size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class Logs:
    """Several loggers, which can be taken back together to what they were.

    Args:
        loggers (sequence of Logger): TorchRL loggers.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values with all loggers."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=step)

    def state_dict(self) -> list[list[Any]]:
        """The class and state of each."""
        return [[type(logger).__name__, logger.state_dict()] for logger in self.loggers]

    def load_state_dict(self, state_dict: Sequence[Sequence[Any]]) -> None:
        """Takes each logger back to the state of one of its class; others begin anew."""
        states: dict[str, list[Any]] = {}
        for kind, state in state_dict:
            states.setdefault(kind, []).append(state)
        for logger in self.loggers:
            known = states.get(type(logger).__name__)
            rewind(logger, known.pop(0) if known else None)


def means(metrics: TensorDictBase) -> dict[str, float]:
    """Metrics as numbers; of those that are not averaged over the batch, their mean."""
    return {key: value.float().mean().item() for key, value in metrics.items()}


def rewind(logger: Logger, state: Mapping[str, Any] | None = None) -> None:
    """Takes a logger back to the state that its ``state_dict()`` returned.

    The files of a :class:`~torchrl.record.CSVLogger` lose the rows that were written after it, and
    get back those that were lost with the machine; that of a :class:`JSONLinesLogger` loses its
    last lines. Other loggers restore what they can: Weights & Biases goes on with the same run and
    ignores steps that it has already.

    Args:
        logger (Logger): a TorchRL logger.
        state (mapping, optional): its state. Defaults to that of a logger that has logged nothing.
    """
    if state is not None:
        logger.load_state_dict(state)
    elif isinstance(logger, JSONLinesLogger):
        logger.load_state_dict({})
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
            with replaced(path) as aside:
                aside.write_text(text)
