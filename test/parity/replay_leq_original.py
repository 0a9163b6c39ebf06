"""LEQ as its authors run it, with their networks and their model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, linear_leaves
from replay_leq import TOLERANCES, Agent, compare, transitions
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.modules import ValueOperator

from torchrl_mac.modules import NormedMLP, WorldModelBase

__all__ = ["TOLERANCES", "accepts", "replay"]


def accepts(case: str, config: dict) -> bool:
    """Whether a case is this agent's."""
    return {"actor_lr", "terminal_threshold"} <= set(config)


def symlog(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()


class Scaled(nn.Module):
    """A network of the symlog of its scaled inputs; for the actor the scale is a parameter."""

    def __init__(self, scaler: Tensor, network: NormedMLP, *, trained: bool) -> None:
        super().__init__()
        if trained:
            self.scaler = nn.Parameter(scaler.clone())
        else:
            self.register_buffer("scaler", scaler)
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        mean, size = self.scaler
        return self.network(symlog((torch.cat(inputs, -1) - mean) / size))


class OriginalModel(WorldModelBase):
    """The authors' dynamics: an ensemble that predicts the reward as well, and a known end."""

    def __init__(self, fixture: Fixture) -> None:
        super().__init__()
        self.model_noise_key, self.member_key = "model_noise", "member"
        self.arrays = {key: fixture[key] for key in fixture.keys("model/")}
        self.threshold = fixture.config["terminal_threshold"]

    def predict_state(self, tensordict: TensorDictBase) -> TensorDictBase:
        arrays, observation = self.arrays, tensordict.get("observation")
        mean, size = arrays["model/scaler"]
        x = (torch.cat([observation, tensordict.get("action")], -1) - mean) / size
        depth = 0
        while f"model/layers_{depth}/kernel" in arrays:
            x = F.silu(self.layer(x, f"layers_{depth}"))
            depth += 1
        mean, log_var = self.layer(x, "last_layer").chunk(2, -1)
        highest, lowest = arrays["model/max_logvar"], arrays["model/min_logvar"]
        log_var = highest - F.softplus(highest - log_var)
        log_var = lowest + F.softplus(log_var - lowest)
        mean = mean + F.pad(observation, (0, 1))
        index = tensordict.get(self.member_key)[None, ..., None].expand(1, *mean.shape[1:])
        mean, std = mean.gather(0, index)[0], (0.5 * log_var).exp().gather(0, index)[0]
        sample = mean + std * tensordict.get(self.model_noise_key)
        scale, shift = arrays["model/reward_scaler"]
        tensordict.set(("next", "observation"), sample[..., :-1])
        return tensordict.set(("next", "reward"), sample[..., -1:] * scale + shift)

    def layer(self, x: Tensor, name: str) -> Tensor:
        return x @ self.arrays[f"model/{name}/kernel"] + self.arrays[f"model/{name}/bias"]

    def predict_outcome(self, tensordict: TensorDictBase) -> TensorDictBase:
        ends = tensordict.get(("next", "observation"))[..., :1] > self.threshold
        tensordict.set(("next", "terminated"), ends)
        return tensordict.set(("next", "done"), ends.clone())


class OriginalAgent(Agent):
    """As the authors of LEQ run it: with a model that is there, and two optimizers."""

    names = ("actor", "critic")
    head = "mean_head"
    target_order = "after"

    def network(self, name: str) -> nn.Module:
        kernels, norm = self.kernels(name)
        sizes = (kernels[0].shape[0], kernels[-1].shape[1], [k.shape[1] for k in kernels[:-1]])
        network = NormedMLP(*sizes, activation_class="relu", layer_norm=norm, norm_first=True)
        where = "params0/actor/scaler" if name == "actor" else "critic_scaler"
        return Scaled(self.fixture[where], network, trained=name == "actor")

    def make_world_model(self) -> WorldModelBase:
        return OriginalModel(self.fixture)

    def make_critic(self) -> Any:
        return ValueOperator(self.networks["critic"], in_keys=["observation", "action"])

    def model_losses(self) -> dict[str, nn.Module]:
        return {}

    def groups(self, losses: dict[str, nn.Module]) -> list[dict[str, Any]]:
        actor, critic = self.loss.actor_network_params, self.loss.qvalue_network_params
        rates = {"actor_lr": actor, "lr": critic}
        return [{"params": [*of.parameters()], "lr": self.config[k]} for k, of in rates.items()]

    def before_update(self, step: int) -> None:
        factor = 0.5 * (1 + math.cos(math.pi * step / self.config["max_steps"]))
        self.update.optimizer.param_groups[0]["lr"] = self.config["actor_lr"] * factor

    def leaves(self, name: str, params: dict[str, Tensor]) -> dict[str, Tensor]:
        network = self.networks[name.removeprefix("target_")].network
        if name != "actor":  # the first of several that there could be
            params = {key: x if x is None else x[0] for key, x in params.items()}
        inner = {key.removeprefix("network."): x for key, x in params.items()}
        leaves = linear_leaves(network.layers, inner)
        if name == "actor":
            for leaf in ("kernel", "bias"):
                leaves[f"{self.head}/{leaf}"] = leaves.pop(f"Dense_{len(network.num_cells)}/{leaf}")
            leaves["scaler"] = params["scaler"]
        return leaves

    def parameters(self, name: str) -> dict[str, Tensor]:
        return self.leaves(name, {key: p.detach() for key, p in self.of(name)})

    def gradients(self, name: str) -> dict[str, Tensor]:
        return self.leaves(name, {key: p.grad for key, p in self.of(name)})

    def of(self, name: str) -> list[tuple[str, Tensor]]:
        """The loss's own parameters of a network, those of critics one by one."""
        if name == "actor":
            return list(self.networks["actor"].named_parameters())
        prefix = "target_" if name.startswith("target_") else ""
        params = getattr(self.loss, f"{prefix}qvalue_network_params")
        found = params.items(True, True)
        return [(".".join(key).removeprefix("module."), value) for key, value in found]

    def batch(self, step: str) -> TensorDict:
        states = TensorDict(observation=self.fixture[f"{step}/model_batch/observations"])
        starts = self.starts(step, states.auto_batch_size_(1))
        return TensorDict(real=transitions(self.fixture, f"{step}/real_batch"), starts=starts)


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Runs every stored update; returns ``{kind: {array: largest error}}``."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    compare(OriginalAgent(Fixture(path, case)), "official", errors)
    return errors
