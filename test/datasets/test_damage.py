"""Conversions that were tampered with, or damaged: what is wrong is named, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from ogbench_files import LENGTHS, make_arrays
from tensordict import NonTensorData

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.datasets.verify import verify_conversion

NAME = "cube-single-play-v0"
ROWS = sum(LENGTHS)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A root with a conversion of both splits, and a column beside the rows."""
    folder = tmp_path_factory.mktemp("pristine")
    for end, lengths, seed in (("", LENGTHS, 0), ("-val", (12, 9), 1)):
        np.savez(folder / f"{NAME}{end}.npz", **make_arrays(NAME, lengths, seed))
    OGBenchExperienceReplay(NAME, root=folder / "root", source=folder, columns=["qpos"])
    return folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "root")


@pytest.fixture
def train(root):
    return root / NAME / "train"


def open_buffer(root):
    return OGBenchExperienceReplay(NAME, 8, root=root, columns=["qpos"], chunk_size=3)


def edit(folder, **changes):
    """Replaces entries of a manifest; a function is given the old one."""
    file = folder / "metadata.json"
    about = json.loads(file.read_text())
    for key, change in changes.items():
        about[key] = change(about[key]) if callable(change) else change
    file.write_text(json.dumps(about))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(root, train, tmp_path):
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    proof.rmdir()  # the payload works
    # as tensordict would read it: meta.json names NonTensorData, of which other.pickle is a part
    rows = open_buffer(root)[:].exclude("qpos").clone()
    rows["evil"] = NonTensorData(Payload(proof), rows.batch_size)
    shutil.rmtree(train / "rows")
    rows.memmap(train / "rows")
    assert list(train.rglob("*.pickle"))
    open_buffer(root).sample()
    assert not proof.exists()
    with pytest.raises(ValueError, match=r"rows/.* does not belong there"):
        verify_conversion(train)
    assert not proof.exists()


def test_what_is_written_to_rows_stays_in_memory(root, train):
    files = {path: path.read_bytes() for path in train.rglob("*.memmap")}
    buffer = open_buffer(root)
    buffer.storage._storage["action"].as_subclass(torch.Tensor).fill_(7)
    buffer.storage._storage["qpos"].as_subclass(torch.Tensor).fill_(7)
    assert {path: path.read_bytes() for path in files} == files
    for path in (*files, *(path.parent for path in files)):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        open_buffer(root).sample()
    finally:
        for path in files:
            path.parent.chmod(0o755)


def test_other_processes_open_the_files_themselves(root):
    buffer = open_buffer(root)
    content = pickle.dumps(buffer.storage)
    assert len(content) < ROWS * 28 * 4
    assert (pickle.loads(content)[:] == buffer[:]).all()


