"""One gradient update over any number of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import LossModule
from torchrl.objectives.utils import TargetNetUpdater

__all__ = ["LossUpdate"]


class LossUpdate:
    """Turns a batch into one optimizer step on the sum of several losses.

    All losses are computed with the same parameters; then the target network moves towards the
    parameters *as they were in those losses*, and only then does the optimizer step. The target
    thus lags one step behind the usual order, as in the reference implementation of MAC
    (https://arxiv.org/abs/2512.08108).

    Args:
        losses (sequence of LossModule): every output whose name starts with ``"loss_"`` is added.
        optimizer (torch.optim.Optimizer): holds the parameters to train.
        target_updater (TargetNetUpdater, optional): such as
            :class:`~torchrl.objectives.SoftUpdate`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
        >>> from torchrl_mac.objectives import ChunkedWorldModelLoss
        >>> from torchrl_mac.trainers import LossUpdate
        >>> networks = (NormedMLP(4 + 20, size, num_cells=(32,)) for size in (4, 1, 1))
        >>> loss = ChunkedWorldModelLoss(ChunkedWorldModel(*networks))
        >>> update = LossUpdate([loss], torch.optim.Adam(loss.parameters(), lr=3e-4))
        >>> batch = TensorDict(
        ...     observation=torch.randn(8, 4),
        ...     action=torch.rand(8, 10, 2),
        ...     next=TensorDict(
        ...         observation=torch.randn(8, 4),
        ...         reward=torch.randn(8, 1),
        ...         terminated=torch.zeros(8, 1, dtype=torch.bool),
        ...     ),
        ... )
        >>> sorted(update(batch).keys())
        ['loss_dynamics', 'loss_reward', 'loss_termination']
    """

    def __init__(
        self,
        losses: Sequence[LossModule],
        optimizer: torch.optim.Optimizer,
        target_updater: TargetNetUpdater | None = None,
    ) -> None:
        self.losses = list(losses)
        self.optimizer = optimizer
        self.target_updater = target_updater

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Makes one update and returns the losses, detached."""
        metrics = self.compute(tensordict)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(
            [value for key, value in metrics.items() if key.startswith("loss_")]
        ).sum().backward()
        if self.target_updater is not None:
            self.target_updater.step()
        self.optimizer.step()
        return metrics.detach()

    def compute(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses of a batch, without an update."""
        metrics = TensorDict()
        for loss in self.losses:
            metrics.update(loss(tensordict))
        return metrics
