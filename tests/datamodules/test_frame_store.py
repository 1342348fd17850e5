"""The cache of frames: complete or absent, never stale, never read twice from the source."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import frame_store
from datamodules.frame_store import StoreShapes, build_store

SHAPES = StoreShapes({"top": (4, 6), "wrist": (3, 2)}, {"action": 2, "state": 3}, (0, 4), (3, 5))
IDENTITY = {"source": [["/data/x.hdf5", 100, 1]], "schema": "demos"}


class Reader:
    """Writes known values and counts how often it was asked to."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.calls = 0

    def content(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, len(name)])
        if len(shape) == 4:
            return rng.integers(0, 256, shape, dtype=np.uint8)
        return rng.normal(size=shape).astype(np.float32)

    def __call__(self, writer) -> None:
        self.calls += 1
        for _, start, stop in writer.episodes:
            for name, size in writer.shapes.cameras.items():
                frames = self.content(name, (writer.shapes.frames, *size, 3))
                writer.write_images(name, start, frames[start:stop])
            for name, dim in writer.shapes.columns.items():
                values = self.content(name, (writer.shapes.frames, dim))
                writer.write_column(name, start, values[start:stop])


def check(store, reader) -> None:
    for name, size in store.shapes.cameras.items():
        expected = reader.content(name, (store.shapes.frames, *size, 3))
        np.testing.assert_array_equal(store.images[name].numpy(), expected)
    for name, dim in store.shapes.columns.items():
        expected = reader.content(name, (store.shapes.frames, dim))
        np.testing.assert_array_equal(store.columns[name].numpy(), expected)


def build(tmp_path, reader, identity=IDENTITY, storage="memmap"):
    return build_store(SHAPES, reader, storage, tmp_path, identity, progress=False)


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_what_was_written_comes_back(tmp_path, storage):
    reader = Reader()
    check(build(tmp_path, reader, storage=storage), reader)


def test_second_opening_does_not_call_the_reader(tmp_path):
    reader = Reader()
    first = build(tmp_path, reader)
    second = build(tmp_path, reader)
    assert reader.calls == 1
    check(second, reader)
    assert first.fingerprint() == second.fingerprint()


def test_writing_into_an_opened_cache_leaves_the_file_alone(tmp_path):
    reader = Reader()
    build(tmp_path, reader).images["top"].zero_()
    check(build(tmp_path, reader), reader)


@pytest.mark.parametrize(
    "changed",
    [
        {**IDENTITY, "source": [["/data/x.hdf5", 101, 1]]},
        {**IDENTITY, "source": [["/data/x.hdf5", 100, 2]]},
    ],
)
def test_changed_source_is_read_again_and_its_old_cache_deleted(tmp_path, changed):
    build(tmp_path, Reader(0))
    reader = Reader(1)
    check(build(tmp_path, reader, changed), reader)
    assert len(list(tmp_path.glob("*/store.json"))) == 1


@pytest.mark.parametrize(
    "other", [{**IDENTITY, "schema": "aloha"}, {**IDENTITY, "source": [["/data/y.hdf5", 100, 1]]}]
)
def test_other_content_has_its_own_cache(tmp_path, other):
    first, second = Reader(0), Reader(1)
    build(tmp_path, first)
    check(build(tmp_path, second, other), second)
    check(build(tmp_path, first), first)
    assert (first.calls, second.calls) == (1, 1)


def test_new_code_does_not_read_what_old_code_wrote(tmp_path, monkeypatch):
    build(tmp_path, Reader(0))
    monkeypatch.setattr(frame_store, "CODE_VERSION", frame_store.CODE_VERSION + 1)
    reader = Reader(1)
    check(build(tmp_path, reader), reader)


@pytest.mark.parametrize("name", ["camera_0.u8", "column_1.f32"])
@pytest.mark.parametrize("left", [None, 7])
def test_cut_or_missing_files_are_built_again(tmp_path, name, left):
    build(tmp_path, Reader())
    (file,) = tmp_path.glob(f"*/{name}")
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    reader = Reader()
    check(build(tmp_path, reader), reader)
    assert reader.calls == 1


