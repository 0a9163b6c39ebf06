from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from torchrl_mac.data import MixedReplayBuffer
from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import (
    ChunkedSACLoss,
    RewardPenalty,
    deviation_penalty,
    value_penalty,
)

E, Q, M, OBS, A, G, B = 4, 2, 3, 3, 2, 2, 5


def shifted(network):
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network


def make_model(goal=False):
    sizes = {"in_features": OBS + A, "num_cells": [8]}
    network = shifted(StackedMLP(E, out_features=2 * OBS, broadcast=True, **sizes))
    width = OBS + A + (G if goal else 0)
    heads = (NormedMLP(width, 1, [8]) for _ in range(2))
    return EnsembleWorldModel(GaussianEnsemble(network), *heads, goal_key="goal" if goal else None)


def make_loss(goal=False, **kwargs):
    keys, width = (["goal"], G) if goal else ([], 0)
    policy = TanhGaussianPolicy(
        shifted(NormedMLP(OBS + width, 2 * A, [8])), A, in_keys=["observation", *keys, "noise"]
    )
    critics = shifted(StackedMLP(Q, OBS + width + A, 1, [8], broadcast=True))
    loss = ChunkedSACLoss(
        policy, QValueEnsemble(critics, in_keys=["observation", *keys, "action"]), **kwargs
    )
    loss.make_value_estimator(gamma=0.9)
    SoftUpdate(loss, tau=0.1)
    loss.target_qvalue_network_params.apply_(lambda x: x.data.add_(0.1 * torch.randn_like(x)))
    return loss


def batch(**kwargs):
    return TensorDict(
        observation=torch.randn(B, OBS),
        action=torch.rand(B, A) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(B, OBS),
            reward=torch.randn(B, 1),
            done=torch.zeros(B, 1, dtype=torch.bool),
            terminated=torch.zeros(B, 1, dtype=torch.bool),
        ),
        **kwargs,
    ).auto_batch_size_(1)


def test_deviation():
    model, td = make_model(), batch()
    _, std = model.dynamics_network(td["observation"], td["action"])
    expected = [max(float(std[e, b].norm()) for e in range(E)) for b in range(B)]
    torch.testing.assert_close(deviation_penalty(model, td), torch.tensor(expected))


@pytest.mark.parametrize("goal", [False, True])
def test_disagreement_of_values(goal):
    model, loss = make_model(goal), make_loss(goal)
    td = batch(value_goal=torch.randn(B, G))
    noise, z = torch.randn(E, M, B, OBS), torch.randn(E, M, B, A)
    mean, std = model.dynamics_network(td["observation"], td["action"])
    critic, expected = loss.qvalue_network, []
    with torch.no_grad(), loss.target_qvalue_network_params.to_module(critic):
        for b in range(B):
            valued = []
            for e in range(E):
                of_member = []
                for m in range(M):
                    s = td["observation"][b] + mean[e, b] + std[e, b] * noise[e, m, b]
                    s = torch.cat([s, td["value_goal"][b]]) if goal else s
                    action = loss.actor_network.module(s, z[e, m, b])
                    values = [critic.network.network(j)(torch.cat([s, action])) for j in range(Q)]
                    of_member.append(float(sum(values)) / Q)
                valued.append(sum(of_member) / M)
            middle = sum(valued) / E
            expected.append((sum((v - middle) ** 2 for v in valued) / E) ** 0.5)
    found = value_penalty(loss, model, td, model_noise=noise, actor_noise=z)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    drawn = value_penalty(loss, model, td, num_samples=2)
    assert drawn.shape == (B,) and not drawn.requires_grad


def test_imagined_rows_alone_are_penalised_with_the_model_as_it_is():
    model = make_model()
    buffers = [TensorDictReplayBuffer(storage=LazyTensorStorage(B)) for _ in range(2)]
    for buffer in buffers:
        buffer.extend(batch().set(("next", "reward"), torch.zeros(B, 1)))
    buffers[1].append_transform(RewardPenalty(lambda td: deviation_penalty(model, td), beta=2.0))
    mixed = MixedReplayBuffer(buffers, [0.5, 0.5])
    for _ in range(2):
        sample = mixed.sample(20)
        assert (sample["next", "reward"][:10] == 0).all()
        expected = -2 * deviation_penalty(model, sample[10:])
        torch.testing.assert_close(sample["next", "reward"][10:].squeeze(-1), expected)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    assert (buffers[1].storage[:]["next", "reward"] == 0).all()  # as they were imagined


def test_targets_are_clipped():
    td = batch()
    torch.manual_seed(0)
    free = make_loss().target(td.set("next_noise", torch.zeros(B, A)))
    torch.manual_seed(0)
    low, high = float(free.min()) + 0.1, float(free.max()) - 0.1
    clipped = make_loss(target_range=(low, high)).target(td)
    torch.testing.assert_close(clipped, free.clamp(low, high))


def test_the_actor_has_goals_of_its_own():
    loss, goals = make_loss(True), torch.randn(2, B, G)
    zeros = {"actor_noise": torch.zeros(B, A), "next_noise": torch.zeros(B, A)}
    one = batch(value_goal=goals[0], actor_goal=goals[0], **zeros)
    other = one.clone().set("actor_goal", goals[1])
    same, changed = loss(one), loss(other)
    assert torch.equal(same["loss_qvalue"], changed["loss_qvalue"])
    assert not torch.equal(same["loss_actor"], changed["loss_actor"])
    assert "actor_goal" in loss.in_keys and "value_goal" in loss.in_keys


if __name__ == "__main__":
    pytest.main([__file__])
