"""Diagnostics: when they run, that training never notices, and where their findings go."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from test_checkpoints import fit
from toy import Shout, ToyData, ToyModule, same

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import Dashboard, read_index
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, read_metrics
from policies.checkpoint_files import read_checkpoint
from policies.interface import Findings


def weights(folder: Path) -> dict:
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    return {key: checkpoint[key] for key in ("state_dict", "current_model_state", "exact_resume")}


def resume(
    folder: Path, steps: int, ckpt_path: Path | None, *callbacks: Callback, logger: Any = False
) -> None:
    """Train the toy to a step, from a checkpoint if there is one."""
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        logger=logger,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), *callbacks],
    )
    trainer.fit(ToyModule(3, 2), ToyData(), ckpt_path=ckpt_path, weights_only=True)


def test_training_is_bitwise_the_same_with_and_without_diagnostics(tmp_path: Path) -> None:
    """They switch modes, freeze weights, leave gradients and draw random numbers."""
    always = (ExactResume(), EMA(decay=0.9), LastCheckpoint())
    fit(tmp_path / "alone", *always)
    always = (ExactResume(), EMA(decay=0.9), LastCheckpoint())
    fit(tmp_path / "watched", Shout(at_start=True), *always)
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "watched")) == []
    always = (ExactResume(), EMA(decay=0.9), LastCheckpoint())
    rarely = Shout(at_start=True, max_share=0.0)
    fit(tmp_path / "skipped", rarely, *always)
    assert rarely.steps == [0, 4, 12]
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "skipped")) == []


@pytest.mark.parametrize(
    ("every", "at_start", "steps"),
    [(1, False, [4, 8, 12]), (2, False, [8, 12]), (5, True, [0, 12])],
)
def test_cadence(tmp_path: Path, every: int, at_start: bool, steps: list[int]) -> None:
    """Every n-th validation, and always the last one; never in the sanity check."""
    shout = Shout(every_n_validations=every, at_start=at_start)
    fit(tmp_path, shout)
    assert shout.steps == steps


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
        assert set(entry) == {"images", "videos", "tables", "arrays"}
        for files in entry.values():
            assert all((tmp_path / path).is_file() for path in files.values())
    for files in index["8"].values():
        assert {key.partition("/")[0] for key in files} == {"early", "shout"}
    table = json.loads((tmp_path / index["8"]["tables"]["shout/words"]).read_text())
    assert table == {
        "columns": ["word", "step", "loudness", "heard"],
        "rows": [["hey", 8, 0.8, True], ["ho", 8, None, False]],
    }


def test_what_is_computed_again_after_a_resume_is_forgotten_first(tmp_path: Path) -> None:
    """Also in an index from before tables and arrays were kept."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, Shout(), LastCheckpoint(), ExactResume(), steps=8)
    at8 = last.rename(tmp_path / "at8.ckpt")
    resume(tmp_path, 12, at8, Shout(), LastCheckpoint(), ExactResume())
    file = tmp_path / "media" / "index.json"
    index = read_index(file)
    assert list(index) == ["4", "8", "12"]
    old = {
        step: {kind: entry[kind] for kind in ("images", "videos")} for step, entry in index.items()
    }
    file.write_text(json.dumps(old))
    assert read_index(file)["4"] == {**old["4"], "tables": {}, "arrays": {}}

    resume(tmp_path, 10, at8, LastCheckpoint(), ExactResume())
    assert list(read_index(file)) == ["4", "8"], "nothing of steps that are to come again"
    resume(tmp_path, 12, at8, Shout(), LastCheckpoint(), ExactResume())
    assert read_index(file)["12"] == index["12"]


def test_a_key_belongs_to_one_diagnostic(tmp_path: Path) -> None:
    """Whoever comes second fails, even when the two are not due at the same validation."""

    class Echo(Shout):
        def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
            return Findings(images={"shout/loudness": __file__})

    with pytest.raises(ValueError, match=r"'shout/loudness'.*'shout' and 'echo'"):
        fit(tmp_path, Shout(), Echo(every_n_validations=2, strict=True))
    with pytest.warns(UserWarning, match="'shout' and 'echo'"):
        trainer = fit(tmp_path, Shout(), Echo())
    assert Dashboard.of(trainer).failed == ["echo"] * 3
    assert trainer.callback_metrics["shout/loudness"] == pytest.approx(1.2)


def test_a_name_belongs_to_one_diagnostic(tmp_path: Path) -> None:
    class Echo(Shout):
        pass

    with pytest.raises(ValueError, match="Echo are both called 'shout'"):
        fit(tmp_path, Shout(), Echo(name="shout"))


