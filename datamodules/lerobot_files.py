"""Folders of LeRobotDataset v3.x, read with pyarrow and PyAV alone.

LeRobot, Lightning and torch stay outside, so that ``analyze.py inspect`` starts quickly. Features
keep LeRobot's keys here (``observation.images.top``); nothing in a folder is trusted: templates of
paths must stay inside it, and every table is checked against ``meta/``.

The format (LeRobot 0.6, ``lerobot/datasets/``): ``meta/info.json`` describes the features,
``meta/episodes/*/*.parquet`` says which file holds an episode and at what time of a video it
begins, ``data/*/*.parquet`` has a row per frame, ``videos/<key>/*/*.mp4`` one film of many
episodes.
"""

import hashlib
import os
import re
import string
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from datamodules.checksums import links_within
from datamodules.errors import DatasetError, Problem
from datamodules.layouts import HDF5_SUFFIXES
from datamodules.scan import PICTURE_LIMIT_PX, decode_picture
from policies.json_files import parse_json
from policies.safe_paths import inside

if TYPE_CHECKING:
    import pyarrow as pa
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from datamodules.frame_store import FrameWriter

INFO = Path("meta") / "info.json"
ACTION = "action"
STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
SIMULATOR_STATE = "observation.simulator_state"

_AGAIN = "download or copy the data set again"
_OWN_FOLDER = "use data sets that you trust, with all files inside their own folder"
_LEAVE_OUT = "leave the episode out with episodes:, or record it again"
_V30_TAG = "v3.0"
_VERSIONS = ("v3.0",)
"""Of the format, that are read. A later one may mean something else by the same names."""
_DAMAGE = (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What libraries raise, besides errors of their own, when a file is damaged."""
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_TEMPLATE_FIELDS = {"video_key", "chunk_index", "file_index"}
_DEFAULT_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_DEFAULT_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_SEEK_AHEAD_FRAMES = 64
_LAST_S = 1e9
"""Of a film: thirty years, beyond which the decoder's whole numbers end."""
_PNG_SLAB = 64


@dataclass(frozen=True)
class CameraFeature:
    """A feature of pictures."""

    key: str
    """LeRobot's name, e.g. ``observation.images.top``."""
    kind: Literal["image", "video"]
    """PNG inside the tables, or films."""
    height: int
    width: int
    codec: str = ""
    """What ``meta/info.json`` says of a film."""


@dataclass(frozen=True)
class VideoSpan:
    """Where the film of an episode is."""

    file: Path
    from_s: float
    """Time of its first frame in the file."""


@dataclass(frozen=True)
class EpisodeEntry:
    """One episode, as ``meta/episodes`` lists it."""

    number: int
    length: int
    data_file: Path
    videos: dict[str, VideoSpan]
    """Feature key to film."""
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A data set, as its ``meta/`` describes it."""

    name: str
    """What the user called it, for messages."""
    root: Path
    version: str
    fps: float
    cameras: dict[str, CameraFeature]
    """Feature key to pictures, in the order of ``meta/info.json``."""
    vectors: dict[str, int]
    """Key of each numeric feature with one axis, to its dimensions."""
    features: dict[str, tuple[str, tuple[int, ...]]]
    """Key of every feature to type and shape."""
    episodes: dict[int, EpisodeEntry]
    masks: dict[str, tuple[int, ...]]
    """Episodes that ``splits`` assigns to ``train`` and ``val``."""
    digest: str
    """Hash of everything in ``meta/`` that the frames depend on."""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Episode:
    """One episode with its numbers."""

    entry: EpisodeEntry
    first_row: int
    """Row of its first frame in the data file."""
    timestamps: Float64[np.ndarray, " step"]
    """Seconds since its first frame."""
    columns: dict[str, Float32[np.ndarray, "step dim"]]
    """Feature key to values."""

    @property
    def number(self) -> int:
        """Its number in the data set."""
        return self.entry.number

    @property
    def length(self) -> int:
        """Its frames."""
        return self.entry.length


@dataclass(frozen=True)
class Tables:
    """What the data files hold."""

    episodes: dict[int, Episode]
    """Readable episodes, by number."""
    problems: tuple[Problem, ...] = ()
    not_finite: dict[str, int] = field(default_factory=dict)
    """Feature key to the number of its values that are NaN or infinite."""


def refusal(file: Path | str, key: str, what: str, mend: str) -> DatasetError:
    """An error of one problem."""
    return DatasetError(file, [Problem(str(file), key, what, mend)])


@contextmanager
def _naming_damage(file: Path, key: str, what: str) -> Iterator[None]:
    """Name file and key, whatever pyarrow or a strange value raises.

    Args:
        file: Where the values come from.
        key: Which of them, as far as that is known here.
        what: What they would be, completing "is no ...".

    Raises:
        DatasetError: In place of the other error.
    """
    import pyarrow as pa

    try:
        yield
    except DatasetError:
        raise
    except (pa.ArrowException, AssertionError, AttributeError, *_DAMAGE) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise refusal(file, key, f"is damaged or no {what} ({reason})", _AGAIN) from error


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be a data set on the hub."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(HDF5_SUFFIXES)


def find_folder(repo_id: str, root: str | None = None, revision: str | None = None) -> Path:
    """Find a data set, and fetch the ``meta/`` of one that is only on the hub.

    Args:
        repo_id: A folder, or ``user/name`` on the hub. What LeRobot recorded under this name
            (``$HF_LEROBOT_HOME/user/name``) is found too.
        root: The folder, when repo_id is only a name. The hub is not asked then.
        revision: Branch, tag or commit on the hub; LeRobot's tag ``v3.0`` when null, else main.

    Returns:
        The folder that holds ``meta/``.

    Raises:
        DatasetError: When nothing is there, or the hub does not give it.
    """
    given = Path(repo_id if root is None else root).expanduser()
    if given.exists():
        if (given / INFO).is_file():
            return given
        what = f"holds no {INFO}, so it is no LeRobot data set"
        if (given / "meta" / "episodes.jsonl").is_file():
            what += " (v2 of the format, without its info.json)"
        raise refusal(given, "", what, "give the folder that contains meta/, data/ and videos/")
    if root is not None or not is_hub_id(repo_id):
        raise refusal(
            given,
            "",
            "no such folder",
            "check the path, or give the name of a data set on the hub, like lerobot/pusht",
        )
    if revision is None:
        home = os.environ.get("HF_LEROBOT_HOME") or _hf_home() / "lerobot"
        recorded = Path(home).expanduser() / repo_id
        if (recorded / INFO).is_file():
            return recorded
    return _download(repo_id, revision, ["meta/*"])


def fetch_files(
    folder: Folder, repo_id: str, episodes: Sequence[int], cameras: Sequence[str]
) -> None:
    """Fetch what chosen episodes need, where :func:`find_folder` only fetched ``meta/``.

    Raises:
        DatasetError: When the hub does not give a file.
    """
    if folder.root.parent.name != "snapshots" or Path(repo_id).expanduser().exists():
        return
    wanted = [file for file in needed_files(folder, episodes, cameras) if not file.is_file()]
    if wanted:
        names = [file.relative_to(folder.root).as_posix() for file in wanted]
        _download(repo_id, folder.root.name, names)


def needed_files(folder: Folder, episodes: Sequence[int], cameras: Sequence[str]) -> list[Path]:
    """Tables and films that hold chosen episodes, each once, in order."""
    entries = [folder.episodes[number] for number in episodes]
    files = {entry.data_file: None for entry in entries}
    for key in cameras:
        files |= {entry.videos[key].file: None for entry in entries if key in entry.videos}
    return list(files)


def _hf_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    def fetch(at: str | None) -> Path:
        return Path(
            snapshot_download(repo_id, repo_type="dataset", revision=at, allow_patterns=patterns)
        )

    try:
        if revision is not None:
            return fetch(revision)
        with suppress(RevisionNotFoundError):
            return fetch(_V30_TAG)
        return fetch(None)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = "" if revision is None else f" at revision {revision}"
        raise refusal(
            repo_id,
            "",
            f"no such folder here, and the hub did not give it{at} ({reason})",
            "check the name and the network; without a network, copy the data set here (elsewhere: "
            f"hf download --repo-type dataset {repo_id} --local-dir FOLDER) and give its folder",
        ) from error


def read_folder(root: Path, name: str | None = None) -> Folder:
    """Read ``meta/``.

    Args:
        root: The folder.
        name: What the user called it.

    Raises:
        DatasetError: When it cannot be used: damaged, of another version, without an episode.
    """
    name = str(root) if name is None else name
    file = root / INFO
    _Links(root).check(file)
    with _naming_damage(file, "", "readable JSON"):
        content = file.read_bytes()
    info = parse_json(content, lambda what: refusal(file, "", what, _AGAIN))
    _check_version(info, file, root)
    with _naming_damage(file, "features", "description of features"):
        features = {
            str(key): (
                str(feature["dtype"]),
                tuple(int(size) for size in feature["shape"]),
                feature.get("names"),
                {**(feature.get("video_info") or {}), **(feature.get("info") or {})},
            )
            for key, feature in info["features"].items()
        }
    with _naming_damage(file, "fps", "control frequency"):
        fps = float(info["fps"])
        if not (fps > 0 and np.isfinite(fps)):
            raise ValueError(f"fps is {fps}")
    data_path = str(info.get("data_path") or _DEFAULT_DATA_PATH)
    video_path = str(info.get("video_path") or _DEFAULT_VIDEO_PATH)
    with _naming_damage(file, "splits", "table of splits"):
        splits = {str(part): str(span) for part, span in (info.get("splits") or {}).items()}
    notes: list[str] = []
    with _naming_damage(file, "features", "description of features"):
        cameras = {
            key: camera
            for key, feature in features.items()
            if (camera := _camera(key, *feature, file=file, notes=notes)) is not None
        }
        vectors = {
            key: _dimensions(file, key, shape)
            for key, (dtype, shape, *_) in features.items()
            if dtype.startswith(("float", "int", "uint", "bool")) and len(shape) <= 1
        }
    paths = _Paths(root, file, data_path, video_path)
    rows, tables = _episode_rows(root, [key for key in cameras if cameras[key].kind == "video"])
    place = root / "meta" / "episodes"
    with _naming_damage(place, "", "table of episodes"):
        episodes = _entries(rows, cameras, paths, place)
    if not episodes:
        raise refusal(place, "", "lists no episode", "record at least one, or " + _AGAIN)
    digest = hashlib.sha256(content)
    for table in tables:
        digest.update(table.read_bytes())
    return Folder(
        name=name,
        root=root,
        version=str(info["codebase_version"]),
        fps=fps,
        cameras=cameras,
        vectors=vectors,
        features={key: (dtype, shape) for key, (dtype, shape, *_) in features.items()},
        episodes=episodes,
        masks=_masks(splits, episodes),
        digest=digest.hexdigest()[:32],
        notes=tuple(notes),
        warnings=tuple(_disagreements(info, episodes)),
    )


def _disagreements(info: Mapping[str, Any], episodes: Mapping[int, EpisodeEntry]) -> list[str]:
    """Counts of ``meta/info.json`` that ``meta/episodes`` contradicts; nothing here uses them."""
    counted = {
        "total_episodes": len(episodes),
        "total_frames": sum(entry.length for entry in episodes.values()),
    }
    return [
        f"{INFO}: {key} is {info[key]!r}, but meta/episodes lists {count}; LeRobot goes by the "
        "former"
        for key, count in counted.items()
        if key in info and info[key] != count
    ]


def _check_version(info: Mapping[str, Any], file: Path, root: Path) -> None:
    version = str(info.get("codebase_version", ""))
    if version in _VERSIONS:
        return
    mend = _AGAIN
    if version.startswith("v"):
        mend = f"fetch the revision {_V30_TAG}, or read it with a version that knows it"
    if version.startswith(("v1.", "v2.")):
        mend = (
            "convert it with LeRobot's own converter: python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=NAME --root={root} "
            "--push-to-hub=false"
        )
        if not version.startswith("v2.1"):
            mend += " (from v2.1 on; bring an older one to v2.1 with an older LeRobot first)"
    raise refusal(
        file, "codebase_version", f"is {version!r}; supported is {', '.join(_VERSIONS)}", mend
    )


def _dimensions(file: Path, key: str, shape: tuple[int, ...]) -> int:
    dim = shape[0] if shape else 1
    if dim < 1:
        raise refusal(file, f"features.{key}.shape", f"is {shape}", "declare at least one number")
    return dim


def _camera(
    key: str,
    dtype: str,
    shape: tuple[int, ...],
    names: Any,
    about: Mapping[str, Any],
    *,
    file: Path,
    notes: list[str],
) -> CameraFeature | None:
    if dtype not in ("image", "video"):
        return None
    if about.get("is_depth_map") or about.get("video.is_depth_map"):
        notes.append(f"{key} is a depth map and is left out")
        return None
    if len(shape) != 3 or min(shape) < 1:
        what = f"a feature of pictures has the shape {shape}"
        raise refusal(file, f"features.{key}.shape", what, "declare (height, width, 3)")
    named = list(names) if isinstance(names, list | tuple) else []
    channels_last = str(named[2]).startswith("channel") if len(named) == 3 else shape[2] == 3
    height, width, channels = shape if channels_last else (shape[1], shape[2], shape[0])
    if height * width > PICTURE_LIMIT_PX:
        what = f"pictures of {height} x {width} px, above {PICTURE_LIMIT_PX} px in all"
        raise refusal(file, f"features.{key}.shape", what, "repair the shape in meta/info.json")
    if channels != 3:
        notes.append(f"{key} has {channels} channel(s) instead of RGB and is left out")
        return None
    codec = " ".join(str(about[part]) for part in ("video.codec", "video.pix_fmt") if part in about)
    return CameraFeature(key, "image" if dtype == "image" else "video", height, width, codec)


class _Links:
    """Looks where the symbolic links of a data set lead."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._within = links_within(root)

    def path(self, relative: str, error: Callable[[str], ValueError]) -> Path:
        """The path of a name in the data set.

        Raises:
            ValueError: Made by ``error``, when it leads out.
        """
        return inside(self._root, relative, error, self._within)

    def check(self, file: Path) -> None:
        """Check a file that was found in the folder.

        Raises:
            DatasetError: When it is a link out of the data set.
        """
        relative = file.relative_to(self._root).as_posix()
        self.path(relative, lambda what: refusal(file, "", what, _OWN_FOLDER))


class _Paths:
    """Turns the templates of ``meta/info.json`` into paths that stay inside the data set."""

    def __init__(self, root: Path, file: Path, data_path: str, video_path: str) -> None:
        self._links = _Links(root)
        self._file = file
        self._templates = {"data_path": data_path, "video_path": video_path}
        for key, template in self._templates.items():
            self._check(key, template)

    def data(self, chunk: int, file: int) -> Path:
        return self._fill("data_path", chunk_index=chunk, file_index=file)

    def video(self, key: str, chunk: int, file: int) -> Path:
        return self._fill("video_path", video_key=key, chunk_index=chunk, file_index=file)

    def _check(self, key: str, template: str) -> None:
        try:
            fields = [
                (name, spec, conversion)
                for _, name, spec, conversion in string.Formatter().parse(template)
                if name is not None
            ]
        except ValueError:
            fields = [(template, "", None)]
        for name, spec, conversion in fields:
            # A stranger's format specification could look at attributes or fill the memory.
            allowed = name in _TEMPLATE_FIELDS and re.fullmatch(r"(0?[1-9]d|d)?", spec or "")
            if not allowed or conversion:
                what = f"is {template!r}, which is no template of paths"
                raise refusal(self._file, key, what, _AGAIN)

    def _fill(self, key: str, **values: Any) -> Path:
        try:
            relative = self._templates[key].format(**values)
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            what = f"is {self._templates[key]!r}, which does not fit {values} ({error!r})"
            raise refusal(self._file, key, what, _AGAIN) from error
        return self._links.path(relative, lambda what: refusal(self._file, key, what, _OWN_FOLDER))


def _episode_rows(root: Path, videos: Sequence[str]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Rows of all tables in ``meta/episodes``, without the statistics."""
    import pyarrow.parquet as pq

    needed = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in videos:
        needed += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index")]
        needed += [f"videos/{key}/from_timestamp"]
    tables = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not tables:
        raise refusal(root / "meta" / "episodes", "", "holds no table of episodes", _AGAIN)
    rows: list[dict[str, Any]] = []
    links = _Links(root)
    for table in tables:
        links.check(table)
        with _naming_damage(table, "", "parquet file"), pq.ParquetFile(table) as opened:
            held = set(opened.schema_arrow.names)
            missing = [key for key in needed if key not in held]
            if missing:
                raise refusal(table, missing[0], "missing column", _AGAIN)
            optional = [key for key in ("tasks",) if key in held]
            rows += opened.read(columns=[*needed, *optional]).to_pylist()
    return rows, tables


def _entries(
    rows: list[dict[str, Any]], cameras: Mapping[str, CameraFeature], paths: _Paths, place: Path
) -> dict[int, EpisodeEntry]:
    films = [key for key, camera in cameras.items() if camera.kind == "video"]
    entries: dict[int, EpisodeEntry] = {}
    for row in rows:
        number, length = row["episode_index"], row["length"]
        if not isinstance(number, int) or number < 0 or number in entries:
            raise refusal(place, "episode_index", f"{number!r} is repeated or no number", _AGAIN)
        if not isinstance(length, int) or length < 1:
            what = f"episode {number} has the length {length!r}"
            raise refusal(place, "length", what, _AGAIN)
        for key in ("data/chunk_index", "data/file_index"):
            if not isinstance(row[key], int):
                what = f"is {row[key]!r} for episode {number}, no number of a file"
                raise refusal(place, key, what, _AGAIN)
        videos: dict[str, VideoSpan] = {}
        for key in films:
            chunk, file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
            from_s = row[f"videos/{key}/from_timestamp"]
            if (
                not isinstance(chunk, int)
                or not isinstance(file, int)
                or not isinstance(from_s, int | float)
                or not 0 <= from_s < _LAST_S
            ):
                what = f"episode {number} has no film of this camera"
                raise refusal(place, f"videos/{key}", what, _AGAIN)
            videos[key] = VideoSpan(paths.video(key, chunk, file), float(from_s))
        entries[number] = EpisodeEntry(
            number,
            length,
            paths.data(row["data/chunk_index"], row["data/file_index"]),
            videos,
            tuple(str(task) for task in row.get("tasks") or ()),
        )
    return dict(sorted(entries.items()))


def _masks(
    splits: Mapping[str, str], episodes: Mapping[int, EpisodeEntry]
) -> dict[str, tuple[int, ...]]:
    masks = {}
    for part, spellings in (("train", ("train",)), ("val", ("val", "validation"))):
        span = next((splits[name] for name in spellings if name in splits), "")
        if match := re.fullmatch(r"(\d{1,18}):(\d{1,18})", span):
            start, stop = int(match[1]), int(match[2])
            masks[part] = tuple(number for number in episodes if start <= number < stop)
    return masks


def missing_files(folder: Folder, episodes: Sequence[int], cameras: Sequence[str]) -> list[Problem]:
    """A problem for each table or film of chosen episodes that is not there."""
    held: dict[Path, list[int]] = {}
    for number in episodes:
        for file in needed_files(folder, [number], cameras):
            held.setdefault(file, []).append(number)
    mend = f"{_AGAIN}, or leave these episodes out with episodes:"
    return [
        Problem(str(file), "", f"no such file; it holds {_spell(numbers)}", mend, numbers[0])
        for file, numbers in held.items()
        if not file.is_file()
    ]


def _spell(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"episode {numbers[0]}"
    return f"{len(numbers)} episodes, {numbers[0]} to {numbers[-1]}"


def read_tables(folder: Folder, episodes: Sequence[int], keys: Sequence[str]) -> Tables:
    """Read numeric features of chosen episodes, and check them.

    Args:
        folder: The data set.
        episodes: Numbers of the episodes.
        keys: Keys of features in :attr:`Folder.vectors`.

    Returns:
        What was found; its problems do not raise here, so that they can be shown together.
        Episodes with a value that is not finite are not among the readable ones.
    """
    entries = sorted(
        (folder.episodes[number] for number in episodes),
        key=lambda entry: (str(entry.data_file), entry.number),
    )
    found: dict[int, Episode] = {}
    problems: list[Problem] = []
    not_finite = dict.fromkeys(keys, 0)
    for file, group in groupby(entries, key=lambda entry: entry.data_file):
        if not file.is_file():
            continue
        try:
            _read_table(folder, file, list(group), keys, found, problems, not_finite)
        except DatasetError as error:
            problems += error.problems
    return Tables(dict(sorted(found.items())), tuple(problems), not_finite)


def _read_table(
    folder: Folder,
    file: Path,
    entries: list[EpisodeEntry],
    keys: Sequence[str],
    found: dict[int, Episode],
    problems: list[Problem],
    not_finite: dict[str, int],
) -> None:
    import pyarrow.parquet as pq

    names = ["episode_index", "frame_index", "timestamp"]
    with _naming_damage(file, "", "parquet file"), pq.ParquetFile(file) as opened:
        held = set(opened.schema_arrow.names)
        absent = [key for key in (*names, *keys) if key not in held]
        if absent:
            what = f"missing column; the table has {', '.join(sorted(held))}"
            raise refusal(file, absent[0], what, _AGAIN)
        table = opened.read(columns=[*names, *keys])
    columns = {}
    for key in (*names, *keys):
        with _naming_damage(file, key, "column of numbers"):
            dim = 1 if key in names else folder.vectors[key]
            columns[key] = _vector(table.column(key), dim, file, key)
    numbers, frames, timestamps = (columns[name][:, 0] for name in names)
    for name, values in (("episode_index", numbers), ("frame_index", frames)):
        if not np.isfinite(values).all():
            raise refusal(file, name, "has rows without a number", _AGAIN)
    with np.errstate(over="ignore"):
        values = {key: columns[key].astype(np.float32) for key in keys}
    # Rows of one episode lie together, so that the borders are where the number changes.
    borders = np.flatnonzero(np.diff(numbers)) + 1
    starts = np.concatenate([[0], borders]).astype(int)
    stops = np.concatenate([borders, [len(numbers)]]).astype(int)
    runs: dict[int, list[tuple[int, int]]] = {}
    if len(numbers):
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            runs.setdefault(int(numbers[start]), []).append((start, stop))

    def problem(key: str, what: str, number: int, kind: str) -> None:
        problems.append(Problem(str(file), key, what, _LEAVE_OUT, number, kind))

    for entry in entries:
        number = entry.number
        spans = runs.get(number, [])
        rows = sum(stop - start for start, stop in spans)
        if rows != entry.length:
            what = f"episode {number} has {rows} rows, but meta/episodes says {entry.length}"
            problem("episode_index", what, number, "rows of an episode")
            continue
        start, stop = spans[0][0], spans[-1][1]
        in_order = np.array_equal(frames[start:stop], np.arange(entry.length))
        if len(spans) > 1 or not in_order:
            what = f"the frames of episode {number} do not follow each other"
            problem("frame_index", what, number, "order of frames")
            continue
        columns = {key: column[start:stop] for key, column in values.items()}
        finite = True
        for key, column in {**columns, "timestamp": timestamps[start:stop, None]}.items():
            wrong = ~np.isfinite(column)
            if wrong.any():
                finite = False
                frame = int(np.nonzero(wrong)[0][0])
                what = (
                    f"{int(wrong.sum())} of {column.size} values of episode {number} are not "
                    f"finite, first at frame {frame}"
                )
                problem(key, what, number, "values that are not finite")
                if key in not_finite:
                    not_finite[key] += int(wrong.sum())
        if finite:
            found[number] = Episode(entry, start, timestamps[start:stop], columns)


def _vector(
    column: "pa.ChunkedArray", dim: int, file: Path, key: str
) -> Float64[np.ndarray, "row dim"]:
    """Values of a column of numbers or of equally long lists; missing ones become NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = len(column)
    kind = column.type
    call = pc.call_function
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = np.unique(call("list_value_length", [column]).to_numpy())
        if rows and not np.array_equal(lengths, [dim]):
            held = ", ".join(str(length) for length in lengths.tolist()[:8])
            what = f"rows hold {held} values, but meta/info.json says {dim}"
            raise refusal(file, key, what, "repair meta/info.json, or " + _AGAIN)
        flat = call("list_flatten", [column])
    elif dim == 1:
        flat = column
    else:
        what = f"is of the type {kind}, but meta/info.json says {dim} values"
        raise refusal(file, key, what, "repair meta/info.json, or " + _AGAIN)
    try:
        numbers = pc.cast(flat, pa.float64(), safe=False)
    except pa.ArrowException as error:
        what = f"is of the type {kind}, which is no number"
        raise refusal(file, key, what, _AGAIN) from error
    return numbers.to_numpy().reshape(rows, dim)


class PictureReader:
    """Pictures of one camera as upright RGB bytes, read forwards where possible.

    An open reader must not be used in a forked process: the threads of its codec stay behind.

    Args:
        camera: Which.
        fps: Control frequency in Hz.
        tolerance_s: Largest distance between the time of a frame in its table and in the film.
    """

    def __init__(self, camera: CameraFeature, fps: float, tolerance_s: float = 1e-4) -> None:
        self.camera = camera
        self._fps = fps
        self._tolerance_s = tolerance_s
        self._film: _Film | None = None
        self._pictures: _TablePictures | None = None

    def pictures(
        self, episode: Episode, frames: Sequence[int] | None = None
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Pictures of an episode.

        Args:
            episode: Which.
            frames: Ascending steps of it; all when None.

        Raises:
            DatasetError: When one cannot be read; names file, episode and time or frame.
        """
        frames = range(episode.length) if frames is None else frames
        if self.camera.kind == "image":
            return self._from_table(episode, frames)
        return self._from_film(episode, frames)

    def close(self) -> None:
        """Close the file that was read last."""
        if self._film is not None:
            self._film.close()
        self._film = self._pictures = None

    def _from_film(
        self, episode: Episode, frames: Sequence[int]
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        span = episode.entry.videos[self.camera.key]
        for frame in frames:
            at_s = span.from_s + float(episode.timestamps[frame])
            try:
                if self._film is None or self._film.file != span.file:
                    self.close()
                    self._film = _Film(span.file, self._fps)
                picture = self._film.at(at_s, self._tolerance_s)
                self._check_size(picture)
            except _FilmError as error:
                self.close()
                where = f"{self.camera.key}, episode {episode.number}, {at_s:.3f} s"
                mend = f"{error.mend or _AGAIN}, or leave the episode out with episodes:"
                problem = Problem(str(span.file), where, str(error), mend, episode.number, "film")
                raise DatasetError(span.file, [problem]) from error
            yield picture

    def _from_table(
        self, episode: Episode, frames: Sequence[int]
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        file = episode.entry.data_file
        if self._pictures is None or self._pictures.file != file:
            with _naming_damage(file, self.camera.key, "parquet file"):
                self._pictures = _TablePictures(file, self.camera.key)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(frames), _PNG_SLAB):
                slab = frames[start : start + _PNG_SLAB]
                with _naming_damage(file, self.camera.key, "parquet file"):
                    encoded = self._pictures.rows([episode.first_row + frame for frame in slab])
                futures = [pool.submit(self._decode, data) for data in encoded]
                for frame, future in zip(slab, futures, strict=True):
                    try:
                        picture = future.result()
                    except (ValueError, _FilmError) as error:
                        where = f"{self.camera.key}, episode {episode.number}, frame {frame}"
                        what = f"holds {error}" if isinstance(error, ValueError) else str(error)
                        problem = Problem(
                            str(file), where, what, _LEAVE_OUT, episode.number, "pictures"
                        )
                        raise DatasetError(file, [problem]) from error
                    yield picture

    def _decode(self, data: object) -> UInt8[np.ndarray, "height width 3"]:
        if data is None:
            raise ValueError("no embedded picture, only a path to one")
        if not isinstance(data, bytes):
            raise ValueError(f"a value of the type {type(data).__name__}, not a picture")
        picture = decode_picture(data)
        self._check_size(picture)
        return picture

    def _check_size(self, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        expected = (self.camera.height, self.camera.width)
        if picture.shape[:2] != expected:
            raise _FilmError(
                f"a picture of {picture.shape[0]} x {picture.shape[1]} px (height x width), but "
                f"meta/info.json says {expected[0]} x {expected[1]}",
                "repair the shape in meta/info.json",
            )


class _FilmError(Exception):
    """A film lacks the wanted frame, or cannot be decoded there."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.mend = mend


def _film_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises when a film is damaged; which one depends on the place of the damage."""
    from av.error import FFmpegError

    return (FFmpegError, *_DAMAGE)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def _open_film(file: Path) -> "tuple[InputContainer, VideoStream]":
    """Open an mp4 whose film can be decoded.

    Raises:
        _FilmError: When it cannot.
    """
    import av

    try:
        container = av.open(str(file))
    except _film_errors() as error:
        raise _FilmError(f"no readable film ({_reason(error)}); it may be truncated") from error
    if not container.streams.video:
        container.close()
        raise _FilmError("no readable film (it holds no pictures); it may be truncated")
    stream = container.streams.video[0]
    context = stream.codec_context
    # PyAV decodes such a stream through a null pointer, which ends the process.
    if context is None:
        container.close()
        raise _FilmError("no readable film (its header names no known codec)")
    if context.width * context.height > PICTURE_LIMIT_PX:
        size = f"{context.width} x {context.height} px"
        container.close()
        raise _FilmError(f"no readable film (its header says {size})")
    return container, stream


class _Film:
    """One mp4, decoded forwards; it seeks backwards, and over long gaps."""

    def __init__(self, file: Path, fps: float) -> None:
        from av.video.reformatter import VideoReformatter

        self.file = file
        self._container, self._stream = _open_film(file)
        if self._stream.time_base is None:
            raise _FilmError("no readable film (its clock has no unit)")
        # Whole numbers: a Fraction's arithmetic would cost as much as the conversion to RGB.
        self._unit_s = self._stream.time_base.as_integer_ratio()
        self._stream.thread_type = "AUTO"
        # Unlike frame.to_ndarray, a shared one keeps its conversion table from frame to frame.
        self._reformatter = VideoReformatter()
        rate = float(self._stream.average_rate or fps)
        self._near_s = 0.25 / max(rate, fps)
        self._gap_s = _SEEK_AHEAD_FRAMES / max(rate, fps)
        self._frames = self._decode()
        self._current: tuple[float, Any] | None = None
        self._next: tuple[float, Any] | None = None

    def close(self) -> None:
        self._frames.close()
        self._container.close()

    def at(self, at_s: float, tolerance_s: float) -> UInt8[np.ndarray, "height width 3"]:
        """The frame nearest to a time, as LeRobot picks it (``decode_video_frames_pyav``)."""
        if self._current is None:
            if at_s > self._gap_s:
                self._seek(at_s)
        elif at_s < self._current[0] - self._near_s or at_s > self._current[0] + self._gap_s:
            self._seek(at_s)
        if self._current is None:
            self._current = self._read()
        # A frame this near cannot be outdone by the following one, which need not be decoded.
        while self._current is not None and self._current[0] < at_s - self._near_s:
            following = self._next or self._read()
            self._next = None
            if following is None:
                break
            if abs(following[0] - at_s) > abs(self._current[0] - at_s):
                self._next = following
                break
            self._current = following
        if self._current is None:
            raise _FilmError("the film has no frame here; it is shorter than its table")
        time_s, frame = self._current
        if abs(time_s - at_s) > tolerance_s:
            raise _FilmError(
                f"the nearest frame of the film is at {time_s:.4f} s, {abs(time_s - at_s):.4f} s "
                f"away (tolerance_s is {tolerance_s:g}); the film is shorter than its table or "
                "runs at another rate",
                f"{_AGAIN}, raise tolerance_s",
            )
        if frame.is_corrupt:
            raise _FilmError("the decoder calls the frame corrupt")
        if frame.width * frame.height > PICTURE_LIMIT_PX:
            raise _FilmError(f"a frame of {frame.width} x {frame.height} px")
        try:
            picture = self._reformatter.reformat(frame, format="rgb24")
        except _film_errors() as error:
            raise _FilmError(f"has colours that cannot be read ({_reason(error)})") from error
        (plane,) = picture.planes
        shape, strides = (picture.height, picture.width, 3), (plane.line_size, 3, 1)
        return np.ndarray(shape, np.uint8, buffer=plane, strides=strides)

    def _seek(self, at_s: float) -> None:
        self._frames.close()
        self._current = self._next = None
        try:
            numerator, denominator = self._unit_s
            offset = max(0, round(at_s * denominator / numerator) - 1)
            self._container.seek(offset, backward=True, any_frame=False, stream=self._stream)
        except _film_errors() as error:
            raise _FilmError(f"cannot be searched ({_reason(error)})") from error
        self._frames = self._decode()

    def _decode(self) -> Generator[tuple[float, Any]]:
        return _timed_frames(self._container, self._stream, *self._unit_s)

    def _read(self) -> tuple[float, Any] | None:
        try:
            return next(self._frames, None)
        except _film_errors() as error:
            reason = _reason(error)
            raise _FilmError(f"cannot be decoded ({reason}); it is damaged or cut") from error


def _timed_frames(
    container: "InputContainer", stream: "VideoStream", numerator: int, denominator: int
) -> Generator[tuple[float, Any]]:
    # No method: a generator that knows its film would keep it alive until the collector runs,
    # perhaps in a forked process, where freeing the codec waits for threads that are not there.
    for frame in container.decode(stream):
        if frame.pts is not None:
            yield frame.pts * numerator / denominator, frame


class _TablePictures:
    """Encoded pictures of one data file; the row group read last stays in memory."""

    def __init__(self, file: Path, key: str) -> None:
        import pyarrow.parquet as pq

        self.file = file
        self._key = key
        self._opened = pq.ParquetFile(file)
        metadata = self._opened.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if key not in self._opened.schema_arrow.names:
            raise refusal(file, key, "missing column", _AGAIN)
        self._ends = np.cumsum(sizes)
        self._group = -1
        self._held: pa.ChunkedArray | None = None

    def rows(self, rows: Sequence[int]) -> list[object]:
        """What the table holds in place of a picture: bytes, unless it is damaged."""
        found = []
        for row in rows:
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group != self._group:
                self._held, self._group = None, -1
                table = self._opened.read_row_group(group, columns=[self._key])
                self._held, self._group = table.column(self._key), group
            assert self._held is not None
            start = int(self._ends[group - 1]) if group else 0
            value = self._held[row - start].as_py()
            found.append(value.get("bytes") if isinstance(value, dict) else value)
        return found


def in_file_order(episodes: Sequence[Episode], camera: CameraFeature) -> list[Episode]:
    """Order in which pictures of a camera are read in one pass through each file."""

    def place(episode: Episode) -> tuple[str, float]:
        if camera.kind == "image":
            return str(episode.entry.data_file), episode.first_row
        span = episode.entry.videos[camera.key]
        return str(span.file), span.from_s

    return sorted(episodes, key=place)


def fill_store(
    folder: Folder,
    episodes: Mapping[int, Episode],
    cameras: Mapping[str, str],
    columns: Mapping[str, str],
    writer: "FrameWriter",
    tolerance_s: float = 1e-4,
) -> None:
    """Write the frames of the writer's episodes, one pass through each file.

    Args:
        folder: The data set.
        episodes: Its episodes by number.
        cameras: Name of a camera in the store to feature key.
        columns: Name of a column in the store to feature key.
        writer: Takes them.
        tolerance_s: Passed to :class:`PictureReader`.

    Raises:
        DatasetError: When a picture cannot be read.
    """
    starts = {number: start for number, start, _ in writer.episodes}
    for number, start in starts.items():
        for name, key in columns.items():
            writer.write_column(name, start, episodes[number].columns[key])
    for name, key in cameras.items():
        camera = folder.cameras[key]
        as_stored = writer.shapes.cameras[name] == (camera.height, camera.width)
        reader = PictureReader(camera, folder.fps, tolerance_s)
        try:
            for episode in in_file_order([episodes[number] for number in starts], camera):
                start = starts[episode.number]
                for frame, picture in enumerate(reader.pictures(episode)):
                    if as_stored:
                        writer.image_rows(name, start + frame, start + frame + 1)[0] = picture
                    else:
                        writer.write_images(name, start + frame, picture[None])
        finally:
            reader.close()


def sample_pictures(
    folder: Folder,
    episodes: Sequence[Episode],
    camera: CameraFeature,
    count: int,
    tolerance_s: float = 1e-4,
) -> list[tuple[int, int, UInt8[np.ndarray, "height width 3"]]]:
    """Episode number, frame and picture of some frames, spread over the given episodes.

    Raises:
        DatasetError: When a picture is damaged.
    """
    ends = np.cumsum([episode.length for episode in episodes])
    reader = PictureReader(camera, folder.fps, tolerance_s)
    found = []
    try:
        for at in np.unique(np.linspace(0, ends[-1] - 1, count).astype(int)).tolist():
            episode = episodes[int(np.searchsorted(ends, at, side="right"))]
            frame = at - int(ends[np.searchsorted(ends, at, side="right")]) + episode.length
            (picture,) = reader.pictures(episode, [frame])
            found.append((episode.number, frame, picture))
    finally:
        reader.close()
    return found


@dataclass(frozen=True)
class FilmFacts:
    """What the header of an mp4 says."""

    codec: str
    """With the format of its pixels, e.g. ``av1 yuv420p``."""
    height: int
    width: int
    fps: float
    frames: int


def film_facts(file: Path) -> FilmFacts:
    """Read the header of an mp4.

    Raises:
        DatasetError: When it has none.
    """
    try:
        container, stream = _open_film(file)
    except _FilmError as error:
        raise refusal(file, "", str(error), error.mend or _AGAIN) from error
    context = stream.codec_context
    codec = "av1" if "av1" in context.name else context.name
    facts = FilmFacts(
        f"{codec} {context.pix_fmt}",
        context.height,
        context.width,
        float(stream.average_rate or 0),
        stream.frames,
    )
    container.close()
    return facts


def check_pictures(
    folder: Folder,
    episodes: Sequence[Episode],
    on_frames: Callable[[int], None],
    tolerance_s: float = 1e-4,
) -> list[Problem]:
    """Read every picture, and list the episodes whose pictures cannot be read.

    Args:
        folder: The data set.
        episodes: Which; those whose film is missing are passed over.
        on_frames: Called with the number of pictures done since its last call.
        tolerance_s: Passed to :class:`PictureReader`.
    """
    problems: list[Problem] = []
    for camera in folder.cameras.values():
        reader = PictureReader(camera, folder.fps, tolerance_s)
        try:
            for episode in in_file_order(episodes, camera):
                span = episode.entry.videos.get(camera.key)
                if span is not None and not span.file.is_file():
                    on_frames(episode.length)
                    continue
                done = 0
                try:
                    for _ in reader.pictures(episode):
                        done += 1
                        on_frames(1)
                except DatasetError as error:
                    problems += error.problems
                on_frames(episode.length - done)
        finally:
            reader.close()
    return problems
