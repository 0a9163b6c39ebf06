"""MAC(Gau) and MAC(FQL)."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingPolicy,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import FQLExpansionLoss, GaussianBCLoss, ValueExpansionLoss

B, OBS, H, A, K = 6, 4, 3, 2, 4
D = H * A
CELLS = [8]


def batch(size=(B,)):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        action=torch.rand(*size, H, A) * 1.9 - 0.95,
        noise=torch.randn(*size, K, D),
        actor_noise=torch.randn(*size, K, D),
        batch_size=size,
    )


def gaussian_bc(state="observation", chunk="action"):
    policy = TanhGaussianPolicy(NormedMLP(OBS, 2 * D, CELLS), D, in_keys=[state, "noise"])
    loss = GaussianBCLoss(policy)
    loss.set_keys(action=chunk)
    return loss


def expansion(state="observation", chunk="action", cls=FQLExpansionLoss, **kwargs):
    """The same networks for each class."""
    torch.manual_seed(0)
    flow = FlowMatchingPolicy(NormedMLP(OBS + D + 1, D, CELLS), D, 3, in_keys=[state, "noise"])
    policy = OneStepPolicy(NormedMLP(OBS + D, D, CELLS), D, in_keys=[state, "noise"])
    actor = PolicyActor(policy, chunk_size=H, action_key=chunk)
    value = ValueOperator(NormedMLP(OBS, 1, CELLS), in_keys=[state])
    keys = {"in_keys": [state, chunk], "out_keys": ["state_action_value"]}
    qvalue = ValueOperator(NormedMLP(OBS + D, 1, CELLS), **keys)
    model = ChunkedWorldModel(
        *(NormedMLP(OBS + D, size, CELLS) for size in (OBS, 1, 1)),
        observation_key=state,
        action_key=chunk,
    )
    torch.nn.init.constant_(model.termination_network.layers[-1].bias, -0.3)
    first = [flow] if cls is FQLExpansionLoss else []
    loss = cls(*first, actor, value, qvalue, model, imagination_horizon=K, **kwargs)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    SoftUpdate(loss, tau=0.1)
    return loss


LOSSES = [gaussian_bc, expansion]
TERMS = {
    (gaussian_bc, "loss_bc"): "policy_params",
    (expansion, "loss_value"): "value_network_params",
    (expansion, "loss_qvalue"): "qvalue_network_params",
    (expansion, "loss_actor"): "onestep_policy_params",
}


def test_gaussian_bc():
    loss, td = gaussian_bc(), batch()
    mean, log_std = loss.policy.module.network(td["observation"]).chunk(2, -1)
    x = td["action"].flatten(1).double().atanh()
    density = Normal(mean.double(), log_std.double().exp()).log_prob(x)
    slope = (1 - td["action"].flatten(1).double().square()).log()
    expected = -(density - slope).sum(-1).mean()
    torch.testing.assert_close(loss(td)["loss_bc"].double(), expected, rtol=1e-4, atol=1e-4)
    td["action"][0] = 1.0  # where there is no inverse
    assert loss(td)["loss_bc"].isfinite()


@pytest.mark.parametrize("mean_over_rollout", [False, True])
def test_the_actor_on_imagined_states(mean_over_rollout):
    loss, td = expansion(mean_over_rollout=mean_over_rollout), batch()
    out, rollout = loss(td), loss.imagine(td)
    plain = expansion(cls=ValueExpansionLoss)(td)
    for key in ("loss_value", "loss_qvalue"):  # as without the actor's term
        torch.testing.assert_close(out[key], plain[key])
    flow, policy = loss.flow_policy.module, loss.actor_network.policy.module
    qvalue, distances, values = loss.qvalue_network.module, [], []
    with torch.no_grad():
        for b in range(B):
            s, z = rollout["observation"][b], td["actor_noise"][b]
            student = policy.network(torch.cat([s, z], -1))
            distances.append((student - flow(s, z)).square().mean(-1))
            values.append(qvalue(torch.cat([s, student.clamp(-1, 1)], -1)).squeeze(-1))
    distance, value = torch.stack(distances), torch.stack(values)
    size = (value.mean(1) if mean_over_rollout else value).abs().mean()
    torch.testing.assert_close(out["loss_actor"], 0.3 * distance.mean() - value.mean() / size)


@pytest.mark.parametrize(("make", "term"), TERMS)
def test_each_term_trains_its_own_network(make, term):
    loss = make()
    loss(batch())[term].backward()
    for name, parameter in loss.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_gradient == name.startswith(TERMS[make, term]), name
    if make is expansion:
        outside = [loss.flow_policy, loss.world_model]
        assert all(p.grad is None for module in outside for p in module.parameters())


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("size", [(B,), (2, 3)])
def test_reduction(make, size):
    td, loss = batch(size), make()
    mean = loss(td)
    loss.reduction = "none"
    for key, value in loss(td).items():
        assert value.shape == td.shape
        torch.testing.assert_close(value.mean(), mean[key])


@pytest.mark.parametrize("make", LOSSES)
def test_nested_keys(make):
    td = batch()
    torch.manual_seed(0)
    expected = make()(td)
    nested = TensorDict(
        x=TensorDict(state=td["observation"], chunk=td["action"]),
        noise=td["noise"],
        z=TensorDict(actor=td["actor_noise"]),
    ).auto_batch_size_(1)
    torch.manual_seed(0)
    loss = make(("x", "state"), ("x", "chunk"))
    if make is expansion:
        loss.set_keys(actor_noise=("z", "actor"))
    for key, value in loss(nested).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("make", LOSSES)
def test_dispatch_and_drawn_noise(make):
    loss, td = make(), batch()
    out = loss(**{key: td[key] for key in loss.in_keys})
    out = [out] if isinstance(out, torch.Tensor) else out
    assert len(out) == len(loss.out_keys) and all(value.isfinite() for value in out)


@pytest.mark.parametrize("make", LOSSES)
def test_compiled_equals_eager(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, td = make(), batch()
    torch.manual_seed(0)
    compiled = make()
    call = torch.compile(compiled, fullgraph=True, backend="eager")
    for loss, forward in ((eager, eager), (compiled, call)):
        sum(forward(td.clone()).values()).backward()
        assert any(p.grad is not None for p in loss.parameters())
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
