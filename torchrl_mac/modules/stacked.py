"""Several networks of one shape, evaluated in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_mac.modules.mlp import NormedMLP, TanhGELU, full_precision

__all__ = ["StackedMLP"]


class StackedMLP(nn.Module):
    """As many :class:`NormedMLP` as there are tasks, as one module with stacked parameters.

    The k-th network maps the k-th entry of the inputs' first dimension. All of them are computed
    together, by batched matrix products.

    Args:
        num_networks (int): the number of networks ``T``.
        in_features (int): the size of all inputs together.
        out_features (int): the size of the output.
        num_cells (sequence of int, optional): the hidden sizes. Defaults to
            ``(1024, 1024, 1024, 1024)``.

    Keyword Args:
        activation_class (callable, optional): makes the activations. Defaults to GELU in its tanh
            approximation.
        device (torch.device, optional): the device of the parameters.

    Inputs ``[T, *, ...]`` are treated as those of :class:`NormedMLP` are, each ``[*, ...]``.

    Raises:
        ValueError: if ``num_networks`` is smaller than 1 or, when called, if the inputs do not fit.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import StackedMLP
        >>> networks = StackedMLP(5, 4 + 10 * 2, 1, num_cells=(32, 32))
        >>> observation, chunk = torch.randn(5, 3, 4), torch.randn(5, 3, 10, 2)
        >>> networks(observation, chunk).shape
        torch.Size([5, 3, 1])
        >>> alone = networks.network(2)
        >>> torch.allclose(
        ...     alone(observation[2], chunk[2]), networks(observation, chunk)[2], atol=1e-6
        ... )
        True
    """

    def __init__(
        self,
        num_networks: int,
        in_features: int,
        out_features: int,
        num_cells: Sequence[int] = (1024, 1024, 1024, 1024),
        *,
        activation_class: Callable[[], nn.Module] = TanhGELU,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_networks < 1:
            raise ValueError(f"num_networks must be at least 1, got {num_networks}.")
        self.num_networks = num_networks
        self.in_features = in_features
        self.num_cells = tuple(num_cells)
        self.activation = activation_class()
        self._make_alone = partial(
            NormedMLP,
            in_features,
            out_features,
            self.num_cells,
            activation_class=activation_class,
            device="meta",
        )
        sizes = [in_features, *num_cells, out_features]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for size, following in itertools.pairwise(sizes):
            limit = math.sqrt(6 / (size + following))  # Xavier's, as in NormedMLP
            weight = torch.empty(num_networks, size, following, device=device)
            self.weights.append(weight.uniform_(-limit, limit))
            self.biases.append(torch.zeros(num_networks, 1, following, device=device))
        for size in num_cells:
            self.scales.append(torch.ones(num_networks, 1, size, device=device))
            self.shifts.append(torch.zeros(num_networks, 1, size, device=device))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps inputs ``[T, *, ...]`` to an output ``[T, *, out_features]``."""
        last = inputs[0].ndim - 1
        features = torch.cat([x.flatten(last) for x in inputs], -1)
        if features.shape[0] != self.num_networks or features.shape[-1] != self.in_features:
            raise ValueError(
                f"The {self.num_networks} networks take [{self.num_networks}, *, "
                f"{self.in_features}] numbers, but their inputs together are "
                f"{list(features.shape)}."
            )
        shape = features.shape[1:-1]
        features = features.reshape(self.num_networks, -1, self.in_features)
        for i, (scale, shift) in enumerate(zip(self.scales, self.shifts, strict=True)):
            features = torch.baddbmm(self.biases[i], features, self.weights[i])
            features = F.layer_norm(self.activation(features), features.shape[-1:], eps=1e-6)
            features = torch.addcmul(shift, features, scale)
        with full_precision(features) as features:
            features = torch.baddbmm(self.biases[-1], features, self.weights[-1])
        return features.unflatten(1, shape) if shape else features.squeeze(1)

    def network(self, index: int) -> NormedMLP:
        """One of the networks; it shares its memory with this module."""
        alone = self._make_alone()
        linears = [layer for layer in alone.layers if isinstance(layer, nn.Linear)]
        norms = [layer for layer in alone.layers if isinstance(layer, nn.LayerNorm)]
        for layer, weight, bias in zip(linears, self.weights, self.biases, strict=True):
            layer.weight = nn.Parameter(weight.data[index].T)
            layer.bias = nn.Parameter(bias.data[index, 0])
        for norm, scale, shift in zip(norms, self.scales, self.shifts, strict=True):
            norm.weight = nn.Parameter(scale.data[index, 0])
            norm.bias = nn.Parameter(shift.data[index, 0])
        return alone
