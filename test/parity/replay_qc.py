"""The updates of the Q-chunking agents: best of N, one-step flow and tanh-Gaussian actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, difference, error, linear_leaves
from replay_windows import arrays, column_of, rows_of, sampler_and_storage, windows
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedQValueLoss, ChunkedSACLoss, FlowBCLoss, FQLLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "window": 1e-6,
    "loss": 1e-5,
    "gradient": 2e-5,
    "parameter": 2e-6,
    "target": 5e-7,
    "action": 1e-5,
}
NOISES = {
    "next_noise": "next_noise",
    "flow_x0": "flow_noise",
    "flow_t": "flow_time",
    "distill_noise": "actor_noise",
    "actor_noise": "actor_noise",
}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is one of these agents'."""
    return config.get("agent_name") in ("acfql", "acrlpd")


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture) -> None:
        config = self.config = fixture.config
        self.horizon = config["horizon_length"]
        self.chunk_size = self.horizon if config["action_chunking"] else 1
        action_dim = self.chunk_size * config["action_dim"]
        self.is_gaussian = config["agent_name"] == "acrlpd"
        activation = "relu" if self.is_gaussian else "gelu"
        self.networks: dict[str, Any] = {}
        for name in ("actor", "actor_bc_flow", "actor_onestep_flow", "critic"):
            if name in fixture.modules("params0"):
                self.networks[name] = _network(
                    fixture, name, activation_class=activation, norm_first=self.is_gaussian
                )
        qvalue = QValueEnsemble(self.networks["critic"], q_aggregation=config["q_agg"])
        self.log_alpha: torch.Tensor | None = None
        losses: dict[str, Any]
        if self.is_gaussian:
            policy = TanhGaussianPolicy(self.networks["actor"], action_dim)
            critic = ChunkedSACLoss(
                policy,
                qvalue,
                target_entropy=config["target_entropy"],
                bc_alpha=config["bc_alpha"],
            )
            self.log_alpha = critic.log_alpha
            critic.log_alpha.data.copy_(fixture["params0/alpha/log_temp"])
            losses = {"critic": critic}
            self.actor = PolicyActor(policy)
        else:
            flow = FlowMatchingPolicy(
                self.networks["actor_bc_flow"], action_dim, config["flow_steps"]
            )
            if config["actor_type"] == "best-of-n":
                del self.networks["actor_onestep_flow"]  # which is neither trained nor used
                candidates = config["actor_num_samples"]
                self.actor = FlowRejectionActor(flow, qvalue, num_candidates=candidates)
                critic = ChunkedQValueLoss(self.actor, qvalue)
                losses = {"behaviour": FlowBCLoss(flow), "critic": critic}
            else:
                policy = OneStepPolicy(self.networks["actor_onestep_flow"], action_dim)
                critic = FQLLoss(flow, policy, qvalue, alpha=config["alpha"])
                losses = {"critic": critic}
                self.actor = PolicyActor(policy)
        self.critic = critic
        self.critic.make_value_estimator(gamma=config["discount"])
        updater = SoftUpdate(self.critic, tau=config["tau"])
        for name in [*self.networks, "target_critic"]:
            for leaf, tensor in self.parameters(name).items():
                tensor.data.copy_(fixture[f"params0/{name}/{leaf}"])
        parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
        self.update = LossUpdate(losses, torch.optim.Adam(parameters, lr=config["lr"]), updater)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """A network's parameters under the fixture's names and layouts, as views."""
        if name == "target_critic":
            target = self.critic.target_qvalue_network_params.flatten_keys(".")
            found = {key.removeprefix("network."): value for key, value in target.items()}
            return _leaves(self.networks["critic"], found)
        found = {key: p.detach() for key, p in self.networks[name].named_parameters()}
        return _leaves(self.networks[name], found)

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        network = self.networks[name]
        return _leaves(network, {key: p.grad for key, p in network.named_parameters()})

    def batch(self, fixture: Fixture, step: str, transitions: dict[str, Any]) -> TensorDict:
        """What our sampler makes of the transitions at a step's starts, with the step's noises."""
        stored = {
            name: fixture.arrays[f"{step}/batch/{name}"] for name in ("start_idxs", "rewards")
        }
        column = column_of(transitions, stored)
        _, storage = sampler_and_storage(
            self.chunk_size,
            self.horizon,
            self.config["discount"],
            rows_of(transitions, column),
        )
        batch = windows(storage, stored["start_idxs"], self.chunk_size)
        if not self.config["action_chunking"]:
            del batch["valid"]  # which is True of all first actions
        for name, key in NOISES.items():
            if f"{step}/noise/{name}" in fixture.arrays:
                batch[key] = fixture[f"{step}/noise/{name}"]
        return batch

    def act(self, observation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The action, flat, for given noise."""
        td = TensorDict(observation=observation, noise=noise)
        return self.actor(td.auto_batch_size_(observation.ndim - 1))["action"]


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest error}}``."""
    fixture, transitions = Fixture(path, case), arrays(path, "data/transitions")
    agent = Agent(fixture)
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}

    def note(kind: str, name: str, found: float) -> None:
        errors[kind][name] = max(errors[kind].get(name, 0.0), found)

    for k in range(fixture.steps):
        step = f"step{k}"
        data = agent.batch(fixture, step, transitions)
        for name, found in _differences(data, fixture, step).items():
            note("window", name, found)
        with torch.no_grad():
            chosen = agent.critic._next_action(data).flatten(1)
        note("action", "next", difference(chosen, fixture[f"{step}/explicit/next/action"]))
        target = agent.critic.target(data)
        note("loss", "target", error(target, fixture[f"{step}/explicit/target"], 1.0))
        with torch.no_grad():
            members = agent.critic.members(
                data.select("observation", "action"), agent.critic.qvalue_network_params
            )
        note("loss", "q_pred", error(members, fixture[f"{step}/explicit/q_pred"], 1.0))

        for name, ours in _losses(agent, agent.update(data), members).items():
            theirs = fixture[f"{step}/official/{name}"]
            note("loss", name, error(ours.detach(), theirs, 1.0))
        for name in agent.networks:
            for leaf, ours in agent.gradients(name).items():
                note(
                    "gradient", f"{name}/{leaf}", error(ours, fixture[f"{step}/grad/{name}/{leaf}"])
                )
        for name in [*agent.networks, "target_critic"]:
            kind = "target" if name == "target_critic" else "parameter"
            for leaf, ours in agent.parameters(name).items():
                theirs = fixture[f"{step}/params_after/{name}/{leaf}"]
                note(kind, f"{name}/{leaf}", difference(ours.detach(), theirs))
        if agent.log_alpha is not None:
            leaf = "alpha/log_temp"
            note("gradient", leaf, error(agent.log_alpha.grad, fixture[f"{step}/grad/{leaf}"]))
            theirs = fixture[f"{step}/params_after/{leaf}"]
            note("parameter", leaf, difference(agent.log_alpha.detach(), theirs))
    for name in ("eval_single", "eval_batch"):
        with torch.no_grad():
            action = agent.act(fixture[f"{name}/observations"], fixture[f"{name}/noise"])
        theirs = fixture[f"{name}/official_action"].reshape(action.shape)
        note("action", name, difference(action, theirs))
    return errors


