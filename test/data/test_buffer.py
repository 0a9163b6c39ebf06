from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from ogbench_files import LENGTHS, VAL_LENGTHS
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import RandomSampler, SliceSampler
from torchrl.data.datasets import load_dataset
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import IQLLoss, TD3BCLoss

import torchrl_mac.data
from torchrl_mac.data import OGBenchExperienceReplay

NAME = "pointmaze-medium-navigate-v0"
TASK = "pointmaze-medium-navigate-singletask-task3-v0"


@pytest.fixture
def folders(write_npz, tmp_path):
    return {"root": tmp_path / "root", "source": write_npz(NAME)}


def test_chunks_equal_a_slow_loop_over_the_file(folders):
    h, gamma = 4, 0.9
    buffer = OGBenchExperienceReplay(TASK, 64, chunk_size=h, gamma=gamma, **folders)
    raw = np.load(folders["source"] / f"{NAME}.npz")
    rewards = buffer[:]["next", "reward"].squeeze(-1).numpy()  # test_tasks checks these
    sample = buffer.sample()
    assert sample.batch_size == (64,) and sample["action"].shape == (64, h, 2)
    ends = np.flatnonzero(raw["terminals"])
    for chunk in sample:
        t = int(chunk["index"][0])
        assert chunk["index"].tolist() == list(range(t, t + h + 1))
        assert not raw["terminals"][t : t + h].any()
        assert chunk["observation"].tolist() == raw["observations"][t].tolist()
        assert chunk["next", "observation"].tolist() == raw["observations"][t + h].tolist()
        np.testing.assert_allclose(chunk["action"], raw["actions"][t : t + h], atol=1.1e-5)
        expected, solved = 0.0, False
        for i in range(h):
            if not solved:
                expected += gamma**i * rewards[t + i]
                solved = rewards[t + i] == 0
        assert chunk["next", "reward"].item() == pytest.approx(expected, rel=1e-6)
        assert chunk["next", "terminated"] == solved
        assert chunk["next", "truncated"] == (t + h in ends and not solved)
        assert chunk["next", "done"] == (t + h in ends or solved)


def test_ignore_terminated(write_npz, tmp_path):
    source = write_npz(NAME, lengths=(2000,))
    folders = {"root": tmp_path / "root", "source": source}
    plain = OGBenchExperienceReplay(TASK, 4096, chunk_size=5, **folders).sample()
    ignoring = OGBenchExperienceReplay(
        TASK, 4096, chunk_size=5, ignore_terminated=True, **folders
    ).sample()
    assert plain["next", "terminated"].any()
    assert not ignoring["next", "terminated"].any()
    assert ignoring["next", "done"].equal(ignoring["next", "truncated"])


def test_single_steps_are_plain_transitions(folders):
    sample = OGBenchExperienceReplay(TASK, 32, **folders).sample()
    assert sample["action"].shape == (32, 2)
    assert sample["next", "reward"].shape == sample["next", "done"].shape == (32, 1)


def test_load_dataset(folders):
    buffer = load_dataset(f"ogbench:{NAME}", batch_size=8, chunk_size=3, **folders)
    assert isinstance(buffer, OGBenchExperienceReplay)
    assert buffer.sample()["action"].shape == (8, 3, 2)
    importlib.reload(torchrl_mac.data)  # registers again
    assert len(load_dataset(f"ogbench:{NAME}", split="val", **folders)) == sum(VAL_LENGTHS)


def make_actor():
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(nn.Linear(2, 4), NormalParamExtractor()),
            ["observation"],
            ["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=TanhNormal,
    )


def make_critic():
    return ValueOperator(MLP(4, 1, num_cells=[32]), in_keys=["observation", "action"])


def make_iql():
    value = ValueOperator(nn.Linear(2, 1), in_keys=["observation"])
    return IQLLoss(make_actor(), make_critic(), value)


def make_td3_bc(action_spec):
    actor = TensorDictSequential(
        TensorDictModule(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), ["observation"], ["action"])
    )
    return TD3BCLoss(actor, make_critic(), action_spec=action_spec)


@pytest.mark.parametrize("algorithm", ["iql", "td3_bc"])
def test_single_steps_train_torchrl_losses(folders, algorithm):
    torch.manual_seed(0)
    buffer = OGBenchExperienceReplay(TASK, 64, **folders)
    buffer.append_transform(buffer.observation_norm())
    loss_module = make_iql() if algorithm == "iql" else make_td3_bc(buffer.action_spec)
    loss_module.make_value_estimator(gamma=0.9)
    optimizer = torch.optim.Adam(loss_module.parameters(), 1e-2)
    critic_losses = []
    for _ in range(30):
        losses = loss_module(buffer.sample())
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()
        critic_losses.append(losses["loss_qvalue"].item())
    assert np.isfinite(critic_losses).all()
    assert np.mean(critic_losses[-5:]) < np.mean(critic_losses[:5])


