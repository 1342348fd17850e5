"""A disk that fills up: one clear error, and what was written before stays."""

import subprocess
from pathlib import Path

import pytest
import torch
from toy_runs import also, errors_in, exit_code, forked, last, write_config

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.loggers import CsvLog, read_metrics
from callbacks.run_folder import RunFolderError, write_beside
from policies.checkpoint_files import CheckpointError, read_checkpoint

pytestmark = [pytest.mark.fault(2), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_reason_is_told_and_the_older_checkpoint_stays(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.ckpt"
    content = {"state_dict": {"weight": torch.ones(50_000)}, "epoch": 1}
    AtomicCheckpointIO().save_checkpoint(content, path)
    before = path.read_bytes()

    def save() -> int:
        with pytest.raises(CheckpointError, match=r"a\.ckpt: cannot be written \(File too large"):
            AtomicCheckpointIO().save_checkpoint({**content, "epoch": 2}, path)
        return 0

    said = tmp_path / "said"
    assert forked(save, said, int(share * len(before))) == 0, said.read_text()
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.ckpt", "said"}


def test_rows_are_whole_and_the_file_is_named(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    for step in range(20):
        log.log_metrics({"loss": step / 3}, step)
    before = log.path.read_bytes()

    def more() -> int:
        with pytest.raises(RunFolderError, match=r"metrics\.csv: cannot be written \(.*make room"):
            log.log_metrics({"loss": 7.0}, 20)
        with pytest.raises(RunFolderError, match=r"metrics\.csv: cannot be written"):
            log.log_metrics({"loss": 7.0, "another": 1.0}, 20)
        return 0

    said = tmp_path / "said"
    # Five bytes of the next row would fit.
    assert forked(more, said, len(before) + 5) == 0, said.read_text()
    assert log.path.read_bytes() == before
    assert len(read_metrics(log.path)) == 20
    log.log_metrics({"loss": 7.0}, 20)
    assert len(read_metrics(log.path)) == 21


def test_notes_of_a_run_name_their_file(tmp_path: Path) -> None:
    def note() -> int:
        with pytest.raises(RunFolderError, match=r"config\.yaml: cannot be written"):
            write_beside(tmp_path / "config.yaml", "a: 1\n" * 100)
        return 0

    assert forked(note, tmp_path / "said", 50) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["said"]


@pytest.mark.parametrize("kind", ["checkpoint", "media"])
def test_a_run_on_a_full_disk_ends_in_one_error_and_goes_on_with_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4") == 0
    run = last(tmp_path).resolve()
    checkpoint = run / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    words = ["fit", "-c", "toy.yaml", "--ckpt_path", "last"]
    said = tmp_path / "said"
    if kind == "media":
        # Nothing but the diagnostic writes as much: its arrays hit the limit, nothing else does.
        size = 4 * max(file.stat().st_size for file in run.rglob("*") if file.is_file())
        words += [also("toy_runs.Large", n_bytes=2 * size)]
        assert forked(lambda: exit_code(*words), said, size) == 0, said.read_text()
        rows = read_metrics(run / "metrics.csv")
        assert max(row.get("diagnostics/errors", 0) for row in rows) >= 1
        assert read_checkpoint(checkpoint)["global_step"] == 12
        return
    code = forked(lambda: exit_code(*words), said, len(before) // 2)
    assert code == 1, said.read_text()
    (error,) = errors_in(said.read_text())
    assert "last.ckpt: cannot be written (File too large)" in error
    assert checkpoint.read_bytes() == before
    assert read_metrics(run / "metrics.csv")[-1]["step"] >= 4
    assert exit_code(*words) == 0
    assert read_checkpoint(checkpoint)["global_step"] == 12


def test_a_small_file_system_that_fills_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        io = AtomicCheckpointIO()
        weight = torch.ones(60_000)
        io.save_checkpoint({"state_dict": {"weight": weight}, "epoch": 1}, disk / "a.ckpt")
        with pytest.raises(CheckpointError, match="No space left on device"):
            io.save_checkpoint({"state_dict": {"weight": weight}, "epoch": 2}, disk / "b.ckpt")
        assert [file.name for file in disk.iterdir()] == ["a.ckpt"]
        assert read_checkpoint(disk / "a.ckpt")["epoch"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
