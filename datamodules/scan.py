"""Look through an HDF5 data set once: everything small is read, everything wrong is listed.

Pictures are only measured here, not read; :mod:`datamodules.hdf5` reads them into a frame store.
"""

import hashlib
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import h5py
import numpy as np
from h5py import h5l, h5o  # pyright: ignore[reportAttributeAccessIssue]
from jaxtyping import Float32, UInt8

from datamodules.errors import DatasetError, Problem
from datamodules.layouts import (
    LAYOUTS,
    CameraSource,
    ForeignStorageError,
    HDF5Schema,
    detect_layout,
    find_files,
    matching,
    member,
    natural_key,
)

_CAMERA_NAME_BYTES = 200
_DEFLATE_LIMIT = 1100
"""Deflate never packs better than 1032 to 1 (zlib, technical details); more is not data."""
_ALWAYS_ACCEPTED_BYTES = 64 * 2**20
_SMALL_CHUNK_BYTES = 2**16
"""As stored, of which no filter makes more than it is worth to look at."""
NEVER_WRITTEN = "was created but never written"
_CHUNK_LIMIT_BYTES = 2**30
_RANGE_PROBES = 16
_MAX_LISTED_DEPTH = 4

PICTURE_LIMIT_PX = 2**26
"""Of one picture, 8192 x 8192: a few bytes can declare thousands of times as many."""
_LISTED_PATHS = 1000

H5PY_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError)
"""What h5py raises when a file is damaged; which one depends on the place of the damage."""

_SKIP = "repair the episode, or leave it out with skip_bad_episodes: true"
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"


@dataclass(frozen=True)
class Camera:
    """A camera after its pictures were measured."""

    source: CameraSource
    """Concrete path and encoding."""
    height: int
    width: int
    scale: float | None = None
    """Factor from stored floating-point values to 0..255; None for pictures of bytes."""


@dataclass(frozen=True)
class Episode:
    """One usable demonstration."""

    number: int
    """Position in the data set, counting unusable episodes too."""
    file: Path
    group: str
    """Path of its group in the file."""
    length: int
    """Steps that have an observation and an action."""
    columns: dict[str, Float32[np.ndarray, "step dim"]]
    """``action`` and, where the data set has them, ``state``, ``environment_state`` and
    ``simulator_state``."""


