"""Networks that read the first actions of a chunk, and actors that rank by them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from torchrl_mac import load_policy
from torchrl_mac.modules import (
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    QValueEnsemble,
    StackedMLP,
    build,
    describe,
    save_policy,
)

B, OBS, H, A, K, N = 5, 4, 3, 2, 2, 6
CELLS = [8]


def shifted(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def make_actor(keys=("observation", "action"), **kwargs):
    state, action = keys
    policy = OneStepPolicy(
        shifted(NormedMLP(OBS + H * A, H * A, CELLS)), H * A, in_keys=[state, "noise"]
    )
    critic = shifted(NormedMLP(OBS + K * A, 1, CELLS, first_actions=K))
    qvalue = ValueOperator(critic, in_keys=[state, action])
    kwargs = {"chunk_size": H, "action_key": action, **kwargs}
    return FlowRejectionActor(policy, qvalue, num_candidates=N, **kwargs)


@pytest.mark.parametrize("shape", [(), (B,), (B, 2)])
@pytest.mark.parametrize("kind", ["one", "broadcast", "stacked"])
def test_a_network_reads_the_first_actions(shape, kind):
    make = {
        "one": NormedMLP,
        "broadcast": lambda *args, **kw: StackedMLP(2, *args, broadcast=True, **kw),
        "stacked": lambda *args, **kw: StackedMLP(2, *args, **kw),
    }[kind]
    network = shifted(make(OBS + K * A, 1, CELLS, first_actions=K))
    tasks = (2,) if kind == "stacked" else ()
    state, chunk = torch.randn(*tasks, *shape, OBS), torch.rand(*tasks, *shape, H, A)
    value = network(state, chunk)
    begun = chunk[..., :K, :].flatten(-2)
    assert torch.equal(value, network(torch.cat([state, begun], -1)))
    assert torch.equal(value, network(state, chunk[..., :K, :]))  # what a policy proposes
    changed = chunk.clone()
    changed[..., K:, :] += 1
    assert torch.equal(value, network(state, changed))
    if kind != "one":
        alone = network.network(1)(*((x[1] for x in (state, chunk)) if tasks else (state, chunk)))
        torch.testing.assert_close(alone, value[1])


def test_what_cannot_be_read_is_refused():
    network = NormedMLP(OBS + K * A, 1, CELLS, first_actions=K)
    for chunk in (torch.rand(B, K - 1, A), torch.rand(B, H * A)):  # too short, or flat
        with pytest.raises(ValueError, match="The network takes 8 numbers"):
            network(torch.randn(B, OBS), chunk)


def test_the_description_has_them_and_may_lack_them():
    for network in (
        NormedMLP(OBS + K * A, 1, CELLS, first_actions=K),
        StackedMLP(2, OBS + K * A, 1, CELLS, first_actions=K),
    ):
        assert build(describe(network)).first_actions == K
        older = {key: of for key, of in describe(network).items() if key != "first_actions"}
        assert build(older).first_actions is None


@pytest.mark.parametrize("keys", [("observation", "action"), (("x", "o"), ("x", "a"))], ids=str)
def test_candidates_are_ranked_by_their_beginning(keys):
    actor = make_actor(keys)
    td = TensorDict({keys[0]: torch.randn(B, OBS), "noise": torch.randn(B, N, H * A)}, [B])
    candidates = actor.candidates(td)
    assert candidates[keys[1]].shape == (B, N, H, A)
    critic, expected = actor.qvalue_network.module, []
    for b in range(B):
        values = [
            critic(torch.cat([td[keys[0]][b], candidates[keys[1]][b, n, :K].flatten()]))
            for n in range(N)
        ]
        expected.append(candidates[keys[1]][b, torch.cat(values).argmax()])
    assert torch.equal(actor(td)[keys[1]], torch.stack(expected))  # the whole of the best


def test_an_export_ranks_in_the_same_way(tmp_path):
    actor = make_actor()
    td = TensorDict(observation=torch.randn(B, OBS), noise=torch.randn(B, N, H * A), batch_size=[B])
    again = load_policy(save_policy(actor, tmp_path / "policy"))
    assert again.qvalue_network.module.first_actions == K
    expected, found = actor(td.clone()), again(td.clone())
    assert torch.equal(found["action"], expected["action"])
    assert found["action"].shape == (B, H, A)


def test_critics_of_what_is_proposed_rank_it():
    network = StackedMLP(2, OBS + K * A, 1, CELLS, first_actions=K, broadcast=True)
    qvalue = QValueEnsemble(network, q_aggregation="min")
    policy = OneStepPolicy(NormedMLP(OBS + K * A, K * A, CELLS), K * A)
    actor = FlowRejectionActor(policy, qvalue, num_candidates=N, chunk_size=K)
    td = actor(TensorDict(observation=torch.randn(B, OBS), batch_size=[B]))
    assert td["action"].shape == (B, K, A)
    longer = TensorDict(
        observation=td["observation"], action=torch.cat([td["action"], torch.rand(B, 3, A)], 1)
    )
    value = qvalue(longer.auto_batch_size_(1))["state_action_value"]
    torch.testing.assert_close(value, td["chosen_action_value"])


if __name__ == "__main__":
    pytest.main([__file__])
