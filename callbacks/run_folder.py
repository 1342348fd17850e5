"""Where a run lives: ``<output_dir>/<name>/<time>/``, with ``<output_dir>/<name>/last`` beside it.

=================  =========================================================================
config.yaml        the configuration, ready for ``train.py fit -c``
environment.json   versions, commit, hardware, command line
metrics.csv        every logged number, one row a step: the record of truth
summary.json       last value of every number, and where everything lies
checkpoints/       ``last.ckpt`` and the best ones
media/             ``step_000123/<diagnostic>/...`` and ``index.json``
wandb/             the W&B run, when W&B is used
=================  =========================================================================
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from policies.atomic_files import write_atomically

LAST = "last"
CHECKPOINTS = "checkpoints"
MEDIA = "media"
LOCK_FILE = ".lock"


class RunFolderError(ValueError):
    """A run folder cannot be made, found or used; the message names it and the mend."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Say which file of a run the disk refused, and what to do.

    Raises:
        RunFolderError: For any OSError while it is written.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror or error}); make room and continue with "
            "--ckpt_path last"
        ) from error


def create_run_folder(
    output_dir: str | os.PathLike[str],
    name: str,
    suffix: str = "",
    started: datetime | None = None,
) -> Path:
    """Make a folder for a new run that no other run has, even one started in the same second.

    Args:
        output_dir: Folder of all runs; made when missing.
        name: Name of the experiment: one folder name.
        suffix: Added to the time, e.g. ``-validate``.
        started: Start of the run; now when None.

    Raises:
        RunFolderError: If the name is not a folder name, or the disk refuses.
    """
    home = named_folder(output_dir, name)
    stamp = (started or datetime.now()).strftime("%Y-%m-%d_%H-%M-%S") + suffix
    try:
        home.mkdir(parents=True, exist_ok=True)
        attempt = 1
        while True:
            folder = home / (stamp if attempt == 1 else f"{stamp}_{attempt}")
            try:
                folder.mkdir()
            except FileExistsError:
                attempt += 1
                continue
            return folder.absolute()
    except OSError as error:
        raise RunFolderError(
            f"{home}: cannot make the run folder ({error.strerror or error}); "
            "choose another place with --output_dir"
        ) from error


def named_folder(output_dir: str | os.PathLike[str] | None, name: str | None) -> Path:
    """Return the folder that holds all runs of one name.

    Raises:
        RunFolderError: If there is no folder or no name, as a config with an empty value gives, or
            the name would leave ``output_dir``.
    """
    if output_dir is None:
        raise RunFolderError("output_dir: is null; give the folder of all runs, e.g. outputs")
    if (
        name is None
        or not name.strip()
        or name in {".", ".."}
        or any(c in "/\\" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
    ):
        raise RunFolderError(f"name {name!r}: is not a folder name; use letters, digits, - and _")
    return Path(output_dir).expanduser() / name


def point_last_at(folder: Path, name: str = LAST) -> None:
    """Let ``last`` beside ``folder`` point at it; whoever looks sees the old or the new target.

    Args:
        folder: The run folder.
        name: Of another link than ``last``.
    """
    link = folder.parent / name
    temporary = folder.parent / f".{name}.{os.getpid()}.part"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(
            f"{link}: cannot point at {folder.name} ({error.strerror or error}); move it away"
        ) from error


def last_run_folder(output_dir: str | os.PathLike[str], name: str) -> Path:
    """Return the newest run of a name.

    Raises:
        RunFolderError: If there is none.
    """
    link = named_folder(output_dir, name) / LAST
    if not link.is_dir():
        raise RunFolderError(
            f"{link}: no earlier run of this name; start one without --ckpt_path, or give the "
            "--name and --output_dir of the run to continue"
        )
    return link.resolve()


def job_link(command: str) -> str | None:
    """Name the link to the run that a command of this process's job made; None outside a job.

    A job is one of SLURM, or a ``torchrun`` that starts its processes again and has an id of its
    own.

    Args:
        command: What tells it from other commands of the same job.
    """
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "none"
    if job == "none":  # torchrun's id where none is given: all such jobs share it
        return None
    which = hashlib.sha256(command.encode(errors="surrogatepass")).hexdigest()[:16]
    return f".job-{re.sub(r'[^0-9A-Za-z_-]', '_', job)[:100]}-{which}"


def restarted() -> bool:
    """Tell whether the job of this process was started before."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in {"", "0"} for name in counts)


def run_folder_of_job(
    output_dir: str | os.PathLike[str], name: str, link: str | None
) -> Path | None:
    """Return the run that this command made in an earlier start of its job; None if there is none.

    Args:
        output_dir: Folder of all runs.
        name: Name of the run.
        link: From :func:`job_link`.
    """
    if link is None or not restarted():
        return None
    folder = named_folder(output_dir, name) / link
    return folder.resolve() if folder.is_dir() else None


class RunLock:
    """Keeps a second process out of a run folder for as long as this process lives.

    A POSIX record lock: it dies with the process, ``kill -9`` included, and the children of a data
    loader do not inherit it.
    """

    def __init__(self, folder: Path) -> None:
        with written(folder / LOCK_FILE):
            self._file: IO[str] | None = (folder / LOCK_FILE).open("a")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RunFolderError(
                f"{folder}: another process is still writing this run; wait for it or stop it"
            ) from error

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._file.close()
            self._file = None


def write_beside(path: Path, text: str) -> Path:
    """Write ``text`` to ``path``, or under the next free number if another text is there.

    Returns:
        The file that holds the text.

    Raises:
        RunFolderError: If the disk refuses.
    """
    candidate, number = path, 2
    while candidate.exists():
        if candidate.read_text(encoding="utf-8") == text:
            return candidate
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    with written(candidate):
        write_atomically(candidate, text)
    return candidate
