"""Decoupled Q-chunking against plain loops over batch and critics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import NormedMLP, QValueEnsemble, StackedMLP
from torchrl_mac.objectives import DQCLoss, InSampleValueLoss

B, OBS, GOAL, H, K, A, E, GAMMA = 8, 4, 2, 4, 2, 2, 3, 0.9
CELLS = [8, 8]
KAPPA_B, KAPPA_D = 0.8, 0.7
TERMS = {
    "loss_value": "value_network_params",
    "loss_qvalue": "qvalue_network_params",
    "loss_chunk_qvalue": "chunk_qvalue_network_params",
}


def batch(size=(B,), whole=False):
    td = TensorDict(
        observation=torch.randn(*size, OBS),
        value_goal=torch.randn(*size, GOAL),
        action=torch.rand(*size, H, A) * 2 - 1,
        steps_to_next_obs=torch.randint(0, H + 1, (*size, 1)),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.rand(*size, 1),
            done=torch.rand(*size, 1) < 0.5,
            terminated=torch.rand(*size, 1) < 0.3,
            batch_size=size,
        ),
        batch_size=size,
    )
    if whole:
        td["next", "whole"] = torch.arange(B).reshape(*size, 1) % 3 > 0
    return td


def critics(num_actions, aggregation="min", members=E, keys=("observation", "goal", "action")):
    size = OBS + GOAL + num_actions * A
    network = StackedMLP(members, size, 1, CELLS, first_actions=num_actions, broadcast=True)
    return QValueEnsemble(network, q_aggregation=aggregation, in_keys=keys)


def make(first=K, aggregation="min", keys=("observation", "goal", "action"), kind=DQCLoss, **kw):
    value = ValueOperator(NormedMLP(OBS + GOAL, 1, CELLS), in_keys=list(keys[:2]))
    chunk = [critics(H, aggregation, keys=keys)] if kind is DQCLoss else []
    if kind is DQCLoss:
        kw = {"expectile": KAPPA_B, "distillation_expectile": KAPPA_D, **kw}
    loss = kind(value, critics(first, aggregation, keys=keys), *chunk, **kw)
    for parameter in loss.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    SoftUpdate(loss, eps=0.5)
    loss.target_qvalue_network_params.apply_(lambda x: x.data.add_(0.3 * torch.randn_like(x)))
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy(logit, p):
    return -p * math.log(sigmoid(logit)) - (1 - p) * math.log(1 - sigmoid(logit))


def apart(logit, p, asymmetry):
    """How far a logit is from a probability."""
    if asymmetry == "quantile":
        return abs(logit - math.log(p / (1 - p)))
    return entropy(logit, p)


def logits(ensemble, params, *inputs):
    """The critics one by one, by networks of their own."""
    with torch.no_grad(), params.to_module(ensemble, preserve_module_state=False):
        networks = [ensemble.network.network(e) for e in range(E)]
        features = torch.cat([x.flatten() for x in inputs])
        return [float(network(features)) for network in networks]


@pytest.mark.parametrize("backup", ["quantile", "expectile"])
@pytest.mark.parametrize("distillation", ["quantile", "expectile"])
@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("whole", [False, True])
def test_numbers(backup, distillation, aggregation, whole):
    loss = make(
        aggregation=aggregation,
        asymmetry=backup,
        distillation_asymmetry=distillation,
        reduction="none",
    )
    td = batch(whole=whole)
    out = loss(td.clone()).detach()
    agg = min if aggregation == "min" else lambda values: sum(values) / len(values)
    critic, chunk_critic = loss.qvalue_network, loss.chunk_qvalue_network

    def value(state, goal):
        with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
            return float(loss.value_network.module(torch.cat([state, goal])))

    def weighted(kappa, logit, p, asymmetry):
        return (kappa if p >= sigmoid(logit) else 1 - kappa) * apart(logit, p, asymmetry)

    for b, row in enumerate(td.unbind(0)):
        s, g, A_all = row["observation"], row["value_goal"], row["action"]
        counts = float(row["next", "whole"]) if whole else 1.0
        first = (s, g, A_all[:K])
        online = logits(critic, loss.qvalue_network_params, *first)
        target = logits(critic, loss.target_qvalue_network_params, *first)
        chunk = logits(chunk_critic, loss.chunk_qvalue_network_params, s, g, A_all)

        wanted = agg([sigmoid(q) for q in target])
        error = counts * weighted(KAPPA_B, value(s, g), wanted, backup)
        assert out["loss_value"][b] == pytest.approx(error, rel=1e-3)

        # each has a chunk critic of its own
        pairs = zip(online, chunk, strict=True)
        errors = [weighted(KAPPA_D, q, sigmoid(c), distillation) for q, c in pairs]
        assert out["loss_qvalue"][b] == pytest.approx(counts * sum(errors) / E, rel=1e-3)
        assert out["pred_value"][b] == pytest.approx(agg([sigmoid(q) for q in online]), rel=1e-3)
        assert out["target_value"][b] == pytest.approx(agg([sigmoid(c) for c in chunk]), rel=1e-3)

        alive = 1 - float(row["next", "terminated"])
        ahead = GAMMA ** int(row["steps_to_next_obs"]) * alive
        ahead *= sigmoid(value(row["next", "observation"], g))
        earned = min(max(float(row["next", "reward"]) + ahead, 0), 1)
        errors = [entropy(c, earned) for c in chunk]
        assert out["loss_chunk_qvalue"][b] == pytest.approx(counts * sum(errors) / E, rel=1e-3)


@pytest.mark.parametrize("term", TERMS)
def test_each_term_trains_its_own_network(term):
    loss = make()
    loss(batch())[term].backward()
    for name, parameter in loss.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == name.startswith(TERMS[term]), name


def test_the_later_actions_tell_the_chunk_critics_alone():
    loss, td = make(), batch()
    later = td.clone()
    later["action"][:, K:] = torch.rand(B, H - K, A)
    before, after = loss(td), loss(later)
    assert torch.equal(before["loss_value"], after["loss_value"])
    assert torch.equal(before["pred_value"], after["pred_value"])
    for key in ("loss_qvalue", "loss_chunk_qvalue", "target_value"):
        assert not torch.equal(before[key], after[key])


def test_the_chunk_critics_learn_as_critics_without_them():
    """Their term is the base class's of critics with the same parameters, whatever the mask."""
    loss, td = make(first=H, aggregation="mean"), batch(whole=True)
    plain = make(
        H, "mean", kind=InSampleValueLoss, expectile=KAPPA_B, asymmetry="quantile",
        loss_function="bce",
    )  # fmt: skip
    for name in ("value", "qvalue"):
        of = getattr(loss, f"{name}_network_params")
        getattr(plain, f"{name}_network_params").data.copy_(of.data)
    plain.target_qvalue_network_params.data.copy_(loss.target_qvalue_network_params.data)
    torch.testing.assert_close(plain(td)["loss_value"], loss(td)["loss_value"])
    plain.qvalue_network_params.data.copy_(loss.chunk_qvalue_network_params.data)
    torch.testing.assert_close(plain(td)["loss_qvalue"], loss(td)["loss_chunk_qvalue"])


