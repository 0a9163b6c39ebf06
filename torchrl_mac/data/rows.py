"""Rows in episodes, in time order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorStorage

from torchrl_mac.data.crossing import CrossingRows
from torchrl_mac.data.segments import Segments

__all__ = ["EpisodeStorage"]


class EpisodeStorage(LazyTensorStorage):
    """Rows of which those of an episode follow each other, and where the episodes end.

    Args:
        rows (TensorDictBase, optional): the rows, of batch size ``[N]``. Default: none yet, to be
            written.

    Keyword Args:
        max_size (int, optional): the most rows, without ``rows``.
        observation_keys (sequence of NestedKey): the observations.
        traj_key (NestedKey): a number that is constant within an episode and differs between
            neighbouring ones, shape ``[N]`` or ``[N, 1]``.
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
        observation_keys: Sequence[NestedKey],
        traj_key: NestedKey,
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
        self.observation_keys = [unravel_key(key) for key in observation_keys]
        self.traj_key = unravel_key(traj_key)
        self.rows_in_state = rows_in_state
        self._episodes: tuple[tuple[int, int], Tensor, Segments] | None = None
        self._crossing: tuple[tuple[int, int], CrossingRows] | None = None
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
