"""Generated datasets: same bytes for any number of workers, OGBench's format, all or nothing."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import ogbench
import pytest

from torchrl_mac.data import cli, generate
from torchrl_mac.data.generate import generate_dataset
from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.parallel import make_episodes
from torchrl_mac.data.rollouts import OfficialSettings, OracleRollout

CUBE = "cube-single-play-v0"
MAZE = "pointmaze-medium-navigate-v0"


def quickly(name, out, **kwargs):
    defaults = {"episodes": 3, "val_episodes": 2, "steps": 40, "workers": 1, "progress": False}
    return generate_dataset(name, out, **{**defaults, **kwargs})


def load(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Training files by name, made once with a single worker."""
    paths = {}

    def make(name):
        if name not in paths:
            paths[name] = quickly(name, tmp_path_factory.mktemp(name))
        return paths[name]

    return make


@pytest.fixture(scope="module")
def rollout():
    """Rollouts by name: an environment takes a second to build, and episodes leave no trace."""
    return functools.cache(OracleRollout.make)


@pytest.fixture(scope="module")
def cube_episode(rollout):
    """A play episode long enough to carry the cube somewhere."""
    return rollout(CUBE).episode(seed=0, split=0, index=0, steps=300)


class TestReproducibility:
    @pytest.mark.parametrize(("name", "workers"), [(CUBE, 2), (CUBE, 3), (MAZE, 2), (MAZE, 3)])
    def test_same_bytes_with_any_number_of_workers(self, made, tmp_path, name, workers):
        path = quickly(name, tmp_path, workers=workers)
        files = sorted(file.name for file in tmp_path.iterdir())
        assert files == sorted(f"{name}{end}" for end in (".npz", "-val.npz", ".json"))
        for file in files:
            assert (tmp_path / file).read_bytes() == (made(name).parent / file).read_bytes(), file
        assert path == tmp_path / f"{name}.npz"

    @pytest.mark.parametrize(
        "name",
        [CUBE, "scene-noisy-v0", "puzzle-3x3-play-v0", "pointmaze-teleport-stitch-v0"],
    )
    def test_an_episode_does_not_depend_on_earlier_ones(self, rollout, name):
        for index in range(3):
            rollout(name).episode(seed=1, split=0, index=index, steps=100)
        fresh = OracleRollout.make(name).episode(seed=1, split=0, index=3, steps=100)
        for key, column in rollout(name).episode(seed=1, split=0, index=3, steps=100).items():
            np.testing.assert_array_equal(column, fresh[key], err_msg=key)

    def test_more_episodes_extend_the_dataset(self, made, tmp_path):
        longer = load(quickly(MAZE, tmp_path, episodes=5))
        for key, column in load(made(MAZE)).items():
            np.testing.assert_array_equal(longer[key][: len(column)], column)

    def test_seeds_splits_and_episodes_differ(self, rollout):
        jobs = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        actions = [
            rollout(MAZE).episode(seed=seed, split=split, index=index, steps=20)["actions"]
            for seed, split, index in jobs
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
    def test_columns(self, made, name, qpos, buttons):
        env = gymnasium.make(OGBenchName.parse(name).env_id)
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
    def test_ogbench_loads_it(self, made, name):
        task = name.replace("-v0", "-singletask-task1-v0")
        for dataset, keys in ((name, set()), (task, {"rewards", "masks"})):
            env, train, val = ogbench.make_env_and_datasets(dataset, dataset_path=str(made(name)))
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
            ("pointmaze-giant-navigate-v0", (500, 2001, 0.5, 0.0)),
            ("pointmaze-large-stitch-v0", (5000, 201, 0.5, 0.0)),
        ],
    )
    def test_official_settings(self, name, expected):
        assert OfficialSettings.of(name) == OfficialSettings(*expected)


