"""World models small enough to imagine with in a unit test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict.utils import NestedKey

from torchrl_mac.modules import ChunkedWorldModel, NormedMLP


@pytest.fixture
def make_world_model() -> Callable[..., ChunkedWorldModel]:
    """A world model with random weights; ``ends=False`` never terminates, ``True`` always does."""

    def make(
        observation_dim: int = 2,
        action_dim: int = 2,
        chunk_size: int = 5,
        ends: bool | None = None,
        **keys: NestedKey,
    ) -> ChunkedWorldModel:
        torch.manual_seed(0)
        sizes = {"in_features": observation_dim + chunk_size * action_dim, "num_cells": (16,)}
        dynamics, reward, termination = (
            NormedMLP(out_features=features, **sizes) for features in (observation_dim, 1, 1)
        )
        if ends is not None:
            torch.nn.init.constant_(termination.layers[-1].bias, 100.0 if ends else -100.0)
        return ChunkedWorldModel(dynamics, reward, termination, **keys)

    return make


@pytest.fixture
def nested_keys() -> dict[str, NestedKey]:
    """Keys of a world model none of which is at the root."""
    return {
        "observation_key": ("agent", "state"),
        "action_key": ("agent", "chunk"),
        "reward_key": ("agent", "gain"),
        "done_key": ("agent", "done"),
        "terminated_key": ("agent", "terminated"),
        "logit_key": ("agent", "logit"),
    }