@pytest.mark.parametrize(
    "file", ["rows/observation", "rows/next/done", "rows/episode", "columns/qpos/rows/qpos"]
)
@pytest.mark.parametrize("size", ["empty", "half", "one more", "gone"])
def test_sizes_are_compared_when_opened(root, train, file, size):
    path = train / f"{file}.memmap"
    content = path.read_bytes()
    if size == "gone":
        path.unlink()
    else:
        sizes = {"empty": b"", "half": content[: len(content) // 2], "one more": content + b"\0"}
        path.write_bytes(sizes[size])
    problem = "not there" if size == "gone" else f"instead of {len(content)}"
    for read in (lambda: open_buffer(root), lambda: verify_conversion(train)):
        with pytest.raises(ValueError, match=rf"{path} is damaged: .*{problem}.*convert again"):
            read()
    assert size == "gone" or path.read_bytes() == sizes[size]


def nan(statistics):
    return {**statistics, "min": [float("nan"), *statistics["min"][1:]]}


def first_shard(**changes):
    return lambda shards: [{**shards[0], **changes}, *shards[1:]]


MANIFEST_EDITS = {
    "rows": {"rows": ROWS - 1},
    "rows of a shard": {"shards": first_shard(rows=ROWS - 1)},
    "rows, both": {"rows": ROWS - 1, "shards": first_shard(rows=ROWS - 1)},
    "no rows": {"rows": None},
    "float rows": {"rows": float(ROWS)},
    "episodes": {"episodes": 2},
    "episodes, both": {"episodes": 2, "shards": first_shard(episodes=2)},
    "observation_dim": {"observation_dim": 27},
    "action_dim": {"action_dim": 1},
    "digest": {"digest": 64 * "0"},
    "checksum": {"shards": first_shard(sha256=64 * "0")},
    "no checksum": {"shards": first_shard(sha256=7)},
    "no shards": {"shards": []},
    "shards of text": {"shards": ["one"]},
    "no column": {"columns": {}},
    "column not listed": {
        "columns": lambda columns: {k: v for k, v in columns.items() if k != "next/truncated"}
    },
    "path as column": {
        "columns": lambda columns: {**columns, "../x": {"dtype": "<f4", "shape": [1]}}
    },
    "dtype": {"columns": lambda columns: {**columns, "action": {"dtype": "<i4", "shape": [5]}}},
    "format": {"format": None},
}
STATISTICS_EDITS = {
    "NaN": nan,
    "fewer": lambda old: {key: value[1:] for key, value in old.items()},
    "missing": lambda old: {key: value for key, value in old.items() if key != "std"},
    "text": lambda old: {**old, "mean": "none"},
    "none": lambda old: None,
    "mean beyond": lambda old: {**old, "mean": [value + 1 for value in old["max"]]},
    "negative std": lambda old: {**old, "std": [-value for value in old["std"]]},
    "huge": lambda old: {**old, "max": [1e300 for _ in old["max"]]},
}


@pytest.mark.parametrize("changes", MANIFEST_EDITS.values(), ids=MANIFEST_EDITS.keys())
def test_an_edited_manifest_is_noticed_when_opened(root, train, changes):
    edit(train, **changes)
    for read in (lambda: open_buffer(root), lambda: verify_conversion(train)):
        with pytest.raises(ValueError, match=rf"{train}.*convert again"):
            read()


@pytest.mark.parametrize("change", STATISTICS_EDITS.values(), ids=STATISTICS_EDITS.keys())
def test_statistics_are_looked_at_when_opened(root, train, change):
    edit(train.parent / "val", statistics=change)
    for read in (lambda: open_buffer(root), lambda: verify_conversion(train.parent / "val")):
        with pytest.raises(ValueError, match=r"val/metadata.json is damaged: .*statistics"):
            read()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"format": 3}'])
def test_a_damaged_manifest_is_named(root, train, content):
    (train / "metadata.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"train(/metadata.json)? (is damaged|was converted)"):
        open_buffer(root)


def with_last(last):
    def change(ends):
        ends[-1] += last
        return ends

    return change


ENDS = {
    "float": lambda ends: ends.astype(float),
    "int32": lambda ends: ends.astype(np.int32),
    "column": lambda ends: ends[:, None],
    "descending": lambda ends: ends[::-1],
    "repeated": lambda ends: np.array([ends[0], ends[0], ends[2]]),
    "negative": lambda ends: np.array([-1, *ends[1:]]),
    "one fewer": lambda ends: ends[1:],
    "beyond": with_last(1),
    "before": with_last(-1),
    "objects": lambda ends: ends.astype(object),
}


@pytest.mark.parametrize("change", ENDS.values(), ids=ENDS.keys())
def test_episode_ends_are_looked_at_when_opened(root, train, change):
    path = train / "episode_ends.npy"
    np.save(path, change(np.load(path)), allow_pickle=True)
    for read in (lambda: open_buffer(root), lambda: verify_conversion(train)):
        with pytest.raises(ValueError, match=rf"{path} is damaged: .*convert again"):
            read()


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00"])
def test_unreadable_episode_ends(root, train, content):
    path = train / "episode_ends.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged: it cannot be read"):
        open_buffer(root)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is damaged: it cannot be read"):
        open_buffer(root)


def test_verify_passes_what_is_sound(train):
    lines = []
    verify_conversion(train, lines.append)
    verify_conversion(train.parent / "val", lines.append)
    assert len(lines) == 3


VERIFIED = {
    "mean": (
        {"statistics": lambda old: {**old, "mean": [m + 0.01 for m in old["mean"]]}},
        "'mean'",
    ),
    "min": ({"statistics": lambda old: {**old, "min": [m - 1 for m in old["min"]]}}, "'min'"),
    "range": ({"shards": first_shard(ranges={"observation": [-1, 1]})}, "range of 'observation'"),
    "hash": (
        {"shards": lambda old: [{**old[0], "columns": dict.fromkeys(old[0]["columns"], 64 * "0")}]},
        r"is not what was made from cube-single-play-v0.npz",
    ),
    "split": ({"split": "val"}, "'split' is 'val', its folder 'train'"),
    "dataset": ({"dataset": "scene-play-v0"}, "'dataset' is 'scene-play-v0'"),
}


@pytest.mark.parametrize(("changes", "message"), VERIFIED.values(), ids=VERIFIED.keys())
def test_verify_works_it_out_again(train, changes, message):
    edit(train, **changes)
    with pytest.raises(ValueError, match=message):
        verify_conversion(train)


@pytest.mark.parametrize(
    "name", ["notes.txt", "rows/other.memmap", "rows/meta.json", "columns/qpos/x", ".hidden"]
)
def test_verify_finds_other_files(train, name):
    (train / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{train / name} does not belong there"):
        verify_conversion(train)


def test_verify_finds_columns_without_a_manifest(root, train):
    (train / "columns" / "qpos" / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"columns/qpos is damaged: it has no metadata.json"):
        verify_conversion(train)


def test_columns_of_another_conversion(root, train):
    shutil.rmtree(train / "columns")
    shutil.copytree(root / NAME / "val" / "rows", train / "columns" / "qpos" / "rows")
    shutil.copy(root / NAME / "val" / "metadata.json", train / "columns" / "qpos")
    for read in (lambda: open_buffer(root), lambda: verify_conversion(train)):
        with pytest.raises(
            ValueError, match=r"columns/qpos/metadata.json is damaged: it has 21 rows"
        ):
            read()
    (train / "columns" / "qpos").rename(train / "columns" / "pixels")
    with pytest.raises(
        ValueError, match=r"columns/pixels is damaged: there are no columns of that"
    ):
        verify_conversion(train)


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        ("observation", 5, np.float32(np.nan)),
        ("action", 5, np.float32(1)),
        ("episode", 5, np.int32(1)),
        ("next/done", 5, True),
        ("next/truncated", LENGTHS[0] - 1, False),
        ("next/terminated", 5, np.uint8(2)),
    ],
)
def test_verify_compares_rows_with_each_other(train, name, row, value):
    """Even if the hash in the manifest is that of the changed rows."""
    path = train / "rows" / f"{name}.memmap"
    content = np.fromfile(path, np.asarray(value).dtype).reshape(ROWS, -1)
    content[row, 0] = value
    content.tofile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(
        train,
        shards=lambda old: [{**old[0], "columns": {**old[0]["columns"], name: digest}}],
    )
    with pytest.raises(ValueError, match=r"rows/.*memmap is damaged"):
        verify_conversion(train)


