import dataclasses

import h5py
import numpy as np
import pytest
from aloha_pictures import DRAWN_EVERY, draw_rarely

from datamodules.inspect import inspect_dataset, report
from datamodules.scan import scan_hdf5
from envs import aloha_demonstrations, collecting
from envs.aloha import AlohaTransferCube
from envs.aloha_demonstrations import AlohaScriptedDemonstrations, collect, play
from envs.aloha_expert import AlohaExpert, AlohaExpertConfig

SIZE = (24, 32)
CAMERAS = ("top", "angle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, graphics):
    path = tmp_path_factory.mktemp("aloha") / "demos"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_rarely(monkeypatch)
        report = collect(
            path, 2, seed=1, cameras=CAMERAS, image_size=SIZE, n_workers=0, progress=False
        )
    assert report.failed_seeds == ()
    return path


def test_the_expert_hands_the_cube_over_and_moves_smoothly():
    env = AlohaTransferCube(("top",), SIZE)
    for variation in (0.0, 1.0):
        expert = AlohaExpert(AlohaExpertConfig(variation))
        actions, rewards = play(env, expert, 4)
        # Handed over, and held to the end.
        assert set(rewards[-20:]) == {4}
        assert list(rewards[:60]) == [0] * 60
        joints = np.delete(actions, [6, 13], axis=1)
        # No jump: the quickest joint turns by less than 5 rad/s.
        assert np.abs(np.diff(joints, axis=0)).max() < 0.1


def test_grip_points_are_where_the_cube_is_held():
    env = AlohaTransferCube(("top",), SIZE)
    env.reset(4)
    held_mm = {}
    for step, action in enumerate(AlohaExpert().plan(env, 4)):
        env.step(action)
        points = env.grip_points(env.joints())
        held_mm[step] = np.linalg.norm(points - env.cube_pose()[:3], axis=1) * 1000
    for step in (200, 250):
        assert held_mm[step][1] < 6
    # The left gripper is sent 8 mm short of the middle.
    for step in (350, 399):
        assert held_mm[step][0] < 9


def test_variation_changes_the_plan_and_not_the_start():
    env = AlohaTransferCube(("top",), SIZE)
    env.reset(7)
    same = [AlohaExpert().plan(env, seed) for seed in (1, 2)]
    np.testing.assert_array_equal(*same)
    varied = [AlohaExpert(AlohaExpertConfig(1.0)).plan(env, seed) for seed in (1, 2)]
    assert np.abs(varied[0] - varied[1]).max() > 0.05
    with pytest.raises(ValueError, match="variation: 2"):
        AlohaExpertConfig(2.0)


def test_the_files_have_the_layout_of_the_act_paper(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["episode_0.hdf5", "episode_1.hdf5"]
    with h5py.File(folder / "episode_1.hdf5") as file:
        assert file.attrs["sim"]
        assert file["action"].shape == (400, 14)
        assert file["observations/qpos"].shape == file["observations/qvel"].shape == (400, 14)
        # h5py's default, which is what ACT's own recorder leaves: its loader cannot read float64.
        for name in ("action", "observations/qpos", "observations/qvel"):
            assert file[name].dtype == np.float32
        assert set(file["observations/images"]) == set(CAMERAS)
        for camera in CAMERAS:
            pictures = file[f"observations/images/{camera}"]
            assert pictures.shape == (400, *SIZE, 3)
            assert pictures.dtype == np.uint8
            assert pictures.chunks == (1, *SIZE, 3)
        assert file["rewards"][:].max() == 4


def test_inspection_finds_the_layout_and_no_problem(folder):
    scan = scan_hdf5(folder)
    scan.require_usable()
    assert scan.layout == "aloha"
    assert scan.fps == 50
    assert [episode.length for episode in scan.episodes] == [400, 400]
    assert scan.episodes[0].columns["simulator_state"].shape == (400, 67)
    assert scan.episodes[0].columns["state"].shape == (400, 14)
    told = report(inspect_dataset(folder, progress=False)[0])
    ranges = told.split("Ranges, per dimension")[1].split("Schema")[0]
    assert "\n  state   " in ranges
    # 67 rows that nobody reads; that they are there is said once.
    assert "simulator_state" not in ranges
    assert "simulator state  yes" in told


def test_actions_replay_to_the_recorded_states_to_the_bit(folder):
    env = AlohaTransferCube(("top",), SIZE)
    for name in ("episode_0.hdf5", "episode_1.hdf5"):
        with h5py.File(folder / name) as file:
            states = file["observations/simulator_state"][:]
            actions, rewards = file["action"][:], file["rewards"][:]
            joints = file["observations/qpos"][:]
            env.reset(int(file.attrs["seed"]))
        np.testing.assert_array_equal(env.state(), states[0])
        env.reset_to(states[100])
        for step in range(100, 300):
            np.testing.assert_array_equal(env.state(), states[step])
            np.testing.assert_array_equal(env.joints().astype(np.float32), joints[step])
            assert env.step(actions[step]).reward == rewards[step]


def test_pictures_show_the_states_beside_them(folder):
    env = AlohaTransferCube(CAMERAS, SIZE)
    with h5py.File(folder / "episode_1.hdf5") as file:
        for step in range(0, 400, DRAWN_EVERY):
            env.reset_to(file["observations/simulator_state"][step])
            for camera in CAMERAS:
                shown = file[f"observations/images/{camera}"][step]
                np.testing.assert_array_equal(env.image(camera), shown)
    env.close()


def test_unsolved_episodes_give_way_to_the_next_seeds(tmp_path, monkeypatch, graphics):
    draw_rarely(monkeypatch)
    real = aloha_demonstrations.play
    first = collecting.SEEDS_PER_DATASET

    def sometimes_fail(env, expert, seed):
        if seed == first:
            return np.zeros((400, 14)), np.zeros(400)
        return real(env, expert, seed)

    monkeypatch.setattr(aloha_demonstrations, "play", sometimes_fail)
    path = tmp_path / "demos"
    report = collect(path, 1, seed=1, image_size=(8, 8), n_workers=0, progress=False)
    assert report.failed_seeds == (first,)
    with h5py.File(path / "episode_0.hdf5") as file:
        assert file.attrs["seed"] == first + 1


def test_nothing_is_overwritten_and_nothing_half_made_is_left(tmp_path, monkeypatch, graphics):
    path = tmp_path / "demos"
    path.mkdir()
    with pytest.raises(FileExistsError, match="another path"):
        collect(path, 1, n_workers=0, progress=False)
    path.rmdir()

    def crash(*arguments):
        raise RuntimeError("the lights went out")

    monkeypatch.setattr(aloha_demonstrations, "play", crash)
    with pytest.raises(RuntimeError, match="lights"):
        collect(path, 1, image_size=(8, 8), n_workers=0, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_cache_knows_every_setting_that_matters(tmp_path):
    source = AlohaScriptedDemonstrations(cache_dir=str(tmp_path))
    changes = (
        {"n_episodes": 3},
        {"seed": 1},
        {"cameras": ("top", "angle")},
        {"image_size": (48, 64)},
        {"variation": 0.5},
    )
    paths = {dataclasses.replace(source, **change).path for change in changes}
    assert len(paths | {source.path}) == len(changes) + 1
    assert dataclasses.replace(source, n_workers=1, progress=False).path == source.path


def test_a_cache_is_used_again_and_a_broken_one_is_named(tmp_path, monkeypatch):
    source = AlohaScriptedDemonstrations(n_episodes=2, cache_dir=str(tmp_path))
    source.path.mkdir()
    for number in range(2):
        (source.path / f"episode_{number}.hdf5").touch()
    monkeypatch.setattr(aloha_demonstrations, "collect", lambda *_, **__: pytest.fail("made anew"))
    assert source.prepare() == source.path
    (source.path / "episode_1.hdf5").unlink()
    with pytest.raises(ValueError, match="holds 1 episodes, not 2; delete it"):
        source.prepare()


@pytest.mark.parametrize("wrong", [{"n_episodes": 0}, {"seed": -1}, {"n_workers": -1}])
def test_impossible_numbers_are_refused(tmp_path, wrong):
    arguments = {"n_episodes": 1, "n_workers": 0, "progress": False} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        collect(tmp_path / "demos", **arguments)
