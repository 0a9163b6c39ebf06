"""A storage that turns windows of consecutive rows into action-chunk transitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.data import TensorStorage

from torchrl_mac.data.segments import Segments

__all__ = ["ActionChunkStorage"]


class ActionChunkStorage(TensorStorage):
    r"""One row per stored state; a 2-D index reads chunks of consecutive actions.

    Rows are in time order, the rows of an episode are contiguous, and the next state of a row
    is the row after it, so next observations are not stored. Indexed with an integer, a slice
    or a 1-D tensor, this is a :class:`~torchrl.data.TensorStorage`. Indexed with
    ``[B, h + 1]`` row numbers, each line a window :math:`t, t + 1, \dots, t + h` inside an
    episode, as :class:`~torchrl_mac.data.ActionChunkSampler` draws them, it returns a batch
    ``[B]`` of transitions that span ``h`` actions:

    ==========================  ============  ================================================
    key                         shape         value
    ==========================  ============  ================================================
    ``"observation"``           ``[B, O]``    :math:`s_t`
    ``"action"``                ``[B, h, A]`` :math:`a_t, \dots, a_{t+h-1}`; ``[B, A]`` if h=1
    ``("next", "observation")`` ``[B, O]``    :math:`s_{t+h}`
    ``("next", "reward")``      ``[B, 1]``    :math:`\sum_{i<h} \gamma^i r_{t+i}`, if stored
    ``("next", "terminated")``  ``[B, 1]``    whether any of the rows t to t+h-1 terminated
    ``("next", "truncated")``   ``[B, 1]``    whether :math:`s_{t+h}` is the last row of its
                                              episode and the chunk did not terminate
    ``("next", "done")``        ``[B, 1]``    terminated or truncated
    ==========================  ============  ================================================

    With ``goal_keys`` the index has one more column for each: the row number of a state, which
    becomes the entry of that key, read from ``goal_source``. The goal under ``reward_goal``
    decides the rewards and ends, which are then of the chunk, not of its steps: the chunk
    terminates with reward 0 if one of the rows t to t+h-1 *is* the goal's, and has reward -1
    otherwise (1 and 0 with ``negative_reward=False``).

    Args:
        rows (TensorDictBase): the rows, of batch size ``[N]``.

    Keyword Args:
        gamma (float, optional): discount per environment step inside a chunk. Defaults to 1.
        ignore_terminated (bool, optional): if ``True``, chunks are never marked as terminated,
            so losses bootstrap through terminal states. Defaults to ``False``.
        observation_keys (sequence of NestedKey, optional): the entries read at both ends of the
            chunk. Defaults to ``("observation",)``.
        action_key (NestedKey, optional): defaults to ``"action"``.
        reward_key (NestedKey, optional): the reward, under ``"next"`` in rows and chunks.
            Rows without it give chunks without it. Defaults to ``"reward"``.
        traj_key (NestedKey, optional): a number that is constant within an episode and differs
            between neighbouring ones, shape ``[N]`` or ``[N, 1]``. Defaults to ``"episode"``.
        goal_keys (sequence of NestedKey, optional): the goals, as the sampler draws them. Defaults
            to none.
        goal_source (NestedKey, optional): the entry that goals are read from. Defaults to
            ``"observation"``.
        reward_goal (NestedKey, optional): the goal that rewards speak of. Defaults to
            ``"value_goal"``.
        negative_reward (bool, optional): whether a chunk's reward for its goal is -1 or 0, or
            else 0 or 1. Defaults to ``True``.
        episode_ends (Tensor, optional): the row number of the last row of each episode, ``[E]``
            int64. Default: found in the rows, which are all read for it.
        device (torch.device, optional): see :class:`~torchrl.data.TensorStorage`.

    Raises:
        KeyError: at the first chunk, if the rows lack one of the keys.

    .. note:: Of a window only the first row number and the length are read: the others follow.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import TensorDictReplayBuffer
        >>> from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
        >>> rows = TensorDict(
        ...     observation=torch.arange(12.0).view(12, 1),
        ...     action=torch.zeros(12, 2),
        ...     episode=torch.arange(12) // 6,
        ...     next=TensorDict(reward=torch.ones(12, 1), batch_size=[12]),
        ...     batch_size=[12],
        ... )
        >>> storage = ActionChunkStorage(rows, gamma=0.5)
        >>> chunk = storage[torch.tensor([[2, 3, 4, 5]])]
        >>> chunk["action"].shape
        torch.Size([1, 3, 2])
        >>> chunk["next", "observation"], chunk["next", "reward"], chunk["next", "truncated"]
        (tensor([[5.]]), tensor([[1.7500]]), tensor([[True]]))
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=storage, sampler=ActionChunkSampler(3), batch_size=32
        ... )
        >>> buffer.sample()["action"].shape
        torch.Size([32, 3, 2])
    """

    def __init__(
        self,
        rows: TensorDictBase,
        *,
        gamma: float = 1.0,
        ignore_terminated: bool = False,
        observation_keys: Sequence[NestedKey] = ("observation",),
        action_key: NestedKey = "action",
        reward_key: NestedKey = "reward",
        traj_key: NestedKey = "episode",
        goal_keys: Sequence[NestedKey] = (),
        goal_source: NestedKey = "observation",
        reward_goal: NestedKey = "value_goal",
        negative_reward: bool = True,
        episode_ends: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(rows, device=device)
        self.gamma = gamma
        self.ignore_terminated = ignore_terminated
        self.observation_keys = [unravel_key(key) for key in observation_keys]
        self.action_key = unravel_key(action_key)
        self.reward_key = unravel_key(reward_key)
        self.traj_key = unravel_key(traj_key)
        self.goal_keys = [unravel_key(key) for key in goal_keys]
        self.goal_source = unravel_key(goal_source)
        self.reward_goal = unravel_key(reward_goal)
        self.negative_reward = negative_reward
        self._episodes: tuple[tuple[int, int], Tensor, Segments] | None = None
        if episode_ends is not None:
            self._set_episodes(episode_ends.to(self.device))

    def get(self, index: Any) -> Any:
        """Rows, or chunks of them if ``index`` has two dimensions."""
        if getattr(index, "ndim", 0) == 2:
            return self._get_chunks(torch.as_tensor(index, device=self.device))
        return super().get(index)

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the rows do, for what is computed from them."""
        return self._mutation_revision, len(self)

    @property
    def episode_ends(self) -> Tensor:
        """The row number of the last row of each episode, ``[E]`` int64, in order."""
        if self._episodes is None or self._episodes[0] != self.version:
            episode = self._column(self.traj_key).flatten()[: len(self)]
            is_end = torch.ones_like(episode, dtype=torch.bool)
            torch.ne(episode[1:], episode[:-1], out=is_end[:-1])
            cursor = self._last_cursor_index
            if cursor is not None and cursor < len(self):
                is_end[cursor] = True  # in a full ring the row after it is the oldest one
            self._set_episodes(is_end.nonzero().squeeze(-1))
        return cast("tuple[Any, Tensor, Segments]", self._episodes)[1]

    def _set_episodes(self, ends: Tensor) -> None:
        self._episodes = self.version, ends, Segments(ends + 1)

    def _is_last(self, row: Tensor) -> Tensor:
        ends = self.episode_ends
        episodes = cast("tuple[Any, Tensor, Segments]", self._episodes)[2]
        return ends[episodes.find(row)] == row

    def _column(self, key: NestedKey) -> Tensor:
        column = self._storage.get(key, None)
        if column is None:
            keys = sorted(self._storage.keys(True, True), key=str)
            raise KeyError(f"The rows have no entry {key!r}; they have {keys}.")
        # a memory-mapped subclass would pay for its dispatch at every gather
        return column.as_subclass(torch.Tensor)

    def _has(self, key: NestedKey) -> bool:
        return self._storage.get(key, None) is not None

    def _get_chunks(self, index: Tensor) -> TensorDict:
        chunk_size = index.shape[1] - 1 - len(self.goal_keys)
        if chunk_size < 1:
            raise ValueError(
                "A window of one row holds no action: index [B, h + 1] with h >= 1, and one column "
                f"for each of the goals {self.goal_keys}."
            )
        window = index[:, : chunk_size + 1]
        goals = dict(zip(self.goal_keys, index[:, chunk_size + 1 :].unbind(1), strict=True))
        start, end = window[:, 0].contiguous(), window[:, -1].contiguous()
        chunks = TensorDict(batch_size=start.shape, device=self._storage.device)
        following = TensorDict(batch_size=start.shape, device=self._storage.device)
        for key in self.observation_keys:
            column = self._column(key)
            chunks.set(key, column.index_select(0, start))
            following.set(key, column.index_select(0, end))
        action = _windows(self._column(self.action_key), start, chunk_size)
        chunks.set(self.action_key, action.squeeze(1) if chunk_size == 1 else action)
        for key, row in goals.items():
            chunks.set(key, self._column(self.goal_source).index_select(0, row))

        goal = goals.get(self.reward_goal)
        if goal is None:
            reward, terminated = self._labels(start, chunk_size)
        else:
            terminated = ((start <= goal) & (goal < end)).unsqueeze(-1)
            reward = terminated.to(torch.float32) - float(self.negative_reward)
        if reward is not None:
            following.set(self.reward_key, reward)
        last = self._is_last(end).unsqueeze(-1)
        if terminated is None or self.ignore_terminated:
            terminated = torch.zeros_like(last)
        following.set("terminated", terminated)
        following.set("truncated", last & ~terminated)
        following.set("done", last | terminated)
        return chunks.set("next", following)

    def _labels(self, start: Tensor, chunk_size: int) -> tuple[Tensor | None, Tensor | None]:
        """The chunks' discounted rewards and whether they terminate, where the rows tell."""
        reward = terminated = None
        if self._has(reward_key := unravel_key(("next", self.reward_key))):
            reward = _windows(self._column(reward_key), start, chunk_size)
            discount = self.gamma ** torch.arange(chunk_size, device=reward.device)
            reward = reward.mul_(discount.unsqueeze(-1)).sum(1)
        if not self.ignore_terminated and self._has(("next", "terminated")):
            terminated = _windows(self._column(("next", "terminated")), start, chunk_size).any(1)
        return reward, terminated


def _windows(column: Tensor, start: Tensor, length: int) -> Tensor:
    """Rows ``start`` to ``start + length - 1`` of ``column``, ``[B, length, *]``.

    Gathers from an overlapping view: each window is one contiguous copy, three times faster
    than ``column[index]`` with ``B * length`` row numbers.
    """
    view = column.unfold(0, length, 1).movedim(-1, 1)
    return view.index_select(0, start)
