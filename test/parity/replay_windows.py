"""The Q-chunking authors' windows of transitions, offline and of a ring, through our sampler.

Their ring's size stops at one below its capacity once it is full, by a slip that keeps the last
place from being sampled; ours is full then. The place written to next is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixture import difference, error
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage

TOLERANCES = {"window": 0.0, "reward": 1e-6, "ring": 0.0}
END = ("next", "end")


def accepts(case: str, config: dict) -> bool:
    """Whether a case is the one of windows."""
    return case == "data"


def arrays(path: str | Path, prefix: str) -> dict[str, Any]:
    """The arrays of a file under a prefix."""
    with np.load(path, allow_pickle=False) as file:
        start = f"{prefix}/"
        return {k.removeprefix(start): file[k] for k in file.files if k.startswith(start)}


def rows_of(data: dict[str, Any], rewards: str = "rewards") -> TensorDict:
    """Stored transitions as rows; the episode's number counts its ends."""
    terminal = torch.as_tensor(data["terminals"] > 0)
    return TensorDict(
        observation=torch.as_tensor(data["observations"], dtype=torch.float32),
        action=torch.as_tensor(data["actions"], dtype=torch.float32),
        episode=terminal.cumsum(0) - terminal.long(),
        next=TensorDict(
            observation=torch.as_tensor(data["next_observations"], dtype=torch.float32),
            reward=torch.as_tensor(data[rewards], dtype=torch.float32).unsqueeze(-1),
            terminated=torch.as_tensor(data["masks"] == 0).unsqueeze(-1),
            end=terminal.unsqueeze(-1),
        ),
    ).auto_batch_size_(1)


def sampler_and_storage(
    chunk_size: int, n_steps: int, gamma: float, rows: TensorDict | None = None, **kwargs: Any
) -> tuple[ActionChunkSampler, ActionChunkStorage]:
    sampler = ActionChunkSampler(chunk_size, n_steps=n_steps, cross_episodes=True, seed=0)
    return sampler, ActionChunkStorage(rows, gamma=gamma, end_key=END, **sampler.layout, **kwargs)


def windows(storage: ActionChunkStorage, starts: np.ndarray, chunk_size: int) -> TensorDict:
    """The batch that begins at given rows."""
    index = storage.crossing_rows.window(torch.as_tensor(starts), chunk_size + 1)
    return storage[index]


def column_of(transitions: dict[str, Any], stored: dict[str, Any]) -> str:
    """Which rewards stored windows are made of, dense or sparse."""
    for name in ("rewards", "rewards_dense"):
        if np.allclose(stored["rewards"][:, 0], transitions[name][stored["start_idxs"]]):
            return name
    raise SystemExit("The windows' rewards are neither the transitions' dense nor sparse ones.")


def gamma_of(windows: dict[str, Any], rewards: np.ndarray) -> float:
    """The discount that sums of two rewards show."""
    start = windows["start_idxs"]
    second = rewards[start + 1]
    k = int(np.abs(second).argmax())
    return float((windows["rewards"][k, 1] - windows["rewards"][k, 0]) / second[k])


def replay(path: str | Path, case: str = "data") -> dict[str, dict[str, float]]:
    """Compares all stored windows; returns ``{kind: {array: largest error}}``."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    data = arrays(path, "data")
    transitions = arrays(path, "data/transitions")
    names = sorted({name.split("/")[0] for name in data if name.startswith("sequence_h")})
    sequences = {name: arrays(path, f"data/{name}") for name in names}
    longest = max(sequences.values(), key=lambda stored: stored["actions"].shape[1])
    column = column_of(transitions, longest)
    gamma = gamma_of(longest, transitions[column])
    for name, stored in sequences.items():
        _, storage = sampler_and_storage(1, 1, gamma, rows_of(transitions, column))
        _compare(errors, name, storage, stored)

    ring, capacity = arrays(path, "data/replay"), int(data["replay/capacity"])
    sampler, storage = sampler_and_storage(1, 1, gamma, max_size=capacity)
    buffer = TensorDictReplayBuffer(storage=storage, sampler=sampler)
    buffer.extend(rows_of(transitions, column))
    added = rows_of({k.removeprefix("added/"): v for k, v in ring.items() if "added/" in k})
    cursors, sizes = [buffer.writer._cursor], [len(buffer)]
    for count, row in enumerate(added.unbind(0), 1):
        buffer.add(row)
        cursors.append(buffer.writer._cursor)
        sizes.append(len(buffer))
        if f"after{count}/start_idxs" in ring:
            stored = {k.removeprefix(f"after{count}/"): v for k, v in ring.items()}
            _compare(errors, f"replay/after{count}", storage, stored)
    place = torch.as_tensor(cursors) % capacity
    errors["ring"]["pointer"] = difference(place, torch.as_tensor(ring["pointer_trace"]))
    full = torch.as_tensor(sizes).clamp_max(capacity - 1)
    theirs = torch.as_tensor(ring["size_trace"]).clamp_max(capacity - 1)
    errors["ring"]["size"] = difference(full, theirs)
    return errors


def _compare(
    errors: dict[str, dict[str, float]], name: str, storage: ActionChunkStorage, stored: Any
) -> None:
    """All of a stored window's steps, each as the last one of a window that long."""
    horizon = stored["actions"].shape[1]
    for length in range(1, horizon + 1):
        storage.n_steps = length
        ours = windows(storage, stored["start_idxs"], length)
        last = length - 1
        exact = {
            "actions": (ours["action"].reshape(-1, length, ours["action"].shape[-1]), length),
            "valid": (ours["valid"].reshape(-1, length).double(), length),
            "whole": (ours["next", "whole"].squeeze(-1).double(), None),
            "masks": (1 - ours["next", "terminated"].squeeze(-1).double(), None),
        }
        if "observations" in stored:
            exact["observations"] = ours["observation"], 0
        if "next_observations" in stored:
            exact["next_observations"] = ours["next", "observation"], None
        for key, (values, upto) in exact.items():
            theirs = torch.as_tensor(stored["valid" if key == "whole" else key])
            if upto is None:
                theirs = theirs[:, last]
            elif upto:
                theirs = theirs[:, :upto]
            label = f"{name}/{key}"
            found = difference(values, theirs.to(values.dtype))
            errors["window"][label] = max(errors["window"].get(label, 0.0), found)
        theirs = torch.as_tensor(stored["rewards"][:, last], dtype=torch.float32)
        found = error(ours["next", "reward"].squeeze(-1), theirs, 1.0)
        errors["reward"][name] = max(errors["reward"].get(name, 0.0), found)
