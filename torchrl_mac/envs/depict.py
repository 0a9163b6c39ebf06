"""Pictures of states that were only imagined: the simulator is set to what an observation says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_mac.envs.ogbench import OGBenchEnv

__all__ = ["depict", "set_observation"]

# How OGBench's observations of its manipulation environments are scaled.
_CENTER, _METRES = np.array([0.425, 0.0, 0.0]), 10.0
_GRIPPER, _BUTTON, _DRAWER, _WINDOW = 3.0, 120.0, 18.0, 15.0
_CLOSED = 0.8  # radians of the driver joint
# The other joints of a finger hang on the driver.
_FINGER = {"driver": 1.0, "spring_link": 1.0, "follower": -1.0, "coupler": 0.0}


def set_observation(env: OGBenchEnv, observation: Tensor) -> None:
    """Puts the simulator in the state that an observation describes.

    Positions and angles of arm, gripper, cubes, buttons, drawer and window are in the observations
    of OGBench's manipulation environments, and velocities of all but gripper and cubes, which rest.
    A button is in the state that is most likely; the quaternions of cubes are normalised.

    Args:
        env (OGBenchEnv): a ``cube``, ``scene`` or ``puzzle`` environment that has been reset.
        observation (Tensor): float ``[O]``, as the environment's own, not normalised.

    Raises:
        ValueError: if it is another environment, or the observation has not its size.

    Examples:
        >>> from torchrl_mac.envs import OGBenchEnv, set_observation
        >>> env = OGBenchEnv("cube-single-play-singletask-v0")
        >>> observation = env.reset()["observation"].clone()
        >>> _ = env.rollout(5)
        >>> set_observation(env, observation)
    """
    kind = env.name.env.partition("-")[0]
    if kind not in ("cube", "scene", "puzzle"):
        raise ValueError(
            f"{env.name}: only states of cube, scene and puzzle can be read off an observation."
        )
    size = env.observation_spec["observation"].shape[-1]
    if observation.shape != (size,):
        raise ValueError(f"{env.name} has observations [{size}], got {list(observation.shape)}.")
    simulator = env._env.unwrapped
    data, rest = simulator.data, observation.double().cpu().numpy()

    def take(count: int) -> np.ndarray:
        nonlocal rest
        taken, rest = rest[:count], rest[count:]
        return taken

    def joint(name: str, position: np.ndarray | float, velocity: np.ndarray | float = 0.0) -> None:
        data.joint(name).qpos[:] = position
        data.joint(name).qvel[:] = velocity

    arm = simulator._arm_joint_ids
    data.qpos[arm], data.qvel[arm] = take(6), take(6)
    take(5)  # where the effector is follows from the arm
    opening = _CLOSED * np.clip(take(2)[0] / _GRIPPER, 0, 1)
    for side in ("right", "left"):
        for part, share in _FINGER.items():
            joint(f"ur5e/robotiq/{side}_{part}_joint", share * opening)
    for i in range(getattr(simulator, "_num_cubes", 0)):
        position, quaternion = take(3) / _METRES + _CENTER, take(4)
        quaternion = quaternion / max(np.linalg.norm(quaternion), 1e-6)
        joint(f"object_joint_{i}", np.concatenate([position, quaternion]))
        take(2)  # its yaw, once more
    states = []
    for i in range(getattr(simulator, "_num_buttons", 0)):
        states.append(take(simulator._num_button_states).argmax())
        position, velocity = take(2)
        joint(f"buttonbox_joint_{i}", position / _BUTTON, velocity)
    if kind == "scene":
        for name, scale in (("drawer_slide", _DRAWER), ("window_slide", _WINDOW)):
            position, velocity = take(2)
            joint(name, position / scale, velocity)
    buttons = [np.array(states)] if states else []
    simulator.set_state(data.qpos.copy(), data.qvel.copy(), *buttons)


def depict(env: OGBenchEnv, observations: Tensor) -> Tensor:
    """Renders the states that observations describe, see :func:`set_observation`.

    Args:
        env (OGBenchEnv): with ``from_pixels=True``, reset.
        observations (Tensor): float ``[T, O]``, not normalised.

    Returns:
        frames, uint8 ``[T, H, W, 3]``.
    """
    frames = []
    for observation in observations:
        set_observation(env, observation)
        frames.append(torch.from_numpy(env._env.unwrapped.render().copy()))
    return torch.stack(frames)
