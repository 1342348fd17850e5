"""Read training checkpoints safely, in rooms that know nothing of Lightning.

Only tensors and plain values are ever unpickled (``weights_only=True``); there is no way round it.
"""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

CHECKPOINT_SUFFIX = ".ckpt"
LAST_CHECKPOINT = f"last{CHECKPOINT_SUFFIX}"

MARK_KEY = "policyscope"
"""Entry of a checkpoint that tells ours from other people's."""
CHECKPOINT_FORMAT = 1
RESUME_KEYS = (
    "state_dict",
    "epoch",
    "global_step",
    "loops",
    "callbacks",
    "optimizer_states",
    "lr_schedulers",
)
"""Entries without which a run cannot go on where it stopped."""

_KINDS = {
    MARK_KEY: dict,
    "state_dict": dict,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
    "datamodule_hyper_parameters": dict,
}
"""What an entry must be wherever it is there; its readers count on it."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or must not be written; the message names file and mend."""


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint of a folder that can be read, and those that could not."""

    path: Path
    checkpoint: dict[str, Any]
    """What the file holds."""
    damaged: tuple[CheckpointError, ...]
    """Why newer files were passed over, newest first."""


def read_checkpoint(
    path: str | os.PathLike[str],
    map_location: torch.device | str = "cpu",
    needed: Sequence[str] = (),
) -> dict[str, Any]:
    """Read a checkpoint that this project wrote, without running any code it may contain.

    Args:
        path: A local file; addresses are refused.
        map_location: Device of the tensors.
        needed: Entries that must be there, e.g. :data:`RESUME_KEYS`.

    Raises:
        CheckpointError: If the file is missing, damaged, foreign, or holds more than tensors and
            plain values.
    """
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"{path}: checkpoints are read from local files only; download it from a source you "
            "trust and give its path"
        )
    file = Path(path)
    try:
        if not file.exists():
            raise CheckpointError(f"{file}: no such checkpoint{_neighbours(file)}")
        if not file.is_file():
            raise CheckpointError(
                f"{file}: is not a file; give one of the {CHECKPOINT_SUFFIX} files"
            )
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file}: the checkpoint is empty{_neighbours(file)}")
        with _archive(file) as archive:
            # torch does not look at the checksums it writes.
            if damaged := archive.testzip():
                raise CheckpointError(
                    f"{file}: damaged, wrong checksum of {damaged}{_neighbours(file)}"
                )
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = shorten(str(error).partition("\n")[0], 160) or "unreadable"
        raise CheckpointError(
            f"{file}: refused, it holds more than tensors and plain values, or is damaged "
            f"({reason}){_neighbours(file)}"
        ) from error
    except OSError as error:
        name = shorten(str(file), 400)
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch names damage by a dozen unrelated exception types
        reason = shorten(str(error).partition("\n")[0], 160) or type(error).__name__
        raise CheckpointError(f"{file}: damaged ({reason}){_neighbours(file)}") from error
    if not isinstance(checkpoint, dict) or MARK_KEY not in checkpoint:
        raise CheckpointError(
            f"{file}: not a checkpoint of this project (no entry {MARK_KEY!r}); "
            "give a file that train.py wrote"
        )
    for key, kind in _KINDS.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            raise CheckpointError(
                f"{file}: its entry {key!r} is of type {type(checkpoint[key]).__name__} instead of "
                f"{kind.__name__}; give a file as train.py wrote it"
            )
    written_as = checkpoint[MARK_KEY].get("checkpoint_format")
    if not (isinstance(written_as, int) and written_as == CHECKPOINT_FORMAT):
        raise CheckpointError(
            f"{file}: written in checkpoint format {shorten(repr(written_as), 80)}, this version "
            f"reads {CHECKPOINT_FORMAT}; use the version of the code that wrote it"
        )
    if missing := [key for key in needed if key not in checkpoint]:
        raise CheckpointError(
            f"{file}: lacks {', '.join(missing)}, so a run cannot go on from it; give a file as "
            f"train.py wrote it{_neighbours(file)}"
        )
    return checkpoint


def _archive(file: Path) -> zipfile.ZipFile:
    """Open a checkpoint as the archive it is; torch compresses nothing, so nothing may swell.

    Raises:
        CheckpointError: If it is something else.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file}: not a checkpoint of this project, or cut short{_neighbours(file)}"
        )
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if size > file.stat().st_size or any(entry.compress_type for entry in entries):
        archive.close()
        raise CheckpointError(
            f"{file}: refused, it would unpack to {size:,} bytes, more than it has; give a file as "
            f"train.py wrote it{_neighbours(file)}"
        )
    return archive


def newest_valid_checkpoint(
    folder: str | os.PathLike[str], needed: Sequence[str] = ()
) -> NewestCheckpoint:
    """Find the checkpoint of ``folder`` that got farthest and can be read from end to end.

    The step that was saved decides, not the time of the file: clocks jump, and copies are younger.

    Args:
        folder: With the checkpoints of one run.
        needed: As in :func:`read_checkpoint`.

    Raises:
        CheckpointError: If the folder holds none.
    """
    files = _checkpoint_files(Path(folder))
    if not files:
        raise CheckpointError(f"{folder}: holds no checkpoint yet; start without --ckpt_path")

    damaged: list[CheckpointError] = []
    for file in sorted(files, key=progress_of, reverse=True):
        try:
            return NewestCheckpoint(file, read_checkpoint(file, needed=needed), tuple(damaged))
        except CheckpointError as error:
            damaged.append(error)
    raise CheckpointError(
        f"{folder}: none of its {len(files)} checkpoints can be read; newest: {damaged[0]}"
    )


def progress_of(file: Path) -> tuple[float, bool, int]:
    """How far the run of a checkpoint was, to compare it with others of the same run.

    Returns:
        Its training step, whether it is the run's last, and the time of the file in ns.
    """
    return _step(file), file.name == LAST_CHECKPOINT, _time_ns(file)


def _time_ns(file: Path) -> int:
    """When a file was written; 0 if it is gone by now."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _step(file: Path) -> float:
    """Training step of a checkpoint; of a damaged one what its name says, infinite where nothing.

    The weights are mapped, not read.
    """
    try:
        _archive(file).close()
        step = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        if isinstance(step, int):
            return step
    except Exception:  # whatever is wrong with it, reading it will say so
        pass
    named = re.search(r"step\D?(\d{1,15})", file.stem)
    return math.inf if named is None else int(named[1])


def _checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the youngest file first."""
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(
        (file for file in files if file.suffix == CHECKPOINT_SUFFIX and file.is_file()),
        key=_time_ns,
        reverse=True,
    )


def _neighbours(file: Path) -> str:
    others = [other.name for other in _checkpoint_files(file.parent) if other.name != file.name]
    return f"; beside it: {', '.join(others[:4])}" if others else ""
