from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBufferEnsemble, TensorDictReplayBuffer

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    GoalDistribution,
    MixedReplayBuffer,
    OGBenchExperienceReplay,
    StackedReplayBuffer,
)

NAME = "pointmaze-medium-navigate-v0"


def make_buffer(value, rows=20, **entries):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(50))
    if rows:
        data = TensorDict(
            observation=torch.full((rows, 2), float(value)),
            next=TensorDict(reward=torch.full((rows, 1), -float(value)), batch_size=[rows]),
            batch_size=[rows],
        )
        buffer.extend(data.update({key: column[:rows] for key, column in entries.items()}))
    return buffer


def make_chunks(h=3, goals=None, **kwargs):
    sampler = ActionChunkSampler(h, goals=goals, seed=0, **kwargs)
    rows = TensorDict(
        observation=torch.arange(20.0).unsqueeze(-1),
        action=torch.arange(20.0).unsqueeze(-1),
        episode=torch.arange(20) // 10,
        next=TensorDict(reward=torch.ones(20, 1), batch_size=[20]),
        batch_size=[20],
    )
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(rows, **sampler.layout), sampler=sampler, batch_size=8
    )


@settings(max_examples=300)
@example(weights=[3, 19], size=55)
@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    size=st.integers(0, 500),
)
def test_shares_are_exact(weights, size):
    total = sum(weights)
    buffer = MixedReplayBuffer([make_buffer(0)] * len(weights), [w / total for w in weights])
    sizes = list(buffer.sizes(size).values())
    exact = [Fraction(w, total) * size for w in weights]
    # the largest remainders, one at a time
    expected = [math.floor(part) for part in exact]
    while sum(expected) < size:
        lost = [part - has for part, has in zip(exact, expected)]
        expected[lost.index(max(lost))] += 1
    assert sizes == expected and sum(sizes) == size


def test_in_proportion_every_row_counts_the_same():
    mixed = MixedReplayBuffer([make_buffer(1, 40), make_buffer(2, 10)], "proportional")
    torch.manual_seed(0)
    counts = torch.tensor([list(mixed.sizes(64).values()) for _ in range(2000)]).double()
    assert (counts.sum(1) == 64).all()
    share = counts[:, 1] / 64
    assert abs(share.mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 64 / 2000)
    assert share.std() == pytest.approx(math.sqrt(0.2 * 0.8 / 64), rel=0.1)  # drawn, not rounded
    small = MixedReplayBuffer([make_buffer(1, 50), make_buffer(2, 1)], "proportional")
    assert sum(small.sizes(8)["1"] for _ in range(2000)) > 0
    batch = mixed.sample(200)["observation"][:, 0]
    assert set(batch.tolist()) == {1.0, 2.0}


def test_in_proportion_to_the_windows_there_are():
    chunks, empty = make_chunks(10 - 1), make_buffer(1, 0)
    assert chunks.sampler.num_starts(chunks.storage) == 2  # of 20 rows
    mixed = MixedReplayBuffer({"chunks": chunks, "rows": make_buffer(1, 2)}, "proportional")
    torch.manual_seed(0)
    drawn = sum(mixed.sizes(100)["chunks"] for _ in range(100))
    assert abs(drawn - 5000) < 5 * 50
    assert MixedReplayBuffer([chunks, empty], "proportional").sizes(7) == {"0": 7, "1": 0}
    with pytest.raises(ValueError, match="are empty"):
        MixedReplayBuffer([empty], "proportional").sample(3)
    with pytest.raises(ValueError, match="not 'equal'"):
        MixedReplayBuffer([empty], "equal")


def test_drawn_shares_go_on_from_a_checkpoint():
    def make():
        return MixedReplayBuffer([make_buffer(1, 40), make_buffer(2, 10)], "proportional")

    one = make()
    state, rng = one.state_dict(), torch.get_rng_state()
    expected = [one.sizes(64) for _ in range(5)]
    other = MixedReplayBuffer([make_buffer(1, 40), make_buffer(2, 10)], [0.5, 0.5])
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    assert [other.sizes(64) for _ in range(5)] == expected


