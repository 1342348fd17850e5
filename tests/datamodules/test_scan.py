"""Broken recordings: one message that names file, key and mend."""

import math
import pickle
import random

import h5py
import numpy as np
import pytest
from recordings import (
    as_padded_jpeg,
    numbers,
    pictures,
    smooth_pictures,
    write_aloha,
    write_demos,
    write_robomimic,
)

from datamodules.errors import DatasetError
from datamodules.hdf5 import HDF5DataModule
from datamodules.layouts import CameraSource, HDF5Schema
from datamodules.scan import scan_hdf5


def replace(file, key, values, **options):
    del file[key]
    file.create_dataset(key, data=values, **options)


def delete(key):
    def breaks(file):
        del file[key]

    return breaks


def set_to(key, values):
    return lambda file: replace(file, key, values)


def nan_at_a_known_place(file):
    values = file["demo_1/actions"][()]
    values[4, 1] = np.nan
    values[6, 0] = np.inf
    replace(file, "demo_1/actions", values)


def never_written(file):
    del file["demo_1/actions"]
    file.create_dataset("demo_1/actions", (9, 2), "f4", chunks=(1, 2))


def fps_nonsense(file):
    file.attrs["fps"] = 0


def fps_differs(file):
    file["demo_1"].attrs["fps"] = 30


def wrong_count(file):
    file.attrs["num_demos"] = 7


def wrong_samples(file):
    file["demo_1"].attrs["num_samples"] = 3


def empty_episode(file):
    for key in list(file["demo_1"]):
        del file[f"demo_1/{key}"]


def zero_length(file):
    replace(file, "demo_1/observations/image", pictures(0))
    replace(file, "demo_1/observations/qpos", numbers(0, 2, 0))
    replace(file, "demo_1/observations/state", numbers(0, 5, 0))
    replace(file, "demo_1/actions", numbers(0, 2, 0))


