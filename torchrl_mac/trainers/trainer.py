"""The training loop for offline objectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl._utils import logger as torchrl_logger
from torchrl._utils import timeit
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from tqdm import tqdm

from torchrl_mac.modules import FlowRejectionActor
from torchrl_mac.trainers.evaluation import Evaluation
from torchrl_mac.trainers.phase import Phase
from torchrl_mac.trainers.update import LossUpdate

__all__ = ["OfflineTrainer"]


class OfflineTrainer:
    """Trains losses on a fixed dataset, phase after phase, and logs, evaluates and saves.

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
            Defaults to ``evaluate``.
        loggers (sequence of Logger, optional): TorchRL loggers.
        log_interval (int, optional): in updates. Defaults to 1000.
        progress_bar (bool, optional): defaults to ``True``.
        **switches: ``compile``, ``cudagraphs``, ``precision`` and ``distributed`` of
            :class:`~torchrl_mac.trainers.LossUpdate`.

    Raises:
        ValueError: if a phase names a term that no loss has, or if two losses have the same.

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
        ['train_seconds', 'updates']
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
        monitor: Callable[[], Mapping[str, float] | Evaluation] | None = None,
        loggers: Sequence[Logger] = (),
        log_interval: int = 1000,
        progress_bar: bool = True,
        **switches: Any,
    ) -> None:
        self.losses = dict(losses)
        self.buffer = buffer
        self.phases = list(phases)
        self.target_updater = target_updater
        self.validation_buffer = validation_buffer
        self.evaluate = evaluate
        self.monitor = evaluate if monitor is None else monitor
        self.loggers = list(loggers)
        self.log_interval = log_interval
        self.progress_bar = progress_bar
        self.switches = switches
        self.updates = 0
        self._pending: list[tuple[int, Evaluation]] = []
        self._num_candidates: dict[FlowRejectionActor, int] = {}  # to restore after a phase
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

    def train(self) -> dict[str, float]:
        """Runs all phases.

        Returns:
            ``updates``, ``train_seconds`` (evaluation excluded), whether all phases were
            ``compiled``, if they should be, and the last evaluation's metrics.
        """
        bar = tqdm(total=self.num_updates, disable=not self.progress_bar, unit="it")
        metrics: dict[str, float] = {}
        compiled = True
        clock, seconds = timeit("OfflineTrainer/train"), 0.0
        end = self.updates + self.num_updates
        with bar:
            for phase in self.phases:
                update, schedule = self._begin(phase)
                bar.set_description(phase.name)
                clock.start()
                for step in range(1, phase.num_updates + 1):
                    losses = update(self.buffer.sample(phase.batch_size))
                    schedule.step()
                    self.updates += 1
                    bar.update()
                    last = self.updates == end
                    if self.updates % self.log_interval == 0 or last:
                        self._log_losses(phase, losses, update, bar)
                        self._log_evaluations(wait=False)
                    if last or (phase.eval_interval and step % phase.eval_interval == 0):
                        seconds += clock.elapsed()
                        metrics = self._evaluate() if last else self._monitor()
                        clock.start()
                seconds += clock.elapsed()
                compiled &= update.is_compiled
                self._end()
        self._log_evaluations(wait=True)
        result = {"updates": self.updates, "train_seconds": seconds, **metrics}
        if self.switches.get("compile"):
            result["compiled"] = compiled
        return result

    def _begin(self, phase: Phase) -> tuple[LossUpdate, torch.optim.lr_scheduler.LambdaLR]:
        trained, updater = [], None
        for loss in self.losses.values():
            terms = [term for term in loss.out_keys if term in phase.losses]
            if terms:
                loss.select_out_keys(*terms)
                trained.append(loss)
                if self.target_updater is not None and self.target_updater.loss_module is loss:
                    updater = self.target_updater
        if phase.num_candidates is not None:
            for actor in self._actors():
                self._num_candidates[actor] = actor.num_candidates
                actor.num_candidates = phase.num_candidates
        parameters = [parameter for loss in trained for parameter in loss.parameters()]
        captured = bool(self.switches.get("cudagraphs"))
        lr = torch.tensor(phase.lr, device=parameters[0].device) if captured else phase.lr
        optimizer = torch.optim.Adam(parameters, lr=lr, fused=True, capturable=captured)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.lr_factor)
        return LossUpdate(trained, optimizer, updater, **self.switches), schedule

    def _end(self) -> None:
        for loss in self.losses.values():
            loss.reset_out_keys()
        while self._num_candidates:
            actor, num_candidates = self._num_candidates.popitem()
            actor.num_candidates = num_candidates

    def _actors(self) -> list[FlowRejectionActor]:
        actors = {getattr(loss, "actor_network", None) for loss in self.losses.values()}
        return [actor for actor in actors if isinstance(actor, FlowRejectionActor)]

    def _log_losses(
        self, phase: Phase, losses: TensorDictBase, update: LossUpdate, bar: tqdm
    ) -> None:
        values = {f"train/{key}": value.item() for key, value in losses.items()}
        bar.set_postfix(
            {key.split("_")[-1]: f"{value.item():.3g}" for key, value in losses.items()}
        )
        if self.validation_buffer is not None:
            with torch.no_grad():
                batch = self.validation_buffer.sample(phase.batch_size)
                for key, value in update.compute(batch).items():
                    values[f"validation/{key}"] = value.item()
        self._log(values, self.updates)

    def _evaluate(self) -> dict[str, float]:
        metrics = {} if self.evaluate is None else dict(self.evaluate())
        self._log_metrics(metrics, self.updates)
        return metrics

    def _monitor(self) -> dict[str, float]:
        metrics = {} if self.monitor is None else self.monitor()
        if not isinstance(metrics, Mapping):
            self._pending.append((self.updates, metrics))
            self._log_evaluations(wait=False)
            return {}
        self._log_metrics(metrics, self.updates)
        return dict(metrics)

    def _log_evaluations(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].done()):
            updates, evaluation = self._pending.pop(0)
            self._log_metrics(evaluation.result(), updates)

    def _log_metrics(self, metrics: Mapping[str, float], updates: int) -> None:
        if metrics:
            self._log({f"eval/{key}": value for key, value in metrics.items()}, updates)
            figures = ", ".join(f"{key} {value:.3g}" for key, value in metrics.items())
            torchrl_logger.info(f"After {updates} updates: {figures}")

    def _log(self, values: Mapping[str, float], updates: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=updates)

    def state_dict(self) -> dict[str, Any]:
        """The parameters of all losses, target networks included, and the update count."""
        losses = {name: loss.state_dict() for name, loss in self.losses.items()}
        return {"losses": losses, "updates": self.updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, in place."""
        for name, loss in self.losses.items():
            loss.load_state_dict(state_dict["losses"][name])
        self.updates = state_dict["updates"]

    def save(self, path: str | Path, **modules: nn.Module) -> None:
        """Writes :meth:`state_dict` to a file, which is whole or not there at all.

        Read it with ``torch.load(path, weights_only=True)``.

        Args:
            path (str or Path): the file.
            **modules (nn.Module): whose states to add, under these names: ``actor=actor``.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            states = {name: module.state_dict() for name, module in modules.items()}
            torch.save({**self.state_dict(), **states}, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
