"""All frames of a data set as one array per camera: filled once, gathered from ever after.

The store knows nothing of HDF5 or video. A reader declares the sizes, gets a :class:`FrameWriter`
and writes slices in any order; the store lies in RAM, in a memory-mapped folder that later runs
open without touching the source, or on a GPU.

A cache folder is complete or absent: it is built under a temporary name, fsynced and renamed,
while a lock keeps a second run waiting. Its ``store.json`` holds a checksum of every file, which
:mod:`datamodules.verify` compares when it is asked to, and no run does.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from datamodules.checksums import CACHE_MANIFEST, cache_checksum
from datamodules.progress import progress_bar
from policies.atomic_files import sync
from policies.json_files import read_json

Storage = Literal["ram", "memmap", "gpu"]

CODE_VERSION = 1
"""Part of the cache key: raise it when the same source would be stored differently."""


@dataclass(frozen=True)
class StoreShapes:
    """How large a store is."""

    cameras: dict[str, tuple[int, int]]
    """Camera name to (height, width) in px, as stored."""
    columns: dict[str, int]
    """Column name to dimensions."""
    episode_numbers: tuple[int, ...]
    """Number of each stored episode in the data set, in the order of the store."""
    episode_lengths: tuple[int, ...]
    """Frames of each stored episode."""

    @property
    def frames(self) -> int:
        """Frames of all episodes together."""
        return sum(self.episode_lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all pictures and columns."""
        pixels = sum(height * width * 3 for height, width in self.cameras.values())
        return self.frames * (pixels + 4 * sum(self.columns.values()))


