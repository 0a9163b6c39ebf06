from __future__ import annotations

import dataclasses

import pytest
import torch
from assembly import Size, make_batch, make_mac
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.data import Bounded, Unbounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.value.functional import generalized_advantage_estimate

from torchrl_mac.envs import ChunkedWorldModelEnv
from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    OneStepPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss, FlowBCLoss, ValueExpansionLoss
from torchrl_mac.trainers import LossUpdate

B, OBS, H, A, N, K = 6, 4, 3, 2, 5, 4
D = H * A
CELLS = [8, 8]


SIZE = Size(CELLS, B, N, K, 3, OBS, A, H)


def batch(size=(B,)):
    return make_batch(SIZE, size)


def flow_bc(**kwargs):
    return make_mac(SIZE, behaviour=kwargs)["behaviour"]


def model_loss(**kwargs):
    return make_mac(SIZE, world_model=kwargs)["world_model"]


def value_expansion(**kwargs):
    loss = make_mac(SIZE, values=kwargs)["values"]
    # Some rollouts must end early, or masks would not be tested.
    torch.nn.init.constant_(loss.world_model.termination_network.layers[-1].bias, -0.3)
    if loss.delay_value:
        SoftUpdate(loss, tau=0.1)  # silences the warning of a target without an updater
        loss.target_value_network_params.apply_(lambda x: x.data.add_(0.1 * torch.randn_like(x)))
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    return loss


LOSSES = [flow_bc, model_loss, value_expansion]
TERMS = {
    "loss_flow": (flow_bc, ["flow_policy_params"]),
    "loss_distillation": (flow_bc, ["onestep_policy_params"]),
    "loss_dynamics": (model_loss, ["world_model_params.dynamics_network"]),
    "loss_reward": (model_loss, ["world_model_params.reward_network"]),
    "loss_termination": (model_loss, ["world_model_params.termination_network"]),
    "loss_value": (value_expansion, ["value_network_params"]),
    "loss_qvalue": (value_expansion, ["qvalue_network_params"]),
}


