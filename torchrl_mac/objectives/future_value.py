"""Values of futures, on top of values that are Monte-Carlo returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator

from torchrl_mac.objectives.common import GoalKeys, required, same_shape
from torchrl_mac.objectives.regression import ValueLoss, difference, expectation

__all__ = ["FutureValueLoss"]


class FutureValueLoss(LossModule):
    r"""Fits V to the returns of the data and Q, of futures, to h rewards and V behind them.

    With the return to go G, the reward R of the next h steps and :math:`m = 0` if the task ends
    in them,

    .. math::

        \mathcal L_{value} &= \ell( V(s_t),\, G ) \\
        \mathcal L_{qvalue} &= \ell( Q(s_{t+1:t+h}, a_t),\, R + \gamma^h m\, V(s_{t+h}) )

    with no gradient in the target and no target networks: the values that D-MPC plans by
    (https://arxiv.org/abs/2410.05364), in the version of https://arxiv.org/abs/2512.08108. The
    difference :math:`\ell` is a square or, where values are probabilities, such as that of reaching
    a goal, the cross-entropy: V and Q then write logits, the target reads the probability that V's
    is, and labels and targets are clipped to [0, 1].

    Args:
        value_network (TensorDictModule): writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (TensorDictModule): reads the future, flat ``[*, h * O]``, and writes
            ``"state_action_value"`` ``[*, 1]``.

    Keyword Args:
        horizon (int): the number of steps h from the state to the next.
        loss_function (str, optional): ``"l2"`` (default) or ``"bce"``.
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what V reads (``"observation"`` ``[*, O]``), also under ``"next"``, there with
    the ``"reward"``, ``"done"`` and ``"terminated"`` of the way, ``[*, 1]``; what Q reads, the
    future (``("future", "observation")``, ``[*, h, O]`` or flat) and the ``"action"``; and the
    ``"return_to_go"`` ``[*, 1]``. For their ``"goal"``, if they read one, there is a
    ``"value_goal"``. :class:`~torchrl_mac.data.ActionChunkStorage` makes all of it.

    Raises:
        ValueError: if ``horizon`` is smaller than 1 or ``loss_function`` is unknown.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import NormedMLP
        >>> from torchrl_mac.objectives import FutureValueLoss
        >>> value = ValueOperator(NormedMLP(4, 1, num_cells=(32,)))
        >>> qvalue = ValueOperator(
        ...     NormedMLP(8 * 4 + 2, 1, num_cells=(32,)),
        ...     in_keys=[("future", "observation"), "action"],
        ... )
        >>> loss = FutureValueLoss(value, qvalue, horizon=8)
        >>> loss.make_value_estimator(gamma=0.99)
        >>> loss_value, loss_qvalue = loss(
        ...     observation=torch.randn(16, 4),
        ...     future_observation=torch.randn(16, 8, 4),
        ...     action=torch.rand(16, 2),
        ...     return_to_go=torch.randn(16, 1),
        ...     next_observation=torch.randn(16, 4),
        ...     next_reward=torch.randn(16, 1),
        ...     next_done=torch.zeros(16, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(16, 1, dtype=torch.bool),
        ... )
        >>> (loss_value + loss_qvalue).backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            future (NestedKey): the future, for Q. Defaults to ``("future", "observation")``.
            return_to_go (NestedKey): the label of V. Defaults to ``"return_to_go"``.
            goal (NestedKey): the goal's entry for the networks, if they read one. Defaults to
                ``"goal"``.
            value_goal (NestedKey): the entry of the input that it is. Defaults to
                ``"value_goal"``.
            value (NestedKey): the output of V. Defaults to ``"state_value"``.
            state_action_value (NestedKey): the output of Q. Defaults to
                ``"state_action_value"``.
            reward (NestedKey): the reward of the h steps, under ``"next"``. Defaults to
                ``"reward"``.
            done (NestedKey): under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): whether the task ends in the h steps, under ``"next"``.
                Defaults to ``"terminated"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        future: NestedKey = ("future", "observation")
        return_to_go: NestedKey = "return_to_go"
        goal: NestedKey = "goal"
        value_goal: NestedKey = "value_goal"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss_value", "loss_qvalue"]  # noqa: RUF012 - TorchRL's convention

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule,
        *,
        horizon: int,
        loss_function: ValueLoss = "l2",
        reduction: str = "mean",
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}.")
        if loss_function not in get_args(ValueLoss):
            raise ValueError(
                f"loss_function must be one of {get_args(ValueLoss)}, got {loss_function!r}."
            )
        super().__init__()
        self.horizon = horizon
        self.loss_function = loss_function
        self.reduction = reduction
        self.convert_to_functional(value_network, "value_network")
        self.convert_to_functional(qvalue_network, "qvalue_network")
        self.make_value_estimator()

    @property
    def in_keys(self) -> list[NestedKey]:
        """What V and Q read, now and after the h steps, and what they learn."""
        keys, value, qvalue = self.tensor_keys, self.value_network, self.qvalue_network
        following = [key for key in value.in_keys if key != keys.goal]
        following += [keys.reward, keys.done, keys.terminated]
        return [
            *self._conditions.sources([*value.in_keys, *qvalue.in_keys]),
            keys.return_to_go,
            *(unravel_key(("next", key)) for key in following),
        ]

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.tensor_keys.goal, self.tensor_keys.value_goal)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the other."""
        terms = {"loss_value": self.value_loss, "loss_qvalue": self.qvalue_loss}
        out = TensorDict({key: terms[key](tensordict) for key in self.out_keys})
        self._clear_weakrefs(tensordict, out, "value_network_params", "qvalue_network_params")
        return out

    def value_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of V on the returns of the data."""
        label = required(tensordict, self.tensor_keys.return_to_go)
        return self._difference(self._value(tensordict), label, tensordict)

    def qvalue_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of Q on the reward of the future and V behind it."""
        keys, target = self.tensor_keys, self.target(tensordict)
        inputs = self._conditions.read(tensordict, self.qvalue_network.in_keys)
        inputs[keys.future] = inputs[keys.future].flatten(target.ndim - 1)
        with self.qvalue_network_params.to_module(self.qvalue_network):
            qvalue = self.qvalue_network(TensorDict(inputs, target.shape[:-1]))
        return self._difference(qvalue.get(keys.state_action_value), target, tensordict)

    @torch.no_grad()
    def target(self, tensordict: TensorDictBase) -> Tensor:
        """The targets ``[*, 1]`` of Q."""
        keys, following = self.tensor_keys, self.next_value(tensordict)
        read = [unravel_key(("next", key)) for key in (keys.reward, keys.done, keys.terminated)]
        outcome = {key: required(tensordict, key) for key in read}
        same_shape("the reward", outcome[read[0]], following.shape)
        return self.value_estimator.value_estimate(
            TensorDict(outcome, following.shape[:-1]), next_value=following
        )

    def next_value(self, tensordict: TensorDictBase) -> Tensor:
        """What V expects after the h steps, ``[*, 1]``."""
        return expectation(self._value(tensordict, following=True), self.loss_function)

    def _value(self, tensordict: TensorDictBase, *, following: bool = False) -> Tensor:
        read = self._conditions.read
        inputs = read(tensordict, self.value_network.in_keys, following=following)
        size = inputs[self.value_network.in_keys[0]].shape[:-1]
        with self.value_network_params.to_module(self.value_network):
            return self.value_network(TensorDict(inputs, size)).get(self.tensor_keys.value)

    def _difference(self, value: Tensor, target: Tensor, tensordict: TensorDictBase) -> Tensor:
        same_shape("the value's target", target, value.shape)
        if self.loss_function == "bce":
            target = target.clamp(0, 1)
        error = difference(value, target, self.loss_function)
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error.squeeze(-1), tensordict, weights=weights)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            names = ("value", "reward", "done", "terminated")
            self._value_estimator.set_keys(**{n: getattr(self.tensor_keys, n) for n in names})

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: Any
    ) -> None:
        """Sets the discount.

        Args:
            value_type (ValueEstimators, optional): ``TD0``, the default.
            **hyperparams: ``gamma``, per environment step, defaults to 0.999.

        Raises:
            ValueError: if ``gamma`` is out of range.
        """
        gamma = hyperparams.pop("gamma", 0.999)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be above 0 and at most 1, got {gamma}.")
        dispatch_value_estimator(
            self,
            self.default_value_estimator if value_type is None else value_type,
            supported=(ValueEstimators.TD0,),
            value_network=None,
            gamma=gamma**self.horizon,
            **hyperparams,
        )
        self._forward_value_estimator_keys()
