from __future__ import annotations

import json
import shutil
import time

import numpy as np
import ogbench
import pytest
import torch
from ogbench_files import make_arrays

from torchrl_mac.data import OGBenchExperienceReplay
from torchrl_mac.datasets import OGBenchName, columns, labels
from torchrl_mac.datasets.sources import find_shards
from torchrl_mac.datasets.verify import verify_conversion, verify_files
from torchrl_mac.utils.files import sha256

pytestmark = pytest.mark.usefixtures("processes")  # whose server starts beside the first tests

NAME = "cube-single-play-v0"
LENGTHS = [(23, 14), (31,), (12, 9, 17)]


@pytest.fixture
def shards(tmp_path):
    """Three shards with their validation files."""
    folder = tmp_path / "source"
    folder.mkdir()
    for k, lengths in enumerate(LENGTHS):
        np.savez_compressed(folder / f"{NAME}-{k:03}.npz", **make_arrays(NAME, lengths, seed=k))
        np.savez_compressed(
            folder / f"{NAME}-{k:03}-val.npz", **make_arrays(NAME, (12,), seed=10 + k)
        )
    return folder


def all_bytes(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_shards_are_one_buffer(shards, tmp_path):
    buffer = OGBenchExperienceReplay(NAME, 256, root=tmp_path / "root", source=shards, chunk_size=4)
    raw = [dict(np.load(shards / f"{NAME}-{k:03}.npz")) for k in range(3)]
    rows = buffer[:]
    for key, column in (("observation", "observations"),):
        expected = np.concatenate([part[column] for part in raw])
        assert rows[key].numpy().tolist() == expected.tolist()
    ends = np.flatnonzero(np.concatenate([part["terminals"] for part in raw]))
    assert buffer.storage.episode_ends.tolist() == ends.tolist()
    assert rows["episode"].unique().tolist() == list(range(6))
    assert rows["next", "done"].flatten().nonzero().flatten().tolist() == ends.tolist()
    windows = buffer.sample()["index"]
    assert (rows["episode"][windows] == rows["episode"][windows[:, :1]]).all()
    assert len(OGBenchExperienceReplay(NAME, root=tmp_path / "root", split="val")) == 36


def test_the_manifest(shards, tmp_path):
    buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=shards)
    manifest = buffer.metadata["shards"]
    assert [shard["rows"] for shard in manifest] == [37, 31, 38]
    assert [shard["episodes"] for shard in manifest] == [2, 1, 3]
    for k, shard in enumerate(manifest):
        path = shards / f"{NAME}-{k:03}.npz"
        raw = np.load(path)
        assert shard["file"] == path.name and shard["bytes"] == path.stat().st_size
        assert shard["sha256"] == sha256(path)
        low, high = raw["observations"].min(), raw["observations"].max()
        assert shard["ranges"]["observation"] == [pytest.approx(low), pytest.approx(high)]
        assert shard["versions"] is None  # no recipe beside it
    reordered = OGBenchExperienceReplay(
        NAME, root=tmp_path / "other", source=sorted(find_shards(shards, NAME), reverse=True)
    )
    assert len(buffer.digest) == 64 and buffer.digest != reordered.digest
    statistics = buffer.statistics
    val = np.concatenate(
        [np.load(shards / f"{NAME}-{k:03}-val.npz")["observations"] for k in range(3)]
    )
    np.testing.assert_allclose(statistics.min, val.min(0))
    np.testing.assert_allclose(statistics.std, val.std(0, dtype=np.float64), rtol=1e-5)


@pytest.mark.usefixtures("shared_labels")
def test_any_number_of_workers_makes_the_same_bytes(shards, tmp_path):
    for workers in (1, 3):
        OGBenchExperienceReplay(
            f"{NAME[:-3]}-singletask-task2-v0",
            root=tmp_path / f"root{workers}",
            source=shards,
            workers=workers,
        )
    assert all_bytes(tmp_path / "root1") == all_bytes(tmp_path / "root3")


