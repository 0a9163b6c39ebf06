"""Decoupled Q-chunking: critics of long chunks teach those of what a policy does of them."""

from __future__ import annotations

from typing import Any, get_args

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor

from torchrl_mac.modules import QValueEnsemble
from torchrl_mac.modules.qvalues import aggregate
from torchrl_mac.objectives.common import same_shape
from torchrl_mac.objectives.in_sample import InSampleValueLoss
from torchrl_mac.objectives.regression import (
    Asymmetry,
    ValueLoss,
    asymmetric_difference,
    difference,
    expectation,
)

__all__ = ["DQCLoss"]


class DQCLoss(InSampleValueLoss):
    r"""Trains critics of chunks, critics of their first actions on these, and V.

    Critics :math:`Q^c_e` of whole chunks :math:`A` look h steps ahead without what the behaviour
    does there being in their way, but a policy of chunks so long does not react. So critics
    :math:`Q_e` of the first :math:`h_a` actions, which a policy proposes and executes, learn what
    the better ones of the chunks that begin so are worth. For a window of k environment steps with
    the discounted sum of rewards R, and :math:`m = 0` if the task ends on the way,

    .. math::

        \mathcal L_{chunk\,qvalue} &= \frac1E \sum_e
        \ell\Bigl( Q^c_e(s, A),\; R + \gamma^k m \, V(s_{t+k}) \Bigr) \\
        \mathcal L_{qvalue} &= \frac1E \sum_e
        \ell_{\kappa_d}\Bigl( Q_e(s, A_{1:h_a}),\; Q^c_e(s, A) \Bigr) \\
        \mathcal L_{value} &= \ell_{\kappa_b}\Bigl(
        V(s),\; \mathrm{agg}_e \bar Q_e(s, A_{1:h_a}) \Bigr)

    where no gradient goes into the second argument of :math:`\ell`, and :math:`\ell_\kappa` counts
    :math:`\kappa` where the first one is not above the second and else :math:`1 - \kappa`
    (https://arxiv.org/abs/2512.10926). Each critic of first actions has a chunk critic of its own
    to learn from. Without chunk critics, :math:`Q_e` learns from the window itself: that is
    :class:`~torchrl_mac.objectives.InSampleValueLoss`, with which the methods that the paper
    compares with are made.

    Args:
        value_network (TensorDictModule): V; writes ``"state_value"`` ``[*, 1]``.
        qvalue_network (QValueEnsemble, TensorDictModule or list of them): the critics
            :math:`Q_e`, see :class:`~torchrl_mac.objectives.QValueLossBase`. Candidates are ranked
            by them. They get the whole chunk; networks with ``first_actions`` read its beginning.
        chunk_qvalue_network (QValueEnsemble): as many critics :math:`Q^c_e`.

    Keyword Args:
        expectile (float, optional): :math:`\kappa_b`. Defaults to 0.9.
        asymmetry (str, optional): of :math:`\ell_{\kappa_b}`, ``"expectile"`` or ``"quantile"``
            (default), see the base class.
        distillation_expectile (float, optional): :math:`\kappa_d`. Defaults to 0.5; ``None``: both
            sides count 1.
        distillation_asymmetry (str, optional): of :math:`\ell_{\kappa_d}`. Defaults to
            ``"expectile"``.
        loss_function (str, optional): ``"bce"`` (default), where all networks write logits, or
            ``"l2"``.
        **kwargs: the others of the base class.

    The input is that of the base class, with chunks ``[*, h, A]``. Windows that are not
    ``("next", "whole")``, if it is there, count with an error of 0: as
    :class:`~torchrl_mac.data.FirstActions` says it, those whose first actions run over the end of
    their episode.

    Raises:
        ValueError: if a number is out of range, a name is unknown, or the two kinds of critics do
            not read the same entries or are not as many.

    Examples:
        >>> import torch
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import NormedMLP, QValueEnsemble, StackedMLP
        >>> from torchrl_mac.objectives import DQCLoss
        >>> value = ValueOperator(NormedMLP(4, 1, num_cells=(32,)), in_keys=["observation"])
        >>> qvalue, chunk_qvalue = (
        ...     QValueEnsemble(
        ...         StackedMLP(
        ...             2, 4 + k * 2, 1, num_cells=(32,), first_actions=k, broadcast=True
        ...         )
        ...     )
        ...     for k in (5, 25)
        ... )
        >>> loss = DQCLoss(value, qvalue, chunk_qvalue)
        >>> loss.make_value_estimator(gamma=0.999)
        >>> loss_value, loss_qvalue, loss_chunk_qvalue, *_ = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 25, 2),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.zeros(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_value + loss_qvalue + loss_chunk_qvalue).backward()
    """

    out_keys = [  # noqa: RUF012 - TorchRL's convention
        *("loss_value", "loss_qvalue", "loss_chunk_qvalue"),
        *("pred_value", "target_value"),
    ]

    chunk_qvalue_network: QValueEnsemble
    chunk_qvalue_network_params: TensorDictParams
    target_chunk_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        value_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        chunk_qvalue_network: QValueEnsemble,
        *,
        expectile: float | None = 0.9,
        asymmetry: Asymmetry = "quantile",
        distillation_expectile: float | None = 0.5,
        distillation_asymmetry: Asymmetry = "expectile",
        loss_function: ValueLoss = "bce",
        **kwargs: Any,
    ) -> None:
        if distillation_expectile is not None and not 0 < distillation_expectile < 1:
            raise ValueError(
                "distillation_expectile must be between 0 and 1, or None, got "
                f"{distillation_expectile}."
            )
        if distillation_asymmetry not in get_args(Asymmetry):
            raise ValueError(
                f"distillation_asymmetry must be one of {get_args(Asymmetry)}, got "
                f"{distillation_asymmetry!r}."
            )
        super().__init__(
            value_network,
            qvalue_network,
            expectile=expectile,
            asymmetry=asymmetry,
            loss_function=loss_function,
            **kwargs,
        )
        if set(chunk_qvalue_network.in_keys) != set(self.qvalue_network.in_keys):
            raise ValueError(
                f"chunk_qvalue_network reads {chunk_qvalue_network.in_keys}, qvalue_network "
                f"{self.qvalue_network.in_keys}: they must read the same."
            )
        self.distillation_expectile = distillation_expectile
        self.distillation_asymmetry: Asymmetry = distillation_asymmetry
        self.convert_to_functional(chunk_qvalue_network, "chunk_qvalue_network")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        out = super().forward(tensordict)
        if "loss_chunk_qvalue" in self.out_keys:
            out.set("loss_chunk_qvalue", self.chunk_qvalue_loss(tensordict))
        self._clear_weakrefs(tensordict, out, "chunk_qvalue_network_params")
        return out

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression of the critics of first actions, each on its chunk critic."""
        taken = self._taken(tensordict)
        with torch.no_grad():
            target = expectation(self._chunk_members(taken), self.loss_function)
        members = self.members(taken, self.qvalue_network_params)
        same_shape("the chunk critics' values", target, members.shape)
        errors = asymmetric_difference(
            members,
            target,
            self.loss_function,
            self.distillation_expectile,
            self.distillation_asymmetry,
        )
        values = {
            "pred_value": self.expected(members.detach()),
            "target_value": aggregate(target, self.q_aggregation),
        }
        return self._critics_loss(errors, tensordict), values

    def chunk_qvalue_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of the chunk critics on what the windows earn and V behind them."""
        target = self.target(tensordict)
        members = self._chunk_members(self._taken(tensordict))
        errors = difference(members, target.expand_as(members), self.loss_function)
        return self._critics_loss(errors, tensordict)

    def _chunk_members(self, taken: TensorDictBase) -> Tensor:
        network, params = self.chunk_qvalue_network, self.chunk_qvalue_network_params
        with params.to_module(network, preserve_module_state=False):
            return network(taken).get(network.out_keys[1]).movedim(-1, 0)
