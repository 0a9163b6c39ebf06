"""MAC, model-based RL with action chunks (https://arxiv.org/abs/2512.08108), on OGBench.

    python examples/mac.py                                   # the paper's sizes, cube-single
    python examples/mac.py preset=cpu                        # small networks, for two CPU cores
    python examples/mac.py task=scene task_id=4 seed=1 wandb=online
    python examples/mac.py task=puzzle-3x3-oraclerep         # goal-conditioned, five tasks at once
    python examples/mac.py policy=one_step                   # ablation: a student without a teacher
    python examples/mac.py chunk_size=25 policy_chunk_size=5     # chunks ranked by their beginning

Every setting is in configs/mac/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

from functools import partial

import hydra
from omegaconf import DictConfig
from torchrl.envs import RewardScaling
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, r, s_{t+h}) and goals, if any, normalised."""
    if run.is_goal_conditioned:
        goals = {key: GoalDistribution(**of) for key, of in cfg.goals.items()}
        labels = {"goals": goals, "negative_reward": cfg.negative_reward}
        return run.dataset(split, chunk_size=cfg.chunk_size, gamma=cfg.gamma, **labels)
    # the mean of a chunk's discounted rewards, in place of their sum
    mean = RewardScaling(loc=0.0, scale=1 / cfg.chunk_size, in_keys=[("next", "reward")])
    return run.dataset(
        split,
        chunk_size=cfg.chunk_size,
        gamma=cfg.gamma,
        ignore_terminated=cfg.ignore_terminated,
        transforms=[mean] if cfg.average_rewards else [],
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], FlowRejectionActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    network = partial(NormedMLP, activation_class=cfg.activation, device=run.device)
    chunked = {"chunk_size": cfg.chunk_size}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    A = buffer.action_spec.shape[-1]
    D = cfg.chunk_size * A  # the numbers of a chunk
    R = (cfg.policy_chunk_size or cfg.chunk_size) * A  # those that it is ranked by
    S, state, goal_key = O, ["observation"], None
    if run.is_goal_conditioned:
        goal_key = "goal"
        S, state = O + buffer.goal_spec.shape[-1], [*state, goal_key]

    # Behaviour: a flow over chunks, and its one-step student
    noisy = [*state, "noise"]
    velocity = network(S + D + 1, D, cfg.policy_cells)
    flow = FlowMatchingPolicy(velocity, D, cfg.flow_steps, in_keys=noisy).to(run.device)
    student = network(S + D, D, cfg.policy_cells)
    policy = OneStepPolicy(student, D, in_keys=noisy).to(run.device)
    candidates = flow if cfg.policy == "flow" else policy

    # World model: the state h steps ahead, the chunk's reward, whether the task ends in it
    world_model = ChunkedWorldModel(
        network(O + D, O, cfg.dynamics_cells),
        network(S + D, 1, cfg.head_cells),
        network(S + D, 1, cfg.head_cells),
        goal_key=goal_key,
        negative_reward=cfg.negative_reward if goal_key else None,
    )

    # Values: V(s), and Q(s, chunk) to choose chunks by, or by their first actions
    value = ValueOperator(network(S, 1, cfg.value_cells), in_keys=state)
    critic = network(S + R, 1, cfg.value_cells, first_actions=cfg.policy_chunk_size)
    qvalue = ValueOperator(critic, in_keys=[*state, "action"])

    # The best of N chunks, in imagination and in the simulator
    imagined, acting = (
        FlowRejectionActor(candidates, qvalue, num_candidates=N, transform=transform, **chunked)
        for N, transform in (
            (cfg.num_candidates, None),
            (cfg.eval_num_candidates, run.normalisation(buffer)),
        )
    )

    values = ValueExpansionLoss(
        imagined,
        value,
        qvalue,
        world_model,
        imagination_horizon=cfg.imagination_horizon,
        ignore_terminated=cfg.ignore_imagined_terminated,
        expectile=cfg.kappa_d,
    )
    values.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    losses = {
        "behaviour": FlowBCLoss(flow, policy, teacher=cfg.policy != "one_step"),
        "world_model": ChunkedWorldModelLoss(world_model),
        "values": values,
    }
    return losses, acting


@hydra.main(config_path="../configs/mac", config_name="mac", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["average_rewards", "policy_chunk_size"]) as run:
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
