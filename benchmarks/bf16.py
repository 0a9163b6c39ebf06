"""Runs ``examples/mac.py`` in bfloat16 at the speed of float32, to see whether it learns the same.

    python benchmarks/bf16.py preset=cpu seed=0 precision=bf16

CPUs without bfloat16 units take ten times as long in it. Their matrix products are those of float32
numbers that have been rounded to bfloat16, added up in float32 and rounded once more, which is what
this does wherever ``precision=bf16`` has autocast on. With ReLU networks (``preset=cpu``) nothing
else is rounded; the sums differ from the real ones by their order alone.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrl_mac.modules import fused, mlp
from torchrl_mac.objectives import flow_bc, value_expansion

_linear = F.linear
_rounds = False


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _rounded_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _rounds:
        return _linear(input, weight, bias)
    bias = None if bias is None else _rounded(bias)
    return _rounded(_linear(_rounded(input), _rounded(weight), bias))


@contextlib.contextmanager
def _rounding(rounds: bool) -> Iterator[None]:
    global _rounds
    before, _rounds = _rounds, rounds
    try:
        yield
    finally:
        _rounds = before


@contextlib.contextmanager
def _full_precision(features: Tensor) -> Iterator[Tensor]:
    features = _rounded(features) if _rounds else features
    with _rounding(False):
        yield features


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Replaces autocast to bfloat16 in the losses by rounding."""
    replaced = [
        (F, "linear", _rounded_linear),
        (fused, "AVAILABLE", False),
        (mlp, "full_precision", _full_precision),
        *(
            (module, "autocast_to", lambda dtype, device: _rounding(dtype == torch.bfloat16))
            for module in (flow_bc, value_expansion)
        ),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).parents[1] / "examples/mac.py")
    with emulated():
        runpy.run_path(sys.argv[0], run_name="__main__")