def test_parts_follow_each_other():
    buffers = {"real": make_buffer(1), "model": make_buffer(2), "none": make_buffer(3)}
    mixed = MixedReplayBuffer(buffers, {"model": 0.7, "real": 0.3, "none": 0.0}, batch_size=10)
    batch = mixed.sample()
    assert batch["observation"].tolist() == [[1, 1]] * 3 + [[2, 2]] * 7
    assert batch["next", "reward"].flatten().tolist() == [-1] * 3 + [-2] * 7
    assert batch.batch_size == (10,) and len(mixed) == 60
    assert set(batch.keys(True, True)) == {"observation", ("next", "reward")}
    mixed.shares = [0, 0, 1]
    assert mixed.sample(4)["observation"].tolist() == [[3, 3]] * 4
    assert mixed.shares == {"real": 0, "model": 0, "none": 1}
    assert repr(mixed) == "MixedReplayBuffer(['real', 'model', 'none'], batch_size=10)"


def test_keys_that_one_lacks_are_dropped():
    some = make_buffer(1, extra=torch.zeros(50, 3))
    batch = MixedReplayBuffer([some, make_buffer(2)], [0.5, 0.5]).sample(8)
    assert "extra" not in batch.keys()
    batch = MixedReplayBuffer([some, make_buffer(2)], [1.0, 0.0]).sample(8)
    assert batch["extra"].shape == (8, 3)


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (
            torch.zeros(50, 2, dtype=torch.float64),
            r"torch.float32 \[2\] in 'a', torch.float64 \[2\]",
        ),
        (torch.zeros(50, 3), r"torch.float32 \[2\] in 'a', torch.float32 \[3\] in 'b'"),
    ],
)
def test_entries_that_do_not_fit_are_named(column, found):
    buffers = {"a": make_buffer(1), "b": make_buffer(2, observation=column)}
    with pytest.raises(ValueError, match=f"rows of 'observation' do not fit together: {found}"):
        MixedReplayBuffer(buffers, [0.5, 0.5]).sample(8)


