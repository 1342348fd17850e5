"""``analyze.py inspect``: what a data set holds, and everything that is wrong with it."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float32, UInt8

from datamodules import lerobot_files
from datamodules.errors import DatasetError, Problem, problem_lines
from datamodules.hdf5_frames import check_pictures, sample_pictures
from datamodules.layouts import LAYOUTS, ForeignStorageError, member
from datamodules.progress import progress_bar
from datamodules.scan import Scan, dataset_paths, filters, naming_damage, opened, scan_hdf5

_STRIP_FRAMES = 8
_STRIP_HEIGHT_PX = 128
_DEAD_CAMERA_STD = 1.0
_READ_AMPLIFICATION = 4.0
_SATURATED_SHARE = 0.05
_DISCRETE_VALUES = 10
_LAGS = range(-5, 11)


@dataclass(frozen=True)
class Key:
    """One data set of the first usable episode."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...] | None
    filters: tuple[str, ...]
    nbytes: int
    """Bytes once read."""
    stored_bytes: int
    """Bytes in the file."""


@dataclass(frozen=True)
class Column:
    """Range of a low-dimensional feature over all usable episodes, per dimension, data units."""

    min: list[float]
    max: list[float]
    mean: list[float]
    std: list[float]
    not_finite: int
    """Values that are NaN or infinite; their episodes are left out of the range."""


@dataclass(frozen=True)
class Video:
    """The films of one camera of a LeRobot data set."""

    key: str
    codec: str
    """With the format of its pixels, as the first file says."""
    height: int
    width: int
    fps: float
    files: int
    frames: int
    """Of all files, as their headers say."""
    nbytes: int


@dataclass(frozen=True)
class LeRobotScan:
    """What :func:`draw_strip` needs of a LeRobot data set."""

    folder: lerobot_files.Folder
    episodes: tuple[lerobot_files.Episode, ...]
    """Those with readable tables and all films."""


@dataclass(frozen=True)
class Inspection:
    """Everything that ``inspect`` says, as plain values."""

    path: str
    format: str
    """``hdf5`` or ``lerobot``."""
    layout: str = ""
    files: int = 0
    file_bytes: int = 0
    episodes: int = 0
    """Usable episodes."""
    bad_episodes: int = 0
    frames: int = 0
    length_min: int = 0
    length_mean: float = 0.0
    length_max: int = 0
    fps: float | None = None
    cameras: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name to (height, width) in px."""
    videos: list[Video] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)
    simulator_state: bool = False
    masks: dict[str, int] = field(default_factory=dict)
    """Episodes that the file assigns to ``train`` and ``val``, where it does."""
    action_state_lag: int | None = None
    """Steps by which changes of the state follow those of the action, where they do."""
    ram_bytes: int = 0
    """Memory that ``storage: ram`` takes without a resize."""
    schema: dict = field(default_factory=dict)
    """Where everything was found; can be copied into a config."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def inspect_dataset(
    path: str | Path, layout: str = "auto", read_pictures: bool = True, progress: bool = True
) -> tuple[Inspection, Scan | LeRobotScan | None]:
    """Look through a data set.

    Args:
        path: HDF5 file, folder of HDF5 files, LeRobot folder, or its name on the hub.
        layout: A known layout of HDF5, or ``auto``.
        read_pictures: Read every picture, instead of a sample per camera.
        progress: Show a bar when a person is watching.

    Returns:
        What was found, and the scan for pictures of it.
    """
    name, path = str(path), Path(path).expanduser()
    on_hub = not path.exists() and lerobot_files.is_hub_id(name)
    if on_hub or (path / lerobot_files.INFO).is_file():
        return inspect_lerobot(name, read_pictures, progress)
    try:
        scan = scan_hdf5(path, layout)
    except DatasetError as error:
        return Inspection(str(path), "hdf5", problems=list(error.problems)), None
    problems, warnings = list(scan.problems), list(scan.warnings)
    if scan.episodes:
        if read_pictures:
            total = sum(episode.length for episode in scan.episodes) * len(scan.cameras)
            with progress_bar("Reading every picture", total, progress) as advance:
                problems += check_pictures(scan, advance)
        warnings += _dead_cameras(scan, problems)
    keys = _keys(scan, warnings)
    columns = _columns(scan)
    values = [episode.columns for episode in scan.episodes]
    warnings += _saturation(values)
    lag = _action_state_lag(values, warnings, "action_offset")
    lengths = [episode.length for episode in scan.episodes] or [0]
    frame_bytes = sum(camera.height * camera.width * 3 for camera in scan.cameras.values())
    frame_bytes += 4 * sum(len(column.min) for column in columns.values())
    bad = {problem.episode for problem in problems if problem.episode is not None}
    masks = {"train": scan.train_episodes, "val": scan.val_episodes}
    inspection = Inspection(
        path=str(path),
        format="hdf5",
        layout=scan.layout,
        files=len(scan.files),
        file_bytes=sum(file.stat().st_size for file in scan.files),
        episodes=len({episode.number for episode in scan.episodes} - bad),
        bad_episodes=len(bad),
        frames=sum(lengths),
        length_min=min(lengths),
        length_mean=float(np.mean(lengths)),
        length_max=max(lengths),
        fps=scan.fps,
        cameras={name: (camera.height, camera.width) for name, camera in scan.cameras.items()},
        keys=keys,
        columns=columns,
        simulator_state="simulator_state" in columns,
        masks={name: len(mask) for name, mask in masks.items() if mask is not None},
        action_state_lag=lag,
        ram_bytes=sum(lengths) * frame_bytes,
        schema=asdict(scan.schema),
        notes=list(scan.notes),
        warnings=warnings,
        problems=problems,
    )
    return inspection, scan


