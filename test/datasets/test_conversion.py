from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from ogbench_files import LENGTHS, VAL_LENGTHS, make_arrays

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.datasets import ObservationStatistics, columns

pytestmark = pytest.mark.usefixtures("processes")  # whose server starts beside the first tests

NAME = "cube-single-play-v0"
ROWS = sum(LENGTHS)


def read(folder):
    return dict(np.load(folder / f"{NAME}.npz"))


def left_behind(root):
    """What a failed conversion left, lock files apart."""
    return [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]


def with_value(key, row, value):
    array = make_arrays(NAME, LENGTHS, seed=0)[key]
    array[row] = value
    return {key: array}


# Each line: what replaces the arrays of a good file, and what the message must name.
BAD_ARRAYS = {
    "missing key": ({"actions": None}, r"has no 'actions'.*generate it again"),
    "wrong shape": ({"observations": np.zeros((ROWS, 2, 3), "f4")}, r"'observations' is.*\(68, 2"),
    "wrong dtype": ({"actions": np.zeros((ROWS, 5), int)}, r"'actions' is int64.*floats"),
    "pickled": ({"terminals": np.array([None] * ROWS)}, r"'terminals' is object"),
    "row counts": ({"actions": np.zeros((ROWS - 1, 5), "f4")}, r"\[68, 67, 68\] rows"),
    "no rows": (
        {
            "observations": np.zeros((0, 28), "f4"),
            "actions": np.zeros((0, 5), "f4"),
            "terminals": np.zeros(0, bool),
        },
        "at least one",
    ),
    "NaN": (with_value("observations", 7, np.nan), r"'observations' has NaN.*first in row 7"),
    "infinity": (with_value("actions", 9, -np.inf), r"'actions' has NaN.*first in row 9"),
    "open end": (with_value("terminals", -1, False), r"'terminals' does not end the last episode"),
    "large action": (with_value("actions", 3, 1.5), r"'actions' reach 1.5.*outside \[-1, 1\]"),
}


@pytest.mark.parametrize(("replaced", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_bad_arrays_are_named(write_npz, tmp_path, replaced, message):
    source = write_npz(**replaced)
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=message) as error:
        OGBenchExperienceReplay(NAME, root=root, source=source)
    assert str(source / f"{NAME}.npz") in str(error.value)
    assert not left_behind(root)


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_archive(write_npz, tmp_path, content):
    source = write_npz()
    file = source / f"{NAME}.npz"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ValueError, match=r"is not an npz file.*again"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)


def test_a_damaged_array(write_npz, tmp_path):
    source = write_npz()
    file = source / f"{NAME}.npz"
    content = bytearray(file.read_bytes())
    content[2000:2100] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"'observations' cannot be read.*again"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)
    assert not left_behind(tmp_path / "root")


def test_no_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # nor OGBench's download folder
    for kwargs in ({}, {"source": tmp_path / "nowhere"}, {"source": tmp_path / "nowhere.npz"}):
        with pytest.raises(FileNotFoundError, match=r"npz does not exist. Pass source="):
            OGBenchExperienceReplay(NAME, root=tmp_path / "root", **kwargs)


def test_ogbench_downloads_are_found(write_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ogbench").mkdir()
    shutil.move(write_npz(), tmp_path / ".ogbench" / "data")
    buffer = OGBenchExperienceReplay(NAME)
    assert len(buffer) == ROWS
    assert buffer.data_path == tmp_path / ".cache/torchrl/ogbench" / NAME / "train"


def test_rows_equal_the_file(write_npz, tmp_path):
    source = write_npz(**with_value("actions", 5, 1.0))
    raw = read(source)
    rows = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)[:]
    episode = 0
    for t in range(ROWS):
        assert rows["observation"][t].numpy().tolist() == raw["observations"][t].tolist()
        bound = np.float32(1 - 1e-5)
        assert rows["action"][t].tolist() == np.clip(raw["actions"][t], -bound, bound).tolist()
        assert rows["episode"][t] == episode
        assert rows["next", "done"][t] == rows["next", "truncated"][t] == raw["terminals"][t]
        assert not rows["next", "terminated"][t]
        episode += raw["terminals"][t]
    assert rows["action"].max() == bound
    assert rows["observation"].dtype == rows["action"].dtype == torch.float32
    assert rows["episode"].dtype == torch.int32
    assert ("next", "reward") not in rows.keys(True)


def test_wider_floats_are_narrowed(write_npz, tmp_path):
    wide = make_arrays(NAME, LENGTHS, seed=0)["observations"].astype(np.float64)
    buffer = OGBenchExperienceReplay(
        NAME, root=tmp_path / "root", source=write_npz(observations=wide)
    )
    assert buffer[:]["observation"].numpy().tolist() == wide.astype(np.float32).tolist()


def test_metadata(write_npz, tmp_path):
    buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())
    expected = {"dataset": NAME, "env": "cube-single", "behaviour": "play", "split": "train"}
    expected |= {"rows": ROWS, "episodes": 3, "observation_dim": 28, "action_dim": 5}
    assert expected.items() <= buffer.metadata.items()


def test_a_single_file_as_source(write_npz, tmp_path):
    folder = write_npz()
    (folder / f"{NAME}.npz").rename(tmp_path / "mine.npz")
    (folder / f"{NAME}-val.npz").rename(tmp_path / "mine-val.npz")
    kwargs = {"root": tmp_path / "root", "source": tmp_path / "mine.npz"}
    assert len(OGBenchExperienceReplay(NAME, **kwargs)) == ROWS
    assert len(OGBenchExperienceReplay(NAME, split="val", **kwargs)) == sum(VAL_LENGTHS)


