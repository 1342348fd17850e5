"""What was run, and with what: the configuration, the code, the machine."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, override

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.run_folder import write_beside

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"

REPOSITORY = Path(__file__).resolve().parent.parent


class RunConfig(Callback):
    """Writes ``config.yaml`` and ``environment.json`` into the run folder, and tells W&B.

    Nothing is overwritten: a continued run whose configuration or machine differs leaves
    ``config_2.yaml`` or ``environment_2.json``.

    Args:
        config: The configuration as YAML, before run folders are filled in, so that it starts a
            fresh run when given to ``train.py fit -c``.
        command: Words of the command line.
    """

    def __init__(self, config: str, command: Sequence[str] = ()) -> None:
        self.config = config
        self.command = list(command)
        self._written = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        run = Path(trainer.default_root_dir)
        write_beside(run / CONFIG_FILE, self.config)
        text = json.dumps(environment(self.command), indent=1) + "\n"
        write_beside(run / ENVIRONMENT_FILE, text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": yaml.safe_load(self.config)})


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Describe code, packages and hardware in plain values."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"count": os.cpu_count(), "usable": len(os.sched_getaffinity(0))},
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": dict(
            sorted(
                (distribution.metadata["Name"], distribution.version)
                for distribution in importlib.metadata.distributions()
            )
        ),
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git() -> dict[str, Any] | None:
    """Return the commit of the code and whether files differ from it; None outside a repository."""

    def git(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return answer.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
