"""The report of a run that trains, is stopped, fails or goes on: always there, never in the way."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import repeatable

import train
from callbacks.dashboard import ERROR_FILE, Dashboard
from callbacks.loggers import read_metrics
from callbacks.report import Report, read_run, write_report
from callbacks.summary import REPORT_FILE, RunSummary

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
    assert [status for status, _, _ in written] == ["running when written"] * 2 + ["finished"]
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


def test_a_disk_that_takes_neither_page_nor_traceback_stops_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any, file: Path, *rest: Any) -> None:
        (file.parents[1] / ERROR_FILE).mkdir(exist_ok=True)
        raise OSError(28, "no space left")

    monkeypatch.setattr("callbacks.report.write_report", fail)
    with pytest.warns(UserWarning, match="report failed .*no space left.*training goes on"):
        run = fit()
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_it_changes_nothing_in_training(here: Path) -> None:
    with_page = fit("--name", "with")
    without = fit("--name", "without", with_callback("callbacks.report.Report", enabled=False))
    assert not (without / REPORT_FILE).exists()
    assert json.loads((without / "summary.json").read_text())["report"] is None
    mine, theirs = (repeatable(run / "metrics.csv") for run in (with_page, without))
    assert mine == theirs


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


def plain_run(folder: Path, last_step: int = 12, **summary: Any) -> Path:
    """A folder with a row at every fourth step, three good checkpoints, and a summary."""
    rows = [f"{step},1.0" for step in range(4, last_step + 1, 4)]
    (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *rows, ""]))
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "checkpoints").mkdir()
    for step in (4, 8, 12):
        (folder / "checkpoints" / f"best-step{step:06d}.ckpt").touch()
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize(
    ("step", "status"), [(8, "ended without a summary"), (12, "finished"), (14, "finished")]
)
def test_the_summary_of_an_earlier_process_says_nothing_of_what_came_after(
    tmp_path: Path, step: int, status: str
) -> None:
    run = plain_run(tmp_path, status="finished", step=step, wall_s=6.0)
    record = read_run(run)
    assert record.status == status
    assert record.wall_s == (6.0 if status == "finished" else None)


def test_the_best_checkpoint_is_the_one_that_the_run_ranks_first(tmp_path: Path) -> None:
    run = plain_run(tmp_path, step=12, checkpoint="checkpoints/best-step000004.ckpt")
    assert read_run(run).best_step == 4
    assert read_run(run, best_checkpoint="checkpoints/best-step000008.ckpt").best_step == 8
    (run / "summary.json").unlink()
    assert read_run(run).best_step is None, "any of the three"
    for step in (4, 12):
        (run / "checkpoints" / f"best-step{step:06d}.ckpt").unlink()
    assert read_run(run).best_step == 8


def test_a_continued_run_shows_what_it_was_continued_with(tmp_path: Path) -> None:
    run = plain_run(tmp_path)
    for number in ("", *(f"_{n}" for n in range(2, 12))):
        (run / f"config{number}.yaml").write_text(f"seed: 0{number}\n")
    (run / "environment.json").write_text('{"python": "3.12"}')
    (run / "environment_2.json").write_text('{"python": "3.13"}')
    record = read_run(run)
    assert record.config == "seed: 0_11\n"
    assert record.environment == {"python": "3.13"}
    assert len(record.earlier) == 11
    assert record.earlier[0] == "config.yaml"
    assert record.earlier[-1] == "environment.json"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("media/index.json", '{"10": {"images": {"a": "b'),
        ("media/index.json", '{"10": []}'),
        ("summary.json", "[]"),
        ("summary.json", '{"step": "twelve"}'),
        ("environment.json", '{"started": "yesterday"}'),
        ("environment.json", '{"git": {"commit": 7}}'),
        ("metrics.csv", "step,val/loss\n4,much\n"),
        ("metrics.csv", "val/loss\n4\n"),
    ],
)
def test_a_damaged_file_is_named_with_a_way_out(tmp_path: Path, name: str, text: str) -> None:
    run = plain_run(tmp_path)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: is cut .* mend it or move it away"):
        read_run(run)


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(ValueError, match=r"caf\\udce9': is not a name in UTF-8; rename"):
        read_run(plain_run(folder))


def trainer_of(run: Path, **fields: Any) -> Any:
    """As much of a trainer as the report looks at."""
    ranking = ModelCheckpoint(monitor="val/loss")
    ranking.best_model_path = str(run / "checkpoints" / "best-step000004.ckpt")
    summary = RunSummary()
    summary.load_state_dict({"wall_s": 360_000.0})
    plain = {
        "default_root_dir": str(run),
        "is_global_zero": True,
        "fast_dev_run": False,
        "global_step": 12,
        "callbacks": [Dashboard(), summary],
        "checkpoint_callbacks": [ranking],
    }
    return SimpleNamespace(**(plain | fields))


@pytest.mark.parametrize("fields", [{"is_global_zero": False}, {"fast_dev_run": True}])
def test_other_processes_and_trials_write_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    module: Any = None
    run = plain_run(tmp_path)
    Report().on_fit_end(trainer_of(run, **fields), module)
    assert not (run / REPORT_FILE).exists()
    Report().on_fit_end(trainer_of(run), module)
    assert (run / REPORT_FILE).exists()


def test_an_error_before_the_first_step_leaves_no_page(tmp_path: Path) -> None:
    module: Any = None
    run = plain_run(tmp_path)
    Report().on_exception(trainer_of(run, global_step=0), module, ValueError())
    assert not (run / REPORT_FILE).exists()
    Report().on_exception(trainer_of(run), module, ValueError())
    assert data_of(run)["status"] == "stopped"


def test_what_training_knows_goes_before_what_a_summary_says(tmp_path: Path) -> None:
    module: Any = None
    run = plain_run(tmp_path, step=12, wall_s=5.0, checkpoint="checkpoints/best-step000012.ckpt")
    Report().on_fit_end(trainer_of(run), module)
    shown = data_of(run)
    assert any(fact.startswith("100 h") for fact in shown["facts"])
    assert shown["bestStep"] == 4


def test_a_reader_keeps_the_page_that_it_has_opened(tmp_path: Path) -> None:
    run = plain_run(tmp_path)
    write_report([read_run(run, "first")], run / REPORT_FILE)
    with (run / REPORT_FILE).open(encoding="utf-8") as opened:
        write_report([read_run(run, "second")], run / REPORT_FILE)
        assert '"status":"first"' in opened.read()
    assert data_of(run)["status"] == "second"


def test_half_a_page_of_a_killed_process_is_swept_away(tmp_path: Path) -> None:
    module: Any = None
    run = plain_run(tmp_path)
    (run / "report").mkdir()
    part = run / "report" / ".index.html.123.part"
    for is_first, left in ((False, [part.name]), (True, [])):
        part.touch()
        Report().setup(trainer_of(run, is_global_zero=is_first), module, "fit")
        assert [file.name for file in (run / "report").iterdir()] == left
