"""Gymnasium's environments, as datasets of one's own know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torchrl.envs import EnvBase, GymWrapper

from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.envs.ogbench import OGBenchEnv

__all__ = ["GymnasiumEnv", "env_maker"]


class GymnasiumEnv(GymWrapper):
    """An environment of Gymnasium, by its id, in the units of this package's datasets.

    Observations are float32 and actions within [-1, 1], whatever the environment's bounds are. In
    contrast to :class:`~torchrl_mac.envs.OGBenchEnv` there is no ``"success"``.

    Args:
        env_id (str): such as ``"Pendulum-v1"``.

    Keyword Args:
        from_pixels (bool, optional): whether a frame, ``"pixels"``, is rendered at each step.
            Defaults to ``False``.
        env_kwargs (dict, optional): keyword arguments of :func:`gymnasium.make`.
        **kwargs: those of :class:`~torchrl.envs.GymWrapper`, such as ``device``.

    Examples:
        >>> from torchrl_mac.envs import GymnasiumEnv
        >>> env = GymnasiumEnv("Pendulum-v1")
        >>> env.rollout(3)["next", "observation"].shape
        torch.Size([3, 3])
        >>> env.action_spec.space.high
        tensor([1.])
    """

    def __init__(
        self,
        env_id: str,
        *,
        from_pixels: bool = False,
        env_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        import gymnasium
        from gymnasium.wrappers import DtypeObservation, RescaleAction

        render_mode = "rgb_array" if from_pixels else None
        env = gymnasium.make(env_id, render_mode=render_mode, **(env_kwargs or {}))
        env = RescaleAction(DtypeObservation(env, np.float32), np.float32(-1), np.float32(1))
        super().__init__(env=env, from_pixels=from_pixels, pixels_only=False, **kwargs)


def env_maker(
    dataset: str | OGBenchName, env_id: str | None = None, **kwargs: Any
) -> Callable[..., EnvBase]:
    """What builds the environment that a dataset is of, in any process.

    Args:
        dataset (str or OGBenchName): OGBench's environment is known by its name.
        env_id (str, optional): the id of another one, of Gymnasium's.
        **kwargs: of the environment, such as ``device`` and ``from_pixels``.
    """
    if env_id is None:
        return partial(OGBenchEnv, dataset, **kwargs)
    return partial(GymnasiumEnv, env_id, **kwargs)
