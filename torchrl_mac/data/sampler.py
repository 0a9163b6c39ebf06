"""Draws windows of consecutive rows that stay inside an episode."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_mac.data.storage import ActionChunkStorage

__all__ = ["ActionChunkSampler"]


class ActionChunkSampler(Sampler):
    """Draws action chunks uniformly, with replacement, over every valid start.

    A start ``t`` is valid if the state ``h`` rows later belongs to the same episode: an episode
    of ``T`` stored states has ``T - h`` of them. The sampler returns the row numbers
    ``[B, h + 1]`` of the windows ``t, ..., t + h`` and
    :class:`~torchrl_mac.data.ActionChunkStorage` makes transitions of them. Drawing takes
    O(B log E) time and O(E) memory for E episodes, whatever the number of rows.

    Random numbers come from the ``generator`` of the replay buffer, else from the default one.

    Args:
        chunk_size (int, optional): the number of actions ``h`` in a chunk. Defaults to 1.

    Raises:
        ValueError: if ``chunk_size`` is smaller than 1 or, when sampling, if no episode is
            longer than it.
        TypeError: when sampling from a storage that has no ``episode_ends``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
        >>> rows = TensorDict(episode=torch.tensor([0, 0, 0, 0, 1, 1, 1]), batch_size=[7])
        >>> sampler = ActionChunkSampler(2)
        >>> index, _ = sampler.sample(ActionChunkStorage(rows), batch_size=500)
        >>> index.unique(dim=0)
        tensor([[0, 1, 2],
                [1, 2, 3],
                [4, 5, 6]])
    """

    def __init__(self, chunk_size: int = 1) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.chunk_size = chunk_size
        self._cache: tuple[Any, ...] | None = None

    def sample(self, storage: ActionChunkStorage, batch_size: int) -> tuple[Tensor, dict]:
        """Draws windows of rows.

        Args:
            storage (ActionChunkStorage): where the rows are.
            batch_size (int): the number of windows ``B``.

        Returns:
            the row numbers, ``[B, chunk_size + 1]`` int64, and an empty dictionary.
        """
        total, cumulative, offset = self._starts(storage)
        if total == 0:
            raise ValueError(
                f"No episode is longer than chunk_size={self.chunk_size} ({len(cumulative)} "
                f"episodes in {len(storage)} rows); choose a smaller chunk_size."
            )
        device = None if self._rng is None else self._rng.device
        rank = torch.randint(total, (batch_size,), generator=self._rng, device=device)
        rank = rank.to(cumulative.device)
        start = rank + offset[torch.searchsorted(cumulative, rank, right=True)]
        return start.unsqueeze(-1) + torch.arange(self.chunk_size + 1), {}

    def num_starts(self, storage: ActionChunkStorage) -> int:
        """The number of valid starts in ``storage``."""
        return self._starts(storage)[0]

    def _sampleable_count(self, storage: ActionChunkStorage, batch_size: int) -> int:
        return self.num_starts(storage)

    def _starts(self, storage: ActionChunkStorage) -> tuple[int, Tensor, Tensor]:
        """The number of starts, that up to each episode's end, and start row minus its rank."""
        if self._cache is not None:
            cached_storage, version, starts = self._cache
            if cached_storage() is storage and version == storage.version:
                return starts
        if not isinstance(storage, ActionChunkStorage):
            raise TypeError(
                f"{type(self).__name__} needs an ActionChunkStorage, got {type(storage).__name__}."
            )
        ends = storage.episode_ends.cpu()
        first = torch.cat([ends.new_zeros(1), ends[:-1] + 1])[: len(ends)]
        count = (ends + 1 - first - self.chunk_size).clamp_min(0)
        cumulative = count.cumsum(0)
        starts = int(count.sum()), cumulative, first - (cumulative - count)
        self._cache = weakref.ref(storage), storage.version, starts
        return starts

    def state_dict(self) -> dict[str, Any]:
        """An empty dictionary: the only state is the replay buffer's generator."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""

    def dumps(self, path: str | Path) -> None:
        """Does nothing."""

    def loads(self, path: str | Path) -> None:
        """Does nothing."""

    def _empty(self) -> None:
        self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(chunk_size={self.chunk_size})"
