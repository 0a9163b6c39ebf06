"""Generated datasets: same bytes however they are made, OGBench's format, resumed when killed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import ogbench
import pytest
from filelock import FileLock

from torchrl_mac.datasets import generate, shards
from torchrl_mac.datasets.episodes import Job, make_episodes
from torchrl_mac.datasets.generate import generate_dataset
from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.rollouts import OfficialSettings, OracleRollout
from torchrl_mac.datasets.shards import RowFiles

CUBE = "cube-single-play-v0"
MAZE = "pointmaze-medium-navigate-v0"

pytestmark = pytest.mark.usefixtures("processes")  # pools of workers start quickly

make_rollout = OracleRollout.make
QUICK = {"episodes": 3, "val_episodes": 2, "steps": 40, "workers": 1, "progress": False}


def quickly(name, out, **kwargs):
    return generate_dataset(name, out, **{**QUICK, **kwargs})


def load(path):
    with np.load(path) as file:
        return dict(file)


def contents(folder):
    """The bytes of all files but the lock's, which stays."""
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name != f".{MAZE}.lock" and path.name != f".{CUBE}.lock"
    }


def mtimes(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}


def shard_names(*numbers):
    return [f"{MAZE}-{k:03d}{end}" for k in numbers for end in (".npz", "-val.npz")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder with a dataset of four shards, made in one go."""
    folder = tmp_path_factory.mktemp("sharded")
    quickly(MAZE, folder, shards=4)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, rollout):
    """Training files by name, made once with a single worker."""
    paths = {}

    def make(name):
        if name not in paths:
            paths[name] = quickly(name, tmp_path_factory.mktemp(name))
        return paths[name]

    return make


@pytest.fixture(scope="module", autouse=True)
def rollout():
    """Rollouts by name: an environment takes a second to build, and episodes leave no trace.

    The package is given them, too, where it makes episodes in this process.
    """
    shared = functools.cache(make_rollout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OracleRollout, "make", lambda name: shared(str(name)))
        yield shared


@pytest.fixture(scope="module")
def make_env():
    return functools.cache(gymnasium.make)


@pytest.fixture(scope="module")
def cube_episode(rollout):
    """A play episode long enough to carry the cube somewhere."""
    return rollout(CUBE).episode(seed=0, split=0, index=0, steps=300)


class TestReproducibility:
    @pytest.mark.parametrize(("name", "workers"), [(CUBE, 2), (MAZE, 2), (MAZE, 3)])
    def test_same_bytes_with_any_number_of_workers(self, made, tmp_path, name, workers):
        path = quickly(name, tmp_path, workers=workers)
        files = contents(tmp_path)
        assert set(files) == {f"{name}{end}" for end in (".npz", "-val.npz", ".json")}
        assert files == contents(made(name).parent)
        assert path == tmp_path / f"{name}.npz"

    @pytest.mark.parametrize(
        "name",
        [CUBE, "scene-noisy-v0", "puzzle-3x3-play-v0", "pointmaze-teleport-stitch-v0"],
    )
    def test_an_episode_does_not_depend_on_earlier_ones(self, rollout, name):
        for index in range(3):
            rollout(name).episode(seed=1, split=0, index=index, steps=100)
        fresh = make_rollout(name).episode(seed=1, split=0, index=3, steps=100)
        for key, column in rollout(name).episode(seed=1, split=0, index=3, steps=100).items():
            np.testing.assert_array_equal(column, fresh[key], err_msg=key)

    def test_more_episodes_extend_the_dataset(self, made, tmp_path):
        longer = load(quickly(MAZE, tmp_path, episodes=5))
        for key, column in load(made(MAZE)).items():
            np.testing.assert_array_equal(longer[key][: len(column)], column)

    def test_seeds_shards_splits_and_episodes_differ(self, rollout):
        keys = ("seed", "shard", "split", "index")
        jobs = [(0, 0, 0, 0), *(tuple(row) for row in np.eye(4, dtype=int).tolist())]
        jobs += [(0, 2, 0, 0), (0, 1, 1, 0)]
        actions = [
            rollout(MAZE).episode(**dict(zip(keys, job, strict=True)), steps=20)["actions"]
            for job in jobs
        ]
        assert len({a.tobytes() for a in actions}) == len(jobs)

    def test_the_callers_random_state_is_left_alone(self, tmp_path):
        np.random.seed(3)
        expected = np.random.uniform(size=3)
        np.random.seed(3)
        quickly(MAZE, tmp_path)
        np.testing.assert_array_equal(np.random.uniform(size=3), expected)


class TestFormat:
    @pytest.mark.parametrize(
        ("name", "qpos", "buttons"),
        [
            (CUBE, 21, None),
            ("scene-play-v0", 25, 2),
            ("puzzle-3x3-play-v0", 23, 9),
            (MAZE, 2, None),
        ],
    )
    def test_columns(self, made, make_env, name, qpos, buttons):
        env = make_env(OGBenchName.parse(name).env_id)
        observations, actions = env.observation_space.shape[0], env.action_space.shape[0]
        for path, episodes in ((made(name), 3), (made(name).with_stem(f"{name}-val"), 2)):
            data = load(path)
            rows = episodes * 40
            expected = {
                "observations": ((rows, observations), np.float32),
                "actions": ((rows, actions), np.float32),
                "qpos": ((rows, qpos), np.float32),
                "qvel": ((rows, env.unwrapped.model.nv), np.float32),
                "terminals": ((rows,), np.bool_),
            }
            if buttons is not None:
                expected["button_states"] = ((rows, buttons), np.int64)
            assert {key: (a.shape, a.dtype) for key, a in data.items()} == expected
            assert data["terminals"].nonzero()[0].tolist() == list(range(39, rows, 40))
            assert np.abs(data["actions"]).max() <= 1
            assert all(np.isfinite(column).all() for column in data.values())

    def test_files_carry_no_time(self, made):
        with zipfile.ZipFile(made(CUBE)) as archive:
            assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

    @pytest.mark.parametrize("name", [CUBE, "scene-play-v0", MAZE])
    def test_ogbench_loads_it(self, made, make_env, name):
        task = name.replace("-v0", "-singletask-task1-v0")
        for dataset, keys in ((name, set()), (task, {"rewards", "masks"})):
            env = make_env(OGBenchName.parse(dataset).env_id)
            train, val = ogbench.make_env_and_datasets(
                dataset, dataset_path=str(made(name)), dataset_only=True, cur_env=env
            )
            assert (len(train["observations"]), len(val["observations"])) == (3 * 39, 2 * 39)
            assert train["observations"].shape[1:] == env.observation_space.shape
            assert keys <= set(train)


class TestContent:
    def test_observations_are_of_the_state_in_the_same_row(self, made):
        data = load(made(CUBE))
        obs, qpos, qvel = data["observations"], data["qpos"], data["qvel"]
        np.testing.assert_allclose(obs[:, :6], qpos[:, :6], atol=1e-6)
        np.testing.assert_allclose(obs[:, 6:12], qvel[:, :6], atol=1e-6)
        np.testing.assert_allclose(obs[:, 19:22], (qpos[:, 14:17] - [0.425, 0, 0]) * 10, atol=1e-5)

    def test_replaying_the_actions_gives_the_observations(self, cube_episode):
        env = gymnasium.make("cube-single-v0").unwrapped
        env.reset(seed=0)
        env.set_state(cube_episode["qpos"][0].astype(float), cube_episode["qvel"][0].astype(float))
        # Up to the first grasp, whose contacts amplify the rounding of the stored state.
        for action, following in zip(
            cube_episode["actions"][:20], cube_episode["observations"][1:21], strict=True
        ):
            obs = env.step(action)[0]
            np.testing.assert_allclose(obs, following, atol=0.02)

    def test_the_cube_is_lifted_and_carried(self, cube_episode):
        cube = cube_episode["qpos"][:, 14:17]
        assert cube[0, 2] == pytest.approx(0.02, abs=0.005)
        assert cube[:, 2].max() > 0.08
        assert np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.03

    @pytest.mark.parametrize("name", ["puzzle-3x3-play-v0", "puzzle-3x3-noisy-v0"])
    def test_buttons_are_pressed(self, rollout, name):
        states = rollout(name).episode(seed=0, split=0, index=0, steps=200)["button_states"]
        flips = np.abs(np.diff(states, axis=0)).sum(1)
        assert set(flips) <= {0, 3, 4, 5}  # a press also flips the neighbours
        assert (flips > 0).sum() >= 2

    def test_the_scene_changes_in_every_part(self, rollout):
        episodes = [
            rollout("scene-play-v0").episode(seed=0, split=0, index=index, steps=250)
            for index in (1, 3)  # one opens the window, the other the drawer
        ]
        for episode in episodes:
            assert np.ptp(episode["button_states"], axis=0).any()
        cube, drawer, window = (
            max(np.ptp(episode["qpos"][:, column]) for episode in episodes)
            for column in (14, 23, 24)
        )
        assert cube > 0.05 and drawer > 0.1 and window > 0.1

    def test_a_scene_whose_cube_is_lost_is_made_again(self, rollout, monkeypatch):
        scene = rollout("scene-play-v0")
        seen = []

        def rows(steps):
            seen.append(np.random.uniform())
            y = 0.3 if len(seen) < 3 else 0.0
            for _ in range(steps):
                qpos = np.zeros(25)
                qpos[15] = y
                yield {"observations": np.zeros(40), "qpos": qpos}

        monkeypatch.setattr(scene, "_rows", rows)
        episode = scene.episode(seed=0, split=0, index=0, steps=5)
        assert len(set(seen)) == 3  # each attempt has its own seed
        assert not episode["qpos"].any()

    def test_noisy_actions_are_partly_random(self, rollout):
        def roughness(name):
            actions = rollout(name).episode(seed=0, split=0, index=0, steps=200)["actions"]
            return np.abs(np.diff(actions, axis=0)).mean()

        assert roughness("puzzle-3x3-noisy-v0") > 1.5 * roughness("puzzle-3x3-play-v0")

    def test_the_point_walks_between_far_cells(self, rollout):
        maze = rollout(MAZE)
        positions = maze.episode(seed=0, split=0, index=0, steps=1001)["observations"]
        cells = {maze.env.xy_to_ij(xy) for xy in positions}
        assert all(maze.env.maze_map[cell] == 0 for cell in cells)
        assert len(cells) >= 15  # of 26

    def test_stitch_goes_four_cells_away_and_stays(self, rollout):
        maze = rollout("pointmaze-giant-stitch-v0")
        for index in range(5):
            xy = maze.episode(seed=0, split=0, index=index, steps=201)["observations"]
            _, distances = maze.env.get_oracle_subgoal(xy[0], xy[0])
            reached = [distances[maze.env.xy_to_ij(point)] for point in xy]
            assert max(reached) == 4 and set(reached[-30:]) <= {3, 4}

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("cube-single-play-v0", (1000, 1001, 0.1, 0.0)),
            ("cube-quadruple-noisy-v0", (5000, 1001, 0.1, 0.1)),
            ("puzzle-4x5-noisy-v0", (3000, 1001, 0.1, 0.2)),
            ("puzzle-4x6-play-v0", (5000, 1001, 0.1, 0.0)),
            ("puzzle-4x5-play-100m-v0", (1000, 1001, 0.1, 0.0)),
            ("pointmaze-giant-navigate-v0", (500, 2001, 0.5, 0.0)),
            ("pointmaze-large-stitch-v0", (5000, 201, 0.5, 0.0)),
        ],
    )
    def test_official_settings(self, name, expected):
        assert OfficialSettings.of(name) == OfficialSettings(*expected)


class TestRecipe:
    def test_same_recipe_is_reused(self, made, tmp_path, monkeypatch):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        before = mtimes(tmp_path)
        monkeypatch.setattr(OracleRollout, "make", lambda _: pytest.fail("made again"))
        task_name = MAZE.replace("-v0", "-singletask-task2-v0")
        assert quickly(task_name, tmp_path, workers=7) == tmp_path / f"{MAZE}.npz"
        assert mtimes(tmp_path) == before

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"episodes": 4}, {"val_episodes": 1}, {"steps": 41}, {"shards": 1}]
    )
    def test_another_recipe_is_refused(self, made, change):
        (key, value) = next(iter(change.items()))
        key, value = ("sharded", True) if key == "shards" else (key, value)
        before = mtimes(made(MAZE).parent)
        with pytest.raises(FileExistsError, match=rf"{key}=.* instead of {value}.*overwrite"):
            quickly(MAZE, made(MAZE).parent, **change)
        assert mtimes(made(MAZE).parent) == before

    def test_another_version_is_refused(self, made, tmp_path):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        path = tmp_path / f"{MAZE}.json"
        recipe = json.loads(path.read_text())
        recipe["versions"]["mujoco"] = "3.0.0"
        path.write_text(json.dumps(recipe))
        with pytest.raises(FileExistsError, match=r"3\.0\.0"):
            quickly(MAZE, tmp_path)

    @pytest.mark.parametrize(
        "text", [None, "{", "[]", '{"seed": 0}', '{"files": 1}', '{"files": [{"file": "a"}]}']
    )
    def test_files_without_a_recipe_are_refused_and_can_be_replaced(self, made, tmp_path, text):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        recipe = tmp_path / f"{MAZE}.json"
        recipe.unlink() if text is None else recipe.write_text(text)
        with pytest.raises(FileExistsError, match="no readable recipe"):
            quickly(MAZE, tmp_path)
        quickly(MAZE, tmp_path, overwrite=True, seed=5)
        assert json.loads(recipe.read_text())["seed"] == 5
        assert (tmp_path / f"{MAZE}.npz").read_bytes() != made(MAZE).read_bytes()

    def test_overwrite_replaces_another_recipe(self, made, sharded, tmp_path):
        shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
        quickly(MAZE, tmp_path, overwrite=True)
        assert contents(tmp_path) == contents(made(MAZE).parent)
        quickly(MAZE, tmp_path, overwrite=True, shards=4)
        assert contents(tmp_path) == contents(sharded)

    def test_overwrite_keeps_the_old_files_until_there_are_new_ones(self, sharded, tmp_path):
        shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
        before = contents(tmp_path)
        with failing_at(episode=4), pytest.raises(KeyboardInterrupt):
            quickly(MAZE, tmp_path, shards=3, seed=1, overwrite=True)
        assert contents(tmp_path) == before
        with failing_at(episode=10), pytest.raises(KeyboardInterrupt):
            quickly(MAZE, tmp_path, shards=3, seed=1, overwrite=True)
        after = contents(tmp_path)
        assert listed(tmp_path) in (sorted(shard_names(0)), sorted(shard_names(0, 1)))
        assert {name for name in before if before[name] != after.get(name)} == {
            f"{MAZE}.json",
            *listed(tmp_path),
            *shard_names(3),
        }
        with pytest.raises(FileExistsError, match="seed=1 instead of 0"):
            quickly(MAZE, tmp_path, shards=4)
        quickly(MAZE, tmp_path, shards=3, seed=1)
        quickly(MAZE, tmp_path / "fresh", shards=3, seed=1)
        assert contents(tmp_path / "fresh").items() <= contents(tmp_path).items()


def listed(folder):
    files = json.loads((folder / f"{MAZE}.json").read_text())["files"]
    return sorted(file["file"] for file in files)


@contextlib.contextmanager
def failing_at(episode, error=KeyboardInterrupt):
    """Raises while an episode is made, in this process."""
    numbers = itertools.count()
    original = OracleRollout.episode

    def fail(self, **kwargs):
        if next(numbers) == episode:
            raise error
        return original(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OracleRollout, "episode", fail)
        yield


@contextlib.contextmanager
def counting():
    """Counts the episodes that are made in this process."""
    jobs = []
    original = OracleRollout.episode

    def count(self, *, seed, shard, split, index, steps):
        jobs.append((shard, split, index))
        return original(self, seed=seed, shard=shard, split=split, index=index, steps=steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OracleRollout, "episode", count)
        yield jobs


class TestShards:
    def test_the_first_shard_is_the_unsharded_set(self, made, sharded):
        whole, first = contents(made(MAZE).parent), contents(sharded)
        for split in ("", "-val"):
            assert first[f"{MAZE}-000{split}.npz"] == whole[f"{MAZE}{split}.npz"]
        assert len({first[name] for name in shard_names(0, 1, 2, 3)}) == 8

    @pytest.mark.parametrize(("shards", "workers"), [(1, 1), (3, 1), (3, 2), (3, 3)])
    def test_bytes_depend_on_the_number_of_the_shard_only(self, sharded, tmp_path, shards, workers):
        path = quickly(MAZE, tmp_path, shards=shards, workers=workers)
        assert path == tmp_path / f"{MAZE}-000.npz"
        files = contents(tmp_path)
        del files[f"{MAZE}.json"]
        assert sorted(files) == sorted(shard_names(*range(shards)))
        assert files.items() <= contents(sharded).items()

    def test_a_name_that_says_its_size_has_shards(self, tmp_path):
        name = "pointmaze-medium-navigate-2m-v0"
        path = quickly(name, tmp_path, workers=1, episodes=1, val_episodes=1)
        assert path == tmp_path / f"{name}-000.npz"
        names = [f"{name}-{k:03d}{end}.npz" for k in range(2) for end in ("", "-val")]
        assert sorted(file.name for file in tmp_path.glob("*.npz")) == sorted(names)

    def test_recipe_lists_the_files(self, sharded):
        found = json.loads((sharded / f"{MAZE}.json").read_text())
        files = found.pop("files")
        assert set(found.pop("versions")) == {"mujoco", "ogbench", "torchrl_mac"}
        assert found == {
            "name": MAZE,
            "sharded": True,
            "episodes": 3,
            "val_episodes": 2,
            "steps": 40,
            "seed": 0,
        }
        names = [f"{MAZE}-{k:03d}{end}.npz" for end in ("", "-val") for k in range(4)]
        assert [file["file"] for file in files] == names
        for file in files:
            path = sharded / file["file"]
            terminals = load(path)["terminals"]
            assert file == {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "rows": len(terminals),
                "episodes": terminals.sum(),
            }

    def test_growing_adds_shards_and_leaves_the_others(self, sharded, tmp_path):
        quickly(MAZE, tmp_path, shards=2)
        before = mtimes(tmp_path)
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=4)
        assert {shard for shard, _, _ in jobs} == {2, 3} and len(jobs) == 10
        assert before.items() <= mtimes(tmp_path).items()
        assert contents(tmp_path) == contents(sharded)
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=1)
        assert not jobs and contents(tmp_path) == contents(sharded)

    def test_numbers_grow_beyond_three_digits(self, tmp_path, monkeypatch):
        names = []
        monkeypatch.setattr(generate, "_make", lambda *args, **_: names.extend(args[2]))
        quickly(MAZE, tmp_path, shards=1002)
        assert names[1998].name == f"{MAZE}-999.npz"
        assert names[2003].name == f"{MAZE}-1001-val.npz"

    def test_one_stream_of_jobs_over_all_shards(self, tmp_path, monkeypatch):
        calls = []

        def spy(name, jobs, **kwargs):
            calls.append(jobs)
            return make_episodes(name, jobs, **kwargs)

        monkeypatch.setattr(generate, "make_episodes", spy)
        quickly(MAZE, tmp_path, shards=3, workers=2)
        (jobs,) = calls
        assert [job.shard for job in jobs] == [0] * 5 + [1] * 5 + [2] * 5

    def test_the_next_shard_is_made_while_one_is_packed(self, tmp_path, monkeypatch):
        original, numbers = RowFiles.pack, []

        def pack(self, stopped):
            if not numbers:  # the first file waits for the last episode
                wait_until(lambda: len(jobs) == 10, seconds=20)
            numbers.append(len(jobs))
            return original(self, stopped)

        monkeypatch.setattr(RowFiles, "pack", pack)
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=2)
        assert numbers == [10] * 4

    @pytest.mark.parametrize("done", [0, 1])
    def test_disk_is_checked_for_all_that_is_left(self, tmp_path, monkeypatch, done):
        if done:
            quickly(MAZE, tmp_path, shards=done)
        row = 4 * 2 * 4 + 1
        needed = (4 - done + 2) * 5 * 40 * row
        free = SimpleNamespace(free=needed - 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        before = contents(tmp_path)
        with pytest.raises(OSError, match=r"MiB are needed.*fewer shards"):
            quickly(MAZE, tmp_path, shards=4)
        assert contents(tmp_path) == before
        free.free += 1
        quickly(MAZE, tmp_path, shards=4)

    def test_disk_is_checked_before_the_first_episode(self, tmp_path):
        with counting() as jobs, pytest.raises(OSError, match=r"(\d{6,}) MiB are needed"):
            quickly(CUBE, tmp_path, steps=10**9)
        assert not jobs and not contents(tmp_path)

    @pytest.mark.parametrize("name", [CUBE, MAZE, "puzzle-3x3-play-v0"])
    def test_the_size_of_a_row(self, made, rollout, name):
        arrays = load(made(name))
        expected = sum(array.nbytes for array in arrays.values()) / len(arrays["terminals"])
        state = np.random.get_state()[1].tolist()
        assert rollout(name).row_bytes() == expected
        assert np.random.get_state()[1].tolist() == state

    def test_progress_of_what_is_left(self, tmp_path, capsys):
        quickly(MAZE, tmp_path, shards=1)
        quickly(MAZE, tmp_path, shards=3, progress=True)
        bar = capsys.readouterr().err.split("\r")[-1]
        assert re.search(r"100%.*400/400.*<.*row/s, shard 3/3\]", bar)


class TestRowFiles:
    def test_same_file_as_savez_compressed(self, cube_episode, tmp_path):
        rows = RowFiles(tmp_path / "rows")
        for _ in range(60):  # more than a block
            rows.append({**cube_episode, "button_states": np.arange(600).reshape(300, 2)})
        path = rows.pack()
        np.savez_compressed(tmp_path / "expected.npz", **load(path))
        assert path.read_bytes() == (tmp_path / "expected.npz").read_bytes()
        np.testing.assert_array_equal(
            load(path)["observations"], np.tile(cube_episode["observations"], (60, 1))
        )
        assert list(rows.folder.iterdir()) == [path]

    def test_packing_can_be_stopped(self, cube_episode, tmp_path):
        rows, stopped = RowFiles(tmp_path / "rows"), threading.Event()
        rows.append(cube_episode)
        stopped.set()
        with pytest.raises(InterruptedError):
            rows.pack(stopped)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "kwargs", "match"),
        [
            ("cube-sngle-play-v0", {}, "cube-single"),
            ("antmaze-large-navigate-v0", {}, "antmaze-large-navigate-v0.*public files"),
            ("humanoidmaze-medium-stitch-v0", {}, "public files"),
            ("antsoccer-arena-navigate-v0", {}, "public files"),
            ("pointmaze-medium-explore-v0", {}, "public files"),
            (CUBE, {"shards": 0}, "shards=0.*1 or more"),
            (CUBE, {"episodes": 0}, "episodes=0.*1 or more"),
            (CUBE, {"val_episodes": 0}, "val_episodes=0.*1 or more"),
            (CUBE, {"steps": 1}, "steps=1.*2 or more"),
            (CUBE, {"workers": 0}, "workers=0.*1 or more"),
            (CUBE, {"workers": -1}, "workers=-1.*1 or more"),
            (CUBE, {"seed": -1}, "seed=-1.*0 or more"),
            (CUBE, {"episodes": 2.5}, "episodes=2.5 is no whole number"),
            (CUBE, {"episodes": 10**9, "steps": None}, "1e.12 rows are too many.*episodes=10+ "),
            (CUBE, {"shards": 10**9}, "rows are too many: shards=10+,"),
            (CUBE, {"steps": 10**12}, "rows are too many.*steps=10+;"),
        ],
    )
    def test_bad_values(self, tmp_path, name, kwargs, match):
        with pytest.raises(ValueError, match=match):
            quickly(name, tmp_path / "out", **kwargs)
        assert not (tmp_path / "out").exists()

    def test_unwritable_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"Cannot write to .*file.*another folder"):
            quickly(MAZE, tmp_path / "file" / "out")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_full_disk(self, tmp_path, monkeypatch, workers):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
        with pytest.raises(OSError, match=r"0 MiB free but \d+ MiB are needed") as error:
            quickly(MAZE, tmp_path, episodes=30000, workers=workers)
        assert not contents(tmp_path)
        assert not multiprocessing.active_children(), error  # which holds the traceback

    def test_failure_in_a_worker_names_the_episode(self):
        episodes = make_episodes(
            OGBenchName.parse(MAZE), [Job(0, 0, 0), Job(2, 1, -7)], seed=0, steps=5, workers=2
        )
        match = r"validation episode -7 of shard 2 failed(.|\n)*ValueError"
        with pytest.raises(RuntimeError, match=match):
            list(episodes)
        assert not multiprocessing.active_children()

    def test_killed_worker(self):
        jobs = [Job(0, 0, i) for i in range(10**5)]
        episodes = make_episodes(OGBenchName.parse(MAZE), jobs, seed=0, steps=50, workers=2)
        next(episodes)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"exit code -9.*fewer workers"):
            list(episodes)
        assert not multiprocessing.active_children()

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the libraries in /proc")
    def test_workers_import_no_torch(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(WORKERS)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["True", "False"] * 2, done.stderr

    def test_a_script_that_does_not_protect_itself(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "from torchrl_mac.datasets import generate_dataset\n"
            f"generate_dataset({MAZE!r}, {str(tmp_path / 'out')!r}, workers=2, episodes=4)\n"
        )
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert 'protect that script with `if __name__ == "__main__":`' in done.stderr


WORKERS = f"""
import multiprocessing
from pathlib import Path
from torchrl_mac.datasets import OGBenchName
from torchrl_mac.datasets.episodes import Job, make_episodes

if __name__ == "__main__":
    jobs = [Job(0, 0, i) for i in range(100)]
    episodes = make_episodes(OGBenchName.parse({MAZE!r}), jobs, seed=0, steps=5, workers=2)
    for _ in range(50):
        next(episodes)
    for process in multiprocessing.active_children():
        libraries = Path(f"/proc/{{process.pid}}/maps").read_text()
        print("libmujoco" in libraries, "libtorch" in libraries)
    episodes.close()
"""


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    @pytest.mark.parametrize("episode", [0, 3, 5, 12, 19])
    def test_in_this_process(self, sharded, tmp_path, episode, error):
        with failing_at(episode, error), pytest.raises(error):
            quickly(MAZE, tmp_path, shards=4)
        files = contents(tmp_path)
        num_complete = len(files) // 2
        # Up to one that was being packed, all shards are there whose episodes were made.
        assert episode // 5 - 1 <= num_complete <= episode // 5
        if files.pop(f"{MAZE}.json", None):
            assert listed(tmp_path) == sorted(files)
        assert sorted(files) == sorted(shard_names(*range(num_complete)))
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=4)
        assert {shard for shard, _, _ in jobs} == set(range(num_complete, 4))
        assert contents(tmp_path) == contents(sharded)

    def test_of_packing_is_prompt(self, tmp_path, monkeypatch):
        original, started, waits = RowFiles.pack, threading.Event(), []

        def pack(self, stopped):
            started.set()
            waits.append(stopped.wait(20))
            return original(self, stopped)

        def episodes(*args, **kwargs):
            for number, made in enumerate(make_episodes(*args, **kwargs)):
                if number == 7:
                    assert started.wait(20)
                    raise KeyboardInterrupt
                yield made

        monkeypatch.setattr(RowFiles, "pack", pack)
        monkeypatch.setattr(generate, "make_episodes", episodes)
        with pytest.raises(KeyboardInterrupt):
            quickly(MAZE, tmp_path, shards=2)
        assert waits == [True] and not contents(tmp_path)

    def test_failed_packing_ends_the_run(self, tmp_path, monkeypatch):
        def pack(*_):
            raise OSError("disk is full")

        monkeypatch.setattr(RowFiles, "pack", pack)
        with counting() as jobs, pytest.raises(OSError, match="disk is full"):
            quickly(MAZE, tmp_path, shards=4)
        assert len(jobs) == 10  # the next shard was on its way
        assert not contents(tmp_path)

    def test_a_file_that_is_not_listed_is_made_again(self, sharded, tmp_path):
        shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
        recipe = json.loads((tmp_path / f"{MAZE}.json").read_text())
        del recipe["files"][2]
        (tmp_path / f"{MAZE}.json").write_text(json.dumps(recipe))
        (tmp_path / f"{MAZE}-002.npz").write_bytes(b"half a file")
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=4)
        assert jobs == [(2, 0, 0), (2, 0, 1), (2, 0, 2)]
        assert contents(tmp_path) == contents(sharded)

    def test_a_listed_file_that_is_gone_is_made_again(self, sharded, tmp_path):
        shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
        (tmp_path / f"{MAZE}-001-val.npz").unlink()
        before = mtimes(tmp_path)
        quickly(MAZE, tmp_path, shards=4)
        assert before.items() <= mtimes(tmp_path).items()
        assert contents(tmp_path) == contents(sharded)

    def test_a_damaged_file_is_refused_by_name(self, sharded, tmp_path):
        shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
        short, flipped = (tmp_path / f"{MAZE}-00{k}.npz" for k in (1, 3))
        short.write_bytes(short.read_bytes()[:-1])
        content = bytearray(flipped.read_bytes())
        content[100] ^= 1
        flipped.write_bytes(content)
        with pytest.raises(FileExistsError, match=rf"{short.name} has \d+ bytes.*Delete.*overwr"):
            quickly(MAZE, tmp_path, shards=4)
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=4, overwrite=True)
        assert {(shard, split) for shard, split, _ in jobs} == {(1, 0), (3, 0)}
        assert contents(tmp_path) == contents(sharded)

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_of_the_program_with_workers(self, tmp_path, number, code):
        program = [sys.executable, "-m", "torchrl_mac.datasets"]
        command = [*program, "generate", MAZE, "--out", tmp_path]
        process = subprocess.Popen(
            [*command, "--workers", "2", "--episodes", "100000", "--quiet"],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
            # where tests run in the background it is ignored, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            wait_until(lambda: any(tmp_path.glob(".*.partial/*.npz/*")))
            os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
            _, stderr = process.communicate(timeout=30)
            assert process.returncode == code
            assert "Traceback" not in stderr
            assert not contents(tmp_path)
            wait_until(lambda: not processes_of_session(process.pid))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(number) == session and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.fixture
def process(processes):
    """Starts functions in processes that can be killed, without the wait for imports."""
    started = []

    def start(function, *args, **kwargs):
        started.append(processes.Process(target=function, args=args, kwargs=kwargs))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.join()


DYING = """
import os, signal
from torchrl_mac.datasets.generate import generate_dataset

original, left = os.replace, call

def replace(*args):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    original(*args)

os.replace = replace
generate_dataset(name, out, shards=2, **kwargs)
"""


ENDLESS = """
import os
from torchrl_mac.datasets.generate import generate_dataset

os.setsid()
generate_dataset(name, out, shards=999, **kwargs)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
class TestKilled:
    @pytest.mark.parametrize("call", range(10))
    def test_before_each_rename(self, process, sharded, tmp_path, call):
        values = {"name": MAZE, "out": tmp_path, "call": call, "kwargs": QUICK}
        killed = process(exec, DYING, values)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert (tmp_path / f".{MAZE}.partial").is_dir()
        names = [f"{MAZE}-{shard}.npz" for shard in ("000-val", "000", "001-val", "001")]
        # A training file never stands there without its validation file.
        published = names[: [0, 0, 1, 1, 2, 2, 2, 3, 3, 4][call]]
        assert mtimes(tmp_path).keys() == set(published)
        assert (tmp_path / f"{MAZE}.json").exists() == (call > 0)
        quickly(MAZE, tmp_path, shards=4)
        assert contents(tmp_path) == contents(sharded)

    def test_at_random_moments(self, process, sharded, tmp_path):
        def generate_and_kill(folder, delay):
            one = process(generate_dataset, MAZE, folder, shards=4, **QUICK)
            wait_until(lambda: folder.exists() or not one.is_alive())
            one.join(delay)
            one.kill()
            one.join()
            return one.exitcode

        start = time.monotonic()
        assert generate_and_kill(tmp_path / "whole", 60) == 0
        duration = time.monotonic() - start
        draw = random.Random(0)
        codes = []
        for number in range(8):
            folder = tmp_path / str(number)
            codes.append(generate_and_kill(folder, draw.uniform(0, duration)))
            quickly(MAZE, folder, shards=4)
            assert contents(folder) == contents(sharded), number
        assert codes.count(-signal.SIGKILL) >= 2

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
    def test_with_workers(self, process, sharded, tmp_path):
        values = {"name": MAZE, "out": tmp_path, "kwargs": {**QUICK, "workers": 2}}
        killed = process(exec, ENDLESS, values)
        wait_until(lambda: len(mtimes(tmp_path)) > 4)
        killed.kill()
        killed.join()
        wait_until(lambda: not processes_of_session(killed.pid))
        complete = {int(name[len(MAZE) + 1 :][:3]) for name in listed(tmp_path)}
        with counting() as jobs:
            quickly(MAZE, tmp_path, shards=max(complete) + 2)
        assert {shard for shard, _, _ in jobs} - {max(complete)} == {max(complete) + 1}
        assert not list(tmp_path.glob(".*.partial"))
        assert len(mtimes(tmp_path)) == 2 * max(complete) + 4
        files, expected = contents(tmp_path), contents(sharded)
        assert all(files[name] == expected[name] for name in shard_names(0, 1))


class TestTwoAtOnce:
    def test_processes(self, process, sharded, tmp_path):
        both = [process(generate_dataset, MAZE, tmp_path, shards=4, **QUICK) for _ in range(2)]
        for one in both:
            one.join()
        assert [one.exitcode for one in both] == [0, 0]
        assert contents(tmp_path) == contents(sharded)

    def test_the_second_waits_and_has_nothing_left_to_do(self, sharded, tmp_path, monkeypatch):
        messages = []
        monkeypatch.setattr(shards.logger, "info", messages.append)
        with ThreadPoolExecutor(1) as pool:
            with FileLock(tmp_path / f".{MAZE}.lock"):
                second = pool.submit(quickly, MAZE, tmp_path, shards=4)
                wait_until(lambda: messages)
                time.sleep(0.2)
                assert not second.done() and not contents(tmp_path)
                shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
                before = mtimes(tmp_path)
            assert second.result(30) == tmp_path / f"{MAZE}-000.npz"
        assert mtimes(tmp_path) == before
        assert f"another process that is making {MAZE}" in messages[0]
