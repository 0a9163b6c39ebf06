"""The training loop: phases of updates, with hooks, logs, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from tqdm import tqdm

from torchrl_mac.data import buffer_state, distinct_buffers, load_buffer_state
from torchrl_mac.trainers.evaluation import Evaluation
from torchrl_mac.trainers.hooks import TrainerHook
from torchrl_mac.trainers.logs import Logs, means
from torchrl_mac.trainers.monitor import Monitor
from torchrl_mac.trainers.phase import Phase, PhaseTraining, check_phase
from torchrl_mac.trainers.postmortem import give_up
from torchrl_mac.trainers.progress import Progress
from torchrl_mac.trainers.run_checkpoints import RunCheckpoints
from torchrl_mac.trainers.signals import StopSignals
from torchrl_mac.trainers.update import listed, target_parameters

__all__ = ["PhaseTrainer"]


class PhaseTrainer:
    """Trains losses on batches of a buffer, phase after phase, and logs, evaluates and saves.

    With ``checkpoints`` a run that was killed goes on as if nothing had happened: :meth:`resume`,
    then :meth:`train`. On a CPU all parameters, moments, targets and metrics are then equal, bit
    for bit, to those of an uninterrupted run. SIGINT and SIGTERM end the run with a checkpoint,
    after the current update, and exit with 130 or 143.

    Updates that are not finite are left out (see :class:`~torchrl_mac.trainers.LossUpdate`).

    Args:
        losses (dict of LossModule): the objectives, by name.
        buffer (ReplayBuffer): sampled with each phase's batch size; a dataset, or a
            :class:`~torchrl_mac.data.MixedReplayBuffer` of several.
        phases (sequence of Phase): what to train, in order. A phase trains the loss terms that
            it names and leaves all other parameters as they are.

    Keyword Args:
        target_updaters (TargetNetUpdater or sequence of them, optional): each steps with every
            update that trains a term of the loss it belongs to.
        phase_buffers (dict of ReplayBuffer, optional): what phases sample from, by their names, in
            the place of ``buffer``. Before such a phase begins, there is an evaluation as after the
            last update; its metrics are returned as ``"{metric}_before_{phase}"``.
        hooks (dict of TrainerHook, optional): what else happens, by name; called in this order.
        validation_buffer (ReplayBuffer, optional): a batch of it goes through the phase's losses,
            without an update, each time something is logged. ``early_stopping`` needs it.
        evaluate (callable, optional): returns a dict of metrics, such as an
            :class:`~torchrl_mac.trainers.EpisodeEvaluator`. Called after the last update.
        monitor (callable, optional): the same, every ``eval_interval`` updates of a phase before
            that. Usually cheaper. May return an :class:`~torchrl_mac.trainers.Evaluation` that goes
            on beside training; it is logged when it is finished, for the update it was begun at.
            If the run is killed before, it is begun anew with ``state=`` of that evaluation.
            Defaults to ``evaluate``.
        loggers (sequence of Logger, optional): TorchRL loggers.
        checkpoints (RunCheckpoints, optional): where the state is saved: from time to time, before
            each evaluation, and when a signal ends the run. Defaults to nowhere.
        max_skipped (int, optional): training gives up after so many updates in a row that were not
            finite; noticed when something is logged. Defaults to 10.
        log_interval (int, optional): in updates. Defaults to 1000.
        first_update (int, optional): counting goes on from there, after another trainer. Defaults
            to 0.
        progress_bar (bool, optional): defaults to ``True``.
        **switches: ``target_order``, ``compile``, ``cudagraphs``, ``precision``, ``max_grad_norm``
            and ``distributed`` of :class:`~torchrl_mac.trainers.LossUpdate`.

    Raises:
        ValueError: if a phase names something that does not exist, or a term that several have.
        NonFiniteError: when training, if it cannot go on; says what is not finite.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> from torchrl_mac.objectives import ChunkedWorldModelLoss
        >>> from torchrl_mac.trainers import Phase, PhaseTrainer
        >>> networks = (NormedMLP(4 + 20, size, num_cells=(32,)) for size in (4, 1, 1))
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64))
        >>> _ = buffer.extend(
        ...     TensorDict(
        ...         observation=torch.randn(64, 4),
        ...         action=torch.rand(64, 10, 2),
        ...         next=TensorDict(
        ...             observation=torch.randn(64, 4),
        ...             reward=torch.randn(64, 1),
        ...             terminated=torch.zeros(64, 1, dtype=torch.bool),
        ...         ),
        ...     ).auto_batch_size_(1)
        ... )
        >>> trainer = PhaseTrainer(
        ...     {"world_model": ChunkedWorldModelLoss(ChunkedWorldModel(*networks))},
        ...     buffer,
        ...     [Phase("model", ["loss_dynamics", "loss_reward"], num_updates=5, batch_size=16)],
        ...     progress_bar=False,
        ... )
        >>> sorted(trainer.train())
        ['skipped_updates', 'train_seconds', 'updates']
    """

    def __init__(
        self,
        losses: Mapping[str, LossModule],
        buffer: ReplayBuffer,
        phases: Sequence[Phase],
        *,
        target_updaters: TargetNetUpdater | Sequence[TargetNetUpdater] = (),
        phase_buffers: Mapping[str, ReplayBuffer] | None = None,
        hooks: Mapping[str, TrainerHook] | None = None,
        validation_buffer: ReplayBuffer | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        monitor: Callable[..., Mapping[str, float] | Evaluation] | None = None,
        loggers: Sequence[Logger] = (),
        checkpoints: RunCheckpoints | None = None,
        log_interval: int = 1000,
        max_skipped: int = 10,
        first_update: int = 0,
        progress_bar: bool = True,
        **switches: Any,
    ) -> None:
        self.losses = dict(losses)
        self.buffer = buffer
        self.phase_buffers = dict(phase_buffers or {})
        self.progress = Progress(phases, first_update=first_update)
        self.target_updaters = listed(target_updaters)
        self.hooks = dict(hooks or {})
        self.validation_buffer = validation_buffer
        self.monitor = Monitor(evaluate, monitor, self._log_evaluation)
        self.logs = Logs(loggers)
        self.checkpoints = checkpoints
        self.log_interval = log_interval
        self.max_skipped = max_skipped
        self.progress_bar = progress_bar
        self.switches = switches
        self._moments: dict[str, Any] = {}  # for phases that keep them
        self._training: PhaseTraining | None = None
        self._restored: Mapping[str, Any] = {}  # what of a loaded state has yet to take effect
        self._evaluation_due = False
        self._before: dict[str, dict[str, float]] = {}  # metrics, by the phase that came then
        for phase in self.progress.phases:
            check_phase(phase, self.losses)
            if phase.early_stopping is not None and validation_buffer is None:
                raise ValueError(f"Phase {phase.name!r}: early_stopping needs a validation_buffer.")
        names = [phase.name for phase in self.progress.phases]
        if unknown := sorted(self.phase_buffers.keys() - names):
            raise ValueError(f"There are phase_buffers of {unknown}; the phases are {names}.")

    @property
    def num_updates(self) -> int:
        """The number of updates of all phases together, if none stops early."""
        return sum(phase.num_updates for phase in self.progress.phases)

    @property
    def updates(self) -> int:
        """The number of updates that were made."""
        return self.progress.updates

    def parameters(self) -> list[torch.Tensor]:
        """The parameters of all losses, target networks included, and Adam's moments of them."""
        losses = self.losses.values()
        found = [p for loss in losses for p in (*loss.parameters(), *target_parameters(loss))]
        state = self._training.update.optimizer.state.values() if self._training else ()
        return [*found, *(value for of in state for value in of.values())]

    def train(self) -> dict[str, float]:
        """Runs what is left of all phases.

        Returns:
            ``updates``, ``skipped_updates``, ``train_seconds`` (evaluation excluded), whether all
            phases that were trained were ``compiled``, if they should be, and the last
            evaluation's metrics.

        Raises:
            SystemExit: after SIGINT or SIGTERM, with code 130 or 143.
        """
        silent = not self.progress_bar
        bar = tqdm(total=self.num_updates, initial=self.progress.done, disable=silent)
        compiled: list[bool] = []
        metrics = {}
        stop = StopSignals()
        stops = self.checkpoints is not None and not self.switches.get("distributed")
        with bar, stop if stops else contextlib.nullcontext():
            self._resume_evaluations()
            metrics = self._evaluate_if_due(stop)
            for phase in self.progress.remaining():
                bar.set_description(phase.name)
                with PhaseTraining(
                    phase, self.losses, self.target_updaters, **self.switches
                ) as training:
                    self._training = training
                    self._begin(training)
                    metrics = self._train_phase(training, stop, bar) or metrics
                    compiled.append(training.update.is_compiled)
                    self.progress.skipped_updates += training.update.guard.read()["skipped"]
                    self._training = None
            if self._restored:  # of a finished run: what follows it draws on
                GlobalRNGState().load_state_dict(self._restored["rng"])
            stop.interruptible(lambda: self.monitor.collect(wait=True))
            self._leave_if(stop)
        result = {
            "updates": self.updates,
            "skipped_updates": self.progress.skipped_updates,
            "train_seconds": self.progress.train_seconds,
            **metrics,
        }
        for name, before in self._before.items():
            result |= {f"{key}_before_{name}": value for key, value in before.items()}
        result |= self._metrics_of_hooks()
        if self.switches.get("compile") and compiled:  # a finished run compiles nothing
            result["compiled"] = all(compiled)
        return result

    def _begin(self, training: PhaseTraining) -> None:
        """Lets moments, and what was loaded, take effect in a phase."""
        state, self._restored = self._restored, {}
        if training.phase.keep_moments and not self.progress.phase_updates:
            training.load_moments(self._moments)
        if state:
            if self.progress.phase_updates:
                training.load_state_dict(state["training"])
                self.progress.skipped_updates -= training.update.guard.read()["skipped"]
            GlobalRNGState().load_state_dict(state["rng"])

    def _train_phase(
        self, training: PhaseTraining, stop: StopSignals, bar: tqdm
    ) -> dict[str, float]:
        phase, progress, clock = training.phase, self.progress, time.perf_counter()
        metrics: dict[str, float] = {}
        while not progress.phase_is_over:
            for hook in self.hooks.values():
                hook.before_update(progress)
            batch = self._buffer_of(phase).sample(phase.batch_size)
            losses = training.step(batch)
            progress.advance()
            bar.update()
            for hook in self.hooks.values():
                hook.after_update(progress, batch, losses)
            if training.stops(progress.phase_updates, self.validation_buffer):
                progress.stop_phase()
            if self.updates % self.log_interval == 0 or progress.is_over:
                self._log_losses(training, losses, batch, bar)
                self.monitor.collect(wait=False)
            if progress.phase_is_over:
                self._end(training)
            self._evaluation_due = self._is_milestone or (
                phase.eval_interval > 0 and progress.phase_updates % phase.eval_interval == 0
            )
            saving = self.checkpoints is not None and self.checkpoints.due(self.updates)
            if self._evaluation_due or stop or saving:
                progress.train_seconds += time.perf_counter() - clock
                self._save(wait=bool(stop))
                metrics = self._evaluate_if_due(stop) or metrics
                clock = time.perf_counter()
        bar.total -= phase.num_updates - progress.phase_updates
        self.progress.train_seconds += time.perf_counter() - clock
        return metrics

    def _end(self, training: PhaseTraining) -> None:
        if training.stopping is not None:
            training.stopping.restore(training.parameters)
        later = self.progress.later_phases  # if none, one may be appended to the finished run
        if not later or any(phase.keep_moments for phase in later):
            self._moments.update(training.moments())
        for hook in self.hooks.values():
            hook.end_phase(self.progress)

    def resume(self, path: str | Path | None = None) -> bool:
        """Restores a checkpoint; :meth:`train` then goes on from there.

        Logs are cut to what they were at that time.

        Args:
            path (str or Path, optional): the checkpoint. Defaults to the newest of ``checkpoints``
                that is whole.

        Returns:
            whether there was one.

        Raises:
            CheckpointError: if the checkpoint at ``path`` is not whole.
        """
        if self.checkpoints is None:
            raise ValueError("Only a trainer with checkpoints can resume.")
        found = self.checkpoints.load(path)
        if found is None:
            self.logs.load_state_dict([])
            return False
        path, state = found
        self.load_state_dict(state)
        torchrl_logger.info(f"Going on after {self.updates} updates, from {path}")
        return True

    def _log_losses(
        self, training: PhaseTraining, losses: TensorDictBase, batch: TensorDictBase, bar: tqdm
    ) -> None:
        phase, update = training.phase, training.update
        figures = means(losses)
        values = {f"train/{key}": value for key, value in figures.items()}
        values |= (besides := self._metrics_of_hooks())
        shown = {key.split("_")[-1]: value for key, value in figures.items()} | besides
        bar.set_postfix({key: f"{value:.3g}" for key, value in shown.items()})
        skipped = update.guard.read()
        if skipped["skipped"]:
            values["train/skipped_updates"] = self.progress.skipped_updates + skipped["skipped"]
            torchrl_logger.warning(
                f"{phase.name}: {skipped['skipped']} updates were not finite and left out."
            )
        if self.validation_buffer is not None:
            found = means(training.validate(self.validation_buffer)[1])
            values |= {f"validation/{key}": value for key, value in found.items()}
        self.logs.log(values, self.updates)
        if skipped["in_a_row"] >= self.max_skipped:
            folder = None if self.checkpoints is None else self.checkpoints.folder.parent
            give_up(
                list(update.losses.values()),
                self._buffer_of(phase),
                batch,
                self.state_dict(),
                folder,
            )

    def _metrics_of_hooks(self) -> dict[str, float]:
        return {
            f"{name}/{key}": value
            for name, hook in self.hooks.items()
            for key, value in hook.metrics().items()
        }

    def _save(self, *, wait: bool) -> None:
        if self.checkpoints is not None:
            state, parameters = self.state_dict(), self.parameters()
            self.checkpoints.save(self.updates, state, parameters=parameters, wait=wait)
            if self._evaluation_due:
                self.checkpoints.expect(self.updates)

    def _leave_if(self, stop: StopSignals) -> None:
        if stop:
            assert self.checkpoints is not None  # only then are signals noted
            self.checkpoints.wait()
            torchrl_logger.info(
                f"Stopped after {self.updates} updates; the same command goes on from there."
            )
            raise SystemExit(stop.exit_code)

    def _evaluate_if_due(self, stop: StopSignals) -> dict[str, float]:
        """Evaluates, unless a signal has come: then a checkpoint says that it is due."""
        self._leave_if(stop)
        if not self._evaluation_due:
            return {}
        metrics = self.monitor.run(self.updates, is_last=self._is_milestone, stop=stop)
        self._leave_if(stop)
        if self._is_milestone and not self.progress.is_over:
            self._before[self.progress.later_phases[0].name] = metrics
        self._evaluation_due = False
        return metrics

    def _buffer_of(self, phase: Phase) -> ReplayBuffer:
        """What a phase samples from."""
        return self.phase_buffers.get(phase.name, self.buffer)

    @property
    def _is_milestone(self) -> bool:
        """Whether training is over, or goes on with a phase that has other data of its own."""
        progress, later = self.progress, self.progress.later_phases
        if not progress.has_begun or not progress.phase_is_over:
            return False
        if not later:
            return True
        own = self.phase_buffers.get(later[0].name)
        return own is not None and own is not self._buffer_of(progress.phase)

    def _resume_evaluations(self) -> None:
        begun = self._restored.get("evaluations", ())
        self.monitor.begin_again(begun)
        if self.checkpoints is not None:
            for evaluation in begun:
                self.checkpoints.expect(evaluation["updates"])

    def _log_evaluation(self, metrics: Mapping[str, float], updates: int) -> None:
        if self.checkpoints is not None:
            self.checkpoints.record(updates, metrics)
        if metrics:
            self.logs.log({f"eval/{key}": value for key, value in metrics.items()}, updates)
            figures = ", ".join(f"{key} {value:.3g}" for key, value in metrics.items())
            torchrl_logger.info(f"After {updates} updates: {figures}")

    def _buffers(self) -> dict[str, ReplayBuffer]:
        """All buffers, each once; those within others are saved with them."""
        candidates = {"train": self.buffer, "validation": self.validation_buffer}
        candidates |= {f"phase {name}": buffer for name, buffer in self.phase_buffers.items()}
        for name, hook in self.hooks.items():
            candidates |= {f"{name}.{part}": buffer for part, buffer in hook.buffers().items()}
        return distinct_buffers(candidates)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of training depends on, target networks and random numbers included."""
        skipped = self._training.update.guard.read()["skipped"] if self._training else 0
        progress = self.progress.state_dict()
        return {
            "losses": {name: loss.state_dict() for name, loss in self.losses.items()},
            "training": self._training.state_dict() if self._training else {},
            "moments": self._moments,
            "buffers": {name: buffer_state(buffer) for name, buffer in self._buffers().items()},
            "hooks": {name: hook.state_dict() for name, hook in self.hooks.items()},
            "loggers": self.logs.state_dict(),
            "rng": GlobalRNGState().state_dict(),
            "progress": {
                **progress,
                "skipped_updates": progress["skipped_updates"] + skipped,
                # HardUpdate counts
                "targets": [getattr(updater, "counter", None) for updater in self.target_updaters],
                "evaluation_due": self._evaluation_due,
                "before": self._before,
                "evaluations": self.monitor.state(),
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; random numbers when training goes on.

        Raises:
            ValueError: if another sequence of phases has led to the state.
        """
        progress = state_dict["progress"]
        self.progress.load_state_dict(progress)
        for name, loss in self.losses.items():
            loss.load_state_dict(state_dict["losses"][name])
        later = {phase.name for phase in self.progress.later_phases}  # perhaps not planned then
        fresh = {f"phase {name}" for name in self.phase_buffers if name in later}
        for name, buffer in self._buffers().items():
            if name not in state_dict["buffers"]:
                if name in fresh:
                    continue
                known = sorted(state_dict["buffers"])
                raise ValueError(f"The checkpoint has no buffer {name!r}, only {known}.")
            load_buffer_state(buffer, state_dict["buffers"][name])
        for name, hook in self.hooks.items():
            hook.load_state_dict(state_dict["hooks"].get(name, {}))
        self.logs.load_state_dict(state_dict["loggers"])
        self._moments = dict(state_dict["moments"])
        for updater, counter in zip(self.target_updaters, progress["targets"], strict=True):
            if counter is not None:
                vars(updater)["counter"] = counter
        self._evaluation_due = progress["evaluation_due"]
        self._before = dict(progress["before"])
        self._restored = {**state_dict, "evaluations": progress["evaluations"]}
