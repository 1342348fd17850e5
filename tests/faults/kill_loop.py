"""Kill a run with SIGKILL again and again, let it go on each time, and look for what is lost.

    python tests/faults/kill_loop.py --kills 200

Nearly all kills hit a forked process that trains the toy model with the real trainer, checkpoints,
hard-linked ``last.ckpt``, metrics, diagnostics and index, saving after every step; some hit a
whole ``train.py``. Every second kill comes as soon as a half-written file is seen, the others at
random moments. Half of them have TMPDIR on another file system (``/dev/shm``), where Lightning's
own writer leaves torn files.

After each kill every checkpoint must load, ``metrics.csv``, ``media/index.json`` and
``config.yaml`` must parse, the newest checkpoint must not be older than before, ``last.ckpt`` must
be there, and the metrics must have a row for each step up to the newest checkpoint. The next start
must sweep away what was half-written. At least a quarter of all kills must hit a write: the others
prove little.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kill_loop.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "callbacks")]

import torch  # noqa: E402
import yaml  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from toy import Shout, ToyData, ToyModule  # noqa: E402

from callbacks.checkpoints import (  # noqa: E402
    AtomicCheckpointIO,
    Checkpoint,
    LastCheckpoint,
    sweep_parts,
)
from callbacks.dashboard import Dashboard, read_index  # noqa: E402
from callbacks.exact_resume import ExactResume  # noqa: E402
from callbacks.loggers import CsvLog, read_metrics  # noqa: E402
from callbacks.run_folder import CHECKPOINTS, RunLock, write_beside  # noqa: E402
from policies.checkpoint_files import newest_valid_checkpoint, read_checkpoint  # noqa: E402

WINDOW_S = 0.5
"""A kill at a random moment comes up to this long after training began or went on."""
SIGHT_LIMIT_S = 5.0
"""How long to look for a half-written file before killing all the same."""
SIGHT_DELAY_S = 0.002
"""A kill on sight comes up to this long after it."""
LEAST_SHARE = 0.25
"""Of all kills, those that must hit a write."""
START_LIMIT_S = 240.0
TMPDIRS = ("same", "/dev/shm")


@dataclass
class Kills:
    """What many kills did to one run each; everything but the counts of kills must be zero."""

    kills: int = 0
    in_a_write: int = 0
    """Kills that left a part of a file: those prove something."""
    swept: int = 0
    """Parts of files that the next start found and cleared away."""
    steps: int = 0
    """Of the newest checkpoint in the end."""
    checkpoints_read: int = 0
    torn_checkpoints: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """What was there before, or had to be, and is not."""
    unreadable: list[str] = field(default_factory=list)
    not_swept: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        return [*self.torn_checkpoints, *self.lost, *self.unreadable, *self.not_swept]


def train_for_ever(run: Path, tmpdir: str, width: int, told: Connection) -> None:
    """Take the run up where its newest checkpoint is, and save after every step."""
    torch.set_num_threads(1)  # torch's threads do not survive a fork
    tempfile.tempdir = None if tmpdir == "same" else tmpdir
    os.environ["TMPDIR"] = str(run.parent) if tmpdir == "same" else tmpdir
    devices = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devices, 1)
    os.dup2(devices, 2)
    RunLock(run)
    sweep_parts(run)
    told.send("swept")
    write_beside(run / "config.yaml", "model: toy\n")
    folder = run / CHECKPOINTS
    newest = newest_valid_checkpoint(folder).path if any(folder.glob("*.ckpt")) else None
    torch.manual_seed(0)
    best = Checkpoint(monitor="val/loss", save_top_k=2, dirpath=str(folder))

    class Tell(Shout):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            told.send("training")

    trainer = Trainer(
        default_root_dir=run,
        accelerator="cpu",
        max_steps=10**6,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=[CsvLog(str(run))],
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            Dashboard(),
            Tell(name="shout"),
            ExactResume(),
            best,
            LastCheckpoint(every_n_train_steps=1),
        ],
    )
    trainer.fit(
        ToyModule(3, 2, hidden=width),
        ToyData(),
        ckpt_path=None if newest is None else str(newest),
        weights_only=True,
    )


def kill_forks(folder: Path, kills: int, tmpdir: str, seed: int = 0, width: int = 4000) -> Kills:
    """Kill a run of forked processes.

    Args:
        folder: Empty folder of the run.
        kills: How many.
        tmpdir: Where TMPDIR points: ``same`` file system, or a folder on another.
        seed: Of the moments.
        width: Hidden units of the toy: 6 numbers each in the weights, three times in a checkpoint.
    """
    result = Kills()
    chance = random.Random(f"{seed}/{tmpdir}")
    newest = 0
    processes = multiprocessing.get_context("fork")
    for number in range(kills):
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=train_for_ever, args=(folder, tmpdir, width, theirs))
        parts = _parts(folder)
        child.start()
        theirs.close()
        try:
            ours.recv()
            _count_swept(folder, parts, number, result)
            ours.recv()
        except EOFError as error:
            child.join()
            raise RuntimeError(f"start {number} ended by itself ({child.exitcode})") from error
        if number % 2:
            time.sleep(chance.uniform(0, WINDOW_S))
        else:
            wait_for_part(folder, chance)
        child.kill()
        child.join()
        ours.close()
        newest = look(folder, number, newest, result)
    return result


def kill_commands(folder: Path, kills: int, tmpdir: str, seed: int = 0) -> Kills:
    """Kill a run of whole ``train.py`` commands, each started anew.

    Args:
        folder: Empty folder to work in.
        kills: How many.
        tmpdir: Where TMPDIR points.
        seed: Of the moments.
    """
    result = Kills()
    chance = random.Random(f"{seed}/{tmpdir}/commands")
    config = {
        "name": "toy",
        "model": {"class_path": "toy.ToyModule", "init_args": {"hidden": 4000}},
        "data": {"class_path": "toy.ToyData"},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": -1,
            "max_steps": 10**6,
            "val_check_interval": 4,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "callbacks.checkpoints.LastCheckpoint",
                    "init_args": {"every_n_train_steps": 1},
                },
                {"class_path": "toy.Shout"},
            ],
        },
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    variables = dict(os.environ, PYTHONPATH=str(ROOT / "tests" / "callbacks"))
    variables["TMPDIR"] = str(folder) if tmpdir == "same" else tmpdir
    command = [sys.executable, str(ROOT / "train.py"), "fit", "-c", "toy.yaml"]
    newest = 0
    run = folder / "outputs" / "toy" / "last"
    for number in range(kills):
        parts = _parts(run.resolve())
        child = subprocess.Popen(
            [*command, "--ckpt_path", "auto"],
            cwd=folder,
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        file = run / "metrics.csv"
        before = file.stat().st_mtime_ns if file.is_file() else 0
        began = time.monotonic()
        while not file.is_file() or file.stat().st_mtime_ns == before:
            if child.poll() is not None or time.monotonic() - began > START_LIMIT_S:
                child.kill()
                raise RuntimeError(f"start {number} of train.py came to nothing")
            time.sleep(0.01)
        _count_swept(run.resolve(), parts, number, result)
        if number % 2:
            time.sleep(chance.uniform(0, 2 * WINDOW_S))
        else:
            wait_for_part(run.resolve(), chance)
        child.send_signal(signal.SIGKILL)
        child.wait()
        newest = look(run, number, newest, result)
    return result


def wait_for_part(run: Path, chance: random.Random) -> None:
    """Wait until one of the next files of a run is half written; which one is drawn."""
    skipped = chance.randrange(4)
    seen_before = False
    began = time.monotonic()
    while time.monotonic() - began < SIGHT_LIMIT_S:
        seen = any(
            entry.name.endswith(".part")
            for folder in (run / CHECKPOINTS, run, run / "media")
            if folder.is_dir()
            for entry in os.scandir(folder)
        )
        if seen and not seen_before:
            if not skipped:
                break
            skipped -= 1
        seen_before = seen
    time.sleep(chance.uniform(0, SIGHT_DELAY_S))


def _parts(run: Path) -> dict[Path, int]:
    """Half-written files and their times in ns: a new one of the same name is another one."""
    return {part: part.stat().st_mtime_ns for part in run.rglob(".*.part")}


def _count_swept(run: Path, before: dict[Path, int], number: int, result: Kills) -> None:
    for part, time_ns in before.items():
        try:
            if part.stat().st_mtime_ns == time_ns:
                result.not_swept.append(f"kill {number}: {part.relative_to(run)}")
                continue
        except FileNotFoundError:
            pass
        result.swept += 1


def look(run: Path, number: int, newest_before: int, result: Kills) -> int:
    """Count what a kill left behind, and return the step of the newest checkpoint."""
    label = f"kill {number}"
    result.kills += 1
    result.in_a_write += any(run.rglob(".*.part"))
    steps = []
    for file in sorted((run / CHECKPOINTS).glob("*.ckpt")):
        try:
            steps.append(read_checkpoint(file)["global_step"])
            result.checkpoints_read += 1
        except ValueError as error:
            result.torn_checkpoints.append(f"{label}: {error}")
    newest = max(steps, default=0)
    if newest < newest_before:
        result.lost.append(f"{label}: newest checkpoint {newest}, {newest_before} before")
    if steps and not (run / CHECKPOINTS / "last.ckpt").is_file():
        result.lost.append(f"{label}: no last.ckpt")
    try:
        rows = {int(row["step"]) for row in read_metrics(run / "metrics.csv")} if steps else set()
        gaps = sorted(set(range(1, newest + 1)) - rows)
        if gaps:
            result.lost.append(f"{label}: metrics.csv has no row of the steps {gaps[:5]}")
        index = read_index(run / "media" / "index.json")
        files = [
            path for step in index.values() for kind in step.values() for path in kind.values()
        ]
        result.lost += [f"{label}: {path}" for path in files if not (run / path).is_file()]
        # The newest checkpoint may owe its validation; those before it have had theirs.
        due = set(range(4, newest, 4)) - {int(step) for step in index}
        if due:
            result.lost.append(f"{label}: media/index.json has no entry of {sorted(due)[:5]}")
        if (run / "config.yaml").is_file():
            yaml.safe_load((run / "config.yaml").read_text())
        elif steps:
            result.lost.append(f"{label}: config.yaml")
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        result.unreadable.append(f"{label}: {type(error).__name__}: {error}")
    result.steps = newest
    return newest


def main(args: Sequence[str] | None = None) -> None:
    """Kill, print and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="In all.")
    parser.add_argument("--commands", type=int, default=6, help="Of them, of a whole train.py.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file of the counts.")
    chosen = parser.parse_args(args)
    found: dict[str, Any] = {}
    faults = []
    for place, tmpdir in enumerate(TMPDIRS):
        commands = (chosen.commands + place) // 2
        forks = (chosen.kills + place) // 2 - commands
        for name, kill, count in (
            ("trainer", kill_forks, forks),
            ("train.py", kill_commands, commands),
        ):
            with tempfile.TemporaryDirectory() as folder:
                kills = kill(Path(folder), count, tmpdir, chosen.seed)
            key = f"{name}, TMPDIR on {'the same file system' if tmpdir == 'same' else tmpdir}"
            found[key] = asdict(kills)
            faults += kills.faults
            print(
                f"{key}: {kills.kills} kills, {kills.in_a_write} in a write, {kills.swept} swept, "
                f"{kills.checkpoints_read} checkpoints read, step {kills.steps}, "
                f"{len(kills.faults)} faults",
                flush=True,
            )
    hits = sum(each["in_a_write"] for each in found.values())
    if hits < LEAST_SHARE * chosen.kills:
        faults.append(f"only {hits} of {chosen.kills} kills hit a write: too few to prove anything")
    found["seed"] = chosen.seed
    found["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(faults))
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
