from __future__ import annotations

import numpy as np
import pytest
import torch

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


def of(key, change):
    return lambda arrays: arrays.update({key: change(arrays[key])})


def narrow_next(arrays):
    arrays["next_observations"] = arrays["observations"][:, :1]


WRONG_COLUMNS = {
    "narrow next": (narrow_next, r"'next_observations' have 1 numbers a row, 'observations' 2"),
    "complex": (of("observations", lambda a: a.astype(complex)), "'observations' is complex128"),
    "3-D": (of("observations", lambda a: a[:, None]), r"'observations' is .* \(20, 1, 2\)"),
    "3-D actions": (of("actions", lambda a: a[:, None]), r"'actions' is .* \(20, 1, 3\)"),
    "boolean": (of("actions", lambda a: a > 0), r"'actions' is bool"),
    "text": (of("terminals", lambda a: a.astype("S5")), r"'terminals' is \|S5"),
    "two": (of("terminals", lambda a: a * 2.0), r"'terminals' has values other than 0 and 1"),
    "NaN": (of("timeouts", lambda a: np.full(20, np.nan)), r"'timeouts' has "),
    "2-D": (of("timeouts", lambda a: np.stack([a, a], 1)), r"'timeouts' is .* \(20, 2\)"),
    "2-D rewards": (of("rewards", lambda a: a[:, None]), r"'rewards' is .* \(20, 1\)"),
    "complex rewards": (of("rewards", lambda a: a.astype(complex)), r"'rewards' is complex"),
    "no numbers": (of("observations", lambda a: a[:, :0]), r"'observation' are empty"),
    "large": (of("observations", lambda a: a * 1e300), r"'observations?' has NaN or infinite"),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(("change", "message"), WRONG_COLUMNS.values(), ids=WRONG_COLUMNS.keys())
def test_every_column_is_checked(tmp_path, suffix, change, message):
    arrays = flat_arrays()
    arrays["observations"] = arrays["observations"].astype(float)
    change(arrays)
    path = save(tmp_path / f"robot{suffix}", arrays)
    with pytest.raises(ValueError, match=message) as error:
        ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)
    assert str(path) in str(error.value)
    assert not list((tmp_path / "root").rglob("*.memmap"))


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_whole_numbers_will_do(tmp_path, suffix):
    arrays = flat_arrays()
    for key in ("rewards", "observations"):
        arrays[key] = arrays[key].astype(int)
    arrays["terminals"] = arrays["terminals"].astype(np.float32)
    path = save(tmp_path / f"robot{suffix}", arrays)
    rows = ActionChunkExperienceReplay("robot", root=tmp_path / "root", source=path)[:]
    assert rows["observation"].dtype == rows["next", "reward"].dtype == torch.float32
    assert rows["next", "terminated"].sum() == 4  # and the states after them


def replaced(name, change):
    def edit(file):
        array = file[name][()]
        del file[name]
        file[name] = change(array)

    return edit


def as_array(file):
    del file["episode_1"]
    file["episode_1"] = np.zeros(3)


def as_group(file):
    del file["episode_1/rewards"]
    file.create_group("episode_1/rewards")


WRONG_EPISODES = {
    "short rewards": (replaced("episode_1/rewards", lambda a: a[:-1]), "'episode_1/rewards' has 5"),
    "long rewards": (
        replaced("episode_0/rewards", lambda a: np.append(a, 1)),
        "'episode_0/rewards' has 5 rows for 4 actions",
    ),
    "no rewards": (lambda file: file["episode_1"].pop("rewards"), "'episode_1' has rows of"),
    "2-D rewards": (
        replaced("episode_1/rewards", lambda a: a[:, None]),
        r"'episode_1/rewards' is .*\(6, 1\)",
    ),
    "terminations": (
        replaced("episode_1/terminations", lambda a: a[1:]),
        "'episode_1/terminations' has 5 rows",
    ),
    "text": (
        replaced("episode_1/terminations", lambda a: np.array([b"False"] * 6)),
        r"'episode_1/terminations' is \|S5",
    ),
    "truncations": (
        replaced("episode_1/truncations", lambda a: np.arange(6) == 2),
        "'episode_1/truncations' are true before the last step",
    ),
    "complex": (
        replaced("episode_1/actions", lambda a: a.astype(complex)),
        "'episode_1/actions' is complex",
    ),
    "width": (
        replaced("episode_1/observations", lambda a: a[:, :1]),
        "'episode_1' has rows of .*'episode_0' of",
    ),
    "observations": (
        replaced("episode_1/observations", lambda a: a[1:]),
        "'episode_1' has 6 observations for 6 actions",
    ),
    "no actions": (lambda file: file["episode_1"].pop("actions"), "'episode_1' has .*needed are"),
    "array": (as_array, "'episode_1' is not an episode"),
    "group": (as_group, "'episode_1/rewards' is no array"),
    "name": (lambda file: file.move("episode_1", "episode_x"), "'episode_x' is not an episode"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_EPISODES.values(), ids=WRONG_EPISODES.keys())
def test_every_column_of_minari_is_checked(tmp_path, change, message):
    path = tmp_path / "mine" / "data" / "main_data.hdf5"
    save_minari(path)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(ValueError, match=message) as error:
        ActionChunkExperienceReplay("mine", root=tmp_path / "root", source=tmp_path / "mine")
    assert str(path) in str(error.value)


def test_minari_terminates_before_the_last_row(tmp_path):
    path = tmp_path / "mine" / "data" / "main_data.hdf5"
    save_minari(path)
    with h5py.File(path, "a") as file:
        file["episode_1/terminations"][2] = True
    buffer = ActionChunkExperienceReplay("mine", root=tmp_path / "root", source=tmp_path / "mine")
    flags = buffer[:]["next"]
    terminated = flags["terminated"].flatten().nonzero().flatten().tolist()
    assert terminated == [3, 4, 5 + 2, 15, 16]  # the last steps, and the states after them
    assert flags["done"][7] and not flags["truncated"][7]
    assert len(buffer.storage.episode_ends) == len(ENDS)


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