# What breaks, the key that must be named, what must be said, the mend.
BROKEN = {
    "missing key": (
        delete("demo_1/observations/qpos"),
        "/demo_1/observations/qpos",
        "missing key; the episode holds actions",
        "record it, or declare",
    ),
    "not finite": (
        nan_at_a_known_place,
        "/demo_1/actions",
        "2 of 18 values are not finite (1 NaN), the first at step 4, dimension 1",
        "skip_bad_episodes: true",
    ),
    "unequal lengths": (
        set_to("demo_1/observations/qpos", numbers(6, 2, 0)),
        "/demo_1",
        "unequal lengths: actions 9, observations/qpos 6",
        "skip_bad_episodes",
    ),
    "rank": (
        set_to("demo_1/actions", np.zeros(9, np.float32)),
        "/demo_1/actions",
        "has the shape (9,), not (steps, dimensions)",
        "(steps, 1)",
    ),
    "type": (
        set_to("demo_1/actions", np.full((9, 2), b"x")),
        "/demo_1/actions",
        "has the type |S1, not numbers",
        "skip_bad_episodes",
    ),
    "picture type": (
        set_to("demo_1/observations/image", pictures(9).astype(np.uint16)),
        "/demo_1/observations/image",
        "pictures of the type uint16",
        "store uint8",
    ),
    "picture rank": (
        set_to("demo_1/observations/image", np.zeros((9, 6, 8), np.uint8)),
        "/demo_1/observations/image",
        "has the shape (9, 6, 8)",
        "declare schema.images",
    ),
    "grey": (
        set_to("demo_1/observations/image", np.ones((9, 6, 8, 1), np.uint8)),
        "/demo_1/observations/image",
        "has 1 channels",
        "store three RGB channels",
    ),
    "channels first": (
        set_to("demo_1/observations/image", np.ones((9, 3, 6, 8), np.uint8)),
        "/demo_1/observations/image",
        "has 8 channels",
        "declare layout: chw",
    ),
    "picture size": (
        set_to("demo_1/observations/image", pictures(9, 5, 5)),
        "/demo_1/observations/image",
        "pictures of 5x5 px; the first episode has 6x8",
        "skip_bad_episodes",
    ),
    "dimensions": (
        set_to("demo_1/actions", numbers(9, 3, 0)),
        "/demo_1",
        "action has 3 dimensions; the first episode has 2",
        "skip_bad_episodes",
    ),
    "zero length": (zero_length, "/demo_1", "zero-length episode", "skip_bad_episodes"),
    "empty episode": (empty_episode, "/demo_1", "the episode is empty", "skip_bad_episodes"),
    "a group": (
        lambda f: (f.__delitem__("demo_1/actions"), f.create_group("demo_1/actions/x")),
        "/demo_1/actions",
        "is a group, not a data set; it holds x",
        "declare its path",
    ),
    "never written": (
        never_written,
        "/demo_1/actions",
        "created but never written",
        "skip_bad_episodes",
    ),
    "num_demos": (
        wrong_count,
        "@num_demos",
        "num_demos is 7 but the file holds 3 episodes",
        "set num_demos to 3",
    ),
    "num_samples": (
        wrong_samples,
        "/demo_1@num_samples",
        "num_samples is 3 but the episode has 9",
        "set it to 9",
    ),
    "fps": (fps_nonsense, "/@fps", "fps is 0", "control frequency in Hz"),
    "two fps": (fps_differs, "/demo_1@fps", "fps is 30 here and 10 elsewhere", "resample"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_named_with_key_and_mend(tmp_path, case):
    breaks, key, what, mend = BROKEN[case]
    path = write_demos(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as file:
        breaks(file)
    scan = scan_hdf5(path)
    with pytest.raises(DatasetError) as error:
        scan.require_usable()
    (line,) = (line for line in str(error.value).splitlines() if what in line)
    assert f"{path}: {key}" in line
    assert mend in line.split("Mend:")[1]


def test_all_problems_of_a_file_are_listed_at_once(tmp_path):
    path = write_demos(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as file:
        wrong_count(file)
        nan_at_a_known_place(file)
        del file["demo_2/observations/qpos"]
        replace(file, "demo_0/actions", numbers(3, 2, 0))
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path).require_usable()
    assert [problem.episode for problem in error.value.problems] == [None, 0, 1, 2]
    assert str(error.value).startswith(f"{path}: 4 problems")


def test_many_problems_of_one_kind_are_counted_not_spelt_out(tmp_path):
    path = write_demos(tmp_path / "broken.hdf5", lengths=(3,) * 20)
    with h5py.File(path, "a") as file:
        for index in range(1, 20):
            del file[f"demo_{index}/actions"]
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path).require_usable()
    assert len(error.value.problems) == 19
    assert "and 16 more of this kind" in str(error.value)
    assert len(str(error.value).splitlines()) == 5


def test_misnamed_key_is_answered_with_the_nearest_name(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file.move("demo_1/actions", "demo_1/action")
    assert "did you mean action?" in str(scan_hdf5(path).problems[0])


def test_bad_episodes_can_be_left_out_and_the_others_keep_their_numbers(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        nan_at_a_known_place(file)
    scan = scan_hdf5(path)
    scan.require_usable(skip_bad_episodes=True)
    assert [episode.number for episode in scan.episodes] == [0, 2]
    with h5py.File(path, "a") as file:
        wrong_count(file)
    with pytest.raises(DatasetError, match="num_demos"):
        scan_hdf5(path).require_usable(skip_bad_episodes=True)


@pytest.mark.parametrize("name", ["..", "...", ".hidden", "a\\b", "a\nb", "x" * 201])
def test_camera_names_that_could_leave_a_folder_are_refused(tmp_path, name):
    path = write_demos(tmp_path / "d.hdf5", cameras=("top",))
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["observations/images"].create_dataset("temporary", data=pictures(3))
            group["observations/images"].move("temporary", name)
    (problem,) = scan_hdf5(path).problems
    assert "cannot name a camera" in problem.what
    assert problem.episode is None


@pytest.mark.parametrize("name", ["cam(1)", "left @ 30", "x..y", "überblick"])
def test_other_names_of_cameras_are_taken_as_they_are(tmp_path, name):
    path = write_demos(tmp_path / "d.hdf5", cameras=("top",))
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["observations/images"].move("top", name)
    data = HDF5DataModule(
        str(path), chunk_size=2, storage="memmap", cache_dir=str(tmp_path), progress=False
    )
    data.setup()
    assert set(data.train_dataset[0].observation.images) == {name}


def test_nothing_there_empty_folder_and_lerobot_folder(tmp_path):
    with pytest.raises(DatasetError, match="no such file or folder"):
        scan_hdf5(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no file matches"):
        scan_hdf5(tmp_path / "empty")
    (tmp_path / "lerobot" / "meta").mkdir(parents=True)
    (tmp_path / "lerobot" / "meta" / "info.json").write_text("{}")
    with pytest.raises(DatasetError, match="is a LeRobot data set"):
        scan_hdf5(tmp_path / "lerobot")


def test_file_without_episodes(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=())
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path, "demos").require_usable()
    assert "no group matches demo_*" in str(error.value)


@pytest.mark.parametrize(("top", "scale"), [(1.0, 255.0), (255.0, 1.0)])
def test_floating_point_pictures_are_recognised_and_said(tmp_path, top, scale):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        for group in file.values():
            frames = group["observations/image"][()] / np.float32(255 / top)
            replace(group, "observations/image", frames.astype(np.float32))
    scan = scan_hdf5(path)
    assert scan.problems == ()
    assert math.isclose(scan.cameras["image"].scale or 0, scale)
    assert "floating-point pictures, taken as 0.." in scan.notes[0]


def test_one_more_observation_than_actions_is_accepted(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=(5,))
    with h5py.File(path, "a") as file:
        replace(file, "demo_0/actions", numbers(4, 2, 0))
    (episode,) = scan_hdf5(path).episodes
    assert episode.length == 4
    assert {len(values) for values in episode.columns.values()} == {4}


def test_masks_must_name_episodes_and_not_overlap(tmp_path):
    path = write_robomimic(tmp_path / "r.hdf5")
    with h5py.File(path, "a") as file:
        replace(file, "mask/train", np.array([b"demo_0", b"demo_9"]))
        replace(file, "mask/valid", np.array([b"demo_0"]))
    texts = [problem.what for problem in scan_hdf5(path).problems]
    assert "names episodes that are not in the file: demo_9" in texts
    assert "episodes [0] are in mask/train too" in texts


def test_depth_is_left_out_and_said(tmp_path):
    scan = scan_hdf5(write_aloha(tmp_path / "a", cameras=("top", "top_depth")))
    assert list(scan.cameras) == ["top"]
    assert "top_depth" in scan.notes[0]


def test_declared_camera_that_is_missing(tmp_path):
    schema = HDF5Schema(images={"top": CameraSource("observations/imag")}, action=("actions",))
    scan = scan_hdf5(write_demos(tmp_path / "d.hdf5", lengths=(4,)), schema=schema)
    assert "did you mean observations/image?" in str(scan.problems[0])


def test_first_compressed_picture_that_is_none(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=(4,))
    with h5py.File(path, "a") as file:
        replace(file, "demo_0/observations/image", as_padded_jpeg(smooth_pictures(4))[:, 9:])
    (problem,) = scan_hdf5(path).problems
    assert problem.key == "/demo_0/observations/image, frame 0"
    assert "neither JPEG nor PNG" in problem.what


def test_copies_of_an_episode_are_a_warning(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file.copy("demo_1", "demo_3")
        file.attrs["num_demos"] = 4
    scan = scan_hdf5(path)
    assert scan.problems == ()
    assert "repeats episode 1" in scan.warnings[0]


def test_the_error_survives_a_process_boundary(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", lengths=())
    with pytest.raises(DatasetError) as error:
        scan_hdf5(path, "demos").require_usable()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bits_never_end_in_a_traceback(tmp_path, seed):
    """Damage in the structure of a file makes h5py raise errors of many kinds."""
    rng = random.Random(seed)
    path = (write_demos if seed % 2 else write_robomimic)(tmp_path / "d.hdf5")
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        problems = scan_hdf5(path).problems
    except DatasetError as error:
        problems = error.problems
    assert all(problem.file == str(path) and problem.mend for problem in problems)
