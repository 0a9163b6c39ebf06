"""Errors in the place of silent broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["concatenated", "shaped"]


def concatenated(inputs: Iterable[Tensor]) -> Tensor:
    """Inputs side by side, ``[*, N]``; all but the first, ``[*, O]``, may be chunks ``[*, h, A]``.

    Examples:
        >>> import torch
        >>> concatenated([torch.zeros(3, 4), torch.zeros(3, 10, 2)]).shape
        torch.Size([3, 24])
    """
    first, *others = inputs
    if not others:
        return first
    return torch.cat([first, *(x.flatten(first.ndim - 1) for x in others)], -1)


def shaped(value: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """A tensor that has the shape it should have; a compiled graph keeps nothing of the check.

    Args:
        value (Tensor): what was given.
        shape (sequence of int): the shape that it should have.
        name (str): what it is, for the error.

    Raises:
        ValueError: if it has another shape, which might broadcast in what follows.
    """
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, but has {list(value.shape)}.")
    return value
