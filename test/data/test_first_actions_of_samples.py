from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    FirstActions,
    GoalDistribution,
)

LENGTHS = (9, 6)


def make_buffer(chunk_size, n_steps, transform):
    rows = TensorDict(
        observation=torch.arange(15.0).unsqueeze(-1),
        action=torch.arange(15.0).unsqueeze(-1).expand(15, 2) + 100,
        episode=torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS)),
        batch_size=[15],
    )
    goals = {"value_goal": GoalDistribution(0.2, 0.5, 0.3)}
    sampler = ActionChunkSampler(chunk_size, n_steps=n_steps, goals=goals, seed=0)
    storage = ActionChunkStorage(rows, gamma=0.9, negative_reward=False, **sampler.layout)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler, batch_size=200)
    buffer.append_transform(transform)
    return buffer


@pytest.mark.parametrize(("chunk_size", "first"), [(4, 2), (4, 4), (3, 1), (1, 1)])
def test_samples(chunk_size, first):
    batch = make_buffer(chunk_size, 4, FirstActions(first)).sample()
    single = chunk_size == 1
    assert batch["policy_action"].shape == ((200, 2) if single else (200, first, 2))
    assert batch["policy_valid"].shape == ((200, 1) if single else (200, first, 1))
    for row in batch:
        t = int(row["observation"])
        left = (LENGTHS[0] if t < LENGTHS[0] else sum(LENGTHS)) - 1 - t  # actions with a successor
        expected = [t + i + 100 if i < left else 0 for i in range(first)]
        assert row["policy_action"].reshape(first, 2)[:, 0].tolist() == expected
        assert row["policy_valid"].flatten().tolist() == [i < left for i in range(first)]
        assert row["next", "whole"].tolist() == [left >= first]
        assert row["action"].numel() == 2 * chunk_size  # as it was
    whole = batch["next", "whole"]
    assert whole.any() and (whole.all() == (first == 1))


def test_nested_keys():
    td = TensorDict(a=TensorDict(c=torch.rand(3, 4, 2)), v=torch.ones(3, 4, 1, dtype=torch.bool))
    td = FirstActions(2, action_key=("a", "c"), valid_key="v")(td.auto_batch_size_(1))
    assert torch.equal(td["policy_action"], td["a", "c"][:, :2])
    assert td["next", "whole"].all()


def test_refusals():
    with pytest.raises(ValueError, match="num_actions must be at least 1, got 0"):
        FirstActions(0)
    for size, valid in (((3, 4, 2), (3, 4, 1)), ((3, 2), (3, 1))):
        td = TensorDict(action=torch.rand(size), valid=torch.ones(valid) > 0, batch_size=[3])
        with pytest.raises(ValueError, match="has not the first 5"):
            FirstActions(5)(td)


if __name__ == "__main__":
    pytest.main([__file__])
