from __future__ import annotations

import json
import subprocess
import sys

from running import ROOT


def test_the_phases_of_a_script_are_measured(data):
    command = [
        *(sys.executable, ROOT / "benchmarks" / "update.py", "--method", "qc", "--preset", "cpu"),
        *("--data-dir", data, "--updates", "3", "--threads", "1", "--json"),
        *("--settings", "task=cube-single", "policy_cells=[16]", "value_cells=[16]"),
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    phases = [value for value in report.values() if isinstance(value, dict)]
    assert phases and all(phase["ms"] > 0 for phase in phases)
    assert abs(report["seconds"] - sum(phase["seconds"] for phase in phases)) < 1e-9
