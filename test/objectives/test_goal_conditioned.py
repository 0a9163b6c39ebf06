"""Goal-conditioned losses; their numbers are held against the reference in test/parity."""

from __future__ import annotations

import pytest
import torch
from assembly import Size, make_batch, make_mac
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.objectives import SoftUpdate

from torchrl_mac.envs import ChunkedWorldModelEnv

B, OBS, G, H, A, N, K = 6, 4, 2, 3, 2, 5, 4
D = H * A
CELLS = [8, 8]


def batch(actor_goal="actor_goal", value_goal="value_goal"):
    td = make_batch(Size(CELLS, B, N, K, 3, OBS, A, H, G))
    return td.rename_key_("actor_goal", actor_goal).rename_key_("value_goal", value_goal)


def make_losses(goal="goal", negative_reward=True):
    losses = make_mac(Size(CELLS, B, N, K, 3, OBS, A, H, G, goal, negative_reward))
    losses["values"].make_value_estimator(gamma=0.9)
    SoftUpdate(losses["values"], tau=0.1)
    return dict(zip(("actor_goal", "model", "value_goal"), losses.values(), strict=True))


def test_each_loss_sees_its_own_goal():
    losses, td = make_losses(), batch()
    for name, loss in losses.items():
        goal = "value_goal" if name == "model" else name
        assert goal in loss.in_keys and "goal" not in loss.in_keys
        same, before = td.clone(), loss(td.clone())
        for other in {"actor_goal", "value_goal"} - {goal}:
            same[other] = torch.randn(B, G)
        assert (loss(same) == before).all()
        after = loss(td.clone().set(goal, torch.randn(B, G)))
        unmoved = [key for key in loss.out_keys if after[key] == before[key]]
        assert unmoved == (["loss_dynamics"] if name == "model" else [])


@pytest.mark.parametrize("goal", ["desired", ("task", "goal")])
def test_other_keys(goal):
    torch.manual_seed(1)
    expected = [loss(batch()) for loss in make_losses().values()]
    torch.manual_seed(1)
    outcome = []
    for name, loss in make_losses(goal).items():
        if name != "model":
            loss.set_keys(goal=goal)
        loss.set_keys(**{"value_goal" if name == "model" else name: ("g", name)})
        value_goal = ("g", "model") if name == "model" else ("g", "value_goal")
        outcome.append(loss(batch(actor_goal=("g", "actor_goal"), value_goal=value_goal)))
    for ours, theirs in zip(outcome, expected, strict=True):
        for key in theirs.keys():
            torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize("negative_reward", [True, False])
def test_reward_is_read_off_the_goal(negative_reward):
    loss = make_losses(negative_reward=negative_reward)["value_goal"]
    rollout = loss.imagine(batch())
    assert (rollout["goal"] == rollout["goal"][:, :1]).all()
    reached = rollout["next", "terminated"]
    assert reached.any() and not reached.all()
    expected = reached.float() - float(negative_reward)
    assert torch.equal(rollout["next", "reward"], expected)


def test_imagination_equals_the_environment():
    loss, td = make_losses()["value_goal"], batch()
    # An environment starts anew where the task ends; imagination goes on.
    torch.nn.init.constant_(loss.world_model.termination_network.layers[-1].bias, -100.0)
    spec = Composite(observation=Unbounded(OBS), goal=Unbounded(G))
    env = ChunkedWorldModelEnv(loss.world_model, spec, Bounded(-1, 1, shape=(A,)), chunk_size=H)
    start = TensorDict(observation=td["observation"], goal=td["value_goal"], batch_size=[B])
    steps = iter(td["noise"].unbind(1))

    def act(tensordict):
        return loss.actor_network(tensordict.set("noise", next(steps)))

    with torch.no_grad():
        real = env.rollout(
            K, act, tensordict=start.clone(), set_state=True, break_when_any_done=False
        )
    imagined = loss.imagine(td)
    for key in ("goal", "action", ("next", "observation"), ("next", "reward"), ("next", "done")):
        torch.testing.assert_close(imagined[key], real[key])


@pytest.mark.parametrize("name", ["actor_goal", "model", "value_goal"])
def test_compiled_equals_eager(name, monkeypatch):
    monkeypatch.setitem(globals(), "K", 2)  # less to trace
    monkeypatch.setitem(globals(), "CELLS", [8])
    loss, td = make_losses()[name], batch()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    expected, ours = loss(td.clone()), compiled(td.clone())
    for key in loss.out_keys:
        torch.testing.assert_close(ours[key], expected[key])


@pytest.mark.parametrize("name", ["actor_goal", "model", "value_goal"])
def test_bad_goals(name):
    loss, goal = make_losses()[name], "value_goal" if name == "model" else name
    with pytest.raises(KeyError, match=rf"no '{goal}'.*goals="):
        loss(batch().exclude(goal))
    with pytest.raises(ValueError, match=r"takes \d+ numbers"):
        loss(batch().set(goal, torch.randn(B, G + 1)))


if __name__ == "__main__":
    pytest.main([__file__])
