"""The arrays of a parity fixture, and how far two of them are apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Fixture:
    """One case of a fixture file, and its arrays as tensors."""

    def __init__(self, path: str | Path, case: str) -> None:
        with np.load(path, allow_pickle=False) as file:
            prefix = f"{case}/"
            arrays = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}
        if not arrays:
            raise SystemExit(f"{path} has no case {case!r}: it is not a parity fixture.")
        self.config = json.loads(str(arrays.pop("config_json")))
        self.arrays = arrays

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.as_tensor(self.arrays[key], dtype=torch.float32)

    def keys(self, prefix: str) -> list[str]:
        return [key for key in self.arrays if key.startswith(prefix)]

    def modules(self, prefix: str) -> list[str]:
        """The names of the networks under a prefix such as ``params0``."""
        return sorted({key.split("/")[1] for key in self.keys(f"{prefix}/")})

    @property
    def steps(self) -> int:
        return len({key.split("/")[0] for key in self.keys("step")})


def configs(path: str | Path) -> dict[str, dict]:
    """The cases of a file and their settings; windows of data are a case without any."""
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if name.endswith("/config_json")]
        found = {name.removesuffix("/config_json"): json.loads(str(file[name])) for name in names}
        has_windows = any(name.startswith("data/sequence_h") for name in file.files)
    return found | ({"data": {}} if has_windows else {})


def error(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the array's largest entry, or to ``floor``."""
    scale = theirs.abs().max().clamp_min(floor)
    if ours.shape != theirs.shape:
        raise SystemExit(f"Shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}.")
    return float((ours - theirs).abs().max() / torch.where(scale > 0, scale, 1.0))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"Shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}.")
    return float((ours - theirs).abs().max())


def linear_leaves(layers: nn.Module, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's tensors under the fixture's names and layouts, from ``layers.{i}.{leaf}``."""
    leaves, counts = {}, {nn.Linear: 0, nn.LayerNorm: 0}
    for name, layer in layers.named_children():
        kind = type(layer)
        if kind not in counts:
            continue
        weight, bias = (params[f"layers.{name}.{leaf}"] for leaf in ("weight", "bias"))
        if kind is nn.Linear:
            leaves[f"Dense_{counts[kind]}/kernel"] = weight.T
            leaves[f"Dense_{counts[kind]}/bias"] = bias
        else:
            leaves[f"LayerNorm_{counts[kind]}/scale"] = weight
            leaves[f"LayerNorm_{counts[kind]}/bias"] = bias
        counts[kind] += 1
    return leaves
