from __future__ import annotations

import math

import pytest
import torch

from torchrl_mac.modules import GaussianEnsemble, NormedMLP, StackedMLP

E, OBS, A = 5, 3, 2


def ensemble(**kwargs):
    network = StackedMLP(E, OBS + A, 2 * OBS, [8, 6], broadcast=True)
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return GaussianEnsemble(network, **kwargs)


@pytest.mark.parametrize("shape", [(), (4,), (4, 2)])
def test_members_are_plain_networks_with_heads(shape):
    module = ensemble(log_std_bounds=(-4.0, 0.5))
    observation, action = torch.randn(*shape, OBS), torch.randn(*shape, A)
    mean, std = module(observation, action)
    assert mean.shape == std.shape == (E, *shape, OBS)
    for k in range(E):
        alone = module.network.network(k)
        assert isinstance(alone, NormedMLP)
        out = alone(observation, action)
        torch.testing.assert_close(mean[k], out[..., :OBS])
        log_std = -4.0 + 4.5 / (1 + torch.exp(-out[..., OBS:]))
        torch.testing.assert_close(std[k], log_std.exp())


def test_log_prob_is_that_of_independent_normals():
    module, x = ensemble(), (torch.randn(4, OBS), torch.randn(4, A))
    target = torch.randn(4, OBS)
    mean, std = module(*x)
    expected = torch.zeros(E, 4)
    for k in range(E):
        for b in range(4):
            for d in range(OBS):
                z = (target[b, d] - mean[k, b, d]) / std[k, b, d]
                expected[k, b] += -0.5 * z**2 - std[k, b, d].log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(module.log_prob(target, *x), expected, rtol=1e-4, atol=1e-4)


def test_samples_are_of_elites_alone():
    module = ensemble(num_elites=2)
    module.choose_elites(torch.tensor([3.0, 0.5, 9.0, 0.1, 2.0]))
    assert module.elites.tolist() == [3, 1]
    x = torch.randn(1, OBS).expand(500, OBS), torch.randn(1, A).expand(500, A)
    mean, _ = module(*x)
    drawn = module.sample(*x, noise=torch.zeros(500, OBS))
    member = (drawn.unsqueeze(0) - mean).abs().sum(-1).argmin(0)
    assert set(member.tolist()) == {1, 3}
    assert 150 < (member == 1).sum() < 350


def test_sample_with_everything_given():
    module, x = ensemble(), (torch.randn(4, OBS), torch.randn(4, A))
    noise, member = torch.randn(4, OBS), torch.tensor([4, 0, 2, 2])
    mean, std = module(*x)
    drawn = module.sample(*x, noise=noise, member=member)
    for b, k in enumerate(member.tolist()):
        torch.testing.assert_close(drawn[b], mean[k, b] + std[k, b] * noise[b])


def test_members_learn_apart():
    module, x = ensemble(), (torch.randn(4, OBS), torch.randn(4, A))
    module.log_prob(torch.randn(4, OBS), *x)[2].sum().backward()
    for parameter in module.parameters():
        assert parameter.grad[2].any()
        assert not parameter.grad[[0, 1, 3, 4]].any()


def test_elites_are_saved():
    module, other = ensemble(num_elites=2), ensemble(num_elites=2)
    module.choose_elites(torch.rand(E))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.elites, module.elites)


def test_errors():
    with pytest.raises(ValueError, match="broadcast=True"):
        GaussianEnsemble(StackedMLP(2, 3, 4, [5]))
    with pytest.raises(ValueError, match="even number"):
        GaussianEnsemble(StackedMLP(2, 3, 5, [5], broadcast=True))
    with pytest.raises(ValueError, match="num_elites must be between 1 and 2, got 3"):
        GaussianEnsemble(StackedMLP(2, 3, 4, [5], broadcast=True), num_elites=3)


if __name__ == "__main__":
    pytest.main([__file__])
