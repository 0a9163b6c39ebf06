"""An actor trained through imagined rollouts."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.distributions import Normal
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.modules import ValueOperator
from torchrl.objectives import DreamerActorLoss, DreamerValueLoss, SoftUpdate, ValueEstimators

from torchrl_mac.envs import ChunkedWorldModelEnv
from torchrl_mac.modules import (
    ChunkedWorldModel,
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, DreamerLoss
from torchrl_mac.trainers import LossUpdate

B, OBS, GOAL, H, A, K = 6, 4, 2, 3, 2, 4
CELLS = [8]
GAMMA, LMBDA = 0.9, 0.8


def batch(size=(B,), chunk=H, horizon=K):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        value_goal=torch.randn(*size, GOAL),
        action=torch.rand(*size, chunk, A) - 0.5,
        noise=torch.randn(*size, horizon, chunk * A),
        entropy_noise=torch.randn(*size, horizon, chunk * A),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.randn(*size, 1),
            terminated=torch.rand(*size, 1) < 0.5,
            batch_size=size,
        ),
        batch_size=size,
    )


def dreamer(
    chunk=H,
    goal=False,
    negative_reward=None,
    members=1,
    state="observation",
    act="action",
    **kwargs,
):
    torch.manual_seed(0)
    D, S = chunk * A, OBS + goal * GOAL
    read = [state, *(["goal"] if goal else [])]
    policy = TanhGaussianPolicy(NormedMLP(S, 2 * D, CELLS), D, in_keys=[*read, "noise"])
    actor = PolicyActor(policy, chunk_size=chunk, action_key=act)
    value = ValueOperator(NormedMLP(S, 1, CELLS), in_keys=read)
    heads = [NormedMLP(S + D, 1, CELLS) for _ in range(2)]
    keys = {"observation_key": state, "action_key": act, "goal_key": "goal" if goal else None}
    keys["negative_reward"] = negative_reward
    if members > 1:
        stacked = StackedMLP(members, OBS + D, 2 * OBS, CELLS, broadcast=True)
        model = EnsembleWorldModel(GaussianEnsemble(stacked), *heads, **keys)
    else:
        model = ChunkedWorldModel(NormedMLP(OBS + D, OBS, CELLS), *heads, **keys)
    kwargs = {"entropy_bonus": 0.1, **kwargs}
    loss = DreamerLoss(actor, value, model, imagination_horizon=K, **kwargs)
    loss.make_value_estimator(gamma=GAMMA, lmbda=LMBDA)
    if loss.delay_value:
        SoftUpdate(loss, tau=0.1)
        for target in loss.target_value_network_params.values(True, True):
            target.data.add_(0.1 * torch.randn_like(target))
    return loss


def slow(loss, td, goal):
    """The two terms by a plain loop over steps, with gradients."""
    policy, model = loss.actor_network.policy.module, loss.world_model
    value = loss.value_network.module
    goals = [td["value_goal"]] if goal else []
    discount = GAMMA**loss.chunk_size

    def moments(s):
        mean, log_std = policy.network(torch.cat([s, *goals], -1)).chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()

    def target(s):
        with loss.target_value_network_params.to_module(loss.value_network):
            return value(s, *goals)

    states, rewards, ends, entropies = [td["observation"]], [], [], []
    for k in range(K):
        s = states[-1]
        mean, std = moments(s)
        a = (mean + std * td["noise"][:, k]).tanh()
        mean, std = moments(s.detach())
        x = mean + std * td["entropy_noise"][:, k]
        slope = (1 - x.double().tanh().square()).log().to(x.dtype)
        density = Normal(mean, std).log_prob(x) - slope
        entropies.append(-density.sum(-1, keepdim=True))
        end = model.termination_network(s, *goals, a).sigmoid()
        ends.append(torch.zeros_like(end) if loss.ignore_terminated else end)
        rewards.append(
            model.reward_network(s, *goals, a)
            if model.negative_reward is None
            else end - float(model.negative_reward)
        )
        states.append(s + model.dynamics_network(s, a))
    returns, following = [], target(states[-1])
    for k in reversed(range(K)):
        blend = (1 - LMBDA) * target(states[k + 1]) + LMBDA * following
        following = rewards[k] + discount * (1 - ends[k]) * blend
        returns.insert(0, following)
    actor, critic, weight = 0.0, 0.0, torch.ones_like(following)
    for k in range(K):
        actor = actor - (weight * (returns[k] + loss.entropy_bonus * entropies[k])).mean() / K
        error = value(states[k].detach(), *goals) - returns[k].detach()
        critic = critic + (weight * error.square()).mean() / K
        if loss.discount_loss:
            weight = weight * discount * (1 - ends[k]).detach()
    return {"loss_actor": actor, "loss_value": critic}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 1, "delay_value": False},
        {"entropy_bonus": 0.0, "discount_loss": False},
        {"ignore_terminated": True},
        {"goal": True, "negative_reward": True},
        {"goal": True, "negative_reward": False, "ignore_terminated": True},
    ],
)
def test_numbers_and_gradients_of_a_slow_loop(options):
    loss, td = dreamer(**options), batch(chunk=options.get("chunk", H))
    out, expected = loss(td), slow(loss, td, options.get("goal", False))
    trained = {"loss_actor": "policy_params", "loss_value": "value_network_params"}
    for term, name in trained.items():
        torch.testing.assert_close(out[term], expected[term])
        parameters = [*getattr(loss, name).parameters()]
        gradients = torch.autograd.grad(out[term], parameters)
        assert any(gradient.abs().sum() > 1e-6 for gradient in gradients)
        again = torch.autograd.grad(expected[term], parameters)
        torch.testing.assert_close(gradients, again, rtol=1e-4, atol=1e-6)


class NoisyTrack(TensorDictModule):
    """A policy for ``env.rollout`` that takes its noise from a list, step by step."""

    def __init__(self, actor, noise):
        super().__init__(actor.policy, in_keys=["state"], out_keys=["action"])
        self.actor, self.steps = actor, iter(noise.unbind(1))

    def forward(self, td):
        return self.actor(td.set("noise", next(self.steps))).exclude("noise")


class StateEnv(ChunkedWorldModelEnv):
    """Starts where TorchRL's loss says, which does not know of ``set_state``."""

    def reset(self, tensordict):
        return super().reset(tensordict, set_state=True)


