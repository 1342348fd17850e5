"""The end of a run: what came out, and where everything lies."""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, override

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from callbacks.checkpoints import LastCheckpoint
from callbacks.dashboard import INDEX, Dashboard, read_index
from callbacks.loggers import CSV_FILE, WandbLog
from callbacks.progress import in_words
from callbacks.rollouts import Rollouts
from callbacks.run_folder import MEDIA, written
from policies.atomic_files import write_atomically
from policies.interface import PolicyView
from policies.json_files import json_text

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report/index.html"

_IMPORTED_S = time.monotonic()


class RunSummary(Callback):
    """Writes ``summary.json`` and prints a table when training ends.

    The file holds the last value of every logged number, ``wall_s``, ``status``, and the paths of
    ``checkpoint`` (the best one), ``last_checkpoint``, ``report`` (the page to open), ``video`` (of
    the rollouts, where there are some) and ``videos`` (the newest of each name), relative to the
    run folder.
    ``wall_s`` adds up the processes of a run that was continued, each up to the checkpoint that
    the next one started from.

    Args:
        keys: Numbers that are always in the file (null when never logged) and in the table; when
            None, the first action's error beside its baselines, and how the rollouts went.
    """

    def __init__(self, keys: Sequence[str] | None = None) -> None:
        self.keys = None if keys is None else list(keys)
        self._earlier_s = 0.0

    @property
    def wall_s(self) -> float:
        """Wall time of the run so far, earlier processes included, in s."""
        return self._earlier_s + process_age_s()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"wall_s": self.wall_s}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_s = state_dict["wall_s"]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            summary = self.write(trainer, "finished")
            # Wide enough that no path is broken: a terminal wraps it, a copy of it still works.
            console = Console()
            console = Console(width=max(console.width, 240), highlight=False)
            console.print(_table(trainer, summary, self._keys(trainer)))

    def write(self, trainer: Trainer, status: str) -> dict[str, Any]:
        """Write ``summary.json`` and return what it holds.

        Raises:
            RunFolderError: If the disk refuses.
        """
        run = Path(trainer.default_root_dir)
        numbers = dict.fromkeys(self._keys(trainer)) | _numbers(trainer)
        summary = dict(sorted(numbers.items())) | {
            "status": status,
            "step": trainer.global_step,
            "wall_s": round(self.wall_s, 2),
            **_files(trainer, run),
        }
        if not getattr(trainer, "fast_dev_run", False):
            with written(run / SUMMARY_FILE):
                write_atomically(run / SUMMARY_FILE, json_text(summary))
        return summary

    def _keys(self, trainer: Trainer) -> Sequence[str]:
        return default_keys(trainer) if self.keys is None else self.keys


def default_keys(trainer: Trainer) -> list[str]:
    """Names of a policy's headline numbers, in its unit and in the score of its task."""
    unit = getattr(trainer.lightning_module, "unit", None)
    errors = ("val/first_action_l1", "baseline/hold_position_l1", "baseline/mean_action_l1")
    keys = [] if unit is None else [f"{name}_{unit}" for name in errors]
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, Rollouts):
            score = f"mean_max_{callback.task.score_name}"
            keys += [f"{callback.prefix}/{score}", f"{callback.prefix}/success"]
            if callback.at_start:
                keys.append(f"{callback.untrained_prefix}/{score}")
    return keys


def process_age_s() -> float:
    """Return the wall time since this process started, imports included, in s."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        # Fields after the program's name in brackets; the 22nd of all is the start in clock ticks.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    return time.monotonic() - _IMPORTED_S


def _numbers(trainer: Trainer) -> dict[str, float | None]:
    """Return the last value of everything that was logged; null for what JSON cannot say."""
    logged = {**trainer.logged_metrics, **trainer.callback_metrics}
    found = {key: float(value) for key, value in logged.items()}
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, Dashboard):
            # Not rounded to single precision on the way, and from before a resume, too.
            found |= callback.latest
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def _files(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Return where checkpoints and videos lie, relative to the run folder."""

    def inside(path: str | Path | None) -> str | None:
        if not path or not Path(path).is_file():
            return None
        return str(Path(path).resolve().relative_to(run.resolve(), walk_up=True))

    best = last = None
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            best = best or inside(callback.best_model_path)
        elif isinstance(callback, LastCheckpoint):
            last = inside(callback.path(trainer))
    index = read_index(run / MEDIA / INDEX)
    videos: dict[str, str] = {}
    for step in sorted(index, key=int):
        videos |= index[step].get("videos", {})
    return {
        "checkpoint": best or last,
        "last_checkpoint": last,
        "report": inside(run / REPORT_FILE),
        "video": videos.get("rollout/video") or next(iter(videos.values()), None),
        "videos": videos,
    }


def _table(trainer: Trainer, summary: Mapping[str, Any], keys: Sequence[str]) -> Table:
    run = Path(trainer.default_root_dir)
    title = f"{run.parent.name}: {summary['step']} steps"
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key in keys:
        if summary[key] is not None:
            table.add_row(key, f"{summary[key]:.4g}")
    table.add_row("time", in_words(summary["wall_s"]))
    table.add_section()
    table.add_row("run folder", _short(run))
    for label, key in (
        ("report", "report"),
        ("best checkpoint", "checkpoint"),
        ("last checkpoint", "last_checkpoint"),
    ):
        if summary[key]:
            table.add_row(label, _short(run / summary[key]))
    if summary["checkpoint"] and isinstance(
        getattr(trainer.lightning_module, "view", None), PolicyView
    ):
        table.add_row("look inside", f"python analyze.py browse --policy_path {_short(run)}")
    for key, path in summary["videos"].items():
        table.add_row(key, _short(run / path))
    if (run / CSV_FILE).is_file():
        table.add_row("all numbers", _short(run / CSV_FILE))
    table.add_row("summary", _short(run / SUMMARY_FILE))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLog) and logger.folder is not None:
            if logger.address:
                table.add_row("W&B", logger.address)
            else:
                folder = _short(logger.folder)
                table.add_row("W&B, offline", folder)
                table.add_row("look at it", f"wandb leet {folder}")
                # A continued run has one folder for each process, all with one id.
                every = _short(logger.folder.parent / "offline-run-*")
                table.add_row("upload it", f"wandb sync {every}")
    return table


def _short(path: Path) -> str:
    """Write a path relative to where the user is, when it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
