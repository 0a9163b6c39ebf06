"""Layers through which no gradient flows, on a CPU: a product and its activation in one pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["frozen_weights", "through"]

OPERATORS = torch.ops.mkldnn
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(OPERATORS, "_linear_pointwise")
DTYPES = {torch.float32}
if AVAILABLE and OPERATORS._is_mkldnn_bf16_supported():
    DTYPES.add(torch.bfloat16)
# To lay out a weight takes 0.1 ms and more, and saves 3 % of the products with it. That pays from
# so many FLOP on; those before tell of those to come.
PAYS_FROM = 1e9


def through(layers: Sequence[nn.Module], features: Tensor) -> Tensor:
    """What layers make of features, one after the other.

    Where no gradient flows and the device is a CPU, a linear layer and the GELU or ReLU after it
    are one operator of oneDNN. Its result differs from that of the two by the rounding of float32
    or, under autocast, of bfloat16. Layers that are not simply :class:`~torch.nn.Linear`, or have
    hooks, are called as they are, and so are all of them when a graph is made of them.

    Args:
        layers (sequence of nn.Module): the layers.
        features (Tensor): ``[*, F]``.
    """
    if not _can_fuse(features):
        for layer in layers:
            features = layer(features)
        return features
    done: nn.Module | None = None  # as a part of the layer before it
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if layer is done:
            continue
        if type(layer) is nn.Linear and not _has_hooks(layer):
            fusion = _fusion(following)
            done = following if fusion else None
            features = _linear(features, layer, *(fusion or ("none", "")))
        else:
            features = layer(features)
    return features


@contextlib.contextmanager
def frozen_weights() -> Iterator[None]:
    """Weights stay as they are in this context: those used again are prepared once.

    They are cast, if autocast says so, at the first use, and laid out for products once these were
    many. It is up to who enters it that none changes inside, as by an optimizer's step. Of contexts
    inside others the outermost counts.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import NormedMLP
        >>> from torchrl_mac.modules.fused import frozen_weights
        >>> network, x = NormedMLP(4, 4, num_cells=(32, 32)), torch.randn(3, 4)
        >>> with torch.no_grad(), frozen_weights():
        ...     for _ in range(10):
        ...         x = network(x)
        >>> x.shape
        torch.Size([3, 4])
    """
    if torch.compiler.is_compiling() or _prepared.by_id is not None:
        yield
        return
    _prepared.by_id = {}
    try:
        yield
    finally:
        _prepared.by_id = None


@dataclass
class _Weight:
    original: Tensor
    weight: Tensor
    bias: Tensor | None
    work: float = 0.0  # FLOP, until it is laid out


class _Prepared(threading.local):
    """Weights and biases as products take them, in a context where they are frozen."""

    # by the weight's id, which is its own as long as it is held here
    by_id: dict[int, _Weight] | None = None


_prepared = _Prepared()


def _can_fuse(features: Tensor) -> bool:
    return (
        AVAILABLE
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and features.device.type == "cpu"
        and _dtype(features) in DTYPES
        and torch._C._functorch.peek_interpreter_stack() is None  # nor inside of vmap
    )


def _dtype(features: Tensor) -> torch.dtype:
    """The dtype of a product, as autocast wants it."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return features.dtype


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _fusion(layer: nn.Module | None) -> tuple[str, str] | None:
    """An activation, and the approximation of it, by oneDNN's names."""
    if layer is None or _has_hooks(layer):
        return None
    if type(layer) is nn.ReLU:
        return "relu", ""
    if isinstance(layer, nn.GELU):
        return "gelu", layer.approximate
    return None


def _linear(features: Tensor, layer: nn.Linear, name: str, approximation: str) -> Tensor:
    dtype = _dtype(features)
    weight, bias = _ready(layer, dtype, features.shape[:-1].numel())
    return OPERATORS._linear_pointwise(features.to(dtype), weight, bias, name, [], approximation)


def _ready(layer: nn.Linear, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, prepared as far as it pays."""
    prepared, original = _prepared.by_id, layer.weight
    if prepared is None:
        return _cast(layer, dtype)
    entry = prepared.get(id(original))
    if entry is None or entry.weight.dtype != dtype:
        entry = prepared[id(original)] = _Weight(original, *_cast(layer, dtype))
    if entry.work >= PAYS_FROM and not entry.weight.is_mkldnn:
        entry.weight = OPERATORS._reorder_linear_weight(entry.weight)
    entry.work += 2 * rows * original.numel()
    return entry.weight, entry.bias


def _cast(layer: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
