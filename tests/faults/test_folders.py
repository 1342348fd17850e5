"""Output folders with odd names, in odd places, or none that can be written."""

import os
import subprocess
from pathlib import Path

import pytest
from toy_runs import exit_code, last, write_config

from callbacks.checkpoints import Checkpoint
from callbacks.run_folder import RunFolderError, create_run_folder, last_run_folder, point_last_at
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(19), pytest.mark.filterwarnings("ignore")]

ODD = (
    "with a space",
    "n\u00e4ive \u4e2d\u6587 \U0001f600",
    "quotes ' and \"",
    "#hash=1,b",
    "$HOME %s {step}",
    "-rf",
    "d" * 180,
)


def test_a_run_in_the_oddest_of_folders_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    best = {
        "class_path": "callbacks.checkpoints.Checkpoint",
        "init_args": {"monitor": "shout/loudness", "filename": "best=1-{step}-{val/loss:.3f}"},
    }
    write_config(tmp_path, callbacks=[{"class_path": "toy.Shout"}, best])
    home = " n\u00e4ive #'\"=1, $HOME {step} "
    words = ["fit", "-c", "toy.yaml", f"--output_dir={home}", "--name=a =1 (x) \U0001f600 {step}"]
    assert exit_code(*words, "--trainer.max_steps", "4") == 0
    assert exit_code(*words, "--trainer.max_steps", "8", "--ckpt_path", "last") == 0
    run = last_run_folder(home, "a =1 (x) \U0001f600 {step}")
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 8
    # A metric's name is a path when it has a slash; the file must stay in its folder.
    assert [
        file for file in run.rglob("best=1*.ckpt") if run / "checkpoints" not in file.parents
    ] == []


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_folders_like_others(tmp_path: Path, name: str) -> None:
    folder = create_run_folder(tmp_path / name, name)
    point_last_at(folder)
    assert last_run_folder(tmp_path / name, name) == folder


@pytest.mark.parametrize("name", ["\udcff", "a\ud800b", "x" * 300])
def test_names_that_no_disk_takes_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--name", name) in {1, 2}
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["toy.yaml"]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing", "x" * 300])
def test_a_place_that_cannot_be_written_is_noticed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    (tmp_path / "file").write_text("mine")
    words = ["fit", "-c", "toy.yaml", f"--output_dir={place}"]
    # A class that could not be made shows that the place is looked at before.
    assert exit_code(*words, "--data.init_args.fail", "too late") == 1
    said = capsys.readouterr().err
    assert "choose another place with --output_dir" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_system_that_is_only_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system to read only")
    try:
        monkeypatch.chdir(tmp_path)
        write_config(tmp_path)
        assert exit_code("fit", "-c", "toy.yaml", f"--output_dir={disk}") == 1
        said = capsys.readouterr().err
        assert "Read-only file system" in said
        assert "--output_dir" in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_metric_names_do_not_become_folders() -> None:
    name = Checkpoint(monitor="val/loss", filename="best-{val/loss:.3f}").format_checkpoint_name(
        {"val/loss": 0.5, "step": 1, "epoch": 0}  # pyright: ignore[reportArgumentType]
    )
    assert name == "best-0.500.ckpt"


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunFolderError, match="choose another place"):
        create_run_folder(tmp_path, "run")
    assert last(tmp_path).parent.name == "toy"
