import cv2
import h5py
import numpy as np
import pytest
from recordings import numbers, pictures, smooth_pictures, write_aloha, write_demos, write_robomimic

from datamodules.inspect import draw_strip, inspect_dataset, report


def found_in(path, **options):
    return inspect_dataset(path, progress=False, **options)[0]


@pytest.mark.parametrize(
    ("write", "layout"),
    [(write_demos, "demos"), (write_aloha, "aloha"), (write_robomimic, "robomimic")],
)
def test_good_files_are_described(tmp_path, write, layout):
    found = found_in(write(tmp_path / "good.hdf5"))
    assert found.problems == []
    assert found.layout == layout
    assert found.length_min <= found.length_mean <= found.length_max
    text = report(found)
    assert f"layout    {layout}" in text
    assert "No problem found." in text


def test_predicted_memory_is_what_the_store_takes(tmp_path):
    from datamodules.hdf5 import HDF5DataModule

    path = write_demos(tmp_path / "d.hdf5", cameras=("top", "wrist"))
    data = HDF5DataModule(str(path), chunk_size=3, progress=False)
    data.setup()
    tensors = [*data.store.images.values(), *data.store.columns.values()]
    assert found_in(path).ram_bytes == sum(tensor.nbytes for tensor in tensors)


def test_ranges_are_those_of_the_file(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path) as file:
        actions = np.concatenate([file[f"demo_{i}/actions"][()] for i in range(3)])
    column = found_in(path).columns["action"]
    np.testing.assert_allclose(column.mean, actions.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(column.std, actions.std(axis=0), rtol=1e-5)
    assert column.max == actions.max(axis=0).tolist()


def test_values_that_are_not_finite_are_counted(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        file["demo_1/actions"][2:4] = np.nan
    found = found_in(path)
    assert found.columns["action"].not_finite == 4
    assert (found.episodes, found.bad_episodes) == (2, 1)


def test_every_damaged_picture_is_found_unless_in_haste(tmp_path):
    folder = write_aloha(tmp_path / "a", lengths=(9, 9), compressed=True)
    for episode, frame in ((0, 3), (1, 6)):
        with h5py.File(folder / f"episode_{episode}.hdf5", "a") as file:
            file["observations/images/top"][frame, :2] = 0
    found = found_in(folder)
    assert [problem.key.split(", ")[1] for problem in found.problems] == ["frame 3", "frame 6"]
    assert found.bad_episodes == 2
    assert len(found_in(folder, read_pictures=False).problems) <= 1


def rewritten(path, key, values, **options):
    with h5py.File(path, "a") as file:
        for index in range(3):
            name = f"demo_{index}/{key}"
            made = values(index, len(file[f"demo_{index}/actions"]))
            del file[name]
            file.create_dataset(name, data=made, **options)
    return path


def test_slow_chunks_are_a_warning(tmp_path):
    def large(index, length):
        return pictures(length, 64, 64)

    path = write_demos(tmp_path / "d.hdf5", (20, 20, 20))
    rewritten(path, "observations/image", large, compression="gzip", chunks=(20, 16, 16, 3))
    (warning,) = found_in(path).warnings
    assert "reading one frame at random unpacks 20 times its size" in warning
    assert "CHUNK=1x64x64x3" in warning
    rewritten(path, "observations/image", large, compression="gzip", chunks=(1, 64, 64, 3))
    assert found_in(path).warnings == []


def test_dead_camera_is_a_warning(tmp_path):
    path = write_demos(tmp_path / "d.hdf5")
    rewritten(path, "observations/image", lambda i, n: np.full((n, 6, 8, 3), 17, np.uint8))
    assert "a single colour" in found_in(path).warnings[0]


def test_clipped_actions_are_a_warning_but_switches_are_not(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", (60, 60, 60))
    rewritten(path, "actions", lambda i, n: np.clip(numbers(n, 2, i), -3, 0.5))
    texts = [text for text in found_in(path).warnings if "clipped" in text]
    assert len(texts) == 2
    assert all("at the maximum 0.5" in text for text in texts)
    rewritten(path, "actions", lambda i, n: np.float32(numbers(n, 2, i) > 0))
    assert not any("clipped" in text for text in found_in(path).warnings)


@pytest.mark.parametrize("lag", [-2, 0, 3])
def test_lag_between_action_and_state_is_measured(tmp_path, lag):
    path = write_demos(tmp_path / "d.hdf5", (80, 80, 80))

    def moving(index, first, length):
        return np.cumsum(numbers(120, 2, 500 + index), axis=0)[first : first + length]

    rewritten(path, "actions", lambda i, n: moving(i, 10, n))
    rewritten(path, "observations/qpos", lambda i, n: moving(i, 10 - lag, n))
    found = found_in(path)
    assert found.action_state_lag == lag
    assert any("declare action_offset: 2" in text for text in found.warnings) == (lag == -2)


def test_single_frame_episode_is_a_warning(tmp_path):
    found = found_in(write_demos(tmp_path / "d.hdf5", (5, 1, 7)))
    assert found.problems == []
    assert any("single frame" in text for text in found.warnings)


def test_strip_shows_the_stored_colours(tmp_path):
    _, scan = inspect_dataset(write_aloha(tmp_path / "a", (5, 6), compressed=True), progress=False)
    assert scan is not None
    strip = draw_strip(scan)
    expected = smooth_pictures(5)[0]
    tile = strip[20 + 18 : 20 + 18 + 128, : round(48 * 128 / 32)]
    small = cv2.resize(tile, (48, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).mean() < 6
