"""TorchRL's own SAC through the trainer: on real and imagined data, killed, and gone on with."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_checkpoints import rows, same, until_killed
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, MixedReplayBuffer
from torchrl_mac.modules import ChunkedWorldModel, NormedMLP
from torchrl_mac.objectives import ChunkedWorldModelLoss
from torchrl_mac.trainers import (
    ModelRolloutHook,
    Phase,
    PhaseTrainer,
    RunCheckpoints,
    SealedCheckpoint,
    TrainerHook,
)

OBS, A = 3, 2
SAC = ("loss_actor", "loss_qvalue", "loss_alpha")
PHASES = [
    Phase("model", ["loss_dynamics", "loss_reward", "loss_termination"], 4, 8),
    Phase(
        "policy",
        [*(f"{name}.{term}" for name in ("one", "two") for term in SAC), "loss_dynamics"],
        9,
        8,
        lr=1e-2,
        optim={"log_alpha": {"lr": 1e-3}, "two.qvalue_network": {"lr": 5e-3, "betas": [0.5, 0.9]}},
        keep_moments=True,
    ),
]


class Count(TrainerHook):
    """A hook with a state of its own."""

    def __init__(self):
        self.seen = self.phases = 0

    def after_update(self, progress, batch, metrics):
        self.seen += len(batch) * progress.updates

    def end_phase(self, progress):
        self.phases += 1

    def state_dict(self):
        return {"seen": self.seen, "phases": self.phases}

    def load_state_dict(self, state_dict):
        self.seen, self.phases = state_dict["seen"], state_dict["phases"]


def make_actor():
    network = nn.Sequential(nn.Linear(OBS, 16), nn.Tanh(), nn.Linear(16, 2 * A))
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(network, NormalParamExtractor()), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def make_sac(actor):
    qvalue = ValueOperator(NormedMLP(OBS + A, 1, [16]), in_keys=["observation", "action"])
    loss = SACLoss(actor, qvalue, num_qvalue_nets=2, target_entropy=-2.0)
    loss.make_value_estimator(gamma=0.9)
    return loss


def make_dataset():
    generator = torch.Generator().manual_seed(0)
    table = TensorDict(
        observation=torch.randn(80, OBS, generator=generator),
        action=torch.rand(80, A, generator=generator) * 2 - 1,
        episode=torch.arange(80) // 20,
        next=TensorDict(
            reward=torch.randn(80, 1, generator=generator),
            terminated=torch.zeros(80, 1, dtype=torch.bool),
            batch_size=[80],
        ),
        batch_size=[80],
    )
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(table, rows_in_state=False),
        sampler=ActionChunkSampler(1, seed=0),
    )


def make_trainer(folder, **kwargs):
    torch.manual_seed(0)
    sizes = {"in_features": OBS + A, "num_cells": [16]}
    model = ChunkedWorldModel(*(NormedMLP(out_features=n, **sizes) for n in (OBS, 1, 1)))
    nn.init.constant_(model.termination_network.layers[-1].bias, -0.5)  # some rollouts end
    actors = make_actor(), make_actor()
    losses = {
        "model": ChunkedWorldModelLoss(model),
        **{name: make_sac(actor) for name, actor in zip(("one", "two"), actors, strict=True)},
    }
    real, imagined = (
        make_dataset(),
        TensorDictReplayBuffer(storage=LazyTensorStorage(40)),
    )
    hooks = {
        "count": Count(),
        "rollouts": ModelRolloutHook(
            actors[0], model, make_dataset(), imagined, interval=3, num_starts=6, horizon=4
        ),
    }
    trainer = PhaseTrainer(
        losses,
        MixedReplayBuffer({"real": real, "imagined": imagined}, [0.25, 0.75]),
        PHASES,
        target_updaters=[SoftUpdate(losses["one"], tau=0.1), SoftUpdate(losses["two"], eps=0.7)],
        hooks=hooks,
        loggers=[CSVLogger("logs", log_dir=str(folder))],
        checkpoints=RunCheckpoints(folder / "checkpoints", interval=1, keep_last=99),
        log_interval=1,
        progress_bar=False,
        **kwargs,
    )
    return trainer, imagined


def train(folder, killed_after=None, **kwargs):
    trainer, imagined = make_trainer(folder, **kwargs)
    trainer.resume()
    until_killed(trainer, killed_after)
    return trainer, imagined


def everything(trainer, imagined):
    newest = SealedCheckpoint.load_states(trainer.checkpoints.paths()[-1])
    newest.pop("loggers"), newest["progress"].pop("train_seconds")
    return {**newest, "rows": imagined[:].to_dict()}


@pytest.mark.parametrize("order", ["before", "after"])
def test_killed_and_resumed_it_ends_bit_equal(tmp_path, order):
    whole = everything(*train(tmp_path / "whole", target_order=order))
    # before the first update, within each phase, at their border, and just before the end
    for killed_after in (1, 4, 6, 8, 12):
        train(tmp_path / "parts", killed_after, target_order=order)
    parts = everything(*train(tmp_path / "parts", target_order=order))
    assert same(whole, parts)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert whole["hooks"]["count"] == {"seen": 8 * sum(range(1, 14)), "phases": 2}


def test_every_metric_is_logged_under_a_name_of_its_own(tmp_path):
    train(tmp_path)
    names = {path.removesuffix(".csv") for path in rows(tmp_path)}
    for loss in ("one", "two"):
        assert {f"train/{loss}/{key}" for key in (*SAC, "alpha", "entropy")} <= names
    assert {"train/loss_dynamics", "train/grad_norm"} <= names
    alphas = [rows(tmp_path)[f"train/{loss}/alpha.csv"] for loss in ("one", "two")]
    assert alphas[0] != alphas[1]


def test_targets_follow_and_learning_rates_are_each_modules_own(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    groups = {}

    class Look(TrainerHook):
        def before_update(self, progress):
            optimizer = trainer._training.update.optimizer
            groups[progress.phase.name] = [
                (len(group["params"]), group["lr"], tuple(group["betas"]))
                for group in optimizer.param_groups
            ]

    trainer.hooks["look"] = Look()
    before = {
        n: loss.target_qvalue_network_params.clone()
        for n, loss in trainer.losses.items()
        if n != "model"
    }
    trainer.train()
    assert len(groups["model"]) == 1
    _, alphas, critic = groups["policy"]
    assert alphas == (2, 1e-3, (0.9, 0.999))
    assert critic[1:] == (5e-3, (0.5, 0.9))
    for name, loss in trainer.losses.items():
        if name != "model":
            moved = (loss.target_qvalue_network_params - before[name]).abs().max()
            assert all(value > 0 for value in moved.values(True, True)), name


def test_imagined_transitions_end_where_the_task_does(tmp_path):
    trainer, imagined = make_trainer(tmp_path)
    hook = trainer.hooks["rollouts"]
    hook._imagine(200)
    stored = imagined.storage[:]
    assert 40 == len(stored)  # the ring is full
    seen = []
    hook.buffer = type("Catch", (), {"extend": lambda self, td: seen.append(td)})()
    hook.process = lambda rollout: seen.append(rollout) or rollout
    hook._imagine(200)
    rollout, kept = seen
    expected = []
    for line in rollout:
        for step in line:
            expected.append(step)
            if step["next", "terminated"].item():
                break
    assert len(kept) == len(expected) < rollout.numel()
    assert torch.equal(kept["observation"], torch.stack([step["observation"] for step in expected]))


def test_moments_are_kept_when_asked(tmp_path):
    def step_of_dynamics(keep):
        trainer, _ = make_trainer(tmp_path / str(keep))
        phase = trainer.progress.phases[1]
        trainer.progress.phases[1] = type(phase)(**{**vars(phase), "keep_moments": keep})
        seen = {}

        class Look(TrainerHook):
            def end_phase(self, progress):
                training = trainer._training
                parameter = training.parameters["model.world_model.dynamics_network.layers.0.bias"]
                state = training.update.optimizer.state[parameter]
                seen[progress.phase.name] = state["step"].item()

        trainer.hooks["look"] = Look()
        trainer.train()
        return seen

    assert step_of_dynamics(True) == {"model": 4, "policy": 13}
    assert step_of_dynamics(False) == {"model": 4, "policy": 9}


if __name__ == "__main__":
    pytest.main([__file__])
