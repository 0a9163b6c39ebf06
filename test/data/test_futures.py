"""Samples with all states on the way, and with the returns that follow."""

from __future__ import annotations

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

ANY = GoalDistribution(current=0.2, trajectory=0.5, random=0.3)


def make_rows(lengths, seed=0, keys=("observation",)):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    return TensorDict(
        {key: torch.randn(rows, 3, generator=generator) for key in keys},
        [rows],
    ).update(
        TensorDict(
            action=torch.rand(rows, 2, generator=generator),
            episode=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            next=TensorDict(
                reward=torch.randn(rows, 1, generator=generator),
                terminated=torch.rand(rows, 1, generator=generator) < 0.2,
                batch_size=[rows],
            ),
            batch_size=[rows],
        )
    )


def last_row(rows, t):
    episode = rows["episode"].tolist()
    while t + 1 < len(episode) and episode[t + 1] == episode[t]:
        t += 1
    return t


def slow_return(rows, t, gamma, ignore_terminated):
    """What is earned from row t on, by walking to the end."""
    total, i = 0.0, 0
    for row in range(t, last_row(rows, t)):
        total += gamma**i * rows["next", "reward"][row].item()
        i += 1
        if rows["next", "terminated"][row] and not ignore_terminated:
            break
    return total


def transitions(rows):
    """The same as rows that hold their next observation."""
    episode = rows["episode"]
    whole = rows[:-1][episode[1:] == episode[:-1]].clone()
    following = torch.arange(1, len(rows))[episode[1:] == episode[:-1]]
    whole["next", "observation"] = rows["observation"][following]
    return whole


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    h=st.integers(1, 5),
    gamma=st.sampled_from([0.5, 0.99, 1.0]),
    ignore_terminated=st.booleans(),
    holds_next=st.booleans(),
    seed=st.integers(0, 99),
)
def test_futures_and_returns_equal_a_walk(lengths, h, gamma, ignore_terminated, holds_next, seed):
    rows = make_rows(lengths, seed)
    if max(lengths) <= h:
        return
    stored = transitions(rows) if holds_next else rows
    storage = ActionChunkStorage(
        stored, ignore_terminated=ignore_terminated, future=True, return_gamma=gamma
    )
    sampler = ActionChunkSampler(h, seed=0)
    index = sampler.sample(storage, 200)[0].unique(dim=0)
    plain = ActionChunkStorage(stored, ignore_terminated=ignore_terminated)[index]
    chunks = storage[index]
    skipped = torch.arange(len(lengths)) if holds_next else torch.zeros(len(lengths), dtype=int)
    for line, chunk in zip(index.tolist(), chunks, strict=True):
        t = line[0] + int(skipped[stored["episode"][line[0]]])  # the last state is no row there
        assert torch.equal(chunk["future", "observation"], rows["observation"][t + 1 : t + h + 1])
        assert torch.equal(chunk["future", "observation"][-1], chunk["next", "observation"])
        expected = torch.tensor([slow_return(rows, t, gamma, ignore_terminated)])
        torch.testing.assert_close(chunk["return_to_go"], expected, atol=1e-5, rtol=1e-5)
    assert (chunks.exclude("future", "return_to_go") == plain).all()


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_returns_of_goals(gamma):
    rows = make_rows([9, 7])
    sampler = ActionChunkSampler(3, goals={"value_goal": ANY}, seed=0)
    storage = ActionChunkStorage(rows, negative_reward=False, return_gamma=gamma, **sampler.layout)
    index, _ = sampler.sample(storage, 500)
    chunks = storage[index]
    seen = set()
    for line, label, reward in zip(
        index.tolist(), chunks["return_to_go"], chunks["next", "reward"], strict=True
    ):
        t, goal = line[0], line[-1]
        later = t <= goal and bool(rows["episode"][t] == rows["episode"][goal])
        assert label.item() == pytest.approx(gamma ** (goal - t) if later else 0.0)
        if reward:  # reached in the chunk
            assert label > 0
        seen.add((later, bool(reward), goal == last_row(rows, t) - 1))
    # later and elsewhere, soon and late, and the last row that can be a goal, in time and not
    assert {(True, True, True), (True, False, True), (True, False, False)} <= seen
    assert {(True, True, False), (False, False, False)} <= seen


def test_returns_follow_what_is_written():
    rows = make_rows([6, 6])
    rows["next", "terminated"].zero_()
    storage = ActionChunkStorage(max_size=100, return_gamma=1.0)
    buffer = TensorDictReplayBuffer(storage=storage)
    first = torch.tensor([[0, 1]])
    buffer.extend(rows[:4])
    assert storage[first]["return_to_go"].item() == pytest.approx(
        rows["next", "reward"][:3].sum().item()
    )
    buffer.extend(rows[4:])
    assert storage[first]["return_to_go"].item() == pytest.approx(
        rows["next", "reward"][:5].sum().item(), abs=1e-6
    )


def test_sparse_rewards_and_several_observations():
    rows = make_rows([8], keys=("observation", ("camera", "pixels")))
    rows["next", "terminated"].zero_()
    storage = ActionChunkStorage(
        rows,
        observation_keys=["observation", ("camera", "pixels")],
        sparse_rewards=True,
        future=True,
        return_gamma=1.0,
    )
    chunk = storage[torch.tensor([[2, 3, 4]])]
    assert chunk["return_to_go"].item() == -5
    assert torch.equal(chunk["future", "camera", "pixels"][0], rows["camera", "pixels"][3:5])


@pytest.mark.parametrize("option", [{"future": True}, {"return_gamma": 1.0}])
@pytest.mark.parametrize("windows", [{"n_steps": 3}, {"cross_episodes": True}])
def test_whole_chunks_only(option, windows):
    with pytest.raises(ValueError, match="future and return_gamma are for whole chunks"):
        ActionChunkStorage(make_rows([9]), **option, **windows)


def test_returns_of_goals_are_of_rewards_0_and_1():
    with pytest.raises(ValueError, match="negative_reward=False"):
        ActionChunkStorage(make_rows([9]), goal_keys=["value_goal"], return_gamma=1.0)


def test_a_dataset_normalises_futures(write_npz, tmp_path):
    folder = write_npz("cube-single-play-v0")
    raw, normed = (
        OGBenchExperienceReplay(
            "cube-single-play-v0",
            16,
            root=tmp_path,
            source=folder,
            chunk_size=4,
            future=True,
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(2)
    )
    norm = normed.observation_norm()
    normed.append_transform(norm)
    before, after = raw.sample(), normed.sample()
    assert before["future", "observation"].shape == (16, 4, 28)
    for key in ("observation", ("next", "observation"), ("future", "observation")):
        torch.testing.assert_close(after[key], (before[key] - norm.loc) / norm.scale)


if __name__ == "__main__":
    pytest.main([__file__])
