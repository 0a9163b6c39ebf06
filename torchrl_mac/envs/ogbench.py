"""OGBench's state-based environments, by dataset name."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader
from torchrl.envs.utils import _classproperty

from torchrl_mac.datasets.names import MANIPULATION_ENVS, MAZE_ENVS, NUM_TASKS, OGBenchName

if TYPE_CHECKING:
    import gymnasium

__all__ = ["OGBenchEnv"]


class OGBenchEnv(GymWrapper):
    """An OGBench environment, named after the dataset that belongs to it.

    All state-based environments of OGBench (https://arxiv.org/abs/2410.20092) are covered, both
    goal-conditioned and single-task. Building one downloads nothing and needs no display.

    Args:
        name (str or OGBenchName): a dataset name, such as ``"cube-single-play-v0"``,
            ``"cube-single-play-oraclerep-v0"`` or ``"cube-single-play-singletask-task2-v0"``.

    Keyword Args:
        task_id (int, optional): the task of a goal-conditioned environment, 1 to 5. ``None``
            (default) draws a task at each reset. A single-task name says its task itself; a
            ``task_id`` beside it must agree.
        from_pixels (bool, optional): whether a frame is rendered at each step. Defaults to
            ``False``, which never touches OpenGL.
        pixels_only (bool, optional): whether frames take the place of ``"observation"`` and
            ``"goal"``. Defaults to ``False``.
        env_kwargs (dict, optional): keyword arguments of the OGBench environment, such as
            ``{"width": 64, "height": 64}`` or ``{"success_timing": "post"}``.
        **kwargs: keyword arguments of :class:`~torchrl.envs.GymWrapper`, such as ``device``.

    Reset and step write

    - ``"observation"``: float32 ``[O]``;
    - ``"success"``: bool ``[1]``, ``False`` at reset. In single-task manipulation environments it
      speaks of the state *before* the step, as the reward does (``success_timing="pre"`` of
      OGBench), so the episode ends one step after the goal is reached;
    - ``"goal"``: float32 ``[G]``, constant through an episode; goal-conditioned environments only;
    - ``"pixels"``: uint8 ``[H, W, 3]``, if ``from_pixels``, and in goal-conditioned environments
      ``"goal_pixels"``, a picture of the goal, constant through an episode;

    and step also ``"reward"`` float32 ``[1]`` and ``"terminated"``, ``"truncated"`` (OGBench's time
    limit) and ``"done"``, bool ``[1]``.

    OGBench's ``info``, such as ``"qpos"``, is there for readers, as with any Gymnasium environment:
    ``env = env.auto_register_info_dict()`` writes all of it, :meth:`set_info_dict_reader` what one
    wants. Readers do not change the entries above. :attr:`available_envs` lists all names.

    After :meth:`set_seed` starts, goals, drawn tasks and transitions all repeat, over any number of
    episodes: the environment draws from random streams of its own, so it neither feels nor disturbs
    NumPy's global generator.

    Raises:
        ImportError: if ``ogbench`` is not installed.
        ValueError: if the name or the task does not exist, or if they contradict each other; for
            ``pixels_only`` without ``from_pixels``; for ``num_envs``, as this is one environment.
        RuntimeError: if ``from_pixels`` finds neither a display nor an off-screen backend
            (``MUJOCO_GL``).

    Examples:
        >>> from torchrl_mac.envs import OGBenchEnv
        >>> env = OGBenchEnv("pointmaze-medium-navigate-v0", task_id=3)
        >>> _ = env.set_seed(0)
        >>> rollout = env.rollout(5)
        >>> rollout["observation"].shape, rollout["next", "success"].shape
        (torch.Size([5, 2]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        name: str | OGBenchName,
        *,
        task_id: int | None = None,
        from_pixels: bool = False,
        pixels_only: bool = False,
        env_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(name, str):
            name = OGBenchName.parse(name)
        if task_id is not None and not 1 <= task_id <= NUM_TASKS:
            raise ValueError(
                f"task_id must be between 1 and {NUM_TASKS} (or None), got {task_id} for {name}."
            )
        if "num_envs" in kwargs:
            number = kwargs["num_envs"]
            raise ValueError(
                f"OGBenchEnv is one environment and takes no num_envs={number}: make a batch with "
                f"SerialEnv({number}, partial(OGBenchEnv, {str(name)!r})) or a ParallelEnv."
            )
        if pixels_only and not from_pixels:
            raise ValueError("pixels_only=True needs from_pixels=True.")
        if not _is_installed():
            raise ImportError("OGBenchEnv needs OGBench: pip install 'ogbench>=1.2'.")
        if from_pixels:
            _check_rendering()
        self._name = name
        self._options: dict[str, Any] = {} if task_id is None else {"task_id": task_id}
        if from_pixels and name.mode != "singletask":
            self._options["render_goal"] = True
        self._goal: np.ndarray | None = None
        self._goal_pixels: np.ndarray | None = None
        self._render, self._pixels_only = from_pixels, pixels_only
        self._numpy_state = np.random.RandomState().get_state(legacy=False)
        with self._own_numpy_random():
            env = _make_env(name, dict(env_kwargs or {}))
        super().__init__(env=env, **kwargs)
        if task_id not in (None, self.task_id):
            raise ValueError(
                f"task_id={task_id} contradicts {str(name)!r}, which is task {self.task_id}: "
                "a single-task environment's task is in its name."
            )

    @_classproperty
    def available_envs(cls) -> list[str]:
        """The names of OGBench's state-based datasets and their tasks; none without OGBench."""
        return [str(name) for name in _names()] if _is_installed() else []

    def set_info_dict_reader(
        self, info_dict_reader: BaseInfoDictReader | None = None, ignore_private: bool = True
    ) -> OGBenchEnv:
        """Adds a reader of OGBench's ``info``; see :class:`~torchrl.envs.GymWrapper`."""
        own: Composite = self.full_observation_spec.clone()
        super().set_info_dict_reader(info_dict_reader, ignore_private)
        self.observation_spec = self.full_observation_spec.clone().update(own)
        return self

    @property
    def name(self) -> OGBenchName:
        """What the dataset name says."""
        return self._name

    @property
    def task_id(self) -> int:
        """The current episode's task, 1 to 5."""
        return self._env.unwrapped.cur_task_id

    def _make_specs(self, env: gymnasium.Env, batch_size: torch.Size | None = None) -> None:
        super()._make_specs(env, batch_size)
        with self._own_numpy_random():
            entries, _ = self._reset_output_transform(env.reset(options=self._options))
        spec = {
            key: Unbounded(np.shape(value), device=self.device, dtype=torch.float32)
            for key, value in entries.items()
        }
        spec["success"] = Categorical(2, shape=(1,), device=self.device, dtype=torch.bool)
        for key in {"pixels", "goal_pixels"} & set(entries):
            shape = entries[key].shape
            spec[key] = Bounded(0, 255, shape, device=self.device, dtype=torch.uint8)
        self.observation_spec = Composite(spec)

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        if seed is not None:
            self._set_seed(seed)
        options = {**self._options, **(options or {})}
        with self._own_numpy_random():
            return super()._reset(tensordict, options=options, **kwargs)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self._name.env.endswith("teleport"):  # the only steps that draw; a swap takes 0.2 ms
            return super()._step(tensordict)
        with self._own_numpy_random():
            return super()._step(tensordict)

    def _reset_output_transform(self, reset_outputs_tuple: tuple) -> tuple:
        observation, info = reset_outputs_tuple
        if self._name.mode != "singletask":
            self._goal = info["goal"]
            self._goal_pixels = info.get("goal_rendered")
        entries = self._entries(observation, success=False)
        return entries, self._info(info, success=False)

    def _output_transform(self, step_outputs_tuple: tuple) -> tuple:
        observation, reward, terminated, truncated, info = step_outputs_tuple
        terminated, truncated, success = bool(terminated), bool(truncated), bool(info["success"])
        entries = self._entries(observation, success=success)
        info = self._info(info, success=success)
        return entries, reward, terminated, truncated, terminated or truncated, info

    def _entries(self, observation: np.ndarray, *, success: bool) -> dict[str, Any]:
        entries: dict[str, Any] = {"success": np.array([success])}
        if not self._pixels_only:
            entries["observation"] = observation
            if self._goal is not None:
                entries["goal"] = self._goal
        if self._render:
            entries["pixels"] = self._env.unwrapped.render()
            if self._goal_pixels is not None:
                entries["goal_pixels"] = self._goal_pixels
        return entries

    def _info(self, info: Mapping[str, Any], *, success: bool) -> dict[str, np.ndarray] | None:
        # TorchRL's readers want arrays. Where they read what is an entry here, they find the same.
        if not self.info_dict_reader:
            return None
        arrays = {key: np.asarray(value) for key, value in info.items() if value is not None}
        arrays["success"] = np.array([success])
        if self._goal is not None:
            arrays["goal"] = np.asarray(self._goal, np.float32)
        return arrays

    def _set_seed(self, seed: int | None) -> None:
        env = self._env.unwrapped
        env.np_random = np.random.default_rng(seed)  # what reset(seed=seed) would do
        numpy_seed, action_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
        env.action_space.seed(action_seed)
        self._numpy_state = np.random.RandomState(numpy_seed).get_state(legacy=False)

    @contextlib.contextmanager
    def _own_numpy_random(self) -> Iterator[None]:
        # Mazes draw starts, goals and teleports, and all environments draw tasks, from NumPy's
        # global generator: lend them one that belongs to this environment.
        outer = np.random.get_state(legacy=False)
        np.random.set_state(self._numpy_state)
        try:
            yield
        finally:
            self._numpy_state = np.random.get_state(legacy=False)
            np.random.set_state(outer)


def _is_installed() -> bool:
    return importlib.util.find_spec("ogbench") is not None


def _names() -> Iterator[OGBenchName]:
    for env in (*MANIPULATION_ENVS, *MAZE_ENVS):
        behaviours = ["play", "noisy"] if env in MANIPULATION_ENVS else ["navigate", "stitch"]
        if env.startswith("antmaze") and not env.endswith("giant"):
            behaviours.append("explore")
        for behaviour in behaviours:
            yield OGBenchName(env, behaviour)
            yield OGBenchName(env, behaviour, "oraclerep")
            for task_id in (None, *range(1, NUM_TASKS + 1)):
                yield OGBenchName(env, behaviour, "singletask", task_id)


def _make_env(name: OGBenchName, env_kwargs: dict[str, Any]) -> gymnasium.Env:
    import ogbench

    # The passive checker would only compare float64 observations to their space, at each step.
    env_kwargs = {"disable_env_checker": True, **env_kwargs}
    name = dataclasses.replace(name, size=None)  # of the dataset, which is not opened here
    env = ogbench.make_env_and_datasets(str(name), env_only=True, **env_kwargs)
    if name.is_manipulation:
        # Their action space is a property that makes a fresh, unseeded space at each access, and
        # resets take random actions from it on the way to the goal observation. A class attribute
        # is the same space each time, so that it can be seeded.
        base = env.unwrapped
        cls = type(base)
        base.__class__ = type(cls.__name__, (cls,), {"action_space": base.action_space})
    return env


def _check_rendering() -> None:
    # MuJoCo picks its OpenGL backend when it is first imported. The default one, GLFW, aborts the
    # process at the first frame where there is no display.
    import mujoco

    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display and mujoco.GLContext.__module__ == "mujoco.glfw":
        raise RuntimeError(
            "from_pixels=True needs off-screen rendering on a machine without a display: set "
            "MUJOCO_GL=egl (or osmesa) in the environment before Python starts. TorchRL imports "
            "MuJoCo, and MuJoCo reads the variable only once."
        )