def test_where_shards_are_looked_for(shards, tmp_path):
    expected = [f"{NAME}-{k:03}.npz" for k in range(3)]
    assert [path.name for path in find_shards(shards, NAME)] == expected
    assert [path.name for path in find_shards([*find_shards(shards, NAME)], NAME)] == expected
    nested = tmp_path / "nested"
    nested.mkdir()
    shutil.copytree(shards, nested / NAME)
    assert [path.name for path in find_shards(nested, NAME)] == expected
    # any names will do, but not those of another dataset
    (nested / "scene-play-v0.npz").touch()
    assert find_shards(nested, "cube-double-play-v0") == [nested / "cube-double-play-v0.npz"]
    for k, path in enumerate(find_shards(shards, NAME)):
        path.rename(shards / f"part{k}.npz")
    assert [path.name for path in find_shards(shards, NAME)] == [f"part{k}.npz" for k in range(3)]
    # the whole set goes before shards
    (shards / f"{NAME}.npz").touch()
    assert find_shards(shards, NAME) == [shards / f"{NAME}.npz"]


def corrupt(path, how):
    content = path.read_bytes()
    arrays = dict(np.load(path))
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        middle = 2000
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif how == "another env":
        np.savez_compressed(path, **make_arrays("pointmaze-medium-navigate-v0", (31,), 0))
    elif how == "NaN":
        arrays["observations"][7, 3] = np.nan
        np.savez_compressed(path, **arrays)
    elif how == "missing key":
        del arrays["actions"]
        np.savez_compressed(path, **arrays)


DAMAGES = ("truncated", "empty", "flipped", "another env", "NaN", "missing key")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_bad_shard_is_named_and_the_good_ones_are_kept(shards, tmp_path, how, monkeypatch):
    bad, root = shards / f"{NAME}-001.npz", tmp_path / "root"
    good = bad.read_bytes()
    corrupt(bad, how)
    with pytest.raises(ValueError, match=str(bad)):
        OGBenchExperienceReplay(NAME, root=root, source=shards, workers=1)
    assert not (root / NAME / "train").exists()
    with pytest.raises(ValueError, match=str(bad)):
        verify_files(find_shards(shards, NAME))
    bad.write_bytes(good)
    rows = OGBenchExperienceReplay(NAME, root=root, source=shards)[:]
    expected = OGBenchExperienceReplay(NAME, root=tmp_path / "clean", source=shards)[:]
    assert (rows == expected).all()


def test_a_conversion_goes_on_at_the_shard_it_was_on(shards, tmp_path, monkeypatch):
    root, write = tmp_path / "root", columns.ColumnWriter.write
    written = []

    def fail_at_the_last(writer, key, block):
        written.append(writer._first)
        if writer._first == 68:
            raise OSError(28, "No space left on device")
        write(writer, key, block)

    with monkeypatch.context() as patch:
        patch.setattr(columns.ColumnWriter, "write", fail_at_the_last)
        with pytest.raises(OSError, match=r"is full.*Free some space"):
            OGBenchExperienceReplay(NAME, root=root, source=shards, workers=1)
    assert set(written) == {0, 37, 68} and not (root / NAME / "train").exists()
    written.clear()

    def record(writer, key, block):
        written.append(writer._first)
        write(writer, key, block)

    monkeypatch.setattr(columns.ColumnWriter, "write", record)
    resumed = OGBenchExperienceReplay(NAME, root=root, source=shards, workers=1)
    assert 37 not in written  # rows 0 are also the validation split's
    clean = OGBenchExperienceReplay(NAME, root=tmp_path / "clean", source=shards)
    assert all_bytes(resumed.data_path) == all_bytes(clean.data_path)


def convert_slowly(root, source, ready):
    write = columns.ColumnWriter.write

    def write_slowly(writer, key, block):
        time.sleep(0.005)
        write(writer, key, block)

    columns.ColumnWriter.write = write_slowly
    ready.set()
    OGBenchExperienceReplay(NAME, root=root, source=source, workers=1)


