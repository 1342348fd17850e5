"""The W&B run that is written without an account, read back with W&B's own tool."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))

from lightning.pytorch import Trainer
from toy import Shout, ToyData, ToyModule

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, WandbLog, read_metrics

VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_CACHE_DIR",
    "WANDB_DATA_DIR",
    "WANDB_DIR",
    "WANDB_MODE",
    "WANDB_SILENT",
)


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def train(folder: Path, log: WandbLog, steps: int, ckpt_path: Path | None = None) -> None:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        logger=[CsvLog(str(folder)), log],
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), Shout(at_start=True), ExactResume(), LastCheckpoint()],
    )
    trainer.fit(ToyModule(3, 2), ToyData(), ckpt_path=ckpt_path, weights_only=True)
    log.close()


def inspect(folder: Path) -> list[dict[str, Any]]:
    tool = Path(sys.executable).parent / "wandb"
    printed = subprocess.run(
        [str(tool), "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in printed.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_an_offline_run_holds_one_row_a_validation_and_is_continued_under_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train(tmp_path, WandbLog(project="toys", save_dir=str(tmp_path)), steps=8)
    said = [record.message for record in caplog.records if record.message.startswith("W&B")]
    assert len(said) == 1
    assert "offline (no WANDB_API_KEY); upload later with: wandb sync" in said[0]

    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = inspect(folder)
    rows = history(records)
    steps = [row["trainer/global_step"] for row in rows]
    assert steps == sorted(steps)
    validations = {row["trainer/global_step"]: row for row in rows if "val/loss" in row}
    assert list(validations) == [4, 8]
    for step, row in validations.items():
        # Numbers, times, picture and film of one validation are one row, under stable keys.
        assert row["shout/loudness"] == 0.1 * step
        assert row["diagnostics/errors"] == 0
        assert row["shout/square.caption"] == f"step {step}"
        for key in ("shout/square.path", "shout/film.path"):
            assert (folder / "files" / row[key]).stat().st_size > 0
    assert rows[0]["trainer/global_step"] == 0, "the look before training"
    assert sum(record["type"] == "exit" for record in records) == 1
    truth = {
        row["step"]: row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row
    }
    assert {step: row["val/loss"] for step, row in validations.items()} == {
        step: row["val/loss"] for step, row in truth.items()
    }

    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert folder.name.endswith(run_id)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        assert Path(os.environ[name]).is_relative_to(tmp_path)

    train(
        tmp_path,
        WandbLog(project="toys", save_dir=str(tmp_path)),
        12,
        tmp_path / "checkpoints" / "last.ckpt",
    )
    folders = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}*"))
    assert len(folders) == 2
    (second,) = set(folders) - {folder}
    later = history(inspect(second))
    assert [row["trainer/global_step"] for row in later] == [10, 12, 12]


@pytest.mark.parametrize(
    ("asked", "variables", "expected"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (True, {"WANDB_API_KEY": "k"}, "offline"),
        (False, {}, "online"),
        (False, {"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_a_key_decides_unless_the_user_does(
    asked: bool | None, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandbLog(offline=asked)._mode()[0] == expected


def test_somebody_who_logged_in_is_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert WandbLog()._mode()[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert WandbLog()._mode()[0] == "offline"


def test_a_server_that_is_down_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    log = WandbLog(save_dir=str(tmp_path), init_timeout_s=2)
    with pytest.warns(UserWarning, match="going on offline"):
        assert log.experiment is not None
    log.log_metrics({"loss": 1.0}, 3)
    log.close()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert history(inspect(folder))[0]["loss"] == 1.0
