"""``analyze.py repack``: HDF5 with a checksum on every chunk, and chunks that are quick to read.

Everything else stays: groups, attributes, links within the file, their order where the file keeps
one, types, fill values, compression, and what was never written.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5p, h5s, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]

from datamodules.checksums import list_beside
from datamodules.convert import FILE_VERSION, build_beside, refuse_overlap
from datamodules.errors import DatasetError, Problem
from datamodules.layouts import HDF5_SUFFIXES, ForeignStorageError, HDF5Schema, find_files
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

_CHUNK_BYTES = 2**20
_PICTURE_BYTES = 4096
"""Of a row of bytes, from which on it is a picture, and read alone."""
_SLAB_BYTES = 16 * 2**20
_OBJECT_LIMIT = 10**6
_GROWN_LIMIT = 10**7
"""Chunks of a data set at its largest: HDF5 writes a table of them all."""

_Name = str | bytes
"""Bytes where they are no UTF-8."""
_Link = tuple[h5py.Group, _Name, h5py.Group | h5py.Dataset | bytes]
_Part = tuple[slice, ...]


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
    if source.is_file() and target.suffix not in HDF5_SUFFIXES:
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
            source.is_dir()
            and all(
                f.suffix in HDF5_SUFFIXES or f.is_dir() or f == list_beside(there)
                for f in there.rglob("*")
            )
        )

    build_beside(target, write, overwrite, replaceable)
    return made


def _repack_file(file: Path, target: Path, made: Repacked) -> None:
    try:
        with opened(file) as before, naming_damage(file):
            ordered = before["/"].id.get_create_plist().get_link_creation_order()
            with _naming_full_disk(target):
                options = {"libver": FILE_VERSION, "track_order": bool(ordered)}
                with h5py.File(target, "w", **options) as after:
                    for write in _writes(file, before, after, made):
                        write()
            with h5py.File(target, "r") as after:
                _check_equal(file, before, after)
    except ForeignStorageError as error:
        raise DatasetError(file, [foreign_problem(file, error)]) from error


@contextmanager
def _naming_full_disk(target: Path) -> Iterator[None]:
    """Name the file that could not be written, not the one that was being read.

    Raises:
        DatasetError: In place of what h5py raises, while writing or when it closes the file.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.__context__, DatasetError):
            raise error.__context__ from None
        if "write" not in str(error) and "flush" not in str(error) and error.errno is None:
            raise
        mend = "make room on the disk, or choose another --output_dir"
        what = f"cannot be written ({first_line(error)})"
        raise _refusal(target.parent, "", what, mend) from error
    except RuntimeError as error:
        # What closing a file raises after an error in the block.
        if isinstance(error.__context__, DatasetError | OSError):
            raise error.__context__ from None
        raise


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
        for name in _names(group):
            count += 1
            links = group.id.links  # pyright: ignore[reportAttributeAccessIssue]
            if count > _OBJECT_LIMIT:
                what = f"is beyond {_OBJECT_LIMIT} links"
                raise _refusal(file, _key(group, name), what, "split the file")
            if links.get_info(_encoded(name)).type == h5l.TYPE_SOFT:
                yield group, name, links.get_val(_encoded(name))
                continue
            found = child(group, name)
            if found is None:
                mend = "write it as a group or a data set"
                what = "is neither a group nor a data set"
                raise _refusal(file, _key(group, name), what, mend)
            yield group, name, found
            if isinstance(found, h5py.Group) and place_in_file(found) not in entered:
                entered.add(place_in_file(found))
                waiting.append(found)


def _names(group: h5py.Group) -> Iterator[_Name]:
    # h5py says that a name may be None, too.
    return (name for name in group if name is not None)


def _encoded(name: _Name) -> bytes:
    return name if isinstance(name, bytes) else name.encode()


def _key(group: h5py.Group, name: _Name) -> str:
    return f"{_text(group.name)}/{_text(name)}".replace("//", "/")


