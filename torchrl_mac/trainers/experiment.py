"""What every script does around its algorithm; needs Hydra."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torchrl._utils import logger as torchrl_logger
from torchrl.data import ReplayBuffer
from torchrl.envs.transforms import Compose, DeviceCastTransform, Transform
from torchrl.objectives import LossModule
from torchrl.record import CSVLogger, WandbLogger
from torchrl.record.loggers import Logger

from torchrl_mac.data import ActionChunkExperienceReplay, OGBenchExperienceReplay
from torchrl_mac.datasets import NUM_TASKS
from torchrl_mac.datasets.trajectories import TrajectorySource
from torchrl_mac.envs import env_maker
from torchrl_mac.modules import ChunkActor, save_policy
from torchrl_mac.trainers.distributed import join_group
from torchrl_mac.trainers.evaluation import EpisodeEvaluator
from torchrl_mac.trainers.logs import JSONLinesLogger
from torchrl_mac.trainers.online import make_online, online_phases
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.report import plot_curves, write_summary
from torchrl_mac.trainers.run import RunFolder
from torchrl_mac.trainers.run_checkpoints import RunCheckpoints
from torchrl_mac.trainers.settings import check_settings, check_widths, resolve_task
from torchrl_mac.trainers.trainer import PhaseTrainer

__all__ = ["Experiment"]

_SWITCHES = ("compile", "cudagraphs", "precision", "max_grad_norm")  # of every update
_FIXED = ("dataset", "dataset_digest", "env_id", "task_ids", "seed", "chunk_size", "activation")


class Experiment(contextlib.AbstractContextManager):
    """A run of a script: seeds, data, logs, checkpoints, evaluation and the report.

    Every script's settings have those that this class reads, explained in ``configs/mac/mac.yaml``:
    all that stands under "Run", "Evaluation" and the first part of "Data", and ``phases``. With
    ``env_id`` the environment is Gymnasium's of that id, and ``dataset`` one's own, a file of that
    name in ``data_dir``. The folder of results is Hydra's output folder; nothing is written to it
    before :meth:`trainer` is called, so that settings and data that are not valid leave no trace.

    Args:
        cfg (DictConfig): the settings.

    Keyword Args:
        fixed (sequence of str, optional): settings that a run cannot go on without when it is
            resumed, beside the dataset, the seed, and those named ``..._cells``. Defaults to none.

    Raises:
        ValueError: if settings contradict each other.
    """

    def __init__(self, cfg: DictConfig, *, fixed: Sequence[str] = ()) -> None:
        self.cfg = cfg
        check_settings({**self.settings, "resume": cfg.resume})
        _ = self.phases  # or an error
        self.task = None if self.env_id else resolve_task(cfg.dataset, cfg.task_id)
        self.online = online_phases(self.settings)
        if self.online is not None and (self.is_goal_conditioned or self.env_id):
            raise ValueError(
                f"online.frames={cfg.online.frames} cannot be with {cfg.dataset}: only a single "
                "task of OGBench is learned online."
            )
        self.fixed = [*_FIXED, *fixed, *(str(key) for key in cfg if str(key).endswith("_cells"))]
        self.rank, self.device = join_group(cfg.device)
        if self.online is not None and torch.distributed.is_initialized():
            raise ValueError("online.frames cannot be with torchrun: one process collects.")
        self.is_first = self.rank == 0  # of torchrun's processes, the one that evaluates and writes
        self.path = Path(HydraConfig.get().runtime.output_dir)
        self._stack = contextlib.ExitStack()
        torch.manual_seed(cfg.seed)
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)

    @property
    def is_goal_conditioned(self) -> bool:
        """Whether one agent learns all tasks of the environment, told which by a goal."""
        return self.task is not None and self.task.mode == "oraclerep"

    @property
    def env_id(self) -> str | None:
        """Gymnasium's id of the environment, if it is none of OGBench's."""
        return self.settings.get("env_id")

    @property
    def score(self) -> str:
        """The metric that counts: the rate of success, or the return where there is no success."""
        return "episode_return" if self.env_id else "success_rate"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values, without what only says how to go on."""
        settings: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return {key: value for key, value in settings.items() if key != "resume"}

    @cached_property
    def phases(self) -> list[Phase]:
        """The settings' ``phases``."""
        try:
            return [Phase(**phase) for phase in self.settings["phases"]]
        except TypeError as error:  # a key that is missing or unknown
            raise ValueError(f"phases={self.settings['phases']} cannot be: {error}.") from error

    @property
    def all_phases(self) -> list[Phase]:
        """The settings' ``phases``, and those online."""
        return [*self.phases, *(() if self.online is None else self.online.phases)]

    def dataset(
        self,
        split: Literal["train", "val"],
        *,
        dataset: str | None = None,
        transforms: Sequence[Transform] = (),
        **kwargs: Any,
    ) -> ActionChunkExperienceReplay:
        """A split of the dataset as a replay buffer, normalised as the setting ``normalize`` says.

        Args:
            split (str): ``"train"`` or ``"val"``.

        Keyword Args:
            dataset (str, optional): another one than the settings'.
            transforms (sequence of Transform, optional): applied to samples after normalisation.
            **kwargs: of :class:`~torchrl_mac.data.ActionChunkExperienceReplay`.
        """
        cfg, name = self.cfg, dataset or self.cfg.dataset
        kind = ActionChunkExperienceReplay if self.env_id else OGBenchExperienceReplay
        source = [Path(cfg.data_dir)]
        if self.env_id:
            source = [path for path in TrajectorySource.find(source[0]) if path.stem == name]
        buffer = kind(
            name,
            self.all_phases[0].batch_size if cfg.prefetch else None,  # what is drawn ahead at first
            root=cfg.root,
            source=source,
            split=split,
            device=self.device if cfg.data_on_device else "cpu",
            prefetch=cfg.prefetch or None,
            generator=torch.Generator().manual_seed(cfg.seed + 2**32 * self.rank),
            **kwargs,
        )
        if norm := self._normalize:
            buffer.append_transform(buffer.observation_norm(norm))
            if self.is_goal_conditioned:
                buffer.append_transform(buffer.goal_norm(norm))
        for transform in (*transforms, DeviceCastTransform(self.device)):
            buffer.append_transform(transform)
        return buffer

    def normalisation(self, buffer: ActionChunkExperienceReplay) -> Compose:
        """What makes an actor of normalised observations, and goals, one of the simulator's."""
        norms, kind = [], self._normalize
        if kind:
            norms.append(buffer.observation_norm(kind, ["observation"]))
            if self.is_goal_conditioned:
                norms.append(buffer.goal_norm(kind, ["goal"]))
        return Compose(*norms).to(self.device)

    @property
    def _normalize(self) -> Any:
        """How observations are normalised, if they are."""
        return self.settings.get("normalize", "min_max")

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder, this process's alone from now on."""
        return self._stack.enter_context(RunFolder(self.path, resume=self.cfg.resume))

    @cached_property
    def loggers(self) -> list[Logger]:
        """CSV files, lines of JSON and, if wanted, Weights & Biases."""
        if not self.is_first:
            return []
        path, kinds = self.folder.path, (CSVLogger, JSONLinesLogger)
        loggers: list[Logger] = [kind("logs", str(path)) for kind in kinds]
        if self.cfg.wandb != "disabled":
            loggers.append(self._wandb(path))
        for logger in loggers:
            logger.log_hparams(OmegaConf.to_container(self.cfg, resolve=True))
            self._stack.callback(logger.close)
        return loggers

    def _wandb(self, path: Path) -> WandbLogger:
        of_run = {"save_dir": str(path), "project": self.cfg.project, "id": self.folder.id}
        if self.cfg.wandb == "online":
            try:
                return WandbLogger(path.name, **of_run)
            except Exception as error:  # of many kinds: no network, no account, no project
                torchrl_logger.warning(
                    f"Weights & Biases cannot be reached ({error}): going on with wandb=offline; "
                    f"`wandb sync {path / 'wandb'}` sends it later."
                )
        return WandbLogger(path.name, offline=True, **of_run)

    def trainer(
        self,
        losses: Mapping[str, LossModule],
        buffer: ReplayBuffer,
        *,
        digest: str,
        actor: ChunkActor | None = None,
        phases: Sequence[Phase] | None = None,
        name: str = "",
        **kwargs: Any,
    ) -> PhaseTrainer:
        """A trainer that logs, saves and resumes as the settings say; all losses are there by now.

        Args:
            losses (dict of LossModule): the objectives, by name.
            buffer (ReplayBuffer): what batches are drawn from.

        Keyword Args:
            digest (str): that of the dataset, without which the run cannot go on.
            actor (ChunkActor, optional): saved with each checkpoint.
            phases (sequence of Phase, optional): defaults to those of the settings.
            name (str, optional): of one of several trainers: the folder of its checkpoints.
            **kwargs: of :class:`~torchrl_mac.trainers.PhaseTrainer`.
        """
        cfg, distributed = self.cfg, torch.distributed.is_initialized()
        if phases is not None and self.online is not None:
            raise ValueError(
                f"online.frames={cfg.online.frames} cannot be: this script trains offline only."
            )
        if not self.is_first:  # parameters are those of the first; noise is each one's own
            torch.manual_seed(cfg.seed + 2**32 * self.rank)
        checkpoints = RunCheckpoints(
            self.folder.path / self._checkpoints / name,
            actor=actor,
            config={**self.settings, "dataset_digest": digest},
            fixed=self.fixed,
            keep_last=cfg.keep_checkpoints,
            keep_best=self.score,
            interval=cfg.checkpoint_interval,
            # processes of torchrun must agree, so not by the clock
            interval_seconds=math.inf if distributed else cfg.checkpoint_seconds,
        )
        self._stack.enter_context(contextlib.closing(checkpoints))
        return PhaseTrainer(
            losses,
            buffer,
            self.all_phases if phases is None else phases,
            loggers=self.loggers,
            checkpoints=checkpoints,
            log_interval=cfg.log_interval,
            progress_bar=self.is_first,
            distributed=distributed,
            **{switch: cfg[switch] for switch in _SWITCHES},
            **kwargs,
        )

    @property
    def _checkpoints(self) -> str:
        return "checkpoints" if self.is_first else f"checkpoints-rank{self.rank}"

    def resume(self, trainer: PhaseTrainer, name: str = "") -> bool:
        """Goes on with the checkpoint that the settings name, or the newest; if there is one.

        A named trainer goes on with checkpoints of its own name alone.
        """
        chosen = self.folder.checkpoint
        if chosen is not None and name and chosen.absolute().parent.name != name:
            return False
        if chosen is not None and not self.is_first:  # its own beside the first one's
            chosen = chosen.parent.with_name(self._checkpoints) / chosen.name
        return trainer.resume(chosen)

    def evaluator(self, actor: ChunkActor, dataset: str | None = None) -> EpisodeEvaluator:
        """Seeded episodes in the simulator; of all tasks, where one agent has learned them all."""
        cfg = self.cfg
        device = "cpu" if cfg.eval_workers else self.device
        evaluator = EpisodeEvaluator(
            env_maker(dataset or cfg.dataset, self.env_id, device=device),
            actor,
            task_ids=range(1, NUM_TASKS + 1) if self.is_goal_conditioned else None,
            num_episodes=cfg.eval_episodes,
            num_envs=cfg.eval_num_envs,
            num_workers=cfg.eval_workers,
            timeout=cfg.eval_timeout,
            replan_interval=cfg.replan_interval,
            seed=cfg.eval_seed,
        )
        return self._stack.enter_context(contextlib.closing(evaluator))

    def train(
        self,
        losses: Mapping[str, LossModule],
        buffer: ReplayBuffer,
        actor: ChunkActor,
        *,
        dataset: ActionChunkExperienceReplay | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Trains, evaluates and reports; goes on where the run was interrupted.

        Args:
            losses (dict of LossModule): the objectives, by name.
            buffer (ReplayBuffer): what batches are drawn from.
            actor (ChunkActor): for raw observations.

        Keyword Args:
            dataset (ActionChunkExperienceReplay, optional): what ``buffer`` mixes with other data.
            **kwargs: of :class:`~torchrl_mac.trainers.PhaseTrainer`.

        Returns:
            the summary.
        """
        data: Any = buffer if dataset is None else dataset
        check_widths(data, env_maker(self.cfg.dataset, self.env_id))
        evaluator = self.evaluator(actor)
        interim: Callable[..., Any] = partial(evaluator.submit, self.cfg.eval_interim_episodes)
        evaluations: dict[str, Any] = (
            {"evaluate": evaluator, "monitor": interim} if self.is_first else {}
        )
        if self.online is not None:
            make_env = env_maker(self.cfg.dataset)
            kwargs |= make_online(self.online, self.settings, data, actor, make_env)
        trainer = self.trainer(
            losses, buffer, digest=data.digest, actor=actor, **evaluations, **kwargs
        )
        self.resume(trainer)
        result = trainer.train()
        if not self.is_first:
            return result
        summary = {
            self.score: result.pop(self.score),  # of several tasks, their mean
            **result,
            "task": self.cfg.dataset,
            "transitions": len(data),
        }
        firsts = [] if self.online is None else [self.online.phases[0].name]
        borders = [border for name in firsts if (border := trainer.progress.beginning(name))]
        policies = {"policy": (actor, self.cfg.dataset)}
        return self.report(summary, data.digest, policies, borders=borders)

    def report(
        self,
        summary: Mapping[str, Any],
        digest: str,
        actors: Mapping[str, tuple[ChunkActor, str]],
        *,
        borders: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Writes exported actors, ``summary.json``, ``curves.png`` and ``evaluation.mp4``.

        Args:
            summary (mapping): what was found.
            digest (str): that of the dataset.
            actors (mapping): the actors and their datasets, by the folder they are exported to.

        Keyword Args:
            borders (sequence of int, optional): see :func:`~torchrl_mac.trainers.plot_curves`.
        """
        cfg, path = self.cfg, self.folder.path
        for folder, (actor, dataset) in actors.items():
            save_policy(actor, path / folder, {**self.settings, "dataset": dataset})
        of_run = ("seed", "eval_seed", "replan_interval", *_SWITCHES)
        whole = {
            **summary,
            "episodes": cfg.eval_episodes,
            "dataset_digest": digest,
            **{key: cfg[key] for key in of_run},
        }
        write_summary(path / "summary.json", whole)
        plot_curves(path / "curves.png", self.loggers[0], borders)
        if cfg.video_episodes:
            self._record(path / next(iter(actors)), path / "evaluation.mp4")
        torchrl_logger.info(
            f"{self.score} {whole[self.score]:.4g} over {cfg.eval_episodes} episodes of "
            f"{cfg.dataset}; summary, curves and video are in {path}"
        )
        return whole

    def _record(self, policy: Path, video: Path) -> None:
        """Makes a video, in a process of its own: MuJoCo chooses how to render when imported."""
        command = [sys.executable, "-m", "torchrl_mac.evaluate", policy, "--episodes", 0]
        settings = ["--seed", self.cfg.eval_seed, "--device", self.device]
        settings += ["--video", video, "--video-episodes", self.cfg.video_episodes]
        process = subprocess.run(
            [str(part) for part in command + settings], capture_output=True, text=True
        )
        if process.returncode:  # no renderer, say: the result stands without it
            reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
            torchrl_logger.warning(f"No video: {reason}")
