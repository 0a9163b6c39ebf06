from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import ObservationNorm
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ValueOperator

from torchrl_mac.modules import (
    ChunkedWorldModel,
    FlowMatchingModel,
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepModel,
    OneStepPolicy,
    StackedMLP,
    TanhGELU,
)

OBS, H, A = 4, 3, 2
D = H * A


class TestNormedMLP:
    def test_layers_and_initialisation(self):
        network = NormedMLP(100, 50, [64, 32])
        kinds = [type(layer) for layer in network.layers]
        hidden = [nn.Linear, TanhGELU, nn.LayerNorm]
        assert kinds == [*hidden, *hidden, nn.Linear]
        for layer in network.layers:
            if isinstance(layer, nn.Linear):
                limit = math.sqrt(6 / sum(layer.weight.shape))
                assert layer.weight.abs().max() <= limit
                assert layer.weight.abs().max() > 0.9 * limit
                assert not layer.bias.any()
            if isinstance(layer, nn.LayerNorm):
                assert layer.eps == 1e-6
            if isinstance(layer, nn.GELU):
                assert layer.approximate == "tanh"

    def test_against_the_formula(self):
        network = NormedMLP(5, 2, [7])
        x = torch.randn(3, 5)
        first, _, norm, last = network.layers
        y = x @ first.weight.T + first.bias
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        y = (y * norm.weight + norm.bias) @ last.weight.T + last.bias
        torch.testing.assert_close(network(x), y)

    def test_chunks_are_flattened_time_major(self):
        network = NormedMLP(OBS + D, 1, [8])
        observation, chunk = torch.randn(2, 3, OBS), torch.randn(2, 3, H, A)
        flat = torch.cat([observation, *chunk.unbind(-2)], -1)
        assert torch.equal(network(observation, chunk), network(flat))
        assert torch.equal(network(observation[0, 0], chunk[0, 0]), network(flat[0, 0]))

    def test_without_layer_norm(self):
        network = NormedMLP(5, 2, [7], layer_norm=False)
        assert not any(isinstance(layer, nn.LayerNorm) for layer in network.layers)

    def test_normalised_first_it_is_the_mlp_of_torchrl(self):
        network = NormedMLP(5, 2, [7, 6], norm_first=True, activation_class="relu")
        theirs = MLP(
            in_features=5,
            out_features=2,
            num_cells=[7, 6],
            activation_class=nn.ReLU,
            norm_class=nn.LayerNorm,
            norm_kwargs=[{"normalized_shape": n, "eps": 1e-6} for n in (7, 6)],
        )
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        for ours, other in zip(network.parameters(), theirs.parameters(), strict=True):
            other.data.copy_(ours)
        x = torch.randn(4, 5)
        torch.testing.assert_close(network(x), theirs(x))


class TestStackedMLP:
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
    def test_each_network_is_a_plain_one(self, shape, norm_first):
        stacked = StackedMLP(4, OBS + D, 2, [8, 6], norm_first=norm_first)
        for parameter in stacked.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        observation, chunk = torch.randn(4, *shape, OBS), torch.randn(4, *shape, H, A)
        out = stacked(observation, chunk)
        assert out.shape == (4, *shape, 2)
        for k in range(4):
            alone = stacked.network(k)
            assert isinstance(alone, NormedMLP)
            torch.testing.assert_close(alone(observation[k], chunk[k]), out[k])

    def test_gradients_stay_with_their_network(self):
        stacked = StackedMLP(3, OBS, 1, [8])
        stacked(torch.randn(3, 5, OBS))[1].sum().backward()
        for parameter in stacked.parameters():
            assert parameter.grad[1].any()
            assert not parameter.grad[[0, 2]].any()

    def test_a_network_shares_its_memory(self):
        stacked, x = StackedMLP(2, OBS, 1, [8]), torch.randn(2, 5, OBS)
        alone, before = stacked.network(1), stacked(x)[1]
        for parameter in stacked.parameters():
            parameter.data.mul_(2)
        after = stacked(x)[1]
        assert not torch.allclose(before, after)
        torch.testing.assert_close(alone(x[1]), after)

    def test_initialisation_and_errors(self):
        stacked = StackedMLP(3, 100, 50, [64])
        limit = math.sqrt(6 / 164)
        assert 0.9 * limit < stacked.weights[0].abs().max() <= limit
        assert len({weight.sum().item() for weight in stacked.weights[0]}) == 3
        with pytest.raises(ValueError, match="num_networks must be at least 1"):
            StackedMLP(0, 4, 1)
        with pytest.raises(ValueError, match=r"3 networks take \[3, \*, 100\]"):
            stacked(torch.randn(2, 5, 100))