def test_whole_chunks_without_asymmetry_copy_the_chunk_critics():
    """With h_a = h and kappa_d = 0.5 the two kinds of critics have the same minimum."""
    loss, td = make(first=H, distillation_expectile=0.5), batch()
    loss.qvalue_network_params.data.copy_(loss.chunk_qvalue_network_params.data)
    out = loss(td)
    torch.testing.assert_close(out["pred_value"], out["target_value"])
    out["loss_qvalue"].backward()
    for parameter in loss.qvalue_network_params.values(True, True):
        assert parameter.grad.abs().max() < 1e-6
    twice = make(first=H, distillation_expectile=None)
    twice.load_state_dict(loss.state_dict())
    torch.testing.assert_close(twice(td)["loss_qvalue"], 2 * out["loss_qvalue"])


def test_interface():
    loss, td = make(), batch((2, 4), whole=True)
    assert loss.in_keys == [
        *("observation", "value_goal", "action"),
        *(("next", key) for key in ("observation", "reward", "done", "terminated")),
    ]
    mean = loss(td)
    loss.reduction = "none"
    none = loss(td)
    td["priority_weight"] = weight = torch.rand(2, 4)
    loss.reduction = "mean"
    weighted = loss(td)
    for key in TERMS:
        assert none[key].shape == td.shape
        torch.testing.assert_close(none[key].mean(), mean[key])
        torch.testing.assert_close(weighted[key], (none[key] * weight).sum() / weight.sum())
    loss.select_out_keys("loss_chunk_qvalue")
    assert list(loss(td).keys()) == ["loss_chunk_qvalue"]
    assert td["td_error"].shape == (2, 4)


def test_nested_keys():
    td = batch()
    torch.manual_seed(0)
    expected = make()(td)
    moved = TensorDict(
        {
            ("x", "state"): td["observation"],
            ("x", "chunk"): td["action"],
            ("g", "v"): td["value_goal"],
            "k": td["steps_to_next_obs"],
            ("next", "x", "state"): td["next", "observation"],
            ("next", "y"): td["next"].select("reward", "done", "terminated"),
        },
        [B],
    )
    torch.manual_seed(0)
    loss = make(keys=(("x", "state"), ("x", "goal"), ("x", "chunk")))
    loss.set_keys(
        action=("x", "chunk"),
        goal=("x", "goal"),
        value_goal=("g", "v"),
        steps_to_next_obs="k",
        **{name: ("y", name) for name in ("reward", "done", "terminated")},
    )
    assert {*loss.in_keys} <= {*moved.keys(True, True)}
    for key, value in loss(moved).items():
        torch.testing.assert_close(value, expected[key])


def test_targets_move_towards_the_critics_of_first_actions():
    loss = make()
    updater = SoftUpdate(loss, tau=0.25)
    target = loss.target_qvalue_network_params.data.clone()
    updater.step()
    expected = target.apply(lambda t, p: 0.75 * t + 0.25 * p, loss.qvalue_network_params.data)
    for key, value in expected.items(True, True):
        torch.testing.assert_close(loss.target_qvalue_network_params.data[key], value)


def test_compiled_equals_eager_over_three_steps():
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make())
    forward = torch.compile(losses[1], fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in losses]
    for _ in range(3):
        td = batch(whole=True)
        for call, optimizer in zip((losses[0], forward), optimizers, strict=True):
            optimizer.zero_grad()
            out = call(td.clone())
            sum(out[key] for key in TERMS).backward()
            optimizer.step()
    for p, q in itertools.zip_longest(*(loss.parameters() for loss in losses)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_refusals():
    for wrong in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match="distillation_expectile must be between 0 and 1"):
            make(distillation_expectile=wrong)
    with pytest.raises(ValueError, match=r"distillation_asymmetry must be one of"):
        make(distillation_asymmetry="median")
    value = ValueOperator(NormedMLP(OBS + GOAL, 1, CELLS), in_keys=["observation", "goal"])
    with pytest.raises(ValueError, match="must read the same"):
        DQCLoss(value, critics(K), critics(H, keys=("observation", "goal", "chunk")))
    with pytest.raises(ValueError, match="the chunk critics' values"):
        loss = DQCLoss(value, critics(K), critics(H, members=2))
        loss(batch())


if __name__ == "__main__":
    pytest.main([__file__])
