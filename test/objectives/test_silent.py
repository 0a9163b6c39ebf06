"""What used to give other numbers without a word."""

from __future__ import annotations

import copy

import pytest
import torch
from assembly import Size, make_batch, make_mac
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator

from torchrl_mac.modules import FlowRejectionActor, NormedMLP
from torchrl_mac.objectives import ValueExpansionLoss

B, OBS, H, A, N, K = 6, 4, 3, 2, 5, 4
SIZE = Size([8, 8], B, N, K, 3, OBS, A, H)


def make(name="values", **options):
    loss = make_mac(SIZE, **options)[name]
    if name == "values":
        SoftUpdate(loss, tau=0.1)
    return loss


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("behaviour", "flow_noise", (B, 1)),
        ("behaviour", "flow_time", (B,)),
        ("behaviour", "flow_time", (B, H * A)),
        ("behaviour", "distillation_noise", (B, 1)),
        ("behaviour", "action", (B, H, 1)),
        ("world_model", ("next", "observation"), (B, 1)),
        ("world_model", ("next", "reward"), (B,)),
        ("world_model", ("next", "reward"), (B, 3)),
        ("world_model", ("next", "terminated"), (B,)),
        ("values", "noise", (B, 1, N, H * A)),
        ("values", "noise", (B, K + 1, N, H * A)),
    ],
    ids=str,
)
def test_what_would_broadcast_is_refused(name, key, shape):
    loss, td = make(name), make_batch(SIZE)
    value = td[key]
    td[key] = torch.zeros(shape, dtype=value.dtype)
    with pytest.raises(ValueError, match=r"has shape|takes"):
        loss(td)
    loss(td.set(key, value))


def test_a_network_of_one_output_is_no_dynamics():
    loss = make("world_model")
    loss.world_model.dynamics_network = NormedMLP(OBS + H * A, 1, [8])
    broken = type(loss)(loss.world_model)
    with pytest.raises(ValueError, match=r"must have shape \[6, 4\], but has \[6, 1\]"):
        broken(make_batch(SIZE))


class TestRanking:
    def follows(self, loss):
        """Whether imagination chooses by the parameters that the loss trains."""
        td = make_batch(SIZE)
        first = loss.imagine(td)[..., 0]
        state = td.select("observation").set("noise", td["noise"][:, 0])
        with loss.qvalue_network_params.to_module(loss.qvalue_network), torch.no_grad():
            candidates = loss.actor_network.candidates(state)
        best = candidates["state_action_value"].max(1).values
        return torch.allclose(first["chosen_action_value"], best, atol=1e-5)

    def test_follows_a_copy(self):
        loss = copy.deepcopy(make())
        loss.qvalue_network_params.apply_(lambda x: x.data.add_(torch.randn_like(x)))
        assert self.follows(loss)

    def test_follows_parameters_that_are_swapped_in(self):
        loss = make()
        td = make_batch(SIZE)
        before = loss.imagine(td)["chosen_action_value"]
        other = loss.qvalue_network_params.data.apply(lambda x: x + torch.randn_like(x))
        loss.qvalue_network_params.data.update_(other)
        assert not torch.allclose(loss.imagine(td)["chosen_action_value"], before)
        assert self.follows(loss)

    def test_by_the_value_that_is_trained(self):
        class Twin(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.both = NormedMLP(OBS + H * A, 2, [8])

            def forward(self, observation, action):
                both = self.both(observation, action)
                return both[..., :1], both.min(-1, keepdim=True).values

        plain = make()
        keys = ["first", "least"]
        network = TensorDictModule(Twin(), ["observation", "action"], keys)
        policy = plain.actor_network.policy
        settings = {"num_candidates": N, "chunk_size": H, "qvalue_key": "least"}
        actor = FlowRejectionActor(policy, network, **settings)
        loss = ValueExpansionLoss(
            actor, plain.value_network, network, plain.world_model, imagination_horizon=K
        )
        assert loss.tensor_keys.state_action_value == "least"
        td = make_batch(SIZE)
        first = loss.imagine(td)[..., 0]
        with torch.no_grad():
            values = network(first.select("observation", "action"))
            target = loss.value_network(first["next"].select("observation"))["state_value"]
        target = (
            first["next", "reward"]
            + loss.value_estimator.gamma * target * ~(first["next", "terminated"])
        )
        torch.testing.assert_close(first["chosen_action_value"], values["least"])
        expected = (values["least"] - target).square().mean()
        torch.testing.assert_close(loss(td)["loss_qvalue"].detach(), expected)

    def test_another_network_is_refused(self):
        loss = make()
        other = ValueOperator(NormedMLP(OBS + H * A, 1, [8]), in_keys=["observation", "action"])
        actor = FlowRejectionActor(loss.actor_network.policy, other, chunk_size=H)
        with pytest.raises(ValueError, match="ranks candidates with another network"):
            ValueExpansionLoss(actor, loss.value_network, loss.qvalue_network, loss.world_model)


@pytest.mark.parametrize("key", [("collector", "mask"), "shifted_valid"])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_masked_samples_do_not_count(key, trailing):
    loss, td = make(), make_batch(SIZE)
    mask = torch.tensor([True, False, True, True, False, True])
    expected = loss(td[mask])
    td.set(key, mask.reshape(B, *trailing))
    td["observation"][~mask] = float("nan")
    found = loss(td)
    for name in ("loss_value", "loss_qvalue"):
        torch.testing.assert_close(found[name], expected[name])
    loss.reduction = "none"
    assert loss(td)["loss_value"].shape == (B,)


class TestEstimators:
    @pytest.mark.parametrize(
        "kind", [ValueEstimators.TDLambda, "tdlambda", "TDLambda", "td_lambda", TDLambdaEstimator]
    )
    def test_one_default_by_any_name(self, kind):
        loss = make()
        loss.make_value_estimator(kind, gamma=0.9)
        assert loss.value_estimator.lmbda == 1.0
        assert loss.value_estimator.gamma == pytest.approx(0.9**H)

    def test_instances_and_classes(self):
        loss, td = make(), make_batch(SIZE)
        rollout = loss.imagine(td)
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        expected = loss.value_target(rollout)
        loss.make_value_estimator(TD0Estimator, gamma=0.9)
        torch.testing.assert_close(loss.value_target(rollout), expected)
        loss.make_value_estimator(TD0Estimator(gamma=0.9**H, value_network=None))
        torch.testing.assert_close(loss.value_target(rollout), expected)
        assert loss(td)["loss_value"].isfinite()
        with pytest.raises(ValueError, match=r"has its own \['gamma'\]"):
            loss.make_value_estimator(TD0Estimator(gamma=0.9, value_network=None), gamma=0.5)

    @pytest.mark.parametrize(
        "settings", [{"gamma": 2.0}, {"gamma": -1.0}, {"gamma": 0}, {"lmbda": 2}, {"lmbda": -1}]
    )
    def test_out_of_range(self, settings):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} must be .*, got {settings[name]}"):
            make().make_value_estimator(**settings)


def test_the_rollout_is_as_long_as_its_noise():
    loss, td = make(), make_batch(SIZE)
    assert loss.imagine(td).shape == (B, K)
    assert loss.imagine(td, 2).shape == (B, 2)
    assert loss.imagine(TensorDict(observation=td["observation"]), 7).shape == (B, 7)


if __name__ == "__main__":
    pytest.main([__file__])
