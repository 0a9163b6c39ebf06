"""Open-loop errors of world models, in small."""

from __future__ import annotations

import csv
import ctypes.util
import runpy

import av
import pytest
import torch
from running import ROOT, run
from tensordict import TensorDict

from torchrl_mac.modules import ChunkedWorldModel, NormedMLP


def test_errors_are_those_of_a_slow_loop():
    script = runpy.run_path(str(ROOT / "examples/model_error.py"))
    B, T, h, O, A = 3, 12, 4, 5, 2  # noqa: E741
    model = ChunkedWorldModel(*(NormedMLP(O + h * A, size, [8]) for size in (O, 1, 1)))
    windows = TensorDict(
        {
            "observation": torch.randn(B, O),
            "action": torch.rand(B, T, A),
            ("future", "observation"): torch.randn(B, T, O),
        },
        batch_size=[B],
    )
    dream = script["open_loop"](model, windows, h)
    errors = script["errors_of"](dream, windows["future", "observation"])
    steps = script["each_step"](windows["observation"], dream, T)
    expected = torch.zeros(T // h)
    for b in range(B):
        state = windows["observation"][b]
        for k in range(T // h):
            chunk = windows["action"][b, k * h : (k + 1) * h]
            step = model(TensorDict({"observation": state, "action": chunk}))
            before, state = state, step["next", "observation"]
            between = [before + (state - before) * (i + 1) / h for i in range(h)]
            torch.testing.assert_close(steps[b, k * h : (k + 1) * h], torch.stack(between))
            real = windows["future", "observation"][b, (k + 1) * h - 1]
            expected[k] += (state - real).square().mean().detach() / B
    torch.testing.assert_close(errors, expected)


@pytest.mark.slow
def test_the_script(data, tmp_path, fork):
    overrides = ["chunk_sizes=[1,5]", "window=20", "num_windows=8", "dynamics_cells=[16]"]
    overrides += ["video_episodes=1"]
    overrides += ["phases=[{name: model, terms: [loss_dynamics], num_updates: 20, batch_size: 8}]"]
    for again in (False, True):  # the second time nothing is left to do
        if again:  # in a process that has not chosen a renderer before
            result = run(data, tmp_path / "run", *overrides, example="model_error")
            code, said = result.returncode, result.stderr
        else:
            code, said = fork.wait(tmp_path / "run", *overrides, example="model_error")
        assert code == 0, said[-3000:]
        with (tmp_path / "run/errors.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(int(row["chunk_size"]), int(row["step"])) for row in rows] == [
            *((1, step) for step in range(1, 21)),
            *((5, step) for step in range(5, 21, 5)),
        ]
        assert all(float(row["mean_squared_error"]) > 0 for row in rows)
        assert (tmp_path / "run/errors.png").stat().st_size > 5_000
    if ctypes.util.find_library("EGL"):
        with av.open(str(tmp_path / "run/imagined.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 20 and frames[0].shape == (200, 600, 3)
    rows = (tmp_path / "run/logs/scalars/train/loss_dynamics.csv").read_text().splitlines()
    assert rows[-1].startswith("40")
    code, said = fork.wait(tmp_path / "bad", *overrides, "window=21", example="model_error")
    assert code == 1 and "window=21 is no multiple of the chunk size 5" in said


def test_the_script_is_short():
    assert len((ROOT / "examples/model_error.py").read_text().splitlines()) <= 150


if __name__ == "__main__":
    pytest.main([__file__])
