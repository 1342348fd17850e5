"""What every experiment puts into a checkpoint is plain values, or we could not load our own."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from toy import Shout, same

import train
from callbacks.checkpoints import AtomicCheckpointIO, Checkpoint, LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume
from callbacks.interruption import StopOnSignal
from callbacks.non_finite import NonFiniteStop
from datamodules.activations import ActivationDataModule
from datamodules.hdf5 import HDF5DataModule
from lightning_modules.act import ActModule
from lightning_modules.lerobot_policy import LeRobotPolicyModule
from lightning_modules.sae import SAEModule
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(22), pytest.mark.filterwarnings("ignore::UserWarning")]

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
LINKED = {
    "cameras": {"image": [96, 96]},
    "state_dim": 2,
    "action_dim": 2,
    "chunk_size": 16,
    "d_in": 64,
}
"""What a data module would tell the model."""
SMALL: dict[str, Any] = {
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 16,
    "n_encoder_layers": 1,
    "latent_dim": 4,
}
POLICIES: dict[str, dict[str, Any]] = {
    "act": {**SMALL, "n_vae_encoder_layers": 1},
    "diffusion": {
        "down_dims": [8, 16],
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "num_train_timesteps": 4,
        "spatial_softmax_num_keypoints": 4,
    },
}
"""Sizes of LeRobot's policies: what kind of values are saved does not depend on them."""


