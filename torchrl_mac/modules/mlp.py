"""The one network body of MAC."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_mac.modules.config import Configurable
from torchrl_mac.modules.fused import through
from torchrl_mac.modules.shapes import concatenated

__all__ = ["ACTIVATIONS", "NormedMLP", "TanhGELU"]


class TanhGELU(nn.GELU):
    r"""GELU in its tanh approximation, in the form that compiles to the least work.

    As :math:`1 + \tanh u = 2 \sigma(2 u)`, a sigmoid does what the tanh does; compiled for a CPU it
    takes half as long.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import TanhGELU
        >>> TanhGELU()(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """Maps each number ``x`` to, approximately, ``x`` times the normal distribution at it."""
        if torch.compiler.is_compiling():
            inner = 2 * math.sqrt(2 / math.pi) * (input + 0.044715 * input * input * input)
            return input * torch.sigmoid(inner)
        return super().forward(input)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu": TanhGELU, "relu": nn.ReLU}
"""The activations that configurations and exports know, by name."""


class NormedMLP(nn.Module, Configurable):
    """A multi-layer perceptron whose hidden layers are Linear, GELU, then LayerNorm.

    The activation comes *before* the normalisation and GELU is the tanh approximation, as in
    the reference implementation of MAC (https://arxiv.org/abs/2512.08108). TorchRL's
    :class:`~torchrl.modules.MLP` normalises before it activates, which is another function:
    that of ``norm_first``.
    Weights are Xavier-uniform and biases zero in every layer, the last included.

    Args:
        in_features (int): the size of all inputs together.
        out_features (int): the size of the output.
        num_cells (sequence of int, optional): the hidden sizes. Defaults to
            ``(1024, 1024, 1024, 1024)``.

    Keyword Args:
        activation_class (callable or str, optional): makes the activations, or the name of one in
            ``ACTIVATIONS``. Defaults to GELU in its tanh approximation; ``"relu"`` is a quarter
            faster to train on a CPU.
        layer_norm (bool, optional): whether hidden layers are normalised. Defaults to ``True``.
        norm_first (bool, optional): whether they are normalised before they are activated, as the
            critics of RLPD (https://arxiv.org/abs/2302.02948). Defaults to ``False``.
        first_actions (int, optional): of a chunk among the inputs only so many actions are read,
            the first. Default: all.
        device (torch.device, optional): the device of the parameters.

    Under :class:`torch.autocast` the last layer is computed in full precision.

    Several inputs are concatenated along the last dimension, in the order given. An input with
    more dimensions than the first is flattened to as many: a chunk ``[*, h, A]`` beside an
    observation ``[*, O]`` counts as ``[*, h * A]``, time-major.

    Raises:
        ValueError: when called, if the inputs together do not have ``in_features`` numbers.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import NormedMLP
        >>> network = NormedMLP(4 + 10 * 2, 1, num_cells=(32, 32))
        >>> observation, chunk = torch.randn(3, 4), torch.randn(3, 10, 2)
        >>> network(observation, chunk).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_cells: Sequence[int] = (1024, 1024, 1024, 1024),
        *,
        activation_class: Callable[[], nn.Module] | str = TanhGELU,
        layer_norm: bool = True,
        norm_first: bool = False,
        first_actions: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_cells = tuple(num_cells)
        self.layer_norm, self.norm_first = layer_norm, norm_first
        self.first_actions = first_actions
        self.activation_class = activation_class = activation(activation_class)
        layers: list[nn.Module] = []
        for cells in num_cells:
            hidden: list[nn.Module] = [activation_class()]
            if layer_norm:
                norm = nn.LayerNorm(cells, eps=1e-6, device=device)
                hidden = [norm, *hidden] if norm_first else [*hidden, norm]
            layers += [nn.Linear(in_features, cells, device=device), *hidden]
            in_features = cells
        layers.append(nn.Linear(in_features, out_features, device=device))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_cells": self.num_cells,
            "activation_class": activation_name(self.activation_class),
            "layer_norm": self.layer_norm,
            "norm_first": self.norm_first,
            "first_actions": self.first_actions,
        }

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps inputs ``[*, ...]`` to an output ``[*, out_features]``."""
        features = concatenated(inputs, self.first_actions)
        if features.shape[-1] != self.in_features:
            shapes = ", ".join(str(list(x.shape)) for x in inputs)
            raise ValueError(
                f"The network takes {self.in_features} numbers, but its inputs of shape {shapes} "
                f"(observation, goal if there is one, chunk or noise) have {features.shape[-1]}."
            )
        layers = list(self.layers)
        with full_precision(through(layers[:-1], features)) as features:
            return through(layers[-1:], features)


def activation(of: Callable[[], nn.Module] | str) -> Callable[[], nn.Module]:
    """An activation's class, which may be given by its name in ``ACTIVATIONS``."""
    if isinstance(of, str) and of not in ACTIVATIONS:
        raise ValueError(f"There is no activation {of!r}; choose among {list(ACTIVATIONS)}.")
    return ACTIVATIONS[of] if isinstance(of, str) else of


def activation_name(of: Callable[[], nn.Module]) -> str:
    """The name of an activation's class, for exports."""
    for name, known in ACTIVATIONS.items():
        if known is of:
            return name
    raise TypeError(f"Only the activations {list(ACTIVATIONS)} can be exported, not {of}.")


@contextlib.contextmanager
def full_precision(features: Tensor) -> Iterator[Tensor]:
    """Features for a last layer, which leaves autocast: its output must resolve small differences.

    Among the values of candidates, say -50.1 and -50.2, bfloat16 sees none.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield features.float()
    else:
        yield features
