"""Windows that run on from one episode into the next, as the authors of Q-chunking sample them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_mac.data.segments import Segments

__all__ = ["CrossingRows"]


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
