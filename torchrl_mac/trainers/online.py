"""The online phases of a run, from a script's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase

from torchrl_mac.data import (
    ActionChunkExperienceReplay,
    ActionChunkSampler,
    ActionChunkStorage,
    MixedReplayBuffer,
)
from torchrl_mac.modules import ChunkActor
from torchrl_mac.trainers.collection import CollectionHook
from torchrl_mac.trainers.phase import Phase

__all__ = ["OnlinePhases", "make_online", "online_buffer", "online_phases"]

_COUNTS = {"frames": 1, "warmup_frames": 0, "random_frames": 0, "capacity": 1}


class OnlinePhases(NamedTuple):
    """Phases that train on collected data as well.

    Attributes:
        phases (list of Phase): what to train.
        frames (dict of str to int): how many steps are collected in which of them.
    """

    phases: list[Phase]
    frames: dict[str, int]


def online_phases(settings: Mapping[str, Any]) -> OnlinePhases | None:
    """The phases that a script's settings describe under ``online``, if there are any.

    Raises:
        ValueError: if one of the settings cannot be.
    """
    online = settings.get("online")
    if not online or online["frames"] == 0:
        return None
    for key, least in _COUNTS.items():
        if type(online[key]) is not int or online[key] < least:
            raise ValueError(
                f"online.{key}={online[key]} cannot be: it must be a whole number of at least "
                f"{least}."
            )
    ratio = online["update_to_data"]
    if not isinstance(ratio, int | float) or not ratio > 0:
        raise ValueError(f"online.update_to_data={ratio} cannot be: it must be a positive number.")
    found = OnlinePhases([], {})
    shares = [
        of.get("share", 1.0 if len(online["phases"]) == 1 else 0.0) for of in online["phases"]
    ]
    if not online["phases"] or min(shares) < 0 or not math.isclose(sum(shares), 1):
        raise ValueError(
            f"online.phases must have shares of the frames that sum up to 1, got {shares}."
        )
    warmup, taken = online["warmup_frames"], {of["name"] for of in settings.get("phases", ())}
    for of, share in zip(online["phases"], shares, strict=True):
        phase, frames = {key: value for key, value in of.items() if key != "share"}, 0
        if share:
            frames = round(share * online["frames"])
            if not warmup < frames:
                raise ValueError(
                    f"online.warmup_frames={warmup} cannot be: the first phase that collects has "
                    f"{frames} frames."
                )
            found.frames[str(phase.get("name"))] = frames
            phase.setdefault("num_updates", max(1, round((frames - warmup) * ratio)))
            warmup = 0
        if phase.get("name") in taken:
            raise ValueError(
                f"online.phases={phase} cannot be: another phase has the name {phase['name']!r}."
            )
        taken.add(phase.get("name"))
        try:
            found.phases.append(Phase(**phase))
        except TypeError as error:  # a key that is missing or unknown
            raise ValueError(f"online.phases={phase} cannot be: {error}.") from error
    return found


def online_buffer(
    dataset: ActionChunkExperienceReplay, capacity: int, seed: int
) -> TensorDictReplayBuffer:
    """An empty buffer whose samples are like those of a dataset, transforms included.

    Args:
        dataset (ActionChunkExperienceReplay): sampled in chunks.
        capacity (int): the most steps that it holds; the oldest are then replaced.
        seed (int): of its sampler.
    """
    like, sampler = dataset.storage, dataset.sampler
    assert isinstance(like, ActionChunkStorage)
    assert isinstance(sampler, ActionChunkSampler)
    buffer = TensorDictReplayBuffer(
        storage=ActionChunkStorage(
            max_size=capacity,
            gamma=like.gamma,
            ignore_terminated=like.ignore_terminated,
            observation_keys=like.observation_keys,
            sparse_rewards=like.sparse_rewards,
            **sampler.layout,
        ),
        sampler=ActionChunkSampler(
            sampler.chunk_size,
            n_steps=sampler.n_steps,
            cross_episodes=sampler.cross_episodes,
            seed=seed,
        ),
    )
    for transform in dataset.transform:
        buffer.append_transform(transform.clone())
    return buffer


def make_online(
    online: OnlinePhases,
    settings: Mapping[str, Any],
    dataset: ActionChunkExperienceReplay,
    actor: ChunkActor,
    make_env: Callable[[], EnvBase],
) -> dict[str, Any]:
    """What a :class:`~torchrl_mac.trainers.PhaseTrainer` needs for the online phases.

    Args:
        online (OnlinePhases): the phases.
        settings (mapping): a script's, ``online`` and ``seed`` among them.
        dataset (ActionChunkExperienceReplay): the offline part of the batches.
        actor (ChunkActor): acts on the environment's observations.
        make_env (callable): builds the environment.
    """
    of, seed = settings["online"], settings["seed"]
    buffer = online_buffer(dataset, of["capacity"], seed)
    mixed = MixedReplayBuffer({"offline": dataset, "online": buffer}, of["shares"])
    hook = CollectionHook(
        make_env,
        actor,
        buffer,
        frames=online.frames,
        warmup_frames=of["warmup_frames"],
        random_frames=of["random_frames"],
        seed=seed,
    )
    return {
        "phase_buffers": {phase.name: mixed for phase in online.phases},
        "hooks": {"online": hook},
    }
