from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchrl.data import ReplayBuffer


def buffer_state(buffer: ReplayBuffer) -> Any:
    state = buffer.state_dict()
    if isinstance(state, Mapping) and any(
        isinstance(leaf, Tensor) for leaf in tree_leaves(state.get("_storage"))
    ):
        return {name: part for name, part in state.items() if name != "_storage"}
    return state


def load_buffer_state(buffer: ReplayBuffer, state: Any) -> None:
    if isinstance(state, Mapping) and "_storage" not in state:
        state = {**state, "_storage": buffer.storage.state_dict()}
    buffer.load_state_dict(state)
