"""The parts in TorchRL's own loops: its losses on imagined data, its critics in our actor."""

from __future__ import annotations

import pytest
import torch
import torchrl.objectives
from assembly import Size, make_mac
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Composite, HERReplayBuffer, LazyTensorStorage, Unbounded
from torchrl.envs import FlattenAction
from torchrl.modules import (
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    CQLLoss,
    CrossQLoss,
    IQLLoss,
    REDQLoss,
    SACLoss,
    SoftUpdate,
    TD3BCLoss,
)

from torchrl_mac.envs import ChunkedWorldModelEnv
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
)

OBS, G, H, A = 3, 2, 4, 2
D = H * A
CELLS = [16]


def make_world_model(goal):
    size = OBS + D + (G if goal else 0)
    return ChunkedWorldModel(
        NormedMLP(OBS + D, OBS, CELLS),
        NormedMLP(size, 1, CELLS),
        NormedMLP(size, 1, CELLS),
        goal_key="goal" if goal else None,
        negative_reward=True if goal else None,
    )


def train(loss, sample, updates=20):
    """TorchRL's plain training loop; returns the losses by name, each ``[updates]``."""
    updater = None if isinstance(loss, CrossQLoss) else SoftUpdate(loss, tau=0.05)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    history = []
    for _ in range(updates):
        out = loss(sample())
        losses = TensorDict({key: out[key] for key in out.keys() if key.startswith("loss_")})
        losses.sum(reduce=True).backward()
        optimizer.step()
        optimizer.zero_grad()
        if updater is not None:
            updater.step()
        history.append(losses.detach())
    return torch.stack(history)


def large_actions():
    """A batch of one-step episodes that reward large actions."""
    action = torch.rand(64, D) * 2 - 1
    done = torch.ones(64, 1, dtype=torch.bool)
    following = TensorDict(
        observation=torch.randn(64, OBS),
        reward=action.mean(-1, keepdim=True),
        done=done,
        terminated=done.clone(),
    )
    return TensorDict(
        observation=torch.randn(64, OBS), action=action, next=following
    ).auto_batch_size_(1)


def check_likes_large_actions(actor, loss):
    """The actor, with the critic that ``loss`` has trained, chooses what that likes best."""
    td = TensorDict(observation=torch.randn(32, OBS), noise=torch.randn(32, 16, D))
    td.auto_batch_size_(1)
    with loss.qvalue_network_params[0].to_module(actor.qvalue_network):
        chosen, candidates = actor(td.clone()), actor.candidates(td.clone())
    assert torch.equal(
        chosen["chosen_action_value"], candidates["state_action_value"].max(1).values
    )
    means = candidates["action"].flatten(2).mean(-1)
    assert (chosen["action"].flatten(1).mean(-1) > means.mean(1)).float().mean() > 0.9
    return chosen


@pytest.mark.parametrize("goal", [False, True], ids=["single-task", "goal-conditioned"])
def test_imagination_feeds_td3_bc(goal):
    state, size = (["observation", "goal"], OBS + G) if goal else (["observation"], OBS)
    spec = Composite({"observation": Unbounded(OBS), **({"goal": Unbounded(G)} if goal else {})})
    env = ChunkedWorldModelEnv(
        make_world_model(goal), spec, Bounded(-1, 1, shape=(A,)), chunk_size=H
    )
    actor = TensorDictSequential(
        TensorDictModule(NormedMLP(size, D, CELLS), in_keys=state, out_keys=["flat"]),
        TensorDictModule(
            nn.Sequential(nn.Tanh(), nn.Unflatten(-1, (H, A))),
            in_keys=["flat"],
            out_keys=["action"],
        ),
    )
    qvalue = ValueOperator(NormedMLP(size + D, 1, CELLS), in_keys=[*state, "action"])
    loss = TD3BCLoss(actor, qvalue, action_spec=env.action_spec)
    loss.make_value_estimator(gamma=0.9)

    def imagine():
        start = env.observation_spec.rand((16,))
        with torch.no_grad():
            return env.rollout(
                4, tensordict=start, set_state=True, break_when_any_done=False
            ).reshape(-1)

    critic = train(loss, imagine)["loss_qvalue"]
    assert critic.isfinite().all()
    assert critic[-5:].mean() < critic[:5].mean()


