from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict, tensorclass
from torch.utils._pytree import tree_leaves, tree_map
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    SamplerWithoutReplacement,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers.samplers import prioritized
from torchrl.envs.transforms import ObservationNorm

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    MixedReplayBuffer,
    OGBenchExperienceReplay,
    StackedReplayBuffer,
    buffer_state,
    load_buffer_state,
)
from torchrl_mac.trainers.checkpoint import HeldState, SealedCheckpoint, on_host

NAME = "pointmaze-medium-navigate-v0"


@tensorclass
class Row:
    value: torch.Tensor


def make_rows(start, stop):
    number = torch.arange(start, stop)
    return TensorDict(
        observation=number.unsqueeze(-1).float(),
        action=torch.stack([number, -number], 1).float(),
        episode=number // 9,
        next=TensorDict(reward=number.unsqueeze(-1) / 10, batch_size=[stop - start]),
        batch_size=[stop - start],
    )


def through_a_file(state, folder):
    """The state as a trainer's checkpoint returns it."""
    state = on_host(state)
    json.dumps([leaf for leaf in tree_leaves(state) if not isinstance(leaf, torch.Tensor)])
    path = SealedCheckpoint(buffer=HeldState(state)).save(folder / "checkpoint")
    return SealedCheckpoint.load_states(path)["buffer"]


def types(state):
    """All types in a state, those of its containers too."""
    inner = ()
    if isinstance(state, dict):
        assert all(type(key) is str for key in state)
        inner = state.values()
    elif isinstance(state, list):
        inner = state
    return {type(state)}.union(*map(types, inner))


def make_ring(**kwargs):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(16), batch_size=8, **kwargs)


def make_chunk_ring(seed=None, **kwargs):
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(max_size=16, **kwargs),
        sampler=ActionChunkSampler(3, n_steps=kwargs.get("n_steps"), seed=seed),
        batch_size=8,
    )


KINDS = {
    "ring": make_ring,
    "chunks": make_chunk_ring,
    "n-step chunks": lambda: make_chunk_ring(n_steps=2),
    "memmap": lambda: TensorDictReplayBuffer(storage=LazyMemmapStorage(16), batch_size=8),
    "list": lambda: TensorDictReplayBuffer(storage=ListStorage(16), batch_size=8),
    "without replacement": lambda: make_ring(sampler=SamplerWithoutReplacement()),
    "generator": lambda: make_ring(generator=torch.Generator().manual_seed(3)),
    "transform": lambda: make_ring(
        transform=ObservationNorm(1.0, 2.0, in_keys=["observation"], standard_normal=True)
    ),
}


@pytest.mark.parametrize("filled", [5, 16, 41])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_buffer_goes_on_as_the_saved_one(kind, filled, tmp_path):
    torch.manual_seed(0)
    make = KINDS[kind]
    buffer, restored = make(), make()
    for number in range(filled):
        buffer.extend(make_rows(number, number + 1))
    buffer.sample()
    saved = on_host(buffer_state(buffer))
    assert types(saved) <= {dict, list, torch.Tensor, int, float, bool, str, type(None)}
    largest = (
        max(
            leaf.shape[0]
            for leaf in tree_leaves(saved["_storage"]["data"])
            if isinstance(leaf, torch.Tensor) and leaf.ndim
        )
        if kind != "list"
        else 0
    )
    assert largest <= min(filled, 16)
    load_buffer_state(restored, through_a_file(saved, tmp_path))

    def go_on(buffer):
        batches = []
        for number in range(filled, filled + 40, 2):
            torch.manual_seed(number)  # as a trainer that restores the default generator
            batches.append(buffer.sample())
            buffer.extend(make_rows(number, number + 1))
            buffer.add(make_rows(number + 1, number + 2)[0])
        return batches

    assert len(restored) == len(buffer)
    for expected, batch in zip(go_on(buffer), go_on(restored), strict=True):
        assert set(batch.keys(True, True)) == set(expected.keys(True, True))
        assert all(batch[key].equal(value) for key, value in expected.items(True, True))
    assert restored.writer._cursor == buffer.writer._cursor
    assert restored.write_count == buffer.write_count
    if kind != "list":
        assert (restored[:] == buffer[:]).all()


def test_the_cut_of_a_full_ring_is_restored():
    """One endless episode: only the cursor says where the newest row is."""
    buffer = make_chunk_ring()
    for number in range(20):
        row = make_rows(number, number + 1)
        row["episode"].zero_()
        buffer.extend(row)
    assert buffer.storage.episode_ends.tolist() == [3, 15]
    restored = make_chunk_ring()
    load_buffer_state(restored, buffer_state(buffer))
    assert restored.storage.episode_ends.tolist() == [3, 15]


