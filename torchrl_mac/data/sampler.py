"""Draws windows of consecutive rows that stay inside an episode, and goals for them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.data.replay_buffers.samplers import Sampler

from torchrl_mac.data.goals import GoalDistribution
from torchrl_mac.data.segments import Segments
from torchrl_mac.data.storage import ActionChunkStorage
from torchrl_mac.data.windows import window_lines
from torchrl_mac.utils.files import DamagedError, read_json, write_json

__all__ = ["ActionChunkSampler"]

_STATE = "action_chunk_sampler.json"


class ActionChunkSampler(Sampler):
    """Draws action chunks uniformly, with replacement, over every valid start.

    A start ``t`` is valid if the state ``h`` rows later belongs to the same episode: an episode
    of ``T`` stored states has ``T - h`` of them. The sampler returns the row numbers
    ``[B, h + 1]`` of the windows ``t, ..., t + h`` and
    :class:`~torchrl_mac.data.ActionChunkStorage` makes transitions of them. With ``goals`` there
    is one more column for each of them, the row number of a state. Drawing takes O(B log E) time
    and O(E) memory for E episodes, whatever the number of rows.

    With ``n_steps`` the next state is at most so many rows later, whatever the number of actions,
    and less where the episode ends before: every row is a start that has a successor in its
    episode. The columns are then the rows of the ``h`` actions, of which the last one that has a
    successor repeats, and the row of the next state. The storage must have the same ``n_steps``.

    With ``cross_episodes`` windows run on from one episode into the next, as the authors of
    Q-chunking sample them (https://arxiv.org/abs/2507.07969): a start is any of the transitions but
    the last ``h - 1`` (or ``n_steps - 1``). The storage then gives all the actions of a window,
    those of the next episode included; the discounted sum of all its rewards, those after a
    termination included; and says which actions are ``"valid"``, being of the start's episode, and
    whether the window is as a ``("next", "whole")``. It is there to compare with published numbers:
    no critic learns from the ends of episodes so, while with ``n_steps`` they are not wasted.

    What is drawn is a function of the seed and of the number of batches drawn before, both of
    which are in the sampler's state: a restored sampler goes on exactly where the saved one was.

    Args:
        chunk_size (int, optional): the number of actions ``h`` in a chunk. Defaults to 1.

    Keyword Args:
        n_steps (int, optional): the most steps from a state to the next one, independent of
            ``chunk_size``. Default: the chunk's, all of them within the episode.
        cross_episodes (bool, optional): whether windows run on from one episode into the next.
            Defaults to ``False``.
        goals (dict of NestedKey to GoalDistribution, optional): the goals to draw, by the entries
            that they become in a batch, such as ``"value_goal"``; the storage's ``goal_keys``.
        seed (int, optional): the seed. Default: drawn from the ``generator`` of the replay
            buffer, else from PyTorch's default one, with the first batch.
        flat_index (bool, optional): if ``True``, the index is ``[B]``, the starts alone, as
            :class:`~torchrl.data.ReplayBufferEnsemble` needs it; then the storage's
            ``flat_chunk_size`` must be ``chunk_size``, and there cannot be goals. The starts are
            the same. Defaults to ``False``.

    Raises:
        ValueError: if ``chunk_size`` or ``n_steps`` is smaller than 1, if ``flat_index`` is to
            hold goals or, when sampling, if no episode is long enough or the storage is made for
            other goals, steps or indices.
        TypeError: when sampling from a storage that has no ``episode_ends``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
        >>> rows = TensorDict(episode=torch.tensor([0, 0, 0, 0, 1, 1, 1]), batch_size=[7])
        >>> sampler = ActionChunkSampler(2, seed=0)
        >>> index, _ = sampler.sample(ActionChunkStorage(rows), batch_size=500)
        >>> index.unique(dim=0)
        tensor([[0, 1, 2],
                [1, 2, 3],
                [4, 5, 6]])
        >>> sampler = ActionChunkSampler(2, n_steps=3, seed=0)  # s_t, two actions, s_{t+3}
        >>> index, _ = sampler.sample(ActionChunkStorage(rows, **sampler.layout), batch_size=500)
        >>> index.unique(dim=0)
        tensor([[0, 1, 3],
                [1, 2, 3],
                [2, 2, 3],
                [4, 5, 6],
                [5, 5, 6]])
    """

    def __init__(
        self,
        chunk_size: int = 1,
        *,
        n_steps: int | None = None,
        cross_episodes: bool = False,
        goals: Mapping[NestedKey, GoalDistribution] | None = None,
        seed: int | None = None,
        flat_index: bool = False,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        if n_steps is not None and n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, or None, got {n_steps}.")
        if cross_episodes and goals:
            raise ValueError("Windows across episodes have no goals: cross_episodes=False.")
        if flat_index and goals:
            raise ValueError(
                "flat_index=True leaves no room for goals; combine buffers that have some in a "
                "MixedReplayBuffer."
            )
        self.chunk_size = chunk_size
        self.n_steps = n_steps
        self.cross_episodes = cross_episodes
        self.goals = {unravel_key(key): goal for key, goal in (goals or {}).items()}
        self.seed = seed
        self.flat_index = flat_index
        self.step = 0
        self._cache: dict[int, tuple[Any, ...]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(self, storage: ActionChunkStorage, batch_size: int) -> tuple[Tensor, dict]:
        """Draws windows of rows, and goals.

        Args:
            storage (ActionChunkStorage): where the rows are.
            batch_size (int): the number of windows ``B``.

        Returns:
            the row numbers, ``[B, chunk_size + 1 + len(goals)]`` int64 or, with ``flat_index``,
            ``[B]``; and an empty dictionary.
        """
        if self.seed is None:
            self.seed = int(torch.randint(2**62, (), generator=self._rng))
        generator = self._generator(self.seed, self.step, storage)
        self.step += 1
        return self.draw(storage, batch_size, generator), {}

    def draw(
        self, storage: ActionChunkStorage, batch_size: int, generator: torch.Generator
    ) -> Tensor:
        """Draws as :meth:`sample` does, from a generator on the storage's device.

        Works on the device alone, so that it can be captured in a CUDA graph once it was called.
        """
        if self.cross_episodes:
            return self._draw_crossing(storage, batch_size, generator)
        total, episodes, offset, last = self._starts(storage, self._span)
        self._check(storage)
        if total == 0:
            span, hint = f"chunk_size={self.chunk_size}", "; choose a smaller chunk_size"
            if self.n_steps is not None:
                span, hint = "one row", ""
            raise ValueError(
                f"No episode is longer than {span} ({len(last)} episodes in {len(storage)} "
                f"rows){hint}."
            )
        device = generator.device
        rank = torch.randint(total, (batch_size,), generator=generator, device=device)
        episode = episodes.find(rank)
        start = rank + offset[episode]
        if self.flat_index:
            return start
        size = self.chunk_size + 1
        index = start.new_empty(batch_size, size + len(self.goals))
        if self.n_steps is None:
            torch.add(start.unsqueeze(-1), torch.arange(size, device=device), out=index[:, :size])
        else:
            index[:, :size] = window_lines(start, last[episode], self.chunk_size, self.n_steps)
        if not self.goals:
            return index
        last = last[episode]
        any_total, episodes, any_offset, _ = self._starts(storage, 1)
        shape = (len(self.goals), batch_size)
        rank = torch.randint(any_total, shape, generator=generator, device=device)
        anywhere = rank + any_offset[episodes.find(rank)]
        uniform = torch.rand((len(self.goals), 3, batch_size), generator=generator, device=device)
        for i, goal in enumerate(self.goals.values()):
            index[:, size + i] = goal.choose(start, last, anywhere[i], uniform[i])
        return index

    def _draw_crossing(
        self, storage: ActionChunkStorage, batch_size: int, generator: torch.Generator
    ) -> Tensor:
        self._check(storage)
        total, device = self.num_starts(storage), generator.device
        if total == 0:
            raise ValueError(
                f"There are only {storage.crossing_rows.total} transitions for windows of "
                f"{self._span}; choose a smaller chunk_size or n_steps."
            )
        number = torch.randint(total, (batch_size,), generator=generator, device=device)
        start = storage.crossing_rows.row(number)
        if self.flat_index:
            return start
        row = storage.crossing_rows.window(start, self._span)
        n_steps = self.chunk_size if self.n_steps is None else self.n_steps
        return torch.cat([row[:, : self.chunk_size], row[:, n_steps - 1 : n_steps] + 1], 1)

    def num_starts(self, storage: ActionChunkStorage) -> int:
        """The number of valid starts in ``storage``."""
        if self.cross_episodes:
            return max(0, storage.crossing_rows.total - self._span + 1)
        return self._starts(storage, self._span)[0]

    @property
    def layout(self) -> dict[str, Any]:
        """What the index is made of: the arguments that a storage needs to understand it."""
        return {
            "goal_keys": list(self.goals),
            "n_steps": self.n_steps,
            "cross_episodes": self.cross_episodes,
            "flat_chunk_size": self.chunk_size if self.flat_index else None,
        }

    @property
    def _span(self) -> int:
        """How many rows must follow a start in its episode; across episodes, the window's steps."""
        if self.cross_episodes:
            return max(self.chunk_size, self.n_steps or 1)
        return self.chunk_size if self.n_steps is None else 1

    def _check(self, storage: ActionChunkStorage) -> None:
        if list(self.goals) != storage.goal_keys:
            raise ValueError(
                f"The sampler draws the goals {list(self.goals)}, the storage makes "
                f"{storage.goal_keys}; give both the same, in the same order."
            )
        if self.cross_episodes != storage.cross_episodes:
            raise ValueError(
                f"The sampler has cross_episodes={self.cross_episodes}, the storage "
                f"cross_episodes={storage.cross_episodes}; give both the same."
            )
        if self.n_steps != storage.n_steps:
            raise ValueError(
                f"The sampler has n_steps={self.n_steps}, the storage n_steps={storage.n_steps}; "
                "give both the same."
            )
        if storage.flat_chunk_size != (self.chunk_size if self.flat_index else None):
            raise ValueError(
                f"The sampler has flat_index={self.flat_index} and chunk_size={self.chunk_size}, "
                f"the storage flat_chunk_size={storage.flat_chunk_size}; give both the same."
            )

    def _sampleable_count(self, storage: ActionChunkStorage, batch_size: int) -> int:
        return self.num_starts(storage)

    def _generator(self, seed: int, step: int, storage: ActionChunkStorage) -> torch.Generator:
        device = torch.device(getattr(storage, "device", "cpu"))
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(_mixed(seed, step))

    def _starts(
        self, storage: ActionChunkStorage, chunk_size: int
    ) -> tuple[int, Segments, Tensor, Tensor]:
        """How many starts; their episodes; per episode, start row minus rank, and last state."""
        if chunk_size in self._cache:
            cached_storage, version, starts = self._cache[chunk_size]
            if cached_storage() is storage and version == storage.version:
                return starts
        if not isinstance(storage, ActionChunkStorage):
            raise TypeError(
                f"{type(self).__name__} needs an ActionChunkStorage, got {type(storage).__name__}."
            )
        ends = storage.episode_ends
        first = torch.cat([ends.new_zeros(1), ends[:-1] + 1])[: len(ends)]
        last = ends + storage.holds_next
        count = (last + 1 - first - chunk_size).clamp_min(0)
        cumulative = count.cumsum(0)
        starts = int(count.sum()), Segments(cumulative), first - (cumulative - count), last
        self._cache[chunk_size] = weakref.ref(storage), storage.version, starts
        return starts

    def state_dict(self) -> dict[str, Any]:
        """The seed and the number of batches drawn."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is something else.
        """
        try:
            seed, step = state_dict["seed"], state_dict["step"]
        except (TypeError, KeyError):
            raise ValueError(f"{state_dict!r:.60} is no state of {self!r}.") from None
        if not (seed is None or type(seed) is int) or type(step) is not int or step < 0:
            raise ValueError(
                f"The state of {self!r} must be whole numbers, got {seed=} and {step=}."
            )
        self.seed, self.step = seed, step

    def dumps(self, path: str | Path) -> None:
        """Writes the state into a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_json(Path(path) / _STATE, self.state_dict())

    def loads(self, path: str | Path) -> None:
        """Reads the state from a folder."""
        file = Path(path) / _STATE
        try:
            self.load_state_dict(read_json(file))
        except ValueError as error:
            raise DamagedError(f"{file}: {error}") from error

    def _empty(self) -> None:
        self._cache = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": {}, "_generators": {}}

    def __repr__(self) -> str:
        n_steps = "" if self.n_steps is None else f", n_steps={self.n_steps}"
        crossing = ", cross_episodes=True" if self.cross_episodes else ""
        return f"{type(self).__name__}(chunk_size={self.chunk_size}{n_steps}{crossing})"


def _mixed(seed: int, step: int) -> int:
    """A seed for each (seed, step), well apart for neighbouring ones (SplitMix64's finaliser)."""
    mask = 2**64 - 1
    z = (seed * 0x9E3779B97F4A7C15 + step + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return (z ^ z >> 31) & 2**63 - 1
