"""LeRobot's policies under our trainer: their samples, their loss, their presets, their folders."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.ema import EMA
from datamodules.hdf5 import HDF5DataModule
from lightning_modules.lerobot_policy import LeRobotPolicyModule
from policies.act import ACTPolicy
from policies.checkpoint_files import CheckpointError, read_checkpoint
from policies.interface import Observation
from policies.lerobot_view import LeRobotPolicyView
from policies.loading import load_policy

LENGTHS = (12, 9)
SIZE = 32

POLICIES = {
    "act": {
        "n_action_steps": 5,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 16,
        "latent_dim": 4,
        "n_encoder_layers": 1,
        "n_vae_encoder_layers": 1,
    },
    "diffusion": {
        "n_obs_steps": 2,
        "horizon": 8,
        "n_action_steps": 3,
        "drop_n_last_frames": 2,
        "down_dims": [8, 16],
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "num_train_timesteps": 4,
        "spatial_softmax_num_keypoints": 4,
        "use_group_norm": True,
        "crop_shape": [28, 28],
    },
    "vqbet": {
        "n_obs_steps": 2,
        "n_action_pred_token": 2,
        "action_chunk_size": 3,
        "crop_shape": [28, 28],
        "use_group_norm": True,
        "spatial_softmax_num_keypoints": 4,
        "n_vqvae_training_steps": 2,
        "vqvae_n_embed": 4,
        "vqvae_embedding_dim": 16,
        "vqvae_enc_hidden_dim": 16,
        "gpt_block_size": 20,
        "gpt_input_dim": 16,
        "gpt_output_dim": 16,
        "gpt_n_layer": 1,
        "gpt_n_head": 2,
        "gpt_hidden_dim": 16,
    },
}
WINDOWS = {
    "act": {"chunk_size": 7},
    "diffusion": {"chunk_size": 8, "n_obs_steps": 2, "action_start": -1, "drop_n_last_frames": 2},
    "vqbet": {"chunk_size": 5, "n_obs_steps": 2, "action_start": -1},
}


def frames(number: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "image": rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8),
        "state": rng.uniform(0, 512, (length, 2)).astype(np.float32),
        "action": rng.uniform(0, 512, (length, 2)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "demos.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = len(LENGTHS)
        file.attrs["fps"] = 10
        for number, length in enumerate(LENGTHS):
            group = file.create_group(f"demo_{number}")
            values = frames(number, length)
            group["observations/image"] = values["image"]
            group["observations/qpos"] = values["state"]
            group["actions"] = values["action"]
    return path


def data(path, policy_type: str, **changes) -> HDF5DataModule:
    settings = {"batch_size": 4, "val_fraction": 0.5, "progress": False, **WINDOWS[policy_type]}
    return HDF5DataModule(str(path), **{**settings, **changes})


def build(datamodule, policy_type: str, config=None, **changes) -> LeRobotPolicyModule:
    torch.manual_seed(0)
    return LeRobotPolicyModule(
        policy_type=policy_type,
        cameras=datamodule.cameras,
        state_dim=datamodule.state_dim,
        action_dim=datamodule.action_dim,
        chunk_size=datamodule.chunk_size,
        policy_config={**POLICIES[policy_type], **(config or {})},
        **changes,
    )


def trainer(folder, **changes) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "plugins": [AtomicCheckpointIO()],
            "inference_mode": False,
            **changes,
        }
    )


def prepared(path, policy_type: str, **changes):
    """A module that knows the statistics, and its data module."""
    datamodule = data(path, policy_type, **changes)
    datamodule.setup()
    module = build(datamodule, policy_type)
    module._trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module._trainer.datamodule = datamodule
    module.setup("fit")
    return module.eval(), datamodule


def observed(datamodule, n_obs_steps: int) -> Observation:
    batch = datamodule.val_dataset.__getitems__([3, 5])
    assert batch.observation.state.ndim == (2 if n_obs_steps == 1 else 3)
    return batch.observation


@pytest.mark.parametrize("policy_type", POLICIES)
def test_a_policy_trains_and_comes_back_from_folder_and_checkpoint(
    policy_type, demonstrations, tmp_path
):
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    datamodule = data(demonstrations, policy_type)
    module = build(datamodule, policy_type)
    before = {name: value.clone() for name, value in module.policy.named_parameters()}
    runner = trainer(tmp_path, callbacks=[EMA(decay=0.5)])
    runner.fit(module, datamodule)
    moved = [
        name for name, value in module.policy.named_parameters() if not value.equal(before[name])
    ]
    assert moved

    logged = runner.callback_metrics
    for name in (
        "train/loss",
        "val/loss",
        "val/first_action_l1_px",
        "val/l1_px",
        "val/l1_px/k00",
        "baseline/hold_position_l1_px",
        "baseline/mean_action_l1_px",
    ):
        assert logged[name].isfinite(), name
    validation = datamodule.val_dataset.__getitems__(range(len(datamodule.val_dataset)))
    now = -WINDOWS[policy_type].get("action_start", 0)
    state = validation.observation.state
    state = state if state.ndim == 2 else state[:, -1]
    hold = (validation.actions[:, now] - state).abs().mean()
    torch.testing.assert_close(logged["baseline/hold_position_l1_px"], hold)

    observation = observed(datamodule, module.view.n_obs_steps)
    expected = module.eval().view.predict_chunk(observation)

    module.export_lerobot(tmp_path / "export")
    policy = get_policy_class(policy_type).from_pretrained(tmp_path / "export", strict=True)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(tmp_path / "export"))
    assert torch.equal(LeRobotPolicyView(policy, *processors).predict_chunk(observation), expected)

    checkpoint = tmp_path / "step.ckpt"
    runner.save_checkpoint(checkpoint)
    loaded = load_policy(str(checkpoint))
    assert loaded.kind == "policyscope"
    assert loaded.view.data_schema == module.view.data_schema
    if policy_type == "act":
        assert isinstance(loaded.view, ACTPolicy)  # ours, which diagnostics can look into
        close = loaded.view.predict_chunk(observation)
        torch.testing.assert_close(close, expected, rtol=1e-6, atol=5e-4)
    else:
        assert torch.equal(loaded.view.predict_chunk(observation), expected)
    again = LeRobotPolicyModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert torch.equal(again.view.predict_chunk(observation), expected)


@pytest.mark.parametrize("policy_type", POLICIES)
def test_samples_and_loss_are_those_of_lerobots_own_loader(policy_type, demonstrations, tmp_path):
    from lerobot.datasets.factory import resolve_delta_timestamps
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "observation.image": {
            "dtype": "image",
            "shape": (SIZE, SIZE, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    root = tmp_path / "dataset"
    written = LeRobotDataset.create(
        "local/demos", fps=10, features=features, root=root, use_videos=False
    )
    for number, length in enumerate(LENGTHS):
        values = frames(number, length)
        for step in range(length):
            written.add_frame(
                {
                    "observation.image": values["image"][step],
                    "observation.state": values["state"][step],
                    "action": values["action"][step],
                    "task": "push",
                }
            )
        written.save_episode()
    written.finalize()

    module, datamodule = prepared(demonstrations, policy_type, val_fraction=0)
    config = module.policy.config
    theirs = LeRobotDataset(
        "local/demos",
        root=root,
        delta_timestamps=resolve_delta_timestamps(config, written.meta),
    )
    drop = getattr(config, "drop_n_last_frames", 0)
    starts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    indices = [
        start + step
        for start, length in zip(starts, LENGTHS, strict=True)
        for step in range(length - drop)
    ]
    expected = torch.utils.data.default_collate([theirs[int(index)] for index in indices])
    ours = datamodule.train_dataset.__getitems__(range(len(datamodule.train_dataset)))
    assert len(ours) == len(indices)
    assert torch.equal(ours.actions, expected["action"])
    assert torch.equal(ours.action_is_pad, expected["action_is_pad"])
    assert torch.equal(ours.observation.state, expected["observation.state"])
    statistics = {key: written.meta.stats[key] for key in ("observation.state", "action")}
    for key, feature in (
        ("observation.state", datamodule.statistics.state),
        ("action", datamodule.statistics.action),
    ):
        for name in ("mean", "std", "min", "max"):
            torch.testing.assert_close(
                getattr(feature, name).double(),
                torch.as_tensor(statistics[key][name]).double(),
                rtol=1e-6,
                atol=0,
            )

    module.train()
    untouched = deepcopy(module.policy)  # VQ-BeT moves its codebook while it looks
    seed_everything(5)
    lerobot_loss, _ = untouched.forward(module.view.preprocessor(expected))
    seed_everything(5)
    loss, _ = module.policy.forward(module.view.training_batch(ours))
    torch.testing.assert_close(loss, lerobot_loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_obs_steps": 1}, "n_obs_steps 2 .it is 1.*--data.init_args.n_obs_steps 2"),
        ({"action_start": 0}, "--data.init_args.action_start -1"),
        ({"drop_n_last_frames": 0}, "drop_n_last_frames 2 .it is 0"),
        ({"chunk_size": 7}, "chunk_size 8 .it is 7.*policy_config"),
    ],
)
def test_samples_that_do_not_suit_the_policy_stop_before_anything_is_read(
    changes, message, demonstrations, tmp_path, monkeypatch
):
    datamodule = data(demonstrations, "diffusion", **changes)
    module = build(datamodule, "diffusion")
    monkeypatch.setattr(datamodule, "setup", lambda stage: pytest.fail("frames were read"))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module, datamodule)


def test_validation_measures_the_same_noise_and_leaves_no_trace(demonstrations):
    """VQ-BeT counts its codebook's training steps in every forward pass, in eval mode too."""
    for policy_type in ("vqbet", "diffusion"):
        module, datamodule = prepared(demonstrations, policy_type)
        batch = datamodule.val_dataset.__getitems__([0, 3])
        losses = []
        module.log_dict = lambda values, losses=losses, **_: losses.append(values["val/loss"])
        state = {name: value.clone() for name, value in module.state_dict().items()}
        trained = [parameter.requires_grad for parameter in module.parameters()]
        random_state = torch.get_rng_state()
        with torch.no_grad():
            for _ in range(4):
                module.validation_step(batch, 0)
            module.validation_step(batch, 1)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(value.equal(state[name]) for name, value in module.state_dict().items())
        assert [parameter.requires_grad for parameter in module.parameters()] == trained
        assert len({float(loss) for loss in losses[:4]}) == 1
        if policy_type == "diffusion":
            assert losses[4] != losses[0]  # other noise for another batch


