from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from torchrl_mac.modules import GaussianPolicy, NormedMLP, QValueEnsemble, StackedMLP
from torchrl_mac.objectives import ChunkedQValueLoss, DDPGBCLoss, InSampleValueLoss

B, OBS, G, H, A, E, ALPHA, STD = 6, 4, 2, 3, 2, 3, 0.7, 0.6
D = H * A
CELLS = [8, 8]
STATE, GOAL, CHUNK, VALUE = ("x", "state"), ("x", "goal"), ("x", "chunk"), ("y", "q")


def batch(size=(B,)):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        actor_goal=torch.randn(*size, G),
        action=torch.rand(*size, H, A) * 2 - 1,
        batch_size=size,
    )


def transition():
    following = TensorDict(
        observation=torch.randn(B, OBS),
        reward=torch.randn(B, 1),
        done=torch.zeros(B, 1, dtype=torch.bool),
        terminated=torch.zeros(B, 1, dtype=torch.bool),
        batch_size=[B],
    )
    return batch().update({"value_goal": torch.randn(B, G), "next": following})


def shifted(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def make(state="observation", goal="goal", chunk="action", value="state_action_value", **kwargs):
    policy = GaussianPolicy(
        shifted(NormedMLP(OBS + G, D, CELLS)), D, std=STD, in_keys=[state, goal, "noise"]
    )
    qvalue = QValueEnsemble(
        shifted(StackedMLP(E, OBS + G + D, 1, CELLS, broadcast=True)),
        q_aggregation="min",
        in_keys=[state, goal, chunk],
        out_keys=[value, "members"],
    )
    loss = DDPGBCLoss(policy, qvalue, **{"alpha": ALPHA, **kwargs})
    loss.set_keys(action=chunk, goal=goal, state_action_value=value)
    return loss


def test_it_is_the_sum_over_samples():
    loss, td = make(), batch()
    state = torch.cat([td["observation"], td["actor_goal"]], 1)
    with torch.no_grad():
        means = loss.actor_network.module.network(state)
        networks = [loss.qvalue_network.network.network(e) for e in range(E)]
    assert (means.abs() > 1).any() and (means.abs() < 1).any()  # clipped for Q alone
    values, densities = [], []
    for b in range(B):
        chunk = torch.tensor([min(max(x, -1.0), 1.0) for x in means[b].tolist()])
        values.append(min(q(state[b], chunk).item() for q in networks))
        taken = td["action"][b].flatten().tolist()
        densities.append(
            sum(
                -0.5 * ((x - m) / STD) ** 2 - math.log(STD * math.sqrt(2 * math.pi))
                for x, m in zip(taken, means[b].tolist(), strict=True)
            )
        )
    size = sum(abs(value) for value in values) / B + 1e-6
    each = [-q / size - ALPHA * p for q, p in zip(values, densities, strict=True)]
    torch.testing.assert_close(loss(td)["loss_actor"], torch.tensor(sum(each) / B))


def test_the_scale_of_q_does_not_matter():
    loss, td = make(), batch()
    expected = loss(td)["loss_actor"]
    loss.qvalue_network.network.weights[-1].data.mul_(1e3)
    loss.qvalue_network.network.biases[-1].data.mul_(1e3)
    torch.testing.assert_close(loss(td)["loss_actor"], expected)


def test_the_actor_alone_is_trained():
    loss, td = make(alpha=0.0), batch()  # so that all of the gradient has come through Q
    assert all(name.startswith("actor_network") for name, _ in loss.named_parameters())
    critic = ChunkedQValueLoss(loss.actor_network, loss.qvalue_network)
    loss(td)["loss_actor"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())


def test_critics_do_not_train_the_actor():
    loss, td = make(), transition()
    critic = ChunkedQValueLoss(loss.actor_network, loss.qvalue_network)
    critic(td)["loss_qvalue"].backward()
    assert all(p.grad is None for p in loss.parameters())
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize("size", [(B,), (2, 3)])
def test_reduction(size):
    loss, td = make(), batch(size)
    mean = loss(td)["loss_actor"]
    loss.reduction = "none"
    none = loss(td)["loss_actor"]
    loss.reduction = "sum"
    assert none.shape == td.shape
    torch.testing.assert_close(none.mean(), mean)
    torch.testing.assert_close(loss(td)["loss_actor"], none.sum())
    loss.reduction = "mean"
    td["priority_weight"] = weight = torch.rand(size)
    torch.testing.assert_close(loss(td)["loss_actor"], (none * weight).sum() / weight.sum())


def test_nested_keys_and_dispatch():
    td = batch()
    torch.manual_seed(0)
    loss = make()
    expected = loss(td)["loss_actor"]
    assert loss.in_keys == ["observation", "actor_goal", "action"]
    given = loss(**{key: td[key] for key in loss.in_keys})
    torch.testing.assert_close(given, expected)
    torch.manual_seed(0)
    loss = make(STATE, GOAL, CHUNK, VALUE)
    loss.set_keys(actor_goal=("g", "later"))
    moved = TensorDict(
        x=TensorDict(state=td["observation"], chunk=td["action"]),
        g=TensorDict(later=td["actor_goal"]),
    )
    torch.testing.assert_close(loss(moved.auto_batch_size_(1))["loss_actor"], expected)
    assert {*loss.in_keys} == {*moved.keys(True, True)}


def test_compiled_equals_eager_over_three_steps():
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make())
    compiled = torch.compile(losses[1], fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-2) for loss in losses]
    for _ in range(3):
        td = batch()
        for forward, optimizer in zip((losses[0], compiled), optimizers, strict=True):
            optimizer.zero_grad()
            forward(td)["loss_actor"].backward()
            optimizer.step()
    for ours, theirs in zip(*(loss.parameters() for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_beside_the_loss_that_trains_its_critics():
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        actor = make()
        value = ValueOperator(NormedMLP(OBS + G, 1, CELLS), in_keys=["observation", "goal"])
        values = InSampleValueLoss(value, actor.qvalue_network, expectile=0.9)
        losses.append(torch.nn.ModuleList([values, actor]))

    def total(td, losses):
        return sum(v for loss in losses for k, v in loss(td).items() if k.startswith("loss_"))

    td = transition()
    terms = [total(td, losses[0])]
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    terms.append(compiled(td, losses[1]))
    torch.testing.assert_close(*terms)
    for term in terms:
        term.backward()
    for ours, theirs in zip(*(loss.named_parameters() for loss in losses), strict=True):
        assert ours[0] == theirs[0] and ours[1].grad is not None
        torch.testing.assert_close(ours[1].grad, theirs[1].grad)


def test_errors():
    loss = make()
    with pytest.raises(ValueError, match="alpha must not be negative"):
        make(alpha=-1.0)
    with pytest.raises(KeyError, match="has no 'actor_goal'"):
        loss(batch().exclude("actor_goal"))
    wide = ValueOperator(NormedMLP(OBS + G + D, 2, CELLS), in_keys=loss.qvalue_network.in_keys)
    with pytest.raises(ValueError, match="'state_action_value' has shape"):
        DDPGBCLoss(loss.actor_network, wide)(batch())


if __name__ == "__main__":
    pytest.main([__file__])
