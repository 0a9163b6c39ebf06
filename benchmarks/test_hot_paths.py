"""The hot paths, for pytest-benchmark: `pytest benchmarks --benchmark-enable`."""

from __future__ import annotations

import pytest
import torch
from assembly import make_mac
from update import SIZES, make_buffer, make_update

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return make_buffer(TINY, CPU, rows=1000).sample()


def test_sample(benchmark):
    buffer = make_buffer(TINY, CPU, rows=1000)
    batch = benchmark(buffer.sample)
    assert batch["action"].shape == (TINY.batch, 10, 5)


def test_act(benchmark, batch):
    actor = make_mac(TINY, CPU)["values"].actor_network
    state = batch.select("observation")
    with torch.no_grad():
        acted = benchmark(lambda: actor(state.copy()))
    assert acted["action"].shape == (TINY.batch, 10, 5)


def test_imagine(benchmark, batch):
    rollout = benchmark(make_mac(TINY, CPU)["values"].imagine, batch)
    assert rollout.shape == (TINY.batch, TINY.horizon)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_update(benchmark, batch, precision):
    metrics = benchmark(make_update(TINY, CPU, precision=precision), batch)
    assert len(metrics.keys()) == 8  # seven losses and the norm of the gradient
    assert all(value.isfinite() for value in metrics.values())
