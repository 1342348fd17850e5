"""SIGKILL at any moment: whole checkpoints, a record without gaps, no rubbish left."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from kill_loop import TMPDIRS, kill_forks
from toy_runs import also, exit_code, forked, last, write_config

from callbacks.checkpoints import AtomicCheckpointIO, sweep_parts
from callbacks.loggers import read_metrics
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(1), pytest.mark.filterwarnings("ignore")]


def save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)  # torch's threads do not survive a fork
    payload = {"weight": torch.zeros(200_000)}
    for epoch in range(10**9):
        AtomicCheckpointIO().save_checkpoint(
            {"state_dict": payload, "epoch": epoch}, folder / f"{epoch % 3}.ckpt"
        )


def test_kill_9_while_writing_leaves_only_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's own writer tears files when TMPDIR is on another file system.
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    processes = multiprocessing.get_context("fork")
    chance = random.Random(0)
    kills = interrupted = 0
    while kills < 6 or (not interrupted and kills < 60):
        kills += 1
        writer = processes.Process(target=save_for_ever, args=(tmp_path,), daemon=True)
        writer.start()
        started = time.monotonic()
        while not (tmp_path / "0.ckpt").exists() and time.monotonic() - started < 60:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        writer.kill()
        writer.join()
        files = list(tmp_path.glob("*.ckpt"))
        assert files
        for file in files:
            assert len(read_checkpoint(file)["state_dict"]["weight"]) == 200_000
        interrupted += bool(sweep_parts(tmp_path))
        assert {file.suffix for file in tmp_path.iterdir()} == {".ckpt"}
    assert interrupted, f"none of {kills} kills hit a write: the test proves nothing"


@pytest.mark.parametrize("tmpdir", TMPDIRS)
def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path: Path, tmpdir: str) -> None:
    kills = kill_forks(tmp_path, 5, tmpdir)
    assert kills.kills == 5
    assert kills.faults == []
    assert kills.in_a_write >= 2, "three were aimed at one"


def test_a_kill_in_the_next_batch_finds_the_checkpoint_that_was_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    words = ["fit", "-c", "toy.yaml"]
    words += [also("callbacks.checkpoints.LastCheckpoint", every_n_train_steps=5)]
    words += [also("toy_runs.KillAt", step=5)]
    words += ["--trainer.limit_val_batches", "0"]

    def run() -> int:
        torch.set_num_threads(1)  # torch's threads do not survive a fork
        return exit_code(*words)

    assert forked(run, tmp_path / "said") == -signal.SIGKILL
    checkpoint = read_checkpoint(last(tmp_path) / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert read_metrics(last(tmp_path) / "metrics.csv")[-1]["step"] == 5


def test_the_next_start_sweeps_the_whole_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    write_config(tmp_path)
    assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4") == 0
    run = last(tmp_path).resolve()
    parts = [
        run / ".metrics.csv.123.part",
        run / "media" / ".index.json.123.part",
        run / "checkpoints" / ".last.ckpt.part",
    ]
    for part in parts:
        part.write_text("half a file")
    before = (run / "config.yaml").read_bytes()
    assert exit_code("fit", "-c", "toy.yaml", "--ckpt_path", "last") == 0
    assert not list(run.rglob(".*.part"))
    assert (run / "config.yaml").read_bytes() == before
