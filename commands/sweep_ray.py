"""A sweep by Ray Tune: the same file and the same runs, spread over a cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.sweep_file import Choice, Range, Sweep
from commands.sweep_trials import RUNS, Trial, best_value, read_curve, run_trial, trial_name
from policies.workers import start_ray

VALUE = "value"
STEP = "step"
NUMBER = "number"


def search_with_ray(
    sweep: Sweep, folder: Path, n_trials: int, n_workers: int, gpus_per_trial: float
) -> list[Trial]:
    """Draw trials at random, and stop those that fall behind (ASHA, Li et al. 2020).

    Args:
        sweep: What to search; its sampler and pruner are Optuna's and not used.
        folder: Of the sweep, where all nodes see it; one that was begun is continued.
        n_trials: Of the sweep.
        n_workers: Trials at once.
        gpus_per_trial: Of each trial; a share lets several have one.

    Raises:
        ValueError: If Ray is not installed or does not start.
    """
    start_ray(n_workers)
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    mode = "min" if sweep.direction == "minimize" else "max"
    space = {each.key: _domain(tune, each) for each in sweep.parameters}
    # The number names the run; a trial that is restored finds it again.
    space[NUMBER] = tune.grid_search(list(range(n_trials)))
    storage = folder.absolute() / "ray"
    trainable = tune.with_resources(
        tune.with_parameters(_train, sweep=sweep, folder=str(folder.absolute())),
        {"cpu": 1, "gpu": gpus_per_trial},
    )
    experiment = storage / "sweep"
    if tune.Tuner.can_restore(str(experiment)):
        tuner = tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                max_concurrent_trials=n_workers,
                scheduler=ASHAScheduler(
                    time_attr=STEP, metric=VALUE, mode=mode, max_t=2**31, grace_period=1
                ),
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=str(storage), verbose=0),
        )
    found = []
    for result in tuner.fit():
        values = dict(result.config or {})
        number = values.pop(NUMBER)
        curve = read_curve(folder / RUNS / trial_name(number) / "last", sweep.metric)
        value = best_value(curve, sweep.direction)
        reason = str(result.error).strip().splitlines()[-1] if result.error else ""
        complete = bool((result.metrics or {}).get("complete"))
        state = "failed" if reason or value is None else "complete" if complete else "pruned"
        found.append(Trial(number, values, state, value, tuple(curve), reason))
    return sorted(found, key=lambda trial: trial.number)


def _train(config: Mapping[str, Any], sweep: Sweep, folder: str) -> None:
    """One trial, in a process of Ray's that Ray ends when the trial falls behind."""
    from ray import tune

    values = {key: value for key, value in config.items() if key != NUMBER}
    last: dict[str, Any] = {}

    def report(step: int, value: float) -> bool:
        last.update({STEP: step, VALUE: value})
        tune.report({**last, "complete": False})
        return False

    trial = run_trial(sweep, config[NUMBER], values, Path(folder), report)
    if trial.state == "failed":
        raise RuntimeError(trial.reason)
    tune.report({**last, "complete": True})


def _domain(tune: Any, parameter: Choice | Range) -> Any:
    if isinstance(parameter, Choice):
        return tune.choice(list(parameter.values))
    low, high, step = parameter.low, parameter.high, parameter.step
    if parameter.is_whole:
        # Ray leaves out the upper end.
        if parameter.log:
            return tune.lograndint(low, high + 1)
        return tune.qrandint(low, high, int(step)) if step else tune.randint(low, high + 1)
    if parameter.log:
        return tune.loguniform(low, high)
    return tune.quniform(low, high, step) if step else tune.uniform(low, high)
