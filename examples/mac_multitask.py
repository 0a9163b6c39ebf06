"""MAC for several tasks of an environment in one run: one model of the world, many goals in it.

    python examples/mac_multitask.py preset=cpu
    python examples/mac_multitask.py task=scene task_ids=[1,4] preset=cpu

Behaviour and dynamics know nothing of rewards. They are learned once; reward, termination, V and Q
are then learned on top of them for all tasks together, as stacked networks in one batched pass.
Settings are those of mac.py, and those in configs/mac/mac_multitask.yaml.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from statistics import fmean

import hydra
import torch
from omegaconf import DictConfig
from torchrl._utils import logger as torchrl_logger
from torchrl.envs import RewardScaling
from torchrl.modules import ValueOperator
from torchrl.objectives import LossModule, SoftUpdate

from torchrl_mac.data import OGBenchExperienceReplay, StackedReplayBuffer
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    StackedMLP,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers.experiment import Experiment

SHARED = {"loss_flow", "loss_distillation", "loss_dynamics"}
OWN = {"loss_reward", "loss_termination", "loss_value", "loss_qvalue"}


def make_buffer(cfg: DictConfig, run: Experiment, split: str, task: str) -> OGBenchExperienceReplay:
    """The dataset as (s_t, a_t ... a_{t+h-1}, r, s_{t+h}), with the rewards of a task."""
    mean = RewardScaling(loc=0.0, scale=1 / cfg.chunk_size, in_keys=[("next", "reward")])
    return run.dataset(
        split,
        dataset=task,
        chunk_size=cfg.chunk_size,
        gamma=cfg.gamma,
        ignore_terminated=cfg.ignore_terminated,
        transforms=[mean] if cfg.average_rewards else [],
    )


def make_losses(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay, num_tasks: int
) -> tuple[dict[str, LossModule], list[FlowRejectionActor]]:
    """The networks and what trains them; also each task's actor for raw observations."""
    shared = partial(NormedMLP, activation_class=cfg.activation, device=run.device)
    of_tasks = partial(StackedMLP, num_tasks, activation_class=cfg.activation, device=run.device)
    S = buffer.observation_spec["observation"].shape[-1]
    A = buffer.action_spec.shape[-1]
    D = cfg.chunk_size * A  # the numbers of a chunk
    R = (cfg.policy_chunk_size or cfg.chunk_size) * A  # those that it is ranked by

    # Behaviour and dynamics of all tasks
    flow = FlowMatchingPolicy(shared(S + D + 1, D, cfg.policy_cells), D, cfg.flow_steps)
    policy = OneStepPolicy(shared(S + D, D, cfg.policy_cells), D)
    flow, policy = flow.to(run.device), policy.to(run.device)
    candidates = flow if cfg.policy == "flow" else policy
    dynamics = shared(S + D, S, cfg.dynamics_cells)

    # Rewards, ends and values of each
    heads = (of_tasks(S + D, 1, cfg.head_cells) for _ in range(2))
    world_model = ChunkedWorldModel(dynamics, *heads)
    value = ValueOperator(of_tasks(S, 1, cfg.value_cells))
    keys = ["observation", "action"]
    critics = of_tasks(S + R, 1, cfg.value_cells, first_actions=cfg.policy_chunk_size)
    qvalue = ValueOperator(critics, in_keys=keys)

    chunked = {"chunk_size": cfg.chunk_size}
    imagined = FlowRejectionActor(candidates, qvalue, num_candidates=cfg.num_candidates, **chunked)
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
    acting = [
        FlowRejectionActor(
            candidates,
            ValueOperator(qvalue.module.network(k), in_keys=keys),  # shares its memory
            num_candidates=cfg.eval_num_candidates,
            transform=run.normalisation(buffer),
            **chunked,
        )
        for k in range(num_tasks)
    ]
    return losses, acting


@hydra.main(config_path="../configs/mac", config_name="mac_multitask", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates each task, and leaves summary.json, curves and policies behind."""
    with Experiment(cfg, fixed=["average_rewards", "policy_chunk_size"]) as run:
        if run.is_goal_conditioned:
            raise ValueError(
                f"dataset={cfg.dataset} makes one agent for all tasks, which is mac.py's work. "
                "Here each has its own: choose a single-task configuration (task=cube-single)."
            )
        if torch.distributed.is_initialized():
            raise ValueError("mac_multitask.py trains in one process: start it without torchrun.")
        tasks = [str(dataclasses.replace(run.task, task_id=task_id)) for task_id in cfg.task_ids]
        train, validation = (
            StackedReplayBuffer({task: make_buffer(cfg, run, split, task) for task in tasks})
            for split in ("train", "val")
        )
        first = train.buffers[tasks[0]]
        losses, actors = make_losses(cfg, run, first, len(tasks))
        target = SoftUpdate(losses["values"], tau=cfg.tau)

        def phases(terms: set[str], scale: float = 1.0) -> list:
            found = (phase.only(terms, batch_scale=scale) for phase in run.phases)
            return [phase for phase in found if phase is not None]

        shared = run.trainer(
            {name: losses[name] for name in ("behaviour", "world_model")},
            first,
            digest=first.digest,
            phases=phases(SHARED),
            name="shared",
            validation_buffer=validation.buffers[tasks[0]],
        )
        own = run.trainer(
            losses,
            train,
            digest=first.digest,
            phases=phases(OWN, cfg.task_batch_scale),
            name="own",
            target_updaters=target,
            validation_buffer=validation,
            first_update=shared.num_updates,
        )
        if not run.resume(own, "own"):
            run.resume(shared, "shared")
            shared.train()
            own.progress.train_seconds = shared.progress.train_seconds
        result = own.train()
        rates = {
            task: run.evaluator(actor, task)()["success_rate"]
            for task, actor in zip(tasks, actors, strict=True)
        }
        for task, rate in rates.items():
            torchrl_logger.info(f"{task}: success rate {rate:.2f}")
        summary = {"success_rate": fmean(rates.values()), "success_rates": rates, **result}
        exports = {f"policies/{task}": (actor, task) for task, actor in zip(tasks, actors)}
        run.report(summary, first.digest, exports)


if __name__ == "__main__":
    main()
