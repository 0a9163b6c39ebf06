"""The grid of methods, environments and seeds, in small, and reports of it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from reproduction.cell import Folders
from reproduction.report import report
from reproduction.suite import SUITES, cells

ROOT = Path(__file__).parents[1]
METHODS = ("MAC", "RLPD")
TIMES = ("seconds", "train_seconds")


def reproduce(*arguments, code=0):
    command = [sys.executable, ROOT / "benchmarks/reproduce.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert result.returncode == code, result.stderr[-3000:]
    return result.stdout + result.stderr


def places(folder, data):
    return ("--results", folder / "results", "--runs", folder / "runs", "--data", data)


def results_of(folder):
    """Without times."""
    found = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        for holder in (result, result["summary"]):
            for key in TIMES:
                holder.pop(key, None)
        found[path.stem] = result, path.with_suffix(".csv").read_text()
    return found


@pytest.mark.slow
def test_cells_are_the_same_in_processes_and_on_ray(tmp_path):
    """Of some methods; all of them have runs of their own in test/examples."""
    data, folder = tmp_path / "data", tmp_path / "processes"
    chosen = ("--suite", "smoke", "--methods", *METHODS)
    for engine in ("processes", "ray"):
        flags = (*chosen, "--workers", 2, "--engine", engine)
        said = reproduce(*flags, *places(tmp_path / engine, data))
        assert f"{len(METHODS)} cells, 0 of them finished" in said
    here = results_of(folder)
    assert here == results_of(tmp_path / "ray")
    scripts = {cell.script for cell in cells("smoke")}
    assert scripts == {path.stem for path in (ROOT / "examples").glob("*.py")} - {"model_error"}
    for cell in cells("smoke", METHODS):
        result, curve = here[cell.name]
        assert result["command"] == cell.command and result["seed"] == 0
        several = "oraclerep" in cell.environment or cell.script == "mac_multitask"
        assert len(result["success_rates"]) == (5 if several else 1)
        assert all(0 <= rate <= 1 for rate in result["success_rates"].values())
        rows = list(csv.DictReader(curve.splitlines()))
        assert max(int(row["update"]) for row in rows) == result["updates"]
        assert result["summary"]["dataset_digest"] and result["summary"]["versions"]["torch"]
        assert result["hardware"]["cores"] == os.cpu_count()

    lost, *_ = here
    (folder / f"results/{lost}.json").unlink()  # as if it had been interrupted at its end
    flags = (*chosen, *places(folder, data))
    assert f"1/1 {lost}" in reproduce(*flags)
    assert results_of(folder) == here
    assert f"{len(METHODS)} of them finished" in reproduce(*flags)
    reproduce("report", *flags)
    page = (folder / "results/report.md").read_bytes()
    picture = (folder / "results/curves.png").read_bytes()
    assert report("smoke", cells("smoke", METHODS), Folders(folder / "results", folder, data)) == 0
    assert (folder / "results/report.md").read_bytes() == page
    assert (folder / "results/curves.png").read_bytes() == picture

    path = folder / f"results/{lost}.json"
    path.write_text(path.read_text().replace("seed=0", "seed=1"))
    assert f"{lost}.json has command" in reproduce(*flags, code=2)


def write_results(folder, suite, rates):
    """Of all cells of a suite; ``rates`` by method, environment and seed: of each task."""
    for cell in cells(suite):
        key = cell.method, cell.environment, cell.seed
        if key not in rates:
            continue
        result = {
            **{name: getattr(cell, name) for name in ("method", "environment", "seed")},
            **{"command": cell.command, "dataset": cell.dataset, "recipe": dict(cell.recipe)},
            "success_rates": {f"task{k + 1}": rate for k, rate in enumerate(rates[key])},
            **{"episodes": 50, "updates": 10, "train_seconds": 120.0},
            "hardware": {"accelerator": None, "processor": "abacus", "cores": 2},
        }
        folder.mkdir(exist_ok=True)
        (folder / f"{cell.name}.json").write_text(json.dumps(result))
        (folder / f"{cell.name}.csv").write_text("update,name,value\n5,eval/success_rate,0.25\n")


def test_what_a_report_says(tmp_path, monkeypatch):
    suite = {
        "overrides": [],
        "seeds": [0, 1],
        "data": {},
        "methods": {
            "MAC": {"script": "mac", "preset": "cpu", "environments": ["cube-single", "scene"]},
            "QC": {"script": "qc", "preset": "cpu", "environments": ["cube-single"]},
        },
    }
    monkeypatch.setitem(SUITES, "own", suite)
    tasks = {0: [0.0, 0.5, 1.0, 0.4, 0.6], 1: [0.2, 0.5, 1.0, 0.8, 0.6]}
    rates = {("MAC", "cube-single", seed): of for seed, of in tasks.items()}
    rates["QC", "cube-single", 0] = [0.5]
    folders = Folders(tmp_path / "own", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="no finished cell of the suite own"):
        report("own", cells("own"), folders)
    write_results(folders.results, "own", rates)
    assert report("own", cells("own"), folders) == 0
    page = (folders.results / "report.md").read_text()
    assert "3 of 6 cells are finished" in page
    assert "50 episodes of each task" in page
    middle = sorted(rate for of in tasks.values() for rate in of)[2:-2]
    assert f"| MAC | cube-single | 2 | 56 ± 8 | {100 * fmean(middle):.0f} [" in page
    assert "| QC | cube-single | 1 | 50 | 50 | 2 min |" in page
    assert "| MAC | cube-single | 56 ± 8 | 99 ± 2 | -43 |" in page
    assert "| QC | cube-single | task1: 50 |" in page and "abacus, 2 cores" in page
    assert "Thresholds" not in page


def test_thresholds(tmp_path, monkeypatch):
    monkeypatch.setattr("reproduction.report.THRESHOLDS", {"smoke": {"QC": {"cube-single": 60}}})
    folders = Folders(tmp_path / "smoke", tmp_path, tmp_path)
    for rate, missed in ((0.5, 1), (0.6, 0)):
        write_results(folders.results, "smoke", {("QC", "cube-single", 0): [rate]})
        assert report("smoke", cells("smoke"), folders) == missed
        said = (folders.results / "report.md").read_text()
        assert ("QC on cube-single has 50 of 60" in said) == bool(missed)


def test_what_is_chosen():
    chosen = cells("smoke", methods=["QC", "MOPO"], seeds=[0])
    assert [cell.method for cell in chosen] == ["MOPO", "QC"]
    assert len({cell.name for cell in cells("smoke")}) == len(cells("smoke"))
    with pytest.raises(ValueError, match="--methods 'PPO': the suite smoke has MAC, "):
        cells("smoke", methods=["PPO"])
    with pytest.raises(ValueError, match="--seeds 7: the suite smoke has 0"):
        cells("smoke", seeds=[7])


@pytest.mark.parametrize("suite", SUITES)
def test_reports_are_those_of_the_committed_results(suite, tmp_path):
    """Byte for byte, but for the picture, which depends on the version of its library."""
    committed = ROOT / "results" / suite
    if not committed.exists():
        pytest.skip(f"no results of {suite}")
    copies = tmp_path / suite
    copies.mkdir()
    for path in committed.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    (copies / "report.md").unlink()
    report(suite, cells(suite), Folders(copies, tmp_path, tmp_path))
    assert (copies / "report.md").read_bytes() == (committed / "report.md").read_bytes()


if __name__ == "__main__":
    pytest.main([__file__])