def test_an_empty_buffer_is_named():
    buffers = {"real": make_buffer(1), "model": make_buffer(2, rows=0)}
    mixed = MixedReplayBuffer(buffers, [0.99, 0.01])
    with pytest.raises(ValueError, match=r"'model' is empty but has a share of 0\.01"):
        mixed.sample(4)  # none of which would be the model's
    mixed.shares = [1, 0]
    assert mixed.sample(4).batch_size == (4,)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.6], "sum up to 1, got"),
        ([1.5, -0.5], "not be negative"),
        ([1.0], r"one share for each of the buffers \['0', '1'\]"),
        ({"0": 0.5, "b": 0.5}, "one share for each"),
        ([float("nan"), 1.0], "sum up to 1"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(ValueError, match=message):
        MixedReplayBuffer([make_buffer(1), make_buffer(2)], shares)


def test_bad_sizes():
    with pytest.raises(ValueError, match="at least one buffer"):
        MixedReplayBuffer([], [])
    with pytest.raises(ValueError, match="Give batch_size"):
        MixedReplayBuffer([make_buffer(1)], [1.0]).sample()
    stacked = StackedReplayBuffer([make_buffer(1), make_buffer(2)])
    with pytest.raises(ValueError, match="'0' gave a batch \\[2, 6\\] instead of \\[6\\]"):
        MixedReplayBuffer([stacked], [1.0]).sample(6)


def test_mixtures_can_be_mixed():
    inner = MixedReplayBuffer([make_buffer(1), make_buffer(2)], [0.5, 0.5])
    batch = MixedReplayBuffer({"inner": inner, "last": make_buffer(3)}, [0.5, 0.5]).sample(8)
    assert batch["observation"][:, 0].tolist() == [1, 1, 2, 2, 3, 3, 3, 3]


def test_a_dataset_and_what_was_collected(write_npz, tmp_path):
    dataset = OGBenchExperienceReplay(
        NAME, 16, chunk_size=3, root=tmp_path / "root", source=write_npz(NAME)
    )
    online = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    online.extend(dataset.sample().exclude("index"))
    batch = MixedReplayBuffer([dataset, online], [0.25, 0.75], batch_size=16).sample()
    assert batch["action"].shape == (16, 3, 2) and "index" not in batch.keys()


def test_stacked_buffers():
    stacked = StackedReplayBuffer({"a": make_buffer(1), "b": make_buffer(2)}, batch_size=5)
    batch = stacked.sample()
    assert batch.batch_size == (2, 5) and len(stacked) == 40
    assert batch["observation"][:, :, 0].tolist() == [[1] * 5, [2] * 5]
    assert stacked.sample(3).batch_size == (2, 3)


# TorchRL's own ensemble


def test_a_flat_index_draws_the_same_starts():
    for n_steps in (None, 2):
        plain, flat = make_chunks(n_steps=n_steps), make_chunks(n_steps=n_steps, flat_index=True)
        batch, same = plain.sample(), flat.sample()
        assert same.pop("index").equal(batch.pop("index")[:, 0])
        assert (same == batch).all()


@pytest.mark.parametrize("dataset_first", [True, False])
@pytest.mark.parametrize("sample_from_all", [True, False])
def test_an_ensemble_of_a_dataset_and_transitions(
    write_npz, tmp_path, dataset_first, sample_from_all
):
    torch.manual_seed(0)
    folders = {"root": tmp_path / "root", "source": write_npz(NAME)}
    dataset = OGBenchExperienceReplay(NAME, 8, chunk_size=3, flat_index=True, **folders)
    rows = dataset[:]
    online = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    collected = dataset.sample(32).exclude("index")
    collected["observation"] = torch.full_like(collected["observation"], 100.0)
    online.extend(collected)
    buffers = [dataset, online] if dataset_first else [online, dataset]
    ensemble = ReplayBufferEnsemble(*buffers, sample_from_all=sample_from_all, batch_size=8)
    seen = set()
    for _ in range(10):
        batch = ensemble.sample()
        assert batch.batch_size == (2, 4) and batch["action"].shape == (2, 4, 3, 2)
        for part in batch:
            ids = part["index", "buffer_ids"].unique()
            seen.add(member := ids.item())
            if member != buffers.index(dataset):
                assert (part["observation"] == 100).all()
                continue
            for chunk in part:
                t = int(chunk["index", "index"])
                assert chunk["observation"].equal(rows["observation"][t])
                assert chunk["action"].equal(rows["action"][t : t + 3])
                assert chunk["next", "observation"].equal(rows["observation"][t + 3])
                assert rows["episode"][t] == rows["episode"][t + 3]
    assert seen == {0, 1}


def test_rows_of_a_flat_storage_are_still_rows():
    storage = make_chunks(flat_index=True).storage
    assert storage[3]["action"].shape == (1,)
    assert storage[2:5]["action"].shape == (3, 1)
    assert storage[torch.tensor([2, 3])]["action"].shape == (2, 3, 1)
    assert storage[torch.tensor([[2, 3, 4]])]["action"].shape == (1, 2, 1)


def test_flat_indices_must_agree():
    sampler = ActionChunkSampler(3, flat_index=True)
    with pytest.raises(ValueError, match=r"flat_index=True and chunk_size=3.*flat_chunk_size=None"):
        sampler.sample(make_chunks(3).storage, 4)
    with pytest.raises(ValueError, match="chunk_size=2, the storage flat_chunk_size=3"):
        ActionChunkSampler(2, flat_index=True).sample(make_chunks(flat_index=True).storage, 4)
    goals = {"value_goal": GoalDistribution(0.0, 1.0, 0.0)}
    with pytest.raises(ValueError, match=r"no room for goals.*MixedReplayBuffer"):
        ActionChunkSampler(3, goals=goals, flat_index=True)


if __name__ == "__main__":
    pytest.main([__file__])
