"""What a run holds is in each validation's row."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from toy import Shout, ToyData, ToyModule

from callbacks.dashboard import Dashboard
from callbacks.loggers import CsvLog, read_metrics
from callbacks.resources import GIB, MIB, Resources

N_FILES = 7
SIZE_MIB = 96


class Hold(Callback):
    """Holds, from the second validation on, what ``take`` returns."""

    def __init__(self, take: Callable[[], Any]) -> None:
        self.take = take
        self.held: list[Any] = []
        self.n_validations = 0

    def on_validation_start(self, trainer, pl_module):
        self.n_validations += 1
        if self.n_validations == 2:
            self.held.append(self.take())


def rows_of(folder: Path, *callbacks: Callback) -> list[dict]:
    log = CsvLog(str(folder))
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        logger=[log],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, Dashboard()],
    )
    trainer.fit(ToyModule(3, 2), ToyData())
    return [row for row in read_metrics(log.path) if "resources/memory_mib" in row]


def test_files_that_stay_open_show(tmp_path: Path) -> None:
    hold = Hold(lambda: [(tmp_path / str(n)).open("w") for n in range(N_FILES)])
    before, after = rows_of(tmp_path, Resources(), hold)
    assert after["resources/open_files"] - before["resources/open_files"] == N_FILES
    for file in hold.held[0]:
        file.close()


def test_memory_shows_and_whose_it_is(tmp_path: Path) -> None:
    before, after = rows_of(tmp_path, Resources(), Hold(lambda: b"\1" * SIZE_MIB * MIB))
    grown_mib = after["resources/memory_training_mib"] - before["resources/memory_training_mib"]
    assert grown_mib == pytest.approx(SIZE_MIB, abs=24)
    for row in (before, after):
        assert row["resources/memory_mib"] == pytest.approx(
            row["resources/memory_training_mib"] + row["resources/memory_children_mib"]
        )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
@pytest.mark.parametrize("leave", ["holes", "cycle"])
def test_what_diagnostics_left_behind_is_given_back(tmp_path: Path, leave: str) -> None:
    """What only a cycle holds, and what lies between blocks that stay."""
    take = {"holes": leave_holes, "cycle": leave_cycle}[leave]
    before, after = rows_of(tmp_path, Hold(take), Shout(), Resources())
    grown_mib = after["resources/memory_training_mib"] - before["resources/memory_training_mib"]
    assert grown_mib < SIZE_MIB / 3


def leave_holes() -> list[bytes]:
    blocks = [bytes([n % 256]) * 1024 for n in range(SIZE_MIB * 1024)]
    return blocks[::100]


def leave_cycle() -> None:
    cycle: list[Any] = [b"\1" * SIZE_MIB * MIB]
    cycle.append(cycle)


def test_what_the_run_started_counts(tmp_path: Path) -> None:
    code = f"held = b'1' * {SIZE_MIB * MIB}; print(flush=True); input()"

    def start() -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        return child

    hold = Hold(start)
    try:
        before, after = rows_of(tmp_path, Resources(), hold)
    finally:
        for child in hold.held:
            child.communicate(b"\n")
    assert after["resources/processes"] - before["resources/processes"] == 1
    grown_mib = after["resources/memory_children_mib"] - before["resources/memory_children_mib"]
    assert SIZE_MIB < grown_mib < SIZE_MIB + 24


def test_a_disk_that_fills_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 4))
    with pytest.warns(UserWarning, match=r"0\.25 GiB left; make room") as warned:
        rows = rows_of(tmp_path, Resources())
    assert [row["resources/disk_free_gib"] for row in rows] == [0.25, 0.25]
    assert sum("GiB left" in str(one.message) for one in warned) == 1


def test_room_is_that_of_the_run_folder(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = rows_of(tmp_path, Resources(min_free_gib=0))
    free_gib = shutil.disk_usage(tmp_path).free / GIB
    assert [row["resources/disk_free_gib"] for row in rows] == pytest.approx([free_gib] * 2, abs=2)
    assert not [one for one in recwarn if "GiB left" in str(one.message)]


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_free_gib -1: must not be negative"):
        Resources(min_free_gib=-1)