@dataclass(frozen=True)
class FrameStore:
    """Frames of many episodes, one behind the other."""

    shapes: StoreShapes
    images: Mapping[str, UInt8[Tensor, "frame height width 3"]]
    """RGB pictures per camera, channels last."""
    columns: Mapping[str, Float32[Tensor, "frame dim"]]
    """``action`` and whatever else the data set has per frame, in data units."""
    episode_starts: Int64[Tensor, " episode"]
    """First frame of each stored episode."""

    @property
    def device(self) -> torch.device:
        """Where the frames lie."""
        return self.columns["action"].device

    def rows(self, number: int) -> slice:
        """Frames of the episode with this number in the data set.

        Raises:
            ValueError: When the store does not hold the episode.
        """
        if number not in self.shapes.episode_numbers:
            held = self.shapes.episode_numbers
            raise ValueError(
                f"episode {number} is not loaded; loaded are {len(held)} episodes "
                f"from {held[0]} to {held[-1]}"
            )
        position = self.shapes.episode_numbers.index(number)
        start = int(self.episode_starts[position])
        return slice(start, start + self.shapes.episode_lengths[position])

    def to(self, device: torch.device | str) -> "FrameStore":
        """Copy to a device."""
        return FrameStore(
            self.shapes,
            {name: frames.to(device) for name, frames in self.images.items()},
            {name: values.to(device) for name, values in self.columns.items()},
            self.episode_starts.to(device),
        )

    def fingerprint(self, probes: int = 64) -> str:
        """Hash of the content: all columns, all lengths, and some whole pictures.

        Equal for equal demonstrations wherever the files lie, so that a run can be resumed
        elsewhere but not on other data.

        Args:
            probes: Pictures per camera, evenly spread.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.shapes), sort_keys=True).encode())
        for name in sorted(self.columns):
            digest.update(self.columns[name].cpu().numpy().tobytes())
        rows = np.unique(np.linspace(0, self.shapes.frames - 1, probes).astype(np.int64))
        chosen = torch.from_numpy(rows).to(self.device)
        for name in sorted(self.images):
            digest.update(self.images[name].index_select(0, chosen).cpu().numpy().tobytes())
        return digest.hexdigest()[:32]


def resize_into(
    row: UInt8[np.ndarray, "height width 3"], frame: UInt8[np.ndarray, "_height _width 3"]
) -> None:
    """Write a picture of any size into one of the stored size, by area averaging."""
    import cv2

    height, width = row.shape[:2]
    shrinks = height <= frame.shape[0] and width <= frame.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cv2.resize(np.ascontiguousarray(frame), (width, height), dst=row, interpolation=how)


class FrameWriter:
    """Hands a reader the places to write to."""

    def __init__(
        self,
        shapes: StoreShapes,
        images: Mapping[str, UInt8[np.ndarray, "frame height width 3"]],
        columns: Mapping[str, Float32[np.ndarray, "frame dim"]],
        on_frames: Callable[[int], None],
    ) -> None:
        self.shapes = shapes
        self._images = images
        self._columns = columns
        self._on_frames = on_frames
        self._missing = {name: shapes.frames for name in (*images, *columns)}

    @property
    def episodes(self) -> Iterator[tuple[int, int, int]]:
        """Number, first frame and end (exclusive) of each episode, in the order of the store."""
        start = 0
        for number, length in zip(
            self.shapes.episode_numbers, self.shapes.episode_lengths, strict=True
        ):
            yield number, start, start + length
            start += length

    def image_rows(
        self, camera: str, start: int, stop: int
    ) -> UInt8[np.ndarray, "frame height width 3"]:
        """Rows to write pictures of the stored size into; counts them as written."""
        self._wrote(camera, stop - start)
        return self._images[camera][start:stop]

    def write_images(
        self, camera: str, start: int, frames: UInt8[np.ndarray, "frame height width 3"]
    ) -> None:
        """Write pictures of any size; the stored size is reached by area averaging."""
        rows = self.image_rows(camera, start, start + len(frames))
        if frames.shape[1:] == rows.shape[1:]:
            rows[:] = frames
            return
        for row, frame in zip(rows, frames, strict=True):
            resize_into(row, frame)

    def write_column(
        self, column: str, start: int, values: Float32[np.ndarray, "frame dim"]
    ) -> None:
        """Write rows of a column."""
        self._columns[column][start : start + len(values)] = values
        self._missing[column] -= len(values)

    def finish(self) -> None:
        """Check that everything was written.

        Raises:
            ValueError: When a reader left rows unwritten, or wrote some twice.
        """
        wrong = {name: count for name, count in self._missing.items() if count}
        if wrong:
            raise ValueError(f"the reader did not write each row once; rows left: {wrong}")

    def _wrote(self, camera: str, frames: int) -> None:
        self._missing[camera] -= frames
        self._on_frames(frames)


Fill = Callable[[FrameWriter], None]


def build_store(
    shapes: StoreShapes,
    fill: Fill,
    storage: Storage = "ram",
    cache_dir: str | Path | None = None,
    identity: Mapping | None = None,
    device: torch.device | str = "cuda",
    progress: bool = True,
) -> FrameStore:
    """Fill a store from a reader, or open the cache that an earlier run filled.

    Args:
        shapes: Sizes of everything.
        fill: Writes every row once; not called when a complete cache exists.
        storage: ``ram``; ``memmap`` for a cache folder on disk; ``gpu``.
        cache_dir: Folder of all caches (memmap only); None takes :func:`default_cache_dir`.
        identity: Plain values that name the content (memmap only). The entry ``source`` lists
            [path, size, time of change] of each file: a cache of the same paths with other
            values there is stale and is deleted.
        device: Where a ``gpu`` store lies.
        progress: Show a progress bar when a person is watching.

    Returns:
        The filled store.

    Raises:
        ValueError: When the store does not fit, or there is no GPU for it.
    """
    if storage == "memmap":
        return _open_or_build(shapes, fill, cache_dir, identity or {}, progress)
    if storage == "gpu" and not torch.cuda.is_available():
        raise ValueError("storage: gpu needs a CUDA device and there is none; use ram or memmap")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if shapes.nbytes > memory:
        raise ValueError(
            f"the frames need {shapes.nbytes / 2**30:.1f} GiB and this machine has "
            f"{memory / 2**30:.1f} GiB; use storage: memmap, "
            "a smaller image_size, or fewer episodes"
        )
    images = {
        name: np.empty((shapes.frames, *size, 3), np.uint8) for name, size in shapes.cameras.items()
    }
    columns = {
        name: np.empty((shapes.frames, dim), np.float32) for name, dim in shapes.columns.items()
    }
    _fill(shapes, images, columns, fill, progress)
    store = _store(shapes, images, columns)
    return store.to(device) if storage == "gpu" else store


def default_cache_dir() -> Path:
    """Folder of the caches: ``$XDG_CACHE_HOME/policyscope/frames``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "policyscope" / "frames"


def cache_key(shapes: StoreShapes, identity: Mapping) -> str:
    """Name of the folder for this content."""
    plain = {"code": CODE_VERSION, "shapes": asdict(shapes), "identity": dict(identity)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]


def _store(
    shapes: StoreShapes, images: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]
) -> FrameStore:
    lengths = np.asarray(shapes.episode_lengths, np.int64)
    return FrameStore(
        shapes,
        {name: torch.from_numpy(array) for name, array in images.items()},
        {name: torch.from_numpy(array) for name, array in columns.items()},
        torch.from_numpy(np.cumsum(lengths) - lengths),
    )


def _fill(
    shapes: StoreShapes,
    images: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    fill: Fill,
    progress: bool,
) -> None:
    total = shapes.frames * len(shapes.cameras)
    with progress_bar("Reading frames", total, progress) as advance:
        writer = FrameWriter(shapes, images, columns, advance)
        fill(writer)
    writer.finish()


