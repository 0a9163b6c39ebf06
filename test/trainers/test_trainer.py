from __future__ import annotations

import json
import math

import pytest
import torch
from assembly import Size, make_mac
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.record import CSVLogger

from torchrl_mac.trainers import (
    Phase,
    PhaseTrainer,
    plot_curves,
    versions,
    write_summary,
    write_video,
)

OBS, H, A = 3, 2, 2
D = H * A
TERMS = {
    "flow_policy": "loss_flow",
    "onestep_policy": "loss_distillation",
    "dynamics_network": "loss_dynamics",
    "reward_network": "loss_reward",
    "termination_network": "loss_termination",
    "loss.value_network": "loss_value",
    "qvalue_network": "loss_qvalue",
}


def make_buffer():
    generator = torch.Generator().manual_seed(0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), generator=generator)
    buffer.extend(
        TensorDict(
            observation=torch.randn(64, OBS),
            action=torch.rand(64, H, A),
            next=TensorDict(
                observation=torch.randn(64, OBS),
                reward=torch.randn(64, 1),
                terminated=torch.zeros(64, 1, dtype=torch.bool),
            ),
        ).auto_batch_size_(1)
    )
    return buffer


def make_losses():
    losses = make_mac(Size([8], 8, 3, 2, 2, OBS, A, H))
    return dict(zip(("behaviour", "model", "loss"), losses.values(), strict=True))


def make_trainer(phases, **kwargs):
    losses = make_losses()
    updater = SoftUpdate(losses["loss"], tau=0.1)
    kwargs.setdefault("progress_bar", False)
    return PhaseTrainer(losses, make_buffer(), phases, target_updaters=updater, **kwargs)


def parameters(trainer):
    return {
        f"{name}.{key}": value.clone()
        for name, loss in trainer.losses.items()
        for key, value in loss.state_dict().items()
    }


class TestPhase:
    def test_schedule(self):
        phase = Phase("p", ["loss_flow"], 110, 8, schedule="cosine", warmup_updates=10)
        assert phase.lr_factor(0) == 0.1
        assert phase.lr_factor(9) == phase.lr_factor(10) == 1.0
        assert phase.lr_factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
        assert phase.lr_factor(110) == 0.0
        assert Phase("p", ["loss_flow"], 110, 8).lr_factor(109) == 1.0

    def test_only_some_of_the_terms(self):
        phase = Phase("p", ["loss_flow", "loss_value"], 10, 9, optim={"value_network": {}})
        part = phase.only({"loss_value", "loss_qvalue"}, batch_scale=0.5)
        assert (part.terms, part.batch_size, part.optim) == (["loss_value"], 4, phase.optim)
        assert phase.only({"loss_qvalue"}) is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_updates": 0}, "num_updates must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"warmup_updates": -1}, "warmup_updates must be at least 0"),
            ({"eval_interval": -1}, "eval_interval must be at least 0"),
            ({"lr": 0.0}, "lr must be positive"),
            ({"schedule": "step"}, "'constant' or 'cosine', got 'step'"),
            ({"terms": []}, "trains nothing"),
        ],
    )
    def test_errors(self, change, message):
        settings = {"name": "p", "terms": ["loss_flow"], "num_updates": 1, "batch_size": 1}
        with pytest.raises(ValueError, match=message):
            Phase(**{**settings, **change})


