"""The state of a replay buffer for a checkpoint: tensors and plain values, no classes.

:func:`buffer_state` returns nested dictionaries and lists of tensors and of what JSON knows, so
that it can be mapped over, copied to the host and stored without pickle. Rows that were collected
belong to it, those of a fixed dataset do not: a storage with ``rows_in_state = False`` is known by
the number of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ListStorage, ReplayBuffer, Storage, StorageEnsemble, TensorStorage
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, Sampler, SamplerEnsemble

__all__ = ["buffer_state", "distinct_buffers", "load_buffer_state"]

_TREES = ("_sum_tree", "_min_tree")  # a prioritized sampler's, each a number for each row


def buffer_state(buffer: Any) -> dict[str, Any]:
    """What a fresh buffer of the same kind needs to go on exactly as this one would.

    Args:
        buffer (ReplayBuffer): the buffer. Any other object's own ``state_dict`` is its state, as
            that of :class:`~torchrl_mac.data.MixedReplayBuffer`.

    Returns:
        nested dictionaries and lists of tensors, which are views of the buffer's, and of numbers,
        strings, booleans and ``None``: the sampler, the writer, transforms, prefetched batches
        and, of storages in memory, the rows that are filled.

    Raises:
        TypeError: if something in the buffer cannot be expressed so; it is named.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_mac.data import buffer_state, load_buffer_state
        >>> online = TensorDictReplayBuffer(storage=LazyTensorStorage(1000))
        >>> _ = online.extend(TensorDict(observation=torch.rand(10, 3), batch_size=[10]))
        >>> state = buffer_state(online)
        >>> state["_storage"]["data"]["entries"]["observation"].shape
        torch.Size([10, 3])
        >>> restored = TensorDictReplayBuffer(storage=LazyTensorStorage(1000))
        >>> load_buffer_state(restored, state)
        >>> len(restored), bool((restored[:] == online[:]).all())
        (10, True)
    """
    if not isinstance(buffer, ReplayBuffer):
        return _encoded(buffer.state_dict(), type(buffer).__name__)
    state = dict(buffer.state_dict())
    state["_storage"] = _storage_state(buffer.storage)
    state["_sampler"] = _sampler_state(buffer.sampler, state["_sampler"])
    return _encoded(state, type(buffer).__name__)


def load_buffer_state(buffer: Any, state: Mapping[str, Any]) -> None:
    """Restores what :func:`buffer_state` returned.

    Args:
        buffer (ReplayBuffer): a buffer of the same kind. Rows that it has are replaced, unless
            they are those of a fixed dataset.
        state (mapping): the state; its tensors may be on any device and are copied.

    Raises:
        ValueError: if the buffer is too small for the rows, or has another dataset.
    """
    if not isinstance(buffer, ReplayBuffer):
        buffer.load_state_dict(_decoded(state))
        return
    parts = {name: part for name, part in state.items() if name != "_storage"}
    restored = _decoded(parts)
    restored["_sampler"] = _load_trees(buffer.sampler, buffer.storage, restored["_sampler"])
    _check_storage(buffer.storage, state["_storage"])
    restored["_storage"] = _unchanged(buffer.storage)
    buffer.load_state_dict(restored)
    _load_storage(buffer.storage, state["_storage"])


def distinct_buffers(candidates: Mapping[str, Any]) -> dict[str, Any]:
    """Buffers that have a state of their own, each once, under the first of its names.

    Args:
        candidates (mapping): buffers by name, or ``None``; those that another one before them is
            made of, as of :class:`~torchrl_mac.data.MixedReplayBuffer`, are saved with it.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, buffer in candidates.items():
        if buffer is not None and id(buffer) not in seen:
            found[name] = buffer
            seen |= {id(buffer), *map(id, getattr(buffer, "buffers", {}).values())}
    return found


def _holds_rows(storage: Storage) -> bool:
    """Whether the rows are read from the storage, and written to it, as by anyone else."""
    return isinstance(storage, TensorStorage | ListStorage)


def _belong(storage: Storage) -> bool:
    return getattr(storage, "rows_in_state", True)


def _storage_state(storage: Storage) -> dict[str, Any]:
    if isinstance(storage, StorageEnsemble):
        return {str(i): _storage_state(member) for i, member in enumerate(storage._storages)}
    if not _belong(storage):
        return {"rows": len(storage)}
    if not _holds_rows(storage):
        return storage.state_dict()
    return {
        "rows": len(storage),
        "data": _rows(storage) if len(storage) else None,
        "cursor": storage._last_cursor_index,
    }


