from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from torchrl_mac.utils import files
from torchrl_mac.utils.files import DamagedError, publish, read_json, recover, replaced, write_json


def make(path, kind, text):
    if kind == "folder":
        (path / "part").mkdir(parents=True)
        path = path / "part" / "content"
    path.write_text(text)


def content(path):
    return (path / "part" / "content" if path.is_dir() else path).read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


kinds = pytest.mark.parametrize("kind", ["file", "folder"])


@kinds
def test_new_content_takes_the_place_of_the_old(tmp_path, kind):
    path = tmp_path / "path"
    for text in ("first", "second"):
        with replaced(path) as aside:
            make(aside, kind, text)
            assert not path.exists() or content(path) == "first"
        assert content(path) == text
        assert names(tmp_path) == ["path"]


@kinds
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_changes_nothing(tmp_path, kind, old):
    path = tmp_path / "path"
    if old:
        make(path, kind, old)
    with pytest.raises(ZeroDivisionError), replaced(path) as aside:
        make(aside, kind, "new")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), replaced(path):
        pass  # makes nothing
    assert names(tmp_path) == (["path"] if old else [])
    assert old is None or content(path) == old


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "path"
    make(path, "folder", "old")
    rename = os.replace

    def fail(source, target):
        if source.name == ".path.partial":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"), replaced(path) as aside:
        make(aside, "folder", "new")
    assert content(path) == "old" and names(tmp_path) == ["path"]


def test_resumable(tmp_path):
    path = tmp_path / "path"
    with pytest.raises(ZeroDivisionError), replaced(path, resumable=True) as aside:
        make(aside, "folder", "half")
        raise ZeroDivisionError
    assert names(tmp_path) == [".path.partial"]
    with replaced(path, resumable=True) as aside:
        assert content(aside) == "half"
    assert content(path) == "half" and names(tmp_path) == ["path"]


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    rename, fsync = os.replace, files.sync
    monkeypatch.setattr(files, "sync", lambda path: (events.append(path.name), fsync(path)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), rename(*paths)))
    with replaced(tmp_path / "path") as aside:
        make(aside, "folder", "new")
    assert events.index("renamed") == 3
    assert set(events[:3]) == {".path.partial", "part", "content"}
    assert events[4] == tmp_path.name


def die_at(call, path, kind):
    """Replaces, and is killed before the rename of that number."""
    rename, calls = os.replace, iter(range(9))

    def replace(*paths):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = replace
    with replaced(path) as aside:
        make(aside, kind, "new")
    os.kill(os.getpid(), signal.SIGKILL)


@kinds
@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("again", [False, True])
def test_killed_before_each_rename(tmp_path, kind, call, again):
    path = tmp_path / "path"
    make(path, kind, "old")
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(call, path, kind))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if again:
        with pytest.raises(ZeroDivisionError), replaced(path):
            raise ZeroDivisionError
    else:
        recover(path)
    renames = 2 if kind == "folder" else 1
    assert content(path) == ("old" if call < renames else "new")
    assert names(tmp_path) == ["path"]


def test_publish_moves_from_elsewhere(tmp_path):
    (tmp_path / "scratch").mkdir()
    for text in ("first", "second"):
        make(tmp_path / "scratch" / "made", "folder", text)
        publish(tmp_path / "scratch" / "made", tmp_path / "path")
        assert content(tmp_path / "path") == text
    assert names(tmp_path) == ["path", "scratch"] and not names(tmp_path / "scratch")


def test_json(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"b": [1, 2.5, None], "a": "é"})
    assert read_json(path) == json.loads(path.read_text()) == {"b": [1, 2.5, None], "a": "é"}
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert names(tmp_path) == ["value.json"] and read_json(path)["a"] == "é"
    path.write_text("{")
    with pytest.raises(DamagedError, match=r"value.json is damaged"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


if __name__ == "__main__":
    pytest.main([__file__])
