"""Whole runs of the toy model through ``train.main``, in this process or a forked one."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

import train
from callbacks.schedule import Diagnostic
from policies.interface import Findings

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "name": "toy",
    "model": {"class_path": "toy.ToyModule"},
    "data": {"class_path": "toy.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 12,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "toy.Shout"}],
    },
}


class Large(Diagnostic):
    """Writes more than a small disk takes."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = n_bytes

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        (folder / "large.bin").write_bytes(bytes(self.n_bytes))
        return Findings(scalars={"large/bytes": float(self.n_bytes)})


class KillAt(Callback):
    """Ends this process in the middle of the batch after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def write_config(folder: Path, **trainer: Any) -> Path:
    """Write ``toy.yaml``, with other settings of the trainer."""
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}))
    return file


def exit_code(*words: str) -> int:
    """Run a command line here; 0 when it comes to its end."""
    try:
        train.main(list(words))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def also(class_path: str, **arguments: Any) -> str:
    """Return the word that adds a callback."""
    callback = {"class_path": class_path, "init_args": arguments}
    return f"--trainer.callbacks+={json.dumps(callback)}"


def last(folder: Path) -> Path:
    """Return the newest run below a working folder."""
    return folder / "outputs" / "toy" / "last"


def forked(work: Callable[[], int], said: Path, largest_file_bytes: int | None = None) -> int:
    """Do something in a forked process, on a disk that takes no larger files.

    Args:
        work: Gives the exit code.
        said: File for what it prints.
        largest_file_bytes: Size from which the disk is full; no limit when None.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            paper = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(paper, 1)
            os.dup2(paper, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            if largest_file_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes,) * 2)
            code = work()
        except BaseException as error:
            print(f"UNHANDLED {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def errors_in(text: str) -> list[str]:
    """The lines of an output that say what is wrong."""
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]
