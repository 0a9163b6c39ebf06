from __future__ import annotations

import ctypes.util
import importlib.util
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Unbounded
from torchrl.envs import (
    InitTracker,
    MultiAction,
    ParallelEnv,
    SerialEnv,
    TransformedEnv,
    default_info_dict_reader,
)
from torchrl.envs.utils import check_env_specs
from torchrl.modules.tensordict_module.actors import MultiStepActorWrapper

from torchrl_mac.datasets import OGBenchName
from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.envs import ogbench as module

ogbench = pytest.importorskip("ogbench")

MAZE = "pointmaze-medium-navigate-v0"
MAZE_SINGLE = "pointmaze-medium-navigate-singletask-task1-v0"
CUBE = "cube-single-play-v0"
CUBE_SINGLE = "cube-single-play-singletask-task2-v0"


def play(env: OGBenchEnv, episodes: int = 3, steps: int = 10, disturb: bool = False):
    """Episodes with actions that depend on nothing but the episode's number."""
    actions = torch.Generator().manual_seed(0)
    out = []
    for _ in range(episodes):
        chunk = 2 * torch.rand(steps, *env.action_spec.shape, generator=actions) - 1
        if disturb:
            np.random.rand(3)
        queue = iter(chunk)
        policy = TensorDictModule(partial(next, queue), in_keys=[], out_keys=["action"])
        out.append(env.rollout(steps, policy))
    return out


class TestSpecs:
    @pytest.mark.parametrize(
        ("name", "goal_dim"),
        [
            (MAZE, 2),
            (MAZE_SINGLE, None),
            (CUBE, 28),
            (CUBE_SINGLE, None),
            ("cube-single-play-oraclerep-v0", 3),
            ("antmaze-medium-navigate-oraclerep-v0", 2),
        ],
    )
    def test_specs(self, name, goal_dim):
        env = OGBenchEnv(name)
        check_env_specs(env)
        rollout = env.rollout(2)
        entries = {"observation": torch.float32, "success": torch.bool}
        if goal_dim is not None:
            entries["goal"] = torch.float32
            assert rollout["next", "goal"].shape == (2, goal_dim)
        ends = dict.fromkeys(("done", "terminated", "truncated"), torch.bool)
        next_entries = {**entries, **ends, "reward": torch.float32}
        assert {key: value.dtype for key, value in rollout["next"].items()} == next_entries
        assert all(rollout["next", key].shape == (2, 1) for key in [*ends, "success", "reward"])

    def test_device(self):
        assert OGBenchEnv(MAZE, device="cpu").rollout(2).device == torch.device("cpu")

    def test_chunks_in_reality(self):
        env = TransformedEnv(OGBenchEnv(MAZE), MultiAction(dim=1, stack_rewards=True))
        check_env_specs(env)
        chunk = torch.full((4, 2), 0.1)
        start = env.reset()
        end = env.step(start.clone().set("action", chunk))["next"]
        moved = end["observation"] - start["observation"]
        assert end["reward"].shape == (4, 1)
        torch.testing.assert_close(moved, 0.2 * chunk.sum(0), atol=1e-4, rtol=0)


class TestDynamics:
    def test_matches_ogbench(self):
        env, theirs = (
            OGBenchEnv(CUBE_SINGLE),
            ogbench.make_env_and_datasets(CUBE_SINGLE, env_only=True),
        )
        env.set_seed(7)
        (episode,) = play(env, episodes=1, steps=250)
        observation, _ = theirs.reset(seed=7)
        expected = {key: [] for key in ("observation", "reward", "success", "truncated")}
        np.testing.assert_array_equal(episode["observation"][0], np.float32(observation))
        for action in episode["action"].numpy():
            observation, reward, _, truncated, info = theirs.step(action)
            for key, value in zip(expected, (observation, reward, info["success"], truncated)):
                expected[key].append(np.atleast_1d(np.float32(value)))
        assert len(episode) == 200  # OGBench's time limit
        for key, value in expected.items():
            np.testing.assert_array_equal(episode["next", key].float(), np.stack(value))

    def test_time_limit(self):
        env = OGBenchEnv(MAZE, env_kwargs={"max_episode_steps": 4})
        rollout = env.rollout(10, lambda td: td.set("action", torch.zeros(2)))
        assert rollout["next", "truncated"].flatten().tolist() == [False, False, False, True]
        assert not rollout["next", "terminated"].any()

    @pytest.mark.parametrize(("name", "reward"), [(MAZE, (0, 1)), (MAZE_SINGLE, (-1, 0))])
    def test_success(self, name, reward):
        env = OGBenchEnv(name, task_id=1)
        td = env.reset()
        assert not td["success"].any()
        stay = torch.zeros(2)
        away = env.step(td.clone().set("action", stay))["next"]
        maze = env._env.unwrapped
        maze.set_xy(maze.cur_goal_xy)
        there = env.step(td.clone().set("action", stay))["next"]
        for key in ("success", "terminated", "done"):
            assert (away[key].item(), there[key].item()) == (False, True)
        assert (away["reward"].item(), there["reward"].item()) == reward


