"""Behaviour cloning with a squashed Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_mac.modules import TanhGaussianPolicy
from torchrl_mac.objectives.common import GoalKeys, condition_and_action

__all__ = ["GaussianBCLoss"]


class GaussianBCLoss(LossModule):
    r"""Clones behaviour by maximum likelihood.

    .. math::

        \mathcal L_{bc} = - \log \pi(a \mid s)

    A Gaussian over a chunk has one mode, where a flow has as many as the data: MAC with it in the
    flow's place is the ablation MAC(Gau) of https://arxiv.org/abs/2512.08108.

    Args:
        policy (TanhGaussianPolicy): the behaviour policy.

    Keyword Args:
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what the policy is conditioned on (``"observation"`` ``[*, O]``; for its
    ``"goal"``, if it reads one, ``"actor_goal"`` ``[*, G]``) and the action, flat ``[*, D]`` or a
    chunk ``[*, h, A]``. Actions are taken to be within :math:`\pm (1 - 10^{-5})`.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import NormedMLP, TanhGaussianPolicy
        >>> from torchrl_mac.objectives import GaussianBCLoss
        >>> policy = TanhGaussianPolicy(NormedMLP(4, 2 * 20, num_cells=(32,)), action_dim=20)
        >>> loss_bc = GaussianBCLoss(policy)(
        ...     observation=torch.randn(8, 4), action=torch.rand(8, 10, 2)
        ... )
        >>> loss_bc.backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            action (NestedKey): the dataset's action. Defaults to ``"action"``.
            goal (NestedKey): the goal's entry for the policy, if it reads one. Defaults to
                ``"goal"``.
            actor_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"actor_goal"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        action: NestedKey = "action"
        goal: NestedKey = "goal"
        actor_goal: NestedKey = "actor_goal"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_bc"]  # noqa: RUF012 - TorchRL's convention

    policy: TanhGaussianPolicy
    policy_params: TensorDictParams
    target_policy_params: TensorDictParams

    def __init__(self, policy: TanhGaussianPolicy, *, reduction: str = "mean") -> None:
        super().__init__()
        self.convert_to_functional(policy, "policy")
        self.reduction = reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the policy is conditioned on, and the action."""
        return [*self._conditions.sources(self.policy.in_keys[:-1]), self.tensor_keys.action]

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The negative log-likelihood of the actions."""
        out = TensorDict(loss_bc=self.bc_loss(tensordict))
        self._clear_weakrefs(tensordict, out, "policy_params")
        return out

    def bc_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The negative log-likelihood of the actions."""
        condition, action = condition_and_action(
            tensordict, self.policy, self._conditions, self.tensor_keys.action
        )
        with self.policy_params.to_module(self.policy):
            log_prob = self.policy.module.log_prob(condition, action)
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(-log_prob, tensordict, weights=weights)