class TestExactNumbers:
    def test_flow_bc(self):
        loss, td = flow_bc(), batch()
        out = loss(td)
        s, a = td["observation"], td["action"].flatten(1)
        x0, t, z = td["flow_noise"], td["flow_time"], td["distillation_noise"]
        network = loss.flow_policy.module.velocity_network
        velocity = network(torch.cat([s, (1 - t) * x0 + t * a, t], 1))
        torch.testing.assert_close(out["loss_flow"], F.mse_loss(velocity, a - x0))
        x = z
        for i in range(3):
            x = x + network(torch.cat([s, x, torch.full((B, 1), i / 3)], 1)) / 3
        student = loss.onestep_policy.module.network(torch.cat([s, z], 1))
        torch.testing.assert_close(out["loss_distillation"], F.mse_loss(student, x.clamp(-1, 1)))

    def test_a_student_without_a_teacher(self):
        loss, td = flow_bc(teacher=False), batch()
        network, a = loss.onestep_policy.module.network, td["action"].flatten(1)
        student = network(torch.cat([td["observation"], td["distillation_noise"]], 1))
        out = loss(td)
        torch.testing.assert_close(out["loss_distillation"], F.mse_loss(student, a))
        # it is the flow matching of a flow whose one Euler step the student is
        x0, flow = td["distillation_noise"], FlowMatchingPolicy(torch.nn.Identity(), D, 1)
        flow.module.velocity = lambda s, x, t: network(torch.cat([s, x], 1)) - x
        torch.testing.assert_close(flow(td["observation"], x0), student.clamp(-1, 1))
        matching = FlowBCLoss(flow)
        td.update({"flow_noise": x0, "flow_time": torch.zeros(B, 1)})
        torch.testing.assert_close(matching(td)["loss_flow"], out["loss_distillation"])
        out["loss_distillation"].backward()
        for name, parameter in loss.named_parameters():
            assert (parameter.grad is not None) == name.startswith("onestep_policy_params"), name
        td["valid"] = torch.zeros(B, H, 1, dtype=torch.bool)
        assert loss(td)["loss_distillation"] == 0

    def test_world_model(self):
        loss, td = model_loss(), batch()
        out = loss(td)
        s, a, model = td["observation"], td["action"].flatten(1), loss.world_model
        x = torch.cat([s, a], 1)
        following = td["next"]
        p = model.termination_network(x).sigmoid()
        y = following["terminated"].float()
        expected = {
            "loss_dynamics": F.mse_loss(s + model.dynamics_network(x), following["observation"]),
            "loss_reward": F.mse_loss(model.reward_network(x), following["reward"]),
            "loss_termination": -(y * p.log() + (1 - y) * (1 - p).log()).mean(),
        }
        for key, value in expected.items():
            torch.testing.assert_close(out[key], value)

    @pytest.mark.parametrize("ignore_terminated", [False, True])
    def test_value_expansion_against_a_slow_loop(self, ignore_terminated):
        loss, td = value_expansion(ignore_terminated=ignore_terminated), batch()
        out = loss(td)
        model, policy = loss.world_model, loss.actor_network.policy.module
        qvalue, value = loss.qvalue_network.module, loss.value_network.module
        gamma, lmbda = 0.9**H, 0.8

        def target(s):
            with loss.target_value_network_params.to_module(loss.value_network):
                return value(s)

        states, rewards, masks, first = [td["observation"]], [], [], None
        with torch.no_grad():
            for k in range(K):
                s, chunks = states[-1], []
                for b in range(B):
                    c = [policy(s[b], td["noise"][b, k, n]) for n in range(N)]
                    q = [qvalue(torch.cat([s[b], a])) for a in c]
                    chunks.append(c[max(range(N), key=lambda n: q[n].item())])
                x = torch.cat([s, torch.stack(chunks)], 1)
                first = x if first is None else first
                rewards.append(model.reward_network(x))
                masks.append((model.termination_network(x).sigmoid() <= 0.5).float())
                states.append(s + model.dynamics_network(x))
            assert 0 < torch.stack(masks).mean() < 1
            if ignore_terminated:
                masks = [torch.ones_like(mask) for mask in masks]
            returns, following = [], target(states[-1])
            for k in reversed(range(K)):
                blend = (1 - lmbda) * target(states[k + 1]) + lmbda * following
                following = rewards[k] + gamma * masks[k] * blend
                returns.insert(0, following)
            q_target = rewards[0] + gamma * masks[0] * value(states[1])
        errors = [(value(states[k]) - returns[k]).square().mean() for k in range(K)]
        torch.testing.assert_close(out["loss_value"], torch.stack(errors).mean())
        torch.testing.assert_close(out["loss_qvalue"], F.mse_loss(qvalue(first), q_target))

    def test_returns_are_gae_plus_value(self):
        loss, td = value_expansion(), batch()
        rollout = loss.imagine(td)
        with torch.no_grad(), loss.target_value_network_params.to_module(loss.value_network):
            value = loss.value_network.module(rollout["observation"])
            following = loss.value_network.module(rollout["next", "observation"])
        done = rollout["next", "done"]
        _, target = generalized_advantage_estimate(
            0.9**H, 0.8, value, following, rollout["next", "reward"], done=done, terminated=done
        )
        torch.testing.assert_close(loss.value_target(rollout), target)

    def test_default_gamma_is_per_environment_step(self):
        loss = value_expansion()
        loss.make_value_estimator()
        assert loss.value_estimator.gamma.item() == pytest.approx(0.999**H)
        assert loss.value_estimator.lmbda.item() == 1.0

    @pytest.mark.parametrize("kind", ValueExpansionLoss.SUPPORTED_VALUE_ESTIMATORS)
    def test_value_estimators(self, kind):
        loss, td = value_expansion(), batch()
        loss.make_value_estimator(kind, gamma=0.9)
        rollout = loss.imagine(td)
        last = loss.value_target(rollout)[:, -1]  # the same for all: nothing follows
        final = rollout[:, -1]
        with torch.no_grad(), loss.target_value_network_params.to_module(loss.value_network):
            following = loss.value_network.module(final["next", "observation"])
        alive = ~final["next", "terminated"]
        torch.testing.assert_close(last, final["next", "reward"] + 0.9**H * alive * following)
        with pytest.raises(NotImplementedError, match="GAE"):
            loss.make_value_estimator(ValueEstimators.GAE)


