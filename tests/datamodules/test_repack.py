"""What ``repack`` keeps, refuses and leaves behind, and what ``verify`` compares."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_hdf5 import packed_zeros, write_aloha, write_demos

from datamodules.convert import build_beside
from datamodules.errors import DatasetError
from datamodules.repack import repack
from datamodules.scan import scan_hdf5
from datamodules.verify import report, verify, write_list


def repacked(folder: Path, write) -> tuple[h5py.File, h5py.File]:
    with h5py.File(folder / "source.hdf5", "w") as file:
        write(file)
    made = repack(folder / "source.hdf5", folder / "made.hdf5", progress=False)
    return h5py.File(folder / "source.hdf5"), h5py.File(made.path)


def test_rows_that_come_later_hold_the_same_fill_value(tmp_path):
    def write(file):
        options = {"maxshape": (None,), "chunks": (4,)}
        file.create_dataset("text", data=np.array([b"abcdefg"], "S16"), **options)
        file.create_dataset("number", data=np.ones(2, "i4"), fillvalue=7, **options)

    for file in repacked(tmp_path, write):
        file.close()
    with h5py.File(tmp_path / "made.hdf5", "a") as file:
        for name in file:
            file[name].resize((3,))
        assert file["text"][:].tolist() == [b"abcdefg", b"", b""]
        assert file["number"][:].tolist() == [1, 1, 7]


def test_a_text_as_fill_value_is_refused_by_its_name(tmp_path):
    def write(file):
        made = file.create_dataset("plain", data=np.array([1], "i4"))
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((4,))
        plist.set_fill_value(np.array(b"none", "V4"))
        space = h5py.h5s.create_simple((1,), (h5py.h5s.UNLIMITED,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.py_create(np.dtype("V4")), space, plist)
        assert made.shape == (1,)

    source, made = repacked(tmp_path, write)
    assert made["x"].fillvalue.tobytes() == source["x"].fillvalue.tobytes() == b"none"


def rows_of_varying_length(file):
    rows = file.create_dataset("rows", (3,), h5py.vlen_dtype("f4"))
    rows[0] = np.array([1, np.nan], "f4")
    rows[2] = np.array([2], "f4")
    file.create_dataset("one", (1,), h5py.vlen_dtype("u1"))[0] = np.arange(3, dtype="u1")
    one_nan = np.array([np.array([1, np.nan]), np.array([3.0])], object)
    file.attrs.create("ragged", one_nan, dtype=h5py.vlen_dtype("f8"))
    file.attrs["nan"] = np.nan


def empty_and_never_written(file):
    file.create_dataset("grows", (0, 3), "f4", maxshape=(None, 3))
    file.create_dataset("labels", (0,), h5py.string_dtype(), maxshape=(None,))
    file.create_dataset("never", (100,), "f4")
    file.create_dataset("never_chunked", (100,), "f4", chunks=(10,), fillvalue=3)


def latin_1_names(file):
    h5py.h5d.create(file.id, b"caf\xe9", h5py.h5t.STD_I32LE, h5py.h5s.create(h5py.h5s.SCALAR))
    file[b"caf\xe9"][()] = 5
    file[b"gro\xdf/x"] = np.ones(3)
    file.attrs.create("place", b"caf\xe9", dtype=h5py.string_dtype("utf-8"))


def ordered(file):
    group = file.create_group("g", track_order=True)
    for name in "zyxab":
        group[name] = np.ones(2)
    for name in "zyx":
        group.attrs[name] = 1


@pytest.mark.parametrize(
    "write", [rows_of_varying_length, empty_and_never_written, latin_1_names, ordered]
)
def test_what_is_valid_is_repacked_in_its_order(tmp_path, write):
    source, made = repacked(tmp_path, write)

    def described(file: h5py.File) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        waiting: list[h5py.Group] = [file]
        while waiting:
            group = waiting.pop()
            for name in group:
                one = group[name]
                found.append((group.name, name, repr(dict(one.attrs)), type(one)))
                if isinstance(one, h5py.Group):
                    waiting.append(one)
                else:
                    found.append((one.shape, one.maxshape, one.dtype, repr(one[()])))
        return [*found, (repr(dict(file.attrs)),)]

    assert described(source) == described(made)
    assert len(described(made)) > 3
    assert verify(tmp_path / "made.hdf5", progress=False).problems == []


def test_bits_that_count_and_chunks_that_were_never_written_stay(tmp_path):
    def write(file):
        kind = h5py.h5t.STD_I16LE.copy()
        kind.set_precision(12)
        space = h5py.h5s.create_simple((40,))
        made = h5py.h5d.create(file.id, b"bits", kind, space)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(40, dtype="i2"))
        file.create_dataset("sparse", (10**6,), "f4", chunks=(1000,), maxshape=(None,))
        file["sparse"][5000:5010] = 1

    source, made = repacked(tmp_path, write)
    assert made["bits"].id.get_type().get_precision() == 12
    assert made["sparse"].id.get_num_chunks() == source["sparse"].id.get_num_chunks() == 1
    assert made["sparse"][5009:5011].tolist() == [1, 0]


def test_references_are_refused_for_what_they_are(tmp_path):
    def write(file):
        file["t"] = np.arange(4.0)
        file["x"] = np.ones((4, 2))
        file["t"].make_scale("time")
        file["x"].dims[0].attach_scale(file["t"])

    with pytest.raises(DatasetError, match="holds references to places in this file") as error:
        repacked(tmp_path, write)
    assert "damaged" not in str(error.value)
    assert "@REFERENCE_LIST" in str(error.value)


def test_only_pictures_get_a_chunk_each(tmp_path):
    def write(file):
        file["frames"] = np.ones((5, 4, 4, 3), np.uint8)
        file["jpeg"] = np.ones((5, 5000), np.uint8)
        file["poses"] = np.ones((500, 2, 2))

    _, made = repacked(tmp_path, write)
    assert made["frames"].chunks == (1, 4, 4, 3)
    assert made["jpeg"].chunks == (1, 5000)
    assert made["poses"].chunks == (500, 2, 2)


@pytest.mark.fault(23)
@pytest.mark.parametrize("key", ["demo_0/observations/qpos", "demo_0/observations/image"])
def test_a_chunk_that_stores_more_than_it_declares_is_not_unpacked(tmp_path, key):
    path = write_demos(tmp_path / "d.hdf5")
    with h5py.File(path, "a") as file:
        shape, kind = file[key].shape, file[key].dtype
        del file[key]
        made = file.create_dataset(key, shape, kind, chunks=shape, compression="gzip")
        made.id.write_direct_chunk((0,) * len(shape), packed_zeros(96))
    (problem,) = scan_hdf5(path).problems
    assert (problem.file, problem.key) == (str(path), f"/{key}")
    assert f"stores {len(packed_zeros(96))} bytes for the chunk" in problem.what
    with pytest.raises(DatasetError, match="bytes for the chunk"):
        repack(path, tmp_path / "out.hdf5", progress=False)


def test_values_that_cannot_be_packed_are_no_bomb(tmp_path):
    path = write_demos(tmp_path / "d.hdf5", (3,))
    noise = np.random.default_rng(0).integers(0, 256, (3, 300, 300, 3), np.uint8)
    with h5py.File(path, "a") as file:
        del file["demo_0/observations/image"]
        options = {"chunks": (1, 300, 300, 3), "compression": "gzip", "fletcher32": True}
        made = file.create_dataset("demo_0/observations/image", data=noise, **options)
        assert made.id.get_storage_size() > noise.nbytes
    assert scan_hdf5(path).problems == ()


def test_a_killed_run_leaves_nothing_for_long_and_loses_nothing(tmp_path):
    target = tmp_path / "data"
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".data.{killed.pid}.part").mkdir()
    (tmp_path / f".data.{killed.pid}.old").mkdir()
    (tmp_path / f".data.{killed.pid}.old" / "film.mp4").write_bytes(b"the only copy")
    running = tmp_path / f".data.{os.getppid()}.part"
    running.write_bytes(b"of another process")
    with pytest.raises(ValueError, match="exists"):
        build_beside(target, lambda building: None, False, lambda there: True)
    assert (target / "film.mp4").read_bytes() == b"the only copy"
    assert sorted(tmp_path.iterdir()) == sorted([running, target])


def test_a_folder_with_its_list_of_checksums_can_be_replaced(tmp_path):
    folder = write_aloha(tmp_path / "a", lengths=(3,))
    target = repack(folder, tmp_path / "b", progress=False).path
    write_list(target, progress=False)
    repack(folder, target, overwrite=True, progress=False)
    assert verify(target, progress=False).listed is None


def hub_snapshot(root: Path) -> Path:
    snapshot = root / "datasets--user--films" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1234").write_bytes(b"a film")
    (snapshot / "film.mp4").symlink_to("../../blobs/1234")
    return snapshot


def test_a_snapshot_of_the_hub_is_listed_and_compared(tmp_path):
    snapshot = hub_snapshot(tmp_path)
    write_list(snapshot, progress=False)
    found = verify(snapshot, progress=False)
    assert (found.listed, found.problems) == (1, [])
    (snapshot.parents[1] / "blobs" / "1234").write_bytes(b"a lilm")
    (problem,) = verify(snapshot, progress=False).problems
    assert problem.file == str(snapshot / "film.mp4")


@pytest.mark.parametrize("name", [b"new\nline", b"caf\xe9"])
def test_names_that_no_line_holds_are_refused(tmp_path, name):
    (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    with pytest.raises(DatasetError, match="rename it") as error:
        write_list(tmp_path, progress=False)
    str(error.value).encode()
    assert len(list(tmp_path.iterdir())) == 1


def test_links_out_of_a_data_set_are_not_listed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"key")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "film.mp4").symlink_to(secret)
    with pytest.raises(DatasetError, match="is a link out of"):
        write_list(folder, progress=False)


def test_attributes_are_read_and_those_without_a_checksum_counted(tmp_path):
    def write(file):
        file["x"] = np.ones(3)
        file["x"].attrs["task"] = "push"
        file["x"].attrs["unit"] = np.bytes_("px" * 50)

    for file in repacked(tmp_path, write):
        file.close()
    path = tmp_path / "made.hdf5"
    assert "1 HDF5 attributes of varying length" in report(verify(path, progress=False))
    content = bytearray(path.read_bytes())
    content[content.index(b"pxpxpx")] ^= 4
    path.write_bytes(content)
    assert verify(path, progress=False).problems
