"""Diagnostics: when they run, that training never notices, and where their findings go."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from test_checkpoints import fit
from toy import Shout, ToyData, ToyModule, same

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, read_metrics
from callbacks.schedule import ERROR_FILE
from policies.checkpoint_files import read_checkpoint
from policies.interface import Findings


def weights(folder: Path) -> dict:
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "current_model_state", "exact_resume")}


def test_training_is_bitwise_the_same_with_and_without_diagnostics(tmp_path: Path) -> None:
    """They switch modes, freeze weights, leave gradients and draw random numbers."""
    always = (ExactResume(), EMA(decay=0.9), LastCheckpoint())
    fit(tmp_path / "alone", *always)
    always = (ExactResume(), EMA(decay=0.9), LastCheckpoint())
    fit(tmp_path / "watched", Shout(at_start=True), *always)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "watched")) == []


@pytest.mark.parametrize(
    ("every", "at_start", "steps"),
    [(1, False, [4, 8, 12]), (2, False, [8, 12]), (5, True, [0, 12])],
)
def test_cadence(tmp_path: Path, every: int, at_start: bool, steps: list[int]) -> None:
    """Every n-th validation, and always the last one; never in the sanity check."""
    shout = Shout(every_n_validations=every, at_start=at_start)
    fit(tmp_path, shout)
    assert shout.steps == steps


def test_a_failing_diagnostic_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    broken, working = Shout(fail=True, name="broken"), Shout()
    trainer = fit(tmp_path, broken, working)
    assert Dashboard.of(trainer).failed == ["broken"] * 3
    log = (tmp_path / ERROR_FILE).read_text()
    assert "step 12, broken" in log
    assert working.steps == [4, 8, 12]


def test_a_strict_diagnostic_stops_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ink is out"):
        fit(tmp_path, Shout(fail=True, strict=True))


def test_one_row_holds_metrics_findings_and_times_of_a_validation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dashboard = Dashboard()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=8,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
        logger=[CsvLog(str(tmp_path))],
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        # The order is unkind on purpose: findings arrive before and after the dashboard's hooks.
        callbacks=[
            Shout(name="early"),
            dashboard,
            Shout(at_start=True),
            Shout(fail=True, name="x"),
        ],
    )
    trainer.fit(ToyModule(3, 2), ToyData())
    rows = read_metrics(tmp_path / "metrics.csv")
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    validations = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validations] == [4, 8]
    for row in validations:
        assert row["shout/loudness"] == 0.1 * row["step"]
        assert {"diagnostics/early_s", "diagnostics/shout_s", "diagnostics/share"} <= row.keys()
    assert [row["diagnostics/errors"] for row in validations] == [1, 2]
    training = [row["step"] for row in rows if "train/loss" in row]
    assert training == list(range(1, 9)), "rows count optimiser steps"
    assert float(trainer.callback_metrics["shout/loudness"]) == pytest.approx(0.8)

    index = json.loads((tmp_path / "media" / "index.json").read_text())
    assert list(index) == ["0", "4", "8"]
    for entry in index.values():
        for path in [*entry["images"].values(), *entry["videos"].values()]:
            assert (tmp_path / path).is_file()


def test_the_share_of_diagnostics_counts_the_untrained_policy_in_both_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only diagnostics move, they are all there is."""
    clock = SimpleNamespace(now_s=0.0)
    clock.perf_counter = lambda: clock.now_s
    monkeypatch.setattr("callbacks.dashboard.time", clock)
    monkeypatch.setattr("callbacks.schedule.time", clock)

    class Slow(Shout):
        def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
            clock.now_s += 100
            return Findings(scalars={"slow/number": 1.0})

    dashboard = Dashboard()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=8,
        max_epochs=-1,
        val_check_interval=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # The dashboard hears of the start of training last.
        callbacks=[Slow(at_start=True), dashboard],
    )
    trainer.fit(ToyModule(3, 2), ToyData())
    assert clock.now_s == 300
    assert dashboard.latest["diagnostics/share"] == 1


def test_a_picture_that_was_not_written_is_an_error_of_the_diagnostic(tmp_path: Path) -> None:
    class Forgetful(Shout):
        def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
            findings = super().diagnose(trainer, module, folder)
            (folder / "square.png").unlink()
            return findings

    with pytest.raises(ValueError, match=r"square\.png is not a file"):
        fit(tmp_path, Forgetful(strict=True))
