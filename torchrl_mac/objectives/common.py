"""What the losses share: reading their input, flow matching, precision where no gradient goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from torchrl_mac.modules import FlowMatchingPolicy, FlowPolicyBase
from torchrl_mac.modules.shapes import concatenated

__all__ = [
    "GoalKeys",
    "autocast_to",
    "condition_and_action",
    "flow_matching_error",
    "given_or_drawn",
    "mean_of_valid",
    "ranking_with",
    "required",
    "same_shape",
]


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


def given_or_drawn(tensordict: TensorDictBase, key: NestedKey, like: Tensor) -> Tensor:
    """Noise of the shape of ``like``: an entry of a loss's input, or normal if it has none.

    Raises:
        ValueError: if the entry has another shape.
    """
    noise = tensordict.get(key, None)
    return torch.randn_like(like) if noise is None else same_shape(key, noise, like.shape)


def condition_and_action(
    tensordict: TensorDictBase, policy: FlowPolicyBase, goals: GoalKeys, action_key: NestedKey
) -> tuple[Tensor, Tensor]:
    """What a policy reads beside its noise, ``[*, O]``, and the flat action taken, ``[*, D]``.

    Raises:
        KeyError: if the input lacks one of them.
        ValueError: if the action is not of the policy's size.
    """
    condition = concatenated(goals.read(tensordict, policy.in_keys[:-1]).values())
    action = required(tensordict, action_key).flatten(condition.ndim - 1)
    flat = (*condition.shape[:-1], policy.action_dim)
    return condition, same_shape(action_key, action, flat)


def flow_matching_error(
    policy: FlowMatchingPolicy,
    condition: Tensor,
    action: Tensor,
    tensordict: TensorDictBase,
    keys: Any,
) -> Tensor:
    """The squared error of a flow's velocity, averaged over the action's coordinates, ``[*]``.

    Args:
        policy (FlowMatchingPolicy): the flow, with the parameters to train.
        condition (Tensor): ``[*, O]``.
        action (Tensor): flat, ``[*, D]``.
        tensordict (TensorDictBase): the loss's input, which may have where the paths begin
            (``flow_noise``, ``[*, D]``), how far along they are (``flow_time``, ``[*, 1]``) and
            which of a chunk's actions are ``valid`` (bool ``[*, h, 1]``, or ``[*, 1]`` of a single
            one): the others count as if they had no error.
        keys: the loss's keys of these three.

    Raises:
        ValueError: if one of them has another shape.
    """
    noise = given_or_drawn(tensordict, keys.flow_noise, action)
    time = tensordict.get(keys.flow_time, None)
    if time is None:
        time = torch.rand_like(action[..., :1])
    same_shape(keys.flow_time, time, action[..., :1].shape)
    velocity = policy.velocity(condition, (1 - time) * noise + time * action, time)
    return mean_of_valid((velocity - (action - noise)).square(), tensordict.get(keys.valid, None))


def mean_of_valid(error: Tensor, valid: Tensor | None) -> Tensor:
    """The errors of an action's coordinates ``[*, D]``, averaged, ``[*]``.

    Those of actions that are not ``valid``, if it is there, count as 0.
    """
    if valid is not None:
        steps = valid.flatten(error.ndim - 1).unsqueeze(-1)
        error = (error.unflatten(-1, (steps.shape[-2], -1)) * steps).flatten(-2)
    return error.mean(-1)


def ranking_with(actor: Any, params: TensorDictBase) -> contextlib.AbstractContextManager:
    """Lets an actor that ranks candidates do it with a loss's parameters of its Q."""
    ranking = getattr(actor, "qvalue_network", None)
    return contextlib.nullcontext() if ranking is None else params.to_module(ranking)


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

    def read(
        self, tensordict: TensorDictBase, keys: Iterable[NestedKey], *, following: bool = False
    ) -> dict:
        """What the networks read, under their names; with ``following`` in the next state.

        Raises:
            KeyError: if the input lacks it.
        """
        values: dict[NestedKey, Tensor] = {}
        for key in dict.fromkeys(keys):
            source = self.source if key == self.goal else key
            if following and key != self.goal:  # which stays the same
                source = unravel_key(("next", key))
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
