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
    JSONCheckpointAdapter,
)

from torchrl_mac.modules.export import CONFIG, WEIGHTS, write_policy
from torchrl_mac.trainers.state_files import StateAdapter
from torchrl_mac.utils.files import SEAL, DamagedError, replaced, seal, verify

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
    hashes of all others. :meth:`load` verifies them first, and that there is nothing else. No file
    is ever unpickled: tensors are stored as plain numbers, everything else as JSON.

    Args:
        **components: what to save, by name: objects with ``state_dict`` and ``load_state_dict``,
            and values that JSON knows; see :class:`~torchrl.checkpoint.Checkpoint`.

    Raises:
        CheckpointError: when loading, if a file is missing, damaged, not listed, or of another
            kind than a checkpoint has.

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
        """Registers a component; the tensors of a state dict are in one file."""
        if hasattr(component, "load_state_dict"):
            kwargs.setdefault("adapter", StateAdapter())
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
            if record["adapter"] == StateAdapter.adapter_id
        }
        Checkpoint.load(cls(**states), path, map_location="cpu")
        return {name: state.state_dict() for name, state in states.items()}

    @staticmethod
    def verify(path: str | Path) -> None:
        """Raises an error that names the first file that is not as it was saved, or not its own.

        The hashes tell what has changed, but not who wrote them: whatever a checkpoint of this kind
        does not have, such as a pickle beside the weights, is refused as well.
        """
        path = Path(path)
        try:
            verify(path)
        except DamagedError as error:
            raise CheckpointError(str(error)) from error
        folders: dict[Path, Collection[str]] = {path: {_MANIFEST, SEAL}}
        for record in SealedCheckpoint.manifest(path)["components"].values():
            folder = (path / record["path"]).resolve()
            if record["adapter"] not in _FILES or folder.parent != (path / "components").resolve():
                raise CheckpointError(f"{path} has a component of an unknown kind: {record}.")
            folders[path / "components" / folder.name] = _FILES[record["adapter"]]
        for file in path.rglob("*"):
            if file.is_symlink() or not (
                file.is_dir() or file.name in folders.get(file.parent, ())
            ):
                raise CheckpointError(f"{file} does not belong into a checkpoint.")


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


_MANIFEST = "manifest.json"
_FILES = {  # of a component, by its adapter
    StateAdapter.adapter_id: StateAdapter.files,
    JSONCheckpointAdapter.adapter_id: {JSONCheckpointAdapter.state_filename},
    PolicyAdapter.adapter_id: {CONFIG, WEIGHTS},
}


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
