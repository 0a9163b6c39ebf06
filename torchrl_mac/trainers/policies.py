"""Finding the policy that a run, a checkpoint or an export holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torchrl._utils import logger as torchrl_logger

from torchrl_mac.modules import ChunkActor, load_export
from torchrl_mac.modules.export import CONFIG, is_export
from torchrl_mac.utils.files import DamagedError, read_json, verify

__all__ = ["SCORES", "load_policy", "load_policy_and_metadata", "read_scores"]

SCORES = "scores.json"  # beside checkpoints: the success rate of some, by name


def load_policy(
    path: str | Path,
    *,
    which: Literal["newest", "best"] = "newest",
    device: torch.device | str = "cpu",
) -> ChunkActor:
    """Makes the actor that a file holds; it takes raw observations, normalisation is inside.

    Args:
        path (str or Path): what :func:`~torchrl_mac.modules.save_policy` wrote, a checkpoint, or
            the output folder of a run.

    Keyword Args:
        which (str, optional): of a run, the ``"newest"`` checkpoint (default) that is whole, or
            the ``"best"``, by the success rates that the run has measured.
        device (torch.device, optional): where the actor is put. Defaults to the CPU.

    Returns:
        the actor, in evaluation mode: reads ``"observation"`` ``[*, O]`` float32 (and ``"goal"``)
        and writes the chunk of actions ``[*, h, A]``.

    Raises:
        FileNotFoundError: if there is no actor.
        DamagedError: if a file is not as it was saved.
        ValueError: if a file is of another version.

    Examples:
        See :func:`~torchrl_mac.modules.save_policy`.
    """
    return load_policy_and_metadata(path, which=which, device=device)[0]


def load_policy_and_metadata(
    path: str | Path,
    *,
    which: Literal["newest", "best"] = "newest",
    device: torch.device | str = "cpu",
) -> tuple[ChunkActor, dict[str, Any]]:
    """The actor of :func:`load_policy`, and what was kept beside it: its task, its settings."""
    return load_export(_policy_folder(Path(path), which), device=device)


def read_scores(checkpoints: Path) -> dict[str, float]:
    """The scores beside checkpoints, of those that are there; what cannot be read is left out."""
    path, names = checkpoints / SCORES, {it.name for it in checkpoints.glob("checkpoint-*")}
    if not path.is_file():
        return {}
    try:
        found = dict(read_json(path))
    except (DamagedError, TypeError, ValueError) as error:
        torchrl_logger.warning(f"{path} cannot be read, no checkpoint has a score: {error}")
        return {}
    return {
        name: float(score)
        for name, score in found.items()
        if name in names and isinstance(score, int | float) and math.isfinite(score)
    }


def _policy_folder(path: Path, which: str) -> Path:
    """The folder with the actor's files, all of a checkpoint's files as they were saved."""
    if is_export(path):
        return path
    if (path / "components").is_dir():
        verify(path)
        for folder in (path / "components").iterdir():
            if is_export(folder):
                return folder
        raise FileNotFoundError(f"{path} is a checkpoint without an actor.")
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    if not checkpoints.is_dir():
        raise FileNotFoundError(
            f"{path} has neither {CONFIG} nor checkpoints: name the output folder of a run, one of "
            "its checkpoints, or an exported policy."
        )
    if which == "best":
        found = read_scores(checkpoints)
        names = sorted(found, key=lambda name: (found[name], name))
        missing = f"No checkpoint in {checkpoints} has been evaluated."
    else:
        names = sorted(folder.name for folder in checkpoints.glob("checkpoint-*"))
        missing = f"There is no checkpoint in {checkpoints}."
    while names:
        folder = checkpoints / names.pop()
        try:
            return _policy_folder(folder, which)
        except DamagedError as error:
            if not names:
                raise
            torchrl_logger.warning(f"{error} Taking the checkpoint before it.")
    raise FileNotFoundError(missing)
