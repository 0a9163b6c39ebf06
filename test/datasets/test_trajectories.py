from __future__ import annotations

import numpy as np
import pytest

from torchrl_mac.data import ActionChunkExperienceReplay
from torchrl_mac.datasets import trajectories

h5py = pytest.importorskip("h5py")

ENDS = {3: "terminal", 9: "timeout", 13: "terminal", 19: "timeout"}  # last row: how it ends


def flat_arrays(seed=0):
    """D4RL's arrays, observations counting steps, so that a test can tell them."""
    rng, rows = np.random.default_rng(seed), max(ENDS) + 1
    return {
        "observations": np.stack([np.arange(rows), rng.random(rows)], 1).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.random(rows).astype(np.float32),
        "terminals": np.isin(np.arange(rows), [t for t, how in ENDS.items() if how == "terminal"]),
        "timeouts": np.isin(np.arange(rows), [t for t, how in ENDS.items() if how == "timeout"]),
    }


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


def episodes_of(arrays):
    """Each episode's observations (with the final one, if known), actions, rewards and ending."""
    start = 0
    for end, how in ENDS.items():
        steps = slice(start, end + 1)
        states = arrays["observations"][steps]
        if "next_observations" in arrays:
            states = np.concatenate([states, arrays["next_observations"][end : end + 1]])
        elif how == "terminal":
            states = np.concatenate([states, states[-1:]])
        yield states, arrays["actions"][steps], arrays["rewards"][steps], how == "terminal"
        start = end + 1


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("has_next", [False, True])
@pytest.mark.parametrize("h", [1, 3])
def test_chunks_equal_a_slow_loop(tmp_path, suffix, has_next, h):
    arrays, gamma = flat_arrays(), 0.9
    if has_next:
        arrays["next_observations"] = arrays["observations"] + np.float32([0.5, 0])
    path = save(tmp_path / f"robot{suffix}", arrays)
    buffer = ActionChunkExperienceReplay(
        "robot", 512, root=tmp_path / "root", source=path, chunk_size=h, gamma=gamma
    )
    expected = {}
    for states, actions, rewards, terminal in episodes_of(arrays):
        for t in range(len(states) - h):
            last = t + h == len(states) - 1
            expected[states[t][0]] = (
                states[t + h].tolist(),
                actions[t : t + h].clip(-0.99999, 0.99999).flatten(),
                sum(gamma**i * rewards[t + i] for i in range(h)),
                terminal and last,
                last and not terminal,
            )
    seen = set()
    for chunk in buffer.sample():
        key = chunk["observation"][0].item()
        following, action, reward, terminated, truncated = expected[key]
        assert chunk["next", "observation"].tolist() == following
        np.testing.assert_allclose(chunk["action"].flatten(), action, rtol=1e-6)
        assert chunk["next", "reward"].item() == pytest.approx(reward, rel=1e-5)
        assert chunk["next", "terminated"].item() == terminated
        assert chunk["next", "truncated"].item() == truncated
        seen.add(key)
    assert seen == set(expected)


def save_minari(path, dictionary=False):
    """The same episodes as ``flat_arrays`` with the states after them."""
    arrays = flat_arrays()
    arrays["next_observations"] = arrays["observations"] + np.float32([0.5, 0])
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for i, (states, actions, rewards, terminal) in enumerate(episodes_of(arrays)):
            group = file.create_group(f"episode_{i}")
            if dictionary:
                group.create_group("observations")["observation"] = states
            else:
                group["observations"] = states
            group["actions"], group["rewards"] = actions, rewards
            last = np.arange(len(actions)) == len(actions) - 1
            group["terminations"], group["truncations"] = last & terminal, last & (not terminal)
    return arrays


@pytest.mark.parametrize("dictionary", [False, True])
def test_minari_holds_the_same_as_d4rl(tmp_path, dictionary):
    arrays = save_minari(tmp_path / "mine" / "data" / "main_data.hdf5", dictionary)
    flat = save(tmp_path / "flat.npz", arrays)
    rows = [
        ActionChunkExperienceReplay(name, root=tmp_path / "root", source=source)[:]
        for name, source in (("minari", tmp_path / "mine"), ("d4rl", flat))
    ]
    assert (rows[0] == rows[1]).all()


def test_validation_files_and_folders(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1), ("a-val", 2)):
        save(folder / f"{name}.npz", flat_arrays(seed))
    train = ActionChunkExperienceReplay("both", root=tmp_path / "root", source=folder)
    val = ActionChunkExperienceReplay("both", root=tmp_path / "root", split="val")
    assert len(train) == 2 * len(val)
    assert train.metadata["episodes"] == 8
    assert train.statistics.max.tolist() == pytest.approx(val[:]["observation"].amax(0).tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": None}, r"robot.npz has \['actions'.*needed are 'observations'"),
        ({"terminals": None, "timeouts": None}, "'terminals' or 'timeouts'"),
        ({"rewards": np.zeros(3, np.float32)}, r"robot.npz has arrays of .*must be equal"),
        ({"actions": np.full((20, 3), 2, np.float32)}, r"'actions' reach 2 .*rescale"),
        ({"actions": np.full((20, 3), np.nan, np.float32)}, "'actions' has NaN"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    arrays = {k: v for k, v in {**flat_arrays(), **change}.items() if v is not None}
    path = save(tmp_path / "robot.npz", arrays)
    with pytest.raises(ValueError, match=message):
        ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)
    assert not list((tmp_path / "root").rglob("*.memmap"))


def test_a_damaged_hdf5_file(tmp_path):
    path = tmp_path / "robot.hdf5"
    path.write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match=r"robot.hdf5 cannot be read as HDF5"):
        ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)


def test_without_h5py(tmp_path, monkeypatch):
    path = save(tmp_path / "robot.hdf5", flat_arrays())
    monkeypatch.setattr(trajectories, "_has_h5py", False)
    with pytest.raises(ImportError, match="pip install h5py"):
        ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)


def test_nothing_to_convert(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'robot' .*not yet converted.*Pass source="):
        ActionChunkExperienceReplay("robot", root=tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", ".hidden"])
def test_names_cannot_leave_the_root(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a dataset"):
        ActionChunkExperienceReplay(name, root=tmp_path / "root", source=tmp_path)


def test_links_cannot_lead_out_of_the_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "robot").symlink_to(tmp_path / "elsewhere")
    path = save(tmp_path / "robot.npz", flat_arrays())
    with pytest.raises(ValueError, match="leads out of"):
        ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)
    assert not list((tmp_path / "elsewhere").iterdir())


if __name__ == "__main__":
    pytest.main([__file__])
