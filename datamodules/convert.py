"""``analyze.py convert``: HDF5 to LeRobotDataset v3.0 and back, with the loss stated."""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from datamodules.layouts import HDF5_SUFFIXES
from datamodules.progress import progress_bar
from policies.atomic_files import sync

MIN_VIDEO_PX = 32
"""SVT-AV1, LeRobot's encoder, ends the process on narrower or lower pictures."""

FILE_VERSION = ("v110", "v110")
"""Of HDF5, readable since 1.10 (2016): its own structures have checksums, and small data sets cost
no tree of chunks."""

_PSNR_FRAMES = 24
_DEMOS_FILE = "demos.hdf5"


@dataclass(frozen=True)
class Demonstration:
    """One episode to convert, without its pictures."""

    number: int
    """In the source."""
    columns: dict[str, Float32[np.ndarray, "step dim"]]
    """``action`` and, where present, ``state``, ``environment_state`` and ``simulator_state``."""
    task: str | None = None

    @property
    def length(self) -> int:
        """Its frames."""
        return len(self.columns["action"])


@runtime_checkable
class Demonstrations(Protocol):
    """A data set that can be converted, whatever its format."""

    name: str
    fps: float | None
    cameras: dict[str, tuple[int, int]]
    """Camera name to (height, width) in px."""
    episodes: list[Demonstration]
    left_behind: list[str]
    """What the other format does not get."""

    def pictures(
        self, camera: str, position: int, frames: range
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Pictures of the episode at a position of :attr:`episodes`."""
        ...


class HDF5Demonstrations:
    """Demonstrations in HDF5, in any layout that is known.

    Args:
        path: File or folder.

    Raises:
        DatasetError: When it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        from datamodules.scan import opened, scan_hdf5

        self._scan = scan_hdf5(path)
        self._scan.require_usable()
        self.name = str(path)
        self.fps = self._scan.fps
        self.cameras = {
            name: (camera.height, camera.width) for name, camera in self._scan.cameras.items()
        }
        self.episodes: list[Demonstration] = []
        self.left_behind = []
        extra: set[str] = set()
        for episode in self._scan.episodes:
            with opened(episode.file) as file:
                group = file[episode.group]
                assert isinstance(group, h5py.Group)
                task = group.attrs.get("task")
                extra |= set(group) - {"observations", "obs", "action", "actions"}
            self.episodes.append(
                Demonstration(
                    episode.number, episode.columns, task if isinstance(task, str) else None
                )
            )
        if extra:
            self.left_behind = [f"data sets beside the observations: {', '.join(sorted(extra))}"]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def pictures(
        self, camera: str, position: int, frames: range
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Pictures of the episode at a position of :attr:`episodes`.

        Raises:
            DatasetError: When one cannot be read.
        """
        from datamodules.hdf5_frames import read_pictures
        from datamodules.scan import opened

        episode = self._scan.episodes[position]
        with opened(episode.file) as file:
            for start in range(frames.start, frames.stop, 64):
                rows = slice(start, min(start + 64, frames.stop))
                pictures = read_pictures(
                    file, episode, self._scan.cameras[camera], rows, self._pool
                )
                yield from pictures


class LeRobotDemonstrations:
    """Demonstrations in a LeRobotDataset v3.x.

    Args:
        repo_id: Folder, or name on the hub.

    Raises:
        DatasetError: When it cannot be used.
    """

    def __init__(self, repo_id: str) -> None:
        from datamodules.lerobot import LeRobotDataModule
        from datamodules.lerobot_files import (
            ENVIRONMENT_STATE,
            SIMULATOR_STATE,
            PictureReader,
            find_folder,
            read_folder,
        )

        held = read_folder(find_folder(repo_id)).vectors
        both = {ENVIRONMENT_STATE, SIMULATOR_STATE} <= held.keys()
        recording = LeRobotDataModule(repo_id, use_environment_state=both, progress=False).recording
        folder = recording.folder
        self.name = folder.name
        self.fps: float | None = folder.fps
        self.cameras = {
            name: (folder.cameras[key].height, folder.cameras[key].width)
            for name, key in recording.cameras.items()
        }
        self._episodes = list(recording.episodes.values())
        self._readers = {
            name: PictureReader(folder.cameras[key], folder.fps)
            for name, key in recording.cameras.items()
        }
        self.episodes = [
            Demonstration(
                episode.number,
                {name: episode.columns[key] for name, key in recording.columns.items()},
                episode.entry.tasks[0] if episode.entry.tasks else None,
            )
            for episode in self._episodes
        ]
        taken = {*recording.columns.values(), *recording.cameras.values()}
        counters = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
        extra = [key for key in folder.features if key not in taken | counters]
        self.left_behind = [f"features: {', '.join(extra)}"] if extra else []

    def pictures(
        self, camera: str, position: int, frames: range
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Pictures of the episode at a position of :attr:`episodes`.

        Raises:
            DatasetError: When one cannot be read.
        """
        return self._readers[camera].pictures(self._episodes[position], frames)


@dataclass(frozen=True)
class Loss:
    """Difference between pictures before and after, over some frames of a camera."""

    frames: int
    psnr_median_db: float
    """10 log10(255^2 / mean squared error); infinite when nothing changed."""
    psnr_min_db: float


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote, and what it cost."""

    path: Path
    episodes: int
    frames: int
    losses: dict[str, Loss]
    """Per camera."""
    notes: list[str] = field(default_factory=list)


def open_demonstrations(path: str) -> Demonstrations:
    """Open HDF5 or LeRobot, whichever it is.

    Raises:
        DatasetError: When it cannot be used.
    """
    from datamodules.lerobot_files import INFO, is_hub_id

    found = Path(path).expanduser()
    if (found / INFO).is_file() or (not found.exists() and is_hub_id(path)):
        return LeRobotDemonstrations(path)
    return HDF5Demonstrations(found)


def measure_loss(before: Demonstrations, after: Demonstrations) -> dict[str, Loss]:
    """Compare frames spread over two data sets of the same episodes, per camera."""
    ends = np.cumsum([episode.length for episode in before.episodes])
    sampled = np.unique(np.linspace(0, ends[-1] - 1, _PSNR_FRAMES).astype(int)).tolist()
    losses = {}
    for camera in before.cameras:
        found = []
        for at in sampled:
            position = int(np.searchsorted(ends, at, side="right"))
            frame = at - int(ends[position]) + before.episodes[position].length
            sides = [
                next(iter(side.pictures(camera, position, range(frame, frame + 1)))).astype(float)
                for side in (before, after)
            ]
            error = float(np.square(sides[0] - sides[1]).mean())
            found.append(np.inf if error == 0 else 10 * np.log10(255**2 / error))
        losses[camera] = Loss(len(found), float(np.median(found)), float(np.min(found)))
    return losses


def write_lerobot(
    source: Demonstrations,
    folder: Path,
    repo_id: str,
    fps: float | None = None,
    video: bool = True,
    task: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write a LeRobotDataset v3.0 through LeRobot's own writer; whole or not at all.

    Args:
        source: What to convert.
        folder: The data set's folder.
        repo_id: Its name in LeRobot.
        fps: Control frequency in Hz; that of the source when None.
        video: Films (AV1, lossy) instead of PNG inside the tables (lossless).
        task: Description of the task, for episodes that bring none.
        overwrite: Replace a data set that is there.
        progress: Show a bar when a person is watching.

    Returns:
        What was written; read back and compared with the source.

    Raises:
        ValueError: When the source cannot be written so, or the folder must not be touched.
        DatasetError: When the source cannot be read.
    """
    from datamodules.lerobot_files import ENVIRONMENT_STATE, SIMULATOR_STATE, STATE
    from policies.lerobot_format import image_key

    rate = _whole_fps(source, fps)
    if video:
        small = {name: size for name, size in source.cameras.items() if min(size) < MIN_VIDEO_PX}
        if small:
            raise ValueError(
                f"{source.name}: camera {next(iter(small))} has pictures of "
                f"{small[next(iter(small))][1]} x {small[next(iter(small))][0]} px, and LeRobot's "
                f"video encoder needs at least {MIN_VIDEO_PX}; use --video false"
            )
    columns = source.episodes[0].columns
    keys = {"action": "action", "state": STATE, "environment_state": ENVIRONMENT_STATE}
    # Of the two only the privileged features have a name in LeRobot.
    both = "environment_state" in columns
    keys["simulator_state"] = SIMULATOR_STATE if both else ENVIRONMENT_STATE
    kind = "video" if video else "image"
    axes = ["height", "width", "channels"]
    features: dict[str, dict[str, Any]] = {
        image_key(name): {"dtype": kind, "shape": (*size, 3), "names": axes}
        for name, size in source.cameras.items()
    }
    for name, values in columns.items():
        dim = values.shape[1]
        names = [f"{name}_{index}" for index in range(dim)]
        features[keys[name]] = {"dtype": "float32", "shape": (dim,), "names": names}
    notes = [f"left behind: {what}" for what in source.left_behind]
    if "simulator_state" in columns:
        inputs = [key for key in features if key not in ("action", keys["simulator_state"])]
        notes.append(
            f"the simulator state is {keys['simulator_state']}. It is privileged: LeRobot would "
            "feed it to a policy, so train there with --policy.input_features naming only "
            f"{', '.join(inputs)}"
        )

    def write(building: Path) -> None:
        _write_lerobot(source, building, repo_id, rate, features, keys, video, task, progress)
        _check_columns(source, LeRobotDemonstrations(str(building)), building)

    refuse_overlap(source.name, folder)
    build_beside(
        folder, write, overwrite, replaceable=lambda there: (there / "meta/info.json").is_file()
    )
    made = LeRobotDemonstrations(str(folder))
    return _conversion(source, made, folder, notes)


def _write_lerobot(
    source: Demonstrations,
    root: Path,
    repo_id: str,
    fps: int,
    features: dict[str, dict[str, Any]],
    keys: dict[str, str],
    video: bool,
    task: str | None,
    progress: bool,
) -> None:
    # SVT-AV1 prints its configuration for every episode, libav a line for every join.
    os.environ.setdefault("SVT_LOG", "1")
    from av import logging as av_logging
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from policies.lerobot_format import image_key

    av_logging.set_libav_level(av_logging.ERROR)
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    made = LeRobotDataset.create(
        repo_id,
        fps,
        features,
        root=root,
        use_videos=video,
        # Asking for torchcodec prints a long traceback where there is no system FFmpeg.
        video_backend="pyav",
        image_writer_threads=0,
    )
    total = sum(episode.length for episode in source.episodes)
    try:
        with progress_bar("Writing frames", total, progress) as advance:
            for position, episode in enumerate(source.episodes):
                frames = range(episode.length)
                readers = {
                    image_key(name): source.pictures(name, position, frames)
                    for name in source.cameras
                }
                for step in frames:
                    values = {keys[name]: column[step] for name, column in episode.columns.items()}
                    images = {key: np.asarray(next(reader)) for key, reader in readers.items()}
                    said = episode.task or task or "unspecified"
                    made.add_frame({**values, **images, "task": said})
                    advance(1)
                made.save_episode(parallel_encoding=False)
    finally:
        made.finalize()
        if not silent:
            enable_progress_bars()


def write_demos(
    source: Demonstrations,
    file: Path,
    fps: float | None = None,
    task: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write one HDF5 file of the ``demos`` layout, lossless; whole or not at all.

    Args:
        source: What to convert.
        file: The file.
        fps: Control frequency in Hz; that of the source when None.
        task: Description of the task, for episodes that bring none.
        overwrite: Replace a file that is there.
        progress: Show a bar when a person is watching.

    Returns:
        What was written; read back and compared with the source.

    Raises:
        ValueError: When the source cannot be written so, or the file must not be touched.
        DatasetError: When the source cannot be read.
    """
    import h5py

    columns = source.episodes[0].columns
    if "state" not in columns:
        raise ValueError(f"{source.name}: has no state, which the demos layout needs (qpos)")
    odd = [name for name in source.cameras if "/" in name or name in ("", ".", "..")]
    if odd:
        raise ValueError(f"{source.name}: a camera called {odd[0]!r} cannot be a name in HDF5")
    notes = [f"left behind: {what}" for what in source.left_behind]
    paths = {"action": "actions", "state": "observations/qpos"}
    paths |= {"simulator_state": "observations/state"}
    if "environment_state" in columns and "simulator_state" not in columns:
        notes.append("left behind: environment_state, which the demos layout has no place for")
    elif "environment_state" in columns:
        notes.append("left behind: environment_state; the simulator state is kept")
    single = list(source.cameras) == ["image"]
    places = {
        name: "observations/image" if single else f"observations/images/{name}"
        for name in source.cameras
    }
    total = sum(episode.length for episode in source.episodes)

    def write(building: Path) -> None:
        with (
            progress_bar("Writing frames", total * len(source.cameras), progress) as advance,
            h5py.File(building, "w", libver=FILE_VERSION) as opened,
        ):
            rate = source.fps if fps is None else fps
            if rate is not None:
                opened.attrs["fps"] = rate
            opened.attrs["num_demos"] = len(source.episodes)
            opened.attrs["total_frames"] = total
            opened.attrs["source"] = source.name
            for position, episode in enumerate(source.episodes):
                group = opened.create_group(f"demo_{position}")
                group.attrs["num_samples"] = episode.length
                group.attrs["source_episode"] = episode.number
                if said := episode.task or task:
                    group.attrs["task"] = said
                for name, path in paths.items():
                    if name in columns:
                        group.create_dataset(path, data=episode.columns[name], fletcher32=True)
                for name, size in source.cameras.items():
                    pictures = group.create_dataset(
                        places[name],
                        (episode.length, *size, 3),
                        np.uint8,
                        chunks=(1, *size, 3),
                        compression="gzip",
                        compression_opts=1,
                        fletcher32=True,
                    )
                    frames = range(episode.length)
                    for step, picture in enumerate(source.pictures(name, position, frames)):
                        pictures[step] = picture
                        advance(1)
        _check_columns(source, HDF5Demonstrations(building), building)

    refuse_overlap(source.name, file)
    build_beside(file, write, overwrite, replaceable=lambda there: there.is_file())
    return _conversion(source, HDF5Demonstrations(file), file, notes)


def _conversion(
    source: Demonstrations, made: Demonstrations, path: Path, notes: list[str]
) -> Conversion:
    total = sum(episode.length for episode in made.episodes)
    return Conversion(path, len(made.episodes), total, measure_loss(source, made), notes)


def _check_columns(source: Demonstrations, made: Demonstrations, path: Path) -> None:
    """Compare the numbers of what was written with the source, before it gets its name."""
    same = len(source.episodes) == len(made.episodes) and all(
        np.array_equal(before.columns[name], values)
        for before, after in zip(source.episodes, made.episodes, strict=True)
        for name, values in after.columns.items()
        if name in before.columns
    )
    if not same:
        raise ValueError(f"{path}: what was written differs from {source.name}; nothing was kept")


def _whole_fps(source: Demonstrations, fps: float | None) -> int:
    rate = source.fps if fps is None else fps
    if rate is None:
        raise ValueError(f"{source.name}: states no control frequency; give it with --fps")
    if rate < 1 or rate != int(rate):
        raise ValueError(f"fps is {rate}; LeRobot takes whole Hz from 1 on, give one with --fps")
    return int(rate)


def refuse_overlap(source: str, target: Path) -> None:
    """Refuse to write over, into or around the source."""
    read, written = Path(source).expanduser().resolve(), target.resolve()
    if read == written or read in written.parents or written in read.parents:
        raise ValueError(f"{target}: overlaps the source {source}; choose another --output_dir")


def _sweep(target: Path) -> None:
    """Delete what killed processes left, and give back what one of them had put aside."""
    if not target.parent.is_dir():
        return
    left = re.compile(rf"\.{re.escape(target.name)}\.([0-9]{{1,9}})\.(part|old)")
    for beside in list(target.parent.iterdir()):
        match = left.fullmatch(beside.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not target.exists():
            os.rename(beside, target)
        elif beside.is_dir() and not beside.is_symlink():
            shutil.rmtree(beside)
        else:
            beside.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def build_beside(
    target: Path,
    write: Callable[[Path], None],
    overwrite: bool,
    replaceable: Callable[[Path], bool],
) -> None:
    """Write beside the target and rename, so that it is whole or as before.

    It is on the disk before it gets its name. What killed runs left beside it is deleted.
    """
    _sweep(target)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty:
        if not overwrite:
            raise ValueError(f"{target} exists; choose another --output_dir or add --overwrite")
        if not replaceable(target):
            raise ValueError(
                f"{target} is no data set of this format, so it is not replaced; choose another "
                "--output_dir"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{os.getpid()}.part")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        write(building)
        for made in (building, *(building.rglob("*") if building.is_dir() else ())):
            sync(made)
        if target.is_dir():
            os.rename(target, aside)
            try:
                os.rename(building, target)
            except OSError:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(building, target)
        sync(target.parent)
    finally:
        if building.is_dir():
            shutil.rmtree(building)
        else:
            building.unlink(missing_ok=True)


def report(conversion: Conversion, to: Literal["lerobot", "hdf5"], video: bool) -> str:
    """The conversion as text for a terminal."""
    lines = [f"Wrote {conversion.path}: {conversion.episodes} episodes, {conversion.frames} frames"]
    for camera, loss in conversion.losses.items():
        if np.isinf(loss.psnr_min_db):
            how = "lossless" if to == "hdf5" or not video else "unchanged by the codec"
            lines.append(f"  camera {camera}: {how} ({loss.frames} frames compared, all equal)")
        else:
            lines.append(
                f"  camera {camera}: lossy (AV1, 4:2:0): PSNR median {loss.psnr_median_db:.1f} dB, "
                f"lowest {loss.psnr_min_db:.1f} dB over {loss.frames} frames; "
                "--video false keeps every bit"
            )
    lines += [f"  {note}" for note in conversion.notes]
    return "\n".join(lines)


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this command has."""
    parser.add_argument("--to", required=True, choices=("lerobot", "hdf5"), help="format to write")
    parser.add_argument(
        "--repo_id", help="name of the LeRobot data set; local/<folder> if not given"
    )
    parser.add_argument(
        "--video",
        type=_boolean,
        default=True,
        help="LeRobot: true for films (AV1, small, lossy), false for PNG (lossless)",
    )
    parser.add_argument("--fps", type=float, help="control frequency in Hz, if the source has none")
    parser.add_argument("--task", help="description of the task, for episodes that have none")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        Exit status: 0 when the data set was converted.

    Raises:
        ValueError: When it cannot be.
    """
    target = Path(args.output_dir).expanduser()
    source = open_demonstrations(args.dataset_repo_id)
    if args.to == "lerobot":
        if isinstance(source, LeRobotDemonstrations):
            raise ValueError(f"{source.name} is a LeRobot data set already")
        conversion = write_lerobot(
            source,
            target,
            args.repo_id or f"local/{target.resolve().name}",
            args.fps,
            args.video,
            args.task,
            args.overwrite,
        )
    else:
        file = target if target.suffix in HDF5_SUFFIXES else target / _DEMOS_FILE
        conversion = write_demos(source, file, args.fps, args.task, args.overwrite)
    print(report(conversion, args.to, args.video))
    sys.stdout.flush()
    return 0
