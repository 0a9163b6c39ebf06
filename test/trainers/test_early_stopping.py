from __future__ import annotations

import pytest
import torch
from test_checkpoints import same, trained
from test_trainer import make_buffer, make_trainer, parameters

from torchrl_mac.trainers import EarlyStopping, Phase, RunCheckpoints, TrainerHook

STOP = EarlyStopping(interval=3, patience=2, num_batches=2)


def phases(**kwargs):
    first = Phase("model", ["loss_dynamics"], 40, 8, lr=0.3, early_stopping=STOP, **kwargs)
    return [first, Phase("values", ["loss_value"], 4, 8)]


def seeded_buffer():
    torch.manual_seed(7)
    return make_buffer()


class Validations(TrainerHook):
    """The dynamics' parameters at each validation, and at the phase's end."""

    def __init__(self):
        self.trainer, self.seen, self.end = None, [], None

    def now(self):
        return {k: v for k, v in parameters(self.trainer).items() if "dynamics" in k}

    def after_update(self, progress, batch, metrics):
        if progress.phase.name == "model" and progress.phase_updates % 3 == 0:
            self.seen.append(self.now())

    def end_phase(self, progress):
        self.end = self.end or (progress.phase_updates, self.now())


def test_the_phase_ends_with_its_best_parameters(monkeypatch):
    values = iter([5.0, 3.0, 4.0, 2.0, 9.0, 2.0])  # best at the fourth validation
    look = Validations()
    trainer = make_trainer(phases(), validation_buffer=make_buffer(), hooks={"look": look})
    look.trainer = trainer
    monkeypatch.setattr("torchrl_mac.trainers.phase.fmean", lambda found: next(values))
    result = trainer.train()
    assert result["updates"] == 18 + 4
    updates, end = look.end
    assert updates == 18 and len(look.seen) == 6
    assert same(end, look.seen[3])
    assert not same(end, look.seen[5])


def test_validation_leaves_training_alone(monkeypatch):
    def run(**kwargs):
        torch.manual_seed(0)
        phase = Phase("flow", ["loss_flow"], 6, 8, **kwargs)
        trainer = make_trainer([phase], validation_buffer=validation)
        trainer.train()
        return parameters(trainer)

    validation, sizes, means = make_buffer(), [], []
    sample = validation.sample
    validation.sample = lambda size: sizes.append(size) or sample(size)

    def mean(values):
        means.append(values)
        return -float(len(means))  # ever better: the last parameters are the best

    monkeypatch.setattr("torchrl_mac.trainers.phase.fmean", mean)
    plain = run()
    assert sizes == [8]  # the last row of the logs
    stopping = run(early_stopping={"interval": 2, "patience": 1, "num_batches": 3})
    assert sizes == [8] * (1 + 3 * 3 + 1)
    assert [len(set(values)) for values in means] == [3, 3, 3]
    assert same(plain, stopping)


@pytest.mark.parametrize("killed_after", [4, 7, 12])
def test_resumed_it_stops_at_the_same_update_with_the_same_parameters(tmp_path, killed_after):
    settings = {"phases": phases(keep_moments=True)}
    validation = [seeded_buffer() for _ in range(3)]
    whole = trained(tmp_path / "whole", validation_buffer=validation[0], **settings)
    trained(tmp_path / "parts", killed_after, validation_buffer=validation[1], **settings)
    parts = trained(tmp_path / "parts", validation_buffer=validation[2], **settings)
    assert whole.updates == parts.updates < 44
    assert same(parameters(whole), parameters(parts))


def test_a_phase_that_has_stopped_is_over(tmp_path):
    settings = {"phases": phases()}
    first = trained(tmp_path, validation_buffer=make_buffer(), **settings)
    again = trained(tmp_path, validation_buffer=make_buffer(), **settings)
    assert again.updates == first.updates
    assert same(parameters(first), parameters(again))


def test_a_metric_of_ones_own():
    settings = {"interval": 1, "patience": 1, "metric": "loss_nothing"}
    phase = Phase("flow", ["loss_flow"], 6, 8, early_stopping=settings)
    trainer = make_trainer([phase], validation_buffer=make_buffer())
    with pytest.raises(KeyError, match="loss_nothing"):
        trainer.train()


def test_errors(tmp_path):
    for key in ("interval", "patience", "num_batches"):
        with pytest.raises(ValueError, match=f"{key} must be at least 1, got 0"):
            EarlyStopping(**{"interval": 1, "patience": 1, key: 0})
    with pytest.raises(ValueError, match="early_stopping needs a validation_buffer"):
        make_trainer(phases())
    assert RunCheckpoints(tmp_path).paths() == []


if __name__ == "__main__":
    pytest.main([__file__])
