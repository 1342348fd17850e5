"""Read the pictures of a scanned HDF5 data set as upright RGB bytes.

Lightning and torch stay outside, so that ``analyze.py inspect`` starts quickly.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING

import h5py
import numpy as np
from jaxtyping import UInt8

from datamodules.errors import DatasetError, Problem
from datamodules.layouts import ForeignStorageError, member
from datamodules.scan import (
    H5PY_ERRORS,
    Camera,
    Episode,
    Scan,
    decode_picture,
    encoded_picture,
    naming_damage,
    opened,
    read_failure,
)

if TYPE_CHECKING:
    from datamodules.frame_store import FrameWriter

_SLAB_BYTES = 64 * 2**20
_FLIPS = {"none": (1, 1), "v": (-1, 1), "h": (1, -1), "vh": (-1, -1)}


def fill_store(scan: Scan, writer: "FrameWriter") -> None:
    """Write the frames of the writer's episodes.

    Args:
        scan: Where they are.
        writer: Takes them.

    Raises:
        DatasetError: When a picture cannot be read; names file, key and frame.
    """
    episodes = {episode.number: episode for episode in scan.episodes}
    wanted = [(episodes[number], start) for number, start, _ in writer.episodes]
    with _threads() as pool:
        for file, group in groupby(wanted, key=lambda pair: pair[0].file):
            with opened(file) as handle:
                for episode, start in group:
                    for name, values in episode.columns.items():
                        writer.write_column(name, start, values)
                    for name, camera in scan.cameras.items():
                        _fill_camera(handle, episode, name, camera, writer, start, pool)


def check_pictures(scan: Scan, on_frames: Callable[[int], None]) -> list[Problem]:
    """Read every picture and list those that cannot be read.

    Args:
        scan: Where they are.
        on_frames: Called with the number of pictures done since its last call.
    """
    problems: list[Problem] = []
    with _threads() as pool:
        for file, group in groupby(scan.episodes, key=lambda episode: episode.file):
            with opened(file) as handle:
                for episode in group:
                    for camera in scan.cameras.values():
                        done = 0
                        try:
                            dataset = _dataset(handle, episode, camera)
                            for rows in _slabs(dataset, episode.length, camera):
                                read_pictures(handle, episode, camera, rows, pool)
                                on_frames(rows.stop - rows.start)
                                done = rows.stop
                        except DatasetError as error:
                            problems += error.problems
                        on_frames(episode.length - done)
    return problems


def sample_pictures(
    scan: Scan, camera: Camera, count: int
) -> list[tuple[int, int, UInt8[np.ndarray, "height width 3"]]]:
    """Episode number, frame and picture of some frames, spread over the whole data set.

    Raises:
        DatasetError: When a picture is damaged.
    """
    ends = np.cumsum([episode.length for episode in scan.episodes])
    found = []
    with _threads() as pool:
        for at in np.unique(np.linspace(0, ends[-1] - 1, count).astype(int)).tolist():
            position = int(np.searchsorted(ends, at, side="right"))
            episode = scan.episodes[position]
            frame = at - int(ends[position]) + episode.length
            with opened(episode.file) as handle:
                rows = slice(frame, frame + 1)
                picture = read_pictures(handle, episode, camera, rows, pool)[0]
            found.append((episode.number, frame, picture))
    return found


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def read_pictures(
    handle: h5py.File, episode: Episode, camera: Camera, rows: slice, pool: ThreadPoolExecutor
) -> UInt8[np.ndarray, "frame height width 3"]:
    """Read pictures of one episode as upright RGB bytes.

    Raises:
        DatasetError: When a picture is damaged; names file, key and frame.
    """
    dataset = _dataset(handle, episode, camera)
    try:
        stored = dataset[rows]
    except H5PY_ERRORS as error:
        where = f"frames {rows.start} to {rows.stop - 1}"
        problem = read_failure(episode.file, dataset, error, where, episode.number)
        raise DatasetError(episode.file, [problem]) from error
    source = camera.source
    if source.encoding != "raw":
        frames = _decode(stored, episode, camera, rows.start, pool)
    else:
        frames = np.moveaxis(stored, 1, -1) if source.layout == "chw" else stored
        if camera.scale is not None:
            frames = _to_bytes(frames, episode, camera, rows.start)
    vertical, horizontal = _FLIPS[source.flip]
    frames = frames[:, ::vertical, ::horizontal]
    return frames[..., ::-1] if source.colour == "bgr" else frames


def _dataset(handle: h5py.File, episode: Episode, camera: Camera) -> h5py.Dataset:
    try:
        with naming_damage(episode.file, episode.group, episode.number):
            group = member(handle, episode.group)
            assert isinstance(group, h5py.Group)
            dataset = member(group, camera.source.path)
    except ForeignStorageError as error:
        # Between scan and reading the file was exchanged.
        problem = Problem(
            str(episode.file), error.key, error.what, "inspect the file again", episode.number
        )
        raise DatasetError(episode.file, [problem]) from error
    assert isinstance(dataset, h5py.Dataset)
    return dataset


def _fill_camera(
    handle: h5py.File,
    episode: Episode,
    name: str,
    camera: Camera,
    writer: "FrameWriter",
    start: int,
    pool: ThreadPoolExecutor,
) -> None:
    dataset = _dataset(handle, episode, camera)
    source = camera.source
    as_stored = (
        source.encoding == "raw"
        and dataset.dtype == np.uint8
        and (source.colour, source.layout, source.flip) == ("rgb", "hwc", "none")
        and writer.shapes.cameras[name] == (camera.height, camera.width)
    )
    for rows in _slabs(dataset, episode.length, camera):
        if as_stored:
            target = writer.image_rows(name, start + rows.start, start + rows.stop)
            try:
                dataset.read_direct(target, rows)
            except H5PY_ERRORS as error:
                where = f"frames {rows.start} to {rows.stop - 1}"
                problem = read_failure(episode.file, dataset, error, where, episode.number)
                raise DatasetError(episode.file, [problem]) from error
        else:
            frames = read_pictures(handle, episode, camera, rows, pool)
            writer.write_images(name, start + rows.start, frames)


def _slabs(dataset: h5py.Dataset, length: int, camera: Camera) -> Iterator[slice]:
    """Cut an episode so that memory stays bounded and no chunk of the file is read twice."""
    frame_bytes = camera.height * camera.width * 3
    if camera.source.encoding == "raw":
        frame_bytes *= dataset.dtype.itemsize
    rows = max(1, _SLAB_BYTES // frame_bytes)
    chunk = dataset.chunks[0] if dataset.chunks else 1
    rows = max(chunk, rows // chunk * chunk)
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _decode(
    stored: np.ndarray, episode: Episode, camera: Camera, first: int, pool: ThreadPoolExecutor
) -> UInt8[np.ndarray, "frame height width 3"]:
    frames = np.empty((len(stored), camera.height, camera.width, 3), np.uint8)

    def decode(row: int) -> None:
        try:
            picture = decode_picture(encoded_picture(stored[row]))
            if picture.shape != frames.shape[1:]:
                raise ValueError(
                    f"a picture of {picture.shape[0]}x{picture.shape[1]} px among pictures of "
                    f"{camera.height}x{camera.width}"
                )
        except ValueError as error:
            raise _bad_picture(episode, camera, first + row, str(error)) from error
        frames[row] = picture

    # A pool's map raises the error of the earliest frame; cv2 decodes outside the interpreter lock.
    for _ in pool.map(decode, range(len(stored))):
        pass
    return frames


def _to_bytes(
    frames: np.ndarray, episode: Episode, camera: Camera, first: int
) -> UInt8[np.ndarray, "frame height width 3"]:
    scaled = frames * np.float32(camera.scale or 1.0)
    wrong = ~((scaled >= 0) & (scaled <= 255.5))
    if wrong.any():
        row = int(np.nonzero(wrong)[0][0])
        value = frames[wrong][0]
        top = 1 if camera.scale == 255.0 else 255
        raise _bad_picture(
            episode, camera, first + row, f"the value {value} outside 0..{top}", "float_range"
        )
    return np.rint(np.minimum(scaled, 255)).astype(np.uint8)


def _bad_picture(
    episode: Episode, camera: Camera, frame: int, what: str, declare: str = ""
) -> DatasetError:
    mend = "record the episode again, or leave it out with episodes:"
    if declare:
        mend = f"declare {declare} for this camera in a schema, or {mend}"
    key = f"{episode.group}/{camera.source.path}, frame {frame}".replace("//", "/")
    problem = Problem(str(episode.file), key, f"holds {what}", mend, episode.number)
    return DatasetError(episode.file, [problem])