@pytest.mark.parametrize("chunk", [1, H])
@pytest.mark.parametrize("discount_loss", [False, True])
def test_torchrl_where_nothing_ends_and_nothing_is_for_entropy(chunk, discount_loss):
    options = {"entropy_bonus": 0.0, "delay_value": False, "ignore_terminated": True}
    loss = dreamer(chunk, state="state", discount_loss=discount_loss, **options)
    torch.nn.init.constant_(loss.world_model.termination_network.layers[-1].bias, -1e3)
    td = batch(chunk=chunk).rename_key_("observation", "state")
    specs = Composite(state=Unbounded(OBS), belief=Unbounded(1))
    env = StateEnv(loss.world_model, specs, Bounded(-1, 1, (A,)), chunk_size=chunk)
    gamma, value = GAMMA**chunk, loss.value_network
    actor = NoisyTrack(loss.actor_network, td["noise"])
    theirs = DreamerActorLoss(actor, value, env, imagination_horizon=K, discount_loss=discount_loss)
    # with the time that it takes to be the last dimension, TorchRL's returns look one step ahead
    theirs.make_value_estimator(ValueEstimators.TDLambda, gamma=gamma, lmbda=LMBDA, time_dim=-2)
    start = TensorDict(state=td["state"], belief=torch.zeros(B, 1), batch_size=[B])
    with loss.value_network_params.to_module(value):
        actor_loss, rollout = theirs(start)
        critic = DreamerValueLoss(value, discount_loss=discount_loss, gamma=gamma)
        value_loss, _ = critic(rollout)
    out = loss(td)
    torch.testing.assert_close(K * out["loss_actor"], actor_loss["loss_actor"])
    torch.testing.assert_close(K * out["loss_value"], value_loss["loss_value"])
    parameters = [*loss.actor_network.policy.parameters()]
    ours = torch.autograd.grad(K * out["loss_actor"], parameters)
    theirs = torch.autograd.grad(actor_loss["loss_actor"], parameters)
    assert ours[0].abs().sum() > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("members", [1, 7])
@pytest.mark.parametrize("goal", [False, True])
@pytest.mark.parametrize("chunk", [1, H])
def test_each_term_trains_its_own_network(chunk, goal, members):
    options = {"chunk": chunk, "goal": goal, "members": members}
    for term, trained in (("loss_actor", "policy"), ("loss_value", "value_network")):
        loss = dreamer(negative_reward=True if goal else None, **options)
        loss(batch(chunk=chunk))[term].backward()
        for name, parameter in loss.named_parameters():
            has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert has_gradient == name.startswith(f"{trained}_params"), name
        outside = [*loss.world_model.parameters()]
        outside += loss.target_value_network_params.values(True, True)
        assert all(p.grad is None for p in outside)
        assert all(p.requires_grad for p in loss.world_model.parameters())


