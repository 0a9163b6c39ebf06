"""FMPC's updates and planning, and the windows of data that it learns from.

The released code differs from ours, and the replay of it puts back what does: for goals, V's logit
in Q's target where its probability belongs (``corrected`` has that); for a task, labels of V that
are the returns of h + 1 later starts and broadcast against it (``corrected`` has the first one);
and a goal in the last row but one of an episode that does not count as reached later, though it
does in the reward (in ``corrected`` as well).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import replay_mac
import torch
from fixture import Fixture, difference, error
from tensordict import TensorDict, TensorDictBase
from torchrl.modules import ValueOperator

from torchrl_mac.data import ActionChunkStorage
from torchrl_mac.modules import FlowFutureModel, FlowMatchingPolicy, FuturePlanningActor
from torchrl_mac.objectives import FlowBCLoss, FutureModelLoss, FutureValueLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "window": 1e-6,
    "loss": 1e-5,
    "target": 1e-5,
    "gradient": 1e-4,
    "parameter": 1e-5,
    "plan": 1e-4,
}
LOSSES = {
    "dynamics": "loss_dynamics",
    "bc_actor": "loss_flow",
    "value": "loss_value",
    "critic": "loss_qvalue",
}
NOISES = {
    "dyn_x0": "future_noise",
    "dyn_t": "future_time",
    "act_x0": "flow_noise",
    "act_t": "flow_time",
}
FUTURE = ("future", "observation")


def accepts(case: str, config: dict) -> bool:
    """Whether a case is this agent's, single-task or goal-conditioned."""
    return config.get("agent_name") == "fmpc"


class ReleasedValueLoss(FutureValueLoss):
    """Learns all labels of a state, and bootstraps from logits."""

    def value_loss(self, tensordict: TensorDictBase) -> torch.Tensor:
        labels, value = tensordict["returns_to_go"], self._value(tensordict)
        terms = [self._difference(value, label, tensordict) for label in labels.split(1, -1)]
        return torch.stack(terms).mean()

    def next_value(self, tensordict: TensorDictBase) -> torch.Tensor:
        return self._value(tensordict, following=True)


class Agent(replay_mac.Agent):
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    def __init__(self, fixture: Fixture, values: type[FutureValueLoss] = FutureValueLoss) -> None:
        config = self.config = fixture.config
        self.networks = {name: self.network(fixture, name) for name in fixture.modules("params0")}
        for name, network in self.networks.items():
            self._load(network, fixture, name)
        goal = ["goal"] if replay_mac.has_goals(fixture) else []
        self.horizon = config["action_chunking"]
        nets, state, steps = self.networks, ["observation", *goal], config["flow_steps"]
        action_dim, future_dim = nets["actor_flow"].out_features, nets["dynamics_flow"].out_features
        noisy = [*state, "noise"]
        flow = FlowMatchingPolicy(nets["actor_flow"], action_dim, steps, in_keys=noisy)
        future_model = FlowFutureModel(nets["dynamics_flow"], future_dim, steps)
        value = ValueOperator(nets["value"], in_keys=state)
        qvalue = ValueOperator(nets["critic"], in_keys=[FUTURE, *goal, "action"])
        self.actor = FuturePlanningActor(
            flow, qvalue, future_model, num_candidates=config["num_samples"]
        )
        loss_function = "bce" if config["value_loss"] == "bce" else "l2"
        self.values = values(value, qvalue, horizon=self.horizon, loss_function=loss_function)
        self.values.make_value_estimator(gamma=config["discount"])
        losses = {
            "behaviour": FlowBCLoss(flow),
            "dynamics": FutureModelLoss(future_model),
            "values": self.values,
        }
        parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
        self.update = LossUpdate(losses, torch.optim.Adam(parameters, lr=config["lr"]))


def make_storage(data: dict[str, torch.Tensor], config: dict, goals: list[str]) -> Any:
    """The dataset as rows, sampled as FMPC does."""
    final = data["valids"] == 0
    rows = TensorDict(
        observation=data["observations"],
        action=data["actions"],
        oracle_rep=data["oracle_reps"],
        episode=final.long().cumsum(0) - final.long(),
        next=TensorDict(reward=data["rewards"].unsqueeze(-1)),
    ).auto_batch_size_(1)
    return ActionChunkStorage(
        rows,
        gamma=config["discount"],
        goal_keys=goals,
        goal_source="oracle_rep",
        negative_reward=False,
        future=True,
        return_gamma=1.0,
    )


def windows(
    fixture: Fixture, data: dict[str, torch.Tensor], step: str
) -> tuple[TensorDictBase, torch.Tensor]:
    """What our storage makes of a step's starts and goals, and the released labels ``[B, *]``."""
    config, horizon = fixture.config, fixture.config["action_chunking"]
    goals = ["value_goal", "actor_goal"] if replay_mac.has_goals(fixture) else []
    storage = make_storage(data, config, goals)
    start = torch.as_tensor(fixture.arrays[f"{step}/idx/start"])
    lines = start.unsqueeze(-1) + torch.arange(horizon + 1)
    rows = [torch.as_tensor(fixture.arrays[f"{step}/idx/{goal}"]) for goal in goals]
    batch = storage[torch.stack([*lines.unbind(1), *rows], 1)]
    chunk = batch["action"].reshape(len(start), horizon, -1)
    batch["action"] = chunk[:, : config["action_chunking_actor"]]
    if goals:
        is_last = (storage.episode_ends - 1).unsqueeze(0) == rows[0].unsqueeze(-1)
        batch["return_to_go"] = batch["return_to_go"] * ~is_last.any(1, keepdim=True)
        return batch, batch["return_to_go"]
    alone = make_storage(data, config, [])
    pairs = torch.stack([lines, lines + 1], -1).flatten(0, 1)  # a label needs one row to follow
    return batch, alone[pairs]["return_to_go"].reshape(lines.shape)


