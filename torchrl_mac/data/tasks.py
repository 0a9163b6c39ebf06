"""Rewards and terminations of OGBench's single tasks, as columns beside a dataset's rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict

from torchrl_mac.data.conversion import SourceFile, publish, save_metadata, write_rows
from torchrl_mac.data.names import OGBenchName

__all__ = ["convert_task", "relabel", "task_folder"]

_has_ogbench = importlib.util.find_spec("ogbench") is not None


def task_folder(dataset_folder: Path, name: OGBenchName) -> Path:
    """Where the columns of a task are; the default task has its own, whatever its number."""
    task = "default" if name.task_id is None else f"task{name.task_id}"
    return dataset_folder / "tasks" / task


def convert_task(source: SourceFile, dataset_folder: Path, name: OGBenchName) -> None:
    """Adds the columns of a task to a converted dataset, unless they are there already.

    Writes ``("next", "reward")``, :math:`r_t` as OGBench defines it on :math:`s_t`, and the
    flags ``terminated`` (the task is solved in :math:`s_t`), ``done`` (terminated, or the last
    row of the episode) and ``truncated`` (done but not terminated).

    Args:
        source (SourceFile): the npz file that was converted, for ``qpos`` and
            ``button_states``.
        dataset_folder (Path): the converted dataset.
        name (OGBenchName): a ``"singletask"`` name.

    Raises:
        ImportError: if OGBench is not installed.
        ValueError: if the source lacks what the rewards are computed from.
    """

    def write(partial: Path) -> None:
        rows = TensorDict.load_memmap(dataset_folder / "rows")
        state = {"qpos": source.read("qpos", "f")}
        if "button_states" in source:
            state["button_states"] = source.read("button_states", "iu")
        for key, array in state.items():
            if len(array) != len(rows):
                raise ValueError(
                    f"{source.path}: {key!r} has {len(array)} rows, the observations {len(rows)}."
                )
        try:
            reward, solved, task_id = relabel(name, state)
        except (KeyError, IndexError, ValueError) as err:
            raise ValueError(
                f"{source.path}: no rewards for {name} from {_shapes(state)} ({err}); the file is "
                f"not of {name.env}."
            ) from err
        terminated = np.expand_dims(solved, -1)
        boundary = rows["next", "done"].numpy()
        columns = {
            ("next", "reward"): np.expand_dims(reward, -1),
            ("next", "terminated"): terminated,
            ("next", "truncated"): boundary & ~terminated,
            ("next", "done"): boundary | terminated,
        }
        write_rows(partial / "rows", columns)
        save_metadata(partial, {"task_id": task_id, "solved_rows": int(solved.sum())})

    publish(task_folder(dataset_folder, name), write)


def relabel(name: OGBenchName, state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """OGBench's own rewards of a task.

    NumPy's global random state, which some of its environments use, is left as it was.

    Args:
        name (OGBenchName): a ``"singletask"`` name.
        state (dict): ``qpos`` ``[N, *]`` and, for scenes and puzzles, ``button_states``.

    Raises:
        ImportError: if OGBench is not installed.
        ValueError: if ``qpos`` is not that of the environment.

    Returns:
        the rewards ``[N]`` float32, whether the task is solved ``[N]`` bool, and the number of
        the task, which for a name without one is OGBench's default.
    """
    if not _has_ogbench:
        raise ImportError(f"The rewards of {name} are computed by OGBench: pip install ogbench.")
    import gymnasium
    import ogbench  # noqa: F401  (registers the environments)
    from ogbench.relabel_utils import relabel_dataset

    random_state = np.random.get_state()
    env: Any = gymnasium.make(name.env_id)
    try:
        if state["qpos"].shape[1] != env.unwrapped.model.nq:
            raise ValueError(f"{name.env} has a qpos of {env.unwrapped.model.nq} numbers.")
        labels: dict[str, Any] = dict(state)
        relabel_dataset(name.env_id, env, labels)
        task_id = int(env.unwrapped._reward_task_id)
    finally:
        env.close()
        np.random.set_state(random_state)
    return labels["rewards"], labels["masks"] == 0, task_id


def _shapes(state: dict[str, np.ndarray]) -> str:
    return " and ".join(f"{key} of shape {array.shape}" for key, array in state.items())
