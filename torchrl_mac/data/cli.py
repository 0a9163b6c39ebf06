"""The command line of datasets: ``torchrl-mac-data generate|convert|info``."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from torchrl.data.datasets.utils import _get_root_dir

from torchrl_mac.data.conversion import is_complete, load_metadata
from torchrl_mac.data.generate import generate_dataset
from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.ogbench import OGBenchExperienceReplay

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
    try:
        with _terminated_by_exception():
            args.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind", 130)
    except OSError as err:
        return _fail(err.strerror or str(err), 2)
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
    generate.add_argument("--steps", type=int, help="rows per episode (default: as official, 1001)")
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.add_argument("--workers", type=int, help="processes (default: number of CPU cores)")
    generate.add_argument("--overwrite", action="store_true", help="replace other files")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")

    convert = commands.add_parser(
        "convert",
        help="make the memory map that training reads",
        description="Converts NAME.npz and NAME-val.npz for OGBenchExperienceReplay.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("name", metavar="NAME", help="a singletask name adds that task's rewards")
    convert.add_argument(
        "--source", type=Path, help="npz file or folder (default: ~/.ogbench/data)"
    )
    _add_root(convert)

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
    path = generate_dataset(
        args.name,
        args.out,
        episodes=args.episodes,
        val_episodes=args.val_episodes,
        steps=args.steps,
        seed=args.seed,
        workers=args.workers,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    _say(str(path))


def _convert(args: argparse.Namespace) -> None:
    for split in ("train", "val"):
        buffer = OGBenchExperienceReplay(args.name, root=args.root, source=args.source, split=split)
        _say(f"{buffer.data_path}: {len(buffer)} rows")


def _info(args: argparse.Namespace) -> None:
    name = OGBenchName.parse(args.name).dataset
    root = (args.root or _get_root_dir("ogbench")).expanduser()
    folders = [folder for split in ("train", "val") if is_complete(folder := root / name / split)]
    if not folders:
        raise FileNotFoundError(
            f"{root} has no converted {name}; make it with `{_PROGRAM} convert {name}`"
        )
    for folder in folders:
        metadata = load_metadata(folder)
        tasks = sorted(path.name for path in folder.glob("tasks/*") if is_complete(path))
        _say(
            f"{folder}: {metadata['rows']} rows, {metadata['episodes']} episodes, "
            f"observation {metadata['observation_dim']}, action {metadata['action_dim']}, "
            f"rewards of {', '.join(tasks) or 'no task'}"
        )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


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
