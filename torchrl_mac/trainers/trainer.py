"""The training loop for offline objectives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from torchrl_mac.trainers.checkpoint import buffer_state, load_buffer_state
from torchrl_mac.trainers.evaluation import Evaluation
from torchrl_mac.trainers.guard import give_up
from torchrl_mac.trainers.logs import rewind
from torchrl_mac.trainers.phase import Phase, check_past
from torchrl_mac.trainers.phase_training import PhaseTraining
from torchrl_mac.trainers.rotation import RunCheckpoints
from torchrl_mac.trainers.signals import StopSignals

__all__ = ["OfflineTrainer"]


class OfflineTrainer:
    """Trains losses on a fixed dataset, phase after phase, and logs, evaluates and saves.

    With ``checkpoints`` a run that was killed goes on as if nothing had happened: :meth:`resume`,
    then :meth:`train`. On a CPU all parameters, moments, targets and metrics are then equal, bit
    for bit, to those of an uninterrupted run. SIGINT and SIGTERM end the run with a checkpoint,
    after the current update, and exit with 130 or 143.

    Updates that are not finite are left out (see :class:`~torchrl_mac.trainers.LossUpdate`).

    Args:
        losses (dict of LossModule): the objectives, by name.
        buffer (ReplayBuffer): the dataset; sampled with each phase's batch size.
        phases (sequence of Phase): what to train, in order. A phase trains the loss terms that
            it names and leaves all other parameters as they are.

    Keyword Args:
        target_updater (TargetNetUpdater, optional): steps with every update that trains a term of
            the loss it belongs to.
        validation_buffer (ReplayBuffer, optional): a batch of it goes through the phase's losses,
            without an update, each time something is logged.
        evaluate (callable, optional): returns a dict of metrics, such as an
            :class:`~torchrl_mac.trainers.Evaluator`. Called after the last update.
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
        **switches: ``compile``, ``cudagraphs``, ``precision``, ``max_grad_norm`` and
            ``distributed`` of :class:`~torchrl_mac.trainers.LossUpdate`.

    Raises:
        ValueError: if a phase names a term that no loss has, or if two losses have the same.
        NonFiniteError: when training, if it cannot go on; says what is not finite.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> from torchrl_mac.objectives import ChunkedWorldModelLoss
        >>> from torchrl_mac.trainers import OfflineTrainer, Phase
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
        >>> trainer = OfflineTrainer(
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
        target_updater: TargetNetUpdater | None = None,
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
        self.phases = list(phases)
        self.target_updater = target_updater
        self.validation_buffer = validation_buffer
        self.evaluate = evaluate
        self.monitor: Callable[..., Any] | None = evaluate if monitor is None else monitor
        self.loggers = list(loggers)
        self.checkpoints = checkpoints
        self.log_interval = log_interval
        self.max_skipped = max_skipped
        self.progress_bar = progress_bar
        self.switches = switches
        self.first_update = self.updates = first_update
        self.skipped_updates = 0
        self.train_seconds = 0.0
        self._training: PhaseTraining | None = None
        self._restored: Mapping[str, Any] = {}  # what of a loaded state has yet to take effect
        self._evaluation_due = False
        self._pending: list[tuple[int, Evaluation]] = []
        self._check_phases()

    def _check_phases(self) -> None:
        terms = [term for loss in self.losses.values() for term in loss.out_keys]
        if len(set(terms)) < len(terms):
            raise ValueError(f"Two losses have a term of the same name: {sorted(terms)}.")
        for phase in self.phases:
            unknown = set(phase.losses) - set(terms)
            if unknown:
                raise ValueError(
                    f"Phase {phase.name!r} trains {sorted(unknown)}, which no loss has; "
                    f"choose among {terms}."
                )

    @property
    def num_updates(self) -> int:
        """The number of updates of all phases together."""
        return sum(phase.num_updates for phase in self.phases)

    @property
    def _last_update(self) -> int:
        return self.first_update + self.num_updates

    def train(self) -> dict[str, float]:
        """Runs what is left of all phases.

        Returns:
            ``updates``, ``skipped_updates``, ``train_seconds`` (evaluation excluded), whether all
            phases were ``compiled``, if they should be, and the last evaluation's metrics.

        Raises:
            SystemExit: after SIGINT or SIGTERM, with code 130 or 143.
        """
        bar = tqdm(
            total=self.num_updates,
            initial=self.updates - self.first_update,
            disable=not self.progress_bar,
            unit="it",
        )
        compiled, metrics = True, {}
        stop = StopSignals()
        stops = self.checkpoints is not None and not self.switches.get("distributed")
        with bar, stop if stops else contextlib.nullcontext():
            self._resume_evaluations()
            metrics = self._evaluate_if_due(stop)
            for phase, done in self._remaining():
                bar.set_description(phase.name)
                with PhaseTraining(
                    phase, self.losses, self.target_updater, **self.switches
                ) as training:
                    self._training = training
                    self._restore(training, done)
                    metrics = self._train_phase(training, done, stop, bar) or metrics
                    compiled &= training.update.is_compiled
                    self.skipped_updates += training.update.guard.read()["skipped"]
                    self._training = None
            if self._restored:  # of a finished run: what follows it draws on
                GlobalRNGState().load_state_dict(self._restored["rng"])
            stop.interruptible(self._wait_for_evaluations)
            self._leave_if(stop)
        result = {
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
            "train_seconds": self.train_seconds,
            **metrics,
        }
        if self.switches.get("compile"):
            result["compiled"] = compiled
        return result

    def _train_phase(
        self, training: PhaseTraining, done: int, stop: StopSignals, bar: tqdm
    ) -> dict[str, float]:
        phase, clock = training.phase, time.perf_counter()
        metrics: dict[str, float] = {}
        for step in range(done + 1, phase.num_updates + 1):
            batch = self.buffer.sample(phase.batch_size)
            losses = training.step(batch)
            self.updates += 1
            bar.update()
            last = self.updates == self._last_update
            if self.updates % self.log_interval == 0 or last:
                self._log_losses(training, losses, batch, bar)
                self._log_evaluations(wait=False)
            self._evaluation_due = last or (
                phase.eval_interval > 0 and step % phase.eval_interval == 0
            )
            if self._evaluation_due or stop or self._checkpoint_due():
                self.train_seconds += time.perf_counter() - clock
                self._save(wait=bool(stop))
                metrics = self._evaluate_if_due(stop) or metrics
                clock = time.perf_counter()
        self.train_seconds += time.perf_counter() - clock
        return metrics

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
            for logger in self.loggers:
                rewind(logger)
            return False
        path, state = found
        self.load_state_dict(state)
        torchrl_logger.info(f"Going on after {self.updates} updates, from {path}")
        return True

    def _remaining(self) -> Iterator[tuple[Phase, int]]:
        """The phases that are not finished and how many of their updates are done."""
        end = self.first_update
        for phase in self.phases:
            begin, end = end, end + phase.num_updates
            if self.updates < end:
                yield phase, max(0, self.updates - begin)

    def _restore(self, training: PhaseTraining, done: int) -> None:
        """Lets what was loaded take effect in the phase that goes on."""
        state, self._restored = self._restored, {}
        if state:
            if done:
                training.load_state_dict(state["training"])
                self.skipped_updates -= training.update.guard.read()["skipped"]
            GlobalRNGState().load_state_dict(state["rng"])

    def _log_losses(
        self, training: PhaseTraining, losses: TensorDictBase, batch: TensorDictBase, bar: tqdm
    ) -> None:
        phase, update = training.phase, training.update
        values = {f"train/{key}": value.item() for key, value in losses.items()}
        bar.set_postfix(
            {key.split("_")[-1]: f"{value.item():.3g}" for key, value in losses.items()}
        )
        skipped = update.guard.read()
        if skipped["skipped"]:
            values["train/skipped_updates"] = self.skipped_updates + skipped["skipped"]
            torchrl_logger.warning(
                f"{phase.name}: {skipped['skipped']} updates were not finite and left out."
            )
        if self.validation_buffer is not None:
            with torch.no_grad():
                validation = self.validation_buffer.sample(phase.batch_size)
                for key, value in update.compute(validation).items():
                    values[f"validation/{key}"] = value.item()
        self._log(values, self.updates)
        if skipped["in_a_row"] >= self.max_skipped:
            folder = None if self.checkpoints is None else self.checkpoints.folder.parent
            give_up(update.losses, self.buffer, batch, self.state_dict(), folder)

    def _checkpoint_due(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.due(self.updates)

    def _save(self, *, wait: bool) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.updates, self.state_dict(), wait=wait)
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
        last = self.updates == self._last_update
        evaluate = self.evaluate if last else self.monitor
        metrics: Any = {}
        try:
            if evaluate is not None:
                metrics = stop.interruptible(evaluate)
        except Exception as error:
            if last:
                raise
            torchrl_logger.warning(f"Training goes on without an evaluation: {error!r}")
        self._leave_if(stop)
        self._evaluation_due = False
        if not isinstance(metrics, Mapping):
            self._pending.append((self.updates, metrics))
            self._log_evaluations(wait=False)
            return {}
        self._log_metrics(metrics, self.updates)
        return dict(metrics)

    def _resume_evaluations(self) -> None:
        for evaluation in self._restored.get("evaluations", ()):
            if self.monitor is not None:
                begun = self.monitor(state=evaluation["state"])
                self._pending.append((evaluation["updates"], begun))
            if self.checkpoints is not None:
                self.checkpoints.expect(evaluation["updates"])

    def _wait_for_evaluations(self) -> None:
        self._log_evaluations(wait=True)

    def _log_evaluations(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].done()):
            updates, evaluation = self._pending[0]
            try:
                metrics = evaluation.result()
            except Exception as error:
                torchrl_logger.warning(f"The evaluation after {updates} updates failed: {error!r}")
                metrics = {}
            del self._pending[0]
            self._log_metrics(metrics, updates)

    def _log_metrics(self, metrics: Mapping[str, float], updates: int) -> None:
        if self.checkpoints is not None:
            self.checkpoints.record(updates, metrics)
        if metrics:
            self._log({f"eval/{key}": value for key, value in metrics.items()}, updates)
            figures = ", ".join(f"{key} {value:.3g}" for key, value in metrics.items())
            torchrl_logger.info(f"After {updates} updates: {figures}")

    def _log(self, values: Mapping[str, float], updates: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=updates)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of training depends on, target networks and random numbers included."""
        buffers = {"train": self.buffer, "validation": self.validation_buffer}
        skipped = self._training.update.guard.read()["skipped"] if self._training else 0
        return {
            "losses": {name: loss.state_dict() for name, loss in self.losses.items()},
            "training": self._training.state_dict() if self._training else {},
            "buffers": {
                name: buffer_state(buf) for name, buf in buffers.items() if buf is not None
            },
            "loggers": [[type(logger).__name__, logger.state_dict()] for logger in self.loggers],
            "rng": GlobalRNGState().state_dict(),
            "progress": {
                "updates": self.updates,
                "skipped_updates": self.skipped_updates + skipped,
                "train_seconds": self.train_seconds,
                "target_counter": getattr(self.target_updater, "counter", None),  # HardUpdate
                "phases": [[phase.name, phase.num_updates] for phase in self.phases],
                "evaluation_due": self._evaluation_due,
                "evaluations": [
                    {"updates": updates, "state": evaluation.state}
                    for updates, evaluation in self._pending
                ],
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; random numbers when training goes on.

        Raises:
            ValueError: if another sequence of phases has led to the state.
        """
        progress = state_dict["progress"]
        check_past(self.phases, progress["phases"], progress["updates"] - self.first_update)
        for name, loss in self.losses.items():
            loss.load_state_dict(state_dict["losses"][name])
        load_buffer_state(self.buffer, state_dict["buffers"]["train"])
        if self.validation_buffer is not None:
            load_buffer_state(self.validation_buffer, state_dict["buffers"]["validation"])
        states: dict[str, list[Any]] = {}
        for kind, state in state_dict["loggers"]:
            states.setdefault(kind, []).append(state)
        for logger in self.loggers:  # there may be others now
            known = states.get(type(logger).__name__)
            rewind(logger, known.pop(0) if known else None)
        self.updates = progress["updates"]
        self.skipped_updates = progress["skipped_updates"]
        self.train_seconds = progress["train_seconds"]
        if progress["target_counter"] is not None:
            vars(self.target_updater)["counter"] = progress["target_counter"]
        self._evaluation_due = progress["evaluation_due"]
        self._restored = {**state_dict, "evaluations": progress["evaluations"]}
