"""``analyze.py verify``: whether the bytes of a data set, or of a frame cache, are still the same.

Three things are compared, as far as they are there: the list that ``--write`` made, the checksums
of the chunks of HDF5 (fletcher32), and those of a frame cache.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from datamodules import checksums
from datamodules.errors import DatasetError, Problem, problem_lines
from datamodules.layouts import HDF5_SUFFIXES, ForeignStorageError
from datamodules.progress import progress_bar
from datamodules.scan import (
    H5PY_ERRORS,
    NEVER_WRITTEN,
    check_storage,
    child,
    filters,
    first_line,
    foreign_problem,
    naming_damage,
    opened,
    place_in_file,
    read_failure,
)

_FLETCHER32 = 3


@dataclass
class Verification:
    """What was compared, and what differs."""

    path: Path
    files: int = 0
    nbytes: int = 0
    listed: int | None = None
    """Files that the list beside the data set names; None where there is no list."""
    caches: int = 0
    """Frame caches that were compared."""
    chunked: int = 0
    """HDF5 data sets whose chunks have checksums."""
    unguarded: int = 0
    """HDF5 data sets whose values have none, or not all."""
    texts: int = 0
    """HDF5 attributes of varying length, whose values have none; they are only read."""
    unlisted: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def nothing_compared(self) -> bool:
        """Whether there was no checksum at all."""
        return not (self.listed or self.caches or self.chunked)


def verify(path: Path, progress: bool = True) -> Verification:
    """Compare all checksums that a data set, or a folder of frame caches, brings.

    Args:
        path: HDF5 file, folder of any data set, one frame cache, or the folder of all.
        progress: Show a bar when a person is watching.

    Raises:
        DatasetError: When nothing is there.
    """
    if not path.exists():
        problem = Problem(str(path), "", "no such file or folder", "check the path")
        raise DatasetError(path, [problem])
    files = checksums.files_below(path)
    caches = sorted(file.parent for file in files if file.name == checksums.CACHE_MANIFEST)
    found = Verification(path, len(files), sum(file.stat().st_size for file in files))
    listed = checksums.list_beside(path)
    hdf5 = [file for file in files if file.suffix in HDF5_SUFFIXES]
    total = found.nbytes * (listed.is_file() + bool(caches))
    total += sum(file.stat().st_size for file in hdf5)
    with progress_bar("Comparing checksums", total, progress) as advance:
        if listed.is_file():
            try:
                found.problems, found.unlisted = checksums.compare_with_list(path, advance)
                found.listed = found.files - len(found.unlisted)
            except DatasetError as error:
                found.problems += error.problems
        for cache in caches:
            found.problems += checksums.compare_cache(cache, advance)
            found.caches += 1
        for file in hdf5:
            try:
                with opened(file) as handle, naming_damage(file):
                    _read_chunks(file, handle, found)
            except DatasetError as error:
                found.problems += error.problems
            except ForeignStorageError as error:
                found.problems.append(foreign_problem(file, error))
            advance(file.stat().st_size)
    return found


def _read_chunks(file: Path, root: h5py.File, found: Verification) -> None:
    """Read every chunk of a file once; HDF5 compares its checksum then."""
    waiting: list[h5py.Group] = [root]
    entered = {place_in_file(root)}
    _read_attributes(file, root, found)
    while waiting:
        group = waiting.pop()
        for name in group:
            below = None if name is None else child(group, name)
            if below is None or (place := place_in_file(below)) in entered:
                continue
            entered.add(place)
            _read_attributes(file, below, found)
            if isinstance(below, h5py.Group):
                waiting.append(below)
            elif _FLETCHER32 not in [code for code, _ in filters(below)]:
                found.unguarded += 1
            elif (problem := check_storage(file, below)) and problem.kind != NEVER_WRITTEN:
                found.problems.append(problem)
            else:
                found.chunked += 1
                if below.size and below.id.get_storage_size():
                    found.problems += _bad_chunks(file, below)


def _read_attributes(file: Path, holder: h5py.Group | h5py.Dataset, found: Verification) -> None:
    """Read every attribute; those of fixed length lie within what HDF5 1.10's format checks."""
    for name in holder.attrs:
        try:
            found.texts += holder.attrs.get_id(name).dtype.hasobject
            holder.attrs[name]
        except H5PY_ERRORS as error:
            what = f"cannot be read ({first_line(error)})"
            problem = Problem(str(file), f"{holder.name}@{name}", what, checksums.AGAIN)
            found.problems.append(problem)


def _bad_chunks(file: Path, dataset: h5py.Dataset) -> list[Problem]:
    problems = []
    for chunk in dataset.iter_chunks():
        try:
            dataset[chunk]
        except H5PY_ERRORS as error:
            where = f"chunk {tuple(part.start for part in chunk)}"
            problem = read_failure(file, dataset, error, where, None)
            problems.append(problem)
    return problems


def write_list(path: Path, overwrite: bool = False, progress: bool = True) -> Path:
    """Write the checksums of every file of a data set beside it.

    Args:
        path: File or folder.
        overwrite: Replace a list that is there.
        progress: Show a bar when a person is watching.

    Returns:
        The list.

    Raises:
        DatasetError: When nothing is there.
        ValueError: When there is a list that must not be replaced.
    """
    if not path.exists() or not checksums.files_below(path):
        problem = Problem(str(path), "", "no such file, or an empty folder", "check the path")
        raise DatasetError(path, [problem])
    target = checksums.list_beside(path)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; compare with it without --write, or add --overwrite")
    total = sum(file.stat().st_size for file in checksums.files_below(path))
    with progress_bar("Reading every file", total, progress) as advance:
        checksums.write_list(path, advance)
    return target


def report(found: Verification) -> str:
    """What was compared, as text for a terminal."""
    lines = [f"{found.path}: {found.files} file(s), {found.nbytes / 2**20:.1f} MiB"]
    if found.listed is not None:
        lines.append(f"  {found.listed} compared with {checksums.list_beside(found.path).name}")
    if found.unlisted:
        shown = ", ".join(found.unlisted[:4]) + (", ..." if len(found.unlisted) > 4 else "")
        lines.append(f"  {len(found.unlisted)} not in the list: {shown}")
    if found.caches:
        lines.append(f"  {found.caches} frame cache(s) compared")
    if found.chunked or found.unguarded:
        lines.append(
            f"  {found.chunked} HDF5 data sets with checksums, all chunks read; "
            f"{found.unguarded} without"
        )
    if found.texts:
        lines.append(f"  {found.texts} HDF5 attributes of varying length, which have none")
    lines += [f"  - {line}" for line in problem_lines(found.problems)]
    if found.problems:
        lines.append(f"{len(found.problems)} problem(s).")
    elif found.nothing_compared:
        lines.append(
            "Nothing compared: no checksums. analyze.py verify --write lists those of all files "
            "from now on; analyze.py repack puts them into HDF5."
        )
    else:
        lines.append("Everything with a checksum is as it was written.")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this command has."""
    parser.add_argument(
        "--write",
        action="store_true",
        help="write checksums.sha256 beside the data set, to compare with later",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a list that is there")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        Exit status: 0 when checksums were compared and agree, or were written; else 1.

    Raises:
        ValueError: When the list cannot be written or read.
    """
    path = Path(args.dataset_repo_id).expanduser()
    if args.write:
        print(f"Wrote {write_list(path, args.overwrite)}")
        sys.stdout.flush()
        return 0
    found = verify(path)
    print(report(found))
    sys.stdout.flush()
    return 1 if found.problems or found.nothing_compared else 0
