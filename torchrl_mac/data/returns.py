"""Monte-Carlo returns of rows, until their episode or their task ends."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["goal_returns", "returns_to_go", "rows_until_an_end"]


def rows_until_an_end(last: Tensor, ends: Tensor | None = None) -> Tensor:
    """How many rows earn from each row on, the first with an end included, ``[N]`` int64.

    Args:
        last (Tensor): the last states of the rows' episodes, ``[N]`` int64, which earn nothing.
        ends (Tensor, optional): the rows that end the task, bool ``[N]``. Default: none of them.

    Examples:
        >>> import torch
        >>> last, ends = torch.tensor([3, 3, 3, 3]), torch.tensor([False, True, False, False])
        >>> rows_until_an_end(last), rows_until_an_end(last, ends)
        (tensor([3, 2, 1, 0]), tensor([2, 1, 1, 0]))
    """
    row = torch.arange(len(last), device=last.device)
    stop = last
    if ends is not None:
        following = torch.where(ends, row + 1, len(last))
        stop = torch.minimum(stop, following.flip(0).cummin(0).values.flip(0))
    return stop - row


def returns_to_go(reward: Tensor, left: Tensor, gamma: float) -> Tensor:
    r"""The discounted sums :math:`\sum_{i < k} \gamma^i r_{t+i}` of the next k rows, ``[N, *]``.

    Sums of 1, 2, 4, ... rows are made of each other, so that N rows cost :math:`O(N \log k)` and
    rounding does not add up.

    Args:
        reward (Tensor): the rows' rewards, ``[N, *]``.
        left (Tensor): k for each row, ``[N]`` int64, as :func:`rows_until_an_end` counts them.
        gamma (float): the discount per row.

    Examples:
        >>> import torch
        >>> returns_to_go(torch.ones(4), torch.tensor([3, 2, 1, 0]), gamma=0.5)
        tensor([1.7500, 1.5000, 1.0000, 0.0000])
    """

    def where(counts: Tensor, rewards: Tensor) -> Tensor:
        return torch.where(counts.reshape(-1, *[1] * (reward.ndim - 1)), rewards, 0)

    total = where(left > 0, reward)
    length, longest = 1, int(left.max()) if len(left) else 0
    while length < longest:
        total[:-length] += gamma**length * where(left[:-length] > length, total[length:])
        length *= 2
    return total


def goal_returns(start: Tensor, last: Tensor, goal: Tensor, gamma: float) -> Tensor:
    r""":math:`\gamma^{g - t}` if the goal is among the rows t, t + 1, ... of the episode, else 0.

    Args:
        start (Tensor): the rows :math:`t`, ``[B]`` int64.
        last (Tensor): the last states of their episodes, ``[B]`` int64.
        goal (Tensor): the rows :math:`g` of the goals, ``[B]`` int64.
        gamma (float): the discount per row.

    Returns:
        the returns, ``[B, 1]`` float32.
    """
    reached = (start <= goal) & (goal < last)
    return (reached * gamma ** (goal - start).clamp_min(0)).float().unsqueeze(-1)
