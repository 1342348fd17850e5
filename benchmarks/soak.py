"""Whether a long run leaks: two hours of the demo configuration, watched from outside.

    python -m benchmarks.soak --hours 2 --output_dir soak

Trains ``configs/demo.yaml`` with all its diagnostics until the time is up, and every
``--interval_s`` adds up what the training process and its children (W&B) hold: memory (proportional
set size: shared pages are counted once), also of each apart, open files, threads; and what lies on
the disk: checkpoints, pictures and videos, W&B files, the rest of the run folder, and temporary
files. Everything is kept as it is in any run, so the media grow by one step's worth at each
validation, the report's page up to its bound; nothing else may grow: the trend over the last three
quarters of the run, the Theil-Sen slope, extrapolated over them, has to be below 5 % of their
median or below one unit.

Writes ``benchmarks/results/soak.json`` and ``docs/images/soak.webp``.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import psutil
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from callbacks.resources import MIB, held

ROOT = Path(__file__).resolve().parents[1]
WARM_SHARE = 0.25
"""Part of the run at its start in which caches fill and first pictures are made."""
FLAT_SHARE = 0.05
UNITS = {
    "memory_mib": 16.0,
    "memory_training_mib": 16.0,
    "memory_children_mib": 16.0,
    "open_files": 3.0,
    "threads": 3.0,
    "processes": 1.0,
    "checkpoints_mib": 1.0,
    "temporary_mib": 1.0,
    "other_mib": 1.0,
}
"""What has to be flat, and how much growth over the run is still no growth."""
GROWING = ("media_mib", "wandb_mib", "report_mib")
"""What is meant to grow: the pictures of each validation, here, for W&B, and in the report, which
has a bound."""


def folder_mib(folder: Path, without: tuple[str, ...] = ()) -> float:
    """Return what the files below ``folder`` take, in MiB; hard links are counted once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in without]
        for name in files:
            try:
                facts = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            seen[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
    return sum(seen.values()) / MIB


def on_disk(run: Path, temporary: Path) -> dict[str, float]:
    """Return what a run has on the disk."""
    parts = ("checkpoints", "media", "wandb", "report")
    sizes = {f"{part}_mib": folder_mib(run / part) for part in parts}
    sizes["other_mib"] = folder_mib(run, without=parts)
    sizes["temporary_mib"] = folder_mib(temporary)
    return sizes


def last_step(run: Path) -> int:
    """Return the last step in the run's ``metrics.csv``."""
    with (run / "metrics.csv").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    first = lines[-1].split(",")[0] if len(lines) > 1 else "0"
    return int(float(first)) if first.replace(".", "").isdigit() else 0


def trend(seconds: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return median and growth over the time after the warm-up (Theil, 1950; Sen, 1968)."""
    late = seconds >= seconds[-1] * WARM_SHARE
    x, y = seconds[late], values[late]
    i, j = np.triu_indices(len(x), k=1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    return {
        "median": float(np.median(y)),
        "max": float(y.max()),
        "growth": slope * float(x[-1] - x[0]),
        "growth_per_hour": slope * 3600,
    }


def draw(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Draw all series over time."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    hours = np.array([row["seconds"] for row in rows]) / 3600
    panels = [
        (
            "memory, MiB (children: W&B)",
            ("memory_mib", "memory_training_mib", "memory_children_mib"),
        ),
        ("open files, threads, processes", ("open_files", "threads", "processes")),
        ("disk, MiB: must be flat", ("checkpoints_mib", "temporary_mib", "other_mib")),
        ("disk, MiB: pictures of each validation", GROWING),
        ("optimiser steps", ("step",)),
    ]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 11), sharex=True)
    for axis, (name, keys) in zip(axes, panels, strict=True):
        for key in keys:
            axis.plot(hours, [row[key] for row in rows], label=key.removesuffix("_mib"))
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylim(bottom=0)
        axis.axvspan(0, hours[-1] * WARM_SHARE, color="0.93", zorder=0)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=8, loc="center left")
    axes[-1].set_xlabel("hours (grey: warm-up, not judged)")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def commit() -> str:
    """Return the commit at hand."""
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--interval_s", type=float, default=10.0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"))
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "soak.webp")
    given = parser.parse_args()
    seconds = given.hours * 3600
    temporary = Path(tempfile.mkdtemp(prefix="soak-"))
    words = [sys.executable, str(ROOT / "train.py"), "fit", "-c", str(ROOT / "configs/demo.yaml")]
    words += ["--name", "soak", "--output_dir", str(given.output_dir)]
    words += ["--trainer.max_steps", "100000000", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.max_time", f"00:{int(seconds // 3600):02}:{int(seconds // 60 % 60):02}:00"]
    run = given.output_dir / "soak" / "last"
    at_commit, began = commit(), time.time()
    log = (temporary.parent / f"{temporary.name}.log").open("wb")
    training = psutil.Popen(
        words,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary), "WANDB_MODE": "offline"},
    )
    rows: list[dict[str, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("soak", total=seconds)
        started = None
        while training.poll() is None:
            time.sleep(given.interval_s)
            fresh = run.is_dir() and (run / "metrics.csv").is_file()
            if not fresh or run.resolve().stat().st_ctime < began:
                continue  # The demonstrations are made first; the clock starts with training.
            started = started or time.monotonic()
            elapsed_s = time.monotonic() - started
            row = {"seconds": elapsed_s, "step": float(last_step(run))}
            rows.append(row | held(training) | on_disk(run, temporary))
            progress.update(bar, completed=elapsed_s)
    log.close()
    if training.returncode or len(rows) < 8:
        print(Path(log.name).read_text(errors="replace")[-4000:])
        raise SystemExit(f"training ended with {training.returncode} after {len(rows)} looks")
    rows = rows[:-1]  # The last look is into a process that is ending.
    index = json.loads((run / "media" / "index.json").read_text())
    times = np.array([row["seconds"] for row in rows])
    result = {
        "commit": at_commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hours": float(times[-1]) / 3600,
        "looks": len(rows),
        "steps": rows[-1]["step"],
        "media_index_entries": len(index),
        "warm_share": WARM_SHARE,
        "trends": {
            key: trend(times, np.array([row[key] for row in rows])) for key in (*UNITS, *GROWING)
        },
    }
    flat = {
        key: result["trends"][key]["growth"]
        < max(UNITS[key], FLAT_SHARE * result["trends"][key]["median"])
        for key in UNITS
    }
    result |= {"flat": flat, "rows": rows}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"{result['hours']:.2f} h of configs/demo.yaml, {result['steps']:.0f} steps"
    draw(rows, given.picture, title)
    for key in (*UNITS, *GROWING):
        facts, verdict = result["trends"][key], {True: "flat", False: "GROWS", None: "by design"}
        print(
            f"{key:20} median {facts['median']:9.1f}  max {facts['max']:9.1f}  growth "
            f"{facts['growth']:+8.2f}  {verdict[flat.get(key)]}"
        )
    raise SystemExit(0 if all(flat.values()) else 1)


if __name__ == "__main__":
    main()
