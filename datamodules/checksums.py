"""Checksums of whole files: what was written is what will be read, years and copies later.

Of a data set they are kept beside it, as lines that ``sha256sum --check`` understands; of a frame
cache in its ``store.json``, by a faster function, because a cache can always be made anew.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import xxhash

from datamodules.errors import DatasetError, Problem
from policies.atomic_files import write_atomically
from policies.json_files import read_json
from policies.safe_paths import inside

CACHE_MANIFEST = "store.json"
_LIST = "checksums.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LIST_LIMIT_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20

_RENAME = "rename it, or put the file itself into the data set"
AGAIN = "copy or download the file again, or take it from a backup"


def list_beside(path: Path) -> Path:
    """Where the checksums of a data set are kept: in its folder, or beside its one file."""
    return path / _LIST if path.is_dir() else path.with_name(f"{path.name}.{_LIST}")


def links_within(root: Path) -> Path:
    """The folder that links in a data set may lead to, besides its own."""
    resolved = root.resolve()
    # The hub's cache links the files of a snapshot to blobs beside it.
    return resolved.parents[1] if resolved.parent.name == "snapshots" else resolved


def files_below(path: Path) -> list[Path]:
    """Files of a data set, without hidden ones and without the list itself."""
    if path.is_file():
        return [path]
    listed = list_beside(path)
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file != listed
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def write_list(path: Path, on_bytes: Callable[[int], None]) -> int:
    """Write the checksums of every file of a data set; the list is there whole or not at all.

    Args:
        path: A file, or a folder.
        on_bytes: Called with the number of bytes read since its last call.

    Returns:
        How many files it lists.

    Raises:
        DatasetError: When a name does not fit into a line, or a file is a link out of the data set.
    """
    root = path if path.is_dir() else path.parent
    files = files_below(path)
    names = [file.relative_to(root).as_posix() for file in files]
    problems = []
    for file, name in zip(files, names, strict=True):
        try:
            name.encode()
            if {"\n", "\r"} & set(name):
                raise ValueError("has a name of more than one line")
            inside(root, name, links_within=links_within(root))
        except UnicodeEncodeError:
            problems.append(Problem(str(file), "", "has a name that is no UTF-8", _RENAME))
        except ValueError as error:
            problems.append(Problem(str(file), "", str(error), _RENAME))
    if problems:
        raise DatasetError(path, problems)
    lines = [
        f"{_checksum(file, hashlib.sha256, on_bytes)}  {name}\n"
        for file, name in zip(files, names, strict=True)
    ]
    write_atomically(list_beside(path), "".join(lines))
    return len(files)


def compare_with_list(
    path: Path, on_bytes: Callable[[int], None]
) -> tuple[list[Problem], list[str]]:
    """Compare every file of a data set with the list beside it.

    Args:
        path: A file, or a folder.
        on_bytes: Called with the number of bytes read since its last call.

    Returns:
        Files that changed or are gone, and names of files that the list does not have.

    Raises:
        DatasetError: When the list is damaged, or names files outside the data set.
    """
    listed = list_beside(path)
    root = listed.parent

    def refuse(what: str) -> DatasetError:
        mend = "write it anew with verify --write --overwrite, if you trust the files"
        return DatasetError(path, [Problem(str(listed), "", what, mend)])

    if listed.stat().st_size > _LIST_LIMIT_BYTES:
        raise refuse(f"is larger than {_LIST_LIMIT_BYTES:,} bytes")
    expected: dict[Path, str] = {}
    for number, line in enumerate(listed.read_bytes().splitlines(), 1):
        match = _LINE.fullmatch(line.decode(errors="replace"))
        if match is None:
            raise refuse(f"line {number} is no checksum and name of a file")
        expected[inside(root, match[2], refuse, links_within(root))] = match[1]
    if not expected:
        raise refuse("lists no file")
    problems = []
    for file, checksum in expected.items():
        if not file.is_file():
            problems.append(Problem(str(file), "", "no such file; the list has it", AGAIN))
        elif _checksum(file, hashlib.sha256, on_bytes) != checksum:
            what = f"differs from what {listed.name} says of it"
            problems.append(Problem(str(file), "", what, AGAIN, kind="differs"))
    unlisted = [str(file) for file in files_below(path) if file not in expected]
    return problems, unlisted


def cache_checksum(file: Path) -> str:
    """Checksum of a file of a frame cache."""
    return _checksum(file, xxhash.xxh3_128, lambda done: None)


def compare_cache(folder: Path, on_bytes: Callable[[int], None]) -> list[Problem]:
    """Compare the files of a frame cache with its manifest.

    Args:
        folder: Of one cache, with its ``store.json``.
        on_bytes: Called with the number of bytes read since its last call.
    """
    manifest = folder / CACHE_MANIFEST
    mend = f"delete {folder}, and the next run fills it again"
    try:
        expected = read_json(manifest).get("files")
    except ValueError as error:
        return [Problem(str(manifest), "", str(error).removeprefix(f"{manifest}: "), mend)]
    if not isinstance(expected, dict) or not expected:
        return [Problem(str(manifest), "files", "holds no checksums", mend)]
    problems = []
    for name, checksum in expected.items():
        try:
            file = inside(folder, name)
            same = _checksum(file, xxhash.xxh3_128, on_bytes) == checksum
        except (OSError, ValueError) as error:
            problems.append(Problem(str(manifest), "files", str(error), mend))
            continue
        if not same:
            problems.append(Problem(str(file), "", "differs from what was stored", mend))
    return problems


def _checksum(file: Path, new: Callable, on_bytes: Callable[[int], None]) -> str:
    digest = new()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()
