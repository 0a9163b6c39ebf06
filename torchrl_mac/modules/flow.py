"""Tensor-only samplers of a flow-matching policy and of its one-step distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FlowMatchingModel", "OneStepModel"]


class FlowMatchingModel(nn.Module):
    r"""Samples bounded actions by Euler integration of a learned velocity field.

    Starting from Gaussian noise :math:`x`, repeats
    :math:`x \leftarrow x + v(s, x, i / F) / F` for :math:`i = 0 \dots F - 1` and clips the
    result once, at the end. Noise is drawn under every exploration type; pass it for repeatable
    samples.

    Args:
        velocity_network (nn.Module): maps the concatenation of observation, action and time,
            ``[*, O + action_dim + 1]``, to a velocity ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.
        num_steps (int, optional): the number of Euler steps :math:`F`. Defaults to 10.

    Keyword Args:
        low (float or Tensor, optional): lower action bound. Defaults to -1.
        high (float or Tensor, optional): upper action bound. Defaults to 1.

    Raises:
        ValueError: if ``num_steps`` is smaller than 1.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import FlowMatchingModel, NormedMLP
        >>> model = FlowMatchingModel(NormedMLP(4 + 6 + 1, 6, num_cells=(32,)), action_dim=6)
        >>> model(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        self.velocity_network = velocity_network
        self.action_dim = action_dim
        self.num_steps = num_steps
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """The velocity ``[*, action_dim]`` of ``action`` at ``time`` ``[*, 1]``."""
        return self.velocity_network(torch.cat([observation, action, time], -1))

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]`` within the bounds."""
        action = _noise_like(observation, self.action_dim) if noise is None else noise
        for step in range(self.num_steps):
            time = torch.full_like(action[..., :1], step / self.num_steps)
            action = action + self.velocity(observation, action, time) / self.num_steps
        return action.clamp(self.low, self.high)


class OneStepModel(nn.Module):
    """Maps noise to an action in one network call; the student of a flow.

    Args:
        network (nn.Module): maps the concatenation of observation and noise,
            ``[*, O + action_dim]``, to an unbounded action ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        low (float or Tensor, optional): lower action bound. Defaults to -1.
        high (float or Tensor, optional): upper action bound. Defaults to 1.

    Noise is drawn under every exploration type; pass it for repeatable samples.

    Examples:
        >>> import torch
        >>> from torchrl_mac.modules import NormedMLP, OneStepModel
        >>> model = OneStepModel(NormedMLP(4 + 6, 6, num_cells=(32,)), action_dim=6)
        >>> model(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.action_dim = action_dim
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))

    def forward(
        self, observation: Tensor, noise: Tensor | None = None, *, clamp: bool = True
    ) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]``.

        With ``clamp=False`` the action is left unbounded, as distillation needs it.
        """
        if noise is None:
            noise = _noise_like(observation, self.action_dim)
        action = self.network(torch.cat([observation, noise], -1))
        return action.clamp(self.low, self.high) if clamp else action


def _noise_like(observation: Tensor, action_dim: int) -> Tensor:
    return torch.randn(
        (*observation.shape[:-1], action_dim), dtype=observation.dtype, device=observation.device
    )
