"""Windows that run on from one episode into the next, as the authors of Q-chunking sample them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_mac.data.segments import Segments
from torchrl_mac.data.windows import Window, before_an_end

__all__ = ["CrossingRows", "crossing_window"]


class CrossingRows:
    """The rows that are transitions, numbered through: windows are runs of these numbers.

    Args:
        episode_ends (Tensor): the row number of the last row of each episode, ``[E]`` int64.
        holds_next (bool): whether all rows are transitions; or else the last one of each episode is
            none, which is left out.

    Examples:
        >>> import torch
        >>> from torchrl_mac.data.crossing import CrossingRows
        >>> rows = CrossingRows(torch.tensor([3, 6]), holds_next=False)  # 4 and 3 states
        >>> rows.total, rows.row(torch.arange(5))
        (5, tensor([0, 1, 2, 4, 5]))
        >>> rows.window(torch.tensor([1, 4]), 2)
        tensor([[1, 2],
                [4, 5]])
    """

    def __init__(self, episode_ends: Tensor, holds_next: bool) -> None:
        self.holds_next = holds_next
        number = torch.arange(len(episode_ends), device=episode_ends.device)
        self._rows = Segments(episode_ends + 1)
        self._numbers = Segments(episode_ends - number)
        ends = episode_ends + 1 if holds_next else self._numbers.ends
        self.total = int(ends[-1]) if len(ends) else 0

    def row(self, number: Tensor) -> Tensor:
        """The rows of transitions."""
        return number if self.holds_next else number + self._numbers.find(number)

    def window(self, start: Tensor, length: int) -> Tensor:
        """The rows ``[B, length]`` of windows that begin at rows ``start`` ``[B]``."""
        number = start if self.holds_next else start - self._rows.find(start)
        offset = torch.arange(length, device=start.device)
        return self.row((number.unsqueeze(-1) + offset).flatten()).unflatten(0, (-1, length))


def crossing_window(
    row: Tensor,
    ends: Tensor,
    *,
    chunk_size: int,
    n_steps: int,
    gamma: float,
    reward: Callable[[Tensor], Tensor] | None,
    terminated: Tensor | None,
) -> Window:
    """Windows of all rewards and terminations of their rows, whatever episodes these are of.

    Args:
        row (Tensor): the rows, ``[B, L]`` int64, as many as actions or steps.
        ends (Tensor): which of them their episode ends with, ``[B, L]`` bool.
        chunk_size (int): the number of actions.
        n_steps (int): the number of steps to the next state.
        gamma (float): the discount per step.
        reward (callable or None): returns the rewards of rows ``[M]``, ``[M, *]``.
        terminated (Tensor or None): whether they end the task, ``[N, *]`` bool; ``None`` if that
            does not count.
    """
    inside, counted = before_an_end(ends), row[:, :n_steps]
    total = ended = None
    if reward is not None:
        rewards = reward(counted.flatten()).unflatten(0, counted.shape)
        discount = gamma ** torch.arange(n_steps, device=row.device)
        total = rewards.mul_(discount.reshape(-1, *[1] * (rewards.ndim - 2))).sum(1)
    if terminated is not None:
        ended = terminated.index_select(0, counted.flatten())
        ended = ended.reshape(len(row), -1).any(1, keepdim=True)
    steps = torch.full_like(row[:, 0], n_steps)
    return Window(steps, inside[:, :chunk_size], total, ended, inside[:, n_steps - 1 : n_steps])
