from __future__ import annotations

import math
from pathlib import Path

import numpy as np
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
from torchrl_mac.datasets import ObservationStatistics

VALUE = GoalDistribution(current=0.2, trajectory=0.5, random=0.3)
GOALS = ("value_goal", "actor_goal")
ACTOR = GoalDistribution(current=0.0, trajectory=0.5, random=0.5, gamma=0.999)


@pytest.fixture(scope="module")
def authors():
    """Rows, drawn indices, batches and histograms of the reference implementation's samplers."""
    file = np.load(Path(__file__).parent.parent / "assets" / "mac_st.npz")
    return {key[5:]: file[key] for key in file.files if key.startswith("data/")}


def authors_storage(data, **kwargs):
    ends = np.flatnonzero(data["valids"] == 0)
    episode = np.searchsorted(ends, np.arange(len(data["valids"])))
    bound = np.float32(1 - 1e-5)
    rows = TensorDict(
        observation=torch.from_numpy(data["raw_observations"]),
        action=torch.from_numpy(data["raw_actions"].clip(-bound, bound)),
        oracle_rep=torch.from_numpy(data["raw_oracle_reps"]),
        episode=torch.from_numpy(episode),
        next=TensorDict(reward=torch.from_numpy(data["raw_rewards"]).unsqueeze(-1)),
    ).auto_batch_size_(1)
    return ActionChunkStorage(rows, **kwargs)


def normalised(value, low, high):
    low, high = torch.from_numpy(low), torch.from_numpy(high)
    loc, scale = ObservationStatistics(low, high, low, high).loc_scale()
    return ((value - loc) / scale).numpy()


def authors_index(data):
    start = torch.from_numpy(data["idxs"])
    goals = [torch.from_numpy(data[f"{kind}_goal_idxs"]) for kind in ("value", "actor")]
    return torch.cat([start.unsqueeze(-1) + torch.arange(11), torch.stack(goals, 1)], 1)


def test_goal_batches_equal_the_authors(authors):
    storage = authors_storage(authors, goal_keys=GOALS, goal_source="oracle_rep")
    batch = storage[authors_index(authors)]
    low, high = authors["scale_obs_min"], authors["scale_obs_max"]
    for ours, theirs in (("observation", "observations"), (("next", "observation"),) * 2):
        theirs = "next_observations" if isinstance(theirs, tuple) else theirs
        np.testing.assert_allclose(
            normalised(batch[ours], low, high), authors[f"gc_batch/{theirs}"], atol=1e-6
        )
    assert batch["action"].flatten(1).numpy().tolist() == authors["gc_batch/actions"].tolist()
    low, high = authors["scale_rep_min"], authors["scale_rep_max"]
    for goal in GOALS:
        np.testing.assert_allclose(
            normalised(batch[goal], low, high), authors[f"gc_batch/{goal}s"], atol=1e-6
        )
    assert batch["next", "reward"].flatten().tolist() == authors["gc_batch/rewards"].tolist()
    masks = batch["next", "terminated"].logical_not().flatten()
    assert masks.tolist() == (authors["gc_batch/masks"] == 1).tolist()
    assert 0 < masks.sum() < len(masks)


def test_single_task_batches_equal_the_authors(authors):
    storage = authors_storage(authors, gamma=0.999, ignore_terminated=True)
    batch = storage[authors_index(authors)[:, :11]]
    np.testing.assert_allclose(
        batch["next", "reward"].flatten() / 10, authors["singletask_batch/rewards"], rtol=1e-6
    )
    assert not batch["next", "terminated"].any()


@pytest.mark.parametrize(("kind", "goals"), [("value", VALUE), ("actor", ACTOR)])
def test_goals_are_distributed_as_the_authors(authors, kind, goals):
    expected = authors[f"goal_hist_{kind}"]
    storage = authors_storage(authors)
    draws, start = int(expected.sum()), int(authors["goal_hist_start"])
    last = storage.episode_ends[torch.searchsorted(storage.episode_ends, torch.tensor(start))]
    generator = torch.Generator().manual_seed(0)
    # starts of chunks of one action: all rows that have a successor
    anywhere = ActionChunkSampler(1).draw(storage, draws, generator)[:, 0]
    uniform = torch.rand(3, draws, generator=generator, dtype=torch.float64)
    goal = goals.choose(torch.full((draws,), start), last.expand(draws), anywhere, uniform)
    count = np.bincount(goal, minlength=len(expected))
    assert (count > 0).tolist() == (expected > 0).tolist()
    seen = expected > 0
    chi_square = ((count - expected)[seen] ** 2 / (count + expected)[seen]).sum()
    freedom = seen.sum() - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_sampler_draws_goals_from_its_own_starts(authors):
    goals = {
        "later": GoalDistribution(0, 1, 0),
        ("nested", "same"): GoalDistribution(1, 0, 0),
        "any": GoalDistribution(0, 0, 1),
    }
    storage = authors_storage(authors, goal_keys=list(goals))
    index, _ = ActionChunkSampler(10, goals=goals).sample(storage, 5000)
    start, (later, same, anywhere) = index[:, 0], index[:, 11:].unbind(1)
    ends = storage.episode_ends
    last = ends[torch.searchsorted(ends, start)]
    assert (later > start).all() and (later < last).all()
    assert same.equal(start)
    assert not torch.isin(anywhere, ends).any()
    assert len(anywhere.unique()) == len(authors["valids"]) - len(ends)
    batch = storage[index]
    assert batch["nested", "same"].equal(batch["observation"])
    with pytest.raises(ValueError, match=r"sampler draws the goals \['later'\], the storage makes"):
        ActionChunkSampler(10, goals={"later": goals["later"]}).sample(storage, 8)


