from __future__ import annotations

import pytest
import torch
import torchrl
from tensordict import TensorDict
from torch.distributions import Normal
from torch.nn import functional as F
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedQValueLoss, ChunkedSACLoss, FlowBCLoss, FQLLoss

B, OBS, H, A, N, E, F_STEPS, GAMMA = 6, 4, 3, 2, 5, 3, 3, 0.9
D = H * A
CELLS = [8, 8]
STATE, CHUNK = ("x", "state"), ("x", "chunk")
NEXT_KEYS = {"reward": ("y", "r"), "done": ("y", "d"), "terminated": ("y", "end")}


def batch(size=(B,)):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        action=torch.rand(*size, H, A) * 1.9 - 0.95,
        valid=torch.rand(*size, H, 1) < 0.7,
        steps_to_next_obs=torch.randint(1, H + 1, (*size, 1)),
        flow_noise=torch.randn(*size, D),
        flow_time=torch.rand(*size, 1),
        actor_noise=torch.randn(*size, D),
        next_noise=torch.randn(*size, D),
        candidates_noise=torch.randn(*size, N, D),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.randn(*size, 1),
            done=torch.rand(*size, 1) < 0.5,
            terminated=torch.rand(*size, 1) < 0.3,
            batch_size=size,
        ),
        batch_size=size,
    )


def shifted(module):
    """Parameters away from their initial values, biases that are not zero included."""
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return module


def critics(state="observation", chunk="action", **kwargs):
    network = shifted(StackedMLP(E, OBS + D, 1, CELLS, broadcast=True))
    return QValueEnsemble(network, in_keys=[state, chunk], **kwargs)


def flow_policy(state="observation"):
    network = shifted(NormedMLP(OBS + D + 1, D, CELLS))
    return FlowMatchingPolicy(network, D, F_STEPS, in_keys=[state, "noise"])


def onestep_policy(state="observation"):
    return OneStepPolicy(shifted(NormedMLP(OBS + D, D, CELLS)), D, in_keys=[state, "noise"])


def finished(loss):
    SoftUpdate(loss, tau=0.1)
    loss.target_qvalue_network_params.apply_(lambda x: x.data.add_(0.1 * torch.randn_like(x)))
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def best_of_n(state="observation", chunk="action", aggregation="mean", **kwargs):
    qvalue = critics(state, chunk, q_aggregation=aggregation)
    actor = FlowRejectionActor(
        flow_policy(state), qvalue, num_candidates=N, chunk_size=H, action_key=chunk
    )
    loss = finished(ChunkedQValueLoss(actor, qvalue, **kwargs))
    loss.set_keys(next_noise="candidates_noise")
    return loss


def fql(state="observation", chunk="action", aggregation="mean", **kwargs):
    qvalue = critics(state, chunk, q_aggregation=aggregation)
    return finished(FQLLoss(flow_policy(state), onestep_policy(state), qvalue, alpha=7.0, **kwargs))


def sac(state="observation", chunk="action", aggregation="mean", **kwargs):
    network = shifted(NormedMLP(OBS, 2 * D, CELLS))
    policy = TanhGaussianPolicy(network, D, in_keys=[state, "noise"])
    qvalue = critics(state, chunk, q_aggregation=aggregation)
    kwargs = {"alpha_init": 0.7, "bc_alpha": 0.3, **kwargs}
    return finished(ChunkedSACLoss(policy, qvalue, **kwargs))


LOSSES = [best_of_n, fql, sac]
TERMS = {
    (best_of_n, "loss_qvalue"): ["qvalue_network_params"],
    (fql, "loss_flow"): ["flow_policy_params"],
    (fql, "loss_actor"): ["actor_network_params"],
    (fql, "loss_qvalue"): ["qvalue_network_params"],
    (sac, "loss_actor"): ["actor_network_params"],
    (sac, "loss_qvalue"): ["qvalue_network_params"],
    (sac, "loss_alpha"): ["log_alpha"],
    (sac, "loss_bc"): ["actor_network_params"],
}


