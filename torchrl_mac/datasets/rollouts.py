"""OGBench's scripted oracles at work: one episode is a pure function of its seed.

Settings, names and rules follow "OGBench: Benchmarking Offline Goal-Conditioned RL"
(https://arxiv.org/abs/2410.20092).
"""

from __future__ import annotations

import abc
import contextlib
import functools
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_mac.datasets.names import OGBenchName

__all__ = ["OfficialSettings", "OracleRollout"]

_EPISODES = {
    "cube-triple": 3000,
    "cube-quadruple": 5000,
    "puzzle-4x5": 3000,
    "puzzle-4x6": 5000,
}
# Stacking more cubes needs more stacks to be seen: range of the chance that a plan stacks,
# drawn anew in each episode.
_P_STACK = {
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
_STITCH_DISTANCE = 4


@dataclass(frozen=True)
class OfficialSettings:
    """How OGBench made one of its datasets.

    Args:
        episodes (int): training episodes, in each file of a set of many files; validation has a
            tenth of that.
        steps (int): rows per episode, the last of which has no successor.
        noise (float): noise of the scripted oracle.
        p_random_action (float): chance that a step takes a uniformly random action.

    Examples:
        >>> OfficialSettings.of("puzzle-4x5-noisy-v0")
        OfficialSettings(episodes=3000, steps=1001, noise=0.1, p_random_action=0.2)
    """

    episodes: int = 1000
    steps: int = 1001
    noise: float = 0.1
    p_random_action: float = 0.0

    @classmethod
    def of(cls, name: OGBenchName | str) -> OfficialSettings:
        """Returns the settings of a dataset.

        Raises:
            ValueError: if OGBench ships no scripted oracle that makes this dataset.
        """
        if isinstance(name, str):
            name = OGBenchName.parse(name)
        if name.is_manipulation:
            p_random_action = 0.2 if name.env.startswith("puzzle") else 0.1
            large = name.size is not None  # in files of 1000 episodes, as cube-octuple always is
            return cls(
                episodes=1000 if large else _EPISODES.get(name.env, 1000),
                p_random_action=p_random_action if name.behaviour == "noisy" else 0.0,
            )
        if name.env.startswith("pointmaze") and name.behaviour == "stitch":
            return cls(episodes=5000, steps=201, noise=0.5)
        if name.env.startswith("pointmaze") and name.behaviour == "navigate":
            if name.env == "pointmaze-giant":
                return cls(episodes=500, steps=2001, noise=0.5)
            return cls(noise=0.5)
        raise ValueError(
            f"{name.dataset!r} cannot be generated: OGBench ships scripted oracles for cube-*, "
            "scene-*, puzzle-* (play, noisy) and pointmaze-* (navigate, stitch) only; other data "
            "come from expert policies that are not in the package. Use the public files, "
            "https://rail.eecs.berkeley.edu/datasets/ogbench."
        )


class OracleRollout(abc.ABC):
    """Lets a scripted oracle act in its OGBench environment, episode by episode.

    An episode depends on ``(seed, shard, split, index)`` alone, not on which episodes this object
    made before, so that any number of processes makes the same dataset.

    Args:
        name (OGBenchName): the dataset to make episodes of.
        settings (OfficialSettings, optional): the oracle's settings. Default: the official ones.

    Examples:
        >>> rollout = OracleRollout.make("pointmaze-medium-navigate-v0")
        >>> episode = rollout.episode(seed=0, split=0, index=0, steps=50)
        >>> episode["observations"].shape, episode["terminals"].nonzero()[0]
        ((50, 2), array([49]))
    """

    env_kwargs: dict[str, Any]

    def __init__(self, name: OGBenchName, settings: OfficialSettings | None = None) -> None:
        import gymnasium
        import ogbench  # noqa: F401, registers the environments

        self.name = name
        self.settings = settings or OfficialSettings.of(name)
        with warnings.catch_warnings():
            # A machine without a display; nothing is rendered here.
            warnings.filterwarnings("ignore", message=".*DISPLAY.*")
            env = gymnasium.make(
                f"{name.env}-v0",
                disable_env_checker=True,
                terminate_at_goal=False,
                **self.env_kwargs,
            )
        self.env: Any = env.unwrapped

    @staticmethod
    def make(name: OGBenchName | str) -> OracleRollout:
        """Builds the rollout, and with it the environment, of a dataset.

        Raises:
            ValueError: if the name is unknown or no oracle for it is shipped with OGBench.
        """
        if isinstance(name, str):
            name = OGBenchName.parse(name)
        settings = OfficialSettings.of(name)
        if name.is_manipulation:
            return ManipulationRollout(name, settings)
        return PointMazeRollout(name, settings)

    def episode(
        self, *, seed: int, split: int, index: int, steps: int, shard: int = 0
    ) -> dict[str, np.ndarray]:
        """Makes one episode.

        Args:
            seed (int): the dataset's seed.
            split (int): 0 for training, 1 for validation.
            index (int): the episode's number within its split and shard.
            steps (int): number of rows.
            shard (int, optional): the shard's number; the first one is like a dataset that is not
                sharded. Defaults to 0.

        Returns:
            dict[str, np.ndarray]: the columns of OGBench's files, each with ``steps`` rows.
        """
        shard_key = (shard,) if shard else ()
        attempt = 0
        while True:
            key = (split, index, attempt, *shard_key)
            with _seeded(np.random.SeedSequence(seed, spawn_key=key)):
                episode = self._columns(self._rows(steps))
            if self._is_usable(episode):
                return episode
            attempt += 1

    def row_bytes(self) -> int:
        """The size of a row, from the widths of the environment."""
        with _seeded(np.random.SeedSequence(0)):
            row = self._columns(self._rows(1))
        return sum(column.nbytes for column in row.values())

    @abc.abstractmethod
    def _rows(self, steps: int) -> Iterator[dict[str, Any]]:
        """Yields ``steps`` rows, drawing all randomness from ``np.random``."""

    def _is_usable(self, episode: dict[str, np.ndarray]) -> bool:
        return True

    @staticmethod
    def _columns(rows: Iterator[dict[str, Any]]) -> dict[str, np.ndarray]:
        lists = defaultdict(list)
        for row in rows:
            for key, value in row.items():
                lists[key].append(value)
        columns = {
            key: np.asarray(values, np.int64 if key == "button_states" else np.float32)
            for key, values in lists.items()
        }
        columns["terminals"] = np.zeros(len(columns["observations"]), bool)
        columns["terminals"][-1] = True
        return columns


class ManipulationRollout(OracleRollout):
    """Pursues one random target after another with OGBench's robot-arm oracles.

    ``"play"`` follows noisy plans; ``"noisy"`` follows a closed-loop oracle whose actions get
    Gaussian noise, of a scale drawn per episode, and are replaced by uniform ones at random.
    """

    env_kwargs = {"mode": "data_collection", "visualize_info": False}  # noqa: RUF012

    def _rows(self, steps: int) -> Iterator[dict[str, Any]]:
        env = self.env
        obs, info = env.reset(seed=np.random.randint(2**31))
        p_stack = np.random.uniform(*_P_STACK.get(self.name.env, (0.0, 0.0)))
        oracles = self._oracles()
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        noise = np.zeros(5)
        if self.name.behaviour == "noisy":
            noise = np.random.uniform(0, self.settings.noise) * np.array([1, 1, 1, 3, 10])
        for _ in range(steps):
            # env.action_space is made anew, and unseeded, each time it is asked for.
            if np.random.uniform() < self.settings.p_random_action:
                action = np.random.uniform(-1, 1, size=5)
            else:
                action = oracle.select_action(obs, info) + np.random.normal(0, noise)
            action = np.clip(action, -1, 1)
            next_obs, _, _, _, info = env.step(action)
            row = {
                "observations": obs,
                "actions": action,
                "qpos": info["prev_qpos"],
                "qvel": info["prev_qvel"],
            }
            if "prev_button_states" in info:
                row["button_states"] = info["prev_button_states"]
            yield row
            obs = next_obs
            if oracle.done:
                # The step's own `info` still speaks of the old target, and in the scene, for the
                # drawer and the window, of one left over from an earlier episode.
                _, info = env.set_new_target(p_stack=p_stack)
                oracle = oracles[info["privileged/target_task"]]
                oracle.reset(obs, info)

    def _oracles(self) -> dict[str, Any]:
        from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
        from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
        from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        # The gripper has nothing to grasp in a puzzle, which is all buttons.
        button_kwargs = {"gripper_always_closed": self.name.env.startswith("puzzle")}
        if self.name.behaviour == "noisy":
            return {
                "cube": CubeMarkovOracle(env=self.env),
                "button": ButtonMarkovOracle(env=self.env, **button_kwargs),
                "drawer": DrawerMarkovOracle(env=self.env),
                "window": WindowMarkovOracle(env=self.env),
            }
        kwargs = {"env": self.env, "noise": self.settings.noise}
        return {
            "cube": CubePlanOracle(**kwargs),
            "button": ButtonPlanOracle(**kwargs, **button_kwargs),
            "drawer": DrawerPlanOracle(**kwargs),
            "window": WindowPlanOracle(**kwargs),
        }

    def _is_usable(self, episode: dict[str, np.ndarray]) -> bool:
        """Whether the scene's cube stays in sight, or in the drawer, as OGBench demands."""
        if self.name.env != "scene":
            return True
        y, z = episode["qpos"][:, 15], episode["qpos"][:, 16]
        in_drawer = (z >= 0.06) & (z <= 0.08)
        return not np.any((y >= 0.29) | ((y <= -0.3) & ~in_drawer))


class PointMazeRollout(OracleRollout):
    """Walks a point along shortest paths, with noise, to random cells of a maze.

    ``"navigate"`` sets out for a new cell whenever it arrives; ``"stitch"`` goes to a cell four
    steps away and stays there.
    """

    env_kwargs: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: OGBenchName, settings: OfficialSettings | None = None) -> None:
        super().__init__(name, settings)
        Path(self.env.fullpath).unlink()  # OGBench would leave this file in the temporary folder
        self._free = [tuple(cell) for cell in np.argwhere(self.env.maze_map == 0)]
        self._goals = [cell for cell in self._free if not self._in_corridor(*cell)]
        # OGBench searches the whole maze at every step, for the same few pairs of cells.
        self._waypoint = functools.cache(self._next_waypoint)

    def _rows(self, steps: int) -> Iterator[dict[str, Any]]:
        env = self.env
        navigate = self.name.behaviour == "navigate"
        start = _choose(self._free)
        goal = _choose(self._goals if navigate else self._cells_at(_STITCH_DISTANCE, start))
        env.action_space.seed(np.random.randint(2**31))
        obs, _ = env.reset(
            seed=np.random.randint(2**31),
            options={"task_info": {"init_ij": start, "goal_ij": goal}},
        )
        for _ in range(steps):
            direction = self._waypoint(env.xy_to_ij(env.get_xy()), env.xy_to_ij(env.cur_goal_xy))
            direction = direction - env.get_xy()
            direction = direction / (np.linalg.norm(direction) + 1e-6)
            action = np.clip(direction + np.random.normal(0, self.settings.noise, size=2), -1, 1)
            next_obs, _, _, _, info = env.step(action)
            yield {
                "observations": obs,
                "actions": action,
                "qpos": info["prev_qpos"],
                "qvel": info["prev_qvel"],
            }
            obs = next_obs
            if navigate and info["success"]:
                env.set_goal(goal_xy=env.add_noise(env.ij_to_xy(_choose(self._goals))))

    def _next_waypoint(self, start: tuple[int, int], goal: tuple[int, int]) -> np.ndarray:
        return self.env.get_oracle_subgoal(self.env.ij_to_xy(start), self.env.ij_to_xy(goal))[0]

    def _cells_at(self, distance: int, start: tuple[int, int]) -> list[tuple[int, int]]:
        xy = self.env.ij_to_xy(start)
        _, distances = self.env.get_oracle_subgoal(xy, xy)
        # A cell reached by teleport only has no neighbours.
        return [tuple(cell) for cell in np.argwhere(distances == distance)] or [start]

    def _in_corridor(self, i: int, j: int) -> bool:
        maze = self.env.maze_map
        walls = maze[i - 1, j], maze[i + 1, j], maze[i, j - 1], maze[i, j + 1]
        return walls in {(0, 0, 1, 1), (1, 1, 0, 0)}


def _choose(cells: list[tuple[int, int]]) -> tuple[int, int]:
    return cells[np.random.randint(len(cells))]


@contextlib.contextmanager
def _seeded(sequence: np.random.SeedSequence) -> Iterator[None]:
    """Seeds the global generator, which OGBench's oracles draw from, and restores it later."""
    state = np.random.get_state()
    np.random.seed(sequence.generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)
