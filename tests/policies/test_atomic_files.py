import os
from pathlib import Path

import pytest
import torch

from callbacks.checkpoints import AtomicCheckpointIO
from policies.atomic_files import whole_file, write_atomically


def save_checkpoint(path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, "new"), save_checkpoint])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_end(
    tmp_path, monkeypatch, write
):
    """What a power cut would lose: the bytes behind a name, then the name."""
    done, sync, rename = [], os.fsync, Path.replace
    write(tmp_path / "file")
    before = (tmp_path / "file").stat().st_ino

    def fsync(handle):
        done.append(("on the disk", os.fstat(handle).st_ino))
        sync(handle)

    def replace(source, target):
        done.append(("renamed", source.stat().st_ino))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path / "file")
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert file != before
    assert done == [("on the disk", file), ("renamed", file), ("on the disk", folder)]


def test_a_text_is_replaced_whole_with_ordinary_permissions(tmp_path):
    file = tmp_path / "summary.json"
    write_atomically(file, "old")
    write_atomically(file, "new\r\n")
    (tmp_path / "plain").write_text("x")
    assert file.read_bytes() == b"new\r\n"
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "plain"}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "maps.parquet"
    file.write_text("old")

    def half_write():
        with whole_file(file) as temporary:
            temporary.write_text("half")
            assert file.read_text() == "old"
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        half_write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"maps.parquet": "old"}


def test_a_file_that_came_meanwhile_is_not_replaced_unasked(tmp_path):
    file = tmp_path / "demos.hdf5"

    def write_beside_another():
        with whole_file(file, overwrite=False) as temporary:
            temporary.write_text("ours")
            file.write_text("theirs")

    with pytest.raises(FileExistsError, match=r"demos\.hdf5 is there"):
        write_beside_another()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"demos.hdf5": "theirs"}
