"""Files that are there whole, or not at all, whatever happens while they are written."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give a path beside ``path``; what is written there takes its place when all went well.

    It is on the disk before it does, and the folder's entry after: a reader, or a power cut, meets
    the old file or the new one. When the block raises, ``path`` is as it was. Who may read it is
    what the umask says, whatever the program that wrote it thinks (:func:`apply_umask`).

    Args:
        path: The file; its folder must be there.
        overwrite: Whether another file of that name may be replaced.

    Raises:
        FileExistsError: If the file is there and may not be replaced; also if it came meanwhile.
        OSError: If the disk refuses.
    """
    # No two threads of a machine share a native id; a process's first thread has its process's.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.part")
    try:
        yield temporary
        apply_umask(temporary)
        sync(temporary)
        if not overwrite and path.exists():
            raise FileExistsError(f"{path} is there: give another path, or leave to overwrite it")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file with :func:`whole_file`."""
    with whole_file(path) as temporary:
        # As it is: a file written on one system reads the same on another.
        temporary.write_text(text, encoding="utf-8", newline="")


def apply_umask(path: Path) -> None:
    """Give a file the mode of any new one; safetensors lets only its owner read what it writes."""
    # Asking for the umask means changing it, for other threads, too; a new file shows it.
    probe = path.with_name(f".{threading.get_native_id()}.mode.part")
    probe.touch()
    try:
        mode = probe.stat().st_mode
    finally:
        probe.unlink()
    if path.stat().st_mode != mode:
        path.chmod(stat.S_IMODE(mode))


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk: a rename then survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