def test_killed_at_any_moment(processes, shards, tmp_path):
    clean = OGBenchExperienceReplay(NAME, root=tmp_path / "clean", source=shards)
    root, rng = tmp_path / "root", np.random.default_rng(0)
    shutil.copytree(tmp_path / "clean" / NAME / "val", root / NAME / "val")
    mine = root / "notes.txt"
    mine.write_text("mine")
    for _ in range(20):
        ready = processes.Event()
        process = processes.Process(target=convert_slowly, args=(root, shards, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        if (root / NAME / "train").exists():
            converted = OGBenchExperienceReplay(NAME, root=root)
            assert all_bytes(converted.data_path) == all_bytes(clean.data_path)
            shutil.rmtree(root / NAME / "train")
    converted = OGBenchExperienceReplay(NAME, root=root, source=shards)
    assert all_bytes(converted.data_path) == all_bytes(clean.data_path)
    assert not (root / NAME / ".train.partial").exists() and mine.read_text() == "mine"


def test_prefetching_changes_nothing(shards, tmp_path):
    def make(prefetch):
        return OGBenchExperienceReplay(
            NAME,
            8,
            root=tmp_path / "root",
            source=shards,
            chunk_size=3,
            prefetch=prefetch,
            generator=torch.Generator().manual_seed(1),
        )

    expected = [make(None).sample()["index"]]
    plain = make(None)
    expected = [plain.sample()["index"] for _ in range(12)]
    for prefetch in (1, 4):
        ahead = make(prefetch)
        assert all(ahead.sample()["index"].equal(index) for index in expected[:5])
        state = ahead.state_dict()
        for restored in (make(None), make(2)):
            restored.load_state_dict(state)
            assert all(restored.sample()["index"].equal(index) for index in expected[5:])
        assert all(ahead.sample()["index"].equal(index) for index in expected[5:])


def test_prefetching_follows_the_batch_size(shards, tmp_path):
    def make(prefetch):
        folders = {"root": tmp_path / "root", "source": shards}
        generator = torch.Generator().manual_seed(1)
        return OGBenchExperienceReplay(NAME, 4, prefetch=prefetch, generator=generator, **folders)

    plain, ahead = make(None), make(3)
    for size in (4, 4, 6, 6, 4):
        batch = ahead.sample(size)
        assert batch.shape == (size,)
        assert batch["index"].equal(plain.sample(size)["index"])


@pytest.mark.usefixtures("shared_labels")
def test_goal_representations_are_ogbenchs(shards, tmp_path):
    name = f"{NAME[:-3]}-oraclerep-v0"
    buffer = OGBenchExperienceReplay(name, 64, root=tmp_path / "root", source=shards, chunk_size=5)
    rows = buffer[:]
    file = shards / f"{NAME}-000.npz"
    train, _ = ogbench.make_env_and_datasets(
        name,
        dataset_path=str(file),
        compact_dataset=True,
        add_info=True,
        dataset_only=True,
        cur_env=labels.LabelledEnv(OGBenchName.parse(name))._env,
    )
    assert rows["oracle_rep"][:37].numpy().tolist() == train["oracle_reps"].tolist()
    batch = buffer.sample()
    assert batch["value_goal"].equal(rows["oracle_rep"][batch["index"][:, -2]])
    assert set(buffer.sampler.goals) == {"value_goal", "actor_goal"}
    buffer.append_transform(buffer.goal_norm())
    loc, scale = buffer.goal_statistics.loc_scale()
    batch = buffer.sample()
    expected = (rows["oracle_rep"][batch["index"][:, -1]] - loc) / scale
    torch.testing.assert_close(batch["actor_goal"], expected)
    val = OGBenchExperienceReplay(name, root=tmp_path / "root", source=shards, split="val")[:]
    assert buffer.goal_statistics.max.equal(val["oracle_rep"].amax(0))


def test_columns_on_request(shards, tmp_path):
    kwargs = {"root": tmp_path / "root", "source": shards}
    assert "qpos" not in OGBenchExperienceReplay(NAME, **kwargs)[:].keys()
    buffer = OGBenchExperienceReplay(NAME, 16, columns=["qpos", "qvel"], chunk_size=4, **kwargs)
    raw = np.concatenate([np.load(shards / f"{NAME}-{k:03}.npz")["qpos"] for k in range(3)])
    assert buffer[:]["qpos"].numpy().tolist() == raw.tolist()
    batch = buffer.sample()
    assert batch["next", "qpos"].numpy().tolist() == raw[batch["index"][:, -1]].tolist()
    with pytest.raises(ValueError, match=r"columns=\['pixels'\] do not exist"):
        OGBenchExperienceReplay(NAME, columns=["pixels"], **kwargs)
    with pytest.raises(ValueError, match="has no 'button_states'"):
        OGBenchExperienceReplay(NAME, columns=["button_states"], **kwargs)


def test_round_trip(shards, tmp_path):
    buffer = OGBenchExperienceReplay(NAME, root=tmp_path / "root", source=shards)
    rows = buffer[:]
    again = tmp_path / "again.npz"
    np.savez(
        again,
        observations=rows["observation"].numpy(),
        actions=rows["action"].numpy(),
        terminals=rows["next", "done"].flatten().numpy(),
    )
    other = OGBenchExperienceReplay(NAME, root=tmp_path / "other", source=again)
    assert (other[:] == rows).all()


@pytest.mark.usefixtures("shared_labels")
def test_verify_finds_a_flipped_bit(shards, tmp_path):
    task = f"{NAME[:-3]}-singletask-task2-v0"
    buffer = OGBenchExperienceReplay(task, root=tmp_path / "root", source=shards)
    folder, lines = buffer.data_path, []
    verify_conversion(folder, lines.append)
    assert len(lines) == 2 and "3 files" in lines[0] and "columns/task2" in lines[1]
    for name, row_bytes, message in (
        ("rows/observation.memmap", 28 * 4, r"'observation' is not .*-001.npz \(rows 37 to 67\)"),
        ("columns/task2/rows/next/reward.memmap", 4, r"'next/reward' is not .*-001.npz"),
    ):
        file = folder / name
        content = file.read_bytes()
        place = 40 * row_bytes
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=message):
            verify_conversion(folder)
        file.write_bytes(content)
    ends = np.load(folder / "episode_ends.npy")
    np.save(folder / "episode_ends.npy", ends[:-1])
    with pytest.raises(ValueError, match="episodes' ends"):
        verify_conversion(folder)
    with pytest.raises(FileNotFoundError, match="not a converted dataset"):
        verify_conversion(tmp_path)


def test_verify_compares_files_with_their_recipe(shards):
    paths = find_shards(shards, NAME)
    files = [{"file": path.name, "sha256": sha256(path)} for path in paths]
    recipe = shards / f"{NAME}.json"
    recipe.write_text(json.dumps({"versions": {"ogbench": "1"}, "files": files}))
    lines = []
    verify_files(paths, lines.append)
    assert len(lines) == 3 and all("as its recipe says" in line for line in lines)
    arrays = dict(np.load(paths[2]))
    arrays["observations"][0, 0] += 1
    np.savez_compressed(paths[2], **arrays)
    with pytest.raises(ValueError, match=rf"{paths[2]} is not what its recipe says"):
        verify_files(paths)


@pytest.mark.usefixtures("shared_labels")
def test_a_large_set_has_a_name_of_its_own(shards, tmp_path):
    name = "cube-single-play-100m-singletask-task2-v0"
    buffer = OGBenchExperienceReplay(
        name, root=tmp_path / "root", source=[shards / f"{NAME}-000.npz"]
    )
    assert buffer.data_path_root.name == "cube-single-play-100m-v0"
    assert str(buffer.name) == name and buffer.name.env_id == "cube-single-singletask-task2-v0"


if __name__ == "__main__":
    pytest.main([__file__])