def test_a_reader_that_fails_leaves_nothing(tmp_path):
    def fails(writer):
        writer.image_rows("top", 0, 3)[:] = 255
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        build(tmp_path, fails)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_reader_that_forgets_rows_is_refused(tmp_path):
    def forgets(writer):
        Reader()(writer)
        writer.image_rows("top", 0, 1)

    with pytest.raises(ValueError, match=r"each row once.*'top': -1"):
        build(tmp_path, forgets)
    with pytest.raises(ValueError, match=r"rows left: .*'state': 8"):
        build_store(SHAPES, lambda writer: None, progress=False)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_frame_store import IDENTITY, SHAPES, Reader, build
from datamodules import frame_store

if {moment!r} == "before the rename":
    frame_store.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def reader(writer):
    Reader()(writer)
    if {moment!r} == "while filling":
        os.kill(os.getpid(), signal.SIGKILL)

build(Path({folder!r}), reader)
"""


@pytest.mark.parametrize("moment", ["while filling", "before the rename"])
def test_a_cache_of_a_killed_run_is_never_read(tmp_path, moment):
    here = Path(__file__).parent
    script = textwrap.dedent(KILLED).format(
        root=str(here.parents[1]), tests=str(here), folder=str(tmp_path), moment=moment
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(tmp_path.glob("*.part"))) == 1
    reader = Reader(1)
    check(build(tmp_path, reader), reader)
    assert reader.calls == 1
    assert list(tmp_path.glob("*.part")) == []


def test_two_runs_fill_a_cache_once(tmp_path):
    """The second waits for the lock and then opens what the first has filled."""
    started, second_waits = threading.Event(), threading.Event()

    def slow(writer):
        started.set()
        assert second_waits.wait(10)
        Reader()(writer)

    def wait_for(lock, root, really=frame_store._wait_for):
        if started.is_set():
            second_waits.set()
        really(lock, root)

    second = Reader()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(frame_store, "_wait_for", wait_for)
        first = pool.submit(build, tmp_path, slow)
        assert started.wait(10)
        check(build(tmp_path, second), Reader())
        check(first.result(), Reader())
    assert second.calls == 0


def test_unwritable_cache_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the frame cache .*choose another"):
        build(tmp_path / "file", Reader())


def test_what_does_not_fit_is_refused_before_it_is_filled(tmp_path):
    huge = StoreShapes({"top": (2**20, 2**20)}, {"action": 2}, (0,), (2**10,))
    for storage in ("ram", "memmap"):
        with pytest.raises(ValueError, match="GiB"):
            build_store(huge, Reader(), storage, tmp_path, {}, progress=False)


def test_pictures_are_resized_by_area_when_they_are_stored():
    frames = np.zeros((3, 8, 12, 3), np.uint8)
    frames[:, ::2] = 200
    shapes = StoreShapes({"top": (4, 6)}, {"action": 1}, (0,), (3,))

    def fill(writer):
        writer.write_images("top", 0, frames)
        writer.write_column("action", 0, np.zeros((3, 1), np.float32))

    store = build_store(shapes, fill, progress=False)
    assert torch.equal(store.images["top"], torch.full((3, 4, 6, 3), 100, dtype=torch.uint8))


def test_fingerprint_depends_on_content_not_on_place(tmp_path):
    same = [build(tmp_path / name, Reader(0)).fingerprint() for name in "ab"]
    other = build(tmp_path / "c", Reader(1)).fingerprint()
    assert same[0] == same[1] != other


def test_manifest_is_plain_json(tmp_path):
    build(tmp_path, Reader())
    (manifest,) = tmp_path.glob("*/store.json")
    assert json.loads(manifest.read_text())["identity"] == IDENTITY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_store_holds_the_same_frames(tmp_path):
    reader = Reader()
    store = build(tmp_path, reader, storage="gpu")
    assert store.device.type == "cuda"
    check(store.to("cpu"), reader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_gpu_store_without_a_gpu_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="use ram or memmap"):
        build(tmp_path, Reader(), storage="gpu")
