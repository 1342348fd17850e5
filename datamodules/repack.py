"""``analyze.py repack``: HDF5 with a checksum on every chunk, and chunks that are quick to read.

Everything else stays: groups, attributes, links within the file, types, fill values, compression.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5l, h5p, h5s, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]

from datamodules.convert import FILE_VERSION, build_beside, refuse_overlap
from datamodules.errors import DatasetError, Problem
from datamodules.layouts import ForeignStorageError, HDF5Schema, find_files, member
from datamodules.progress import progress_bar
from datamodules.scan import (
    H5PY_ERRORS,
    check_storage,
    foreign_problem,
    naming_damage,
    opened,
    place_in_file,
    read_failure,
)

_CHUNK_BYTES = 2**20
_SLAB_BYTES = 16 * 2**20
_OBJECT_LIMIT = 10**6
_GROWN_LIMIT = 10**7
"""Chunks of a data set at its largest: HDF5 writes a table of them all."""
_SUFFIXES = (".hdf5", ".h5")

_Link = tuple[h5py.Group, str, h5py.Group | h5py.Dataset | str]


@dataclass
class Repacked:
    """What was written."""

    path: Path
    files: int = 0
    datasets: int = 0
    """Data sets with a checksum on each chunk."""
    without: list[str] = field(default_factory=list)
    """Data sets that can have none: single values, empty ones, and texts of varying length, whose
    characters lie outside the chunks."""
    bytes_before: int = 0
    bytes_after: int = 0


def repack(source: Path, target: Path, overwrite: bool = False, progress: bool = True) -> Repacked:
    """Write a file, or a folder of files, anew with checksums; whole or not at all.

    Args:
        source: HDF5 file, or folder of HDF5 files.
        target: File for a file, folder for a folder. A folder given for a file gets one of the
            same name.
        overwrite: Replace what is there.
        progress: Show a bar when a person is watching.

    Returns:
        What was written; every value was read back and compared.

    Raises:
        ValueError: When the target must not be touched.
        DatasetError: When the source cannot be read, or leads out of its files.
    """
    if not source.exists():
        problem = Problem(str(source), "", "no such file or folder", "check the path")
        raise DatasetError(source, [problem])
    if source.is_file() and target.suffix not in _SUFFIXES:
        target = target / source.name
    refuse_overlap(str(source), target)
    files = find_files(source, HDF5Schema(files=("**/*.hdf5", "**/*.h5")))
    made = Repacked(target, files=len(files))

    def write(building: Path) -> None:
        total = sum(file.stat().st_size for file in files)
        with progress_bar("Repacking", total, progress) as advance:
            for file in files:
                into = building / file.relative_to(source) if source.is_dir() else building
                into.parent.mkdir(parents=True, exist_ok=True)
                _repack_file(file, into, made)
                made.bytes_before += file.stat().st_size
                made.bytes_after += into.stat().st_size
                advance(file.stat().st_size)

    def replaceable(there: Path) -> bool:
        return there.is_file() or (
            source.is_dir() and all(f.suffix in _SUFFIXES or f.is_dir() for f in there.rglob("*"))
        )

    build_beside(target, write, overwrite, replaceable)
    return made


def _repack_file(file: Path, target: Path, made: Repacked) -> None:
    try:
        with opened(file) as before, naming_damage(file):
            with h5py.File(target, "w", libver=FILE_VERSION) as after:
                for write in _writes(file, before, after, made):
                    write()
            with h5py.File(target, "r") as after:
                _check_equal(file, before, after)
    except ForeignStorageError as error:
        raise DatasetError(file, [foreign_problem(file, error)]) from error


def _links(file: Path, root: h5py.Group) -> Iterator[_Link]:
    """Every link of a file once: its group, its name, and the object or a soft link's target.

    Raises:
        DatasetError: When a link leads to something that is neither, or there are too many.
        ForeignStorageError: When one leads out of the file.
    """
    waiting = [root]
    entered = {place_in_file(root)}
    count = 0
    while waiting:
        group = waiting.pop()
        for name in map(str, group):
            count += 1
            key = f"{group.name}/{name}".replace("//", "/")
            links = group.id.links  # pyright: ignore[reportAttributeAccessIssue]
            if count > _OBJECT_LIMIT:
                raise _refusal(file, key, f"is beyond {_OBJECT_LIMIT} links", "split the file")
            if links.get_info(name.encode()).type == h5l.TYPE_SOFT:
                yield group, name, links.get_val(name.encode()).decode()
                continue
            found = member(group, name)
            if found is None:
                mend = "write it as a group or a data set"
                raise _refusal(file, key, "is neither a group nor a data set", mend)
            yield group, name, found
            if isinstance(found, h5py.Group) and place_in_file(found) not in entered:
                entered.add(place_in_file(found))
                waiting.append(found)


def _writes(
    file: Path, before: h5py.File, after: h5py.File, made: Repacked
) -> Iterator[Callable[[], None]]:
    """What is to be done for each object, its links after it."""
    copies: dict[tuple[int, int], h5py.Group | h5py.Dataset] = {place_in_file(before): after}
    yield lambda: _copy_attributes(file, before, after)
    for group, name, found in _links(file, before):
        into = copies[place_in_file(group)]
        assert isinstance(into, h5py.Group)
        if isinstance(found, str):
            into[name] = h5py.SoftLink(found)
            continue
        place = place_in_file(found)
        if place in copies:
            into[name] = copies[place]
        elif isinstance(found, h5py.Group):
            copies[place] = into.create_group(name, track_order=None)
            yield lambda found=found, place=place: _copy_attributes(file, found, copies[place])
        else:
            copies[place] = _copy_dataset(file, found, into, name, made)
            yield lambda found=found, place=place: _copy_attributes(file, found, copies[place])


def _copy_dataset(
    file: Path, dataset: h5py.Dataset, into: h5py.Group, name: str, made: Repacked
) -> h5py.Dataset:
    key = str(dataset.name)
    if dataset.dtype.hasobject and h5py.check_ref_dtype(dataset.dtype) is not None:
        mend = "replace the references by paths"
        raise _refusal(file, key, "holds references to places in this file", mend)
    if problem := check_storage(file, dataset):
        raise DatasetError(file, [problem])
    plist = h5p.create(h5p.DATASET_CREATE)
    chunks = _chunks(dataset)
    if chunks is not None:
        largest = [
            max(size or 0, chunk)
            for size, chunk in zip(dataset.maxshape or (), chunks, strict=True)
        ]
        if math.prod(largest) > _GROWN_LIMIT * math.prod(chunks):
            what = f"may grow to {dataset.maxshape}, more than {_GROWN_LIMIT:,} chunks"
            raise _refusal(file, key, what, "let it grow without end (maxshape None)")
        plist.set_chunk(chunks)
        _set_filters(dataset, plist)
    if chunks is None or dataset.dtype.hasobject:
        made.without.append(f"{file.name}: {key}")
    else:
        made.datasets += 1
    # Made anew: where the source's own are damaged, HDF5 2.0 writes them and ends the process.
    kind = h5t.py_create(dataset.dtype, logical=True)
    space = h5s.create(h5s.NULL)
    if dataset.shape is not None:
        grown = [h5s.UNLIMITED if size is None else size for size in dataset.maxshape or ()]
        space = h5s.create_simple(dataset.shape, tuple(grown))
    written = h5py.Dataset(h5d.create(into.id, name.encode(), kind, space, plist))
    if dataset.shape:
        for rows in _slabs(dataset):
            written[rows] = _read(file, dataset, rows)
    elif dataset.shape == ():
        written[()] = _read(file, dataset, ())
    return written


def _set_filters(dataset: h5py.Dataset, plist: h5p.PropDCID) -> None:
    """Those of the source and its fill value, and the checksum last, over what is stored."""
    # Not on a copy of the source's list: HDF5 2.0 frees such a list twice.
    before = dataset.id.get_create_plist()
    for index in range(before.get_nfilters()):
        code, flags, values, _ = before.get_filter(index)
        if code != h5z.FILTER_FLETCHER32:
            plist.set_filter(code, flags, values)
    # HDF5 allows none over values of varying length, which lie elsewhere.
    if not dataset.dtype.hasobject:
        plist.set_fletcher32()
        fill = np.zeros((), dataset.dtype)
        before.get_fill_value(fill)
        plist.set_fill_value(fill)


def _chunks(dataset: h5py.Dataset) -> tuple[int, ...] | None:
    """One picture per chunk, and of numbers as many rows as a mebibyte takes."""
    if not dataset.shape or 0 in dataset.shape:
        return None
    if dataset.dtype.hasobject:
        return dataset.chunks
    row_bytes = max(1, int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize)
    # Of a row that is larger than HDF5's chunks may be, what the file had.
    if row_bytes > 2**31 and dataset.chunks:
        return dataset.chunks
    rows = 1 if dataset.ndim >= 3 else max(1, min(dataset.shape[0], _CHUNK_BYTES // row_bytes))
    return (rows, *dataset.shape[1:])


def _slabs(dataset: h5py.Dataset) -> Iterator[slice]:
    row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
    rows = max(1, _SLAB_BYTES // max(1, row_bytes))
    if dataset.chunks:
        rows = max(dataset.chunks[0], rows // dataset.chunks[0] * dataset.chunks[0])
    for start in range(0, len(dataset), rows):
        yield slice(start, min(start + rows, len(dataset)))


def _read(file: Path, dataset: h5py.Dataset, rows: slice | tuple[()]) -> np.ndarray:
    try:
        return np.asarray(dataset[rows], dataset.dtype)
    except H5PY_ERRORS as error:
        where = f"rows {rows.start} to {rows.stop - 1}" if isinstance(rows, slice) else "its value"
        raise DatasetError(file, [read_failure(file, dataset, error, where, None)]) from error


def _copy_attributes(
    file: Path, before: h5py.Group | h5py.Dataset, after: h5py.Group | h5py.Dataset
) -> None:
    for name in before.attrs:
        stored = before.attrs.get_id(name)
        if h5py.check_ref_dtype(stored.dtype) is not None:
            key = f"{before.name}@{name}"
            mend = "delete the attribute, or replace it by a path"
            raise _refusal(file, key, "holds references to places in this file", mend)
        value = before.attrs[name]
        if isinstance(value, h5py.Empty):
            after.attrs[name] = value
        else:
            after.attrs.create(name, value, stored.shape, stored.dtype)


def _check_equal(file: Path, before: h5py.File, after: h5py.File) -> None:
    """Compare every object, attribute and value with the source, before the file gets its name."""

    def alike(one: h5py.Group | h5py.Dataset, other: h5py.Group | h5py.Dataset) -> bool:
        return set(one.attrs) == set(other.attrs) and all(
            _same(np.asarray(_plain(one.attrs[name])), np.asarray(_plain(other.attrs[name])))
            for name in one.attrs
        )

    def check(equal: bool, key: str) -> None:
        if not equal:
            raise ValueError(f"{file}: {key} differs after writing; nothing was kept")

    check(alike(before, after), "/")
    seen = 0
    for group, name, found in _links(file, before):
        seen += 1
        key = f"{group.name}/{name}".replace("//", "/")
        if isinstance(found, str):
            link = after.get(key, getlink=True)
            check(isinstance(link, h5py.SoftLink) and link.path == found, key)
            continue
        copy = after[key]
        check(type(copy) is type(found), key)
        assert isinstance(copy, h5py.Group | h5py.Dataset)
        check(alike(found, copy), key)
        if not isinstance(found, h5py.Dataset) or not isinstance(copy, h5py.Dataset):
            continue
        check((found.shape, found.dtype) == (copy.shape, copy.dtype), key)
        if found.shape:
            for rows in _slabs(found):
                check(_same(_read(file, found, rows), _read(file, copy, rows)), key)
        elif found.shape == ():
            check(_same(np.asarray(found[()]), np.asarray(copy[()])), key)
    check(sum(1 for _ in _links(file, after)) == seen, "the number of links")


def _plain(value: object) -> object:
    return str(value.dtype) if isinstance(value, h5py.Empty) else value


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.dtype.hasobject:
        return one.tobytes() == other.tobytes()
    pairs = zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def _refusal(file: Path, key: str, what: str, mend: str) -> DatasetError:
    return DatasetError(file, [Problem(str(file), key, what, mend)])


def report(made: Repacked) -> str:
    """What was written, as text for a terminal."""
    before, after = made.bytes_before / 2**20, made.bytes_after / 2**20
    lines = [
        f"Wrote {made.path}: {made.files} file(s), {made.datasets} data sets with a checksum on "
        f"every chunk, {before:.1f} MiB before, {after:.1f} MiB after; every value was compared"
    ]
    if made.without:
        shown = ", ".join(made.without[:4]) + (", ..." if len(made.without) > 4 else "")
        lines.append(
            f"  {len(made.without)} can have none (single values, empty ones, texts of varying "
            f"length): {shown}; analyze.py verify --write covers them"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this command has."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        Exit status: 0 when everything was written.

    Raises:
        ValueError: When it cannot be.
    """
    source = Path(args.dataset_repo_id).expanduser()
    made = repack(source, Path(args.output_dir).expanduser(), args.overwrite)
    print(report(made))
    sys.stdout.flush()
    return 0
