"""MAC's ablations: a Gaussian behaviour, and a policy trained by FQL on imagined states.

The released MAC(FQL) discounts a chunk by ``gamma`` in the returns of V and by ``gamma**h`` in the
target of Q. Here both are ``gamma**h``, which the fixture's ``corrected`` updates are; the replay
of the released ones puts the other discount in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture
from replay_mac import LOSSES, TOLERANCES, Agent, compare
from tensordict import TensorDictBase
from torchrl.objectives import LossModule
from torchrl.objectives.value import TDLambdaEstimator

from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import FlowBCLoss, FQLExpansionLoss, GaussianBCLoss

__all__ = ["TOLERANCES", "accepts", "replay"]

OF_MAC = {name: key for name, key in LOSSES.items() if name not in ("flow", "distill")}
HEADS = {"mean_net": 0, "log_std_net": 1}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is one of these ablations'."""
    return config.get("agent_name") in ("mbrs_ac", "mbfql")


class GaussianAgent(Agent):
    """MAC(Gau)."""

    losses = {**OF_MAC, "bc_actor": "loss_bc"}  # noqa: RUF012

    def network(self, fixture: Fixture, name: str) -> NormedMLP:
        if name != "actor":
            return super().network(fixture, name)
        hidden = range(len(fixture.keys("params0/actor/Dense_")) // 2)
        kernels = [fixture[f"params0/actor/Dense_{i}/kernel"] for i in hidden]
        outputs = 2 * fixture.config["action_dim"]
        cells = [kernel.shape[1] for kernel in kernels]
        norm = bool(fixture.keys("params0/actor/LayerNorm_0/"))
        return NormedMLP(kernels[0].shape[0], outputs, cells, layer_norm=norm)

    def behaviour(self, fixture: Fixture) -> LossModule:
        policy = TanhGaussianPolicy(
            self.networks["actor"],
            self.config["action_dim"],
            log_std_bounds=(-5.0, 2.0),
            in_keys=[*self.state, "noise"],
        )
        self.actor = FlowRejectionActor(
            policy,
            self.qvalue,
            num_candidates=self.rollout_noise(fixture, "step0").shape[1],
            chunk_size=self.config["action_chunking"],
        )
        return GaussianBCLoss(policy)

    def rollout_noise(self, fixture: Fixture, step: str) -> torch.Tensor:
        return fixture[f"{step}/noise/rollout_eps"]

    def leaves(self, module: str, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        leaves = super().leaves(module, params)
        if module == "actor":  # means and log-deviations are one layer here
            last = len(self.networks["actor"].num_cells)
            for leaf in ("kernel", "bias"):
                both = leaves.pop(f"Dense_{last}/{leaf}").chunk(2, -1)
                leaves |= {f"{head}/{leaf}": both[place] for head, place in HEADS.items()}
        return leaves


class FQLAgent(Agent):
    """MAC(FQL), with one discount."""

    losses = {**OF_MAC, "bc_actor": "loss_flow", "actor": "loss_actor"}  # noqa: RUF012
    expansion_class = FQLExpansionLoss

    def behaviour(self, fixture: Fixture) -> LossModule:
        nets, config, noisy = self.networks, self.config, [*self.state, "noise"]
        action_dim, steps = config["action_dim"], config["flow_steps"]
        self.flow = FlowMatchingPolicy(nets["actor_bc_flow"], action_dim, steps, in_keys=noisy)
        student = OneStepPolicy(nets["actor_onestep_flow"], action_dim, in_keys=noisy)
        self.actor = PolicyActor(student, chunk_size=config["action_chunking"])
        return FlowBCLoss(self.flow)

    def expansion(self, *networks: Any, **kwargs: Any) -> FQLExpansionLoss:
        return self.expansion_class(
            self.flow,
            self.actor,
            *networks,
            alpha=self.config["alpha"],
            mean_over_rollout=True,
            **kwargs,
        )


class ReleasedFQLLoss(FQLExpansionLoss):
    """With the returns of V discounted by ``gamma`` for a chunk."""

    def value_target(self, rollout: TensorDictBase) -> torch.Tensor:
        own = self._value_estimator
        gamma = float(own.gamma) ** (1 / self.chunk_size)
        try:
            self._value_estimator = TDLambdaEstimator(
                gamma=gamma, lmbda=float(own.lmbda), value_network=None
            )
            self._forward_value_estimator_keys()
            return super().value_target(rollout)
        finally:
            self._value_estimator = own


class ReleasedFQLAgent(FQLAgent):
    expansion_class = ReleasedFQLLoss


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest relative error}}``."""
    fixture = Fixture(path, case)
    if fixture.config["agent_name"] == "mbrs_ac":
        return compare(GaussianAgent(fixture), fixture)
    errors = compare(ReleasedFQLAgent(fixture), fixture)
    for kind, found in compare(FQLAgent(fixture), fixture, "corrected").items():
        errors[kind] |= found
    return errors
