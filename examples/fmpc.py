"""FMPC, D-MPC (https://arxiv.org/abs/2410.05364) with flows, as MAC's paper has it.

    python examples/fmpc.py                                   # the paper's sizes, cube-single
    python examples/fmpc.py preset=cpu                        # small networks, for two CPU cores
    python examples/fmpc.py task=puzzle-3x3-oraclerep         # goal-conditioned, five tasks at once
    python examples/fmpc.py preset=cpu dynamics=mlp           # one predicted future, not a sample

One flow clones single actions, another imagines the next 32 states after one. Of 64 actions that
one is executed whose imagined future has the highest value (MAC: https://arxiv.org/abs/2512.08108).
Every setting is in configs/fmpc/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

from functools import partial

import hydra
from omegaconf import DictConfig
from torchrl.envs import RewardScaling, UnaryTransform
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    FlowFutureModel,
    FlowMatchingPolicy,
    FuturePlanningActor,
    MLPFutureModel,
    NormedMLP,
)
from torchrl_mac.objectives import FlowBCLoss, FutureModelLoss, FutureValueLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t, s_{t+1} ... s_{t+h}, R, G) and goals, if any, normalised."""
    transforms, labels = [], {"ignore_terminated": cfg.ignore_terminated}
    # of a window's actions those that are proposed together
    first = UnaryTransform(["action"], ["action"], fn=lambda action: action[:, : cfg.chunk_size])
    if cfg.horizon > 1:
        transforms.append(first)
    if run.is_goal_conditioned:
        goals = {key: GoalDistribution(**of) for key, of in cfg.goals.items()}
        labels = {"goals": goals, "negative_reward": False}
    elif cfg.average_rewards:  # the mean of the window's discounted rewards, in place of their sum
        scale = 1 / cfg.horizon
        transforms.append(RewardScaling(loc=0.0, scale=scale, in_keys=[("next", "reward")]))
    return run.dataset(
        split,
        chunk_size=cfg.horizon,
        gamma=cfg.gamma,
        future=True,
        return_gamma=cfg.return_gamma,
        transforms=transforms,
        **labels,
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], FuturePlanningActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    network = partial(NormedMLP, activation_class=cfg.activation, device=run.device)
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a proposal
    F = cfg.horizon * O  # and of a future
    S, goal = O, []
    if run.is_goal_conditioned:
        S, goal = O + buffer.goal_spec.shape[-1], ["goal"]
    state = ["observation", *goal]

    # Proposals: a flow over actions
    velocity = network(S + D + 1, D, cfg.policy_cells)
    policy = FlowMatchingPolicy(velocity, D, cfg.flow_steps, in_keys=[*state, "noise"])
    policy = policy.to(run.device)

    # Dynamics: the next h states at once, by a flow or as one prediction
    if cfg.dynamics == "flow":
        velocity = network(O + D + F + 1, F, cfg.dynamics_cells)
        future_model = FlowFutureModel(velocity, F, cfg.flow_steps).to(run.device)
    else:
        future_model = MLPFutureModel(network(O + D, F, cfg.dynamics_cells), cfg.horizon)

    # Values: V(s) of what the data earns from s on, and Q(future, action) to choose actions by
    value = ValueOperator(network(S, 1, cfg.value_cells), in_keys=state)
    reads = [("future", "observation"), *goal, "action"]
    qvalue = ValueOperator(network(F + S - O + D, 1, cfg.value_cells), in_keys=reads)

    values = FutureValueLoss(
        value,
        qvalue,
        horizon=cfg.horizon,
        loss_function="bce" if run.is_goal_conditioned else "l2",
    )
    values.make_value_estimator(gamma=cfg.gamma)
    losses = {
        "behaviour": FlowBCLoss(policy),
        "dynamics": FutureModelLoss(future_model),
        "values": values,
    }
    acting = FuturePlanningActor(
        policy,
        qvalue,
        future_model,
        num_candidates=cfg.eval_num_candidates,
        transform=run.normalisation(buffer),
        chunk_size=cfg.chunk_size,
    )
    return losses, acting


@hydra.main(config_path="../configs/fmpc", config_name="fmpc", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    fixed = ["horizon", "dynamics", "average_rewards", "return_gamma"]
    with Experiment(cfg, fixed=fixed) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(losses, train, actor, validation_buffer=validation)


if __name__ == "__main__":
    main()
