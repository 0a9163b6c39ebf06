"""What the losses share: reading their input, and reduced precision where no gradient goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["GoalKeys", "autocast_to", "required", "same_shape"]


def required(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """An entry of a loss's input.

    Raises:
        KeyError: if the input lacks it.
    """
    value = tensordict.get(key, None)
    if value is None:
        there = sorted(map(str, tensordict.keys(True, True)))
        raise KeyError(f"The loss needs {key!r}, but the input has {there}.")
    return value


def same_shape(name: object, value: Tensor, expected: Sequence[int]) -> Tensor:
    """A tensor that must have this very shape: what would broadcast gives other numbers.

    Raises:
        ValueError: if it has another.
    """
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name!r} has shape {tuple(value.shape)}, but the loss needs {tuple(expected)}."
        )
    return value


class GoalKeys:
    """Networks read one goal; which of a batch's goals it is depends on the loss.

    Args:
        goal (NestedKey): the goal's entry for the networks, as in the environment: ``"goal"``.
        source (NestedKey): the entry of the loss's input that it is, such as ``"value_goal"``.
    """

    def __init__(self, goal: NestedKey, source: NestedKey) -> None:
        self.goal, self.source = goal, source

    def sources(self, keys: Iterable[NestedKey]) -> list[NestedKey]:
        """The entries of the input for what the networks read, without repetitions."""
        return list(dict.fromkeys(self.source if key == self.goal else key for key in keys))

    def read(self, tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> dict:
        """What the networks read, under their names.

        Raises:
            KeyError: if the input lacks it.
        """
        values: dict[NestedKey, Tensor] = {}
        for key in dict.fromkeys(keys):
            source = self.source if key == self.goal else key
            if key == self.goal and tensordict.get(source, None) is None:
                raise KeyError(
                    f"The networks read a goal and the input has no {source!r}: give the replay "
                    f"buffer goals={{{source!r}: ...}}, or name another entry with set_keys()."
                )
            values[key] = required(tensordict, source)
        return values


def autocast_to(
    dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager:
    """Autocast to ``dtype``; ``None`` changes nothing.

    Inside of another autocast, weights are cast anew: PyTorch would hand out casts made without a
    gradient to the passes that need one.
    """
    if dtype is None:
        return contextlib.nullcontext()
    nested = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype, cache_enabled=not nested)
