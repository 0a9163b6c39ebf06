"""Fitting a chunked world model to a dataset."""

from __future__ import annotations

from dataclasses import dataclass

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn import functional as F
from torchrl.objectives import LossModule

from torchrl_mac.modules import ChunkedWorldModel
from torchrl_mac.objectives.common import GoalKeys, required, same_shape

__all__ = ["ChunkedWorldModelLoss"]


class ChunkedWorldModelLoss(LossModule):
    r"""Fits dynamics, reward and termination of a :class:`ChunkedWorldModel` to chunks.

    .. math::

        \mathcal L_{dynamics} &= \| \hat s_{t+h} - s_{t+h} \|^2 \\
        \mathcal L_{reward} &= ( \hat r - r )^2 \\
        \mathcal L_{termination} &= \mathrm{BCE}(\mathrm{logit}, \mathrm{terminated})

    with squares averaged over the state's coordinates (https://arxiv.org/abs/2512.08108). Dynamics
    of another kind say themselves what they minimise, such as the likelihood of an
    :class:`~torchrl_mac.modules.EnsembleWorldModel`. Each
    of the model's networks learns from one term; the reward network also where the model reads
    rewards off terminations.

    Args:
        world_model (ChunkedWorldModel): the model.

    Keyword Args:
        reduction (str, optional): ``"none"``, ``"mean"`` or ``"sum"`` over the batch. Defaults to
            ``"mean"``.

    The input holds what the model reads and, under ``"next"``, the state ``[*, O]`` after the
    chunk, the chunk's reward ``[*, 1]`` and whether the task ended inside it (bool ``[*, 1]``).

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> from torchrl_mac.objectives import ChunkedWorldModelLoss
        >>> sizes = {"in_features": 4 + 10 * 2, "num_cells": (32,)}
        >>> loss = ChunkedWorldModelLoss(
        ...     ChunkedWorldModel(*(NormedMLP(out_features=size, **sizes) for size in (4, 1, 1)))
        ... )
        >>> loss_dynamics, loss_reward, loss_termination = loss(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 10, 2),
        ...     next_observation=torch.randn(8, 4),
        ...     next_reward=torch.randn(8, 1),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool),
        ... )
        >>> (loss_dynamics + loss_reward + loss_termination).backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can change.

        Attributes:
            observation (NestedKey): the state to predict, under ``"next"``. Defaults to
                ``"observation"``.
            value_goal (NestedKey): what the model reads as its goal, if it has one. Defaults to
                ``"value_goal"``.
            reward (NestedKey): the reward, under ``"next"``. Defaults to ``"reward"``.
            terminated (NestedKey): the termination, under ``"next"``. Defaults to
                ``"terminated"``.
            priority_weight (NestedKey): optional weight of each sample.
        """

        observation: NestedKey = "observation"
        value_goal: NestedKey = "value_goal"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_dynamics", "loss_reward", "loss_termination"]  # noqa: RUF012

    world_model: ChunkedWorldModel
    world_model_params: TensorDictParams
    target_world_model_params: TensorDictParams

    def __init__(self, world_model: ChunkedWorldModel, *, reduction: str = "mean") -> None:
        super().__init__()
        self.convert_to_functional(world_model, "world_model")
        self.reduction = reduction

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the model reads, and what it is compared with."""
        keys = self.tensor_keys
        truth = [("next", key) for key in (keys.observation, keys.reward, keys.terminated)]
        return [*self._conditions.sources(self.world_model.in_keys), *truth]

    @property
    def _conditions(self) -> GoalKeys:
        return GoalKeys(self.world_model.goal_key, self.tensor_keys.value_goal)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """The terms in ``out_keys``; :meth:`select_out_keys` leaves out the work of the others."""
        terms = {
            "loss_dynamics": self.dynamics_loss,
            "loss_reward": self.reward_loss,
            "loss_termination": self.termination_loss,
        }
        out = TensorDict({key: terms[key](tensordict) for key in self.out_keys})
        self._clear_weakrefs(tensordict, out, "world_model_params")
        return out

    def dynamics_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of the next state, or its likelihood; no goal has a part in it."""
        observation, action, *_ = self._inputs(tensordict)
        truth = self._truth(self.tensor_keys.observation, tensordict, observation)
        with self.world_model_params.to_module(self.world_model):
            error = self.world_model.dynamics_error(observation, action, truth)
        return self._reduced(error.unsqueeze(-1), tensordict)

    def reward_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The regression of the chunk's reward."""
        observation, action, *goal = self._inputs(tensordict)
        with self.world_model_params.to_module(self.world_model):
            reward = self.world_model.reward_network(observation, *goal, action)
        truth = self._truth(self.tensor_keys.reward, tensordict, reward)
        return self._reduced((reward - truth).square(), tensordict)

    def termination_loss(self, tensordict: TensorDictBase) -> Tensor:
        """The classification of chunks in which the task ends."""
        observation, action, *goal = self._inputs(tensordict)
        with self.world_model_params.to_module(self.world_model):
            logit = self.world_model.termination_network(observation, *goal, action)
        truth = self._truth(self.tensor_keys.terminated, tensordict, logit).to(logit.dtype)
        error = F.binary_cross_entropy_with_logits(logit, truth, reduction="none")
        return self._reduced(error, tensordict)

    def _truth(self, key: NestedKey, tensordict: TensorDictBase, like: Tensor) -> Tensor:
        return same_shape(("next", key), required(tensordict, ("next", key)), like.shape)

    def _inputs(self, tensordict: TensorDictBase) -> list[Tensor]:
        return [*self._conditions.read(tensordict, self.world_model.in_keys).values()]

    def _reduced(self, error: Tensor, tensordict: TensorDictBase) -> Tensor:
        weights = self._maybe_get_priority_weight(tensordict)
        return self._reduce_loss(error.mean(-1), tensordict, weights=weights)
