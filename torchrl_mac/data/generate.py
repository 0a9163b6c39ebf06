"""Makes OGBench datasets with OGBench's scripted oracles: seeded, parallel, in its file format."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from torchrl_mac.data.names import OGBenchName
from torchrl_mac.data.parallel import Episode, make_episodes
from torchrl_mac.data.rollouts import OfficialSettings

__all__ = ["generate_dataset"]


def generate_dataset(
    name: str,
    out: str | Path,
    *,
    episodes: int | None = None,
    val_episodes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Makes an OGBench dataset, training and validation files, from its scripted oracles.

    Writes ``{name}.npz`` and ``{name}-val.npz``, which OGBench's own loader reads, and
    ``{name}.json``, the recipe. Files already there with the same recipe are left alone. The files
    depend on the recipe only, byte by byte, whatever the number of workers. They appear when they
    are complete; a run that fails or is interrupted leaves nothing behind.

    Args:
        name (str): the dataset, such as ``"cube-single-play-v0"``; the mode and task in a name
            such as ``"cube-single-play-singletask-task2-v0"`` make no difference.
        out (str or Path): the folder to write to.

    Keyword Args:
        episodes (int, optional): training episodes. Default: as many as the official dataset.
        val_episodes (int, optional): validation episodes. Default: a tenth of ``episodes``, at
            least one.
        steps (int, optional): rows per episode. Default: as the official dataset, mostly 1001.
        seed (int, optional): seed of the whole dataset. Defaults to 0.
        workers (int, optional): processes, each with an environment of about 0.5 GiB. 1 means
            this very process. Default: the number of CPU cores.
        overwrite (bool, optional): replaces files with another recipe. Defaults to ``False``.
        progress (bool, optional): shows a progress bar on stderr. Defaults to ``True``.

    Returns:
        Path: the training file.

    Raises:
        ValueError: if the name is unknown, OGBench ships no oracle for it, or a number is too
            small.
        FileExistsError: if there are files with another recipe.
        OSError: if the folder cannot be written or the disk is too small.
        RuntimeError: if a worker fails.

    .. note:: A script that calls this with more than one worker must do so below
        ``if __name__ == "__main__":``, as the workers import the script.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from torchrl_mac.data import generate_dataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = generate_dataset(
        ...         "pointmaze-medium-navigate-v0",
        ...         folder,
        ...         episodes=2,
        ...         steps=50,
        ...         workers=1,
        ...         progress=False,
        ...     )
        ...     np.load(path)["observations"].shape
        (100, 2)
    """
    parsed = OGBenchName.parse(name)
    official = OfficialSettings.of(parsed)
    episodes = official.episodes if episodes is None else episodes
    steps = official.steps if steps is None else steps
    val_episodes = max(1, episodes // 10) if val_episodes is None else val_episodes
    workers = (os.cpu_count() or 1) if workers is None else workers
    for key, value, least in (
        ("episodes", episodes, 1),
        ("val_episodes", val_episodes, 1),
        ("steps", steps, 2),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise ValueError(f"{key}={value} is too small; it must be {least} or more.")
    recipe = {
        "name": parsed.dataset,
        "episodes": episodes,
        "val_episodes": val_episodes,
        "steps": steps,
        "seed": seed,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("mujoco", "ogbench", "torchrl_mac")
        },
    }
    out = Path(out).expanduser()
    paths = [out / f"{parsed.dataset}.npz", out / f"{parsed.dataset}-val.npz"]
    recipe_path = out / f"{parsed.dataset}.json"
    if not overwrite and _is_made(paths, recipe_path, recipe):
        return paths[0]

    jobs = [(0, i) for i in range(episodes)] + [(1, i) for i in range(val_episodes)]
    with ExitStack() as stack:
        scratch = _scratch_folder(out, parsed.dataset, stack)
        splits = [stack.enter_context(_RowFiles(scratch / key)) for key in ("train", "val")]
        bar = stack.enter_context(_progress_bar(parsed.dataset, len(jobs) * steps, progress))
        # Closed here: a traceback would keep the generator, and so its workers, alive.
        made = stack.enter_context(
            closing(make_episodes(parsed, jobs, seed=seed, steps=steps, workers=workers))
        )
        for number, ((split, _), episode) in enumerate(made, start=1):
            if number == 1:
                _check_disk(out, len(jobs) * sum(column.nbytes for column in episode.values()))
            splits[split].append(episode)
            bar.set_postfix_str(f"{number}/{len(jobs)} episodes", refresh=False)
            bar.update(steps)
        saved = [rows.save() for rows in splits]
        # Without its recipe, a file that another run is about to replace is not mistaken for it.
        recipe_path.unlink(missing_ok=True)
        for source, path in zip(saved, paths, strict=True):
            os.replace(source, path)
        source = scratch / "recipe.json"
        source.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
        _sync(source)
        os.replace(source, recipe_path)
        _sync(out)
    return paths[0]


def _is_made(paths: list[Path], recipe_path: Path, recipe: dict[str, Any]) -> bool:
    existing = [path for path in paths if path.exists()]
    if not existing:
        return False
    try:
        found = json.loads(recipe_path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if found == recipe and len(existing) == len(paths):
        return True
    if found is None:
        reason = f"has no readable recipe beside it ({recipe_path.name})"
    elif found == recipe:
        reason = "lacks its other split"
    else:
        differences = (
            f"{key}={found.get(key)!r} instead of {value!r}"
            for key, value in recipe.items()
            if found.get(key) != value
        )
        reason = f"was made with {', '.join(differences)}"
    raise FileExistsError(
        errno.EEXIST,
        f"{existing[0]} {reason}. Choose another folder, or replace it with overwrite=True "
        "(--overwrite)",
    )


def _scratch_folder(out: Path, dataset: str, stack: ExitStack) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{dataset}-", dir=out)
    except OSError as err:
        raise OSError(
            err.errno, f"Cannot write to {out} ({err.strerror}); choose another folder"
        ) from err
    return Path(stack.enter_context(folder))


def _check_disk(out: Path, num_bytes: int) -> None:
    needed = 2 * num_bytes  # the rows as they come, then the compressed file beside them
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out} has {free / 2**20:.0f} MiB free but {needed / 2**20:.0f} MiB are needed; free "
            "some space, choose another folder or ask for fewer episodes",
        )


class _RowFiles:
    """Collects the rows of one split in flat files, so that memory does not grow with them.

    Args:
        folder (Path): where to put the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._columns: dict[str, tuple[BinaryIO, np.dtype, tuple[int, ...]]] = {}

    def append(self, episode: Episode) -> None:
        for key, column in episode.items():
            if key not in self._columns:
                file = open(self.folder / key, "wb")
                self._columns[key] = file, column.dtype, column.shape[1:]
            self._columns[key][0].write(np.ascontiguousarray(column).data)

    def save(self) -> Path:
        """Packs the rows as an npz file, safe on disk, and returns its path."""
        self.__exit__()
        arrays: dict[str, Any] = {
            key: np.memmap(file.name, dtype, mode="r").reshape(-1, *shape)
            for key, (file, dtype, shape) in self._columns.items()
        }
        path = self.folder / "rows.npz"
        np.savez_compressed(path, **arrays)
        _sync(path)
        return path

    def __enter__(self) -> _RowFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for column in self._columns.values():
            column[0].close()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _progress_bar(dataset: str, rows: int, progress: bool) -> tqdm:
    return tqdm(
        desc=dataset,
        total=rows,
        unit="row",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
