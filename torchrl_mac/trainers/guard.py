"""Updates that are not finite do not happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FiniteGuard"]


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
