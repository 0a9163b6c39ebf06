"""An actor that climbs the returns of imagined rollouts, by the gradients of the world model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import step_mdp
from torchrl.objectives import ValueEstimators
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value.functional import td_lambda_return_estimate

from torchrl_mac.modules import PolicyActor, TanhGaussianPolicy
from torchrl_mac.objectives.common import given_or_drawn, same_shape
from torchrl_mac.objectives.imagination import ImaginationLossBase

__all__ = ["DreamerLoss"]


class DreamerLoss(ImaginationLossBase):
    r"""Trains an actor through imagined rollouts, and V on the same :math:`\lambda`-returns.

    From each state of the batch the actor and the world model imagine ``imagination_horizon``
    chunks :math:`(s^k, A^k, r^k, c^k, s^{k+1})`, where :math:`c` is the probability that the task
    goes on. With :math:`\Gamma = \gamma^h` for chunks of :math:`h` actions and a target network
    :math:`\bar V`,

    .. math::

        G^k &= r^k + \Gamma c^k [ (1 - \lambda) \bar V(s^{k+1}) + \lambda G^{k+1} ],
        \qquad G^H = \bar V(s^H), \qquad w^k = \prod_{l < k} \Gamma c^l \\
        \mathcal L_{actor} &= - \mathrm{mean}_k \, \mathrm{sg}[w^k]
        \bigl( G^k - \eta \log \pi(a \mid \mathrm{sg}[s^k]) \bigr), \qquad a \sim \pi \\
        \mathcal L_{value} &= \mathrm{mean}_k \, \mathrm{sg}[w^k] ( V(s^k) - \mathrm{sg}[G^k] )^2

    (https://arxiv.org/abs/1912.01603, with the entropy and the target network of
    https://arxiv.org/abs/2010.02193). Returns pass their gradients to the actor through chunks,
    states, rewards and ends; world model and V stay as they are in that. TorchRL's
    :class:`~torchrl.objectives.DreamerActorLoss` and
    :class:`~torchrl.objectives.DreamerValueLoss` have no ends, entropy or target network, and add
    up the steps of a rollout where here they are averaged.

    Args:
        actor_network (PolicyActor): acts with a :class:`~torchrl_mac.modules.TanhGaussianPolicy`,
            which is trained here.
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        world_model (TensorDictModule): see the base class. Where it writes the logit of an end, as
            a :class:`~torchrl_mac.modules.ChunkedWorldModel`, its probability counts in the place
            of the end itself, which has no gradient; also in a reward that is read off it.

    Keyword Args:
        entropy_bonus (float, optional): the weight of the entropy, :math:`\eta`; with 0 there is
            none. Defaults to 1e-4.
        discount_loss (bool, optional): whether steps count by how likely and how soon they are;
            if not, :math:`w = 1`. Defaults to ``True``.
        **kwargs: those of :class:`~torchrl_mac.objectives.ImaginationLossBase`:
            ``imagination_horizon``, ``chunk_size``, ``delay_value``, ``ignore_terminated``
            (:math:`c = 1` throughout) and ``reduction``.

    The input is that of the base class; the rollout's noise is ``[*, H, D]``. Noise of the entropy
    (``"entropy_noise"``, ``[*, H, D]``) is drawn unless the input has it. Discounts are set with
    ``make_value_estimator(gamma=0.999, lmbda=1.0)``; only ``TDLambda`` is supported.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     ChunkedWorldModel, NormedMLP, PolicyActor, TanhGaussianPolicy
        ... )
        >>> from torchrl_mac.objectives import DreamerLoss
        >>> cells = {"num_cells": (32,)}
        >>> policy = TanhGaussianPolicy(NormedMLP(4, 2 * 20, **cells), action_dim=20)
        >>> value = ValueOperator(NormedMLP(4, 1, **cells))
        >>> model = ChunkedWorldModel(*(NormedMLP(24, size, **cells) for size in (4, 1, 1)))
        >>> loss = DreamerLoss(PolicyActor(policy, chunk_size=10), value, model)
        >>> loss.make_value_estimator(gamma=0.99, lmbda=0.95)
        >>> loss_actor, loss_value = loss(observation=torch.randn(8, 4))
        >>> (loss_actor + loss_value).backward()
    """

    @dataclass
    class _AcceptedKeys(ImaginationLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            termination_logit (NestedKey): the logit behind an imagined end, if there is one.
                Defaults to ``"termination_logit"``.
            lambda_target (NestedKey): where a rollout has its returns. Defaults to
                ``"lambda_target"``.
            discount_weight (NestedKey): where a rollout has its weights. Defaults to
                ``"discount_weight"``.
            entropy_noise (NestedKey): optional noise of the entropy.
        """

        termination_logit: NestedKey = "termination_logit"
        lambda_target: NestedKey = "lambda_target"
        discount_weight: NestedKey = "discount_weight"
        entropy_noise: NestedKey = "entropy_noise"

    default_keys: Any = _AcceptedKeys
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TDLambda,)
    out_keys = ["loss_actor", "loss_value"]  # noqa: RUF012 - TorchRL's convention

    policy: TanhGaussianPolicy
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams

    def __init__(
        self,
        actor_network: PolicyActor,
        value_network: TensorDictModule,
        world_model: TensorDictModuleBase,
        *,
        entropy_bonus: float = 1e-4,
        discount_loss: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(actor_network, value_network, world_model, **kwargs)
        self.convert_to_functional(actor_network.policy, "policy")
        self.entropy_bonus = entropy_bonus
        self.discount_loss = discount_loss

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Imagines from the batch and returns the terms in ``out_keys``."""
        has_actor = "loss_actor" in self.out_keys  # or nothing needs the rollout's gradients
        with contextlib.nullcontext() if has_actor else torch.no_grad():
            rollout = self.imagine(tensordict)
        terms = {"loss_actor": self.actor_loss, "loss_value": self.value_loss}
        out = TensorDict({key: terms[key](rollout) for key in self.out_keys})
        self._clear_weakrefs(tensordict, out, "policy_params", "value_network_params")
        return out

    def imagine(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Imagines a rollout from each state, with its returns and weights, ``[*, H]``."""
        with (
            hold_out_net(self.world_model),
            self.policy_params.to_module(self.actor_network.policy),
        ):
            rollout = self._imagine(tensordict)
        keys = self.tensor_keys
        reward, discount = self._reward_and_discount(rollout)
        # a frozen V still passes the gradient to the states
        frozen = self.target_value_network_params
        with frozen.to_module(self.value_network, preserve_module_state=False):
            next_value = self._value(step_mdp(rollout))
        same_shape(keys.value, next_value, reward.shape)
        never = torch.zeros_like(reward, dtype=torch.bool)  # the discount says it all
        target = td_lambda_return_estimate(
            discount, self.value_estimator.lmbda, next_value, reward, never
        )
        weight = torch.ones_like(target)
        if self.discount_loss:
            until = discount[..., :-1, :].detach().cumprod(-2)
            weight = torch.cat([weight[..., :1, :], until], -2)
        rollout.set(keys.lambda_target, target)
        rollout.set(keys.discount_weight, weight)
        if (noise := tensordict.get(keys.entropy_noise, None)) is not None:
            rollout.set(keys.entropy_noise, noise)
        return rollout

    def actor_loss(self, rollout: TensorDictBase) -> Tensor:
        """The returns and the entropy of a rollout ``[*, H]``, which the actor climbs."""
        keys = self.tensor_keys
        objective = rollout.get(keys.lambda_target)
        if self.entropy_bonus:
            objective = objective + self.entropy_bonus * self.entropy(rollout)
        error = -(rollout.get(keys.discount_weight) * objective).mean((-2, -1))
        return self._reduced(error, rollout[..., 0])

    def value_loss(self, rollout: TensorDictBase) -> Tensor:
        """The regression of V on the returns of a rollout ``[*, H]``."""
        keys = self.tensor_keys
        rollout = rollout.detach()
        with self.value_network_params.to_module(self.value_network):
            value = self._value(rollout)
        error = (value - rollout.get(keys.lambda_target)).square()
        error = (rollout.get(keys.discount_weight) * error).mean((-2, -1))
        return self._reduced(error, rollout[..., 0])

    def entropy(self, rollout: TensorDictBase) -> Tensor:
        """One sample's estimate of the actor's entropy in each state, ``[*, H, 1]``."""
        states = [rollout.get(key).detach() for key in self.policy.in_keys[:-1]]
        taken = rollout.get(self.actor_network.action_key).flatten(rollout.ndim)
        noise = given_or_drawn(rollout, self.tensor_keys.entropy_noise, taken)
        with self.policy_params.to_module(self.policy):
            _, log_prob = self.policy.module.sample(torch.cat(states, -1), noise)
        return -log_prob.unsqueeze(-1)

    def _reward_and_discount(self, rollout: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Each chunk's reward, and what a value after it counts, ``[*, H, 1]``."""
        keys = self.tensor_keys
        reward = rollout.get(("next", keys.reward))
        logit = rollout.get(("next", keys.termination_logit), None)
        if logit is None:
            ended = rollout.get(("next", keys.terminated)).to(reward.dtype)
        else:
            ended = logit.sigmoid()
            negative = getattr(self.world_model, "negative_reward", None)
            if negative is not None:  # the reward is read off the end
                reward = ended - float(negative)
        alive = torch.ones_like(ended) if self.ignore_terminated else 1 - ended
        return reward, self.value_estimator.gamma * alive
