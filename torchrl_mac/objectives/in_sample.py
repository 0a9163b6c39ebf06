"""Values of what the data does: no policy is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from torchrl_mac.objectives.common import required, same_shape
from torchrl_mac.objectives.critics import QValueLossBase
from torchrl_mac.objectives.regression import (
    Asymmetry,
    asymmetric_difference,
    expectation,
)

__all__ = ["InSampleValueLoss"]


class InSampleValueLoss(QValueLossBase):
    r"""Trains V on the critics of the actions in the data, and the critics on V behind them.

    For a window of k environment steps with the discounted sum of rewards R, and :math:`m = 0` if
    the task ends on the way,

    .. math::

        \mathcal L_{value} &= w \, \ell\Bigl( V(s),\; \mathrm{agg}_e \bar Q_e(s, A) \Bigr),
        \qquad w = \begin{cases}
            \kappa & \mathrm{agg}_e \bar Q_e(s, A) \ge V(s) \\ 1 - \kappa & \text{else}
        \end{cases} \\
        \mathcal L_{qvalue} &= \frac1E \sum_e
        \ell\Bigl( Q_e(s, A),\; R + \gamma^k m \, V(s_{t+k}) \Bigr)

    where no gradient goes into the second argument of :math:`\ell`. With a large expectile
    :math:`\kappa` this is implicit Q-learning (IQL, https://arxiv.org/abs/2110.06169), as GCIQL
    uses it; without one, the SARSA values of SHARSA (https://arxiv.org/abs/2506.04168); with
    chunks, the quantile form and ``"bce"``, decoupled Q-chunking without its chunk critic
    (https://arxiv.org/abs/2512.10926). TorchRL's :class:`~torchrl.objectives.IQLLoss` has the
    minimum of the critics, squares, one step, and an actor that is trained by weighted cloning.

    Args:
        value_network (TensorDictModule): V; writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics, see
            :class:`~torchrl_mac.objectives.QValueLossBase`.

    Keyword Args:
        expectile (float, optional): :math:`\kappa`. Defaults to none: both sides count 1.
        asymmetry (str, optional): ``"expectile"`` (default), or ``"quantile"``, where V's
            :math:`\ell` is an absolute difference, with ``"bce"`` of logits.
        **kwargs: those of :class:`~torchrl_mac.objectives.QValueLossBase`: ``num_qvalue_nets``,
            ``q_aggregation``, ``chunk_size``, ``loss_function``, ``target_range``,
            ``sampling_dtype``, ``critic_reduction``, ``reduction``. With
            ``loss_function="bce"`` V, too, writes logits.

    The input holds what the networks read, ``"observation"`` ``[*, O]`` and ``"action"``
    (``[*, h, A]`` or flat), and under ``"next"`` what V reads, with the ``"reward"``, ``"done"``
    and ``"terminated"`` of the way there, ``[*, 1]``, as
    :class:`~torchrl_mac.data.ActionChunkStorage` makes them. If they read a ``"goal"``, it is the
    ``"value_goal"`` of the input.

    Raises:
        ValueError: if ``expectile`` is not between 0 and 1 or a name is unknown.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import NormedMLP, QValueEnsemble, StackedMLP
        >>> from torchrl_mac.objectives import InSampleValueLoss
        >>> value = ValueOperator(NormedMLP(4, 1, num_cells=(32,)), in_keys=["observation"])
        >>> critics = StackedMLP(2, 4 + 3, 1, num_cells=(32,), broadcast=True)
        >>> qvalue = QValueEnsemble(critics, q_aggregation="min")
        >>> loss = InSampleValueLoss(value, qvalue, expectile=0.9)
        >>> loss.make_value_estimator(gamma=0.99)
        >>> loss_value, loss_qvalue, *_ = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 3),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_value + loss_qvalue).backward()
    """

    @dataclass
    class _AcceptedKeys(QValueLossBase._AcceptedKeys):
        """Keys that :meth:`set_keys` can change, beside those of the base class.

        Attributes:
            value (NestedKey): the output of ``value_network``. Defaults to ``"state_value"``.
        """

        value: NestedKey = "state_value"

    default_keys = _AcceptedKeys
    out_keys = ["loss_value", "loss_qvalue", "pred_value", "target_value"]  # noqa: RUF012

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        expectile: float | None = None,
        asymmetry: Asymmetry = "expectile",
        **kwargs: Any,
    ) -> None:
        if expectile is not None and not 0 < expectile < 1:
            raise ValueError(f"expectile must be between 0 and 1, or None, got {expectile}.")
        if asymmetry not in get_args(Asymmetry):
            raise ValueError(f"asymmetry must be one of {get_args(Asymmetry)}, got {asymmetry!r}.")
        super().__init__(qvalue_network, **kwargs)
        self.expectile = expectile
        self.asymmetry: Asymmetry = asymmetry
        self.convert_to_functional(value_network, "value_network")

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the networks read, and what becomes of it."""
        read = list(self.value_network.in_keys)
        return list(dict.fromkeys([*self._conditions.sources(read), *self._transition_keys(read)]))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        out = TensorDict()
        if "loss_value" in self.out_keys:
            out.set("loss_value", self.value_loss(tensordict))
        if "loss_qvalue" in self.out_keys:
            loss, values = self.qvalue_loss(tensordict)
            out.update({"loss_qvalue": loss, **values})
        self._clear_weakrefs(
            tensordict,
            out,
            "value_network_params",
            "qvalue_network_params",
            "target_qvalue_network_params",
        )
        return out

    def value_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of V on the target critics of the data's actions."""
        value = self._value(tensordict).squeeze(-1)
        inputs = self._conditions.read(tensordict, self._critic_keys)
        inputs[self.tensor_keys.action] = required(tensordict, self.tensor_keys.action)
        with torch.no_grad():
            taken = TensorDict(inputs, batch_size=value.shape)
            target = self.expected(self.members(taken, self.target_qvalue_network_params))
        same_shape("the critics' value", target, value.shape)
        error = asymmetric_difference(
            value, target, self.loss_function, self.expectile, self.asymmetry
        )
        return self._reduced(error, tensordict)

    def _next_value(self, tensordict: TensorDictBase) -> Tensor:
        return expectation(self._value(tensordict, following=True), self.loss_function)

    def _value(self, tensordict: TensorDictBase, *, following: bool = False) -> Tensor:
        read = self.value_network.in_keys
        inputs = self._conditions.read(tensordict, read, following=following)
        size = tensordict.get(("next", self.tensor_keys.reward)).shape[:-1]
        with self.value_network_params.to_module(self.value_network):
            return self.value_network(TensorDict(inputs, size)).get(self.tensor_keys.value)
