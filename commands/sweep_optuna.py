"""A sweep by Optuna: one journal in a folder, shared by as many processes as one starts.

The journal is a file, so no server is needed. Every trial has a lock that its process and its run
hold: who finds a running trial without a holder goes on with it, in the same run folder, from its
last checkpoint.
"""

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from commands.sweep_file import Choice, Component, Range, Sweep
from commands.sweep_trials import (
    State,
    Trial,
    claim_sweep,
    run_trial,
    take_lock,
    trial_name,
)

JOURNAL = "journal.log"
STUDY = "sweep"
REASON = "reason"
STATES: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned"}


def search(sweep: Sweep, folder: Path, n_trials: int) -> list[Trial]:
    """Make trials until the folder holds as many as asked for, those of other processes included.

    Args:
        sweep: What to search.
        folder: Of the sweep; one that was begun is continued.
        n_trials: Of all processes together.

    Raises:
        ValueError: If Optuna is not installed, or the folder holds another sweep.
        TrialInterrupted: If somebody stopped a trial's run.
    """
    optuna = _optuna()
    study = _study(optuna, sweep, folder)
    while (chosen := _next_trial(optuna, study, sweep, folder, n_trials)) is not None:
        trial, lock = chosen
        with lock:
            _run(optuna, study, sweep, folder, trial, lock)
    return trials(study)


def trials(study: Any) -> list[Trial]:
    """All that are done, in the order of their numbers."""
    found = []
    for each in study.get_trials(deepcopy=False):
        if not each.state.is_finished():
            continue
        state = STATES.get(each.state.name, "failed")
        found.append(
            Trial(
                each.number,
                dict(each.params),
                state,
                None if state == "failed" else each.user_attrs["best"],
                tuple(sorted(each.intermediate_values.items())),
                each.user_attrs.get(REASON, ""),
            )
        )
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError("Optuna is not installed: uv sync --extra sweeps") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, sweep: Sweep, folder: Path) -> Any:
    from optuna.storages import JournalStorage

    # A wrong one is the file's fault, and leaves nothing behind.
    pruner = _make(sweep.pruner, {})
    _make(sweep.sampler, {"seed": sweep.seed})
    with _locked(folder):
        claim_sweep(sweep, folder, "optuna")
        try:
            return optuna.create_study(
                study_name=STUDY,
                storage=JournalStorage(_journal(folder / JOURNAL)),
                direction=sweep.direction,
                pruner=pruner,
                load_if_exists=True,
            )
        except JournalError:
            raise
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{folder / JOURNAL}: is damaged ({error}); choose another --output_dir"
            ) from error


class JournalError(ValueError):
    """The journal cannot be written; what it held before is as it was."""


def _journal(path: Path) -> Any:
    """Optuna's journal in a file, which ends with a whole line whatever happens to who writes it.

    A process that is killed, or meets a full disk, in the middle of a line would leave what the
    next line is appended to, and no process could read the journal again.
    """
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import get_lock_file

    class Journal(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
            try:
                with get_lock_file(self._lock), path.open("r+b", buffering=0) as file:
                    _append(file, "".join(lines).encode())
            except OSError as error:
                raise JournalError(
                    f"{path}: cannot be written ({error.strerror}); mend that, for a full disk "
                    "make room: the same command goes on"
                ) from error

    return Journal(str(path))


def _append(file: Any, lines: bytes) -> None:
    """Write lines behind the last whole one; all of them or, when the disk refuses, none."""
    end = _end_of_lines(file)
    file.truncate(end)
    file.seek(end)
    try:
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _end_of_lines(file: Any) -> int:
    """Where the last whole line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(end - (1 << 16), 0)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time decides what comes next."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".next.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _next_trial(
    optuna: Any, study: Any, sweep: Sweep, folder: Path, n_trials: int
) -> tuple[Any, IO[str]] | None:
    """A trial that nobody trains, and its lock; None when there are enough."""
    with _locked(folder):
        known = study.get_trials(deepcopy=False)
        for each in known:
            if each.state == optuna.trial.TrialState.RUNNING:
                lock = take_lock(_lock_file(folder, each.number))
                if lock is not None:
                    return optuna.trial.Trial(study, each._trial_id), lock
        if len(known) >= n_trials:
            return None
        # Of two processes with one seed, each would draw the same.
        study.sampler = _make(sweep.sampler, {"seed": sweep.seed + len(known)})
        trial = study.ask()
        lock = take_lock(_lock_file(folder, trial.number))
        assert lock is not None
        return trial, lock


def _lock_file(folder: Path, number: int) -> Path:
    return folder / "locks" / trial_name(number)


def _run(optuna: Any, study: Any, sweep: Sweep, folder: Path, trial: Any, lock: IO[str]) -> None:
    values = {each.key: _suggest(trial, each) for each in sweep.parameters}
    reported = {*trial.storage.get_trial(trial._trial_id).intermediate_values}

    def should_stop(step: int, value: float) -> bool:
        if step not in reported:
            reported.add(step)
            trial.report(value, step)
        return trial.should_prune()

    result = run_trial(sweep, trial.number, values, folder, should_stop, lock)
    print(f"{result.name} {result.state}: {result.reason or result.value}")
    state = optuna.trial.TrialState
    if result.state == "failed":
        trial.set_user_attr(REASON, result.reason)
        study.tell(trial, state=state.FAIL)
        return
    trial.set_user_attr("best", result.value)
    if result.state == "pruned":
        study.tell(trial, state=state.PRUNED)
    else:
        study.tell(trial, result.value)


def _suggest(trial: Any, parameter: Choice | Range) -> Any:
    if isinstance(parameter, Choice):
        return trial.suggest_categorical(parameter.key, parameter.values)
    # The last value of a range with a step, which its upper end need not be.
    high = parameter.grid[-1] if parameter.grid else parameter.high
    if parameter.is_whole:
        step = int(parameter.step or 1)
        return trial.suggest_int(parameter.key, parameter.low, high, step=step, log=parameter.log)
    return trial.suggest_float(
        parameter.key, parameter.low, high, step=parameter.step, log=parameter.log
    )


def _make(component: Component, more: dict[str, Any]) -> Any:
    """Build a sampler or a pruner.

    Raises:
        ValueError: If there is no such class, or it does not take the arguments.
    """
    module, _, name = component.class_path.rpartition(".")
    kind = getattr(import_module(module), name, None)
    if not isinstance(kind, type):
        raise ValueError(f"{component.class_path}: Optuna has no such class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return kind(**more, **component.init_args)
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(
                f"{component.class_path}: {error}; mend its init_args in the sweep's file"
            ) from error