def test_reused_without_the_source(write_npz, tmp_path, monkeypatch):
    source = write_npz()
    expected = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)[:].clone()
    shutil.rmtree(source)

    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(columns.ColumnWriter, "write", fail)
    for kwargs in ({}, {"source": source}):
        buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", **kwargs)
        assert (buffer[:] == expected).all()
        assert len(OGBenchExperienceReplay(NAME, root=tmp_path / "root", split="val")) == 21


def test_a_download_of_ogbench_does_not_replace_a_conversion(write_npz, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root, source = tmp_path / "root", write_npz(val_lengths=None)
    expected = OGBenchExperienceReplay(NAME, root=root, source=source)[:].clone()
    (tmp_path / ".ogbench").mkdir()
    shutil.move(write_npz(lengths=(30,)), tmp_path / ".ogbench" / "data")
    buffer = OGBenchExperienceReplay(NAME, root=root)
    assert (buffer[:] == expected).all()
    assert not (root / NAME / "val").exists()


def test_another_source_is_noticed(write_npz, tmp_path):
    OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())
    source = write_npz(**with_value("observations", 0, 9.0))
    with pytest.raises(ValueError, match=r"is not what .* was converted from"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)


def test_another_layout_is_refused(write_npz, tmp_path):
    buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())
    file = buffer.data_path / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
    with pytest.raises(ValueError, match=r"layout 0, expected 3\); delete it"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root")


def test_full_disk(write_npz, tmp_path, monkeypatch):
    written = []

    def write(writer, key, block):
        written.append(key)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(columns.ColumnWriter, "write", write)
    with pytest.raises(OSError, match=r"disk of .* is full: 1 MiB are needed.*root=") as error:
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz(lengths=(9000,)))
    assert error.value.errno == errno.ENOSPC
    assert len(written) == 2 and not left_behind(tmp_path / "root")


def test_too_little_space_is_noticed_before_writing(write_npz, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(columns.ColumnWriter, "write", lambda *args: pytest.fail("wrote"))
    with pytest.raises(OSError, match="is full"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())


def test_read_only_root(write_npz, tmp_path, monkeypatch):
    source = write_npz()

    def mkdir(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(OSError, match=r"Cannot write to .*Read-only.*pass another root=") as error:
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)
    assert error.value.errno == errno.EROFS


def test_foreign_files_are_kept(write_npz, tmp_path):
    folder = tmp_path / "root" / NAME
    (folder / "train").mkdir(parents=True)
    mine = [folder / "notes.txt", folder / "train" / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    with pytest.raises(FileExistsError, match="is not a converted dataset; move it away"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())
    mine.append(folder / "train-notes")
    (folder / "train").rename(mine[-1])
    OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=write_npz())
    assert mine[0].read_text() == (mine[2] / "notes.txt").read_text() == "mine"


def convert_slowly(root, source, seconds, reports):
    write = columns.ColumnWriter.write

    def write_slowly(writer, key, block):
        write(writer, key, block)
        reports.put("column")
        time.sleep(seconds)

    columns.ColumnWriter.write = write_slowly
    OGBenchExperienceReplay(NAME, root=root, source=source)
    reports.put("ogbench imported" if "ogbench" in sys.modules else "done")


def start_conversion(processes, root, source, seconds, reports):
    process = processes.Process(target=convert_slowly, args=(root, source, seconds, reports))
    process.start()
    return process


def test_a_killed_conversion_is_redone(processes, write_npz, tmp_path):
    source, root, reports = write_npz(), tmp_path / "root", processes.Queue()
    process = start_conversion(processes, root, source, 60, reports)
    assert reports.get(timeout=60) == "column"
    process.kill()
    process.join()
    partial = root / NAME / ".train.partial"
    assert partial.is_dir() and not (root / NAME / "train").exists()

    # the lock died with its owner, so this does not wait
    rows = OGBenchExperienceReplay(NAME, root=root, source=source)[:]
    assert rows["observation"].numpy().tolist() == read(source)["observations"].tolist()
    assert not partial.exists()


def test_two_processes_convert_at_once(processes, write_npz, tmp_path):
    source, root, reports = write_npz(), tmp_path / "root", processes.Queue()
    both = [start_conversion(processes, root, source, 0.1, reports) for _ in range(2)]
    # six columns in each of two splits, each written by one of the two
    received = sorted(reports.get(timeout=60) for _ in range(14))
    assert received == 12 * ["column"] + 2 * ["done"]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(OGBenchExperienceReplay(NAME, root=root)) == ROWS


def test_statistics_are_those_of_the_rows(monkeypatch):
    monkeypatch.setattr("torchrl_mac.datasets.statistics._BLOCK", 7)
    rows = make_arrays(NAME, (40,), seed=3)["observations"]
    statistics = ObservationStatistics.from_rows(rows)
    for name in ("min", "max", "mean", "std"):
        expected = getattr(rows.astype(np.float64), name)(0)
        np.testing.assert_allclose(getattr(statistics, name).numpy(), expected, rtol=1e-6)
    again = ObservationStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert all(getattr(again, name).equal(getattr(statistics, name)) for name in ("min", "std"))


def test_normalisations():
    statistics = ObservationStatistics.from_rows(np.float32([[-1, 5], [3, 5], [1, 5]]))
    loc, scale = statistics.loc_scale()
    assert loc.tolist() == [1, 5]
    assert scale.tolist() == pytest.approx([2.001, 0.001])
    loc, scale = statistics.loc_scale("mean_std")
    assert loc.tolist() == [1, 5]
    assert scale.tolist() == pytest.approx([(8 / 3) ** 0.5 + 0.001, 0.001])
    with pytest.raises(ValueError, match="kind must be 'min_max' or 'mean_std', got 'max'"):
        statistics.loc_scale("max")


if __name__ == "__main__":
    pytest.main([__file__])