@pytest.mark.parametrize("term", ["loss_actor", "loss_value"])
def test_a_selected_term_is_the_same_and_alone(term):
    loss, td = dreamer(), batch()
    every = loss(td)
    loss.select_out_keys(term)
    out = loss(td)
    assert list(out.keys()) == [term] and out[term].requires_grad
    torch.testing.assert_close(out[term], every[term])


def test_a_world_model_without_a_logit():
    loss, td = dreamer(entropy_bonus=0.0), batch()
    expected = loss(td)
    model = loss.world_model
    torch.nn.init.constant_(model.termination_network.layers[-1].bias, 1e3)
    every = loss(td)  # ends at once
    model.select_out_keys(*[key for key in model.out_keys if "logit" not in str(key)])
    out = loss(td)
    for key, value in out.items():
        torch.testing.assert_close(value, every[key])
        assert not torch.isclose(value, expected[key])


@pytest.mark.parametrize("size", [(B,), (2, 3), ()])
def test_reduction_and_weights(size):
    td, loss = batch(size), dreamer()
    mean = loss(td)
    loss.reduction = "none"
    each = loss(td)
    loss.reduction = "mean"
    weight = td["priority_weight"] = torch.rand(size)
    for key, value in loss(td).items():
        assert each[key].shape == td.shape
        torch.testing.assert_close(each[key].mean(), mean[key])
        torch.testing.assert_close(value, (each[key] * weight).sum() / weight.sum())


def test_nested_keys():
    td = batch()
    nested = TensorDict(
        x=TensorDict(state=td["observation"]),
        noise=td["noise"],
        z=TensorDict(entropy=td["entropy_noise"]),
    ).auto_batch_size_(1)
    loss = dreamer(state=("x", "state"), act=("x", "chunk"))
    loss.set_keys(
        entropy_noise=("z", "entropy"), lambda_target=("z", "g"), discount_weight=("z", "w")
    )
    for key, value in dreamer()(td).items():
        torch.testing.assert_close(loss(nested)[key], value)


def test_dispatch_and_drawn_noise():
    loss = dreamer(goal=True)
    given = {key: batch()[key] for key in loss.in_keys}
    assert set(given) == {"observation", "value_goal"}
    first, second = loss(**given), loss(**given)
    assert all(a.isfinite() and a != b for a, b in zip(first, second, strict=True))


def test_what_cannot_be():
    loss = dreamer()
    parts = (loss.actor_network, loss.value_network, loss.world_model)
    with pytest.raises(ValueError, match="imagination_horizon"):
        DreamerLoss(*parts, imagination_horizon=0)
    with pytest.raises(NotImplementedError, match="TD0"):
        loss.make_value_estimator(ValueEstimators.TD0)


@pytest.mark.parametrize("members", [1, 3])
def test_compiled_equals_eager(members):
    """Together with the world model's own loss, over three updates."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, {"backend": "aot_eager"}):
        loss = dreamer(members=members)
        loss.imagination_horizon = 2  # there is less to trace
        losses = [ChunkedWorldModelLoss(loss.world_model), loss]
        parameters = [p for part in losses for p in part.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        update = LossUpdate(losses, optimizer, SoftUpdate(loss, tau=0.1), compile=compiled)
        if members > 1:  # a model that draws nothing: its deviations are as good as none
            loss.world_model.dynamics_network.log_std_bounds = (-30.0, -29.0)
            loss.world_model.dynamics_network.elites = torch.zeros(1, dtype=torch.int64)
        torch.manual_seed(1)
        out = [update(batch(horizon=2)) for _ in range(3)]
        assert update.is_compiled == bool(compiled)
        results.append((torch.stack(out), parameters))
    (eager, p), (compiled, q) = results
    for key in ("loss_actor", "loss_value"):
        torch.testing.assert_close(eager[key], compiled[key], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_the_actor_finds_what_the_model_rewards():
    """Reward is highest where all actions are 0.5: gradients through the model lead there."""
    loss = dreamer(delay_value=False, entropy_bonus=0.0, ignore_terminated=True)
    chunk = torch.nn.Module()
    chunk.forward = lambda s, a: -(a - 0.5).square().mean((-2, -1)).unsqueeze(-1)
    loss.world_model.reward_network = chunk
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = loss.imagine(batch((64,)))["next", "reward"].mean()
    for _ in range(60):
        optimizer.zero_grad()
        sum(loss(batch((64,))).values()).backward()
        optimizer.step()
    after = loss.imagine(batch((64,)))["next", "reward"].mean()
    assert after > 0.3 * before


if __name__ == "__main__":
    pytest.main([__file__])
