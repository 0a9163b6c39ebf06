"""FMPC's losses; their numbers are held against the reference in test/parity."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torchrl.modules import ValueOperator

from torchrl_mac.modules import FlowFutureModel, MLPFutureModel, NormedMLP
from torchrl_mac.objectives import FutureModelLoss, FutureValueLoss

B, OBS, G, A, C, H = 6, 4, 2, 3, 2, 5
D, FUTURE = C * A, H * OBS
CELLS = [8]
KEY = ("future", "observation")


def batch(size=(B,)):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        value_goal=torch.randn(*size, G),
        action=torch.rand(*size, C, A),
        future=TensorDict(observation=torch.randn(*size, H, OBS)),
        return_to_go=torch.rand(*size, 1) * 2 - 0.5,
        future_noise=torch.randn(*size, FUTURE),
        future_time=torch.rand(*size, 1),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.rand(*size, 1) - 0.5,
            terminated=torch.rand(*size, 1) < 0.4,
            done=torch.ones(*size, 1, dtype=torch.bool),
        ),
        batch_size=size,
    )


def flow_loss(state="observation", chunk="action", future=KEY, **kwargs):
    torch.manual_seed(1)
    model = FlowFutureModel(
        NormedMLP(OBS + D + FUTURE + 1, FUTURE, CELLS),
        FUTURE,
        in_keys=[state, chunk, "future_noise"],
    )
    loss = FutureModelLoss(model, **kwargs)
    loss.set_keys(future=future)
    return loss


def mlp_loss(state="observation", chunk="action", future=KEY, **kwargs):
    torch.manual_seed(1)
    model = MLPFutureModel(NormedMLP(OBS + D, FUTURE, CELLS), H, in_keys=[state, chunk])
    loss = FutureModelLoss(model, **kwargs)
    loss.set_keys(future=future)
    return loss


def value_loss(state="observation", chunk="action", future=KEY, loss_function="l2", **kwargs):
    torch.manual_seed(1)
    value = ValueOperator(NormedMLP(OBS + G, 1, CELLS), in_keys=[state, "goal"])
    qvalue = ValueOperator(
        NormedMLP(FUTURE + G + D, 1, CELLS),
        in_keys=[future, "goal", chunk],
        out_keys=["state_action_value"],
    )
    loss = FutureValueLoss(value, qvalue, horizon=H, loss_function=loss_function, **kwargs)
    loss.make_value_estimator(gamma=0.9)
    loss.set_keys(future=future)
    return loss


def bce_loss(*args, **kwargs):
    return value_loss(*args, loss_function="bce", **kwargs)


LOSSES = [flow_loss, mlp_loss, value_loss, bce_loss]
TERMS = {
    (flow_loss, "loss_dynamics"): "future_model_params",
    (mlp_loss, "loss_dynamics"): "future_model_params",
    (value_loss, "loss_value"): "value_network_params",
    (value_loss, "loss_qvalue"): "qvalue_network_params",
    (bce_loss, "loss_value"): "value_network_params",
    (bce_loss, "loss_qvalue"): "qvalue_network_params",
}


def test_a_flow_of_futures():
    loss, td = flow_loss(), batch()
    s, a, x = td["observation"], td["action"].flatten(1), td[KEY].flatten(1)
    x0, t = td["future_noise"], td["future_time"]
    network = loss.future_model.module.velocity_network
    velocity = network(torch.cat([s, a, (1 - t) * x0 + t * x, t], 1))
    torch.testing.assert_close(loss(td)["loss_dynamics"], F.mse_loss(velocity, x - x0))
    td["future", "valid"] = torch.rand(B, H, 1) < 0.5
    error = (velocity - (x - x0)).square().unflatten(1, (H, OBS)) * td["future", "valid"]
    torch.testing.assert_close(loss(td)["loss_dynamics"], error.mean())


def test_an_mlp_of_futures():
    loss, td = mlp_loss(), batch()
    network, total = loss.future_model.network, 0.0
    for b in range(B):
        s = td["observation"][b]
        change = network(torch.cat([s, td["action"][b].flatten()])).unflatten(0, (H, OBS))
        for i in range(H):
            total = total + (s + change[i] - td[KEY][b, i]).square().mean() / (B * H)
    torch.testing.assert_close(loss(td)["loss_dynamics"], total)


@pytest.mark.parametrize("make", [value_loss, bce_loss])
def test_values(make):
    loss, td = make(), batch()
    value, qvalue = loss.value_network.module, loss.qvalue_network.module
    nn.init.constant_(value.layers[-1].bias, 0.7)
    expected = {"loss_value": [], "loss_qvalue": []}
    for row in td:
        goal, following = row["value_goal"], row["next"]
        v = value(torch.cat([row["observation"], goal]))
        q = qvalue(torch.cat([row[KEY].flatten(), goal, row["action"].flatten()]))
        label = row["return_to_go"]
        v_next = value(torch.cat([following["observation"], goal])).detach()
        if make is bce_loss:
            v_next, label = v_next.sigmoid(), label.clamp(0, 1)
        target = following["reward"] + (0 if following["terminated"] else 0.9**H * v_next)
        if make is bce_loss:
            target = target.clamp(0, 1)
            for term, logit, y in (("loss_value", v, label), ("loss_qvalue", q, target)):
                p = logit.sigmoid()
                expected[term].append(-(y * p.log() + (1 - y) * (1 - p).log()))
        else:
            expected["loss_value"].append((v - label).square())
            expected["loss_qvalue"].append((q - target).square())
    out = loss(td)
    for term, values in expected.items():
        torch.testing.assert_close(out[term], torch.stack(values).mean())


def test_gamma_is_per_environment_step():
    loss = value_loss()
    loss.make_value_estimator()
    assert loss.value_estimator.gamma.item() == pytest.approx(0.999**H)
    for gamma in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"gamma must be .*, got {gamma}"):
            loss.make_value_estimator(gamma=gamma)


@pytest.mark.parametrize(("make", "term"), TERMS)
def test_each_term_trains_its_own_network(make, term):
    loss = make()
    every = loss(batch())
    every[term].backward()
    for name, parameter in loss.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_gradient == name.startswith(TERMS[make, term]), name


@pytest.mark.parametrize(("make", "term"), TERMS)
def test_a_selected_term_is_the_same_and_alone(make, term):
    loss, td = make(), batch()
    every = loss(td)
    loss.select_out_keys(term)
    out = loss(td)
    assert list(out.keys()) == [term]
    torch.testing.assert_close(out[term], every[term])


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("size", [(B,), (2, 3)])
def test_reduction(make, size):
    td = batch(size)
    mean, alone = make()(td), make(reduction="none")(td)
    for key, value in alone.items():
        assert value.shape == td.shape
        torch.testing.assert_close(value.mean(), mean[key])
    weights = td["priority_weight"] = torch.rand(size)
    for key, value in make(reduction="sum")(td).items():
        torch.testing.assert_close(value, (alone[key] * weights).sum())


@pytest.mark.parametrize("make", LOSSES)
def test_nested_keys(make):
    td = batch()
    expected = make()(td)
    nested = td.select("future_noise", "future_time", "next", "return_to_go", "value_goal")
    nested["x"] = TensorDict(state=td["observation"], chunk=td["action"], ahead=td[KEY])
    nested["next", "x", "state"] = nested["next"].pop("observation")
    loss = make(("x", "state"), ("x", "chunk"), ("x", "ahead"))
    if make in (value_loss, bce_loss):
        nested["a", "goal"] = nested.pop("value_goal")
        nested["a", "label"] = nested.pop("return_to_go")
        loss.set_keys(value_goal=("a", "goal"), return_to_go=("a", "label"))
    else:
        nested["a", "x0"], nested["a", "t"] = nested.pop("future_noise"), nested.pop("future_time")
        loss.set_keys(flow_noise=("a", "x0"), flow_time=("a", "t"))
    for key, value in loss(nested).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("make", LOSSES)
def test_dispatch_and_drawn_noise(make):
    loss, td = make(), batch()
    inputs = {"_".join(key) if isinstance(key, tuple) else key: td[key] for key in loss.in_keys}
    out = loss(**inputs)
    out = [out] if isinstance(out, torch.Tensor) else out
    assert len(out) == len(loss.out_keys) and all(value.isfinite() for value in out)
    if make is not flow_loss:  # the one that draws noise
        for value, key in zip(out, loss.out_keys, strict=True):
            torch.testing.assert_close(value, loss(td)[key])


@pytest.mark.parametrize(
    ("make", "key", "shape"),
    [
        (flow_loss, KEY, (B, H, 1)),
        (flow_loss, "future_noise", (B, 1)),
        (flow_loss, "future_time", (B,)),
        (mlp_loss, KEY, (B, H, 1)),
        (value_loss, "return_to_go", (B,)),
        (value_loss, "return_to_go", (B, H)),
        (value_loss, ("next", "reward"), (B,)),
        (bce_loss, "return_to_go", (1,)),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_what_would_broadcast_is_refused(make, key, shape):
    loss, td = make(), batch()
    td.batch_size = []
    td[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match="has shape"):
        loss(td)


def test_options_are_checked():
    value = ValueOperator(NormedMLP(OBS, 1, CELLS))
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        FutureValueLoss(value, value, horizon=0)
    with pytest.raises(ValueError, match=r"one of \('l2', 'bce'\), got 'l1'"):
        FutureValueLoss(value, value, horizon=2, loss_function="l1")
    with pytest.raises(KeyError, match="no 'value_goal'"):
        value_loss()(batch().exclude("value_goal"))


@pytest.mark.parametrize("make", LOSSES)
def test_compiled_equals_eager(make):
    torch._dynamo.reset()
    eager, compiled, td = make(), make(), batch()
    call = torch.compile(compiled, fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in (eager, compiled)]
    for _ in range(3):
        for forward, optimizer in zip((eager, call), optimizers, strict=True):
            optimizer.zero_grad()
            sum(forward(td.clone()).values()).backward()
            optimizer.step()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
