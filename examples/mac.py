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
import math
import os

if ctypes.util.find_library("EGL"):  # MuJoCo reads it when first imported, by TorchRL
    os.environ.setdefault("MUJOCO_GL", "egl")

from contextlib import ExitStack, closing
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

from torchrl_mac.data import GoalDistribution, OGBenchExperienceReplay
from torchrl_mac.datasets import NUM_TASKS, OGBenchName
from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    StackedMLP,
    TanhGELU,
    save_policy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers import (
    Evaluator,
    JSONLinesLogger,
    OfflineTrainer,
    Phase,
    RunCheckpoints,
    RunFolder,
    join_group,
    plot_curves,
    write_summary,
    write_video,
)

SWITCHES = ("compile", "cudagraphs", "precision", "max_grad_norm")  # of every update
FIXED = (  # what a run cannot go on without
    *("dataset", "dataset_digest", "task_ids", "seed", "chunk_size", "average_rewards"),
    *("activation", "policy_cells", "dynamics_cells", "head_cells", "value_cells"),
)


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
        timeout=cfg.eval_timeout,
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


def make_loggers(cfg: DictConfig, run: RunFolder) -> list[Logger]:
    """CSV files, lines of JSON and, if wanted, Weights & Biases."""
    loggers: list[Logger] = [kind("logs", str(run.path)) for kind in (CSVLogger, JSONLinesLogger)]
    if cfg.wandb != "disabled":
        offline = cfg.wandb == "offline"
        settings = {"save_dir": str(run.path), "project": cfg.project, "id": run.id}
        loggers.append(WandbLogger(run.path.name, offline=offline, **settings))
    for logger in loggers:
        logger.log_hparams(OmegaConf.to_container(cfg, resolve=True))
    return loggers


def make_checkpoints(
    cfg: DictConfig,
    folder: Path,
    buffer: OGBenchExperienceReplay,
    actor: FlowRejectionActor | None = None,
) -> RunCheckpoints:
    """Where the run's state is saved; processes of torchrun must agree, so not by the clock."""
    alone = not torch.distributed.is_initialized()
    return RunCheckpoints(
        folder,
        actor=actor,
        config={**settings_of(cfg), "dataset_digest": buffer.digest},
        fixed=FIXED,
        keep_last=cfg.keep_checkpoints,
        interval=cfg.checkpoint_interval,
        interval_seconds=cfg.checkpoint_seconds if alone else math.inf,
    )


def settings_of(cfg: DictConfig) -> dict:
    """The settings as plain values, without what only says how to go on."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in settings.items() if key != "resume"}


def begin(cfg: DictConfig) -> tuple[int, torch.device, Path]:
    """Seeds the run; which of its processes this is, its device, and the folder for results."""
    rank, device = join_group(cfg.device)
    torch.manual_seed(cfg.seed)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    return rank, device, Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)


@hydra.main(config_path="../configs", config_name="mac", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates and reports; the same command goes on where it was interrupted."""
    rank, device, output = begin(cfg)
    first = rank == 0  # of the processes of torchrun: only the first one evaluates and writes

    with ExitStack() as stack:
        run = stack.enter_context(RunFolder(output, resume=cfg.resume))
        buffer = make_buffer(cfg, device, "train", rank)
        losses, actor = make_losses(cfg, buffer, device)
        if not first:  # parameters are those of the first; noise is each one's own
            torch.manual_seed(cfg.seed + 2**32 * rank)
        evaluator = stack.enter_context(closing(make_evaluator(cfg, actor, device)))
        loggers = make_loggers(cfg, run) if first else []
        for logger in loggers:
            stack.callback(logger.close)
        name = "checkpoints" if first else f"checkpoints-rank{rank}"
        checkpoints = make_checkpoints(cfg, run.path / name, buffer, actor)
        stack.enter_context(closing(checkpoints))

        trainer = OfflineTrainer(
            losses,
            buffer,
            [Phase(**phase) for phase in OmegaConf.to_container(cfg.phases, resolve=True)],
            target_updater=SoftUpdate(losses["values"], tau=cfg.tau),
            validation_buffer=make_buffer(cfg, device, "val"),
            evaluate=evaluator if first else None,
            monitor=partial(evaluator.submit, cfg.eval_interim_episodes) if first else None,
            loggers=loggers,
            checkpoints=checkpoints,
            log_interval=cfg.log_interval,
            progress_bar=first,
            **{name: cfg[name] for name in SWITCHES},
            distributed=torch.distributed.is_initialized(),
        )
        chosen = run.checkpoint
        if chosen is not None and not first:  # its own beside the first one's
            chosen = chosen.parent.with_name(name) / chosen.name
        trainer.resume(chosen)
        result = trainer.train()
        if first:
            report(cfg, run, buffer, actor, evaluator, loggers[0], result)


def report(
    cfg: DictConfig,
    run: RunFolder,
    buffer: OGBenchExperienceReplay,
    actor: FlowRejectionActor,
    evaluator: Evaluator,
    logger: CSVLogger,
    result: dict[str, float],
) -> None:
    """Writes policy/, summary.json, curves.png and evaluation.mp4."""
    save_policy(actor, run.path / "policy", **settings_of(cfg))
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
    write_summary(run.path / "summary.json", summary)
    plot_curves(run.path / "curves.png", logger)
    if cfg.video_episodes:
        try:
            device = next(actor.parameters()).device
            make_env = partial(OGBenchEnv, cfg.dataset, device=device, from_pixels=True)
            frames = evaluator.record(make_env, cfg.video_episodes)
            write_video(run.path / "evaluation.mp4", frames)
        except (ImportError, RuntimeError) as error:  # no renderer: the result stands without it
            torchrl_logger.warning(f"No video: {error}")
    torchrl_logger.info(
        f"Success rate {summary['success_rate']:.2f} over {cfg.eval_episodes} episodes of "
        f"{cfg.dataset}; summary, curves and video are in {run.path}"
    )


if __name__ == "__main__":
    main()
