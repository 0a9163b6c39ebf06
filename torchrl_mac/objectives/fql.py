"""Flow Q-learning, of single actions or whole chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_mac.modules import FlowMatchingPolicy, OneStepPolicy
from torchrl_mac.objectives.common import (
    GoalKeys,
    autocast_to,
    condition_and_action,
    flow_matching_error,
    given_or_drawn,
)
from torchrl_mac.objectives.critics import QValueLossBase

__all__ = ["FQLLoss"]


class FQLLoss(QValueLossBase):
    r"""A behaviour flow, and a one-step policy held close to it that maximises Q.

    With noise :math:`z`, the flow's sample :math:`\mu(s, z)`, the one-step policy
    :math:`\pi_\omega` and E critics,

    .. math::

        \mathcal L_{actor} &= \alpha \| \pi_\omega(s, z) - \mathrm{sg}[\mu(s, z)] \|^2
        - \frac1E \sum_e Q_e(s, \mathrm{clip}\, \pi_\omega(s, z)) \\
        \mathcal L_{qvalue} &= \frac1E \sum_e \Bigl( Q_e(s, A) -
        \bigl[ R + \gamma^k m \, \mathrm{agg}_e \bar Q_e(s', \pi_\omega(s', z')) \bigr] \Bigr)^2

    and the flow's own term as in :class:`~torchrl_mac.objectives.FlowBCLoss` (FQL,
    https://arxiv.org/abs/2502.02538; with chunks QC-FQL, https://arxiv.org/abs/2507.07969). Squares
    are averaged over an action's coordinates. The actor's term passes the critics, but does not
    train them, and averages them whatever ``q_aggregation`` says. Constructor, keys and outputs are
    those of TorchRL's loss of this name.

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour policy.
        actor_network (OneStepPolicy): the policy that is improved.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics, see
            :class:`~torchrl_mac.objectives.QValueLossBase`.

    Keyword Args:
        alpha (float, optional): the weight of the distillation. Defaults to 10.
        normalize_q_loss (bool, optional): whether the critics' part of the actor's term is divided
            by the mean size of Q. Defaults to ``False``.
        **kwargs: those of :class:`~torchrl_mac.objectives.QValueLossBase`: ``num_qvalue_nets``,
            ``q_aggregation``, ``chunk_size``, ``target_range``, ``sampling_dtype``, ``reduction``.

    The input is that of :class:`~torchrl_mac.objectives.ChunkedQValueLoss`. Noise
    (``"flow_noise"``, ``"actor_noise"`` and ``"next_noise"`` ``[*, D]``, ``"flow_time"``
    ``[*, 1]``) is drawn unless the input has it. Of a chunk's actions the flow learns those that
    are ``"valid"`` (bool ``[*, h, 1]``), if the input says it.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.objectives import FQLLoss
        >>> cells = {"num_cells": (32,)}
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 6 + 1, 6, **cells), action_dim=6)
        >>> actor = OneStepPolicy(NormedMLP(4 + 6, 6, **cells), action_dim=6)
        >>> qvalues = [
        ...     ValueOperator(NormedMLP(4 + 6, 1, **cells), in_keys=["observation", "action"])
        ...     for _ in range(2)
        ... ]
        >>> loss = FQLLoss(flow, actor, qvalues, alpha=100.0)
        >>> loss.make_value_estimator(gamma=0.99)
        >>> loss_flow, loss_actor, loss_qvalue = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 6),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_flow + loss_actor + loss_qvalue).backward()
    """

    @dataclass
    class _AcceptedKeys(QValueLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            actor_goal (NestedKey): the entry of the input that the policies' goal is, if they read
                one. Defaults to ``"actor_goal"``.
            valid (NestedKey): optionally, which of a chunk's actions the flow learns.
            flow_noise (NestedKey): optional noise of the flow's term.
            flow_time (NestedKey): optional times of the flow's term.
            actor_noise (NestedKey): optional noise of the actor's term.
        """

        actor_goal: NestedKey = "actor_goal"
        valid: NestedKey = "valid"
        flow_noise: NestedKey = "flow_noise"
        flow_time: NestedKey = "flow_time"
        actor_noise: NestedKey = "actor_noise"

    default_keys = _AcceptedKeys
    out_keys = ["loss_flow", "loss_actor", "loss_qvalue"]  # noqa: RUF012 - TorchRL's convention

    flow_policy: FlowMatchingPolicy
    flow_policy_params: TensorDictParams
    target_flow_policy_params: TensorDictParams
    actor_network: OneStepPolicy

    def __init__(
        self,
        flow_policy: FlowMatchingPolicy,
        actor_network: OneStepPolicy,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        alpha: float = 10.0,
        normalize_q_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(qvalue_network, **kwargs)
        self.convert_to_functional(flow_policy, "flow_policy")
        self.convert_to_functional(actor_network, "actor_network")
        self.alpha = alpha
        self.normalize_q_loss = normalize_q_loss

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the networks read, and what becomes of it."""
        policies = [*self.flow_policy.in_keys[:-1], *self.actor_network.in_keys[:-1]]
        following = self._transition_keys(self.actor_network.in_keys[:-1])
        return list(dict.fromkeys([*self._actor_conditions.sources(policies), *following]))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        out = TensorDict()
        if "loss_flow" in self.out_keys:
            out.set("loss_flow", self.flow_loss(tensordict))
        if "loss_actor" in self.out_keys:
            loss, parts = self.actor_loss(tensordict)
            out.update({"loss_actor": loss, **parts})
        if "loss_qvalue" in self.out_keys:
            loss, values = self.qvalue_loss(tensordict)
            out.update({"loss_qvalue": loss, **values})
        self._clear_weakrefs(
            tensordict,
            out,
            "flow_policy_params",
            "actor_network_params",
            "qvalue_network_params",
            "target_qvalue_network_params",
        )
        return out

    def flow_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The flow-matching regression of the behaviour policy."""
        condition, action = self._condition_and_action(tensordict, self.flow_policy)
        with self.flow_policy_params.to_module(self.flow_policy):
            error = flow_matching_error(
                self.flow_policy, condition, action, tensordict, self.tensor_keys
            )
        return self._reduced(error, tensordict)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Distillation and Q of the one-step policy, and the two of them apart."""
        keys, goals = self.tensor_keys, self._actor_conditions
        condition, taken = self._condition_and_action(tensordict, self.flow_policy)
        noise = given_or_drawn(tensordict, keys.actor_noise, taken)
        with (
            torch.no_grad(),
            autocast_to(self.sampling_dtype, noise.device),
            self.flow_policy_params.to_module(self.flow_policy),
        ):
            teacher = self.flow_policy(condition, noise)
        condition, _ = self._condition_and_action(tensordict, self.actor_network)
        with self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network(condition, noise, clamp=False)
            clipped = action.clamp(self.actor_network.module.low, self.actor_network.module.high)
        distillation = (action - teacher).square().mean(-1)
        inputs = goals.read(tensordict, self._critic_keys)
        inputs[keys.action] = clipped.reshape(tensordict.get(keys.action).shape)
        inputs = TensorDict(inputs, batch_size=condition.shape[:-1])
        # frozen critics still pass the gradient to the action
        value = self.members(inputs, self.qvalue_network_params.detach()).mean(0)
        q_loss = -value
        if self.normalize_q_loss:
            scale = value.detach().abs().mean().clamp_min(torch.finfo(value.dtype).eps)
            q_loss = q_loss / scale
        loss = self._reduced(self.alpha * distillation + q_loss, tensordict)
        return loss, {"distillation_loss": distillation.detach(), "q_loss": q_loss.detach()}

    @property
    def _actor_conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    def _condition_and_action(
        self, tensordict: TensorDictBase, policy: FlowMatchingPolicy | OneStepPolicy
    ) -> tuple[Tensor, Tensor]:
        action_key = self.tensor_keys.action
        return condition_and_action(tensordict, policy, self._actor_conditions, action_key)
