"""What model-based policy optimisation adds to the trainer: elites, goals, rows of its own."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import UnaryTransform

from torchrl_mac.data import MixedReplayBuffer
from torchrl_mac.modules import (
    EnsembleWorldModel,
    GaussianEnsemble,
    NormedMLP,
    PolicyActor,
    StackedMLP,
    TanhGaussianPolicy,
)
from torchrl_mac.objectives import ChunkedWorldModelLoss
from torchrl_mac.trainers import (
    EarlyStopping,
    EliteHook,
    LossUpdate,
    ModelRolloutHook,
    Phase,
    PhaseTrainer,
)
from torchrl_mac.trainers import distributed as processes

E, OBS, G, H, A, ROWS = 5, 3, 2, 2, 2, 40
D = H * A
TERMS = ["loss_dynamics", "loss_reward", "loss_termination"]


def make_model(goal=False, num_elites=2):
    width = OBS + D + (G if goal else 0)
    network = StackedMLP(E, OBS + D, 2 * OBS, [8], broadcast=True)
    heads = [NormedMLP(width, 1, [8]) for _ in range(2)]
    for parameter in network.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    nn.init.constant_(heads[1].layers[-1].bias, -0.5)  # some rollouts end
    return EnsembleWorldModel(
        GaussianEnsemble(network, num_elites=num_elites),
        *heads,
        goal_key="goal" if goal else None,
        negative_reward=True if goal else None,
    )


def make_policy(goal=False):
    width, keys = (OBS + G, ["observation", "goal"]) if goal else (OBS, ["observation"])
    return TanhGaussianPolicy(NormedMLP(width, 2 * D, [8]), D, in_keys=[*keys, "noise"])


def make_buffer(goal=False, weight=None):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS))
    goals = {key: torch.randn(ROWS, G) for key in ("value_goal", "actor_goal")} if goal else {}
    terminated = torch.rand(ROWS, 1) < 0.3
    buffer.extend(
        TensorDict(
            observation=torch.randn(ROWS, OBS),
            action=torch.rand(ROWS, H, A) * 2 - 1,
            **goals,
            next=TensorDict(
                observation=torch.randn(ROWS, OBS),
                reward=torch.randn(ROWS, 1),
                terminated=terminated,
                done=terminated.clone(),
            ),
        ).auto_batch_size_(1)
    )
    if weight is not None:
        fill = lambda reward: torch.full_like(reward[:, 0], weight)  # noqa: E731
        buffer.append_transform(UnaryTransform([("next", "reward")], ["weight"], fn=fill))
    return buffer


def make_trainer(model, buffer, phases, **kwargs):
    losses = {"model": ChunkedWorldModelLoss(model)}
    return PhaseTrainer(losses, buffer, phases, progress_bar=False, **kwargs)


@torch.no_grad()
def test_goals_are_pursued_and_stored():
    """Against a loop that draws the same numbers, step by step and row by row."""
    model, policy, source = make_model(True), make_policy(True), make_buffer(True)
    imagined = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    hook = ModelRolloutHook(
        PolicyActor(policy, chunk_size=H),
        model,
        source,
        imagined,
        interval=1,
        num_starts=6,
        horizon=3,
        goals=["value_goal", "actor_goal"],
    )
    torch.manual_seed(5)
    hook._imagine(6)
    torch.manual_seed(5)
    start = source.sample(6)
    state, steps = start["observation"], []
    for _ in range(3):
        z = torch.randn(6, D)
        member = model.dynamics_network.elites[torch.randint(2, (6,))]
        eps = torch.randn(6, OBS)
        mean_and_log = policy.module.network(torch.cat([state, start["value_goal"]], -1))
        mean, log_std = mean_and_log.chunk(2, -1)
        action = (mean + log_std.clamp(-20, 2).exp() * z).tanh().unflatten(-1, (H, A))
        mu, sigma = model.dynamics_network(state, action)
        following = [state[b] + mu[e, b] + sigma[e, b] * eps[b] for b, e in enumerate(member)]
        logit = model.termination_network(state, start["value_goal"], action)
        steps.append((state, action, torch.stack(following), logit > 0))
        state = steps[-1][2]
    expected = []
    for b in range(6):
        for s, a, following, reached in steps:
            expected.append((s[b], a[b], following[b], reached[b].float() - 1, b))
            if reached[b]:
                break
    rows = imagined[:]
    assert len(rows) == len(expected) < 18
    for row, (s, a, following, reward, b) in zip(rows, expected, strict=True):
        for key, value in (("observation", s), ("action", a), (("next", "reward"), reward)):
            torch.testing.assert_close(row[key], value)
        torch.testing.assert_close(row["next", "observation"], following)
        for key in ("value_goal", "actor_goal"):
            assert torch.equal(row[key], start[key][b])
    # and they go with the dataset's
    mixed = MixedReplayBuffer({"real": source, "imagined": imagined}, [0.5, 0.5]).sample(8)
    assert {"value_goal", "actor_goal", "action"} <= set(mixed.keys()) and "goal" not in mixed


def test_the_members_that_predict_best_are_chosen_when_the_model_is_trained():
    model, validation = make_model(), make_buffer()
    assert model.dynamics_network.elites.tolist() == [0, 1]
    seen = []
    sample = validation.sample
    validation.sample = lambda size: seen.append(sample(size)) or seen[-1]
    hook = EliteHook(model, validation, phases=["model"], batch_size=16, num_batches=3)
    phases = [Phase(name, TERMS, 4, 8, lr=1e-2) for name in ("model", "policy")]
    make_trainer(model, make_buffer(), phases, hooks={"elites": hook}).train()
    assert len(seen) == 3  # once, after the first phase
    chosen = model.dynamics_network.elites.tolist()

    model.dynamics_network.elites.copy_(torch.arange(2))
    make_trainer(model, make_buffer(), phases[:1], hooks={"elites": hook}).train()
    batches, errors = seen[3:], []
    for e in range(E):
        total = 0.0
        for batch in batches:
            mean, _ = model.dynamics_network(batch["observation"], batch["action"])
            for b in range(16):
                off = batch["observation"][b] + mean[e, b] - batch["next", "observation"][b]
                total += float(off.detach().square().sum())
        errors.append(total)
    assert model.dynamics_network.elites.tolist() == sorted(range(E), key=errors.__getitem__)[:2]
    assert len(chosen) == 2


def test_elites_are_chosen_with_the_parameters_that_early_stopping_has_kept(monkeypatch):
    values = iter([1.0, 2.0, 3.0])  # the first validation is the best
    monkeypatch.setattr("torchrl_mac.trainers.phase.fmean", lambda found: next(values))
    model, seen = make_model(), {}

    class Look(EliteHook):
        def after_update(self, progress, batch, metrics):
            weight = model.dynamics_network.network.weights[0].detach().clone()
            seen[progress.phase_updates] = weight

        def end_phase(self, progress):
            seen["end"] = model.dynamics_network.network.weights[0].detach().clone()
            super().end_phase(progress)

    stopping = EarlyStopping(interval=2, patience=2)
    phase = Phase("model", TERMS, 40, 8, lr=1e-2, early_stopping=stopping)
    hooks = {"elites": Look(model, make_buffer(), batch_size=8, num_batches=1)}
    make_trainer(
        model, make_buffer(), [phase], hooks=hooks, validation_buffer=make_buffer()
    ).train()
    assert max(key for key in seen if key != "end") == 6
    assert torch.equal(seen["end"], seen[2]) and not torch.equal(seen["end"], seen[6])


def test_elites_are_in_the_state_of_the_loss_and_nowhere_else():
    model, other = make_model(), make_model()
    model.dynamics_network.choose_elites(torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0]))
    loss = ChunkedWorldModelLoss(other)
    loss.load_state_dict(ChunkedWorldModelLoss(model).state_dict())
    assert other.dynamics_network.elites.tolist() == [2, 3]
    other.dynamics_network.choose_elites(torch.arange(5.0))
    (kept,) = (value for key, value in loss.state_dict().items() if key.endswith("elites"))
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_learns_from_real_rows_alone(compiled):
    model, real, imagined = make_model(), make_buffer(weight=1.0), make_buffer(weight=0.0)
    loss = ChunkedWorldModelLoss(model)
    loss.set_keys(priority_weight="weight")
    batch = MixedReplayBuffer([real, imagined], [0.25, 0.75]).sample(16)
    assert batch["weight"].tolist() == [1.0] * 4 + [0.0] * 12
    expected = {key: value.item() for key, value in loss(batch[:4].exclude("weight")).items()}
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)
    update = LossUpdate([loss], optimizer, compile={"backend": "aot_eager"} if compiled else False)
    found = update(batch)
    assert update.is_compiled == compiled
    for term in TERMS:
        assert float(found[term]) == pytest.approx(expected[term], rel=1e-5)


def test_a_phase_with_other_data_is_not_followed_by_an_evaluation():
    """Nothing has changed in what acts when the model is trained."""
    real, mixed, calls = make_buffer(), make_buffer(), []
    phases = [Phase("model", TERMS, 2, 8), Phase("policy", TERMS, 3, 8)]
    evaluate = lambda: calls.append(trainer.updates) or {"success_rate": 0.5}  # noqa: E731
    kwargs = {"phase_buffers": {"model": real}, "evaluate": evaluate}
    trainer = make_trainer(make_model(), mixed, phases, **kwargs)
    result = trainer.train()
    assert calls == [5] and "success_rate_before_policy" not in result


def test_processes_agree(monkeypatch):
    value = torch.tensor([1.0, 4.0])
    assert processes.mean_of_processes(value) is value
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda total: total.add_(3.0))
    assert processes.mean_of_processes(value).tolist() == [2.0, 3.5]
    assert value.tolist() == [1.0, 4.0]


if __name__ == "__main__":
    pytest.main([__file__])
