"""What was run, and with what: the configuration, the code, the machine."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, override

import torch
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.run_folder import write_beside

CONFIG_FILE = "config.yaml"
MAX_CONFIG_BYTES = 2**20
MAX_CONFIG_VALUES = 20_000
"""Values of a configuration, included files and repeated aliases counted each time."""
TRUSTED = (
    "attention",
    "autoencoders",
    "callbacks",
    "datamodules",
    "envs",
    "features",
    "landscapes",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning_modules",
    "policies",
    "rendering",
    "torch.optim",
)
"""Packages whose classes a stranger's configuration may name; nothing in them runs other code."""
CALLS_ANYTHING = ("LambdaCallback",)
"""Classes in them that call whatever function they are given the name of."""
ENVIRONMENT_FILE = "environment.json"

REPOSITORY = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A configuration must not be used; the message names the file and the mend."""


def check_config(file: Path, any_class: bool = False) -> dict[str, Any]:
    """Read a configuration without using it, and see what it would import.

    A configuration is code: it names the classes to import and call. Whatever in it could be the
    name of a class or function must belong to a trusted package.

    Args:
        file: The configuration; files that it includes are checked, too.
        any_class: Whether to check nothing but the size.

    Returns:
        What the file holds.

    Raises:
        ConfigError: If it is not YAML, too large, or names what is not trusted.
    """
    content = _Check(file, any_class).read(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a configuration; it must be a YAML mapping")
    return content


@contextlib.contextmanager
def only_trusted_imports() -> Iterator[None]:
    """Have nothing imported for a configuration but what is trusted, wherever it is named.

    What :func:`check_config` sees gets the better message; this holds for all the rest: files that
    the parser reads by any name, words of the command line, names that lead out of a trusted
    package.
    """
    before = dict(parsing_settings)
    refused = [f"{package}.{name}" for package in TRUSTED for name in CALLS_ANYTHING]
    set_parsing_settings(import_path_denylist=["*", *refused], import_path_allowlist=[*TRUSTED])
    try:
        yield
    finally:
        parsing_settings.update(before)


def mend_refusal(message: str) -> str:
    """Say what to do about a name that :func:`only_trusted_imports` refused."""
    refused = re.compile(
        r", denied by the '.*?' entry of the import path denylist\. Add the .* it\."
    )
    return refused.sub(
        ": not part of this project; a configuration is code: read it, and give it with -c "
        "(without --safe) if you trust it",
        message,
    )


class _Check:
    """Walks through a configuration and the files it includes."""

    def __init__(self, file: Path, any_class: bool) -> None:
        self.file = file
        self.any_class = any_class
        self.values = 0

    def read(self, file: Path) -> Any:
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise ConfigError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes, no configuration")
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            self.walk(content, file.parent)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise ConfigError(f"{file}: not a readable YAML file ({reason})") from error
        except (ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{file}: not a readable YAML file ({error})") from error
        return content

    def walk(self, value: Any, folder: Path) -> None:
        self.values += 1
        if self.values > MAX_CONFIG_VALUES:
            raise ConfigError(
                f"{self.file}: more than {MAX_CONFIG_VALUES} values, aliases repeated; write out "
                "what it needs"
            )
        if isinstance(value, dict):
            for key, each in value.items():
                self.walk(key, folder)
                self.walk(each, folder)
        elif isinstance(value, list | tuple | set):
            for each in value:
                self.walk(each, folder)
        elif isinstance(value, str):
            self.text(value, folder)

    def text(self, text: str, folder: Path) -> None:
        included = folder / text
        # JSON files are mostly data; but the parser would take one for a configuration, too.
        kinds = (".yaml", ".yml") if self.any_class else (".yaml", ".yml", ".json")
        if text.endswith(kinds) and "\0" not in text and len(text) < 1000 and included.is_file():
            self.read(included)
            return
        if self.any_class:
            return
        if any(mark in text for mark in "{[:\n'\""):
            # The parser takes YAML within a text for what it says.
            inner = yaml.safe_load(text)
            if inner != text:
                self.walk(inner, folder)
                return
        name = text.strip()
        trusted = any(name.startswith(f"{package}.") for package in TRUSTED)
        if name.rpartition(".")[2] in CALLS_ANYTHING or (
            _DOTTED.fullmatch(name) and not trusted and _importable(name.partition(".")[0])
        ):
            raise ConfigError(
                f"{self.file}: names {name!r}, which is not part of this project; a configuration "
                "is code: read it, and give it with -c (without --safe) if you trust it"
            )


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def _importable(package: str) -> bool:
    # Finding a top-level package runs nothing of it.
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return True


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
