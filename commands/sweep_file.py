"""What a sweep is: a file that says what to train, what to vary, and what to compare by.

Every engine reads the same file; names of parameters are keys of ``train.py``.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Direction = Literal["minimize", "maximize"]
Plain = bool | int | float | str | None
MAX_BYTES = 1 << 20
MAX_STEPS = 1000
"""Values of a range with a step."""


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of some values."""

    key: str
    values: tuple[Plain, ...]


@dataclass(frozen=True)
class Range:
    """A parameter that takes any value between two; whole numbers where both are."""

    key: str
    low: float
    high: float
    step: float | None = None
    """Distance of neighbouring values."""
    log: bool = False
    """Whether factors count, not distances."""

    @property
    def is_whole(self) -> bool:
        """Whether it takes whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def grid(self) -> tuple[float, ...]:
        """All its values, counted from ``low``; empty without a step."""
        if self.step is None:
            return ()
        # In decimals: three steps of 0.1 are 0.3.
        low, high, step = (Decimal(str(each)) for each in (self.low, self.high, self.step))
        kind = int if self.is_whole else float
        return tuple(kind(low + place * step) for place in range(int((high - low) / step) + 1))


@dataclass(frozen=True)
class Component:
    """A class of Optuna's with its arguments."""

    class_path: str
    init_args: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What to train, what to vary, what to compare by."""

    configs: tuple[str, ...]
    """Of ``train.py fit -c``, first to last."""
    metric: str
    """Name of a logged number; a trial counts as its best value."""
    direction: Direction
    n_trials: int
    parameters: tuple[Choice | Range, ...]
    fixed: Mapping[str, Any]
    """Keys that all trials share, on top of the configs."""
    sampler: Component
    pruner: Component
    seed: int
    words: tuple[str, ...] = ()
    """More words of ``train.py``, from the command line."""

    def train_words(self, values: Mapping[str, Any]) -> list[str]:
        """Words of ``train.py`` for one trial, without where it lives; what is varied comes last.

        A configuration that is read later would win over it.
        """
        words = ["fit", *(word for config in self.configs for word in ("-c", config))]
        words += [f"--{key}={as_word(value)}" for key, value in self.fixed.items()]
        words += self.words
        return [*words, *(f"--{key}={as_word(value)}" for key, value in values.items())]

    def facts(self) -> dict[str, Any]:
        """Everything that makes trials comparable, as plain values.

        Configurations count by what they hold: the same file may lie elsewhere on another machine.
        """
        found = asdict(self)
        for name in ("n_trials", "sampler", "pruner", "seed"):
            del found[name]
        found["configs"] = [_hash_of(config) for config in self.configs]
        found["words"] = [*_on_configs(self.words, _hash_of)]
        return json.loads(json.dumps(found))


CONFIG_WORDS = ("-c", "--config")


def _on_configs(words: Sequence[str], change: Callable[[str], str]) -> Iterator[str]:
    """The same words, with the paths of configurations changed."""
    for before, word in zip(("", *words), words, strict=False):
        name, is_joined, path = word.partition("=")
        if before in CONFIG_WORDS:
            yield change(word)
        elif is_joined and name in CONFIG_WORDS:
            yield f"{name}={change(path)}"
        else:
            yield word


def _hash_of(config: str) -> str:
    try:
        return hashlib.sha256(Path(config).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{config}: cannot be read ({error.strerror})") from error


def as_word(value: Any) -> str:
    """A value as ``train.py`` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def read_sweep(path: Path, words: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file.

    Args:
        path: Of the file; configs in it are relative to it.
        words: More words of ``train.py``.

    Raises:
        ValueError: Naming the file, the key and the mend.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: has more than {MAX_BYTES:,} bytes; that is no sweep")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: is no YAML ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: give keys with values, configs and parameters first of all")
    defaults: dict[str, Any] = {
        "direction": "minimize",
        "n_trials": 20,
        "fixed": {},
        "sampler": {"class_path": "optuna.samplers.TPESampler"},
        "pruner": {"class_path": "optuna.pruners.MedianPruner"},
        "seed": 0,
    }
    needed = {"configs", "metric", "parameters"}
    if unknown := sorted(map(str, {*found} - {*defaults} - needed)):
        raise ValueError(f"{path}: {unknown[0]}: no such key; {sorted(needed | {*defaults})}")
    if missing := sorted(needed - {*found}):
        raise ValueError(f"{path}: {missing[0]} is missing")
    found = {**defaults, **found}
    reader = _Reader(path)
    parameters = reader.mapping("parameters", found["parameters"])
    if not parameters:
        raise ValueError(f"{path}: parameters: name at least one to vary")
    fixed = reader.mapping("fixed", found["fixed"])
    if both := sorted({*parameters} & {*fixed}):
        raise ValueError(f"{path}: {both[0]}: is fixed and varied; leave one of them out")
    given = {word.partition("=")[0] for word in words}
    if both := [key for key in parameters if f"--{key}" in given]:
        raise ValueError(
            f"--{both[0]} after --: {path} varies it; leave the word out, or put it under fixed "
            "instead of parameters"
        )
    if found["direction"] not in get_args(Direction):
        raise ValueError(f"{path}: direction {found['direction']!r}: {get_args(Direction)}")
    if not isinstance(found["metric"], str) or not found["metric"]:
        raise ValueError(f"{path}: metric {found['metric']!r}: give the name of a logged number")
    return Sweep(
        configs=reader.configs(found["configs"]),
        metric=found["metric"],
        direction=found["direction"],
        n_trials=reader.whole("n_trials", found["n_trials"], 1),
        parameters=tuple(reader.parameter(key, entry) for key, entry in parameters.items()),
        fixed=fixed,
        sampler=reader.component("sampler", found["sampler"]),
        pruner=reader.component("pruner", found["pruner"]),
        seed=reader.whole("seed", found["seed"], 0),
        # A trial may run elsewhere.
        words=tuple(_on_configs(words, lambda path: str(Path(path).absolute()))),
    )


