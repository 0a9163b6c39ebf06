"""The benchmark scripts run, in small, and say what they should."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrl_mac.modules import NormedMLP

FOLDER = Path(__file__).parents[1] / "benchmarks"
BARE = """
import importlib.machinery, pathlib, runpy, sys

missing = {"tqdm", "safetensors", "mujoco", "ogbench", "gymnasium", "hydra", "wandb"}
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.split(".")[0] in missing else find(name, *args)
)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in (sys.executable, *command)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_update():
    arguments = ["--preset", "tiny", "--precision", "bf16", "--repeats", "2", "--json"]
    report = json.loads(run(FOLDER / "update.py", *arguments))
    assert report["precision"] == "bf16" and report["ms"] > 0
    assert set(report["parts_ms"]) == {"sample", "imagine", "losses", "backward", "optimizer"}
    assert 0 < report["share_of_peak"] < 1
    # all matrix products of the seven losses, counted by hand
    W, B, N, H, F = 32, 16, 2, 2, 1
    S, D = 28, 50

    def products(inputs, outputs):
        return inputs * W + W * W + W * outputs

    def trained(inputs, outputs):  # forward, and backward but for the input of the first layer
        return 3 * products(inputs, outputs) - inputs * W

    flow, policy, one = products(S + D + 1, D), products(S + D, D), products(S + D, 1)
    imagined = H * (N * (policy + one) + products(S + D, S) + 2 * one)
    total = trained(S + D + 1, D) + F * flow + trained(S + D, D)  # the flow and its student
    total += trained(S + D, S) + 2 * trained(S + D, 1)  # the world model
    total += imagined + H * products(S, 1) + products(S, 1)  # rollouts, targets of V and of Q
    total += H * trained(S, 1) + trained(S + D, 1)
    assert report["tflop"] * 1e12 == pytest.approx(2 * B * total, rel=1e-4)  # returns apart


@pytest.mark.slow
def test_pipeline():
    arguments = ["--rows", "20000", "--preset", "tiny", "--updates", "3", "--json"]
    plain, ahead = json.loads(run(FOLDER / "pipeline.py", *arguments))
    assert (plain["prefetch"], ahead["prefetch"]) == (0, 1)
    assert all(0 < row["waiting_share"] < 1 for row in (plain, ahead))


@pytest.mark.slow
def test_gpu_script_on_a_bare_cpu_machine(tmp_path):
    output = run("-c", BARE, FOLDER / "gpu.py", "--device", "cpu", "--quick", "--out", tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["variants"]) == 2 and not report["skipped"]
    assert all(row["agrees"] for row in report["variants"])
    assert (tmp_path / "gpu.md").read_text() in output


def test_emulated_bf16_is_bf16(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from assembly import make_batch
    from bf16 import emulated
    from update import SIZES, make_update

    batch = make_batch(SIZES["tiny"], seed=0)
    values = {}
    for precision in ("fp32", "bf16", "emulated"):
        torch.manual_seed(0)
        relu = partial(NormedMLP, activation_class=nn.ReLU)
        monkeypatch.setattr("assembly.NormedMLP", relu)
        update = make_update(
            SIZES["tiny"], torch.device("cpu"), precision=precision.replace("emulated", "bf16")
        )
        with emulated() if precision == "emulated" else contextlib.nullcontext():
            values[precision] = update.losses["values"].imagine(batch)["next", "observation"]
    real, rounded = values["bf16"].float(), values["emulated"]
    error = (rounded - real).abs().mean() / (values["fp32"] - real).abs().mean()
    assert 0 <= error < 0.05  # against what bfloat16 changes
    assert not torch.equal(values["fp32"], rounded)


def test_partial_ranking(tmp_path):
    rates = {(10, None, 0): 0.5, (10, None, 1): 0.7, (10, 5, 0): 0.9, (25, 5, 0): 0.25}
    for (h, first, seed), rate in rates.items():
        of = {"chunk_size": h, "policy_chunk_size": first, "kappa_d": None, "replan_interval": 5}
        result = {"success_rates": {"task2": rate}, "train_seconds": 60.0, "seed": seed}
        path = tmp_path / f"{h}-{first}-{seed}.json"
        path.write_text(json.dumps({**result, "settings": of}))
    rows = run(FOLDER / "partial_ranking.py", tmp_path).splitlines()[2:]
    assert rows == [
        "| 10 | first 5 | 5 | 0.90 | 0.90 | 60 s |",
        "| 25 | first 5 | 5 | 0.25 | 0.25 | 60 s |",
        "| 10 | whole chunks | 5 | 0.50, 0.70 | 0.60 | 60 s |",
    ]
    assert (tmp_path / "partial_ranking.png").stat().st_size > 5_000


if __name__ == "__main__":
    pytest.main([__file__])