def _losses(
    agent: Agent, metrics: TensorDictBase, members: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What an update has returned, and the values before it, under the fixture's names."""
    losses = {
        "critic/critic_loss": metrics["loss_qvalue"],
        "critic/q_mean": members.mean(),
        "critic/q_max": members.max(),
        "critic/q_min": members.min(),
        "loss_total": sum(value for key, value in metrics.items() if key.startswith("loss_")),
    }
    if agent.is_gaussian:
        losses |= {
            "actor/actor_loss": metrics["loss_actor"],
            "actor/alpha_loss": metrics["loss_alpha"],
            "actor/alpha": metrics["alpha"],
            "actor/entropy": metrics["entropy"],
        }
        if "loss_bc" in metrics.keys():
            losses["actor/bc_loss"] = metrics["loss_bc"]
    else:
        losses["actor/bc_flow_loss"] = metrics["loss_flow"]
        if "loss_actor" in metrics.keys():
            losses["actor/distill_loss"] = metrics["distillation_loss"].mean()
            losses["actor/actor_loss"] = metrics["loss_flow"] + metrics["loss_actor"]
    return losses


def _differences(data: TensorDict, fixture: Fixture, step: str) -> dict[str, float]:
    """How far a batch is from the stored one."""
    stored = {
        name: fixture[f"{step}/batch/{name}"]
        for name in ("observations", "actions", "next_observations", "rewards", "masks", "valid")
    }
    chunk = data["action"].unsqueeze(1) if data["action"].ndim == 2 else data["action"]
    following = data["next"]
    pairs = {
        "observation": (data["observation"], stored["observations"]),
        "action": (chunk, stored["actions"][:, : chunk.shape[1]]),
        "next_observation": (following["observation"], stored["next_observations"][:, -1]),
        "reward": (following["reward"], stored["rewards"][:, -1:]),
        "mask": (1 - following["terminated"].float(), stored["masks"][:, -1:]),
        "whole": (following["whole"].float(), stored["valid"][:, -1:]),
    }
    if "valid" in data.keys():
        valid = data["valid"].reshape(len(data), -1)
        pairs["valid"] = valid.float(), stored["valid"][:, : valid.shape[1]]
    return {name: error(ours, theirs, 1.0) for name, (ours, theirs) in pairs.items()}


def _network(fixture: Fixture, name: str, **kwargs: Any) -> NormedMLP | StackedMLP:
    """A network of the sizes of a fixture's."""
    prefix = f"params0/{name}"
    hidden = 0  # layers
    while f"{prefix}/Dense_{hidden}/kernel" in fixture.arrays:
        hidden += 1
    if name != "actor":
        hidden -= 1
    kernels = [fixture[f"{prefix}/Dense_{i}/kernel"] for i in range(hidden)]
    last = fixture[f"{prefix}/Dense_{'mean' if name == 'actor' else hidden}/kernel"]
    outputs = 2 * last.shape[-1] if name == "actor" else last.shape[-1]
    sizes = (kernels[0].shape[-2], outputs, [kernel.shape[-1] for kernel in kernels])
    kwargs["layer_norm"] = bool(fixture.keys(f"{prefix}/LayerNorm_0/"))
    if last.ndim == 2:
        return NormedMLP(*sizes, **kwargs)
    return StackedMLP(last.shape[0], *sizes, broadcast=True, **kwargs)


def _leaves(network: Any, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(network, StackedMLP):
        return stacked_leaves(network, params)
    leaves = linear_leaves(network.layers, params)
    if network.norm_first:  # a Gaussian actor: means and log-deviations are one layer here
        last = len(network.num_cells)
        for leaf in ("kernel", "bias"):
            both = leaves.pop(f"Dense_{last}/{leaf}")
            leaves[f"Dense_mean/{leaf}"], leaves[f"Dense_logstd/{leaf}"] = both.chunk(2, -1)
    return leaves


def stacked_leaves(network: StackedMLP, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of networks side by side under the fixture's names and layouts."""
    leaves = {}
    for i in range(len(network.weights)):
        leaves[f"Dense_{i}/kernel"] = params[f"weights.{i}"]
        leaves[f"Dense_{i}/bias"] = params[f"biases.{i}"].squeeze(1)
    for i in range(len(network.scales)):
        leaves[f"LayerNorm_{i}/scale"] = params[f"scales.{i}"].squeeze(1)
        leaves[f"LayerNorm_{i}/bias"] = params[f"shifts.{i}"].squeeze(1)
    return leaves
