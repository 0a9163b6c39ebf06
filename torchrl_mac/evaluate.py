"""The command line of trained agents: ``torchrl-mac-eval``."""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal, get_args

if ctypes.util.find_library("EGL"):  # MuJoCo reads it when first imported, by TorchRL, below
    os.environ.setdefault("MUJOCO_GL", "egl")

from torchrl_mac.datasets import NUM_TASKS, OGBenchName
from torchrl_mac.envs import env_maker
from torchrl_mac.modules import FlowRejectionActor, SubgoalActor, save_policy
from torchrl_mac.trainers import EpisodeEvaluator, load_policy_and_metadata, write_video
from torchrl_mac.utils.workers import Engine

__all__ = ["main"]

_PROGRAM = "torchrl-mac-eval"


def main(argv: list[str] | None = None) -> int:
    """Evaluates a checkpoint and prints the metrics as JSON.

    Args:
        argv (list of str, optional): the arguments. Default: those of the process.

    Returns:
        int: the exit code: 0, 2 for wrong usage, values or files, 1 if episodes or a video failed.

    Examples:
        >>> main(["--help"])  # doctest: +ELLIPSIS
        usage: torchrl-mac-eval ...
        0
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        _evaluate(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        return _fail(error, 2)
    except Exception as error:  # a damaged file, a missing device, a simulator that fails
        return _fail(error, 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Evaluates a trained actor in its environment. Settings that are not given "
        "are those it was trained with.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's folder, a checkpoint, or an export"
    )
    parser.add_argument("--best", action="store_true", help="of a run, not the newest but the best")
    parser.add_argument("--task", help="dataset name, cube-single-play-singletask-task2-v0")
    parser.add_argument(
        "--episodes", type=int, default=50, help="default: %(default)s; 0 for a video alone"
    )
    parser.add_argument("--num-envs", type=int, default=10, help="side by side, default: 10")
    parser.add_argument("--workers", type=int, default=0, help="processes, default: this one")
    parser.add_argument(
        "--engine",
        choices=get_args(Engine),
        default="processes",
        help="where they are; ray: the cluster at RAY_ADDRESS, default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the episodes, default: 0")
    parser.add_argument("--num-candidates", type=int, help="chunks to choose from")
    parser.add_argument("--replan-interval", type=int, help="actions before the next choice")
    parser.add_argument("--device", default="cpu", help="of the actor, default: cpu")
    parser.add_argument("--video", type=Path, metavar="FILE", help="an MP4 of some episodes")
    parser.add_argument("--video-episodes", type=int, default=3, help="of each task, default: 3")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the actor there")
    return parser


def _evaluate(args: argparse.Namespace) -> None:
    which: Literal["newest", "best"] = "best" if args.best else "newest"
    actor, settings = load_policy_and_metadata(args.checkpoint, which=which, device=args.device)
    task = args.task or settings.get("dataset")
    if task is None:
        raise ValueError(f"{args.checkpoint} does not say what it was trained on: give --task.")
    env_id = None if args.task else settings.get("env_id")
    several = env_id is None and OGBenchName.parse(task).mode != "singletask"
    make_env = partial(env_maker, task, env_id)
    if args.num_candidates is not None:
        if not isinstance(actor, FlowRejectionActor | SubgoalActor):
            raise ValueError(f"--num-candidates: a {type(actor).__name__} has no candidates.")
        actor.num_candidates = args.num_candidates
    if args.export is not None:
        save_policy(actor, args.export, settings)
    evaluator = EpisodeEvaluator(
        make_env(device="cpu" if args.workers else args.device),
        actor,
        task_ids=range(1, NUM_TASKS + 1) if several else None,
        num_episodes=args.episodes or 1,
        num_envs=args.num_envs,
        num_workers=args.workers or int(args.engine == "ray"),
        engine=args.engine,
        replan_interval=args.replan_interval or settings.get("replan_interval", 1),
        seed=args.seed,
    )
    try:
        if args.episodes:
            about = {"task": task, "episodes": args.episodes, "seed": args.seed}
            sys.stdout.write(json.dumps({**about, **evaluator()}, indent=1) + "\n")
        if args.video is not None:
            filming = make_env(device=args.device, from_pixels=True)
            write_video(args.video, evaluator.record(filming, args.video_episodes))
    finally:
        evaluator.close()


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: {error or type(error).__name__}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
