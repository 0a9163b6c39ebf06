"""Checks of a script's settings, before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torchrl.envs import EnvBase

from torchrl_mac.data import ActionChunkExperienceReplay
from torchrl_mac.datasets import OGBenchName

__all__ = ["check_settings", "check_widths", "resolve_task"]

Rule = Callable[[Any], str | None]  # what a value must be, if it is not


def _count(least: int = 0, *, optional: bool = False) -> Rule:
    def check(value: Any) -> str | None:
        if (optional and value is None) or (type(value) is int and value >= least):
            return None
        return f"a whole number of at least {least}" + (" or null" if optional else "")

    return check


def _number(low: float, high: float = math.inf, *, open_low: bool = True) -> Rule:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and type(value) is not bool
        if is_number and (low < value if open_low else low <= value) and value <= high:
            return None
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        return f"a number {above}" + ("" if high == math.inf else f" and at most {high:g}")

    return check


def _one_of(*choices: Any) -> Rule:
    return lambda value: None if value in choices else f"one of {', '.join(map(str, choices))}"


def _maybe(rule: Rule) -> Rule:
    def check(value: Any) -> str | None:
        wanted = None if value is None else rule(value)
        return wanted and f"{wanted}, or null"

    return check


def _cells(value: Any) -> str | None:
    if isinstance(value, list | tuple) and value and all(_count(1)(n) is None for n in value):
        return None
    return "a list of whole numbers of at least 1, one for each hidden layer"


def _flag(value: Any) -> str | None:
    return None if type(value) is bool else "true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a text"


def _device(value: Any) -> str | None:
    try:
        device = None if value is None else torch.device(value)
    except (RuntimeError, TypeError):
        return "null, cpu, cuda or cuda:0"
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        return "null or cpu: there is no CUDA device"
    return None


_RULES: dict[str, Rule] = {
    # Run
    "seed": _count(),
    "device": _device,
    "num_threads": _count(1, optional=True),
    "compile": _one_of(True, False, "networks"),
    "cudagraphs": _flag,
    "precision": _one_of("fp32", "tf32", "bf16", "bf16-mixed"),
    "wandb": _one_of("disabled", "offline", "online"),
    "log_interval": _count(1),
    "max_grad_norm": _maybe(_number(0)),
    "resume": _text,
    "checkpoint_seconds": _number(0),
    "checkpoint_interval": _count(1, optional=True),
    "keep_checkpoints": _count(1),
    # Data
    "dataset": _text,
    "data_on_device": _flag,
    "prefetch": _count(),
    "normalize": _one_of(None, "min_max", "mean_std"),
    "sparse_rewards": _flag,
    "cross_episodes": _flag,
    "truncation_is_success": _flag,
    "average_rewards": _flag,
    "ignore_terminated": _flag,
    "negative_reward": _flag,
    # Algorithm
    "activation": _one_of("gelu", "relu"),
    "chunk_size": _count(1),
    "policy_chunk_size": _count(1, optional=True),
    "chunk_critic": _flag,
    "kappa_b": _maybe(_number(0, 1)),
    "kappa_d": _maybe(_number(0, 1)),
    "backup": _one_of("expectile", "quantile"),
    "distillation": _one_of("expectile", "quantile"),
    "n_steps": _count(1),
    "num_members": _count(1),
    "num_qvalue_nets": _count(1),
    "q_aggregation": _one_of("mean", "min"),
    "alpha": _number(0, open_low=False),
    "normalize_q_loss": _flag,
    "alpha_init": _number(0),
    "bc_alpha": _number(0, open_low=False),
    "imagination_horizon": _count(1),
    "entropy_bonus": _number(0, open_low=False),
    "policy": _one_of("distilled", "flow", "one_step"),
    "num_elites": _count(1),
    "rollout_interval": _count(1),
    "rollout_batch": _count(1),
    "rollout_length": _count(1),
    "rollout_keep": _count(1),
    "real_share": _number(0, 1, open_low=False),
    "penalty_weight": _number(0, open_low=False),
    "penalty_samples": _count(1),
    "horizon": _count(1),
    "dynamics": _one_of("flow", "mlp"),
    "flow_steps": _count(1),
    "num_candidates": _count(1),
    "gamma": _number(0, 1),
    "return_gamma": _number(0, 1),
    "lmbda": _number(0, 1, open_low=False),
    "tau": _number(0, 1),
    "expectile": _number(0, 1),
    "model_batch_ratio": _number(0, 1, open_low=False),
    "ignore_imagined_terminated": _flag,
    "task_batch_scale": _number(0),
    # Evaluation
    "eval_num_candidates": _count(1),
    "replan_interval": _count(1),
    "eval_episodes": _count(1),
    "eval_interim_episodes": _count(1),
    "eval_num_envs": _count(1),
    "eval_workers": _count(),
    "eval_timeout": _number(0),
    "eval_seed": _count(),
    "video_episodes": _count(),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks every setting that is known; others are the algorithm's own to check.

    Args:
        settings (mapping): plain values, by name.

    Raises:
        ValueError: naming the first key that is wrong, its value, and what it must be.

    Examples:
        >>> check_settings({"gamma": 0.99, "value_cells": [256, 256], "log_interval": 100})
    """
    for key, value in settings.items():
        rule = _cells if key.endswith("_cells") else _RULES.get(key)
        if rule is not None and (wanted := rule(value)):
            raise ValueError(f"{key}={value} cannot be: it must be {wanted}.")
    online = settings.get("online") or {}
    if not settings.get("phases", True) and not online.get("frames"):
        raise ValueError("phases=[] cannot be: name at least one phase to train, or online.frames.")
    for key, limit, reason in (
        ("policy_chunk_size", "chunk_size", "a chunk has only"),
        ("replan_interval", "chunk_size", "a chunk has only"),
        ("replan_interval", "policy_chunk_size", "a choice is made by only"),
        ("chunk_size", "horizon", "a window has only"),
    ):
        most = settings.get(limit)
        if most is not None and (settings.get(key) or 1) > most:
            raise ValueError(f"{key}={settings[key]} cannot be: {reason} {limit}={most} actions.")
    if online.get("frames") and settings.get("policy_chunk_size"):
        raise ValueError(
            f"policy_chunk_size={settings['policy_chunk_size']} cannot be with online.frames: "
            "chunks are executed whole there."
        )
    device = settings.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if settings.get("cudagraphs") and torch.device(device).type != "cuda":
        raise ValueError(f"cudagraphs=true cannot be on device={device}: it needs a CUDA device.")