def inspect_lerobot(
    repo_id: str, read_pictures: bool = True, progress: bool = True
) -> tuple[Inspection, LeRobotScan | None]:
    """Look through a LeRobotDataset v3.x.

    Args:
        repo_id: Folder, or name on the hub, from where everything is fetched.
        read_pictures: Read every picture, instead of a sample per camera.
        progress: Show a bar when a person is watching.

    Returns:
        What was found, and the scan for pictures of it.
    """
    try:
        folder = lerobot_files.read_folder(lerobot_files.find_folder(repo_id), repo_id)
        numbers, cameras = list(folder.episodes), list(folder.cameras)
        lerobot_files.fetch_files(folder, repo_id, numbers, cameras)
    except DatasetError as error:
        return Inspection(repo_id, "lerobot", problems=list(error.problems)), None
    low_dim = [key for key in folder.vectors if key.startswith(("observation.", "action"))]
    problems = lerobot_files.missing_files(folder, numbers, cameras)
    tables = lerobot_files.read_tables(folder, numbers, low_dim)
    problems += tables.problems
    warnings, notes = list(folder.warnings), list(folder.notes)
    if lerobot_files.ACTION not in folder.vectors:
        what, mend = "no such feature of numbers", "policies learn actions: record them"
        problems.append(Problem(str(folder.root / lerobot_files.INFO), "action", what, mend))
    if lerobot_files.ENVIRONMENT_STATE in folder.vectors:
        notes.append(
            f"{lerobot_files.ENVIRONMENT_STATE} is privileged: it may reset a simulator here, and "
            "is no input of a policy unless use_environment_state is set"
        )
    readable = tuple(
        episode
        for episode in tables.episodes.values()
        if all(span.file.is_file() for span in episode.entry.videos.values())
    )
    scan = LeRobotScan(folder, readable)
    if readable and read_pictures:
        total = sum(episode.length for episode in readable) * len(cameras)
        with progress_bar("Reading every picture", total, progress) as advance:
            problems += lerobot_files.check_pictures(folder, readable, advance)
    if readable:
        warnings += _dead_cameras(scan, problems)
    videos = _videos(scan, warnings)
    named = {"action": lerobot_files.ACTION, "state": lerobot_files.STATE}
    values = [
        {name: episode.columns[key] for name, key in named.items() if key in episode.columns}
        for episode in readable
    ]
    lag = None
    if lerobot_files.ACTION in folder.vectors:
        warnings += _saturation(values)
        lag = _action_state_lag(values, warnings, "action_start")
    bad = set(folder.episodes) - {episode.number for episode in readable}
    bad |= {problem.episode for problem in problems if problem.episode is not None}
    lengths = [entry.length for entry in folder.episodes.values()]
    files = {
        file for file in lerobot_files.needed_files(folder, numbers, cameras) if file.is_file()
    }
    pixels = sum(camera.height * camera.width * 3 for camera in folder.cameras.values())
    stored = {*named.values(), lerobot_files.SIMULATOR_STATE}
    if lerobot_files.SIMULATOR_STATE not in folder.vectors:
        stored.add(lerobot_files.ENVIRONMENT_STATE)
    dims = sum(folder.vectors.get(key, 0) for key in stored)
    masks = {name: len(mask) for name, mask in folder.masks.items()}
    inspection = Inspection(
        path=repo_id,
        format="lerobot",
        layout=f"LeRobotDataset {folder.version}",
        files=len(files),
        file_bytes=sum(file.stat().st_size for file in files),
        episodes=len(set(folder.episodes) - bad),
        bad_episodes=len(bad),
        frames=sum(lengths),
        length_min=min(lengths),
        length_mean=float(np.mean(lengths)),
        length_max=max(lengths),
        fps=folder.fps,
        cameras={key: (camera.height, camera.width) for key, camera in folder.cameras.items()},
        videos=videos,
        keys=[
            Key(key, shape, dtype, None, (), 0, 0)
            for key, (dtype, shape) in folder.features.items()
        ],
        columns={
            key: _column([episode.columns[key] for episode in readable], tables.not_finite[key])
            for key in low_dim
            if readable
        },
        simulator_state=bool(
            {lerobot_files.SIMULATOR_STATE, lerobot_files.ENVIRONMENT_STATE} & folder.vectors.keys()
        ),
        masks=masks if len(masks) == 2 else {},
        action_state_lag=lag,
        ram_bytes=sum(lengths) * (pixels + 4 * dims),
        notes=notes,
        warnings=warnings,
        problems=problems,
    )
    return inspection, scan


