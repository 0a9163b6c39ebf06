"""The losses of actions are those of subgoals, under other keys: SHARSA on sampled windows."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, GoalDistribution
from torchrl_mac.modules import FlowMatchingPolicy, NormedMLP, QValueEnsemble, StackedMLP
from torchrl_mac.objectives import FlowBCLoss, InSampleValueLoss

OBS, G, A, H, CELLS = 4, 2, 3, 4, [8]
GOALS = {
    "value_goal": GoalDistribution(current=0.2, trajectory=0.5, random=0.3),
    "actor_goal": GoalDistribution(current=0.0, trajectory=1.0, random=0.0),
}


def windows(size=64):
    rows = TensorDict(
        observation=torch.randn(40, OBS),
        place=torch.randn(40, G),
        action=torch.rand(40, A),
        episode=torch.arange(40) // 10,
        batch_size=[40],
    )
    sampler = ActionChunkSampler(H, n_steps=5, goals=GOALS, seed=0)
    storage = ActionChunkStorage(
        rows, goal_source="place", negative_reward=False, subgoals=True, **sampler.layout
    )
    batch = storage[sampler.sample(storage, size)[0]]
    batch["high_x0"], batch["high_t"] = torch.randn(size, G), torch.rand(size, 1)
    batch["low_x0"], batch["low_t"] = torch.randn(size, H * A), torch.rand(size, 1)
    return batch


def make_high(**keys):
    torch.manual_seed(0)
    network = NormedMLP(OBS + G + G + 1, G, CELLS)
    flow = FlowMatchingPolicy(
        network, G, low=-math.inf, high=math.inf, in_keys=["observation", "goal", "noise"]
    )
    loss = FlowBCLoss(flow)
    loss.set_keys(flow_noise="high_x0", flow_time="high_t", **keys)
    return loss


def make_low(goal, **keys):
    torch.manual_seed(0)
    network = NormedMLP(OBS + G + H * A + 1, H * A, CELLS)
    flow = FlowMatchingPolicy(network, H * A, in_keys=["observation", goal, "noise"])
    loss = FlowBCLoss(flow)
    loss.set_keys(goal=goal, flow_noise="low_x0", flow_time="low_t", **keys)
    return loss


def make_values(action, **keys):
    torch.manual_seed(0)
    state = ["observation", "goal"]
    value = ValueOperator(NormedMLP(OBS + G, 1, CELLS), in_keys=state)
    critics = StackedMLP(2, OBS + G + G, 1, CELLS, broadcast=True)
    qvalue = QValueEnsemble(critics, q_aggregation="min", in_keys=[*state, action])
    loss = InSampleValueLoss(value, qvalue, loss_function="bce", critic_reduction="sum")
    loss.set_keys(action=action, **keys)
    return loss


def of_actions(batch):
    """The windows as those of a policy whose actions are subgoals, and of one towards goals."""
    high, low = batch.exclude("subgoal", "valid"), batch.exclude("subgoal")
    low["actor_goal"] = batch["low_actor_goal"]
    values = high.clone().set("action", batch["subgoal", "value_goal"])
    return high.set("action", batch["subgoal", "actor_goal"]), low, values


WHOLE = {"action": ("subgoal", "actor_goal"), "valid": ("subgoal", "valid")}


def make_all():
    return (
        make_high(**WHOLE),
        make_low("subgoal", actor_goal="low_actor_goal"),
        make_values(("subgoal", "value_goal")),
    )


def test_losses_of_subgoals_are_those_of_actions():
    batch = windows()
    assert not batch["valid"].all()  # of all actions; a subgoal is whole
    plain = (make_high(), make_low("goal"), make_values("action"))
    for loss, same, td in zip(make_all(), plain, of_actions(batch), strict=True):
        out, expected = loss(batch), same(td)
        for key in loss.out_keys:
            torch.testing.assert_close(out[key], expected[key])


@pytest.mark.parametrize("which", [0, 1, 2], ids=["high", "low", "values"])
def test_compiled_equals_eager(which):
    torch._dynamo.reset()
    loss, batch = make_all()[which], windows()
    out = loss(batch.clone())
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(batch.clone())
    for key in loss.out_keys:
        torch.testing.assert_close(compiled[key], out[key])


if __name__ == "__main__":
    pytest.main([__file__])
