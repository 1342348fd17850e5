"""Features at checkpoints of an autoencoder: numbers are those of the policy on its codes."""

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from lightning.pytorch import LightningModule
from pusht_runs import SIZE, act, data, fit_with_wandb, trainer, write_pusht

from autoencoders.files import load_autoencoder
from callbacks.autoencoder_folder import AutoencoderFolder
from callbacks.features import Features
from datamodules.activations import ActivationDataModule
from envs.push_t import PushTTask
from features.splice import reconstruction_edit, splice
from lightning_modules.sae import SAEModule


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    demonstrations = data(write_pusht(folder / "demos.hdf5", SIZE))
    run = trainer(folder, steps=2)
    run.fit(act(demonstrations), demonstrations)
    run.save_checkpoint(folder / "policy.ckpt")
    return folder / "policy.ckpt"


def activations(policy: Path, **changes: Any) -> ActivationDataModule:
    settings = {"batch_size": 16, "storage": "stream", "buffer_mb": 8, "progress": False}
    return ActivationDataModule(str(policy), **{**settings, **changes})


def autoencoder(datamodule: ActivationDataModule) -> SAEModule:
    torch.manual_seed(0)
    return SAEModule(datamodule.d_in, n_latents=24, k=3, lr=3e-3)


def found(folder: Path, step: int, name: str = "features") -> dict[str, float]:
    path = folder / "media" / f"step_{step:06d}" / name / "metrics.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(policy, tmp_path_factory) -> tuple[Path, list[dict[str, Any]], ActivationDataModule]:
    folder = tmp_path_factory.mktemp("run")
    datamodule = activations(policy)
    callbacks = [
        Features(PushTTask(SIZE, max_steps=12), n_rollouts=2, strict=True),
        AutoencoderFolder(),
    ]
    _, history = fit_with_wandb(folder, autoencoder(datamodule), datamodule, *callbacks)
    return folder, history, datamodule


def test_the_action_score_is_what_splicing_the_saved_autoencoder_gives(finished):
    folder, _, datamodule = finished
    sae = load_autoencoder(folder / "autoencoder").sae
    view, episodes = datamodule.policy, datamodule.split["val"]
    spliced = splice(view, "encoder", reconstruction_edit(sae))
    moved = torch.cat(
        [
            (spliced.predict_chunk(batch.observation) - view.predict_chunk(batch.observation)).norm(
                dim=-1
            )
            for batch in map(datamodule.demonstrations.episode, episodes)
        ]
    )
    numbers = found(folder, 4)
    assert numbers["features/sae_px"] == pytest.approx(float(moved.mean()), rel=1e-3)
    score = 1 - numbers["features/sae_px"] / numbers["features/mean_px"]
    assert numbers["features/action_score"] == pytest.approx(score, rel=1e-6)
    assert numbers["features/action_score_low"] <= score <= numbers["features/action_score_high"]


def test_rollouts_come_at_the_end_in_pairs(finished):
    folder, _, _ = finished
    assert not any(key.startswith("features/rollout") for key in found(folder, 2))
    last = found(folder, 4)
    for name in ("clean", "spliced"):
        assert last[f"features/rollout_{name}_n_episodes"] == 2


def test_pictures_and_densities_reach_wandb(finished):
    folder, history, _ = finished
    text = json.dumps(history)
    for key in ("features/strip", "features/density", "features/log10_density", "val/fvu"):
        assert key in text, key
    for name in ("strip", "density"):
        picture = cv2.imread(str(folder / "media" / "step_000004" / "features" / f"{name}.png"))
        assert picture.std() > 0


def test_concepts_are_measured_on_other_episodes_than_chose(finished):
    numbers = found(finished[0], 4)
    assert {"features/r_agent_x_px", "features/auroc_contact"} & numbers.keys()
    assert all(abs(value) <= 1 for key, value in numbers.items() if "features/r_" in key)


def test_frames_are_reconstructed_whole(policy, tmp_path):
    datamodule = activations(policy, per="frame", batch_size=4)
    run = trainer(tmp_path, Features(strict=True), steps=2)
    run.fit(autoencoder(datamodule), datamodule)
    assert found(tmp_path, 2)["features/action_score"] <= 1


def test_parts_of_frames_are_refused(policy, tmp_path):
    datamodule = activations(policy, per="frame", token_sampling="stride")
    with pytest.raises(ValueError, match="token_sampling"):
        trainer(tmp_path, Features()).fit(autoencoder(datamodule), datamodule)


@pytest.mark.parametrize("callback", [Features(), AutoencoderFolder()])
def test_a_policys_run_has_no_autoencoder(callback, tmp_path):
    demonstrations = data(write_pusht(tmp_path / "demos.hdf5", SIZE))
    module: LightningModule = act(demonstrations)
    with pytest.raises(TypeError, match=r"ActModule"):
        trainer(tmp_path, callback).fit(module, demonstrations)


def test_rollouts_need_a_task():
    with pytest.raises(ValueError, match="task"):
        Features(n_rollouts=2)
