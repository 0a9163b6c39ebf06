from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal
from torchrl.data import Bounded, Unbounded

from torchrl_mac.envs import ChunkedWorldModelEnv, imagine
from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    StackedMLP,
    build,
    describe,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss

E, OBS, H, A, B = 4, 3, 2, 2, 5
D = H * A


def make_model(outputs=2 * OBS, **kwargs):
    sizes = {"in_features": OBS + D, "num_cells": [8]}
    network = StackedMLP(E, out_features=outputs, broadcast=True, **sizes)
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    ensemble = GaussianEnsemble(network, num_elites=kwargs.pop("num_elites", None))
    heads = (NormedMLP(out_features=1, **sizes) for _ in range(2))
    return EnsembleWorldModel(ensemble, *heads, **kwargs)


def batch(size=(B,)):
    return TensorDict(
        observation=torch.randn(*size, OBS),
        action=torch.rand(*size, H, A),
        next=TensorDict(
            observation=torch.randn(*size, OBS),
            reward=torch.randn(*size, 1),
            terminated=torch.rand(*size, 1) < 0.5,
            batch_size=size,
        ),
        batch_size=size,
    )


def moments(model, td):
    return model.dynamics_network(td["observation"], td["action"])


def test_samples_are_of_the_members_asked_for():
    model, td = make_model(), batch()
    member, noise = torch.tensor([0, 3, 1, 1, 2]), torch.randn(B, OBS)
    td["member"], td["model_noise"] = member, noise
    mean, std = moments(model, td)
    rows = torch.arange(B)
    expected = td["observation"] + mean[member, rows] + std[member, rows] * noise
    torch.testing.assert_close(model(td)["next", "observation"], expected)


def test_only_elites_are_drawn():
    model, td = make_model(num_elites=1), batch((1,)).expand(300)
    model.dynamics_network.choose_elites(torch.tensor([3.0, 2.0, 0.0, 1.0]))
    mean, std = moments(model, td[:1])
    found = model(td.clone())["next", "observation"] - td["observation"]
    torch.testing.assert_close(found.mean(0), mean[2, 0], atol=0.5, rtol=0.2)
    torch.testing.assert_close(found.std(0), std[2, 0], rtol=0.25, atol=0.05)


def test_its_dynamics_learn_by_likelihood():
    model, td = make_model(), batch()
    mean, std = moments(model, td)
    change = td["next", "observation"] - td["observation"]
    expected = -Normal(mean, std).log_prob(change).sum(-1).mean()
    loss = ChunkedWorldModelLoss(model)
    out = loss(td)
    torch.testing.assert_close(out["loss_dynamics"], expected)
    out["loss_dynamics"].backward()
    for name, parameter in loss.named_parameters():
        assert (parameter.grad is not None) == ("dynamics_network" in name), name
    loss.reduction = "none"
    assert loss(td)["loss_dynamics"].shape == (B,)


def test_members_disagree():
    model, td = make_model(), batch()
    noise = torch.randn(E, B, OBS)
    mean, std = moments(model, td)
    found = model.sample_members(td["observation"], td["action"], noise)
    torch.testing.assert_close(found, td["observation"] + mean + std * noise)
    norms = torch.stack([std[e].square().sum(-1).sqrt() for e in range(E)])
    expected = norms.max(0).values
    torch.testing.assert_close(model.max_deviation(td["observation"], td["action"]), expected)


def test_errors_of_members():
    model, td = make_model(), batch()
    mean, _ = moments(model, td)
    following = td["next", "observation"]
    expected = torch.empty(E, B)
    for e in range(E):
        for b in range(B):
            off = td["observation"][b] + mean[e, b] - following[b]
            expected[e, b] = sum(float(x) ** 2 for x in off) / OBS
    found = model.member_errors(td["observation"], td["action"], following)
    torch.testing.assert_close(found, expected)


def test_it_is_a_world_model_like_any_other():
    model = make_model()
    torch.nn.init.constant_(model.termination_network.layers[-1].bias, -100.0)  # nothing ends
    policy = OneStepPolicy(NormedMLP(OBS + D, D, [8]), D)
    actor = PolicyActor(policy, chunk_size=H)
    start = batch().select("observation")
    rollout = imagine(actor, model, start, 3)
    assert rollout.shape == (B, 3) and rollout["next", "reward"].shape == (B, 3, 1)
    env = ChunkedWorldModelEnv(model, Unbounded(OBS), Bounded(-1, 1, (A,)), chunk_size=H)
    assert env.rollout(2, actor, tensordict=start, set_state=True).shape == (B, 2)


def test_it_is_exported():
    model = make_model(num_elites=2, model_noise_key=("n", "z"))
    model.dynamics_network.choose_elites(torch.rand(E))
    again = build(describe(model))
    again.load_state_dict(model.state_dict())
    td = batch()
    td["member"], td["n", "z"] = torch.zeros(B, dtype=torch.int64), torch.randn(B, OBS)
    torch.testing.assert_close(again(td.clone())["next"], model(td.clone())["next"])
    assert torch.equal(again.dynamics_network.elites, model.dynamics_network.elites)


def test_what_would_broadcast_is_refused():
    with pytest.raises(ValueError, match="A sample of dynamics_network must have shape"):
        make_model(outputs=2)(batch())


def test_compiled_equals_eager():
    torch._dynamo.reset()
    loss, td = ChunkedWorldModelLoss(make_model()), batch()
    expected = loss(td)
    out = torch.compile(loss, fullgraph=True, backend="eager")(td)
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value)


if __name__ == "__main__":
    pytest.main([__file__])
