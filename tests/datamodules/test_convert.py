"""HDF5 to LeRobot and back: what survives, what does not, and what is left alone."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "0")

import h5py
import numpy as np
import pytest
import torch
from recordings import smooth_pictures, write_aloha, write_demos, write_robomimic

from analyze import main
from datamodules import convert
from datamodules.convert import HDF5Demonstrations, measure_loss, open_demonstrations
from datamodules.hdf5 import HDF5DataModule
from datamodules.lerobot import LeRobotDataModule

LENGTHS = (5, 9, 7)


@pytest.fixture
def demos(tmp_path) -> Path:
    """Two cameras with pictures that survive a film, and a task per episode."""
    path = write_demos(tmp_path / "demos.hdf5", LENGTHS, cameras=("top", "wrist"))
    with h5py.File(path, "a") as file:
        for index, length in enumerate(LENGTHS):
            for camera, turned in (("top", 1), ("wrist", -1)):
                key = f"demo_{index}/observations/images/{camera}"
                del file[key]
                file[key] = smooth_pictures(length)[:, ::turned]
            file[f"demo_{index}"].attrs["task"] = f"push {index}"
    return path


def convert_to(form: str, source: Path, target: Path, *options: str) -> int:
    words = ["--dataset_repo_id", str(source), "--output_dir", str(target), "--to", form]
    return main(["convert", *words, *options])


def batch_of(data):
    data.setup()
    samples = data.dataset(sorted(data.split["train"]))
    return samples.__getitems__(range(len(samples)))


def ours(kind, path):
    settings = {"chunk_size": 4, "val_fraction": 0.0, "storage": "ram", "progress": False}
    return kind(str(path), **settings)


def equal_but_pictures(one, other) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("actions", "action_is_pad", "episode_index", "frame_index", "simulator_state")
    ) and torch.equal(one.observation.state, other.observation.state)


def test_pictures_as_images_keep_every_bit_there_and_back(demos, tmp_path, capsys):
    assert convert_to("lerobot", demos, tmp_path / "set", "--video", "false") == 0
    said = capsys.readouterr().out
    assert "camera top: lossless" in said
    assert "the simulator state is observation.environment_state" in said
    assert convert_to("hdf5", tmp_path / "set", tmp_path / "back") == 0
    before = batch_of(ours(HDF5DataModule, demos))
    between = batch_of(ours(LeRobotDataModule, tmp_path / "set"))
    after = batch_of(ours(HDF5DataModule, tmp_path / "back" / "demos.hdf5"))
    for other in (between, after):
        assert equal_but_pictures(before, other)
        assert list(other.observation.images) == ["top", "wrist"]
        for name, pictures in before.observation.images.items():
            assert torch.equal(pictures, other.observation.images[name])
    with h5py.File(tmp_path / "back" / "demos.hdf5") as file:
        assert file.attrs["fps"] == 10
        assert file["demo_2"].attrs["task"] == "push 2"


def test_films_lose_little_and_say_how_much(demos, tmp_path, capsys):
    assert convert_to("lerobot", demos, tmp_path / "set") == 0
    said = capsys.readouterr().out
    assert "camera wrist: lossy (AV1, 4:2:0): PSNR median" in said
    before = batch_of(ours(HDF5DataModule, demos))
    after = batch_of(ours(LeRobotDataModule, tmp_path / "set"))
    assert equal_but_pictures(before, after)
    for name, pictures in before.observation.images.items():
        errors = (pictures.double() - after.observation.images[name].double()).square()
        psnr = 10 * torch.log10(255**2 / errors.mean(dim=(1, 2, 3)))
        assert 30 < psnr.min() < np.inf
        found = measure_loss(*map(open_demonstrations, (str(demos), str(tmp_path / "set"))))[name]
        # All 21 frames are among the 24 compared ones.
        assert found.frames == sum(LENGTHS)
        assert found.psnr_min_db == pytest.approx(psnr.min().item())
        assert found.psnr_median_db == pytest.approx(np.median(psnr.numpy()))


@pytest.mark.parametrize("video", ["true", "false"])
def test_lerobot_loads_what_was_written(demos, tmp_path, video):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    arguments = ["--video", video, "--repo_id", "me/pushing"]
    assert convert_to("lerobot", demos, tmp_path / "set", *arguments) == 0
    ahead = [step / 10 for step in range(4)]
    theirs = LeRobotDataset(
        "me/pushing",
        root=tmp_path / "set",
        delta_timestamps={"action": ahead},
        video_backend="pyav",
    )
    batch = batch_of(ours(LeRobotDataModule, tmp_path / "set"))
    assert len(theirs) == len(batch)
    for index in range(len(theirs)):
        item = theirs[index]
        assert torch.equal(item["action"], batch.actions[index])
        assert torch.equal(
            item["observation.images.top"], batch.observation.images["top"][index] / 255
        )
        assert torch.equal(item["observation.environment_state"], batch.simulator_state[index])
        assert item["task"] == f"push {int(item['episode_index'])}"


def test_a_single_camera_called_image_keeps_its_key(tmp_path):
    source = write_demos(tmp_path / "d.hdf5", LENGTHS)
    assert convert_to("lerobot", source, tmp_path / "set", "--video", "false") == 0
    assert convert_to("hdf5", tmp_path / "set", tmp_path / "back.hdf5") == 0
    with h5py.File(source) as before, h5py.File(tmp_path / "back.hdf5") as after:
        for key in ("image", "qpos", "state"):
            name = f"demo_1/observations/{key}"
            np.testing.assert_array_equal(before[name][()], after[name][()])


def test_both_states_of_robomimic_survive(tmp_path):
    source = write_robomimic(tmp_path / "r.hdf5")
    before = HDF5Demonstrations(source)
    assert set(before.episodes[0].columns) >= {"environment_state", "simulator_state"}
    arguments = ["--video", "false", "--fps", "20", "--task", "lift"]
    assert convert_to("lerobot", source, tmp_path / "set", *arguments) == 0
    after = open_demonstrations(str(tmp_path / "set"))
    assert after.fps == 20
    for one, other in zip(before.episodes, after.episodes, strict=True):
        assert other.task == "lift"
        for name, values in one.columns.items():
            np.testing.assert_array_equal(values, other.columns[name])


def test_a_folder_of_jpeg_is_decoded_first(tmp_path):
    source = write_aloha(tmp_path / "aloha", (5, 6), compressed=True)
    assert convert_to("lerobot", source, tmp_path / "set", "--fps", "50", "--video", "false") == 0
    loss = measure_loss(HDF5Demonstrations(source), open_demonstrations(str(tmp_path / "set")))
    assert loss["top"].psnr_min_db == np.inf


def nothing_beside(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


def test_nothing_is_replaced_unasked_and_nothing_foreign_at_all(demos, tmp_path, capsys):
    target = tmp_path / "set"
    assert convert_to("lerobot", demos, target, "--video", "false") == 0
    content = (target / "meta" / "info.json").read_bytes()
    assert convert_to("lerobot", demos, target, "--video", "false") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (target / "meta" / "info.json").read_bytes() == content
    assert (
        convert_to("lerobot", demos, target, "--fps", "5", "--video", "false", "--overwrite") == 0
    )
    assert open_demonstrations(str(target)).fps == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert convert_to("lerobot", demos, tmp_path / "mine", "--video", "false", "--overwrite") == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert nothing_beside(tmp_path, "demos.hdf5", "set", "mine")


def test_a_failure_leaves_no_trace(demos, tmp_path, monkeypatch):
    """Also when an older data set was to be replaced."""
    target = tmp_path / "set"
    assert convert_to("lerobot", demos, target, "--video", "false") == 0
    content = (target / "meta" / "info.json").read_bytes()

    def fail(*arguments):
        raise ValueError("interrupted")

    monkeypatch.setattr(convert, "_check_columns", fail)
    for form, place in (("lerobot", target), ("lerobot", tmp_path / "new"), ("hdf5", tmp_path)):
        source = demos if form == "lerobot" else target
        options = ["--video", "false"] if form == "lerobot" else []
        assert convert_to(form, source, place, *options, "--overwrite") == 1
    assert (target / "meta" / "info.json").read_bytes() == content
    assert nothing_beside(tmp_path, "demos.hdf5", "set")


def spoil(path: Path, key: str, value) -> None:
    with h5py.File(path, "a") as file:
        file[key][2] = value


@pytest.mark.parametrize(
    ("prepare", "options", "what"),
    [
        (lambda f: spoil(f, "demo_1/actions", np.nan), [], "/demo_1/actions: "),
        (lambda f: write_demos(f, LENGTHS), [], "8 x 6 px, and LeRobot's video encoder needs"),
        (lambda f: None, ["--fps", "12.5"], "fps is 12.5; LeRobot takes whole Hz"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    demos, tmp_path, capsys, prepare, options, what
):
    prepare(demos)
    assert convert_to("lerobot", demos, tmp_path / "set", *options) == 1
    assert what in capsys.readouterr().err
    assert nothing_beside(tmp_path, "demos.hdf5")


def test_an_unstated_rate_must_be_given(tmp_path, capsys):
    source = write_robomimic(tmp_path / "r.hdf5")
    assert convert_to("lerobot", source, tmp_path / "set", "--video", "false") == 1
    assert "give it with --fps" in capsys.readouterr().err


def test_source_and_target_must_not_overlap(demos, tmp_path, capsys):
    assert convert_to("lerobot", demos, tmp_path / "set", "--video", "false") == 0
    assert convert_to("hdf5", tmp_path / "set", tmp_path / "set" / "inside") == 1
    assert convert_to("hdf5", demos, demos, "--overwrite") == 1
    assert convert_to("lerobot", tmp_path / "set", tmp_path / "again") == 1
    said = capsys.readouterr().err
    assert said.count("overlaps the source") == 2
    assert "is a LeRobot data set already" in said
