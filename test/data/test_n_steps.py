from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import TensorDictReplayBuffer
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, TD3Loss
from torchrl.objectives.value import TD0Estimator

from torchrl_mac.data import (
    ActionChunkSampler,
    ActionChunkStorage,
    GoalDistribution,
    OGBenchExperienceReplay,
)

VALUE = GoalDistribution(current=0.2, trajectory=0.5, random=0.3)
ACTOR = GoalDistribution(current=0.0, trajectory=0.5, random=0.5, gamma=0.9)
GOALS = {"value_goal": VALUE, ("nested", "actor_goal"): ACTOR}


def make_rows(lengths, seed=0, p_terminated=0.2):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    return TensorDict(
        observation=torch.randn(rows, 3, generator=generator),
        action=torch.rand(rows, 2, generator=generator) + 0.1,
        episode=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        next=TensorDict(
            reward=torch.randn(rows, 1, generator=generator),
            terminated=torch.rand(rows, 1, generator=generator) < p_terminated,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def last_row(rows, t):
    """The last row of the episode of row t."""
    episode = rows["episode"].tolist()
    while t + 1 < len(episode) and episode[t + 1] == episode[t]:
        t += 1
    return t


def slow_actions(rows, t, h, last, stop):
    """The chunk, step by step: no action from the last row, none is valid once the task ended."""
    actions, valid = torch.zeros(h, 2), torch.zeros(h, 1, dtype=torch.bool)
    for i in range(h):
        if t + i >= last:
            break
        actions[i], valid[i] = rows["action"][t + i], t + i <= stop
    return (actions, valid) if h > 1 else (actions[0], valid[0])


def slow_transition(rows, t, h, n, gamma, ignore_terminated):
    """One transition by walking along the episode."""
    last = last_row(rows, t)
    ends = [] if ignore_terminated else rows["next", "terminated"].flatten().nonzero().flatten()
    stop = min((int(row) for row in ends if t <= row < last), default=last)
    row, reward, terminated = t, 0.0, False
    while row < last and row - t < n and not terminated:
        reward += gamma ** (row - t) * rows["next", "reward"][row].item()
        terminated = row == stop
        row += 1
    action, valid = slow_actions(rows, t, h, last, stop)
    return {
        "observation": rows["observation"][t],
        "action": action,
        "valid": valid,
        "steps_to_next_obs": torch.tensor([row - t]),
        ("next", "observation"): rows["observation"][row],
        ("next", "reward"): torch.tensor([reward]),
        ("next", "terminated"): torch.tensor([terminated]),
        ("next", "truncated"): torch.tensor([row == last and not terminated]),
        ("next", "done"): torch.tensor([row == last or terminated]),
    }


def assert_equal(chunk, expected):
    assert set(chunk.keys(True, True)) == set(expected)
    for key, value in expected.items():
        assert chunk[key].dtype == value.dtype and chunk[key].shape == value.shape, key
        torch.testing.assert_close(chunk[key], value, msg=lambda text, key=key: f"{key}: {text}")


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    h=st.integers(1, 5),
    n=st.integers(1, 6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    ignore_terminated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_equal_a_walk(lengths, h, n, gamma, ignore_terminated, seed):
    rows = make_rows(lengths, seed)
    sampler = ActionChunkSampler(h, n_steps=n, seed=seed)
    storage = ActionChunkStorage(
        rows, gamma=gamma, ignore_terminated=ignore_terminated, **sampler.layout
    )
    starts = [t for t in range(len(rows)) if last_row(rows, t) > t]
    assert sampler.num_starts(storage) == len(starts)
    if not starts:
        with pytest.raises(ValueError, match="No episode is longer than one row"):
            sampler.sample(storage, 1)
        return
    index, _ = sampler.sample(storage, 40 * len(starts))
    assert index.shape == (40 * len(starts), h + 1) and index.dtype == torch.int64
    assert set(index[:, 0].tolist()) == set(starts)
    lines = index.unique(dim=0)
    assert len(lines) == len(starts)
    for line, chunk in zip(lines.tolist(), storage[lines], strict=True):
        t, last = line[0], last_row(rows, line[0])
        assert line == [*(min(t + i, last - 1) for i in range(h)), min(t + n, last)]
        assert_equal(chunk, slow_transition(rows, t, h, n, gamma, ignore_terminated))


def walked_to(rows, t, n, goal=None):
    """The row that n steps lead to, as long as the goal is not here and another one can be."""
    row = t
    while row - t < n and row < last_row(rows, t) - 1 and row != goal:
        row += 1
    return row


def slow_goal_transition(rows, t, goal, h, n, gamma, negative, truncation_is_success):
    """One transition towards a goal by walking."""
    last, row = last_row(rows, t), walked_to(rows, t, n, goal)
    reward = -sum(gamma**i for i in range(row - t)) + 0.0
    success = row - t < n and (row == goal or truncation_is_success)
    if not negative:
        reward = gamma ** (row - t) if success else 0.0
    action, valid = slow_actions(rows, t, h, last, last)
    return {
        "observation": rows["observation"][t],
        "action": action,
        "valid": valid,
        "value_goal": rows["observation"][goal],
        "steps_to_next_obs": torch.tensor([row - t]),
        ("next", "observation"): rows["observation"][row],
        ("next", "reward"): torch.tensor([reward]),
        ("next", "terminated"): torch.tensor([success]),
        ("next", "truncated"): torch.tensor([False]),
        ("next", "done"): torch.tensor([success]),
    }


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    h=st.integers(1, 4),
    n=st.integers(1, 6),
    gamma=st.sampled_from([0.5, 0.99, 1.0]),
    negative=st.booleans(),
    quirk=st.booleans(),
    subgoals=st.booleans(),
    seed=st.integers(0, 99),
)
def test_goal_windows_equal_a_walk(lengths, h, n, gamma, negative, quirk, subgoals, seed):
    rows = make_rows(lengths, seed)
    sampler = ActionChunkSampler(h, n_steps=n, goals=GOALS, seed=seed)
    storage = ActionChunkStorage(
        rows,
        gamma=gamma,
        negative_reward=negative,
        truncation_is_success=quirk,
        subgoals=subgoals,
        **sampler.layout,
    )
    index, _ = sampler.sample(storage, 100)
    for line, chunk in zip(index.tolist(), storage[index], strict=True):
        expected = slow_goal_transition(rows, line[0], line[-2], h, n, gamma, negative, quirk)
        expected["nested", "actor_goal"] = rows["observation"][line[-1]]
        if subgoals:
            to_value, to_actor = (walked_to(rows, line[0], n, goal) for goal in line[-2:])
            expected["subgoal", "value_goal"] = rows["observation"][to_value]
            expected["subgoal", "nested", "actor_goal"] = rows["observation"][to_actor]
            expected["low_actor_goal"] = rows["observation"][walked_to(rows, line[0], n)]
        assert_equal(chunk, expected)


def test_a_goal_that_is_ahead_by_all_steps_is_not_yet_reached():
    storage = ActionChunkStorage(
        make_rows([9]), n_steps=3, goal_keys=["value_goal"], negative_reward=False, gamma=0.5
    )
    goals = [1, 2, 3, 4, 5, 7, 0]  # from row 2 on
    batch = storage[torch.tensor([[2, 5, goal] for goal in goals])]
    assert batch["steps_to_next_obs"].flatten().tolist() == [3, 0, 1, 2, 3, 3, 3]
    assert batch["next", "terminated"].flatten().tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert batch["next", "reward"].flatten().tolist() == [0, 1, 0.5, 0.25, 0, 0, 0]


def test_one_step_is_a_plain_transition():
    rows = make_rows([7, 4])
    plain, sampler = ActionChunkSampler(seed=3), ActionChunkSampler(n_steps=1, seed=3)
    index, _ = plain.sample(storage := ActionChunkStorage(rows), 64)
    same, _ = sampler.sample(windows := ActionChunkStorage(rows, n_steps=1), 64)
    assert index.equal(same)
    batch = windows[same]
    assert (batch.pop("steps_to_next_obs") == 1).all() and batch.pop("valid").all()
    assert (batch == storage[index]).all() and batch["action"].shape == (64, 2)


def make_critic(cells):
    return ValueOperator(MLP(cells, 1, num_cells=[16]), in_keys=["observation"])


def test_td0_discounts_each_sample_by_its_steps():
    torch.manual_seed(0)
    rows, gamma, n = make_rows([4, 9, 6]), 0.8, 4
    sampler = ActionChunkSampler(2, n_steps=n, seed=0)
    buffer = TensorDictReplayBuffer(
        storage=ActionChunkStorage(rows, gamma=gamma, **sampler.layout),
        sampler=sampler,
        batch_size=128,
    )
    batch = buffer.sample()
    assert set(batch["steps_to_next_obs"].flatten().tolist()) == {1, 2, 3, 4}
    critic = make_critic(3)
    target = TD0Estimator(gamma=gamma, value_network=critic).value_estimate(batch)
    value = critic.module(rows["observation"])
    for line, estimate in zip(batch["index"].tolist(), target, strict=True):
        row, last, expected, discount, ended = line[0], last_row(rows, line[0]), 0.0, 1.0, False
        while row < last and row - line[0] < n and not ended:
            expected += discount * rows["next", "reward"][row].item()
            ended = rows["next", "terminated"][row].item()
            discount, row = discount * gamma, row + 1
        expected += 0.0 if ended else discount * value[row].item()
        assert estimate.item() == pytest.approx(expected, abs=1e-5)


def slow_q_loss(rows, starts, n, gamma, next_values, predicted):
    """The mean squared error of all critics; ``next_values`` and ``predicted`` speak of rows."""
    errors = []
    for t in starts:
        step = slow_transition(rows, t, 1, n, gamma, ignore_terminated=False)
        k = step["steps_to_next_obs"].item()
        alive = 1 - step["next", "terminated"].item()
        target = step["next", "reward"].item() + gamma**k * alive * next_values[t + k].item()
        errors.append(sum((critic[t].item() - target) ** 2 for critic in predicted))
    return sum(errors) / len(errors)


def make_qvalue():
    return ValueOperator(MLP(5, 1, num_cells=[16]), in_keys=["observation", "action"])


def critics(loss, observation, action):
    values = []
    for params in loss.qvalue_network_params.unbind(0):
        with torch.no_grad(), params.to_module(loss.qvalue_network):
            values.append(loss.qvalue_network.module(observation, action).flatten())
    return torch.stack(values)


def test_the_q_loss_of_td3_equals_a_slow_loop():
    torch.manual_seed(0)
    rows, gamma, n = make_rows([4, 9, 6]), 0.8, 3
    actor = TensorDictModule(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), ["observation"], ["action"])
    loss = TD3Loss(
        actor,
        make_qvalue(),
        bounds=(-1.0, 1.0),
        policy_noise=0.0,
        loss_function="l2",
    )
    loss.make_value_estimator(gamma=gamma)
    sampler = ActionChunkSampler(n_steps=n, seed=0)
    storage = ActionChunkStorage(rows, gamma=gamma, **sampler.layout)
    index, _ = sampler.sample(storage, 64)
    with torch.no_grad():
        policy = actor.module(rows["observation"])
    next_values = critics(loss, rows["observation"], policy).min(0).values
    predicted = critics(loss, rows["observation"], rows["action"])
    expected = slow_q_loss(rows, index[:, 0].tolist(), n, gamma, next_values, predicted)
    assert loss(storage[index])["loss_qvalue"].item() == pytest.approx(expected, rel=1e-4)


def test_the_q_loss_of_iql_equals_a_slow_loop():
    torch.manual_seed(0)
    rows, gamma, n = make_rows([4, 9, 6]), 0.8, 3
    network = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    loss = IQLLoss(actor, make_qvalue(), make_critic(3), loss_function="l2")
    loss.make_value_estimator(gamma=gamma)
    # IQLLoss gives its estimator "next", the observation and the action of a batch alone
    loss.value_estimator.set_keys(steps_to_next_obs=("next", "steps_to_next_obs"))
    sampler = ActionChunkSampler(n_steps=n, seed=0)
    storage = ActionChunkStorage(rows, gamma=gamma, **sampler.layout)
    index, _ = sampler.sample(storage, 64)
    batch = storage[index]
    batch["next", "steps_to_next_obs"] = batch["steps_to_next_obs"]
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        next_values = loss.value_network.module(rows["observation"]).flatten()
    predicted = critics(loss, rows["observation"], rows["action"])
    expected = slow_q_loss(rows, index[:, 0].tolist(), n, gamma, next_values, predicted)
    assert loss(batch)["loss_qvalue"].item() == pytest.approx(expected, rel=1e-4)


def test_both_sides_must_agree():
    storage = ActionChunkStorage(make_rows([9]), n_steps=3)
    with pytest.raises(ValueError, match="sampler has n_steps=None, the storage n_steps=3"):
        ActionChunkSampler(2).sample(storage, 1)
    with pytest.raises(ValueError, match="n_steps must be at least 1, or None, got 0"):
        ActionChunkSampler(2, n_steps=0)
    with pytest.raises(ValueError, match="n_steps must be at least 1, or None, got -1"):
        ActionChunkStorage(make_rows([9]), n_steps=-1)
    assert repr(ActionChunkSampler(2, n_steps=3)) == "ActionChunkSampler(chunk_size=2, n_steps=3)"


def test_nested_keys():
    rows = make_rows([6])
    nested = TensorDict(
        {
            ("agent", "state"): rows["observation"],
            ("agent", "move"): rows["action"],
            "traj": rows["episode"],
            ("next", "agent", "gain"): rows["next", "reward"],
        },
        batch_size=rows.batch_size,
    )
    storage = ActionChunkStorage(
        nested,
        n_steps=3,
        observation_keys=[("agent", "state")],
        action_key=("agent", "move"),
        reward_key=("agent", "gain"),
        traj_key="traj",
    )
    chunk = storage[torch.tensor([[3, 4, 5]])]
    assert chunk["next", "agent", "state"].equal(rows["observation"][5:])
    expected = rows["next", "reward"][3:5].sum(0, keepdim=True)
    torch.testing.assert_close(chunk["next", "agent", "gain"], expected)
    assert chunk["agent", "move"].equal(rows["action"][3:5].unsqueeze(0))
    assert "reward" not in chunk["next"].keys()


def test_a_dataset_in_steps(write_npz, tmp_path):
    name = "pointmaze-medium-navigate-singletask-task3-v0"
    source = write_npz("pointmaze-medium-navigate-v0")
    buffer = OGBenchExperienceReplay(
        name, 64, chunk_size=4, n_steps=9, gamma=0.9, root=tmp_path / "root", source=source
    )
    rows, batch = buffer[:], buffer.sample()
    for line, chunk in zip(batch.pop("index").tolist(), batch, strict=True):
        assert_equal(chunk, slow_transition(rows, line[0], 4, 9, 0.9, ignore_terminated=False))
    given = OGBenchExperienceReplay(
        name, 8, sampler=ActionChunkSampler(n_steps=2), root=tmp_path / "root"
    )
    assert given.sample()["valid"].shape == (8, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("goals", [{}, GOALS])
def test_windows_on_cuda_can_be_captured(goals):
    rows, sampler = make_rows([9, 12]), ActionChunkSampler(3, n_steps=5, goals=goals)
    options = {"gamma": 0.9, "subgoals": bool(goals), **sampler.layout}
    on_host = ActionChunkStorage(rows, **options)
    storage = ActionChunkStorage(rows.cuda(), device="cuda", **options)
    generator = torch.Generator("cuda").manual_seed(0)
    storage[sampler.draw(storage, 64, generator)]
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        index = sampler.draw(storage, 64, generator)
        batch = storage[index]
    for _ in range(2):
        graph.replay()
        expected = on_host[index.cpu()].to_dict()
        torch.testing.assert_close(batch.cpu().to_dict(), expected)


if __name__ == "__main__":
    pytest.main([__file__])
