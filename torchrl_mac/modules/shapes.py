"""Errors in the place of silent broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["concatenated", "shaped"]


def concatenated(inputs: Iterable[Tensor], first_actions: int | None = None) -> Tensor:
    """Inputs side by side, ``[*, N]``; all but the first, ``[*, O]``, may be chunks ``[*, h, A]``.

    Args:
        inputs (iterable of Tensor): the inputs.
        first_actions (int, optional): how many actions of a chunk count, the first. Default: all.

    Examples:
        >>> import torch
        >>> concatenated([torch.zeros(3, 4), torch.zeros(3, 10, 2)]).shape
        torch.Size([3, 24])
        >>> concatenated([torch.zeros(3, 4), torch.zeros(3, 10, 2)], first_actions=5).shape
        torch.Size([3, 14])
    """
    first, *others = inputs
    if first_actions is not None:
        others = [x[..., :first_actions, :] if x.ndim > first.ndim else x for x in others]
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
