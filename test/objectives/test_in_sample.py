"""V and critics of the data's own actions, against plain loops over the batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import NormedMLP, QValueEnsemble, StackedMLP
from torchrl_mac.objectives import ChunkedQValueLoss, InSampleValueLoss

B, OBS, GOAL, H, A, E, GAMMA = 6, 4, 2, 3, 2, 3, 0.9
CELLS = [8, 8]
KAPPA = 0.8


def batch(size=(B,), goal="value_goal"):
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            goal: torch.randn(*size, GOAL),
            "action": torch.rand(*size, H, A) * 2 - 1,
            "steps_to_next_obs": torch.randint(1, H + 1, (*size, 1)),
            "next": TensorDict(
                observation=torch.randn(*size, OBS),
                reward=torch.rand(*size, 1),
                done=torch.rand(*size, 1) < 0.5,
                terminated=torch.rand(*size, 1) < 0.3,
                batch_size=size,
            ),
        },
        batch_size=size,
    )


def make(state="observation", goal="goal", action="action", aggregation="min", **kwargs):
    network = NormedMLP(OBS + GOAL, 1, CELLS)
    value = ValueOperator(network, in_keys=[state, goal], out_keys=["state_value"])
    critics = StackedMLP(E, OBS + GOAL + H * A, 1, CELLS, broadcast=True)
    qvalue = QValueEnsemble(critics, q_aggregation=aggregation, in_keys=[state, goal, action])
    kwargs = {"expectile": KAPPA, "loss_function": "bce", **kwargs}
    loss = InSampleValueLoss(value, qvalue, **kwargs)
    for parameter in loss.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    SoftUpdate(loss, eps=0.5)
    for name, parameter in loss.named_buffers():
        if name.startswith("target_"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    loss.make_value_estimator(gamma=GAMMA)
    return loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("function", ["l2", "bce"])
@pytest.mark.parametrize("asymmetry", ["expectile", "quantile"])
@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("kappa", [None, KAPPA])
def test_numbers(function, asymmetry, aggregation, kappa):
    loss = make(
        aggregation=aggregation,
        loss_function=function,
        asymmetry=asymmetry,
        expectile=kappa,
        critic_reduction="sum",
        reduction="none",
    )
    td = batch()
    out = loss(td)
    agg = min if aggregation == "min" else lambda values: sum(values) / len(values)
    expected = sigmoid if function == "bce" else float

    def apart(value, target):
        if function == "l2":
            return (value - target) ** 2
        return -target * math.log(sigmoid(value)) - (1 - target) * math.log(1 - sigmoid(value))

    def value(row, following=False):
        state = row["next", "observation"] if following else row["observation"]
        with loss.value_network_params.to_module(loss.value_network):
            return loss.value_network.module(state, row["value_goal"]).item()

    def members(row, params):
        given = TensorDict(
            observation=row["observation"], goal=row["value_goal"], action=row["action"]
        )
        return loss.members(given, params).tolist()

    for b, row in enumerate(td.unbind(0)):
        target = agg([expected(q) for q in members(row, loss.target_qvalue_network_params)])
        v = value(row)
        if asymmetry == "quantile":
            error = abs(v - (logit(target) if function == "bce" else target))
        else:
            error = apart(v, target)
        weight = 1 if kappa is None else kappa if target >= expected(v) else 1 - kappa
        assert out["loss_value"][b].item() == pytest.approx(weight * error, rel=1e-4)

        alive = 1 - float(row["next", "terminated"])
        ahead = GAMMA ** int(row["steps_to_next_obs"]) * alive * expected(value(row, True))
        target = float(row["next", "reward"]) + ahead
        if function == "bce":
            target = min(max(target, 0), 1)
        error = sum(apart(q, target) for q in members(row, loss.qvalue_network_params))
        assert out["loss_qvalue"][b].item() == pytest.approx(error, rel=1e-4)
        assert out["target_value"][b].item() == pytest.approx(target, rel=1e-4)
        online = agg([expected(q) for q in members(row, loss.qvalue_network_params)])
        assert out["pred_value"][b].item() == pytest.approx(online, rel=1e-4)
    loss.critic_reduction = "mean"
    torch.testing.assert_close(loss(td)["loss_qvalue"], out["loss_qvalue"] / E)


def test_a_range_of_ones_own_is_kept():
    loss, td = make(target_range=(0.2, 0.3)), batch()
    target = loss(td)["target_value"]
    assert target.min() >= 0.2
    assert target.max() <= 0.3


def test_critics_of_probabilities_under_any_actor():
    """The other losses with critics share the option."""
    loss, td = make(), batch()
    inputs = TensorDict({"observation": td["observation"]}, [B])

    class Same(torch.nn.Module):
        in_keys, out_keys = ("observation",), ("action",)

        def forward(self, given):
            return given.set("action", given["observation"][:, :1].expand(-1, H * A))

    other = ChunkedQValueLoss(Same(), loss.qvalue_network, loss_function="bce", chunk_size=H)
    other.qvalue_network_params.data.copy_(loss.qvalue_network_params.data)
    other.target_qvalue_network_params.data.copy_(loss.target_qvalue_network_params.data)
    other.make_value_estimator(gamma=GAMMA)
    following = TensorDict(
        observation=td["next", "observation"],
        goal=td["value_goal"],
        action=Same()(inputs.set("observation", td["next", "observation"]))["action"],
    )
    members = other.members(following, other.target_qvalue_network_params)
    ahead = members.sigmoid().min(0).values
    alive = ~td["next", "terminated"].squeeze(-1)
    steps = td["steps_to_next_obs"].squeeze(-1)
    target = (td["next", "reward"].squeeze(-1) + GAMMA**steps * alive * ahead).clamp(0, 1)
    torch.testing.assert_close(other(td)["target_value"], target)


@pytest.mark.parametrize("term", ["value", "qvalue"])
def test_each_term_trains_its_own_network(term):
    loss = make()
    loss(batch())[f"loss_{term}"].backward()
    for name, parameter in loss.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == name.startswith(f"{term}_network_params"), name


def test_interface():
    loss, td = make(), batch((2, 3))
    assert loss.in_keys == [
        "observation",
        "value_goal",
        "action",
        *(("next", key) for key in ("observation", "reward", "done", "terminated")),
    ]
    mean = loss(td)
    loss.reduction = "none"
    none = loss(td)
    for key in ("loss_value", "loss_qvalue"):
        assert none[key].shape == td.shape
        torch.testing.assert_close(none[key].mean(), mean[key])
    td["priority_weight"] = weight = torch.rand(2, 3)
    loss.reduction = "mean"
    for key in ("loss_value", "loss_qvalue"):
        torch.testing.assert_close(loss(td)[key], (none[key] * weight).sum() / weight.sum())
    loss.select_out_keys("loss_value")
    assert list(loss(td).keys()) == ["loss_value"]


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
    loss = make(("x", "state"), ("x", "goal"), ("x", "chunk"))
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


def test_refusals():
    for wrong in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match="expectile must be between 0 and 1"):
            make(expectile=wrong)
    with pytest.raises(ValueError, match=r"asymmetry must be one of \('expectile', 'quantile'\)"):
        make(asymmetry="median")
    with pytest.raises(ValueError, match=r"loss_function must be one of \('l2', 'bce'\)"):
        make(loss_function="l1")
    with pytest.raises(ValueError, match=r"critic_reduction must be one of \('mean', 'sum'\)"):
        make(critic_reduction="max")
    with pytest.raises(KeyError, match="value_goal"):
        make()(batch(goal="actor_goal"))


def test_compiled_equals_eager_over_three_steps():
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make(asymmetry="quantile"))
    forward = torch.compile(losses[1], fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in losses]
    for _ in range(3):
        td = batch()
        for call, optimizer in zip((losses[0], forward), optimizers, strict=True):
            optimizer.zero_grad()
            out = call(td.clone())
            (out["loss_value"] + out["loss_qvalue"]).backward()
            optimizer.step()
    for p, q in itertools.zip_longest(*(loss.parameters() for loss in losses)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
