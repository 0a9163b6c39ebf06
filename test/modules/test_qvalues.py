from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_mac.modules import (
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    QValueEnsemble,
    StackedMLP,
)

E, OBS, H, A = 3, 4, 2, 2


def ensemble(**kwargs):
    network = StackedMLP(E, OBS + H * A, 1, [8], broadcast=True)
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return QValueEnsemble(network, **kwargs)


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 2)])
def test_values_are_those_of_the_critics(shape, aggregation):
    qvalue = ensemble(q_aggregation=aggregation)
    observation, chunk = torch.randn(*shape, OBS), torch.rand(*shape, H, A)
    td = qvalue(TensorDict(observation=observation, action=chunk, batch_size=shape))
    members = [qvalue.network.network(e)(observation, chunk) for e in range(E)]
    torch.testing.assert_close(td["member_values"], torch.cat(members, -1))
    expected = sum(members) / E if aggregation == "mean" else torch.stack(members).amin(0)
    torch.testing.assert_close(td["state_action_value"], expected)
    assert qvalue.num_members == E


def test_candidates_are_ranked_by_the_aggregate():
    qvalue = ensemble(q_aggregation="min")
    policy = OneStepPolicy(NormedMLP(OBS + H * A, H * A, [8]), H * A)
    actor = FlowRejectionActor(policy, qvalue, num_candidates=6, chunk_size=H)
    td = TensorDict(observation=torch.randn(5, OBS), noise=torch.randn(5, 6, H * A), batch_size=[5])
    candidates = actor.candidates(td)
    best = candidates["member_values"].amin(-1).argmax(-1)
    expected = candidates["action"][torch.arange(5), best]
    assert torch.equal(actor(td)["action"], expected)


def test_nested_keys():
    qvalue = ensemble(in_keys=[("o", "x"), ("a", "c")], out_keys=[("q", "one"), ("q", "all")])
    td = TensorDict(o=TensorDict(x=torch.randn(5, OBS)), a=TensorDict(c=torch.rand(5, H, A)))
    td = qvalue(td.auto_batch_size_(1))
    assert td["q", "one"].shape == (5, 1) and td["q", "all"].shape == (5, E)


def test_errors():
    network = StackedMLP(E, OBS, 1, [8])
    with pytest.raises(ValueError, match="broadcast=True and one output"):
        QValueEnsemble(network)
    with pytest.raises(ValueError, match=r"one of \('mean', 'min'\), got 'max'"):
        ensemble(q_aggregation="max")


if __name__ == "__main__":
    pytest.main([__file__])
