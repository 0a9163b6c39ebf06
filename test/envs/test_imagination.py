from __future__ import annotations

import pytest
import torch
from assembly import Size, make_batch, make_mac
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.objectives import LossModule, hold_out_net

from torchrl_mac.envs import ChunkedWorldModelEnv, imagine
from torchrl_mac.modules import (
    ChunkedWorldModel,
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    OneStepPolicy,
    PolicyActor,
    StackedMLP,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss
from torchrl_mac.trainers import LossUpdate, make_adam

OBS, H, A, K = 4, 3, 2, 5
D = H * A


def make_model():
    return ChunkedWorldModel(*(NormedMLP(OBS + D, n, [8]) for n in (OBS, 1, 1)))


@pytest.mark.parametrize("goal", [0, 2])
def test_equals_a_rollout_of_the_environment(goal):
    values = make_mac(Size([8], 6, 3, K, 2, OBS, A, H, goal))["values"]
    actor, model = values.actor_network, values.world_model
    # An environment starts anew where the task ends; imagination goes on.
    nn.init.constant_(model.termination_network.layers[-1].bias, -100.0)
    spec = {"observation": Unbounded(OBS), **({"goal": Unbounded(goal)} if goal else {})}
    env = ChunkedWorldModelEnv(model, Composite(spec), Bounded(-1, 1, shape=(A,)), chunk_size=H)
    start = TensorDict({key: torch.randn(6, *of.shape) for key, of in spec.items()}, [6])
    torch.manual_seed(1)
    ours = imagine(actor, model, start, K)
    torch.manual_seed(1)
    theirs = env.rollout(
        K, actor, tensordict=start.clone(), set_state=True, break_when_any_done=False
    )
    for key in ("observation", "action", *(("next", k) for k in ("observation", "reward", "done"))):
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-5)
    assert set(start.keys()) == set(spec)  # it is left as it was


def test_gradients_flow_through_states_and_actions():
    """Against a plain loop over tensors."""
    model, policy = make_model(), OneStepPolicy(NormedMLP(OBS + D, D, [8]), D, low=-9.0, high=9.0)
    start, noise = torch.randn(6, OBS), torch.randn(6, K, D)
    state = TensorDict(observation=start.clone().requires_grad_(), batch_size=[6])
    rollout = imagine(PolicyActor(policy, chunk_size=H), model, state, K, noise=noise)
    rollout["next", "reward"].sum().backward()
    found = [state["observation"].grad, *(p.grad.clone() for p in policy.parameters())]
    policy.zero_grad()
    observation = first = start.clone().requires_grad_()
    total = torch.zeros(())
    for k in range(K):
        action = policy(observation, noise[:, k])
        total = total + model.reward_network(observation, action).sum()
        observation = observation + model.dynamics_network(observation, action)
    total.backward()
    expected = [first.grad, *(p.grad for p in policy.parameters())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_noise_of_the_world_model_as_well():
    network = StackedMLP(3, OBS + D, 2 * OBS, [8], broadcast=True)
    heads = (NormedMLP(OBS + D, 1, [8]) for _ in range(2))
    model = EnsembleWorldModel(GaussianEnsemble(network), *heads)
    policy = OneStepPolicy(NormedMLP(OBS + D, D, [8]), D)
    noise = TensorDict(
        noise=torch.randn(6, K, D),
        model_noise=torch.randn(6, K, OBS),
        member=torch.randint(3, (6, K)),
        batch_size=[6, K],
    )
    start = TensorDict(observation=torch.randn(6, OBS), batch_size=[6])
    rollout = imagine(PolicyActor(policy, chunk_size=H), model, start, K, noise=noise)
    observation = start["observation"]
    for k in range(K):
        mean, std = network(observation, policy(observation, noise["noise"][:, k])).chunk(2, -1)
        std = (-5 + 6 * std.sigmoid()).exp()
        member, row = noise["member"][:, k], torch.arange(6)
        change = mean[member, row] + std[member, row] * noise["model_noise"][:, k]
        torch.testing.assert_close(rollout["observation"][:, k], observation)
        observation = observation + change


class ActorLoss(LossModule):
    """An actor that is trained through a world model, which it only reads."""

    out_keys = ["loss_actor"]  # noqa: RUF012

    def __init__(self, policy, world_model):
        super().__init__()
        self.convert_to_functional(policy, "actor_network")
        self.__dict__["world_model"] = world_model

    @property
    def in_keys(self):
        return ["observation"]

    def forward(self, tensordict):
        start = tensordict.select("observation")
        with (
            hold_out_net(self.world_model),
            self.actor_network_params.to_module(self.actor_network),
        ):
            rollout = imagine(self.actor_network, self.world_model, start, 3)
        return TensorDict(loss_actor=-rollout["next", "reward"].mean())

    def _forward_value_estimator_keys(self, **kwargs):
        pass


def joint(**switches):
    torch.manual_seed(0)
    model = make_model()
    actor = TensorDictModule(
        nn.Sequential(nn.Linear(OBS, D), nn.Tanh(), nn.Unflatten(-1, (H, A))),
        ["observation"],
        ["action"],
    )
    losses = {"model": ChunkedWorldModelLoss(model), "actor": ActorLoss(actor, model)}
    return LossUpdate(losses, make_adam(losses, 1e-2), **switches), model, actor


def test_what_a_loss_only_reads_gets_no_gradient():
    batch = make_batch(Size(batch=6, observation=OBS, action=A, chunk=H))
    update, model, actor = joint()
    update.total(batch)[0].backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(update.losses["model"](batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(together[name], parameter.grad), name
    assert all(p.grad.any() for p in actor.parameters())


def test_it_compiles_to_the_same():
    torch._dynamo.reset()
    eager, *_ = joint()
    compiled, *_ = joint(compile={"backend": "aot_eager"})
    size = Size(batch=6, observation=OBS, action=A, chunk=H)
    for seed in range(3):
        batch = make_batch(size, seed=seed)
        torch.testing.assert_close(compiled(batch), eager(batch), atol=1e-5, rtol=1e-4)
    assert compiled.is_compiled


def test_any_module_can_be_the_model():
    class Half(nn.Module):
        def forward(self, observation, action):
            return observation / 2, action.sum((-2, -1)).unsqueeze(-1)

    keys = [("next", "observation"), ("next", "reward")]
    model = TensorDictModule(Half(), ["observation", "action"], keys)
    actor = PolicyActor(OneStepPolicy(NormedMLP(OBS + D, D, [8]), D), chunk_size=H)
    start = TensorDict(observation=torch.full((2, OBS), 8.0), batch_size=[2])
    rollout = imagine(actor, model, start, 3)
    assert rollout["next", "observation"][0, :, 0].tolist() == [4.0, 2.0, 1.0]
    torch.testing.assert_close(
        rollout["next", "reward"], rollout["action"].sum((-2, -1)).unsqueeze(-1)
    )


if __name__ == "__main__":
    pytest.main([__file__])
