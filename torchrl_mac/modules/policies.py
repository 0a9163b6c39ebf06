"""TensorDict faces of the flow models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor, nn

from torchrl_mac.modules.flow import FlowMatchingModel, OneStepModel

__all__ = ["FlowMatchingPolicy", "OneStepPolicy"]


class _FlowPolicy(TensorDictModuleBase):
    """Reads what the model is conditioned on, then noise; writes the action.

    Every input key but the last is a condition (the observation, and a goal where there is
    one); conditions are concatenated in the order of ``in_keys``. The last key is the noise,
    drawn when the input does not have it.
    """

    model: Any  # a FlowMatchingModel or a OneStepModel

    def __init__(
        self, model: nn.Module, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]
    ) -> None:
        super().__init__()
        if len(in_keys) < 2 or len(out_keys) != 1:
            raise ValueError(
                "A flow policy reads one or more conditions and then its noise, and writes one "
                f"action; got in_keys={list(in_keys)} and out_keys={list(out_keys)}."
            )
        self.model = model
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    @property
    def action_dim(self) -> int:
        """The number of action coordinates."""
        return self.model.action_dim

    def forward(
        self, tensordict: TensorDictBase | Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> TensorDictBase | Tensor:
        """Writes the action into a tensordict, or maps tensors ``(condition, noise)`` to it."""
        if isinstance(tensordict, Tensor):
            return self.model(tensordict, noise, **kwargs)
        *conditions, noise_key = self.in_keys
        condition = torch.cat([tensordict.get(key) for key in conditions], -1)
        noise = tensordict.get(noise_key, None)
        return tensordict.set(self.out_keys[0], self.model(condition, noise, **kwargs))


class FlowMatchingPolicy(_FlowPolicy):
    """A behaviour policy that integrates a flow, as a TensorDict module.

    See :class:`FlowMatchingModel` for the sampler; "Flow Matching for Generative Modeling",
    https://arxiv.org/abs/2210.02747.

    Args:
        velocity_network (nn.Module): maps ``[*, O + action_dim + 1]`` to ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.
        num_steps (int, optional): the number of Euler steps. Defaults to 10.

    Keyword Args:
        low (float or Tensor, optional): lower action bound. Defaults to -1.
        high (float or Tensor, optional): upper action bound. Defaults to 1.
        in_keys (sequence of NestedKey, optional): the conditions, then the noise. Defaults to
            ``["observation", "noise"]``.
        out_keys (sequence of NestedKey, optional): where the flat action ``[*, action_dim]`` is
            written. Defaults to ``["action"]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP
        >>> policy = FlowMatchingPolicy(NormedMLP(4 + 6 + 1, 6, num_cells=(32,)), action_dim=6)
        >>> td = policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))
        >>> td["action"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        velocity_network: nn.Module,
        action_dim: int,
        num_steps: int = 10,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        model = FlowMatchingModel(velocity_network, action_dim, num_steps, low=low, high=high)
        super().__init__(model, in_keys, out_keys)

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """The velocity ``[*, action_dim]`` of ``action`` at ``time`` ``[*, 1]``."""
        return self.model.velocity(observation, action, time)


class OneStepPolicy(_FlowPolicy):
    """A policy that maps noise to an action in one network call, as a TensorDict module.

    See :class:`OneStepModel` for the sampler; "Flow Q-Learning",
    https://arxiv.org/abs/2502.02538.

    Args:
        network (nn.Module): maps ``[*, O + action_dim]`` to ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        low (float or Tensor, optional): lower action bound. Defaults to -1.
        high (float or Tensor, optional): upper action bound. Defaults to 1.
        in_keys (sequence of NestedKey, optional): the conditions, then the noise. Defaults to
            ``["observation", "noise"]``.
        out_keys (sequence of NestedKey, optional): where the flat action ``[*, action_dim]`` is
            written. Defaults to ``["action"]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import NormedMLP, OneStepPolicy
        >>> policy = OneStepPolicy(NormedMLP(4 + 6, 6, num_cells=(32,)), action_dim=6)
        >>> td = policy(TensorDict({"observation": torch.randn(3, 4)}, [3]))
        >>> td["action"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        network: nn.Module,
        action_dim: int,
        *,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        super().__init__(OneStepModel(network, action_dim, low=low, high=high), in_keys, out_keys)