def _open_or_build(
    shapes: StoreShapes,
    fill: Fill,
    cache_dir: str | Path | None,
    identity: Mapping,
    progress: bool,
) -> FrameStore:
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / cache_key(shapes, identity)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"cannot write to the frame cache {root} ({error.strerror}); choose another cache_dir"
        ) from error
    with lock:
        _wait_for(lock, root)
        if (store := _open(folder, shapes)) is not None:
            return store
        _sweep(root, folder.name, identity)
        free = shutil.disk_usage(root).free
        if shapes.nbytes > free:
            raise ValueError(
                f"the frames need {shapes.nbytes / 2**30:.1f} GiB in {root} and only "
                f"{free / 2**30:.1f} GiB are free; choose another cache_dir or a smaller image_size"
            )
        building = root / f"{folder.name}.{os.getpid()}.part"
        try:
            _build(building, shapes, fill, identity, progress)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(building, folder)
            sync(root)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        store = _open(folder, shapes)
        assert store is not None
        return store


def _wait_for(lock, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another run is filling the frame cache in {root}; waiting.", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _files(folder: Path, shapes: StoreShapes) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    # Numbered, because camera names come from strangers' files.
    named = {
        name: (folder / f"camera_{index}.u8", (shapes.frames, *size, 3), "uint8")
        for index, (name, size) in enumerate(shapes.cameras.items())
    }
    return named | {
        f"column {name}": (folder / f"column_{index}.f32", (shapes.frames, dim), "float32")
        for index, (name, dim) in enumerate(shapes.columns.items())
    }


def _map(
    folder: Path, shapes: StoreShapes, mode: Literal["c", "r+"]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    arrays = {
        name: np.memmap(file, dtype, mode, shape=shape)
        if np.prod(shape)
        else np.empty(shape, dtype)
        for name, (file, shape, dtype) in _files(folder, shapes).items()
    }
    return (
        {name: arrays[name] for name in shapes.cameras},
        {name: arrays[f"column {name}"] for name in shapes.columns},
    )


def _open(folder: Path, shapes: StoreShapes) -> FrameStore | None:
    """Open a complete cache; None when there is none, or its files were cut since."""
    if not (folder / CACHE_MANIFEST).is_file():
        return None
    for file, shape, dtype in _files(folder, shapes).values():
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not file.is_file() or file.stat().st_size != expected:
            return None
    # Copy-on-write: torch wants writable memory, and nothing may reach the file.
    return _store(shapes, *_map(folder, shapes, "c"))


def _build(
    folder: Path, shapes: StoreShapes, fill: Fill, identity: Mapping, progress: bool
) -> None:
    files = _files(folder, shapes).values()
    with _naming_cache(folder.parent):
        folder.mkdir()
        for file, shape, dtype in files:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            with file.open("wb") as handle:
                # Writing to a map of a full disk kills the process, so ask for the space first.
                if size:
                    os.posix_fallocate(handle.fileno(), 0, size)
    _fill(shapes, *_map(folder, shapes, "r+"), fill, progress)
    with _naming_cache(folder.parent):
        manifest = {
            "code": CODE_VERSION,
            "shapes": asdict(shapes),
            "identity": dict(identity),
            "files": {file.name: cache_checksum(file) for file, *_ in files},
        }
        (folder / CACHE_MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in (*folder.iterdir(), folder):
            sync(file)


@contextmanager
def _naming_cache(root: Path) -> Iterator[None]:
    """Say what to do about a disk that takes no more.

    Raises:
        ValueError: In place of the error of the system.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the frame cache {root} cannot be written ({error.strerror or error}); free space "
            "there, or choose another cache_dir or a smaller image_size"
        ) from error


def _sweep(root: Path, key: str, identity: Mapping) -> None:
    """Delete what a killed run left of this cache, and caches of the source as it was before."""
    for left in root.glob(f"{key}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    source = identity.get("source")
    if not source:
        return
    for manifest in root.glob(f"*/{CACHE_MANIFEST}"):
        try:
            other = _source_of(manifest)
        except ValueError as error:
            # Another run may be deleting it.
            if manifest.is_file():
                print(f"{error}; it is left alone, and can be deleted.", file=sys.stderr)
            continue
        same_files = [entry[0] for entry in other] == [entry[0] for entry in source]
        if same_files and other != [list(entry) for entry in source]:
            shutil.rmtree(manifest.parent, ignore_errors=True)


def _source_of(manifest: Path) -> list[list]:
    """Files that another cache was filled from.

    Raises:
        ValueError: When its manifest is damaged.
    """
    identity = read_json(manifest).get("identity")
    source = identity.get("source", []) if isinstance(identity, dict) else None
    if not isinstance(source, list) or not all(isinstance(e, list) and e for e in source):
        raise ValueError(f"{manifest}: lists no source files")
    return source
