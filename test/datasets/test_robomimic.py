from __future__ import annotations

import numpy as np
import pytest
import torch

from torchrl_mac.data import ActionChunkExperienceReplay
from torchrl_mac.datasets import RobomimicDataset, trajectories
from torchrl_mac.datasets.robomimic import LOW_DIM_KEYS

h5py = pytest.importorskip("h5py")

LENGTHS = {0: 4, 2: 3, 10: 5, 1: 6}  # not in the order in which HDF5 sorts names
WIDTHS = dict(zip(LOW_DIM_KEYS, (3, 4, 2, 5), strict=True))
SUCCEEDS = (0, 1, 10)  # the others end without


def demonstrations(seed=0):
    """Each demonstration's arrays, with one more observation than actions."""
    rng = np.random.default_rng(seed)
    for number, steps in LENGTHS.items():
        states = {key: rng.random((steps + 1, width)) for key, width in WIDTHS.items()}
        done = (np.arange(steps) == steps - 1) & (number in SUCCEEDS)
        yield number, states, rng.uniform(-1, 1, (steps, 7)), done


def save(path, has_next=True, masks=None, seed=0):
    with h5py.File(path, "w") as file:
        for number, states, actions, done in demonstrations(seed):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["num_samples"] = len(actions)
            demo["actions"], demo["rewards"] = actions, done.astype(float)
            demo["dones"] = done.astype(int)
            demo["obs/camera"] = np.zeros((len(actions), 2, 2, 3), np.uint8)
            for key, array in states.items():
                demo[f"obs/{key}"] = array[:-1]
                if has_next:
                    demo[f"next_obs/{key}"] = array[1:]
        for name, members in (masks or {}).items():
            file[f"mask/{name}"] = np.array([f"demo_{number}" for number in members], "S")
    return path


def in_order(seed=0, members=tuple(LENGTHS)):
    chosen = [demo for demo in demonstrations(seed) if demo[0] in members]
    return sorted(chosen, key=lambda demo: demo[0])


def as_state(states, keys=LOW_DIM_KEYS):
    return torch.from_numpy(np.concatenate([states[key] for key in keys], 1)).float()


def test_rows_are_the_demonstrations(tmp_path):
    path = save(tmp_path / "low_dim_v15.hdf5")
    rows = ActionChunkExperienceReplay("lift", root=tmp_path / "root", source=path)[:]
    first = 0
    for episode, (_, states, actions, done) in enumerate(in_order()):
        steps = slice(first, first + len(actions))
        last = first + len(actions)
        assert (rows["episode"][first : last + 1] == episode).all()
        assert rows["observation"][first : last + 1].equal(as_state(states))
        torch.testing.assert_close(rows["action"][steps], torch.from_numpy(actions).float())
        assert rows["next", "reward"][steps].flatten().tolist() == (done - 1.0).tolist()
        assert rows["next", "terminated"][steps].flatten().tolist() == done.tolist()
        assert rows["next", "truncated"][last].item() == (not done[-1])
        first = last + 1
    assert first == len(rows)


@pytest.mark.parametrize("h", [1, 3])
def test_windows_are_those_of_the_transitions(tmp_path, h):
    """As the Q-chunking authors put the demonstrations one after another."""
    path = save(tmp_path / "low_dim_v15.hdf5")
    buffer = ActionChunkExperienceReplay(
        "lift",
        300,
        root=tmp_path / "root",
        source=path,
        chunk_size=h,
        gamma=0.5,
        cross_episodes=True,
    )
    steps = [
        (as_state(states)[i], as_state(states)[i + 1], done[i], i == len(actions) - 1)
        for _, states, actions, done in in_order()
        for i in range(len(actions))
    ]
    assert buffer.sampler.num_starts(buffer.storage) == len(steps) - h + 1
    seen = set()
    for chunk in buffer.sample():
        matches = [step[0].equal(chunk["observation"]) for step in steps]
        t = matches.index(True)
        window = steps[t : t + h]
        assert chunk["next", "observation"].equal(window[-1][1])
        reward = sum(0.5**i * (step[2] - 1.0) for i, step in enumerate(window))
        assert chunk["next", "reward"].item() == pytest.approx(reward)
        assert chunk["next", "terminated"].item() == any(step[2] for step in window)
        valid = [not any(step[3] for step in window[:i]) for i in range(h)]
        assert chunk["valid"].flatten().tolist() == valid
        seen.add(t)
    assert seen == set(range(len(steps) - h + 1))


def test_without_next_observations_the_last_state_is_unknown(tmp_path):
    path = save(tmp_path / "low_dim_v15.hdf5", has_next=False)
    rows = ActionChunkExperienceReplay("lift", root=tmp_path / "root", source=path)[:]
    for episode, (_, states, actions, done) in enumerate(in_order()):
        found = rows["observation"][rows["episode"] == episode]
        known = as_state(states)[: len(actions)]
        assert found.equal(torch.cat([known, known[-1:]]) if done[-1] else known)


def test_an_episode_ends_where_a_demonstration_is_done(tmp_path):
    path = save(tmp_path / "low_dim_v15.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_1/dones"][2:] = 1
    dataset = RobomimicDataset("lift", root=tmp_path / "root", source=path)
    lengths = torch.diff(dataset.episode_ends, prepend=torch.tensor([-1])) - 1
    assert lengths.tolist() == [4, 3, 1, 1, 1, 3, 5]


