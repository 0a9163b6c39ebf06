"""Windows of rows: where they end, what they earn, which of their actions are real.

All of it on the rows' device and without waiting for it: masks instead of branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Window",
    "before_an_end",
    "chunk_labels",
    "consecutive",
    "expand_as_rows",
    "goal_steps",
    "goal_window",
    "task_window",
    "window_lines",
    "window_rows",
]


class Window(NamedTuple):
    """What became of windows that start at given rows.

    Attributes:
        steps (Tensor): from the start to the next state, ``[B]`` int64.
        valid (Tensor): which of the chunk's actions were taken, ``[B, h]`` bool.
        reward (Tensor or None): the discounted sum over the steps, ``[B, *]``.
        terminated (Tensor or None): whether the task ends with them, ``[B, 1]`` bool.
        whole (Tensor or None): whether they are within one episode, ``[B, 1]`` bool, if not all
            are.
    """

    steps: Tensor
    valid: Tensor
    reward: Tensor | None
    terminated: Tensor | None
    whole: Tensor | None = None


def window_rows(start: Tensor, last: Tensor, length: int) -> Tensor:
    """The rows ``start, start + 1, ...``, ``[B, length]``; the last one that has a next repeats.

    Args:
        start (Tensor): the first rows, ``[B]`` int64.
        last (Tensor): the last rows of their episodes, ``[B]`` int64.
        length (int): the number of rows in a window.
    """
    offset = torch.arange(length, device=start.device)
    return torch.minimum(start.unsqueeze(-1) + offset, last.unsqueeze(-1) - 1)


def window_lines(start: Tensor, last: Tensor, chunk_size: int, n_steps: int) -> Tensor:
    """The lines of an index, ``[B, chunk_size + 1]``: rows of the actions, row of the next state.

    Examples:
        >>> import torch
        >>> start, last = torch.tensor([0, 3]), torch.tensor([4, 4])
        >>> window_lines(start, last, chunk_size=3, n_steps=2)
        tensor([[0, 1, 2, 2],
                [3, 3, 3, 4]])
    """
    following = torch.minimum(start + n_steps, last).unsqueeze(-1)
    return torch.cat([window_rows(start, last, chunk_size), following], 1)


def consecutive(column: Tensor, start: Tensor, length: int) -> Tensor:
    """Rows ``start`` to ``start + length - 1`` of ``column``, ``[B, length, *]``.

    Gathers from an overlapping view: each window is one contiguous copy, three times faster
    than ``column[index]`` with ``B * length`` row numbers.
    """
    view = column.unfold(0, length, 1).movedim(-1, 1)
    return view.index_select(0, start)


def chunk_labels(
    reward: Tensor | None, terminated: Tensor | None, gamma: float
) -> tuple[Tensor | None, Tensor | None]:
    """What whole chunks earn up to their first termination, and whether they have one.

    Args:
        reward (Tensor or None): the rewards of their rows, ``[B, h, *]``; overwritten.
        terminated (Tensor or None): whether the rows end the task, ``[B, h, *]`` bool; ``None`` if
            that does not count.
        gamma (float): the discount per step.

    Returns:
        the discounted sums ``[B, *]``, and bool ``[B, 1]``; each if the rows tell.
    """
    ended = over = None
    if terminated is not None:
        ends = terminated.reshape(*terminated.shape[:2], -1).any(-1)
        ended = ends.any(1, keepdim=True)
        # a look at the CPU's memory is free; elsewhere it would have to be waited for
        if not ends.is_cpu or ended.any():
            over = ends[:, :-1].cumsum(1, dtype=torch.int32) > 0
    if reward is None:
        return None, ended
    discount = gamma ** torch.arange(reward.shape[1], device=reward.device)
    reward.mul_(discount.reshape(-1, *[1] * (reward.ndim - 2)))
    if over is not None:
        reward[:, 1:].masked_fill_(expand_as_rows(over, reward), 0)
    return reward.sum(1), ended


def task_window(
    start: Tensor,
    end: Tensor,
    last: Tensor,
    *,
    chunk_size: int,
    n_steps: int,
    gamma: float,
    reward: Callable[[Tensor], Tensor] | None,
    terminated: Tensor | None,
) -> Window:
    r"""Windows of the rewards and terminations of the rows, cut at the first termination.

    Args:
        start (Tensor): the first rows, ``[B]`` int64.
        end (Tensor): the rows of the next states, if nothing terminates, ``[B]`` int64.
        last (Tensor): the last rows of the episodes, ``[B]`` int64.
        chunk_size (int): the number of actions.
        n_steps (int): the most rows between ``start`` and ``end``.
        gamma (float): the discount per step.
        reward (callable or None): returns the rewards of rows ``[M]``, ``[M, *]``.
        terminated (Tensor or None): whether they end the task, ``[N, *]`` bool; ``None`` if that
            does not count.
    """
    length = max(chunk_size, n_steps)
    row = window_rows(start, last, length)
    offset = torch.arange(length, device=start.device)
    inside = start.unsqueeze(-1) + offset < last.unsqueeze(-1)
    if terminated is not None:
        ends = terminated.index_select(0, row.flatten()).reshape(*row.shape, -1).any(-1)
        inside = inside & before_an_end(ends)
    counted = inside[:, :n_steps] & (offset[:n_steps] < (end - start).unsqueeze(-1))
    total = ended = None
    if terminated is not None:
        ended = (ends[:, :n_steps] & counted).any(1, keepdim=True)
    if reward is not None:
        rewards = reward(row[:, :n_steps].flatten()).unflatten(0, (-1, n_steps))
        discount = counted * gamma ** offset[:n_steps]
        total = rewards.mul_(expand_as_rows(discount, rewards)).sum(1)
    return Window(counted.sum(1), inside[:, :chunk_size], total, ended)


def goal_steps(start: Tensor, limit: Tensor, goal: Tensor) -> Tensor:
    """The steps to a goal if it is ahead and nearer than ``limit``, or else to that, ``[B]``.

    Args:
        start (Tensor): the first rows, ``[B]`` int64.
        limit (Tensor): the rows that a window cannot pass, ``[B]`` int64.
        goal (Tensor): the rows of the goals, ``[B]`` int64.

    Examples:
        >>> import torch
        >>> start, limit = torch.tensor(3), torch.tensor(6)
        >>> [goal_steps(start, limit, torch.tensor(goal)).item() for goal in (3, 5, 6, 9, 0)]
        [0, 2, 3, 3, 3]
    """
    ahead, steps = goal - start, limit - start
    return torch.where((ahead >= 0) & (ahead < steps), ahead, steps)


def goal_window(
    start: Tensor,
    end: Tensor,
    last: Tensor,
    goal: Tensor,
    *,
    chunk_size: int,
    n_steps: int,
    gamma: float,
    negative_reward: bool,
    truncation_is_success: bool,
) -> Window:
    r"""Windows towards a goal, cut where the goal is.

    With :math:`e`, the last row but one of the episode, and :math:`m = \min(n, e - t)` the window
    has :math:`k = g - t` steps if :math:`0 \le g - t < m` and else :math:`k = m`. It succeeds if
    :math:`k < n` and :math:`g = t + k`.

    Args:
        start (Tensor): the first rows :math:`t`, ``[B]`` int64.
        end (Tensor): the rows :math:`n` steps later, or ``last``, ``[B]`` int64.
        last (Tensor): the last rows of the episodes, ``[B]`` int64.
        goal (Tensor): the rows :math:`g` of the goals, ``[B]`` int64.
        chunk_size (int): the number of actions.
        n_steps (int): the most steps :math:`n`.
        gamma (float): the discount per step.
        negative_reward (bool): whether the reward is -1 for each of the k steps, or else 1 after
            them if they succeed.
        truncation_is_success (bool): whether :math:`k < n` suffices for success.
    """
    steps = goal_steps(start, torch.minimum(end, last - 1), goal)
    success = steps < n_steps
    if not truncation_is_success:
        success = success & (goal == start + steps)
    discount = gamma ** torch.arange(n_steps + 1, device=start.device, dtype=torch.float64)
    if negative_reward:
        reward = (discount - discount.cumsum(0))[steps]  # minus the sum over i < k
    else:
        reward = discount[steps] * success
    offset = torch.arange(chunk_size, device=start.device)
    valid = start.unsqueeze(-1) + offset < last.unsqueeze(-1)
    return Window(steps, valid, reward.float().unsqueeze(-1), success.unsqueeze(-1))


def before_an_end(ends: Tensor) -> Tensor:
    """Which steps of windows come before any end, or with the first one, bool ``[B, L]``.

    Args:
        ends (Tensor): after which steps something ends, bool ``[B, L]``.
    """
    return ends.cumsum(1) - ends.long() == 0


def expand_as_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """``mask [B, h]`` with as many dimensions as ``rows [B, h, *]``."""
    return mask.reshape(mask.shape + (1,) * (rows.ndim - mask.ndim))