def compare_windows(
    batch: TensorDictBase, labels: torch.Tensor, fixture: Fixture, step: str
) -> dict[str, float]:
    """How far a batch is from the stored one."""
    stored = {
        "observations": batch["observation"],
        "actions": batch["action"].flatten(1),
        "next_observations": batch[FUTURE].flatten(1),
        "rewards": batch["next", "reward"].squeeze(-1) / _rewards_of(fixture),
        "masks": 1 - batch["next", "terminated"].squeeze(-1).float(),
        "returns_to_go": labels.squeeze(-1) if labels.shape[-1] == 1 else labels.T,
    }
    for goal in ("value_goal", "actor_goal"):
        if goal in batch.keys():
            stored[f"{goal}s"] = batch[goal]
    return {
        name: error(ours, fixture[f"{step}/batch/{name}"].reshape(ours.shape), 1.0)
        for name, ours in stored.items()
    }


def _rewards_of(fixture: Fixture) -> int:
    """How many rewards a chunk's is the mean of: those of goals are no sums."""
    return 1 if replay_mac.has_goals(fixture) else fixture.config["action_chunking"]


def plan(agent: Agent, fixture: Fixture, name: str) -> dict[str, float]:
    """How far candidates, futures, values and the choice are from the stored ones."""
    noises = [fixture[f"{name}/{noise}_noise"].movedim(0, -2) for noise in ("action", "future")]
    td = TensorDict(
        observation=fixture[f"{name}/observations"], noise=noises[0], future_noise=noises[1]
    )
    if f"{name}/goals" in fixture.arrays:
        td["goal"] = fixture[f"{name}/goals"]
    td.auto_batch_size_(td["observation"].ndim - 1)
    with torch.no_grad():
        candidates, chosen = agent.actor.candidates(td), agent.actor(td.clone())["action"]
    found = {
        "actions": candidates["action"],
        "futures": candidates[FUTURE],
        "q": candidates["state_action_value"].squeeze(-1),
    }
    places = {"actions": -2, "futures": -2, "q": -1}
    errors = {
        key: error(ours, fixture[f"{name}/{key}"].movedim(0, places[key]))
        for key, ours in found.items()
    }
    theirs = fixture[f"{name}/official_action"]  # of a chunk, what is executed
    return errors | {"choice": difference(chosen[..., : theirs.shape[-1]], theirs)}


def compare(
    agent: Agent, fixture: Fixture, data: dict[str, torch.Tensor], source: str = "official"
) -> dict[str, dict[str, float]]:
    """Runs every stored update of a fixture, against what ``source`` has made of it."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    of_source = "" if source == "official" else f"{source}/"

    def note(kind: str, name: str, found: float) -> None:
        errors[kind][of_source + name] = max(errors[kind].get(of_source + name, 0.0), found)

    for k in range(fixture.steps):
        step = f"step{k}"
        batch, labels = windows(fixture, data, step)
        for name, found in compare_windows(batch, labels, fixture, step).items():
            note("window", name, found)
        batch["returns_to_go"] = labels
        batch["next", "reward"] = batch["next", "reward"] / _rewards_of(fixture)
        for name, key in NOISES.items():
            batch[key] = fixture[f"{step}/noise/{name}"]

        target = agent.values.target(batch).squeeze(-1)
        if agent.values.loss_function == "bce":
            target = target.clamp(0, 1)
        theirs = fixture[f"{step}/{source.replace('official', 'explicit')}/critic_target"]
        note("target", "critic", error(target, theirs, 1.0))
        metrics = agent.update(batch)
        for name, key in LOSSES.items():
            theirs = fixture[f"{step}/{source}/loss/{name}"]
            note("loss", name, error(metrics[key], theirs, 1.0))
        total = sum(metrics[key] for key in LOSSES.values())
        note("loss", "total", error(total, fixture[f"{step}/{source}/loss/total"], 1.0))
        for kind, where, tensors in (
            ("gradient", "grad", agent.gradients),
            ("parameter", "params_after", agent.parameters),
        ):
            for module in agent.networks:
                for leaf, ours in tensors(module).items():
                    name = f"{module}/{leaf}"
                    stored = f"{step}/{of_source}{where}/{name}"
                    if stored in fixture.arrays or not of_source:
                        note(kind, name, error(ours.detach(), fixture[stored]))
    return errors


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update, and then plans; returns ``{kind: {array: largest error}}``."""
    fixture = Fixture(path, case)
    with np.load(path, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("data/")]
        data = {name.removeprefix("data/"): torch.as_tensor(file[name]) for name in names}
    released = Agent(fixture, ReleasedValueLoss)
    errors = compare(released, fixture, data)
    for name in ("eval_single", "eval_batch"):
        found = plan(released, fixture, name)
        errors["plan"] |= {f"{name}/{key}": value for key, value in found.items()}
    for kind, found in compare(Agent(fixture), fixture, data, "corrected").items():
        errors[kind] |= found
    return errors
