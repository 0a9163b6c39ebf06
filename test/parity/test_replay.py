from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import replay
import torch
from fixture import Fixture
from replay_mac import LOSSES, has_goals
from tensordict import TensorDict
from torchrl.modules import ValueOperator

from torchrl_mac.modules import FlowRejectionActor, NormedMLP, OneStepPolicy

ASSETS = Path(__file__).parents[1] / "assets"
CASES = ("st", "gc")


def fixture_of(case):
    return ASSETS / f"mac_{case}.npz"


def tampered(tmp_path, source, **changes):
    """The fixture with some arrays scaled."""
    with np.load(source) as file:
        arrays = {key: file[key] for key in file.files}
    for key, factor in changes.items():
        key = key.replace("__", "/")
        arrays[key] = arrays[key] * factor
    path = tmp_path / "tampered.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("case", CASES)
def test_replay_agrees_with_the_reference(capsys, case):
    assert replay.main([str(fixture_of(case))]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", case}
    assert report[case]["passed"]
    names = report[case]["all"]
    assert set(names["loss"]) == {*LOSSES, "total"}
    modules = {key.split("/")[0] for key in names["parameter"]}
    assert modules == {
        *("dynamics", "value", "target_value", "critic"),
        *("actor_flow", "actor_onestep_flow", "success", "reward"),
    }


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("st__step0__official__loss__critic", "loss"),
        ("gc__step0__batch__value_goals", "return"),
        ("gc__step0__batch__actor_goals", "gradient"),
        ("st__step1__official__rollout_observations", "rollout"),
        ("st__step1__official__rollout_returns", "return"),
        ("st__step0__grad__dynamics__Dense_0__kernel", "gradient"),
        ("st__step1__params_after__target_value__Dense_0__kernel", "parameter"),
    ],
)
def test_replay_notices_a_difference(tmp_path, capsys, key, kind):
    case = key[:2]
    path = tampered(tmp_path, fixture_of(case), **{key: 1.01})
    assert replay.main([str(path)]) == 1
    errors = json.loads(capsys.readouterr().out)[case]["largest_relative_error"]
    failed = [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]
    assert failed == [kind] if "batch" not in key else kind in failed