def test_prefetched_batches_are_not_lost(tmp_path):
    def make(seed):
        return make_ring(prefetch=2, generator=torch.Generator().manual_seed(seed))

    buffer, restored = make(0), make(1)
    buffer.extend(make_rows(0, 5))
    buffer.sample()
    state = through_a_file(buffer_state(buffer), tmp_path)
    assert types(state) <= {dict, list, torch.Tensor, int, float, bool, str, type(None)}
    assert len(state["_prefetch_state"]["queue"]) == 2
    buffer.extend(make_rows(20, 30))  # which those two batches do not know
    expected = [buffer.sample() for _ in range(2)]
    load_buffer_state(restored, state)
    for batch in expected:
        assert (restored.sample() == batch).all()


def test_an_empty_buffer_stays_empty(tmp_path):
    state = through_a_file(buffer_state(make_ring()), tmp_path)
    restored = make_ring()
    load_buffer_state(restored, state)
    assert len(restored) == 0
    restored.extend(make_rows(0, 3))
    assert restored.sample()["observation"].shape == (8, 1)
    load_buffer_state(restored, state)
    assert len(restored) == 0


def test_rows_that_are_there_are_replaced():
    buffer, other = make_ring(), make_ring()
    buffer.extend(make_rows(0, 5))
    other.extend(make_rows(50, 62))
    load_buffer_state(other, on_host(buffer_state(buffer)))
    assert len(other) == 5 and (other[:].exclude("index") == make_rows(0, 5)).all()


def test_the_state_is_a_copy_once_loaded():
    buffer, restored = make_ring(), make_ring()
    buffer.extend(make_rows(0, 5))
    load_buffer_state(restored, buffer_state(buffer))
    buffer.extend(make_rows(20, 36))
    assert (restored[:].exclude("index") == make_rows(0, 5)).all()


def test_plain_tensors():
    buffer, restored = (ReplayBuffer(storage=LazyTensorStorage(6), batch_size=4) for _ in range(2))
    buffer.extend(torch.arange(9.0))
    load_buffer_state(restored, on_host(buffer_state(buffer)))
    assert restored[:].equal(buffer[:])
    buffer.extend(torch.arange(3.0))
    restored.extend(torch.arange(3.0))
    assert restored[:].equal(buffer[:])


def test_storages_of_two_dimensions():
    def make():
        return TensorDictReplayBuffer(storage=LazyTensorStorage(12, ndim=2), batch_size=4)

    buffer, restored = make(), make()
    buffer.extend(make_rows(0, 8).reshape(2, 4))
    load_buffer_state(restored, on_host(buffer_state(buffer)))
    assert len(restored) == 8
    for each in (buffer, restored):
        each.extend(make_rows(20, 28).reshape(2, 4))
    assert (restored[:] == buffer[:]).all() and restored.writer._cursor == buffer.writer._cursor


def test_a_dataset_is_known_by_its_number_of_rows(write_npz, tmp_path):
    folders = {"root": tmp_path / "root", "source": write_npz(NAME)}

    def make(**kwargs):
        return OGBenchExperienceReplay(NAME, 8, chunk_size=3, **folders, **kwargs)

    buffer = make(prefetch=2)
    buffer.sample()
    state = through_a_file(buffer_state(buffer), tmp_path)
    assert state["_storage"] == {"rows": 68}
    expected = buffer.sample()
    restored = make(prefetch=2)
    load_buffer_state(restored, state)
    assert (restored.sample() == expected).all()
    with pytest.raises(ValueError, match="dataset of 68 rows, this one has 21"):
        load_buffer_state(make(split="val"), state)


def test_any_storage_can_keep_its_rows_out():
    buffer = TensorDictReplayBuffer(storage=TensorStorage(make_rows(0, 9)), batch_size=4)
    buffer.storage.rows_in_state = False
    state = buffer_state(buffer)
    assert state["_storage"] == {"rows": 9}
    load_buffer_state(buffer, state)
    assert (buffer[:] == make_rows(0, 9)).all()
    fixed = ActionChunkStorage(make_rows(0, 5), rows_in_state=False)
    with pytest.raises(ValueError, match="dataset of 9 rows, this one has 5"):
        load_buffer_state(TensorDictReplayBuffer(storage=fixed), state)
    with pytest.raises(ValueError, match="no rows for a LazyTensorStorage with rows_in_state"):
        load_buffer_state(make_ring(), state)


def test_a_buffer_that_is_too_small():
    buffer = make_ring()
    buffer.extend(make_rows(0, 9))
    small = TensorDictReplayBuffer(storage=LazyTensorStorage(8))
    with pytest.raises(ValueError, match="9 rows, which a LazyTensorStorage of max_size=8"):
        load_buffer_state(small, buffer_state(buffer))
    assert len(small) == 0


def test_what_no_checkpoint_holds_is_named():
    buffer = ReplayBuffer(storage=ListStorage(4))
    buffer.extend([{1, 2}])
    with pytest.raises(TypeError, match=r"ReplayBuffer\['_storage'\]\['data'\]\[0\] .* type set"):
        buffer_state(buffer)
    buffer = ReplayBuffer(storage=LazyTensorStorage(4))
    buffer.extend(Row(value=torch.zeros(2), batch_size=[2]))
    with pytest.raises(TypeError, match="LazyTensorStorage are of type Row"):
        buffer_state(buffer)


