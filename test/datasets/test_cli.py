"""The command line of datasets."""

from __future__ import annotations

import errno
import json
import re
import zipfile

import pytest

from torchrl_mac import datasets
from torchrl_mac.datasets import cli

MAZE, CUBE = "pointmaze-medium-navigate-v0", "cube-single-play-v0"


class TestCommandLine:
    def test_generate_convert_info(self, tmp_path, capsys):
        options = ["--episodes", "2", "--steps", "30", "--workers", "1", "--quiet"]
        assert cli.main(["generate", MAZE, "--out", str(tmp_path), *options]) == 0
        assert capsys.readouterr().out == f"{tmp_path / MAZE}.npz\n"
        root = str(tmp_path / "root")
        task = MAZE.replace("-v0", "-singletask-task1-v0")
        assert cli.main(["convert", task, "--source", str(tmp_path), "--root", root]) == 0
        assert "train: 60 rows" in capsys.readouterr().out
        assert cli.main(["info", task, "--root", root]) == 0
        words = [line.split() for line in capsys.readouterr().out.splitlines()]
        (train,) = (line for line in words if line[0] == "train")
        (val,) = (line for line in words if line[0] == "val")
        assert "60" in train and "30" in val

    @pytest.mark.parametrize(
        ("argv", "match"),
        [
            ([], "required"),
            (["generate", CUBE, "--episodes", "many"], "many"),
            (["generate", CUBE, "--episodes", "0"], "episodes=0"),
            (["generate", "cube-nonuple-play-v0"], "cube-nonuple"),
            (["generate", CUBE, "--out", "/dev/null/out"], "another folder"),
            (["convert", CUBE, "--source", "/nowhere", "--root", "/dev/null"], "/dev/null|source"),
            (["info", CUBE, "--root", "/nowhere"], "no converted cube-single-play-v0"),
            (["generate", CUBE, "--episodes", "1000000000"], "rows are too many"),
            (["generate", CUBE, "--workers", "0"], "workers=0.*1 or more"),
            (["generate", CUBE, "--workers", "-1"], "workers=-1.*1 or more"),
            (["convert", CUBE, "--workers", "0"], "workers=0.*1 or more"),
            (["convert", CUBE, "--workers", "-1"], "workers=-1.*1 or more"),
        ],
    )
    def test_errors(self, capsys, argv, match):
        assert cli.main(argv) == 2
        stderr = capsys.readouterr().err
        assert re.search(match, stderr)
        assert "Traceback" not in stderr and "Errno" not in stderr
        assert stderr.splitlines()[-1].startswith("torchrl-mac-data")

    def test_errors_of_the_system_name_the_file(self, write_npz, tmp_path, capsys, monkeypatch):
        source = str(write_npz())

        def unreadable(*_, **__):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(zipfile, "ZipFile", unreadable)
            for argv in (["convert", CUBE, "--root", str(tmp_path / "root")], ["verify", CUBE]):
                assert cli.main([*argv, "--source", source]) == 2
                assert f"{source}/{CUBE}.npz: Input/output error" in capsys.readouterr().err

        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied", "/data/set.npz")

        monkeypatch.setattr(datasets, "generate_dataset", refuse)
        assert cli.main(["generate", CUBE]) == 2
        assert capsys.readouterr().err.endswith(": /data/set.npz: Permission denied\n")

        def move(*_, **__):
            raise OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b")

        monkeypatch.setattr(datasets, "generate_dataset", move)
        assert cli.main(["generate", CUBE]) == 2
        assert capsys.readouterr().err.endswith(": /a and /b: Invalid cross-device link\n")

    @pytest.mark.parametrize("command", ["info", "verify", "convert"])
    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 3, "rows": 5}'])
    def test_damaged_manifests_are_named(self, write_npz, tmp_path, capsys, command, content):
        root = ["--root", str(tmp_path / "root")]
        source = ["--source", str(write_npz())]
        assert cli.main(["convert", CUBE, *source, *root]) == 0
        manifest = tmp_path / "root" / CUBE / "train" / "metadata.json"
        manifest.write_text(content)
        assert cli.main([command, CUBE, *root, *(source if command == "convert" else [])]) == 2
        stderr = capsys.readouterr().err
        assert str(manifest.parent) in stderr and "Traceback" not in stderr

    def test_verify_misses_a_file(self, write_npz, capsys):
        source = write_npz()
        files = [{"file": f"{CUBE}{end}.npz", "sha256": 64 * "0"} for end in ("", "-val")]
        (source / f"{CUBE}.json").write_text(json.dumps({"files": files}))
        (source / f"{CUBE}-val.npz").unlink()
        assert cli.main(["verify", CUBE, "--source", str(source)]) == 2
        assert f"{CUBE}-val.npz is missing" in capsys.readouterr().err

    def test_interrupted(self, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(datasets, "generate_dataset", interrupt)
        assert cli.main(["generate", CUBE]) == 130
        assert "interrupted" in capsys.readouterr().err

    def test_failed_worker(self, capsys, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("worker is gone")

        monkeypatch.setattr(datasets, "generate_dataset", fail)
        assert cli.main(["generate", CUBE]) == 1
        assert "worker is gone" in capsys.readouterr().err

    def test_columns_and_workers(self, write_npz, tmp_path, capsys):
        options = ["--source", str(write_npz()), "--root", str(tmp_path / "root")]
        argv = ["convert", CUBE, *options, "--columns", "qpos", "qvel", "--workers", "1"]
        assert cli.main(argv) == 0
        assert cli.main(["info", CUBE, "--root", str(tmp_path / "root")]) == 0
        assert "qpos  qvel" in capsys.readouterr().out
        assert cli.main(["convert", CUBE, *options, "--columns", "velocity"]) == 2
        assert "velocity" in capsys.readouterr().err

    def test_verify(self, write_npz, tmp_path, capsys):
        source, root = write_npz(), str(tmp_path / "root")
        assert cli.main(["convert", CUBE, "--source", str(source), "--root", root]) == 0
        capsys.readouterr()
        assert cli.main(["verify", CUBE, "--source", str(source)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        assert cli.main(["verify", CUBE, "--root", root]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        column = tmp_path / "root" / CUBE / "train/rows/action.memmap"
        with column.open("r+b") as file:
            file.seek(40)
            file.write(b"x")
        assert cli.main(["verify", CUBE, "--root", root]) == 2
        stderr = capsys.readouterr().err
        assert "'action'" in stderr and f"{CUBE}.npz" in stderr and "convert again" in stderr

    def test_download(self, tmp_path, capsys, monkeypatch):
        calls = []

        def download(name, out, *, checksums):
            calls.append((name, out, checksums))
            return [out / f"{name}.npz", out / f"{name}-val.npz"]

        monkeypatch.setattr(datasets, "download_dataset", download)
        argv = ["download", CUBE, "--out", str(tmp_path)]
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == [str(tmp_path / f"{CUBE}{end}.npz") for end in ("", "-val")]
        digest = 32 * "aB"
        assert cli.main([*argv, "--sha256", f"{CUBE}.npz={digest}"]) == 0
        assert calls == [(CUBE, tmp_path, {}), (CUBE, tmp_path, {f"{CUBE}.npz": digest})]
        assert cli.main([*argv, "--sha256", f"{CUBE}.npz=abc"]) == 2
        assert "is not FILE=HEX" in capsys.readouterr().err


if __name__ == "__main__":
    pytest.main([__file__])
