import dataclasses
import sys
import threading

import h5py
import numpy as np
import pytest

from envs import collecting, demonstrations
from envs.demonstrations import ScriptedDemonstrations, collect
from envs.push_t import PushT


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("demonstrations") / "demos.hdf5"
    collect(path, n_episodes=3, seed=1, image_size=48, n_workers=0, progress=False)
    with h5py.File(path) as file:
        yield file


def test_the_number_of_workers_leaves_no_trace(file, tmp_path):
    again = tmp_path / "again.hdf5"
    collect(again, n_episodes=3, seed=1, image_size=48, n_workers=2, progress=False)
    with open(file.filename, "rb") as one, open(again, "rb") as other:
        assert one.read() == other.read()


def test_another_seed_gives_other_starts(file, tmp_path):
    path = tmp_path / "other.hdf5"
    collect(path, n_episodes=1, seed=2, image_size=48, n_workers=0, progress=False)
    with h5py.File(path) as other:
        ours = {tuple(file[f"demo_{i}/observations/state"][0]) for i in range(3)}
        assert tuple(other["demo_0/observations/state"][0]) not in ours


def test_counts_agree_with_the_groups(file):
    groups = [file[name] for name in file]
    assert file.attrs["num_demos"] == len(groups) == 3
    lengths = []
    for group in groups:
        arrays = [group[name] for name in ("actions", "rewards", "success")]
        arrays += [group["observations"][name] for name in ("image", "qpos", "state")]
        assert len({len(array) for array in arrays}) == 1
        lengths.append(len(arrays[0]))
        assert group["success"][-1]
        assert group["rewards"][-1] == 1.0
        assert not group["success"][:-1].any()
    assert file.attrs["total_frames"] == sum(lengths)


def test_pictures_show_the_states_beside_them(file):
    env = PushT(48)
    group = file["demo_1"]
    states = group["observations/state"][:]
    for step in range(0, len(states), 7):
        env.reset_to(states[step])
        difference = np.abs(env.image().astype(int) - group["observations/image"][step])
        # The file's states are rounded to float32, which may move an edge by a pixel.
        assert difference.mean() < 0.3
    np.testing.assert_array_equal(states[:, :2], group["observations/qpos"][:])


@pytest.mark.parametrize("start", ["seed", "state"])
def test_actions_replay_to_the_recorded_states(file, start):
    env = PushT()
    for name in file:
        group = file[name]
        states, actions = group["observations/state"][:], group["actions"][:]
        if start == "seed":
            env.reset(int(group.attrs["seed"]))
        else:
            env.reset_to(states[0])
        replayed = []
        for action in actions:
            replayed.append(env.state())
            outcome = env.step(action)
        tolerance = 1e-4 if start == "seed" else 0.05
        np.testing.assert_allclose(replayed, states, atol=tolerance)
        assert outcome.score > 0.95


def test_unsolved_episodes_give_way_to_the_next_seeds(tmp_path, monkeypatch, file):
    play = demonstrations.demonstrate
    first = collecting.SEEDS_PER_DATASET

    def sometimes_fail(seed, *arguments):
        episode = play(seed, *arguments)
        failed = dataclasses.replace(episode, success=np.zeros_like(episode.success))
        return failed if seed == first else episode

    monkeypatch.setattr(demonstrations, "demonstrate", sometimes_fail)
    path = tmp_path / "demos.hdf5"
    report = collect(path, 2, seed=1, image_size=48, n_workers=0, progress=False)
    assert report.failed_seeds == (first,)
    with h5py.File(path) as other:
        for ours, theirs in (("demo_0", "demo_1"), ("demo_1", "demo_2")):
            assert other[ours].attrs["seed"] == file[theirs].attrs["seed"]


def test_nothing_is_overwritten_and_nothing_half_made_is_left(tmp_path, monkeypatch):
    path = tmp_path / "demos.hdf5"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        collect(path, 1, image_size=16, n_workers=0, progress=False)
    assert path.read_text() == "mine"

    def crash(*arguments):
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(demonstrations, "demonstrate", crash)
    with pytest.raises(RuntimeError, match="lights"):
        collect(path, 1, image_size=16, n_workers=0, overwrite=True, progress=False)
    assert [each.name for each in tmp_path.iterdir()] == ["demos.hdf5"]
    assert path.read_text() == "mine"


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        collect(tmp_path / "demos.hdf5", 1, image_size=16, n_workers=1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"n_episodes": 0}, {"seed": -1}, {"image_size": 0}])
def test_impossible_numbers_are_refused(tmp_path, wrong):
    arguments = {"n_episodes": 1, "n_workers": 0, "progress": False} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        collect(tmp_path / "demos.hdf5", **arguments)


def test_the_cache_knows_every_setting_that_matters(tmp_path):
    source = ScriptedDemonstrations(cache_dir=str(tmp_path))
    for change in (
        {"n_episodes": 3},
        {"seed": 1},
        {"image_size": 48},
        {"settle_waits": True},
        {"plan_noise": 5.0},
    ):
        assert dataclasses.replace(source, **change).path != source.path
    assert dataclasses.replace(source, n_workers=1, progress=False).path == source.path


def test_two_runs_make_the_file_once(tmp_path, monkeypatch):
    source = ScriptedDemonstrations(
        n_episodes=1, image_size=16, cache_dir=str(tmp_path), n_workers=0, progress=False
    )
    made, both_here = [], threading.Barrier(2)
    real = demonstrations.collect

    def counted(path, **arguments):
        made.append(path)
        return real(path, **arguments)

    monkeypatch.setattr(demonstrations, "collect", counted)

    def run():
        both_here.wait()
        found.append(source.prepare())

    found = []
    runs = [threading.Thread(target=run) for _ in range(2)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    assert len(made) == 1
    assert found == [source.path] * 2


def test_a_broken_cache_is_named(tmp_path):
    source = ScriptedDemonstrations(n_episodes=1, cache_dir=str(tmp_path))
    source.path.write_bytes(b"\x89HDF\r\n\x1a\n truncated")
    with pytest.raises(ValueError, match=r"push_t_scripted.*delete it"):
        source.prepare()