class TestTasks:
    def test_task_is_passed(self):
        for task_id in (1, 4):
            env = OGBenchEnv(MAZE, task_id=task_id)
            for _ in range(3):
                goal = env.reset()["goal"]
                assert env.task_id == task_id
                expected = env._env.unwrapped.task_infos[task_id - 1]["goal_xy"]
                assert np.abs(goal.numpy() - expected).max() <= 1.0 + 1e-5

    def test_random_tasks(self):
        env = OGBenchEnv(MAZE)
        env.set_seed(0)
        tasks = []
        for _ in range(20):
            env.reset()
            tasks.append(env.task_id)
        assert set(tasks) == {1, 2, 3, 4, 5}

    def test_task_of_one_reset(self):
        env = OGBenchEnv(MAZE, task_id=1)
        env.reset(options={"task_id": 5})
        assert env.task_id == 5

    def test_task_in_name(self):
        assert OGBenchEnv(CUBE_SINGLE, task_id=2).task_id == 2
        assert OGBenchEnv(MAZE_SINGLE.replace("-task1", "")).task_id == 1

    @pytest.mark.parametrize(
        ("name", "task_id", "message"),
        [
            (MAZE, 6, "between 1 and 5"),
            (MAZE, 0, "between 1 and 5"),
            (MAZE_SINGLE, 2, "contradicts"),
            (MAZE_SINGLE.replace("-task1", ""), 2, "is task 1"),
            ("cube-singel-play-v0", None, "cube-single"),
        ],
    )
    def test_errors(self, name, task_id, message):
        with pytest.raises(ValueError, match=message):
            OGBenchEnv(name, task_id=task_id)

    def test_missing_ogbench(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install"):
            OGBenchEnv(MAZE)


class TestSeeding:
    @pytest.mark.parametrize(
        "name",
        [
            MAZE,
            "pointmaze-teleport-navigate-v0",
            "antmaze-medium-navigate-v0",
            CUBE,
            "puzzle-3x3-play-oraclerep-v0",
            "scene-play-singletask-task3-v0",
        ],
    )
    def test_repeats(self, name):
        one, other = OGBenchEnv(name), OGBenchEnv(name)
        play(other, episodes=1, steps=3)  # what came before must not matter
        one.set_seed(3)
        other.set_seed(3)
        first, second = play(one), play(other, disturb=True)
        for a, b in zip(first, second):
            assert (a == b).all()
        starts = torch.stack([episode["observation"][0] for episode in first])
        assert len(starts.unique(dim=0)) == len(starts)
        other.set_seed(4)
        assert not (play(other, episodes=1)[0] == first[0]).all()

    def test_teleports_repeat(self):
        # The only steps that draw: walk into a teleport again and again.
        exits = []
        for noise in (0, 5):
            env = OGBenchEnv("pointmaze-teleport-navigate-v0")
            env.set_seed(0)
            td = env.reset()
            maze = env._env.unwrapped
            for _ in range(8):
                np.random.rand(noise)
                maze.set_xy(np.array(maze._teleport_info["teleport_in_xys"][0]))
                env.step(td.clone().set("action", torch.zeros(2)))
                exits.append(maze.get_xy())  # the observation shows it one step later
        np.testing.assert_array_equal(exits[:8], exits[8:])
        assert len(np.unique(exits, axis=0)) > 1

    def test_leaves_numpy_alone(self):
        np.random.seed(0)
        np.random.randn()  # leaves a second normal number pending
        before = np.random.get_state(legacy=False)
        env = OGBenchEnv("pointmaze-teleport-navigate-v0")
        env.set_seed(0)
        play(env, episodes=2)
        after = np.random.get_state(legacy=False)
        assert (before["state"]["key"] == after["state"]["key"]).all()
        assert before["gauss"] == after["gauss"] and before["has_gauss"] == after["has_gauss"]
        assert before["state"]["pos"] == after["state"]["pos"]

    def test_reset_with_seed(self):
        one, other = OGBenchEnv(MAZE), OGBenchEnv(MAZE)
        assert (one.reset(seed=5) == other.reset(seed=5)).all()
        assert not (one.reset() == other.reset(seed=5)).all()


class TestBatched:
    @pytest.mark.parametrize(
        "batched", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")], ids=["serial", "par"]
    )
    def test_specs_and_seeds(self, batched):
        rollouts = []
        for _ in range(2):
            env = batched(2, partial(OGBenchEnv, MAZE))
            try:
                check_env_specs(env)
                env.set_seed(0)
                torch.manual_seed(0)
                rollouts.append(env.rollout(5, break_when_any_done=False))
            finally:
                env.close(raise_if_closed=False)
        one, other = rollouts
        assert one.shape == (2, 5)
        assert (one == other).all()
        assert not torch.equal(one["observation"][0, 0], one["observation"][1, 0])

    def test_receding_horizon(self):
        env = TransformedEnv(SerialEnv(2, partial(OGBenchEnv, MAZE)), InitTracker())
        calls = []

        def plan(observation: torch.Tensor) -> torch.Tensor:
            calls.append(observation)
            return torch.arange(4.0).div(10)[:, None].expand(*observation.shape[:-1], 4, 2)

        actor = TensorDictModule(plan, in_keys=["observation"], out_keys=["action"])
        policy = MultiStepActorWrapper(actor, n_steps=4, replan_interval=2)
        actions = env.rollout(6, policy)["action"]
        torch.testing.assert_close(actions[0, :, 0], torch.tensor([0, 0.1] * 3))
        assert len(calls) == 3


class TestInfo:
    @pytest.mark.parametrize("name", [MAZE, MAZE_SINGLE, CUBE, "puzzle-3x3-play-v0"])
    def test_all_of_it(self, name):
        env = OGBenchEnv(name)
        own = env.observation_spec.clone()
        env = env.auto_register_info_dict()
        check_env_specs(env)
        rollout = env.rollout(3)
        assert rollout["next", "qpos"].dtype == torch.float64
        assert rollout["next", "qpos"].diff(dim=0).abs().max() > 0
        for key, spec in own.items():
            assert env.observation_spec[key] == spec
            assert rollout["next", key].dtype == spec.dtype

    def test_some_of_it(self):
        env, plain = OGBenchEnv(CUBE), OGBenchEnv(CUBE)
        size = env._env.unwrapped.model.nq
        reader = default_info_dict_reader(["qpos"], spec=[Unbounded(size, dtype=torch.float64)])
        env.set_info_dict_reader(reader)
        check_env_specs(env)
        env.set_seed(0)
        plain.set_seed(0)
        (ours,), (theirs,) = play(env, episodes=1), play(plain, episodes=1)
        assert torch.equal(ours["next", "qpos"][:-1], ours["qpos"][1:])
        assert (ours["next", "qpos"][-1] == torch.as_tensor(env._env.unwrapped.data.qpos)).all()
        assert (ours.exclude("qpos", ("next", "qpos")) == theirs).all()

    @pytest.mark.parametrize("name", [MAZE, CUBE_SINGLE])
    def test_what_is_there_already(self, name):
        """Not even a reader of ``"success"``, a Python bool, or of the goal changes an entry."""
        env, plain = OGBenchEnv(name), OGBenchEnv(name)
        keys = [key for key in ("success", "goal") if key in plain.observation_spec.keys()]
        env.set_info_dict_reader(default_info_dict_reader(keys))
        check_env_specs(env)
        assert env.observation_spec == plain.observation_spec
        env.set_seed(0)
        plain.set_seed(0)
        assert (play(env, episodes=1)[0] == play(plain, episodes=1)[0]).all()

    def test_a_function(self):
        env, seen = OGBenchEnv(MAZE), []
        env.set_info_dict_reader(lambda info, td: seen.append(sorted(info)) or td)
        env.rollout(1)
        assert seen == [["goal", "success"], sorted({*seen[1], "goal", "success", "qpos", "xy"})]


class TestNames:
    def test_available_envs(self):
        names = OGBenchEnv.available_envs
        assert len(names) == len(set(names))
        assert {MAZE, MAZE_SINGLE, CUBE, CUBE_SINGLE, "antmaze-large-explore-v0"} <= set(names)
        assert "cube-single-play-oraclerep-v0" in names
        registered = set(importlib.import_module("gymnasium").registry)
        for name in names:
            parsed = OGBenchName.parse(name)
            assert str(parsed) == name and parsed.env_id in registered
        for name in names[:: len(names) // 4]:
            OGBenchEnv(name).close()

    def test_none_without_ogbench(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert OGBenchEnv.available_envs == []

    def test_a_batch_is_made_elsewhere(self):
        with pytest.raises(ValueError, match=r"num_envs=2.*SerialEnv\(2"):
            OGBenchEnv(MAZE, num_envs=2)


class TestPixels:
    def test_backend_error(self, monkeypatch):
        import mujoco

        glfw = type("GLContext", (), {"__module__": "mujoco.glfw"})
        monkeypatch.setattr(mujoco, "GLContext", glfw)
        monkeypatch.setattr(sys, "platform", "linux")
        for display in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(display, raising=False)
        with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
            OGBenchEnv(MAZE, from_pixels=True)

    def test_state_only_renders_nothing(self, monkeypatch):
        env = OGBenchEnv(MAZE)

        def fail() -> None:
            raise AssertionError("rendered")

        monkeypatch.setattr(env._env.unwrapped, "render", fail)
        assert "pixels" not in env.rollout(2)

    @pytest.mark.parametrize("name", [MAZE, CUBE_SINGLE])
    def test_pixels_only(self, name, monkeypatch):
        make = module._make_env

        def make_painted(*args):
            env = make(*args)
            frame = np.full((4, 6, 3), 9, np.uint8)
            monkeypatch.setattr(env.unwrapped, "render", lambda: frame)
            return env

        monkeypatch.setattr(module, "_check_rendering", lambda: None)
        monkeypatch.setattr(module, "_make_env", make_painted)
        env = OGBenchEnv(name, from_pixels=True, pixels_only=True)
        check_env_specs(env)
        frames = {"pixels"} if name == CUBE_SINGLE else {"pixels", "goal_pixels"}
        assert set(env.observation_spec.keys()) == {*frames, "success"}
        both = OGBenchEnv(name, from_pixels=True)
        assert {"observation", *frames} <= set(both.observation_spec.keys())
        assert env.rollout(2)["next", "pixels"].shape == (2, 4, 6, 3)

    def test_pixels_only_needs_pixels(self):
        with pytest.raises(ValueError, match="pixels_only=True needs from_pixels=True"):
            OGBenchEnv(MAZE, pixels_only=True)

    @pytest.mark.slow
    @pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="needs EGL")
    def test_frames(self):
        # In a process of its own: MuJoCo chooses how to render when it is first imported.
        code = f"""
import os
os.environ["MUJOCO_GL"] = "egl"
import torch
from torchrl.envs.utils import check_env_specs
from torchrl_mac.envs import OGBenchEnv
for name in ({MAZE!r}, {CUBE!r}, "cube-single-play-singletask-v0"):
    env = OGBenchEnv(name, from_pixels=True, env_kwargs={{"width": 64, "height": 48}})
    check_env_specs(env)
    rollout = env.rollout(2)
    frames = rollout["next", "pixels"]
    assert frames.shape == (2, 48, 64, 3) and frames.dtype == torch.uint8, frames
    assert frames.float().std() > 1
    assert "observation" in rollout
    if "goal" in rollout:
        goal = rollout["goal_pixels"]
        assert goal.shape == frames.shape and (goal[0] == goal[1]).all()
        assert (goal != rollout["pixels"]).any()
    else:
        assert "goal_pixels" not in rollout
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_step_after_any_tensordict():
    # Only the action is read: an actor's other entries ride along.
    env = OGBenchEnv(MAZE)
    td = env.reset().update(TensorDict(action=torch.zeros(2), chosen_action_value=torch.ones(1)))
    assert env.step_mdp(env.step(td))["chosen_action_value"].item() == 1


def test_import_needs_no_ogbench(processes):
    code = "import sys, torchrl_mac.envs; sys.exit('ogbench' in sys.modules)"
    process = processes.Process(target=exec, args=(code,))
    process.start()
    process.join()
    assert process.exitcode == 0


if __name__ == "__main__":
    pytest.main([__file__])
