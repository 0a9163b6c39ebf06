"""LEQ."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    ChunkedWorldModel,
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    QValueEnsemble,
    StackedMLP,
    TanhPolicy,
)
from torchrl_mac.objectives import LEQLoss

B, OBS, A, G, E, K = 5, 3, 2, 2, 4, 4
CELLS = [8]
SETTINGS = {"lmbda": 0.8, "expectile": 0.3, "model_batch_ratio": 0.4}
GAMMA = 0.9


def shifted(network):
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network


def make(
    state="observation", chunk="action", goal=False, h=1, ensemble=True, single=False, **settings
):
    """A loss whose tasks end in imagination now and then."""
    torch.manual_seed(0)
    D, width, goals = h * A, (G if goal else 0), (["goal"] if goal else [])
    keys = {"observation_key": state, "action_key": chunk, "goal_key": "goal" if goal else None}
    heads = [shifted(NormedMLP(OBS + width + D, 1, CELLS)) for _ in range(2)]
    if ensemble:
        network = StackedMLP(E, OBS + D, 2 * OBS, CELLS, broadcast=True)
        dynamics = GaussianEnsemble(shifted(network), log_std_bounds=(-3.0, -1.0))
        model = EnsembleWorldModel(dynamics, *heads, **keys)
    else:
        model = ChunkedWorldModel(shifted(NormedMLP(OBS + D, OBS, CELLS)), *heads, **keys)
    policy = TanhPolicy(
        shifted(NormedMLP(OBS + width, D, CELLS)), in_keys=[state, *goals], out_keys=[chunk]
    )
    actor = PolicyActor(policy, chunk_size=h if h > 1 else None, action_key=chunk)
    if single:
        critic = shifted(NormedMLP(OBS + width + D, 1, CELLS))
        names = {"in_keys": [state, *goals, chunk], "out_keys": ["state_action_value"]}
        qvalue = [ValueOperator(critic, **names)]
    else:
        critics = shifted(StackedMLP(2, OBS + width + D, 1, CELLS, broadcast=True))
        qvalue = QValueEnsemble(critics, in_keys=[state, *goals, chunk])
    loss = LEQLoss(actor, qvalue, model, imagination_horizon=K, **{**SETTINGS, **settings})
    loss.set_keys(action=chunk)
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.1)
    loss.target_qvalue_network_params.apply_(lambda x: x.data.add_(0.1 * torch.randn_like(x)))
    return loss


def batch(h=1, size=(B,)):
    torch.manual_seed(1)
    terminated = torch.rand(*size, 1) < 0.4
    return TensorDict(
        observation=torch.randn(*size, OBS),
        action=torch.rand(*size, *([h] if h > 1 else []), A) * 2 - 1,
        value_goal=torch.randn(*size, G),
        actor_goal=torch.randn(*size, G),
        model_noise=torch.randn(*size, K, OBS),
        member=torch.randint(E, (*size, K)),
        actor_model_noise=torch.randn(*size, K, OBS),
        actor_member=torch.randint(E, (*size, K)),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.randn(*size, 1),
            done=terminated,
            terminated=terminated.clone(),
        ),
        batch_size=size,
    )


class Slow:
    """One row at a time, each return from its definition, each gradient by a pass of its own."""

    def __init__(self, loss, h=1, goal=None):
        self.loss, self.model, self.goal = loss, loss.world_model, goal
        self.discount = GAMMA**h

    def q(self, s, a, params=None):
        network, inputs = self.loss.qvalue_network, [s, self.goal, a.flatten()]
        params = self.loss.qvalue_network_params if params is None else params
        with params.to_module(network):
            return network.network(torch.cat([x for x in inputs if x is not None]))[:, 0]

    def pi(self, s):
        return self.loss.actor_network(
            **{"observation": s} | ({} if self.goal is None else {"goal": self.goal})
        )

    def step(self, s, a, noise, member):
        goal = [] if self.goal is None else [self.goal]
        if isinstance(self.model, EnsembleWorldModel):
            mean, std = self.model.dynamics_network(s, a)
            following = s + mean[member] + std[member] * noise
        else:
            following = s + self.model.dynamics_network(s, a)
        reward = self.model.reward_network(s, *goal, a)[0]
        return following, reward, bool(self.model.termination_network(s, *goal, a) > 0)

    def rollout(self, s, noise, member):
        states, actions, rewards, alive = [s], [], [], [1.0]
        for k in range(K):
            actions.append(self.pi(states[-1]))
            s, r, end = self.step(states[-1], actions[-1], noise[k], int(member[k]))
            states.append(s)
            rewards.append(r)
            alive.append(alive[-1] * (not end))
        actions.append(self.pi(states[-1]))
        values = [self.q(s, a).mean() for s, a in zip(states, actions, strict=True)]
        return states, actions, rewards, alive, values

    def returns(self, rewards, alive, values):
        def ahead(i, n):
            if n == 0:
                return values[i]
            return alive[i] * rewards[i] + alive[i + 1] * self.discount * ahead(i + 1, n - 1)

        found = []
        for i in range(K + 1):
            weights = [self.loss.lmbda**n for n in range(K - i + 1)]
            each = [w * ahead(i, n) for n, w in enumerate(weights)]
            found.append(sum(each) / sum(weights))
        return found


CASES = [
    {"h": 1, "goal": False, "ensemble": True},
    {"h": 3, "goal": True, "ensemble": True},
    {"h": 2, "goal": False, "ensemble": False},
    {"h": 1, "goal": True, "ensemble": False},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case):
    loss, td = make(**case), batch(case["h"])
    out = loss(td)
    expected = {"loss_actor": [], "loss_qvalue": [], "loss_expansion": []}
    ends, ratio = [], loss.model_batch_ratio
    target_params = loss.target_qvalue_network_params
    for b in range(B):
        row = td[b]
        slow = Slow(loss, case["h"], row["value_goal"] if case["goal"] else None)
        states, actions, *rest = slow.rollout(row["observation"], row["model_noise"], row["member"])
        alive, terms = rest[1], []
        for i, y in enumerate(slow.returns(*rest)[:-1]):
            q = slow.q(states[i], actions[i])
            drift = (q - slow.q(states[i], actions[i], target_params)).square()
            weight = torch.where(y > q, loss.expectile, 1 - loss.expectile)
            error = (weight * (y - q).square() + drift).mean()
            terms.append(slow.discount**i * alive[i] * error)
        expected["loss_expansion"].append(ratio * sum(terms) / K)
        ends.append(sum(alive))

        s, a, s2 = row["observation"], row["action"], row["next", "observation"]
        q, goes_on = slow.q(s, a), ~row["next", "terminated"]
        y = row["next", "reward"] + slow.discount * goes_on * slow.q(s2, slow.pi(s2)).mean()
        drift = (q - slow.q(s, a, target_params)).square()
        error = (0.5 * (q - y).square() + drift).mean()
        expected["loss_qvalue"].append((1 - ratio) * error)

        slow = Slow(loss, case["h"], row["actor_goal"] if case["goal"] else None)
        states, actions, *rest = slow.rollout(
            row["observation"], row["actor_model_noise"], row["actor_member"]
        )
        total = 0.0
        for i, y in enumerate(slow.returns(*rest)):
            (gradient,) = torch.autograd.grad(y, actions[i], retain_graph=True)
            weight = loss.expectile if y > rest[2][i] else 1 - loss.expectile
            weight = 0.5 if i == K else weight
            total = total - weight * (gradient * actions[i]).sum()
        expected["loss_actor"].append(total)
    assert min(ends) < K + 1 and max(ends) > 1  # some end and some do not
    for key, values in expected.items():
        torch.testing.assert_close(out[key], torch.stack(values).mean(), rtol=1e-4, atol=1e-5)


def test_the_actor_alone_is_moved_by_its_gradient():
    """The gradient is that of a sum of products with detached gradients, at detached states."""
    loss, td = make(), batch()
    steps = loss.action_gradient(td)
    action = loss.actor_network(observation=steps["observation"])
    slow = -(steps["weight"].unsqueeze(-1) * steps["action_gradient"] * action).sum((1, 2)).mean()
    expected = torch.autograd.grad(slow, list(loss.actor_network.parameters()))
    loss(td)["loss_actor"].backward()
    found = [p.grad for p in loss.actor_network_params.parameters()]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().sum() > 0


TERMS = {
    "loss_actor": "actor_network_params",
    "loss_qvalue": "qvalue_network_params",
    "loss_expansion": "qvalue_network_params",
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_trains_its_own_network(term, single):
    loss = make(goal=True, single=single)
    loss(batch())[term].backward()
    for name, parameter in loss.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_gradient == name.startswith(TERMS[term]), name
    assert all(p.grad is None for p in loss.world_model.parameters())
    assert any(name.startswith("qvalue_network_params") for name, _ in loss.named_parameters())


def test_terms_that_are_left_out_are_not_computed():
    loss, td = make(), batch()
    whole = loss(td)
    loss.qvalue_loss = None
    loss.select_out_keys("loss_actor", "loss_expansion")
    part = loss(td)
    assert set(part.keys()) == {"loss_actor", "loss_expansion"}
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key])


@pytest.mark.parametrize("size", [(B,), (2, 3), ()])
def test_reduction(size):
    td, loss = batch(size=size), make()
    mean = loss(td)
    loss.reduction = "none"
    found = loss(td)
    for key in TERMS:
        assert found[key].shape == td.shape
        torch.testing.assert_close(found[key].mean(), mean[key])


def test_nested_keys():
    td = batch()
    expected = make(goal=True)(td)
    nested = TensorDict(
        x=TensorDict(state=td["observation"], chunk=td["action"]),
        g=TensorDict(value=td["value_goal"], actor=td["actor_goal"]),
        z=td.select("model_noise", "member", "actor_model_noise", "actor_member"),
        next=TensorDict(
            x=TensorDict(state=td["next", "observation"]),
            **td["next"].select("reward", "done", "terminated"),
        ),
    ).auto_batch_size_(1)
    loss = make(("x", "state"), ("x", "chunk"), goal=True)
    names = ("model_noise", "member", "actor_model_noise", "actor_member")
    loss.set_keys(
        value_goal=("g", "value"), actor_goal=("g", "actor"), **{key: ("z", key) for key in names}
    )
    assert set(loss.in_keys) <= set(nested.keys(True, True))
    found = loss(nested)
    for key in TERMS:
        torch.testing.assert_close(found[key], expected[key])


def test_goals_of_critic_and_actor():
    loss, td = make(goal=True), batch()
    before = loss(td)
    critic = loss(td.clone().set("actor_goal", torch.randn(B, G)))
    actor = loss(td.clone().set("value_goal", torch.randn(B, G)))
    for key in TERMS:
        assert torch.equal(before[key], critic[key]) == (key != "loss_actor")
        assert torch.equal(before[key], actor[key]) == (key == "loss_actor")


@pytest.mark.parametrize("ensemble", [False, True])
def test_dispatch_and_drawn_noise(ensemble):
    loss, td = make(ensemble=ensemble), batch()
    inputs = {("_".join(k) if isinstance(k, tuple) else k): td[k] for k in loss.in_keys}
    first, second = loss(**inputs), loss(**inputs)
    assert len(first) == len(loss.out_keys)
    assert all(value.isfinite().all() for value in first)
    assert torch.equal(first[0], second[0]) != ensemble  # each rollout is another one


def test_validation_sees_the_same_numbers():
    loss, td = make(), batch()
    expected = loss(td)
    with torch.no_grad():
        found = loss(td)
    for key in TERMS:
        torch.testing.assert_close(found[key], expected[key])


def test_mixed_precision_keeps_all_gradients():
    td, full, mixed = batch(), make(), make()
    mixed.sampling_dtype = torch.bfloat16
    sum(full(td)[key] for key in TERMS).backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed(td)
    sum(out[key] for key in TERMS).backward()
    for p, q in zip(full.parameters(), mixed.parameters(), strict=True):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager(case):
    torch._dynamo.reset()
    td, eager, compiled = batch(case["h"]), make(**case), make(**case)
    call = torch.compile(compiled, fullgraph=True, backend="eager")
    for forward in (eager, call):
        out = forward(td.clone())
        sum(out[key] for key in TERMS).backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1.5}, "lmbda must be between 0 and 1, got 1.5"),
        ({"expectile": -0.1}, "expectile must be between"),
        ({"model_batch_ratio": 2.0}, "model_batch_ratio must be between"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_numbers_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_noise_of_another_horizon_is_refused():
    loss, td = make(), batch()
    td["model_noise"] = td["model_noise"][:, 1:]
    with pytest.raises(ValueError, match=r"'model_noise' has shape \(5, 3, 3\)"):
        loss(td)


if __name__ == "__main__":
    pytest.main([__file__])