@pytest.mark.parametrize("split", ["train", "val"])
def test_normalisation_comes_from_the_validation_split(folders, split):
    buffer = OGBenchExperienceReplay(NAME, 256, split=split, chunk_size=2, **folders)
    raw = buffer.sample()
    buffer.append_transform(buffer.observation_norm())
    seen = np.load(folders["source"] / f"{NAME}-val.npz")["observations"]
    low, high = seen.min(0), seen.max(0)
    for index in (7, 11):
        expected = (buffer.storage[index]["observation"].numpy() - (high + low) / 2) / (
            (high - low) / 2 + 1e-3
        )
        transformed = buffer.transform[0](
            buffer.storage[index]
            .select("observation", "next")
            .set(("next", "observation"), buffer.storage[index]["observation"])
        )
        np.testing.assert_allclose(transformed["observation"], expected, rtol=1e-5)
        np.testing.assert_allclose(transformed["next", "observation"], expected, rtol=1e-5)
    assert buffer.sample()["observation"].std() != raw["observation"].std()


def test_other_normalisations(folders):
    buffer = OGBenchExperienceReplay(NAME, **folders)
    norm = buffer.observation_norm("mean_std", in_keys=["observation"])
    assert norm.in_keys == ["observation"]
    assert norm.loc.equal(buffer.statistics.mean)


def test_without_a_validation_split(write_npz, tmp_path):
    source = write_npz(NAME, val_lengths=None)
    buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source)
    with pytest.warns(UserWarning, match="no validation split .* training split"):
        statistics = buffer.statistics
    assert statistics.max.equal(buffer[:]["observation"].max(0).values)
    with pytest.raises(FileNotFoundError, match=r"\(val\).*-val.npz does not exist"):
        OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=source, split="val")


def test_specs(folders):
    buffer = OGBenchExperienceReplay(NAME, 16, **folders)
    sample = buffer.sample()
    assert buffer.observation_spec.is_in(sample[0].select("observation"))
    assert buffer.action_spec.is_in(sample[0]["action"])
    assert buffer.action_spec.space.low.tolist() == [-1, -1]
    assert not buffer.action_spec.is_in(torch.full((2,), 1.5))


def test_rows_cannot_be_written(folders):
    buffer = OGBenchExperienceReplay(NAME, 16, **folders)
    before = buffer[:].clone()
    for write in (
        lambda: buffer.add(before[0]),
        lambda: buffer.extend(before),
        lambda: buffer.__setitem__(0, before[1]),
        buffer.empty,
    ):
        with pytest.raises(RuntimeError, match="doesn't allow writing"):
            write()
    assert (buffer[:] == before).all() and len(buffer) == sum(LENGTHS)


def test_a_checkpoint_holds_no_rows_and_resumes(folders, tmp_path):
    def make(seed, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        return OGBenchExperienceReplay(
            NAME, 16, chunk_size=3, generator=generator, **folders, **kwargs
        )

    buffer = make(0)
    buffer.sample()
    state = buffer.state_dict()
    assert state["_storage"] == {"rows": sum(LENGTHS)}
    torch.save(state, tmp_path / "state.pt")
    buffer.dumps(tmp_path / "buffer")
    assert not (tmp_path / "buffer" / "storage").exists()
    expected = buffer.sample()
    resumed, loaded = make(1), make(1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    loaded.loads(tmp_path / "buffer")
    assert (resumed.sample() == expected).all() and (loaded.sample() == expected).all()
    with pytest.raises(ValueError, match="of 68 rows, this one has 21"):
        make(1, split="val").load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))


@pytest.mark.parametrize(
    ("sampler", "shape"),
    [
        (RandomSampler(), (12,)),
        (SliceSampler(slice_len=4, traj_key="episode", cache_values=True), (12,)),
    ],
)
def test_torchrl_samplers_draw_rows(folders, sampler, shape):
    sample = OGBenchExperienceReplay(NAME, 12, sampler=sampler, **folders).sample()
    assert sample.batch_size == shape and sample["observation"].shape == (*shape, 2)


def test_chunks_longer_than_every_episode(folders):
    buffer = OGBenchExperienceReplay(NAME, 4, chunk_size=max(LENGTHS), **folders)
    with pytest.raises(ValueError, match="No episode is longer than chunk_size=31"):
        buffer.sample()


def test_names_and_splits_are_checked(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'pointmaze-medium'"):
        OGBenchExperienceReplay("pointmaze-medum-navigate-v0", root=tmp_path)
    with pytest.raises(ValueError, match="Task 6"):
        OGBenchExperienceReplay("pointmaze-medium-navigate-singletask-task6-v0", root=tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        OGBenchExperienceReplay(NAME, root=tmp_path, split="test")


def test_delete(folders):
    buffer = OGBenchExperienceReplay(NAME, **folders)
    buffer.delete()
    assert not buffer.data_path.exists() and folders["source"].exists()


if __name__ == "__main__":
    pytest.main([__file__])
