"""GCIQL (https://arxiv.org/abs/2410.20092): goal-conditioned implicit Q-learning, on OGBench.

    python examples/gciql.py                             # the paper's sizes, cube-single
    python examples/gciql.py task=cube-octuple-oraclerep # another environment, its settings
    python examples/gciql.py preset=cpu_goal             # small networks, for two CPU cores

V learns an expectile of Q at the dataset's actions, Q one step ahead with V, and a Gaussian actor
maximises Q and clones the dataset (DDPG+BC). As MAC's authors and those of "Horizon Reduction Makes
RL Scalable" (https://arxiv.org/abs/2506.04168) run this baseline. Every setting is in
configs/gciql/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.

The authors' settings of each environment, in configs/gciql/task/:

    environment           alpha   actor's goals
    cube-octuple          10      a thousand steps ahead or so, as for the other cubes
    puzzle-4x5            1       half of them such, half of them any state
    humanoidmaze-giant    0.3     any later state
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    GaussianPolicy,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
)
from torchrl_mac.objectives import DDPGBCLoss, InSampleValueLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t, r, s_{t+1}) and goals, normalised."""
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        gamma=cfg.gamma,
        goals={key: GoalDistribution(**of) for key, of in cfg.goals.items()},
        negative_reward=cfg.negative_reward,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], PolicyActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    state = ["observation", "goal"]
    S = buffer.observation_spec["observation"].shape[-1] + buffer.goal_spec.shape[-1]
    D = cfg.chunk_size * buffer.action_spec.shape[-1]

    # A Gaussian around actions that are small at first
    mean = NormedMLP(S, D, cfg.policy_cells, **sizes)
    nn.init.xavier_uniform_(mean.layers[-1].weight, gain=0.1)
    policy = GaussianPolicy(mean, D, in_keys=[*state, "noise"])

    # V and critics
    value = ValueOperator(NormedMLP(S, 1, cfg.value_cells, **sizes), in_keys=state)
    critics = StackedMLP(cfg.num_qvalue_nets, S + D, 1, cfg.value_cells, broadcast=True, **sizes)
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation, in_keys=[*state, "action"])

    values = InSampleValueLoss(
        value,
        qvalue,
        expectile=cfg.expectile,
        critic_reduction="sum",
        chunk_size=cfg.chunk_size,
    )
    values.make_value_estimator(gamma=cfg.gamma)
    actor = DDPGBCLoss(policy, qvalue, alpha=cfg.alpha)
    norm = run.normalisation(buffer)
    acting = PolicyActor(policy, deterministic=True, chunk_size=cfg.chunk_size, transform=norm)
    return {"values": values, "actor": actor}, acting


@hydra.main(config_path="../configs/gciql", config_name="gciql", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["num_qvalue_nets"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["values"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
