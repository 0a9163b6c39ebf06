"""Training on collected experience: what is due, killed and gone on with, offline before it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from test_checkpoints import rows, same, until_killed
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage, MixedReplayBuffer
from torchrl_mac.envs import OGBenchEnv
from torchrl_mac.modules import (
    FlowMatchingPolicy,
    FlowRejectionActor,
    NormedMLP,
    QValueEnsemble,
    StackedMLP,
)
from torchrl_mac.objectives import ChunkedQValueLoss, FlowBCLoss
from torchrl_mac.trainers import (
    CollectionHook,
    NonFiniteError,
    Phase,
    PhaseTrainer,
    RunCheckpoints,
    SealedCheckpoint,
    TrainerHook,
)
from torchrl_mac.trainers.logs import JSONLinesLogger, rewind
from torchrl_mac.trainers.online import online_phases
from torchrl_mac.trainers.progress import Progress

POINTMAZE = "pointmaze-medium-navigate-singletask-v0"
H, OBS, A = 3, 2, 2
BOTH = ["loss_flow", "loss_qvalue"]
OFFLINE = Phase("offline", BOTH, 4, 8)
ONLINE = [
    Phase("online", BOTH, 8, 8, lr=1e-2),
    Phase("values", ["loss_qvalue"], 3, 8),
    Phase("online again", BOTH, 4, 8),
]
FRAMES = {"online": 21, "online again": 12}


def make_env():
    return OGBenchEnv(POINTMAZE, env_kwargs={"max_episode_steps": 8})


def make_dataset():
    generator = torch.Generator().manual_seed(0)
    table = TensorDict(
        observation=torch.randn(40, OBS, generator=generator),
        action=torch.rand(40, A, generator=generator) * 2 - 1,
        episode=torch.arange(40) // 20,
        next=TensorDict(
            reward=-torch.ones(40, 1),
            terminated=torch.zeros(40, 1, dtype=torch.bool),
            batch_size=[40],
        ),
        batch_size=[40],
    )
    sampler = ActionChunkSampler(H, n_steps=H, seed=0)
    return TensorDictReplayBuffer(
        storage=ActionChunkStorage(table, rows_in_state=False, **sampler.layout), sampler=sampler
    )


def make_ring(size=1000):
    sampler = ActionChunkSampler(H, n_steps=H, seed=1)
    storage = ActionChunkStorage(max_size=size, **sampler.layout)
    return TensorDictReplayBuffer(storage=storage, sampler=sampler)


def make_actor():
    torch.manual_seed(0)
    flow = FlowMatchingPolicy(NormedMLP(OBS + H * A + 1, H * A, [8]), H * A, 2)
    qvalue = QValueEnsemble(StackedMLP(2, OBS + H * A, 1, [8], broadcast=True))
    return FlowRejectionActor(flow, qvalue, num_candidates=3, chunk_size=H)


def make_trainer(folder, *, online=True, shares="proportional", ring=None, **kwargs):
    actor = make_actor()
    critic = ChunkedQValueLoss(actor, actor.qvalue_network)
    dataset, ring = make_dataset(), make_ring() if ring is None else ring
    mixed = MixedReplayBuffer({"offline": dataset, "online": ring}, shares)
    phases = kwargs.pop("phases", [OFFLINE, *ONLINE])
    hook = CollectionHook(
        make_env, actor, ring, frames=FRAMES, warmup_frames=5, random_frames=4, seed=7
    )
    of_online = {
        "phase_buffers": {phase.name: mixed for phase in ONLINE},
        "hooks": {"online": hook},
    }
    return PhaseTrainer(
        {"behaviour": FlowBCLoss(actor.policy), "critic": critic},
        dataset,
        phases if online else [OFFLINE],
        target_updaters=SoftUpdate(critic, tau=0.1),
        loggers=[CSVLogger("logs", log_dir=str(folder))],
        checkpoints=RunCheckpoints(folder / "checkpoints", interval=1, keep_last=99),
        log_interval=1,
        progress_bar=False,
        **(of_online if online else {}),
        **kwargs,
    )


def train(folder, killed_after=None, **kwargs):
    trainer = make_trainer(folder, **kwargs)
    trainer.resume()
    until_killed(trainer, killed_after)
    return trainer


def everything(trainer):
    newest = SealedCheckpoint.load_states(trainer.checkpoints.paths()[-1])
    newest.pop("loggers"), newest["progress"].pop("train_seconds")
    return newest


class TestResuming:
    @pytest.mark.parametrize("shares", ["proportional", [0.5, 0.5]])
    def test_killed_and_resumed_it_ends_bit_equal(self, tmp_path, shares):
        whole = train(tmp_path / "whole", shares=shares)
        # before the first step, in an episode and a chunk, at a phase's border, before the end
        for killed_after in (2, 4, 5, 6, 9, 12, 15, 17, 18):
            train(tmp_path / "parts", killed_after, shares=shares)
        parts = train(tmp_path / "parts", shares=shares)
        assert same(everything(whole), everything(parts))
        assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
        state = everything(whole)
        assert state["hooks"]["online"]["collected"] == 33
        buffer = whole.hooks["online"].buffer
        assert len(buffer) == 33
        assert buffer[:]["episode"].tolist() == [step // 8 for step in range(33)]

    def test_a_finished_offline_run_goes_on_online(self, tmp_path):
        evaluate = iter([{"success_rate": rate} for rate in (0.1, 0.2, 0.3, 0.4)])
        whole = train(tmp_path / "whole", evaluate=lambda: {"success_rate": 0.0})
        first = train(tmp_path / "run", online=False, evaluate=lambda: next(evaluate))
        assert first.updates == 4
        second = make_trainer(tmp_path / "run", evaluate=lambda: next(evaluate))
        assert second.resume()
        result = second.train()
        assert result["success_rate_before_online"] == 0.2  # evaluated anew
        assert result["success_rate"] == 0.3
        assert result["online/frames"] == 33
        for name, value in everything(whole)["losses"]["critic"].items():
            assert torch.equal(value, second.losses["critic"].state_dict()[name]), name

    @pytest.mark.parametrize("keep", [True, False])
    def test_the_moments_of_a_finished_run_are_kept(self, tmp_path, keep):
        train(tmp_path, online=False)
        first = dataclasses.replace(ONLINE[0], keep_moments=keep)
        trainer = make_trainer(tmp_path, phases=[OFFLINE, first, *ONLINE[1:]])
        trainer.resume()
        seen = []

        class Look(TrainerHook):
            def after_update(self, progress, batch, metrics):
                training = trainer._training
                parameter = training.parameters["critic.qvalue_network.network.weights.0"]
                seen.append(training.update.optimizer.state[parameter]["step"].item())

        trainer.hooks["look"] = Look()
        trainer.train()
        assert seen[0] == (5 if keep else 1)

    def test_buffers_that_should_be_there(self, tmp_path):
        trainer = train(tmp_path)
        state = trainer.state_dict()
        assert "phase online" in state["buffers"]
        del state["buffers"]["phase online"]
        with pytest.raises(ValueError, match="no buffer 'phase online'"):
            make_trainer(tmp_path / "other").load_state_dict(state)
        with pytest.raises(ValueError, match=r"phase_buffers of \['online'.*\['offline'\]"):
            make_trainer(tmp_path, phases=[OFFLINE])

    def test_another_runs_lines_are_not_made_up(self, tmp_path):
        first = JSONLinesLogger("logs", str(tmp_path / "first"))
        first.log_metrics({"loss": 1.0}, step=1)
        other = JSONLinesLogger("logs", str(tmp_path / "other"))
        rewind(other, first.state_dict())
        other.log_metrics({"loss": 2.0}, step=2)
        assert other.path.read_text() == '{"step": 2, "loss": 2.0}\n'

    def test_the_border_is_evaluated_as_the_end_is(self, tmp_path):
        calls = []
        trainer = make_trainer(
            tmp_path,
            evaluate=lambda: calls.append("whole") or {"success_rate": 0.5},
            monitor=lambda: calls.append("short") or {"success_rate": 0.1},
        )
        result = trainer.train()
        assert calls == ["whole", "whole"]  # before going online, and at the end
        assert result["success_rate_before_online"] == 0.5
        assert trainer.progress.beginning("online") == 4
        assert trainer.progress.beginning("nothing") is None

    def test_without_anything_offline(self, tmp_path):
        trainer = make_trainer(tmp_path, phases=ONLINE, shares=[0.5, 0.5])
        result = trainer.train()
        assert result["updates"] == 15 and result["online/frames"] == 33

    def test_what_is_not_finite_ends_it_with_a_diagnosis(self, tmp_path):
        trainer = make_trainer(tmp_path, max_skipped=2)

        class Poison(TrainerHook):
            def before_update(self, progress):
                if progress.updates == 7:
                    params["network", "weights", "0"].data.fill_(torch.nan)

        params = trainer.losses["critic"].qvalue_network_params
        trainer.hooks["poison"] = Poison()
        with pytest.raises(NonFiniteError, match=r"ChunkedQValueLoss\.qvalue_network_params"):
            trainer.train()
        (folder,) = tmp_path.glob("nonfinite-*")
        assert SealedCheckpoint.load_states(folder)["hooks"]["online"]["collected"] > 0

    def test_it_goes_on_in_a_ring_that_is_full(self, tmp_path):
        whole = train(tmp_path / "whole", ring=make_ring(13))
        for killed_after in (7, 14, 17):
            train(tmp_path / "parts", killed_after, ring=make_ring(13))
        parts = train(tmp_path / "parts", ring=make_ring(13))
        assert same(everything(whole), everything(parts))
        assert len(parts.hooks["online"].buffer) == 13


class TestCollection:
    @settings(max_examples=100, deadline=None)
    @given(
        frames=st.lists(st.integers(1, 50), min_size=1, max_size=3),
        updates=st.lists(st.integers(1, 80), min_size=3, max_size=3),
        warmup=st.integers(0, 20),
    )
    def test_steps_are_spread_over_the_updates(self, frames, updates, warmup):
        warmup = min(warmup, frames[0] - 1)
        phases = [Phase(str(i), BOTH, n, 8) for i, n in enumerate(updates)]
        of = {str(i): n for i, n in enumerate(frames)}
        hook = CollectionHook(None, make_actor(), None, frames=of, warmup_frames=warmup)
        progress, dues = Progress(phases), []
        for phase in progress.remaining():
            first = hook.collected
            spread = of.get(phase.name, 0) - (warmup if phase.name == "0" else 0)
            while not progress.phase_is_over:
                due = hook.due(progress)
                if phase.name in of:
                    done = progress.phase_updates + 1
                    least = (warmup if phase.name == "0" else 0) + spread * done / phase.num_updates
                    assert least <= due - first < least + 1
                else:
                    assert due == hook.collected
                hook.collected = due
                dues.append(due)
                progress.advance()
        assert dues == sorted(dues) and dues[-1] == sum(frames)

    def test_one_step_for_each_update(self):
        phase = Phase("online", BOTH, 10, 8)
        hook = CollectionHook(None, make_actor(), None, frames={"online": 15}, warmup_frames=5)
        progress = Progress([phase])
        next(progress.remaining())
        assert hook.due(progress) == 6
        progress.advance()
        assert hook.due(progress) == 7

    def test_rows_are_what_the_actor_did(self):
        actor, ring = make_actor(), make_ring()
        hook = CollectionHook(make_env, actor, ring, frames={"online": 20}, seed=7)
        torch.manual_seed(0)
        for _ in range(20):
            hook._collect()
        stored = ring[:]
        assert stored["next", "done"].flatten().nonzero().flatten().tolist() == [7, 15]
        assert torch.equal(stored["observation"][1:8], stored["next", "observation"][:7])
        assert not torch.equal(stored["observation"][8], stored["next", "observation"][7])
        torch.manual_seed(0)  # whole chunks, anew where an episode begins
        for start in (0, 3, 6, 8, 11, 14, 16):
            with torch.no_grad():
                td = TensorDict(
                    observation=stored["observation"][start : start + 1], batch_size=[1]
                )
                chunk = actor(td)["action"][0]
            length = min(H, 8 - start % 8, 20 - start)
            assert torch.equal(stored["action"][start : start + length], chunk[:length])
        found = hook.metrics()
        assert found["frames"] == 20 and found["episode_length"] == 8
        assert found["episode_return"] == -8 and found["success_rate"] == 0

    def test_the_actor_acts_with_its_parameters_as_they_are(self):
        actor, ring = make_actor(), make_ring()
        hook = CollectionHook(make_env, actor, ring, frames={"online": 20}, seed=7)
        for _ in range(3):
            hook._collect()
        for parameter in actor.parameters():
            parameter.data.zero_()
        actor.policy.module.low.fill_(0.25)  # all that is left of the flow is noise, clipped
        for _ in range(3):
            hook._collect()
        actions = ring[:]["action"]
        assert (actions[:3] < 0.25).any() and (actions[3:] >= 0.25).all()

    def test_random_actions_are_uniform_and_end_with_a_chunk(self):
        actor, ring = make_actor(), make_ring()
        actor.policy.module.high.fill_(-0.9)  # what the actor does is below
        hook = CollectionHook(make_env, actor, ring, frames={"online": 999}, random_frames=200)
        for _ in range(220):
            hook._collect()
        actions = ring[:]["action"]
        assert (actions[:200] > -0.9).float().mean() == pytest.approx(0.95, abs=0.03)
        assert abs(actions[:200].mean()) < 0.1
        assert (actions[203:] <= -0.9).all()

    def test_out_of_range(self):
        make = partial(CollectionHook, make_env, make_actor(), make_ring())
        with pytest.raises(ValueError, match="fewer than those of the first"):
            make(frames={"online": 5}, warmup_frames=5)
        with pytest.raises(ValueError, match="at least 1 in each phase"):
            make(frames={"online": 5, "again": 0})
        with pytest.raises(ValueError, match="random_frames must not be negative"):
            make(frames={"online": 5}, random_frames=-1)


class TestSettings:
    ONE: ClassVar = {
        "frames": 1000,
        "warmup_frames": 200,
        "random_frames": 0,
        "update_to_data": 0.5,
        "capacity": 10,
        "shares": "proportional",
        "phases": [{"name": "online", "terms": BOTH, "batch_size": 8}],
    }

    def make(self, **changes):
        return online_phases({"online": {**self.ONE, **changes}})

    def test_updates_follow_from_the_frames(self):
        online = self.make()
        assert [phase.num_updates for phase in online.phases] == [400]
        assert online.frames == {"online": 1000}
        assert self.make(frames=0) is None and online_phases({}) is None
        name = {"terms": BOTH, "batch_size": 8}
        online = self.make(
            phases=[
                {"name": "a", "share": 0.4, **name},
                {"name": "b", "num_updates": 7, **name},
                {"name": "c", "share": 0.6, **name},
            ]
        )
        assert [phase.num_updates for phase in online.phases] == [100, 7, 300]
        assert online.frames == {"a": 400, "c": 600}

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"frames": 1.5}, r"online.frames=1.5 cannot be: it must be a whole number"),
            ({"capacity": 0}, r"online.capacity=0 cannot be"),
            ({"warmup_frames": 1000}, r"online.warmup_frames=1000 cannot be"),
            ({"update_to_data": 0}, r"online.update_to_data=0 cannot be"),
            ({"phases": []}, r"shares of the frames that sum up to 1, got \[\]"),
            (
                {"phases": [{"name": "a", "share": 0.5, "terms": BOTH, "batch_size": 8}]},
                r"sum up to 1, got \[0.5\]",
            ),
            ({"update_to_data": "often"}, r"online.update_to_data=often cannot be"),
            ({"phases": 2 * ONE["phases"], "shares": 1}, r"sum up to 1, got \[0.0, 0.0\]"),
            (
                {"phases": 2 * [{**ONE["phases"][0], "share": 0.5}]},
                "another phase has the name 'online'",
            ),
            (
                {
                    "phases": [
                        {**ONE["phases"][0], "share": 1.0},
                        {"name": "b", "terms": BOTH, "batch_size": 8},
                    ]
                },
                r"cannot be: .*'num_updates'",
            ),
            (
                {"phases": [{"name": "a", "terms": BOTH, "size": 8}]},
                r"online.phases=.* cannot be: .*'size'",
            ),
        ],
    )
    def test_what_cannot_be_is_named(self, changes, match):
        with pytest.raises(ValueError, match=match):
            self.make(**changes)


if __name__ == "__main__":
    pytest.main([__file__])
