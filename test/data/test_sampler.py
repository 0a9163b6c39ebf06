from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
from torchrl_mac.data.segments import Segments


def make_storage(lengths, names=None):
    names = range(len(lengths)) if names is None else names
    episode = torch.repeat_interleave(torch.tensor(list(names)), torch.tensor(lengths))
    rows = sum(lengths)
    return ActionChunkStorage(
        TensorDict(
            observation=torch.arange(float(rows)).unsqueeze(-1),
            action=torch.zeros(rows, 1),
            episode=episode,
            batch_size=[rows],
        )
    )


def valid_starts(lengths, h):
    first, starts = 0, []
    for length in lengths:
        starts += range(first, first + length - h)
        first += length
    return starts


def make_buffer(seed, **kwargs):
    return TensorDictReplayBuffer(
        storage=make_storage([30, 7, 50]),
        sampler=ActionChunkSampler(5),
        batch_size=16,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), h=st.integers(1, 5), data=st.data()
)
def test_windows_are_consecutive_and_inside_an_episode(lengths, h, data):
    # neighbouring episodes differ, names may come back
    names = [
        data.draw(st.integers(0, 2).map(lambda n, k=k: 3 * (k % 2) + n))
        for k in range(len(lengths))
    ]
    storage, sampler = make_storage(lengths, names), ActionChunkSampler(h)
    starts = valid_starts(lengths, h)
    assert sampler.num_starts(storage) == len(starts)
    if not starts:
        with pytest.raises(ValueError, match="No episode is longer"):
            sampler.sample(storage, 4)
        return
    index, info = sampler.sample(storage, 300)
    assert info == {} and index.shape == (300, h + 1) and index.dtype == torch.int64
    assert (index.diff() == 1).all()
    episode = storage[:]["episode"][index]
    assert (episode == episode[:, :1]).all()
    assert set(index[:, 0].tolist()) <= set(starts)


def test_every_start_is_drawn_equally_often():
    lengths, h, draws = [5, 30, 3, 4, 18], 3, 60_000
    starts = valid_starts(lengths, h)
    sampler = ActionChunkSampler(h)
    sampler._rng = torch.Generator().manual_seed(0)
    index, _ = sampler.sample(make_storage(lengths), draws)
    count = torch.bincount(index[:, 0], minlength=sum(lengths))
    assert count.nonzero().squeeze(-1).tolist() == starts
    expected = draws / len(starts)
    chi_square = ((count[starts] - expected) ** 2 / expected).sum().item()
    freedom = len(starts) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_an_episode_of_1001_rows_has_991_chunks_of_ten():
    assert ActionChunkSampler(10).num_starts(make_storage([1001, 1001])) == 2 * 991


def test_generator_decides_the_samples():
    first, same, other = make_buffer(0), make_buffer(0), make_buffer(1)
    samples = [first.sample()["index"] for _ in range(3)]
    assert all(index.equal(same.sample()["index"]) for index in samples)
    assert not samples[0].equal(other.sample()["index"])
    assert not samples[0].equal(samples[1])


def test_the_default_generator_is_used_without_one():
    storage = make_storage([30])
    torch.manual_seed(3)
    first = ActionChunkSampler(2).sample(storage, 8)[0]
    torch.manual_seed(3)
    assert first.equal(ActionChunkSampler(2).sample(storage, 8)[0])
    assert not first.equal(ActionChunkSampler(2).sample(storage, 8)[0])


def test_prefetching_draws_the_same_samples():
    plain, ahead = make_buffer(0), make_buffer(0, prefetch=1)
    for _ in range(5):
        assert plain.sample()["index"].equal(ahead.sample()["index"])


def test_a_restored_buffer_goes_on_with_the_same_samples(tmp_path):
    buffer = make_buffer(0)
    buffer.sample()
    state = copy.deepcopy(buffer.state_dict())
    buffer.dumps(tmp_path / "buffer")
    expected = [buffer.sample()["index"] for _ in range(2)]

    restored = make_buffer(7)
    restored.load_state_dict(state)
    assert all(index.equal(restored.sample()["index"]) for index in expected)
    loaded = make_buffer(7)
    loaded.loads(tmp_path / "buffer")
    assert all(index.equal(loaded.sample()["index"]) for index in expected)


def test_episodes_are_looked_up_again_after_a_change():
    storage, sampler = make_storage([6, 6]), ActionChunkSampler(4)
    assert sampler.num_starts(storage) == 4
    assert sampler.num_starts(make_storage([12])) == 8
    assert sampler.num_starts(storage) == 4
    storage._storage["episode"].zero_()
    storage._bump_mutation_revision()
    assert sampler.num_starts(storage) == 8


def test_can_sample():
    buffer = TensorDictReplayBuffer(
        storage=make_storage([3, 3]), sampler=ActionChunkSampler(3), batch_size=2
    )
    assert not buffer.can_sample()
    buffer.set_sampler(ActionChunkSampler(2))
    assert buffer.can_sample()


def test_pickle():
    storage, sampler = make_storage([6]), ActionChunkSampler(4)
    sampler.sample(storage, 2)
    copied = pickle.loads(pickle.dumps(sampler))
    assert copied.chunk_size == 4 and copied.num_starts(storage) == 2


def test_state_and_repr():
    sampler = ActionChunkSampler(4)
    sampler.load_state_dict(sampler.state_dict())
    sampler._empty()
    assert repr(sampler) == "ActionChunkSampler(chunk_size=4)"


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ActionChunkSampler(0)


def test_other_storages_are_refused():
    storage = TensorStorage(TensorDict(episode=torch.zeros(4), batch_size=[4]))
    with pytest.raises(TypeError, match="needs an ActionChunkStorage, got TensorStorage"):
        ActionChunkSampler(2).sample(storage, 1)


def test_rows_without_episodes_are_refused():
    storage = ActionChunkStorage(TensorDict(action=torch.zeros(4, 1), batch_size=[4]))
    with pytest.raises(KeyError, match="no entry 'episode'"):
        ActionChunkSampler(2).sample(storage, 1)


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=9), equal=st.booleans())
def test_segments(lengths, equal):
    lengths = [max(1, lengths[0])] * len(lengths) if equal else lengths
    expected = [k for k, length in enumerate(lengths) for _ in range(length)]
    segments = Segments(torch.tensor(lengths).cumsum(0))
    assert segments.find(torch.arange(len(expected))).tolist() == expected


@pytest.mark.parametrize(
    "content", ["", "[]", '{"seed": 1}', '{"seed": "a", "step": 1}', '{"seed": 1, "step": -1}']
)
def test_a_damaged_state_is_named(tmp_path, content):
    sampler = ActionChunkSampler(2, seed=5)
    sampler.dumps(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=str(file)):
        sampler.loads(tmp_path)
    assert sampler.state_dict() == {"seed": 5, "step": 0}


if __name__ == "__main__":
    pytest.main([__file__])