def _text(name: _Name | None) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _writes(
    file: Path, before: h5py.File, after: h5py.File, made: Repacked
) -> Iterator[Callable[[], None]]:
    """What is to be done for each object, its links after it."""
    copies: dict[tuple[int, int], h5py.Group | h5py.Dataset] = {place_in_file(before): after}
    yield lambda: _copy_attributes(file, before, after)
    for group, name, found in _links(file, before):
        into = copies[place_in_file(group)]
        assert isinstance(into, h5py.Group)
        if isinstance(found, bytes):
            links = into.id.links  # pyright: ignore[reportAttributeAccessIssue]
            links.create_soft(_encoded(name), found, _link_plist(name))
            continue
        place = place_in_file(found)
        if place in copies:
            into[name] = copies[place]
        elif isinstance(found, h5py.Group):
            copies[place] = _new_group(found, into, name)
            yield lambda found=found, place=place: _copy_attributes(file, found, copies[place])
        else:
            copies[place] = _copy_dataset(file, found, into, name, made)
            yield lambda found=found, place=place: _copy_attributes(file, found, copies[place])


def _link_plist(name: _Name) -> h5p.PropLCID:
    plist = h5p.create(h5p.LINK_CREATE)
    if isinstance(name, str) and not name.isascii():
        plist.set_char_encoding(h5t.CSET_UTF8)
    return plist


def _new_group(group: h5py.Group, into: h5py.Group, name: _Name) -> h5py.Group:
    before = group.id.get_create_plist()  # pyright: ignore[reportAttributeAccessIssue]
    plist = h5p.create(h5p.GROUP_CREATE)
    plist.set_link_creation_order(before.get_link_creation_order())
    plist.set_attr_creation_order(before.get_attr_creation_order())
    return h5py.Group(h5g.create(into.id, _encoded(name), _link_plist(name), plist))


def _copy_dataset(
    file: Path, dataset: h5py.Dataset, into: h5py.Group, name: _Name, made: Repacked
) -> h5py.Dataset:
    key = _key(into, name)
    if _refers(dataset.dtype):
        mend = "replace the references by paths"
        raise _refusal(file, key, "holds references to places in this file", mend)
    problem = check_storage(file, dataset)
    if problem and problem.kind != NEVER_WRITTEN:
        raise DatasetError(file, [problem])
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_attr_creation_order(dataset.id.get_create_plist().get_attr_creation_order())
    _set_fill_value(file, key, dataset, plist)
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
    space = h5s.create(h5s.NULL)
    if dataset.shape is not None:
        grown = [h5s.UNLIMITED if size is None else size for size in dataset.maxshape or ()]
        space = h5s.create_simple(dataset.shape, tuple(grown))
    new = h5d.create(into.id, _encoded(name), _kind(dataset), space, plist, _link_plist(name))
    written = h5py.Dataset(new)
    for part in _parts(dataset):
        _write(written, part, _read(file, dataset, part))
    return written


def _write(dataset: h5py.Dataset, part: _Part, values: np.ndarray) -> None:
    if not part or h5py.check_vlen_dtype(dataset.dtype) in (None, str, bytes):
        dataset[part] = values
        return
    # h5py takes one row of varying length for a table.
    where = dataset.id.get_space()
    where.select_hyperslab(tuple(one.start for one in part), values.shape)
    dataset.id.write(h5s.create_simple(values.shape), where, values)


def _kind(dataset: h5py.Dataset) -> h5t.TypeID:
    """Type of the values, with the bits that count of each integer."""
    # Made anew: where the source's own are damaged, HDF5 2.0 writes them and ends the process.
    kind = h5t.py_create(dataset.dtype, logical=True)
    before = dataset.id.get_type()
    if isinstance(before, h5t.TypeIntegerID) and isinstance(kind, h5t.TypeIntegerID):
        bits, offset = before.get_precision(), before.get_offset()
        if bits < kind.get_precision():
            kind = kind.copy()
            kind.set_precision(bits)
            kind.set_offset(offset)
    return kind


