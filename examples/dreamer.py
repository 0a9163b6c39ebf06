"""Dreamer (https://arxiv.org/abs/1912.01603) on states and, if wanted, in chunks.

    python examples/dreamer.py                                   # sizes of the paper, cube-single
    python examples/dreamer.py preset=cpu                        # small networks, for two CPU cores
    python examples/dreamer.py preset=cpu_goal task=cube-single-oraclerep
    python examples/dreamer.py chunk_size=10 imagination_horizon=10 num_members=1

The actor climbs the returns of imagined rollouts by the gradients of the world model; nothing holds
it to the dataset. The world model predicts states and not pixels, one chunk of actions ahead.
Every setting is in configs/dreamer/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

from functools import partial

import hydra
from omegaconf import DictConfig
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.modules import (
    ChunkedWorldModel,
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, DreamerLoss
from torchrl_mac.trainers.experiment import Experiment


def make_buffer(cfg: DictConfig, run: Experiment, split: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, R, s_{t+h}) and goals, if any, normalised."""
    if run.is_goal_conditioned:
        goals = {key: GoalDistribution(**of) for key, of in cfg.goals.items()}
        labels = {"goals": goals, "negative_reward": cfg.negative_reward}
    else:
        labels = {"ignore_terminated": cfg.ignore_terminated}
    return run.dataset(split, chunk_size=cfg.chunk_size, gamma=cfg.gamma, **labels)


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay
) -> tuple[dict[str, LossModule], PolicyActor]:
    """The networks and what trains them; also the actor for the simulator's raw observations."""
    sizes = {"activation_class": cfg.activation, "device": run.device}
    network = partial(NormedMLP, **sizes)
    chunked = {"chunk_size": cfg.chunk_size}
    O = buffer.observation_spec["observation"].shape[-1]  # noqa: E741
    D = cfg.chunk_size * buffer.action_spec.shape[-1]  # the numbers of a chunk
    S, state, goal_key = O, ["observation"], None
    if run.is_goal_conditioned:
        goal_key = "goal"
        S, state = O + buffer.goal_spec.shape[-1], [*state, goal_key]

    # World model: the state h steps ahead, the chunk's reward, whether the task ends in it
    if cfg.num_members == 1:
        model_class, dynamics = ChunkedWorldModel, network(O + D, O, cfg.dynamics_cells)
    else:
        members = StackedMLP(
            cfg.num_members, O + D, 2 * O, cfg.dynamics_cells, broadcast=True, **sizes
        )
        model_class, dynamics = EnsembleWorldModel, GaussianEnsemble(members).to(run.device)
    world_model = model_class(
        dynamics,
        network(S + D, 1, cfg.head_cells),
        network(S + D, 1, cfg.head_cells),
        goal_key=goal_key,
        negative_reward=cfg.negative_reward if goal_key else None,
    )

    # Actor and critic
    moments = network(S, 2 * D, cfg.policy_cells)
    policy = TanhGaussianPolicy(moments, D, in_keys=[*state, "noise"])
    value = ValueOperator(network(S, 1, cfg.value_cells), in_keys=state)
    imagined, acting = (
        PolicyActor(policy, transform=transform, **chunked)
        for transform in (None, run.normalisation(buffer))
    )

    dreamer = DreamerLoss(
        imagined,
        value,
        world_model,
        imagination_horizon=cfg.imagination_horizon,
        entropy_bonus=cfg.entropy_bonus,
        ignore_terminated=cfg.ignore_imagined_terminated,
    )
    dreamer.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    return {"world_model": ChunkedWorldModelLoss(world_model), "dreamer": dreamer}, acting


@hydra.main(config_path="../configs/dreamer", config_name="dreamer", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    with Experiment(cfg, fixed=["num_members"]) as run:
        train, validation = (make_buffer(cfg, run, split) for split in ("train", "val"))
        losses, actor = make_losses(cfg, run, train)
        run.train(
            losses,
            train,
            actor,
            validation_buffer=validation,
            target_updaters=SoftUpdate(losses["dreamer"], tau=cfg.tau),
        )


if __name__ == "__main__":
    main()
