"""The README's Python runs, from top to bottom, as a newcomer would run it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"
DATASETS = README.parent / "docs" / "datasets.md"
COMPOSITION = README.parent / "docs" / "composition.md"


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_readme(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    generator = np.random.default_rng(0)
    for split in ("", "-val"):
        np.savez(
            tmp_path / f"data/cube-single-play-v0{split}.npz",
            observations=generator.normal(size=(120, 28)).astype(np.float32),
            actions=generator.uniform(-1, 1, size=(120, 5)).astype(np.float32),
            qpos=generator.normal(size=(120, 21)).astype(np.float32),
            qvel=generator.normal(size=(120, 20)).astype(np.float32),
            terminals=np.arange(120) % 40 == 39,
        )
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["batch"]["action"].shape == (256, 10, 5)
    assert names["rollout"].shape == (256, 10)


def write_robot(folder):
    np.savez(
        folder / "robot.npz",
        observations=np.random.rand(60, 2).astype(np.float32),
        actions=np.zeros((60, 2), np.float32),
        rewards=np.ones(60, np.float32),
        terminals=np.zeros(60, bool),
        timeouts=np.arange(60) % 20 == 19,
    )


def test_own_data(tmp_path, monkeypatch):
    write_robot(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(DATASETS)
    names: dict = {}
    exec(compile(block, str(DATASETS), "exec"), names)
    assert names["batch"]["action"].shape == (256, 10, 2)


def test_composition(tmp_path, monkeypatch):
    write_robot(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(COMPOSITION)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(COMPOSITION), "exec"), names)
    assert names["batch"]["action"].shape == (256, 10)
    assert names["chunk"].shape == (256, 5, 2) and names["value"].shape == (256, 1)
    assert names["rollout"]["action"].shape == (2, 10)


def test_readme_names_files_that_exist():
    named = re.findall(r"`((?:configs|examples|test|torchrl_mac)/[^`\s]*)`", README.read_text())
    assert named
    for path in named:
        assert (README.parent / path).exists(), path


if __name__ == "__main__":
    pytest.main([__file__])
