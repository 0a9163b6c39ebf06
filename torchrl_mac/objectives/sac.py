"""Soft actor-critic of single actions or whole chunks, as in RLPD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from torchrl_mac.modules import TanhGaussianPolicy
from torchrl_mac.objectives.common import GoalKeys, condition_and_action, given_or_drawn
from torchrl_mac.objectives.critics import QValueLossBase

__all__ = ["ChunkedSACLoss"]

Cloning = Literal["likelihood", "squared"]


class ChunkedSACLoss(QValueLossBase):
    r"""An entropy-regularised actor of chunks, its critics and its temperature.

    With :math:`a, a' \sim \pi` of the states, the temperature :math:`\kappa` and D action
    coordinates,

    .. math::

        \mathcal L_{actor} &= \kappa \log \pi(a \mid s) - \frac1E \sum_e Q_e(s, a) \\
        \mathcal L_{qvalue} &= \frac1E \sum_e \Bigl( Q_e(s, A) -
        \bigl[ R + \gamma^k m \, \mathrm{agg}_e \bar Q_e(s', a') \bigr] \Bigr)^2 \\
        \mathcal L_{alpha} &= \kappa \, ( - \log \pi(a \mid s) - \bar H ),
        \qquad \bar H = - D / 2

    as the Q-chunking authors run RLPD (https://arxiv.org/abs/2302.02948,
    https://arxiv.org/abs/2507.07969). TorchRL's :class:`~torchrl.objectives.SACLoss` has the
    entropy in the critics' target, takes the minimum of the critics and sums their errors. With
    ``bc_alpha`` the dataset's actions are cloned as well, by their likelihood or, with
    ``bc="squared"``, by how far the actor's are from them,

    .. math::

        \mathcal L_{bc} = - \alpha_{bc} \log \pi(A \mid s) \qquad \text{or} \qquad
        \mathcal L_{actor} \mathrel{+}= \alpha_{bc} \, \mathrm{sg}[\overline{|Q|}] \, \| a - A \|^2

    Args:
        actor_network (TanhGaussianPolicy): the actor.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics, see
            :class:`~torchrl_mac.objectives.QValueLossBase`.

    Keyword Args:
        alpha_init (float, optional): the temperature to begin with. Defaults to 1.
        target_entropy (float, optional): :math:`\bar H`. Defaults to minus half of the number of
            action coordinates.
        bc_alpha (float, optional): the weight of cloning; 0 (default) is none.
        bc (str, optional): ``"likelihood"`` (default), a term of its own, or ``"squared"``, a part
            of ``"loss_actor"``, where :math:`\overline{|Q|}` is the mean size of Q in the batch.
        **kwargs: those of :class:`~torchrl_mac.objectives.QValueLossBase`: ``num_qvalue_nets``,
            ``q_aggregation``, ``chunk_size``, ``target_range``, ``sampling_dtype``, ``reduction``.

    The input is that of :class:`~torchrl_mac.objectives.ChunkedQValueLoss`. Noise
    (``"actor_noise"`` and ``"next_noise"``, ``[*, D]``) is drawn unless the input has it.

    Raises:
        ValueError: if ``alpha_init`` is not positive, ``bc_alpha`` is negative or ``bc`` unknown.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import (
        ...     NormedMLP, QValueEnsemble, StackedMLP, TanhGaussianPolicy
        ... )
        >>> from torchrl_mac.objectives import ChunkedSACLoss
        >>> cells = {"num_cells": (32,), "activation_class": "relu"}
        >>> actor = TanhGaussianPolicy(NormedMLP(4, 2 * 6, layer_norm=False, **cells), action_dim=6)
        >>> qvalue = QValueEnsemble(
        ...     StackedMLP(10, 4 + 6, 1, norm_first=True, broadcast=True, **cells)
        ... )
        >>> loss = ChunkedSACLoss(actor, qvalue)
        >>> loss.make_value_estimator(gamma=0.99)
        >>> loss_actor, loss_qvalue, loss_alpha, alpha, entropy = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 6),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_actor + loss_qvalue + loss_alpha).backward()
    """

    @dataclass
    class _AcceptedKeys(QValueLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            actor_goal (NestedKey): the entry of the input that the goal is in the actor's terms, if
                the networks read one. Defaults to ``"actor_goal"``.
            actor_noise (NestedKey): optional noise of the actor's term.
        """

        actor_goal: NestedKey = "actor_goal"
        actor_noise: NestedKey = "actor_noise"

    default_keys = _AcceptedKeys
    out_keys = ["loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy"]  # noqa: RUF012

    actor_network: TanhGaussianPolicy

    def __init__(
        self,
        actor_network: TanhGaussianPolicy,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        alpha_init: float = 1.0,
        target_entropy: float | None = None,
        bc_alpha: float = 0.0,
        bc: Cloning = "likelihood",
        **kwargs: Any,
    ) -> None:
        if not alpha_init > 0 or bc_alpha < 0:
            raise ValueError(
                "alpha_init must be positive and bc_alpha not negative, got "
                f"{alpha_init} and {bc_alpha}."
            )
        if bc not in get_args(Cloning):
            raise ValueError(f"bc must be one of {get_args(Cloning)}, got {bc!r}.")
        super().__init__(qvalue_network, **kwargs)
        self.convert_to_functional(actor_network, "actor_network")
        device = next(actor_network.parameters()).device
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha_init), device=device))
        self.target_entropy = (
            -0.5 * actor_network.action_dim if target_entropy is None else target_entropy
        )
        self.bc_alpha = bc_alpha
        self.bc: Cloning = bc
        if bc_alpha and bc == "likelihood":
            self.out_keys = [*self.out_keys, "loss_bc"]

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the networks read, and what becomes of it."""
        policy = self.actor_network.in_keys[:-1]
        following = self._transition_keys(policy)
        return list(dict.fromkeys([*self._actor_conditions.sources(policy), *following]))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        out = TensorDict()
        if {"loss_actor", "loss_alpha"} & set(self.out_keys):
            loss, log_prob = self.actor_loss(tensordict)
            out.set("loss_actor", loss)
            out.set("loss_alpha", self.alpha_loss(tensordict, log_prob))
            out.set("alpha", self.log_alpha.detach().exp())
            out.set("entropy", -log_prob.mean())
        if "loss_qvalue" in self.out_keys:
            loss, values = self.qvalue_loss(tensordict)
            out.update({"loss_qvalue": loss, **values})
        if "loss_bc" in self.out_keys:
            out.set("loss_bc", self.bc_loss(tensordict))
        self._clear_weakrefs(
            tensordict,
            out,
            "actor_network_params",
            "qvalue_network_params",
            "target_qvalue_network_params",
        )
        return out

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Entropy and Q of the actor, and the log-density of its actions, detached, ``[*]``.

        With ``bc="squared"`` also the distance of its actions from the dataset's.
        """
        keys = self.tensor_keys
        condition, taken = self._condition_and_action(tensordict)
        noise = given_or_drawn(tensordict, keys.actor_noise, taken)
        with self.actor_network_params.to_module(self.actor_network):
            action, log_prob = self.actor_network.module.sample(condition, noise)
        inputs = self._actor_conditions.read(tensordict, self._critic_keys)
        inputs[keys.action] = action.reshape(tensordict.get(keys.action).shape)
        inputs = TensorDict(inputs, batch_size=condition.shape[:-1])
        # frozen critics still pass the gradient to the action
        value = self.members(inputs, self.qvalue_network_params.detach()).mean(0)
        loss = self.log_alpha.detach().exp() * log_prob - value
        if self.bc_alpha and self.bc == "squared":
            distance = (action - taken).square().sum(-1)
            loss = loss + self.bc_alpha * value.detach().abs().mean() * distance
        return self._reduced(loss, tensordict), log_prob.detach()

    def alpha_loss(self, tensordict: TensorDictBase, log_prob: Tensor) -> Tensor:
        """The temperature's term, for the log-density of the actor's actions."""
        excess = -log_prob - self.target_entropy
        return self._reduced(self.log_alpha.exp() * excess, tensordict)

    def bc_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The log-likelihood of the dataset's actions, all of a chunk's."""
        condition, action = self._condition_and_action(tensordict)
        with self.actor_network_params.to_module(self.actor_network):
            log_prob = self.actor_network.module.log_prob(condition, action)
        return self._reduced(-self.bc_alpha * log_prob, tensordict)

    @property
    def _actor_conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    def _condition_and_action(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        action_key = self.tensor_keys.action
        return condition_and_action(
            tensordict, self.actor_network, self._actor_conditions, action_key
        )
