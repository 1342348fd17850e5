"""Damaged and hostile LeRobot folders, with pictures inside the tables; and films, in a child.

A case replaces one file of a good folder. A decoder that crashes takes its process along, so that
films are read in a forked one.
"""

import copy
import io
import json
import os
import random
import signal
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_hdf5 import png
from fuzzing import Case, Target, mutated_bytes, mutated_json_text

from datamodules import lerobot_files
from datamodules.errors import DatasetError
from datamodules.lerobot import LeRobotDataModule, name_cameras

TOP = "observation.images.top"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
FILM = f"videos/{TOP}/chunk-000/file-000.mp4"
LENGTHS = (3, 4)
FPS, SIZE_PX = 10, 32
FILES = {"info": "meta/info.json", "episodes": EPISODES, "data": DATA, "film": FILM}


def info(kind: str) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": 2,
        "total_frames": sum(LENGTHS),
        "splits": {"train": "0:1"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [2], "names": None},
            "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]},
            TOP: {
                "dtype": kind,
                "shape": [SIZE_PX, SIZE_PX, 3],
                "names": ["height", "width", "channels"],
                "info": {"video.codec": "h264", "video.pix_fmt": "yuv420p"},
            },
        },
    }


@cache
def tables() -> dict[str, pa.Table]:
    """Columns of ``meta/episodes`` and of the data."""
    rows = sum(LENGTHS)
    picture = cv2.imencode(".png", np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8))[1].tobytes()
    frames = [frame for length in LENGTHS for frame in range(length)]
    episodes = {
        "episode_index": [0, 1],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        "tasks": [["x"], ["y"]],
        f"videos/{TOP}/chunk_index": [0, 0],
        f"videos/{TOP}/file_index": [0, 0],
        f"videos/{TOP}/from_timestamp": [0.0, LENGTHS[0] / FPS],
    }
    data = {
        "episode_index": [n for n, length in enumerate(LENGTHS) for _ in range(length)],
        "frame_index": frames,
        "timestamp": [frame / FPS for frame in frames],
        "action": [[1.0, float(row)] for row in range(rows)],
        "observation.state": [[1.0, 2.0, float(row)] for row in range(rows)],
        TOP: [{"bytes": picture, "path": ""}] * rows,
    }
    return {"episodes": pa.table(episodes), "data": pa.table(data)}


@cache
def films() -> tuple[bytes, ...]:
    """The same moving pattern in the codecs of the hub's data sets."""
    pattern = np.random.default_rng(0).integers(0, 255, (SIZE_PX, SIZE_PX, 3), np.uint8)
    made = []
    for codec in ("libx264", "mpeg4", "libsvtav1"):
        os.environ.setdefault("SVT_LOG", "1")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "film.mp4"
            with av.open(str(file), "w") as container:
                stream = container.add_stream(codec, rate=FPS)
                stream.width = stream.height = 2 * SIZE_PX if "av1" in codec else SIZE_PX
                stream.pix_fmt, stream.options = "yuv420p", {"g": "4"}
                pattern = np.resize(pattern, (stream.height, stream.width, 3))
                for step in range(sum(LENGTHS)):
                    picture = np.ascontiguousarray(np.roll(pattern, 3 * step, 1))
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            made.append(file.read_bytes())
    return tuple(made)


def write_folder(root: Path, kind: str = "image") -> Path:
    """A good data set."""
    for name in FILES.values():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info(kind)))
    pq.write_table(tables()["episodes"], root / EPISODES)
    pq.write_table(tables()["data"], root / DATA)
    (root / FILM).write_bytes(films()[0])
    return root


def _parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


_COLUMNS: tuple[Any, ...] = (
    None,
    "a",
    0.5,
    float("nan"),
    float("inf"),
    1e300,
    -1,
    2**62,
    True,
    b"\xff",
    [1.0],
    [],
    [None, 1.0],
    [float("nan"), 1.0],
    [[1.0]],
    {"bytes": None, "path": "/etc/passwd"},
    {"bytes": "text"},
    {"bytes": png(10**5, 10**5), "path": ""},
    {"bytes": png(SIZE_PX, SIZE_PX, b"\0" * 99), "path": ""},
    {"path": "x"},
    "../" * 5 + "etc/hostname",
)