def configured(file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        train.main(["fit", "-c", str(file), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def build(described: Mapping[str, Any]) -> Any:
    """Make what a ``class_path`` describes."""
    room, _, name = described["class_path"].rpartition(".")
    return getattr(importlib.import_module(room), name)(**(described.get("init_args") or {}))


def odd_values(value: Any, where: str = "") -> list[str]:
    """Name what is neither a tensor nor a value that JSON has."""
    if isinstance(value, Mapping):
        return [odd for key in value for odd in odd_values(value[key], f"{where}.{key}")]
    if isinstance(value, list | tuple):
        return [odd for i, each in enumerate(value) for odd in odd_values(each, f"{where}[{i}]")]
    plain = type(value) in {bool, int, float, str, type(None)}
    return [] if plain or isinstance(value, torch.Tensor) else [f"{where}: {type(value)}"]


def small(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A model's arguments, but with few weights, and none that would be downloaded."""
    if "policy_type" in arguments:
        config = {**arguments["policy_config"], **POLICIES[arguments["policy_type"]]}
        return {**arguments, "policy_config": config}
    if "dim_model" in arguments:
        return {**arguments, **SMALL, "n_posterior_layers": 1, "backbone_weights": None}
    return {**arguments, "n_latents": 64}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_what_an_experiment_saves_loads_as_plain_values(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(file, capsys)
    model = config["model"]
    known = importlib.import_module(model["class_path"].rpartition(".")[0])
    kind = getattr(known, model["class_path"].rpartition(".")[2])
    linked = {
        "SAEModule": ("d_in",),
        "ActModule": ("cameras", "state_dim", "action_dim", "chunk_size"),
        "LeRobotPolicyModule": ("cameras", "state_dim", "action_dim", "chunk_size"),
    }[kind.__name__]
    arguments = small(model["init_args"]) | {key: LINKED[key] for key in linked}
    if "chunk_size" in linked:
        arguments["chunk_size"] = config["data"]["init_args"]["chunk_size"]
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
    }
    module = kind(**arguments)
    # Those that take a task keep the same state as the diagnostics among these.
    callbacks = [
        build(each)
        for each in config["trainer"]["callbacks"]
        if "class_path" not in str(each.get("init_args"))
    ]
    checkpoint: dict[str, Any] = {
        "state_dict": {"one": torch.zeros(())},
        "hyper_parameters": dict(module.hparams),
        "callbacks": {each.state_key: each.state_dict() for each in callbacks},
    }
    module.on_save_checkpoint(checkpoint)
    assert odd_values(checkpoint) == []
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "own.ckpt")
    again = read_checkpoint(tmp_path / "own.ckpt")
    assert [entry for key in checkpoint for entry in same(again[key], checkpoint[key], key)] == []


def fit(module: LightningModule, data: LightningDataModule, folder: Path, monitor: str) -> Path:
    """Train two steps with everything that keeps a state; returns the checkpoint."""
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        max_epochs=-1,
        val_check_interval=1,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            EMA(),
            Shout(max_share=1.0),
            Dashboard(),
            ExactResume(),
            NonFiniteStop(),
            StopOnSignal(),
            Checkpoint(monitor=monitor),
            LastCheckpoint(),
        ],
    )
    trainer.fit(module, data)
    file = folder / "own.ckpt"
    trainer.save_checkpoint(file)
    return file


def link(data: HDF5DataModule) -> dict[str, Any]:
    names = ("cameras", "state_dim", "action_dim", "chunk_size")
    return {name: getattr(data, name) for name in names}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of runs of each kind of module with its own kind of data."""
    home = tmp_path_factory.mktemp("own")
    demos = home / "demos.hdf5"
    random = np.random.default_rng(0)
    with h5py.File(demos, "w") as file:
        file.attrs["num_demos"] = 5
        file.attrs["fps"] = 10
        for number in range(5):
            group = file.create_group(f"demo_{number}")
            pictures = random.integers(0, 256, (10, 32, 32, 3), np.uint8)
            group["observations/image"] = pictures
            group["observations/qpos"] = random.normal(size=(10, 2)).astype(np.float32)
            group["actions"] = random.normal(size=(10, 2)).astype(np.float32)
    windows: dict[str, dict[str, Any]] = {
        "act": {"chunk_size": 4},
        "diffusion": {
            "chunk_size": 8,
            "n_obs_steps": 2,
            "action_start": -1,
            "drop_n_last_frames": 2,
        },
    }
    data = {
        name: HDF5DataModule(str(demos), batch_size=4, val_fraction=0.4, progress=False, **window)
        for name, window in windows.items()
    }
    act = ActModule(
        **link(data["act"]),
        **SMALL,
        n_posterior_layers=1,
        backbone="small_cnn",
        backbone_width=8,
        token_stride=8,
    )
    diffusion = LeRobotPolicyModule(
        policy_type="diffusion",
        **link(data["diffusion"]),
        policy_config={
            **POLICIES["diffusion"],
            "n_obs_steps": 2,
            "horizon": 8,
            "n_action_steps": 3,
            "drop_n_last_frames": 2,
            "use_group_norm": True,
            "crop_shape": [28, 28],
        },
    )
    monitor = "val/first_action_l1_px"
    files = {
        "ACT": fit(act, data["act"], home / "act", monitor),
        "LeRobot": fit(diffusion, data["diffusion"], home / "diffusion", monitor),
    }
    activations = ActivationDataModule(
        str(files["ACT"]), batch_size=32, device="cpu", storage="stream", progress=False
    )
    sae = SAEModule(activations.d_in, n_latents=32, k=2)
    files["SAE"] = fit(sae, activations, home / "sae", "val/fvu")
    return files


@pytest.mark.parametrize("kind", ["ACT", "LeRobot", "SAE"])
def test_everything_that_a_run_saves_is_plain(own: dict[str, Path], kind: str) -> None:
    saved = torch.load(own[kind], map_location="cpu", weights_only=False)
    assert odd_values(saved) == []
    data = "ActivationDataModule" if kind == "SAE" else "HDF5DataModule"
    parts = {"loops", "optimizer_states", "lr_schedulers", "hyper_parameters", "exact_resume"}
    assert {*parts, data, "averaging_state"} <= saved.keys()
    assert {name.partition("[")[0] for name in saved["callbacks"]} >= {"Shout", "Dashboard"}
    again = read_checkpoint(own[kind])
    assert [entry for key in saved for entry in same(again[key], saved[key], key)] == []
