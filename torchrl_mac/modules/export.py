"""Actors as files: weights in safetensors, everything else in JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrl._utils import logger as torchrl_logger
from torchrl.envs.transforms import Compose, ObservationNorm, Transform
from torchrl.modules import ValueOperator

from torchrl_mac.modules.mlp import NormedMLP, TanhGELU
from torchrl_mac.modules.policies import FlowMatchingPolicy, OneStepPolicy
from torchrl_mac.modules.rejection import FlowRejectionActor
from torchrl_mac.utils.files import SEAL, DamagedError, read_json, seal, verify

__all__ = ["describe_policy", "load_policy", "policy_metadata", "save_policy", "write_policy"]

CONFIG, WEIGHTS = "policy.json", "policy.safetensors"
SCORES = "scores.json"  # beside checkpoints: the success rate of some, by name
_VERSION = 1
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": TanhGELU, "relu": nn.ReLU}


def save_policy(actor: FlowRejectionActor, path: str | Path, **metadata: Any) -> Path:
    """Exports an actor into a folder, which is whole or not there at all.

    Args:
        actor (FlowRejectionActor): a :class:`~torchrl_mac.modules.OneStepPolicy` or
            :class:`~torchrl_mac.modules.FlowMatchingPolicy` under a Q of
            :class:`~torchrl.modules.ValueOperator`, both of
            :class:`~torchrl_mac.modules.NormedMLP`, and a normalisation of
            :class:`~torchrl.envs.transforms.ObservationNorm`, if any.
        path (str or Path): the folder; an export that is there is replaced. It gets
            ``policy.safetensors`` (all weights, float32, and the normalisation), ``policy.json``
            (sizes, keys, ``metadata``) and ``hashes.json`` (their checksums).
        **metadata: what else to keep, JSON-compatible: ``task="cube-single-..."``.

    Returns:
        the folder.

    Raises:
        FileExistsError: if ``path`` is something else than an export.
        TypeError: if a part of the actor is of a class that cannot be described.

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
    if path.exists() and not (path / CONFIG).is_file():
        raise FileExistsError(f"{path} is not an exported policy: choose another folder.")
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{part}") for part in ("new", "old"))
    try:
        aside.mkdir(parents=True)
        write_policy(aside, *describe_policy(actor, **metadata))
        seal(aside)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
    return path


def load_policy(
    path: str | Path,
    *,
    which: Literal["newest", "best"] = "newest",
    device: torch.device | str = "cpu",
) -> FlowRejectionActor:
    """Makes the actor that a file holds; it takes raw observations, normalisation is inside.

    Args:
        path (str or Path): what :func:`save_policy` wrote, a checkpoint, or the output folder of a
            run.

    Keyword Args:
        which (str, optional): of a run, the ``"newest"`` checkpoint (default) that is whole, or
            the ``"best"``, by the success rates that the run has measured.
        device (torch.device, optional): where the actor is put. Defaults to the CPU.

    Returns:
        the actor, in evaluation mode: reads ``"observation"`` ``[*, O]`` float32 (and ``"goal"``)
        and writes the chunk of actions ``[*, h, A]``.

    Raises:
        FileNotFoundError: if there is no actor.
        DamagedError: if a file is not as it was saved.
        ValueError: if a file is of another version.

    Examples:
        See :func:`save_policy`.
    """
    config, folder = _read(_policy_folder(Path(path), which))
    actor = _build(config).to(device)
    actor.load_state_dict(load_file(folder / WEIGHTS, device=str(device)))
    return actor.eval()


def policy_metadata(
    path: str | Path, *, which: Literal["newest", "best"] = "newest"
) -> dict[str, Any]:
    """What was kept beside an actor: its task, how it was evaluated.

    Args:
        path (str or Path): see :func:`load_policy`.

    Keyword Args:
        which (str, optional): see :func:`load_policy`.
    """
    return _read(_policy_folder(Path(path), which))[0]["metadata"]