def member_values(loss, observation, chunk, target=False):
    """The critics one by one, by networks of their own."""
    params = loss.target_qvalue_network_params if target else loss.qvalue_network_params
    with params.to_module(loss.qvalue_network):
        networks = [loss.qvalue_network.network.network(e) for e in range(E)]
    return torch.stack([network(observation, chunk).squeeze(-1) for network in networks]).detach()


def euler(policy, observation, noise):
    x = noise
    for i in range(F_STEPS):
        time = torch.full_like(x[..., :1], i / F_STEPS)
        velocity = policy.module.velocity_network(torch.cat([observation, x, time], -1))
        x = x + velocity / F_STEPS
    return x.clamp(-1, 1)


def critic_loss(loss, td, next_chunk, aggregation):
    """One sample and one critic at a time."""
    following, total = td["next"], 0.0
    targets = member_values(loss, following["observation"], next_chunk, target=True)
    values = member_values(loss, td["observation"], td["action"].flatten(1))
    for b in range(B):
        per_critic = [targets[e, b].item() for e in range(E)]
        bootstrap = min(per_critic) if aggregation == "min" else sum(per_critic) / E
        alive = not following["terminated"][b].item()
        k = td["steps_to_next_obs"][b].item()
        y = following["reward"][b].item() + GAMMA**k * alive * bootstrap
        whole = following.get("whole", torch.ones(B, 1))[b].item()
        total += sum(whole * (values[e, b].item() - y) ** 2 for e in range(E))
    return torch.tensor(total / (E * B))


@pytest.mark.parametrize("aggregation", ["mean", "min"])
class TestExactNumbers:
    @pytest.mark.parametrize("masked", [False, True])
    def test_best_of_n(self, aggregation, masked):
        loss, td = best_of_n(aggregation=aggregation), batch()
        if masked:
            td["next", "whole"] = torch.tensor([[i % 2 == 0] for i in range(B)])
        state, chosen = td["next", "observation"], []
        with torch.no_grad():
            for b in range(B):
                z = td["candidates_noise"][b]
                x = torch.stack(
                    [euler(loss.actor_network.policy, state[b], z[n]) for n in range(N)]
                )
                members = member_values(loss, state[b].expand(N, -1), x)
                ranked = members.min(0).values if aggregation == "min" else members.mean(0)
                chosen.append(x[max(range(N), key=lambda n: ranked[n].item())])
        expected = critic_loss(loss, td, torch.stack(chosen), aggregation)
        out = loss(td)
        torch.testing.assert_close(out["loss_qvalue"], expected, rtol=1e-5, atol=1e-5)
        error = td["td_error"]
        assert error.shape == (B,)
        if masked:
            assert (error[1::2] == 0).all()
            assert (error[::2] > 0).all()

    def test_fql(self, aggregation):
        loss, td = fql(aggregation=aggregation), batch()
        out = loss(td)
        s, z = td["observation"], td["actor_noise"]
        chunk = td["action"].flatten(1)
        x0, t = td["flow_noise"], td["flow_time"]
        network = loss.flow_policy.module.velocity_network
        velocity = network(torch.cat([s, (1 - t) * x0 + t * chunk, t], 1))
        error = (velocity - (chunk - x0)).square().unflatten(1, (H, A)) * td["valid"]
        torch.testing.assert_close(out["loss_flow"], error.mean())

        student = loss.actor_network.module.network(torch.cat([s, z], 1))
        distance = F.mse_loss(student, euler(loss.flow_policy, s, z))
        value = member_values(loss, s, student.clamp(-1, 1)).mean()
        torch.testing.assert_close(out["loss_actor"], 7.0 * distance - value)

        following = td["next", "observation"]
        network = loss.actor_network.module.network
        next_chunk = network(torch.cat([following, td["next_noise"]], 1)).clamp(-1, 1)
        expected = critic_loss(loss, td, next_chunk, aggregation)
        torch.testing.assert_close(out["loss_qvalue"], expected, rtol=1e-5, atol=1e-5)

    def test_sac(self, aggregation):
        loss, td = sac(aggregation=aggregation), batch()
        out = loss(td)

        def normal(observation):
            mean, log_std = loss.actor_network.module.network(observation).chunk(2, -1)
            return Normal(mean, log_std.clamp(-20, 2).exp())

        def log_prob(observation, x):
            """Of tanh(x), with the derivative of tanh as a textbook has it."""
            slope = 1 - x.double().tanh().square()
            return (normal(observation).log_prob(x) - slope.log()).sum(-1).float()

        s, chunk = td["observation"], td["action"].flatten(1)
        x = normal(s).mean + normal(s).stddev * td["actor_noise"]
        value = member_values(loss, s, x.tanh()).mean(0)
        entropy = -log_prob(s, x).mean()
        torch.testing.assert_close(out["loss_actor"], (0.7 * log_prob(s, x) - value).mean())
        torch.testing.assert_close(out["entropy"], entropy.detach())
        torch.testing.assert_close(out["alpha"], torch.tensor(0.7))
        torch.testing.assert_close(out["loss_alpha"], 0.7 * (entropy + 0.5 * D))
        torch.testing.assert_close(out["loss_bc"], -0.3 * log_prob(s, chunk.atanh()).mean())
        following = normal(td["next", "observation"])
        next_chunk = (following.mean + following.stddev * td["next_noise"]).tanh()
        expected = critic_loss(loss, td, next_chunk, aggregation)
        torch.testing.assert_close(out["loss_qvalue"], expected, rtol=1e-5, atol=1e-5)


