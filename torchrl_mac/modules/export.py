"""Actors as files: weights in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchrl_mac.modules.actor import ChunkActor
from torchrl_mac.modules.config import build, describe
from torchrl_mac.utils.files import SEAL, read_json, replaced, seal, verify

__all__ = ["describe_policy", "is_export", "load_export", "save_policy", "write_policy"]

CONFIG, WEIGHTS = "policy.json", "policy.safetensors"
_VERSION = 2


def save_policy(
    actor: ChunkActor, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Exports an actor into a folder, which is whole or not there at all.

    Args:
        actor (ChunkActor): such as :class:`~torchrl_mac.modules.FlowRejectionActor`; all its parts
            are of classes that :func:`~torchrl_mac.modules.describe` knows.
        path (str or Path): the folder; an export that is there is replaced. It gets
            ``policy.safetensors`` (all weights, float32, and the normalisation), ``policy.json``
            (sizes, keys, ``metadata``) and ``hashes.json`` (their checksums).
        metadata (mapping, optional): what else to keep, JSON-compatible, such as
            ``{"dataset": "cube-single-..."}``.

    Returns:
        the folder.

    Raises:
        FileExistsError: if ``path`` is, or has, something else than an export.
        TypeError: if a part of the actor is of a class that is not known.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac import load_policy
        >>> from torchrl_mac.modules import (
        ...     FlowRejectionActor, NormedMLP, OneStepPolicy, save_policy
        ... )
        >>> policy = OneStepPolicy(NormedMLP(4 + 10 * 2, 10 * 2, num_cells=(32,)), action_dim=20)
        >>> qvalue = ValueOperator(
        ...     NormedMLP(4 + 10 * 2, 1, num_cells=(32,)), in_keys=["observation", "action"]
        ... )
        >>> actor = FlowRejectionActor(policy, qvalue, num_candidates=8, chunk_size=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_policy(save_policy(actor, f"{folder}/policy"))
        >>> td = TensorDict({"observation": torch.randn(3, 4), "noise": torch.randn(3, 8, 20)}, [3])
        >>> torch.equal(actor(td.clone())["action"], again(td.clone())["action"])
        True
    """
    path = Path(path)
    if path.exists() and not is_export(path):
        raise FileExistsError(f"{path} is not an exported policy: choose another folder.")
    if others := sorted({file.name for file in path.glob("*")} - {CONFIG, WEIGHTS, SEAL}):
        raise FileExistsError(f"{path} also has {others}: move that, or choose another folder.")
    described = describe_policy(actor, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as aside:
        aside.mkdir()
        write_policy(aside, *described)
        seal(aside)
    return path


def is_export(path: Path) -> bool:
    """Whether a folder holds an exported actor."""
    return (path / CONFIG).is_file()


def load_export(
    path: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[ChunkActor, dict[str, Any]]:
    """Makes the actor that :func:`save_policy` has written; see also ``torchrl_mac.load_policy``.

    Args:
        path (str or Path): the folder.

    Keyword Args:
        device (torch.device, optional): where the actor is put. Defaults to the CPU.

    Returns:
        the actor, in evaluation mode, and its ``metadata``.

    Raises:
        FileNotFoundError: if there is no actor.
        DamagedError: if a file is not as it was saved.
        ValueError: if a file is of another version.
    """
    path = Path(path)
    if (path / SEAL).is_file():
        verify(path)
    config = read_json(path / CONFIG)
    if config.get("format") != "torchrl_mac.policy" or config.get("version") != _VERSION:
        raise ValueError(
            f"{path / CONFIG} is not a policy of version {_VERSION}, but "
            f"{config.get('format')!r} of version {config.get('version')!r}."
        )
    actor = build(config["actor"]).to(device)
    actor.load_state_dict(load_file(path / WEIGHTS, device=str(device)))
    return actor.eval(), config["metadata"]


def describe_policy(
    actor: ChunkActor, metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An actor as a JSON-compatible configuration and its tensors; see :func:`save_policy`."""
    config = {
        "format": "torchrl_mac.policy",
        "version": _VERSION,
        "actor": describe(actor),
        "metadata": dict(metadata or {}),
    }
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in actor.state_dict().items()
    }
    return config, tensors


def write_policy(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes what :func:`describe_policy` returned into a folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)
