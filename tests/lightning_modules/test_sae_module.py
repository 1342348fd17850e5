"""SAEModule in a real Trainer: it learns, calibrates on episodes of its own, stands alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from autoencoders.files import load_autoencoder
from autoencoders.planted import PlantedDictionary
from callbacks.checkpoints import AtomicCheckpointIO
from lightning_modules.sae import SAEModule

D_IN, K, SCALE = 16, 3, 7.0
DICTIONARY = PlantedDictionary.draw(D_IN, 32, K, seed=0)


class Planted(LightningDataModule):
    """Activations of a planted dictionary; what serves demonstrations has nothing of this."""

    def __init__(self, n: int = 2000) -> None:
        super().__init__()
        self.batch_size = 128
        self.splits = {
            name: SCALE * DICTIONARY.sample(n if name == "train" else 500, seed)
            for seed, name in enumerate(("train", "calibration", "val"))
        }

    @property
    def d_in(self) -> int:
        return D_IN

    @property
    def provenance(self) -> dict[str, Any]:
        return {"layer": "encoder", "policy_hash": "abc"}

    def sample(self, n: int, split: str, seed: int = 0) -> Tensor:
        return self.splits[split][:n]

    def vectors(self, split: str, batch_size: int) -> Iterator[Tensor]:
        yield from self.splits[split].split(batch_size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["train"], self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["val"], 200)


def trainer(folder: Path, steps: int, **settings: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=min(steps, 15),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        **settings,
    )


def module(**changes: Any) -> SAEModule:
    torch.manual_seed(0)
    return SAEModule(D_IN, **{"n_latents": 64, "k": K, "lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[SAEModule, Trainer, Path]:
    folder = tmp_path_factory.mktemp("run")
    trained, run = module(), trainer(folder, 300)
    run.fit(trained, Planted())
    return trained, run, folder


def test_it_explains_activations_that_it_has_not_seen(finished):
    trained, run, _ = finished
    x = Planted().splits["val"]
    error = (x - trained.sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    logged = float(run.callback_metrics["val/fvu"])
    assert logged == pytest.approx(float(error), rel=1e-4)
    assert logged < 0.3


def test_the_threshold_is_that_of_the_calibration_vectors(finished):
    trained, run, _ = finished
    codes = trained.sae.encode(Planted().splits["calibration"])
    assert float((codes > 0).float().sum(1).mean()) == pytest.approx(K, rel=0.01)
    assert float(run.callback_metrics["val/l0"]) == pytest.approx(K, rel=0.1)


def test_decoder_rows_have_length_one_and_scale_is_the_datas(finished):
    sae = finished[0].sae
    torch.testing.assert_close(sae.directions.norm(dim=1), torch.ones(64), rtol=0, atol=1e-5)
    norm = Planted().splits["train"].norm(dim=1).mean()
    assert float(sae.scale * norm) == pytest.approx(D_IN**0.5, rel=1e-3)


def test_the_folder_alone_gives_the_same_codes(finished, tmp_path):
    trained, _, _ = finished
    trained.save_autoencoder(tmp_path / "autoencoder")
    loaded = load_autoencoder(tmp_path / "autoencoder")
    x = Planted().splits["val"]
    torch.testing.assert_close(loaded.sae(x), trained.sae(x), rtol=1e-4, atol=1e-4)
    assert loaded.metadata["policy_hash"] == "abc"
    assert loaded.density is not None


def test_a_continued_run_keeps_scale_threshold_and_silence(tmp_path):
    first, run = module(), trainer(tmp_path, 30)
    run.fit(first, Planted())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = module()
    trainer(tmp_path, 31).fit(
        again, Planted(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
    )
    assert torch.equal(again.sae.scale, first.sae.scale)
    assert float((again.sae.W_dec - first.sae.W_dec).abs().max()) < 0.05
    assert int(again.silent_for.max()) > 0


def test_latents_that_never_fire_are_dead_before_the_run_is_over(tmp_path):
    # In two epochs of 1920 vectors.
    trained, run = module(), trainer(tmp_path, 30)
    datamodule = Planted()
    trained.sae.initialise(datamodule.sample(500, "train"))
    with torch.no_grad():
        trained.sae.b_enc[:5] = -1e4
    run.fit(trained, datamodule)
    assert float(run.callback_metrics["train/dead_fraction"]) >= 5 / 64
    assert (trained.silent_for[:5] == 30 * 128).all()


@pytest.mark.parametrize(
    "architecture", ["topk", "matryoshka_batch_topk", "jumprelu", "vanilla", "gated"]
)
def test_every_architecture_trains(architecture, tmp_path):
    trained, run = module(architecture=architecture), trainer(tmp_path, 15)
    run.fit(trained, Planted())
    assert 0 < float(run.callback_metrics["val/fvu"]) < 1.5


def test_mixed_precision_trains_with_clipped_gradients(tmp_path):
    trained, run = module(), trainer(tmp_path, 60, precision="bf16-mixed")
    run.fit(trained, Planted())
    assert trained.sae.W_dec.dtype == torch.float32
    assert float(run.callback_metrics["val/fvu"]) < 0.9


def test_options_reach_the_architecture_and_unknown_ones_are_refused():
    assert module(options={"auxiliary_weight": 0.5}).sae.auxiliary_weight == 0.5
    with pytest.raises(TypeError, match="sparkle"):
        module(options={"sparkle": 1})


def test_demonstrations_are_no_activations(tmp_path):
    class Other(LightningDataModule):
        batch_size = 1

        def train_dataloader(self) -> DataLoader:
            return DataLoader(torch.zeros(4, D_IN))

    with pytest.raises(ValueError, match="ActivationDataModule"):
        trainer(tmp_path, 2).fit(module(), Other())
