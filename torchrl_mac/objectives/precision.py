"""Reduced precision where no gradient goes through."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["autocast_to"]


def autocast_to(
    dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager:
    """Autocast to ``dtype``; ``None`` changes nothing.

    Inside of another autocast, weights are cast anew: PyTorch would hand out casts made without a
    gradient to the passes that need one.
    """
    if dtype is None:
        return contextlib.nullcontext()
    nested = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype, cache_enabled=not nested)
