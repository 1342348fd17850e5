"""Half of the training samples are mirrored, whole, reproducibly, and only where that has sense."""

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.exact_resume import ExactResume
from datamodules.hdf5 import HDF5DataModule
from lightning_modules.act import ActModule
from lightning_modules.augmentation import MirrorAugmentation, mirror_for_training
from policies.interface import Batch, DataSchema, Observation
from policies.loading import load_policy
from policies.mirror import AntiDiagonal, XFlip

SMALL = {
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 16,
    "n_encoder_layers": 1,
    "n_posterior_layers": 1,
    "latent_dim": 4,
    "dropout": 0.0,
    "backbone": "small_cnn",
    "backbone_width": 8,
    "token_stride": 8,
    "n_action_steps": 4,
}
PLAIN = DataSchema({"image": (16, 16)}, 2, 2)
MIRRORS = {"x_flip": XFlip(), "anti_diagonal": AntiDiagonal()}


def batch_of(n: int) -> Batch:
    torch.manual_seed(0)
    return Batch(
        observation=Observation(
            {"image": torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)},
            state=torch.rand(n, 2) * 512,
        ),
        actions=torch.rand(n, 4, 2) * 512,
        action_is_pad=torch.zeros(n, 4).bool(),
        episode_index=torch.arange(n),
        frame_index=torch.arange(n),
        simulator_state=torch.rand(n, 5),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MIRRORS)
def test_each_sample_is_whole_as_recorded_or_whole_in_the_mirror(kind):
    batch = batch_of(200)
    mirrored = MIRRORS[kind].batch(
        Batch(
            batch.observation,
            batch.actions,
            batch.action_is_pad,
            batch.episode_index,
            batch.frame_index,
        )
    )
    mixed = mirror_for_training(kind, 512.0, PLAIN)(batch, seeded(0))

    def parts(each: Batch) -> list[torch.Tensor]:
        return [each.observation.images["image"], each.observation.state, each.actions]

    def equal(first: Batch) -> torch.Tensor:
        return torch.stack(
            [(a == b).flatten(1).all(1) for a, b in zip(parts(first), parts(mixed), strict=True)]
        )

    kept, turned = equal(batch), equal(mirrored)
    assert (kept.all(0) == kept.any(0)).all(), "a sample is mirrored in part"
    assert (kept.all(0) ^ turned.all(0)).all()
    # 200 fair coins: 5 standard deviations.
    assert abs(int(turned.all(0).sum()) - 100) < 36
    assert mixed.simulator_state is None


