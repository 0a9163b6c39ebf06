"""World models whose dynamics are an ensemble."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from torchrl_mac.modules.ensemble import GaussianEnsemble
from torchrl_mac.modules.shapes import shaped
from torchrl_mac.modules.world_model import ChunkedWorldModel

__all__ = ["EnsembleWorldModel"]


class EnsembleWorldModel(ChunkedWorldModel):
    r"""A world model that samples the next state from one of several Gaussians.

    .. math::

        \hat s' = s + \mu_e(s, a) + \sigma_e(s, a) \epsilon, \qquad \epsilon \sim \mathcal N(0, I)

    with a member :math:`e` drawn among the elites for each state: the dynamics of MOPO
    (https://arxiv.org/abs/2005.13239) and its successors, of single actions or of whole chunks.
    Reward and termination are as in :class:`ChunkedWorldModel`.

    Args:
        dynamics_network (GaussianEnsemble): maps ``(observation [*, O], action)`` to the mean and
            deviation of the state's change, ``[E, *, O]``.
        reward_network (nn.Module): maps the same inputs to the reward ``[*, 1]``.
        termination_network (nn.Module): maps the same inputs to a logit ``[*, 1]``.

    Keyword Args:
        model_noise_key (NestedKey, optional): where :math:`\epsilon` ``[*, O]`` is read, if it is
            there. Defaults to ``"model_noise"``.
        member_key (NestedKey, optional): where the member of each state is read, int64 ``[*]``, if
            it is there. Defaults to ``"member"``.
        **kwargs: those of :class:`ChunkedWorldModel`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import (
        ...     EnsembleWorldModel, GaussianEnsemble, NormedMLP, StackedMLP
        ... )
        >>> sizes = {"in_features": 4 + 2, "num_cells": (32,)}
        >>> model = EnsembleWorldModel(
        ...     GaussianEnsemble(StackedMLP(7, out_features=2 * 4, broadcast=True, **sizes)),
        ...     NormedMLP(out_features=1, **sizes),
        ...     NormedMLP(out_features=1, **sizes),
        ... )
        >>> td = TensorDict(observation=torch.randn(3, 4), action=torch.randn(3, 2))
        >>> model(td.auto_batch_size_(1))["next", "observation"].shape
        torch.Size([3, 4])
        >>> model.max_deviation(td["observation"], td["action"]).shape
        torch.Size([3])
    """

    dynamics_network: GaussianEnsemble

    def __init__(
        self,
        dynamics_network: GaussianEnsemble,
        reward_network: nn.Module,
        termination_network: nn.Module,
        *,
        model_noise_key: NestedKey = "model_noise",
        member_key: NestedKey = "member",
        **kwargs: Any,
    ) -> None:
        super().__init__(dynamics_network, reward_network, termination_network, **kwargs)
        self.model_noise_key = unravel_key(model_noise_key)
        self.member_key = unravel_key(member_key)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        keys = {"model_noise_key": self.model_noise_key, "member_key": self.member_key}
        return {**super().config(), **keys}

    def predict_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes a next observation, each of an elite of its own."""
        observation, action, *_ = self._inputs(tensordict)
        change = self.dynamics_network.sample(
            observation,
            action,
            noise=tensordict.get(self.model_noise_key, None),
            member=tensordict.get(self.member_key, None),
        )
        shaped(change, observation.shape, "A sample of dynamics_network")
        return tensordict.set(self._next[self.observation_key], observation + change)

    def dynamics_error(self, observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """The negative log-likelihood of the next state, averaged over the members, ``[*]``."""
        change = following - observation
        return -self.dynamics_network.log_prob(change, observation, action).mean(0)

    def member_errors(self, observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """The squared error of each member's mean, averaged over coordinates, ``[E, *]``."""
        mean, _ = self.dynamics_network(observation, action)
        return (observation + mean - following).square().mean(-1)

    def sample_members(
        self, observation: Tensor, action: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """A next observation of each member, ``[E, *, O]``; ``noise`` has the same shape."""
        mean, std = self.dynamics_network(observation, action)
        noise = torch.randn_like(mean) if noise is None else noise
        return observation + mean + std * noise

    def max_deviation(self, observation: Tensor, action: Tensor) -> Tensor:
        """The norm of the deviation of the member that is least sure, ``[*]``: MOPO's penalty."""
        return self.dynamics_network(observation, action)[1].norm(dim=-1).amax(0)
