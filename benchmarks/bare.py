"""Stands in for what a bare machine lacks and no benchmark needs: progress bars and exports."""

from __future__ import annotations

import sys
import types

import tensordict  # noqa: F401  (PyTorch looks at all modules there are when it is imported)

try:
    import safetensors.torch  # noqa: F401
    import tqdm  # noqa: F401
except ImportError:
    stubs = {
        "tqdm": ["tqdm"],
        "safetensors": ["SafetensorError"],
        "safetensors.torch": ["load_file", "save_file"],
    }
    for name, parts in stubs.items():
        stub = types.ModuleType(name)
        vars(stub).update(dict.fromkeys([*parts, "__spec__"], object()))
        sys.modules.setdefault(name, stub)
