"""Downloads from a local server that misbehaves in all the ways servers and networks do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchrl_mac.data import download
from torchrl_mac.data.download import download_dataset

NAME = "cube-single-play-v0"
TRAIN, VAL = f"{NAME}.npz", f"{NAME}-val.npz"
PART, ORIGIN, LOCK = f".{TRAIN}.part", f".{TRAIN}.part.json", f".{TRAIN}.lock"


def make_npz(seed, rows=4000):
    file = io.BytesIO()
    np.savez(file, observations=np.random.default_rng(seed).normal(size=(rows, 5)))
    return file.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def flip(content, index):
    return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]


class Mirror(http.server.ThreadingHTTPServer):
    """Serves ``files`` from memory; ``faults`` holds what goes wrong, one for each npz request,
    ``sums_faults`` the same for other files.

    A fault is a dictionary with one of ``cut`` (closes after so many bytes), ``stall`` (falls
    silent after them), ``flip`` (a byte of the file arrives wrong), ``shift`` (of the first byte
    of a range), ``status`` and ``location`` (of a redirect).
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {}
        self.faults, self.sums_faults = iter(()), iter(())
        self.requests = []  # path, Range and If-Range
        self.ranges = "served"  # or "ignored", "refused"
        self.validator = "etag"  # or "weak", "date", "same" (whatever the file), "none"
        self.heeds_if_range = True
        self.tells_length = True
        self.pause = 0.0  # seconds after every 4 KiB
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # the client was killed or gave up

    def ranges_of(self, file):
        return [asked for path, asked, _ in self.requests if path == file]


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, file, asked = self.server, self.path[1:], self.headers["Range"]
        server.requests.append((file, asked, self.headers["If-Range"]))
        fault = next(server.faults if file.endswith(".npz") else server.sums_faults, {})
        body = server.files.get(file)
        if "location" in fault:
            self.send_response(302)
            self.send_header("Location", fault["location"])
            return self.end_headers()
        if body is None or "status" in fault:
            return self.send_error(fault.get("status", 404))
        if asked and server.ranges == "refused":
            return self.send_error(416)
        digest = sha256(body)
        date = self.date_time_string(int(digest[:7], 16))
        validators = {
            "etag": {"ETag": f'"{digest}"'},
            "weak": {"ETag": f'W/"{digest}"', "Last-Modified": date},
            "date": {"Last-Modified": date},
            "same": {"ETag": '"same"'},
            "none": {},
        }[server.validator]
        current = self.headers["If-Range"] in validators.values() or not server.heeds_if_range
        start = 0
        if asked and server.ranges == "served" and current:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + fault.get("shift", 0)
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        for key, value in validators.items():
            self.send_header(key, value)
        if server.tells_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if "flip" in fault:
            body = flip(body, fault["flip"])
        end = fault.get("cut", fault.get("stall", len(body)))
        for index in range(start, end, 4096):
            self.wfile.write(body[index : min(index + 4096, end)])
            server.closing.wait(server.pause)
        if "stall" in fault:
            server.closing.wait()


@pytest.fixture
def make_mirror():
    with contextlib.ExitStack() as stack:

        def make():
            mirror = stack.enter_context(Mirror())
            mirror.files = {TRAIN: make_npz(0), VAL: make_npz(1, rows=300)}
            threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(mirror.shutdown)
            stack.callback(mirror.closing.set)
            return mirror

        yield make


@pytest.fixture
def mirror(make_mirror):
    return make_mirror()


@pytest.fixture
def dead():
    """The address of a port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Downloads do not wait between tries; the waits they would have made."""
    waits = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OGBENCH_MIRRORS", raising=False)
    return waits


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def fetch(mirror, out, **kwargs):
    """Downloads the training file alone."""
    mirrors = [m if isinstance(m, str) else m.url for m in np.atleast_1d(mirror)]
    defaults = {"files": [TRAIN], "mirrors": mirrors, "timeout": 5, "progress": False}
    return download_dataset(NAME, out, **{**defaults, **kwargs})


