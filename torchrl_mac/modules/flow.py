"""Flow-matching policies and their one-step students: tensor-only samplers and TensorDict faces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key_list
from torch import Tensor, nn

from torchrl_mac.modules.config import Configurable, as_keys, placeholder
from torchrl_mac.modules.fused import frozen_weights
from torchrl_mac.modules.shapes import concatenated, shaped

__all__ = [
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "FlowPolicyBase",
    "OneStepModel",
    "OneStepPolicy",
]


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
        ValueError: if ``num_steps`` is smaller than 1 or a ``low`` is not smaller than its
            ``high``; when called, if the noise or a velocity does not have the action's shape.

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
        low, high = _bounds(low, high)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """The velocity ``[*, action_dim]`` of ``action`` at ``time`` ``[*, 1]``."""
        velocity = self.velocity_network(torch.cat([observation, action, time], -1))
        return shaped(velocity, action.shape, "The output of velocity_network")

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]`` within the bounds."""
        action = _noise(observation, self.action_dim, noise)
        with frozen_weights():
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

    Raises:
        ValueError: if a ``low`` is not smaller than its ``high``; when called, if the noise or the
            network's output does not have the action's shape.

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
        low, high = _bounds(low, high)
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(
        self, observation: Tensor, noise: Tensor | None = None, *, clamp: bool = True
    ) -> Tensor:
        """Maps an observation ``[*, O]`` to an action ``[*, action_dim]``.

        With ``clamp=False`` the action is left unbounded, as distillation needs it.
        """
        noise = _noise(observation, self.action_dim, noise)
        action = self.network(torch.cat([observation, noise], -1))
        shaped(action, noise.shape, "The output of network")
        return action.clamp(self.low, self.high) if clamp else action


class FlowPolicyBase(TensorDictModuleBase, Configurable):
    """A policy that maps conditions and noise to an action.

    Args:
        module (nn.Module): a :class:`FlowMatchingModel` or a :class:`OneStepModel`.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): every key but the last is a condition: the
            observation, and a goal where there is one, concatenated in this order. The last one is
            the noise ``[*, action_dim]``, drawn when the input does not have it. Defaults to
            ``["observation", "noise"]``.
        out_keys (sequence of NestedKey, optional): where the flat action ``[*, action_dim]`` is
            written. Defaults to ``["action"]``.

    Raises:
        ValueError: if there are fewer keys than that.
    """

    module: Any

    def __init__(
        self,
        module: nn.Module,
        *,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        super().__init__()
        if len(in_keys) < 2 or len(out_keys) != 1:
            raise ValueError(
                "A flow policy reads one or more conditions and then its noise, and writes one "
                f"action; got in_keys={list(in_keys)} and out_keys={list(out_keys)}."
            )
        self.module = module
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    @property
    def action_dim(self) -> int:
        """The number of action coordinates."""
        return self.module.action_dim

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, but for the bounds: their shapes alone."""
        return {
            "action_dim": self.action_dim,
            "low": self.module.low.shape,
            "high": self.module.high.shape,
            "in_keys": self.in_keys,
            "out_keys": self.out_keys,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another policy from what :meth:`config` returned."""
        keys = {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
        low, high = (placeholder(config[name]) for name in ("low", "high"))
        return cls(**{**config, **keys, "low": low - 1, "high": high + 1})

    def forward(
        self, tensordict: TensorDictBase | Tensor | None = None, *args: Any, **kwargs: Any
    ) -> TensorDictBase | Tensor:
        """Writes the action into a tensordict, or maps tensors to it.

        Tensors are given by the names of the ``in_keys``, ``(observation=..., goal=...)``, or as
        ``(condition, noise)`` with all conditions in one. The noise may be left out.
        """
        if isinstance(tensordict, Tensor):
            return self.module(tensordict, *args, **kwargs)
        return self._act(*(() if tensordict is None else (tensordict,)), *args, **kwargs)

    @dispatch(auto_batch_size=False)
    def _act(self, tensordict: TensorDictBase, **kwargs: Any) -> TensorDictBase:
        *conditions, noise_key = self.in_keys
        condition = concatenated(tensordict.get(key) for key in conditions)
        noise = tensordict.get(noise_key, None)
        return tensordict.set(self.out_keys[0], self.module(condition, noise, **kwargs))


class FlowMatchingPolicy(FlowPolicyBase):
    """A behaviour policy that integrates a flow, as a TensorDict module.

    See :class:`FlowMatchingModel` for the sampler; "Flow Matching for Generative Modeling",
    https://arxiv.org/abs/2210.02747.

    Args:
        velocity_network (nn.Module): maps ``[*, O + action_dim + 1]`` to ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.
        num_steps (int, optional): the number of Euler steps. Defaults to 10.

    Keyword Args:
        low, high (float or Tensor, optional): the action's bounds. Default to -1 and 1.
        **kwargs: ``in_keys`` and ``out_keys`` of :class:`FlowPolicyBase`.

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
        **kwargs: Any,
    ) -> None:
        module = FlowMatchingModel(velocity_network, action_dim, num_steps, low=low, high=high)
        super().__init__(module, **kwargs)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        network, steps = self.module.velocity_network, self.module.num_steps
        return {"velocity_network": network, "num_steps": steps, **super().config()}

    def velocity(self, observation: Tensor, action: Tensor, time: Tensor) -> Tensor:
        """The velocity ``[*, action_dim]`` of ``action`` at ``time`` ``[*, 1]``."""
        return self.module.velocity(observation, action, time)


class OneStepPolicy(FlowPolicyBase):
    """A policy that maps noise to an action in one network call, as a TensorDict module.

    See :class:`OneStepModel` for the sampler; "Flow Q-Learning",
    https://arxiv.org/abs/2502.02538.

    Args:
        network (nn.Module): maps ``[*, O + action_dim]`` to ``[*, action_dim]``.
        action_dim (int): the number of action coordinates; ``h * A`` for a chunk.

    Keyword Args:
        low, high (float or Tensor, optional): the action's bounds. Default to -1 and 1.
        **kwargs: ``in_keys`` and ``out_keys`` of :class:`FlowPolicyBase`.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(OneStepModel(network, action_dim, low=low, high=high), **kwargs)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"network": self.module.network, **super().config()}


def _noise(observation: Tensor, action_dim: int, noise: Tensor | None) -> Tensor:
    shape = (*observation.shape[:-1], action_dim)
    if noise is None:
        return torch.randn(shape, dtype=observation.dtype, device=observation.device)
    return shaped(noise, shape, "The noise")


def _bounds(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    if not (low < high).all():
        raise ValueError(f"low must be smaller than high, got low={low} and high={high}.")
    return low, high