def _videos(scan: LeRobotScan, warnings: list[str]) -> list[Video]:
    """Headers of the films; unreadable ones are left to the check of the pictures."""
    videos = []
    for key, camera in scan.folder.cameras.items():
        if camera.kind != "video":
            continue
        spans = [entry.videos[key] for entry in scan.folder.episodes.values()]
        files = sorted({span.file for span in spans if span.file.is_file()})
        facts = []
        for file in files:
            with suppress(DatasetError):
                facts.append(lerobot_files.film_facts(file))
        if not facts:
            continue
        first = facts[0]
        videos.append(
            Video(
                key,
                first.codec,
                first.height,
                first.width,
                first.fps,
                len(files),
                sum(fact.frames for fact in facts),
                sum(file.stat().st_size for file in files),
            )
        )
        if abs(first.fps - scan.folder.fps) > 0.01 * scan.folder.fps:
            warnings.append(
                f"{key}: the films run at {first.fps:g} Hz, the tables at {scan.folder.fps:g} Hz"
            )
    return videos


def _keys(scan: Scan, warnings: list[str]) -> list[Key]:
    """Data sets of the first usable episode; of the first file when there is none."""
    keys: list[Key] = []
    file, group_path = (scan.files[0], "/")
    if scan.episodes:
        file, group_path = scan.episodes[0].file, scan.episodes[0].group
    with suppress(DatasetError, ForeignStorageError), opened(file) as handle, naming_damage(file):
        group = member(handle, group_path)
        assert isinstance(group, h5py.Group)
        for path in dataset_paths(group):
            dataset = member(group, path)
            if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
                continue
            names = tuple(name for _, name in filters(dataset))
            keys.append(
                Key(
                    path,
                    tuple(dataset.shape),
                    str(dataset.dtype),
                    tuple(dataset.chunks) if dataset.chunks else None,
                    names,
                    int(np.prod(dataset.shape, dtype=np.int64)) * dataset.dtype.itemsize,
                    dataset.id.get_storage_size(),
                )
            )
    pictures = {camera.source.path for camera in scan.cameras.values()}
    for key in keys:
        if key.path in pictures and (factor := _amplification(key)) > _READ_AMPLIFICATION:
            whole = ",".join(("1", *map(str, key.shape[1:])))
            warnings.append(
                f"{key.path}: chunks of {key.chunks} with {', '.join(key.filters)}: reading one "
                f"frame at random unpacks {factor:.0f} times its size. This program reads each "
                "chunk once; for others, rewrite the file with one frame per chunk "
                f"(h5repack -l {key.path}:CHUNK={whole.replace(',', 'x')})"
            )
    return keys