class TestGradients:
    @pytest.mark.parametrize("term", TERMS)
    def test_each_term_trains_its_own_network(self, term):
        make, trained = TERMS[term]
        loss = make()
        loss(batch())[term].backward()
        for name, parameter in loss.named_parameters():
            inside = any(name.startswith(prefix) for prefix in trained)
            has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert has_gradient == inside, name

    def test_imagination_trains_nothing_else(self):
        loss = value_expansion()
        sum(loss(batch()).values()).backward()
        outside = [loss.actor_network.policy, loss.world_model]
        assert all(p.grad is None for module in outside for p in module.parameters())
        targets = loss.target_value_network_params
        assert all(p.grad is None for p in targets.values(True, True))
        theirs = {id(p) for module in outside for p in module.parameters()}
        assert not theirs & {id(p) for p in loss.parameters()}

    @pytest.mark.parametrize("term", TERMS)
    def test_a_selected_term_is_the_same_and_alone(self, term):
        loss, td = TERMS[term][0](), batch()
        every = loss(td)
        loss.select_out_keys(term)
        out = loss(td)
        assert list(out.keys()) == [term]
        torch.testing.assert_close(out[term], every[term])
        loss.reset_out_keys()
        assert set(loss(td).keys()) == set(every.keys())


class TestInterface:
    @pytest.mark.parametrize("make", LOSSES)
    @pytest.mark.parametrize("size", [(B,), (2, 3)])
    def test_reduction(self, make, size):
        td = batch(size)
        loss = make()
        mean = loss(td)
        loss.reduction = "none"
        none = loss(td)
        loss.reduction = "sum"
        total = loss(td)
        for key in mean.keys():
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
        assert all(value.shape == () for value in single.values())

    @pytest.mark.parametrize("make", LOSSES)
    def test_dispatch(self, make):
        loss, td = make(), batch()
        given = {"_".join(k) if isinstance(k, tuple) else k: td[k] for k in loss.in_keys}
        out = loss(**given)
        assert len(out) == len(loss.out_keys)
        assert all(torch.isfinite(value) for value in out)

    @pytest.mark.parametrize("make", LOSSES)
    def test_priority_weights(self, make):
        loss, td = make(), batch()
        loss.reduction = "none"
        each = loss(td)
        loss.reduction = "mean"
        weight = torch.rand(B)
        td["priority_weight"] = weight
        for key, value in loss(td).items():
            torch.testing.assert_close(value, (each[key] * weight).sum() / weight.sum())

    def test_noise_is_drawn_when_absent(self):
        for make in LOSSES:
            loss = make()
            td = batch().exclude("flow_noise", "flow_time", "distillation_noise", "noise")
            terms = [key for key in loss.out_keys if key not in ("loss_dynamics", "loss_reward")]
            first, second = loss(td), loss(td)
            if make is not model_loss:
                assert all(first[key] != second[key] for key in terms)

    def test_nested_keys(self):
        td = batch()
        nested = TensorDict(
            x=TensorDict(state=td["observation"], chunk=td["action"], z=td["noise"]),
            n=TensorDict(a=td["flow_noise"], b=td["flow_time"], c=td["distillation_noise"]),
            next=TensorDict(
                x=TensorDict(state=td["next", "observation"]),
                y=TensorDict(r=td["next", "reward"], end=td["next", "terminated"]),
            ),
        )
        state, chunk = ("x", "state"), ("x", "chunk")

        plain = flow_bc()
        velocity = plain.flow_policy.module.velocity_network
        flow = FlowMatchingPolicy(velocity, D, 3, in_keys=[state, ("n", "a")])
        network = plain.onestep_policy.module.network
        student = OneStepPolicy(network, D, in_keys=[state, ("n", "c")])
        loss = FlowBCLoss(flow, student)
        loss.set_keys(
            action=chunk,
            flow_noise=("n", "a"),
            flow_time=("n", "b"),
            distillation_noise=("n", "c"),
        )
        self._same(loss(nested), plain(td))

        plain = model_loss()
        networks = plain.world_model
        keys = {"reward_key": ("y", "r"), "done_key": ("y", "d"), "terminated_key": ("y", "end")}
        model = ChunkedWorldModel(
            networks.dynamics_network,
            networks.reward_network,
            networks.termination_network,
            observation_key=state,
            action_key=chunk,
            **keys,
        )
        loss = ChunkedWorldModelLoss(model)
        loss.set_keys(observation=state, reward=("y", "r"), terminated=("y", "end"))
        self._same(loss(nested), plain(td))

        plain = value_expansion()
        networks = plain.world_model
        model = ChunkedWorldModel(
            networks.dynamics_network,
            networks.reward_network,
            networks.termination_network,
            observation_key=state,
            action_key=chunk,
            **keys,
        )
        policy = OneStepPolicy(
            plain.actor_network.policy.module.network, D, in_keys=[state, ("x", "z")]
        )
        value = ValueOperator(
            plain.value_network.module, in_keys=[state], out_keys=[("v", "state")]
        )
        qvalue = ValueOperator(
            plain.qvalue_network.module, in_keys=[state, chunk], out_keys=[("v", "action")]
        )
        actor = FlowRejectionActor(
            policy,
            qvalue,
            num_candidates=N,
            chunk_size=H,
            action_key=chunk,
            noise_key=("x", "z"),
            value_key=("v", "best"),
        )
        loss = ValueExpansionLoss(actor, value, qvalue, model, imagination_horizon=K)
        loss.set_keys(
            value=("v", "state"),
            state_action_value=("v", "action"),
            reward=("y", "r"),
            done=("y", "d"),
            terminated=("y", "end"),
            noise=("x", "z"),
        )
        loss.make_value_estimator(gamma=0.9, lmbda=0.8)
        SoftUpdate(loss, tau=0.1)
        loss.target_value_network_params.data.update_(plain.target_value_network_params.data)
        self._same(loss(nested), plain(td))

    @staticmethod
    def _same(ours, theirs):
        assert set(ours.keys()) == set(theirs.keys())
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key])

    @pytest.mark.parametrize("make", LOSSES)
    def test_unknown_keys(self, make):
        with pytest.raises(ValueError, match="not an accepted tensordict key"):
            make().set_keys(nothing="x")

    @pytest.mark.parametrize("name", ["imagination_horizon", "chunk_size"])
    def test_out_of_range(self, name):
        loss = value_expansion()
        args = loss.actor_network, loss.value_network, loss.qvalue_network, loss.world_model
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ValueExpansionLoss(*args, **{name: 0})

    @pytest.mark.parametrize("make", LOSSES)
    def test_state_dict_round_trip(self, make):
        td = batch()
        torch.manual_seed(0)
        one = make()
        torch.manual_seed(1)
        other = make()
        if make is value_expansion:  # what a loss only reads is not in its state
            other.__dict__["world_model"] = one.world_model
            other.actor_network.policy = one.actor_network.policy
        other.load_state_dict(one.state_dict())
        self._same(other(td), one(td))

    def test_rollout_layout(self):
        loss, td = value_expansion(), batch((2, 3))
        rollout = loss.imagine(td)
        assert rollout.shape == (2, 3, K)
        assert rollout["action"].shape == (2, 3, K, H, A)
        assert torch.equal(rollout["observation"][:, :, 0], td["observation"])
        assert torch.equal(
            rollout["observation"][:, :, 1:], rollout["next", "observation"][:, :, :-1]
        )

    def test_imagination_equals_the_environment(self):
        loss, start = value_expansion(), batch().select("observation", "noise")
        # An environment starts anew where the task ends; imagination goes on.
        torch.nn.init.constant_(loss.world_model.termination_network.layers[-1].bias, -100.0)
        env = ChunkedWorldModelEnv(
            loss.world_model, Unbounded(OBS), Bounded(-1, 1, (A,)), chunk_size=H
        )
        noise = start.pop("noise")
        steps = iter(noise.unbind(1))

        def policy(tensordict):
            return loss.actor_network(tensordict.set("noise", next(steps)))

        with torch.no_grad():
            theirs = env.rollout(
                K, policy, tensordict=start.clone(), set_state=True, break_when_any_done=False
            )
        ours = loss.imagine(start.set("noise", noise))
        next_keys = [("next", key) for key in ("observation", "reward", "terminated", "done")]
        for key in ("observation", "action", "chosen_action_value", *next_keys):
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=1e-6)


