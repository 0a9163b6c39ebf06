"""An ActionChunkStorage that is written while it is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage


def make_buffer(size, h, n_steps=None, **kwargs):
    sampler = ActionChunkSampler(h, n_steps=n_steps, seed=0)
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(max_size=size, **sampler.layout, **kwargs),
        sampler=sampler,
        batch_size=200,
    )


def make_row(number, episode):
    return TensorDict(
        observation=torch.tensor([float(number)]),
        action=torch.tensor([10.0 * number]),
        episode=torch.tensor(episode),
        next=TensorDict(reward=torch.tensor([1.0]), terminated=torch.tensor([False])),
    )


class SlowRing:
    """The rows as a list, of which the oldest are replaced."""

    def __init__(self, size):
        self.size, self.rows, self.written = size, [], 0

    def add(self, number, episode):
        place = self.written % self.size
        self.rows[place : place + 1] = [(number, episode)]
        self.written += 1

    def follows(self, place):
        """Whether the next row in memory is the next state of this one."""
        if place + 1 >= len(self.rows):
            return False
        (number, episode), (following, same) = self.rows[place], self.rows[place + 1]
        return following == number + 1 and same == episode

    def room(self, place):
        steps = 0
        while self.follows(place + steps):
            steps += 1
        return steps


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    size=st.integers(4, 20),
    h=st.integers(1, 3),
    n_steps=st.one_of(st.none(), st.integers(1, 4)),
    names=st.integers(1, 3),
)
def test_step_by_step(lengths, size, h, n_steps, names):
    """Few names come back often, so that only the cursor tells new rows from old ones."""
    buffer, ring, number = make_buffer(size, h, n_steps), SlowRing(size), 0
    for episode, length in enumerate(lengths):
        for _ in range(length):
            # neighbouring episodes differ
            name = episode % (names + 1)
            buffer.add(make_row(number, name)) if number % 2 else buffer.extend(
                make_row(number, name).unsqueeze(0)
            )
            ring.add(number, name)
            number += 1
            check(buffer, ring, h, n_steps)
        number += 1  # the next episode begins elsewhere


def check(buffer, ring, h, n_steps):
    assert len(buffer) == len(ring.rows)
    needed = h if n_steps is None else 1
    starts = [place for place in range(len(ring.rows)) if ring.room(place) >= needed]
    if not starts:
        assert not buffer.can_sample()
        with pytest.raises(ValueError, match="No episode is longer"):
            buffer.sample()
        return
    batch = buffer.sample()
    assert set(batch["index"][:, 0].tolist()) == set(starts)
    for chunk in batch[:30]:
        place = int(chunk["index"][0])
        number, room = ring.rows[place][0], ring.room(place)
        steps = h if n_steps is None else min(n_steps, room)
        assert chunk["observation"].item() == number
        assert chunk["next", "observation"].item() == number + steps
        assert chunk["next", "reward"].item() == steps
        assert chunk["next", "truncated"].item() == (room == steps)
        valid = [i < room for i in range(h)]
        expected = [10.0 * (number + i) * ok for i, ok in enumerate(valid)]
        assert chunk["action"].flatten().tolist() == expected
        if n_steps is not None:
            assert chunk["valid"].flatten().tolist() == valid
            assert chunk["steps_to_next_obs"].item() == steps


def test_blocks_that_wrap_around():
    buffer = make_buffer(10, 2)
    rows = torch.stack([make_row(number, number // 7) for number in range(14)])
    buffer.extend(rows[:8])
    buffer.extend(rows[8:])
    assert buffer[:]["observation"].flatten().tolist() == [10, 11, 12, 13, *range(4, 10)]
    assert buffer.storage.episode_ends.tolist() == [3, 6, 9]
    assert set(buffer.sample()["index"][:, 0].tolist()) == {0, 1, 4, 7}


def test_empty():
    buffer = make_buffer(10, 2)
    assert len(buffer) == 0 and buffer.storage.episode_ends.tolist() == []
    with pytest.raises(ValueError, match="0 episodes in 0 rows"):
        buffer.sample()
    buffer.extend(torch.stack([make_row(number, 0) for number in range(6)]))
    buffer.sample()
    buffer.empty()
    assert not buffer.can_sample()
    buffer.extend(torch.stack([make_row(number, 0) for number in range(3)]))
    assert set(buffer.sample()["index"][:, 0].tolist()) == {0}


def test_rows_or_a_size():
    rows = torch.stack([make_row(0, 0)])
    for arguments in ({}, {"rows": rows, "max_size": 1}):
        with pytest.raises(ValueError, match="either rows or, to write them later, max_size"):
            ActionChunkStorage(**arguments)


if __name__ == "__main__":
    pytest.main([__file__])
