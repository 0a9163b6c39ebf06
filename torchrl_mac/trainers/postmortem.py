"""What was not finite, and all that it takes to see it again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule

from torchrl_mac.data import ActionChunkSampler
from torchrl_mac.trainers.checkpoint import HeldState, SealedCheckpoint, on_host

__all__ = ["NonFiniteError", "diagnose", "give_up"]


class NonFiniteError(FloatingPointError):
    """Training cannot go on: losses or gradients are not finite, update after update."""


def give_up(
    losses: Sequence[LossModule],
    buffer: ReplayBuffer,
    batch: TensorDictBase,
    state: Mapping[str, Any],
    folder: Path | None,
) -> NoReturn:
    """Ends training with a diagnosis and all that it takes to repeat the last update.

    Args:
        losses (sequence of LossModule): the objectives of the update.
        buffer (ReplayBuffer): where its batch is from.
        batch (TensorDictBase): its batch ``[B]``.
        state (mapping): the trainer's state.
        folder (Path, optional): where ``nonfinite-...`` is written, a checkpoint with ``batch`` as
            one more component and the diagnosis in its manifest. Defaults to nowhere.

    Raises:
        NonFiniteError: always.
    """
    found = diagnose(losses, batch)
    parts = (*found["inputs"].values(), *found["losses"].values())
    rows = sorted({row for part in parts for row in part})
    drawn = _drawn(buffer, len(batch))
    if drawn is not None:
        found["dataset_rows"] = {row: drawn[row] for row in rows}
    updates = state["progress"]["updates"]
    message = f"Losses or gradients are not finite, update after update, the last one {updates}. "
    message += " ".join(f"{part}: {_short(of)}." for part, of in found.items() if of)
    if folder is not None:
        path = folder / f"nonfinite-{updates:012d}"
        copies = {**on_host(dict(state)), "batch": on_host(batch.to_dict())}
        try:
            checkpoint = SealedCheckpoint(**{name: HeldState(of) for name, of in copies.items()})
            checkpoint.save(path, metadata=found)
            message += f" The batch and the state are in {path}."
        except (OSError, RuntimeError) as error:
            message += f" The batch and the state could not be written: {error}."
    raise NonFiniteError(message)


def diagnose(losses: Sequence[LossModule], batch: TensorDictBase) -> dict[str, Any]:
    """Which inputs, parameters and loss terms are not finite.

    Args:
        losses (sequence of LossModule): the objectives.
        batch (TensorDictBase): the batch ``[B]`` of the update.

    Returns:
        ``"inputs"`` and ``"losses"`` map names to the rows of the batch that are not finite,
        ``"parameters"`` lists names.
    """
    found: dict[str, Any] = {"inputs": {}, "losses": {}, "parameters": []}
    for key, value in batch.items(True, True):
        if value.is_floating_point() and (rows := _rows(value)):
            found["inputs"]["/".join(key) if isinstance(key, tuple) else key] = rows
    for loss in losses:
        found["parameters"] += [
            f"{type(loss).__name__}.{name}"
            for name, value in loss.named_parameters()
            if not value.detach().isfinite().all()
        ]
        reduction, loss.reduction = loss.reduction, "none"
        try:
            with torch.no_grad(), torch.random.fork_rng():
                for key, value in loss(batch).items():
                    if key.startswith("loss_") and (rows := _rows(value)):
                        found["losses"][key] = rows
        finally:
            loss.reduction = reduction
    return found


def _drawn(buffer: ReplayBuffer, batch_size: int) -> list[int] | None:
    """The dataset's rows at which the samples of the last batch begin."""
    sampler = getattr(buffer, "sampler", None)
    if not isinstance(sampler, ActionChunkSampler):
        return None
    state = buffer.state_dict()["_sampler"]
    again = copy.copy(sampler)
    again.load_state_dict({**state, "step": state["step"] - 1})
    return again.sample(buffer.storage, batch_size)[0][:, 0].tolist()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 400 else text[:400] + " ..."


def _rows(value: Tensor) -> list[int]:
    bad = ~value.detach().isfinite()
    return bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if bad.ndim else []
