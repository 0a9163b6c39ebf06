"""GCIQL and n-step GCSAC+BC: goal-conditioned critics, in sample and with an actor's actions.

The released windows count one that the end of an episode cuts short as a success. The fixture's
``corrected`` updates are those of windows that reach their goal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, difference, error, linear_leaves
from replay_qc import stacked_leaves
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    GaussianPolicy,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedSACLoss, DDPGBCLoss, InSampleValueLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "loss": 1e-5,
    "target": 1e-5,
    "gradient": 3e-5,
    "parameter": 1e-5,
    "target_parameter": 1e-6,
    "action": 1e-5,
}
LOSSES = {
    "gciql": {"value": "loss_value", "critic": "loss_qvalue", "actor": "loss_actor"},
    "ngcsacbc": {"critic": "loss_qvalue"},
}
HEADS = ("mean_net", "log_std_net")
STATE = ["observation", "goal"]


def accepts(case: str, config: dict) -> bool:
    """Whether a case is one of these agents', not windows of their data alone."""
    return config.get("agent_name") in LOSSES and not case.startswith("probe/")


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture) -> None:
        config = self.config = fixture.config
        names = [name for name in ("value", "critic", "actor") if fixture.keys(f"params0/{name}/")]
        self.networks: dict[str, Any] = {name: _network(fixture, name) for name in names}
        self.heads = [head for head in HEADS if fixture.keys(f"params0/actor/{head}/")]
        self.is_implicit = config["agent_name"] == "gciql"
        self.losses = self._implicit() if self.is_implicit else self._soft(fixture)
        self.values = self.losses["values"]
        self.values.make_value_estimator(gamma=config["discount"])
        updater = SoftUpdate(self.values, tau=config["tau"])
        for name in [*names, "target_critic"]:
            for leaf, tensor in self.parameters(name).items():
                tensor.data.copy_(fixture[f"params0/{name}/{leaf}"])
        parameters = [p for loss in self.losses.values() for p in loss.parameters()]
        adam = torch.optim.Adam(parameters, lr=config["lr"])
        self.update = LossUpdate(self.losses, adam, updater)

    def _implicit(self) -> dict[str, Any]:
        config, nets = self.config, self.networks
        value, qvalue = ValueOperator(nets["value"], in_keys=STATE), self._qvalue("min")
        policy = GaussianPolicy(
            nets["actor"], nets["actor"].out_features, in_keys=[*STATE, "noise"]
        )
        self.actor = PolicyActor(policy)
        values = InSampleValueLoss(
            value, qvalue, expectile=config["expectile"], critic_reduction="sum"
        )
        return {"values": values, "actor": DDPGBCLoss(policy, qvalue, alpha=config["alpha"])}

    def _soft(self, fixture: Fixture) -> dict[str, Any]:
        config, network = self.config, self.networks["actor"]
        policy = TanhGaussianPolicy(
            network,
            network.out_features // 2,
            log_std_bounds=(-5.0, 2.0),
            in_keys=[*STATE, "noise"],
        )
        self.actor = PolicyActor(policy)
        loss = ChunkedSACLoss(
            policy,
            self._qvalue(config["q_agg"]),
            target_entropy=config["target_entropy"],
            bc_alpha=config["alpha"],
            bc="squared",
            loss_function=config["value_loss"],
        )
        loss.log_alpha.data.copy_(fixture["params0/lam/log_value"])
        return {"values": loss}

    def _qvalue(self, aggregation: Any) -> QValueEnsemble:
        keys = [*STATE, "action"]
        return QValueEnsemble(self.networks["critic"], q_aggregation=aggregation, in_keys=keys)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """A network's parameters under the fixture's names and layouts, as views."""
        if name == "lam":
            return {"log_value": self.values.log_alpha.detach()}
        if name == "target_critic":
            target = self.values.target_qvalue_network_params.flatten_keys(".")
            found = {key.removeprefix("network."): value for key, value in target.items()}
            return stacked_leaves(self.networks["critic"], found)
        found = {key: p.detach() for key, p in self.networks[name].named_parameters()}
        return self._leaves(name, found)

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        """A network's gradients, likewise."""
        if name == "lam":
            return {"log_value": self.values.log_alpha.grad}
        params = dict(self.networks[name].named_parameters())
        return self._leaves(name, {key: p.grad for key, p in params.items()})

    def _leaves(self, name: str, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        network = self.networks[name]
        if isinstance(network, StackedMLP):
            return stacked_leaves(network, params)
        leaves = linear_leaves(network.layers, params)
        if name == "actor":  # its heads are one layer here
            for leaf in ("kernel", "bias"):
                both = leaves.pop(f"Dense_{len(network.num_cells)}/{leaf}")
                parts = both.chunk(len(self.heads), -1)
                leaves |= {f"{head}/{leaf}": part for head, part in zip(self.heads, parts)}
        return leaves

    def batch(self, fixture: Fixture, step: str, corrected: bool) -> TensorDict:
        """The stored transitions in the layout of the replay buffer, with the stored noises."""
        batch, high = f"{step}/batch", "" if self.is_implicit else "high_value_"
        outcome = f"{step}/corrected" if corrected else batch
        ended = fixture[f"{outcome}/{high}masks"].unsqueeze(-1) == 0
        td = TensorDict(
            observation=fixture[f"{batch}/observations"],
            action=fixture[f"{batch}/actions"],
            value_goal=fixture[f"{batch}/{high or 'value_'}goals"],
            actor_goal=fixture[f"{batch}/{'' if self.is_implicit else 'high_'}actor_goals"],
            next=TensorDict(
                observation=fixture[f"{batch}/{high}next_observations"],
                reward=fixture[f"{outcome}/{high}rewards"].unsqueeze(-1),
                terminated=ended,
                done=ended,
            ),
        )
        if not self.is_implicit:
            td["steps_to_next_obs"] = fixture[f"{batch}/high_value_subgoal_steps"].unsqueeze(-1)
            td["next_noise"] = fixture[f"{step}/noise/critic_eps"]
            td["actor_noise"] = fixture[f"{step}/noise/actor_eps"]
        return td.auto_batch_size_(1)

    def act(self, fixture: Fixture, temperature: float) -> torch.Tensor:
        """The actions in the stored states, for the stored noise."""
        td = TensorDict(observation=fixture["eval/observations"], goal=fixture["eval/goals"])
        td["noise"] = temperature * fixture["eval/noise"]
        with torch.no_grad():
            return self.actor(td.auto_batch_size_(1))["action"]


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest error}}``."""
    fixture = Fixture(path, case)
    errors = compare(fixture)
    if fixture.keys("step0/corrected/"):
        for kind, found in compare(fixture, corrected=True).items():
            errors[kind] |= found
    return errors


def compare(fixture: Fixture, corrected: bool = False) -> dict[str, dict[str, float]]:
    """The errors of the released updates, or of those of windows that reach their goal."""
    agent, prefix = Agent(fixture), "corrected/" if corrected else ""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    trained = [*agent.networks, *([] if agent.is_implicit else ["lam"])]

    def note(kind: str, name: str, found: float) -> None:
        errors[kind][prefix + name] = max(errors[kind].get(prefix + name, 0.0), found)

    for k in range(fixture.steps):
        step = f"step{k}"
        data = agent.batch(fixture, step, corrected)
        target = f"{step}/corrected/" if corrected else f"{step}/explicit/"
        ours = agent.values.target(data)
        note("target", "critic_target", error(ours, fixture[f"{target}critic_target"], 1.0))
        metrics = agent.update(data)
        losses = {name: metrics[key] for name, key in LOSSES[fixture.config["agent_name"]].items()}
        losses["total"] = sum(value for key, value in metrics.items() if key.startswith("loss_"))
        if not agent.is_implicit:  # their cloning is a part of the actor's term here
            losses["actor_total"] = metrics["loss_actor"] + metrics["loss_alpha"]
            losses["lam"], losses["entropy"] = metrics["loss_alpha"], metrics["entropy"]
        official = f"{step}/{'corrected' if corrected else 'official'}/loss"
        for name, ours in losses.items():
            note("loss", name, error(ours, fixture[f"{official}/{name}"], 1.0))
        if corrected:
            continue
        for name in trained:
            grads = fixture.keys(f"{step}/grad/{name}/")
            largest = max(float(fixture[key].abs().max()) for key in grads)
            for leaf, ours in agent.gradients(name).items():
                theirs = fixture[f"{step}/grad/{name}/{leaf}"]
                note("gradient", f"{name}/{leaf}", error(ours, theirs, largest))
        for name in [*trained, "target_critic"]:
            kind = "target_parameter" if name == "target_critic" else "parameter"
            for leaf, ours in agent.parameters(name).items():
                theirs = fixture[f"{step}/params_after/{name}/{leaf}"]
                note(kind, f"{name}/{leaf}", difference(ours, theirs))
    if not corrected:
        for temperature in (0, 1):
            name = f"temp{temperature}"
            theirs = fixture[f"eval/official_action_{name}"]
            note(
                "action", f"temp{temperature}", difference(agent.act(fixture, temperature), theirs)
            )
    return errors


def _network(fixture: Fixture, name: str) -> NormedMLP | StackedMLP:
    prefix = f"params0/{name}"
    kernels = []
    while f"{prefix}/Dense_{len(kernels)}/kernel" in fixture.arrays:
        kernels.append(fixture[f"{prefix}/Dense_{len(kernels)}/kernel"])
    heads = [key for head in HEADS for key in fixture.keys(f"{prefix}/{head}/kernel")]
    outputs = sum(fixture[key].shape[-1] for key in heads)
    if not heads:
        *kernels, last = kernels
        outputs = last.shape[-1]
    sizes = (kernels[0].shape[-2], outputs, [kernel.shape[-1] for kernel in kernels])
    norm = {"layer_norm": bool(fixture.keys(f"{prefix}/LayerNorm_0/"))}
    if kernels[0].ndim == 2:
        return NormedMLP(*sizes, **norm)
    return StackedMLP(kernels[0].shape[0], *sizes, broadcast=True, **norm)
