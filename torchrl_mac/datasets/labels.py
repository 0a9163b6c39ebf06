"""Columns beside a dataset's rows: single-task rewards, goal representations, simulator states."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict

from torchrl_mac.datasets.columns import ColumnWriter, write_columns
from torchrl_mac.datasets.conversion import FLAGS, end_flags, open_rows, parts_of
from torchrl_mac.datasets.manifest import METADATA, damaged, load_metadata, load_split
from torchrl_mac.datasets.names import NUM_TASKS, OGBenchName
from torchrl_mac.datasets.sources import OGBenchSource
from torchrl_mac.datasets.statistics import ObservationStatistics, RunningStatistics
from torchrl_mac.datasets.tables import Schema, open_columns

__all__ = [
    "STATE_KEYS",
    "LabelledEnv",
    "column_folder",
    "convert_columns",
    "label_of",
    "open_labels",
    "task_of",
]

STATE_KEYS = ("qpos", "qvel", "button_states")
"""What OGBench files hold beside observations and actions."""

_ORACLE = "oracle_rep"
_TASKS = ("task-default", *(f"task{number}" for number in range(1, NUM_TASKS + 1)))
_has_ogbench = importlib.util.find_spec("ogbench") is not None


def column_folder(dataset_folder: Path, label: str) -> Path:
    """Where the columns of a label are."""
    return dataset_folder / "columns" / label


def label_of(name: OGBenchName) -> str | None:
    """The label that a dataset name asks for; the default task has its own, whatever its number."""
    if name.mode == "singletask":
        return "task-default" if name.task_id is None else f"task{name.task_id}"
    return _ORACLE if name.mode == "oraclerep" else None


def convert_columns(
    sources: list[OGBenchSource],
    dataset_folder: Path,
    name: OGBenchName,
    label: str,
    *,
    workers: int = 1,
    progress: bool | None = None,
) -> None:
    """Adds the columns of a label to a converted dataset, unless they are there already.

    A task has ``("next", "reward")``, :math:`r_t` as OGBench defines it on :math:`s_t`, and the
    flags ``terminated`` (the task is solved in :math:`s_t`), ``done`` (terminated, or the last
    row of the episode) and ``truncated`` (done but not terminated). ``"oracle_rep"`` is the goal
    representation of each state, and the labels in ``STATE_KEYS`` are the file's own arrays.

    Args:
        sources (list of OGBenchSource): the files that were converted.
        dataset_folder (Path): the converted dataset.
        name (OGBenchName): the dataset and, for a task's label, the task.
        label (str): from :func:`label_of`, or one of ``STATE_KEYS``.

    Keyword Args:
        workers (int, optional): files converted at a time. Defaults to 1.
        progress (bool, optional): shows a progress bar. Default: on a terminal.

    Raises:
        ImportError: if OGBench is needed and not installed.
        ValueError: if a file lacks what the columns are computed from.
    """
    folder = column_folder(dataset_folder, label)
    if label in STATE_KEYS:
        kind = "iu" if label == "button_states" else "f"
        schema = _schema(label, *_width(sources, label, kind))
        dtype = schema[label][0]

        def fill(i: int, writer: ColumnWriter) -> dict[str, Any]:
            for block in sources[i].blocks(label, kind):
                writer.write(label, block.astype(dtype, copy=False))
            return {}

        def finish(_: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
            return {"shards": records}

    elif label == _ORACLE:
        env = LabelledEnv(name)
        schema = _schema(label, env.oracle_reps(_state(sources[0], first_rows=1)).shape[1])

        def fill(i: int, writer: ColumnWriter) -> dict[str, Any]:
            reps = _labelled(env.oracle_reps, sources[i], name)
            writer.write(_ORACLE, reps)
            running = RunningStatistics()
            running.update(reps)
            return {"running": running.to_dict()}

        def finish(_: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
            statistics = ObservationStatistics.from_running([r.pop("running") for r in records])
            return {"statistics": statistics.to_dict(), "shards": records}

    else:
        env = LabelledEnv(name)
        boundary = open_rows(dataset_folder)["next", "truncated"].numpy()
        first = np.cumsum([0, *(source.rows for source in sources)])
        schema = _schema(label)

        def fill(i: int, writer: ColumnWriter) -> dict[str, Any]:
            reward, solved = _labelled(env.rewards, sources[i], name)
            writer.write(("next", "reward"), np.expand_dims(reward, -1))
            flags = end_flags(boundary[first[i] : first[i + 1]], np.expand_dims(solved, -1))
            for key, values in zip(FLAGS, flags, strict=True):
                writer.write(("next", key), values)
            return {"solved_rows": int(solved.sum())}

        def finish(_: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
            solved = sum(record["solved_rows"] for record in records)
            return {"task_id": env.task_id, "solved_rows": solved, "shards": records}

    write_columns(
        folder, parts_of(sources), schema, fill, finish, workers=workers, progress=progress
    )


def open_labels(dataset_folder: Path, label: str) -> TensorDict:
    """The columns of a label beside the rows of a converted split, mapped.

    Raises:
        ValueError: if the manifest is damaged or not of as many rows, or if a file is not what it
            says.
    """
    folder = column_folder(dataset_folder, label)
    about, rows = load_metadata(folder), load_split(dataset_folder)["rows"]
    if label in _TASKS:
        schema = _schema(label)
    elif label in (_ORACLE, *STATE_KEYS):
        schema = _schema(label, *about["columns"].get(label, {"shape": [1]})["shape"])
    else:
        raise damaged(folder, "there are no columns of that name", folder)
    if about["rows"] != rows:
        problem = f"it has {about['rows']} rows, those in {dataset_folder} are {rows}"
        raise damaged(folder / METADATA, problem, folder)
    return open_columns(folder, [schema])


def task_of(folder: Path) -> int:
    """The number of the task that the columns in a folder are of.

    Raises:
        ValueError: if the manifest is damaged, or does not tell.
    """
    number = load_metadata(folder).get("task_id")
    if type(number) is not int or not 1 <= number <= NUM_TASKS:
        raise damaged(folder / METADATA, f"'task_id' is {number!r}", folder)
    if folder.name not in ("task-default", f"task{number}"):
        raise damaged(folder / METADATA, f"'task_id' is {number}, not that of its folder", folder)
    return number


def _schema(label: str, *width: int) -> Schema:
    """The columns of a label; those of a task need no width."""
    if width:
        dtype = np.int64 if label == "button_states" else np.float32
        return {label: (np.dtype(dtype), width)}
    flag = (np.dtype(bool), (1,))
    return {
        ("next", "reward"): (np.dtype(np.float32), (1,)),
        **{("next", key): flag for key in FLAGS},
    }


def _width(sources: list[OGBenchSource], label: str, kind: str) -> tuple[int, ...]:
    """The row shape of an array, which must be the same in all files."""
    shapes = {source.path: source.shape(label, kind)[1:] for source in sources}
    first, *_ = shapes
    for path, shape in shapes.items():
        if shape != shapes[first] or 0 in shape:
            raise ValueError(
                f"{path}: {label!r} has rows of shape {shape}, those of {first} have "
                f"{shapes[first]}; they must be the same, and not empty."
            )
    return shapes[first]


def _state(source: OGBenchSource, first_rows: int | None = None) -> dict[str, Any]:
    if "qpos" not in source:
        raise ValueError(
            f"{source.path} has no 'qpos', which rewards and oracle representations are computed "
            "from: download or generate it again, or use it without them."
        )
    state = {"qpos": source.read("qpos", "f")[:first_rows]}
    if "button_states" in source:
        state["button_states"] = source.read("button_states", "iu")[:first_rows]
    for key, array in state.items():
        if first_rows is None and len(array) != source.rows:
            raise ValueError(
                f"{source.path}: {key!r} has {len(array)} rows, the observations {source.rows}."
            )
    return state


def _labelled(label: Any, source: OGBenchSource, name: OGBenchName) -> Any:
    state = _state(source)
    try:
        return label(state)
    except (KeyError, IndexError, ValueError) as err:
        shapes = " and ".join(f"{key} of shape {array.shape}" for key, array in state.items())
        raise ValueError(
            f"{source.path}: no labels of {name} from {shapes} ({err}); the file is not of "
            f"{name.env}."
        ) from err


class LabelledEnv:
    """OGBench's own labels of simulator states.

    NumPy's global random state, which some of its environments use, is left as it was. May be
    called from several threads.

    Args:
        name (OGBenchName): for rewards a ``"singletask"`` name.

    Raises:
        ImportError: if OGBench is not installed.
    """

    def __init__(self, name: OGBenchName) -> None:
        if not _has_ogbench:
            raise ImportError(f"The labels of {name} are computed by OGBench: pip install ogbench.")
        import gymnasium
        import ogbench  # noqa: F401  (registers the environments)
        from ogbench.relabel_utils import add_oracle_reps, relabel_dataset

        self.name = name
        self._lock = threading.Lock()
        self._relabel, self._add_oracle_reps = relabel_dataset, add_oracle_reps
        random_state = np.random.get_state()
        try:
            self._env: Any = gymnasium.make(name.env_id)
        finally:
            np.random.set_state(random_state)

    @property
    def task_id(self) -> int:
        """The number of the task, which for a name without one is OGBench's default."""
        return int(self._env.unwrapped._reward_task_id)

    def rewards(self, state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The rewards of the task, ``[N]`` float32, and whether it is solved, ``[N]`` bool.

        Args:
            state (dict): ``qpos`` ``[N, *]`` and, for scenes and puzzles, ``button_states``.

        Raises:
            ValueError: if ``qpos`` is not that of the environment.
        """
        labels = self._call(self._relabel, state)
        return labels["rewards"], labels["masks"] == 0

    def oracle_reps(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """The goal representation of each state, ``[N, G]`` float32; see :meth:`rewards`."""
        return self._call(self._add_oracle_reps, state)["oracle_reps"]

    def _call(self, function: Any, state: dict[str, np.ndarray]) -> dict[str, Any]:
        expected = self._env.unwrapped.model.nq
        if state["qpos"].shape[1] != expected:
            raise ValueError(f"{self.name.env} has a qpos of {expected} numbers.")
        labels: dict[str, Any] = dict(state)
        with self._lock:
            random_state = np.random.get_state()
            try:
                function(self.name.env_id, self._env, labels)
            finally:
                np.random.set_state(random_state)
        return labels
