"""The simulator is in the state that an observation describes."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchrl_mac.envs import OGBenchEnv, set_observation

NAMES = ["cube-double-play-singletask-v0", "scene-play-singletask-v0", "puzzle-3x3-play-v0"]
EFFECTOR, CONTACT = slice(12, 17), 18


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_set_is_observed(name):
    env = OGBenchEnv(name)
    env.set_seed(0)
    observations = env.rollout(30)["next", "observation"]
    env.reset()
    for observation in observations[::10]:
        set_observation(env, observation)
        seen = env._env.unwrapped.compute_observation()
        # a cube environment tells where the effector was before its last substep
        assert np.abs(seen[EFFECTOR] - observation[EFFECTOR].numpy()).max() < 0.02
        seen[EFFECTOR], seen[CONTACT] = observation[EFFECTOR], observation[CONTACT]
        np.testing.assert_allclose(seen, observation, atol=1e-5)


PICTURES = """
from torchrl_mac.envs import OGBenchEnv, depict

env = OGBenchEnv("cube-double-play-singletask-v0", from_pixels=True)
env.set_seed(0)
rollout = env.rollout(20)["next"]
frames = depict(env, rollout["observation"][[4, 19]])
assert frames.shape == (2, *rollout["pixels"].shape[1:])
for frame, other in ((0, 1), (1, 0)):
    real = rollout["pixels"][[4, 19]].float()
    errors = [(frames[frame].float() - real[k]).abs().mean() for k in (frame, other)]
    assert errors[0] < 0.5 * errors[1], errors
"""


@pytest.mark.slow
@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="no off-screen renderer")
def test_pictures_are_those_of_the_states():
    env = {**os.environ, "MUJOCO_GL": "egl"}  # which counts when MuJoCo is imported
    command = [sys.executable, "-c", PICTURES]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_what_cannot_be_set():
    maze = OGBenchEnv("pointmaze-medium-navigate-singletask-v0")
    with pytest.raises(ValueError, match="only states of cube, scene and puzzle"):
        set_observation(maze, torch.zeros(2))
    cube = OGBenchEnv("cube-single-play-singletask-v0")
    with pytest.raises(ValueError, match=r"has observations \[28\], got \[3\]"):
        set_observation(cube, torch.zeros(3))


if __name__ == "__main__":
    pytest.main([__file__])
