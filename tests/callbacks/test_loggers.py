"""The CSV file is the record of truth: nothing lost, nothing twice, steps that only rise."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callbacks.loggers import CsvLog, read_metrics
from policies.interface import Findings

ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["loss", "val/loss", "rollout/mean, max", 'quoted "name"']),
        st.floats(allow_nan=False),
        min_size=1,
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, reopened_after=st.integers(0, 8))
def test_rows_are_read_back_exactly_whatever_columns_appear_when(
    tmp_path: Path, rows: list[dict[str, float]], reopened_after: int
) -> None:
    (tmp_path / "metrics.csv").unlink(missing_ok=True)
    log = CsvLog(str(tmp_path))
    for step, row in enumerate(rows):
        if step == reopened_after:
            log = CsvLog(str(tmp_path))
        log.log_metrics(row, step)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": step, **row} for step, row in enumerate(rows)
    ]


def test_rows_written_before_a_kill_are_there(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        log = CsvLog(str(tmp_path))
        for step in range(50):
            log.log_metrics({"loss": step / 3}, step)
        os._exit(9)  # no buffers are flushed on the way out
    os.waitpid(child, 0)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [
        step / 3 for step in range(50)
    ]


def test_rewinding_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    for step in (1, 2, 2, 3, 4):
        log.log_metrics({"loss": float(step)}, step)
    with log.path.open("a") as file:
        file.write("5,0.1")
    log = CsvLog(str(tmp_path))
    log.rewind(2)
    log.log_metrics({"loss": 9.0, "new": 1.0}, 3)
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 2, 3]
    assert read_metrics(log.path)[-1] == {"step": 3, "loss": 9.0, "new": 1.0}


def test_a_reader_leaves_a_line_that_is_being_written_alone_and_the_next_writer_drops_it(
    tmp_path: Path,
) -> None:
    CsvLog(str(tmp_path)).log_metrics({"loss": 1.0}, 1)
    file = tmp_path / "metrics.csv"
    with file.open("a") as stream:
        stream.write("2,0.1")
    before = file.read_bytes()
    assert [row["step"] for row in read_metrics(file)] == [1]
    assert file.read_bytes() == before
    CsvLog(str(tmp_path)).log_metrics({"loss": 3.0}, 3)
    assert read_metrics(file) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]


def test_logs_that_are_held_become_one_row(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    log.hold()
    log.log_metrics({"val/loss": 0.5}, 7)
    log.log_metrics({"epoch": 1.0}, 7)
    assert not log.path.exists()
    log.release({"rollout/success": 0.25}, Findings())
    assert len(read_metrics(log.path)) == 1
    log.release({}, Findings())
    assert len(read_metrics(log.path)) == 1, "nothing held, nothing written"


def test_what_is_held_when_the_run_breaks_off_is_not_lost(tmp_path: Path) -> None:
    log = CsvLog(str(tmp_path))
    log.hold()
    log.log_metrics({"val/loss": 0.5}, 7)
    log.finalize("failed")
    assert read_metrics(log.path)[0]["val/loss"] == 0.5


@pytest.mark.parametrize("text", ["", "step\n"])
def test_a_file_without_rows_is_continued(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    CsvLog(str(tmp_path)).log_metrics({"loss": 1.0}, 1)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "loss": 1.0}]
