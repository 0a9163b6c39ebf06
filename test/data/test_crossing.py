"""Windows that run over the borders of episodes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    GoalDistribution,
    OGBenchExperienceReplay,
)

GAMMA = 0.5


def make_steps(lengths, seed=0):
    """Transitions of episodes as dictionaries, in the order of time."""
    draw, steps = torch.Generator().manual_seed(seed), []
    for episode, length in enumerate(lengths):
        states = torch.randn(length + 1, 2, generator=draw)
        for i in range(length):
            step = {
                "observation": states[i],
                "action": torch.rand(3, generator=draw) + 0.1,
                "episode": torch.tensor(episode),
                "is_end": torch.tensor([i == length - 1]),
                ("next", "observation"): states[i + 1],
                ("next", "reward"): torch.randn(1, generator=draw),
                ("next", "terminated"): torch.rand(1, generator=draw) < 0.2,
            }
            steps.append(step)
    return steps


def as_rows(steps, kind):
    rows = []
    for step in steps:
        row = TensorDict(step)
        rows.append(row if kind == "transitions" else row.exclude(("next", "observation")))
        if kind == "states" and step["is_end"]:
            last = TensorDict({**step, "observation": step["next", "observation"]})
            rows.append(last.exclude(("next", "observation")))
    return torch.stack(rows)


def slow_window(steps, t, h):
    """One window, step by step."""
    reward, valid, ended = 0.0, [], False
    for i, step in enumerate(steps[t : t + h]):
        reward += GAMMA**i * step["next", "reward"].item()
        valid.append(not ended)
        ended = ended or step["is_end"].item()
    window = steps[t : t + h]
    terminated = any(step["next", "terminated"].item() for step in window)
    is_last = window[-1]["is_end"].item()
    action = torch.stack([step["action"] for step in window])
    return {
        "observation": window[0]["observation"],
        "action": action if h > 1 else action[0],
        "steps_to_next_obs": torch.tensor([h]),
        "valid": torch.tensor(valid).unsqueeze(-1) if h > 1 else torch.tensor(valid),
        ("next", "observation"): window[-1]["next", "observation"],
        ("next", "whole"): torch.tensor([valid[-1]]),
        ("next", "reward"): torch.tensor([reward]),
        ("next", "terminated"): torch.tensor([terminated]),
        ("next", "truncated"): torch.tensor([is_last and not terminated]),
        ("next", "done"): torch.tensor([is_last or terminated]),
    }


def assert_equal(chunk, expected):
    chunk = chunk.exclude("index")
    assert set(chunk.keys(True, True)) == set(expected)
    for key, value in expected.items():
        assert chunk[key].dtype == value.dtype and chunk[key].shape == value.shape, key
        torch.testing.assert_close(chunk[key], value, msg=lambda text, key=key: f"{key}: {text}")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    h=st.integers(1, 8),
    kind=st.sampled_from(["states", "transitions"]),
    end_key=st.sampled_from([None, "is_end"]),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_equal_a_walk(lengths, h, kind, end_key, flat, seed):
    steps = make_steps(lengths, seed)
    rows = as_rows(steps, kind)
    sampler = ActionChunkSampler(h, cross_episodes=True, flat_index=flat, seed=seed)
    storage = ActionChunkStorage(rows, gamma=GAMMA, end_key=end_key, **sampler.layout)
    starts = len(steps) - h + 1
    assert sampler.num_starts(storage) == max(starts, 0)
    if starts < 1:
        with pytest.raises(ValueError, match=rf"only \d+ transitions for windows of {h};"):
            sampler.sample(storage, 1)
        return
    index, _ = sampler.sample(storage, 40 * starts)
    lines = index.unique(dim=0)
    assert len(lines) == starts
    for t, chunk in enumerate(storage[lines]):  # in the order of time
        assert_equal(chunk, slow_window(steps, t, h))


def test_starts_are_uniform():
    steps = make_steps([5, 1, 4])
    sampler = ActionChunkSampler(3, cross_episodes=True, seed=0)
    storage = ActionChunkStorage(as_rows(steps, "states"), **sampler.layout)
    index, _ = sampler.sample(storage, 8000)
    rows, counts = index[:, 0].unique(return_counts=True)
    assert rows.tolist() == [0, 1, 2, 3, 4, 6, 8, 9]  # 5 and 7 are last states
    assert (counts - 1000).abs().max() < 120


def make_ring(size, h, **kwargs):
    sampler = ActionChunkSampler(h, cross_episodes=True, seed=0)
    storage = ActionChunkStorage(max_size=size, gamma=GAMMA, **sampler.layout, **kwargs)
    return TensorDictReplayBuffer(storage=storage, sampler=sampler)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    size=st.integers(3, 12),
    h=st.integers(1, 5),
    end_key=st.sampled_from([None, "is_end"]),
)
def test_a_ring_of_transitions(lengths, size, h, end_key):
    """What was written last is followed by what was written first: a border without a flag."""
    buffer, memory = make_ring(size, h, end_key=end_key), []
    for written, step in enumerate(make_steps(lengths)):
        buffer.add(TensorDict(step))
        memory[written % size : written % size + 1] = [step]
        if len(memory) < h:
            continue
        seen = [dict(step) for step in memory]
        if end_key is None:
            for one, other in itertools.pairwise(seen):
                one["is_end"] = (one["episode"] != other["episode"]).unsqueeze(0)
            seen[written % size]["is_end"] = torch.tensor([True])
        seen[-1]["is_end"] = torch.tensor([True])
        for chunk in buffer.sample(20):
            assert_equal(chunk, slow_window(seen, int(chunk["index"][0]), h))


def test_a_ring_of_states_has_a_border_where_it_is_written():
    buffer = make_ring(6, 2, end_key="is_end")
    rows = as_rows(make_steps([9]), "states")
    for row in rows[:9]:
        buffer.add(row)
    batch = buffer.sample(200)
    assert set(map(tuple, batch["index"].tolist())) == {(0, 1, 2), (1, 3, 4), (3, 4, 5)}


def test_a_restored_sampler_goes_on():
    sampler = ActionChunkSampler(3, cross_episodes=True, seed=1)
    storage = ActionChunkStorage(as_rows(make_steps([5, 4]), "transitions"), **sampler.layout)
    sampler.sample(storage, 8)
    other = ActionChunkSampler(3, cross_episodes=True)
    other.load_state_dict(sampler.state_dict())
    assert other.sample(storage, 8)[0].equal(sampler.sample(storage, 8)[0])
    assert repr(other) == "ActionChunkSampler(chunk_size=3, cross_episodes=True)"


def test_both_sides_must_agree():
    rows = as_rows(make_steps([5]), "states")
    with pytest.raises(ValueError, match="cross_episodes=True, the storage cross_episodes=False"):
        ActionChunkSampler(2, cross_episodes=True).sample(ActionChunkStorage(rows), 1)
    goals = {"value_goal": GoalDistribution(0.2, 0.5, 0.3)}
    with pytest.raises(ValueError, match="Windows across episodes have no goals"):
        ActionChunkSampler(2, cross_episodes=True, goals=goals)
    with pytest.raises(ValueError, match="Windows across episodes have no goals"):
        ActionChunkStorage(rows, cross_episodes=True, goal_keys=["value_goal"])


@pytest.mark.parametrize("kind", ["states", "transitions"])
@pytest.mark.parametrize(("h", "n_steps"), [(1, 4), (4, 2), (3, 3)])
def test_the_next_state_may_be_another_than_the_chunks(kind, h, n_steps):
    steps = make_steps([5, 1, 4])
    sampler = ActionChunkSampler(h, n_steps=n_steps, cross_episodes=True, seed=0)
    storage = ActionChunkStorage(as_rows(steps, kind), gamma=GAMMA, **sampler.layout)
    starts = len(steps) - max(h, n_steps) + 1
    assert sampler.num_starts(storage) == starts
    lines = sampler.sample(storage, 40 * starts)[0].unique(dim=0)
    for t, chunk in enumerate(storage[lines]):
        ours, of_chunk = slow_window(steps, t, n_steps), slow_window(steps, t, h)
        expected = {**ours, "action": of_chunk["action"], "valid": of_chunk["valid"]}
        assert_equal(chunk, expected)


def test_a_dataset(write_npz, tmp_path):
    name = "pointmaze-medium-navigate-singletask-task3-v0"
    buffer = OGBenchExperienceReplay(
        name,
        64,
        chunk_size=30,
        cross_episodes=True,
        sparse_rewards=True,
        root=tmp_path / "root",
        source=write_npz("pointmaze-medium-navigate-v0"),
    )
    batch = buffer.sample()
    rewards = buffer[:]["next", "reward"][batch["index"][:, :-1]]
    assert batch["next", "reward"].equal(-(rewards != 0).float().sum(1))
    assert batch["action"].shape[1] == 30 and (batch["steps_to_next_obs"] == 30).all()
    assert not batch["valid"].all()
    last = batch["index"][:, -1]
    assert batch["next", "whole"].flatten().equal(batch["valid"][:, -1].flatten())
    assert batch["next", "observation"].equal(buffer[:]["observation"][last])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_windows_on_cuda_can_be_captured():
    rows = as_rows(make_steps([5, 1, 7]), "states")
    sampler = ActionChunkSampler(4, cross_episodes=True, seed=0)
    storage = ActionChunkStorage(rows.cuda(), gamma=GAMMA, device="cuda", **sampler.layout)
    generator = torch.Generator("cuda")
    storage[sampler.draw(storage, 64, generator)]
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        index = sampler.draw(storage, 64, generator)
        batch = storage[index]
    graph.replay()
    on_host = ActionChunkStorage(rows, gamma=GAMMA, **sampler.layout)[index.cpu()]
    torch.testing.assert_close(batch.cpu().to_dict(), on_host.to_dict())


if __name__ == "__main__":
    pytest.main([__file__])
