"""State dicts as files that hold numbers and text, and nothing that could run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchrl.checkpoint import CheckpointAdapter, CheckpointError

__all__ = ["StateAdapter", "num_bytes"]

_TENSORS, _STRUCTURE = "state.safetensors", "state.json"


class StateAdapter(CheckpointAdapter):
    """Saves what ``state_dict`` returns as ``state.safetensors`` and ``state.json``.

    The state is made of mappings, lists and tuples of tensors, arrays, numbers, strings, booleans
    and ``None``.

    Raises:
        TypeError: when saving, if it holds anything else.
        CheckpointError: when loading, if the files do not fit each other.
    """

    adapter_id = "torchrl_mac.state"
    files = frozenset({_TENSORS, _STRUCTURE})

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Writes both files into a new folder."""
        tensors: dict[str, Tensor] = {}
        structure = _encode(component.state_dict(*args, **kwargs), tensors)
        path.mkdir(parents=True)
        (path / _STRUCTURE).write_text(json.dumps(structure) + "\n", encoding="utf-8")
        save_file(tensors, path / _TENSORS)
        shutil.copymode(path / _STRUCTURE, path / _TENSORS)

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Hands the state to ``load_state_dict``."""
        try:
            structure = json.loads((path / _STRUCTURE).read_text(encoding="utf-8"))
            tensors = load_file(path / _TENSORS, device=str(map_location or "cpu"))
            state = _decode(structure, tensors)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}.") from error
        component.load_state_dict(state, *args, **kwargs)


def num_bytes(state: Any) -> int:
    """How large the tensors of a state are together, in bytes.

    Examples:
        >>> import torch
        >>> num_bytes({"weight": torch.ones(2, 3), "step": 3})
        24
    """
    tensors: dict[str, Tensor] = {}
    _encode(state, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON, its tensors by name: lists begin with their kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", name]
    if isinstance(value, np.ndarray):
        return ["array", _encode(torch.from_numpy(value.copy()), tensors)]
    if isinstance(value, Mapping):
        pairs = [[_encode(key, tensors), _encode(part, tensors)] for key, part in value.items()]
        return ["mapping", *pairs]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_encode(part, tensors) for part in value)]
    raise TypeError(f"A {type(value).__name__} cannot be saved in a checkpoint.")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "tensor":
        return tensors[parts[0]]
    if kind == "mapping":
        return {_decode(key, tensors): _decode(part, tensors) for key, part in parts}
    decoded = [_decode(part, tensors) for part in parts]
    if kind == "array":
        return decoded[0].numpy()
    if kind in ("list", "tuple"):
        return decoded if kind == "list" else tuple(decoded)
    raise ValueError(f"there is no kind {kind!r}")
