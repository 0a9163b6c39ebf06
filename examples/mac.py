"""MAC, model-based RL with action chunks (https://arxiv.org/abs/2512.08108), on OGBench.

    python examples/mac.py                                   # the paper's sizes, cube-single
    python examples/mac.py preset=cpu                        # small networks, for two CPU cores
    python examples/mac.py task=scene task_id=4 seed=1 wandb=online
    python examples/mac.py task=puzzle-3x3-oraclerep         # goal-conditioned, five tasks at once

Every setting is in configs/. The dataset must be in `data_dir`:
`torchrl-mac-data generate cube-single-play-v0 --out data`.
"""

from __future__ import annotations

import ctypes.util
import os

if ctypes.util.find_library("EGL"):  # MuJoCo reads it when first imported, by TorchRL
    os.environ.setdefault("MUJOCO_GL", "egl")

from functools import partial
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchrl._utils import logger as torchrl_logger
from torchrl.envs import Compose, DeviceCastTransform, RewardScaling
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger, WandbLogger
from torchrl.record.loggers import Logger

from torchrl_mac.data import NUM_TASKS, GoalDistribution, OGBenchExperienceReplay, OGBenchName
from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    StackedMLP,
    TanhGELU,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers import (
    Evaluator,
    OfflineTrainer,
    Phase,
    join_group,
    plot_curves,
    write_summary,
    write_video,
)

SWITCHES = ("compile", "cudagraphs", "precision")  # of every update


def is_goal_conditioned(cfg: DictConfig) -> bool:
    """Whether one agent learns all tasks of the environment, told which by a goal."""
    name = OGBenchName.parse(cfg.dataset)
    if name.mode == "goal":
        raise ValueError(
            f"dataset={cfg.dataset} has neither rewards nor oracle representations: name a task "
            "(...-singletask-task2-v0) or all of them (...-oraclerep-v0)."
        )
    if name.mode == "oraclerep" and cfg.task_id != "all":
        raise ValueError(
            f"dataset={cfg.dataset} has all tasks of its environment, but task_id={cfg.task_id}: "
            "leave it out, or choose a single task (task=cube-single task_id=2)."
        )
    if name.mode == "singletask" and name.task_id not in (None, cfg.task_id):
        raise ValueError(
            f"dataset={cfg.dataset} contradicts task_id={cfg.task_id}: choose by task_id alone."
        )
    return name.mode == "oraclerep"


def make_evaluator(cfg: DictConfig, actor: FlowRejectionActor, device: torch.device) -> Evaluator:
    """Seeded episodes in the simulator; of all tasks, where one agent has learned them all."""
    return Evaluator(
        partial(OGBenchEnv, cfg.dataset, device="cpu" if cfg.eval_workers else device),
        actor,
        task_ids=range(1, NUM_TASKS + 1) if is_goal_conditioned(cfg) else None,
        num_episodes=cfg.eval_episodes,
        num_envs=cfg.eval_num_envs,
        num_workers=cfg.eval_workers,
        replan_interval=cfg.replan_interval,
        seed=cfg.eval_seed,
    )


