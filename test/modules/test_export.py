from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tensordict import TensorDict
from torch import nn
from torchrl.envs import Compose, ObservationNorm, RewardScaling
from torchrl.modules import ValueOperator

from torchrl_mac import load_policy
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    OneStepPolicy,
    save_policy,
)
from torchrl_mac.trainers import load_policy_and_metadata
from torchrl_mac.utils.files import DamagedError

OBS, GOAL, H, A = 3, 2, 4, 2
D = H * A


def make_actor(kind="onestep", goal=False, activation=nn.ReLU, transform="composed", **kwargs):
    state, size = ["observation"], OBS
    if goal:
        state, size = ["observation", ("task", "goal")], OBS + GOAL

    def network(inputs, outputs, **settings):
        return NormedMLP(inputs, outputs, [8, 6], activation_class=activation, **settings)

    if kind == "flow":
        policy = FlowMatchingPolicy(
            network(size + D + 1, D), D, 3, high=torch.full((D,), 0.5), in_keys=[*state, "noise"]
        )
    else:
        policy = OneStepPolicy(network(size + D, D), D, in_keys=[*state, "noise"])
    qvalue = ValueOperator(
        network(size + D, 1, layer_norm=False), in_keys=[*state, kwargs.get("action_key", "action")]
    )
    norm = ObservationNorm(
        torch.randn(OBS), torch.rand(OBS) + 0.5, in_keys=["observation"], standard_normal=True
    )
    transform = {"composed": Compose(norm), "single": norm, None: None}[transform]
    return FlowRejectionActor(
        policy, qvalue, num_candidates=5, chunk_size=H, transform=transform, **kwargs
    )


def raw(goal=False):
    td = TensorDict(observation=torch.randn(4, OBS), noise=torch.randn(4, 5, D), batch_size=[4])
    return td.set(("task", "goal"), torch.randn(4, GOAL)) if goal else td


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "flow"},
        {"goal": True},
        {"transform": "single"},
        {"transform": None},
        {"action_key": ("agent", "action"), "value_key": ("agent", "q")},
    ],
    ids=str,
)
def test_the_loaded_actor_acts_the_same_on_raw_observations(tmp_path, settings):
    actor = make_actor(**settings)
    folder = save_policy(actor, tmp_path / "policy", {"dataset": "cube", "replan_interval": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
    again = load_policy(folder)
    td = raw(settings.get("goal", False))
    expected, found = actor(td.clone()), again(td.clone())
    for key in actor.out_keys:
        assert torch.equal(found[key], expected[key])
    assert (found["observation"] == td["observation"]).all()
    assert again.num_candidates == 5 and again.chunk_size == H
    assert load_policy_and_metadata(folder)[1] == {"dataset": "cube", "replan_interval": 2}
    assert not again.training


def test_the_files_are_what_others_read(tmp_path):
    actor = make_actor()
    save_policy(actor, tmp_path / "policy")
    with safe_open(tmp_path / "policy/policy.safetensors", "pt") as file:
        assert set(file.keys()) == set(actor.state_dict())
    config = json.loads((tmp_path / "policy/policy.json").read_text())
    assert config["actor"]["policy"]["network"]["num_cells"] == [8, 6]
    assert config["actor"]["policy"]["network"]["activation_class"] == "relu"
    assert config["actor"]["qvalue_network"]["module"]["layer_norm"] is False


def test_needs_neither_hydra_nor_a_simulator(tmp_path):
    save_policy(make_actor(), tmp_path / "policy")
    code = (
        "import sys; from torchrl_mac import load_policy; load_policy(sys.argv[1])\n"
        "bad = {'hydra', 'omegaconf', 'ogbench', 'wandb'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "policy")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_an_export_is_replaced_but_nothing_else(tmp_path):
    save_policy(make_actor(), tmp_path / "policy")
    actor = make_actor()
    save_policy(actor, tmp_path / "policy")
    td = raw()
    assert torch.equal(load_policy(tmp_path / "policy")(td.clone())["action"], actor(td)["action"])
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not an exported policy"):
        save_policy(actor, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "policy"]


def test_files_beside_an_export_are_not_deleted(tmp_path):
    folder = save_policy(make_actor(), tmp_path / "policy")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also has \['notes\.txt'\]"):
        save_policy(make_actor(), folder)
    assert (folder / "notes.txt").read_text() == "mine"
    modes = {path.stat().st_mode for path in folder.glob("policy.*")}
    assert len(modes) == 1  # whoever may read the one may read the other


def test_a_link_at_the_staging_name_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").write_text("mine")
    (tmp_path / ".policy.partial").symlink_to(tmp_path / "elsewhere")
    load_policy(save_policy(make_actor(), tmp_path / "policy"))
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "policy").is_symlink()


@pytest.mark.parametrize("name", ["actor", "path", "metadata", "class"])
def test_any_name_of_a_setting_will_do(tmp_path, name):
    folder = save_policy(make_actor(), tmp_path / "policy", {name: 1})
    assert load_policy_and_metadata(folder)[1] == {name: 1}


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    actor = make_actor()
    save_policy(actor, tmp_path / "policy")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchrl_mac.modules.export.seal", full)
    with pytest.raises(OSError, match="No space"):
        save_policy(make_actor(), tmp_path / "policy")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
    load_policy(tmp_path / "policy")


def test_errors(tmp_path):
    folder = save_policy(make_actor(), tmp_path / "policy")
    file = folder / "policy.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=r"policy\.safetensors is not as it was saved"):
        load_policy(folder)
    with pytest.raises(FileNotFoundError, match=r"neither policy\.json nor checkpoints"):
        load_policy(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No checkpoint in .* has been evaluated"):
        load_policy(tmp_path, which="best")
    (folder / "hashes.json").unlink()
    config = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps({**config, "version": 99}))
    with pytest.raises(ValueError, match="of version 99"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": nn.Linear(2, 2)}, "A Linear cannot be exported"),
        ({"qvalue_network": nn.Linear(2, 2)}, "A Linear cannot be exported"),
        ({"transform": RewardScaling(0, 1)}, "A RewardScaling cannot be exported"),
    ],
)
def test_what_cannot_be_described_is_named(tmp_path, change, message):
    actor = make_actor()
    for name, part in change.items():
        part.in_keys, part.out_keys = [], []
        setattr(actor, name, part)
    with pytest.raises(TypeError, match=message):
        save_policy(actor, tmp_path / "policy")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="Only the activations"):
        save_policy(make_actor(activation=nn.Tanh), tmp_path / "policy")