def _amplification(key: Key) -> float:
    """Bytes unpacked to read one random frame, over the bytes of the frame."""
    if not key.filters or key.chunks is None or len(key.shape) != 4:
        return 1.0
    pieces = np.prod(
        [-(-size // chunk) for size, chunk in zip(key.shape[1:], key.chunks[1:], strict=True)]
    )
    return float(pieces * np.prod(key.chunks) / np.prod(key.shape[1:]))


def _column(values: Sequence[Float32[np.ndarray, "_step dim"]], not_finite: int) -> Column:
    joined = np.concatenate(values).astype(float)
    return Column(
        joined.min(axis=0).tolist(),
        joined.max(axis=0).tolist(),
        joined.mean(axis=0).tolist(),
        joined.std(axis=0).tolist(),
        not_finite,
    )


def _columns(scan: Scan) -> dict[str, Column]:
    if not scan.episodes:
        return {}
    schema = scan.schema
    paths = {
        "action": schema.action,
        "state": schema.state,
        "environment_state": schema.environment_state,
        "simulator_state": (schema.simulator_state,) if schema.simulator_state else (),
    }
    return {
        name: _column(
            [episode.columns[name] for episode in scan.episodes],
            sum(scan.not_finite.get(path, 0) for path in paths[name]),
        )
        for name in scan.episodes[0].columns
    }


Samples = list[tuple[int, int, UInt8[np.ndarray, "height width 3"]]]


def _samples(scan: Scan | LeRobotScan, camera: str) -> Samples:
    """Some frames of a camera, spread over the data set."""
    if isinstance(scan, Scan):
        return sample_pictures(scan, scan.cameras[camera], _STRIP_FRAMES)
    return lerobot_files.sample_pictures(
        scan.folder, scan.episodes, scan.folder.cameras[camera], _STRIP_FRAMES
    )


def _camera_names(scan: Scan | LeRobotScan) -> list[str]:
    return list(scan.cameras if isinstance(scan, Scan) else scan.folder.cameras)


def _dead_cameras(scan: Scan | LeRobotScan, problems: list[Problem]) -> list[str]:
    warnings = []
    damaged = {str(problem) for problem in problems}
    for name in _camera_names(scan):
        try:
            pictures = [picture for _, _, picture in _samples(scan, name)]
        except DatasetError as error:
            problems += [problem for problem in error.problems if str(problem) not in damaged]
            continue
        spread = max(float(picture.std()) for picture in pictures)
        if spread < _DEAD_CAMERA_STD:
            warnings.append(
                f"camera {name}: pictures of a single colour (deviation {spread:.2g} of 255); "
                "is it covered or switched off?"
            )
    return warnings


def _saturation(episodes: Sequence[Mapping[str, Float32[np.ndarray, "_step _dim"]]]) -> list[str]:
    if not episodes:
        return []
    actions = np.concatenate([episode["action"] for episode in episodes]).astype(float)
    warnings = []
    for dim, values in enumerate(actions.T):
        if len(np.unique(values)) <= _DISCRETE_VALUES:
            continue
        for name, limit in (("minimum", values.min()), ("maximum", values.max())):
            share = float((values == limit).mean())
            if share > _SATURATED_SHARE:
                warnings.append(
                    f"action dimension {dim}: {share:.0%} of the steps lie at the {name} "
                    f"{limit:g}; were the commands clipped?"
                )
    return warnings


def _action_state_lag(
    episodes: Sequence[Mapping[str, Float32[np.ndarray, "_step _dim"]]],
    warnings: list[str],
    remedy: str,
) -> int | None:
    """Lag at which changes of the state correlate best with changes of the action."""
    if not episodes or "state" not in episodes[0]:
        return None
    first = episodes[0]
    if first["state"].shape[1] != first["action"].shape[1]:
        return None
    best, best_correlation = None, 0.3
    for lag in _LAGS:
        moves: list[tuple[np.ndarray, np.ndarray]] = []
        for episode in episodes:
            action = np.diff(episode["action"], axis=0)
            state = np.diff(episode["state"], axis=0)
            steps = len(action) - abs(lag)
            if steps > 0:
                moves.append((action[max(0, -lag) :][:steps], state[max(0, lag) :][:steps]))
        if not moves:
            continue
        action, state = (np.concatenate(side).astype(float) for side in zip(*moves, strict=True))
        action, state = action - action.mean(axis=0), state - state.mean(axis=0)
        norms = np.sqrt((action**2).sum(axis=0) * (state**2).sum(axis=0))
        moving = norms > 0
        if not moving.any():
            continue
        correlation = float(((action * state).sum(axis=0)[moving] / norms[moving]).mean())
        if correlation > best_correlation:
            best, best_correlation = lag, correlation
    if best is not None and best < 0:
        warnings.append(
            f"the state moves {-best} step(s) before the action: an observation already shows the "
            f"outcome of its action. If that is how it was recorded, declare {remedy}: {-best}"
        )
    return best


def draw_strip(scan: Scan | LeRobotScan) -> UInt8[np.ndarray, "height width 3"]:
    """Frames spread over the data set, one row per camera, labelled camera, episode and frame."""
    import cv2

    font = cv2.FONT_HERSHEY_SIMPLEX
    rows = []
    for name in _camera_names(scan):
        tiles = []
        for episode, frame, picture in _samples(scan, name):
            height = picture.shape[0]
            width = max(1, round(picture.shape[1] * _STRIP_HEIGHT_PX / height))
            how = cv2.INTER_AREA if height > _STRIP_HEIGHT_PX else cv2.INTER_NEAREST
            tile = cv2.resize(
                np.ascontiguousarray(picture), (width, _STRIP_HEIGHT_PX), interpolation=how
            )
            label = np.full((18, width, 3), 255, np.uint8)
            cv2.putText(
                label, f"{episode}/{frame}", (3, 13), font, 0.38, (40, 40, 40), 1, cv2.LINE_AA
            )
            tile = np.concatenate([label, tile])
            tiles.append(np.pad(tile, ((0, 2), (0, 2), (0, 0)), constant_values=255))
        row = np.concatenate(tiles, axis=1)
        title = np.full((20, row.shape[1], 3), 235, np.uint8)
        cv2.putText(
            title, f"{name}  (episode/frame)", (3, 14), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA
        )
        rows.append(np.concatenate([title, row]))
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [
            np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
            for row in rows
        ]
    )


def report(inspection: Inspection) -> str:
    """The inspection as text for a terminal."""
    found = inspection
    lines = [found.path]
    if found.format == "lerobot" and found.layout:
        lines.append(f"  format    {found.layout}: a LeRobot data set, not HDF5")
        lines.append(f"  files     {found.files}, {_size(found.file_bytes)}")
    elif found.layout:
        about = LAYOUTS[found.layout].summary if found.layout in LAYOUTS else "from a schema"
        lines.append(f"  layout    {found.layout} ({about})")
        lines.append(f"  files     {found.files}, {_size(found.file_bytes)}")
    if found.episodes or found.bad_episodes:
        bad = f", and {found.bad_episodes} with problems" if found.bad_episodes else ""
        lines.append(f"  episodes  {found.episodes} usable{bad}; {found.frames} frames")
        if found.length_max:
            lines.append(
                f"  length    {found.length_min} to {found.length_max} steps, "
                f"mean {found.length_mean:.1f}"
            )
        fps = f"{found.fps:g} Hz" if found.fps else "not stated (declare fps if it matters)"
        lines.append(f"  fps       {fps}")
        for name, (height, width) in found.cameras.items():
            lines.append(f"  camera    {name}: {width} x {height} px (width x height)")
        for video in found.videos:
            lines.append(
                f"  film      {video.key}: {video.codec}, {video.width} x {video.height} px, "
                f"{video.fps:g} Hz, {video.frames} frames in {video.files} file(s), "
                f"{_size(video.nbytes)}"
            )
    if found.episodes:
        with_state = "yes" if found.simulator_state else "no"
        lines.append(f"  simulator state  {with_state}")
        for name, count in found.masks.items():
            lines.append(f"  mask      {name}: {count} episodes")
        if found.action_state_lag is not None:
            lines.append(f"  lag       the state follows the action by {found.action_state_lag}")
        lines.append(f"  memory    {_size(found.ram_bytes)} with storage: ram, without a resize")
    if found.keys:
        lines += ["", "Keys of one episode"]
        lines += _table(
            [("key", "shape", "type", "chunks", "filters", "size", "stored")]
            + [
                (
                    key.path,
                    str(key.shape),
                    key.dtype,
                    str(key.chunks or "-"),
                    ", ".join(key.filters) or "-",
                    _size(key.nbytes) if key.nbytes else "-",
                    _size(key.stored_bytes) if key.stored_bytes else "-",
                )
                for key in found.keys
            ]
        )
    if found.columns:
        lines += ["", "Ranges, per dimension"]
        rows: list[tuple[str, ...]] = [("column", "dim", "min", "max", "mean", "std", "not finite")]
        for name, column in found.columns.items():
            # Dozens of numbers that are there to be given back to a simulator.
            if name == "simulator_state":
                continue
            for dim, values in enumerate(
                zip(column.min, column.max, column.mean, column.std, strict=True)
            ):
                count = str(column.not_finite) if dim == 0 else ""
                rows.append((name, str(dim), *(f"{value:.5g}" for value in values), count))
        lines += _table(rows)
    if found.schema and found.layout:
        lines += ["", "Schema (copy it into a config to change it)"]
        lines += [f"  {line}" for line in _as_yaml(found.schema)]
    for title, entries in (
        ("Taken for granted", found.notes),
        ("Warnings", found.warnings),
        ("Problems", problem_lines(found.problems)),
    ):
        if entries:
            lines += ["", title, *(f"  - {entry}" for entry in entries)]
    count = len(found.problems)
    verdict = "No problem found." if not count else f"{count} problem(s): not usable as it is."
    return "\n".join([*lines, "", verdict])


def _as_yaml(schema: dict) -> list[str]:
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value

    shown = {key: value for key, value in plain(schema).items() if value not in (None, [], {})}
    return yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=96).splitlines()


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [f"  {'  '.join(cells)}".rstrip() for cells in padded]


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this command has."""
    parser.add_argument("--layout", default="auto", help=f"auto, {', '.join(LAYOUTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--quick", action="store_true", help="look at a few pictures instead of reading them all"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output_dir")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        Exit status: 0 when the data set is usable, 1 when it has problems.

    Raises:
        ValueError: When a file in the output folder would be overwritten.
    """
    targets: dict[str, Path] = {}
    if args.output_dir is not None:
        folder = Path(args.output_dir).expanduser()
        targets = {name: folder / name for name in ("inspect.json", "frames.png")}
        existing = [str(target) for target in targets.values() if target.exists()]
        if existing and not args.overwrite:
            raise ValueError(
                f"{', '.join(existing)} exists; choose another --output_dir or add --overwrite"
            )
    inspection, scan = inspect_dataset(
        args.dataset_repo_id, args.layout, read_pictures=not args.quick
    )
    document = json.dumps(asdict(inspection), indent=2, allow_nan=False)
    written = []
    if targets:
        targets["inspect.json"].parent.mkdir(parents=True, exist_ok=True)
        targets["inspect.json"].write_text(document + "\n", encoding="utf-8")
        written.append(targets["inspect.json"])
        if scan is not None and scan.episodes and _camera_names(scan):
            import cv2

            with suppress(DatasetError):
                strip = draw_strip(scan)
                cv2.imwrite(str(targets["frames.png"]), cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))
                written.append(targets["frames.png"])
    if args.json:
        print(document)
    else:
        print(report(inspection))
        for target in written:
            print(f"Wrote {target}")
    sys.stdout.flush()
    return 1 if inspection.problems else 0
