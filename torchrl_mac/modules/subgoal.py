"""Acting on two levels: a subgoal is chosen, and acted towards."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey

from torchrl_mac.modules.actor import ChunkActor

__all__ = ["SubgoalActor"]


class SubgoalActor(ChunkActor):
    r"""Lets one actor choose a subgoal, and a policy act towards it.

    .. math::

        w = \arg\max_{w_i} Q(s, g, w_i), \qquad w_i \sim \pi_h(\cdot \mid s, g), \; i = 1 \dots N,
        \qquad a \sim \pi_l(\cdot \mid s, w)

    is SHARSA (https://arxiv.org/abs/2506.04168): the upper level is a
    :class:`FlowRejectionActor` whose actions are subgoals.

    Args:
        subgoal_actor (ChunkActor): writes the subgoal as its action, under another ``action_key``.
        policy (TensorDictModule): reads the subgoal and writes an action ``[*, D]``.

    Keyword Args:
        **kwargs: those of :class:`ChunkActor`: ``chunk_size``, ``action_key``, ``noise_key`` (of
            the policy's noise ``[*, D]``) and ``transform``, for both levels.

    What ``subgoal_actor`` writes, the subgoal among it, is written beside the action. Its own
    noise is read, if it is there, from its ``noise_key``.

    Raises:
        ValueError: if both levels read their noise from the same key, or the policy does not read
            the subgoal.

    Examples:
        >>> import math
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     FlowMatchingPolicy, FlowRejectionActor, NormedMLP, SubgoalActor
        ... )
        >>> S, G, A, cells = 4, 2, 3, {"num_cells": (32,)}
        >>> proposals = FlowMatchingPolicy(
        ...     NormedMLP(S + G + G + 1, G, **cells), G, low=-math.inf, high=math.inf,
        ...     in_keys=["observation", "goal", "subgoal_noise"], out_keys=["subgoal"],
        ... )
        >>> qvalue = ValueOperator(
        ...     NormedMLP(S + G + G, 1, **cells), in_keys=["observation", "goal", "subgoal"]
        ... )
        >>> policy = FlowMatchingPolicy(
        ...     NormedMLP(S + G + A + 1, A, **cells), A, in_keys=["observation", "subgoal", "noise"]
        ... )
        >>> actor = SubgoalActor(
        ...     FlowRejectionActor(
        ...         proposals, qvalue, action_key="subgoal", noise_key="subgoal_noise"
        ...     ),
        ...     policy,
        ... )
        >>> td = actor(TensorDict(observation=torch.randn(5, S), goal=torch.randn(5, G)))
        >>> td["subgoal"].shape, td["action"].shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self, subgoal_actor: ChunkActor, policy: TensorDictModuleBase, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if subgoal_actor.action_key not in policy.in_keys:
            raise ValueError(
                f"policy reads {list(policy.in_keys)}, but the subgoal is written to "
                f"{subgoal_actor.action_key!r}."
            )
        self.subgoal_actor = subgoal_actor
        self.policy = policy
        if self.noise_key in self._noise_keys[1:]:
            raise ValueError(
                f"Both levels read their noise from {self.noise_key!r}: they draw of different "
                "sizes, so give each a noise_key of its own."
            )
        made_here = {*subgoal_actor.out_keys, self.noise_key}
        read = [key for key in policy.in_keys if key not in made_here]
        self.in_keys = list(dict.fromkeys([*subgoal_actor.in_keys, *read]))
        self.out_keys = [self.action_key, *subgoal_actor.out_keys]

    @property
    def _noise_keys(self) -> list[NestedKey]:
        above = self.subgoal_actor
        return [self.noise_key, *(key for key in above._read_keys if key not in above.in_keys)]

    @property
    def _read_keys(self) -> list[NestedKey]:
        return [*self.in_keys, *self._noise_keys]

    @property
    def num_candidates(self) -> int:
        """The number of subgoals that one is chosen from."""
        return self.subgoal_actor.num_candidates

    @num_candidates.setter
    def num_candidates(self, value: int) -> None:
        self.subgoal_actor.num_candidates = value

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"subgoal_actor": self.subgoal_actor, "policy": self.policy}
        return {**own, **super().config()}

    @dispatch(source="_read_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the subgoal and the action."""
        inputs = self._read(tensordict)
        for key in self._noise_keys:
            if (noise := tensordict.get(key, None)) is not None:
                inputs.set(key, noise)
        inputs = self.subgoal_actor(inputs)
        action = self.policy(inputs).get(self.policy.out_keys[0])
        for key in self.subgoal_actor.out_keys:
            tensordict.set(key, inputs.get(key))
        return tensordict.set(self.action_key, self._chunk(action))
