"""A storage that turns windows of consecutive rows into action-chunk transitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor

from torchrl_mac.data.crossing import crossing_window
from torchrl_mac.data.returns import goal_returns
from torchrl_mac.data.rows import EpisodeStorage
from torchrl_mac.data.windows import (
    Window,
    consecutive,
    expand_as_rows,
    goal_steps,
    goal_window,
    task_window,
    window_lines,
    window_rows,
)

__all__ = ["ActionChunkStorage"]


class ActionChunkStorage(EpisodeStorage):
    r"""One row per stored state; a 2-D index reads chunks of consecutive actions.

    Rows are in time order, the rows of an episode are contiguous, and the next state of a row
    is the row after it, so next observations are not stored: an episode of T steps has T + 1
    rows, and the action, reward and ends of its last row mean nothing. Rows that do have
    ``("next", "observation")``, as collectors write them, are transitions: then an episode of T
    steps has T rows, and the next state of a window is read from the last of them. Indexed with
    an integer, a slice or a 1-D tensor, this is a :class:`~torchrl.data.TensorStorage`, full from
    the start with ``rows`` or growing up to ``max_size``, then a ring, as a replay buffer writes
    it. Indexed with ``[B, h + 1]`` row numbers, each line a window :math:`t, t + 1, \dots, t + h`
    inside an episode, as :class:`~torchrl_mac.data.ActionChunkSampler` draws them, it returns a
    batch ``[B]`` of transitions that span ``h`` actions:

    ==========================  ============  ================================================
    key                         shape         value
    ==========================  ============  ================================================
    ``"observation"``           ``[B, O]``    :math:`s_t`
    ``"action"``                ``[B, h, A]`` :math:`a_t, \dots, a_{t+h-1}`; ``[B, A]`` if h=1
    ``("next", "observation")`` ``[B, O]``    :math:`s_{t+h}`
    ``("next", "reward")``      ``[B, 1]``    :math:`\sum_{i<h} \gamma^i r_{t+i}`, if stored, up to
                                              the first of the rows that terminated
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

    With ``n_steps`` the next state is not the chunk's. It is :math:`s_{t+k}`, of which the
    column after the actions' holds the row number: :math:`k = n` steps later or, where the
    episode has fewer left, its last row; no row with a successor is wasted. A termination on the
    way, if it is not ignored, is where the window ends and k counts. Rewards and ends are of the
    k steps, and there are two more entries:

    ===========================  ============  ===============================================
    ``"steps_to_next_obs"``      ``[B, 1]``    k, int64, by which TorchRL's value estimators
                                               discount: give them the gamma of one step.
                                               IQLLoss and REDQLoss do not pass it on to them
    ``"valid"``                  ``[B, h, 1]`` whether the actions have a successor in their
                                               episode and come before its termination. Those
                                               after the episode are 0, those after the
                                               termination what was done. ``[B, 1]`` if h=1
    ===========================  ============  ===============================================

    With a goal under ``reward_goal`` such a window ends with the last row but one of the episode,
    the last that can be a goal (:class:`~torchrl_mac.data.GoalDistribution`), as in OGBench's
    hierarchical agents, and at the goal if that is nearer. It terminates if the goal is reached in
    fewer than n steps, from 0 on; its reward is :math:`-\sum_{i<k} \gamma^i`, or with
    ``negative_reward=False`` :math:`\gamma^k` for success and else 0. From the last row but one
    k = 0: without success its target is its own value.

    With ``subgoals`` such samples also have what a hierarchical policy aims for on the way, states
    read from ``goal_source`` as goals are (https://arxiv.org/abs/2506.04168):

    ===========================  ============  ===============================================
    ``("subgoal", goal)``        ``[B, G]``    for each goal, :math:`s_{t+k}` with the k of a
                                               window towards it: what a high level should choose
    ``"low_actor_goal"``         ``[B, G]``    n steps ahead or, if nearer, the last row but one,
                                               whatever the goals: what a low level should reach
    ===========================  ============  ===============================================

    Two more entries can be had of chunks that are within an episode, not with ``n_steps``:

    ===========================  ============  ===============================================
    ``("future", key)``          ``[B, h, O]`` with ``future``, for each observation: all of
                                               :math:`s_{t+1}, \dots, s_{t+h}`
    ``"return_to_go"``           ``[B, 1]``    with ``return_gamma``, the sum of the rewards
                                               :math:`r_t, r_{t+1}, \dots` so discounted, to the
                                               end of the episode or, if it counts, of the task.
                                               For a goal: ``return_gamma`` to the number of
                                               steps to it, 0 if it is not among the rows t, t + 1,
                                               ... of the episode
    ===========================  ============  ===============================================

    Args:
        rows (TensorDictBase, optional): the rows, of batch size ``[N]``. Default: none yet, to be
            written.

    Keyword Args:
        max_size (int, optional): the most rows, without ``rows``.
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
        n_steps (int, optional): the most steps from a state to the next one, as the sampler's.
            Default: those of the chunk.
        truncation_is_success (bool, optional): with ``n_steps`` and goals, whether windows that
            the end of the episode cuts short succeed as well, as in OGBench's agents (by
            mistake). Defaults to ``False``.
        subgoals (bool, optional): whether samples have subgoals. Defaults to ``False``.
        cross_episodes (bool, optional): whether windows run on from one episode into the next, see
            :class:`~torchrl_mac.data.ActionChunkSampler`. Defaults to ``False``.
        end_key (NestedKey, optional): for such windows, the entry of rows (bool ``[N, 1]``) that
            says that an episode ends with their action. Default: where ``traj_key`` changes.
        sparse_rewards (bool, optional): whether the rewards of rows that are not 0 count as -1.
            Defaults to ``False``.
        future (bool, optional): whether samples have all states on the way to the next one.
            Defaults to ``False``.
        return_gamma (float, optional): the discount per step of the returns to go that samples
            have; those of a goal need ``negative_reward=False``. Computed for all rows whenever
            these have changed. Default: samples have none.
        flat_chunk_size (int, optional): if given, a 1-D tensor is an index of the starts of
            chunks of so many actions, as of samplers with ``flat_index``. Default: of rows.
        rows_in_state (bool, optional): whether a checkpoint must hold the rows. If ``False``, as
            for a dataset that is on disk, it holds their number. Defaults to ``True``.
        episode_ends (Tensor, optional): the row number of the last row of each episode, ``[E]``
            int64. Default: found in the rows, which are all read for it.
        device (torch.device, optional): see :class:`~torchrl.data.TensorStorage`.

    Raises:
        KeyError: at the first chunk, if the rows lack one of the keys.
        ValueError: if neither or both of ``rows`` and ``max_size`` are given, ``n_steps`` is
            smaller than 1, or ``subgoals``, ``future`` or ``return_gamma`` do not go with the rest.

    .. note:: Of a window only the first row number, that of the next state and the number of
        actions are read: the others follow.

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

        Windows of at most two steps, the second of which ends with the episode:

        >>> sampler = ActionChunkSampler(3, n_steps=2)
        >>> storage = ActionChunkStorage(rows, gamma=0.5, **sampler.layout)
        >>> chunk = storage[torch.tensor([[2, 3, 4, 4], [4, 4, 4, 5]])]
        >>> chunk["steps_to_next_obs"].flatten(), chunk["next", "observation"].flatten()
        (tensor([2, 1]), tensor([4., 5.]))
        >>> chunk["next", "reward"].flatten(), chunk["valid"].squeeze(-1)
        (tensor([1.5000, 1.0000]), tensor([[ True,  True,  True],
                [ True, False, False]]))

        A ring that is written step by step:

        >>> buffer = TensorDictReplayBuffer(
        ...     storage=ActionChunkStorage(max_size=8), sampler=ActionChunkSampler(3), batch_size=4
        ... )
        >>> for row in rows:
        ...     _ = buffer.add(row)
        >>> len(buffer), buffer.sample()["action"].shape
        (8, torch.Size([4, 3, 2]))
    """

    def __init__(
        self,
        rows: TensorDictBase | None = None,
        *,
        max_size: int | None = None,
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
        n_steps: int | None = None,
        truncation_is_success: bool = False,
        subgoals: bool = False,
        cross_episodes: bool = False,
        end_key: NestedKey | None = None,
        sparse_rewards: bool = False,
        future: bool = False,
        return_gamma: float | None = None,
        flat_chunk_size: int | None = None,
        rows_in_state: bool = True,
        episode_ends: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if cross_episodes and goal_keys:
            raise ValueError("Windows across episodes have no goals: cross_episodes=False.")
        if n_steps is not None and n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, or None, got {n_steps}.")
        if subgoals and (n_steps is None or not goal_keys):
            raise ValueError("subgoals are on the way to goals: give n_steps and goal_keys.")
        if (future or return_gamma is not None) and (cross_episodes or n_steps is not None):
            raise ValueError(
                "future and return_gamma are for whole chunks within an episode: without n_steps "
                "and cross_episodes."
            )
        if return_gamma is not None and goal_keys and negative_reward:
            raise ValueError("return_gamma is for rewards of 0 and 1: negative_reward=False.")
        super().__init__(
            rows,
            max_size=max_size,
            gamma=gamma,
            ignore_terminated=ignore_terminated,
            observation_keys=observation_keys,
            action_key=action_key,
            reward_key=reward_key,
            traj_key=traj_key,
            sparse_rewards=sparse_rewards,
            rows_in_state=rows_in_state,
            episode_ends=episode_ends,
            device=device,
        )
        self.goal_keys = [unravel_key(key) for key in goal_keys]
        self.goal_source = unravel_key(goal_source)
        self.reward_goal = unravel_key(reward_goal)
        self.negative_reward = negative_reward
        self.n_steps = n_steps
        self.truncation_is_success = truncation_is_success
        ways = [unravel_key(("subgoal", key)) for key in self.goal_keys]
        self.subgoal_keys = [*ways, "low_actor_goal"] if subgoals else []
        self.cross_episodes = cross_episodes
        self.end_key = None if end_key is None else unravel_key(end_key)
        self.future = future
        self.return_gamma = return_gamma
        self.flat_chunk_size = flat_chunk_size

    def get(self, index: Any) -> Any:
        """Rows, or chunks of them if ``index`` has two dimensions or the storage is flat."""
        ndim = getattr(index, "ndim", 0)
        if ndim == 2:
            return self._get_chunks(torch.as_tensor(index, device=self.device))
        if ndim == 1 and self.flat_chunk_size is not None:
            return self._get_chunks(self._lines(torch.as_tensor(index, device=self.device)))
        return super().get(index)

    def _lines(self, start: Tensor) -> Tensor:
        """The lines of an index that has the starts alone."""
        chunk_size = cast("int", self.flat_chunk_size)
        if self.n_steps is not None:
            return window_lines(start, self._last(start), chunk_size, self.n_steps)
        return start.unsqueeze(-1) + torch.arange(chunk_size + 1, device=start.device)

    def _get_chunks(self, index: Tensor) -> TensorDict:
        chunk_size = index.shape[1] - 1 - len(self.goal_keys)
        if chunk_size < 1:
            raise ValueError(
                "A window of one row holds no action: index [B, h + 1] with h >= 1, and one column "
                f"for each of the goals {self.goal_keys}."
            )
        if self.goal_keys and self.holds_next:
            raise ValueError("Goals are states: they need rows without a next observation.")
        start, end = index[:, 0].contiguous(), index[:, chunk_size].contiguous()
        goals = dict(zip(self.goal_keys, index[:, chunk_size + 1 :].unbind(1), strict=True))
        goal = goals.get(self.reward_goal)
        # an ensemble stacks batches of several storages, which must all have a device
        device = self._storage.device if self.flat_chunk_size is None else self.device
        chunks = TensorDict(batch_size=start.shape, device=device)
        following = TensorDict(batch_size=start.shape, device=device)
        window = None
        if self.cross_episodes:
            window, action, end, is_last = self._crossing_window(start, chunk_size)
            following.set("whole", window.whole)
        elif self.n_steps is None:
            action = consecutive(self._column(self.action_key), start, chunk_size)
            last = self._last(start)
            if goal is None:
                reward, terminated = self._labels(start, chunk_size)
            else:
                terminated = ((start <= goal) & (goal < end)).unsqueeze(-1)
                reward = terminated.to(torch.float32) - float(self.negative_reward)
        else:
            last = self._last(start)
            if self.subgoal_keys:
                limit = torch.minimum(end, last - 1)
                ahead = [start + goal_steps(start, limit, row) for row in goals.values()]
                goals |= dict(zip(self.subgoal_keys, [*ahead, limit], strict=True))
            window = self._window(start, end, last, goal, chunk_size)
            end = start + window.steps
            action = self._actions(window_rows(start, last, chunk_size))
            inside = start.unsqueeze(-1) + torch.arange(chunk_size, device=start.device)
            inside = inside < last.unsqueeze(-1)
            action.masked_fill_(~expand_as_rows(inside, action), 0)
        if window is not None:
            reward, terminated = window.reward, window.terminated
            chunks.set("steps_to_next_obs", window.steps.unsqueeze(-1))
            valid = window.valid.unsqueeze(-1)
            chunks.set("valid", valid.squeeze(1) if chunk_size == 1 else valid)
        chunks.set(self.action_key, action.squeeze(1) if chunk_size == 1 else action)
        for key in self.observation_keys:
            chunks.set(key, self._column(key).index_select(0, start))
            following.set(key, self._next_observation(key, end))
            if self.future:
                chunks.set(unravel_key(("future", key)), self._future(key, start, chunk_size))
        for key, row in goals.items():
            chunks.set(key, self._column(self.goal_source).index_select(0, row))
        if (gamma := self.return_gamma) is not None:
            if goal is None:
                to_go = self._returns_to_go(start, gamma)
            else:
                to_go = goal_returns(start, last, goal, gamma)
            chunks.set("return_to_go", to_go)
        if reward is not None:
            following.set(self.reward_key, reward)
        if not self.cross_episodes:
            is_last = (last == end).unsqueeze(-1)
        if terminated is None or self.ignore_terminated:
            terminated = torch.zeros_like(is_last)
        following.set("terminated", terminated)
        following.set("truncated", is_last & ~terminated)
        following.set("done", is_last | terminated)
        return chunks.set("next", following)

    def _crossing_window(
        self, start: Tensor, chunk_size: int
    ) -> tuple[Window, Tensor, Tensor, Tensor]:
        """Windows regardless of episodes, their actions, the rows of the next states, and ends."""
        n_steps = chunk_size if self.n_steps is None else self.n_steps
        row = self.crossing_rows.window(start, max(chunk_size, n_steps))
        if self.end_key is None:
            ends = self._last(row) == row + 1
        else:
            ends = self._column(self.end_key).flatten()[row.flatten()].reshape(row.shape)
            ends = ends | (row == len(self) - 1)  # nothing is known to follow
        window = crossing_window(
            row, ends, chunk_size=chunk_size, n_steps=n_steps, **self._outcomes
        )
        is_last = ends[:, n_steps - 1 : n_steps]
        return window, self._actions(row[:, :chunk_size]), row[:, n_steps - 1] + 1, is_last

    def _window(
        self, start: Tensor, end: Tensor, last: Tensor, goal: Tensor | None, chunk_size: int
    ) -> Window:
        """Windows of at most n steps, cut where the task or the way to the goal ends."""
        options: dict[str, Any] = {"chunk_size": chunk_size, "n_steps": self.n_steps}
        if goal is None:
            return task_window(start, end, last, **options, **self._outcomes)
        for name in ("gamma", "negative_reward", "truncation_is_success"):
            options[name] = getattr(self, name)
        return goal_window(start, end, last, goal, **options)
