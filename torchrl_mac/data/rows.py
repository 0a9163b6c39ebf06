"""Rows in episodes, in time order: states, actions, and what these earn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorStorage

from torchrl_mac.data.crossing import CrossingRows
from torchrl_mac.data.returns import returns_to_go, rows_until_an_end
from torchrl_mac.data.segments import Segments
from torchrl_mac.data.windows import chunk_labels, consecutive

__all__ = ["EpisodeStorage"]


class EpisodeStorage(LazyTensorStorage):
    """Rows of which those of an episode follow each other: where these end, what they earn.

    Args:
        rows (TensorDictBase, optional): the rows, of batch size ``[N]``. Default: none yet, to be
            written.

    Keyword Args:
        max_size (int, optional): the most rows, without ``rows``.
        gamma (float): the discount per step.
        ignore_terminated (bool): whether no row ends the task, whatever it says.
        observation_keys (sequence of NestedKey): the observations.
        action_key (NestedKey): the actions.
        reward_key (NestedKey): the rewards, under ``"next"``, if there are any.
        traj_key (NestedKey): a number that is constant within an episode and differs between
            neighbouring ones, shape ``[N]`` or ``[N, 1]``.
        sparse_rewards (bool): whether rewards that are not 0 count as -1.
        rows_in_state (bool): whether a checkpoint must hold the rows.
        episode_ends (Tensor, optional): the row number of the last row of each episode, ``[E]``
            int64. Default: found in the rows, which are all read for it.
        device (torch.device): see :class:`~torchrl.data.TensorStorage`.

    Raises:
        ValueError: if neither or both of ``rows`` and ``max_size`` are given.
    """

    def __init__(
        self,
        rows: TensorDictBase | None,
        *,
        max_size: int | None,
        gamma: float,
        ignore_terminated: bool,
        observation_keys: Sequence[NestedKey],
        action_key: NestedKey,
        reward_key: NestedKey,
        traj_key: NestedKey,
        sparse_rewards: bool,
        rows_in_state: bool,
        episode_ends: Tensor | None,
        device: torch.device | str,
    ) -> None:
        if (rows is None) == (max_size is None):
            raise ValueError("Give either rows or, to write them later, max_size.")
        size = len(rows) if rows is not None else max_size
        super().__init__(cast("int", size), device=device)
        if rows is not None:
            TensorStorage.__init__(self, rows, device=device)
        self.gamma = gamma
        self.ignore_terminated = ignore_terminated
        self.observation_keys = [unravel_key(key) for key in observation_keys]
        self.action_key = unravel_key(action_key)
        self.reward_key = unravel_key(reward_key)
        self.traj_key = unravel_key(traj_key)
        self.sparse_rewards = sparse_rewards
        self.rows_in_state = rows_in_state
        self._episodes: tuple[tuple[int, int], Tensor, Segments] | None = None
        self._crossing: tuple[tuple[int, int], CrossingRows] | None = None
        self._returns: tuple[tuple[int, int], Tensor] | None = None
        if episode_ends is not None:
            self._set_episodes(episode_ends.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        """The rows or, if they do not belong in a checkpoint, their number."""
        return super().state_dict() if self.rows_in_state else {"rows": len(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, or compares the number of rows."""
        if self.rows_in_state:
            super().load_state_dict(state_dict)
        elif state_dict["rows"] != len(self):
            raise ValueError(
                f"The checkpoint is of a dataset of {state_dict['rows']} rows, this one has "
                f"{len(self)}."
            )

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the rows do, for what is computed from them."""
        return self._mutation_revision, len(self)

    @property
    def episode_ends(self) -> Tensor:
        """The row number of the last row of each episode, ``[E]`` int64, in order."""
        if self._episodes is None or self._episodes[0] != self.version:
            if len(self) == 0:
                self._set_episodes(torch.zeros(0, dtype=torch.int64, device=self.device))
                return self.episode_ends
            episode = self._column(self.traj_key).flatten()[: len(self)]
            is_end = torch.ones_like(episode, dtype=torch.bool)
            torch.ne(episode[1:], episode[:-1], out=is_end[:-1])
            cursor = self._last_cursor_index
            if cursor is not None and cursor < len(self):
                is_end[cursor] = True  # in a full ring the row after it is the oldest one
            self._set_episodes(is_end.nonzero().squeeze(-1))
        return cast("tuple[Any, Tensor, Segments]", self._episodes)[1]

    @property
    def crossing_rows(self) -> CrossingRows:
        """The rows that are transitions, numbered through."""
        if self._crossing is None or self._crossing[0] != self.version:
            self._crossing = self.version, CrossingRows(self.episode_ends, self.holds_next)
        return self._crossing[1]

    def _set_episodes(self, ends: Tensor) -> None:
        self._episodes = self.version, ends, Segments(ends + 1)

    def _last(self, row: Tensor) -> Tensor:
        """The last states of the rows' episodes."""
        ends = self.episode_ends
        episodes = cast("tuple[Any, Tensor, Segments]", self._episodes)[2]
        return ends[episodes.find(row)] + self.holds_next

    @property
    def holds_next(self) -> bool:
        """Whether rows are transitions: the last state of an episode is then no row.

        It counts as the row after its last one, of which only ``("next", "observation")`` is read.
        """
        if not self.initialized:
            return False
        following = {key: unravel_key(("next", key)) for key in self.observation_keys}
        missing = [key for key in following.values() if not self._has(key)]
        if missing and len(missing) < len(following):
            raise KeyError(
                f"The rows have no entry {missing[0]!r}, but the next of other observations: store "
                "either all of them, or none and the last state as a row."
            )
        return not missing

    def _column(self, key: NestedKey) -> Tensor:
        column = self._storage.get(key, None)
        if column is None:
            keys = sorted(self._storage.keys(True, True), key=str)
            raise KeyError(f"The rows have no entry {key!r}; they have {keys}.")
        # a memory-mapped subclass would pay for its dispatch at every gather
        return column.as_subclass(torch.Tensor)

    def _has(self, key: NestedKey) -> bool:
        return self._storage.get(key, None) is not None

    def _next_observation(self, key: NestedKey, row: Tensor) -> Tensor:
        """What is observed in the state at a row that is not the first of its episode."""
        if self.holds_next:
            return self._column(unravel_key(("next", key))).index_select(0, row - 1)
        return self._column(key).index_select(0, row)

    def _future(self, key: NestedKey, start: Tensor, length: int) -> Tensor:
        """What is observed in the states after ``start``, ``[B, length, *]``."""
        if self.holds_next:
            return consecutive(self._column(unravel_key(("next", key))), start, length)
        return consecutive(self._column(key), start + 1, length)

    @property
    def _reward(self) -> Tensor | None:
        """The rewards of all rows, if they have any."""
        key = unravel_key(("next", self.reward_key))
        return self._column(key) if self._has(key) else None

    @property
    def _terminated(self) -> Tensor | None:
        """Whether rows end the task, if they say it and it counts."""
        key = ("next", "terminated")
        return None if self.ignore_terminated or not self._has(key) else self._column(key)

    @property
    def _outcomes(self) -> dict[str, Any]:
        """What windows of rows need to know of their rewards and ends."""
        reward = None if self._reward is None else self._rewards
        return {"gamma": self.gamma, "reward": reward, "terminated": self._terminated}

    def _scored(self, reward: Tensor) -> Tensor:
        return -(reward != 0).to(reward.dtype) if self.sparse_rewards else reward

    def _rewards(self, row: Tensor) -> Tensor:
        """The rewards of rows ``[N]``."""
        return self._scored(cast("Tensor", self._reward).index_select(0, row))

    def _actions(self, row: Tensor) -> Tensor:
        """The actions of rows ``[B, h]``."""
        action = self._column(self.action_key).index_select(0, row.flatten())
        return action.unflatten(0, row.shape)

    def _labels(self, start: Tensor, chunk_size: int) -> tuple[Tensor | None, Tensor | None]:
        """The chunks' discounted rewards and whether they terminate, where the rows tell."""
        reward, terminated = (
            None if column is None else consecutive(column, start, chunk_size)
            for column in (self._reward, self._terminated)
        )
        reward = None if reward is None else self._scored(reward)
        return chunk_labels(reward, terminated, self.gamma)

    def _returns_to_go(self, start: Tensor, gamma: float) -> Tensor:
        """What is earned from ``start`` on, ``[B, *]``; computed for all rows when they change."""
        if self._returns is None or self._returns[0] != self.version:
            row, ends = torch.arange(len(self), device=self.device), self._terminated
            if ends is not None:
                ends = ends[: len(self)].reshape(len(self), -1).any(-1)
            left = rows_until_an_end(self._last(row), ends)
            self._returns = self.version, returns_to_go(self._rewards(row), left, gamma)
        return self._returns[1].index_select(0, start)