def test_the_way_is_a_chunk_long_where_nothing_says_how_long():
    loss, td = best_of_n(), batch()
    assert loss.chunk_size == H  # the actor's
    td["steps_to_next_obs"] = torch.full((B, 1), H)
    expected = loss(td)["loss_qvalue"]
    torch.testing.assert_close(loss(td.exclude("steps_to_next_obs"))["loss_qvalue"], expected)


def test_a_list_of_critics_is_an_ensemble():
    loss, td = fql(), batch()
    alone = []
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        with params.to_module(loss.qvalue_network):
            networks = [loss.qvalue_network.network.network(e) for e in range(E)]
        keys = {"in_keys": ["observation", "action"]}
        alone.append([ValueOperator(network, **keys) for network in networks])
    other = FQLLoss(loss.flow_policy, loss.actor_network, alone[0], num_qvalue_nets=E, alpha=7.0)
    for name in ("flow_policy", "actor_network"):  # emptied when the first loss was made
        getattr(other, f"{name}_params").data.update_(getattr(loss, f"{name}_params").data)
    finished(other)
    targets = torch.stack([TensorDict.from_module(critic) for critic in alone[1]])
    other.target_qvalue_network_params.data.update_(targets.data)
    for key, value in other(td).items():
        torch.testing.assert_close(value, loss(td)[key])


@pytest.mark.skipif(
    not hasattr(torchrl.objectives, "FQLLoss"), reason="of TorchRL's development branch"
)
@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_it_is_the_loss_of_torchrl(aggregation):
    def make(flow, onestep, loss, **kwargs):
        torch.manual_seed(0)
        cells = {"num_cells": CELLS}
        critics = [
            ValueOperator(NormedMLP(OBS + D, 1, **cells), in_keys=["observation", "action"])
            for _ in range(2)
        ]
        policies = (
            flow(NormedMLP(OBS + D + 1, D, **cells), D, F_STEPS),
            onestep(NormedMLP(OBS + D, D, **cells), D),
        )
        loss = loss(*policies, critics, alpha=7.0, q_aggregation=aggregation, **kwargs)
        SoftUpdate(loss, tau=0.1)
        loss.make_value_estimator(gamma=GAMMA)
        return loss

    ours = make(FlowMatchingPolicy, OneStepPolicy, FQLLoss)
    modules = torchrl.modules
    theirs = make(modules.FlowMatchingPolicy, modules.OneStepPolicy, torchrl.objectives.FQLLoss)
    assert ours.out_keys == theirs.out_keys
    td = batch().select("observation", "action", "next")
    td["action"] = td["action"].flatten(1)
    assert {*theirs.in_keys} == {*ours.in_keys}
    results = []
    for loss in (ours, theirs):
        torch.manual_seed(1)
        results.append(loss(td.clone()))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value)


