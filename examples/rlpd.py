"""RLPD (https://arxiv.org/abs/2302.02948) and RLPD-AC, online with a dataset at hand.

    python examples/rlpd.py                                 # RLPD, the paper's sizes, cube-double
    python examples/rlpd.py chunk_size=5                    # RLPD-AC: chunks of five actions
    python examples/rlpd.py chunk_size=5 bc_alpha=0.01      # QC-RLPD: and clones (terms: loss_bc)
    python examples/rlpd.py preset=cpu task=cube-single     # small networks, for two CPU cores

There is no offline training: half of each batch is the dataset's, half was collected. As the
Q-chunking authors run it (https://arxiv.org/abs/2507.07969): ten critics, their mean in the target,
and no entropy in it. Every setting is in configs/rlpd/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-double-play-v0 --out data`.

The paper's settings are the same in each environment, but for the rewards:

    environment        rewards   dataset     episode's limit
    scene              sparse    1M play     750
    puzzle-3x3         sparse    1M play     500
    cube-double        dense     1M play     500
    cube-triple        dense     1M play     1000
    cube-quadruple     dense     100M play   1000
    robomimic          -1 and 0  MH          300 to 400
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import OGBenchExperienceReplay
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
    """The dataset as (s_t, a_t ... a_{t+h-1}, R, s_{t+k}), cut where an episode ends."""
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        n_steps=cfg.n_steps,
        cross_episodes=cfg.cross_episodes,
        gamma=cfg.gamma,
        sparse_rewards=cfg.sparse_rewards,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], PolicyActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk

    # A Gaussian over chunks
    moments = NormedMLP(O, 2 * D, cfg.policy_cells, layer_norm=False, **sizes)
    policy = TanhGaussianPolicy(moments, D)

    # Critics of state and chunk
    critics = StackedMLP(
        cfg.num_qvalue_nets, O + D, 1, cfg.value_cells, norm_first=True, broadcast=True, **sizes
    )
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation)

    acting = PolicyActor(policy, transform=run.normalisation(buffer), chunk_size=cfg.chunk_size)

    loss = ChunkedSACLoss(policy, qvalue, alpha_init=cfg.alpha_init, bc_alpha=cfg.bc_alpha)
    loss.make_value_estimator(gamma=cfg.gamma)
    return {"sac": loss}, acting


@hydra.main(config_path="../configs/rlpd", config_name="rlpd", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["n_steps", "sparse_rewards", "normalize"]) as run:
        train = make_buffer(cfg, run, "train")
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            target_updaters=SoftUpdate(losses["sac"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
