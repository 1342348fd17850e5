"""Films that are cut, flipped, foreign, or that ended the process of every reader before."""

import faulthandler
import os
import resource
from pathlib import Path

import av
import numpy as np
import pytest
from fuzz_lerobot import (
    FILM,
    FPS,
    LENGTHS,
    SIZE_PX,
    TOP,
    films,
    in_a_child,
    info,
    tables,
    write_folder,
)
from fuzzing import CORPUS

from datamodules import lerobot_files
from datamodules.errors import DatasetError
from datamodules.lerobot import LeRobotDataModule

pytestmark = pytest.mark.fault(12)

CRASHING = CORPUS / "lerobot" / "film--h264_no_codec"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "set", "video")


def pictures(folder: Path, number: int) -> list[np.ndarray]:
    found = lerobot_files.read_folder(folder)
    episode = lerobot_files.read_tables(found, [number], ["action"]).episodes[number]
    reader = lerobot_files.PictureReader(found.cameras[TOP], FPS)
    try:
        return [picture.copy() for picture in reader.pictures(episode)]
    finally:
        reader.close()


def test_a_header_without_a_known_codec_is_an_error_not_the_end_of_the_process(folder):
    """PyAV 15.1 reads such a stream through a null pointer."""
    (folder / FILM).write_bytes(CRASHING.read_bytes())
    with pytest.raises(DatasetError) as error:
        in_a_child(folder)
    text = str(error.value)
    assert "its header names no known codec" in text
    assert f"{folder / FILM}: {TOP}, episode 0, 0.000 s" in text
    assert "leave the episode out with episodes:" in text


def test_pyav_itself_still_ends_on_it():
    """When it no longer does, the guard may go."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with av.open(str(CRASHING)) as container:
            list(container.decode(container.streams.video[0]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11


def damaged(how: str) -> bytes:
    film = films()[0]
    mdat = film.index(b"mdat")
    if how == "flipped header":
        # The name of its codec, as one bit turns it into another.
        return film.replace(b"avc1", b"avb1")
    if how == "flipped pictures":
        return film[: mdat + 60] + bytes(b ^ 0xFF for b in film[mdat + 60 : -900]) + film[-900:]
    return {
        "empty": b"",
        "cut in the header": film[:-200],
        "cut in the pictures": film[: mdat + 300],
        "a text": b"no film at all" * 50,
        "sound": film.replace(b"vide", b"soun"),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "cut in the header",
        "cut in the pictures",
        "a text",
        "sound",
        "flipped header",
        "flipped pictures",
    ],
)
def test_a_damaged_film_is_named_with_file_episode_and_time(folder, how):
    (folder / FILM).write_bytes(damaged(how))
    before = {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    with pytest.raises(DatasetError) as error:
        in_a_child(folder)
    text = str(error.value)
    assert f"{folder / FILM}: {TOP}, episode 0, 0.000 s" in text
    assert "download or copy the data set again" in text
    assert {one: one.read_bytes() for one in folder.rglob("*") if one.is_file()} == before


@pytest.mark.parametrize("storage", ["ram", "memmap", "stream"])
def test_every_storage_says_so_and_keeps_no_half_of_a_cache(folder, tmp_path, storage):
    (folder / FILM).write_bytes(CRASHING.read_bytes())
    data = LeRobotDataModule(
        str(folder),
        chunk_size=2,
        batch_size=2,
        val_fraction=0.0,
        storage=storage,
        cache_dir=str(tmp_path / "cache"),
        progress=False,
    )
    with pytest.raises(DatasetError, match="its header names no known codec"):
        use(data)
    assert not list((tmp_path / "cache").glob("*/store.json"))


def use(data: LeRobotDataModule) -> None:
    data.setup()
    list(data.train_dataloader())


def test_the_episodes_before_the_damage_are_as_they_were(folder):
    good = [pictures(folder, number) for number in range(len(LENGTHS))]
    with av.open(str(folder / FILM)) as film:
        places = [packet.pos for packet in film.demux(video=0) if packet.pos is not None]
    content = bytearray((folder / FILM).read_bytes())
    last = sorted(places)[-1]
    content[last + 5 :] = bytes(len(content) - last - 5)
    moov = (folder / FILM).read_bytes().rindex(b"moov") - 4
    content[moov:] = (folder / FILM).read_bytes()[moov:]
    (folder / FILM).write_bytes(content)
    for one, other in zip(pictures(folder, 0), good[0], strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(DatasetError, match=rf"{TOP}, episode 1, \d"):
        pictures(folder, 1)


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(folder, monkeypatch):
    found = lerobot_files.read_folder(folder)
    episode = lerobot_files.read_tables(found, [0], ["action"]).episodes[0]
    reader = lerobot_files.PictureReader(found.cameras[TOP], FPS)
    monkeypatch.setattr(lerobot_files, "PICTURE_LIMIT_PX", SIZE_PX**2 - 1)
    with pytest.raises(DatasetError, match=f"its header says {SIZE_PX} x {SIZE_PX} px"):
        next(iter(reader.pictures(episode)))
    with pytest.raises(DatasetError, match=f"pictures of {SIZE_PX} x {SIZE_PX} px, above"):
        lerobot_files.read_folder(folder)


def test_the_film_of_these_tests_is_good(folder):
    assert info("video")["features"][TOP]["dtype"] == "video"
    assert len(tables()["data"]) == sum(LENGTHS)
    for number, length in enumerate(LENGTHS):
        assert len(pictures(folder, number)) == length