def test_squared_cloning_is_a_part_of_the_actor_s_term():
    plain, td = sac(bc_alpha=0.0), batch()
    assert "loss_bc" not in plain.out_keys
    expected = plain(td)["loss_actor"]
    s, noise = td["observation"], td["actor_noise"]
    action = plain.actor_network.module(s, noise)
    size = member_values(plain, s, action).mean(0).abs().mean()
    distance = 0.0
    for ours, theirs in zip(action.tolist(), td["action"].flatten(1).tolist(), strict=True):
        distance += sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)) / B
    plain.bc, plain.bc_alpha = "squared", 0.3
    out = plain(td)
    assert set(out.keys()) == {*plain.out_keys, "pred_value", "target_value"}
    torch.testing.assert_close(out["loss_actor"], expected + 0.3 * size * distance)
    out["loss_actor"].backward()
    assert all(p.grad is None for p in plain.qvalue_network_params.values(True, True))
    plain.reduction = "none"
    each = plain(td)["loss_actor"]
    assert each.shape == (B,)
    torch.testing.assert_close(each.mean(), out["loss_actor"])


def test_normalised_q():
    plain, td = fql(), batch()
    _, parts = plain.actor_loss(td)
    plain.normalize_q_loss = True
    loss, normalised = plain.actor_loss(td)
    expected = parts["q_loss"] / parts["q_loss"].abs().mean()
    torch.testing.assert_close(normalised["q_loss"], expected)
    torch.testing.assert_close(loss, (7.0 * parts["distillation_loss"] + expected).mean())


@pytest.mark.parametrize("make", LOSSES)
def test_targets_in_reduced_precision_are_near(make):
    loss, td = make(), batch()
    exact = loss.target(td)
    loss.sampling_dtype = torch.bfloat16
    reduced = loss.target(td)
    assert reduced.dtype == torch.float32
    assert not torch.equal(reduced, exact)
    torch.testing.assert_close(reduced, exact, rtol=0.05, atol=0.2)


def test_a_flow_without_a_student():
    td, flow = batch(), flow_policy()
    loss, both = FlowBCLoss(flow), FlowBCLoss(flow, onestep_policy())
    assert loss.out_keys == ["loss_flow"]
    assert loss.in_keys == ["observation", "action"]
    torch.testing.assert_close(loss(td)["loss_flow"], both(td)["loss_flow"])
    td["valid"] = torch.zeros_like(td["valid"])
    assert loss(td)["loss_flow"] == 0
    td["valid"][:, 0] = True
    first = loss(td)["loss_flow"]
    del td["valid"]
    assert 0 < first < loss(td)["loss_flow"]


