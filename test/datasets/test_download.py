"""Downloads by OGBench, from a local server: what is not sound never stands there."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
import time

import numpy as np
import ogbench.utils
import pytest
from ogbench_files import make_arrays

from torchrl_mac.datasets import download, download_dataset
from torchrl_mac.utils.files import sha256

NAME = "cube-single-play-v0"
TRAIN, VAL = f"{NAME}.npz", f"{NAME}-val.npz"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; of the files in ``cut`` only the first half."""

    def __init__(self, *args, asked, cut, **kwargs):
        self.asked, self.cut = asked, cut
        super().__init__(*args, **kwargs)

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        name = self.path[1:]
        self.asked.append(name)
        content = source.read()
        outputfile.write(content[: len(content) // 2] if name in self.cut else content)


@pytest.fixture
def server(write_npz, monkeypatch):
    """The folder that is served, the files asked for, and those to be cut short."""
    folder, asked, cut = write_npz(), [], set()
    handler = functools.partial(Handler, directory=folder, asked=asked, cut=cut)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(ogbench.utils, "DATASET_URL", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder, asked, cut
        server.shutdown()
        thread.join()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def left(out):
    """All files but the lock's."""
    return sorted(path.name for path in out.rglob("*") if path.suffix != ".lock")


def test_both_files_arrive(server, out, capsys):
    folder, asked, _ = server
    task = NAME.replace("-v0", "-singletask-task2-v0")
    checksums = {TRAIN: sha256(folder / TRAIN).upper()}
    assert download_dataset(task, out, checksums=checksums) == [out / TRAIN, out / VAL]
    assert asked == [TRAIN, VAL] and left(out) == [VAL, TRAIN]
    for file in (TRAIN, VAL):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
        assert not (out / file).is_symlink()
    assert not capsys.readouterr().out  # OGBench prints


def test_what_is_there_is_checked_and_left_alone(server, out):
    folder, asked, _ = server
    out.mkdir()
    (out / VAL).write_bytes((folder / VAL).read_bytes())
    time = (out / VAL).stat().st_mtime_ns
    download_dataset(NAME, out)
    assert asked == [TRAIN] and left(out) == [VAL, TRAIN]
    assert (out / VAL).stat().st_mtime_ns == time
    download_dataset(NAME, out)
    assert asked == [TRAIN]


@pytest.mark.parametrize("how", ["cut", "no archive", "NaN", "checksum"])
@pytest.mark.parametrize("file", [TRAIN, VAL])
def test_what_is_not_sound_is_not_kept(server, out, how, file):
    folder, _, cut = server
    checksums = {file: 64 * "0"} if how == "checksum" else {}
    if how == "cut":
        cut.add(file)
    elif how == "no archive":
        (folder / file).write_text("<html>not today</html>")
    elif how == "NaN":
        arrays = make_arrays(NAME, (9,), seed=0)
        arrays["observations"][3] = np.nan
        np.savez(folder / file, **arrays)
    with pytest.raises(ValueError, match=rf"What came from http://.*/{file} is not kept: "):
        download_dataset(NAME, out, checksums=checksums)
    assert left(out) == []


@pytest.mark.parametrize("how", ["damaged", "checksum"])
def test_an_unsound_file_that_is_there_is_named(server, out, how):
    folder, asked, _ = server
    out.mkdir()
    content = (folder / TRAIN).read_bytes()
    (out / TRAIN).write_bytes(content[:-100] if how == "damaged" else content)
    checksums = {TRAIN: 64 * "0"} if how == "checksum" else {}
    with pytest.raises(ValueError, match=rf"{out / TRAIN} is there but not sound, delete it"):
        download_dataset(NAME, out, checksums=checksums)
    assert not asked and left(out) == [TRAIN]


@pytest.mark.parametrize("how", ["missing", "nobody listens", "nobody answers"])
def test_errors_of_the_network_name_the_address(server, out, how, monkeypatch):
    folder, _, _ = server
    if how == "missing":
        (folder / VAL).unlink()
    elif how == "nobody answers":
        monkeypatch.setattr(download, "_SECONDS", 0.2)
        monkeypatch.setattr(Handler, "do_GET", lambda self: time.sleep(1))
    else:
        monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    match = rf"from {ogbench.utils.DATASET_URL} \(.*\)\. Try again.*generate {NAME}.*by hand"
    with pytest.raises(ConnectionError, match=match):
        download_dataset(NAME, out)
    assert left(out) == []
    assert socket.getdefaulttimeout() is None  # it is nobody else's


def test_what_a_killed_process_has_left_is_removed(server, out):
    (out / f".{NAME}.partial").mkdir(parents=True)
    (out / f".{NAME}.partial" / TRAIN).write_text("half")
    download_dataset(NAME, out)
    assert left(out) == [VAL, TRAIN]


def test_arguments(out):
    with pytest.raises(ValueError, match="Did you mean 'cube-single'"):
        download_dataset("cube-sngle-play-v0", out)
    with pytest.raises(ValueError, match=r"\['other.npz'\] are not files of cube-single-play-v0"):
        download_dataset(NAME, out, checksums={"other.npz": 64 * "0"})
    with pytest.raises(OSError, match="Cannot write to /dev/null/out"):
        download_dataset(NAME, "/dev/null/out")
    assert not out.exists()


if __name__ == "__main__":
    pytest.main([__file__])
