"""Returns that are averages over how far they look ahead."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["average_return", "look_ahead_shares"]


def look_ahead_shares(horizon: int, lmbda: float) -> list[float]:
    r"""How much of each step's return is what comes after its own value, :math:`p_0 \dots p_{H-1}`.

    With weights :math:`\lambda^n` of looking n = 0 ... H - i steps ahead, all but the first.

    Examples:
        >>> look_ahead_shares(2, 1.0)
        [0.6666666666666666, 0.5]
    """
    sums = [1.0]
    for _ in range(horizon):
        sums.append(1 + lmbda * sums[-1])
    return [lmbda * less / more for less, more in itertools.pairwise(sums)][::-1]


def average_return(
    value: Tensor, reward: Tensor, alive: Tensor, discount: Tensor | float, shares: Sequence[float]
) -> Tensor:
    r"""The returns :math:`G_i = (1 - p_i) q_i + p_i (M_i r_i + M_{i+1} \Gamma G_{i+1})`.

    Args:
        value (Tensor): :math:`q`, ``[*, H + 1]``; the last one is the last return.
        reward (Tensor): r, ``[*, H]``.
        alive (Tensor): M, 1 until the task has ended and 0 from then on, ``[*, H + 1]``.
        discount (Tensor or float): :math:`\Gamma`.
        shares (sequence of float): p, see :func:`look_ahead_shares`.

    Returns:
        ``[*, H + 1]``.

    Examples:
        >>> import torch
        >>> value, reward = torch.tensor([0.0, 0.0, 8.0]), torch.tensor([1.0, 2.0])
        >>> average_return(value, reward, torch.ones(3), 0.5, look_ahead_shares(2, 1.0))
        tensor([1.6667, 3.0000, 8.0000])
    """
    returns = [value[..., -1]]
    for i, share in reversed(list(enumerate(shares))):
        ahead = alive[..., i] * reward[..., i] + discount * alive[..., i + 1] * returns[-1]
        returns.append((1 - share) * value[..., i] + share * ahead)
    return torch.stack(returns[::-1], -1)
