"""MAC, model-based RL with action chunks (https://arxiv.org/abs/2512.08108), for TorchRL."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrl_mac.trainers import load_policy

__all__ = ["load_policy"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when asked for: the data tools' processes start without it
        return getattr(importlib.import_module("torchrl_mac.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
