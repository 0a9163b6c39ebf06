from __future__ import annotations

import functools
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ogbench_files import LENGTHS, VAL_LENGTHS, make_arrays

from torchrl_mac.datasets import labels

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "test" / "parity"), str(ROOT / "benchmarks")]


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Forks processes, which may be killed, from a server that imports while the first tests run.

    It serves the package's own pools as well, as a process has one such server.
    """
    context = multiprocessing.get_context("forkserver")
    preload = ["torchrl_mac.trainers.experiment", "torchrl_mac.datasets.episodes"]
    context.set_forkserver_preload(["pytest", *preload])
    forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def shared_labelled_env() -> Any:
    """``LabelledEnv``, of earlier tests if there is one: each takes a second to build."""
    return functools.lru_cache(maxsize=2)(labels.LabelledEnv)


@pytest.fixture
def shared_labels(monkeypatch: pytest.MonkeyPatch, shared_labelled_env: Any) -> None:
    """Conversions are labelled by ``shared_labelled_env``."""
    monkeypatch.setattr(labels, "LabelledEnv", shared_labelled_env)


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``tmp_path/source/{name}.npz`` and ``-val.npz``, small files of OGBench's layout.

    Keyword arguments replace arrays; an array replaced by ``None`` is left out.
    """

    def write(
        name: str = "cube-single-play-v0",
        lengths: Sequence[int] = LENGTHS,
        val_lengths: Sequence[int] | None = VAL_LENGTHS,
        **replaced: np.ndarray | None,
    ) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        arrays = {**make_arrays(name, lengths, seed=0), **replaced}
        np.savez_compressed(
            folder / f"{name}.npz", **{key: a for key, a in arrays.items() if a is not None}
        )
        if val_lengths is not None:
            np.savez_compressed(
                folder / f"{name}-val.npz", **make_arrays(name, val_lengths, seed=1)
            )
        return folder

    return write


def pytest_addoption(parser):
    parser.addoption("--upstream-failures", help="a file of test ids that have to fail")


def pytest_collection_modifyitems(config, items):
    if path := config.getoption("upstream_failures"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        failures = {line for line in lines if line and not line.startswith("#")}
        for item in items:
            if item.nodeid in failures:
                item.add_marker(pytest.mark.xfail(reason=f"see {path}", strict=True))
    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path])  # whole files: two workers end together
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
