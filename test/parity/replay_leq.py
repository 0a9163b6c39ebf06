"""LEQ as the MAC repository runs it, single-task and goal-conditioned.

The released form evaluates the critic on imagined states with frozen parameters, and in the
actor's rollouts draws the model's member anew for each coordinate of the state. Here the critic
learns there and a state has one member, which the fixture's ``corrected`` updates are; the replay
of the released ones puts the other in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, difference, error, linear_leaves
from replay_qc import stacked_leaves
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhPolicy,
    WorldModelBase,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, LEQLoss
from torchrl_mac.trainers import LossUpdate

TOLERANCES = {
    "loss": 1e-4,
    "rollout": 1e-3,
    "return": 1e-3,
    "gradient": 1e-3,
    "parameter": 1e-5,
    "target": 1e-6,
    "action": 1e-5,
}
OF_MODEL = {"dynamics": "loss_dynamics", "success": "loss_termination", "reward": "loss_reward"}
GOALS = {"value_goals": "value_goal", "actor_goals": "actor_goal"}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is this agent's."""
    return config.get("agent_name") == "leq"


class Parts(nn.Module):
    """LEQ's loss, with transitions and the starts of rollouts from two batches."""

    out_keys = ["loss_actor", "loss_qvalue", "loss_expansion"]  # noqa: RUF012

    def __init__(self, loss: LEQLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        starts = tensordict.get("starts")
        return TensorDict(
            loss_actor=self.loss.actor_loss(starts),
            loss_qvalue=self.loss.qvalue_loss(tensordict.get("real"))[0],
            loss_expansion=self.loss.expansion_loss(starts),
        )


class ModelPart(nn.Module):
    """The world model's loss on transitions."""

    out_keys = tuple(OF_MODEL.values())

    def __init__(self, world_model: EnsembleWorldModel) -> None:
        super().__init__()
        self.loss = ChunkedWorldModelLoss(world_model)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.loss(tensordict.get("real"))


class ReleasedLoss(LEQLoss):
    """With a critic that does not learn from imagined states."""

    def expansion_loss(self, tensordict: TensorDictBase) -> Tensor:
        return super().expansion_loss(tensordict).detach()


class ReleasedEnsemble(GaussianEnsemble):
    """Whose member may be another one for each coordinate, ``[*, O]``."""

    def sample(self, *inputs: Tensor, noise: Tensor, member: Tensor) -> Tensor:
        if member.ndim < inputs[0].ndim:
            return super().sample(*inputs, noise=noise, member=member)
        mean, std = (part.gather(0, member[None])[0] for part in self(*inputs))
        return mean + std * noise


class Agent:
    """The package's modules, losses and update, with the sizes and parameters of a fixture."""

    names = ("dynamics", "success", "reward", "actor", "critic")
    target_order = "before"

    def __init__(self, fixture: Fixture, *, released: bool = False) -> None:
        self.fixture, self.config, self.released = fixture, fixture.config, released
        self.goal = ["goal"] if fixture.keys("step0/batch/value_goals") else []
        self.networks: dict[str, Any] = {name: self.network(name) for name in self.names}
        self.world_model = self.make_world_model()
        policy = TanhPolicy(self.networks["actor"], in_keys=["observation", *self.goal])
        self.actor = PolicyActor(policy)
        self.loss = (ReleasedLoss if released else LEQLoss)(
            self.actor,
            self.make_critic(),
            self.world_model,
            imagination_horizon=self.config["rollout_steps"],
            lmbda=self.config["lam"],
            expectile=self.config["expectile"],
            model_batch_ratio=self.config["model_batch_ratio"],
        )
        self.loss.make_value_estimator(gamma=self.config["discount"])
        updater = SoftUpdate(self.loss, tau=self.config["tau"])
        for name in [*self.names, "target_critic"]:
            for leaf, tensor in self.parameters(name).items():
                tensor.data.copy_(fixture[f"params0/{name}/{leaf}"])
        losses = {**self.model_losses(), "leq": Parts(self.loss)}
        optimizer = torch.optim.Adam(self.groups(losses))
        self.update = LossUpdate(losses, optimizer, updater, target_order=self.target_order)

    def network(self, name: str) -> nn.Module:
        """A network of the fixture's sizes."""
        kernels, norm = self.kernels(name)
        sizes = (kernels[0].shape[-2], kernels[-1].shape[-1], [k.shape[-1] for k in kernels[:-1]])
        if name == "critic":
            return StackedMLP(1, *sizes, broadcast=True, layer_norm=norm)
        if kernels[0].ndim == 3:
            return StackedMLP(kernels[0].shape[0], *sizes, broadcast=True, layer_norm=norm)
        return NormedMLP(*sizes, layer_norm=norm)

    def kernels(self, name: str) -> tuple[list[Tensor], bool]:
        """The kernels of a network's layers, and whether it has norms."""
        prefix, kernels = f"params0/{name}", []
        while f"{prefix}/Dense_{len(kernels)}/kernel" in self.fixture.arrays:
            kernels.append(self.fixture[f"{prefix}/Dense_{len(kernels)}/kernel"])
        if name == "actor":
            kernels.append(self.fixture[f"{prefix}/{self.head}/kernel"])
        return kernels, bool(self.fixture.keys(f"{prefix}/LayerNorm_0/"))

    head = "mean_net"

    def make_world_model(self) -> WorldModelBase:
        kind = ReleasedEnsemble if self.released else GaussianEnsemble
        return EnsembleWorldModel(
            kind(self.networks["dynamics"], log_std_bounds=(-5.0, 1.0)),
            self.networks["reward"],
            self.networks["success"],
            goal_key=self.goal[0] if self.goal else None,
            negative_reward=True if self.goal else None,
        )

    def make_critic(self) -> Any:
        in_keys = ["observation", *self.goal, "action"]
        return QValueEnsemble(self.networks["critic"], in_keys=in_keys)

    def model_losses(self) -> dict[str, nn.Module]:
        return {"world_model": ModelPart(self.world_model)}

    def groups(self, losses: dict[str, nn.Module]) -> list[dict[str, Any]]:
        """The optimizer's."""
        parameters = [parameter for loss in losses.values() for parameter in loss.parameters()]
        return [{"params": parameters, "lr": self.config["lr"]}]

    def before_update(self, step: int) -> None:
        """What changes between updates."""

    def leaves(self, name: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """A network's tensors under the fixture's names and layouts, as views."""
        network = self.networks[name]
        if isinstance(network, StackedMLP):
            leaves = stacked_leaves(network, params)
            return {key: x.squeeze(0) for key, x in leaves.items()} if name == "critic" else leaves
        leaves = linear_leaves(network.layers, params)
        if name == "actor":
            for leaf in ("kernel", "bias"):
                last = leaves.pop(f"Dense_{len(network.num_cells)}/{leaf}")
                leaves[f"{self.head}/{leaf}"] = last
        return leaves

    def parameters(self, name: str) -> dict[str, Tensor]:
        if name == "target_critic":
            target = self.loss.target_qvalue_network_params.flatten_keys(".")
            found = {key.removeprefix("network."): value for key, value in target.items()}
            return self.leaves("critic", found)
        found = dict(self.networks[name].named_parameters())
        return self.leaves(name, {key: p.detach() for key, p in found.items()})

    def gradients(self, name: str) -> dict[str, Tensor]:
        found = dict(self.networks[name].named_parameters())
        return self.leaves(name, {key: p.grad for key, p in found.items()})

    def batch(self, step: str) -> TensorDict:
        """A stored batch with its noises, in the layout of the replay buffer."""
        real = transitions(self.fixture, f"{step}/batch")
        read = ["observation", *(key for key in GOALS.values() if key in real)]
        return TensorDict(real=real, starts=self.starts(step, real.select(*read)))

    def starts(self, step: str, states: TensorDict) -> TensorDict:
        """The starts of rollouts, with the noises of these."""
        stored = self.fixture.arrays
        member = torch.as_tensor(stored[f"{step}/noise/critic_member"]).long()
        of_actor = torch.as_tensor(stored[f"{step}/noise/actor_member"]).long()
        noise = self.fixture[f"{step}/noise/critic_model_eps"].movedim(1, 2)
        of_noise = self.fixture[f"{step}/noise/actor_model_eps"]
        if of_actor.ndim == 3 and not self.released:
            of_actor = of_actor[..., 0]
        states = states.repeat_interleave(member.shape[1] // len(states), 0)
        return states.update(
            {
                "member": member.T,
                "model_noise": of_members(noise, member).transpose(0, 1),
                "actor_member": of_actor.transpose(0, 1),
                "actor_model_noise": of_members(of_noise, of_actor).transpose(0, 1),
            }
        )


def of_members(noise: Tensor, member: Tensor) -> Tensor:
    """Of noise for all members, ``[H, B, E, O]``, that of the chosen ones, ``[H, B, O]``."""
    if member.ndim == 2:
        member = member.unsqueeze(-1).expand(*member.shape, noise.shape[-1])
    return noise.gather(2, member.unsqueeze(2)).squeeze(2)


def transitions(fixture: Fixture, prefix: str) -> TensorDict:
    """Stored transitions in the layout of the replay buffer."""
    ends = fixture[f"{prefix}/masks"].unsqueeze(-1) == 0
    goals = {
        key: fixture[f"{prefix}/{name}"]
        for name, key in GOALS.items()
        if f"{prefix}/{name}" in fixture.arrays
    }
    return TensorDict(
        **goals,
        observation=fixture[f"{prefix}/observations"],
        action=fixture[f"{prefix}/actions"],
        next=TensorDict(
            observation=fixture[f"{prefix}/next_observations"],
            reward=fixture[f"{prefix}/rewards"].unsqueeze(-1),
            terminated=ends,
            done=ends,
        ),
    ).auto_batch_size_(1)


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest error}}``."""
    fixture = Fixture(path, case)
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    compare(Agent(fixture, released=True), "official", errors)
    compare(Agent(fixture), "corrected", errors)
    return errors


def compare(agent: Agent, source: str, errors: dict[str, dict[str, float]]) -> None:
    """Runs every stored update of a fixture, against what ``source`` has made of it."""
    fixture, ratio = agent.fixture, agent.config["model_batch_ratio"]
    of_source = "" if source == "official" else f"{source}/"

    def note(kind: str, name: str, ours: Tensor, theirs: Tensor) -> None:
        if kind in ("target", "action"):
            found = difference(ours.detach(), theirs)
        else:
            found = error(ours.detach(), theirs, 1.0 if kind == "loss" else 0.0)
        errors[kind][of_source + name] = max(errors[kind].get(of_source + name, 0.0), found)

    for k in range(fixture.steps):
        step, data = f"step{k}", agent.batch(f"step{k}")
        if source == "official":
            for (kind, name), ours in imagined(agent.loss, data).items():
                note(kind, name, ours, fixture[f"{step}/explicit/{name}"])
        agent.before_update(k)
        metrics = agent.update(data)
        prefix = f"{step}/{source}/loss/"
        stored = {name.removeprefix(prefix): fixture[name] for name in fixture.keys(prefix)}
        of_data = stored["critic_data"] + stored["critic_reg_data"]
        of_model = stored["critic_model"] + stored["critic_reg_model"]
        note("loss", "critic_on_data", metrics["loss_qvalue"], (1 - ratio) * of_data)
        note("loss", "critic_on_imagination", metrics["loss_expansion"], ratio * of_model)
        note("loss", "actor", metrics["loss_actor"], stored["actor"])
        if agent.model_losses():
            for name, key in OF_MODEL.items():
                note("loss", name, metrics[key], stored[name])
            total = sum(value for key, value in metrics.items() if key.startswith("loss_"))
            note("loss", "total", total, stored["total"])
        for name in agent.names:
            for leaf, ours in agent.gradients(name).items():
                where = f"{step}/{of_source}grad/{name}/{leaf}"
                if where in fixture.arrays or not of_source:
                    note("gradient", f"{name}/{leaf}", ours, fixture[where])
        for name in [*agent.names, "target_critic"]:
            for leaf, ours in agent.parameters(name).items():
                where = f"{step}/{of_source}params_after/{name}/{leaf}"
                if where in fixture.arrays or not of_source:
                    kind = "target" if name == "target_critic" else "parameter"
                    note(kind, f"{name}/{leaf}", ours, fixture[where])
    if source == "official" and fixture.keys("eval/"):
        state = {"observation": fixture["eval/observations"]}
        state |= {"goal": fixture["eval/goals"]} if agent.goal else {}
        with torch.no_grad():
            action = agent.actor(**state)
        note("action", "eval", action, fixture["eval/official_action"])


def imagined(loss: LEQLoss, data: TensorDictBase) -> dict[tuple[str, str], Tensor]:
    """What a loss makes of a batch on the way, under the fixture's names, step-major."""
    starts, real = data["starts"], data["real"]
    rollout, own = loss.imagine(starts), loss.action_gradient(starts)
    with torch.no_grad():
        taken = rollout.select(*loss.qvalue_network.in_keys)
        members = loss.members(taken, loss.qvalue_network_params)
        inputs = loss._conditions.read(real, loss._critic_keys) | {"action": real["action"]}
        inputs = TensorDict(inputs, batch_size=real.shape)
        value = loss.members(inputs, loss.qvalue_network_params)[0]
    alive = loss._alive(rollout)
    weight = loss._discount ** torch.arange(rollout.shape[1]) * alive[:, :-1]
    found = {
        ("rollout", "critic/rewards"): rollout["next", "reward"].squeeze(-1),
        ("rollout", "critic/survival"): alive,
        ("return", "critic/lambda_returns"): loss.lambda_return(rollout, members)[:, :-1],
        ("return", "critic/loss_weights"): weight,
        ("rollout", "actor/states"): own["observation"],
        ("rollout", "actor/q"): own["value"],
        ("return", "actor/lambda_returns"): own["lambda_return"],
        ("return", "actor/weights"): own["weight"],
        ("gradient", "actor/action_grads"): own["action_gradient"],
    }
    found = {name: array.transpose(0, 1) for name, array in found.items()}
    found["return", "critic/data_target"] = loss.target(real)
    found["return", "critic/data_q"] = value
    return found
