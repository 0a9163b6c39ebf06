from __future__ import annotations

import json

import pytest
import torch
from tensordict import TensorDict

from torchrl_mac.modules import (
    NormedMLP,
    PolicyActor,
    TanhPolicy,
    build,
    describe,
)

OBS, G, H, A = 4, 2, 3, 2
D = H * A


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_it_is_the_tanh_of_its_network(batch):
    policy = TanhPolicy(NormedMLP(OBS + G, D, [8]), in_keys=[("x", "state"), "goal"])
    state, goal = torch.randn(*batch, OBS), torch.randn(*batch, G)
    expected = policy.network(torch.cat([state, goal], -1)).tanh()
    td = TensorDict(x=TensorDict(state=state), goal=goal)
    torch.testing.assert_close(policy(td)["action"], expected)
    torch.testing.assert_close(policy(x_state=state, goal=goal), expected)


def test_it_acts_in_chunks_and_comes_back_from_its_description():
    actor = PolicyActor(TanhPolicy(NormedMLP(OBS, D, [8])), chunk_size=H)
    td = TensorDict(observation=torch.randn(5, OBS), batch_size=[5])
    chunk = actor(td.clone())["action"]
    assert chunk.shape == (5, H, A)
    again = build(json.loads(json.dumps(describe(actor))))
    again.load_state_dict(actor.state_dict())
    assert torch.equal(again(td)["action"], chunk)


@pytest.mark.parametrize("keys", [{"in_keys": []}, {"out_keys": ["a", "b"]}])
def test_keys(keys):
    with pytest.raises(ValueError, match="reads one or more conditions and writes one action"):
        TanhPolicy(NormedMLP(OBS, D, [8]), **keys)


if __name__ == "__main__":
    pytest.main([__file__])
