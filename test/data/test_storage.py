from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs.transforms import RewardScaling

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage


def make_rows(lengths, seed=0, p_terminated=0.1):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    episode = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TensorDict(
        observation=torch.randn(rows, 3, generator=generator),
        action=torch.rand(rows, 2, generator=generator),
        episode=episode,
        next=TensorDict(
            reward=torch.randn(rows, 1, generator=generator),
            terminated=torch.rand(rows, 1, generator=generator) < p_terminated,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def slow_chunk(rows, t, h, gamma, ignore_terminated):
    """One transition, by hand, from the rows as NumPy arrays."""
    episode = rows["episode"].tolist()
    reward, terminated = 0.0, False
    for i in range(h):
        if not terminated:  # what comes after the end is not earned
            reward += gamma**i * rows["next", "reward"][t + i].item()
        if rows["next", "terminated"][t + i] and not ignore_terminated:
            terminated = True
    last = t + h == len(episode) - 1 or episode[t + h + 1] != episode[t + h]
    return {
        "observation": rows["observation"][t],
        "action": rows["action"][t : t + h] if h > 1 else rows["action"][t],
        ("next", "observation"): rows["observation"][t + h],
        ("next", "reward"): torch.tensor([reward]),
        ("next", "terminated"): torch.tensor([terminated]),
        ("next", "truncated"): torch.tensor([last and not terminated]),
        ("next", "done"): torch.tensor([last or terminated]),
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    h=st.integers(1, 6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    ignore_terminated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_equal_a_slow_loop(lengths, h, gamma, ignore_terminated, seed):
    rows = make_rows(lengths, seed, p_terminated=0.3)
    storage = ActionChunkStorage(rows, gamma=gamma, ignore_terminated=ignore_terminated)
    first = np.cumsum([0, *lengths[:-1]])
    starts = [t for f, n in zip(first, lengths) for t in range(f, f + n - h)]
    if not starts:
        return
    chunks = storage[torch.tensor(starts)[:, None] + torch.arange(h + 1)]
    assert chunks.batch_size == (len(starts),)
    for chunk, t in zip(chunks, starts):
        expected = slow_chunk(rows, t, h, gamma, ignore_terminated)
        assert set(chunk.keys(True, True)) == set(expected)
        for key, value in expected.items():
            assert chunk[key].dtype == value.dtype
            torch.testing.assert_close(chunk[key], value)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_rewards_after_the_end_do_not_count(shape):
    """Rewards 1, 1, 1 with the end in the second row are 2, whatever the third one is."""
    rows = TensorDict(
        observation=torch.zeros(5, 1),
        action=torch.zeros(5, 1),
        episode=torch.zeros(5, dtype=torch.int64),
        next=TensorDict(
            reward=torch.ones(5, *shape),
            terminated=torch.tensor([[False], [True], [False], [False], [False]]),
            batch_size=[5],
        ),
        batch_size=[5],
    )
    windows = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    for gamma, expected in ((1.0, (2.0, 1.0)), (0.5, (1.5, 1.0))):
        chunk = ActionChunkStorage(rows, gamma=gamma)[windows]
        for reward, value in zip(chunk["next", "reward"], expected, strict=True):
            assert reward.shape == shape and (reward == value).all()
        assert chunk["next", "terminated"].all()
    rows["next", "reward"][2] = float("nan")
    assert not ActionChunkStorage(rows)[windows[:1]]["next", "reward"].isnan().any()
    ignoring = ActionChunkStorage(rows, ignore_terminated=True)[windows[:1]]
    assert ignoring["next", "reward"].isnan().all() and not ignoring["next", "terminated"].any()


def test_reward_is_exact_for_single_steps():
    rows = make_rows([8])
    chunk = ActionChunkStorage(rows, gamma=0.9)[torch.tensor([[3, 4]])]
    assert chunk["next", "reward"].equal(rows["next", "reward"][3:4])


def test_rows_are_those_of_a_tensor_storage():
    rows = make_rows([4, 5])
    storage = ActionChunkStorage(rows)
    assert len(storage) == 9
    for index in (3, slice(2, 5), torch.tensor([1, 8]), np.array([0, 4]), [2, 3]):
        assert (storage[index] == rows[index]).all()


def test_gathering_leaves_the_rows_alone():
    rows = make_rows([6])
    before = rows.clone()
    ActionChunkStorage(rows, gamma=0.5)[torch.tensor([[0, 1, 2, 3]])].zero_()
    assert (rows == before).all()


def test_numpy_windows():
    storage = ActionChunkStorage(make_rows([6]))
    window = np.array([[1, 2, 3]])
    assert (storage[window] == storage[torch.as_tensor(window)]).all()


def test_nested_and_additional_keys():
    rows = make_rows([5, 5])
    nested = TensorDict(
        {
            ("agent", "state"): rows["observation"],
            "goal": rows["action"],
            ("agent", "move"): rows["action"],
            ("collector", "traj_ids"): rows["episode"].unsqueeze(-1),
            ("next", "agent", "gain"): rows["next", "reward"],
        },
        batch_size=rows.batch_size,
    )
    storage = ActionChunkStorage(
        nested,
        gamma=0.5,
        observation_keys=[("agent", "state"), "goal"],
        action_key=("agent", "move"),
        reward_key=("agent", "gain"),
        traj_key=("collector", "traj_ids"),
    )
    window = torch.tensor([[1, 2, 3, 4]])
    chunk, plain = storage[window], ActionChunkStorage(rows, gamma=0.5)[window]
    assert chunk["agent", "state"].equal(plain["observation"])
    assert chunk["next", "agent", "state"].equal(plain["next", "observation"])
    assert chunk["next", "goal"].equal(rows["action"][4:5])
    assert chunk["agent", "move"].equal(plain["action"])
    assert chunk["next", "agent", "gain"].equal(plain["next", "reward"])
    assert chunk["next", "truncated"].all() and not chunk["next", "terminated"].any()


def test_rows_without_reward_give_chunks_without_it():
    rows = make_rows([5]).exclude(("next", "reward"))
    chunk = ActionChunkStorage(rows)[torch.tensor([[0, 1]])]
    assert ("next", "reward") not in chunk.keys(True)


def test_missing_key_is_named():
    storage = ActionChunkStorage(make_rows([5]), action_key="move")
    with pytest.raises(KeyError, match=r"no entry 'move'.*action"):
        storage[torch.tensor([[0, 1]])]


def test_a_window_needs_two_rows():
    with pytest.raises(ValueError, match="holds no action"):
        ActionChunkStorage(make_rows([5]))[torch.tensor([[0]])]


def test_episode_ends_follow_writes():
    storage = ActionChunkStorage(make_rows([4, 4]))
    assert storage.episode_ends.tolist() == [3, 7]
    row = storage[3].clone()
    row["episode"] = torch.tensor(5)
    storage.set(3, row)
    # row 3 is also where a ring buffer has been written last
    assert storage.episode_ends.tolist() == [2, 3, 7]


def test_a_ring_is_cut_at_its_cursor():
    storage = ActionChunkStorage(make_rows([8]))
    storage.set(range(0, 3), storage[0:3].clone())
    assert storage.episode_ends.tolist() == [2, 7]


def test_mean_reward_of_the_authors():
    """RewardScaling turns the chunk's sum into the mean that MAC's authors use."""
    h, gamma = 4, 0.9
    rows = make_rows([12], p_terminated=0)
    buffer = TensorDictReplayBuffer(
        storage=ActionChunkStorage(rows, gamma=gamma),
        sampler=ActionChunkSampler(h),
        transform=RewardScaling(0.0, 1 / h, in_keys=[("next", "reward")]),
        batch_size=64,
    )
    sample = buffer.sample()
    reward = rows["next", "reward"].squeeze(-1).numpy()
    expected = [np.mean(gamma ** np.arange(h) * reward[t : t + h]) for t in sample["index"][:, 0]]
    np.testing.assert_allclose(sample["next", "reward"].squeeze(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_rows():
    rows = make_rows([12, 9])
    window = torch.tensor([[1, 2, 3], [17, 18, 19]])
    on_cuda = ActionChunkStorage(rows.cuda(), gamma=0.9, device="cuda")
    chunk = on_cuda[window]
    assert chunk["action"].is_cuda
    torch.testing.assert_close(
        chunk.cpu().to_dict(), ActionChunkStorage(rows, gamma=0.9)[window].to_dict()
    )
    index, _ = ActionChunkSampler(2).sample(on_cuda, 100)
    assert on_cuda[index]["action"].shape == (100, 2, 2)


if __name__ == "__main__":
    pytest.main([__file__])
