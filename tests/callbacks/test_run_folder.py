"""Run folders: one for each run, found again, never shared."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from callbacks.run_folder import (
    RunFolderError,
    create_run_folder,
    last_run_folder,
    point_last_at,
    write_beside,
)

NOON = datetime(2026, 3, 1, 12, 0, 0)


def test_last_is_a_relative_link_to_the_newest_run(tmp_path: Path) -> None:
    for _ in range(2):
        newest = create_run_folder(tmp_path / "a", "naïve run", started=NOON)
        point_last_at(newest)
    link = tmp_path / "a" / "naïve run" / "last"
    assert os.readlink(link) == newest.name
    (tmp_path / "a").rename(tmp_path / "b")
    found = last_run_folder(tmp_path / "b", "naïve run")
    assert found == tmp_path / "b" / "naïve run" / newest.name


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../../etc", "a\\b", "a\nb", "a\0"])
def test_names_cannot_leave_the_output_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="is not a folder name"):
        create_run_folder(tmp_path / "out", name)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="choose another place with --output_dir"):
        create_run_folder(tmp_path / "file", "demo")


def test_a_missing_last_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no earlier run of this name"):
        last_run_folder(tmp_path, "demo")


def test_a_folder_in_the_way_of_last_is_not_deleted(tmp_path: Path) -> None:
    folder = create_run_folder(tmp_path, "demo")
    (folder.parent / "last").mkdir()
    with pytest.raises(RunFolderError, match="move it away"):
        point_last_at(folder)
    assert sorted(file.name for file in folder.parent.iterdir()) == sorted([folder.name, "last"])


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    first = write_beside(tmp_path / "config.yaml", "a: 1")
    assert write_beside(tmp_path / "config.yaml", "a: 1") == first
    assert write_beside(tmp_path / "config.yaml", "a: 2").name == "config_2.yaml"
    assert write_beside(tmp_path / "config.yaml", "a: 2").name == "config_2.yaml"
    assert first.read_text() == "a: 1"
