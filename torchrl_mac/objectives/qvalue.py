"""Temporal-difference learning of chunk values, for the actions of any actor."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from torchrl_mac.objectives.common import ranking_with
from torchrl_mac.objectives.critics import QValueLossBase

__all__ = ["ChunkedQValueLoss"]


class ChunkedQValueLoss(QValueLossBase):
    r"""Trains critics of chunks, where any actor says what is done next.

    For a window of k environment steps with the discounted sum of rewards R, and :math:`m = 0` if
    the task ends on the way,

    .. math::

        \mathcal L_{qvalue} = \frac1E \sum_e \Bigl( Q_e(s, A) -
        \bigl[ R + \gamma^k m \, \mathrm{agg}_e \bar Q_e(s', A') \bigr] \Bigr)^2,
        \qquad A' \sim \mathrm{actor}(s')

    With a :class:`~torchrl_mac.modules.FlowRejectionActor` this is Q-chunking
    (https://arxiv.org/abs/2507.07969): the best of N chunks of the behaviour is chosen by the
    critics as they are, and judged by their target networks :math:`\bar Q_e`.

    Args:
        actor_network (TensorDictModule): writes the next action; a
            :class:`~torchrl_mac.modules.ChunkActor`, or any policy. Not trained here. If it ranks
            candidates, then with ``qvalue_network``.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics, see
            :class:`QValueLossBase`.

    Keyword Args:
        chunk_size (int, optional): see there. Defaults to the actor's.
        **kwargs: the others of :class:`QValueLossBase`.

    The input holds what the critics read, ``"observation"`` ``[*, O]`` and ``"action"``
    (``[*, h, A]`` or flat), and under ``"next"`` what they and the actor read, with the
    ``"reward"``, ``"done"`` and ``"terminated"`` of the way there, ``[*, 1]``, as
    :class:`~torchrl_mac.data.ActionChunkStorage` makes them. Noise for the actor
    (``"next_noise"``, ``[*, N, D]`` for N candidates of D numbers) is drawn unless the input has
    it.

    Raises:
        ValueError: if the actor ranks candidates with another Q.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import (
        ...     FlowMatchingPolicy, FlowRejectionActor, NormedMLP, QValueEnsemble, StackedMLP
        ... )
        >>> from torchrl_mac.objectives import ChunkedQValueLoss
        >>> cells = {"num_cells": (32,)}
        >>> qvalue = QValueEnsemble(StackedMLP(2, 4 + 20, 1, broadcast=True, **cells))
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 20 + 1, 20, **cells), action_dim=20)
        >>> actor = FlowRejectionActor(flow, qvalue, num_candidates=8, chunk_size=10)
        >>> loss = ChunkedQValueLoss(actor, qvalue)
        >>> loss.make_value_estimator(gamma=0.99)
        >>> loss_qvalue, *_ = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 10, 2),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> loss_qvalue.backward()
    """

    out_keys = ["loss_qvalue", "pred_value", "target_value"]  # noqa: RUF012 - TorchRL's convention

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if getattr(actor_network, "qvalue_network", qvalue_network) is not qvalue_network:
            raise ValueError(
                "actor_network ranks candidates with another network than qvalue_network; give "
                "both the same, so that chunks are chosen by the Q that is trained."
            )
        if chunk_size is None:
            chunk_size = getattr(actor_network, "chunk_size", None) or 1
        super().__init__(qvalue_network, chunk_size=chunk_size, **kwargs)
        self.__dict__["actor_network"] = actor_network  # read, not trained

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the critics and, in the next state, the actor read."""
        return self._transition_keys(list(self.actor_network.in_keys))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The critics' term, and the values that it compares."""
        loss, values = self.qvalue_loss(tensordict)
        out = TensorDict({"loss_qvalue": loss, **values})
        self._clear_weakrefs(
            tensordict, out, "qvalue_network_params", "target_qvalue_network_params"
        )
        return out

    def _next_action(self, tensordict: TensorDictBase) -> Tensor:
        actor = self.actor_network
        reward = tensordict.get(("next", self.tensor_keys.reward))
        noise_key = unravel_key(getattr(actor, "noise_key", "noise"))
        read = [key for key in actor.in_keys if key != noise_key]
        inputs = self._conditions.read(tensordict, read, following=True)
        if (noise := tensordict.get(self.tensor_keys.next_noise, None)) is not None:
            inputs[noise_key] = noise
        with ranking_with(actor, self.qvalue_network_params):
            chosen = actor(TensorDict(inputs, batch_size=reward.shape[:-1]))
        return chosen.get(getattr(actor, "action_key", actor.out_keys[0]))
