"""The online phase of a run, from a script's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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

__all__ = ["make_online_phase", "online_buffer", "online_phase"]

NAME = "online"


def online_phase(settings: Mapping[str, Any]) -> Phase | None:
    """The phase that the settings under ``online`` describe, if there is one.

    Raises:
        ValueError: if one of them cannot be.
    """
    online = settings.get("online")
    if not online or not online["frames"]:
        return None
    for key in ("frames", "warmup_frames", "random_frames", "capacity"):
        if type(online[key]) is not int or online[key] < 0:
            raise ValueError(
                f"online.{key}={online[key]} cannot be: it must be a whole number of at least 0."
            )
    frames, warmup = online["frames"], online["warmup_frames"]
    if not warmup < frames:
        raise ValueError(
            f"online.warmup_frames={warmup} cannot be: it must be below online.frames={frames}."
        )
    if not online["update_to_data"] > 0:
        raise ValueError(
            f"online.update_to_data={online['update_to_data']} cannot be: it must be positive."
        )
    updates = max(1, round((frames - warmup) * online["update_to_data"]))
    try:
        return Phase(name=NAME, num_updates=updates, **online["phase"])
    except TypeError as error:  # a key that is missing or unknown
        raise ValueError(f"online.phase={online['phase']} cannot be: {error}.") from error


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


def make_online_phase(
    phase: Phase,
    settings: Mapping[str, Any],
    dataset: ActionChunkExperienceReplay,
    actor: ChunkActor,
    make_env: Callable[[], EnvBase],
    phases: Sequence[Phase],
) -> dict[str, Any]:
    """What a :class:`~torchrl_mac.trainers.PhaseTrainer` needs for the online phase.

    Args:
        phase (Phase): of :func:`online_phase`.
        settings (mapping): a script's, ``online`` and ``seed`` among them.
        dataset (ActionChunkExperienceReplay): the offline part of the batches.
        actor (ChunkActor): acts on the environment's observations.
        make_env (callable): builds the environment.
        phases (sequence of Phase): those before.
    """
    online, seed = settings[NAME], settings["seed"]
    buffer = online_buffer(dataset, online["capacity"], seed)
    return {
        "phases": [*phases, phase],
        "phase_buffers": {
            NAME: MixedReplayBuffer({"offline": dataset, NAME: buffer}, online["shares"])
        },
        "hooks": {
            NAME: CollectionHook(
                make_env,
                actor,
                buffer,
                frames=online["frames"],
                update_to_data=online["update_to_data"],
                warmup_frames=online["warmup_frames"],
                random_frames=online["random_frames"],
                phases=[NAME],
                seed=seed,
            )
        },
    }