def test_what_lies_beyond_the_episode_piles_up_on_its_end():
    goals, draws = GoalDistribution(0, 1, 0, gamma=0.9), 200_000
    start, last = torch.zeros(draws, dtype=torch.int64), torch.full((draws,), 6)
    uniform = torch.rand(3, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = goals.choose(start, last, start, uniform)
    share = torch.bincount(goal, minlength=7).double() / draws
    expected = [0, *(0.1 * 0.9**k for k in range(4)), 0.9**4, 0]
    np.testing.assert_allclose(share, expected, atol=0.004)


def test_a_uniform_goal_has_half_weight_at_both_ends():
    goals, draws = GoalDistribution(0, 1, 0), 200_000
    start, last = torch.zeros(draws, dtype=torch.int64), torch.full((draws,), 6)
    uniform = torch.rand(3, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(goals.choose(start, last, start, uniform), minlength=7) / draws
    np.testing.assert_allclose(share, [0, 0.125, 0.25, 0.25, 0.25, 0.125, 0], atol=0.004)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    h=st.integers(1, 4),
    seed=st.integers(0, 1000),
    negative=st.booleans(),
)
def test_success_is_index_containment(lengths, h, seed, negative):
    if max(lengths) <= h:
        return
    rows = sum(lengths)
    storage = ActionChunkStorage(
        TensorDict(
            observation=torch.arange(float(rows)).unsqueeze(-1),
            action=torch.zeros(rows, 1),
            episode=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            batch_size=[rows],
        ),
        goal_keys=GOALS,
        negative_reward=negative,
    )
    sampler = ActionChunkSampler(h, goals={"value_goal": VALUE, "actor_goal": ACTOR}, seed=seed)
    index, _ = sampler.sample(storage, 64)
    batch = storage[index]
    for chunk, row in zip(batch, index, strict=True):
        t, goal = int(row[0]), int(row[-2])
        success = goal in range(t, t + h)
        assert chunk["value_goal"].tolist() == [float(goal)]
        assert chunk["actor_goal"].tolist() == [float(row[-1])]
        assert chunk["next", "terminated"].item() == success
        assert chunk["next", "reward"].item() == success - float(negative)
        at_end = (t + h) in (torch.tensor(lengths).cumsum(0) - 1)
        assert chunk["next", "truncated"].item() == (at_end and not success)


def test_a_replay_buffer_of_goals(authors):
    buffer = TensorDictReplayBuffer(
        storage=authors_storage(
            authors, goal_keys=["value_goal"], goal_source="oracle_rep", ignore_terminated=True
        ),
        sampler=ActionChunkSampler(5, goals={"value_goal": VALUE}, seed=1),
        batch_size=32,
    )
    batch = buffer.sample()
    assert batch["value_goal"].shape == (32, 3) and batch["index"].shape == (32, 7)
    assert not batch["next", "terminated"].any()
    assert (batch["next", "reward"] == 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.5, 0.5), r"probabilities with sum 1, got \(0.5, 0.5, 0.5\)"),
        ((-0.5, 1.0, 0.5), "probabilities"),
        ((0.0, 1.0, 0.0, 1.0), "gamma must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_distributions(arguments, message):
    with pytest.raises(ValueError, match=message):
        GoalDistribution(*arguments)


def test_a_single_task_has_no_goals(tmp_path):
    name = "cube-single-play-singletask-task2-v0"
    with pytest.raises(ValueError, match=r"single task.*cube-single-play-oraclerep-v0"):
        OGBenchExperienceReplay(
            name, root=tmp_path, source=tmp_path, goals={"value_goal": GoalDistribution(0, 1, 0)}
        )


if __name__ == "__main__":
    pytest.main([__file__])
