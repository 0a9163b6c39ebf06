"""MAC's networks and losses at any size, and batches for them: for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss


@dataclass(frozen=True)
class Size:
    """Widths of the data, and what makes an update large; ``goal`` 0 means none."""

    cells: Sequence[int] = (256,) * 4
    batch: int = 256
    candidates: int = 4
    horizon: int = 10
    flow_steps: int = 10
    observation: int = 28
    action: int = 5
    chunk: int = 10
    goal: int = 0
    goal_key: str | tuple[str, ...] = "goal"
    negative_reward: bool = True

    @property
    def flat(self) -> int:
        """The numbers of a whole chunk."""
        return self.chunk * self.action

    @property
    def state(self) -> int:
        """The numbers of an observation and its goal."""
        return self.observation + self.goal


def make_mac(
    size: Size, device: torch.device | str | None = None, **options: dict[str, Any]
) -> dict[str, Any]:
    """The three losses, by name; ``options`` are their keyword arguments, by the same names."""
    unknown = options.keys() - {"behaviour", "world_model", "values"}
    if unknown:
        raise ValueError(f"There is no loss {sorted(unknown)}.")

    def network(inputs: int, outputs: int) -> NormedMLP:
        return NormedMLP(inputs, outputs, size.cells, device=device)

    state = ["observation", *([size.goal_key] if size.goal else [])]
    S, D = size.state, size.flat
    flow = FlowMatchingPolicy(
        network(S + D + 1, D), D, size.flow_steps, in_keys=[*state, "noise"]
    ).to(device)
    policy = OneStepPolicy(network(S + D, D), D, in_keys=[*state, "noise"]).to(device)
    model = ChunkedWorldModel(
        network(size.observation + D, size.observation),
        *(network(S + D, 1) for _ in range(2)),
        goal_key=size.goal_key if size.goal else None,
        negative_reward=size.negative_reward if size.goal else None,
    )
    value = ValueOperator(network(S, 1), in_keys=state)
    qvalue = ValueOperator(network(S + D, 1), in_keys=[*state, "action"])
    actor = FlowRejectionActor(
        policy, qvalue, num_candidates=size.candidates, chunk_size=size.chunk
    )
    values = ValueExpansionLoss(
        actor, value, qvalue, model, imagination_horizon=size.horizon, **options.get("values", {})
    )
    values.make_value_estimator(gamma=0.999, lmbda=1.0)
    return {
        "behaviour": FlowBCLoss(flow, policy, **options.get("behaviour", {})),
        "world_model": ChunkedWorldModelLoss(model, **options.get("world_model", {})),
        "values": values,
    }


def make_batch(
    size: Size, shape: Sequence[int] | None = None, seed: int | None = None
) -> TensorDict:
    """A random batch with all the noise that the losses would draw."""
    shape = [size.batch] if shape is None else list(shape)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*shape, *sizes, generator=generator)

    def rand(*sizes: int) -> torch.Tensor:
        return torch.rand(*shape, *sizes, generator=generator)

    goals = ("value_goal", "actor_goal") if size.goal else ()
    return TensorDict(
        **{goal: randn(size.goal) for goal in goals},
        observation=randn(size.observation),
        action=rand(size.chunk, size.action) * 2 - 1,
        noise=randn(size.horizon, size.candidates, size.flat),
        flow_noise=randn(size.flat),
        flow_time=rand(1),
        distillation_noise=randn(size.flat),
        next=TensorDict(
            observation=randn(size.observation),
            reward=randn(1),
            terminated=rand(1) < 0.3,
            batch_size=shape,
        ),
        batch_size=shape,
    )