def _spoilt_table(rng: random.Random, name: str) -> bytes:
    table = tables()[name]
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(table.num_columns)
        key = table.column_names[place]
        way = rng.randrange(5)
        if way == 0:
            table = table.remove_column(place)
        elif way == 1:
            order = rng.sample(range(table.num_rows), table.num_rows)
            table = table.set_column(place, key, table.column(place).take(pa.array(order)))
        elif way == 2:
            values = table.column(place).to_pylist()
            values[rng.randrange(len(values))] = rng.choice((None, copy.copy(values[0])))
            table = table.set_column(place, key, pa.array(values, table.column(place).type))
        elif way == 3:
            rows = rng.randrange(table.num_rows + 1)
            table = table.slice(rng.randrange(3), rows)
            if table.num_rows == 0:
                break
        else:
            odd = rng.choice(_COLUMNS)
            table = table.set_column(place, key, pa.array([odd] * table.num_rows))
        if not table.num_columns:
            break
    return _parquet(table)


def make_case(rng: random.Random) -> Case:
    """One file of the folder, spoilt."""
    kind = rng.choice(("info", "info", "info", "episodes", "data", "data", "film"))
    if kind == "info":
        return Case(kind, mutated_json_text(rng, info(rng.choice(("image", "video")))))
    if kind == "film":
        return Case(kind, mutated_bytes(rng, rng.choice(films()), rng.choice(films())))
    if rng.random() < 0.3:
        return Case(kind, mutated_bytes(rng, _parquet(tables()[kind])))
    return Case(kind, _spoilt_table(rng, kind))


def use(case: Case, folder: Path) -> None:
    """What training reads of it; of the film in a process of its own."""
    root = write_folder(folder / "set", "video" if case.kind == "film" else "image")
    (root / FILES[case.kind]).write_bytes(case.content)
    if case.kind == "film":
        in_a_child(root)
    else:
        _read(root, films_too=False)


def _read(root: Path, films_too: bool) -> None:
    found = lerobot_files.read_folder(root)
    name_cameras(found)
    numbers = list(found.episodes)
    for file in lerobot_files.needed_files(found, numbers, list(found.cameras)):
        assert file.resolve().is_relative_to(root.resolve()), file
    vectors = [key for key in found.vectors if key.startswith(("action", "observation."))]
    read = lerobot_files.read_tables(found, numbers, vectors)
    cameras = [key for key, one in found.cameras.items() if films_too or one.kind == "image"]
    problems = [*read.problems, *lerobot_files.missing_files(found, numbers, cameras)]
    for episode in read.episodes.values():
        for values in episode.columns.values():
            assert np.isfinite(values).all()
    if films_too or all(camera.kind == "image" for camera in found.cameras.values()):
        seen: list[int] = []
        readable = list(read.episodes.values())
        problems += lerobot_files.check_pictures(found, readable, seen.append)
    if problems:
        raise DatasetError(root, problems)
    if not films_too and all(camera.kind == "image" for camera in found.cameras.values()):
        LeRobotDataModule(
            str(root), val_fraction=0.0, chunk_size=2, storage="ram", progress=False
        ).setup()


def in_a_child(root: Path) -> None:
    """Raise what reading the film raised there; a signal is an AssertionError."""
    results, ours = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(results)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, 5.0)
        signal.alarm(100)
        text = "accepted"
        try:
            _read(root, films_too=True)
        except DatasetError as error:
            text = f"refused {error}"
        except BaseException as error:
            text = f"escaped {type(error).__name__}: {error}"
        os.write(ours, text[:4000].encode(errors="replace"))
        os._exit(0)
    os.close(ours)
    with os.fdopen(results, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"reading the film ended by signal {os.WTERMSIG(status)}"
    verdict, _, text = said.partition(" ")
    assert verdict in ("accepted", "refused"), text
    if verdict == "refused":
        problem = lerobot_files.Problem(str(root), "", text, "see there")
        raise DatasetError(root, [problem])


TARGET = Target("lerobot", make_case, use, (DatasetError,))
