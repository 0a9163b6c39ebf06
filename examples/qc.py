"""Q-chunking (https://arxiv.org/abs/2507.07969): the best of N chunks, offline, then online.

    python examples/qc.py                                 # QC, the paper's sizes, cube-double
    python examples/qc.py preset=cpu task=cube-single     # small networks, for two CPU cores
    python examples/qc.py preset=cpu task=cube-single online.frames=20_000    # and then online
    python examples/qc.py chunk_size=1 num_candidates=4   # BFN: single actions
    python examples/qc.py chunk_size=1 num_candidates=4 n_steps=5    # BFN-n: returns of five steps

A flow clones the dataset's chunks, critics learn the value of the best of N of its samples, and
that one is executed. Every setting is in configs/qc/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-double-play-v0 --out data`.

The paper's settings of each environment, in configs/qc/task/:

    environment       rewards   dataset     num_candidates   of BFN, BFN-n   episode's limit
    scene             sparse    1M play     32               4               750
    puzzle-3x3        sparse    1M play     64               4               500
    cube-double       dense     1M play     32               4               500
    cube-triple       dense     1M play     32               4               1000
    cube-quadruple    dense     100M play   32               4               1000
    robomimic         -1 and 0  MH          16               4               300 to 400
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
)
from torchrl_mac.objectives import ChunkedQValueLoss, FlowBCLoss
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
) -> tuple[dict[str, LossModule], FlowRejectionActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk

    # Behaviour: a flow over chunks
    velocity = NormedMLP(O + D + 1, D, cfg.policy_cells, layer_norm=False, **sizes)
    flow = FlowMatchingPolicy(velocity, D, cfg.flow_steps).to(run.device)

    # Critics of state and chunk
    critics = StackedMLP(cfg.num_qvalue_nets, O + D, 1, cfg.value_cells, broadcast=True, **sizes)
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation)

    # The best of N chunks, in the critics' target and in the simulator
    imagined, acting = (
        FlowRejectionActor(
            flow, qvalue, num_candidates=N, transform=transform, chunk_size=cfg.chunk_size
        )
        for N, transform in (
            (cfg.num_candidates, None),
            (cfg.eval_num_candidates, run.normalisation(buffer)),
        )
    )

    critic = ChunkedQValueLoss(imagined, qvalue)
    critic.make_value_estimator(gamma=cfg.gamma)
    return {"behaviour": FlowBCLoss(flow), "critic": critic}, acting


@hydra.main(config_path="../configs/qc", config_name="qc", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["n_steps", "sparse_rewards", "normalize"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["critic"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
