"""Learning values from imagined rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import step_mdp

from torchrl_mac.modules import ChunkActor
from torchrl_mac.objectives.common import autocast_to, ranking_with, required, same_shape
from torchrl_mac.objectives.imagination import ImaginationLossBase
from torchrl_mac.objectives.regression import asymmetric_difference

__all__ = ["ValueExpansionLoss"]


class ValueExpansionLoss(ImaginationLossBase):
    r"""Trains V on the :math:`\lambda`-returns of imagined rollouts and Q one chunk ahead.

    From each state of the batch the actor and the world model imagine ``imagination_horizon``
    chunks :math:`(s^k, A^k, r^k, m^k, s^{k+1})`, where :math:`m = 0` once the task has ended.
    With :math:`\Gamma = \gamma^h` for chunks of :math:`h` actions, a target network
    :math:`\bar V` and stopped gradients on all targets,

    .. math::

        G^k &= r^k + \Gamma m^k [ (1 - \lambda) \bar V(s^{k+1}) + \lambda G^{k+1} ],
        \qquad G^H = \bar V(s^H) \\
        \mathcal L_{value} &= \mathrm{mean}_k ( V(s^k) - G^k )^2 \\
        \mathcal L_{qvalue} &= ( Q(s^0, A^0) - [ r^0 + \Gamma m^0 V(s^1) ] )^2

    (https://arxiv.org/abs/2512.08108). Q bootstraps from the online V and is fitted only at the
    action the actor chose; V looks ahead as far as the rollout goes.

    A Q that reads the first actions of a chunk alone (``first_actions`` of
    :class:`~torchrl_mac.modules.NormedMLP`) ranks chunks by what can be done before the next
    choice. What it learns is then an average over the actions that follow or, with an
    ``expectile`` :math:`\kappa` above one half, what the better ones lead to
    (https://arxiv.org/abs/2512.10926): squares count :math:`\kappa` where Q is below its target and
    :math:`1 - \kappa` elsewhere.

    Args:
        actor_network (ChunkActor): chooses chunks by ``qvalue_network``. It is not
            trained here: its policy's parameters are not this module's.
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (TensorDictModule): writes ``"state_action_value"`` ``[*, 1]``; the same
            module that ``actor_network`` ranks candidates with, if it does. In imagination it ranks
            them with this loss's parameters of it.
        world_model (TensorDictModule): see the base class.

    Keyword Args:
        sampling_dtype (torch.dtype, optional): rollouts are imagined under autocast to this dtype.
            Defaults to none.
        expectile (float, optional): that of Q. Defaults to none: both sides count 1.
        **kwargs: those of :class:`~torchrl_mac.objectives.ImaginationLossBase`:
            ``imagination_horizon``, ``chunk_size``, ``delay_value``, ``ignore_terminated``
            (:math:`m = 1` throughout) and ``reduction``.

    The input is that of the base class. The rollout's noise is ``[*, H, N, D]``, for N candidates
    of D coordinates.

    Raises:
        ValueError: if the actor ranks with another Q, or ``expectile`` is not between 0 and 1.

    The discount, per environment step, is set with
    ``make_value_estimator(gamma=0.999, lmbda=1.0)``; these are the defaults.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     ChunkedWorldModel, FlowRejectionActor, NormedMLP, OneStepPolicy
        ... )
        >>> from torchrl_mac.objectives import ValueExpansionLoss
        >>> cells = {"num_cells": (32,)}
        >>> policy = OneStepPolicy(NormedMLP(4 + 20, 20, **cells), action_dim=20)
        >>> value = ValueOperator(NormedMLP(4, 1, **cells))
        >>> qvalue = ValueOperator(NormedMLP(24, 1, **cells), in_keys=["observation", "action"])
        >>> actor = FlowRejectionActor(policy, qvalue, num_candidates=8, chunk_size=10)
        >>> model = ChunkedWorldModel(*(NormedMLP(24, size, **cells) for size in (4, 1, 1)))
        >>> loss = ValueExpansionLoss(actor, value, qvalue, model)
        >>> loss.make_value_estimator(gamma=0.99, lmbda=1.0)
        >>> loss_value, loss_qvalue = loss(observation=torch.randn(8, 4))
        >>> (loss_value + loss_qvalue).backward()
        >>> loss.imagine(TensorDict(observation=torch.randn(8, 4))).shape
        torch.Size([8, 10])
    """

    @dataclass
    class _AcceptedKeys(ImaginationLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            state_action_value (NestedKey): the value of a chunk. Defaults to what the actor ranks
                by, or ``"state_action_value"``.
        """

        state_action_value: NestedKey = "state_action_value"

    default_keys: Any = _AcceptedKeys
    out_keys = ["loss_value", "loss_qvalue"]  # noqa: RUF012

    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ChunkActor,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        world_model: TensorDictModuleBase,
        *,
        sampling_dtype: torch.dtype | None = None,
        expectile: float | None = None,
        **kwargs: Any,
    ) -> None:
        if expectile is not None and not 0 < expectile < 1:
            raise ValueError(f"expectile must be between 0 and 1, or None, got {expectile}.")
        if getattr(actor_network, "qvalue_network", qvalue_network) is not qvalue_network:
            raise ValueError(
                "actor_network ranks candidates with another network than qvalue_network; give "
                "both the same, so that chunks are chosen by the Q that is trained."
            )
        super().__init__(actor_network, value_network, world_model, **kwargs)
        self.sampling_dtype = sampling_dtype
        self.expectile = expectile
        self.convert_to_functional(qvalue_network, "qvalue_network")
        if (ranked := getattr(actor_network, "qvalue_key", None)) is not None:
            self.set_keys(state_action_value=ranked)  # what is trained is what chunks are ranked by

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Imagines from the batch and returns the terms in ``out_keys``."""
        # Q looks at the first imagined chunk only.
        horizon = self.imagination_horizon if "loss_value" in self.out_keys else 1
        rollout = self.imagine(tensordict, horizon)
        terms = {"loss_value": self.value_loss, "loss_qvalue": self.qvalue_loss}
        out = TensorDict({key: terms[key](rollout) for key in self.out_keys})
        self._clear_weakrefs(
            tensordict,
            out,
            "value_network_params",
            "qvalue_network_params",
        )
        return out

    @torch.no_grad()
    def imagine(
        self, tensordict: TensorDictBase, imagination_horizon: int | None = None
    ) -> TensorDictBase:
        """Imagines a rollout from each state, a tensordict of shape ``[*, H]``.

        ``H`` is ``imagination_horizon``, by default this module's. The rollout has the layout of
        :meth:`~torchrl.envs.EnvBase.rollout`: what was seen and done at its root, what followed
        under ``"next"``. All H steps are imagined, whether or not the task has ended before; with
        ``ignore_terminated`` none is said to end it.
        """
        device = required(tensordict, self.in_keys[0]).device
        ranking = ranking_with(self.actor_network, self.qvalue_network_params)
        with autocast_to(self.sampling_dtype, device), ranking:
            return self._imagine(tensordict, imagination_horizon)

    def value_loss(self, rollout: TensorDictBase) -> Tensor:
        """The regression of V on the returns of a rollout ``[*, H]``."""
        target = self.value_target(rollout)
        with self.value_network_params.to_module(self.value_network):
            value = self._value(rollout)
        same_shape(self.tensor_keys.value, value, target.shape)
        error = (value - target).square().mean((-2, -1))
        return self._reduced(error, rollout[..., 0])

    def qvalue_loss(self, rollout: TensorDictBase) -> Tensor:
        """The regression of Q on one imagined chunk, the first of a rollout ``[*, H]``."""
        first = rollout[..., 0]
        keys = self.tensor_keys
        with torch.no_grad(), self.value_network_params.to_module(self.value_network):
            next_value = self._value(step_mdp(first))
        reward = first.get(("next", keys.reward))
        alive = first.get(("next", keys.terminated)).logical_not()
        target = reward + self.value_estimator.gamma * alive * next_value
        with self.qvalue_network_params.to_module(self.qvalue_network):
            qvalue = self.qvalue_network(first.select(*self.qvalue_network.in_keys))
        chosen = same_shape(
            keys.state_action_value, qvalue.get(keys.state_action_value), target.shape
        )
        error = asymmetric_difference(chosen, target, "l2", self.expectile).mean(-1)
        return self._reduced(error, first)

    @torch.no_grad()
    def value_target(self, rollout: TensorDictBase) -> Tensor:
        """The returns ``[*, H, 1]`` that V is regressed on."""
        following = step_mdp(rollout)
        device = rollout.get(self.value_network.in_keys[0]).device
        with (
            autocast_to(self.sampling_dtype, device),
            self.target_value_network_params.to_module(self.value_network),
        ):
            next_value = self._value(following)
        return self.value_estimator.value_estimate(rollout, next_value=next_value)