def test_rejection_sampling_with_a_critic_of_iql():
    """An actor around IQL's critic chooses what that critic, as trained, likes best."""
    qvalue = ValueOperator(NormedMLP(OBS + D, 1, CELLS), in_keys=["observation", "action"])
    network = nn.Sequential(nn.Linear(OBS, 2 * D), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    loss = IQLLoss(actor, qvalue, ValueOperator(NormedMLP(OBS, 1, CELLS)))
    loss.make_value_estimator(gamma=0.9)
    policy = OneStepPolicy(NormedMLP(OBS + D, D, CELLS), D)
    chooser = FlowRejectionActor(policy, qvalue, num_candidates=16)
    train(loss, large_actions, 200)
    check_likes_large_actions(chooser, loss)


@pytest.mark.skipif(
    not hasattr(torchrl.objectives, "FQLLoss"), reason="this version of TorchRL has no FQLLoss"
)
def test_flow_q_learning_trains_our_policies():
    """Upstream's loss on flat actions of a chunk; then our actor chooses with its critic."""
    flow = FlowMatchingPolicy(NormedMLP(OBS + D + 1, D, CELLS), D, num_steps=4)
    policy = OneStepPolicy(NormedMLP(OBS + D, D, CELLS), D)
    qvalue = ValueOperator(NormedMLP(OBS + D, 1, CELLS), in_keys=["observation", "action"])
    chooser = FlowRejectionActor(policy, qvalue, num_candidates=16, chunk_size=H)
    loss = torchrl.objectives.FQLLoss(flow, policy, qvalue)
    loss.make_value_estimator(gamma=0.9)
    losses = train(loss, large_actions, 200)
    assert set(losses.keys()) == {"loss_flow", "loss_actor", "loss_qvalue"}
    for name, values in losses.items():
        assert values.isfinite().all(), name
        assert values[-20:].mean() < values[:20].mean(), name
    assert check_likes_large_actions(chooser, loss)["action"].shape == (32, H, A)


FIVE, GAMMA = 5, 0.99
D5 = FIVE * A
FLAT = Bounded(-1, 1, (D5,))


def five_steps(steps=None):
    """Chunks of five, as a replay buffer returns them, made flat; ``steps`` says how long."""
    rows, reward = 64, torch.rand(64, FIVE)
    done = torch.rand(rows, 1) < 0.1
    batch = TensorDict(
        observation=torch.randn(rows, OBS),
        action=torch.rand(rows, FIVE, A) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(rows, OBS),
            reward=(reward * GAMMA ** torch.arange(FIVE)).sum(-1, True),
            done=done,
            terminated=done.clone(),
        ),
    ).auto_batch_size_(1)
    if steps is not None:
        batch["steps_to_next_obs"] = torch.full((rows, 1), steps)
    return FlattenAction(-2, -1)(batch)


