"""A world model that predicts what a whole action chunk leads to."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

__all__ = ["ChunkedWorldModel"]


class ChunkedWorldModel(TensorDictModuleBase):
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
        goal_key (NestedKey, optional): the goal, such as ``"goal"``. Defaults to none.
        negative_reward (bool, optional): if ``True``, a chunk's reward is -1, and 0 if the task
            ends in it; if ``False``, 0 and 1. Default: ``reward_network`` predicts it.
        observation_key (NestedKey, optional): defaults to ``"observation"``.
        action_key (NestedKey, optional): the chunk ``[*, h, A]``. Defaults to ``"action"``.
        reward_key (NestedKey, optional): defaults to ``"reward"``.
        done_key (NestedKey, optional): defaults to ``"done"``.
        terminated_key (NestedKey, optional): defaults to ``"terminated"``.
        logit_key (NestedKey, optional): defaults to ``"termination_logit"``.

    Everything is written under ``"next"``, the way an environment's step does: the observation
    ``[*, O]``, the reward ``[*, 1]``, ``terminated`` and ``done`` (bool ``[*, 1]``, always
    equal) and the logit ``[*, 1]`` behind them.

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
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
        reward_key: NestedKey = "reward",
        done_key: NestedKey = "done",
        terminated_key: NestedKey = "terminated",
        logit_key: NestedKey = "termination_logit",
        goal_key: NestedKey | None = None,
        negative_reward: bool | None = None,
    ) -> None:
        super().__init__()
        self.negative_reward = negative_reward
        self.dynamics_network = dynamics_network
        self.reward_network = reward_network
        self.termination_network = termination_network
        self.in_keys = [unravel_key(observation_key), unravel_key(action_key)]
        self.goal_key = None if goal_key is None else unravel_key(goal_key)
        if self.goal_key is not None:
            self.in_keys.append(self.goal_key)
        self.out_keys = [
            unravel_key(("next", key))
            for key in (observation_key, reward_key, done_key, terminated_key, logit_key)
        ]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the prediction for ``tensordict``'s chunk under ``"next"``."""
        return self.predict_outcome(self.predict_state(tensordict))

    def predict_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the next observation alone, all that the next step of a rollout needs."""
        observation, action, *_ = self._inputs(tensordict)
        following = observation + self.dynamics_network(observation, action)
        return tensordict.set(self.out_keys[0], following)

    def predict_outcome(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes all the rest: reward, termination and done, for any number of steps at once."""
        observation, action, *goal = self._inputs(tensordict)
        logit = self.termination_network(observation, *goal, action)
        terminated = logit > 0
        if self.negative_reward is None:
            reward = self.reward_network(observation, *goal, action)
        else:
            reward = terminated.to(observation.dtype) - float(self.negative_reward)
        outcome = (reward, terminated, terminated.clone(), logit)
        for key, value in zip(self.out_keys[1:], outcome, strict=True):
            tensordict.set(key, value)
        return tensordict

    def _inputs(self, tensordict: TensorDictBase) -> list[Tensor]:
        return [tensordict.get(key) for key in self.in_keys]
