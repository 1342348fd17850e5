"""Two processes that want one run folder: each gets its own, or one is told."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from toy_runs import ROOT, exit_code, last, write_config

from callbacks.run_folder import RunFolderError, RunLock, create_run_folder

pytestmark = [pytest.mark.fault(20), pytest.mark.filterwarnings("ignore")]

NOON = datetime(2026, 3, 1, 12, 0, 0)


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(
            pool.map(lambda _: create_run_folder(tmp_path, "demo", started=NOON), range(24))
        )
    assert len(set(folders)) == 24
    assert min(folders) == tmp_path / "demo" / "2026-03-01_12-00-00"


def test_a_second_process_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)

    def other_process() -> int:
        child = os.fork()
        if child == 0:
            try:
                RunLock(tmp_path)
            except RunFolderError:
                os._exit(3)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert other_process() == 3
    lock.release()
    assert other_process() == 0


def test_a_run_that_is_being_written_cannot_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4") == 0
    run = last(tmp_path).resolve()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    code = "import sys; sys.path.insert(0, sys.argv[2]); from callbacks.run_folder import *\n"
    code += "from pathlib import Path; lock = RunLock(Path(sys.argv[1])); print(1, flush=True)\n"
    other = subprocess.Popen(
        [sys.executable, "-c", code + "sys.stdin.read()", str(run), str(ROOT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    capsys.readouterr()
    assert exit_code("fit", "-c", "toy.yaml", "--ckpt_path", "last") == 1
    said = capsys.readouterr().err
    assert "another process is still writing this run" in said
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    other.communicate(b"")
    assert exit_code("fit", "-c", "toy.yaml", "--ckpt_path", "last") == 0