@dataclass(frozen=True)
class _Reader:
    """Checks values, and names the file and the key of those that are wrong."""

    path: Path

    def mapping(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{self.path}: {name}: give keys of train.py, each with a value")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: {name}: give plain values ({error})") from error
        return value

    def configs(self, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{self.path}: configs {value!r}: give a list of files")
        files = [self.path.absolute().parent / each for each in value]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"{self.path}: configs: {missing[0]} is not there")
        return tuple(str(file.resolve()) for file in files)

    def whole(self, name: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{self.path}: {name} {value!r}: give a whole number from {least}")
        return value

    def component(self, name: str, value: Any) -> Component:
        kind = f"optuna.{name}s."
        entry = {"init_args": {}, **value} if isinstance(value, dict) else {}
        path, arguments = entry.get("class_path"), entry.get("init_args")
        if {*entry} != {"class_path", "init_args"} or not isinstance(arguments, dict):
            raise ValueError(f"{self.path}: {name} {value!r}: give class_path and init_args")
        if not (isinstance(path, str) and path.startswith(kind) and path.count(".") == 2):
            raise ValueError(f"{self.path}: {name}: class_path {path!r}: give one of {kind}*")
        if path.endswith((".GridSampler", ".BruteForceSampler")):
            # They end Optuna's own loop, and there is none: processes ask for trials.
            raise ValueError(f"{self.path}: {name}: {path} has an end of its own: give another")
        return Component(path, arguments)

    def parameter(self, key: str, entry: Any) -> Choice | Range:
        if isinstance(entry, dict) and {*entry} == {"values"}:
            values = entry["values"]
            if isinstance(values, list) and values and all(isinstance(v, Plain) for v in values):
                return Choice(key, tuple(values))
        elif isinstance(entry, dict) and {"low", "high"} <= {*entry} <= {
            "low",
            "high",
            "step",
            "log",
        }:
            return self._range(key, entry)
        raise ValueError(
            f"{self.path}: parameters.{key}: give values: [...], or low and high, with log: true "
            f"or a step; not {json.dumps(entry)[:80]}"
        )

    def _range(self, key: str, entry: Mapping[str, Any]) -> Range:
        where = f"{self.path}: parameters.{key}"
        numbers = {name: entry[name] for name in ("low", "high", "step") if name in entry}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                # YAML reads 1e-4 as a word.
                raise ValueError(f"{where}: {name} {value!r}: give a number, such as 1.0e-4")
            if not math.isfinite(value):
                raise ValueError(f"{where}: {name} {value!r}: give a finite number")
        log = entry.get("log", False)
        if not isinstance(log, bool):
            raise ValueError(f"{where}: log {log!r}: give true or false")
        low, high, step = entry["low"], entry["high"], entry.get("step")
        if low >= high:
            raise ValueError(f"{where}: low {low} is not below high {high}")
        if log and (low <= 0 or step is not None):
            raise ValueError(f"{where}: log needs low above 0, and no step")
        if step is not None and not 0 < step <= high - low:
            raise ValueError(f"{where}: step {step}: give one between 0 and {high - low}")
        if isinstance(low, int) and isinstance(high, int) and isinstance(step, float):
            raise ValueError(f"{where}: step {step}: low and high are whole, give a whole step")
        if step is not None and (high - low) / step >= MAX_STEPS:
            raise ValueError(f"{where}: step {step}: gives more than {MAX_STEPS:,} values")
        return Range(key, low, high, step, log)


def wandb_sweep(sweep: Sweep) -> str:
    """The same sweep as W&B's own file, for who has a server: ``wandb sweep FILE``."""
    document = {
        "program": "train.py",
        "method": "bayes",
        "metric": {"name": sweep.metric, "goal": sweep.direction},
        "run_cap": sweep.n_trials,
        "parameters": {each.key: _wandb_parameter(each) for each in sweep.parameters},
        "command": ["${env}", "python", "${program}", *sweep.train_words({}), "${args}"],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _wandb_parameter(parameter: Choice | Range) -> dict[str, Any]:
    if isinstance(parameter, Choice):
        return {"values": list(parameter.values)}
    if parameter.grid:
        # Its own steps are counted from 0, not from the lower end.
        return {"values": list(parameter.grid)}
    limits = {"min": parameter.low, "max": parameter.high}
    if parameter.log:
        if parameter.is_whole:
            return {"distribution": "q_log_uniform_values", **limits, "q": 1}
        return {"distribution": "log_uniform_values", **limits}
    return {"distribution": "int_uniform" if parameter.is_whole else "uniform", **limits}
