"""LeRobot folders whose tables or descriptions are damaged, or that lead out of themselves."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_lerobot import DATA, EPISODES, LENGTHS, TOP, info, tables, write_folder

from datamodules.errors import DatasetError
from datamodules.lerobot import LeRobotDataModule, name_cameras
from datamodules.lerobot_files import read_folder
from datamodules.verify import verify, write_list

INFO = "meta/info.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "set")


def ready(folder: Path, **arguments) -> LeRobotDataModule:
    defaults = {"chunk_size": 2, "val_fraction": 0.0, "storage": "ram", "progress": False}
    data = LeRobotDataModule(str(folder), **{**defaults, **arguments})
    data.setup()
    return data


def change(folder: Path, **changes) -> None:
    (folder / INFO).write_text(json.dumps({**info("image"), **changes}))


def column(folder: Path, name: str, key: str, value: object) -> None:
    table = tables()[name]
    values = pa.array([value] * table.num_rows)
    place = table.column_names.index(key)
    pq.write_table(table.set_column(place, key, values), folder / FILES[name])


FILES = {"data": DATA, "episodes": EPISODES}


def edited(name: str, key: str, value: object):
    return lambda folder: column(folder, name, key, value)


def info_of(**changes):
    return lambda folder: change(folder, **changes)


def feature(shape: list) -> dict:
    return {**info("image")["features"], "action": {"dtype": "float32", "shape": shape}}


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("breaks", "file", "key"),
    [
        (info_of(fps=10**400), INFO, ""),
        (info_of(fps=[10]), INFO, "fps"),
        (info_of(splits={"train": 5, "val": None}, fps=None), INFO, "fps"),
        (info_of(splits=["0:1"]), INFO, "splits"),
        (info_of(features=feature([float("inf")])), INFO, "features"),
        (info_of(features=feature([0])), INFO, "features.action.shape"),
        (info_of(features=None), INFO, "features"),
        (info_of(codebase_version="v9.0"), INFO, "codebase_version"),
        (info_of(codebase_version=None), INFO, "codebase_version"),
        (info_of(data_path="{chunk_index}/{file_index!r}"), INFO, "data_path"),
        (lambda f: (f / INFO).write_text("[" * 200_000), INFO, ""),
        (lambda f: (f / INFO).write_bytes(b"\xff\xfe{}"), INFO, ""),
        (lambda f: (f / INFO).write_text("{}"), INFO, "codebase_version"),
        (edited("episodes", "data/chunk_index", None), "meta/episodes", "data/chunk_index"),
        (edited("episodes", "data/file_index", 0.5), "meta/episodes", "data/file_index"),
        (edited("episodes", "tasks", 5), "meta/episodes", ""),
        (edited("episodes", "length", "3"), "meta/episodes", "length"),
        (edited("data", "episode_index", None), DATA, "episode_index"),
        (edited("data", "action", "text"), DATA, "action"),
        (edited("data", "action", [[1.0]]), DATA, "action"),
        (edited("data", "timestamp", float("nan")), DATA, "timestamp"),
        (edited("data", TOP, "text"), DATA, f"{TOP}, episode 0, frame 0"),
        (edited("data", TOP, 0.5), DATA, f"{TOP}, episode 0, frame 0"),
        (edited("data", TOP, {"bytes": "text"}), DATA, f"{TOP}, episode 0, frame 0"),
        (edited("data", TOP, {"path": "/etc/passwd"}), DATA, f"{TOP}, episode 0, frame 0"),
        (lambda f: (f / DATA).write_bytes((f / DATA).read_bytes()[:-9]), DATA, ""),
        (lambda f: (f / EPISODES).write_bytes(b"PAR1" * 9), EPISODES, ""),
    ],
)
def test_every_damage_is_one_error_with_file_and_key(folder, breaks, file, key):
    breaks(folder)
    before = {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    with pytest.raises(DatasetError) as error:
        ready(folder)
    assert str(folder / file) in str(error.value)
    assert key in {problem.key for problem in error.value.problems}
    assert all(problem.mend for problem in error.value.problems)
    assert len(str(error.value)) < 3000
    assert {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()} == before


@pytest.mark.fault(11)
def test_a_split_of_five_thousand_digits_assigns_nothing(folder):
    change(folder, splits={"train": "0:" + "9" * 5000})
    assert ready(folder).split["train"] == [0, 1]


@pytest.mark.fault(11)
@pytest.mark.parametrize("lost", [DATA, "meta/stats.json", EPISODES])
def test_what_is_missing_in_a_local_folder_is_never_fetched(folder, monkeypatch, lost):
    """Sockets are closed in tests: an attempt would be another error."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (folder / lost).unlink(missing_ok=True)
    for words in ({}, {"root": str(folder)}):
        data = LeRobotDataModule(
            "user/name" if words else str(folder), chunk_size=2, progress=False, **words
        )
        if lost == "meta/stats.json":
            # Statistics are our own.
            assert data.action_dim == 2
            continue
        with pytest.raises(DatasetError, match=r"no such file|no table of episodes"):
            _ = data.source


@pytest.mark.fault(24)
@pytest.mark.parametrize("name", [INFO, EPISODES, DATA])
def test_links_out_of_the_folder_are_refused(folder, name):
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(DatasetError, match="is a link out of") as error:
        ready(folder)
    assert "all files inside their own folder" in str(error.value)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "key", ["observation.images.../../x", "observation.images.a/b", "observation.images.\x1b[31m"]
)
def test_cameras_whose_names_could_leave_a_folder_are_refused(folder, key):
    features = info("image")["features"]
    features[key] = features.pop(TOP)
    change(folder, features=features)
    with pytest.raises(DatasetError, match="cannot name a camera") as error:
        _ = LeRobotDataModule(str(folder)).source
    assert str(error.value).isprintable()


@pytest.mark.fault(24)
def test_only_cameras_that_are_taken_need_a_name(folder):
    features = info("image")["features"]
    odd = "observation.images.a/b"
    features |= {odd: features[TOP], "observation.images.cam(1)": features[TOP]}
    change(folder, features=features)
    found = read_folder(folder)
    named = name_cameras(found, ["cam(1)", TOP])
    assert named == {"cam(1)": "observation.images.cam(1)", "top": TOP}
    with pytest.raises(DatasetError, match="cannot name a camera"):
        name_cameras(found, [odd])


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", [DATA, EPISODES, INFO, f"videos/{TOP}/chunk-000/file-000.mp4"])
def test_a_flipped_bit_in_a_listed_folder_is_found(folder, name):
    write_list(folder, progress=False)
    assert verify(folder, progress=False).problems == []
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    (problem,) = verify(folder, progress=False).problems
    assert problem.file == str(folder / name)


def test_the_folder_of_these_tests_is_good(folder):
    data = ready(folder)
    assert data.source.episode_lengths == dict(enumerate(LENGTHS))
    assert data.train_dataset[0].actions.isfinite().all()
