"""Errors in the place of silent broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["shaped"]


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
