"""Several networks of one shape, evaluated in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_mac.modules.config import Configurable
from torchrl_mac.modules.mlp import (
    NormedMLP,
    TanhGELU,
    activation,
    activation_name,
    full_precision,
)
from torchrl_mac.modules.shapes import concatenated

__all__ = ["StackedMLP"]


class StackedMLP(nn.Module, Configurable):
    """Several :class:`NormedMLP` as one module with stacked parameters.

    All networks are computed together, by batched matrix products. The k-th one maps the k-th entry
    of the inputs' first dimension (one network for each task) or, with ``broadcast``, all map the
    same inputs (the members of an ensemble).

    Args:
        num_networks (int): the number of networks ``T``.
        in_features (int): the size of all inputs together.
        out_features (int): the size of the output.
        num_cells (sequence of int, optional): the hidden sizes. Defaults to
            ``(1024, 1024, 1024, 1024)``.

    Keyword Args:
        activation_class (callable or str, optional): see :class:`NormedMLP`.
        layer_norm, norm_first (bool, optional): see :class:`NormedMLP`.
        first_actions (int, optional): see :class:`NormedMLP`.
        broadcast (bool, optional): whether inputs ``[*, ...]`` are those of every network. Defaults
            to ``False``: inputs are ``[T, *, ...]``.
        device (torch.device, optional): the device of the parameters.

    Each network treats its inputs as :class:`NormedMLP` does; outputs are ``[T, *, out_features]``.

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
        >>> ensemble = StackedMLP(5, 4 + 10 * 2, 1, num_cells=(32, 32), broadcast=True)
        >>> ensemble(observation[0], chunk[0]).shape
        torch.Size([5, 3, 1])
    """

    def __init__(
        self,
        num_networks: int,
        in_features: int,
        out_features: int,
        num_cells: Sequence[int] = (1024, 1024, 1024, 1024),
        *,
        activation_class: Callable[[], nn.Module] | str = TanhGELU,
        layer_norm: bool = True,
        norm_first: bool = False,
        first_actions: int | None = None,
        broadcast: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_networks < 1:
            raise ValueError(f"num_networks must be at least 1, got {num_networks}.")
        self.num_networks = num_networks
        self.in_features, self.out_features = in_features, out_features
        self.num_cells = tuple(num_cells)
        self.layer_norm, self.norm_first = layer_norm, norm_first
        self.first_actions = first_actions
        self.broadcast = broadcast
        self.activation_class = activation(activation_class)
        self.activation = self.activation_class()
        sizes = [in_features, *num_cells, out_features]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for size, following in itertools.pairwise(sizes):
            limit = math.sqrt(6 / (size + following))  # Xavier's, as in NormedMLP
            weight = torch.empty(num_networks, size, following, device=device)
            self.weights.append(weight.uniform_(-limit, limit))
            self.biases.append(torch.zeros(num_networks, 1, following, device=device))
        for size in num_cells if layer_norm else ():
            self.scales.append(torch.ones(num_networks, 1, size, device=device))
            self.shifts.append(torch.zeros(num_networks, 1, size, device=device))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_networks": self.num_networks,
            "broadcast": self.broadcast,
            **self._one(),
            "activation_class": activation_name(self.activation_class),
        }

    def _one(self) -> dict[str, Any]:
        """What makes one of the networks."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_cells": self.num_cells,
            "activation_class": self.activation_class,
            "layer_norm": self.layer_norm,
            "norm_first": self.norm_first,
            "first_actions": self.first_actions,
        }

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps the inputs to outputs ``[T, *, out_features]``."""
        features = concatenated(inputs, self.first_actions)
        if self.broadcast:
            features = features.expand(self.num_networks, *features.shape)
        if features.shape[0] != self.num_networks or features.shape[-1] != self.in_features:
            raise ValueError(
                f"The {self.num_networks} networks take [{self.num_networks}, *, "
                f"{self.in_features}] numbers, but their inputs together are "
                f"{list(features.shape)}."
            )
        shape = features.shape[1:-1]
        features = features.reshape(self.num_networks, -1, self.in_features)
        for i in range(len(self.num_cells)):
            features = torch.baddbmm(self.biases[i], features, self.weights[i])
            if self.norm_first:
                features = self.activation(self._normed(features, i))
            else:
                features = self._normed(self.activation(features), i)
        with full_precision(features) as features:
            features = torch.baddbmm(self.biases[-1], features, self.weights[-1])
        return features.unflatten(1, shape) if shape else features.squeeze(1)

    def _normed(self, features: Tensor, layer: int) -> Tensor:
        if not self.layer_norm:
            return features
        features = F.layer_norm(features, features.shape[-1:], eps=1e-6)
        return torch.addcmul(self.shifts[layer], features, self.scales[layer])

    def network(self, index: int) -> NormedMLP:
        """One of the networks; it shares its memory with this module."""
        alone = NormedMLP(**self._one(), device="meta")
        linears = [layer for layer in alone.layers if isinstance(layer, nn.Linear)]
        norms = [layer for layer in alone.layers if isinstance(layer, nn.LayerNorm)]
        for layer, weight, bias in zip(linears, self.weights, self.biases, strict=True):
            layer.weight = nn.Parameter(weight.data[index].T)
            layer.bias = nn.Parameter(bias.data[index, 0])
        for norm, scale, shift in zip(norms, self.scales, self.shifts, strict=True):
            norm.weight = nn.Parameter(scale.data[index, 0])
            norm.bias = nn.Parameter(shift.data[index, 0])
        return alone