class TestFlow:
    def test_euler_integration(self):
        network = NormedMLP(OBS + D + 1, D, [8])
        model = FlowMatchingModel(network, D, 4, low=-0.3, high=0.4)
        observation, noise = torch.randn(5, OBS), torch.randn(5, D)
        x = noise
        for step in range(4):
            time = torch.full((5, 1), step / 4)
            x = x + network(torch.cat([observation, x, time], -1)) / 4
        torch.testing.assert_close(model(observation, noise), x.clamp(-0.3, 0.4))
        assert (x.abs() > 0.4).any()  # or clipping would not have been tested

    def test_integrates_a_known_field_exactly(self):
        class Constant(nn.Module):
            def forward(self, x):
                return torch.full_like(x[..., :D], 0.5)

        model = FlowMatchingModel(Constant(), D, 10)
        noise = torch.rand(5, D) * 0.5 - 0.5
        torch.testing.assert_close(model(torch.randn(5, OBS), noise), noise + 0.5)

    def test_one_step_clamps_only_when_asked(self):
        model = OneStepModel(NormedMLP(OBS + D, D, [8]), D, low=-0.1, high=0.1)
        observation, noise = torch.randn(5, OBS), torch.randn(5, D)
        free = model(observation, noise, clamp=False)
        assert (free.abs() > 0.1).any()
        assert torch.equal(model(observation, noise), free.clamp(-0.1, 0.1))

    @pytest.mark.parametrize("kind", [FlowMatchingPolicy, OneStepPolicy])
    def test_policies(self, kind):
        extra = kind is FlowMatchingPolicy
        keys = {"in_keys": ["observation", "goal", ("a", "noise")], "out_keys": [("a", "action")]}
        policy = kind(NormedMLP(OBS + 2 + D + extra, D, [8]), D, **keys)
        td = TensorDict(observation=torch.randn(5, OBS), goal=torch.randn(5, 2))
        torch.manual_seed(1)
        drawn = policy(td.clone())["a", "action"]
        torch.manual_seed(1)
        td["a", "noise"] = torch.randn(5, D)
        torch.testing.assert_close(policy(td.clone())["a", "action"], drawn)
        condition = torch.cat([td["observation"], td["goal"]], -1)
        torch.testing.assert_close(policy(condition, td["a", "noise"]), drawn)

    @pytest.mark.parametrize("kind", list(ExplorationType))
    def test_noise_is_drawn_under_every_exploration_type(self, kind):
        policy = OneStepPolicy(NormedMLP(OBS + D, D, [8]), D)
        with set_exploration_type(kind):
            action = policy(TensorDict(observation=torch.zeros(50, OBS)))["action"]
        assert action.std(0).min() > 0.01

    def test_errors(self):
        with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
            FlowMatchingModel(nn.Identity(), D, 0)
        with pytest.raises(ValueError, match="in_keys"):
            OneStepPolicy(nn.Identity(), D, in_keys=["noise"])


def world_model(**keys):
    sizes = {"in_features": OBS + D, "num_cells": [8]}
    return ChunkedWorldModel(*(NormedMLP(out_features=n, **sizes) for n in (OBS, 1, 1)), **keys)


class TestChunkedWorldModel:
    def test_prediction(self):
        model = world_model()
        td = TensorDict(observation=torch.randn(50, OBS), action=torch.randn(50, H, A))
        flat = torch.cat([td["observation"], td["action"].flatten(1)], -1)
        following = model(td.clone())["next"]
        torch.testing.assert_close(
            following["observation"], td["observation"] + model.dynamics_network(flat)
        )
        torch.testing.assert_close(following["reward"], model.reward_network(flat))
        probability = model.termination_network(flat).sigmoid()
        assert torch.equal(following["terminated"], probability > 0.5)
        assert 0 < following["terminated"].sum() < 50
        assert torch.equal(following["done"], following["terminated"])

    def test_nested_keys(self):
        model = world_model(observation_key=("agent", "state"), action_key=("agent", "chunk"))
        td = TensorDict(agent=TensorDict(state=torch.randn(5, OBS), chunk=torch.randn(5, H, A)))
        assert model(td)["next", "agent", "state"].shape == (5, OBS)


def actor(num_candidates=6, chunk_size=H, **keys):
    policy = OneStepPolicy(NormedMLP(OBS + D, D, [8]), D)
    qvalue = ValueOperator(NormedMLP(OBS + D, 1, [8]), in_keys=["observation", "action"])
    return FlowRejectionActor(
        policy, qvalue, num_candidates=num_candidates, chunk_size=chunk_size, **keys
    )


