"""MOBILE (https://arxiv.org/abs/2306.09344), of single actions or of chunks, on OGBench.

    python examples/mobile.py                                # the paper's sizes, cube-single
    python examples/mobile.py preset=cpu                     # small networks, for two CPU cores
    python examples/mobile.py preset=cpu chunk_size=5        # a model of chunks: 5 actions a step
    python examples/mobile.py preset=cpu_goal task=cube-single-oraclerep    # goal-conditioned
    python examples/mobile.py preset=cpu task=pendulum       # data of benchmarks/pendulum.py

Soft actor-critic on the dataset and on short rollouts of an ensemble of models, whose rewards are
lower where the ensemble is unsure: by how differently its members' next states are valued. Every
setting is in configs/mobile/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import UnaryTransform
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import ActionChunkExperienceReplay, GoalDistribution, MixedReplayBuffer
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
    value_penalty,
)
from torchrl_mac.trainers import EliteHook, ModelRolloutHook
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> ActionChunkExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, r, s_{t+h}) and goals, if any, normalised."""
    labels: dict[str, Any] = {"ignore_terminated": cfg.ignore_terminated}
    if run.is_goal_conditioned:
        goals = {key: GoalDistribution(**of) for key, of in cfg.goals.items()}
        labels = {"goals": goals, "negative_reward": cfg.negative_reward}
    return run.dataset(
        split, chunk_size=cfg.chunk_size, gamma=cfg.gamma, transforms=[model_weight(1.0)], **labels
    )


def model_weight(weight: float) -> UnaryTransform:
    """Weighs rows in the model's loss, which learns from real ones alone."""
    key = ("next", "reward")
    return UnaryTransform([key], ["model_weight"], fn=lambda it: torch.full_like(it[:, 0], weight))


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: ActionChunkExperienceReplay
) -> tuple[dict[str, LossModule], EnsembleWorldModel, TanhGaussianPolicy]:
    """The networks and what trains them; also the model and the policy that rollouts are of."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk
    S, state, of_goal, target_range = O, ["observation"], {}, None
    if run.is_goal_conditioned:
        S, state = O + buffer.goal_spec.shape[-1], ["observation", "goal"]
        of_goal = {"goal_key": "goal", "negative_reward": cfg.negative_reward}
        least = -1 / (1 - cfg.gamma**cfg.chunk_size)  # the goal is never reached
        target_range = (least, 0.0) if cfg.negative_reward else (0.0, 1.0)

    # World model: Gaussians of the state h steps ahead, the chunk's reward, whether the task ends
    members = StackedMLP(cfg.num_members, O + D, 2 * O, cfg.dynamics_cells, broadcast=True, **sizes)
    world_model = EnsembleWorldModel(
        GaussianEnsemble(members, num_elites=cfg.num_elites).to(run.device),
        NormedMLP(S + D, 1, cfg.head_cells, **sizes),
        NormedMLP(S + D, 1, cfg.head_cells, **sizes),
        **of_goal,
    )
    model_loss = ChunkedWorldModelLoss(world_model)
    model_loss.set_keys(priority_weight="model_weight")

    # A Gaussian over chunks, which begins in the middle of the actions' range, and critics
    moments = NormedMLP(S, 2 * D, cfg.policy_cells, **sizes)
    nn.init.xavier_uniform_(moments.layers[-1].weight, gain=0.1)
    policy = TanhGaussianPolicy(moments, D, log_std_bounds=(-5, 2), in_keys=[*state, "noise"])
    critics = StackedMLP(cfg.num_qvalue_nets, S + D, 1, cfg.value_cells, broadcast=True, **sizes)
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation, in_keys=[*state, "action"])

    sac = ChunkedSACLoss(policy, qvalue, chunk_size=cfg.chunk_size, target_range=target_range)
    sac.make_value_estimator(gamma=cfg.gamma)
    return {"world_model": model_loss, "sac": sac}, world_model, policy


def make_imagined(cfg: DictConfig, run: Experiment, penalty: Any) -> TensorDictReplayBuffer:
    """A buffer of the last few rollouts, whose samples are penalised by what is unsure now."""
    capacity = cfg.rollout_keep * cfg.rollout_batch * cfg.rollout_length
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity, device=run.device))
    buffer.append_transform(RewardPenalty(penalty, cfg.penalty_weight))
    buffer.append_transform(model_weight(0.0))
    return buffer


@hydra.main(config_path="../configs/mobile", config_name="mobile", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["num_members", "num_elites"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, world_model, policy = make_losses(cfg, run, train)
        penalty = partial(
            value_penalty, losses["sac"], world_model, num_samples=cfg.penalty_samples
        )
        imagined = make_imagined(cfg, run, penalty)
        of_model = [phase.name for phase in run.phases if "loss_qvalue" not in phase.terms]
        elites = EliteHook(world_model, validation, phases=of_model)
        rollouts = ModelRolloutHook(
            PolicyActor(policy, chunk_size=cfg.chunk_size if cfg.chunk_size > 1 else None),
            world_model,
            train,
            imagined,
            interval=cfg.rollout_interval,
            num_starts=cfg.rollout_batch,
            horizon=cfg.rollout_length,
            phases=[phase.name for phase in run.phases if phase.name not in of_model],
            goals=["value_goal", "actor_goal"] if run.is_goal_conditioned else [],
        )
        norm = run.normalisation(train)
        acting = PolicyActor(policy, deterministic=True, chunk_size=cfg.chunk_size, transform=norm)
        shares = {"real": cfg.real_share, "imagined": 1 - cfg.real_share}
        run.train(
            losses,
            MixedReplayBuffer({"real": train, "imagined": imagined}, shares),
            acting,
            dataset=train,
            phase_buffers=dict.fromkeys(of_model, train),
            hooks={"elites": elites, "rollouts": rollouts},
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["sac"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