def _rows(storage: Storage) -> Any:
    """The rows that are filled, in memory's order."""
    if isinstance(storage, ListStorage):
        return [storage.get(i) for i in range(len(storage))]
    rows = storage.get(slice(0, storage._len_along_dim0))
    if not isinstance(rows, Tensor | TensorDictBase):
        raise TypeError(
            f"The rows of a {type(storage).__name__} are of type {type(rows).__name__}, which no "
            "checkpoint holds: use tensors or tensordicts."
        )
    return rows


def _check_storage(storage: Storage, state: Mapping[str, Any]) -> None:
    if isinstance(storage, StorageEnsemble):
        for i, member in enumerate(storage._storages):
            _check_storage(member, state[str(i)])
    elif not _belong(storage):
        if state["rows"] != len(storage):
            raise ValueError(
                f"The checkpoint is of a dataset of {state['rows']} rows, this one has "
                f"{len(storage)}."
            )
    elif _holds_rows(storage):
        if "data" not in state:
            raise ValueError(
                f"The checkpoint has no rows for a {type(storage).__name__} with rows_in_state, "
                "only their number."
            )
        if state["rows"] > storage.max_size:
            raise ValueError(
                f"The checkpoint has {state['rows']} rows, which a {type(storage).__name__} of "
                f"max_size={storage.max_size} cannot hold."
            )


def _unchanged(storage: Storage) -> dict[str, Any]:
    """A state dict that the storage may load as it is."""
    if isinstance(storage, StorageEnsemble):
        return {str(i): _unchanged(member) for i, member in enumerate(storage._storages)}
    state = storage.state_dict()
    if isinstance(getattr(storage, "_storage", None), TensorDictBase) and "_storage" in state:
        state["_storage"] = {}  # no entry, none changes
    return state


def _load_storage(storage: Storage, state: Mapping[str, Any]) -> None:
    if isinstance(storage, StorageEnsemble):
        for i, member in enumerate(storage._storages):
            _load_storage(member, state[str(i)])
    elif not _belong(storage):
        return
    elif not _holds_rows(storage):
        storage.load_state_dict(_decoded(state))
    else:
        storage._empty()
        if state["rows"]:
            data = _decoded(state["data"])
            if isinstance(data, Tensor | TensorDictBase) and storage.device is not None:
                data = data.to(storage.device)
            storage.set(range(len(data)), data)
        if state["cursor"] is not None:
            storage._set_last_cursor(state["cursor"])


def _sampler_state(sampler: Sampler, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with a prioritized sampler's trees as tensors."""
    if isinstance(sampler, SamplerEnsemble):
        members = enumerate(sampler._samplers)
        return {str(i): _sampler_state(member, state[str(i)]) for i, member in members}
    if not isinstance(sampler, PrioritizedSampler):
        return dict(state)
    every = torch.arange(sampler._max_capacity, device=sampler.device)
    trees = {name: torch.as_tensor(state[name][every]) for name in _TREES}
    return {**state, **trees}


def _load_trees(sampler: Sampler, storage: Storage, state: dict[str, Any]) -> dict[str, Any]:
    """The state with trees again, where the sampler would make them, and filled."""
    if isinstance(sampler, SamplerEnsemble):
        members = enumerate(zip(sampler._samplers, storage._storages))
        return {str(i): _load_trees(*member, state[str(i)]) for i, member in members}
    if not isinstance(sampler, PrioritizedSampler):
        return state
    sampler._maybe_init_from_storage(storage)
    every = torch.arange(sampler._max_capacity, device=sampler.device)
    trees = {}
    for name in _TREES:
        if len(state[name]) != len(every):
            raise ValueError(
                f"The checkpoint has priorities for {len(state[name])} rows, not for {len(every)}."
            )
        trees[name] = deepcopy(getattr(sampler, name))
        trees[name][every] = state[name].to(sampler.device)
    return {**state, **trees}


def _encoded(value: Any, place: str) -> Any:
    """Tensors and JSON's values; a tensordict becomes a dictionary that says what it was."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, TensorDictBase):
        entries = {key: _encoded(value.get(key), f"{place}[{key!r}]") for key in value.keys()}
        return {"batch_size": list(value.batch_size), "entries": entries}
    if isinstance(value, Mapping):
        return {str(key): _encoded(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item, f"{place}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{place} is of type {type(value).__name__}, which no checkpoint holds.")


def _decoded(value: Any) -> Any:
    if isinstance(value, TensorDictBase):  # which is a mapping
        return value
    if isinstance(value, Mapping):
        if value.keys() == {"batch_size", "entries"}:
            entries = {key: _decoded(item) for key, item in value["entries"].items()}
            return TensorDict(entries, batch_size=value["batch_size"])
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    return value
