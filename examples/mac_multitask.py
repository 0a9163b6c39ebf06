"""MAC for several tasks of an environment in one run: one model of the world, many goals in it.

    python examples/mac_multitask.py preset=cpu
    python examples/mac_multitask.py task=scene task_ids=[1,4] preset=cpu

Behaviour and dynamics know nothing of rewards. They are learned once; reward, termination, V and Q
are then learned on top of them for all tasks together, as stacked networks in one batched pass.
Settings are those of mac.py, and `task_ids` (configs/mac_multitask.yaml).
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from statistics import fmean
from typing import Any

import hydra
import torch
from mac import (
    SWITCHES,
    begin,
    is_goal_conditioned,
    make_buffer,
    make_checkpoints,
    make_evaluator,
    make_loggers,
    make_losses,
    settings_of,
)
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl._utils import logger as torchrl_logger
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.modules import FlowRejectionActor, save_policy
from torchrl_mac.trainers import (
    OfflineTrainer,
    Phase,
    RunCheckpoints,
    RunFolder,
    plot_curves,
    write_summary,
)

SHARED = {"loss_flow", "loss_distillation", "loss_dynamics"}
OWN = {"loss_reward", "loss_termination", "loss_value", "loss_qvalue"}


class TaskBuffers:
    """One buffer for each task, sampled together: batches are ``[tasks, B]``."""

    def __init__(self, buffers: list[OGBenchExperienceReplay]) -> None:
        self.buffers = buffers

    def sample(self, batch_size: int) -> TensorDictBase:
        """As a replay buffer."""
        return torch.stack([buffer.sample(batch_size) for buffer in self.buffers])

    def state_dict(self) -> list[dict[str, Any]]:
        """As a replay buffer."""
        return [buffer.state_dict() for buffer in self.buffers]

    def load_state_dict(self, state_dict: list[dict[str, Any]]) -> None:
        """As a replay buffer."""
        for buffer, state in zip(self.buffers, state_dict, strict=True):
            buffer.load_state_dict(state)


def select(phases: list[Phase], terms: set[str], batch_scale: float = 1.0) -> list[Phase]:
    """The phases with these terms alone, and batches of another size."""
    return [
        dataclasses.replace(
            phase,
            losses=losses,
            batch_size=max(1, round(batch_scale * phase.batch_size)),
            eval_interval=0,
        )
        for phase in phases
        if (losses := [term for term in phase.losses if term in terms])
    ]


@hydra.main(config_path="../configs", config_name="mac_multitask", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains, evaluates each task, and leaves summary.json and curves.png behind."""
    _, device, output = begin(cfg)
    if is_goal_conditioned(cfg):
        raise ValueError(
            f"dataset={cfg.dataset} makes one agent for all tasks, which is mac.py's work. Here "
            "each task has its own: choose a single-task configuration (task=cube-single)."
        )
    if torch.distributed.is_initialized():
        raise ValueError("mac_multitask.py trains in one process: start it without torchrun.")
    tasks = [OmegaConf.merge(cfg, {"task_id": task_id}) for task_id in cfg.task_ids]
    train, validation = (
        TaskBuffers([make_buffer(task, device, split) for task in tasks])
        for split in ("train", "val")
    )
    losses, actor = make_losses(cfg, train.buffers[0], device, num_tasks=len(tasks))
    phases = [Phase(**phase) for phase in OmegaConf.to_container(cfg.phases, resolve=True)]
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder(output, resume=cfg.resume))
        loggers = make_loggers(cfg, run)
        for logger in loggers:
            stack.callback(logger.close)
        settings = {
            "loggers": loggers,
            "log_interval": cfg.log_interval,
            **{name: cfg[name] for name in SWITCHES},
        }

        def checkpoints(name: str) -> RunCheckpoints:
            folder = run.path / "checkpoints" / name
            return stack.enter_context(closing(make_checkpoints(cfg, folder, train.buffers[0])))

        shared = OfflineTrainer(
            {name: losses[name] for name in ("behaviour", "world_model")},
            train.buffers[0],
            select(phases, SHARED),
            validation_buffer=validation.buffers[0],
            checkpoints=checkpoints("shared"),
            **settings,
        )
        own = OfflineTrainer(
            losses,
            train,
            select(phases, OWN, cfg.task_batch_scale),
            target_updater=SoftUpdate(losses["values"], tau=cfg.tau),
            validation_buffer=validation,
            first_update=shared.num_updates,
            checkpoints=checkpoints("own"),
            **settings,
        )
        if not own.resume(run.checkpoint):
            shared.resume()
            shared.train()
            own.train_seconds = shared.train_seconds
        result = own.train()

        rates = {}
        for k, task in enumerate(tasks):
            acting = actor_of_task(actor, k)
            save_policy(acting, run.path / "policies" / task.dataset, **settings_of(task))
            with closing(make_evaluator(task, acting, device)) as evaluator:
                rates[task.dataset] = evaluator()["success_rate"]
            torchrl_logger.info(f"{task.dataset}: success rate {rates[task.dataset]:.2f}")
        summary = {
            "success_rate": fmean(rates.values()),
            "success_rates": rates,
            "episodes": cfg.eval_episodes,
            **result,
            "seed": cfg.seed,
            "dataset_digest": train.buffers[0].digest,
            **{name: cfg[name] for name in SWITCHES},
        }
        write_summary(run.path / "summary.json", summary)
        plot_curves(run.path / "curves.png", loggers[0])


def actor_of_task(actor: FlowRejectionActor, k: int) -> FlowRejectionActor:
    """The actor with the k-th task's Q."""
    network = actor.qvalue_network.module.network(k)
    return FlowRejectionActor(
        actor.policy,
        ValueOperator(network, in_keys=actor.qvalue_network.in_keys),
        num_candidates=actor.num_candidates,
        chunk_size=actor.chunk_size,
        transform=actor.transform,
    )


if __name__ == "__main__":
    main()
