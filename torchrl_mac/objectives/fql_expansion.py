"""Learning values from imagined rollouts, and a policy that maximises them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_mac.modules import FlowMatchingPolicy, OneStepPolicy, PolicyActor
from torchrl_mac.objectives.common import autocast_to, given_or_drawn
from torchrl_mac.objectives.value_expansion import ValueExpansionLoss

__all__ = ["FQLExpansionLoss"]


class FQLExpansionLoss(ValueExpansionLoss):
    r"""Value expansion with a one-step policy that is held close to a flow and maximises Q.

    Rollouts are those of the one-step policy :math:`\pi_\omega`, one chunk at each state. On all
    imagined states, with noise :math:`z` and the flow's sample :math:`\mu(s, z)`,

    .. math::

        \mathcal L_{actor} = \alpha \| \pi_\omega(s, z) - \mathrm{sg}[\mu(s, z)] \|^2
        - \frac{1}{\mathrm{sg}[\overline{|Q|}]} Q(s, \mathrm{clip}\, \pi_\omega(s, z))

    where :math:`\overline{|Q|}` is the mean size of Q there: policy extraction as in FQL
    (https://arxiv.org/abs/2502.02538) in the place of rejection sampling, the ablation MAC(FQL) of
    https://arxiv.org/abs/2512.08108. The other terms are those of
    :class:`~torchrl_mac.objectives.ValueExpansionLoss`.

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour policy. Not trained here.
        actor_network (PolicyActor): acts with the one-step policy, which is trained here.
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (TensorDictModule): writes ``"state_action_value"`` ``[*, 1]``.
        world_model (TensorDictModule): see the base class.

    Keyword Args:
        alpha (float, optional): the weight of the distillation. Defaults to 0.3.
        mean_over_rollout (bool, optional): whether a rollout's mean Q counts in the place of its
            Qs in :math:`\overline{|Q|}`, as in the reference implementation. Defaults to ``False``.
        **kwargs: those of :class:`~torchrl_mac.objectives.ValueExpansionLoss`.

    The input is that of the base class; the rollout's noise is ``[*, H, D]``. Noise of the actor's
    term (``"actor_noise"``, ``[*, H, D]``) is drawn unless the input has it.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     ChunkedWorldModel, FlowMatchingPolicy, NormedMLP, OneStepPolicy, PolicyActor
        ... )
        >>> from torchrl_mac.objectives import FQLExpansionLoss
        >>> cells = {"num_cells": (32,)}
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 20 + 1, 20, **cells), action_dim=20)
        >>> policy = OneStepPolicy(NormedMLP(4 + 20, 20, **cells), action_dim=20)
        >>> value = ValueOperator(NormedMLP(4, 1, **cells))
        >>> qvalue = ValueOperator(NormedMLP(24, 1, **cells), in_keys=["observation", "action"])
        >>> actor = PolicyActor(policy, chunk_size=10)
        >>> model = ChunkedWorldModel(*(NormedMLP(24, size, **cells) for size in (4, 1, 1)))
        >>> loss = FQLExpansionLoss(flow, actor, value, qvalue, model)
        >>> loss_value, loss_qvalue, loss_actor = loss(observation=torch.randn(8, 4))
        >>> (loss_value + loss_qvalue + loss_actor).backward()
    """

    @dataclass
    class _AcceptedKeys(ValueExpansionLoss._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            actor_noise (NestedKey): optional noise of the actor's term.
        """

        actor_noise: NestedKey = "actor_noise"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    out_keys = ["loss_value", "loss_qvalue", "loss_actor"]  # noqa: RUF012

    onestep_policy: OneStepPolicy
    onestep_policy_params: TensorDictParams
    target_onestep_policy_params: TensorDictParams

    def __init__(
        self,
        flow_policy: FlowMatchingPolicy,
        actor_network: PolicyActor,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        world_model: TensorDictModuleBase,
        *,
        alpha: float = 0.3,
        mean_over_rollout: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(actor_network, value_network, qvalue_network, world_model, **kwargs)
        self.convert_to_functional(actor_network.policy, "onestep_policy")
        self.__dict__["flow_policy"] = flow_policy  # read, not trained
        self.alpha = alpha
        self.mean_over_rollout = mean_over_rollout

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Imagines from the batch and returns the terms in ``out_keys``."""
        horizon = 1 if self.out_keys == ["loss_qvalue"] else self.imagination_horizon
        rollout = self.imagine(tensordict, horizon)
        noise = tensordict.get(self.tensor_keys.actor_noise, None)
        if noise is not None:
            rollout.set(self.tensor_keys.actor_noise, noise)
        terms = {
            "loss_value": self.value_loss,
            "loss_qvalue": self.qvalue_loss,
            "loss_actor": self.actor_loss,
        }
        out = TensorDict({key: terms[key](rollout) for key in self.out_keys})
        self._clear_weakrefs(
            tensordict,
            out,
            "value_network_params",
            "qvalue_network_params",
            "onestep_policy_params",
        )
        return out

    def actor_loss(self, rollout: TensorDictBase) -> Tensor:
        """Distillation and Q of the one-step policy on a rollout ``[*, H]``."""
        policy = self.onestep_policy
        condition = torch.cat([rollout.get(key) for key in policy.in_keys[:-1]], -1)
        taken = rollout.get(self.actor_network.action_key)
        flat = taken.flatten(rollout.ndim)
        noise = given_or_drawn(rollout, self.tensor_keys.actor_noise, flat)
        with torch.no_grad(), autocast_to(self.sampling_dtype, noise.device):
            teacher = self.flow_policy(condition, noise)
        with self.onestep_policy_params.to_module(policy):
            action = policy(condition, noise, clamp=False)
        clipped = action.clamp(policy.module.low, policy.module.high).reshape(taken.shape)
        inputs = rollout.select(*self.qvalue_network.in_keys)
        inputs.set(self.actor_network.action_key, clipped)
        # a frozen Q still passes the gradient to the action
        frozen = self.qvalue_network_params.detach()
        with frozen.to_module(self.qvalue_network, preserve_module_state=False):
            value = self.qvalue_network(inputs).get(self.tensor_keys.state_action_value)
        value = value.squeeze(-1)
        size = (value.mean(-1) if self.mean_over_rollout else value).detach().abs().mean()
        distillation = (action - teacher).square().mean(-1)
        error = self.alpha * distillation - value / size
        return self._reduced(error.mean(-1), rollout[..., 0])
