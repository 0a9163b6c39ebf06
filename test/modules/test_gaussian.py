from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal
from torchrl.modules import TanhNormal

from torchrl_mac.modules import (
    GaussianModel,
    GaussianPolicy,
    NormedMLP,
    PolicyActor,
    TanhGaussianModel,
    TanhGaussianPolicy,
    build,
    describe,
)

OBS, D = 4, 6


def model(**kwargs):
    network = NormedMLP(OBS, 2 * D, [8])
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return TanhGaussianModel(network, D, **kwargs)


@pytest.mark.parametrize("shape", [(), (5,), (5, 2)])
def test_it_is_the_tanh_normal_of_torchrl(shape):
    policy, observation = model(log_std_bounds=(-1.0, 0.5)), torch.randn(*shape, OBS)
    noise = torch.randn(*shape, D)
    mean, log_std = policy.network(observation).chunk(2, -1)
    std = log_std.clamp(-1.0, 0.5).exp()
    expected = TanhNormal(mean, std)
    action, log_prob = policy.sample(observation, noise)
    torch.testing.assert_close(action, (mean + std * noise).tanh())
    torch.testing.assert_close(policy(observation, noise), action)
    torch.testing.assert_close(log_prob, expected.log_prob(action), rtol=1e-4, atol=1e-4)
    inside = torch.rand(*shape, D) * 1.8 - 0.9
    torch.testing.assert_close(
        policy.log_prob(observation, inside), expected.log_prob(inside), rtol=1e-4, atol=1e-4
    )


def test_gradients_pass_the_sample():
    policy, observation, noise = model(), torch.randn(5, OBS), torch.randn(5, D)
    action, log_prob = policy.sample(observation, noise)
    (action.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_where_tanh_saturates_densities_stay_finite():
    policy = model()
    policy.network.layers[-1].bias.data[:D] = 50.0
    action, log_prob = policy.sample(torch.randn(5, OBS))
    assert (action == 1).all()
    assert log_prob.isfinite().all()


def test_it_acts_in_chunks():
    policy = TanhGaussianPolicy(NormedMLP(OBS, 2 * D, [8]), D)
    actor = PolicyActor(policy, chunk_size=3)
    td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, D), batch_size=[5])
    chunk = actor(td.clone())["action"]
    assert chunk.shape == (5, 3, 2)
    torch.testing.assert_close(chunk.flatten(1), policy(td.clone())["action"])
    drawn = actor(td.exclude("noise"))["action"], actor(td.exclude("noise"))["action"]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("shape", [(), (5,), (5, 2)])
def test_a_constant_deviation(shape):
    policy = GaussianModel(NormedMLP(OBS, D, [8]), D, std=0.5)
    observation, noise = torch.randn(*shape, OBS), 3 * torch.randn(*shape, D)
    mean = policy.mean(observation)
    expected = Normal(mean, 0.5)
    action = policy(observation, noise)
    torch.testing.assert_close(action, (mean + 0.5 * noise).clamp(-1, 1))
    density = policy.log_prob(mean, action)
    torch.testing.assert_close(density, expected.log_prob(action).sum(-1))


def test_its_mode_in_evaluation_and_its_description():
    policy = GaussianPolicy(NormedMLP(OBS, D, [8]), D, std=0.5)
    policy.module.network.layers[-1].bias.data[0] = 9.0
    actor = PolicyActor(policy, deterministic=True, chunk_size=3)
    td = TensorDict(observation=torch.randn(5, OBS), batch_size=[5])
    chunk = actor(td.clone())["action"]
    mean = policy.module.mean(td["observation"])
    torch.testing.assert_close(chunk.flatten(1), mean.clamp(-1, 1))
    again = build(json.loads(json.dumps(describe(actor))))
    again.load_state_dict(actor.state_dict())
    assert torch.equal(again(td.clone())["action"], chunk)
    assert again.policy.module.std == 0.5


def test_errors():
    with pytest.raises(ValueError, match="The noise must have shape"):
        model()(torch.randn(5, OBS), torch.randn(5, D + 1))
    with pytest.raises(ValueError, match="The output of network must have shape"):
        TanhGaussianModel(NormedMLP(OBS, D, [8]), D)(torch.randn(5, OBS))
    with pytest.raises(ValueError, match="The output of network must have shape"):
        GaussianModel(NormedMLP(OBS, 2 * D, [8]), D)(torch.randn(5, OBS))
    with pytest.raises(ValueError, match="std must be positive"):
        GaussianModel(NormedMLP(OBS, D, [8]), D, std=0.0)


if __name__ == "__main__":
    pytest.main([__file__])
