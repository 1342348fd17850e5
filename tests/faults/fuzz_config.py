"""Configurations of ``train.py`` that are wrong: one ``error:`` line, and nothing left behind."""

import contextlib
import io
import os
import random
import warnings
from pathlib import Path
from typing import Any

import yaml
from fuzzing import Case, Target, mutated_bytes, mutated_json
from toy_runs import CONFIG

import train

CALLBACKS: list[dict[str, Any]] = [
    {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}},
    {"class_path": "callbacks.checkpoints.Checkpoint", "init_args": {"monitor": "val/loss"}},
    {"class_path": "callbacks.checkpoints.LastCheckpoint", "init_args": {"every_n_train_steps": 2}},
]
BASE: dict[str, Any] = {
    **CONFIG,
    "seed_everything": 3,
    "output_dir": "outputs",
    "trainer": {**CONFIG["trainer"], "callbacks": CALLBACKS, "gradient_clip_val": 1.0},
}


class RefusedError(Exception):
    """The command line said what is wrong."""


def make_case(rng: random.Random) -> Case:
    """A configuration with wrong values, or wrong text; for one of the ways to use it."""
    kind = rng.choice(("print", "safe", "run"))
    if rng.random() < 0.15:
        return Case(kind, mutated_bytes(rng, yaml.safe_dump(BASE).encode()))
    try:
        text = yaml.safe_dump(mutated_json(rng, BASE), allow_unicode=True)
        return Case(kind, text.encode("utf-8", "surrogatepass"))
    except yaml.YAMLError:
        return Case(kind, b"a: [")


def use(case: Case, folder: Path) -> None:
    """Give the configuration to ``train.main``, far enough to build what it names."""
    (folder / "case.yaml").write_bytes(case.content)
    words = {
        "print": ["fit", "-c", "case.yaml", "--print_config"],
        "safe": ["fit", "-c", "case.yaml", "--safe", "--print_config"],
        # The data refuse in setup, so that nothing is trained, whatever the number of steps.
        "run": ["fit", "-c", "case.yaml", "--data.init_args.fail", "far enough"],
    }[case.kind]
    said = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            train.main(words)
    except SystemExit as stop:
        if stop.code:
            if stop.code not in {1, 2}:
                raise AssertionError(f"exit code {stop.code}") from None
            lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
            if len(lines) != 1:
                raise AssertionError(f"{len(lines)} error lines") from None
            raise RefusedError(lines[0][:2000].encode(errors="replace").decode()) from None
    finally:
        os.chdir(before)
        left = sorted(path.name for path in folder.rglob("*") if path.is_file())
        assert left == ["case.yaml"], f"left behind: {left[:3]}"


TARGET = Target("config", make_case, use, (RefusedError,), limit_s=20.0)
