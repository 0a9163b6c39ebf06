"""Rows that hold their own next observation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, GoalDistribution


def make_states(lengths, seed=0):
    """A row for each state, the last one of an episode included."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    return TensorDict(
        observation=torch.randn(rows, 3, generator=generator),
        action=torch.rand(rows, 2, generator=generator) + 0.1,
        episode=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        next=TensorDict(
            reward=torch.randn(rows, 1, generator=generator),
            terminated=torch.rand(rows, 1, generator=generator) < 0.2,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def as_transitions(states):
    """The same steps, as a collector writes them."""
    episode = states["episode"]
    has_next = torch.cat([episode[1:] == episode[:-1], torch.tensor([False])])
    rows = states[has_next].clone()
    rows["next", "observation"] = states["observation"].roll(-1, 0)[has_next]
    return rows


def unique_batches(rows, h, n_steps, **kwargs):
    """All windows, in order."""
    sampler = ActionChunkSampler(h, n_steps=n_steps, seed=0)
    storage = ActionChunkStorage(rows, gamma=0.9, **sampler.layout, **kwargs)
    if sampler.num_starts(storage) == 0:
        return None
    index, _ = sampler.sample(storage, 60 * sampler.num_starts(storage))
    lines = index.unique(dim=0)
    assert len(lines) == sampler.num_starts(storage)
    return storage[lines]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    h=st.integers(1, 4),
    n_steps=st.one_of(st.none(), st.integers(1, 5)),
    ignore_terminated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_are_those_of_the_states(lengths, h, n_steps, ignore_terminated, seed):
    states = make_states(lengths, seed)
    transitions = as_transitions(states)
    if not len(transitions):
        return
    kwargs = {"ignore_terminated": ignore_terminated}
    ours = unique_batches(transitions, h, n_steps, **kwargs)
    theirs = unique_batches(states, h, n_steps, **kwargs)
    if theirs is None:
        assert ours is None
        return
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        assert torch.equal(ours[key], theirs[key]), key


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(3, 20),
    h=st.integers(1, 3),
    n_steps=st.one_of(st.none(), st.integers(1, 4)),
)
def test_a_ring_of_transitions(lengths, size, h, n_steps):
    sampler = ActionChunkSampler(h, n_steps=n_steps, seed=0)
    buffer = TensorDictReplayBuffer(
        storage=ActionChunkStorage(max_size=size, **sampler.layout),
        sampler=sampler,
        batch_size=300,
    )
    memory, written, time = [None] * size, 0, 0
    for episode, length in enumerate(lengths):
        for step in range(length):
            row = TensorDict(
                observation=torch.tensor([float(time)]),
                action=torch.tensor([10.0 * time]),
                episode=torch.tensor(episode % 2),
                next=TensorDict(
                    observation=torch.tensor([time + 0.5 if step == length - 1 else time + 1.0]),
                    reward=torch.ones(1),
                    terminated=torch.zeros(1, dtype=torch.bool),
                ),
            )
            buffer.add(row)
            memory[written % size] = time
            written, time = written + 1, time + 1
        time += 7  # the next episode begins elsewhere
    following = {}  # of each time, the observation after it
    for row in buffer[:].unbind(0):
        following[int(row["observation"])] = row["next", "observation"].item()
    cursor = (written - 1) % size
    starts = []
    for place, begin in enumerate(memory[: min(written, size)]):
        room = 1
        while (
            place + room - 1 != cursor
            and place + room < min(written, size)
            and memory[place + room] == begin + room
        ):
            room += 1
        if n_steps is not None or room >= h:
            starts.append((begin, min(room, h if n_steps is None else n_steps)))
    if not starts:
        with pytest.raises(ValueError, match="No episode is longer"):
            buffer.sample()
        return
    batch = buffer.sample()
    steps = dict(starts)
    assert set(batch["observation"].flatten().int().tolist()) == set(steps)
    for row in batch.unbind(0):
        begin = int(row["observation"])
        assert row["next", "observation"].item() == following[begin + steps[begin] - 1]
        assert row["action"].flatten()[0] == 10.0 * begin


def test_goals_are_states():
    rows = as_transitions(make_states([5, 5]))
    goals = {"value_goal": GoalDistribution(0.2, 0.5, 0.3)}
    sampler = ActionChunkSampler(2, goals=goals, seed=0)
    storage = ActionChunkStorage(rows, **sampler.layout)
    with pytest.raises(ValueError, match="need rows without a next observation"):
        storage[sampler.sample(storage, 4)[0]]


if __name__ == "__main__":
    pytest.main([__file__])
