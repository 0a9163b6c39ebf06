"""Environments: OGBench's, Gymnasium's, two that answer from a world model, and imagination."""

from torchrl_mac.envs.depict import depict, set_observation
from torchrl_mac.envs.gym import GymnasiumEnv, env_maker
from torchrl_mac.envs.imagination import imagine
from torchrl_mac.envs.ogbench import OGBenchEnv
from torchrl_mac.envs.resumable import ResumableEpisodes
from torchrl_mac.envs.world_model_env import ChunkedWorldModelEnv
from torchrl_mac.envs.world_model_transform import ChunkedWorldModelTransform

__all__ = [
    "ChunkedWorldModelEnv",
    "ChunkedWorldModelTransform",
    "GymnasiumEnv",
    "OGBenchEnv",
    "ResumableEpisodes",
    "depict",
    "env_maker",
    "imagine",
    "set_observation",
]