def make_group(kind):
    rings = {"real": make_chunk_ring(seed=1), "model": make_ring()}
    if kind == "mixed":
        return MixedReplayBuffer(rings, [0.25, 0.75], batch_size=8), list(rings.values())
    if kind == "stacked":
        rings = [make_chunk_ring(seed=1), make_chunk_ring(seed=2)]
        return StackedReplayBuffer(rings, batch_size=8), rings
    rings = [make_ring(), make_ring()]
    return ReplayBufferEnsemble(*rings, batch_size=8, sample_from_all=True), rings


@pytest.mark.parametrize("kind", ["mixed", "stacked", "ensemble"])
def test_groups_of_buffers(kind, tmp_path):
    (group, rings), (restored, other) = make_group(kind), make_group(kind)
    source = make_chunk_ring(seed=0)
    source.extend(make_rows(0, 16))
    for i, ring in enumerate(rings):
        chunks = source.sample().exclude("index")
        is_rows = isinstance(ring.storage, ActionChunkStorage)
        ring.extend(make_rows(20 * i, 20 * i + 11) if is_rows else chunks)
    if kind == "mixed":
        group.shares = [0.5, 0.5]
    group.sample()
    load_buffer_state(restored, through_a_file(buffer_state(group), tmp_path))
    assert [len(ring) for ring in other] == [len(ring) for ring in rings]
    for seed in range(3):
        torch.manual_seed(seed)
        expected = group.sample()
        torch.manual_seed(seed)
        assert (restored.sample() == expected).all()


def test_groups_have_names():
    group, _ = make_group("mixed")
    renamed = MixedReplayBuffer({"a": make_ring(), "b": make_ring()}, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"buffers \['real', 'model'\], these are \['a', 'b'\]"):
        load_buffer_state(renamed, buffer_state(group))


class SumTree:
    """What TorchRL's compiled trees do, slowly."""

    reduce = staticmethod(lambda values: values.sum())
    nothing = 0.0

    def __init__(self, capacity):
        self.values = torch.full((capacity,), self.nothing)

    def __getitem__(self, index):
        return self.values[index]

    def __setitem__(self, index, value):
        self.values[index] = torch.as_tensor(value, dtype=torch.float32)

    def query(self, start, stop):
        return self.reduce(self.values[start:stop]).item()

    def scan_lower_bound(self, mass):
        return torch.searchsorted(self.values.cumsum(0), torch.as_tensor(mass).float())


class MinTree(SumTree):
    reduce = staticmethod(lambda values: values.min())
    nothing = float("inf")


@pytest.fixture
def trees(monkeypatch):
    """The trees need TorchRL's extension, which a given PyTorch may not be able to load."""
    for name in ("SumSegmentTreeFp32", "SumSegmentTreeFp64"):
        monkeypatch.setattr(prioritized, name, SumTree)
    for name in ("MinSegmentTreeFp32", "MinSegmentTreeFp64"):
        monkeypatch.setattr(prioritized, name, MinTree)


def test_priorities(trees, tmp_path):
    def make(seed, size=16):
        return TensorDictPrioritizedReplayBuffer(
            alpha=0.7,
            beta=0.5,
            storage=LazyTensorStorage(size),
            batch_size=8,
            generator=torch.Generator().manual_seed(seed),
        )

    buffer, restored = make(0), make(1)
    buffer.extend(make_rows(0, 11))
    batch = buffer.sample()
    batch["td_error"] = torch.rand(8)
    buffer.update_tensordict_priority(batch)
    state = through_a_file(buffer_state(buffer), tmp_path)
    with pytest.raises(ValueError, match="priorities for 16 rows, not for 12"):
        load_buffer_state(make(1, size=12), state)
    load_buffer_state(restored, state)

    def go_on(buffer):
        batches = []
        for seed in range(10):
            torch.manual_seed(seed)
            batches.append(buffer.sample())
            batches[-1]["td_error"] = torch.rand(8)
            buffer.update_tensordict_priority(batches[-1])
            buffer.extend(make_rows(seed, seed + 1))
        return batches

    for expected, batch in zip(go_on(buffer), go_on(restored), strict=True):
        assert (batch == expected).all() and "priority_weight" in batch


def test_the_state_is_mapped_over():
    buffer = make_ring()
    buffer.extend(make_rows(0, 5))
    doubled = tree_map(
        lambda leaf: 2 * leaf if isinstance(leaf, torch.Tensor) else leaf, buffer_state(buffer)
    )
    load_buffer_state(buffer, doubled)
    assert buffer[:]["observation"].equal(2 * make_rows(0, 5)["observation"])


if __name__ == "__main__":
    pytest.main([__file__])