def stochastic_actor():
    network = nn.Sequential(NormedMLP(OBS, 2 * D5, CELLS), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_loss(kind):
    qvalue = ValueOperator(NormedMLP(OBS + D5, 1, CELLS), in_keys=["observation", "action"])
    if kind is TD3BCLoss:
        network = nn.Sequential(NormedMLP(OBS, D5, CELLS), nn.Tanh())
        actor = TensorDictModule(network, in_keys=["observation"], out_keys=["action"])
    else:
        actor = stochastic_actor()
    further = {} if kind is IQLLoss else {"action_spec": FLAT}
    if kind in (SACLoss, REDQLoss, CrossQLoss):  # entropy would move the critic's target for long
        further.update(alpha_init=0.01, min_alpha=0.001, fixed_alpha=True)
    value = [ValueOperator(NormedMLP(OBS, 1, CELLS))] if kind is IQLLoss else []
    loss = kind(actor, qvalue, *value, **further)
    loss.make_value_estimator(gamma=GAMMA**FIVE)
    return loss


LOSSES = [IQLLoss, CQLLoss, TD3BCLoss, SACLoss, REDQLoss, CrossQLoss]


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_torchrl_train_on_flat_chunks(kind):
    loss, batch = make_loss(kind), five_steps()
    assert batch["action"].shape == (64, D5)
    if kind is CrossQLoss:  # it has no target networks, and would need batch normalisation instead
        for key in ("done", "terminated"):
            batch["next", key].fill_(True)
    critic = train(loss, lambda: batch, 30)["loss_qvalue"]
    assert critic.isfinite().all()
    assert critic[-5:].mean() < critic[:5].mean()


def test_the_discount_of_a_chunk_is_that_of_five_steps():
    """IQL's loss of the critic, by hand."""
    loss, batch = make_loss(IQLLoss), five_steps()
    following = batch["next"]
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        value = loss.value_network(following.select("observation"))["state_value"]
    target = following["reward"] + GAMMA**FIVE * value * ~following["terminated"]
    total = 0.0
    for k in range(2):
        with torch.no_grad(), loss.qvalue_network_params[k].to_module(loss.qvalue_network):
            predicted = loss.qvalue_network(batch.clone())["state_action_value"]
        total = total + nn.functional.smooth_l1_loss(predicted, target)
    torch.testing.assert_close(loss(batch.clone())["loss_qvalue"].detach(), total)


@pytest.mark.parametrize("kind", LOSSES)
def test_who_reads_the_number_of_steps(kind):
    """Which is why the discount is given as a power: IQL and REDQ do not (torchrl 0.14.1)."""
    loss = make_loss(kind)
    terms = []
    for steps in (None, 20):
        torch.manual_seed(1)
        batch = five_steps(steps)
        torch.manual_seed(2)
        terms.append(loss(batch)["loss_qvalue"])
    assert torch.equal(*terms) == (kind in (IQLLoss, REDQLoss))


def test_critics_of_iql_rank_chunks_by_the_smaller_value():
    loss = make_loss(IQLLoss)
    train(loss, five_steps)

    def critics(observation, action):
        values = []
        for k in range(2):
            with loss.qvalue_network_params[k].to_module(loss.qvalue_network):
                td = TensorDict(observation=observation, action=action)
                values.append(loss.qvalue_network(td)["state_action_value"])
        return *values, torch.minimum(*values)

    names = ["first", "second", "least"]
    network = TensorDictModule(critics, ["observation", "action"], names)
    policy = OneStepPolicy(NormedMLP(OBS + D5, D5, CELLS), D5)
    kwargs = {"num_candidates": 16, "chunk_size": FIVE}
    td = TensorDict(observation=torch.randn(32, OBS), noise=torch.randn(32, 16, D5))
    td.auto_batch_size_(1)
    chosen = {}
    for name in names:
        actor = FlowRejectionActor(policy, network, qvalue_key=name, **kwargs)
        candidates, out = actor.candidates(td.clone()), actor(td.clone())
        assert out["action"].shape == (32, FIVE, A)
        assert torch.equal(out["chosen_action_value"], candidates[name].max(1).values)
        chosen[name] = out["action"]
    assert torch.equal(
        candidates["least"], torch.minimum(candidates["first"], candidates["second"])
    )
    assert not torch.equal(chosen["least"], chosen["first"])
    with pytest.raises(ValueError, match="qvalue_key"):
        FlowRejectionActor(policy, network, **kwargs)
    before = actor(td.clone())["chosen_action_value"]
    train(loss, five_steps)  # the actor sees what the loss learns
    assert not torch.equal(actor(td.clone())["chosen_action_value"], before)


def test_hindsight_goals_train_our_losses():
    torch.manual_seed(0)
    buffer = HERReplayBuffer(
        reward_fn=lambda td: (td["achieved_goal"] != td["desired_goal"]).any(-1, True).float() - 1,
        her_ratio=0.5,
        storage=LazyTensorStorage(200),
        batch_size=32,
    )
    done = (torch.arange(200) % 20 == 19).unsqueeze(-1)
    position = torch.randn(200, G)
    buffer.extend(
        TensorDict(
            observation=torch.randn(200, OBS),
            desired_goal=torch.full((200, G), 7.0),
            achieved_goal=position,
            action=torch.rand(200, H, A),
            next=TensorDict(
                observation=torch.randn(200, OBS),
                reward=torch.zeros(200, 1),
                done=done,
                terminated=done.clone(),
            ),
        ).auto_batch_size_(1)
    )
    mac = make_mac(Size(CELLS, 32, 4, 3, 2, OBS, A, H, G))
    mac["behaviour"].set_keys(actor_goal="desired_goal")
    mac["world_model"].set_keys(value_goal="desired_goal")
    mac["values"].set_keys(value_goal="desired_goal")
    mac["values"].make_value_estimator(gamma=0.9)
    SoftUpdate(mac["values"], tau=0.05)
    losses = list(mac.values())
    optimizer = torch.optim.Adam([p for loss in losses for p in loss.parameters()], 1e-2)
    totals = []
    for _ in range(20):
        batch = buffer.sample()
        assert (batch["desired_goal"] != 7).any() and (batch["desired_goal"] == 7).any()
        terms = {key: term for loss in losses for key, term in loss(batch).items()}
        total = sum(terms.values())
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append((terms["loss_flow"] + terms["loss_dynamics"]).item())
    assert sum(totals[-5:]) < sum(totals[:5])


if __name__ == "__main__":
    pytest.main([__file__])