def resolve_task(dataset: str, task_id: int | str | None) -> OGBenchName:
    """The name that ``dataset`` is, if it says what to learn and ``task_id`` does not contradict.

    Args:
        dataset (str): a single task (``...-singletask-task2-v0``), or all of an environment's
            (``...-oraclerep-v0``), which then are learned by one agent.
        task_id (int or str): the number of the single task, or ``"all"``.

    Raises:
        ValueError: if there is nothing to learn, or the two contradict each other.

    Examples:
        >>> resolve_task("cube-single-play-oraclerep-v0", "all").mode
        'oraclerep'
    """
    name = OGBenchName.parse(dataset)
    if name.mode == "goal":
        raise ValueError(
            f"dataset={dataset} has neither rewards nor oracle representations: name a task "
            "(...-singletask-task2-v0) or all of them (...-oraclerep-v0)."
        )
    if name.mode == "oraclerep" and task_id != "all":
        raise ValueError(
            f"dataset={dataset} has all tasks of its environment, but task_id={task_id}: "
            "leave it out, or choose a single task (task=cube-single task_id=2)."
        )
    if name.mode == "singletask" and name.task_id not in (None, task_id):
        raise ValueError(
            f"dataset={dataset} contradicts task_id={task_id}: choose by task_id alone."
        )
    return name


def check_widths(data: ActionChunkExperienceReplay, make_env: Callable[[], EnvBase]) -> None:
    """Whether the environment's observations and actions are as wide as the dataset's.

    Args:
        data (ActionChunkExperienceReplay): the dataset.
        make_env (callable): builds the environment.

    Raises:
        ValueError: if they are not.
    """
    env = make_env()
    specs = {"observation": env.observation_spec["observation"], "action": env.action_spec}
    env.close()
    for name, spec in specs.items():
        width = data.metadata[f"{name}_dim"]
        if spec.shape[-1] != width:
            raise ValueError(
                f"{data.data_path} has {name}s of {width} numbers, those of the environment have "
                f"{spec.shape[-1]}: it is another environment's data."
            )