def test_replay_agrees_with_q_chunking(capsys):
    assert replay.main([str(ASSETS / "qc.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", "qcfql", "fqln", "bfnn", "qcrlpd", "data"}
    for case in ("qcfql", "fqln", "bfnn", "qcrlpd"):
        assert set(report[case]["largest_relative_error"]) == {
            *("window", "loss", "gradient", "parameter", "target", "action")
        }
    windows = report["data"]["all"]["window"]
    assert {"sequence_h5/valid", "replay/after22/valid"} <= set(windows)
    assert set(report["data"]["largest_relative_error"]) == {"window", "reward", "ring"}
    modules = {key.split("/")[0] for key in report["qcfql"]["all"]["parameter"]}
    assert modules == {"actor_bc_flow", "actor_onestep_flow", "critic"}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("qcfql__step0__official__critic__critic_loss", "loss"),
        ("qcfql__step2__batch__valid", "window"),
        ("qcfql__step0__noise__flow_x0", "gradient"),
        ("data__sequence_h5__rewards", "reward"),
        ("data__sequence_h5__masks", "window"),
        ("data__sequence_h5__next_observations", "window"),
        ("data__replay__after22__valid", "window"),
        ("data__replay__pointer_trace", "ring"),
        ("bfnn__step0__noise__next_noise", "action"),
        ("bfnn__eval_batch__official_action", "action"),
        ("qcrlpd__step0__grad__alpha__log_temp", "gradient"),
        ("qcrlpd__step0__params_after__actor__Dense_logstd__kernel", "parameter"),
        ("qcfql__step1__params_after__target_critic__LayerNorm_0__scale", "target"),
        ("fqln__step0__official__actor__distill_loss", "loss"),
    ],
)
def test_replay_of_q_chunking_notices_a_difference(tmp_path, capsys, key, kind):
    factor = 0 if key.endswith(("valid", "masks", "trace")) else 1.01
    assert replay.main([str(tampered(tmp_path, ASSETS / "qc.npz", **{key: factor}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    failed = [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]
    assert kind in failed


def test_replay_agrees_with_the_ablations(capsys):
    assert replay.main([str(ASSETS / "mac_variants.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", "mbrs_ac", "mbfql"}
    names = report["mbfql"]["all"]
    assert {"actor", "corrected/actor", "corrected/value"} <= set(names["loss"])
    assert {"returns", "corrected/returns"} == set(names["return"])
    modules = {key.split("/")[0] for key in report["mbrs_ac"]["all"]["parameter"]}
    assert "actor" in modules and "target_value" in modules


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("mbrs_ac__step0__official__loss__bc_actor", "loss"),
        ("mbrs_ac__step1__params_after__actor__log_std_net__kernel", "parameter"),
        ("mbfql__step0__official__rollout_returns", "return"),
        ("mbfql__step1__corrected__gae__returns", "return"),
        ("mbfql__step0__noise__actor_noises", "gradient"),
    ],
)
def test_replay_of_the_ablations_notices_a_difference(tmp_path, capsys, key, kind):
    assert replay.main([str(tampered(tmp_path, ASSETS / "mac_variants.npz", **{key: 1.01}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_agrees_with_mopo_and_mobile(capsys):
    assert replay.main([str(ASSETS / "mbpo.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", "mopo_st", "mobile_gc"}
    for case in ("mopo_st", "mobile_gc"):
        assert set(report[case]["largest_relative_error"]) == {
            *("loss", "rollout", "penalty", "gradient", "parameter")
        }


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("mopo_st__step0__official__penalty", "penalty"),
        ("mobile_gc__rollout__noise__model_eps", "rollout"),
        ("mobile_gc__step1__noise__penalty_actor_eps", "penalty"),
        ("mobile_gc__step1__params_after__target_critic__Dense_0__kernel", "parameter"),
        ("mopo_st__step0__official__loss__lam", "loss"),
    ],
)
def test_replay_of_mopo_and_mobile_notices_a_difference(tmp_path, capsys, key, kind):
    assert replay.main([str(tampered(tmp_path, ASSETS / "mbpo.npz", **{key: 1.05}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_agrees_with_fmpc(capsys):
    assert replay.main([str(ASSETS / "fmpc.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", "gc", "st"}
    for case in ("gc", "st"):
        names = report[case]["all"]
        assert set(report[case]["largest_relative_error"]) == {
            *("window", "loss", "target", "gradient", "parameter", "plan")
        }
        assert {"value", "corrected/value", "corrected/critic", "total"} <= set(names["loss"])
        modules = {key.split("/")[0] for key in names["parameter"]} - {"corrected"}
        assert modules == {"dynamics_flow", "actor_flow", "value", "critic"}
        assert {"returns_to_go", "next_observations", "rewards"} <= set(names["window"])
        assert {"eval_single/choice", "eval_batch/futures"} <= set(names["plan"])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("gc__step0__batch__returns_to_go", "window"),
        ("st__step2__batch__returns_to_go", "window"),
        ("st__step1__batch__next_observations", "window"),
        ("gc__step1__official__loss__critic", "loss"),
        ("gc__step0__corrected__loss__critic", "loss"),
        ("st__step0__corrected__loss__value", "loss"),
        ("gc__step1__explicit__critic_target", "target"),
        ("gc__step0__noise__dyn_x0", "gradient"),
        ("st__step0__corrected__grad__value__Dense_0__kernel", "gradient"),
        ("st__step2__params_after__dynamics_flow__Dense_0__kernel", "parameter"),
        ("gc__eval_batch__future_noise", "plan"),
        ("st__eval_single__official_action", "plan"),
    ],
)
def test_replay_of_fmpc_notices_a_difference(tmp_path, capsys, key, kind):
    assert replay.main([str(tampered(tmp_path, ASSETS / "fmpc.npz", **{key: 1.01}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_agrees_with_goal_conditioned_critics(capsys):
    assert replay.main([str(ASSETS / "gcrl.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"gciql", "ngcsacbc"} <= set(report)
    kinds = {"loss", "target", "gradient", "parameter", "target_parameter", "action"}
    modules = {"gciql": {"value", "critic", "actor"}, "ngcsacbc": {"critic", "actor", "lam"}}
    for case, trained in modules.items():
        assert set(report[case]["largest_relative_error"]) == kinds
        names = report[case]["all"]
        for kind in ("gradient", "parameter"):
            assert {key.split("/")[0] for key in names[kind]} == trained
        assert set(names["action"]) == {"temp0", "temp1"}
    losses = {"critic", "actor_total", "lam", "entropy", "total"}
    assert set(report["ngcsacbc"]["all"]["loss"]) == {
        *losses,
        *(f"corrected/{name}" for name in losses),
    }


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("gciql__step0__official__loss__value", "loss"),
        ("gciql__step0__batch__value_goals", "target"),
        ("gciql__step1__batch__actor_goals", "gradient"),
        ("gciql__step2__params_after__target_critic__Dense_0__kernel", "target_parameter"),
        ("gciql__eval__official_action_temp1", "action"),
        ("ngcsacbc__step0__noise__critic_eps", "target"),
        ("ngcsacbc__step0__noise__actor_eps", "gradient"),
        ("ngcsacbc__step1__batch__high_value_subgoal_steps", "target"),
        ("ngcsacbc__step1__corrected__high_value_rewards", "target"),
        ("ngcsacbc__step2__corrected__loss__total", "loss"),
        ("ngcsacbc__step2__params_after__lam__log_value", "parameter"),
    ],
)
def test_replay_of_goal_conditioned_critics_notices_a_difference(tmp_path, capsys, key, kind):
    assert replay.main([str(tampered(tmp_path, ASSETS / "gcrl.npz", **{key: 1.05}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_agrees_with_leq(capsys):
    assert replay.main([str(ASSETS / "leq.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"fixture", "mac_st", "mac_gc", "orig"}
    kinds = {"loss", "rollout", "return", "gradient", "parameter", "target"}
    assert set(report["orig"]["largest_relative_error"]) == kinds
    assert set(report["mac_gc"]["largest_relative_error"]) == {*kinds, "action"}
    names = report["mac_st"]["all"]
    assert {"actor", "critic_on_imagination", "corrected/critic_on_imagination", "total"} <= set(
        names["loss"]
    )
    for prefix in ("", "corrected/"):
        assert f"{prefix}critic/Dense_0/kernel" in names["gradient"]
        assert f"{prefix}target_critic/Dense_0/kernel" in names["target"]
    assert "actor/scaler" in report["orig"]["all"]["parameter"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("orig__step0__official__loss__actor", "loss"),
        ("orig__step0__explicit__actor__action_grads", "gradient"),
        ("orig__step1__explicit__critic__lambda_returns", "return"),
        ("orig__step2__params_after__target_critic__Dense_0__kernel", "target"),
        ("mac_gc__step0__batch__actor_goals", "gradient"),
        ("mac_gc__step0__noise__actor_model_eps", "rollout"),
        ("mac_st__step0__corrected__loss__critic_model", "loss"),
        ("mac_st__step1__corrected__params_after__critic__Dense_1__kernel", "parameter"),
        ("mac_st__eval__official_action", "action"),
    ],
)
def test_replay_of_leq_notices_a_difference(tmp_path, capsys, key, kind):
    assert replay.main([str(tampered(tmp_path, ASSETS / "leq.npz", **{key: 1.05}))]) == 1
    errors = json.loads(capsys.readouterr().out)[key.split("__")[0]]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_agrees_with_sharsa_and_the_batches_of_goals(capsys):
    assert replay.main([str(ASSETS / "gcrl.npz")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= {"sharsa", "probe/hgc", "probe/gc"}
    names = report["sharsa"]["all"]
    assert set(names) >= {"window", "reward", "loss", "gradient", "parameter", "action"}
    assert {"total", "corrected/high_critic", "corrected/total"} <= set(names["loss"])
    assert {"step2/corrected/false_success", "step0/batch/low_actor_goals"} <= set(names["window"])
    assert "target_high_critic/Dense_0/kernel" in names["target parameter"]
    assert {"batch/high_value_actions", "batch/high_actor_next_observations"} <= set(
        report["probe/hgc"]["all"]["window"]
    )
    assert "batch/actor_goals" in report["probe/gc"]["all"]["window"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("sharsa__step0__batch__high_actor_actions", "window"),
        ("sharsa__step1__corrected__high_value_rewards", "reward"),
        ("sharsa__step0__official__loss__high_critic", "loss"),
        ("sharsa__step2__corrected__loss__high_critic", "loss"),
        ("sharsa__step1__corrected__critic_target", "target"),
        ("sharsa__step0__noise__low_x0", "gradient"),
        ("sharsa__step2__params_after__high_value__Dense_0__kernel", "parameter"),
        ("sharsa__step0__params_after__target_high_critic__Dense_0__bias", "target parameter"),
        ("sharsa__eval__high_noise", "action"),
        ("sharsa__eval__chosen_subgoal", "action"),
        ("probe__hgc__batch__low_actor_goals", "window"),
        ("probe__hgc__batch__high_value_rewards", "reward"),
        ("probe__gc__batch__value_goals", "window"),
        ("data__valid_idxs", "start"),
    ],
)
def test_replay_of_sharsa_notices_a_difference(tmp_path, capsys, key, kind):
    path = tampered(tmp_path, ASSETS / "gcrl.npz", **{key: 2})
    assert replay.main([str(path)]) == 1
    report = json.loads(capsys.readouterr().out)
    case = key.split("__")[0]
    case = {"probe": "/".join(key.split("__")[:2]), "data": "probe/gc"}.get(case, case)
    errors = report[case]["largest_relative_error"]
    assert kind in [name for name, entry in errors.items() if entry["error"] > entry["tolerance"]]


def test_replay_refuses_other_files(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(SystemExit, match=r"other\.npz has no case of a known agent"):
        replay.main([str(path)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("evaluation", ["eval_single", "eval_batch"])
def test_actor_chooses_the_reference_chunk(case, evaluation):
    fixture = Fixture(fixture_of(case), case)
    networks = {}
    for module in ("critic", "actor_onestep_flow"):
        prefix = f"eval_params/{module}"
        weights = [fixture[f"{prefix}/Dense_{i}/kernel"] for i in range(3)]
        network = NormedMLP(
            weights[0].shape[0], weights[-1].shape[1], [w.shape[1] for w in weights[:-1]]
        )
        with torch.no_grad():
            for i, layer in enumerate(m for m in network.layers if isinstance(m, torch.nn.Linear)):
                layer.weight.copy_(weights[i].T)
                layer.bias.copy_(fixture[f"{prefix}/Dense_{i}/bias"])
            norms = (m for m in network.layers if isinstance(m, torch.nn.LayerNorm))
            for i, layer in enumerate(norms):
                layer.weight.copy_(fixture[f"{prefix}/LayerNorm_{i}/scale"])
                layer.bias.copy_(fixture[f"{prefix}/LayerNorm_{i}/bias"])
        networks[module] = network
    noises = fixture[f"{evaluation}/noises"]
    state = ["observation", "goal"] if has_goals(fixture) else ["observation"]
    actor = FlowRejectionActor(
        OneStepPolicy(networks["actor_onestep_flow"], noises.shape[-1], in_keys=[*state, "noise"]),
        ValueOperator(networks["critic"], in_keys=[*state, "action"]),
        num_candidates=noises.shape[0],
        chunk_size=fixture.config["action_chunking"],
    )
    td = TensorDict(observation=fixture[f"{evaluation}/observations"], noise=noises.movedim(0, -2))
    if has_goals(fixture):
        td["goal"] = fixture[f"{evaluation}/goals"]
    td.auto_batch_size_(td["observation"].ndim - 1)
    td = actor(td)
    chunk = td["action"]
    torch.testing.assert_close(
        chunk.flatten(-2), fixture[f"{evaluation}/full_chunk"], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        chunk[..., 0, :], fixture[f"{evaluation}/official_action"], atol=1e-5, rtol=1e-4
    )
    best = fixture[f"{evaluation}/q"].max(0).values
    torch.testing.assert_close(td["chosen_action_value"].squeeze(-1), best, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    pytest.main([__file__])
