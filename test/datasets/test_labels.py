from __future__ import annotations

import shutil

import numpy as np
import ogbench
import pytest
from ogbench_files import LENGTHS, make_arrays

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.datasets import OGBenchName, labels

CUBE = "cube-single-play-singletask-task2-v0"
MAZE = "pointmaze-medium-navigate-singletask-task3-v0"


@pytest.fixture
def cube_goal(shared_labels):
    env = labels.LabelledEnv(OGBenchName.parse(CUBE))._env
    return env.unwrapped.task_infos[1]["goal_xyzs"][0]


def solve_some_cubes(goal):
    """Cubes at the goal in some rows, the last one of the first episode among them."""
    qpos = make_arrays("cube-single-play-v0", LENGTHS, seed=0)["qpos"]
    for row in (0, 5, 6, LENGTHS[0] - 1, 40):
        qpos[row, 14:17] = goal + 0.01
    return qpos


@pytest.mark.parametrize("dataset_id", [CUBE, MAZE])
@pytest.mark.usefixtures("shared_labels")
def test_rewards_are_those_ogbench_loads(write_npz, tmp_path, cube_goal, dataset_id):
    stem = OGBenchName.parse(dataset_id).dataset
    if dataset_id == CUBE:
        source = write_npz(stem, qpos=solve_some_cubes(cube_goal))
    else:
        source = write_npz(stem, lengths=(400, 400))
    train, val = ogbench.make_env_and_datasets(
        dataset_id,
        dataset_path=str(source / f"{stem}.npz"),
        compact_dataset=True,
        dataset_only=True,
        cur_env=labels.LabelledEnv(OGBenchName.parse(dataset_id))._env,
    )
    assert 0 < train["masks"].sum() < len(train["masks"])
    for split, expected in (("train", train), ("val", val)):
        rows = OGBenchExperienceReplay(
            dataset_id, root=tmp_path / "root", source=source, split=split
        )[:]
        columns = {key: column.squeeze(-1).numpy() for key, column in rows["next"].items()}
        terminated, boundary = expected["masks"] == 0, expected["valids"] == 0
        assert columns["reward"].tolist() == expected["rewards"].tolist()
        assert columns["terminated"].tolist() == terminated.tolist()
        assert columns["done"].tolist() == (boundary | terminated).tolist()
        assert columns["truncated"].tolist() == (boundary & ~terminated).tolist()


@pytest.mark.usefixtures("shared_labels")
def test_a_solved_last_row_is_terminated_not_truncated(write_npz, tmp_path, cube_goal):
    source = write_npz(qpos=solve_some_cubes(cube_goal))
    row = OGBenchExperienceReplay(CUBE, root=tmp_path, source=source)[LENGTHS[0] - 1]
    assert row["next", "terminated"] and row["next", "done"] and not row["next", "truncated"]


@pytest.mark.usefixtures("shared_labels")
def test_default_task_is_that_of_ogbench(write_npz, tmp_path, cube_goal):
    source = write_npz(qpos=solve_some_cubes(cube_goal))
    default = CUBE.replace("-task2", "")
    buffer = OGBenchExperienceReplay(default, root=tmp_path / "root", source=source)
    assert buffer.task_id == 2
    second = OGBenchExperienceReplay(CUBE, root=tmp_path / "root", source=source)
    assert second.task_id == 2 and (second[:] == buffer[:]).all()
    assert buffer[:]["next", "terminated"].sum() == 5
    assert OGBenchExperienceReplay("cube-single-play-v0", root=tmp_path / "root").task_id is None


@pytest.mark.usefixtures("shared_labels")
def test_tasks_are_added_to_the_same_rows(write_npz, tmp_path, cube_goal):
    source, root = write_npz(qpos=solve_some_cubes(cube_goal)), tmp_path / "root"
    plain = OGBenchExperienceReplay("cube-single-play-v0", root=root, source=source)
    files = {path: path.stat().st_mtime_ns for path in plain.data_path.rglob("*.memmap")}
    first = OGBenchExperienceReplay(CUBE, root=root, source=source)
    other = OGBenchExperienceReplay(CUBE.replace("task2", "task1"), root=root, source=source)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert not (first[:]["next", "reward"] == other[:]["next", "reward"]).all()
    # and are found again without the source
    shutil.rmtree(source)
    again = OGBenchExperienceReplay(CUBE, root=root)
    assert (again[:] == first[:]).all()


def test_a_missing_task_needs_the_source(write_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source, root = write_npz(), tmp_path / "root"
    OGBenchExperienceReplay("cube-single-play-v0", root=root, source=source)
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match=r"task2-v0' .*not yet converted.*Pass source="):
        OGBenchExperienceReplay(CUBE, root=root, source=source)


@pytest.mark.parametrize(
    ("qpos", "message"),
    [
        (None, "has no 'qpos'"),
        (np.zeros((5, 21), "f4"), r"'qpos' has 5 rows, the observations 68"),
        (np.zeros((sum(LENGTHS), 14), "f4"), r"qpos of shape \(68, 14\).*not of cube-single"),
        (np.zeros((sum(LENGTHS), 28), "f4"), r"qpos of shape \(68, 28\).*qpos of 21 numbers"),
        (np.full((sum(LENGTHS), 21), np.nan, "f4"), "'qpos' has NaN"),
    ],
)
@pytest.mark.usefixtures("shared_labels")
def test_bad_states_are_named(write_npz, tmp_path, qpos, message):
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=message):
        OGBenchExperienceReplay(CUBE, root=root, source=write_npz(qpos=qpos))
    folder = root / "cube-single-play-v0" / "train"
    assert [path.name for path in (folder / "columns").iterdir()] == [".task2.lock"]
    assert len(OGBenchExperienceReplay("cube-single-play-v0", root=root)) == sum(LENGTHS)


def test_buttons_are_needed_where_there_are_some():
    with pytest.raises(KeyError, match="button_states"):
        name = OGBenchName.parse("puzzle-3x3-play-singletask-v0")
        labels.LabelledEnv(name).rewards({"qpos": np.zeros((4, 23), np.float32)})


def test_without_ogbench(write_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_has_ogbench", False)
    with pytest.raises(ImportError, match="pip install ogbench"):
        OGBenchExperienceReplay(CUBE, root=tmp_path / "root", source=write_npz())


@pytest.mark.parametrize("dataset_id", [CUBE, MAZE])
def test_relabelling_is_deterministic_and_leaves_the_random_state(dataset_id, shared_labelled_env):
    name = OGBenchName.parse(dataset_id)
    state = {"qpos": make_arrays(name.dataset, (200,), seed=0)["qpos"]}
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first = labels.LabelledEnv(name).rewards(state)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(1)
    second = shared_labelled_env(name).rewards(state)
    assert first[0].tolist() == second[0].tolist() and first[1].tolist() == second[1].tolist()
    assert list(state) == ["qpos"]


if __name__ == "__main__":
    pytest.main([__file__])
