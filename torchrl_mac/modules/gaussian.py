"""Gaussian policies, squashed or clipped to the range of actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_mac.modules.config import as_keys
from torchrl_mac.modules.flow import FlowPolicyBase
from torchrl_mac.modules.shapes import shaped

__all__ = ["GaussianModel", "GaussianPolicy", "TanhGaussianModel", "TanhGaussianPolicy"]

_BOUND = 1 - 1e-5  # of given actions, whose tanh must have an inverse


class TanhGaussianModel(nn.Module):
    r"""Samples actions :math:`a = \tanh(\mu(s) + \sigma(s) z)`, :math:`z \sim \mathcal N(0, I)`.

    The logarithm of :math:`\sigma` is clipped. All coordinates of a chunk are independent given
    the state.

    Args:
        network (nn.Module): maps an observation ``[*, O]`` to means and log-deviations,
            ``[*, 2 * action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        log_std_bounds (tuple of float, optional): of the deviation's logarithm. Defaults to
            ``(-20.0, 2.0)``.

    Noise is drawn under every exploration type; pass it for repeatable samples, or zeros for the
    mode.

    Raises:
        ValueError: when called, if the noise or the network's output does not fit the action.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import NormedMLP, TanhGaussianModel
        >>> model = TanhGaussianModel(NormedMLP(4, 2 * 6, num_cells=(32,)), action_dim=6)
        >>> action, log_prob = model.sample(torch.randn(3, 4))
        >>> action.shape, log_prob.shape
        (torch.Size([3, 6]), torch.Size([3]))
    """

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        *,
        log_std_bounds: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.network = network
        self.action_dim = action_dim
        self.log_std_bounds = (float(log_std_bounds[0]), float(log_std_bounds[1]))

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]``."""
        return self._before_tanh(observation, noise)[0].tanh()

    def sample(self, observation: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """An action ``[*, action_dim]`` and its log-density ``[*]``, finite where tanh saturates.

        Both carry gradients of the parameters through the sample.
        """
        x, mean, log_std = self._before_tanh(observation, noise)
        return x.tanh(), _log_prob(x, mean, log_std)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """The log-density ``[*]`` of actions ``[*, action_dim]``, clipped to within 1 - 1e-5."""
        mean, log_std = self._mean_and_log_std(observation)
        return _log_prob(torch.atanh(action.clamp(-_BOUND, _BOUND)), mean, log_std)

    def _before_tanh(
        self, observation: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std = self._mean_and_log_std(observation)
        noise = torch.randn_like(mean) if noise is None else shaped(noise, mean.shape, "The noise")
        return mean + log_std.exp() * noise, mean, log_std

    def _mean_and_log_std(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(observation)
        shaped(out, (*observation.shape[:-1], 2 * self.action_dim), "The output of network")
        mean, log_std = out.chunk(2, -1)
        return mean, log_std.clamp(*self.log_std_bounds)


class TanhGaussianPolicy(FlowPolicyBase):
    """A squashed Gaussian policy, of single actions or whole chunks, as a TensorDict module.

    See :class:`TanhGaussianModel`; the actor of RLPD (https://arxiv.org/abs/2302.02948).

    Args:
        network (nn.Module): maps ``[*, O]`` to ``[*, 2 * action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        log_std_bounds (tuple of float, optional): see :class:`TanhGaussianModel`.
        **kwargs: ``in_keys`` and ``out_keys`` of :class:`FlowPolicyBase`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import NormedMLP, TanhGaussianPolicy
        >>> policy = TanhGaussianPolicy(NormedMLP(4, 2 * 6, num_cells=(32,)), action_dim=6)
        >>> td = policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))
        >>> td["action"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        *,
        log_std_bounds: tuple[float, float] = (-20.0, 2.0),
        **kwargs: Any,
    ) -> None:
        module = TanhGaussianModel(network, action_dim, log_std_bounds=log_std_bounds)
        super().__init__(module, **kwargs)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "network": self.module.network,
            "action_dim": self.action_dim,
            "log_std_bounds": self.module.log_std_bounds,
            "in_keys": self.in_keys,
            "out_keys": self.out_keys,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another policy from what :meth:`config` returned."""
        keys = {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
        return cls(**{**config, **keys})


class GaussianModel(nn.Module):
    r"""Samples actions :math:`a = \mathrm{clip}(\mu(s) + \sigma z)` of one constant deviation.

    They are clipped to within -1 and 1.

    Args:
        network (nn.Module): maps an observation ``[*, O]`` to means ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        std (float, optional): the deviation of each coordinate. Defaults to 1.

    Noise is drawn under every exploration type; pass it for repeatable samples, or zeros for the
    mode.

    Raises:
        ValueError: if ``std`` is not positive; when called, if the noise or the network's output
            does not fit the action.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import GaussianModel, NormedMLP
        >>> model = GaussianModel(NormedMLP(4, 6, num_cells=(32,)), action_dim=6)
        >>> model(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(self, network: nn.Module, action_dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}.")
        self.network = network
        self.action_dim = action_dim
        self.std = float(std)

    def mean(self, observation: Tensor) -> Tensor:
        """The means ``[*, action_dim]`` at an observation ``[*, O]``, not clipped."""
        shape = (*observation.shape[:-1], self.action_dim)
        return shaped(self.network(observation), shape, "The output of network")

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]``."""
        mean = self.mean(observation)
        noise = torch.randn_like(mean) if noise is None else shaped(noise, mean.shape, "The noise")
        return (mean + self.std * noise).clamp(-1, 1)

    def log_prob(self, mean: Tensor, action: Tensor) -> Tensor:
        """The log-density ``[*]``, before clipping, of actions around means ``[*, action_dim]``."""
        return _normal_log_prob((action - mean) / self.std, math.log(self.std)).sum(-1)


class GaussianPolicy(FlowPolicyBase):
    """A Gaussian policy of constant deviation, as a TensorDict module.

    See :class:`GaussianModel`; the actor of DDPG+BC (https://arxiv.org/abs/2406.09329).

    Args:
        network (nn.Module): maps ``[*, O]`` to means ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        std (float, optional): see :class:`GaussianModel`.
        **kwargs: ``in_keys`` and ``out_keys`` of :class:`FlowPolicyBase`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import GaussianPolicy, NormedMLP, PolicyActor
        >>> policy = GaussianPolicy(NormedMLP(4, 6, num_cells=(32,)), action_dim=6)
        >>> mode = PolicyActor(policy, deterministic=True)
        >>> mode(TensorDict({"observation": torch.randn(3, 4)}, [3]))["action"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self, network: nn.Module, action_dim: int, *, std: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(GaussianModel(network, action_dim, std=std), **kwargs)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "network": self.module.network,
            "action_dim": self.action_dim,
            "std": self.module.std,
            "in_keys": self.in_keys,
            "out_keys": self.out_keys,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another policy from what :meth:`config` returned."""
        keys = {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
        return cls(**{**config, **keys})


def _normal_log_prob(z: Tensor, log_std: Tensor | float) -> Tensor:
    """The log-density of each coordinate, ``z`` deviations from its mean."""
    return -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)


def _log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log-density of ``tanh(x)``, by what was there before the tanh: it can be recovered."""
    normal = _normal_log_prob((x - mean) * (-log_std).exp(), log_std)
    jacobian = 2 * (math.log(2) - x - F.softplus(-2 * x))
    return (normal - jacobian).sum(-1)
