"""The command line of datasets: ``torchrl-mac-data generate|download|convert|verify|info``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from torchrl_mac import datasets
from torchrl_mac.datasets.manifest import DEFAULT_ROOT, converted_splits, is_complete, load_split
from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.sources import find_shards, refuse_twice, validation_file
from torchrl_mac.utils.workers import Engine

__all__ = ["main"]

_PROGRAM = "torchrl-mac-data"


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv (list of str, optional): the arguments. Default: those of the process.

    Returns:
        int: the exit code: 0, 2 for wrong usage, values or files, 1 if a worker process failed
        and 130 after Ctrl-C. All but the first print what went wrong on stderr.

    Examples:
        >>> main(["generate", "--help"])  # doctest: +ELLIPSIS
        usage: torchrl-mac-data generate ...
        0
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    logging.basicConfig(format=f"{_PROGRAM}: %(message)s")
    logging.getLogger("torchrl").setLevel(logging.INFO)
    try:
        with _terminated_by_exception():
            args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    except OSError as err:
        return _fail(_text_of(err), 2)
    except (ImportError, NotImplementedError, ValueError) as err:
        return _fail(str(err), 2)
    except RuntimeError as err:
        return _fail(str(err), 1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="OGBench datasets.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="make a dataset with OGBench's scripted oracles",
        description="Makes NAME.npz and NAME-val.npz in OGBench's format, for cube-*, scene-*, "
        "puzzle-* (play, noisy) and pointmaze-* (navigate, stitch). The same options give the "
        "same bytes, whatever the number of workers.",
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("name", metavar="NAME", help="such as cube-single-play-v0")
    generate.add_argument("--out", type=Path, default="data", help="folder (default: %(default)s)")
    generate.add_argument("--episodes", type=int, help="default: as in the official dataset")
    generate.add_argument("--val-episodes", type=int, help="default: a tenth, at least one")
    generate.add_argument(
        "--shards",
        type=int,
        help="make this many pairs of files, each of --episodes (default: 100 for 100m names)",
    )
    generate.add_argument("--steps", type=int, help="rows per episode (default: as official, 1001)")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.add_argument("--workers", type=int, help="processes, at least 1 (default: CPU cores)")
    generate.add_argument(
        "--engine",
        choices=get_args(Engine),
        default="processes",
        help="where workers are; ray: the cluster at RAY_ADDRESS (default: %(default)s)",
    )
    generate.add_argument("--overwrite", action="store_true", help="replace other files")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")

    convert = commands.add_parser(
        "convert",
        help="make the memory map that training reads",
        description="Converts NAME.npz and NAME-val.npz for training.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("name", metavar="NAME", help="a singletask name adds that task's rewards")
    convert.add_argument(
        "--source",
        type=Path,
        nargs="+",
        help="npz files or folders of them (default: ~/.ogbench/data)",
    )
    convert.add_argument(
        "--columns", nargs="+", default=(), metavar="KEY", help="qpos, qvel, button_states"
    )
    convert.add_argument(
        "--workers", type=int, help="files at a time, at least 1 (default: CPU cores)"
    )
    _add_root(convert)

    download = commands.add_parser(
        "download",
        help="fetch OGBench's public files",
        description="Fetches NAME.npz and NAME-val.npz, and checks them.",
    )
    download.set_defaults(run=_download)
    download.add_argument("name", metavar="NAME", help="such as cube-single-play-v0")
    download.add_argument("--out", type=Path, default="data", help="folder (default: %(default)s)")
    download.add_argument(
        "--sha256", nargs="+", type=_pair, metavar="FILE=HEX", help="what the files must hash to"
    )

    verify = commands.add_parser(
        "verify",
        help="check files or a conversion",
        description="Hashes and checks a converted dataset; with --source the files instead.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("name", metavar="NAME", help="such as cube-single-play-v0")
    verify.add_argument("--source", type=Path, help="npz file, or folder of files, to check")
    _add_root(verify)

    info = commands.add_parser(
        "info", help="what a converted dataset holds", description="Describes a converted dataset."
    )
    info.set_defaults(run=_info)
    info.add_argument("name", metavar="NAME", help="such as cube-single-play-v0")
    _add_root(info)
    return parser


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, help="folder of conversions (default: ~/.cache/torchrl/ogbench)"
    )


def _generate(args: argparse.Namespace) -> None:
    path = datasets.generate_dataset(
        args.name,
        args.out,
        episodes=args.episodes,
        val_episodes=args.val_episodes,
        steps=args.steps,
        shards=args.shards,
        seed=args.seed,
        workers=args.workers,
        engine=args.engine,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    _say(str(path))


def _download(args: argparse.Namespace) -> None:
    for path in datasets.download_dataset(args.name, args.out, checksums=dict(args.sha256 or ())):
        _say(str(path))


def _convert(args: argparse.Namespace) -> None:
    for split in ("train", "val"):
        dataset = datasets.OGBenchDataset(
            args.name,
            root=args.root,
            source=args.source,
            split=split,
            columns=args.columns,
            workers=args.workers,
        )
        _say(f"{dataset.path}: {len(dataset)} rows")


def _verify(args: argparse.Namespace) -> None:
    name = OGBenchName.parse(args.name).dataset
    if args.source is None:
        for folder in _converted(args.root, name):
            datasets.verify_conversion(folder, _say)
        return
    train = find_shards(args.source, name)
    refuse_twice(train)
    datasets.verify_files(
        [*train, *(path for path in map(validation_file, train) if path.exists())], _say
    )


def _info(args: argparse.Namespace) -> None:
    name = OGBenchName.parse(args.name).dataset
    table: list[tuple[str, ...]] = [
        ("split", "files", "rows", "episodes", "observation", "action", "GiB", "columns")
    ]
    for folder in _converted(args.root, name):
        about = load_split(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.memmap")) / 2**30
        columns = [path.name for path in sorted(folder.glob("columns/*")) if is_complete(path)]
        numbers = (about["rows"], about["episodes"], about["observation_dim"], about["action_dim"])
        table.append(
            (folder.name, str(len(about["shards"])), *map(str, numbers), f"{size:.2f}", *columns)
        )
        digest = about["digest"]
        _say(f"{folder}: digest {digest}")
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(table[0]))]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        _say("  ".join([*cells, *row[len(widths) :]]).rstrip())


def _converted(root: Path | None, name: str) -> list[Path]:
    folders = converted_splits(name, root)
    if not folders:
        raise FileNotFoundError(
            f"{root or DEFAULT_ROOT} has no converted {name}; make it with "
            f"`{_PROGRAM} convert {name}`"
        )
    return folders


def _pair(text: str) -> tuple[str, str]:
    file, _, digest = text.rpartition("=")
    if not file or not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE=HEX, with 64 hexadecimal digits")
    return file, digest


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _text_of(err: OSError) -> str:
    """The message without its number; the system's name the file beside it."""
    files = [str(file) for file in (err.filename, err.filename2) if file is not None]
    message = err.strerror or str(err)
    return f"{' and '.join(files)}: {message}" if files else message


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: {message}\n")
    return code


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Lets SIGTERM, as sent by ``timeout`` and job schedulers, clean up like Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