class TestRecipe:
    def test_same_recipe_is_reused(self, made, tmp_path, monkeypatch):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        monkeypatch.setattr(OracleRollout, "make", lambda _: pytest.fail("made again"))
        task_name = MAZE.replace("-v0", "-singletask-task2-v0")
        assert quickly(task_name, tmp_path, workers=7) == tmp_path / f"{MAZE}.npz"
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"episodes": 4}, {"val_episodes": 1}, {"steps": 41}]
    )
    def test_another_recipe_is_refused(self, made, change):
        (key, value) = next(iter(change.items()))
        with pytest.raises(FileExistsError, match=rf"{key}=.* instead of {value}.*overwrite"):
            quickly(MAZE, made(MAZE).parent, **change)

    def test_another_version_is_refused(self, made, tmp_path):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        path = tmp_path / f"{MAZE}.json"
        recipe = json.loads(path.read_text())
        recipe["versions"]["mujoco"] = "3.0.0"
        path.write_text(json.dumps(recipe))
        with pytest.raises(FileExistsError, match=r"3\.0\.0"):
            quickly(MAZE, tmp_path)

    @pytest.mark.parametrize(
        ("missing", "match"), [(".json", "no readable recipe"), ("-val.npz", "other split")]
    )
    def test_incomplete_files_are_refused_and_can_be_replaced(self, made, tmp_path, missing, match):
        shutil.copytree(made(MAZE).parent, tmp_path, dirs_exist_ok=True)
        (tmp_path / f"{MAZE}{missing}").unlink()
        with pytest.raises(FileExistsError, match=match):
            quickly(MAZE, tmp_path)
        quickly(MAZE, tmp_path, overwrite=True, seed=5)
        assert json.loads((tmp_path / f"{MAZE}.json").read_text())["seed"] == 5
        assert (tmp_path / f"{MAZE}.npz").read_bytes() != made(MAZE).read_bytes()


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "kwargs", "match"),
        [
            ("cube-sngle-play-v0", {}, "cube-single"),
            ("antmaze-large-navigate-v0", {}, "antmaze-large-navigate-v0.*public files"),
            ("humanoidmaze-medium-stitch-v0", {}, "public files"),
            ("antsoccer-arena-navigate-v0", {}, "public files"),
            ("pointmaze-medium-explore-v0", {}, "public files"),
            (CUBE, {"episodes": 0}, "episodes=0.*1 or more"),
            (CUBE, {"val_episodes": 0}, "val_episodes=0.*1 or more"),
            (CUBE, {"steps": 1}, "steps=1.*2 or more"),
            (CUBE, {"workers": 0}, "workers=0.*1 or more"),
            (CUBE, {"seed": -1}, "seed=-1.*0 or more"),
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
        assert not list(tmp_path.iterdir())
        assert not multiprocessing.active_children(), error  # which holds the traceback

    def test_failure_in_a_worker_names_the_episode(self):
        episodes = make_episodes(
            OGBenchName.parse(MAZE), [(0, 0), (1, -7)], seed=0, steps=5, workers=2
        )
        with pytest.raises(RuntimeError, match=r"validation episode -7 failed(.|\n)*ValueError"):
            list(episodes)
        assert not multiprocessing.active_children()

    def test_killed_worker(self):
        jobs = [(0, i) for i in range(10**6)]
        episodes = make_episodes(OGBenchName.parse(MAZE), jobs, seed=0, steps=50, workers=2)
        next(episodes)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"exit code -9.*fewer workers"):
            list(episodes)
        assert not multiprocessing.active_children()


class TestInterruption:
    def test_in_this_process(self, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(generate, "_sync", interrupt)  # at the very end
        with pytest.raises(KeyboardInterrupt):
            quickly(MAZE, tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_of_the_program_with_workers(self, tmp_path, number, code):
        command = [sys.executable, "-m", "torchrl_mac.data", "generate", MAZE, "--out", tmp_path]
        process = subprocess.Popen(
            [*command, "--workers", "2", "--episodes", "100000", "--quiet"],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".*/train/*")))
            os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
            _, stderr = process.communicate(timeout=30)
            assert process.returncode == code
            assert "Traceback" not in stderr
            assert not list(tmp_path.iterdir())
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


class TestCommandLine:
    def test_generate_convert_info(self, tmp_path, capsys):
        options = ["--episodes", "2", "--steps", "30", "--workers", "1", "--quiet"]
        assert cli.main(["generate", MAZE, "--out", str(tmp_path), *options]) == 0
        assert capsys.readouterr().out == f"{tmp_path / MAZE}.npz\n"
        root = str(tmp_path / "root")
        task = MAZE.replace("-v0", "-singletask-task1-v0")
        assert cli.main(["convert", task, "--source", str(tmp_path), "--root", root]) == 0
        assert "train: 60 rows" in capsys.readouterr().out
        assert cli.main(["info", task, "--root", root]) == 0
        train, val = capsys.readouterr().out.splitlines()
        assert "60 rows, 2 episodes, observation 2, action 2, rewards of task1" in train
        assert "30 rows, 1 episodes" in val

    @pytest.mark.parametrize(
        ("argv", "match"),
        [
            ([], "required"),
            (["generate", CUBE, "--episodes", "many"], "many"),
            (["generate", CUBE, "--episodes", "0"], "episodes=0"),
            (["generate", "cube-nonuple-play-v0"], "cube-nonuple"),
            (["generate", CUBE, "--out", "/dev/null/out"], "another folder"),
            (["convert", CUBE, "--source", "/nowhere", "--root", "/dev/null"], "/dev/null|source"),
            (["info", CUBE, "--root", "/nowhere"], "no converted cube-single-play-v0"),
        ],
    )
    def test_errors(self, capsys, argv, match):
        assert cli.main(argv) == 2
        stderr = capsys.readouterr().err
        assert re.search(match, stderr)
        assert "Traceback" not in stderr and "Errno" not in stderr
        assert stderr.splitlines()[-1].startswith("torchrl-mac-data")

    def test_interrupted(self, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "generate_dataset", interrupt)
        assert cli.main(["generate", CUBE]) == 130
        assert "interrupted" in capsys.readouterr().err

    def test_failed_worker(self, capsys, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("worker is gone")

        monkeypatch.setattr(cli, "generate_dataset", fail)
        assert cli.main(["generate", CUBE]) == 1
        assert "worker is gone" in capsys.readouterr().err