def test_the_same_seed_mirrors_the_same_samples_and_another_seed_others():
    batch, augmentation = batch_of(40), MirrorAugmentation(XFlip())
    first, again, other = (augmentation(batch, seeded(seed)).actions for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_history_is_mirrored_as_one():
    images = torch.randint(0, 256, (30, 2, 3, 8, 8), dtype=torch.uint8)
    state = torch.rand(30, 2, 2) * 512
    batch = Batch(
        Observation({"image": images}, state),
        torch.rand(30, 4, 2),
        torch.zeros(30, 4).bool(),
        torch.arange(30),
        torch.arange(30),
    )
    mixed = MirrorAugmentation(XFlip())(batch, seeded(0)).observation
    turned = (mixed.state != state).any(-1)
    assert torch.equal(turned[:, 0], turned[:, 1])
    assert 0 < int(turned[:, 0].sum()) < 30
    expected = torch.where(turned[:, :, None, None, None], images.flip(-1), images)
    assert torch.equal(mixed.images["image"], expected)


@pytest.mark.parametrize(
    ("kind", "schema", "order", "message"),
    [
        ("x_flip", DataSchema({}, 7, 7), None, r"\{'state': 7, 'action': 7\}.*set mirror to null"),
        ("x_flip", DataSchema({}, 2, 3), None, r"\{'action': 3\}"),
        ("anti_diagonal", DataSchema({"top": (8, 9)}, 2, 2), None, "top.*are not square"),
        ("x_flip", DataSchema({}, 2, 2, environment_state_dim=8), None, "set mirror_point_order"),
        ("x_flip", DataSchema({}, 2, 2, environment_state_dim=8), (1, 0), "names 2 points"),
        ("x_flip", DataSchema({}, 2, 2, environment_state_dim=3), (), "'environment_state': 3"),
    ],
)
def test_what_has_no_mirror_image_is_refused(kind, schema, order, message):
    with pytest.raises(ValueError, match=message):
        mirror_for_training(kind, 512.0, schema, order)


def test_a_flip_needs_no_square_pictures():
    mirror_for_training("x_flip", 512.0, DataSchema({"top": (8, 9)}, 2, 2))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The agent walks down on the left half; its action is 20 px further to the left."""
    file = tmp_path_factory.mktemp("data") / "demos.hdf5"
    generator = np.random.default_rng(0)
    with h5py.File(file, "w") as h5:
        h5.attrs["num_demos"] = 4
        h5.attrs["fps"] = 10.0
        for demo in range(4):
            group = h5.create_group(f"demo_{demo}")
            x, y = generator.uniform(60, 200, 24), np.linspace(40, 470, 24)
            qpos = np.stack([x, y], axis=1).astype(np.float32)
            image = np.full((24, 16, 16, 3), 255, np.uint8)
            for frame, (column, row) in enumerate((qpos * 16 / 512).astype(int)):
                image[frame, row, column] = 0
            group["observations/image"] = image
            group["observations/qpos"] = qpos
            group["actions"] = qpos - np.array([20, 0], np.float32)
    return file


def data(path) -> HDF5DataModule:
    return HDF5DataModule(
        path=str(path), batch_size=16, chunk_size=4, val_fraction=0.25, progress=False
    )


def module_for(datamodule, **arguments) -> ActModule:
    torch.manual_seed(0)
    return ActModule(
        cameras=datamodule.cameras,
        state_dim=datamodule.state_dim,
        action_dim=datamodule.action_dim,
        chunk_size=datamodule.chunk_size,
        **{**SMALL, "lr": 3e-3, **arguments},
    )


def trainer_for(folder, **settings) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[ExactResume()],
        **settings,
    )


def test_a_policy_trained_with_the_flip_also_acts_on_the_other_side(path, tmp_path):
    """To the left where it was shown, to the right in the mirror; without the flip, to the left."""
    errors = {}
    for mirror in (None, "x_flip"):
        torch.manual_seed(0)
        datamodule = data(path)
        module = module_for(datamodule, mirror=mirror, relative_actions=True, kl_weight=0.01)
        trainer_for(tmp_path, max_steps=80).fit(module, datamodule)
        module.eval()
        batch = datamodule.episode(datamodule.split["train"][0])
        for side, each in (("seen", batch), ("mirrored", XFlip().batch(batch))):
            with torch.no_grad():
                predicted = module.policy.predict_chunk(each.observation)[:, 0]
            step_x = predicted[:, 0] - each.observation.state[:, 0]
            errors[mirror, side] = float((step_x - (-20 if side == "seen" else 20)).abs().mean())
    assert errors[None, "seen"] < 20
    assert errors["x_flip", "seen"] < 20
    assert errors["x_flip", "mirrored"] < 20
    assert errors[None, "mirrored"] > 30


def test_training_errors_are_of_the_samples_that_were_shown(path, tmp_path, monkeypatch):
    """Compared with what was recorded, a perfect prediction in the mirror would look wrong."""
    datamodule = data(path)
    datamodule.setup()
    module = module_for(datamodule, mirror="x_flip")
    module.policy.fit_normaliser(datamodule.statistics)
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.fit(module, datamodule)
    compared = []
    monkeypatch.setattr(
        module.train_reconstruction, "update", lambda found, actions, pad: compared.append(actions)
    )
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "log_dict", lambda *args, **kwargs: None)
    batch = next(iter(datamodule.train_dataloader()))
    module.training_step(batch, 0)
    shown = module._augmented(batch, 0)
    torch.testing.assert_close(compared[0], shown.actions)
    assert not torch.equal(shown.actions, batch.actions)


def test_samples_of_a_batch_depend_on_seed_epoch_and_batch_alone(path):
    datamodule = data(path)
    first, again = (module_for(datamodule, mirror="x_flip", shift_px=2) for _ in range(2))
    other = module_for(datamodule, mirror="x_flip", shift_px=2, augmentation_seed=1)
    batch = batch_of(32)
    for module in (first, again, other):
        module._trainer = trainer_for(None, max_steps=1)
    torch.manual_seed(1)
    shown = first._augmented(batch, 3)
    torch.manual_seed(2)
    same = again._augmented(batch, 3)
    assert torch.equal(shown.actions, same.actions)
    assert torch.equal(shown.observation.images["image"], same.observation.images["image"])
    assert not torch.equal(shown.actions, again._augmented(batch, 4).actions)
    assert not torch.equal(shown.actions, other._augmented(batch, 3).actions)


def test_without_a_mirror_pictures_are_augmented_as_before(path):
    datamodule, batch = data(path), batch_of(8)
    module = module_for(datamodule, shift_px=2)
    module._trainer = trainer_for(None, max_steps=1)
    shown = module._augmented(batch, 0)
    place = hash((0, 0, 0, 0)) & (2**63 - 1)
    expected = module.augmentation(batch, seeded(place))
    assert torch.equal(shown.observation.images["image"], expected.observation.images["image"])
    assert torch.equal(shown.actions, batch.actions)


def test_a_continued_run_ends_with_the_same_weights(path, tmp_path):
    def fitted(n_epochs: int, checkpoint=None) -> tuple[ActModule, Trainer]:
        module = module_for(data(path), mirror="anti_diagonal")
        trainer = trainer_for(tmp_path, max_epochs=n_epochs)
        torch.manual_seed(1)
        trainer.fit(module, data(path), ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    whole, _ = fitted(2)
    _, first = fitted(1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    continued, _ = fitted(2, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(continued.state_dict()[name], value, atol=0, rtol=0)


def test_a_checkpoint_keeps_the_mirror_as_plain_values(path, tmp_path):
    datamodule = data(path)
    module = module_for(datamodule, mirror="x_flip", mirror_extent=512.0)
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "policy.ckpt")
    stored = torch.load(tmp_path / "policy.ckpt", weights_only=True)["hyper_parameters"]
    assert (stored["mirror"], stored["mirror_extent"]) == ("x_flip", 512.0)
    assert load_policy(tmp_path / "policy.ckpt", "cpu").view.chunk_size == 4


@pytest.mark.parametrize("extent", [100.0, 1000.0, 1e5])
def test_data_that_are_no_points_of_the_board_are_refused(path, tmp_path, extent):
    datamodule = data(path)
    module = module_for(datamodule, mirror="x_flip", mirror_extent=extent)
    with pytest.raises(ValueError, match="set mirror_extent to the board's width"):
        trainer_for(tmp_path, max_steps=1).fit(module, datamodule)