def test_splits_of_other_widths(root, write_npz, tmp_path):
    """Edited by hand, or put together from two conversions."""
    source = tmp_path / "maze"
    source.mkdir()
    name = "pointmaze-medium-navigate-v0"
    np.savez(source / f"{NAME}.npz", **make_arrays(name, (9,), 0))
    np.savez(source / f"{NAME}-val.npz", **make_arrays(name, (9,), 0))
    OGBenchExperienceReplay(NAME, root=tmp_path / "other", source=source)
    shutil.rmtree(root / NAME / "val")
    shutil.copytree(tmp_path / "other" / NAME / "val", root / NAME / "val")
    for read in (lambda: open_buffer(root), lambda: verify_conversion(root / NAME / "train")):
        with pytest.raises(ValueError, match=r"train.*val.*same"):
            read()


@pytest.mark.parametrize("key", ["observations", "actions"])
@pytest.mark.parametrize("first", ["train", "val"])
def test_a_validation_file_of_other_widths(write_npz, tmp_path, key, first):
    source, root = write_npz(), tmp_path / "new"
    arrays = make_arrays(NAME, (12, 9), seed=1)
    np.savez(source / f"{NAME}-val.npz", **{**arrays, key: arrays[key][:, :1]})
    message = rf"{source / NAME}.npz has \(28, 5\) but {source / NAME}-val.npz has " + (
        r"\(1, 5\)" if key == "observations" else r"\(28, 1\)"
    )
    with pytest.raises(ValueError, match=message):
        OGBenchExperienceReplay(NAME, root=root, source=source, split=first)
    assert not list(root.rglob("*.memmap"))


