"""How far imagined transitions can be trusted, and rewards that are lower where it is less."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs.transforms import Transform

from torchrl_mac.modules import EnsembleWorldModel
from torchrl_mac.objectives.critics import QValueLossBase

__all__ = ["RewardPenalty", "deviation_penalty", "value_penalty"]


@torch.no_grad()
def deviation_penalty(world_model: EnsembleWorldModel, tensordict: TensorDictBase) -> Tensor:
    r"""How unsure the least sure member is of the next state, ``[*]``.

    .. math::

        u = \max_e \| \sigma_e(s, a) \|_2

    as in MOPO (https://arxiv.org/abs/2005.13239).

    Args:
        world_model (EnsembleWorldModel): the model.
        tensordict (TensorDictBase): what its dynamics read.
    """
    inputs = (world_model.observation_key, world_model.action_key)
    return world_model.max_deviation(*(tensordict.get(key) for key in inputs))


@torch.no_grad()
def value_penalty(
    loss: QValueLossBase,
    world_model: EnsembleWorldModel,
    tensordict: TensorDictBase,
    num_samples: int = 10,
    *,
    model_noise: Tensor | None = None,
    actor_noise: Tensor | None = None,
) -> Tensor:
    r"""How differently the members' next states are valued, ``[*]``.

    .. math::

        u = \mathrm{std}_e \, \mathrm{mean}_m \, \mathrm{mean}_j
        \bar Q_j(s'_{e,m}, a'), \qquad a' \sim \pi(s'_{e,m})

    with M samples of each member, as in MOBILE (https://arxiv.org/abs/2306.09344), its target
    networks and the actor's own actions; the deviation is that of the population.

    Args:
        loss (QValueLossBase): the critics and the actor; one that trains its ``actor_network``.
        world_model (EnsembleWorldModel): the model.
        tensordict (TensorDictBase): what dynamics, critics and actor read, ``[*]``.
        num_samples (int, optional): the number of samples of each member, M. Defaults to 10.

    Keyword Args:
        model_noise (Tensor, optional): ``[E, M, *, O]``. Default: drawn.
        actor_noise (Tensor, optional): ``[E, M, *, D]``. Default: drawn.
    """
    observation = tensordict.get(world_model.observation_key)
    action = tensordict.get(world_model.action_key)
    mean, std = (part.unsqueeze(1) for part in world_model.dynamics_network(observation, action))
    if model_noise is None:
        shape = (mean.shape[0], num_samples, *observation.shape)
        model_noise = torch.randn(shape, device=mean.device, dtype=mean.dtype)
    following = observation + mean + std * model_noise
    size = following.shape[:-1]
    goals = loss._conditions.read(
        tensordict, [key for key in loss._critic_keys if key != world_model.observation_key]
    )
    state = {key: goal.expand(*size, goal.shape[-1]) for key, goal in goals.items()}
    state[world_model.observation_key] = following
    policy = loss.actor_network
    condition = torch.cat([state[key] for key in policy.in_keys[:-1]], -1)
    with loss.actor_network_params.to_module(policy):
        state[loss.tensor_keys.action] = policy(condition, actor_noise)
    inputs = TensorDict(state, batch_size=size)
    members = loss.members(inputs, loss.target_qvalue_network_params)
    return members.mean(0).mean(1).std(0, correction=0)


class RewardPenalty(Transform):
    r"""Lowers the rewards of samples, :math:`r \leftarrow r - \beta u`.

    Appended to the buffer of imagined transitions it penalises what the model and the critics are
    unsure of now, not when they imagined it.

    Args:
        penalty (callable): returns u ``[*]`` of a batch, such as :func:`deviation_penalty` of a
            world model.
        beta (float): its weight.

    Keyword Args:
        reward_key (NestedKey, optional): defaults to ``("next", "reward")``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.objectives import RewardPenalty
        >>> penalty = RewardPenalty(lambda td: td["observation"].norm(dim=-1), beta=0.5)
        >>> td = TensorDict(observation=torch.ones(2, 4), next=TensorDict(reward=torch.zeros(2, 1)))
        >>> penalty(td.auto_batch_size_(1))["next", "reward"].flatten()
        tensor([-1., -1.])
    """

    def __init__(
        self,
        penalty: Callable[[TensorDictBase], Tensor],
        beta: float,
        *,
        reward_key: NestedKey = ("next", "reward"),
    ) -> None:
        key = unravel_key(reward_key)
        super().__init__(in_keys=[key], out_keys=[key])
        self.__dict__["penalty"] = penalty
        self.beta = beta

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Lowers the rewards of a sample."""
        reward = tensordict.get(self.in_keys[0])
        lower = reward - self.beta * self.penalty(tensordict).reshape(reward.shape)
        return tensordict.set(self.out_keys[0], lower)
