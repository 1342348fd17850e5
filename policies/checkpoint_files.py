"""Read training checkpoints safely, in rooms that know nothing of Lightning.

Only tensors and plain values are ever unpickled (``weights_only=True``); there is no way round it.
"""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_SUFFIX = ".ckpt"
LAST_CHECKPOINT = f"last{CHECKPOINT_SUFFIX}"

MARK_KEY = "policyscope"
"""Entry of a checkpoint that tells ours from other people's."""
CHECKPOINT_FORMAT = 1


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
    path: str | os.PathLike[str], map_location: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint that this project wrote, without running any code it may contain.

    Args:
        path: A local file; addresses are refused.
        map_location: Device of the tensors.

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
    if not file.exists():
        raise CheckpointError(f"{file}: no such checkpoint{_neighbours(file)}")
    if not file.is_file():
        raise CheckpointError(f"{file}: is not a file; give one of the {CHECKPOINT_SUFFIX} files")
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file}: the checkpoint is empty{_neighbours(file)}")
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{file}: not a checkpoint of this project, or cut short{_neighbours(file)}"
            )
        with zipfile.ZipFile(file) as archive:
            # torch does not look at the checksums it writes.
            if damaged := archive.testzip():
                raise CheckpointError(
                    f"{file}: damaged, wrong checksum of {damaged}{_neighbours(file)}"
                )
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "unreadable"
        raise CheckpointError(
            f"{file}: refused, it holds more than tensors and plain values, or is damaged "
            f"({reason[:160]}){_neighbours(file)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch names damage by a dozen unrelated exception types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: damaged ({reason[:160]}){_neighbours(file)}") from error
    if not isinstance(checkpoint, dict) or MARK_KEY not in checkpoint:
        raise CheckpointError(
            f"{file}: not a checkpoint of this project (no entry {MARK_KEY!r}); "
            "give a file that train.py wrote"
        )
    written_as = checkpoint[MARK_KEY].get("checkpoint_format")
    if written_as != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{file}: written in checkpoint format {written_as!r}, this version reads "
            f"{CHECKPOINT_FORMAT}; use the version of the code that wrote it"
        )
    return checkpoint


def newest_valid_checkpoint(folder: str | os.PathLike[str]) -> NewestCheckpoint:
    """Find the most recent checkpoint in ``folder`` that can be read from end to end.

    Raises:
        CheckpointError: If the folder holds none.
    """
    candidates = _checkpoint_files(Path(folder))
    if not candidates:
        raise CheckpointError(f"{folder}: holds no checkpoint yet; start without --ckpt_path")
    damaged: list[CheckpointError] = []
    for file in candidates:
        try:
            return NewestCheckpoint(file, read_checkpoint(file), tuple(damaged))
        except CheckpointError as error:
            damaged.append(error)
    raise CheckpointError(
        f"{folder}: none of its {len(candidates)} checkpoints can be read; newest: {damaged[0]}"
    )


def _checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first; of files written together ``last`` goes first."""

    def age(file: Path) -> tuple[int, bool]:
        return file.stat().st_mtime_ns, file.name == LAST_CHECKPOINT

    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(
        (file for file in files if file.suffix == CHECKPOINT_SUFFIX and file.is_file()),
        key=age,
        reverse=True,
    )


def _neighbours(file: Path) -> str:
    others = [other.name for other in _checkpoint_files(file.parent) if other.name != file.name]
    return f"; beside it: {', '.join(others[:4])}" if others else ""