@dataclass(frozen=True)
class Scan:
    """What an HDF5 data set holds, and what is wrong with it."""

    path: Path
    layout: str
    """Name of the layout; ``declared`` for a schema from a config."""
    schema: HDF5Schema
    """Concrete: no pattern left in the paths of an episode."""
    files: tuple[Path, ...]
    cameras: dict[str, Camera]
    episodes: tuple[Episode, ...]
    fps: float | None
    train_episodes: tuple[int, ...] | None
    """Episodes that the file itself assigns to training; None when it does not say."""
    val_episodes: tuple[int, ...] | None
    not_finite: dict[str, int]
    """Path of a column to the number of its values that are NaN or infinite."""
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What was recognised and is taken for granted from here on."""

    def require_usable(self, skip_bad_episodes: bool = False) -> None:
        """Refuse a data set with problems.

        Args:
            skip_bad_episodes: Accept problems that concern single episodes; those are left out.

        Raises:
            DatasetError: Lists every problem that counts.
        """
        counting = [p for p in self.problems if not (skip_bad_episodes and p.episode is not None)]
        if not counting and not self.episodes:
            counting = list(self.problems)
        if counting:
            raise DatasetError(self.path, counting)


def scan_hdf5(path: str | Path, layout: str = "auto", schema: HDF5Schema | None = None) -> Scan:
    """Measure a data set and list its problems.

    Args:
        path: A file or a folder of files.
        layout: A name in :data:`datamodules.layouts.LAYOUTS`, or ``auto``.
        schema: Where things are, instead of a known layout.

    Returns:
        What was found; its ``problems`` do not raise here, so that they can be shown together.

    Raises:
        DatasetError: When there is nothing to look through: no file, or an unknown layout.
    """
    path = Path(path).expanduser()
    if not path.exists():
        problem = Problem(str(path), "", "no such file or folder", "check the path of the data set")
        raise DatasetError(path, [problem])
    if (path / "meta" / "info.json").is_file():
        what = "is a LeRobot data set (meta/info.json), not HDF5"
        raise DatasetError(
            path, [Problem(str(path), "", what, "use the LeRobot data module for it")]
        )
    if schema is not None:
        return _Scanner(path, "declared", schema).scan()
    if layout == "auto":
        layout = _detect(path)
    elif layout not in LAYOUTS:
        near = get_close_matches(layout, LAYOUTS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        problem = Problem(
            str(path),
            "layout",
            f"unknown layout {layout!r}",
            f"{hint}choose auto, {', '.join(LAYOUTS)}, or declare a schema",
        )
        raise DatasetError(path, [problem])
    return _Scanner(path, layout, LAYOUTS[layout].schema).scan()


def _detect(path: Path) -> str:
    anything = HDF5Schema(files=("*.hdf5", "*.h5"))
    if path.is_dir() and not any(True for p in anything.files for _ in path.glob(p)):
        anything = HDF5Schema(files=("**/*.hdf5", "**/*.h5"))
    problems: list[Problem] = []
    for file in find_files(path, anything):
        try:
            with opened(file) as handle, naming_damage(file):
                return detect_layout(handle).name
        except DatasetError as error:
            if error.problems[0].kind == "unknown layout":
                raise
            problems += error.problems
        except ForeignStorageError as error:
            problems.append(foreign_problem(file, error))
    raise DatasetError(path, problems)


@contextmanager
def opened(file: Path) -> Iterator[h5py.File]:
    """Open a file for reading, or say in one sentence why it cannot be read.

    Raises:
        DatasetError: When the file is missing, empty, truncated, foreign, or being written.
    """
    try:
        handle = h5py.File(file, "r")
    except H5PY_ERRORS as error:
        raise DatasetError(file, [_unreadable(file, error)]) from error
    with handle:
        yield handle


@contextmanager
def naming_damage(file: Path, key: str = "", episode: int | None = None) -> Iterator[None]:
    """Name file and key when h5py stumbles over damaged metadata.

    Raises:
        DatasetError: In place of whatever h5py raises.
    """
    try:
        yield
    except DatasetError:
        raise
    except H5PY_ERRORS as error:
        problem = Problem(
            str(file),
            key,
            f"is damaged inside ({first_line(error)})",
            f"copy the file again, or {_SKIP}" if episode is not None else "copy the file again",
            episode,
            kind="damaged inside",
        )
        raise DatasetError(file, [problem]) from error


def first_line(error: BaseException) -> str:
    """What a library says is wrong, in one line."""
    text = str(error.args[0]) if error.args else str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return next(iter(text.splitlines()), "") or type(error).__name__


def _unreadable(file: Path, error: Exception) -> Problem:
    text = str(error)
    again = "copy or download the file again and compare sizes"
    if not file.exists():
        return Problem(str(file), "", "no such file", "check the path", kind="unreadable")
    if file.stat().st_size == 0:
        what, mend = "the file is empty (0 bytes)", again
    elif isinstance(error, BlockingIOError) or "unable to lock" in text:
        what, mend = "another program has the file open for writing", "wait until it has finished"
    elif "already open for write" in text or "consistency flags" in text:
        what = "the program that wrote the file was killed before closing it"
        mend = f"run h5clear -s {file.name}, then inspect it again"
    elif isinstance(error, PermissionError):
        what, mend = "permission denied", "make the file readable"
    elif "truncated" in text:
        what, mend = "the file is truncated", again
    elif "signature not found" in text:
        what = "is not an HDF5 file, or its beginning is damaged"
        mend = f"check that it is HDF5, or {again}"
    else:
        what, mend = f"cannot be opened ({first_line(error)})", again
    return Problem(str(file), "", what, mend, kind="unreadable")


def foreign_problem(file: Path, error: ForeignStorageError, episode: int | None = None) -> Problem:
    """Say which object is not, or may not be, in the file itself."""
    return Problem(
        str(file),
        error.key,
        f"{error.what}; only what lies in the file itself is read",
        "write the values into this file (h5copy, h5repack) if you trust their origin",
        episode,
        kind="links out of the file",
    )


def filters(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """Number and name of the filters that a data set was written through, e.g. (1, deflate)."""
    plist = dataset.id.get_create_plist()
    found = []
    for index in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(index)
        found.append((code, name.decode(errors="replace") or f"filter {code}"))
    return found


def check_storage(file: Path, dataset: h5py.Dataset, episode: int | None = None) -> Problem | None:
    """Say why a data set cannot, or must not, be read, before any of it is.

    A few bytes can declare a shape or a chunk that fills the memory.
    """
    key = str(dataset.name)
    if dataset.shape is None:
        return None
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    # What the header says, too: of contiguous values it follows from the shape.
    stored = min(dataset.id.get_storage_size(), file.stat().st_size)
    if declared and not stored:
        return Problem(str(file), key, NEVER_WRITTEN, _SKIP, episode, NEVER_WRITTEN)
    if declared > max(_ALWAYS_ACCEPTED_BYTES, _DEFLATE_LIMIT * stored):
        return Problem(
            str(file),
            key,
            f"declares the shape {dataset.shape}, {declared / 2**30:.3g} GiB, but stores "
            f"{stored} bytes",
            f"do not trust the file, or {_SKIP}",
            episode,
            "declared shape",
        )
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > _CHUNK_LIMIT_BYTES:
        what = f"has chunks of {dataset.chunks}, above 1 GiB"
        return Problem(str(file), key, what, "rewrite it with small chunks", episode)
    through = filters(dataset)
    if through and stored > _SMALL_CHUNK_BYTES and (what := _swollen_chunk(dataset)):
        mend = f"do not trust the file, or {_SKIP}"
        return Problem(str(file), key, what, mend, episode, "swollen chunk")
    for code, name in through:
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            return Problem(
                str(file),
                key,
                f"was compressed by {name} (filter {code}), which is not installed",
                "pip install hdf5plugin",
                episode,
                f"filter {code}",
            )
    return None


def _swollen_chunk(dataset: h5py.Dataset) -> str | None:
    """Say which chunk stores more than packing its values can take.

    HDF5 unpacks all that a chunk stores, whatever its declared size: 1.5 MB of packed zeros in a
    chunk of 32 bytes fill 1.6 GB. What passes here is at most 1030 times as large as the declared
    chunk, or as 64 KiB.
    """
    assert dataset.chunks is not None
    declared = math.prod(dataset.chunks) * dataset.dtype.itemsize
    # What deflate adds to what cannot be packed (zlib: 0.03 %), and fletcher32.
    limit = max(_SMALL_CHUNK_BYTES, int(1.01 * declared) + 68)
    # In memory a text of varying length is a pointer; in the file it takes 16 bytes.
    if dataset.dtype.hasobject:
        limit = max(limit, 2 * int(1.01 * declared) + 68)
    if dataset.id.get_storage_size() <= limit:
        return None
    found: list[str] = []

    def look(info: h5py.h5d.StoreInfo) -> int | None:
        if info.size <= limit:
            return None
        found.append(
            f"stores {info.size} bytes for the chunk {info.chunk_offset} of {declared} bytes"
        )
        return 1

    dataset.id.chunk_iter(look)
    return found[0] if found else None


def read_failure(
    file: Path, dataset: h5py.Dataset, error: Exception, where: str, episode: int | None
) -> Problem:
    """Say why values could not be read, and through which filters they were written."""
    through = ", ".join(f"{name} (filter {code})" for code, name in filters(dataset)) or "no filter"
    return Problem(
        str(file),
        str(dataset.name),
        f"cannot be read at {where} ({first_line(error)}; written through {through})",
        f"the file is damaged: copy it again, or {_SKIP}",
        episode,
        kind="cannot be read",
    )


def child(group: h5py.Group, name: str | bytes) -> h5py.Group | h5py.Dataset | None:
    """What a group holds under a name as h5py lists it: bytes where they are no UTF-8.

    Raises:
        ForeignStorageError: When it lies, or may lie, outside the file.
    """
    if isinstance(name, str):
        return member(group, name)
    key = f"{group.name}/{name.decode(errors='replace')}"
    links = group.id.links  # pyright: ignore[reportAttributeAccessIssue]
    if links.get_info(name).type != h5l.TYPE_HARD:
        raise ForeignStorageError(key, "is a link under a name that is no UTF-8")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise ForeignStorageError(key, "keeps its values in other files")
    return found if isinstance(found, h5py.Group | h5py.Dataset) else None


def can_name_camera(name: str) -> bool:
    """Whether files can be named after a camera; strangers name the cameras."""
    return (
        name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\"} & set(name)
        and 0 < len(name.encode()) <= _CAMERA_NAME_BYTES
    )


def encoded_picture(value: object) -> bytes:
    """Bytes of one compressed picture, whatever HDF5 type held it, without padding zeros."""
    if isinstance(value, np.ndarray | np.void):
        value = value.tobytes()
    return bytes(value).rstrip(b"\0")  # pyright: ignore[reportArgumentType]


def decode_picture(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Decode JPEG or PNG to RGB as a standard viewer shows it.

    Raises:
        ValueError: When the bytes are no picture, or a JPEG stops before its end.
    """
    import cv2

    height, width = _declared_size(data)
    if not 0 < height * width <= PICTURE_LIMIT_PX:
        raise ValueError(
            f"a picture that declares {height} x {width} px (height x width); up to "
            f"{PICTURE_LIMIT_PX} px in all are read"
        )
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ValueError("a damaged picture") from error
    if picture is None:
        raise ValueError("a damaged picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _declared_size(data: bytes) -> tuple[int, int]:
    """Height and width in px that the header of a JPEG or PNG declares, before any is unpacked.

    PNG: W3C recommendation, section 11.2.1. JPEG: ITU-T T.81, annex B.

    Raises:
        ValueError: When the bytes are no picture, or a JPEG stops before its end.
    """
    if data.startswith(_PNG):
        if len(data) < 24:
            raise ValueError("a damaged picture")
        return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])
    if not data.startswith(_JPEG):
        raise ValueError(f"bytes that are neither JPEG nor PNG (they begin with {data[:4].hex()})")
    if not data.endswith(b"\xff\xd9"):
        raise ValueError("a JPEG that stops before its end marker")
    place = 2
    while (place := data.find(b"\xff", place)) >= 0 and place + 9 <= len(data):
        marker = data[place + 1]
        # The sizes are in the frame's header, SOF0 to SOF15 without the three other tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(height), int.from_bytes(width)
        # Fill bytes and markers without a segment have no length.
        alone = marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9
        length = int.from_bytes(data[place + 2 : place + 4])
        place += 1 if alone else 2 + length
    raise ValueError("a damaged picture")