class TestGradients:
    @pytest.mark.parametrize(("make", "term"), TERMS)
    def test_each_term_trains_its_own_network(self, make, term):
        loss = make()
        loss(batch())[term].backward()
        trained = TERMS[make, term]
        for name, parameter in loss.named_parameters():
            inside = any(name.startswith(prefix) for prefix in trained)
            has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert has_gradient == inside, name

    def test_the_behaviour_is_not_trained_by_critics(self):
        loss = best_of_n()
        loss(batch())["loss_qvalue"].backward()
        assert all(p.grad is None for p in loss.actor_network.policy.parameters())

    @pytest.mark.parametrize(("make", "term"), TERMS)
    def test_a_selected_term_is_the_same_and_alone(self, make, term):
        loss, td = make(), batch()
        every = loss(td)
        loss.select_out_keys(term)
        out = loss(td)
        assert [key for key in out.keys() if key.startswith("loss_")] == [term]
        torch.testing.assert_close(out[term], every[term])
        loss.reset_out_keys()
        assert set(loss(td).keys()) == set(every.keys())

    def test_saturated_actions_have_finite_densities(self):
        loss, td = sac(), batch()
        torch.nn.init.constant_(
            loss.actor_network_params["module", "network", "layers", "6", "bias"], 40.0
        )
        out = loss(td)
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        assert all(value.isfinite().all() for value in out.values())
        assert all(p.grad.isfinite().all() for p in loss.parameters())


