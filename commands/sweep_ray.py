"""A sweep by Ray Tune: the same file and the same runs, spread over a cluster."""

import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.sweep_file import Choice, Range, Sweep
from commands.sweep_trials import (
    RUNS,
    Trial,
    best_value,
    claim_sweep,
    read_curve,
    run_trial,
    trial_name,
)
from policies.workers import start_ray

VALUE = "value"
STEP = "step"
TRIAL = "trial"


def search_with_ray(
    sweep: Sweep, folder: Path, n_trials: int, n_workers: int, gpus_per_trial: float
) -> list[Trial]:
    """Draw trials at random, and stop those that fall behind (ASHA, Li et al. 2020).

    Args:
        sweep: What to search; its sampler and pruner are Optuna's and not used.
        folder: Of the sweep, where all nodes see it; one that was begun is continued.
        n_trials: Of the sweep; more than there are add to them.
        n_workers: Trials at once.
        gpus_per_trial: Of each trial; a share lets several have one.

    Raises:
        ValueError: If Ray is not installed or does not start, the folder holds another sweep, or
            ``train.py`` does not take the words of a trial.
    """
    # Ctrl-C ends the search instead of giving half of it.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    claim_sweep(sweep, folder, "ray")
    start_ray(n_workers)
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    mode = "min" if sweep.direction == "minimize" else "max"
    storage = folder.absolute() / "ray"
    trainable = tune.with_resources(
        tune.with_parameters(
            _train, sweep=sweep, folder=str(folder.absolute()), cwd=str(Path.cwd())
        ),
        {"cpu": 1, "gpu": gpus_per_trial},
    )
    found = []
    for numbers in experiments(storage, n_trials):
        name = _experiment_name(numbers)
        if tune.Tuner.can_restore(str(storage / name)):
            tuner = tune.Tuner.restore(str(storage / name), trainable, resume_unfinished=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={TRIAL: tune.grid_search([draw(sweep, number) for number in numbers])},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=n_workers,
                    scheduler=ASHAScheduler(
                        time_attr=STEP, metric=VALUE, mode=mode, max_t=2**31, grace_period=1
                    ),
                ),
                run_config=tune.RunConfig(name=name, storage_path=str(storage), verbose=0),
            )
        found += [_trial(sweep, folder, result) for result in tuner.fit()]
    return sorted(found, key=lambda trial: trial.number)


def experiments(storage: Path, n_trials: int) -> list[range]:
    """Numbers of the trials of each of Ray's experiments: those begun, and one with the rest.

    Ray cannot add trials to an experiment.
    """
    begun = sorted(storage.glob("trials_*_to_*")) if storage.is_dir() else []
    found = []
    for folder in begun:
        _, first, _, last = folder.name.split("_")
        found.append(range(int(first), int(last) + 1))
    n_there = found[-1].stop if found else 0
    return [*found, range(n_there, n_trials)] if n_there < n_trials else found


def _experiment_name(numbers: range) -> str:
    return f"trials_{numbers.start:04d}_to_{numbers.stop - 1:04d}"


def draw(sweep: Sweep, number: int) -> dict[str, Any]:
    """Number and values of a trial, the same whenever they are drawn."""
    generator = random.Random(f"{sweep.seed} {number}")
    values = {each.key: _draw_one(generator, each) for each in sweep.parameters}
    return {"number": number, "values": values}


def _draw_one(generator: random.Random, parameter: Choice | Range) -> Any:
    if isinstance(parameter, Choice):
        return generator.choice(parameter.values)
    if parameter.grid:
        return generator.choice(parameter.grid)
    low, high = parameter.low, parameter.high
    if not parameter.is_whole:
        if parameter.log:
            return min(max(math.exp(generator.uniform(math.log(low), math.log(high))), low), high)
        return generator.uniform(low, high)
    if parameter.log:
        drawn = math.exp(generator.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(max(round(drawn), int(low)), int(high))
    return generator.randint(int(low), int(high))


def _trial(sweep: Sweep, folder: Path, result: Any) -> Trial:
    number, values = (result.config[TRIAL][name] for name in ("number", "values"))
    curve = read_curve(folder / RUNS / trial_name(number) / "last", sweep.metric)
    value = best_value(curve, sweep.direction)
    reason = str(result.error).strip().splitlines()[-1] if result.error else ""
    complete = bool((result.metrics or {}).get("complete"))
    state = "failed" if reason or value is None else "complete" if complete else "pruned"
    return Trial(number, values, state, value, tuple(curve), reason)


def _train(config: Mapping[str, Any], sweep: Sweep, folder: str, cwd: str) -> None:
    """One trial, in a process of Ray's that Ray ends when the trial falls behind."""
    from ray import tune

    number, values = (config[TRIAL][name] for name in ("number", "values"))
    last: dict[str, Any] = {}

    def report(step: int, value: float) -> bool:
        last.update({STEP: step, VALUE: value})
        tune.report({**last, "complete": False})
        return False

    # Ray gives every trial a folder of its own to work in.
    trial = run_trial(sweep, number, values, Path(folder), report, cwd=Path(cwd))
    if trial.state == "failed":
        raise RuntimeError(trial.reason)
    tune.report({**last, "complete": True})