class Clock(Callback):
    """A clock that only training (10 s a step) and :class:`Slow` move."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s

    def on_train_batch_end(self, *_: Any) -> None:
        self.now_s += 10


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("callbacks.dashboard.time", clock)
    monkeypatch.setattr("callbacks.schedule.time", clock)
    return clock


class Slow(Shout):
    def __init__(self, clock: Clock, cost_s: float = 100, **options: Any) -> None:
        super().__init__(**options)
        self.clock = clock
        self.cost_s = cost_s

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        self.clock.now_s += self.cost_s
        self.steps.append(trainer.global_step)
        return Findings()


@pytest.mark.parametrize(
    ("max_share", "at_start", "steps"),
    [
        # 40 s of training between validations, 100 s a look: on time when n looks fit into
        # max_share * (10 s * step + 100 s * n). The first and the last are never skipped.
        (0.5, False, [4, 20, 32, 40]),
        (0.5, True, [0, 4, 32, 40]),
        (0.0, False, [4, 40]),
        (1.0, False, list(range(4, 41, 4))),
        (None, False, list(range(4, 41, 4))),
    ],
)
def test_a_bounded_diagnostic_is_skipped_when_one_more_would_cost_too_much(
    tmp_path: Path, clock: Clock, max_share: float | None, at_start: bool, steps: list[int]
) -> None:
    slow = Slow(clock, max_share=max_share, at_start=at_start)
    log = CsvLog(str(tmp_path))
    resume(tmp_path, 40, None, clock, slow, Slow(clock, cost_s=0, name="other"), logger=log)
    assert slow.steps == steps
    rows = [row for row in read_metrics(log.path) if "diagnostics/other_s" in row]
    assert [row["step"] for row in rows] == list(range(4, 41, 4))
    for row in rows:
        looked = row["step"] in steps
        assert ("diagnostics/slow_s" in row) == looked
        assert row.get("diagnostics/slow_skipped") == (None if max_share is None else not looked)
        if max_share is not None:
            spent_s = 100 * sum(step <= row["step"] for step in steps)
            share = spent_s / (10 * row["step"] + spent_s)
            assert row["diagnostics/slow_share"] == pytest.approx(share)
            if looked and row["step"] not in (4, 40):
                assert share <= max_share
        assert "diagnostics/other_skipped" not in row


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("cut_at", [2, 22])
def test_a_resumed_run_skips_what_the_whole_one_skips(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, at_start: bool, cut_at: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    class Cut(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == cut_at:
                raise InterruptedError

    def run(folder: Path, slow: Slow, checkpoint: Path | None = None, *more: Callback) -> None:
        last = LastCheckpoint(every_n_train_steps=2)
        resume(folder, 60, checkpoint, clock, slow, ExactResume(), last, *more)

    def slow() -> Slow:
        return Slow(clock, max_share=0.4, at_start=at_start)

    whole, first, second = slow(), slow(), slow()
    run(tmp_path / "whole", whole)
    assert len(whole.steps) < 6, "most are skipped"
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", first, None, Cut())
    clock.now_s += 5000
    run(tmp_path / "parts", second, tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert first.steps + second.steps == whole.steps


def test_a_checkpoint_from_before_shares_were_bounded_is_continued() -> None:
    shout = Shout(max_share=0.1)
    shout.load_state_dict({"validations": 3, "last_step": 12})
    assert shout.state_dict() == {"validations": 3, "last_step": 12, "spent_s": 0, "last_s": 0}


@pytest.mark.parametrize("max_share", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(max_share: float) -> None:
    with pytest.raises(ValueError, match="max_share"):
        Shout(max_share=max_share)


def test_the_share_of_diagnostics_counts_the_untrained_policy_in_both_terms(
    tmp_path: Path, clock: "Clock"
) -> None:
    """On a clock that only diagnostics move, they are all there is."""
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
        callbacks=[Slow(clock, at_start=True), dashboard],
    )
    trainer.fit(ToyModule(3, 2), ToyData())
    assert clock.now_s == 1300
    assert dashboard.latest["diagnostics/share"] == 1


def test_a_picture_that_was_not_written_is_an_error_of_the_diagnostic(tmp_path: Path) -> None:
    class Forgetful(Shout):
        def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
            findings = super().diagnose(trainer, module, folder)
            (folder / "square.png").unlink()
            return findings

    with pytest.raises(ValueError, match=r"square\.png is not a file"):
        fit(tmp_path, Forgetful(strict=True))
