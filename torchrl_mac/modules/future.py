"""Models of the next h observations at once, and the actor that plans with one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key, unravel_key_list
from torch import nn

from torchrl_mac.modules.config import Configurable, as_keys
from torchrl_mac.modules.flow import FlowMatchingPolicy
from torchrl_mac.modules.rejection import FlowRejectionActor
from torchrl_mac.modules.shapes import concatenated, shaped

__all__ = ["FlowFutureModel", "FuturePlanningActor", "MLPFutureModel"]


class FlowFutureModel(FlowMatchingPolicy):
    r"""Samples the next h observations, given a state and an action, from a flow.

    The flow version of D-MPC's multi-step dynamics (https://arxiv.org/abs/2410.05364), FMPC in
    https://arxiv.org/abs/2512.08108. A sample is not bounded; see
    :class:`~torchrl_mac.modules.FlowMatchingModel` for how it is drawn.

    Args:
        velocity_network (nn.Module): maps the concatenation of observation, action, future and
            time, ``[*, O + D + future_dim + 1]``, to a velocity ``[*, future_dim]``.
        future_dim (int): the numbers of h observations together, ``h * O``.
        num_steps (int, optional): the number of Euler steps. Defaults to 10.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the conditions, of which actions may be chunks
            ``[*, c, A]``; and the noise ``[*, future_dim]``, drawn when the input does not have
            it. Defaults to ``["observation", "action", "future_noise"]``.
        out_keys (sequence of NestedKey, optional): where the flat future ``[*, future_dim]`` is
            written. Defaults to ``[("future", "observation")]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import FlowFutureModel, NormedMLP
        >>> future = 8 * 4  # eight observations of four numbers
        >>> velocity = NormedMLP(4 + 2 + future + 1, future, num_cells=(32,))
        >>> model = FlowFutureModel(velocity, future)
        >>> td = model(TensorDict(observation=torch.randn(3, 4), action=torch.rand(3, 2)))
        >>> td["future", "observation"].shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        velocity_network: nn.Module,
        future_dim: int,
        num_steps: int = 10,
        *,
        in_keys: Sequence[NestedKey] = ("observation", "action", "future_noise"),
        out_keys: Sequence[NestedKey] = (("future", "observation"),),
    ) -> None:
        super().__init__(
            velocity_network,
            future_dim,
            num_steps,
            low=-math.inf,
            high=math.inf,
            in_keys=in_keys,
            out_keys=out_keys,
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "velocity_network": self.module.velocity_network,
            "future_dim": self.action_dim,
            "num_steps": self.module.num_steps,
            "in_keys": self.in_keys,
            "out_keys": self.out_keys,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another model from what :meth:`config` returned."""
        return cls(**{**config, **_keys(config)})


class MLPFutureModel(TensorDictModuleBase, Configurable):
    r"""Predicts the next h observations, given a state and an action, in one network call.

    .. math::

        \hat s_{t+i} = s_t + \Delta_i(s_t, a_t), \qquad i = 1 \dots h

    Deterministic, where a :class:`FlowFutureModel` samples: an actor that chooses among
    candidates then compares nothing but actions.

    Args:
        network (nn.Module): maps the concatenation of observation and action, ``[*, O + D]``, to
            the changes of h observations ``[*, h * O]``.
        horizon (int): the number of observations h.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): the observation and what else the future depends
            on. Defaults to ``["observation", "action"]``.
        out_keys (sequence of NestedKey, optional): where the flat future ``[*, h * O]`` is
            written. Defaults to ``[("future", "observation")]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import MLPFutureModel, NormedMLP
        >>> model = MLPFutureModel(NormedMLP(4 + 2, 8 * 4, num_cells=(32,)), horizon=8)
        >>> td = model(TensorDict(observation=torch.randn(3, 4), action=torch.rand(3, 2)))
        >>> td["future", "observation"].shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        network: nn.Module,
        horizon: int,
        *,
        in_keys: Sequence[NestedKey] = ("observation", "action"),
        out_keys: Sequence[NestedKey] = (("future", "observation"),),
    ) -> None:
        super().__init__()
        self.network = network
        self.horizon = horizon
        self.in_keys = unravel_key_list(list(in_keys))
        self.out_keys = unravel_key_list(list(out_keys))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("network", "horizon", "in_keys", "out_keys")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes another model from what :meth:`config` returned."""
        return cls(**{**config, **_keys(config)})

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the future."""
        observation, *others = (tensordict.get(key) for key in self.in_keys)
        state = observation.tile(self.horizon)
        change = self.network(concatenated([observation, *others]))
        shaped(change, state.shape, "The output of network")
        return tensordict.set(self.out_keys[0], state + change)


class FuturePlanningActor(FlowRejectionActor):
    r"""Draws N candidates, imagines a future of each and acts with the one of highest value.

    .. math::

        a = \arg\max_{a_i} Q(\hat s^i_{t+1:t+h}, a_i), \qquad
        a_i \sim \pi(\cdot \mid s_t), \quad
        \hat s^i_{t+1:t+h} \sim p(\cdot \mid s_t, a_i), \qquad i = 1 \dots N

    The planner of D-MPC (https://arxiv.org/abs/2410.05364).

    Args:
        policy (TensorDictModule): writes an action ``[*, D]``, see :class:`FlowRejectionActor`.
        qvalue_network (TensorDictModule): reads the future ``[*, h * O]`` and whatever else, and
            writes a value ``[*, 1]``.
        future_model (TensorDictModule): reads the action and writes the future, such as
            :class:`FlowFutureModel`.

    Keyword Args:
        future_noise_key (NestedKey, optional): where explicit noise of the futures is read,
            ``[*, N, h * O]``, if it is there. Defaults to ``"future_noise"``.
        **kwargs: those of :class:`FlowRejectionActor`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import ValueOperator
        >>> from torchrl_mac.modules import (
        ...     FlowFutureModel, FlowMatchingPolicy, FuturePlanningActor, NormedMLP
        ... )
        >>> S, A, F, cells = 4, 2, 8 * 4, {"num_cells": (32,)}
        >>> actor = FuturePlanningActor(
        ...     FlowMatchingPolicy(NormedMLP(S + A + 1, A, **cells), A),
        ...     ValueOperator(
        ...         NormedMLP(F + A, 1, **cells), in_keys=[("future", "observation"), "action"]
        ...     ),
        ...     FlowFutureModel(NormedMLP(S + A + F + 1, F, **cells), F),
        ...     num_candidates=64,
        ... )
        >>> actor(TensorDict({"observation": torch.randn(3, 4)}, [3]))["action"].shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        qvalue_network: TensorDictModuleBase,
        future_model: TensorDictModuleBase,
        *,
        future_noise_key: NestedKey = "future_noise",
        **kwargs: Any,
    ) -> None:
        self.future_noise_key = unravel_key(future_noise_key)
        super().__init__(policy, qvalue_network, **kwargs)
        self.future_model = future_model
        self._set_keys(policy, future_model, qvalue_network)

    @property
    def _noise_keys(self) -> list[NestedKey]:
        return [self.noise_key, self.future_noise_key]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"future_model": self.future_model, "future_noise_key": self.future_noise_key}
        return {**super().config(), **own}

    def _valued(self, candidates: TensorDictBase) -> TensorDictBase:
        return self.qvalue_network(self.future_model(candidates))


def _keys(config: dict[str, Any]) -> dict[str, list[NestedKey]]:
    return {name: as_keys(config[name]) for name in ("in_keys", "out_keys")}
