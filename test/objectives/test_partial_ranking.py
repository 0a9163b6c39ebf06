"""MAC whose Q reads the first actions of a chunk, and learns an expectile of what they lead to."""

from __future__ import annotations

import itertools

import pytest
import torch
from assembly import Size, make_batch, make_mac
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import FlowRejectionActor, NormedMLP
from torchrl_mac.objectives import ValueExpansionLoss

B, OBS, G, H, A, N, STEPS, K = 6, 4, 2, 4, 2, 5, 3, 2
SIZE = Size([8, 8], B, N, STEPS, 2, OBS, A, H, G)
GAMMA = 0.9


def make(first=K, size=SIZE, **kwargs):
    """MAC's values with another Q."""
    plain = make_mac(size)["values"]
    state = ["observation", "goal"]
    critic = NormedMLP(OBS + G + (first or H) * A, 1, size.cells, first_actions=first)
    torch.nn.init.constant_(critic.layers[-1].bias, -0.7)  # about what it learns
    qvalue = ValueOperator(critic, in_keys=[*state, "action"])
    actor = FlowRejectionActor(plain.actor_network.policy, qvalue, num_candidates=N, chunk_size=H)
    value = ValueOperator(NormedMLP(OBS + G, 1, size.cells), in_keys=state)
    loss = ValueExpansionLoss(
        actor, value, qvalue, plain.world_model, imagination_horizon=STEPS, **kwargs
    )
    for parameter in loss.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    loss.make_value_estimator(gamma=GAMMA, lmbda=1.0)
    SoftUpdate(loss, tau=0.1)
    return loss


@pytest.mark.parametrize("expectile", [None, 0.8])
def test_numbers(expectile):
    loss, td = make(expectile=expectile, reduction="none"), make_batch(SIZE)
    out = loss(td)
    actor, model = loss.actor_network, loss.world_model
    with loss.qvalue_network_params.to_module(loss.qvalue_network):
        critic = loss.qvalue_network.module
    sides = set()
    with torch.no_grad():
        for b, row in enumerate(td.unbind(0)):
            s, g = row["observation"], row["value_goal"]
            values, chunks = [], []
            for n in range(N):
                chunk = actor.policy(torch.cat([s, g]), row["noise"][0, n]).reshape(H, A)
                with loss.qvalue_network_params.to_module(loss.qvalue_network):
                    values.append(float(critic(torch.cat([s, g, chunk[:K].flatten()]))))
                chunks.append(chunk)
            best = values.index(max(values))
            flat = chunks[best].flatten()  # the world model reads all of it
            following = s + model.dynamics_network(torch.cat([s, flat]))
            reached = float(model.termination_network(torch.cat([s, g, flat]))) > 0
            with loss.value_network_params.to_module(loss.value_network):
                ahead = float(loss.value_network.module(torch.cat([following, g])))
            target = float(reached) - 1 + GAMMA**H * (not reached) * ahead
            below = target >= max(values)
            weight = 1 if expectile is None else expectile if below else 1 - expectile
            sides.add(below)
            expected = weight * (max(values) - target) ** 2
            assert out["loss_qvalue"][b] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert sides == {True, False}


def test_the_rest_of_the_chunk_matters_to_the_model_alone():
    loss, td = make(), make_batch(SIZE)
    rollout = loss.imagine(td)
    assert rollout["action"].shape == (B, STEPS, H, A)
    before = loss.qvalue_loss(rollout)
    rollout["action"][:, 0, K:] += 1
    assert torch.equal(loss.qvalue_loss(rollout), before)  # what was imagined is there already
    rollout["action"][:, 0, :K] += 1
    assert not torch.equal(loss.qvalue_loss(rollout), before)


@pytest.mark.parametrize("term", ["value", "qvalue"])
def test_each_term_trains_its_own_network(term):
    loss = make(expectile=0.8)
    loss(make_batch(SIZE))[f"loss_{term}"].backward()
    for name, parameter in loss.named_parameters():
        trained = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert trained == name.startswith(f"{term}_network_params"), name


def test_all_of_the_actions_are_what_there_was_before():
    """The same bits, whether the option is left out or names the whole chunk."""
    outcome = []
    for first, kwargs in ((None, {}), (H, {"expectile": None})):
        torch.manual_seed(1)
        loss = make(first, **kwargs)
        torch.manual_seed(2)
        out = loss(make_batch(SIZE))
        (out["loss_value"] + out["loss_qvalue"]).backward()
        outcome.append([*out.values(), *(p.grad for p in loss.parameters())])
    for ours, theirs in zip(*outcome, strict=True):
        assert torch.equal(ours, theirs)
    torch.manual_seed(1)
    plain = make(None)
    torch.manual_seed(1)
    half = make(None, expectile=0.5)
    torch.manual_seed(2)
    td = make_batch(SIZE)
    torch.testing.assert_close(2 * half(td)["loss_qvalue"], plain(td)["loss_qvalue"])


def test_compiled_equals_eager_over_three_steps():
    torch._dynamo.reset()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(make(expectile=0.7))
    forward = torch.compile(losses[1], fullgraph=True, backend="eager")
    optimizers = [torch.optim.Adam(loss.parameters(), lr=1e-3) for loss in losses]
    for _ in range(3):
        td = make_batch(SIZE)
        for call, optimizer in zip((losses[0], forward), optimizers, strict=True):
            optimizer.zero_grad()
            out = call(td.clone())
            (out["loss_value"] + out["loss_qvalue"]).backward()
            optimizer.step()
    for p, q in itertools.zip_longest(*(loss.parameters() for loss in losses)):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_refusals():
    for wrong in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match="expectile must be between 0 and 1"):
            make(expectile=wrong)


if __name__ == "__main__":
    pytest.main([__file__])
