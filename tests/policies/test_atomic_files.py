import pytest

from policies.atomic_files import whole_file, write_atomically


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
