"""The forecast, against runs whose length is known."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer
from test_checkpoints import fit

from callbacks import progress
from callbacks.progress import Forecast, RunProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    return clock


def run(step: int = 0, max_steps: int = -1, max_epochs: int = -1, *callbacks: Any) -> Any:
    counters = SimpleNamespace(current=SimpleNamespace(ready=0, processed=0))
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        max_epochs=max_epochs,
        num_training_batches=10,
        callbacks=list(callbacks),
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=SimpleNamespace(ready=0, processed=0)),
            epoch_loop=SimpleNamespace(batch_progress=counters),
        ),
    )


def test_steady_steps_are_forecast_exactly(clock: Clock) -> None:
    forecast, trainer = Forecast(), run(max_steps=100)
    forecast.start(trainer)
    assert forecast.left_s(trainer) is None, "no step yet: nobody can tell"
    clock.now_s += 30
    trainer.global_step = 25
    assert forecast.done(trainer) == 0.25
    assert forecast.left_s(trainer) == pytest.approx(90)


def test_a_resumed_run_is_judged_by_its_own_speed(clock: Clock) -> None:
    forecast, trainer = Forecast(), run(step=80, max_steps=100)
    forecast.start(trainer)
    clock.now_s += 10
    trainer.global_step = 90
    assert forecast.left_s(trainer) == pytest.approx(10)


def test_whichever_limit_comes_first_counts(clock: Clock) -> None:
    timer = Timer(timedelta(seconds=60))
    timer.on_train_start(None, None)  # pyright: ignore[reportArgumentType]
    forecast, trainer = Forecast(), run(0, 1000, -1, timer)
    forecast.start(trainer)
    clock.now_s += 15
    trainer.global_step = 10
    assert forecast.done(trainer) == pytest.approx(0.25)
    assert forecast.left_s(trainer) == pytest.approx(45)
    trainer.global_step = 900
    assert forecast.done(trainer) == pytest.approx(0.9)
    assert forecast.left_s(trainer) == pytest.approx(15 / 9)


def test_a_run_that_stops_by_time_still_validates_once_more(clock: Clock) -> None:
    timer = Timer(timedelta(seconds=60))
    timer.on_train_start(None, None)  # pyright: ignore[reportArgumentType]
    forecast, trainer = Forecast(), run(0, -1, -1, timer)
    forecast.start(trainer)
    forecast.validation_starts()
    clock.now_s += 7
    forecast.validation_ends()
    clock.now_s += 13
    assert forecast.left_s(trainer) == pytest.approx(40 + 7)


def test_epochs_count_with_their_batches(clock: Clock) -> None:
    forecast, trainer = Forecast(), run(max_epochs=4)
    forecast.start(trainer)
    epochs = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    shares = []
    for epoch in range(4):
        epochs.ready = epoch + 1
        for batch in (5, 10):
            batches.ready = batch
            shares.append(forecast.done(trainer))
        epochs.processed = epoch + 1
        shares.append(forecast.done(trainer))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[3] == pytest.approx(1.5 / 4)


def test_a_log_file_gets_lines_not_a_flood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_with_bar(tmp_path, RunProgress(every_s=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 12
    assert "train/loss" in lines[-1]
    assert "100%" in lines[-1]
    fit_with_bar(tmp_path, RunProgress(every_s=3600))
    assert "step " not in capsys.readouterr().out


def fit_with_bar(folder: Path, bar: RunProgress) -> None:
    fit(folder, bar, enable_progress_bar=True)
