"""The folder of frame caches, which all runs of a user share: flips, full disks, neighbours."""

import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest

from analyze import main
from datamodules.frame_store import StoreShapes, build_store
from datamodules.verify import verify

SHAPES = StoreShapes({"top": (4, 6)}, {"action": 2}, (0, 4), (3, 5))


def fill(writer) -> None:
    frames = writer.shapes.frames
    pixels = np.arange(frames * 4 * 6 * 3).reshape(frames, 4, 6, 3) % 251
    writer.write_images("top", 0, pixels.astype(np.uint8))
    writer.write_column("action", 0, np.arange(2.0 * frames, dtype=np.float32).reshape(frames, 2))


def build(root, name: str = "x"):
    identity = {"source": [[f"/data/{name}.hdf5", 100, 1]]}
    return build_store(SHAPES, fill, "memmap", root, identity, progress=False)


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", ["camera_0.u8", "column_0.f32"])
def test_a_flipped_byte_in_a_cache_is_found_when_it_is_asked_for(tmp_path, capsys, name):
    build(tmp_path)
    build(tmp_path, "y")
    assert verify(tmp_path, progress=False).caches == 2
    words = ["verify", "--dataset_repo_id", str(tmp_path)]
    assert main(words) == 0
    file = sorted(tmp_path.glob(f"*/{name}"))[0]
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    assert main(words) == 1
    text = capsys.readouterr().out
    assert f"{file}: differs from what was stored" in text
    assert f"delete {file.parent}, and the next run fills it again" in text
    shutil.rmtree(file.parent)
    build(tmp_path)
    build(tmp_path, "y")
    assert main(words) == 0


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "[[]]",
        "null",
        '{"identity": []}',
        '{"identity": {"source": 5}}',
        '{"identity": {"source": [[]]}}',
        '{"identity": {"source": [5]}}',
        "[" * 100_000,
        '{"identity": {"source": [["/data/x.hdf5", ' + "9" * 5000 + "]]}}",
    ],
)
def test_a_neighbours_damaged_manifest_stops_no_other_run(tmp_path, capsys, damage):
    build(tmp_path, "neighbour")
    (manifest,) = tmp_path.glob("*/store.json")
    manifest.write_text(damage)
    before = {file: file.read_bytes() for file in manifest.parent.iterdir()}
    store = build(tmp_path)
    assert store.shapes == SHAPES
    said = capsys.readouterr().err
    assert str(manifest) in said
    assert "it is left alone, and can be deleted" in said
    assert {file: file.read_bytes() for file in manifest.parent.iterdir()} == before
    assert [problem.file for problem in verify(tmp_path, progress=False).problems] == [
        str(manifest)
    ]


@pytest.mark.fault(2)
def test_a_full_disk_names_the_cache_and_leaves_the_others(tmp_path):
    build(tmp_path, "neighbour")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            build(tmp_path)
        except ValueError as error:
            told = f"the frame cache {tmp_path} cannot be written"
            os._exit(7 if told in str(error) and "another cache_dir" in str(error) else 8)
        except BaseException:
            os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: after[file] for file in before} == before
    assert {file.suffix for file in after.keys() - before.keys()} == {".lock"}
    assert len(list(tmp_path.glob("*/store.json"))) == 1
    build(tmp_path)
    assert len(list(tmp_path.glob("*/store.json"))) == 2


def test_an_older_cache_without_checksums_is_said_to_have_none(tmp_path):
    build(tmp_path)
    (manifest,) = tmp_path.glob("*/store.json")
    content = json.loads(manifest.read_text())
    del content["files"]
    manifest.write_text(json.dumps(content))
    (problem,) = verify(tmp_path, progress=False).problems
    assert problem.what == "holds no checksums"
    assert build(tmp_path).shapes == SHAPES
