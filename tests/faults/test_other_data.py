"""A checkpoint meets other cameras or dimensions than it was made for: refused, all are named."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from lightning.pytorch import Trainer

from callbacks.checkpoints import AtomicCheckpointIO
from datamodules.hdf5 import HDF5DataModule
from lightning_modules.act import ActModule

pytestmark = [pytest.mark.fault(15), pytest.mark.filterwarnings("ignore::UserWarning")]

CHUNK = 3
MADE_FOR: dict[str, Any] = {
    "cameras": {"top": (16, 16), "wrist": (16, 16)},
    "state_dim": 2,
    "action_dim": 2,
}


def demonstrations(
    file: Path, cameras: dict[str, tuple[int, int]], state_dim: int, action_dim: int
) -> HDF5DataModule:
    """Write demonstrations and open them."""
    random = np.random.default_rng(0)
    with h5py.File(file, "w") as demos:
        demos.attrs["num_demos"] = 2
        for number in range(2):
            group = demos.create_group(f"demo_{number}")
            for name, (height, width) in cameras.items():
                pictures = random.integers(0, 256, (6, height, width, 3), np.uint8)
                group[f"observations/images/{name}"] = pictures
            group["observations/qpos"] = random.normal(size=(6, state_dim)).astype(np.float32)
            group["actions"] = random.normal(size=(6, action_dim)).astype(np.float32)
    return HDF5DataModule(
        path=str(file), batch_size=4, chunk_size=CHUNK, val_fraction=0.5, progress=False
    )


def module(data: HDF5DataModule) -> ActModule:
    return ActModule(
        cameras=data.cameras,
        state_dim=data.state_dim,
        action_dim=data.action_dim,
        chunk_size=data.chunk_size,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_posterior_layers=1,
        backbone="small_cnn",
        backbone_width=8,
        token_stride=8,
    )


def trainer(folder: Path, steps: int) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on the data that it is made for."""
    folder = tmp_path_factory.mktemp("made")
    data = demonstrations(folder / "demos.hdf5", **MADE_FOR)
    run = trainer(folder, 1)
    run.fit(module(data), data)
    run.save_checkpoint(folder / "policy.ckpt")
    return folder / "policy.ckpt"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cameras": {"top": (24, 24), "wrist": (16, 16)}}, r"cameras.*16.* != .*24"),
        ({"cameras": {"front": (16, 16), "wrist": (16, 16)}}, r"cameras.*top.* != .*front"),
        ({"cameras": {"top": (16, 16)}}, r"cameras.*wrist"),
        ({"state_dim": 7}, r"state_dim.*2 != 7"),
        ({"action_dim": 7}, r"action_dim.*2 != 7"),
        ({"state_dim": 3, "action_dim": 7}, r"state_dim.*2 != 3.*action_dim.*2 != 7"),
    ],
    ids=["size", "name", "missing camera", "state", "action", "both"],
)
def test_other_data_are_refused_and_every_difference_is_named(
    saved: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    before = saved.read_bytes()
    other = demonstrations(tmp_path / "other.hdf5", **{**MADE_FOR, **changes})
    run = trainer(tmp_path, 2)
    with pytest.raises(ValueError, match=named) as refused:
        run.fit(module(other), other, ckpt_path=str(saved), weights_only=True)
    assert "Use the data set it was trained on" in str(refused.value)
    assert run.global_step == 0
    assert saved.read_bytes() == before


def test_the_same_data_are_taken(saved: Path, tmp_path: Path) -> None:
    same = demonstrations(tmp_path / "demos.hdf5", **MADE_FOR)
    run = trainer(tmp_path, 2)
    run.fit(module(same), same, ckpt_path=str(saved), weights_only=True)
    assert run.global_step == 2
