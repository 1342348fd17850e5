"""``analyze.py report``: one page of a finished run, or of several side by side."""

import argparse
import errno
import fcntl
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from callbacks.report import RUNNING, read_run, write_report
from callbacks.run_folder import LOCK_FILE
from callbacks.summary import REPORT_FILE
from rendering.report.embedding import Medium
from rendering.report.page import MAX_SIZE_MIB, MIB

PAGE_FILE = "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    parser.add_argument(
        "--run_dir",
        nargs="+",
        required=True,
        metavar="RUN",
        help="run folders, e.g. outputs/demo/last; several are shown side by side",
    )
    parser.add_argument(
        "--max_size_mib",
        type=float,
        default=MAX_SIZE_MIB,
        metavar="MIB",
        help="leave out videos, then pictures of checkpoints in the middle, to stay below this "
        "size (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page and say where it is and what is not in it.

    Raises:
        ValueError: For a folder that is no run, several runs without a place for their page, or a
            place that cannot be written.
    """
    folders = [Path(word).resolve() for word in arguments.run_dir]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ValueError(f"--run_dir {twice}: is given twice; give each run once")
    if len(folders) > 1 and arguments.output_dir is None:
        raise ValueError(f"--run_dir names {len(folders)} runs: say where to with --output_dir")
    records = [
        replace(read_run(folder, RUNNING if is_running(folder) else None), name=name)
        for folder, name in zip(folders, names(folders), strict=True)
    ]
    file = folders[0] / REPORT_FILE
    if arguments.output_dir is not None:
        file = Path(arguments.output_dir) / PAGE_FILE
    began = time.perf_counter()
    try:
        page = write_report(records, file, arguments.max_size_mib)
    except OSError as error:
        raise ValueError(
            f"{file}: the page cannot be written ({error}); choose another place with --output_dir"
        ) from error
    took_s = time.perf_counter() - began
    print(f"{file}: {page.size_bytes / MIB:.2f} MiB, written in {took_s:.1f} s")
    if page.left_out:
        print(_about(page.left_out, arguments.max_size_mib))
    return 0


def names(folders: Sequence[Path]) -> list[str]:
    """Call each run by the last parts of its path: two, or as many as tell them apart."""
    n_parts = 2
    while len({folder.parts[-n_parts:] for folder in folders}) < len(folders):
        n_parts += 1
    return ["/".join(folder.parts[-n_parts:]) for folder in folders]


def is_running(folder: Path) -> bool:
    """Tell whether another process holds the lock of a run folder.

    Raises:
        ValueError: If that cannot be told.
    """
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(
            f"{path}: does not say whether the run goes on ({error.strerror}); make it readable, "
            "or remove it if the run is over"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            # Anything else means that this disk knows no locks, so nobody holds one.
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


def _about(left_out: tuple[Medium, ...], max_size_mib: float) -> str:
    kinds = {kind: sum(medium.kind == kind for medium in left_out) for kind in ("videos", "images")}
    kinds["tables"] = len(left_out) - sum(kinds.values())
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return (
        f"left out to stay below {max_size_mib:g} MiB: {what}; the page says where they are, "
        "--max_size_mib allows more"
    )