class TestUpdate:
    def test_the_target_lags_one_step(self):
        loss = value_expansion()
        updater = SoftUpdate(loss, tau=0.1)
        loss.target_value_network_params.apply_(lambda x: x.data.add_(torch.randn_like(x)))
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
        before = loss.value_network_params.data.clone()
        target = loss.target_value_network_params.data.clone()
        LossUpdate([loss], optimizer, updater)(batch())
        expected = before * 0.1 + target * 0.9
        after = loss.target_value_network_params.data
        torch.testing.assert_close(
            after.flatten_keys().to_dict(), expected.flatten_keys().to_dict()
        )
        moved = loss.value_network_params.data * 0.1 + target * 0.9
        assert any((after[k] - moved[k]).abs().max() > 1e-3 for k in moved.keys(True, True))

    def test_one_optimizer_step_on_the_sum(self):
        torch.manual_seed(0)
        losses = [flow_bc(), model_loss()]
        torch.manual_seed(0)
        others = [flow_bc(), model_loss()]
        td = batch()
        optimizer = torch.optim.SGD([p for loss in losses for p in loss.parameters()], lr=0.1)
        metrics = LossUpdate(losses, optimizer)(td)
        assert not any(value.requires_grad for value in metrics.values())
        for loss in others:
            sum(loss(td).values()).backward()
        for ours, theirs in zip(losses, others, strict=True):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p.data, q.data - 0.1 * q.grad)