def _refers(kind: np.dtype) -> bool:
    """Whether values hold references, which mean nothing in another file."""
    if h5py.check_ref_dtype(kind) is not None:
        return True
    if (inner := h5py.check_vlen_dtype(kind)) is not None:
        return _refers(np.dtype(inner))
    if kind.subdtype is not None:
        return _refers(kind.subdtype[0])
    return any(_refers(kind[name]) for name in kind.names or ())


def _set_fill_value(file: Path, key: str, dataset: h5py.Dataset, plist: h5p.PropDCID) -> None:
    before = dataset.id.get_create_plist()
    if before.fill_value_defined() != h5d.FILL_VALUE_USER_DEFINED:
        return
    mend = "write it without a fill value (h5repack keeps those of text)"
    if dataset.dtype.hasobject:
        raise _refusal(file, key, "has a fill value of varying length", mend)
    fill = np.zeros((), dataset.dtype)
    before.get_fill_value(fill)
    # h5py would store where the text lies in memory; zeros are what it would be anyway.
    if dataset.dtype.kind != "S":
        plist.set_fill_value(fill)
    elif fill.tobytes().strip(b"\0"):
        raise _refusal(file, key, f"has the fill value {fill[()]!r}, a text", mend)


def _set_filters(dataset: h5py.Dataset, plist: h5p.PropDCID) -> None:
    """Those of the source, and the checksum last, over what is stored."""
    # Not on a copy of the source's list: HDF5 2.0 frees such a list twice.
    before = dataset.id.get_create_plist()
    for index in range(before.get_nfilters()):
        code, flags, values, _ = before.get_filter(index)
        if code != h5z.FILTER_FLETCHER32:
            plist.set_filter(code, flags, values)
    # HDF5 allows none over values of varying length, which lie elsewhere.
    if not dataset.dtype.hasobject:
        plist.set_fletcher32()


