"""The moving average: its formula, and that it is what everybody sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from test_checkpoints import fit
from toy import Shout, ToyData, ToyModule

from callbacks.checkpoints import LastCheckpoint
from callbacks.ema import EMA
from policies.checkpoint_files import read_checkpoint

FIRST = "net.0.weight"


class Watch(Callback):
    """Keeps the raw weights after each step and those seen by validation metrics."""

    def __init__(self) -> None:
        self.raw: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.raw.append(next(pl_module.parameters()).detach().clone())

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        self.validated.append(next(pl_module.parameters()).detach().clone())


def expected(raw: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = raw[0].double()
    for updates, weights in enumerate(raw[1:], start=1):
        kept = min(decay, (1 + updates) / (10 + updates))
        average = kept * average + (1 - kept) * weights.double()
    return average.float()


@pytest.mark.parametrize("order", ["before", "after"])
def test_metrics_diagnostics_and_checkpoint_hold_the_average(tmp_path: Path, order: str) -> None:
    watch, shout, ema = Watch(), Shout(), EMA(decay=0.4)
    observers = [watch, shout, ema] if order == "before" else [ema, shout, watch]
    fit(tmp_path, *observers, LastCheckpoint())
    average = expected(watch.raw, 0.4)
    assert (average - watch.raw[-1]).abs().max() > 1e-3
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    torch.testing.assert_close(checkpoint["state_dict"][FIRST], average)
    torch.testing.assert_close(shout.weights[-1], average)
    torch.testing.assert_close(watch.validated[-1], average)
    assert torch.equal(checkpoint["current_model_state"][FIRST], watch.raw[-1])


def test_a_checkpoint_written_in_mid_validation_is_not_the_wrong_way_round(tmp_path: Path) -> None:
    class Stumble(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                raise RuntimeError("stumbled")

    watch = Watch()
    with pytest.raises(RuntimeError, match="stumbled"):
        fit(tmp_path, watch, EMA(decay=0.4), Stumble(), LastCheckpoint())
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 8
    assert torch.equal(checkpoint["current_model_state"][FIRST], watch.raw[-1])
    torch.testing.assert_close(checkpoint["state_dict"][FIRST], expected(watch.raw, 0.4))


def test_after_training_the_module_holds_the_average_and_the_file_still_both(
    tmp_path: Path,
) -> None:
    watch = Watch()
    trainer = fit(tmp_path, watch, EMA(decay=0.4), LastCheckpoint(), steps=10)
    module = trainer.lightning_module
    torch.testing.assert_close(next(module.parameters()).detach(), expected(watch.raw, 0.4))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 10, "no validation at step 10: written at the end"
    assert torch.equal(checkpoint["current_model_state"][FIRST], watch.raw[-1])


def test_weights_that_do_not_change_stay_bitwise_the_same() -> None:
    weights = torch.randn(1000)
    average = weights.clone()
    EMA()._move_average([average], [weights], torch.tensor(5))
    assert torch.equal(average, weights)


def test_what_the_module_prepares_in_its_setup_is_in_the_average_from_the_start(
    tmp_path: Path,
) -> None:
    class Prepared(ToyModule):
        def setup(self, stage: str) -> None:
            self.scale.fill_(0.7)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert float(self.scale) == pytest.approx(0.7)

    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=3,
        val_check_interval=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[EMA(every_n_steps=2)],
    )
    trainer.fit(Prepared(3, 2), ToyData())


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}])
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EMA(**wrong)
