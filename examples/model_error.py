"""How far world models go astray: open-loop errors for several lengths of chunks.

    python examples/model_error.py preset=cpu                 # minutes on two CPU cores
    python examples/model_error.py task=scene chunk_sizes=[1,10,25]
    python examples/model_error.py task=puzzle-4x5-oraclerep  # the paper's sizes and set

Trains one model of the dynamics for each length, as MAC's, and has each imagine recorded episodes
that it has not seen, from their first state and their actions alone. Leaves errors.csv, the mean
squared error of the normalised state by environment step, errors.png and, of cube, scene and
puzzle, imagined.mp4: the episode, and beside it what each model takes it for. Settings are those of
mac.py, and those in configs/mac/model_error.yaml.
"""

from __future__ import annotations

import csv
import ctypes.util
import os
from functools import partial

if ctypes.util.find_library("EGL"):  # MuJoCo reads it when first imported, by TorchRL, below
    os.environ.setdefault("MUJOCO_GL", "egl")

import hydra
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl._utils import logger as torchrl_logger

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.envs import depict, env_maker, imagine
from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
from torchrl_mac.objectives import ChunkedWorldModelLoss
from torchrl_mac.trainers import write_video
from torchrl_mac.trainers.experiment import Experiment
from torchrl_mac.utils.files import replaced


def make_model(
    cfg: DictConfig, run: Experiment, buffer: OGBenchExperienceReplay, chunk_size: int
) -> ChunkedWorldModel:
    """The state h steps ahead; reward and end are not asked for."""
    S = buffer.observation_spec["observation"].shape[-1]
    D = chunk_size * buffer.action_spec.shape[-1]
    network = partial(NormedMLP, activation_class=cfg.activation, device=run.device)
    heads = (network(S + D, 1, [8]) for _ in range(2))
    return ChunkedWorldModel(network(S + D, S, cfg.dynamics_cells), *heads)


@torch.no_grad()
def open_loop(model: ChunkedWorldModel, windows: TensorDict, chunk_size: int) -> Tensor:
    """The states ``[B, T / h, O]`` after each chunk of windows of T actions, as imagined."""
    chunks = windows["action"].unflatten(1, (-1, chunk_size))
    recorded = TensorDict({"action": chunks}, batch_size=chunks.shape[:2])
    replay = TensorDictModule(nn.Identity(), ["action"], ["action"])
    start = windows.select("observation")
    return imagine(replay, model, start, chunks.shape[1], noise=recorded)["next", "observation"]


def errors_of(dream: Tensor, real: Tensor) -> Tensor:
    """Mean squared errors ``[T / h]`` of ``[B, T / h, O]``, where ``[B, T, O]`` would be right."""
    chunk_size = real.shape[1] // dream.shape[1]
    return (dream - real[:, chunk_size - 1 :: chunk_size]).square().mean((0, 2))


def each_step(start: Tensor, dream: Tensor, steps: int) -> Tensor:
    """States ``[B, T, O]`` of each step, on lines between those after each chunk."""
    known = torch.cat([start.unsqueeze(1), dream], 1).unsqueeze(2)
    chunk_size = steps // dream.shape[1]
    share = torch.arange(1, chunk_size + 1, device=dream.device)[:, None] / chunk_size
    return torch.lerp(known[:, :-1], known[:, 1:], share).flatten(1, 2)


def write(run: Experiment, errors: dict[int, Tensor]) -> None:
    """errors.csv and errors.png."""
    with replaced(run.folder.path / "errors.csv") as path, path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["chunk_size", "step", "mean_squared_error"])
        for h, of in errors.items():
            rows.writerows([h, (k + 1) * h, f"{error:.6g}"] for k, error in enumerate(of.tolist()))
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axis = figure.subplots()
    for h, of in errors.items():
        axis.plot([(k + 1) * h for k in range(len(of))], of, ".-", label=str(h))
    axis.set_xlabel("environment steps")
    axis.set_ylabel("mean squared error")
    axis.set_yscale("log")
    axis.legend(title="actions in a chunk", fontsize=8)
    with replaced(run.folder.path / "errors.png") as path:
        figure.savefig(path, dpi=120, format="png")


def film(run: Experiment, loc: Tensor, scale: Tensor, episodes: list[Tensor]) -> None:
    """imagined.mp4, of normalised states ``[B, T, O]`` for each column, from left to right."""
    try:
        env = env_maker(run.cfg.dataset, from_pixels=True)()
    except RuntimeError as error:  # no renderer: the errors stand without it
        torchrl_logger.warning(f"No video: {error}")
        return
    env.reset()
    frames = [
        torch.cat([depict(env, states[b].cpu() * scale + loc) for states in episodes], 2)
        for b in range(run.cfg.video_episodes)
    ]
    write_video(run.folder.path / "imagined.mp4", frames)


@hydra.main(config_path="../configs/mac", config_name="model_error", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Trains and measures; the same command goes on where it was interrupted."""
    with Experiment(cfg) as run:
        if bad := [h for h in cfg.chunk_sizes if cfg.window % h]:
            raise ValueError(f"window={cfg.window} is no multiple of the chunk size {bad[0]}.")
        held_out = run.dataset("val", chunk_size=cfg.window, future=True)
        windows = held_out.sample(cfg.num_windows).exclude("index")
        phases = [phase.only({"loss_dynamics"}) for phase in run.phases]
        real = windows["future", "observation"]
        columns, errors, updates = [real], {}, 0
        for h in cfg.chunk_sizes:
            train, validation = (run.dataset(split, chunk_size=h) for split in ("train", "val"))
            model = make_model(cfg, run, train, h)
            trainer = run.trainer(
                {"world_model": ChunkedWorldModelLoss(model)},
                train,
                digest=train.digest,
                phases=[phase for phase in phases if phase is not None],
                name=f"chunks-of-{h}",
                validation_buffer=validation,
                first_update=updates,
            )
            run.resume(trainer, f"chunks-of-{h}")
            trainer.train()
            updates += trainer.num_updates
            dream = open_loop(model, windows, h)
            columns.append(each_step(windows["observation"], dream, cfg.window))
            errors[h] = errors_of(dream, real).cpu()
            torchrl_logger.info(
                f"chunks of {h}: error {errors[h][-1]:.3g} after {cfg.window} steps"
            )
            write(run, errors)
        if cfg.video_episodes and cfg.env.split("-")[0] in ("cube", "scene", "puzzle"):
            film(run, *held_out.statistics.loc_scale("min_max"), columns)


if __name__ == "__main__":
    main()
