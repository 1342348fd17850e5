"""One trial of a sweep: a run of ``train.py`` in a process and a folder of its own.

Its numbers are read from ``metrics.csv``, the record of truth, while it trains. So a trial is a run
like any other: it needs nothing of the sweep's, and may itself use several processes or GPUs.
"""

import fcntl
import json
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
from commands.sweep_file import Choice, Direction, Sweep
from policies.atomic_files import write_atomically
from policies.json_files import read_json

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
POLL_S = 1.0
"""How often a trial's numbers are looked at."""
RUNS = "runs"
SEARCH_FILE = "search.json"
"""In the folder of a sweep: what it searches, and who does."""
TRIAL_FILE = "trial.json"
"""Beside the runs of a trial: what it is a part of, and its values."""
EXIT_USAGE = 2
EXIT_INTERRUPTED = {128 + signal.SIGINT, 128 + signal.SIGTERM}

State = Literal["complete", "pruned", "failed"]


class TrialInterrupted(Exception):  # noqa: N818  (like KeyboardInterrupt, no error)
    """Somebody stopped a trial's run; it goes on when the sweep does."""

    def __init__(self, name: str, exit_status: int) -> None:
        super().__init__(name, exit_status)
        self.exit_status = exit_status
        """Of the run: 130 or 143."""

    def __str__(self) -> str:
        return f"{self.args[0]} was stopped"


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


def claim(file: Path, said: Mapping[str, Any], is_used: bool) -> None:
    """Say what a folder is for; a folder that is for something else is not continued.

    Args:
        file: That says it; written when it is not there.
        said: What it must say.
        is_used: Whether there is work in the folder already.

    Raises:
        ValueError: If it says something else, or there is work that nobody described.
    """
    expected = json.loads(json.dumps(said))
    if not file.is_file():
        if is_used:
            raise ValueError(
                f"{file}: is missing, and there are runs beside it; choose another --output_dir"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(expected, indent=1) + "\n")
        return
    there = read_json(file)
    changed = [key for key in expected if there.get(key) != expected[key]]
    facts, others = expected.get("facts", {}), there.get("facts")
    if "facts" in changed and isinstance(others, dict):
        changed.remove("facts")
        changed += [key for key in facts if others.get(key) != facts[key]]
    if changed or there.keys() != expected.keys():
        raise ValueError(
            f"{file.parent}: holds another sweep ({', '.join(changed)} differ); choose another "
            "--output_dir"
        )


def claim_sweep(sweep: Sweep, folder: Path, engine: str) -> None:
    """Begin a sweep, or go on with the same one.

    Before the first trial, ``train.py`` is asked whether it takes the words of a trial.

    Args:
        sweep: What is searched.
        folder: Where.
        engine: Who searches; two would number their trials alike.

    Raises:
        ValueError: If the folder holds another sweep, or ``train.py`` does not take the words.
    """
    file = folder / SEARCH_FILE
    if not file.is_file():
        _check_words(sweep)
    claim(file, {"engine": engine, "facts": sweep.facts()}, (folder / RUNS).is_dir())


def _check_words(sweep: Sweep) -> None:
    values = {
        each.key: each.values[0] if isinstance(each, Choice) else each.low
        for each in sweep.parameters
    }
    done = subprocess.run(
        [sys.executable, str(TRAIN), *sweep.train_words(values), "--print_config"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise ValueError(
            f"train.py does not take the words of a trial: {_telling_line(done.stderr)}"
        )


def run_trial(
    sweep: Sweep,
    number: int,
    values: Mapping[str, Any],
    folder: Path,
    should_stop: Callable[[int, float], bool],
    lock: IO[str] | None = None,
    cwd: Path | None = None,
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
        cwd: Where its relative paths begin; this process's folder when None.

    Raises:
        TrialInterrupted: If the run was stopped by a signal.
        ValueError: If ``train.py`` does not understand its command line, or the trial's folder
            holds a run of another sweep.
    """
    name = trial_name(number)
    runs = folder / RUNS
    is_used = (runs / name / LAST).is_symlink()
    claim(runs / name / TRIAL_FILE, {"facts": sweep.facts(), "values": values}, is_used)
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
            cwd=cwd,
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
        raise TrialInterrupted(name, process.returncode)
    if process.returncode == EXIT_USAGE:
        raise ValueError(f"train.py does not take the words of {name}: {reason}")
    if process.returncode == 0:
        reason = f"it logged no finite {sweep.metric}; give the name of a number in {CSV_FILE}"
    return Trial(*result, "failed", None, tuple(curve), reason or f"exit {process.returncode}")


def _last_lines(log: Path) -> str:
    return _telling_line(log.read_text(encoding="utf-8", errors="replace"))


def _telling_line(text: str) -> str:
    lines = text.strip().splitlines()
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
