"""``analyze.py sweep``: train many configurations of one file, and say which is best.

Each trial is a normal run of ``train.py`` in ``<output_dir>/runs/trial_0000/``. The same command
started again, or on several machines that share the folder, goes on with what is there.
"""

import argparse
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NoReturn, get_args

from commands.sweep_file import Sweep, read_sweep, wandb_sweep
from policies.atomic_files import whole_file, write_atomically
from policies.json_files import json_text

Engine = Literal["optuna", "ray", "wandb"]
RESULT_FILE = "sweep.json"
PICTURE_FILE = "sweep.png"
BEST_FILE = "best.yaml"
WANDB_FILE = "wandb_sweep.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="what to train, vary and compare by"
    )
    parser.add_argument(
        "--n_trials",
        type=int,
        metavar="N",
        help="trials in --output_dir when the sweep is done, those of all processes together "
        "(default: as the file says)",
    )
    parser.add_argument(
        "--engine",
        choices=get_args(Engine),
        default="optuna",
        help="optuna: here, without a server; ray: over a Ray cluster; wandb: only write the file "
        "for 'wandb sweep' (default: %(default)s)",
    )
    parser.add_argument(
        "--n_workers", type=int, default=1, metavar="N", help="trials at once, of --engine ray"
    )
    parser.add_argument(
        "--gpus_per_trial", type=float, default=0, metavar="N", help="of --engine ray"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="-- WORDS",
        help="more words of train.py for all trials, such as -- --data.init_args.path DEMOS.hdf5",
    )


def run(arguments: argparse.Namespace) -> int:
    """Search, and write table, picture and best configuration.

    Returns:
        0; 1 when no trial has a value; 130 or 143 when it was stopped by Ctrl-C or SIGTERM.

    Raises:
        ValueError: For anything wrong with the file, the folder or an engine.
    """
    from commands.sweep_trials import TrialInterrupted

    sweep = read_sweep(Path(arguments.config), arguments.words)
    folder = Path(arguments.output_dir)
    n_trials = sweep.n_trials if arguments.n_trials is None else arguments.n_trials
    for name, value in (("n_trials", n_trials), ("n_workers", arguments.n_workers)):
        if value < 1:
            raise ValueError(f"--{name} {value}: give at least 1")
    if arguments.engine == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WANDB_FILE, wandb_sweep(sweep))
        print(f"written to {folder / WANDB_FILE}; start it with: wandb sweep {folder / WANDB_FILE}")
        return 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if arguments.engine == "ray":
            from commands.sweep_ray import search_with_ray

            found = search_with_ray(
                sweep, folder, n_trials, arguments.n_workers, arguments.gpus_per_trial
            )
        else:
            from commands.sweep_optuna import search

            found = search(sweep, folder, n_trials)
    except (TrialInterrupted, _Stopped, KeyboardInterrupt) as stopped:
        # Ctrl-C reaches the trial's run, too, which may end first.
        status = getattr(stopped, "exit_status", 128 + signal.SIGINT)
        print(f"{str(stopped) or 'the sweep was stopped'}; the same command goes on")
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
    return finish(sweep, folder, found, Path(arguments.config).stem)


class _Stopped(BaseException):
    """SIGTERM, which like Ctrl-C is nobody's error to catch."""

    exit_status = 128 + signal.SIGTERM


def _stop(signal_number: int, frame: object) -> NoReturn:
    raise _Stopped


def finish(sweep: Sweep, folder: Path, found: Sequence, title: str) -> int:
    """Write what came of a sweep, and print it.

    Args:
        sweep: What was searched.
        folder: Where to write.
        found: Trials that are done.
        title: Part of the best run's name.

    Returns:
        0; 1 when no trial has a value.
    """
    import cv2
    from rich.console import Console
    from rich.table import Table

    from commands.sweep_trials import best_config
    from rendering.sweep import TrialMarks, sweep_chart

    sign = 1 if sweep.direction == "minimize" else -1
    valued = sorted(
        (trial for trial in found if trial.value is not None), key=lambda trial: sign * trial.value
    )
    # A pruned trial may lead by a lucky validation.
    complete = [trial for trial in valued if trial.state == "complete"]
    document = {
        "metric": sweep.metric,
        "direction": sweep.direction,
        "best": complete[0].number if complete else None,
        "trials": [asdict(trial) for trial in found],
    }
    write_atomically(folder / RESULT_FILE, json_text(document))
    console = Console()
    table = Table(title=f"{len(found)} trials, best first")
    keys = [parameter.key for parameter in sweep.parameters]
    names = [key.replace(".init_args", "") for key in keys]
    for name in ("trial", sweep.metric, "state", "step", *names):
        table.add_column(name, justify="right")
    for trial in [*valued, *(trial for trial in found if trial.value is None)]:
        value = trial.reason[:60] if trial.value is None else f"{trial.value:.4g}"
        step = str(trial.curve[-1][0]) if trial.curve else ""
        given = [_short(trial.values.get(key)) for key in keys]
        table.add_row(str(trial.number), value, trial.state, step, *given)
    console.print(table)
    if not valued:
        console.print(f"no trial has a value; look at {folder / 'logs'}", highlight=False)
        return 1
    marks = [
        TrialMarks(trial.values, trial.state, trial.value, trial.curve)
        for trial in found
        if trial.value is not None
    ]
    picture = sweep_chart(marks, sweep.metric, sweep.direction == "minimize")
    with whole_file(folder / PICTURE_FILE) as part:
        _, encoded = cv2.imencode(".png", picture[..., ::-1])
        part.write_bytes(encoded.tobytes())
    if complete:
        write_atomically(folder / BEST_FILE, best_config(complete[0], folder, title))
        console.print(
            f"train the best again with: python train.py fit -c {folder / BEST_FILE}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"written to {folder}", highlight=False)
    return 0


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
