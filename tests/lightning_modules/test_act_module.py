"""ActModule under a real Trainer on a tiny file: it learns, its checkpoints stand alone."""

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.checkpoints import AtomicCheckpointIO
from datamodules.hdf5 import HDF5DataModule
from lightning_modules.act import ActModule
from policies.interface import Observation
from policies.loading import load_policy

SMALL = {
    "dim_model": 32,
    "n_heads": 2,
    "dim_feedforward": 32,
    "n_encoder_layers": 1,
    "n_posterior_layers": 1,
    "latent_dim": 4,
    "dropout": 0.0,
    "backbone": "small_cnn",
    "backbone_width": 16,
    "token_stride": 8,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Demonstrations whose action is a fixed step to the right of the state."""
    file = tmp_path_factory.mktemp("data") / "demos.hdf5"
    generator = np.random.default_rng(0)
    with h5py.File(file, "w") as h5:
        h5.attrs["num_demos"] = 4
        h5.attrs["fps"] = 10.0
        for demo in range(4):
            group = h5.create_group(f"demo_{demo}")
            qpos = np.cumsum(generator.normal(size=(12, 2)), axis=0).astype(np.float32) * 20 + 200
            group["observations/image"] = generator.integers(
                0, 256, (12, 16, 16, 3), dtype=np.uint8
            )
            group["observations/qpos"] = qpos
            group["actions"] = qpos + np.array([30, 0], np.float32)
    return file


def data(path, chunk_size=4, image_size=None):
    return HDF5DataModule(
        path=str(path),
        batch_size=8,
        chunk_size=chunk_size,
        val_fraction=0.25,
        image_size=image_size,
        progress=False,
    )


def module_for(datamodule, **arguments):
    return ActModule(
        cameras=datamodule.cameras,
        state_dim=datamodule.state_dim,
        action_dim=datamodule.action_dim,
        chunk_size=datamodule.chunk_size,
        **{**SMALL, "lr": 3e-3, **arguments},
    )


def trainer_for(folder, max_steps, **settings):
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        **settings,
    )


def test_mixed_precision_trains_with_clipped_gradients(path, tmp_path):
    torch.manual_seed(0)
    datamodule = data(path)
    module = module_for(datamodule)
    before = module.policy.network.action_head.weight.detach().clone()
    trainer = trainer_for(tmp_path, 2, precision="bf16-mixed", gradient_clip_val=1.0)
    trainer.fit(module, datamodule)
    after = module.policy.network.action_head.weight
    assert after.isfinite().all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("relative_actions", [False, True])
def test_training_lowers_the_error_and_baselines_are_what_they_say(
    path, tmp_path, relative_actions
):
    torch.manual_seed(0)
    datamodule = data(path)
    module = module_for(datamodule, relative_actions=relative_actions, brightness=0.1)
    trainer = trainer_for(tmp_path, 60)
    before = trainer.validate(module, datamodule, verbose=False)[0]
    trainer.fit(module, datamodule)
    after = trainer.validate(module, datamodule, verbose=False)[0]
    assert after["val/first_action_l1_px"] < 0.7 * before["val/first_action_l1_px"]
    assert after["baseline/hold_position_l1_px"] == pytest.approx(15.0)  # 30 px on one of two axes
    assert after["val/first_action_l1_px"] == pytest.approx(after["val/l1_px/k00"])
    assert {"val/l1_px/k03", "val/reconstruction_l1_px", "val/kl_nats"} <= after.keys()


def test_a_checkpoint_alone_gives_the_same_actions(path, tmp_path):
    datamodule = data(path)
    module = module_for(datamodule)
    trainer = trainer_for(tmp_path, 3)
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "policy.ckpt")
    loaded = load_policy(str(tmp_path / "policy.ckpt"))
    observation = Observation(
        {"image": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)},
        torch.rand(3, 2) * 400,
    )
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.view.predict_chunk(observation),
            module.policy.predict_chunk(observation),
            atol=0,
            rtol=0,
        )


def test_the_image_encoder_has_its_own_learning_rate(path, tmp_path):
    datamodule = data(path)
    module = module_for(datamodule, lr_backbone=1e-5, lr_schedule="constant")
    trainer = trainer_for(tmp_path, 1)
    trainer.fit(module, datamodule)
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"policy": 3e-3, "backbone": 1e-5}


def test_negative_kl_weight_is_refused(path):
    with pytest.raises(ValueError, match="kl_weight=-1"):
        module_for(data(path), kl_weight=-1.0)


@pytest.mark.parametrize(("argument", "value"), [("n_obs_steps", 2), ("action_start", -1)])
def test_samples_cut_for_another_policy_are_refused(path, tmp_path, argument, value):
    datamodule = HDF5DataModule(
        path=str(path), chunk_size=4, val_fraction=0.25, progress=False, **{argument: value}
    )
    with pytest.raises(ValueError, match=f"--data.init_args.{argument}"):
        trainer_for(tmp_path, 1).fit(module_for(datamodule), datamodule)
