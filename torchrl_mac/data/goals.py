"""Which states serve as goals: the goal relabelling of goal-conditioned data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GoalDistribution"]


@dataclass(frozen=True)
class GoalDistribution:
    r"""A mixture of the current state, a later state of the trajectory, and any state.

    With start row :math:`t` and :math:`e`, the last row of its episode but one,

    - a *trajectory* goal is :math:`\mathrm{round}(u\,(t + 1) + (1 - u)\,e)` with :math:`u` uniform
      in [0, 1) or, if ``gamma`` is given, :math:`\min(t + k, e)` with :math:`k` geometric,
      :math:`P(k) = (1 - \gamma)\,\gamma^{k - 1}`: what lies beyond the episode piles up on
      :math:`e`;
    - a *random* goal is any row of the dataset that has a successor.

    The last row of an episode is never a goal, as in OGBench's own datasets
    (https://arxiv.org/abs/2410.20092).

    Args:
        current (float): the probability of the current state.
        trajectory (float): that of a trajectory goal.
        random (float): that of a random goal.
        gamma (float, optional): the discount of a geometric trajectory goal. Default: uniform.

    Raises:
        ValueError: if the probabilities do not sum up to 1, or ``gamma`` is not within (0, 1).

    Examples:
        >>> import torch
        >>> from torchrl_mac.data import GoalDistribution
        >>> goals = GoalDistribution(current=0.2, trajectory=0.5, random=0.3)  # for values
        >>> goals = GoalDistribution(0.0, 0.5, 0.5, gamma=0.999)  # for policies
        >>> start, last = torch.tensor([0, 3]), torch.tensor([9, 9])  # in an episode of ten rows
        >>> anywhere = torch.tensor([100, 200])
        >>> goals.choose(start, last, anywhere, torch.rand(3, 2)).shape
        torch.Size([2])
    """

    current: float
    trajectory: float
    random: float
    gamma: float | None = None

    def __post_init__(self) -> None:
        shares = (self.current, self.trajectory, self.random)
        if min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"current, trajectory and random must be probabilities with sum 1, got {shares}."
            )
        if self.gamma is not None and not 0 < self.gamma < 1:
            raise ValueError(f"gamma must be between 0 and 1, got {self.gamma}.")

    def choose(self, start: Tensor, last: Tensor, anywhere: Tensor, uniform: Tensor) -> Tensor:
        """The rows of the goals, ``[B]`` int64.

        Args:
            start (Tensor): the current rows, ``[B]`` int64.
            last (Tensor): the last rows of their episodes, ``[B]`` int64.
            anywhere (Tensor): random goals to choose from, ``[B]`` int64.
            uniform (Tensor): uniform random numbers in [0, 1), ``[3, B]``: one to choose the kind,
                one against the current state, one within the trajectory.
        """
        kind, keep, place = uniform
        end = last - 1
        if self.gamma is None:
            nearest = torch.minimum(start + 1, end)
            ahead = nearest + ((end - nearest) * place + 0.5).long()
        else:
            steps = (torch.log1p(-place) * (1 / math.log(self.gamma))).long()
            ahead = torch.minimum(start + 1 + steps, end)
        if self.current == 1:
            return start
        goal = torch.where(kind < self.trajectory / (1 - self.current), ahead, anywhere)
        return torch.where(keep < self.current, start, goal) if self.current else goal
