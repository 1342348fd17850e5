"""The table of faults in docs/reliability.md holds: each row has tests, and the count is true."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "reliability.md"
N_ROWS = 26
LEAST_CASES = 60
HERE = Path(__file__).parent


def stated() -> dict[int, tuple[int, list[str]]]:
    """Return, for each row of the table, its number of cases and the files of its tests."""
    rows = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].isdigit():
            files = re.findall(r"`(tests/[\w/]+\.py)`", cells[4])
            rows[int(cells[0])] = (int(cells[3]), files)
    return rows


def test_the_table_has_every_row_and_its_tests_exist() -> None:
    rows = stated()
    assert sorted(rows) == list(range(1, N_ROWS + 1))
    for row, (_, files) in rows.items():
        assert files, f"row {row} names no test"
        for file in files:
            assert (ROOT / file).is_file(), f"row {row}: {file} does not exist"


def test_every_row_is_injected_as_often_as_the_table_says(request: pytest.FixtureRequest) -> None:
    collected = {Path(item.path) for item in request.session.items}
    if not set(HERE.rglob("test_*.py")) <= collected:
        pytest.skip("counts only when all of tests/faults is run")
    counts = Counter(
        mark.args[0]
        for item in request.session.items
        if HERE in Path(item.path).parents
        for mark in item.iter_markers("fault")
    )
    assert dict(counts) == {row: count for row, (count, _) in stated().items()}
    assert counts.total() >= LEAST_CASES
