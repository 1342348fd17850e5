"""The report of a run that trains, is stopped, fails or goes on: always there, never in the way."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

import train
from callbacks.loggers import read_metrics
from callbacks.report import Report, read_run, write_report
from callbacks.summary import REPORT_FILE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG: dict[str, Any] = {
    "name": "toy",
    "model": {"class_path": "toy.ToyModule"},
    "data": {"class_path": "toy.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 12,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "callbacks.checkpoints.Checkpoint",
                "init_args": {"monitor": "val/loss"},
            },
            {"class_path": "toy.Shout"},
        ],
    },
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds ``toy.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def with_callback(class_path: str, **arguments: Any) -> str:
    callback = {"class_path": class_path, "init_args": arguments}
    return f"--trainer.callbacks+={json.dumps(callback)}"


def fit(*words: str) -> Path:
    return train.main(["fit", "-c", "toy.yaml", *words]).run_folder


def stopped(*words: str) -> Path:
    with pytest.raises((SystemExit, RuntimeError)):
        train.main(["fit", "-c", "toy.yaml", *words])
    return (Path("outputs") / "toy" / "last").resolve()


def data_of(run: Path) -> dict[str, Any]:
    page = (run / REPORT_FILE).read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["runs"][0]


def test_a_finished_run_has_everything_in_its_report(here: Path) -> None:
    run = fit()
    shown = data_of(run)
    assert shown["status"] == "finished"
    assert shown["checkpoints"] == [4, 8, 12]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["report"] == REPORT_FILE
    assert f"best-step{shown['bestStep']:06d}" in summary["checkpoint"]
    logged = {key for row in read_metrics(run / "metrics.csv") for key in row} - {"step"}
    assert shown["metrics"].keys() == logged
    assert "diagnostics/report_s" in logged
    for step in ("4", "8", "12"):
        kinds = shown["media"][step]
        assert all(kinds[kind] for kind in ("images", "videos", "tables"))
        assert all(file["id"] for kind in ("images", "videos") for file in kinds[kind].values())
    assert [file.name for file in (run / "report").iterdir()] == ["index.html"]


def test_the_page_during_training_has_the_validation_and_its_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, tuple[int, ...], int | None]] = []

    def note(records: Any, *rest: Any) -> None:
        written.append((records[0].status, records[0].checkpoints, records[0].best_step))

    monkeypatch.setattr("callbacks.report.write_report", note)
    run = fit()
    best = data_of_best(run)
    assert [status for status, _, _ in written] == ["running", "running", "finished"]
    assert [steps for _, steps, _ in written] == [(4,), (4, 8), (4, 8, 12)]
    assert written[0][2] == 4, "the first is the best so far"
    assert written[-1][2] == best


def data_of_best(run: Path) -> int:
    rows = [row for row in read_metrics(run / "metrics.csv") if "val/loss" in row]
    return int(min(rows, key=lambda row: row["val/loss"])["step"])


def test_a_run_that_is_stopped_says_so_and_goes_on_in_the_same_page(here: Path) -> None:
    run = stopped(with_callback("toy.SignalAt", step=6, number=int(signal.SIGTERM)))
    assert data_of(run)["status"] == "stopped"
    assert data_of(run)["checkpoints"] == [4]
    assert fit("--ckpt_path", "last") == run
    assert data_of(run)["status"] == "finished"
    assert data_of(run)["checkpoints"] == [4, 8, 12]


def test_an_error_of_the_page_stops_nothing_and_is_counted(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("callbacks.report.write_report", fail)
    with pytest.warns(UserWarning, match="report failed .*no space left.*training goes on"):
        run = fit()
    assert json.loads((run / "summary.json").read_text())["report"] is None
    errors = [
        row["diagnostics/errors"] for row in read_metrics(run / "metrics.csv") if "val/loss" in row
    ]
    assert errors == [0, 1, 2], "the third failure comes after the last row"
    assert (run / "diagnostic_errors.log").read_text().count("no space left") >= 3


def test_it_changes_nothing_in_training(here: Path) -> None:
    def numbers(run: Path) -> list[dict[str, float]]:
        rows = read_metrics(run / "metrics.csv")
        return [
            {key: value for key, value in row.items() if not key.startswith("diagnostics/")}
            for row in rows
        ]

    with_page = fit("--name", "with")
    without = fit("--name", "without", with_callback("callbacks.report.Report", enabled=False))
    assert not (without / REPORT_FILE).exists()
    assert json.loads((without / "summary.json").read_text())["report"] is None
    assert numbers(with_page) == numbers(without)


def test_a_validation_of_its_own_has_a_report(here: Path) -> None:
    run = fit()
    checkpoint = run / "checkpoints" / "last.ckpt"
    words = ["validate", "-c", "toy.yaml", "--ckpt_path", str(checkpoint)]
    shown = data_of(train.main(words).run_folder)
    assert shown["status"] == "finished"
    assert shown["checkpoints"] == [12]


def test_pictures_are_encoded_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rendering.report import embedding

    encoded: list[int] = []
    webp = embedding.webp

    def count(picture: bytes) -> bytes:
        encoded.append(len(picture))
        return webp(picture)

    monkeypatch.setattr(embedding, "webp", count)
    fit()
    assert len(encoded) == 3, "one picture at each of three checkpoints, four pages"


def test_a_killed_run_and_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/loss\n1,2.0\n2,")
    record = read_run(tmp_path)
    assert record.status == "ended without a summary"
    assert record.metrics == {"val/loss": {1: 2.0}}
    page = write_report([record], tmp_path / REPORT_FILE)
    assert (tmp_path / REPORT_FILE).stat().st_size == page.size_bytes
    with pytest.raises(ValueError, match=r"neither metrics.csv nor config.yaml; give a folder"):
        read_run(tmp_path / "report")


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_size_mib 0: must be above 0; enabled: false"):
        Report(max_size_mib=0)
