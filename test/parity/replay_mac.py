"""MAC's updates, single-task and goal-conditioned, through this package's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, error, linear_leaves
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {"loss": 1e-4, "rollout": 1e-3, "return": 1e-3, "gradient": 1e-3, "parameter": 1e-5}
NOISES = {
    "flow_x0": "flow_noise",
    "flow_t": "flow_time",
    "distill_noise": "distillation_noise",
    "actor_noises": "actor_noise",
}
LOSSES = {
    "dynamics": "loss_dynamics",
    "flow": "loss_flow",
    "distill": "loss_distillation",
    "value": "loss_value",
    "critic": "loss_qvalue",
    "success": "loss_termination",
    "reward": "loss_reward",
}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is this agent's, single-task or goal-conditioned."""
    return config.get("agent_name") == "mac"


def has_goals(fixture: Fixture) -> bool:
    return bool(fixture.keys("step0/batch/value_goals"))


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture) -> None:
        config = self.config = fixture.config
        self.networks = {name: self.network(fixture, name) for name in fixture.modules("params0")}
        nets = self.networks
        target_network = nets.pop("target_value")
        goal = ["goal"] if has_goals(fixture) else []
        self.state = ["observation", *goal]
        value = ValueOperator(nets["value"], in_keys=self.state)
        self.qvalue = ValueOperator(nets["critic"], in_keys=[*self.state, "action"])
        world_model = ChunkedWorldModel(
            nets["dynamics"],
            nets["reward"],
            nets["success"],
            goal_key=goal[0] if goal else None,
            negative_reward=config.get("gc_negative", True) if goal else None,
        )
        behaviour = self.behaviour(fixture)
        self.value_expansion = self.expansion(
            value,
            self.qvalue,
            world_model,
            imagination_horizon=self.rollout_noise(fixture, "step0").shape[0],
            delay_value=config.get("target_network", True),
        )
        self.value_expansion.make_value_estimator(gamma=config["discount"], lmbda=config["lam"])
        losses = [behaviour, ChunkedWorldModelLoss(world_model), self.value_expansion]
        updater = None
        if self.value_expansion.delay_value:
            updater = SoftUpdate(self.value_expansion, tau=config["tau"])
            self._load(target_network, fixture, "target_value")
            targets = TensorDict.from_module(ValueOperator(target_network))
            self.value_expansion.target_value_network_params.data.update_(targets.data)
        for name, network in nets.items():
            self._load(network, fixture, name)
        parameters = [parameter for loss in losses for parameter in loss.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=config["lr"])
        self.update = LossUpdate(losses, optimizer, [updater] if updater else [])

    def network(self, fixture: Fixture, name: str) -> NormedMLP:
        """A network of the fixture's sizes."""
        kernels = [
            fixture[f"params0/{name}/Dense_{i}/kernel"]
            for i in range(len(fixture.keys(f"params0/{name}/Dense_")) // 2)
        ]
        return NormedMLP(
            kernels[0].shape[0],
            kernels[-1].shape[1],
            [kernel.shape[1] for kernel in kernels[:-1]],
            layer_norm=bool(fixture.keys(f"params0/{name}/LayerNorm_0/")),
        )

    def behaviour(self, fixture: Fixture) -> LossModule:
        """The loss of the policies; makes the actor of imagination."""
        config, nets, noisy = self.config, self.networks, [*self.state, "noise"]
        action_dim, steps = config["action_dim"], config["flow_steps"]
        flow = FlowMatchingPolicy(nets["actor_flow"], action_dim, steps, in_keys=noisy)
        student = OneStepPolicy(nets["actor_onestep_flow"], action_dim, in_keys=noisy)
        self.actor = FlowRejectionActor(
            student,
            self.qvalue,
            num_candidates=self.rollout_noise(fixture, "step0").shape[1],
            chunk_size=config["action_chunking"],
        )
        return FlowBCLoss(flow, student)

    def expansion(self, *networks: Any, **kwargs: Any) -> ValueExpansionLoss:
        """The loss of the values."""
        return ValueExpansionLoss(self.actor, *networks, **kwargs)

    def rollout_noise(self, fixture: Fixture, step: str) -> torch.Tensor:
        """The noise of imagination, ``[H, N, B, D]``."""
        return fixture[f"{step}/noise/rollout_noises"]

    losses = LOSSES

    def leaves(self, module: str, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A network's tensors under the fixture's names and layouts."""
        network = self.networks["value" if module == "target_value" else module]
        return linear_leaves(network.layers, params)

    def _load(self, network: NormedMLP, fixture: Fixture, module: str) -> None:
        params = {name: parameter.data for name, parameter in network.named_parameters()}
        for leaf, tensor in self.leaves(module, params).items():
            tensor.copy_(fixture[f"params0/{module}/{leaf}"])

    def parameters(self, module: str) -> dict[str, torch.Tensor]:
        if module == "target_value":
            target = self.value_expansion.target_value_network_params
            params = {k[len("module.") :]: v for k, v in target.flatten_keys(".").items()}
            return self.leaves(module, params)
        return self.leaves(module, dict(self.networks[module].named_parameters()))

    def gradients(self, module: str) -> dict[str, torch.Tensor]:
        params = dict(self.networks[module].named_parameters())
        return self.leaves(module, {name: p.grad for name, p in params.items()})


def batch(agent: Agent, fixture: Fixture, step: str) -> TensorDict:
    """A stored batch, with its noises, in the layout of the replay buffer."""
    data = {key: fixture[f"{step}/batch/{key}"] for key in ("observations", "next_observations")}
    chunk_size = fixture.config["action_chunking"]
    goals = ("value_goal", "actor_goal") if has_goals(fixture) else ()
    noise = agent.rollout_noise(fixture, step).movedim(-2, 0)
    stored = TensorDict(
        **{goal: fixture[f"{step}/batch/{goal}s"] for goal in goals},
        observation=data["observations"],
        action=fixture[f"{step}/batch/actions"].unflatten(-1, (chunk_size, -1)),
        noise=noise,
        next=TensorDict(
            observation=data["next_observations"],
            reward=fixture[f"{step}/batch/rewards"].unsqueeze(-1),
            terminated=fixture[f"{step}/batch/masks"].unsqueeze(-1) == 0,
        ),
    )
    for name, key in NOISES.items():
        if f"{step}/noise/{name}" in fixture.arrays:
            stored[key] = fixture[f"{step}/noise/{name}"]
    if "actor_noise" in stored.keys():
        stored["actor_noise"] = stored["actor_noise"].transpose(0, 1)
    return stored.auto_batch_size_(1)


def replay(path: str | Path, case: str = "st") -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest relative error}}``."""
    fixture = Fixture(path, case)
    return compare(Agent(fixture), fixture)


def compare(
    agent: Agent, fixture: Fixture, source: str = "official"
) -> dict[str, dict[str, float]]:
    """Runs every stored update of a fixture, against what ``source`` has made of it."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    of_source = "" if source == "official" else f"{source}/"

    def note(kind: str, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        name = of_source + name
        errors[kind][name] = max(errors[kind].get(name, 0.0), error(ours.detach(), theirs))

    for k in range(fixture.steps):
        step = f"step{k}"
        data, stored = batch(agent, fixture, step), f"{step}/{source}"
        rollout = agent.value_expansion.imagine(data)
        arrays = {
            "observations": rollout["observation"],
            "actions": rollout["action"].flatten(-2),
            "next_observations": rollout["next", "observation"],
            "rewards": rollout["next", "reward"].squeeze(-1),
            "masks": 1 - rollout["next", "terminated"].squeeze(-1).float(),
        }
        for name, ours in arrays.items():
            if f"{stored}/rollout_{name}" in fixture.arrays:
                theirs = fixture[f"{stored}/rollout_{name}"]
                note("rollout", name, ours.transpose(0, 1), theirs)
        returns = agent.value_expansion.value_target(rollout).squeeze(-1).T
        where = f"{stored}/rollout_returns"
        theirs = fixture[where if where in fixture.arrays else f"{stored}/gae/returns"]
        note("return", "returns", returns, theirs)

        metrics = agent.update(data)
        for name, key in agent.losses.items():
            note("loss", name, metrics[key], fixture[f"{stored}/loss/{name}"])
        total = sum(value for key, value in metrics.items() if key.startswith("loss_"))
        note("loss", "total", total, fixture[f"{stored}/loss/total"])
        changed = f"{step}/{of_source}"
        for module in agent.networks:
            for leaf, ours in agent.gradients(module).items():
                where = f"{changed}grad/{module}/{leaf}"
                if where in fixture.arrays or not of_source:
                    note("gradient", f"{module}/{leaf}", ours, fixture[where])
        modules = [*agent.networks, *(["target_value"] if agent.update.target_updaters else [])]
        for module in modules:
            for leaf, ours in agent.parameters(module).items():
                where = f"{changed}params_after/{module}/{leaf}"
                if where in fixture.arrays or not of_source:
                    note("parameter", f"{module}/{leaf}", ours, fixture[where])
    return errors
