"""MOPO and MOBILE: imagined rollouts of an ensemble, penalties, and the joint update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, error, linear_leaves
from replay_qc import stacked_leaves
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import (
    ChunkedSACLoss,
    ChunkedWorldModelLoss,
    RewardPenalty,
    deviation_penalty,
    value_penalty,
)
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "loss": 1e-4,
    "rollout": 1e-3,
    "penalty": 1e-3,
    "gradient": 1e-3,
    "parameter": 1e-5,
}
LOSSES = {
    "dynamics": "loss_dynamics",
    "success": "loss_termination",
    "reward": "loss_reward",
    "actor": "loss_actor",
    "lam": "loss_alpha",
    "critic": "loss_qvalue",
}
KEYS = {"observations": "observation", "value_goals": "value_goal", "actor_goals": "actor_goal"}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is one of these agents'."""
    return config.get("agent_name") in ("mopo", "mobile")


class Part(nn.Module):
    """A loss on a part of the batch: the model's on real rows, actor's and critics' on all."""

    def __init__(self, loss: nn.Module, part: str) -> None:
        super().__init__()
        self.loss, self.part = loss, part

    @property
    def out_keys(self) -> list[str]:
        return self.loss.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.loss(tensordict.get(self.part))


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture) -> None:
        config = self.config = fixture.config
        names = ("dynamics", "success", "reward", "actor", "critic")
        self.networks: dict[str, Any] = {name: _network(fixture, name) for name in names}
        nets = self.networks
        goal = ["goal"] if fixture.keys("step0/real_batch/value_goals") else []
        self.world_model = EnsembleWorldModel(
            GaussianEnsemble(nets["dynamics"], log_std_bounds=(-5.0, 1.0)),
            nets["reward"],
            nets["success"],
            goal_key=goal[0] if goal else None,
            negative_reward=config["gc_negative"] if goal else None,
        )
        policy = TanhGaussianPolicy(
            nets["actor"],
            config["action_dim"],
            log_std_bounds=(-5.0, 2.0),
            in_keys=["observation", *goal, "noise"],
        )
        self.actor = PolicyActor(policy)
        self.is_goal_conditioned = bool(goal)
        gamma = config["discount"]
        self.sac = ChunkedSACLoss(
            policy,
            QValueEnsemble(
                nets["critic"],
                q_aggregation=config["q_agg"],
                in_keys=["observation", *goal, "action"],
            ),
            target_entropy=config["target_entropy"],
            target_range=(-1 / (1 - gamma), 0.0) if goal else None,
        )
        self.sac.make_value_estimator(gamma=gamma)
        self.sac.log_alpha.data.copy_(fixture["params0/lam/log_value"])
        updater = SoftUpdate(self.sac, tau=config["tau"])
        for name in [*names, "target_critic"]:
            for leaf, tensor in self.parameters(name).items():
                tensor.data.copy_(fixture[f"params0/{name}/{leaf}"])
        losses = {
            "world_model": Part(ChunkedWorldModelLoss(self.world_model), "real"),
            "sac": Part(self.sac, "mixed"),
        }
        parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
        self.update = LossUpdate(losses, torch.optim.Adam(parameters, lr=config["lr"]), updater)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """A network's parameters under the fixture's names and layouts, as views."""
        if name == "target_critic":
            target = self.sac.target_qvalue_network_params.flatten_keys(".")
            found = {key.removeprefix("network."): value for key, value in target.items()}
            return stacked_leaves(self.networks["critic"], found)
        found = {key: p.detach() for key, p in self.networks[name].named_parameters()}
        return self.leaves(name, found)

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        params = dict(self.networks[name].named_parameters())
        return self.leaves(name, {key: p.grad for key, p in params.items()})

    def leaves(self, name: str, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        network = self.networks[name]
        if isinstance(network, StackedMLP):
            return stacked_leaves(network, params)
        leaves = linear_leaves(network.layers, params)
        if name == "actor":  # means and log-deviations are one layer here
            for leaf in ("kernel", "bias"):
                both = leaves.pop(f"Dense_{len(network.num_cells)}/{leaf}").chunk(2, -1)
                leaves[f"mean_net/{leaf}"], leaves[f"log_std_net/{leaf}"] = both
        return leaves

    def penalty(self, fixture: Fixture, step: str, fake: TensorDictBase) -> torch.Tensor:
        """How far the imagined rows are to be trusted."""
        if self.config["agent_name"] == "mopo":
            return deviation_penalty(self.world_model, fake)
        return value_penalty(
            self.sac,
            self.world_model,
            fake,
            model_noise=fixture[f"{step}/noise/penalty_model_eps"],
            actor_noise=fixture[f"{step}/noise/penalty_actor_eps"],
        )


def rows(fixture: Fixture, prefix: str) -> TensorDict:
    """Stored transitions in the layout of the replay buffer."""
    masks = fixture[f"{prefix}/masks"].unsqueeze(-1)
    found = {
        key: fixture[f"{prefix}/{name}"]
        for name, key in KEYS.items()
        if f"{prefix}/{name}" in fixture.arrays
    }
    return TensorDict(
        **found,
        action=fixture[f"{prefix}/actions"],
        next=TensorDict(
            observation=fixture[f"{prefix}/next_observations"],
            reward=fixture[f"{prefix}/rewards"].unsqueeze(-1),
            terminated=masks == 0,
            done=masks == 0,
        ),
    ).auto_batch_size_(1)


def imagine(agent: Agent, fixture: Fixture) -> dict[str, torch.Tensor]:
    """The rollout from the stored starts with the stored noises, flattened step after step."""
    noise = {name: fixture[f"rollout/noise/{name}"] for name in ("actor_eps", "model_eps")}
    members = fixture["rollout/noise/member"].long()
    state = TensorDict(observation=fixture["rollout/start/observations"])
    if agent.is_goal_conditioned:
        state["goal"] = fixture["rollout/start/value_goals"]
    state.auto_batch_size_(1)
    steps = []
    for k, member in enumerate(members):
        td = agent.actor(state.clone().set("noise", noise["actor_eps"][k]))
        td["member"] = member
        td["model_noise"] = noise["model_eps"][k, member, torch.arange(len(member))]
        steps.append(agent.world_model(td))
        state = state.clone().set("observation", td["next", "observation"])
    rollout = torch.cat(steps)
    return {
        "observations": rollout["observation"],
        "actions": rollout["action"],
        "next_observations": rollout["next", "observation"],
        "rewards": rollout["next", "reward"].squeeze(-1),
        "masks": 1 - rollout["next", "terminated"].squeeze(-1).float(),
    }


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs the rollout and every stored update; returns ``{kind: {array: largest error}}``."""
    fixture = Fixture(path, case)
    agent = Agent(fixture)
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}

    def note(kind: str, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        found = error(ours.detach(), theirs, 1.0 if kind == "loss" else 0.0)
        errors[kind][name] = max(errors[kind].get(name, 0.0), found)

    if fixture.keys("rollout/official/"):  # that of a goal-conditioned MOPO crashes
        with torch.no_grad():
            for name, ours in imagine(agent, fixture).items():
                note("rollout", name, ours, fixture[f"rollout/official/{name}"])
    for k in range(fixture.steps):
        step = f"step{k}"
        real, fake = (rows(fixture, f"{step}/{part}_batch") for part in ("real", "fake"))
        seen = fake.clone()
        if agent.is_goal_conditioned:
            seen["goal"] = seen["value_goal"]
        penalty = agent.penalty(fixture, step, seen)
        note("penalty", "penalty", penalty, fixture[f"{step}/official/penalty"])
        lower = RewardPenalty(lambda _, found=penalty: found, agent.config["beta"])
        mixed = torch.cat([real, lower(fake)])
        note(
            "penalty",
            "mixed_rewards",
            mixed["next", "reward"].squeeze(-1),
            fixture[f"{step}/explicit/mixed_rewards"],
        )
        mixed["actor_noise"] = fixture[f"{step}/noise/actor_eps"]
        mixed["next_noise"] = fixture[f"{step}/noise/critic_eps"]
        metrics = agent.update(TensorDict(real=real, mixed=mixed))
        for name, key in LOSSES.items():
            note("loss", name, metrics[key], fixture[f"{step}/official/loss/{name}"])
        total = sum(metrics[key] for key in LOSSES.values())
        note("loss", "total", total, fixture[f"{step}/official/loss/total"])
        for name in agent.networks:
            for leaf, ours in agent.gradients(name).items():
                theirs = fixture[f"{step}/grad/{name}/{leaf}"]
                note("gradient", f"{name}/{leaf}", ours, theirs)
        for name in [*agent.networks, "target_critic"]:
            for leaf, ours in agent.parameters(name).items():
                theirs = fixture[f"{step}/params_after/{name}/{leaf}"]
                note("parameter", f"{name}/{leaf}", ours, theirs)
        theirs = fixture[f"{step}/params_after/lam/log_value"]
        note("parameter", "lam/log_value", agent.sac.log_alpha, theirs)
    return errors


def _network(fixture: Fixture, name: str) -> NormedMLP | StackedMLP:
    prefix = f"params0/{name}"
    kernels = []
    while f"{prefix}/Dense_{len(kernels)}/kernel" in fixture.arrays:
        kernels.append(fixture[f"{prefix}/Dense_{len(kernels)}/kernel"])
    outputs = kernels[-1].shape[-1]
    if name == "actor":
        outputs = 2 * fixture.config["action_dim"]
    else:
        *kernels, _ = kernels
    sizes = (kernels[0].shape[-2], outputs, [kernel.shape[-1] for kernel in kernels])
    norm = {"layer_norm": bool(fixture.keys(f"{prefix}/LayerNorm_0/"))}
    if kernels[0].ndim == 2:
        return NormedMLP(*sizes, **norm)
    return StackedMLP(kernels[0].shape[0], *sizes, broadcast=True, **norm)
