"""Policy extraction by DDPG+BC: a Gaussian that maximises Q and clones the dataset's actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule
from torchrl.objectives.utils import hold_out_net

from torchrl_mac.modules import GaussianPolicy
from torchrl_mac.objectives.common import GoalKeys, condition_and_action, same_shape

__all__ = ["DDPGBCLoss"]


class DDPGBCLoss(LossModule):
    r"""Trains a Gaussian actor of constant deviation by a Q that other losses train.

    With its mean :math:`\mu(s)`,

    .. math::

        \mathcal L_{actor} = - \frac{Q(s, \mathrm{clip}\, \mu(s))}{\mathrm{sg}[\overline{|Q|}]}
        - \alpha \log \mathcal N(A; \mu(s), \sigma^2 I)

    where :math:`\overline{|Q|}` is the mean size of Q in the batch: DDPG+BC
    (https://arxiv.org/abs/2406.09329), the actor of OGBench's GCIQL
    (https://arxiv.org/abs/2410.20092), whose values are those of
    :class:`~torchrl_mac.objectives.InSampleValueLoss`. TorchRL's
    :class:`~torchrl.objectives.IQLLoss` weighs the dataset's actions by their advantage instead,
    and its :class:`~torchrl.objectives.TD3BCLoss` brings critics and a target of its own.

    Args:
        actor_network (GaussianPolicy): the actor.
        qvalue_network (QValueEnsemble or TensorDictModule): writes ``"state_action_value"``
            ``[*, 1]``: of an ensemble what its ``q_aggregation`` says. Not trained here.

    Keyword Args:
        alpha (float, optional): the weight of cloning. Defaults to 1.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what actor and Q read (``"observation"`` ``[*, O]``; for a ``"goal"``, if they
    read one, ``"actor_goal"`` ``[*, G]``) and the dataset's ``"action"``, flat ``[*, D]`` or a
    chunk ``[*, h, A]``.

    Raises:
        ValueError: if ``alpha`` is negative.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import GaussianPolicy, NormedMLP, QValueEnsemble, StackedMLP
        >>> from torchrl_mac.objectives import DDPGBCLoss
        >>> actor = GaussianPolicy(NormedMLP(4, 6, num_cells=(32,)), action_dim=6)
        >>> network = StackedMLP(2, 4 + 6, 1, num_cells=(32,), broadcast=True)
        >>> loss = DDPGBCLoss(actor, QValueEnsemble(network, q_aggregation="min"))
        >>> loss_actor = loss(observation=torch.randn(8, 4), action=torch.rand(8, 6))
        >>> loss_actor.backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            action (NestedKey): the dataset's action. Defaults to ``"action"``.
            goal (NestedKey): the goal's entry for the networks, if they read one. Defaults to
                ``"goal"``.
            actor_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"actor_goal"``.
            state_action_value (NestedKey): what ``qvalue_network`` writes. Defaults to
                ``"state_action_value"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        action: NestedKey = "action"
        goal: NestedKey = "goal"
        actor_goal: NestedKey = "actor_goal"
        state_action_value: NestedKey = "state_action_value"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys: Any = _AcceptedKeys
    out_keys = ["loss_actor"]  # noqa: RUF012 - TorchRL's convention

    actor_network: GaussianPolicy
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule

    def __init__(
        self,
        actor_network: GaussianPolicy,
        qvalue_network: TensorDictModule,
        *,
        alpha: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}.")
        self.convert_to_functional(actor_network, "actor_network")
        self.__dict__["qvalue_network"] = qvalue_network  # read, not trained
        self.alpha = alpha
        self.reduction = reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the actor and Q read."""
        read = [*self.actor_network.in_keys[:-1], *self.qvalue_network.in_keys]
        return self._conditions.sources([*read, self.tensor_keys.action])

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The actor's term."""
        out = TensorDict(loss_actor=self.actor_loss(tensordict))
        self._clear_weakrefs(tensordict, out, "actor_network_params")
        return out

    def actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        """Q of the actor's mode and the likelihood of the dataset's actions."""
        policy, action_key = self.actor_network.module, self.tensor_keys.action
        condition, taken = condition_and_action(
            tensordict, self.actor_network, self._conditions, action_key
        )
        with self.actor_network_params.to_module(self.actor_network):
            mean = policy.mean(condition)
        inputs = self._conditions.read(tensordict, self.qvalue_network.in_keys)
        inputs[action_key] = mean.clamp(-1, 1).reshape(inputs[action_key].shape)
        with hold_out_net(self.qvalue_network):  # it still passes the gradient to the action
            out = self.qvalue_network(TensorDict(inputs, batch_size=condition.shape[:-1]))
        key = self.tensor_keys.state_action_value
        value = same_shape(key, out.get(key), (*condition.shape[:-1], 1)).squeeze(-1)
        scale = value.detach().abs().mean() + 1e-6
        error = -value / scale - self.alpha * policy.log_prob(mean, taken)
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error, tensordict, weights=weights)