def describe_policy(
    actor: FlowRejectionActor, **metadata: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An actor as a JSON-compatible configuration and its tensors; see :func:`save_policy`."""
    config = {
        "format": "torchrl_mac.policy",
        "version": _VERSION,
        "policy": _describe_sampler(actor.policy),
        "qvalue": _describe_value(actor.qvalue_network),
        "transform": _describe_transform(actor.transform),
        "num_candidates": actor.num_candidates,
        "chunk_size": actor.chunk_size,
        "action_key": actor.action_key,
        "noise_key": actor.noise_key,
        "value_key": actor.value_key,
        "metadata": metadata,
    }
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in actor.state_dict().items()
    }
    return config, tensors


def write_policy(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes what :func:`describe_policy` returned into a folder."""
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _policy_folder(path: Path, which: str) -> Path:
    """The folder with the actor's files, all of them as they were saved."""
    if (path / CONFIG).is_file():
        if (path / SEAL).is_file():
            verify(path)
        return path
    if (path / "components").is_dir():
        verify(path)
        for folder in (path / "components").iterdir():
            if (folder / CONFIG).is_file():
                return folder
        raise FileNotFoundError(f"{path} is a checkpoint without an actor.")
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    if not checkpoints.is_dir():
        raise FileNotFoundError(
            f"{path} has neither {CONFIG} nor checkpoints: name the output folder of a run, one of "
            "its checkpoints, or an exported policy."
        )
    if which == "best":
        scores = checkpoints / SCORES
        found = read_json(scores) if scores.is_file() else {}
        names = sorted(found, key=lambda name: (found[name], name))
        missing = f"No checkpoint in {checkpoints} has been evaluated."
    else:
        names = sorted(folder.name for folder in checkpoints.glob("checkpoint-*"))
        missing = f"There is no checkpoint in {checkpoints}."
    while names:
        folder = checkpoints / names.pop()
        try:
            return _policy_folder(folder, which)
        except DamagedError as error:
            if not names:
                raise
            torchrl_logger.warning(f"{error} Taking the checkpoint before it.")
    raise FileNotFoundError(missing)


def _read(folder: Path) -> tuple[dict[str, Any], Path]:
    config = read_json(folder / CONFIG)
    if config.get("format") != "torchrl_mac.policy" or config.get("version") != _VERSION:
        raise ValueError(
            f"{folder / CONFIG} is not a policy of version {_VERSION}, but "
            f"{config.get('format')!r} of version {config.get('version')!r}."
        )
    return config, folder


def _build(config: dict[str, Any]) -> FlowRejectionActor:
    return FlowRejectionActor(
        _build_sampler(config["policy"]),
        ValueOperator(
            _build_network(config["qvalue"]["network"]),
            in_keys=_keys(config["qvalue"]["in_keys"]),
            out_keys=_keys(config["qvalue"]["out_keys"]),
        ),
        num_candidates=config["num_candidates"],
        chunk_size=config["chunk_size"],
        action_key=_key(config["action_key"]),
        noise_key=_key(config["noise_key"]),
        value_key=_key(config["value_key"]),
        transform=_build_transform(config["transform"]),
    )


def _describe_sampler(policy: nn.Module) -> dict[str, Any]:
    described: dict[str, Any] = {"in_keys": policy.in_keys, "out_keys": policy.out_keys}
    if not isinstance(policy, FlowMatchingPolicy | OneStepPolicy):
        raise TypeError(f"A policy of class {type(policy).__name__} cannot be exported.")
    model = policy.model
    if isinstance(policy, FlowMatchingPolicy):
        network, described["num_steps"] = model.velocity_network, model.num_steps
    else:
        network = model.network
    return {
        **described,
        "action_dim": model.action_dim,
        "bound_shapes": [list(model.low.shape), list(model.high.shape)],
        "network": _describe_network(network),
    }


def _build_sampler(config: dict[str, Any]) -> nn.Module:
    low, high = (torch.zeros(shape) for shape in config["bound_shapes"])  # filled by the weights
    keys = {"in_keys": _keys(config["in_keys"]), "out_keys": _keys(config["out_keys"])}
    network = _build_network(config["network"])
    if "num_steps" in config:
        steps = config["num_steps"]
        return FlowMatchingPolicy(network, config["action_dim"], steps, low=low, high=high, **keys)
    return OneStepPolicy(network, config["action_dim"], low=low, high=high, **keys)


def _describe_value(qvalue: nn.Module) -> dict[str, Any]:
    if not isinstance(qvalue, ValueOperator):
        raise TypeError(f"A Q of class {type(qvalue).__name__} cannot be exported.")
    return {
        "in_keys": qvalue.in_keys,
        "out_keys": qvalue.out_keys,
        "network": _describe_network(qvalue.module),
    }


def _describe_network(network: nn.Module) -> dict[str, Any]:
    if not isinstance(network, NormedMLP):
        raise TypeError(f"A network of class {type(network).__name__} cannot be exported.")
    linears = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    names = [
        name
        for name, activation in _ACTIVATIONS.items()
        if any(type(layer) is activation for layer in network.layers)
    ]
    if len(linears) > 1 and not names:
        raise TypeError(f"Only the activations {list(_ACTIVATIONS)} can be exported.")
    return {
        "in_features": linears[0].in_features,
        "out_features": linears[-1].out_features,
        "num_cells": [layer.out_features for layer in linears[:-1]],
        "activation": names[0] if names else "gelu",
        "layer_norm": any(isinstance(layer, nn.LayerNorm) for layer in network.layers),
    }


def _build_network(config: dict[str, Any]) -> NormedMLP:
    return NormedMLP(
        config["in_features"],
        config["out_features"],
        config["num_cells"],
        activation_class=_ACTIVATIONS[config["activation"]],
        layer_norm=config["layer_norm"],
    )


def _describe_transform(transform: Transform | None) -> Any:
    """``None``, one transform or a list of them."""
    if transform is None:
        return None
    if isinstance(transform, Compose):
        return [_describe_transform(part) for part in transform]
    if not isinstance(transform, ObservationNorm):
        raise TypeError(f"A transform of class {type(transform).__name__} cannot be exported.")
    return {
        "in_keys": transform.in_keys,
        "out_keys": transform.out_keys,
        "standard_normal": bool(transform.standard_normal),
        "shape": list(transform.loc.shape),
    }


def _build_transform(config: Any) -> Transform | None:
    if config is None:
        return None
    if isinstance(config, list):
        return Compose(*map(_build_transform, config))
    return ObservationNorm(
        torch.zeros(config["shape"]),
        torch.ones(config["shape"]),
        in_keys=_keys(config["in_keys"]),
        out_keys=_keys(config["out_keys"]),
        standard_normal=config["standard_normal"],
    )


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _keys(keys: list[Any]) -> list[Any]:
    return [_key(key) for key in keys]