def _chunks(dataset: h5py.Dataset) -> tuple[int, ...] | None:
    """One picture per chunk, and of numbers as many rows as a mebibyte takes."""
    if not dataset.shape:
        return None
    if 0 in dataset.shape or dataset.dtype.hasobject or _unwritten_chunks(dataset):
        return dataset.chunks
    row_bytes = max(1, int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize)
    # Of a row that is larger than HDF5's chunks may be, what the file had.
    if row_bytes > 2**31 and dataset.chunks:
        return dataset.chunks
    rows = max(1, min(dataset.shape[0], _CHUNK_BYTES // row_bytes))
    if dataset.dtype == np.uint8 and (dataset.ndim >= 4 or row_bytes > _PICTURE_BYTES):
        rows = 1
    return (rows, *dataset.shape[1:])


def _unwritten_chunks(dataset: h5py.Dataset) -> bool:
    if not dataset.shape or not dataset.chunks:
        return False
    whole = math.prod(-(-n // m) for n, m in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() < whole


def _parts(dataset: h5py.Dataset) -> Iterator[_Part]:
    """What was written, in parts that fit into memory: rows, or chunks where some are missing."""
    if dataset.shape is None or 0 in dataset.shape or not dataset.id.get_storage_size():
        return
    if dataset.shape == ():
        yield ()
        return
    if dataset.chunks and _unwritten_chunks(dataset):
        chunks = dataset.chunks
        starts: list[tuple[int, ...]] = []
        dataset.id.chunk_iter(lambda info: starts.append(info.chunk_offset))
        for start in starts:
            ends = zip(start, chunks, dataset.shape, strict=True)
            part = tuple(slice(at, min(at + size, end)) for at, size, end in ends)
            if all(one.start < one.stop for one in part):
                yield part
        return
    row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
    rows = max(1, _SLAB_BYTES // max(1, row_bytes))
    if dataset.chunks:
        rows = max(dataset.chunks[0], rows // dataset.chunks[0] * dataset.chunks[0])
    rest = tuple(slice(0, size) for size in dataset.shape[1:])
    for start in range(0, len(dataset), rows):
        yield (slice(start, min(start + rows, len(dataset))), *rest)


def _read(file: Path, dataset: h5py.Dataset, part: _Part) -> np.ndarray:
    try:
        return np.asarray(dataset[part], dataset.dtype)
    except H5PY_ERRORS as error:
        where = f"rows {part[0].start} to {part[0].stop - 1}" if part else "its value"
        raise DatasetError(file, [read_failure(file, dataset, error, where, None)]) from error


def _copy_attributes(
    file: Path, before: h5py.Group | h5py.Dataset, after: h5py.Group | h5py.Dataset
) -> None:
    for name in before.attrs:
        stored = before.attrs.get_id(name)
        if _refers(stored.dtype):
            key = f"{_text(before.name)}@{_text(name)}"
            mend = "delete it (of a dimension scale: dims[i].detach_scale), or replace it by a path"
            raise _refusal(file, key, "holds references to places in this file", mend)
        value = before.attrs[name]
        if isinstance(value, h5py.Empty):
            after.attrs[name] = value
            continue
        text = h5py.check_string_dtype(stored.dtype)
        if text is not None and text.length is None:
            # As bytes: they need not be the UTF-8 that they are said to be.
            value = np.zeros(stored.shape, stored.dtype)
            stored.read(value)
        after.attrs.create(name, value, stored.shape, stored.dtype)


def _check_equal(file: Path, before: h5py.File, after: h5py.File) -> None:
    """Compare every object, attribute and value with the source, before the file gets its name."""

    def alike(one: h5py.Group | h5py.Dataset, other: h5py.Group | h5py.Dataset) -> bool:
        return list(one.attrs) == list(other.attrs) and all(
            _same(np.asarray(_plain(one.attrs[name])), np.asarray(_plain(other.attrs[name])))
            for name in one.attrs
        )

    def check(equal: bool, key: str, what: str = "") -> None:
        if not equal:
            mend = "report it; h5repack -f FLET writes checksums, too"
            raise _refusal(file, key, f"{what} differs after writing; nothing was kept", mend)

    check(alike(before, after), "/", "an attribute")
    seen = 0
    for group, name, found in _links(file, before):
        seen += 1
        key = _key(group, name)
        into = after[group.name or "/"]
        assert isinstance(into, h5py.Group)
        if isinstance(found, bytes):
            links = into.id.links  # pyright: ignore[reportAttributeAccessIssue]
            check(links.get_val(_encoded(name)) == found, key, "a link")
            continue
        copy = into[name]
        check(type(copy) is type(found), key, "the kind")
        assert isinstance(copy, h5py.Group | h5py.Dataset)
        check(alike(found, copy), key, "an attribute")
        if not isinstance(found, h5py.Dataset) or not isinstance(copy, h5py.Dataset):
            continue
        check(_described(found) == _described(copy), key, "what is said of the values")
        written = False
        for part in _parts(found):
            written = True
            check(_same(_read(file, found, part), _read(file, copy, part)), key, "a value")
        check(written == bool(copy.id.get_storage_size()), key, "what was written")
    check(sum(1 for _ in _links(file, after)) == seen, "/", "the number of links")


def _described(dataset: h5py.Dataset) -> tuple[object, ...]:
    plist = dataset.id.get_create_plist()
    kind = dataset.id.get_type()
    bits = kind.get_precision() if isinstance(kind, h5t.TypeIntegerID) else None
    fill = np.zeros((), dataset.dtype)
    if dataset.shape is not None and not dataset.dtype.hasobject:
        plist.get_fill_value(fill)
    packed = [code for code, _ in filters(dataset) if code != h5z.FILTER_FLETCHER32]
    growth = None if dataset.shape is None else dataset.maxshape
    # What is not chunked has no filter, and its copy those of chunks: none but the checksum.
    return dataset.shape, dataset.dtype, bits, fill.tobytes(), packed, growth


def _plain(value: object) -> object:
    return str(value.dtype) if isinstance(value, h5py.Empty) else value


def _same(one: object, other: object) -> bool:
    """Equal to the bit; a NaN equals itself."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.dtype.hasobject:
            return one.tobytes() == other.tobytes()
        return all(map(_same, one.ravel().tolist(), other.ravel().tolist()))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


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
