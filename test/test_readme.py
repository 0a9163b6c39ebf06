"""The README's Python runs, from top to bottom, as a newcomer would run it."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from torchrl_mac.datasets.robomimic import LOW_DIM_KEYS

README = Path(__file__).parents[1] / "README.md"
DATASETS = README.parent / "docs" / "datasets.md"
COMPOSITION = README.parent / "docs" / "composition.md"
ONLINE = README.parent / "docs" / "online.md"


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def write_cube(tmp_path):
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


def test_readme(tmp_path, monkeypatch):
    write_cube(tmp_path)
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
    own, robomimic = python_blocks(DATASETS)
    names: dict = {}
    exec(compile(own, str(DATASETS), "exec"), names)
    assert names["batch"]["action"].shape == (256, 10, 2)
    with h5py.File("low_dim_v15.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["rewards"] = np.zeros((8, 7)), np.arange(8) // 7.0
        demo["dones"] = np.arange(8) == 7
        for key, width in zip(LOW_DIM_KEYS, (3, 4, 2, 14), strict=True):
            demo[f"obs/{key}"] = np.random.rand(8, width)
    exec(compile(robomimic, str(DATASETS), "exec"), names)
    assert names["buffer"].sample()["observation"].shape == (256, 23)


def test_online(tmp_path, monkeypatch):
    write_cube(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(ONLINE)
    names: dict = {}
    exec(compile(block, str(ONLINE), "exec"), names)
    assert names["trainer"].updates == 10
    assert len(names["online"]) == 20


def test_composition(tmp_path, monkeypatch):
    write_robot(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(COMPOSITION)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(COMPOSITION), "exec"), names)
    assert names["batch"]["action"].shape == (256, 10)
    assert names["chunk"].shape == (256, 5, 2) and names["value"].shape == (256, 1)
    assert names["rollout"]["action"].shape == (2, 10)
    assert names["trainer"].updates == 10
    assert names["imagined"][:]["action"].shape[1:] == (10,)


def test_readme_names_files_that_exist():
    named = re.findall(r"`((?:configs|examples|test|torchrl_mac)/[^`\s]*)`", README.read_text())
    assert named
    for path in named:
        assert (README.parent / path).exists(), path


if __name__ == "__main__":
    pytest.main([__file__])
