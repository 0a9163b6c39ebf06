"""LEQ, lower-expectile Q-learning (https://arxiv.org/abs/2407.00699), on OGBench.

    python examples/leq.py                                   # MAC's baseline, cube-single
    python examples/leq.py preset=original                   # the sizes and rates of its authors
    python examples/leq.py preset=cpu                        # small networks, for two CPU cores
    python examples/leq.py preset=cpu chunk_size=5           # of chunks of five actions
    python examples/leq.py task=puzzle-3x3-oraclerep         # goal-conditioned, five tasks at once

A deterministic actor follows the gradient of pessimistic returns through an ensemble of dynamics.
The authors start rollouts in states that the actor has imagined before; here they start in those of
the dataset. Every setting is in configs/leq/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

from functools import partial

import hydra
from omegaconf import DictConfig
from torch import nn
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, LEQLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, r, s_{t+h}) and goals, if any, normalised."""
    if run.is_goal_conditioned:
        goals = {key: GoalDistribution(**of) for key, of in cfg.goals.items()}
        labels = {"goals": goals, "negative_reward": cfg.negative_reward}
        return run.dataset(split, chunk_size=cfg.chunk_size, gamma=cfg.gamma, **labels)
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        gamma=cfg.gamma,
        ignore_terminated=cfg.ignore_terminated,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], PolicyActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    network = partial(NormedMLP, **sizes)
    ensemble = partial(StackedMLP, broadcast=True, **sizes)
    chunked = {"chunk_size": cfg.chunk_size}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk
    S, state, goal_key = O, ["observation"], None
    if run.is_goal_conditioned:
        goal_key = "goal"
        S, state = O + buffer.goal_spec.shape[-1], [*state, goal_key]

    # World model: the state h steps ahead as a Gaussian of each member, reward, whether it ends
    dynamics = ensemble(cfg.num_members, O + D, 2 * O, cfg.dynamics_cells)
    world_model = EnsembleWorldModel(
        GaussianEnsemble(dynamics),
        network(S + D, 1, cfg.head_cells),
        network(S + D, 1, cfg.head_cells),
        goal_key=goal_key,
        negative_reward=cfg.negative_reward if goal_key else None,
    ).to(run.device)

    # A deterministic actor, whose actions are small at first
    mean = network(S, D, cfg.policy_cells)
    nn.init.xavier_uniform_(mean.layers[-1].weight, gain=0.1)
    policy = TanhPolicy(mean, in_keys=state)
    imagined, acting = (
        PolicyActor(policy, transform=transform, **chunked)
        for transform in (None, run.normalisation(buffer))
    )

    # Its critic
    critic = ensemble(cfg.num_qvalue_nets, S + D, 1, cfg.value_cells)
    qvalue = QValueEnsemble(critic, q_aggregation=cfg.q_aggregation, in_keys=[*state, "action"])

    leq = LEQLoss(
        imagined,
        qvalue,
        world_model,
        imagination_horizon=cfg.imagination_horizon,
        lmbda=cfg.lmbda,
        expectile=cfg.expectile,
        model_batch_ratio=cfg.model_batch_ratio,
    )
    leq.make_value_estimator(gamma=cfg.gamma)
    return {"world_model": ChunkedWorldModelLoss(world_model), "leq": leq}, acting


@hydra.main(config_path="../configs/leq", config_name="leq", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["num_members", "num_qvalue_nets"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["leq"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