class TestInterface:
    @pytest.mark.parametrize("make", LOSSES)
    @pytest.mark.parametrize("size", [(B,), (2, 3)])
    def test_reduction(self, make, size):
        td, loss = batch(size), make()
        mean = loss(td)
        loss.reduction = "none"
        none = loss(td)
        loss.reduction = "sum"
        total = loss(td)
        for key in [key for key in mean.keys() if key.startswith("loss_")]:
            assert none[key].shape == td.shape
            torch.testing.assert_close(none[key].mean(), mean[key])
            torch.testing.assert_close(none[key].sum(), total[key])

    @pytest.mark.parametrize("make", LOSSES)
    def test_without_batch_size(self, make):
        loss, td = make(), batch()
        expected = loss(td)
        flat = td.clone()
        flat["next"].batch_size = []
        flat.batch_size = []
        for key, value in loss(flat).items():
            torch.testing.assert_close(value, expected[key])
        single = loss(td[0])
        assert all(single[key].shape == () for key in loss.out_keys if key.startswith("loss_"))

    @pytest.mark.parametrize("make", LOSSES)
    def test_dispatch(self, make):
        loss, td = make(), batch()
        given = {"_".join(k) if isinstance(k, tuple) else k: td[k] for k in loss.in_keys}
        out = loss(**given)
        assert len(out) == len(loss.out_keys)
        assert all(torch.isfinite(value).all() for value in out)

    @pytest.mark.parametrize("make", LOSSES)
    def test_priority_weights(self, make):
        loss, td = make(), batch()
        loss.reduction = "none"
        each = loss(td)
        loss.reduction = "mean"
        td["priority_weight"] = weight = torch.rand(B)
        for key, value in loss(td).items():
            if key.startswith("loss_"):
                torch.testing.assert_close(value, (each[key] * weight).sum() / weight.sum())

    @pytest.mark.parametrize("make", LOSSES)
    def test_nested_keys(self, make):
        td = batch()
        moved = TensorDict(
            x=TensorDict(state=td["observation"], chunk=td["action"]),
            n={"next": td["candidates_noise" if make is best_of_n else "next_noise"]},
            **{key: td[key] for key in ("flow_noise", "flow_time", "actor_noise", "valid")},
            k=td["steps_to_next_obs"],
            next=TensorDict(
                x=TensorDict(state=td["next", "observation"]),
                y=TensorDict(
                    r=td["next", "reward"], d=td["next", "done"], end=td["next", "terminated"]
                ),
            ),
        ).auto_batch_size_(1)
        torch.manual_seed(0)
        expected = make()(td)
        torch.manual_seed(0)
        loss = make(STATE, CHUNK)
        loss.set_keys(
            action=CHUNK,
            steps_to_next_obs="k",
            next_noise=("n", "next"),
            priority=("p", "error"),
            **NEXT_KEYS,
        )
        out = loss(moved)
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value)
        torch.testing.assert_close(moved["p", "error"], td["td_error"])
        assert {*loss.in_keys} <= {*moved.keys(True, True)}

    @pytest.mark.parametrize("make", LOSSES)
    def test_a_goal_is_read_from_the_batch(self, make):
        td, loss = batch(), make()
        assert "goal" not in loss.in_keys
        goal = torch.randn(B, 1)
        wide = td.clone()
        wide["observation"] = td["observation"][:, :-1]
        wide["next", "observation"] = td["next", "observation"][:, :-1]
        wide["value_goal"] = wide["actor_goal"] = goal
        td["observation"][:, -1:] = goal
        td["next", "observation"][:, -1:] = goal
        expected = loss(td)
        modules = [loss.qvalue_network]
        if make is best_of_n:
            actor = loss.actor_network
            actor.policy.in_keys = ["observation", "goal", "noise"]
            actor.in_keys = ["observation", "goal"]
            modules += [actor.qvalue_network]
        else:
            policies = ("flow_policy", "actor_network")
            for policy in [getattr(loss, name) for name in policies if hasattr(loss, name)]:
                policy.in_keys = ["observation", "goal", "noise"]
        for module in modules:
            module.in_keys = ["observation", "goal", "action"]
        for key, value in loss(wide).items():
            torch.testing.assert_close(value, expected[key])

    def test_noise_is_drawn_when_absent(self):
        for make in LOSSES:
            loss = make()
            noises = [key for key in batch().keys() if "noise" in key or key == "flow_time"]
            td = batch().exclude(*noises)
            first, second = loss(td), loss(td)
            for key in first.keys():
                if key not in ("loss_bc", "alpha", "pred_value"):
                    assert not torch.equal(first[key], second[key]), key

    def test_refusals(self):
        loss, td = best_of_n(), batch()
        qvalue = critics()
        with pytest.raises(ValueError, match="ranks candidates with another network"):
            ChunkedQValueLoss(loss.actor_network, qvalue)
        with pytest.raises(ValueError, match=r"q_aggregation='min' is not that of qvalue_network"):
            ChunkedQValueLoss(flow_policy(), qvalue, q_aggregation="min")
        with pytest.raises(ValueError, match=r"must be one of \('mean', 'min'\), got 'max'"):
            FQLLoss(flow_policy(), onestep_policy(), qvalue, q_aggregation="max")
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            FQLLoss(flow_policy(), onestep_policy(), qvalue, chunk_size=0)
        with pytest.raises(ValueError, match="gamma must be above 0"):
            loss.make_value_estimator(gamma=1.5)
        with pytest.raises(ValueError, match="alpha_init must be positive"):
            sac(alpha_init=0.0)
        with pytest.raises(ValueError, match="bc must be one of"):
            sac(bc="cubed")
        with pytest.raises(KeyError, match="reward"):
            loss(td.exclude(("next", "reward")))
        with pytest.raises(ValueError, match="'action' has shape"):
            fql()(td.set("action", td["action"][:, :2]))
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            loss.set_keys(nothing="x")

    @pytest.mark.parametrize("make", LOSSES)
    def test_state_dict_round_trip(self, make):
        td = batch()
        one, other = make(), make()
        if make is best_of_n:  # what a loss only reads is not in its state
            other.actor_network.policy = one.actor_network.policy
        other.load_state_dict(one.state_dict())
        expected = one(td)
        for key, value in other(td).items():
            torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("make", LOSSES)
def test_compiled_equals_eager_over_three_steps(make):
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make())
    eager, compiled = losses
    forward = torch.compile(compiled, fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in losses]
    for _ in range(3):
        td = batch()
        for call, optimizer in zip((eager, forward), optimizers, strict=True):
            optimizer.zero_grad()
            out = call(td.clone())
            sum(value for key, value in out.items() if key.startswith("loss_")).backward()
            optimizer.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("make", LOSSES)
def test_losses_on_cuda(make):
    loss, td = make(), batch()
    expected = loss(td)
    loss.to("cuda")
    if make is best_of_n:
        loss.actor_network.to("cuda")
    for key, value in loss(td.to("cuda")).items():
        torch.testing.assert_close(value.cpu(), expected[key], atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