class TestFlowRejectionActor:
    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
    def test_against_a_loop(self, batch):
        module = actor()
        td = TensorDict(
            observation=torch.randn(*batch, OBS), noise=torch.randn(*batch, 6, D), batch_size=batch
        )
        out = module(td.clone())
        for i in range(max(1, td.numel())):
            one = td.reshape(-1)[i] if batch else td
            best, chosen = -math.inf, None
            for noise in one["noise"]:
                sample = module.policy(TensorDict(observation=one["observation"], noise=noise))
                chunk = sample["action"].unflatten(-1, (H, A))
                value = module.qvalue_network.module(one["observation"], chunk)
                if value > best:
                    best, chosen = value.item(), chunk
            ours = out.reshape(-1)[i] if batch else out
            torch.testing.assert_close(ours["action"], chosen)
            assert ours["chosen_action_value"].item() == pytest.approx(best, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("kind", list(ExplorationType))
    def test_samples_under_every_exploration_type(self, kind):
        module = actor(num_candidates=4)
        with set_exploration_type(kind):
            candidates = module.candidates(TensorDict(observation=torch.zeros(2, OBS)))
        assert candidates.shape == (2, 4)
        assert candidates["action"].std(1).min() > 0.01

    def test_num_candidates_may_change(self):
        module = actor(num_candidates=1)
        td = TensorDict(observation=torch.randn(200, OBS))
        few = module(td.clone())["chosen_action_value"].mean()
        module.num_candidates = 32
        assert module(td.clone())["chosen_action_value"].mean() > few

    def test_a_goal_reaches_policy_and_value(self):
        policy = OneStepPolicy(
            NormedMLP(OBS + 2 + D, D, [8]), D, in_keys=["observation", "actor_goal", "noise"]
        )
        keys = ["observation", "goal", "action"]
        qvalue = ValueOperator(NormedMLP(OBS + 3 + D, 1, [8]), in_keys=keys)
        module = FlowRejectionActor(policy, qvalue, num_candidates=4, chunk_size=H)
        assert module.in_keys == ["observation", "actor_goal", "goal"]
        td = TensorDict(
            observation=torch.randn(5, OBS), actor_goal=torch.randn(5, 2), goal=torch.randn(5, 3)
        )
        assert module(td)["action"].shape == (5, H, A)

    def test_nested_keys(self):
        policy = OneStepPolicy(
            NormedMLP(OBS + D, D, [8]), D, in_keys=[("o", "x"), ("n", "z")], out_keys=["raw"]
        )
        qvalue = ValueOperator(
            NormedMLP(OBS + D, 1, [8]), in_keys=[("o", "x"), ("a", "chunk")], out_keys=[("q", "v")]
        )
        module = FlowRejectionActor(
            policy,
            qvalue,
            chunk_size=H,
            num_candidates=4,
            action_key=("a", "chunk"),
            noise_key=("n", "z"),
            value_key=("q", "best"),
        )
        td = module(TensorDict(o=TensorDict(x=torch.randn(5, OBS)), batch_size=[5]))
        assert td["a", "chunk"].shape == (5, H, A)
        assert td["q", "best"].shape == (5, 1)

    def test_a_transform_normalises_a_copy(self):
        plain, loc, scale = actor(), torch.randn(OBS), torch.rand(OBS) + 0.5
        norm = ObservationNorm(loc, scale, in_keys=["observation"])
        raw = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, 6, D))
        expected = plain(raw.clone().set("observation", raw["observation"] * scale + loc))
        module = FlowRejectionActor(
            plain.policy, plain.qvalue_network, num_candidates=6, chunk_size=H, transform=norm
        )
        out = module(raw.clone())
        assert torch.equal(out["observation"], raw["observation"])
        torch.testing.assert_close(out["action"], expected["action"])
        assert {"transform.loc", "transform.scale"} <= set(module.state_dict())

    def test_flat_actions_without_a_chunk_size(self):
        td = actor(chunk_size=None)(TensorDict(observation=torch.randn(5, OBS)))
        assert td["action"].shape == (5, D)

    def test_errors(self):
        with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
            actor(num_candidates=0)
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            actor(chunk_size=0)
        td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, 3, D))
        with pytest.raises(ValueError, match="num_candidates=6"):
            actor(num_candidates=6)(td)


if __name__ == "__main__":
    pytest.main([__file__])
