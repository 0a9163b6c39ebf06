"""The actor of two levels."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, ObservationNorm

from torchrl_mac import load_policy
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
    SubgoalActor,
    build,
    describe,
    save_policy,
)

B, OBS, G, A, H, N, F = 5, 4, 2, 3, 2, 7, 3
D, CELLS = H * A, [8]


def make_actor(subgoal="subgoal", subgoal_noise="subgoal_noise", noise="noise", **kwargs):
    torch.manual_seed(0)
    proposals = FlowMatchingPolicy(
        NormedMLP(OBS + G + G + 1, G, CELLS),
        G,
        F,
        low=-math.inf,
        high=math.inf,
        in_keys=["observation", "goal", subgoal_noise],
        out_keys=[subgoal],
    )
    policy = FlowMatchingPolicy(
        NormedMLP(OBS + G + D + 1, D, CELLS), D, F, in_keys=["observation", subgoal, noise]
    )
    critics = StackedMLP(2, OBS + G + G, 1, CELLS, broadcast=True)
    qvalue = QValueEnsemble(critics, q_aggregation="min", in_keys=["observation", "goal", subgoal])
    chosen = FlowRejectionActor(
        proposals, qvalue, num_candidates=N, action_key=subgoal, noise_key=subgoal_noise
    )
    return SubgoalActor(chosen, policy, noise_key=noise, chunk_size=H, **kwargs)


def state(batch=(B,)):
    return TensorDict(
        observation=torch.randn(*batch, OBS),
        goal=torch.randn(*batch, G),
        subgoal_noise=3 * torch.randn(*batch, N, G),
        noise=torch.randn(*batch, D),
        batch_size=batch,
    )


def euler(network, condition, x):
    for i in range(F):
        x = x + network(torch.cat([condition, x, torch.tensor([i / F])])) / F
    return x


@pytest.mark.parametrize("batch", [(), (B,), (2, 3)])
def test_acts_towards_the_best_subgoal(batch):
    actor, td = make_actor(), state(batch)
    out, above = actor(td.clone()), actor.subgoal_actor
    largest = 0.0
    for row, found in zip(td.reshape(-1), out.reshape(-1), strict=True):
        s, g, values, subgoals = row["observation"], row["goal"], [], []
        for noise in row["subgoal_noise"]:
            w = euler(above.policy.module.velocity_network, torch.cat([s, g]), noise)
            values.append(above.qvalue_network.network(torch.cat([s, g, w])).min())
            subgoals.append(w)
        best = max(range(N), key=lambda n: values[n].item())
        torch.testing.assert_close(found["subgoal"], subgoals[best])
        torch.testing.assert_close(found["chosen_action_value"].squeeze(-1), values[best])
        condition = torch.cat([s, subgoals[best]])
        action = euler(actor.policy.module.velocity_network, condition, row["noise"])
        torch.testing.assert_close(found["action"].flatten(), action.clamp(-1, 1))
        largest = max(largest, found["subgoal"].abs().max().item())
    assert largest > 1  # a subgoal is not clipped


def test_reads_what_it_needs_and_writes_no_more():
    actor, td = make_actor(), state().exclude("noise", "subgoal_noise")
    assert actor.in_keys == ["observation", "goal"]
    out = actor(td.clone())
    written = {"action", "subgoal", "chosen_action_value"}
    assert set(out.keys()) == {"observation", "goal", *written} and set(actor.out_keys) == written
    assert out["action"].shape == (B, H, A)
    assert not torch.equal(out["subgoal"], actor(td.clone())["subgoal"])  # noise is drawn
    actor.select_out_keys("action")
    assert set(actor(td).keys()) == {"observation", "goal", "action"}


def test_takes_tensors():
    actor, td = make_actor(), state()
    action, subgoal, value = actor(**td.to_dict())
    out = actor(td)
    for key, tensor in (("action", action), ("subgoal", subgoal), ("chosen_action_value", value)):
        assert torch.equal(out[key], tensor)


def test_nested_keys():
    td = state()
    expected = make_actor()(td.clone())
    renamed = {"subgoal": ("high", "w"), "subgoal_noise": ("high", "z"), "noise": ("low", "z")}
    for before in ("subgoal_noise", "noise"):
        td[renamed[before]] = td.pop(before)
    out = make_actor(**renamed, action_key=("low", "action"))(td)
    assert torch.equal(out["low", "action"], expected["action"])
    assert torch.equal(out["high", "w"], expected["subgoal"])


def test_levels_have_noise_of_their_own():
    with pytest.raises(ValueError, match="Both levels read their noise from 'noise'"):
        make_actor(subgoal_noise="noise")


def test_the_policy_must_read_the_subgoal():
    actor = make_actor()
    policy = FlowMatchingPolicy(NormedMLP(OBS + G + A + 1, A, CELLS), A)
    with pytest.raises(ValueError, match="but the subgoal is written to 'subgoal'"):
        SubgoalActor(actor.subgoal_actor, policy)


def test_the_number_of_candidates_is_that_of_subgoals():
    actor, td = make_actor(), state().exclude("noise", "subgoal_noise")
    actor.num_candidates = 3
    assert actor.subgoal_actor.num_candidates == actor.num_candidates == 3
    assert actor.subgoal_actor.candidates(td).shape == (B, 3)


def test_is_exported(tmp_path):
    norms = [
        ObservationNorm(torch.randn(n), torch.rand(n) + 0.5, in_keys=[key])
        for n, key in ((OBS, "observation"), (G, "goal"))
    ]
    actor, td = make_actor(transform=Compose(*norms)), state()
    config = json.loads(json.dumps(describe(actor)))
    assert json.loads(json.dumps(describe(build(config)))) == config
    again = load_policy(save_policy(actor, tmp_path / "policy"))
    assert again.in_keys == actor.in_keys and again.num_candidates == N
    out = again(td.clone())
    for key in ("action", "subgoal"):
        assert torch.equal(out[key], actor(td.clone())[key])
    assert out["subgoal"].abs().max() > 1


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    actor, td = make_actor(), state()
    compiled = torch.compile(actor, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(td.clone())["action"], actor(td.clone())["action"])


if __name__ == "__main__":
    pytest.main([__file__])
