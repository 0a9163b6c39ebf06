"""Makes OGBench datasets with OGBench's scripted oracles: seeded, parallel, in its file format."""

from __future__ import annotations

import errno
import importlib.metadata
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path

from tqdm import tqdm

from torchrl_mac.datasets.episodes import Job, make_episodes
from torchrl_mac.datasets.names import OGBenchName
from torchrl_mac.datasets.rollouts import OfficialSettings, OracleRollout
from torchrl_mac.datasets.shards import Catalog, RowFiles, ShardFile, scratch_folder
from torchrl_mac.utils.workers import Engine, number_of_workers, require_main_guard

__all__ = ["generate_dataset"]

_MOST_ROWS = 10**10  # a hundred times the largest of the official sets


def generate_dataset(
    name: str,
    out: str | Path,
    *,
    shards: int | None = None,
    episodes: int | None = None,
    val_episodes: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    engine: Engine = "processes",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Makes an OGBench dataset, training and validation files, from its scripted oracles.

    Writes ``{name}.npz`` and ``{name}-val.npz``, which OGBench's own loader reads, or with
    ``shards`` as many pairs ``{name}-000.npz`` and ``{name}-000-val.npz``, ``{name}-001.npz`` and
    so on. The files depend on the recipe only, byte by byte, and a shard on its number too, but
    not on the number of shards or workers, nor on where these are.

    A pair appears when it is complete. ``{name}.json`` holds the recipe and lists the files that
    are complete, with their size, checksum, rows and episodes. After an interruption, even by
    ``SIGKILL`` or a power cut, the same call makes what is not listed; so does a call for more
    shards. Listed files are left alone. Of two calls at once for the same dataset and folder, one
    waits for the other.

    Args:
        name (str): the dataset, such as ``"cube-single-play-v0"``; the mode and task in a name
            such as ``"cube-single-play-singletask-task2-v0"`` make no difference.
        out (str or Path): the folder to write to.

    Keyword Args:
        shards (int, optional): number of pairs of files. The first holds the same rows as a
            dataset that is not sharded. Default: one for each million rows that the name speaks
            of (``"100m"``), else one pair without a number in its name.
        episodes (int, optional): training episodes, in each shard. Default: as many as the
            official dataset.
        val_episodes (int, optional): validation episodes, in each shard. Default: a tenth of
            ``episodes``, at least one.
        steps (int, optional): rows per episode. Default: as the official dataset, mostly 1001.
        seed (int, optional): seed of the whole dataset. Defaults to 0.
        workers (int, optional): processes, each with an environment of about 0.5 GiB; at least 1,
            which means this very process. Default: the number of CPU cores.
        engine (str, optional): ``"processes"`` of this machine, or ``"ray"`` for actors of the
            cluster at ``RAY_ADDRESS``, which only make episodes: files are written here. Defaults
            to ``"processes"``.
        overwrite (bool, optional): replaces files with another recipe, and listed files whose
            checksum is wrong. Defaults to ``False``.
        progress (bool, optional): shows a progress bar on stderr. Defaults to ``True``.

    Returns:
        Path: the training file, of the first shard if there are several.

    Raises:
        ValueError: if the name is unknown, OGBench ships no oracle for it, or a number is too
            small or much too large.
        FileExistsError: if there are files with another recipe, or a listed file has another size
            by now.
        OSError: if the folder cannot be written or the disk is too small.
        RuntimeError: if a worker fails.

    .. note:: A script that calls this with more than one worker must do so below
        ``if __name__ == "__main__":``, as the workers import the script.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from torchrl_mac.datasets import generate_dataset
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
    if shards is None and parsed.size is not None:
        shards = int(parsed.size[:-1])
    episodes = official.episodes if episodes is None else episodes
    steps = official.steps if steps is None else steps
    val_episodes = max(1, episodes // 10) if val_episodes is None else val_episodes
    workers = number_of_workers(workers)
    for key, value, least in (
        ("shards", 1 if shards is None else shards, 1),
        ("episodes", episodes, 1),
        ("val_episodes", val_episodes, 1),
        ("steps", steps, 2),
        ("seed", seed, 0),
    ):
        if type(value) is not int:
            raise ValueError(f"{key}={value} is no whole number; it must be {least} or more.")
        if value < least:
            raise ValueError(f"{key}={value} is too small; it must be {least} or more.")
    rows = (shards or 1) * (episodes + val_episodes) * steps
    if rows > _MOST_ROWS:
        raise ValueError(
            f"{rows:.0e} rows are too many: shards={shards or 1}, each of episodes={episodes} and "
            f"val_episodes={val_episodes} with steps={steps}; together at most {_MOST_ROWS:.0e}."
        )
    if workers > 1 and engine == "processes":
        require_main_guard()
    recipe = {
        "name": parsed.dataset,
        "sharded": shards is not None,
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
    files = [
        ShardFile(
            f"{parsed.dataset}{'' if shards is None else f'-{shard:03d}'}{suffix}.npz",
            shard,
            split,
            count,
        )
        for shard in range(shards or 1)
        for split, (suffix, count) in enumerate((("", episodes), ("-val", val_episodes)))
    ]
    catalog = Catalog(out, recipe, files)
    if overwrite or catalog.missing():  # else the folder need not be writable
        with scratch_folder(out, parsed.dataset) as scratch:
            if missing := catalog.missing(overwrite):
                make = partial(_make, workers=workers, engine=engine, progress=progress)
                make(parsed, catalog, missing, scratch)
    return out / files[0].name


def _make(
    name: OGBenchName,
    catalog: Catalog,
    missing: list[ShardFile],
    scratch: Path,
    *,
    workers: int,
    engine: Engine,
    progress: bool,
) -> None:
    seed, steps = catalog.recipe["seed"], catalog.recipe["steps"]
    # The compressed files, beside the rows of one shard that is packed and one that grows.
    num_jobs = sum(file.episodes for file in missing)
    per_shard = sum(file.episodes for file in catalog.files if file.shard == 0)
    num_bytes = OracleRollout.make(name).row_bytes() * steps
    _check_disk(catalog.out, (num_jobs + min(num_jobs, 2 * per_shard)) * num_bytes)
    jobs = [Job(file.shard, file.split, i) for file in missing for i in range(file.episodes)]
    num_shards = catalog.files[-1].shard + 1
    with ExitStack() as stack:
        # One shard is packed while the workers go on with the next.
        packer = stack.enter_context(ThreadPoolExecutor(1))
        stopped = threading.Event()
        stack.callback(stopped.set)
        bar = stack.enter_context(_progress_bar(name.dataset, len(jobs) * steps, progress))
        # Closed here: a traceback would keep the generator, and so its workers, alive.
        made = stack.enter_context(
            closing(
                make_episodes(name, jobs, seed=seed, steps=steps, workers=workers, engine=engine)
            )
        )
        packing: Future[None] | None = None
        for shard, files in groupby(missing, attrgetter("shard")):
            rows = {file: RowFiles(scratch / file.name) for file in files}
            for file in rows:
                for _, episode in islice(made, file.episodes):
                    rows[file].append(episode)
                    bar.set_postfix_str(f"shard {shard + 1}/{num_shards}", refresh=False)
                    bar.update(steps)
            if packing is not None:
                packing.result()
            packing = packer.submit(_publish, catalog, rows, stopped)
        if packing is not None:
            packing.result()


def _publish(catalog: Catalog, rows: dict[ShardFile, RowFiles], stopped: threading.Event) -> None:
    packed = {file: rows[file].pack(stopped) for file in rows}
    # The training file comes last: where there is one, its validation file is there too.
    catalog.publish(dict(reversed(packed.items())))


def _check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out} has {free / 2**20:.0f} MiB free but {needed / 2**20:.0f} MiB are needed; free "
            "some space, choose another folder or ask for fewer shards or episodes",
        )


def _progress_bar(dataset: str, rows: int, progress: bool) -> tqdm:
    return tqdm(
        desc=dataset,
        total=rows,
        unit="row",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
