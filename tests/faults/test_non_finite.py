"""Nothing that is not finite reaches the weights."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from toy import ToyData, ToyDataset, ToyModule

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.exact_resume import ExactResume
from callbacks.non_finite import NonFiniteError, NonFiniteStop
from policies.checkpoint_files import read_checkpoint

pytestmark = pytest.mark.fault(13)


class Remember(Callback):
    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append(next(pl_module.parameters()).detach().clone())


def train(
    folder: Path,
    module: ToyModule,
    poisoned: int | None = None,
    bad: float = math.nan,
    where: str = "actions",
    **options: Any,
) -> Remember:
    remember = Remember()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[NonFiniteStop(), ExactResume(), remember, LastCheckpoint()],
        **options,
    )
    try:
        trainer.fit(module, Spoilt(poisoned, bad, where))
    finally:
        if remember.weights:
            assert torch.equal(next(module.parameters()), remember.weights[-1])
        assert all(bool(torch.isfinite(weight).all()) for weight in module.parameters())
    return remember


class Spoilt(ToyData):
    """The toy's samples, one of which has a value that is no number."""

    def __init__(self, sample: int | None, bad: float, where: str) -> None:
        super().__init__()
        self._spoilt = (sample, bad, where)

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        sample, bad, where = self._spoilt
        if sample is not None:
            assert isinstance(loader.dataset, ToyDataset)
            getattr(loader.dataset, where)[sample].view(-1)[0] = bad
        return loader


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("where", "accumulate"), [("actions", 1), ("actions", 2), ("state", 1), ("state", 2)]
)
def test_a_bad_value_in_the_data_is_traced_to_its_frame(
    tmp_path: Path, where: str, accumulate: int, bad: float
) -> None:
    with pytest.raises(NonFiniteError, match=r"not finite: episode 2 frame 7\."):
        train(tmp_path, ToyModule(3, 2), 27, bad, where, accumulate_grad_batches=accumulate)
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] > 0
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())


class Explosive(ToyModule):
    """A finite loss with an infinite gradient: the square root at zero."""

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        if self.trainer.global_step < 3:
            return loss
        return loss + self.net[0].bias.sub(self.net[0].bias.detach()).abs().sum().sqrt()


def test_an_infinite_gradient_of_a_finite_loss_is_caught(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 3: the gradient of net\.0\.bias .*samples of the batch"
    ):
        train(tmp_path, Explosive(3, 2))


class Huge(ToyModule):
    """Gradients whose sum of squares overflows, though each is finite."""

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * 1e30


def test_large_finite_gradients_pass(tmp_path: Path) -> None:
    assert len(train(tmp_path, Huge(3, 2)).weights) == 11