class TestPhaseTrainer:
    @pytest.mark.parametrize("trained", TERMS)
    def test_a_phase_trains_what_it_names(self, trained):
        trainer = make_trainer([Phase("p", [TERMS[trained]], 2, 8)])
        before = parameters(trainer)
        trainer.train()
        for key, value in parameters(trainer).items():
            if key.endswith(("weight", "bias")):
                target = "target_value_network" in key  # follows its loss
                expected = trained == "loss.value_network" if target else trained in key
                assert (not torch.equal(value, before[key])) == expected, key

    def test_phases_follow_one_another(self):
        batches, rates = [], []
        phases = [
            Phase("one", ["loss_flow"], 3, 4, lr=1e-3),
            Phase("two", ["loss_dynamics", "loss_value"], 2, 6, lr=1e-2, schedule="cosine"),
        ]
        trainer = make_trainer(phases)
        sample = trainer.buffer.sample
        trainer.buffer.sample = lambda n: batches.append(n) or sample(n)
        begin = trainer._begin

        def spy(training):
            begin(training)
            step = training.step
            training.step = lambda batch: (
                rates.append(training.schedule.get_last_lr()[0]) or step(batch)
            )

        trainer._begin = spy
        result = trainer.train()
        assert batches == [4, 4, 4, 6, 6]
        assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-2, 5e-3])
        assert result["updates"] == trainer.num_updates == 5
        assert result["train_seconds"] > 0
        assert set(trainer.losses["behaviour"].out_keys) == {"loss_flow", "loss_distillation"}

    def test_a_finished_training_is_finished(self):
        calls = []
        trainer = make_trainer(
            [Phase("p", ["loss_flow"], 3, 4)], evaluate=lambda: calls.append(1) or {"x": 1.0}
        )
        assert trainer.train()["updates"] == 3
        assert trainer.train()["updates"] == 3
        assert len(calls) == 1

    def test_candidates_of_a_phase(self):
        terms, seen = ["loss_value", "loss_qvalue"], []
        phases = [
            Phase("few", terms, 1, 4, overrides={"loss.actor_network.num_candidates": 2}),
            Phase("usual", terms, 2, 4),
        ]
        trainer = make_trainer(phases)
        actor = trainer.losses["loss"].actor_network
        candidates = actor.candidates
        actor.candidates = lambda td: seen.append(actor.num_candidates) or candidates(td)
        trainer.train()
        assert seen == [2] * (len(seen) // 3) + [3] * (2 * len(seen) // 3)
        assert len(seen) >= 3

    @pytest.mark.parametrize(
        ("path", "value"), [("loss", 1), ("nothing.x", 1), ("loss.actor_network.nothing", 1)]
    )
    def test_overrides_of_what_does_not_exist(self, path, value):
        with pytest.raises(ValueError, match=f"overrides '{path}', which does not exist"):
            make_trainer([Phase("p", ["loss_flow"], 1, 4, overrides={path: value})])

    def test_overrides_end_with_the_phase_even_if_it_fails(self):
        phase = Phase("p", ["loss_flow"], 1, 4, overrides={"loss.imagination_horizon": 7})
        trainer = make_trainer([phase])
        seen = []

        def sample(size):
            seen.append(trainer.losses["loss"].imagination_horizon)
            raise OSError

        trainer.buffer.sample = sample
        with pytest.raises(OSError):
            trainer.train()
        assert seen == [7] and trainer.losses["loss"].imagination_horizon == 2

    def test_logs_and_evaluations(self, tmp_path):
        calls = []
        csv = CSVLogger("logs", log_dir=str(tmp_path))
        trainer = make_trainer(
            [Phase("p", list(TERMS.values()), 5, 8, eval_interval=2)],
            loggers=[csv],
            validation_buffer=make_buffer(),
            evaluate=lambda: calls.append("final") or {"success_rate": 0.5},
            monitor=lambda: calls.append("interim") or {"success_rate": 0.25},
            log_interval=2,
        )
        result = trainer.train()
        assert calls == ["interim", "interim", "final"]
        assert result["success_rate"] == 0.5
        scalars = csv.experiment.scalars
        assert scalars["eval/success_rate"] == [(2, 0.25), (4, 0.25), (5, 0.5)]
        for term in TERMS.values():
            for split in ("train", "validation"):
                steps = [step for step, _ in scalars[f"{split}/{term}"]]
                assert steps == [2, 4, 5]
        rows = (tmp_path / "logs/scalars/train/loss_flow.csv").read_text().splitlines()
        assert len(rows) == 3
        plot_curves(tmp_path / "curves.png", csv)
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"

    def test_evaluations_beside_training_are_logged_for_their_update(self, tmp_path):
        class Pending:
            def __init__(self, value):
                self.value, self.asked = value, 0

            def done(self):
                self.asked += 1
                return self.asked > 2

            def result(self):
                return {"success_rate": self.value}

        begun = iter(range(10))
        csv = CSVLogger("logs", log_dir=str(tmp_path))
        trainer = make_trainer(
            [Phase("p", ["loss_flow"], 6, 8, eval_interval=2)],
            evaluate=lambda: {"success_rate": 9.0},
            monitor=lambda: Pending(float(next(begun))),
            loggers=[csv],
            log_interval=1,
        )
        assert trainer.train()["success_rate"] == 9.0
        rows = (tmp_path / "logs/scalars/eval/success_rate.csv").read_text().split()
        assert sorted(rows) == ["2,0.0", "4,1.0", "6,9.0"]

    def test_switches_reach_the_update(self):
        trainer = make_trainer([Phase("p", ["loss_flow"], 1, 8)], compile={"backend": "eager"})
        assert trainer.train()["compiled"]
        with pytest.raises(ValueError, match="precision"):
            make_trainer([Phase("p", ["loss_flow"], 1, 8)], precision="fp8").train()

    def test_the_same_seed_trains_the_same(self):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            trainer = make_trainer([Phase("p", list(TERMS.values()), 3, 8)])
            trainer.train()
            runs.append(parameters(trainer))
        assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())

    def test_errors(self):
        with pytest.raises(ValueError, match="trains 'loss_nothing', which no loss has"):
            make_trainer([Phase("p", ["loss_nothing"], 1, 8)])
        with pytest.raises(ValueError, match=r"nothing to optimize named \['value_network'\]"):
            make_trainer([Phase("p", ["loss_flow"], 1, 8, optim={"value_network": {"lr": 1.0}})])
        losses = make_losses()
        twice = {"a": losses["model"], "b": losses["model"]}
        phases = [Phase("p", ["loss_reward"], 1, 8)]
        with pytest.raises(ValueError, match=r"of \['a', 'b'\]; choose among .*'a.loss_reward'"):
            PhaseTrainer(twice, make_buffer(), phases)


class TestReport:
    def test_summary(self, tmp_path):
        path = tmp_path / "summary.json"
        write_summary(path, {"success_rate": 0.5})
        summary = json.loads(path.read_text())
        assert summary == {"success_rate": 0.5, "versions": versions()}
        assert summary["versions"]["torch"] == torch.__version__

    def test_video(self, tmp_path):
        av = pytest.importorskip("av")
        episodes = [torch.randint(255, (n, 64, 48, 3), dtype=torch.uint8) for n in (5, 7)]
        path = tmp_path / "video.mp4"
        write_video(path, episodes, fps=10)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width, stream.average_rate) == (64, 48, 10)
            assert sum(1 for _ in container.decode(stream)) == 12


if __name__ == "__main__":
    pytest.main([__file__])
