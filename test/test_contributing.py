"""The worked example of CONTRIBUTING.md is a method that runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_mac import load_policy
from torchrl_mac.datasets import generate_dataset

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.mark.slow
def test_the_worked_example(tmp_path):
    text = PAGE.read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    for path, content in {"examples/bc.py": script, "configs/bc/bc.yaml": settings}.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    assert len(script.splitlines()) <= 150
    sizes = {"episodes": 3, "val_episodes": 1, "steps": 81, "workers": 1, "progress": False}
    generate_dataset("cube-single-play-v0", tmp_path / "data", **sizes)
    overrides = ["phases.0.num_updates=20", "phases.0.batch_size=8", "phases.0.eval_interval=0"]
    overrides += ["policy_cells=[16]", "eval_episodes=1", "video_episodes=0", "num_threads=1"]
    result = subprocess.run(
        [sys.executable, "examples/bc.py", "hydra.run.dir=run", *overrides],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 20
    assert load_policy(tmp_path / "run").chunk_size == 10


if __name__ == "__main__":
    pytest.main([__file__])