@pytest.mark.parametrize("policy_type", POLICIES)
def test_optimiser_and_schedule_are_lerobots(policy_type, demonstrations):
    module, _ = prepared(demonstrations, policy_type)
    module.trainer.fit_loop.epoch_loop.max_steps = 1000
    made = module.configure_optimizers()
    config = module.policy.config
    expected = config.get_optimizer_preset().build(module.policy.get_optim_params())
    optimizer = made if policy_type == "act" else made["optimizer"]
    assert type(optimizer) is type(expected)
    for ours, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert len(ours["params"]) == len(theirs["params"])
        for key in ("lr", "betas", "eps", "weight_decay"):
            reached = ours.get("initial_lr", ours["lr"]) if key == "lr" else ours[key]
            assert reached == theirs[key], key
    if policy_type == "act":
        assert config.get_scheduler_preset() is None
        return
    schedule = config.get_scheduler_preset().build(expected, 1000)
    for _ in range(600):
        for group, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
            assert group["lr"] == theirs["lr"]
        for step in (optimizer, expected, made["lr_scheduler"]["scheduler"], schedule):
            step.step()


def test_arguments_override_lerobots_presets(demonstrations):
    datamodule = data(demonstrations, "act")
    module = build(
        datamodule, "act", lr=3e-4, weight_decay=0.5, lr_schedule="cosine", warmup_steps=2
    )
    module._trainer = Trainer(accelerator="cpu", logger=False, max_steps=10)
    made = module.configure_optimizers()
    rates = []
    for _ in range(11):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert max(rates) == pytest.approx(3e-4)
    assert rates[0] < rates[1] < rates[2]
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert made["optimizer"].param_groups[0]["weight_decay"] == 0.5
    # ACT's image encoder has a rate of its own.
    assert made["optimizer"].param_groups[1]["initial_lr"] == 1e-5