@pytest.fixture
def less_to_trace(monkeypatch):
    """Loops of two turns and networks of one layer."""
    size = dataclasses.replace(SIZE, cells=[8], horizon=2, flow_steps=2)
    monkeypatch.setitem(globals(), "SIZE", size)


@pytest.mark.parametrize("make", LOSSES)
def test_compiled_equals_eager_over_three_steps(make, less_to_trace):
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make())
    eager, compiled = losses
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in losses]
    for _ in range(3):
        td = batch()
        for call, optimizer in zip((eager, forward), optimizers, strict=True):
            optimizer.zero_grad()
            sum(call(td.clone()).values()).backward()
            optimizer.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor_compiles_imagination(less_to_trace):
    torch._dynamo.reset()
    torch.manual_seed(0)
    loss, td = value_expansion(), batch()
    expected = loss(td.clone())
    out = torch.compile(loss, fullgraph=True)(td.clone())
    for key, value in out.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("make", LOSSES)
def test_losses_on_cuda(make):
    loss, td = make(), batch()
    expected = loss(td)
    loss.to("cuda")
    if make is value_expansion:
        loss.actor_network.to("cuda")
        loss.world_model.to("cuda")
    for key, value in loss(td.to("cuda")).items():
        torch.testing.assert_close(value.cpu(), expected[key], atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
