"""Short runs on small PushT recordings, for what looks at a policy at checkpoints."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.dashboard import Dashboard
from callbacks.loggers import CsvLog, WandbLog
from datamodules.hdf5 import HDF5DataModule
from envs.push_t import PushT, PushTTask
from lightning_modules.act import ActModule
from lightning_modules.lerobot_policy import LeRobotPolicyModule

LENGTHS = (12, 9, 14, 10, 11, 13)
CHUNK = 6
SIZE = 16
DIFFUSION = {
    "n_obs_steps": 2,
    "horizon": 8,
    "n_action_steps": 3,
    "drop_n_last_frames": 2,
    "down_dims": [8, 16],
    "n_groups": 4,
    "diffusion_step_embed_dim": 8,
    "num_train_timesteps": 3,
    "spatial_softmax_num_keypoints": 4,
    "use_group_norm": True,
    "crop_shape": [28, 28],
}
LEROBOT_ACT = {
    "n_action_steps": 3,
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 16,
    "latent_dim": 4,
    "n_encoder_layers": 1,
    "n_vae_encoder_layers": 1,
}


@dataclass(frozen=True)
class ShortPushT(PushTTask):
    """Episodes long enough for what happens around them, for ``--task pusht_runs.ShortPushT``."""

    max_steps: int = 40


def write_pusht(path: Path, size: int, states: bool = True) -> Path:
    """The agent walks over the board, each target being a little ahead of it."""
    rng = np.random.default_rng(0)
    env = PushT(size)
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = len(LENGTHS)
        file.attrs["fps"] = 10
        for number, length in enumerate(LENGTHS):
            walk = rng.uniform(120, 360, 2) + np.cumsum(rng.normal(0, 12, (length + 1, 2)), axis=0)
            agent, targets = walk[:-1], walk[1:] + rng.normal(0, 3, (length, 2))
            values = np.hstack([agent, np.tile((256.0, 300.0, 0.7), (length, 1))])
            pictures = np.empty((length, size, size, 3), np.uint8)
            for step, state in enumerate(values):
                env.reset_to(state)
                pictures[step] = env.image()
            group = file.create_group(f"demo_{number}")
            group["observations/image"] = pictures
            group["observations/qpos"] = agent.astype(np.float32)
            if states:
                group["observations/state"] = values.astype(np.float32)
            group["actions"] = targets.astype(np.float32)
    env.close()
    return path


def data(path: Path, **changes: Any) -> HDF5DataModule:
    """Four episodes held out, two train."""
    settings = {"batch_size": 4, "chunk_size": CHUNK, "val_fraction": 0.6, "progress": False}
    return HDF5DataModule(str(path), **{**settings, **changes})


def act(datamodule: HDF5DataModule, **changes: Any) -> ActModule:
    torch.manual_seed(0)
    settings = {
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "n_encoder_layers": 1,
        "n_posterior_layers": 1,
        "latent_dim": 3,
        "n_action_steps": 3,
        "backbone": "small_cnn",
        "backbone_width": 16,
        "token_stride": 8,
        "dropout": 0.2,
    }
    return ActModule(
        cameras=datamodule.cameras,
        state_dim=datamodule.state_dim,
        action_dim=datamodule.action_dim,
        chunk_size=datamodule.chunk_size,
        **{**settings, **changes},
    )


def lerobot(datamodule: HDF5DataModule, policy_type: str, config: dict) -> LeRobotPolicyModule:
    torch.manual_seed(0)
    return LeRobotPolicyModule(
        policy_type,
        cameras=datamodule.cameras,
        state_dim=datamodule.state_dim,
        action_dim=datamodule.action_dim,
        chunk_size=datamodule.chunk_size,
        policy_config=config,
        # The preset warms up for 500 steps.
        lr_schedule="constant",
    )


def trainer(folder: Path, *callbacks: Callback, steps: int = 4, logger: Any = False) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        log_every_n_steps=2,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), *callbacks],
    )


@dataclass
class DataOnly:
    """As much of a trainer as a study needs."""

    datamodule: HDF5DataModule


def ready(datamodule: HDF5DataModule, module: LightningModule) -> LightningModule:
    """The module as it is once its setup was called."""
    datamodule.setup()
    module._trainer = DataOnly(datamodule)  # pyright: ignore[reportAttributeAccessIssue]
    module.setup("fit")
    return module


def fit_with_wandb(
    folder: Path, module: LightningModule, datamodule: HDF5DataModule, *callbacks: Callback
) -> tuple[Path, list[dict[str, Any]]]:
    """Train with W&B offline; return its run and what its own tool reads back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_DIR"):
            patch.setenv(name, str(folder / "wandb"))
        patch.setenv("HOME", str(folder))
        patch.setenv("NETRC", str(folder / "none"))
        log = WandbLog(project="toys", save_dir=str(folder))
        logger = [CsvLog(str(folder)), log]
        trainer(folder, *callbacks, logger=logger).fit(module, datamodule)
        log.close()
    (run,) = folder.glob("wandb/offline-run-*")
    tool = Path(sys.executable).parent / "wandb"
    printed = subprocess.run(
        [str(tool), "leet", "inspect", "--json", str(run)],
        capture_output=True,
        text=True,
        check=True,
    )
    return run, [json.loads(line) for line in printed.stdout.splitlines()]


def frames_of(path: str) -> list[np.ndarray]:
    with av.open(path) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


class NeverTrain(Callback):
    """Fails where training would begin."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise AssertionError("it began")

    on_train_start = on_sanity_check_start
