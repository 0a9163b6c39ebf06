"""n-step GCSAC+BC (https://arxiv.org/abs/2506.04168): goals and returns of many steps, on OGBench.

    python examples/gcsac_bc.py                                  # the paper's sizes, cube-single
    python examples/gcsac_bc.py task=cube-octuple-oraclerep      # another environment, its settings
    python examples/gcsac_bc.py preset=cpu_goal                  # small networks, for two CPU cores

Critics learn the probability of reaching the goal, discounted, by cross-entropy and n steps at a
time; the actor is soft actor-critic's, held close to the dataset's actions. As MAC's authors and
those of "Horizon Reduction Makes RL Scalable" run this baseline. Where the released code counts a
window that the end of an episode cuts short as a success, here only the goal counts. Every setting
is in configs/gcsac_bc/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.

The authors' settings of each environment, in configs/gcsac_bc/task/:

    environment           n_steps   bc_alpha   q_aggregation   actor's goals
    cube-octuple          50        0.1        min             a thousand steps ahead or so
    puzzle-4x5            25        0.1        min             half of them such, half any state
    humanoidmaze-giant    50        0.03       mean            any later state
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from torch import nn
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedSACLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t, R, s_{t+k}) and goals, cut where the goal is, normalised."""
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        n_steps=cfg.n_steps,
        gamma=cfg.gamma,
        goals={key: GoalDistribution(**of) for key, of in cfg.goals.items()},
        negative_reward=False,  # values are probabilities
        truncation_is_success=cfg.truncation_is_success,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], PolicyActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    state = ["observation", "goal"]
    S = buffer.observation_spec["observation"].shape[-1] + buffer.goal_spec.shape[-1]
    D = cfg.chunk_size * buffer.action_spec.shape[-1]

    # A Gaussian which begins in the middle of the actions' range
    moments = NormedMLP(S, 2 * D, cfg.policy_cells, **sizes)
    nn.init.xavier_uniform_(moments.layers[-1].weight, gain=0.1)
    policy = TanhGaussianPolicy(moments, D, log_std_bounds=(-5, 2), in_keys=[*state, "noise"])

    # Critics, which write logits
    critics = StackedMLP(cfg.num_qvalue_nets, S + D, 1, cfg.value_cells, broadcast=True, **sizes)
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation, in_keys=[*state, "action"])

    sac = ChunkedSACLoss(
        policy,
        qvalue,
        alpha_init=cfg.alpha_init,
        bc_alpha=cfg.bc_alpha,
        bc="squared",
        loss_function="bce",
    )
    sac.make_value_estimator(gamma=cfg.gamma)
    norm = run.normalisation(buffer)
    acting = PolicyActor(policy, deterministic=True, chunk_size=cfg.chunk_size, transform=norm)
    return {"sac": sac}, acting


@hydra.main(config_path="../configs/gcsac_bc", config_name="gcsac_bc", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["n_steps", "num_qvalue_nets"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["sac"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
