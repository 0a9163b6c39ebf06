"""Fitting a model of the next h observations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from torchrl_mac.modules import FlowFutureModel, MLPFutureModel
from torchrl_mac.modules.shapes import concatenated
from torchrl_mac.objectives.common import flow_matching_error, required, same_shape

__all__ = ["FutureModelLoss"]


class FutureModelLoss(LossModule):
    r"""Fits a model of the next h observations to what followed.

    With :math:`x = s_{t+1:t+h}`, noise :math:`x_0 \sim \mathcal N(0, I)` and a time
    :math:`u \sim U[0, 1)` per sample,

    .. math::

        \mathcal L_{dynamics} = \| v(s_t, a_t, (1 - u) x_0 + u x, u) - (x - x_0) \|^2

    for a :class:`~torchrl_mac.modules.FlowFutureModel`, and :math:`\| \hat x - x \|^2` for a
    :class:`~torchrl_mac.modules.MLPFutureModel`, averaged over the future's coordinates: the
    multi-step dynamics of D-MPC (https://arxiv.org/abs/2410.05364), in its flow version of
    https://arxiv.org/abs/2512.08108.

    Args:
        future_model (FlowFutureModel or MLPFutureModel): the model.

    Keyword Args:
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what the model is conditioned on (``"observation"`` ``[*, O]`` and
    ``"action"``, flat or a chunk) and the future, flat ``[*, h * O]`` or ``[*, h, O]``, as
    :class:`~torchrl_mac.data.ActionChunkStorage` makes it. Noise (``"future_noise"``
    ``[*, h * O]`` and ``"future_time"`` ``[*, 1]``) is drawn unless the input has it.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import FlowFutureModel, NormedMLP
        >>> from torchrl_mac.objectives import FutureModelLoss
        >>> future = 8 * 4  # eight observations of four numbers
        >>> velocity = NormedMLP(4 + 2 + future + 1, future, num_cells=(32,))
        >>> loss_dynamics = FutureModelLoss(FlowFutureModel(velocity, future))(
        ...     observation=torch.randn(16, 4),
        ...     action=torch.rand(16, 2),
        ...     future_observation=torch.randn(16, 8, 4),
        ... )
        >>> loss_dynamics.backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            future (NestedKey): the future that followed. Defaults to ``("future", "observation")``.
            flow_noise (NestedKey): optional noise of a flow. Defaults to ``"future_noise"``.
            flow_time (NestedKey): optional times of a flow. Defaults to ``"future_time"``.
            valid (NestedKey): optionally, which of the observations a flow learns, bool
                ``[*, h, 1]``. Defaults to ``("future", "valid")``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        future: NestedKey = ("future", "observation")
        flow_noise: NestedKey = "future_noise"
        flow_time: NestedKey = "future_time"
        valid: NestedKey = ("future", "valid")
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: Any
    default_keys: Any = _AcceptedKeys
    out_keys = ["loss_dynamics"]  # noqa: RUF012 - TorchRL's convention

    future_model: FlowFutureModel | MLPFutureModel
    future_model_params: TensorDictParams
    target_future_model_params: TensorDictParams

    def __init__(
        self, future_model: FlowFutureModel | MLPFutureModel, *, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.convert_to_functional(future_model, "future_model")
        self.reduction = reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the model is conditioned on, and the future."""
        return [*self._conditions, self.tensor_keys.future]

    @property
    def _conditions(self) -> list[NestedKey]:
        keys = self.future_model.in_keys
        return keys[:-1] if isinstance(self.future_model, FlowFutureModel) else keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The error of the model."""
        out = TensorDict(loss_dynamics=self.dynamics_loss(tensordict))
        self._clear_weakrefs(tensordict, out, "future_model_params")
        return out

    def dynamics_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The flow-matching regression, or that of the future itself."""
        model, keys = self.future_model, self.tensor_keys
        conditions = {key: required(tensordict, key) for key in self._conditions}
        condition = concatenated(conditions.values())
        future = required(tensordict, keys.future).flatten(condition.ndim - 1)
        with self.future_model_params.to_module(model):
            if isinstance(model, FlowFutureModel):
                same_shape(keys.future, future, (*condition.shape[:-1], model.action_dim))
                error = flow_matching_error(model, condition, future, tensordict, keys)
            else:
                size = condition.shape[:-1]
                predicted = model(TensorDict(conditions, size)).get(model.out_keys[0])
                same_shape(keys.future, future, predicted.shape)
                error = (predicted - future).square().mean(-1)
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error, tensordict, weights=weights)
