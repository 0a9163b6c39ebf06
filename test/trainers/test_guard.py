from __future__ import annotations

import sys

import pytest
import torch
from tensordict import TensorDict
from test_checkpoints import PHASES, same, trained
from test_trainer import make_trainer, parameters
from test_update import EAGER, OBS, A, H, batch, make_update
from test_update import parameters as update_parameters
from torchrl._utils import logger as torchrl_logger
from torchrl.data import TensorDictReplayBuffer

from torchrl_mac.data import ActionChunkSampler, ActionChunkStorage
from torchrl_mac.trainers import LossUpdate, NonFiniteError, RunCheckpoints, SealedCheckpoint
from torchrl_mac.trainers.postmortem import diagnose, give_up


def everything(update):
    return update_parameters(update), moments(update)


def moments(update):
    return [
        value.clone()
        for state in update.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def equal(left, right):
    return same(left[0], right[0]) and all(map(torch.equal, left[1], right[1]))


def poisoned(value=float("nan")):
    bad = batch(1).clone()
    bad["observation"][2, 0] = value
    return bad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_changes_nothing(value):
    update, twin = make_update(), make_update()
    for each in (update, twin):
        torch.manual_seed(0)
        each(batch(0))
    before = everything(update)
    losses = update(poisoned(value))
    assert not torch.stack([v for k, v in losses.items() if k.startswith("loss_")]).isfinite().all()
    assert equal(everything(update), before)
    assert update.guard.read() == {"skipped": 1, "in_a_row": 1}
    for each in (update, twin):  # and the next update is as if there had been no other
        torch.manual_seed(1)
        each(batch(2))
    assert equal(everything(update), everything(twin))
    assert update.guard.read() == {"skipped": 1, "in_a_row": 0}


def test_compiled():
    torch._dynamo.reset()
    model = make_update().losses["world_model"]  # one loss is traced in seconds
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    update = LossUpdate([model], optimizer, compile=EAGER)
    update(batch(0))
    before = everything(update)
    with torch._dynamo.config.patch(error_on_recompile=True):
        update(poisoned())
        assert equal(everything(update), before)
        update(batch(1))
    assert update.is_compiled
    assert not equal(everything(update), before)
    assert update.guard.read() == {"skipped": 1, "in_a_row": 0}


def test_a_bad_gradient_changes_nothing():
    update = make_update()
    update(batch(0))
    before = everything(update)
    parameter = update.optimizer.param_groups[0]["params"][0]
    hook = parameter.register_hook(lambda grad: grad * float("nan"))
    losses = update(batch(1))
    assert all(v.isfinite() for k, v in losses.items() if k.startswith("loss_"))
    assert losses["grad_norm"].isnan()
    assert equal(everything(update), before)
    hook.remove()
    update(batch(1))
    assert not equal(everything(update), before)


def test_a_bad_weight_does_not_spread():
    update = make_update()
    update(batch(0))
    weight = next(iter(update.losses["values"].value_network_params.values(True, True)))
    weight.data.view(-1)[0] = float("nan")
    names = {k for k, v in everything(update)[0].items() if not v.isfinite().all()}
    assert names
    for step in range(3):
        update(batch(step))
    assert {k for k, v in everything(update)[0].items() if not v.isfinite().all()} == names
    assert update.guard.read() == {"skipped": 3, "in_a_row": 3}
    found = diagnose(list(update.losses.values()), batch(0))
    assert any("value_network" in name for name in found["parameters"])
    assert set(found["losses"]) >= {"loss_value"}


def test_an_optimizer_that_cannot_mask_is_not_asked():
    plain = make_update()
    optimizer = torch.optim.RMSprop(
        [p for loss in plain.losses.values() for p in loss.parameters()]
    )
    update = LossUpdate(plain.losses, optimizer, plain.target_updaters)
    before = everything(update)[0]
    update(poisoned())
    assert same(everything(update)[0], before)
    update(batch(0))
    assert not same(everything(update)[0], before)


def test_clipping_equals_the_closed_form():
    clipped, plain = make_update(max_grad_norm=0.5), make_update()
    torch.manual_seed(0)
    norm = plain(batch(0))["grad_norm"]
    torch.manual_seed(0)
    assert clipped(batch(0))["grad_norm"] == norm > 0.5  # reported as it was
    for group, other in zip(
        clipped.optimizer.param_groups, plain.optimizer.param_groups, strict=True
    ):
        for p, q in zip(group["params"], other["params"], strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad * 0.5 / (norm + 1e-6))
    with pytest.raises(ValueError, match="max_grad_norm must be positive, got 0"):
        make_update(max_grad_norm=0)


def test_the_norm_is_that_of_all_gradients():
    update = make_update()
    norm = update(batch(0))["grad_norm"]
    gradients = [p.grad for group in update.optimizer.param_groups for p in group["params"]]
    total = sum(float((grad**2).sum()) for grad in gradients if grad is not None) ** 0.5
    assert norm.item() == pytest.approx(total, rel=1e-5)


class TestTrainer:
    def poison(self, trainer, first, last):
        sample = trainer.buffer.sample

        def poisoning(size):
            drawn = sample(size)
            if first <= trainer.updates < last:
                drawn["observation"][1:3] = float("nan")
            return drawn

        trainer.buffer.sample = poisoning

    def test_a_few_are_counted_and_training_goes_on(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(torchrl_logger, "warning", lambda message, *_: seen.append(message))
        trainer = make_trainer(PHASES, log_interval=1, max_skipped=3)
        self.poison(trainer, 2, 4)
        result = trainer.train()
        assert result["skipped_updates"] == 2
        assert result["updates"] == 10
        assert any("2 updates were not finite" in text for text in seen)
        assert all(value.isfinite().all() for value in parameters(trainer).values())

    @pytest.mark.parametrize("killed_after", [3, 4, 7])
    def test_the_count_outlives_the_process(self, tmp_path, killed_after):
        def run(updates=None):
            checkpoints = RunCheckpoints(tmp_path / "checkpoints", interval=1)
            trainer = make_trainer(PHASES, checkpoints=checkpoints, max_skipped=9)
            trainer.resume()
            self.poison(trainer, 1, 6)
            if updates is not None:
                step = trainer.checkpoints.save
                trainer.checkpoints.save = lambda n, state, **_: (
                    step(n, state, wait=True) and (n < updates or sys.exit())
                )
            return trainer.train()

        with pytest.raises(SystemExit):
            run(killed_after)
        assert run()["skipped_updates"] == 5

    def test_many_in_a_row_end_it_with_a_diagnosis(self, tmp_path):
        checkpoints = RunCheckpoints(tmp_path / "checkpoints", interval=1, keep_last=99)
        trainer = make_trainer(PHASES, checkpoints=checkpoints, log_interval=1, max_skipped=3)
        self.poison(trainer, 2, 99)
        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        checkpoints.close()
        message = str(caught.value)
        assert "the last one 7" in message
        assert "'observation': [1, 2]" in message
        assert "'loss_qvalue': [1, 2]" in message
        folder = tmp_path / "nonfinite-000000000007"
        assert str(folder) in message
        states = SealedCheckpoint.load_states(folder)
        assert states["batch"]["observation"][1:3].isnan().all()
        assert states["progress"]["updates"] == 7
        assert all(value.isfinite().all() for value in parameters(trainer).values())
        for path in checkpoints.paths():
            SealedCheckpoint.verify(path)

    def test_a_poisoned_weight_is_never_saved(self, tmp_path):
        trained(tmp_path, 5)
        checkpoints = RunCheckpoints(tmp_path / "checkpoints", interval=1, keep_last=99)
        trainer = make_trainer(PHASES, checkpoints=checkpoints, log_interval=1, max_skipped=3)
        trainer.resume()
        with torch.no_grad():
            next(iter(trainer.losses["loss"].parameters())).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"parameters: \['ValueExpansionLoss\."):
            trainer.train()
        checkpoints.close()
        assert checkpoints.paths()[-1].name.endswith("5")


def test_rows_of_the_dataset_are_named(monkeypatch):
    rows = TensorDict(
        observation=torch.randn(60, OBS),
        action=torch.rand(60, A),
        episode=torch.arange(60) // 20,
        next=TensorDict(
            reward=torch.randn(60, 1),
            terminated=torch.zeros(60, 1, dtype=torch.bool),
            batch_size=[60],
        ),
        batch_size=[60],
    )
    rows["observation"][7] = float("nan")
    buffer = TensorDictReplayBuffer(
        storage=ActionChunkStorage(rows),
        sampler=ActionChunkSampler(H),
        batch_size=512,
        generator=torch.Generator().manual_seed(0),
    )
    buffer.sample()
    drawn = buffer.sample()
    first, after = (of["observation"].isnan().any(-1) for of in (drawn, drawn["next"]))
    bad = (first | after).nonzero().flatten().tolist()
    state = {"progress": {"updates": 2}}
    monkeypatch.setattr("torchrl_mac.trainers.postmortem._short", str)
    with pytest.raises(NonFiniteError) as caught:
        give_up([make_update().losses["behaviour"]], buffer, drawn, state, None)
    assert bad
    expected = {row: 7 if first[row] else 7 - H for row in bad}  # where their samples begin
    assert f"dataset_rows: {expected}" in str(caught.value)
