"""The runner of the benchmarks: what it runs is there, and its table says what was measured."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
runner = import_module("benchmarks.__main__")


def test_every_comparison_is_a_file_and_every_row_has_one():
    names = {comparison.name for comparison in runner.COMPARISONS}
    assert {row.comparison for row in runner.ROWS} == names
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in names)


def test_the_table_holds_what_the_result_files_hold():
    page = runner.render()
    for row in runner.ROWS:
        (line,) = (
            each
            for each in page.splitlines()
            if each.startswith(f"| {row.what} | {row.unit} |")
            and row.target in each
            and row.peer in each
        )
        file = runner.RESULTS / f"{row.comparison}.json"
        if not file.is_file():
            assert line.endswith("| not run |")
            continue
        measured = row.read(json.loads(file.read_text()))
        assert measured.ours.low <= measured.ours.median <= measured.ours.high
        assert ("**no**" in line) != row.is_met(measured.number)
        assert measured.ours.text() in line


def test_the_page_in_the_repository_is_the_one_that_is_rendered():
    ends = "## When"
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert page.partition(ends)[0] == runner.render().partition(ends)[0]


def test_every_miss_says_its_floor_and_what_is_extrapolated_says_so():
    page = runner.render()
    table, _, rest = page.partition("## Missed")
    missed = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if "**no**" in line]
    said = [line for line in rest.splitlines() if line.startswith("- ")]
    assert [line[2:].split(":")[0] for line in said] == missed
    assert all("floor" in line for line in said)
    (wide,) = (line for line in table.splitlines() if line.startswith("| landscape of 100 x 100"))
    assert "four times the measured 50 x 50 grid" in wide


def test_the_share_of_diagnostics_is_that_of_the_whole_run(tmp_path):
    share = import_module("benchmarks.diagnostics_share")
    (tmp_path / "summary.json").write_text(
        json.dumps({"step": 20, "wall_s": 90.0, "diagnostics/share": 0.2, "diagnostics/a_s": 4.0})
    )
    (tmp_path / "environment.json").write_text(
        json.dumps({"started": "2026-01-02T03:04:05", "git": {"commit": "0123456789"}})
    )
    (tmp_path / "metrics.csv").write_text(
        "step,diagnostics/a_s,diagnostics/b_s\n0,1.5,\n10,2,3\n20,4,\n"
    )
    found = share.measured(tmp_path)
    assert found["seconds"] == {"a": 7.5, "b": 3.0}
    assert found["share"] == 0.2
    assert (found["date"], found["commit"]) == ("2026-01-02", "0123456")


def test_a_missed_target_is_said(tmp_path, monkeypatch):
    found = json.loads((runner.RESULTS / "activation_reads.json").read_text())
    found["ours"]["read_amplification"] = 1.6
    (tmp_path / "activation_reads.json").write_text(json.dumps(found))
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    page = runner.render()
    assert "| 1.6 | at most 1.5 | **no** |" in page
    not_run = [line for line in page.splitlines() if line.endswith("| not run |")]
    assert len(not_run) == len(runner.ROWS) - 1


def test_what_is_not_given_is_left_out_and_its_result_stays(capsys):
    (sae,) = (each for each in runner.COMPARISONS if each.name == "sae_step")
    before = (runner.RESULTS / "sae_step.json").read_bytes()
    assert runner.run(sae, {"peers_path": None}, quick=False)
    assert "give --peers_path" in capsys.readouterr().out
    assert (runner.RESULTS / "sae_step.json").read_bytes() == before


@pytest.mark.slow
def test_a_quick_run_runs_and_keeps_nothing():
    before = {file: file.read_bytes() for file in sorted(runner.RESULTS.iterdir())}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--only", "landscape_drawing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "benchmarks.landscape_drawing --rounds 1" in done.stdout
    assert {file: file.read_bytes() for file in sorted(runner.RESULTS.iterdir())} == before


def test_a_comparison_that_fails_is_said(monkeypatch, capsys):
    broken = runner.Comparison("landscape_drawing", (("--no_such_option",),))
    assert not runner.run(broken, {}, quick=True)
    assert "landscape_drawing: failed" in capsys.readouterr().err


def test_the_model_of_scaling_follows_its_formula():
    scaling = import_module("benchmarks.scaling")
    counted = {"gflop_a_sample": 10.0, "batch_size": 10, "gradient_bytes": 10**8}
    rows = {row["gpus"]: row for row in scaling.model(counted)}
    assert rows[1]["sent_mb"] == 0
    assert rows[1]["links"]["NVLink"]["efficiency"] == [1.0, 1.0]
    assert rows[2]["sent_mb"] == pytest.approx(100)
    assert rows[64]["sent_mb"] == pytest.approx(2 * 63 / 64 * 100)
    # 100 GFLOP at 100 TFLOP/s; 196.875 MB at 50 GB/s and 126 messages of 10 us.
    assert rows[64]["computing_ms"] == pytest.approx(1.0)
    link = rows[64]["links"]["InfiniBand 400 Gb/s"]
    assert link["communication_ms"] == pytest.approx(3.9375 + 1.26)
    assert link["step_ms"] == pytest.approx([1 + 5.1975 - 2 / 3, 1 + 5.1975])
    assert "NVLink" not in rows[64]["links"]


def test_the_note_on_scaling_holds_what_was_counted():
    found = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())
    text = (ROOT / "docs/scaling.md").read_text()
    for each in found["counted"].values():
        assert each["2 processes"]["bytes_a_step"] == [each["gradient_bytes"]]
        assert f"{each['gradient_bytes']:,} B" in text
    scaling = import_module("benchmarks.scaling")
    for table in scaling.tables(found["counted"], found["modelled"]).split("\n\n"):
        assert table in text
