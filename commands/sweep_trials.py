"""One trial of a sweep: a run of ``train.py`` in a process and a folder of its own.

Its numbers are read from ``metrics.csv``, the record of truth, while it trains. So a trial is a run
like any other: it needs nothing of the sweep's, and may itself use several processes or GPUs.
"""

import fcntl
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from callbacks.loggers import CSV_FILE, read_metrics
from callbacks.run_folder import LAST, last_run_folder
from commands.sweep_file import Direction, Sweep

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
POLL_S = 1.0
"""How often a trial's numbers are looked at."""
RUNS = "runs"
EXIT_USAGE = 2
EXIT_INTERRUPTED = {128 + signal.SIGINT, 128 + signal.SIGTERM}

State = Literal["complete", "pruned", "failed"]


class TrialInterrupted(Exception):  # noqa: N818  (like KeyboardInterrupt, no error)
    """Somebody stopped a trial's run; it goes on when the sweep does."""


@dataclass(frozen=True)
class Trial:
    """What came of one."""

    number: int
    values: Mapping[str, Any]
    """Key of each parameter to its value."""
    state: State
    value: float | None
    """Best of the metric; None of a trial that failed."""
    curve: tuple[tuple[int, float], ...]
    """Step and metric, at each validation."""
    reason: str = ""
    """Why it failed."""

    @property
    def name(self) -> str:
        """Of its run."""
        return trial_name(self.number)


def trial_name(number: int) -> str:
    """Name of a trial's run."""
    return f"trial_{number:04d}"


def best_value(curve: Sequence[tuple[int, float]], direction: Direction) -> float | None:
    """Best of a curve's finite values; None where there is none."""
    finite = [value for _, value in curve if math.isfinite(value)]
    if not finite:
        return None
    return min(finite) if direction == "minimize" else max(finite)


def read_curve(run: Path, metric: str) -> list[tuple[int, float]]:
    """Step and metric of every row that has it; nothing before the first is written."""
    file = run / CSV_FILE
    rows = read_metrics(file) if file.is_file() else []
    return [(int(row["step"]), row[metric]) for row in rows if metric in row]


def take_lock(file: Path) -> IO[str] | None:
    """Open and lock a file; None where another process, or a run it started, holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = file.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def run_trial(
    sweep: Sweep,
    number: int,
    values: Mapping[str, Any],
    folder: Path,
    should_stop: Callable[[int, float], bool],
    lock: IO[str] | None = None,
) -> Trial:
    """Train one trial, or go on with it where it was interrupted.

    Args:
        sweep: What it is a part of.
        number: Of the trial.
        values: Of its parameters.
        folder: Of the sweep.
        should_stop: Told step and metric of each validation; whether the trial is not worth
            its time.
        lock: That the run inherits: it is held as long as somebody trains.

    Raises:
        TrialInterrupted: If the run was stopped by a signal.
        ValueError: If ``train.py`` does not understand its command line.
    """
    name = trial_name(number)
    runs = folder / RUNS
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [
        *sweep.train_words(values),
        f"--name={name}",
        f"--output_dir={runs}",
        "--ckpt_path=auto",
        "--trainer.enable_progress_bar=false",
    ]
    curve: list[tuple[int, float]] = []
    pruned = False
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock.fileno(),),
        )
        try:
            while True:
                ended = process.poll() is not None
                found = read_curve(runs / name / LAST, sweep.metric)
                for step, value in found[len(curve) :]:
                    if should_stop(step, value) and not pruned and not ended:
                        process.terminate()
                        pruned = True
                curve = found
                if ended:
                    break
                time.sleep(POLL_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    value = best_value(curve, sweep.direction)
    result = (number, values)
    if pruned:
        return Trial(*result, "pruned", value, tuple(curve))
    if process.returncode == 0 and value is not None:
        return Trial(*result, "complete", value, tuple(curve))
    reason = _last_lines(log)
    if process.returncode in EXIT_INTERRUPTED:
        raise TrialInterrupted(f"{name} was stopped; the same command goes on with it")
    if process.returncode == EXIT_USAGE:
        raise ValueError(f"train.py does not take the words of {name}: {reason}")
    if process.returncode == 0:
        reason = f"it logged no finite {sweep.metric}; give the name of a number in {CSV_FILE}"
    return Trial(*result, "failed", None, tuple(curve), reason or f"exit {process.returncode}")


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or [""])[-1].strip()


def best_config(trial: Trial, folder: Path, title: str) -> str:
    """The configuration of a trial's run, under another name, ready for ``train.py fit -c``."""
    import yaml

    from callbacks.run_config import CONFIG_FILE

    run = last_run_folder(folder / RUNS, trial.name)
    config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    config.update(name=f"{title}_best", output_dir="outputs")
    config.pop("ckpt_path", None)
    config["trainer"].pop("enable_progress_bar", None)
    return (
        f"# The best of a sweep: {trial.name}, at {trial.value:g}.\n"
        f"# Command: python train.py fit -c best.yaml\n"
        f"{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"
    )
