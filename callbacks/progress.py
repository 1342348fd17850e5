"""How far a run is, and how long it still takes: a bar on a terminal, a line now and then in a log.

The estimate covers the whole run, validations included, and both kinds of limit: the run ends at
whichever comes first, its last step or its time.
"""

import math
import time
from datetime import timedelta
from typing import Any, override

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomTimeColumn
from rich import get_console
from rich.progress import ProgressColumn, Task
from rich.text import Text


class Forecast:
    """Estimates the share of a run that is done and the time that is left."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._began_at = 0.0
        self._validation_began_s = 0.0
        self._last_validation_s = 0.0

    def start(self, trainer: Trainer) -> None:
        """Start the clock; a resumed run is judged by its speed since then."""
        self._began_s = time.monotonic()
        self._began_at = _steps_done(trainer)

    def validation_starts(self) -> None:
        """Note the start of a validation."""
        self._validation_began_s = time.monotonic()

    def validation_ends(self) -> None:
        """Note its end: a run that stops by time validates once more after the limit."""
        self._last_validation_s = time.monotonic() - self._validation_began_s

    @property
    def elapsed_s(self) -> float:
        """Wall time since the start, in s."""
        return time.monotonic() - self._began_s

    def done(self, trainer: Trainer) -> float:
        """Return the share of the run that is done, 0 to 1: the larger of steps and time."""
        return min(1.0, max(_steps_done(trainer), _time_done(trainer)))

    def left_s(self, trainer: Trainer) -> float | None:
        """Return the wall time left, in s; None when nothing limits the run or nobody can tell."""
        estimates = []
        progress = _steps_done(trainer) - self._began_at
        if progress > 0:
            left = max(0.0, 1 - _steps_done(trainer))
            estimates.append(self.elapsed_s * left / progress)
        timer = _timer(trainer)
        if timer is not None and (remaining := timer.time_remaining()) is not None:
            estimates.append(max(0.0, remaining) + self._last_validation_s)
        return min(estimates, default=None)


def _steps_done(trainer: Trainer) -> float:
    """Return the share of steps or epochs that is done; 0 when neither is limited."""
    shares = [0.0]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        if 0 < batches < math.inf:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready / batches
            # At the end of an epoch its counter and that of its batches are both up.
            epochs: Any = trainer.fit_loop.epoch_progress.current
            under_way = done if epochs.ready > epochs.processed else 0.0
            shares.append((epochs.processed + under_way) / trainer.max_epochs)
    return max(shares)


def _time_done(trainer: Trainer) -> float:
    timer = _timer(trainer)
    if timer is None or (remaining := timer.time_remaining()) is None:
        return 0.0
    elapsed = timer.time_elapsed()
    return elapsed / max(elapsed + remaining, 1e-9)


def _timer(trainer: Trainer) -> Timer | None:
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((callback for callback in callbacks if isinstance(callback, Timer)), None)


def in_words(seconds: float | None) -> str:
    """Write a duration as ``h:mm:ss``."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


class _RunColumn(ProgressColumn):
    """Share of the run that is done, and time left."""

    max_refresh = 0.5

    def __init__(self, trainer: Trainer, forecast: Forecast) -> None:
        super().__init__()
        self._trainer = trainer
        self._forecast = forecast

    @override
    def render(self, task: Task) -> Text:
        if self._trainer.state.fn != "fit":
            return Text("")
        forecast, trainer = self._forecast, self._trainer
        return Text(
            f"{forecast.done(trainer):.0%} of run, {in_words(forecast.left_s(trainer))} left",
            style="dim",
            no_wrap=True,
        )


class RunProgress(RichProgressBar):
    """A progress bar on a terminal; elsewhere one line every ``every_s``.

    Args:
        every_s: Time between two lines in a log file, in s.
        refresh_rate: Redraws of the bar a second.
    """

    def __init__(self, every_s: float = 30.0, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)
        self.every_s = every_s
        self._forecast = Forecast()
        self._lines = not get_console().is_terminal
        self._said_at_s = -math.inf
        if self._lines:
            self.disable()

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs in (None, -1):
            # Lightning would write "Epoch 3/-2".
            return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        whole_run = _RunColumn(trainer, self._forecast)
        return [whole_run if isinstance(each, CustomTimeColumn) else each for each in columns]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forecast.start(trainer)
        self._said_at_s = time.monotonic()
        super().on_train_start(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forecast.validation_starts()
        super().on_validation_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._forecast.validation_ends()
        super().on_validation_end(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._lines and time.monotonic() - self._said_at_s >= self.every_s:
            self._said_at_s = time.monotonic()
            if trainer.is_global_zero:
                print(self.line(trainer, pl_module), flush=True)

    def line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Say in one line where the run is."""
        metrics = {
            key: value
            for key, value in self.get_metrics(trainer, pl_module).items()
            if isinstance(value, int | float)
        }
        words = [
            f"step {trainer.global_step}",
            f"{self._forecast.done(trainer):.0%}",
            *(f"{key} {value:.4g}" for key, value in metrics.items()),
            f"{in_words(self._forecast.elapsed_s)} gone",
            f"{in_words(self._forecast.left_s(trainer))} left",
        ]
        return " | ".join(words)
