"""The W&B run that is written without an account, read back with W&B's own tool."""

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))

from lightning.pytorch import Callback, LightningModule, Trainer
from toy import Shout, ToyData, ToyModule

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import Dashboard, read_index
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, WandbLog, read_metrics
from callbacks.schedule import Diagnostic
from policies.checkpoint_files import read_checkpoint
from policies.interface import Findings, Table

pytestmark = pytest.mark.usefixtures("without_wandb_account")


def train(
    folder: Path,
    log: WandbLog,
    steps: int,
    ckpt_path: Path | None = None,
    *callbacks: Callback,
) -> None:
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
        callbacks=[Dashboard(), Shout(at_start=True), ExactResume(), LastCheckpoint(), *callbacks],
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
        # All that one validation found is one row, under stable keys.
        assert row["shout/loudness"] == 0.1 * step
        assert row["diagnostics/errors"] == 0
        assert row["shout/square.caption"] == f"step {step}"
        assert (row["shout/pitch.bins"], row["shout/pitch.values"]) == ([0, 0.5, 2], [3, step])
        for key in ("shout/square.path", "shout/film.path", "shout/words.path"):
            assert (folder / "files" / row[key]).stat().st_size > 0
    assert len([row for row in rows if "shout/words.path" in row]) == len([0, 4, 8])
    assert all("shout/loudness" in row for row in rows if "shout/words.path" in row)
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
    records = inspect(second)
    assert [row["trainer/global_step"] for row in history(records)] == [10, 12, 12]
    (arrays,) = [
        record["artifact"]
        for record in records
        if record["type"] == "artifact" and record["artifact"]["type"] == "arrays"
    ]
    assert arrays["name"] == f"shout.wave-{run_id}", "a version more, not another artifact"
    assert "step-12" in arrays["aliases"]


def digest(path: Path, algorithm: str) -> bytes:
    return hashlib.new(algorithm, path.read_bytes()).digest()


def test_each_checkpoint_keeps_a_table_and_arrays_of_its_own(tmp_path: Path) -> None:
    """What a later ``wandb sync`` uploads is in the run folder, and nothing writes to it again."""
    train(tmp_path, WandbLog(project="toys", save_dir=str(tmp_path)), steps=8)
    for file in tmp_path.glob("media/step_*/shout/wave.npz"):
        file.write_bytes(b"a resumed run is here")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = inspect(folder)
    tables = {
        row["trainer/global_step"]: row for row in history(records) if "shout/words.path" in row
    }
    assert list(tables) == [0, 4, 8]
    for step, row in tables.items():
        assert row["shout/words._type"] == "table-file"
        assert row["shout/words.log_mode"] == "IMMUTABLE"
        assert (row["shout/words.nrows"], row["shout/words.ncols"]) == (2, 4)
        file = folder / "files" / row["shout/words.path"]
        assert digest(file, "sha256").hex() == row["shout/words.sha256"]
        table = json.loads(file.read_text())
        assert table["columns"] == ["word", "step", "loudness", "heard"]
        assert table["data"] == [["hey", step, 0.1 * step, True], ["ho", step, None, False]]

    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    arrays = [artifact for artifact in artifacts if artifact["type"] == "arrays"]
    assert {artifact["name"] for artifact in arrays} == {f"shout.wave-{run_id}"}
    assert [set(artifact["aliases"]) for artifact in arrays] == [
        {"latest", f"step-{step}"} for step in (0, 4, 8)
    ]
    for step, artifact in zip((0, 4, 8), arrays, strict=True):
        (entry,) = artifact["manifest"]["contents"]
        assert entry["path"] == "wave.npz"
        staged = Path(entry["local_path"])
        assert base64.b64encode(digest(staged, "md5")).decode() == entry["digest"]
        with np.load(staged) as content:
            assert content["pressure"].tolist() == [step, step + 1, step + 2]
    staged = [
        Path(entry["local_path"])
        for artifact in artifacts
        for entry in artifact["manifest"]["contents"]
    ]
    assert all(file.is_relative_to(tmp_path / "wandb") for file in staged)


class Lost(Diagnostic):
    """Finds numbers that JSON does not know."""

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        cells = (("a", math.nan), ("b", -math.inf), ("c", None), ("d", 1.5))
        return Findings(
            scalars={"lost/nan": math.nan, "lost/inf": math.inf},
            tables={"lost/cells": Table(("name", "value"), cells)},
        )


def test_numbers_that_are_not_finite_are_logged_as_what_they_are(tmp_path: Path) -> None:
    train(tmp_path, WandbLog(project="toys", save_dir=str(tmp_path)), 4, None, Lost())
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    (row,) = [row for row in history(inspect(folder)) if "lost/nan" in row]
    assert (row["lost/nan"], row["lost/inf"]) == ("NaN", "Infinity")
    (row,) = [row for row in read_metrics(tmp_path / "metrics.csv") if "lost/nan" in row]
    assert math.isnan(row["lost/nan"])
    assert row["lost/inf"] == math.inf
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    kept = checkpoint["callbacks"][Dashboard.__qualname__]["latest"]
    assert not [key for key in kept if key.startswith("lost")]
    index = read_index(tmp_path / "media" / "index.json")
    table = json.loads(
        (tmp_path / index["4"]["tables"]["lost/cells"]).read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert table["rows"] == [["a", None], ["b", None], ["c", None], ["d", 1.5]]


def test_w_and_b_that_is_disabled_takes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tmp_path, WandbLog(save_dir=str(tmp_path)), steps=4)
    assert not list(tmp_path.glob("wandb/*run-*"))


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
