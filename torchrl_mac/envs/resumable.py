"""Episodes that go on where another process has left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase, step_mdp
from torchrl.envs.transforms import Transform

__all__ = ["ResumableEpisodes"]


class ResumableEpisodes(Transform):
    """Makes a simulator's episodes repeatable, and the one in progress a part of a checkpoint.

    Before each reset the environment is seeded with a number that is a function of ``seed`` and of
    the episode's number: an episode's start does not depend on what came before. The state is the
    episode's number, its actions so far, and what the policy has left in the tensordict, such as
    the rest of a chunk. After :meth:`load_state_dict` the next reset does not begin an episode: it
    repeats those actions and returns what the last one has led to, so that whoever steps the
    environment goes on in the middle of the episode, and of a chunk.

    It needs an environment that does the same again when it is seeded and told the same actions, as
    OGBench's do, and a batch of one, such as ``SerialEnv(1, ...)``. It comes last in the chain of
    transforms.

    Args:
        seed (int, optional): defaults to 0.

    Raises:
        ValueError: at a reset, if the environment is a batch of several.

    Examples:
        >>> from torchrl.envs import SerialEnv, TransformedEnv
        >>> from torchrl_mac.envs import OGBenchEnv, ResumableEpisodes
        >>> def make_env():
        ...     make = lambda: OGBenchEnv("pointmaze-medium-navigate-singletask-v0")
        ...     return TransformedEnv(SerialEnv(1, make), ResumableEpisodes(seed=3))
        >>> env = make_env()
        >>> left = env.rollout(7)[0, -1]["next", "observation"]
        >>> other = make_env()
        >>> other.transform.load_state_dict(env.transform.state_dict())
        >>> bool((other.reset()["observation"] == left).all())
        True
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.episode = -1  # the number of the current one
        self._actions: list[Tensor] = []
        self._input: TensorDictBase | None = None  # of the last step
        self._kept: Mapping[str, Any] = {}  # what a policy had left, until a reset takes it
        self._is_resuming = False
        self._known: set[NestedKey] = set()  # what the environment writes and reads

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The episode's number and actions, and what the policy keeps from step to step."""
        if self._is_resuming:  # not yet taken up
            kept = dict(self._kept)
        else:
            kept = {} if self._input is None else self._of_policy(self._input)
        return {
            "episode": self.episode,
            "actions": [action.clone() for action in self._actions],
            "kept": kept,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Restores what :meth:`state_dict` returned, with the next reset."""
        self.episode = state_dict["episode"]
        self._actions = list(state_dict["actions"])
        self._kept = state_dict["kept"]
        self._is_resuming = self.episode >= 0

    def _reset_env_preprocess(self, tensordict: TensorDictBase) -> TensorDictBase:
        env = self._base
        if env.batch_size.numel() != 1:
            raise ValueError(f"ResumableEpisodes takes one environment, not {env.batch_size}.")
        if not self._is_resuming:
            self.episode += 1
            self._actions, self._input = [], None
        specs = (env.full_observation_spec, env.full_done_spec, env.full_action_spec)
        of_env = (key for spec in specs for key in spec.keys(True, True))
        self._known = {"next", "is_init", "collector", *of_env}
        seed = np.random.SeedSequence([self.seed, self.episode]).generate_state(1)
        with torch.random.fork_rng([]):
            env.set_seed(int(seed[0]))
        return tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if not self._is_resuming:
            return tensordict_reset
        self._is_resuming = False
        env, state = self._base, tensordict_reset.copy()
        for action in self._actions:
            state = step_mdp(env.step(state.set(env.action_key, action)), exclude_action=True)
        tensordict_reset.update(state)
        if self._actions:
            if "is_init" in tensordict_reset.keys():  # as InitTracker marks a reset
                tensordict_reset.set("is_init", torch.zeros_like(tensordict_reset.get("is_init")))
            self._input = tensordict_reset.copy()
            for key, value in self._kept.items():
                for td in (tensordict_reset, self._input):
                    td.set(unravel_key(tuple(key.split("/"))), value)
        return tensordict_reset

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._actions.append(tensordict.get(self._base.action_key).clone())
        self._input = tensordict.copy()
        return next_tensordict

    @property
    def _base(self) -> EnvBase:
        return self.container.base_env

    def _of_policy(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """The entries that the environment neither writes nor reads."""
        own = TensorDict(tensordict.exclude(*self._known))
        return {
            "/".join(key) if isinstance(key, tuple) else key: value.clone()
            for key, value in own.items(True, True)
        }