def test_gradients_are_clipped_at_lerobots_preset_unless_told_otherwise(demonstrations, tmp_path):
    for given, expected in ((None, 10.0), (0.25, 0.25)):
        datamodule = data(demonstrations, "act")
        module = build(datamodule, "act")
        norms = []

        def scaled(optimizer, norms=norms, module=module):
            norms.append(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in module.parameters() if p.grad is not None]
                ).item()
            )

        forward = module.policy.forward
        module.policy.forward = lambda batch, forward=forward: (1e4 * forward(batch)[0], {})
        module.on_before_zero_grad = scaled
        trainer(tmp_path, max_steps=2, gradient_clip_val=given, limit_val_batches=0).fit(
            module, datamodule
        )
        assert norms[-1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("image_statistics", "expected"),
    [("symmetric", (0.5, 0.5)), ("imagenet", (0.485, 0.229)), ("data", None)],
)
def test_pictures_are_scaled_as_asked(image_statistics, expected, demonstrations):
    datamodule = data(demonstrations, "act")
    datamodule.setup()
    module = build(datamodule, "act", image_statistics=image_statistics)
    module._trainer = Trainer(accelerator="cpu", logger=False)
    module._trainer.datamodule = datamodule
    module.setup("fit")
    batch = datamodule.train_dataset.__getitems__([0, 1, 2])
    given = batch.observation.images["image"][:, 0].float() / 255
    if expected is None:
        statistics = datamodule.statistics.images["image"]
        expected = (statistics.mean[0].item(), statistics.std[0].item())
    seen = module.view.training_batch(batch)["observation.image"][:, 0]
    torch.testing.assert_close(seen, (given - expected[0]) / expected[1])


def test_a_view_before_setup_says_what_is_missing(demonstrations):
    module = build(data(demonstrations, "act"), "act")
    with pytest.raises(RuntimeError, match="no statistics yet"):
        module.view  # noqa: B018


def test_other_data_and_other_checkpoints_are_refused(demonstrations, tmp_path):
    module, _ = prepared(demonstrations, "diffusion")
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    module.data_schema = replace(module.data_schema, action_dim=3)
    other: dict = {}
    module.on_save_checkpoint(other)
    with pytest.raises(ValueError, match="action_dim: 3 != 2"):
        module.on_load_checkpoint(other)
    path = tmp_path / "other.ckpt"
    for damage, message in (
        ({"lerobot": None}, "holds no LeRobot policy"),
        ({"state_dict": {"policy.wrong": torch.zeros(2)}}, "weights do not fit the policy"),
    ):
        AtomicCheckpointIO().save_checkpoint({**checkpoint, **damage}, path)
        assert read_checkpoint(path)
        with pytest.raises(CheckpointError, match=message):
            load_policy(str(path))
