"""Decoupled Q-chunking (https://arxiv.org/abs/2512.10926), on OGBench's goals.

    python examples/dqc.py                                       # the paper's sizes, cube-triple
    python examples/dqc.py preset=cpu_goal task=cube-single-oraclerep     # for two CPU cores
    python examples/dqc.py policy_chunk_size=1                   # a policy of single actions
    python examples/dqc.py chunk_critic=false policy_chunk_size=25    # QC: one critic, whole chunks
    python examples/dqc.py chunk_critic=false                   # QC-NS: 5 actions, after 25 steps
    python examples/dqc.py chunk_critic=false policy_chunk_size=1     # NS: n-step returns
    python examples/dqc.py chunk_critic=false policy_chunk_size=1 chunk_size=1    # OS: one step

Critics of long chunks look far ahead. Critics of a chunk's first actions learn from them what the
better ends of it are worth, and of the first actions that a flow proposes, the best are executed.
Every setting is in configs/dqc/, with those of each environment. The dataset must be in
`data_dir`: `torchrl-mac-data generate cube-single-play-v0 --out data`.

The paper's kappa_b and, of DQC, kappa_d; the others' differ in places:

    environment          DQC         QC-NS   QC     NS     OS     q_aggregation
    cube-triple          0.93, 0.8   0.93    0.93   0.5    0.5    min
    cube-quadruple       0.93, 0.8   0.93    0.93   0.5    0.7    min
    cube-octuple         0.93, 0.5   0.93    0.93   0.97   0.7    min
    puzzle-4x5           0.9, 0.5    0.7     0.9    0.7    0.7    mean
    puzzle-4x6           0.7, 0.5    0.5     0.7    0.7    0.7    mean
    humanoidmaze-giant   0.5, 0.8    0.5     0.5    0.5    0.5    mean
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import FirstActions, GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
)
from torchrl_mac.objectives import DQCLoss, FlowBCLoss, InSampleValueLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, R, s_{t+k}) and a goal, cut where that is reached."""
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size if cfg.chunk_critic else cfg.policy_chunk_size,
        n_steps=cfg.chunk_size,
        gamma=cfg.gamma,
        goals={key: GoalDistribution(**of) for key, of in cfg.goals.items()},
        negative_reward=False,
        transforms=[FirstActions(cfg.policy_chunk_size)],
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], FlowRejectionActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    A = buffer.action_spec.shape[-1]
    D = cfg.policy_chunk_size * A  # the numbers of what the policy proposes
    S, state = O + buffer.goal_spec.shape[-1], ["observation", "goal"]

    # Behaviour: a flow over the first actions of chunks, whatever the goal
    velocity = NormedMLP(O + D + 1, D, cfg.policy_cells, **sizes)
    flow = FlowMatchingPolicy(velocity, D, cfg.flow_steps).to(run.device)
    behaviour = FlowBCLoss(flow)
    behaviour.set_keys(action="policy_action", valid="policy_valid")

    # Logits of reaching the goal, discounted: V(s), and critics of state and first actions
    def critics(num_actions: int) -> QValueEnsemble:
        network = StackedMLP(
            cfg.num_qvalue_nets,
            S + num_actions * A,
            1,
            cfg.value_cells,
            first_actions=num_actions,
            broadcast=True,
            **sizes,
        )
        in_keys = [*state, "action"]
        return QValueEnsemble(network, q_aggregation=cfg.q_aggregation, in_keys=in_keys)

    value = ValueOperator(NormedMLP(S, 1, cfg.value_cells, **sizes), in_keys=state)
    qvalue = critics(cfg.policy_chunk_size)
    backup = {"expectile": cfg.kappa_b, "asymmetry": cfg.backup, "loss_function": "bce"}
    if cfg.chunk_critic:
        values = DQCLoss(
            value,
            qvalue,
            critics(cfg.chunk_size),
            distillation_expectile=cfg.kappa_d,
            distillation_asymmetry=cfg.distillation,
            **backup,
        )
    else:
        values = InSampleValueLoss(value, qvalue, **backup)
    values.make_value_estimator(gamma=cfg.gamma)

    # The best of N, in the simulator
    acting = FlowRejectionActor(
        flow,
        qvalue,
        num_candidates=cfg.eval_num_candidates,
        transform=run.normalisation(buffer),
        chunk_size=cfg.policy_chunk_size,
    )
    return {"behaviour": behaviour, "values": values}, acting


@hydra.main(config_path="../configs/dqc", config_name="dqc", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["policy_chunk_size", "chunk_critic", "normalize"]) as run:
        if not run.is_goal_conditioned:
            raise ValueError(
                f"dataset={cfg.dataset} has rewards, and this script learns to reach goals: choose "
                "an oraclerep name (task=cube-single-oraclerep)."
            )
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        missing = () if cfg.chunk_critic else ("loss_chunk_qvalue",)
        terms = {term for phase in run.phases for term in phase.terms if term not in missing}
        run.train(
            losses,
            train,
            actor,
            phases=[phase.only(terms) for phase in run.phases],
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["values"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
