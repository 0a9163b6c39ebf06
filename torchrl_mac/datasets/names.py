"""What an OGBench dataset name says: environment, behaviour, goal mode and task."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["MANIPULATION_ENVS", "MAZE_ENVS", "NUM_TASKS", "OGBenchName"]

NUM_TASKS = 5
"""Every OGBench environment has five tasks, numbered from 1."""

MANIPULATION_ENVS = (
    "cube-single",
    "cube-double",
    "cube-triple",
    "cube-quadruple",
    "cube-octuple",
    "scene",
    "puzzle-3x3",
    "puzzle-4x4",
    "puzzle-4x5",
    "puzzle-4x6",
)
MAZE_ENVS = (
    *(f"pointmaze-{size}" for size in ("medium", "large", "giant", "teleport")),
    *(f"antmaze-{size}" for size in ("medium", "large", "giant", "teleport")),
    *(f"humanoidmaze-{size}" for size in ("medium", "large", "giant")),
    *(f"antsoccer-{arena}" for arena in ("arena", "medium")),
)
_BEHAVIOURS = {
    **dict.fromkeys(MANIPULATION_ENVS, ("play", "noisy")),
    **dict.fromkeys(MAZE_ENVS, ("navigate", "stitch", "explore")),
}
_PATTERN = re.compile(
    r"(?P<env>[a-z0-9-]+?)-(?P<behaviour>play|noisy|navigate|stitch|explore)(?:-(?P<size>\d+m))?"
    r"(?P<goal>-oraclerep|-singletask(?:-task(?P<task>\d+))?)?-v0"
)


@dataclass(frozen=True)
class OGBenchName:
    """A parsed OGBench dataset name.

    Args:
        env (str): the environment family, ``"cube-single"``.
        behaviour (str): how the data was collected: ``"play"``, ``"noisy"``,
            ``"navigate"``, ``"stitch"`` or ``"explore"``.
        mode (str): ``"goal"`` (goal-conditioned, goals are observations), ``"oraclerep"``
            (goals are oracle representations) or ``"singletask"`` (reward-based).
        task_id (int, optional): the task of a ``"singletask"`` name, 1 to 5. ``None`` is
            OGBench's default task of that environment.
        size (str, optional): ``"100m"`` for the large set of that many million rows.

    Examples:
        >>> from torchrl_mac.datasets import OGBenchName
        >>> name = OGBenchName.parse("cube-single-play-singletask-task2-v0")
        >>> name.env, name.mode, name.task_id
        ('cube-single', 'singletask', 2)
        >>> name.dataset, name.env_id
        ('cube-single-play-v0', 'cube-single-singletask-task2-v0')
    """

    env: str
    behaviour: str
    mode: Literal["goal", "oraclerep", "singletask"] = "goal"
    task_id: int | None = None
    size: str | None = None

    @classmethod
    def parse(cls, name: str) -> OGBenchName:
        """Reads a name such as ``"cube-single-play-singletask-task2-v0"``.

        Raises:
            ValueError: if the environment, behaviour or task does not exist.
        """
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is not an OGBench dataset name. Names look like 'cube-single-play-v0', "
                "'cube-single-play-singletask-task2-v0' or 'cube-single-play-oraclerep-v0'."
            )
        env, behaviour = match["env"], match["behaviour"]
        if env not in _BEHAVIOURS:
            close = difflib.get_close_matches(env, _BEHAVIOURS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Unknown OGBench environment {env!r} in {name!r}.{hint} "
                f"Known state-based environments: {', '.join(_BEHAVIOURS)}."
            )
        if behaviour not in _BEHAVIOURS[env]:
            raise ValueError(
                f"{env!r} has no {behaviour!r} data (in {name!r}); "
                f"choose one of {_BEHAVIOURS[env]}."
            )
        mode: Literal["goal", "oraclerep", "singletask"] = "goal"
        if match["goal"]:
            mode = "oraclerep" if match["goal"] == "-oraclerep" else "singletask"
        task_id = int(match["task"]) if match["task"] else None
        if task_id is not None and not 1 <= task_id <= NUM_TASKS:
            raise ValueError(
                f"Task {task_id} in {name!r} does not exist: every OGBench environment has "
                f"tasks 1 to {NUM_TASKS}."
            )
        return cls(env, behaviour, mode, task_id, match["size"])

    def __str__(self) -> str:
        goal = {"goal": "", "oraclerep": "-oraclerep", "singletask": "-singletask"}[self.mode]
        task = "" if self.task_id is None else f"-task{self.task_id}"
        return self.dataset.removesuffix("-v0") + f"{goal}{task}-v0"

    @property
    def dataset(self) -> str:
        """The stem of the dataset's file, shared by all modes and tasks."""
        size = "" if self.size is None else f"-{self.size}"
        return f"{self.env}-{self.behaviour}{size}-v0"

    @property
    def env_id(self) -> str:
        """The id under which OGBench registers the environment with Gymnasium."""
        if self.mode != "singletask":
            return f"{self.env}-v0"
        task = "" if self.task_id is None else f"-task{self.task_id}"
        return f"{self.env}-singletask{task}-v0"

    @property
    def is_manipulation(self) -> bool:
        """Whether this is a robot-arm environment (as opposed to a maze)."""
        return self.env in MANIPULATION_ENVS
