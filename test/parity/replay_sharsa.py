"""SHARSA's updates and acting, on batches that our sampler and storage make.

The released windows succeed where an episode ends (see replay_goal_windows.py); ``corrected`` has
the losses of those that do not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, difference, error, linear_leaves
from replay_goal_windows import GoalWindows, window_errors
from replay_qc import stacked_leaves
from tensordict import TensorDict, TensorDictBase
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
    SubgoalActor,
)
from torchrl_mac.objectives import FlowBCLoss, InSampleValueLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "window": 0.0,
    "reward": 1e-6,
    "loss": 1e-5,
    "target": 1e-5,
    "gradient": 1e-4,
    "parameter": 1e-5,
    "target parameter": 1e-6,
    "action": 1e-4,
}
LOSSES = {
    "high_value": "loss_value",
    "high_critic": "loss_qvalue",
    "high_actor": "high/loss_flow",
    "low_actor": "low/loss_flow",
}
TARGET = "target_high_critic"


def accepts(case: str, config: dict) -> bool:
    """Whether a case is this agent's."""
    return config.get("agent_name") == "sharsa" and not case.startswith("probe/")


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture) -> None:
        config = fixture.config
        names = [name for name in fixture.modules("params0") if name != TARGET]
        self.networks = {name: make_network(fixture, name) for name in names}
        nets, state, steps = self.networks, ["observation", "goal"], config["flow_steps"]
        proposals = FlowMatchingPolicy(
            nets["high_actor_flow"],
            config["goal_dim"],
            steps,
            low=-math.inf,
            high=math.inf,
            in_keys=[*state, "subgoal_noise"],
            out_keys=["subgoal"],
        )
        policy = FlowMatchingPolicy(
            nets["low_actor_flow"],
            config["action_dim"],
            steps,
            in_keys=["observation", "subgoal", "noise"],
        )
        critics, on_the_way = nets["high_critic"], ("subgoal", "value_goal")
        self.values = InSampleValueLoss(
            ValueOperator(nets["high_value"], in_keys=state),
            QValueEnsemble(critics, q_aggregation=config["q_agg"], in_keys=[*state, on_the_way]),
            expectile=None if config["expectile"] == 0.5 else config["expectile"],
            loss_function="bce",
            critic_reduction="sum",
        )
        self.values.set_keys(action=on_the_way)
        self.values.make_value_estimator(gamma=config["discount"])
        losses = {
            "values": self.values,
            "high": FlowBCLoss(proposals),
            "low": FlowBCLoss(policy),
        }
        losses["high"].set_keys(
            action=("subgoal", "actor_goal"), flow_noise="high_x0", flow_time="high_t"
        )
        losses["low"].set_keys(
            goal="subgoal", actor_goal="low_actor_goal", flow_noise="low_x0", flow_time="low_t"
        )
        self.actor = SubgoalActor(
            FlowRejectionActor(
                proposals,
                QValueEnsemble(critics, q_aggregation="min", in_keys=[*state, "subgoal"]),
                num_candidates=config["num_samples"],
                action_key="subgoal",
                noise_key="subgoal_noise",
            ),
            policy,
        )
        updater = SoftUpdate(self.values, tau=config["tau"])
        for name in [*names, TARGET]:
            for leaf, tensor in self.parameters(name).items():
                tensor.data.copy_(fixture[f"params0/{name}/{leaf}"])
        parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
        self.update = LossUpdate(losses, torch.optim.Adam(parameters, lr=config["lr"]), updater)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """A network's parameters under the fixture's names and layouts, as views."""
        if name == TARGET:
            target = self.values.target_qvalue_network_params.flatten_keys(".")
            found = {key.removeprefix("network."): value for key, value in target.items()}
            return leaves_of(self.networks["high_critic"], found)
        network = self.networks[name]
        return leaves_of(network, {key: p.detach() for key, p in network.named_parameters()})

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        network = self.networks[name]
        return leaves_of(network, {key: p.grad for key, p in network.named_parameters()})


