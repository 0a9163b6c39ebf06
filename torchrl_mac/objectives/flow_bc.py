"""Behaviour cloning by flow matching, with a one-step student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_mac.modules import FlowMatchingPolicy, OneStepPolicy
from torchrl_mac.objectives.common import (
    GoalKeys,
    autocast_to,
    condition_and_action,
    flow_matching_error,
    given_or_drawn,
    mean_of_valid,
)

__all__ = ["FlowBCLoss"]


class FlowBCLoss(LossModule):
    r"""Clones behaviour with a flow and distils the flow into a one-step policy.

    With noise :math:`x_0, z \sim \mathcal N(0, I)` and a time :math:`t \sim U[0, 1)` per sample,

    .. math::

        \mathcal L_{flow} &= \| v(s, (1 - t) x_0 + t a, t) - (a - x_0) \|^2 \\
        \mathcal L_{distillation} &= \| \pi_\omega(s, z) - \mathrm{sg}[\mu(s, z)] \|^2

    where :math:`\mu` integrates the flow and clips, the student :math:`\pi_\omega` is not
    clipped, and squares are averaged over the action's coordinates
    (https://arxiv.org/abs/2512.08108, https://arxiv.org/abs/2502.02538). The flow learns from
    the first term only and the student from the second only.

    Without a ``teacher`` the student is a flow of its own with a single Euler step,
    :math:`\pi_\omega(s, z) = z + v_\omega(s, z, 0)`, and flow matching at that step is regression
    on the dataset's action, an ablation of MAC:

    .. math::

        \mathcal L_{distillation} = \| \pi_\omega(s, z) - a \|^2

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour policy.
        onestep_policy (OneStepPolicy, optional): its student. Default: none, and no distillation.

    Keyword Args:
        teacher (bool, optional): whether the student learns from the flow. Defaults to ``True``.
        sampling_dtype (torch.dtype, optional): the flow's own samples, which the student learns
            from, are drawn under autocast to this dtype. Defaults to none.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what the policies are conditioned on (``"observation"`` ``[*, O]``; for their
    ``"goal"``, if they read one, ``"actor_goal"`` ``[*, G]``) and the
    action, flat ``[*, D]`` or a chunk ``[*, h, A]`` with ``D = h * A``. Noise
    (``"flow_noise"`` and ``"distillation_noise"`` ``[*, D]``, ``"flow_time"`` ``[*, 1]``) is
    drawn unless the input has it. Where it says of a chunk's actions that they are not ``"valid"``
    (bool ``[*, h, 1]``), they are not learned; the average is over all of them, as in
    Q-chunking (https://arxiv.org/abs/2507.07969).

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP, OneStepPolicy
        >>> from torchrl_mac.objectives import FlowBCLoss
        >>> flow = FlowMatchingPolicy(NormedMLP(4 + 20 + 1, 20, num_cells=(32,)), action_dim=20)
        >>> student = OneStepPolicy(NormedMLP(4 + 20, 20, num_cells=(32,)), action_dim=20)
        >>> loss = FlowBCLoss(flow, student)
        >>> loss_flow, loss_distillation = loss(
        ...     observation=torch.randn(8, 4), action=torch.rand(8, 10, 2)
        ... )
        >>> (loss_flow + loss_distillation).backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            action (NestedKey): the dataset's action. Defaults to ``"action"``.
            goal (NestedKey): the goal's entry for the policies, if they read one. Defaults to
                ``"goal"``.
            actor_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"actor_goal"``.
            valid (NestedKey): optionally, which of a chunk's actions are learned.
            flow_noise (NestedKey): optional noise of the flow term.
            flow_time (NestedKey): optional times of the flow term.
            distillation_noise (NestedKey): optional noise of the distillation term.
            priority_weight (NestedKey): optional weight of each sample.
        """

        action: NestedKey = "action"
        goal: NestedKey = "goal"
        actor_goal: NestedKey = "actor_goal"
        valid: NestedKey = "valid"
        flow_noise: NestedKey = "flow_noise"
        flow_time: NestedKey = "flow_time"
        distillation_noise: NestedKey = "distillation_noise"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_flow", "loss_distillation"]  # noqa: RUF012 - TorchRL's convention

    flow_policy: FlowMatchingPolicy
    flow_policy_params: TensorDictParams
    target_flow_policy_params: TensorDictParams
    onestep_policy: OneStepPolicy
    onestep_policy_params: TensorDictParams
    target_onestep_policy_params: TensorDictParams

    def __init__(
        self,
        flow_policy: FlowMatchingPolicy,
        onestep_policy: OneStepPolicy | None = None,
        *,
        teacher: bool = True,
        sampling_dtype: torch.dtype | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.sampling_dtype = sampling_dtype
        self.convert_to_functional(flow_policy, "flow_policy")
        if onestep_policy is None:
            self.out_keys = ["loss_flow"]
        else:
            self.convert_to_functional(onestep_policy, "onestep_policy")
        self.reduction = reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the policies are conditioned on, and the action."""
        policies = [getattr(self, name, None) for name in ("flow_policy", "onestep_policy")]
        conditions = [key for policy in policies if policy for key in policy.in_keys[:-1]]
        return [*self._conditions.sources(conditions), self.tensor_keys.action]

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.actor_goal)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the other."""
        terms = {"loss_flow": self.flow_loss, "loss_distillation": self.distillation_loss}
        out = TensorDict({key: terms[key](tensordict) for key in self.out_keys})
        self._clear_weakrefs(tensordict, out, "flow_policy_params", "onestep_policy_params")
        return out

    def flow_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The flow-matching regression of the behaviour policy."""
        condition, action = self._condition_and_action(tensordict, self.flow_policy)
        with self.flow_policy_params.to_module(self.flow_policy):
            error = flow_matching_error(
                self.flow_policy, condition, action, tensordict, self.tensor_keys
            )
        return self._reduced(error, tensordict)

    def distillation_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of the student on the flow's samples or, without a teacher, the data."""
        keys = self.tensor_keys
        condition, action = self._condition_and_action(tensordict, self.onestep_policy)
        noise = given_or_drawn(tensordict, keys.distillation_noise, action)
        with self.onestep_policy_params.to_module(self.onestep_policy):
            sample = self.onestep_policy(condition, noise, clamp=False)
        if not self.teacher:
            error = mean_of_valid((sample - action).square(), tensordict.get(keys.valid, None))
            return self._reduced(error, tensordict)
        with (
            torch.no_grad(),
            autocast_to(self.sampling_dtype, noise.device),
            self.flow_policy_params.to_module(self.flow_policy),
        ):
            target = self.flow_policy(condition, noise)
        return self._reduced((sample - target).square().mean(-1), tensordict)

    def _condition_and_action(
        self, tensordict: TensorDictBase, policy: FlowMatchingPolicy | OneStepPolicy
    ) -> tuple[Tensor, Tensor]:
        return condition_and_action(tensordict, policy, self._conditions, self.tensor_keys.action)

    def _reduced(self, error: Tensor, tensordict: TensorDictBase) -> Tensor:
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error, tensordict, weights=weights)
