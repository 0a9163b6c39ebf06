"""Updates that are not finite do not happen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule

from torchrl_mac.data import ActionChunkSampler
from torchrl_mac.trainers.checkpoint import HeldState, SealedCheckpoint, on_host

__all__ = ["FiniteGuard", "NonFiniteError", "diagnose", "give_up"]


class NonFiniteError(FloatingPointError):
    """Training cannot go on: losses or gradients are not finite, update after update."""


class FiniteGuard:
    """Finds, on the device, losses and gradients that are not finite, and counts them.

    Nothing is read on the host unless :meth:`read` is called.

    Args:
        device (torch.device): where the losses are.

    Keyword Args:
        distributed (bool, optional): whether one process's bad update is everyone's. Defaults to
            ``False``.

    Examples:
        >>> import torch
        >>> from torchrl_mac.trainers.guard import FiniteGuard
        >>> guard = FiniteGuard(torch.device("cpu"))
        >>> bad = guard.check(torch.tensor(1.0), torch.tensor(float("inf")))
        >>> guard.read()
        {'skipped': 1, 'in_a_row': 1}
    """

    def __init__(self, device: torch.device, *, distributed: bool = False) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped, in a row
        self.distributed = distributed

    def check(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Returns 1.0 if ``loss`` or ``gradient_norm`` is not finite, else 0.0, and counts it."""
        bad = 1.0 - (loss.detach().isfinite() & gradient_norm.isfinite()).float()
        if self.distributed:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        is_bad = bad.long()
        self.counts[0].add_(is_bad)
        self.counts[1].add_(1).mul_(is_bad)
        return bad

    def read(self) -> dict[str, int]:
        """How many updates were skipped, and how many of them just now, one after the other."""
        return dict(zip(("skipped", "in_a_row"), self.counts.tolist(), strict=True))


@contextlib.contextmanager
def undone_where(bad: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """What happens to ``tensors`` in this context is undone where ``bad`` is 1."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    undo = bad.bool()
    for tensor, old in zip(tensors, before, strict=True):
        tensor.detach().copy_(torch.where(undo, old, tensor.detach()))


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
