"""States on the way to goals, which hierarchical policies choose and reach for."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    GoalDistribution,
    OGBenchExperienceReplay,
)


def make_rows(length):
    return TensorDict(
        observation=torch.zeros(length, 3),
        place=10 * torch.arange(float(length)).unsqueeze(-1),
        action=torch.zeros(length, 2),
        episode=torch.zeros(length),
        batch_size=[length],
    )


def test_each_goal_has_a_subgoal_of_its_own():
    storage = ActionChunkStorage(
        make_rows(9),  # of which row 7 is the last that can be a goal
        n_steps=3,
        goal_keys=["value_goal", "actor_goal"],
        goal_source="place",
        subgoals=True,
    )
    starts = [2, 2, 2, 6, 7]
    goals = [(3, 8), (2, 4), (0, 5), (7, 1), (7, 7)]
    ends = [min(start + 3, 8) for start in starts]
    index = [[t, end, *goal] for t, end, goal in zip(starts, ends, goals, strict=True)]
    batch = storage[torch.tensor(index)]
    assert batch["subgoal", "value_goal"].flatten().tolist() == [30, 20, 50, 70, 70]
    assert batch["subgoal", "actor_goal"].flatten().tolist() == [50, 40, 50, 70, 70]
    assert batch["low_actor_goal"].flatten().tolist() == [50, 50, 50, 70, 70]
    assert batch["actor_goal"].flatten().tolist() == [80, 40, 50, 10, 70]  # as they are without


@pytest.mark.parametrize("options", [{"goal_keys": ["value_goal"]}, {"n_steps": 3}])
def test_subgoals_are_on_the_way_to_goals(options):
    with pytest.raises(ValueError, match="give n_steps and goal_keys"):
        ActionChunkStorage(make_rows(9), subgoals=True, **options)


@pytest.mark.usefixtures("shared_labels")
def test_a_dataset_normalises_subgoals_as_goals(write_npz, tmp_path):
    folder = write_npz("pointmaze-medium-navigate-v0")
    raw, normed = (
        OGBenchExperienceReplay(
            "pointmaze-medium-navigate-oraclerep-v0",
            16,
            root=tmp_path,
            source=folder,
            n_steps=4,
            goals={"value_goal": GoalDistribution(current=0.2, trajectory=0.5, random=0.3)},
            subgoals=True,
            generator=torch.Generator().manual_seed(0),
        )
        for _ in range(2)
    )
    assert isinstance(raw.sampler, ActionChunkSampler)
    normed.append_transform(norm := normed.goal_norm())
    before, after = raw.sample(), normed.sample()
    for key in ("value_goal", ("subgoal", "value_goal"), "low_actor_goal"):
        torch.testing.assert_close(after[key], (before[key] - norm.loc) / norm.scale)
    assert torch.equal(after["observation"], before["observation"])


if __name__ == "__main__":
    pytest.main([__file__])
