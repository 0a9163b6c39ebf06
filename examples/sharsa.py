"""SHARSA (https://arxiv.org/abs/2506.04168): the best of N subgoals, and how to get there.

    python examples/sharsa.py                                 # the paper's sizes, cube-single
    python examples/sharsa.py preset=cpu_goal                 # small networks, for two CPU cores
    python examples/sharsa.py task=cube-octuple-oraclerep     # 100M transitions, five tasks at once

One flow clones where the data is n steps later on the way to a goal, another what it does to get
there. Values of subgoals are learned from the data's own (SARSA), without a policy. Every setting
is in configs/sharsa/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.

The paper's settings of each environment, in configs/sharsa/task/:

    environment               n_steps   goals of the actor            q_aggregation
    cube-octuple              50        geometric, later              min
    puzzle-4x5, puzzle-4x6    25        geometric, half of them any   min
    humanoidmaze-giant        50        uniform, later                mean
"""

from __future__ import annotations

import math

import hydra
from omegaconf import DictConfig
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
    SubgoalActor,
)
from torchrl_mac.objectives import FlowBCLoss, InSampleValueLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t, R, s_{t+k}) towards goals, and the subgoals on the way."""
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        n_steps=cfg.n_steps,
        gamma=cfg.gamma,
        goals={key: GoalDistribution(**of) for key, of in cfg.goals.items()},
        negative_reward=False,
        truncation_is_success=cfg.truncation_is_success,
        subgoals=True,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], SubgoalActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    G = buffer.goal_spec.shape[-1]
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk

    # High level: a flow over subgoals; low level: one over actions, towards a subgoal
    proposals = FlowMatchingPolicy(
        NormedMLP(O + G + G + 1, G, cfg.policy_cells, **sizes),
        G,
        cfg.flow_steps,
        low=-math.inf,
        high=math.inf,
        in_keys=["observation", "goal", "subgoal_noise"],
        out_keys=["subgoal"],
    ).to(run.device)
    policy = FlowMatchingPolicy(
        NormedMLP(O + G + D + 1, D, cfg.policy_cells, **sizes),
        D,
        cfg.flow_steps,
        in_keys=["observation", "subgoal", "noise"],
    ).to(run.device)

    # Values: V(s, g), and critics of subgoals, of which the lowest one chooses
    state = ["observation", "goal"]
    value = ValueOperator(NormedMLP(O + G, 1, cfg.value_cells, **sizes), in_keys=state)
    critics = StackedMLP(2, O + G + G, 1, cfg.value_cells, broadcast=True, **sizes)
    on_the_way = ("subgoal", "value_goal")
    qvalue = QValueEnsemble(critics, q_aggregation=cfg.q_aggregation, in_keys=[*state, on_the_way])
    lowest = QValueEnsemble(critics, q_aggregation="min", in_keys=[*state, "subgoal"])

    losses = {
        "high": FlowBCLoss(proposals),
        "low": FlowBCLoss(policy),
        "values": InSampleValueLoss(value, qvalue, loss_function="bce", critic_reduction="sum"),
    }
    # a subgoal is whole, whatever actions are valid
    losses["high"].set_keys(action=("subgoal", "actor_goal"), valid=("subgoal", "valid"))
    losses["low"].set_keys(goal="subgoal", actor_goal="low_actor_goal")
    losses["values"].set_keys(action=on_the_way)
    losses["values"].make_value_estimator(gamma=cfg.gamma)

    chosen = FlowRejectionActor(
        proposals,
        lowest,
        num_candidates=cfg.eval_num_candidates,
        action_key="subgoal",
        noise_key="subgoal_noise",
    )
    acting = SubgoalActor(
        chosen, policy, chunk_size=cfg.chunk_size, transform=run.normalisation(buffer)
    )
    return losses, acting


@hydra.main(config_path="../configs/sharsa", config_name="sharsa", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["n_steps", "q_aggregation"]) as run:
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