def make_buffer(
    cfg: DictConfig, device: torch.device, split: str, rank: int = 0
) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, r, s_{t+h}) and goals, if any, normalised."""
    goals = {}
    if is_goal_conditioned(cfg):
        goals = {"goals": {key: GoalDistribution(**of) for key, of in cfg.goals.items()}}
    buffer = OGBenchExperienceReplay(
        cfg.dataset,
        cfg.phases[0].batch_size if cfg.prefetch else None,  # what is drawn ahead at first
        root=cfg.root,
        source=cfg.data_dir,
        split=split,
        chunk_size=cfg.chunk_size,
        gamma=cfg.gamma,
        ignore_terminated=cfg.ignore_terminated and not goals,
        negative_reward=cfg.negative_reward,
        device=device if cfg.data_on_device else "cpu",
        prefetch=cfg.prefetch or None,
        generator=torch.Generator().manual_seed(cfg.seed + 2**32 * rank),
        **goals,
    )
    buffer.append_transform(buffer.observation_norm())
    if goals:
        buffer.append_transform(buffer.goal_norm())
    elif cfg.average_rewards:  # the mean of the chunk's discounted rewards instead of their sum
        scaling = RewardScaling(loc=0.0, scale=1 / cfg.chunk_size, in_keys=[("next", "reward")])
        buffer.append_transform(scaling)
    buffer.append_transform(DeviceCastTransform(device))
    return buffer


def make_losses(
    cfg: DictConfig,
    buffer: OGBenchExperienceReplay,
    device: torch.device,
    num_tasks: int | None = None,
):
    """The networks and what trains them; also the actor for the simulator's raw observations.

    With ``num_tasks`` there is one network for each task where rewards have a say.
    """
    obs_dim, action_dim = buffer.metadata["observation_dim"], buffer.metadata["action_dim"]
    h, chunk_dim = cfg.chunk_size, cfg.chunk_size * action_dim
    goal = ["goal"] if is_goal_conditioned(cfg) else []
    state, state_dim = ["observation", *goal], obs_dim
    normalise = [buffer.observation_norm(in_keys=["observation"])]
    if goal:
        state_dim += buffer.goal_spec.shape[-1]
        normalise.append(buffer.goal_norm(in_keys=goal))
    activation = {"gelu": TanhGELU, "relu": nn.ReLU}[cfg.activation]

    def network(cells: list[int], inputs: int, outputs: int) -> NormedMLP:
        return NormedMLP(inputs, outputs, cells, activation_class=activation, device=device)

    def task_network(*sizes) -> NormedMLP | StackedMLP:
        if num_tasks is None:
            return network(*sizes)
        cells, inputs, outputs = sizes
        return StackedMLP(
            num_tasks, inputs, outputs, cells, activation_class=activation, device=device
        )

    # Behaviour: a flow over chunks, and its one-step student
    flow = FlowMatchingPolicy(
        network(cfg.policy_cells, state_dim + chunk_dim + 1, chunk_dim),
        chunk_dim,
        cfg.flow_steps,
        in_keys=[*state, "noise"],
    ).to(device)
    policy = OneStepPolicy(
        network(cfg.policy_cells, state_dim + chunk_dim, chunk_dim),
        chunk_dim,
        in_keys=[*state, "noise"],
    ).to(device)

    # World model: the state h steps ahead, the chunk's reward, whether the task ends in it
    world_model = ChunkedWorldModel(
        network(cfg.dynamics_cells, obs_dim + chunk_dim, obs_dim),
        task_network(cfg.head_cells, state_dim + chunk_dim, 1),
        task_network(cfg.head_cells, state_dim + chunk_dim, 1),
        goal_key=goal[0] if goal else None,
        negative_reward=cfg.negative_reward if goal else None,
    )

    # Values: V(s), and Q(s, chunk) to choose chunks by
    value = ValueOperator(task_network(cfg.value_cells, state_dim, 1), in_keys=state)
    qvalue = ValueOperator(
        task_network(cfg.value_cells, state_dim + chunk_dim, 1), in_keys=[*state, "action"]
    )
    imagined = FlowRejectionActor(policy, qvalue, num_candidates=cfg.num_candidates, chunk_size=h)
    acting = FlowRejectionActor(
        policy,
        qvalue,
        num_candidates=cfg.eval_num_candidates,
        chunk_size=h,
        transform=Compose(*normalise).to(device),
    )

    values = ValueExpansionLoss(
        imagined,
        value,
        qvalue,
        world_model,
        imagination_horizon=cfg.imagination_horizon,
        ignore_terminated=cfg.ignore_imagined_terminated,
    )
    values.make_value_estimator(gamma=cfg.gamma, lmbda=cfg.lmbda)
    losses = {
        "behaviour": FlowBCLoss(flow, policy),
        "world_model": ChunkedWorldModelLoss(world_model),
        "values": values,
    }
    return losses, acting


def make_loggers(cfg: DictConfig, output: Path) -> list[Logger]:
    """CSV files and, if wanted, Weights & Biases."""
    loggers = [CSVLogger("logs", log_dir=str(output))]
    if cfg.wandb != "disabled":
        offline = cfg.wandb == "offline"
        loggers.append(
            WandbLogger(output.name, offline=offline, save_dir=str(output), project=cfg.project)
        )
    for logger in loggers:
        logger.log_hparams(OmegaConf.to_container(cfg, resolve=True))
    return loggers


def begin(cfg: DictConfig) -> tuple[int, torch.device, Path]:
    """Seeds the run; which of its processes this is, its device, and the folder for results."""
    rank, device = join_group(cfg.device)
    torch.manual_seed(cfg.seed)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    return rank, device, Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)


@hydra.main(config_path="../configs", config_name="mac", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates, and leaves summary.json, curves.png and evaluation.mp4 behind."""
    rank, device, output = begin(cfg)
    first = rank == 0  # of the processes of torchrun: only the first one evaluates and writes

    buffer = make_buffer(cfg, device, "train", rank)
    losses, actor = make_losses(cfg, buffer, device)
    if not first:  # parameters are those of the first; noise is each one's own
        torch.manual_seed(cfg.seed + 2**32 * rank)
    evaluator = make_evaluator(cfg, actor, device)
    loggers = make_loggers(cfg, output) if first else []

    trainer = OfflineTrainer(
        losses,
        buffer,
        [Phase(**phase) for phase in OmegaConf.to_container(cfg.phases, resolve=True)],
        target_updater=SoftUpdate(losses["values"], tau=cfg.tau),
        validation_buffer=make_buffer(cfg, device, "val"),
        evaluate=evaluator if first else None,
        monitor=partial(evaluator.submit, cfg.eval_interim_episodes) if first else None,
        loggers=loggers,
        log_interval=cfg.log_interval,
        progress_bar=first,
        **{name: cfg[name] for name in SWITCHES},
        distributed=torch.distributed.is_initialized(),
    )
    result = trainer.train()
    if not first:
        return

    trainer.save(output / "checkpoint.pt", actor=actor)
    summary = {
        "success_rate": result.pop("success_rate"),  # of several tasks, their mean
        "episodes": cfg.eval_episodes,
        **result,
        "seed": cfg.seed,
        "task": cfg.dataset,
        "transitions": len(buffer),
        "dataset_digest": buffer.digest,
        "replan_interval": cfg.replan_interval,
        **{name: cfg[name] for name in SWITCHES},
    }
    write_summary(output / "summary.json", summary)
    plot_curves(output / "curves.png", loggers[0])
    if cfg.video_episodes:
        try:
            make_env = partial(OGBenchEnv, cfg.dataset, device=device, from_pixels=True)
            frames = evaluator.record(make_env, cfg.video_episodes)
            write_video(output / "evaluation.mp4", frames)
        except (ImportError, RuntimeError) as error:  # no renderer: the result stands without it
            torchrl_logger.warning(f"No video: {error}")
    evaluator.close()
    torchrl_logger.info(
        f"Success rate {summary['success_rate']:.2f} over {cfg.eval_episodes} episodes of "
        f"{cfg.dataset}; summary, curves and video are in {output}"
    )


if __name__ == "__main__":
    main()
