"""Goal-conditioned batches, of one step or n and with subgoals, as the authors' samplers make them.

Their windows of n steps succeed where the end of an episode cuts them short, whatever the goal:
``truncation_is_success``. The arrays under ``corrected`` are of windows that do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixture import Fixture, difference
from replay_windows import arrays
from tensordict import TensorDict, TensorDictBase

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, GoalDistribution
from torchrl_mac.data.windows import window_lines

TOLERANCES = {"window": 0.0, "reward": 1e-6, "start": 0.0}


def accepts(case: str, config: dict) -> bool:
    """Whether a case is of batches alone."""
    return case.startswith("probe/")


class GoalWindows:
    """The data of a file, and the batches that our sampler and storage make of a case's indices.

    Args:
        path (Path or str): the file.
        fixture (Fixture): the case.

    Keyword Args:
        one_step (bool): whether windows are of one step, whatever the case's are.
        **kwargs: of the storage.
    """

    def __init__(
        self, path: str | Path, fixture: Fixture, *, one_step: bool = False, **kwargs: Any
    ) -> None:
        self.fixture, config = fixture, fixture.config
        self.valid_starts = torch.as_tensor(arrays(path, "data")["valid_idxs"])
        self.n_steps = None if one_step else config.get("subgoal_steps")
        goals = {
            f"{name}_goal": GoalDistribution(
                *(config[f"{name}_p_{kind}goal"] for kind in ("cur", "traj", "random")),
                gamma=config["discount"] if config[f"{name}_geom_sample"] else None,
            )
            for name in ("value", "actor")
        }
        self.sampler = ActionChunkSampler(n_steps=self.n_steps, goals=goals, seed=0)
        self.storage = ActionChunkStorage(
            _rows(arrays(path, "data")),
            gamma=config["discount"],
            observation_keys=["observation", "oracle_rep"],
            goal_source="oracle_rep",
            negative_reward=config["gc_negative"],
            subgoals=self.n_steps is not None,
            **self.sampler.layout,
            **kwargs,
        )

    def index(self, prefix: str = "") -> torch.Tensor:
        """The sampler's index, with the starts and goals that the authors' sampler drew."""
        names = ("start", "value_goal", "actor_goal")
        start, *goals = (torch.as_tensor(self.fixture.arrays[f"{prefix}idx/{n}"]) for n in names)
        lines = torch.stack([start, start + 1], 1)
        if self.n_steps is not None:
            ends = self.storage.episode_ends
            last = ends[torch.searchsorted(ends, start)]
            lines = window_lines(start, last, 1, self.n_steps)
        return torch.cat([lines, torch.stack(goals, 1)], 1)

    def batch(self, prefix: str = "") -> TensorDictBase:
        """A batch, under its place in the fixture (``"step0/"``)."""
        return self.storage[self.index(prefix)]

    def starts(self) -> torch.Tensor:
        """Where windows can begin, in order, as the sampler draws them."""
        index, _ = self.sampler.sample(self.storage, 50 * len(self.storage))
        return index[:, 0].unique()


def window_errors(path: str | Path, fixture: Fixture, prefix: str = "") -> dict[str, Any]:
    """How far all arrays of a batch are from ours, ``{kind: {array: error}}``."""
    errors: dict[str, dict[str, float]] = {kind: {} for kind in TOLERANCES}
    for place, ours in _arrays(path, fixture, prefix).items():
        for stored in fixture.keys(f"{prefix}{place}/"):
            name = stored.removeprefix(f"{prefix}{place}/")
            if name in ours:
                kind = "reward" if name.endswith("rewards") else "window"
                errors[kind][f"{place}/{name}"] = difference(ours[name].float(), fixture[stored])
            elif place == "batch":
                raise SystemExit(f"{stored} is no array that our batches have.")
    return errors


def replay(path: str | Path, case: str) -> dict[str, dict[str, float]]:
    """Makes a batch anew; returns ``{kind: {array: error}}``."""
    fixture = Fixture(path, case)
    errors, windows = window_errors(path, fixture), GoalWindows(path, fixture)
    found = difference(windows.starts().float(), windows.valid_starts.float())
    return {**errors, "start": {"starts": found}}


def _rows(data: dict[str, Any]) -> TensorDict:
    """Stored states as rows; the episode's number counts the last ones."""
    final = torch.as_tensor(data["valids"] == 0)
    return TensorDict(
        observation=torch.as_tensor(data["observations"]),
        action=torch.as_tensor(data["actions"]),
        oracle_rep=torch.as_tensor(data["oracle_reps"]),
        episode=final.long().cumsum(0) - final.long(),
    ).auto_batch_size_(1)


def _arrays(path: str | Path, fixture: Fixture, prefix: str) -> dict[str, dict[str, Any]]:
    """Our arrays by the names of the fixture's."""
    step = GoalWindows(path, fixture, one_step=True).batch(prefix)
    ours = {
        "observations": step["observation"],
        "actions": step["action"],
        "next_observations": step["next", "observation"],
        **_outcome(step),
    }
    windows = GoalWindows(path, fixture, truncation_is_success=True)
    if windows.n_steps is None:
        ours |= {f"{name}_goals": step[f"{name}_goal"] for name in ("value", "actor")}
        return {"batch": ours}
    batch, index = windows.batch(prefix), windows.index(prefix)
    to_actor_goal = GoalWindows(path, fixture, reward_goal="actor_goal").batch(prefix)
    ours |= {
        "high_value_reps": batch["oracle_rep"],
        "high_value_goals": batch["value_goal"],
        "high_value_actions": batch["subgoal", "value_goal"],
        "high_value_next_observations": batch["next", "observation"],
        "high_value_offsets": index[:, -2] - index[:, 0],
        "high_value_subgoal_steps": batch["steps_to_next_obs"].squeeze(-1),
        "high_actor_goals": batch["actor_goal"],
        "high_actor_actions": batch["subgoal", "actor_goal"],
        "high_actor_next_observations": to_actor_goal["next", "observation"],
        "low_actor_goals": batch["low_actor_goal"],
        **_outcome(batch, "high_value_"),
    }
    corrected = GoalWindows(path, fixture).batch(prefix)
    done, wrongly = corrected["next", "terminated"], batch["next", "terminated"]
    better = {"false_success": (wrongly & ~done).squeeze(-1), **_outcome(corrected, "high_value_")}
    return {"batch": ours, "corrected": better}


def _outcome(batch: TensorDictBase, prefix: str = "") -> dict[str, torch.Tensor]:
    following = batch["next"]
    return {
        f"{prefix}masks": 1 - following["terminated"].squeeze(-1).float(),
        f"{prefix}rewards": following["reward"].squeeze(-1),
    }
