import h5py
import numpy as np
import pytest
from recordings import write_aloha, write_demos, write_robomimic

from datamodules.errors import DatasetError
from datamodules.layouts import LAYOUTS, CameraSource, HDF5Schema, detect_layout, natural_key
from datamodules.scan import scan_hdf5


def written(tmp_path, layout):
    if layout == "demos":
        return write_demos(tmp_path / "d.hdf5")
    if layout == "aloha":
        return write_aloha(tmp_path / "a")
    if layout == "aloha_pp":
        return write_aloha(tmp_path / "m", compressed=True, base=True)
    return write_robomimic(tmp_path / "r.hdf5", libero=layout == "libero")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_by_its_signs_alone(tmp_path, layout):
    scan = scan_hdf5(written(tmp_path, layout))
    assert scan.layout == layout
    assert scan.problems == ()


def test_numbers_in_names_count_as_numbers():
    names = [f"demo_{i}" for i in (10, 2, 0, 1, 11)]
    assert sorted(names, key=natural_key) == [f"demo_{i}" for i in (0, 1, 2, 10, 11)]


def test_episodes_come_in_the_order_of_their_numbers(tmp_path):
    lengths = tuple(range(3, 15))
    scan = scan_hdf5(write_demos(tmp_path / "d.hdf5", lengths))
    assert tuple(episode.length for episode in scan.episodes) == lengths


def test_unknown_layout_says_what_was_seen_and_what_was_probably_meant(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        del file.attrs["num_demos"]
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path)
    text = str(error.value)
    assert str(path) in text
    assert "demo_0" in text
    assert "did you mean layout 'demos', which needs the attribute num_demos of the file" in text


def test_two_matching_layouts_are_an_error_that_names_both(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file.create_group("data/demo_0")
        file["data"].attrs["env_args"] = "{}"
    with h5py.File(path) as file, pytest.raises(DatasetError, match="signs of demos and robomimic"):
        detect_layout(file)
    assert scan_hdf5(path, "demos").problems == ()


def test_misspelt_layout_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(DatasetError, match=r"unknown layout 'robomimc'.*did you mean 'robomimic'"):
        scan_hdf5(write_demos(tmp_path / "d.hdf5"), "robomimc")


def test_any_other_file_can_be_declared(tmp_path):
    path = tmp_path / "odd.h5"
    frames = np.arange(4 * 3 * 2 * 5, dtype=np.uint8).reshape(4, 3, 2, 5)
    with h5py.File(path, "w") as file:
        for name in ("traj_0", "traj_1"):
            file[f"{name}/rgb"] = frames
            file[f"{name}/arm"] = np.ones((4, 3))
            file[f"{name}/hand"] = np.full((4, 1), 2)
            file[f"{name}/command"] = np.zeros((4, 2))
    schema = HDF5Schema(
        episode_group="traj_*",
        images={"wrist": CameraSource("rgb", layout="chw")},
        state=("arm", "hand"),
        action=("command",),
        fps=20.0,
    )
    scan = scan_hdf5(path, schema=schema)
    assert scan.problems == ()
    assert (scan.cameras["wrist"].height, scan.cameras["wrist"].width) == (2, 5)
    np.testing.assert_array_equal(scan.episodes[1].columns["state"][0], [1, 1, 1, 2])
    assert scan.fps == 20


def test_masks_of_the_file_decide_the_split(tmp_path):
    scan = scan_hdf5(write_robomimic(tmp_path / "r.hdf5"))
    assert scan.train_episodes == (0, 2)
    assert scan.val_episodes == (1,)


def test_mobile_aloha_joins_the_smoothed_base_to_the_arms(tmp_path):
    folder = write_aloha(tmp_path / "m", lengths=(9,), compressed=True, base=True)
    with h5py.File(folder / "episode_0.hdf5") as file:
        arms, base = file["action"][()], file["base_action"][()]
    actions = scan_hdf5(folder).episodes[0].columns["action"]
    np.testing.assert_array_equal(actions[:, :14], arms)
    np.testing.assert_allclose(actions[4, 14:], base[2:7].mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(("offset", "order"), [(-1, (0, 0, 1, 2)), (1, (1, 2, 3, 3))])
def test_action_offset_pairs_neighbours_and_stays_in_the_episode(tmp_path, offset, order):
    path = write_demos(tmp_path / "d.hdf5", lengths=(4,))
    schema = HDF5Schema(
        images={}, state=("observations/qpos",), action=("actions",), action_offset=offset
    )
    with h5py.File(path) as file:
        stored = file["demo_0/actions"][()]
    shifted = scan_hdf5(path, schema=schema).episodes[0].columns["action"]
    np.testing.assert_array_equal(shifted, stored[list(order)])
