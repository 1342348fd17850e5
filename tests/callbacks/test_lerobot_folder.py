"""A LeRobot folder beside the checkpoints, replaced as a whole."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule

from callbacks.lerobot_folder import LeRobotFolder
from lightning_modules.act import ActModule
from policies.interface import Observation
from policies.lerobot_format import load_lerobot_act
from policies.normalisation import AffineFeature


@dataclass
class FakeTrainer:
    default_root_dir: str


def small_module():
    module = ActModule(
        cameras={"image": [32, 32]},
        state_dim=2,
        action_dim=2,
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        n_posterior_layers=1,
        kl_weight=0.25,
    ).eval()
    for feature in module.policy.normaliser.modules():
        if isinstance(feature, AffineFeature):
            feature.set(torch.zeros_like(feature.offset), torch.ones_like(feature.scale))
    return module


def test_the_folder_holds_the_newest_weights(tmp_path):
    module, callback = small_module(), LeRobotFolder()
    trainer = FakeTrainer(str(tmp_path))
    observation = Observation({"image": torch.rand(2, 3, 32, 32)}, torch.rand(2, 2))
    for _ in range(2):
        with torch.no_grad():
            module.policy.network.action_head.bias += 1.0
        callback.diagnose(trainer, module, tmp_path)
        loaded = load_lerobot_act(tmp_path / "lerobot/pretrained_model")
        assert loaded.config["kl_weight"] == 0.25
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.policy.predict_chunk(observation),
                module.policy.predict_chunk(observation),
            )
    assert [path.name for path in (tmp_path / "lerobot").iterdir()] == ["pretrained_model"]


def test_a_failed_export_leaves_the_old_folder(tmp_path):
    module, callback = small_module(), LeRobotFolder()
    trainer = FakeTrainer(str(tmp_path))
    callback.diagnose(trainer, module, tmp_path)
    module.policy.hyper_parameters["token_stride"] = 16
    with pytest.raises(ValueError, match="token_stride 16"):
        callback.diagnose(trainer, module, tmp_path)
    load_lerobot_act(tmp_path / "lerobot/pretrained_model")


def test_a_module_without_a_lerobot_form_is_refused(tmp_path):
    with pytest.raises(TypeError, match="has no LeRobot form"):
        LeRobotFolder().diagnose(FakeTrainer(str(tmp_path)), LightningModule(), tmp_path)