def test_a_validation_file_that_comes_later(write_npz, tmp_path):
    source, root = write_npz(val_lengths=None), tmp_path / "new"
    OGBenchExperienceReplay(NAME, root=root, source=source)
    arrays = make_arrays(NAME, (12, 9), seed=1)
    np.savez(source / f"{NAME}-val.npz", **{**arrays, "actions": arrays["actions"][:, :1]})
    with pytest.raises(ValueError, match=r"train has \(28, 5\) but .*-val.npz has \(28, 1\)"):
        OGBenchExperienceReplay(NAME, root=root, source=source)
    assert not (root / NAME / "val").exists()


class TestSources:
    """Files that belong together."""

    @pytest.fixture
    def shards(self, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        files = []
        for k in range(3):
            for end in ("", "-val"):
                file = folder / f"{NAME}-{k:03}{end}.npz"
                np.savez(file, **make_arrays(NAME, (9,), seed=k))
                files.append({"file": file.name, "bytes": 1, "sha256": 64 * "0"})
        (folder / f"{NAME}.json").write_text(json.dumps({"files": files}))
        return folder

    @pytest.mark.parametrize("name", [f"{NAME}-001.npz", f"{NAME}-001-val.npz"])
    def test_a_missing_file_of_a_recipe(self, shards, tmp_path, name):
        kwargs = {"root": tmp_path / "root", "source": shards}
        (shards / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{shards / name} is missing.*Generate"):
            OGBenchExperienceReplay(NAME, **kwargs)
        assert not (tmp_path / "root").exists()
        (shards / f"{NAME}.json").unlink()
        OGBenchExperienceReplay(NAME, **kwargs)

    def test_files_of_choice(self, shards, tmp_path):
        chosen = [shards / f"{NAME}-{k:03}.npz" for k in (0, 2)]
        (shards / f"{NAME}-001.npz").unlink()
        assert len(OGBenchExperienceReplay(NAME, root=tmp_path / "a", source=chosen)) == 18
        (shards / f"{NAME}-002-val.npz").unlink()
        with pytest.raises(FileNotFoundError, match=r"002-val.npz is missing"):
            OGBenchExperienceReplay(NAME, root=tmp_path / "b", source=chosen)

    @pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', '{"files": [{}]}'])
    def test_a_damaged_recipe(self, shards, tmp_path, content):
        (shards / f"{NAME}.json").write_text(content)
        with pytest.raises(ValueError, match=rf"{shards / NAME}.json is damaged"):
            OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=shards)

    @pytest.mark.parametrize("how", ["same", "symlink", "hard link", "folder"])
    def test_a_file_given_twice(self, shards, tmp_path, how):
        first = shards / f"{NAME}-000.npz"
        again = first if how == "same" else tmp_path / "again.npz"
        if how == "symlink":
            again.symlink_to(first)
        elif how == "hard link":
            again.hardlink_to(first)
        elif how == "folder":
            again = shards
        with pytest.raises(ValueError, match=r"is given twice, first as .*000.npz"):
            OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=[first, again])
        assert not (tmp_path / "root").exists()

    def test_columns_of_other_widths(self, shards, tmp_path):
        arrays = make_arrays(NAME, (9,), seed=0)
        np.savez(shards / f"{NAME}-001.npz", **{**arrays, "qpos": arrays["qpos"][:, :1]})
        with pytest.raises(ValueError, match=r"001.npz: 'qpos' has rows of shape \(1,\)"):
            OGBenchExperienceReplay(
                NAME, root=tmp_path / "root", source=shards, columns=["qpos"], workers=1
            )

    @pytest.mark.parametrize("workers", [0, -1, 2.0])
    def test_workers(self, shards, tmp_path, workers):
        with pytest.raises(ValueError, match=rf"workers={workers}.*1 or more"):
            OGBenchExperienceReplay(NAME, root=tmp_path / "x", source=shards, workers=workers)


if __name__ == "__main__":
    pytest.main([__file__])