@pytest.fixture(autouse=True, scope="module")
def start():
    """Starts a download in another process, forked from one that has the package imported.

    That one does so while the first tests run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrl_mac.data.download"])
    forkserver.ensure_running()

    def start(mirror, out):
        kwargs = {"files": [TRAIN], "mirrors": [mirror.url], "progress": False}
        process = context.Process(
            target=download_dataset, args=(NAME, out), kwargs=kwargs, daemon=True
        )
        process.start()
        return process

    return start


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_complete(out, content):
    assert (out / TRAIN).read_bytes() == content
    assert names(out) == sorted([LOCK, TRAIN])


def break_off(mirror, out, at=10_000):
    """Leaves a partial file of a mirror in ``out``."""
    mirror.faults = iter([{"cut": at}])
    with pytest.raises(ConnectionError, match=f"closed after {at} of {len(mirror.files[TRAIN])}"):
        fetch(mirror, out, retries=0)
    assert (out / PART).read_bytes() == mirror.files[TRAIN][:at]
    assert names(out) == sorted([LOCK, PART, ORIGIN])
    mirror.requests.clear()


class TestDelivery:
    @pytest.mark.parametrize("name", [NAME, "cube-single-play-singletask-task2-v0"])
    def test_both_splits_arrive(self, mirror, out, name):
        paths = download_dataset(name, str(out), mirrors=[mirror.url + "/"], progress=False)
        assert paths == [out / TRAIN, out / VAL]
        assert {path.name: path.read_bytes() for path in paths} == mirror.files
        assert names(out) == sorted([TRAIN, VAL, LOCK, f".{VAL}.lock"])
        assert [path for path, *_ in mirror.requests] == [TRAIN, "SHA256SUMS", VAL, "SHA256SUMS"]

    def test_other_files(self, mirror, out):
        shards = [f"{NAME}-{i:03d}.npz" for i in range(3)]
        mirror.files = {shard: make_npz(i, rows=50) for i, shard in enumerate(shards)}
        paths = fetch(mirror, out, files=iter(shards))
        assert paths == [out / shard for shard in shards]
        assert [path.read_bytes() for path in paths] == list(mirror.files.values())

    def test_what_is_there_is_left_alone(self, mirror, out):
        out.mkdir()
        (out / TRAIN).write_bytes(b"mine")
        download_dataset(NAME, out, mirrors=[mirror.url], progress=False)
        assert (out / TRAIN).read_bytes() == b"mine"
        assert (out / VAL).read_bytes() == mirror.files[VAL]
        assert mirror.ranges_of(TRAIN) == []
        mirror.requests.clear()
        download_dataset(NAME, out, mirrors=[mirror.url], progress=False)
        assert mirror.requests == []

    def test_mirrors_of_the_environment(self, make_mirror, dead, out, monkeypatch):
        named, given, default = make_mirror(), make_mirror(), make_mirror()
        monkeypatch.setattr(download, "_MIRRORS", (default.url,))
        monkeypatch.setenv("OGBENCH_MIRRORS", f"{dead} , {named.url}/,")
        fetch(named, out / "named", mirrors=None)
        fetch(given, out / "given")
        monkeypatch.setenv("OGBENCH_MIRRORS", " ,")
        fetch(default, out / "default", mirrors=None)
        for mirror in (named, given, default):
            assert mirror.ranges_of(TRAIN) == [None]

    def test_ogbenchs_server_is_the_default(self, monkeypatch, out):
        opened = []

        def connect(address, *_, **__):
            opened.append(address)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

        monkeypatch.setattr(socket, "create_connection", connect)
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(ConnectionError) as error:
            fetch("", out, mirrors=None, retries=0)
        assert opened == [("rail.eecs.berkeley.edu", 443)]
        url = f"https://rail.eecs.berkeley.edu/datasets/ogbench/{TRAIN}: "
        assert url in str(error.value)

    def test_the_next_mirror_steps_in(self, make_mirror, dead, out):
        empty, broken, good = make_mirror(), make_mirror(), make_mirror()
        empty.files = {}
        broken.faults = itertools.repeat({"flip": 5000})
        fetch([dead, empty, broken, good], out, retries=1)
        assert_complete(out, good.files[TRAIN])
        assert [len(m.ranges_of(TRAIN)) for m in (empty, broken, good)] == [1, 2, 1]

    def test_unknown_length(self, mirror, out):
        mirror.tells_length = False
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])

    def test_cut_short_without_a_known_length(self, mirror, out):
        mirror.tells_length = False
        mirror.faults = iter([{"cut": 10_000}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, None]

    def test_redirect(self, make_mirror, out):
        old, new = make_mirror(), make_mirror()
        old.faults = iter([{"location": f"{new.url}/{TRAIN}"}])
        new.files[TRAIN] = make_npz(2)
        fetch(old, out)
        assert_complete(out, new.files[TRAIN])

    @pytest.mark.parametrize("scheme", ["file", "ftp"])
    def test_redirects_stay_on_the_web(self, mirror, out, tmp_path, scheme):
        secret = tmp_path / TRAIN
        secret.write_bytes(make_npz(3))
        mirror.faults = iter([{"location": f"{scheme}://127.0.0.1{secret}"}])
        with pytest.raises(ConnectionError, match=scheme):
            fetch(mirror, out, retries=0)
        assert names(out) == [LOCK]

    def test_progress(self, mirror, out, capfd):
        break_off(mirror, out)
        assert "%" not in capfd.readouterr().err
        fetch(mirror, out, progress=True)
        bar = capfd.readouterr().err
        assert TRAIN in bar and "100%" in bar
        size = len(mirror.files[TRAIN]) / 2**10
        assert f"{size:.0f}k/{size:.0f}k" in bar  # the part that was there counts


class TestResume:
    @pytest.fixture
    def unchecked(self, monkeypatch):
        """No checks of the content: the bytes must be right without."""
        monkeypatch.setattr(download, "_verify", lambda *_: None)

    def test_closed_early(self, mirror, out, waits):
        mirror.faults = iter([{"cut": 1}, {"cut": 50_000}, {"cut": 100_001}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, "bytes=1-", "bytes=50000-", "bytes=100001-"]
        assert waits == [0, 1, 2, 4]

    def test_too_often(self, mirror, out):
        mirror.faults = iter([{"cut": i} for i in (10, 20, 30, 40)])
        with pytest.raises(ConnectionError, match=r"closed after 10 of .* closed after 30 of"):
            fetch(mirror, out, retries=2)
        assert (out / PART).read_bytes() == mirror.files[TRAIN][:30]
        assert not (out / TRAIN).exists()

    def test_stalled(self, mirror, out):
        mirror.faults = iter([{"stall": 0}, {"stall": 70_000}, {"stall": 70_000}])
        start = time.monotonic()
        fetch(mirror, out, timeout=0.2)
        assert 0.6 < time.monotonic() - start < 3
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, None, "bytes=70000-", "bytes=70000-"]

    def test_slow_is_not_stalled(self, mirror, out):
        mirror.files[TRAIN] = make_npz(0, rows=1000)
        mirror.pause = 0.05
        fetch(mirror, out, timeout=0.3, retries=0)
        assert_complete(out, mirror.files[TRAIN])

    def test_ranges_ignored(self, mirror, out):
        mirror.ranges = "ignored"
        mirror.faults = iter([{"cut": 90_000}, {"cut": 50_000}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, "bytes=90000-", "bytes=50000-"]

    def test_ranges_refused(self, mirror, out):
        mirror.ranges = "refused"
        mirror.faults = iter([{"cut": 90_000}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, "bytes=90000-", None]

    @pytest.mark.parametrize("validator", ["etag", "date", "weak"])
    def test_by_a_later_call(self, mirror, out, validator):
        mirror.validator = validator
        break_off(mirror, out)
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == ["bytes=10000-"]
        if_range = mirror.requests[0][2]
        assert if_range.startswith('"') if validator == "etag" else if_range.endswith("GMT")

    @pytest.mark.parametrize("heeds_if_range", [True, False])
    @pytest.mark.parametrize("rows", [4000, 4100, 200])
    @pytest.mark.parametrize("validator", ["etag", "date", "weak"])
    def test_a_changed_file_is_not_continued(
        self, mirror, out, unchecked, validator, rows, heeds_if_range
    ):
        mirror.validator, mirror.heeds_if_range = validator, heeds_if_range
        break_off(mirror, out)
        mirror.files[TRAIN] = make_npz(5, rows)
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        restarted = ["bytes=10000-"] if heeds_if_range else ["bytes=10000-", None]
        assert mirror.ranges_of(TRAIN) == restarted

    @pytest.mark.parametrize("rows", [4100, 3000, 200])
    def test_a_file_of_another_length_is_not_continued(self, mirror, out, unchecked, rows):
        mirror.validator = "same"
        break_off(mirror, out)
        mirror.files[TRAIN] = make_npz(5, rows)
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == ["bytes=10000-", None]

    def test_a_file_without_validator_is_not_continued(self, mirror, out, unchecked):
        mirror.validator = "none"
        break_off(mirror, out)
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]

    def test_another_range_than_asked_for(self, mirror, out, unchecked):
        break_off(mirror, out)
        mirror.faults = iter([{"shift": 1}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == ["bytes=10000-", None]

    def test_another_mirror_does_not_continue(self, make_mirror, out, unchecked):
        first, second = make_mirror(), make_mirror()
        break_off(first, out)
        second.files[TRAIN] = make_npz(6)
        second.validator, second.heeds_if_range = "none", False  # would send a range if asked
        fetch(second, out)
        assert_complete(out, second.files[TRAIN])
        assert second.ranges_of(TRAIN) == [None]

    def test_a_dead_mirror_does_not_cost_the_partial_file(self, make_mirror, dead, out):
        empty, mirror = make_mirror(), make_mirror()
        empty.files = {}
        break_off(mirror, out)
        fetch([dead, empty, mirror], out, retries=0)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == ["bytes=10000-"]

    @pytest.mark.parametrize("origin", ["", '{"url": "http', "[]", "{}", "null", None, b"\xff"])
    def test_damaged_origin(self, mirror, out, origin):
        break_off(mirror, out)
        (out / ORIGIN).unlink()
        if origin is not None:
            (out / ORIGIN).write_bytes(origin if isinstance(origin, bytes) else origin.encode())
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]

    def test_origin_without_partial_file(self, mirror, out):
        break_off(mirror, out)
        (out / PART).unlink()
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]

    @pytest.mark.parametrize("damaged", [False, True])
    def test_all_there_but_not_checked(self, mirror, out, damaged):
        content = mirror.files[TRAIN]
        break_off(mirror, out)
        (out / PART).write_bytes(flip(content, 5000) if damaged else content)
        fetch(mirror, out)
        assert_complete(out, content)
        assert mirror.ranges_of(TRAIN) == ([None] if damaged else [])

    def test_more_there_than_the_file_has(self, mirror, out):
        break_off(mirror, out)
        (out / PART).write_bytes(mirror.files[TRAIN] + b"more")
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]


class TestChecks:
    def test_damaged_once(self, mirror, out):
        mirror.faults = iter([{"flip": 5000}])
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None, None]

    @pytest.mark.parametrize("index", [0, 5000, -20])
    def test_damaged_always(self, mirror, out, index):
        mirror.faults = itertools.repeat({"flip": index})
        with pytest.raises(ConnectionError, match="the file is damaged"):
            fetch(mirror, out, retries=1)
        assert mirror.ranges_of(TRAIN) == [None, None]
        assert not {TRAIN, PART} & set(names(out))

    @pytest.mark.parametrize("content", [b"", b"<html>Log in to the hotel's network</html>"])
    def test_not_an_archive(self, mirror, out, content):
        mirror.files[TRAIN] = content
        with pytest.raises(ConnectionError, match="damaged: File is not a zip file"):
            fetch(mirror, out, retries=0)
        assert not {TRAIN, PART} & set(names(out))

    def test_given_checksum(self, mirror, out):
        content = mirror.files[TRAIN]
        mirror.files["SHA256SUMS"] = b"0" * 64 + f"  {TRAIN}\n".encode()  # not consulted
        fetch(mirror, out, checksums={TRAIN: sha256(content).upper()})
        assert_complete(out, content)

    def test_sound_file_of_another_checksum(self, mirror, out):
        expected = sha256(b"another")
        with pytest.raises(ConnectionError) as error:
            fetch(mirror, out, checksums={TRAIN: expected}, retries=0)
        for digest in (expected, sha256(mirror.files[TRAIN])):
            assert digest in str(error.value)
        assert not {TRAIN, PART} & set(names(out))

    @pytest.mark.parametrize("line", ["{} *{}\n", "{}  {}\r\n", "{}  ./{}"])
    def test_published_checksum(self, make_mirror, out, line):
        stale, good = make_mirror(), make_mirror()
        other = line.format("1" * 64, VAL) + "\n"
        for mirror in (stale, good):
            sums = other + line.format(sha256(good.files[TRAIN]), TRAIN)
            mirror.files["SHA256SUMS"] = sums.encode()
        stale.files[TRAIN] = make_npz(7)
        fetch([stale, good], out, retries=1)
        assert_complete(out, good.files[TRAIN])
        assert stale.ranges_of(TRAIN) == [None, None]

    @pytest.mark.parametrize("sums", [b"<html>\xff</html>", b"1234  cube-single-play-v0.npz\n"])
    def test_no_published_checksum(self, mirror, out, sums):
        mirror.files["SHA256SUMS"] = sums
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])

    def test_checksums_come_late(self, mirror, out):
        sums = f"{sha256(make_npz(8))}  {TRAIN}\n".encode()
        mirror.files["SHA256SUMS"] = sums
        faults = [{"status": 503}, {"cut": 70}, {"stall": 70}]
        mirror.sums_faults = iter(faults)
        with pytest.raises(ConnectionError) as error:
            fetch(mirror, out, timeout=0.2)
        for reason in ("SHA256SUMS: HTTP 503", "SHA256SUMS: cut short", "SHA256SUMS: timed out"):
            assert reason in str(error.value)
        assert sha256(make_npz(8)) in str(error.value)  # the last try had them
        mirror.requests.clear()
        mirror.files[TRAIN] = make_npz(8)
        mirror.sums_faults = iter(faults)
        fetch(mirror, out, timeout=0.2)
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]  # not fetched again with them

    def test_the_file_there_has_another_checksum(self, mirror, out):
        fetch(mirror, out)
        content = mirror.files[TRAIN]
        fetch(mirror, out, checksums={TRAIN: sha256(content)})
        with pytest.raises(ValueError, match=rf"{TRAIN} does not have .*{'0' * 64}; delete it"):
            fetch(mirror, out, checksums={TRAIN: "0" * 64})
        assert_complete(out, content)
        assert mirror.ranges_of(TRAIN) == [None]


class TestErrors:
    def test_nobody_answers(self, make_mirror, dead, out, waits):
        empty, busy = make_mirror(), make_mirror()
        empty.files = {}
        busy.faults = itertools.repeat({"status": 503})
        with pytest.raises(ConnectionError) as error:
            fetch([dead, empty, busy], out, retries=2)
        message = str(error.value)
        for line in (
            rf"  {dead}/{TRAIN}: .*Connection refused",
            rf"  {empty.url}/{TRAIN}: HTTP 404 Not Found",
            rf"  {busy.url}/{TRAIN}: HTTP 503 Service Unavailable",
        ):
            assert re.search(line, message)
        for remedy in ("mirrors=", "--mirror", f"torchrl-mac-data generate {NAME}`", out / TRAIN):
            assert str(remedy) in message
        assert len(empty.requests) == 1  # a missing file stays missing
        assert len(busy.requests) == 3
        assert waits == [0, 1, 2, 0, 0, 1, 2]
        assert names(out) == [LOCK]

    @pytest.mark.parametrize(
        "file",
        [
            "../evil.npz",
            "/tmp/evil.npz",
            "a/b.npz",
            "a\\b.npz",
            "..",
            "",
            ".hidden.npz",
            "evil.npz\n",
            "evil.npz?x",
            "%2e%2e%2fevil.npz",
            "SHA256SUMS",
        ],
    )
    def test_names_that_are_not_plain(self, mirror, out, file):
        mirror.files[file] = make_npz(0)
        with pytest.raises(ValueError, match="not the plain name"):
            fetch(mirror, out, files=[TRAIN, file])
        assert mirror.requests == [] and not out.exists()

    @pytest.mark.parametrize("file", [TRAIN, PART, ORIGIN, LOCK])
    @pytest.mark.parametrize("exists", [True, False])
    def test_links(self, mirror, out, tmp_path, file, exists):
        outside = tmp_path / "outside"
        if exists:
            outside.write_bytes(b"mine")
        out.mkdir()
        (out / file).symlink_to(outside)
        with pytest.raises(ValueError, match=rf"{file} is a link"):
            fetch(mirror, out)
        assert outside.read_bytes() == b"mine" if exists else not outside.exists()
        assert mirror.requests == []

    @pytest.mark.parametrize(
        "url", ["file:///data", "ftp://host/data", "host/data", "/data", "", "http://", "https:/h"]
    )
    def test_addresses_that_are_not_of_the_web(self, mirror, out, url):
        with pytest.raises(ValueError, match=r"mirrors: .* is not an address"):
            fetch(mirror, out, mirrors=[mirror.url, url])
        assert mirror.requests == []

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"mirrors": []}, "mirrors is empty"),
            ({"mirrors": "http://host"}, "'h' is not an address"),
            ({"checksums": {TRAIN: "123"}}, f"'123' of {TRAIN} is not a SHA-256"),
            ({"retries": -1}, "retries=-1"),
            ({"timeout": 0}, "timeout=0"),
        ],
    )
    def test_arguments(self, mirror, out, kwargs, message):
        with pytest.raises(ValueError, match=message):
            fetch(mirror, out, **kwargs)
        assert mirror.requests == [] and not out.exists()

    def test_unknown_dataset(self, out):
        with pytest.raises(ValueError, match="Did you mean 'cube-single'"):
            download_dataset("cube-singel-play-v0", out)

    def test_too_little_space(self, make_mirror, out, monkeypatch):
        first, second = make_mirror(), make_mirror()
        first.files[TRAIN] = make_npz(0, rows=200_000)  # 7.6 MiB
        first.pause = 0.01
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
        with pytest.raises(OSError, match=r"8 MiB are needed, 3 MiB are free") as error:
            fetch([first, second], out)
        assert error.value.errno == errno.ENOSPC
        assert str(out / TRAIN) in str(error.value)
        assert second.requests == [] and names(out) == [LOCK]

    def test_what_is_there_needs_no_space(self, mirror, out, monkeypatch):
        break_off(mirror, out, at=150_000)
        rest = len(mirror.files[TRAIN]) - 150_000
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=rest))
        fetch(mirror, out)
        assert_complete(out, mirror.files[TRAIN])

    def test_disk_full_on_the_way(self, make_mirror, out, monkeypatch):
        first, second = make_mirror(), make_mirror()
        real = Path.open

        def open_full(path, mode="r", **kwargs):
            file = real(path, mode, **kwargs)
            if mode != "ab":
                return file

            class Full(io.BufferedWriter):
                def write(self, block):
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full(file.detach())

        monkeypatch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match=rf"{TRAIN} \(No space left on device\)") as error:
            fetch([first, second], out)
        assert error.value.errno == errno.ENOSPC
        assert first.ranges_of(TRAIN) == [None] and second.requests == []

    @pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
    def test_read_only_folder(self, mirror, out):
        out.mkdir()
        out.chmod(0o500)
        with pytest.raises(PermissionError, match=rf"Cannot write {out / TRAIN}"):
            fetch(mirror, out)
        assert mirror.requests == [] and names(out) == []

    def test_read_only_folder_simulated(self, mirror, out, monkeypatch):
        def lock(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(download, "FileLock", lock)
        with pytest.raises(PermissionError, match=rf"Cannot write {out / TRAIN} \(Permission"):
            fetch(mirror, out)
        assert mirror.requests == []

    def test_a_complete_file_in_a_read_only_folder(self, mirror, out, monkeypatch):
        fetch(mirror, out)
        monkeypatch.setattr(download, "FileLock", lambda path: pytest.fail("locked"))
        assert fetch(mirror, out) == [out / TRAIN]

    def test_the_folder_is_a_file(self, mirror, out):
        out.write_text("mine")
        with pytest.raises(OSError, match="choose another folder"):
            fetch(mirror, out)
        assert out.read_text() == "mine"


class TestProcesses:
    def test_killed_again_and_again(self, start, mirror, out):
        rng = random.Random(0)
        mirror.files[TRAIN] = content = make_npz(0, rows=20_000)
        mirror.pause = 0.01  # 2 seconds for all
        for number in range(10):
            process = start(mirror, out)
            while len(mirror.requests) <= number:
                assert process.is_alive()
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            process.join()
            assert not (out / TRAIN).exists()
        offsets = [int(asked[6:-1]) for asked in mirror.ranges_of(TRAIN) if asked]
        assert offsets == sorted(offsets) and offsets[-1] > 0
        offset = (out / PART).stat().st_size
        assert (out / PART).read_bytes() == content[:offset]
        assert json.loads((out / ORIGIN).read_text())["length"] == len(content)
        mirror.pause = 0
        fetch(mirror, out)
        assert mirror.ranges_of(TRAIN)[-1] == f"bytes={offset}-"
        assert_complete(out, content)

    def test_two_at_once(self, start, mirror, out):
        mirror.pause = 0.01
        processes = [start(mirror, out) for _ in range(2)]
        for process in processes:
            process.join(20)
        assert [process.exitcode for process in processes] == [0, 0]
        assert_complete(out, mirror.files[TRAIN])
        assert mirror.ranges_of(TRAIN) == [None]

    def test_the_second_goes_on_where_the_first_was_killed(self, start, mirror, out):
        mirror.pause = 0.05
        first = start(mirror, out)
        while not (out / PART).exists() or (out / PART).stat().st_size < 8192:
            time.sleep(0.002)
        second = start(mirror, out)
        time.sleep(0.2)
        assert len(mirror.requests) == 1
        first.kill()
        mirror.pause = 0
        second.join(20)
        assert second.exitcode == 0
        assert_complete(out, mirror.files[TRAIN])
        assert [asked is None for asked in mirror.ranges_of(TRAIN)] == [True, False]
