"""Every example that goes online, for about 20 updates: whole, and killed on the way."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from running import ONE_EPISODE, ROOT, TERMS, newest

from torchrl_mac import load_policy
from torchrl_mac.trainers import SealedCheckpoint

OFFLINE = 6
PHASE = "{{name: {name}, terms: [{terms}], num_updates: {updates}, batch_size: 8{more}}}"
MODEL, VALUES = "loss_dynamics,loss_reward,loss_termination", "loss_value,loss_qvalue"
SINGLE_STEPS = ["chunk_size=1", "replan_interval=1", "num_members=3"]
SCRIPTS = {
    "qc": ("qc", "loss_flow,loss_qvalue", ["num_candidates=2"]),
    "qc_fql": ("qc_fql", "loss_flow,loss_actor,loss_qvalue", []),
    "fql": ("qc_fql", "loss_flow,loss_actor,loss_qvalue", ["chunk_size=1"]),
    "rlpd": ("rlpd", "loss_actor,loss_qvalue,loss_alpha", ["online.random_frames=7"]),
    "rlpd_ac": (
        "rlpd",
        "loss_actor,loss_qvalue,loss_alpha,loss_bc",
        ["chunk_size=5", "bc_alpha=0.01"],
    ),
    "mac": ("mac", ",".join(TERMS), ["replan_interval=10"]),
    "mac_gaussian": ("mac_gaussian", f"loss_bc,{MODEL},{VALUES}", ["replan_interval=10"]),
    "mac_fql": ("mac_fql", f"loss_flow,{MODEL},{VALUES},loss_actor", ["replan_interval=10"]),
    "dreamer": ("dreamer", f"{MODEL},loss_actor,loss_value", SINGLE_STEPS),
}
CHUNK_SIZES = {"mac": 10, "mac_gaussian": 10, "mac_fql": 10, "fql": 1, "rlpd": 1, "dreamer": 1}


def overrides_of(kind):
    example, terms, more = SCRIPTS[kind]
    offline = PHASE.format(name="offline", terms=terms, updates=OFFLINE, more="")
    phases = [PHASE.format(name="online", terms=terms, updates=10, more=", share: 0.5")]
    phases += [PHASE.format(name="again", terms=terms, updates=6, more=", share: 0.5")]
    overrides = [f"phases=[{'' if example == 'rlpd' else offline}]"]
    overrides += [f"online.phases=[{','.join(phases)}]", "online.frames=60"]
    overrides += ["online.warmup_frames=15", "checkpoint_interval=1", "log_interval=2"]
    return example, [*overrides, *more, *ONE_EPISODE]


KILLED = ("qc", "rlpd_ac", "mac")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SCRIPTS if kind not in KILLED])
def test_offline_and_then_online(kind, tmp_path, fork):
    example, overrides = overrides_of(kind)
    code, said = fork.wait(tmp_path / "run", *overrides, example=example)
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["online/frames"] == 60
    assert ("success_rate_before_online" in summary) == (example != "rlpd")
    assert load_policy(tmp_path / "run").chunk_size == CHUNK_SIZES.get(kind, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_is_killed_online_goes_on(kind, tmp_path, fork):
    example, overrides = overrides_of(kind)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = fork.wait(whole, *overrides, example=example)
    assert code == 0, said[-3000:]
    process = fork(parts, *overrides, example=example)
    border = f"checkpoint-{(0 if example == 'rlpd' else OFFLINE) + 3:012d}"
    while process.is_alive() and (newest(parts) is None or newest(parts).name < border):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -9
    code, said = fork.wait(parts, *overrides, example=example)
    assert code == 0, said[-3000:]
    assert "Going on after" in said
    for path in (whole / "logs").rglob("*.csv"):
        assert (parts / path.relative_to(whole)).read_text() == path.read_text()
    weights = "policy/policy.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    summary, again = (json.loads((p / "summary.json").read_text()) for p in (whole, parts))
    assert summary["success_rate"] == again["success_rate"]
    assert summary["online/frames"] == again["online/frames"] == 60
    assert ("success_rate_before_online" in summary) == (example != "rlpd")
    states = [SealedCheckpoint.load_states(newest(path)) for path in (whole, parts)]
    stored = [str(state["hooks"]["online"]["recent"]) for state in states]
    assert stored[0] == stored[1]
    assert load_policy(whole).chunk_size == CHUNK_SIZES.get(kind, 5)


@pytest.mark.slow
def test_a_finished_run_goes_online(tmp_path, fork):
    _, overrides = overrides_of("mac")
    offline = [part for part in overrides if not part.startswith("online.")]
    code, said = fork.wait(tmp_path / "offline", *offline)
    assert code == 0, said[-3000:]
    start = f"resume={newest(tmp_path / 'offline')}"  # of another run
    code, said = fork.wait(tmp_path / "online", *overrides, start)
    assert code == 0, said[-3000:]
    summary = json.loads((tmp_path / "online/summary.json").read_text())
    assert summary["updates"] == OFFLINE + 16
    before = json.loads((tmp_path / "offline/summary.json").read_text())
    assert summary["success_rate_before_online"] == before["success_rate"]


@pytest.mark.parametrize(
    ("example", "overrides", "message"),
    [
        ("mac", ["task=cube-single-oraclerep", "online.frames=9999"], "only a single task"),
        ("mac_multitask", ["online.frames=9999"], "this script trains offline only"),
        ("qc", ["online.frames=50", "online.warmup_frames=50"], "online.warmup_frames=50 cannot"),
        ("rlpd", ["online.frames=0"], r"phases=[] cannot be"),
    ],
)
def test_what_cannot_be_online(tmp_path, fork, example, overrides, message):
    code, said = fork.wait(tmp_path / "run", *overrides, example=example)
    assert code == 1
    assert message in said


@pytest.mark.parametrize("method", ["qc", "qc_fql", "rlpd"])
def test_scripts_are_short_and_configs_cover_the_paper(method):
    tasks = {path.stem for path in (ROOT / f"configs/{method}/task").glob("*.yaml")}
    assert tasks >= {"scene", "puzzle-3x3", "cube-double", "cube-triple", "cube-quadruple"}
    assert {path.stem for path in (ROOT / f"configs/{method}/preset").glob("*.yaml")} == {
        *("cpu", "paper")
    }
    assert len((ROOT / f"examples/{method}.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
