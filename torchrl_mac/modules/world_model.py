"""World models: what a whole action chunk leads to."""

from __future__ import annotations

import abc
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from torchrl_mac.modules.config import Configurable, as_key
from torchrl_mac.modules.shapes import shaped

__all__ = ["ChunkedWorldModel", "WorldModelBase"]


class WorldModelBase(TensorDictModuleBase, Configurable, abc.ABC):
    """What environments, imagination and losses expect of a world model.

    It reads a state and an action, single or a chunk, and writes under ``"next"`` what an
    environment's step would: the observation ``[*, O]``, the reward ``[*, 1]`` and ``terminated``
    and ``done`` (bool ``[*, 1]``, always equal). A subclass predicts in two parts, as a rollout
    needs the state at each step, but all the rest only once, for all of its steps together. The
    parts write all they know; :meth:`select_out_keys` applies to a call of the model.

    Keyword Args:
        observation_key (NestedKey, optional): defaults to ``"observation"``.
        action_key (NestedKey, optional): defaults to ``"action"``.
        reward_key (NestedKey, optional): defaults to ``"reward"``.
        done_key (NestedKey, optional): defaults to ``"done"``.
        terminated_key (NestedKey, optional): defaults to ``"terminated"``.
        goal_key (NestedKey, optional): the goal, if there is one, such as ``"goal"``. Defaults to
            none.
    """

    def __init__(
        self,
        *,
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
        reward_key: NestedKey = "reward",
        done_key: NestedKey = "done",
        terminated_key: NestedKey = "terminated",
        goal_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        self.observation_key = unravel_key(observation_key)
        self.action_key = unravel_key(action_key)
        self.reward_key = unravel_key(reward_key)
        self.done_key = unravel_key(done_key)
        self.terminated_key = unravel_key(terminated_key)
        self.goal_key = None if goal_key is None else unravel_key(goal_key)
        goal = [] if self.goal_key is None else [self.goal_key]
        self.in_keys = [self.observation_key, self.action_key, *goal]
        self._next = {
            key: unravel_key(("next", key))
            for key in (
                self.observation_key,
                self.reward_key,
                self.done_key,
                self.terminated_key,
            )
        }
        self.out_keys = list(self._next.values())

    def config(self) -> dict[str, Any]:
        """The keys, among the constructor's arguments."""
        names = ("observation", "action", "reward", "done", "terminated", "goal")
        return {f"{name}_key": getattr(self, f"{name}_key") for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another model from what :meth:`config` returned."""
        keys = {name: as_key(key) for name, key in config.items() if name.endswith("_key")}
        return cls(**{**config, **keys})

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the prediction for ``tensordict``'s action under ``"next"``."""
        return self.predict_outcome(self.predict_state(tensordict))

    @abc.abstractmethod
    def predict_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the next observation alone, all that the next step of a rollout needs."""

    @abc.abstractmethod
    def predict_outcome(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes all the rest: reward, termination and done, for any number of steps at once."""

    def dynamics_error(self, observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """What the dynamics are trained to minimise, ``[*]``, for the true next state."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its dynamics learn.")


class ChunkedWorldModel(WorldModelBase):
    r"""Predicts, from a state and a chunk of ``h`` actions, the state ``h`` steps ahead.

    The dynamics are deterministic and predict a difference,
    :math:`\hat s_{t+h} = s_t + \Delta(s_t, a_{t:t+h})`; a second network predicts the chunk's
    reward and a third the logit of ending inside the chunk, which is thresholded at
    probability one half (https://arxiv.org/abs/2512.08108).

    Args:
        dynamics_network (nn.Module): maps ``(observation [*, O], chunk [*, h, A])`` to
            :math:`\Delta` ``[*, O]``.
        reward_network (nn.Module): maps the same inputs to the chunk's reward ``[*, 1]``.
        termination_network (nn.Module): maps the same inputs to a logit ``[*, 1]``.

    With a goal ``[*, G]`` the last two map ``(observation, goal, chunk)``; the dynamics never see
    it. To end is then to reach the goal, and the reward can be read off it.

    Keyword Args:
        negative_reward (bool, optional): if ``True``, a chunk's reward is -1, and 0 if the task
            ends in it; if ``False``, 0 and 1. Default: ``reward_network`` predicts it.
        logit_key (NestedKey, optional): the logit ``[*, 1]`` behind the termination, written under
            ``"next"`` as well. Defaults to ``"termination_logit"``.
        **kwargs: the keys of :class:`WorldModelBase`.

    Raises:
        ValueError: when called, if a network's output has another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> sizes = {"in_features": 4 + 10 * 2, "num_cells": (32,)}
        >>> model = ChunkedWorldModel(
        ...     NormedMLP(out_features=4, **sizes),
        ...     NormedMLP(out_features=1, **sizes),
        ...     NormedMLP(out_features=1, **sizes),
        ... )
        >>> td = TensorDict(observation=torch.randn(3, 4), action=torch.randn(3, 10, 2))
        >>> model(td)["next", "observation"].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        dynamics_network: nn.Module,
        reward_network: nn.Module,
        termination_network: nn.Module,
        *,
        negative_reward: bool | None = None,
        logit_key: NestedKey = "termination_logit",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.negative_reward = negative_reward
        self.dynamics_network = dynamics_network
        self.reward_network = reward_network
        self.termination_network = termination_network
        self.logit_key = unravel_key(logit_key)
        self._next[self.logit_key] = unravel_key(("next", self.logit_key))
        self.out_keys = list(self._next.values())

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        networks = ("dynamics_network", "reward_network", "termination_network")
        return {
            **{name: getattr(self, name) for name in networks},
            "negative_reward": self.negative_reward,
            "logit_key": self.logit_key,
            **super().config(),
        }

    def predict_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the next observation alone, all that the next step of a rollout needs."""
        observation, action, *_ = self._inputs(tensordict)
        change = self.dynamics_network(observation, action)
        shaped(change, observation.shape, "The output of dynamics_network")
        return tensordict.set(self._next[self.observation_key], observation + change)

    def dynamics_error(self, observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """The squared error of the next state, averaged over its coordinates, ``[*]``."""
        change = self.dynamics_network(observation, action)
        shaped(change, observation.shape, "The output of dynamics_network")
        return (observation + change - following).square().mean(-1)

    def predict_outcome(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes all the rest: reward, termination and done, for any number of steps at once."""
        observation, action, *goal = self._inputs(tensordict)
        one = (*observation.shape[:-1], 1)
        logit = self.termination_network(observation, *goal, action)
        shaped(logit, one, "The output of termination_network")
        terminated = logit > 0
        if self.negative_reward is None:
            reward = self.reward_network(observation, *goal, action)
            shaped(reward, one, "The output of reward_network")
        else:
            reward = terminated.to(observation.dtype) - float(self.negative_reward)
        outcome = {
            self.reward_key: reward,
            self.done_key: terminated,
            self.terminated_key: terminated.clone(),
            self.logit_key: logit,
        }
        for key, value in outcome.items():
            tensordict.set(self._next[key], value)
        return tensordict

    def _inputs(self, tensordict: TensorDictBase) -> list[Tensor]:
        return [tensordict.get(key) for key in self.in_keys]
