"""Checkpoints that are whole, or known not to be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
    CheckpointOptions,
    StateDictCheckpointAdapter,
)

from torchrl_mac.modules.export import write_policy
from torchrl_mac.utils.files import DamagedError, replaced, seal, verify

__all__ = [
    "HeldState",
    "PolicyAdapter",
    "SealedCheckpoint",
    "is_finite",
    "on_host",
]


class SealedCheckpoint(Checkpoint):
    """A TorchRL checkpoint that is safe on disk and whose every bit is vouched for.

    After :meth:`save` each file has been synced, and the last of them lists the sizes and SHA-256
    hashes of all others. :meth:`load` verifies them first. No file is ever unpickled: tensors are
    stored as plain numbers, everything else as JSON.

    Args:
        **components: what to save, by name: objects with ``state_dict`` and ``load_state_dict``,
            and values that JSON knows; see :class:`~torchrl.checkpoint.Checkpoint`.

    Raises:
        CheckpointError: when loading, if a file is missing, damaged or not listed.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from torchrl_mac.trainers import SealedCheckpoint
        >>> source, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = SealedCheckpoint(policy=source).save(f"{folder}/checkpoint")
        ...     _ = SealedCheckpoint(policy=target).load(path)
        >>> torch.equal(source.weight, target.weight)
        True
    """

    def register(self, name: str, component: Any, **kwargs: Any) -> Checkpoint:
        """Registers a component; one file holds all tensors of a state dict."""
        if hasattr(component, "load_state_dict"):
            kwargs.setdefault("adapter", StateDictCheckpointAdapter("consolidated"))
        return super().register(name, component, **kwargs)

    def save(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        component_options: Mapping[str, CheckpointOptions] | None = None,
        format: Any = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Saves the components into a folder that appears when it is synced and sealed."""
        if (self.format if format is None else format) != "directory":
            raise ValueError("A sealed checkpoint is a folder: format must be 'directory'.")
        path = Path(path).absolute()
        with replaced(path) as aside:
            super().save(
                aside, components=components, component_options=component_options, metadata=metadata
            )
            seal(aside)
        return path

    def load(self, path: str | Path, **kwargs: Any) -> CheckpointLoadResult:
        """Verifies all files and restores the components."""
        self.verify(path)
        return super().load(path, **kwargs)

    @classmethod
    def load_states(cls, path: str | Path) -> dict[str, Any]:
        """Verifies all files and returns the state dicts, their tensors on the CPU."""
        cls.verify(path)
        records = cls.manifest(path)["components"]
        states = {
            name: HeldState()
            for name, record in records.items()
            if record["adapter"] == StateDictCheckpointAdapter.adapter_id
        }
        Checkpoint.load(cls(**states), path, map_location="cpu")
        return {name: state.state_dict() for name, state in states.items()}

    @staticmethod
    def verify(path: str | Path) -> None:
        """Raises an error that names the first file that is not as it was saved."""
        try:
            verify(Path(path))
        except DamagedError as error:
            raise CheckpointError(str(error)) from error


class HeldState:
    """A state dict in the place of the object that it came from."""

    def __init__(self, state: Any = None) -> None:
        self._state = state

    def state_dict(self) -> Any:
        """The state dict."""
        return self._state

    def load_state_dict(self, state_dict: Any) -> None:
        """Replaces the state dict."""
        self._state = state_dict


class PolicyAdapter(CheckpointAdapter):
    """Saves an actor, described by :func:`~torchrl_mac.modules.describe_policy`, as an export."""

    adapter_id = "torchrl_mac.policy"

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Writes what :func:`~torchrl_mac.modules.load_policy` reads."""
        path.mkdir(parents=True)
        write_policy(path, *component)

    def load(self, component: Any, path: Path, **kwargs: Any) -> None:
        """Does nothing: :func:`~torchrl_mac.modules.load_policy` makes a new actor of it."""


def on_host(state: Any) -> Any:
    """A copy of a state dict, its tensors on the CPU.

    Examples:
        >>> import torch
        >>> state = {"weight": torch.ones(2), "step": 3}
        >>> copy = on_host(state)
        >>> _ = state["weight"].zero_()
        >>> copy
        {'weight': tensor([1., 1.]), 'step': 3}
    """

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.clone() if value.device.type == "cpu" else value.cpu()

    return tree_map(copy, state)


def is_finite(state: Any) -> bool:
    """Whether all tensors of a state dict are free of NaN and infinity.

    Examples:
        >>> import torch
        >>> is_finite({"weight": torch.tensor([1.0, float("nan")])})
        False
    """
    checks = [
        leaf.detach().isfinite().all()
        for leaf in tree_leaves(state)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    by_device: dict[torch.device, list[Tensor]] = {}
    for check in checks:
        by_device.setdefault(check.device, []).append(check)
    return all(bool(torch.stack(part).all()) for part in by_device.values())