def test_masks_make_the_splits(tmp_path):
    path = save(tmp_path / "low_dim_v15.hdf5", masks={"train": [10, 0], "valid": [2]})
    for split, members in (("train", (0, 10)), ("val", (2,))):
        buffer = ActionChunkExperienceReplay(
            "lift", root=tmp_path / "root", source=path, split=split
        )
        expected = torch.cat([as_state(states) for _, states, *_ in in_order(members=members)])
        assert buffer[:]["observation"].equal(expected)
    assert buffer.statistics.max.equal(expected.amax(0))
    again = ActionChunkExperienceReplay("lift", root=tmp_path / "root", source=path)
    assert again.metadata["episodes"] == 2


def test_the_rest_is_for_training(tmp_path):
    path = save(tmp_path / "low_dim_v15.hdf5", masks={"valid": [2]})
    dataset = RobomimicDataset("lift", root=tmp_path / "root", source=path)
    assert dataset.metadata["episodes"] == 3


def test_all_demonstrations_and_a_validation_file(tmp_path):
    path = save(tmp_path / "low_dim.hdf5", masks={"train": [10, 0], "valid": [2]})
    save(tmp_path / "low_dim-val.hdf5", masks={"train": [0], "valid": [2]}, seed=1)
    for split, seed in (("train", 0), ("val", 1)):
        dataset = RobomimicDataset(
            "lift", root=tmp_path / "root", source=path, split=split, masks=False
        )
        expected = torch.cat([as_state(states) for _, states, *_ in in_order(seed)])
        assert dataset.load()["observation"].equal(expected)
    with pytest.raises(ValueError, match=r"not what .* was converted from"):
        RobomimicDataset("lift", root=tmp_path / "root", source=path)


def test_a_choice_of_observations(tmp_path):
    path, keys = save(tmp_path / "low_dim_v15.hdf5"), ["object", "robot0_eef_pos"]
    dataset = RobomimicDataset("lift", root=tmp_path / "root", source=path, observations=keys)
    expected = torch.cat([as_state(states, keys) for _, states, *_ in in_order()])
    assert dataset.load()["observation"].equal(expected)
    with pytest.raises(ValueError, match=r"not what .* was converted from"):
        RobomimicDataset("lift", root=tmp_path / "root", source=path)
    with pytest.raises(ValueError, match="observations= must name at least one"):
        RobomimicDataset("none", root=tmp_path / "root", source=path, observations=[])


def replaced(name, change):
    def edit(file):
        array = file[name][()]
        del file[name]
        file[name] = change(array)

    return edit


def removed(name):
    return lambda file: file.pop(name)


def attribute(file):
    file["data/demo_2"].attrs["num_samples"] = 7


DAMAGE = {
    "no actions": (removed("data/demo_2/actions"), "'data/demo_2/actions' is no array"),
    "no rewards": (removed("data/demo_1/rewards"), "'data/demo_1/rewards' is no array"),
    "no dones": (removed("data/demo_10/dones"), "'data/demo_10/dones' is no array"),
    "no obs": (removed("data/demo_2/obs"), "'data/demo_2/obs' is no group; needed are"),
    "no object": (removed("data/demo_2/obs/object"), r"'data/demo_2/obs' is \['camera'"),
    "no next": (removed("data/demo_2/next_obs"), "'next_observations' of 'data/demo_2' has rows"),
    "no next object": (removed("data/demo_2/next_obs/object"), "'data/demo_2/next_obs' is"),
    "short": (replaced("data/demo_1/rewards", lambda a: a[1:]), "'data/demo_1' has arrays of"),
    "num_samples": (attribute, "'data/demo_2' has arrays of .* num_samples, 7"),
    "short object": (
        replaced("data/demo_1/obs/object", lambda a: a[1:]),
        "'data/demo_1/obs' has arrays of .*'object': 5",
    ),
    "wide": (
        replaced("data/demo_1/actions", lambda a: np.tile(a, 2)),
        r"'actions' of 'data/demo_1' has rows of shape \(14,\), of 'data/demo_0' \(7,\)",
    ),
    "camera": (
        replaced("data/demo_1/obs/object", lambda a: a[..., None]),
        r"'data/demo_1/obs/object' is .*\(6, 5, 1\)",
    ),
    "two": (replaced("data/demo_1/dones", lambda a: a * 2), "'terminals' has values other than"),
    "nan": (replaced("data/demo_1/obs/object", lambda a: a * np.nan), "'observation' has NaN"),
    "large": (replaced("data/demo_1/actions", lambda a: a * 9), "'actions' reach .*rescale"),
    "name": (lambda file: file.move("data/demo_1", "data/demo_x"), "'data/demo_x' is no demo"),
    "mask": (removed("data/demo_2"), "'mask/train' lists 'demo_2', which is not in 'data'"),
    "empty": (replaced("mask/train", lambda a: a[:0]), "no demonstrations .*split 'train'"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_wrong_is_named(tmp_path, change, message):
    path = save(tmp_path / "low_dim_v15.hdf5", masks={"train": list(LENGTHS)})
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message) as error:
        ActionChunkExperienceReplay("lift", root=tmp_path / "root", source=path)
    assert str(path) in str(error.value)
    assert not list((tmp_path / "root").rglob("*.memmap"))


def test_without_h5py(tmp_path, monkeypatch):
    path = save(tmp_path / "low_dim_v15.hdf5")
    monkeypatch.setattr(trajectories, "_has_h5py", False)
    with pytest.raises(ImportError, match="pip install h5py"):
        ActionChunkExperienceReplay("lift", root=tmp_path / "root", source=path)


if __name__ == "__main__":
    pytest.main([__file__])