def shift_actions(
    actions: Float32[np.ndarray, "step action"], offset: int
) -> Float32[np.ndarray, "step action"]:
    """Pair step t with the action stored at t + offset, the nearest one beyond the ends."""
    if offset == 0:
        return actions
    return actions[np.clip(np.arange(len(actions)) + offset, 0, len(actions) - 1)]


def _smooth(values: Float32[np.ndarray, "step dim"], width: int) -> Float32[np.ndarray, "step dim"]:
    kernel = np.ones(width) / width
    columns = [np.convolve(column, kernel, mode="same") for column in values.T]
    return np.stack(columns, axis=1).astype(np.float32)


class _Scanner:
    """Collects problems on the way, instead of stopping at the first."""

    def __init__(self, path: Path, layout: str, schema: HDF5Schema) -> None:
        self.path = path
        self.layout = layout
        self.schema = schema
        self.resolved = False
        self.cameras: dict[str, Camera] = {}
        self.camera_sources: dict[str, CameraSource] = {}
        self.episodes: list[Episode] = []
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.fps: float | None = schema.fps
        self.dims: dict[str, int] = {}
        self.not_finite: dict[str, int] = {}
        self.found = 0
        self.masked: dict[str, set[int]] = {}
        self.file = path
        self.episode: int | None = None

    def scan(self) -> Scan:
        if self.schema.action == ():
            self.problem("schema.action", "no path of actions", "declare at least one")
        files = find_files(self.path, self.schema)
        for self.file in files:
            self.episode = None
            before = self.found
            try:
                with opened(self.file) as handle, naming_damage(self.file):
                    self.scan_file(handle)
            except DatasetError as error:
                number = None
                if self.schema.episode_group == "/":
                    number, self.found = before, before + 1
                self.problems += [replace(problem, episode=number) for problem in error.problems]
            except ForeignStorageError as error:
                self.problems.append(foreign_problem(self.file, error, self.episode))
        self.episode = None
        self.file = self.path
        if not self.episodes and not self.problems:
            self.problem("", "no episode", "record at least one")
        self.look_for_duplicates()
        masks = [
            None if mask not in self.masked else tuple(sorted(self.masked[mask]))
            for mask in ("train_mask", "val_mask")
        ]
        if masks[0] and masks[1] and (both := set(masks[0]) & set(masks[1])):
            self.problem(
                str(self.schema.val_mask).rstrip("?"),
                f"episodes {sorted(both)[:8]} are in {str(self.schema.train_mask).rstrip('?')} too",
                "an episode belongs to training or to validation",
            )
        return Scan(
            path=self.path,
            layout=self.layout,
            schema=replace(
                self.schema,
                images={name: camera.source for name, camera in self.cameras.items()},
                fps=self.fps,
            ),
            files=tuple(files),
            cameras=self.cameras,
            episodes=tuple(self.episodes),
            fps=self.fps,
            train_episodes=masks[0],
            val_episodes=masks[1],
            not_finite=self.not_finite,
            problems=tuple(self.problems),
            warnings=tuple(self.warnings),
            notes=tuple(self.notes),
        )

    def problem(self, key: str, what: str, mend: str, kind: str = "") -> None:
        self.problems.append(Problem(str(self.file), key, what, mend, self.episode, kind))

    def scan_file(self, handle: h5py.File) -> None:
        schema = self.schema
        if schema.episode_group == "/":
            groups = [""]
        else:
            groups = list(matching(handle, schema.episode_group))
        if not groups:
            names = ", ".join(sorted(handle.keys(), key=natural_key)[:8]) or "nothing"
            self.problem(
                "",
                f"no episode: no group matches {schema.episode_group}; the file holds {names}",
                "check that the recording was finished, or declare schema.episode_group",
                kind="no episode",
            )
        self.check_count(handle, len(groups))
        if self.layout == "aloha" and not self.found and not handle.attrs.get("sim", True):
            self.notes.append(
                "recorded on real arms; actions are taken as stored, while ACT shifts them by one "
                "step here (action_offset: -1 in a schema)"
            )
        self.read_fps(handle, handle.name or "/")
        first = self.found
        for name in groups:
            self.episode = self.found
            self.found += 1
            try:
                with naming_damage(self.file, f"/{name}", self.episode):
                    group = member(handle, name or "/")
                    if not isinstance(group, h5py.Group):
                        self.problem(f"/{name}", "is not a group", _SKIP)
                    elif not len(group):
                        self.problem(f"/{name}", "the episode is empty", _SKIP)
                    else:
                        self.scan_episode(group)
            except DatasetError as error:
                self.problems += error.problems
            except ForeignStorageError as error:
                self.problems.append(foreign_problem(self.file, error, self.episode))
        self.episode = None
        self.read_masks(
            handle, {name.rsplit("/", 1)[-1]: first + i for i, name in enumerate(groups)}
        )

    def check_count(self, handle: h5py.File, found: int) -> None:
        if self.schema.episode_count is None:
            return
        path, _, attribute = self.schema.episode_count.rstrip("?").partition("@")
        group = member(handle, path or "/")
        key = f"{path}@{attribute}"
        if group is None or attribute not in group.attrs:
            if not self.schema.episode_count.endswith("?"):
                self.problem(key, "missing attribute", f"set it to {found}, the number of episodes")
            return
        stated = group.attrs[attribute]
        if not isinstance(stated, int | np.integer) or int(stated) != found:
            self.problem(
                key,
                f"{attribute} is {stated} but the file holds {found} episodes",
                f"finish the recording, or set {attribute} to {found}",
            )

    def read_fps(self, holder: h5py.Group, key: str) -> None:
        if self.schema.fps is not None or "fps" not in holder.attrs:
            return
        stated = holder.attrs["fps"]
        try:
            fps = float(np.asarray(stated).reshape(()))  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            fps = math.nan
        if not (math.isfinite(fps) and fps > 0):
            self.problem(f"{key}@fps", f"fps is {stated}", "set it to the control frequency in Hz")
        elif self.fps is None:
            self.fps = fps
        elif fps != self.fps:
            self.problem(
                f"{key}@fps",
                f"fps is {fps:g} here and {self.fps:g} elsewhere",
                "separate the recordings, or resample them to one frequency",
            )

    def read_masks(self, handle: h5py.File, numbers: dict[str, int]) -> None:
        for field in ("train_mask", "val_mask"):
            path = getattr(self.schema, field)
            if path is None:
                continue
            mask = member(handle, path.rstrip("?"))
            if not isinstance(mask, h5py.Dataset):
                if not path.endswith("?"):
                    self.problem(path, "missing mask", "declare schema.train_mask: null")
                continue
            if problem := check_storage(self.file, mask):
                self.problems.append(problem)
                continue
            names = [
                name.decode(errors="replace") if isinstance(name, bytes) else str(name)
                for name in np.asarray(mask[()]).reshape(-1).tolist()
            ]
            unknown = [name for name in names if name not in numbers]
            if unknown:
                self.problem(
                    str(mask.name),
                    f"names episodes that are not in the file: {', '.join(unknown[:8])}",
                    "write the mask anew",
                )
            self.masked.setdefault(field, set()).update(
                numbers[name] for name in names if name in numbers
            )

    def resolve(self, group: h5py.Group) -> None:
        """Settle patterns and optional paths by the first episode; the others must agree."""
        schema = self.schema

        def present(path: str) -> bool:
            return not path.endswith("?") or member(group, path.rstrip("?")) is not None

        def settled(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(path.rstrip("?") for path in paths if present(path))

        simulator_state = schema.simulator_state
        if simulator_state is not None:
            simulator_state = next(iter(settled((simulator_state,))), None)
        self.schema = replace(
            schema,
            state=settled(schema.state),
            action=settled(schema.action),
            environment_state=settled(schema.environment_state),
            simulator_state=simulator_state,
        )
        for name, source in schema.images.items():
            path = source.path.rstrip("?")
            if "*" not in path:
                if present(source.path):
                    self.add_camera(name, replace(source, path=path), group)
                continue
            found = list(matching(group, path))
            depth = [at for at in found if at.endswith("_depth")]
            if depth:
                self.notes.append(f"left out, because depth is not RGB: {', '.join(depth)}")
            for at in found:
                if at not in depth:
                    self.add_camera(at.rsplit("/", 1)[-1], replace(source, path=at), group)
            if not found and not source.path.endswith("?"):
                self.missing(group, path)
        if schema.images and not self.camera_sources and not self.problems:
            tried = ", ".join(source.path.rstrip("?") for source in schema.images.values())
            self.problem(
                str(group.name),
                f"no camera: looked for {tried}; {self.available(group)}",
                "declare schema.images, or schema.images: {} for a data set without pictures",
                kind="no camera",
            )
        self.resolved = True

    def add_camera(self, name: str, source: CameraSource, group: h5py.Group) -> None:
        if not can_name_camera(name):
            self.problem(
                f"{group.name}/{source.path}",
                f"{name!r} cannot name a camera, because files are named after cameras",
                "leave out '/', '\\' and control characters, a '.' at its beginning, and what is "
                f"longer than {_CAMERA_NAME_BYTES} bytes",
                kind="camera name",
            )
            return
        self.camera_sources[name] = source

    def available(self, group: h5py.Group) -> str:
        paths = sorted(dataset_paths(group), key=natural_key)
        more = f", ... ({len(paths)} in all)" if len(paths) > 12 else ""
        return f"the episode holds {', '.join(paths[:12]) or 'nothing'}{more}"

    def missing(self, group: h5py.Group, path: str) -> None:
        paths = dataset_paths(group)
        near = get_close_matches(path, paths, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        self.problem(
            f"{group.name}/{path}".replace("//", "/"),
            f"missing key; {self.available(group)}",
            f"{hint}record it, or declare where it is with schema:",
            kind=f"missing key {path}",
        )

    def scan_episode(self, group: h5py.Group) -> None:
        before = len(self.problems)
        if not self.resolved:
            # What the first episode lacks decides for all: leaving it out would mend nothing.
            number, self.episode = self.episode, None
            self.resolve(group)
            self.episode = number
        self.read_fps(group, str(group.name))
        schema = self.schema
        lengths: dict[str, int] = {}
        columns: dict[str, Float32[np.ndarray, "step dim"]] = {}
        for column, paths in (
            ("action", schema.action),
            ("state", schema.state),
            ("environment_state", schema.environment_state),
            ("simulator_state", (schema.simulator_state,) if schema.simulator_state else ()),
        ):
            parts = [
                part for path in paths if (part := self.read(group, path, lengths)) is not None
            ]
            if paths and len(parts) == len(paths) and len({len(part) for part in parts}) == 1:
                columns[column] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        for name, source in self.camera_sources.items():
            self.measure(group, name, source, lengths)

        length = self.agreed_length(group, lengths)
        if len(self.problems) > before or length is None or "action" not in columns:
            return
        for column, values in columns.items():
            self.check_dim(group, column, values)
        stated = group.attrs.get("num_samples")
        if isinstance(stated, int | np.integer) and int(stated) != length:
            self.problem(
                f"{group.name}@num_samples",
                f"num_samples is {stated} but the episode has {length} steps",
                f"finish the recording, or set it to {length}",
            )
        if len(self.problems) > before or self.episode is None:
            return
        if length == 1:
            self.warnings.append(f"{self.file}: {group.name}: the episode has a single frame")
        columns = {name: values[:length] for name, values in columns.items()}
        columns["action"] = shift_actions(columns["action"], schema.action_offset)
        self.episodes.append(Episode(self.episode, self.file, str(group.name), length, columns))

    def agreed_length(self, group: h5py.Group, lengths: dict[str, int]) -> int | None:
        actions = [lengths[path] for path in self.schema.action if path in lengths]
        if not actions:
            return None
        length = actions[0]
        if 0 in lengths.values():
            empty = ", ".join(path for path, rows in lengths.items() if rows == 0)
            self.problem(
                str(group.name), f"zero-length episode ({empty})", _SKIP, kind="zero-length episode"
            )
            return None
        # Recorders that store the observation after the last action have one row more.
        odd = {
            path: rows
            for path, rows in lengths.items()
            if rows != length and (path in self.schema.action or rows != length + 1)
        }
        if odd:
            spelt = ", ".join(f"{path} {rows}" for path, rows in lengths.items())
            self.problem(
                str(group.name), f"unequal lengths: {spelt}", _SKIP, kind="unequal lengths"
            )
            return None
        return length

    def check_dim(
        self, group: h5py.Group, column: str, values: Float32[np.ndarray, "step dim"]
    ) -> None:
        expected = self.dims.setdefault(column, values.shape[1])
        if values.shape[1] != expected:
            self.problem(
                str(group.name),
                f"{column} has {values.shape[1]} dimensions; the first episode has {expected}",
                _SKIP,
                kind=f"dimensions of {column}",
            )

    def dataset(self, group: h5py.Group, path: str) -> h5py.Dataset | None:
        """A data set that is safe to read, or a problem and None."""
        found = member(group, path)
        key = f"{group.name}/{path}".replace("//", "/")
        if found is None:
            self.missing(group, path)
            return None
        if not isinstance(found, h5py.Dataset):
            holds = ", ".join(sorted(found.keys(), key=natural_key)[:8]) or "nothing"
            self.problem(key, f"is a group, not a data set; it holds {holds}", "declare its path")
            return None
        if found.shape is None:
            self.problem(key, "holds no values (null space)", _SKIP)
            return None
        if problem := check_storage(self.file, found, self.episode):
            self.problems.append(problem)
            return None
        return found

    def read(
        self, group: h5py.Group, path: str, lengths: dict[str, int]
    ) -> Float32[np.ndarray, "step dim"] | None:
        """Read a column, or list what is wrong with it and return None."""
        dataset = self.dataset(group, path)
        if dataset is None:
            return None
        key = str(dataset.name)
        if dataset.dtype.kind not in "fiub":
            self.problem(
                key, f"has the type {dataset.dtype}, not numbers", _SKIP, kind=f"type of {path}"
            )
            return None
        if dataset.ndim != 2:
            self.problem(
                key,
                f"has the shape {dataset.shape}, not (steps, dimensions)",
                "store a single dimension as (steps, 1)",
                kind=f"rank of {path}",
            )
            return None
        lengths[path] = len(dataset)
        try:
            values = dataset[()]
        except H5PY_ERRORS as error:
            self.problems.append(read_failure(self.file, dataset, error, "some row", self.episode))
            return None
        with np.errstate(over="ignore"):
            values = np.asarray(values).astype(np.float32)
        wrong = ~np.isfinite(values)
        if wrong.any():
            step, dim = (int(index[0]) for index in np.nonzero(wrong))
            nans = int(np.isnan(values).sum())
            self.not_finite[path] = self.not_finite.get(path, 0) + int(wrong.sum())
            self.problem(
                key,
                f"{int(wrong.sum())} of {values.size} values are not finite ({nans} NaN), "
                f"the first at step {step}, dimension {dim}",
                _SKIP,
                kind=f"values of {path} are not finite",
            )
            return None
        width = self.schema.smoothing.get(path, 1)
        return _smooth(values, width) if width > 1 and len(values) >= width else values

    def measure(
        self, group: h5py.Group, name: str, source: CameraSource, lengths: dict[str, int]
    ) -> None:
        """Find size and encoding of a camera's pictures, and compare with the other episodes."""
        dataset = self.dataset(group, source.path)
        if dataset is None:
            return
        key = str(dataset.name)
        encoding = source.encoding
        if encoding == "auto":
            encoding = "raw" if dataset.ndim == 4 else _guess_encoding(dataset)
        if encoding is None or (encoding == "raw" and dataset.ndim != 4):
            self.problem(
                key,
                f"has the shape {dataset.shape} and type {dataset.dtype}, neither pictures "
                "(steps, height, width, 3) nor compressed pictures",
                "declare schema.images with the right path",
                kind=f"rank of {source.path}",
            )
            return
        lengths[source.path] = len(dataset)
        if len(dataset) == 0:
            return
        camera = self.cameras.get(name)
        if camera and (encoding == "raw") != (camera.source.encoding == "raw"):
            how, first = ("raw", "compressed") if encoding == "raw" else ("compressed", "raw")
            self.problem(
                key,
                f"{how} pictures (shape {dataset.shape}); the first episode has {first} ones",
                _SKIP,
                kind=f"encoding of {source.path}",
            )
            return
        if encoding == "raw":
            height, width, channels = dataset.shape[1:]
            if source.layout == "chw":
                channels, height, width = dataset.shape[1:]
            if channels != 3:
                chw = source.layout == "hwc" and dataset.shape[1] == 3
                mend = "declare layout: chw for this camera" if chw else "store three RGB channels"
                self.problem(
                    key,
                    f"has {channels} channels (shape {dataset.shape})",
                    mend,
                    kind=f"channels of {source.path}",
                )
                return
            if 0 in (height, width):
                self.problem(key, f"pictures of {height}x{width} px", _SKIP)
                return
            if dataset.dtype.kind not in "f" and dataset.dtype != np.uint8:
                self.problem(
                    key,
                    f"pictures of the type {dataset.dtype}",
                    "store uint8, or floating point in 0..1 or 0..255",
                    kind=f"type of {source.path}",
                )
                return
            scale = None
            if dataset.dtype.kind == "f":
                scale = camera.scale if camera else self.float_scale(dataset, source, name)
                if scale is None:
                    return
        else:
            scale = None
            if camera:
                height, width = camera.height, camera.width
            else:
                try:
                    data = encoded_picture(dataset[0])
                    height, width = decode_picture(data).shape[:2]
                except H5PY_ERRORS as error:
                    self.problem(
                        f"{key}, frame 0", f"holds {first_line(error)}", _SKIP, kind="pictures"
                    )
                    return
                encoding = "jpeg" if data.startswith(_JPEG) else "png"
                self.notes.append(
                    f"camera {name}: {encoding.upper()}, decoded as a standard viewer does"
                    + (", red and blue exchanged" if source.colour == "bgr" else "")
                )
        measured = Camera(replace(source, encoding=encoding), height, width, scale)
        camera = self.cameras.setdefault(name, measured)
        if (height, width) != (camera.height, camera.width):
            self.problem(
                key,
                f"pictures of {height}x{width} px; the first episode has "
                f"{camera.height}x{camera.width}",
                _SKIP,
                kind=f"size of {source.path}",
            )

    def float_scale(self, dataset: h5py.Dataset, source: CameraSource, name: str) -> float | None:
        """Decide between 0..1 and 0..255 by some frames of the first episode, and say so."""
        if source.float_range != "auto":
            return 255.0 if source.float_range == "unit" else 1.0
        rows = np.unique(np.linspace(0, len(dataset) - 1, _RANGE_PROBES).astype(int))
        try:
            frames = np.stack([dataset[int(row)] for row in rows])
        except H5PY_ERRORS as error:
            self.problems.append(
                read_failure(self.file, dataset, error, "some frame", self.episode)
            )
            return None
        low, high = float(frames.min()), float(frames.max())
        if not (low >= 0 and high <= 255):
            self.problem(
                str(dataset.name),
                f"floating-point pictures between {low:g} and {high:g}",
                "store pictures in 0..1 or 0..255",
                kind=f"range of {source.path}",
            )
            return None
        unit = high <= 1
        self.notes.append(
            f"camera {name}: floating-point pictures, taken as {'0..1' if unit else '0..255'} "
            "(otherwise declare float_range)"
        )
        return 255.0 if unit else 1.0

    def look_for_duplicates(self) -> None:
        first: dict[bytes, Episode] = {}
        for episode in self.episodes:
            digest = hashlib.sha256()
            for values in episode.columns.values():
                digest.update(np.ascontiguousarray(values).tobytes())
            twin = first.setdefault(digest.digest(), episode)
            if twin is not episode and episode.length > 1:
                self.warnings.append(
                    f"{episode.file}: {episode.group} repeats episode {twin.number}: "
                    "a copy in the validation split would measure memory"
                )


def _guess_encoding(dataset: h5py.Dataset) -> str | None:
    padded = dataset.ndim == 2 and dataset.dtype.kind in "iu" and dataset.dtype.itemsize == 1
    one_each = dataset.ndim == 1 and (
        dataset.dtype.kind in "SV" or h5py.check_vlen_dtype(dataset.dtype) is not None
    )
    as_string = dataset.ndim == 1 and h5py.check_string_dtype(dataset.dtype) is not None
    return "jpeg" if padded or one_each or as_string else None


def dataset_paths(group: h5py.Group) -> list[str]:
    """Paths of data sets below a group, without following anything out of the file.

    Each object is listed under its first path, so that links in a circle end; of a file with more
    data sets than anybody reads, some.
    """
    paths: list[str] = []
    entered: set[tuple[int, int]] = set()
    waiting = [(group, "", 0)]
    while waiting and len(paths) < _LISTED_PATHS:
        here, prefix, depth = waiting.pop()
        below = []
        for name in map(str, here):
            found = None
            with suppress(ForeignStorageError):
                found = member(here, name)
            if found is None or (place := place_in_file(found)) in entered:
                continue
            entered.add(place)
            if isinstance(found, h5py.Dataset):
                paths.append(prefix + name)
                if len(paths) >= _LISTED_PATHS:
                    break
            elif depth < _MAX_LISTED_DEPTH:
                below.append((found, f"{prefix}{name}/", depth + 1))
        waiting += reversed(below)
    return paths


def place_in_file(found: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """Where an object is in its file, whichever of its paths led there."""
    info = h5o.get_info(found.id)
    return info.fileno, info.addr
