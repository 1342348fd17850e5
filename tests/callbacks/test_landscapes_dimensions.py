"""Landscapes of 14 dimensions at checkpoints: planes, single dimensions, projection, all named."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from lightning.pytorch import LightningModule
from pusht_runs import DataOnly, act, ready
from toy_arms import ToyArms, ToyArmsTask, write_arms

from callbacks.landscapes import Landscapes
from callbacks.schedule import undisturbed
from datamodules.hdf5 import HDF5DataModule
from envs.push_t import PushTTask
from landscapes.methods import Confidence, Reconstruction
from policies.interface import Findings
from rendering.report.explanations import FAMILIES, MEANINGS, PICTURES

NAMES = [axis.name for axis in ToyArmsTask().action_dimensions]
PLANE = "right_0-right_1"


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> tuple[HDF5DataModule, LightningModule]:
    path = write_arms(tmp_path_factory.mktemp("arms") / "arms.hdf5", n_episodes=6, length=12)
    datamodule = HDF5DataModule(
        str(path), batch_size=4, chunk_size=6, val_fraction=0.6, progress=False
    )
    datamodule.setup()
    return datamodule, ready(datamodule, act(datamodule))


def studying(**changes: Any) -> Landscapes:
    settings = {
        "horizons": [0, 4],
        "n_samples": 4,
        "action_resolution": 24,
        "frame_stride": 4,
        "n_train_episodes": 0,
        "n_evidence_frames": 2,
        "n_video_steps": 0,
        "n_strip_frames": 2,
        "target_height": 180,
        "strict": True,
        "max_share": None,
        "task": ToyArmsTask(),
    }
    return Landscapes(**{**settings, **changes})


def study(folder: Path, arms: tuple[HDF5DataModule, LightningModule], **knobs: Any) -> Findings:
    datamodule, module = arms
    folder.mkdir(parents=True, exist_ok=True)
    with undisturbed(module):
        return studying(**knobs).diagnose(DataOnly(datamodule), module, folder)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def found(arms, tmp_path_factory) -> Findings:
    folder = tmp_path_factory.mktemp("found")
    return study(folder, arms, n_video_steps=4, n_train_episodes=2)


def test_a_checkpoint_shows_the_plane_the_dimensions_and_where_actions_lead(found):
    assert {*found.images} == {
        "landscape/strip",
        "landscape/marginals",
        "landscape/marginals_along",
        "landscape/projection_strip",
    }
    assert {*found.videos} == {"landscape/video", "landscape/projection"}
    for path in found.images.values():
        assert np.ptp(cv2.imread(path)) > 100


def test_numbers_are_named_by_dimension_and_finite(found):
    for k in (0, 4):
        for part in ("", *(f"{name}/" for name in NAMES), f"{PLANE}/"):
            for name in ("nll", "c80", "c95", "energy"):
                assert math.isfinite(found.scalars[f"landscape/val/k{k}/{part}{name}"])
        for name in NAMES:
            assert found.scalars[f"calib/val/k{k}/b_{name}"] > 0
        assert f"landscape/train/k{k}/nll" in found.scalars
    assert not [key for key in found.scalars if key.endswith(("b_x", "b_y", "sigma_z_px"))]
    assert not [key for key in found.scalars if key.startswith("landscape/train/k0/left")]


def test_the_report_knows_what_everything_is(found):
    for key in found.scalars:
        # The ends of an interval belong to the number between them.
        number = re.sub(r"_(low|high)$", "", key)
        assert any(re.fullmatch(pattern, number) for pattern, _ in MEANINGS), key
    for key in [*found.images, *found.videos, *found.tables]:
        assert any(re.fullmatch(picture.pattern, key) for picture in PICTURES), key


def test_dimensions_share_a_chart_and_chunk_steps_of_all_at_once_another():
    def family(key: str) -> tuple[int, str]:
        place, match = next(
            (i, match)
            for i, pattern in enumerate(FAMILIES)
            if (match := re.fullmatch(pattern, key))
        )
        return place, match["of"]

    left, right = (family(f"landscape/val/k0/{name}/nll") for name in ("left_0", "right_0"))
    assert left[0] == right[0]
    assert (left[1], right[1]) == ("left_0", "right_0")
    assert family("landscape/val/k0/nll")[1] == "k0"


def test_planes_are_what_was_asked_for(arms, tmp_path):
    found = study(tmp_path, arms, action_dims=[["left_3", 9], [0, 1]], n_video_steps=3)
    assert "landscape/val/k0/left_3-right_2/nll" in found.scalars
    assert {"landscape/strip", "landscape/strip_left_0-left_1"} <= {*found.images}
    assert {"landscape/video", "landscape/video_left_0-left_1"} <= {*found.videos}
    assert f"landscape/val/k0/{PLANE}/nll" not in found.scalars


def test_without_a_task_dimensions_have_numbers(arms, tmp_path):
    found = study(tmp_path, arms, task=None)
    assert "landscape/val/k0/action_7-action_8/nll" in found.scalars
    assert "landscape/val/k4/action_13/c95" in found.scalars
    assert "landscape/projection_strip" not in found.images
    assert "landscape/marginals" in found.images


def test_the_same_study_gives_the_same_numbers_whatever_is_drawn(arms, found, tmp_path):
    again = study(tmp_path, arms, method=Confidence())
    ours = {key: value for key, value in again.scalars.items() if key.startswith("landscape/val")}
    assert ours
    for key, value in ours.items():
        assert value == pytest.approx(found.scalars[key], rel=1e-9), key


def test_what_does_not_fit_stops_before_training(arms):
    datamodule, module = arms
    about = DataOnly(datamodule), module
    with pytest.raises(ValueError, match="describes 2 action dimensions, the data have 14"):
        studying(task=PushTTask()).on_fit_start(*about)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="recon: scores whole actions"):
        studying(method=Reconstruction()).on_fit_start(*about)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="action_dims wrist"):
        studying(action_dims=[[0, "wrist"]]).on_fit_start(*about)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="give pairs"):
        studying(action_dims=[[0, 1, 2]])


class SilentArms:
    """The same arms, that cannot say where in a picture an action leads."""

    def __init__(self):
        self._arms = ToyArms()

    def __getattr__(self, name: str) -> Any:
        if name in ("project_actions", "end_effectors"):
            raise AttributeError(name)
        return getattr(self._arms, name)


@dataclass(frozen=True)
class SilentTask(ToyArmsTask):
    def make(self) -> Any:
        return SilentArms()


def test_a_projection_does_not_change_the_numbers(arms, found, tmp_path):
    """Draws for pictures have random numbers of their own."""
    silent = study(tmp_path, arms, task=SilentTask(), n_train_episodes=2)
    assert not [key for key in silent.images if "projection" in key]
    assert "landscape/projection_strip" in found.images
    assert silent.scalars == found.scalars


class BlindArms(ToyArms):
    """One camera has another name here than in the data."""

    def project_actions(
        self, camera: str, actions: np.ndarray, size_px: tuple[int, int]
    ) -> np.ndarray:
        if camera == "side":
            raise ValueError("camera 'side': there are top and wrist")
        return super().project_actions(camera, actions, size_px)


@dataclass(frozen=True)
class BlindTask(ToyArmsTask):
    def make(self) -> ToyArms:
        return BlindArms()


def test_a_camera_that_the_task_does_not_have_stops_before_training(arms):
    datamodule, module = arms
    about = DataOnly(datamodule), module
    studying().on_fit_start(*about)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"pictures of camera side \(camera 'side': there are top"):
        studying(task=BlindTask()).on_fit_start(*about)  # pyright: ignore[reportArgumentType]


def test_arrays_hold_every_board_and_say_what_it_is(arms, tmp_path):
    found = study(tmp_path, arms, action_dims=[["left_3", 9], [0, 1]])
    with np.load(found.arrays["landscapes"]) as file:
        assert file["names"].tolist() == NAMES
        assert set(file["units"].tolist()) == {"rad"}
        assert str(file["slice"]) == "marginal"
        assert file["dims"].tolist() == [3, 9]
        assert file["dims_left_0-left_1"].tolist() == [0, 1]
        first, second = file["strip_mass"], file["strip_mass_left_0-left_1"]
        assert first.shape == second.shape
        assert not np.allclose(first, second)
        assert file["scale_single"].shape[-1] == 14


def test_intervals_of_parts_are_kept(arms, tmp_path):
    study(tmp_path, arms, n_val_episodes=4)
    document = json.loads((tmp_path / "metrics.json").read_text())
    low, high = document["val_intervals"]["k0/left_3/c80"]
    assert low <= document["val"]["k0/left_3/c80"] <= high
    assert f"k0/{PLANE}/nll" in document["val_intervals"]