def make_network(fixture: Fixture, name: str) -> NormedMLP | StackedMLP:
    """A network of the sizes of a fixture's."""
    prefix = f"params0/{name}"
    count = len({key.split("/")[2] for key in fixture.keys(f"{prefix}/Dense_")})
    kernels = [fixture[f"{prefix}/Dense_{i}/kernel"] for i in range(count)]
    sizes = (kernels[0].shape[-2], kernels[-1].shape[-1], [k.shape[-1] for k in kernels[:-1]])
    layer_norm = bool(fixture.keys(f"{prefix}/LayerNorm_0/"))
    if kernels[0].ndim == 2:
        return NormedMLP(*sizes, layer_norm=layer_norm)
    return StackedMLP(len(kernels[0]), *sizes, broadcast=True, layer_norm=layer_norm)


def leaves_of(network: Any, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's tensors under the fixture's names and layouts."""
    if isinstance(network, StackedMLP):
        return stacked_leaves(network, params)
    return linear_leaves(network.layers, params)


def with_noise(batch: TensorDictBase, fixture: Fixture, step: str) -> TensorDictBase:
    """A batch with the noises of a step, under their own names."""
    for key in fixture.keys(f"{step}/noise/"):
        batch[key.rpartition("/")[2]] = fixture[key]
    return batch


def compare(
    agent: Agent, fixture: Fixture, windows: GoalWindows, source: str = "official"
) -> dict[str, dict[str, float]]:
    """Runs every stored update of a fixture, against what ``source`` has made of it."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    of_source = "" if source == "official" else f"{source}/"

    def note(kind: str, name: str, found: float) -> None:
        errors[kind][of_source + name] = max(errors[kind].get(of_source + name, 0.0), found)

    for k in range(fixture.steps):
        step = f"step{k}"
        batch = with_noise(windows.batch(f"{step}/"), fixture, step)
        theirs = fixture[f"{step}/{of_source or 'explicit/'}critic_target"]
        note("target", "critic", error(agent.values.target(batch), theirs, 1.0))
        metrics = agent.update(batch)
        for name, key in LOSSES.items():
            theirs = fixture[f"{step}/{source}/loss/{name}"]
            note("loss", name, error(metrics[key], theirs, 1.0))
        total = sum(metrics[key] for key in LOSSES.values())
        note("loss", "total", error(total, fixture[f"{step}/{source}/loss/total"], 1.0))
        if of_source:  # of the losses alone
            continue
        for name in agent.networks:
            for leaf, ours in agent.gradients(name).items():
                theirs = fixture[f"{step}/grad/{name}/{leaf}"]
                note("gradient", f"{name}/{leaf}", error(ours, theirs))
        for name in [*agent.networks, TARGET]:
            kind = "target parameter" if name == TARGET else "parameter"
            for leaf, ours in agent.parameters(name).items():
                theirs = fixture[f"{step}/params_after/{name}/{leaf}"]
                note(kind, f"{name}/{leaf}", difference(ours, theirs))
    return errors


def act(agent: Agent, fixture: Fixture) -> dict[str, float]:
    """How far subgoals, their values, the choice and the action are from the stored ones."""
    td = TensorDict(
        observation=fixture["eval/observations"],
        goal=fixture["eval/goals"],
        subgoal_noise=fixture["eval/high_noise"],
        noise=fixture["eval/low_noise"],
    )
    with torch.no_grad():
        candidates = agent.actor.subgoal_actor.candidates(td.clone())
        td = agent.actor(td)
    ours = {
        "subgoals": candidates["subgoal"],
        "q": candidates["state_action_value"].squeeze(-1),
        "chosen_subgoal": td["subgoal"],
        "action": td["action"],
        "official_action": td["action"],
    }
    return {name: error(value, fixture[f"eval/{name}"], 1.0) for name, value in ours.items()}


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Makes every batch, runs every update, and acts; returns ``{kind: {array: error}}``."""
    fixture = Fixture(path, case)
    released = Agent(fixture)
    errors = compare(released, fixture, GoalWindows(path, fixture, truncation_is_success=True))
    errors["action"] = act(released, fixture)
    corrected = compare(Agent(fixture), fixture, GoalWindows(path, fixture), "corrected")
    for kind, found in corrected.items():
        errors[kind] |= found
    for k in range(fixture.steps):
        for kind, found in window_errors(path, fixture, f"step{k}/").items():
            errors.setdefault(kind, {}).update({f"step{k}/{n}": e for n, e in found.items()})
    return errors
