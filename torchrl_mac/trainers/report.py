"""What a run leaves behind: a summary, its curves and a video."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrl.record.loggers.csv import CSVLogger

from torchrl_mac.utils.files import write_json

__all__ = ["plot_curves", "versions", "write_summary", "write_video"]

_PACKAGES = ("torchrl_mac", "torch", "torchrl", "tensordict", "ogbench", "mujoco", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    installed = importlib.metadata.packages_distributions()  # a nightly build has its own name
    for package in _PACKAGES:
        if names := installed.get(package):
            name = package if package in names else names[0]
            found[package] = importlib.metadata.version(name)
    return found


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes ``summary`` as JSON, with :func:`versions` under ``"versions"``.

    Examples:
        >>> import json, tempfile
        >>> from torchrl_mac.trainers import write_summary
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_summary(f"{folder}/summary.json", {"success_rate": 0.9})
        ...     summary = json.load(open(f"{folder}/summary.json"))
        >>> sorted(summary)
        ['success_rate', 'versions']
    """
    write_json(Path(path), {**summary, "versions": versions()})


def plot_curves(path: str | Path, logger: CSVLogger, borders: Sequence[int] = ()) -> None:
    """Draws what ``logger`` has logged: evaluation metrics and losses over updates.

    Args:
        path (str or Path): the picture's file, such as ``curves.png``.
        logger (CSVLogger): its scalars are grouped by what stands before the first ``/``; a
            validation loss shares the axes of the training loss of the same name.
        borders (sequence of int, optional): updates at which a line is drawn, such as where
            training went online.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Curves need matplotlib: pip install 'torchrl_mac[train]'.")
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, points in logger.experiment.scalars.items():
        group, _, metric = name.partition("/")
        curves.setdefault(metric, {})[group] = points
    order = sorted(curves, key=lambda metric: ("eval" not in curves[metric], metric))
    columns = min(4, max(1, len(order)))
    rows = max(1, -(-len(order) // columns))
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows))
    # fixed margins, in shares of a plot: to measure every label takes seconds
    around = {"left": 0.18 / columns, "right": 1 - 0.05 / columns}
    around |= {"bottom": 0.2 / rows, "top": 1 - 0.1 / rows}
    figure.subplots_adjust(**around, wspace=0.3, hspace=0.45)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for metric, axis in zip(order, axes):
        for group, points in curves[metric].items():
            updates, values = zip(*points, strict=True)
            axis.plot(updates, values, label=group, marker="." if len(points) < 30 else None)
        for border in borders:
            axis.axvline(border, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(metric, fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        if metric.startswith("loss_") and all(v > 0 for p in curves[metric].values() for _, v in p):
            axis.set_yscale("log")
        if metric == "success_rate":
            axis.set_ylim(-0.02, 1.02)
        if len(curves[metric]) > 1:
            axis.legend(fontsize=7)
    for axis in axes:  # what is left of the grid
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def write_video(path: str | Path, episodes: Sequence[Tensor], fps: int = 30) -> None:
    """Writes episodes, one after the other, as an H.264 MP4.

    Args:
        path (str or Path): the video's file.
        episodes (sequence of Tensor): frames, uint8 ``[T, H, W, 3]`` each, all of one size.
        fps (int, optional): frames per second. Defaults to 30.

    Raises:
        ImportError: if PyAV is not installed.
    """
    if importlib.util.find_spec("av") is None:
        raise ImportError("Videos need PyAV: pip install 'torchrl_mac[video]'.")
    import av

    frames = torch.cat(list(episodes))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
