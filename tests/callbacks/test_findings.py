"""Findings that no logger could take are refused where they are made."""

import math
from typing import Any

import numpy as np
import pytest
import wandb

from callbacks.dashboard import FILE_KEY, MAX_BINS, MAX_ROWS, check_findings, file_name
from policies.interface import Findings, Table


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        (Findings(scalars={"a": None}), "scalar 'a': None is no number"),  # pyright: ignore[reportArgumentType]
        (Findings(scalars={"a": 1.0}, histograms={"a": ((0, 1), (1,))}), "scalars and in histog"),
        (Findings(tables={"a": Table(("n",), ((1,),) * 10_001)}), "10001 rows"),
        (Findings(tables={"../a": Table((), ())}), r"'\.\./a' names a file"),
        (Findings(arrays={"a b": __file__}), "'a b' names a file"),
        (Findings(arrays={"a": "nowhere.npz"}), "nowhere.npz is not a file"),
        (Findings(histograms={"a": (range(514), range(513))}), "513 counts and 514 edges"),
        (Findings(histograms={"a": ((0, 1, 2), (1,))}), "1 counts and 3 edges"),
        (Findings(histograms={"a": ((0, 0), (1,))}), "edges must rise"),
        (Findings(histograms={"a": ((0, 1), (float("nan"),))}), "be finite"),
    ],
)
def test_what_no_logger_could_take_is_an_error_of_the_diagnostic(
    findings: Findings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_findings(findings)


def test_the_most_that_a_logger_takes_is_accepted() -> None:
    check_findings(
        Findings(
            tables={"landscape/val-0/episodes": Table(("n",), ((1,),) * 10_000)},
            histograms={"u": (range(513), range(512))},
        )
    )


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (("a", "b"), (1,), "has 1 cells"),
        (("a", "a"), (1, 2), "name of its own"),
        (("a",), (np.float64(1),), "float64 is no plain value"),
        (("a",), (np.bool_(True),), "'a': bool"),
        (("a",), ([1],), "list is no plain value"),
        (("a",), ("one",), r"mixes \['float', 'str'\]"),
        (("a",), (True,), r"mixes \['bool', 'float'\]"),
    ],
)
def test_a_table_that_has_no_columns_of_one_kind_is_refused(
    columns: tuple[str, ...], row: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Table(columns, ((0.5,) * len(columns), row))


@pytest.mark.parametrize(
    "column", [(), (None, None), (1, 2.5, None), (math.nan, 1), ("a", None), (None, True)]
)
def test_w_and_b_takes_every_table_that_is_allowed(column: tuple[Any, ...]) -> None:
    table = Table(("name", "value"), tuple(("row", cell) for cell in column))
    theirs = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
    assert len(theirs.data) == len(column)


def test_the_limits_are_those_of_w_and_b() -> None:
    assert (MAX_ROWS, MAX_BINS) == (wandb.Table.MAX_ROWS, wandb.Histogram.MAX_LENGTH)
    longest = "a/" * 49 + "bc"
    assert FILE_KEY.fullmatch(longest)
    assert not FILE_KEY.fullmatch(longest + "d")
    wandb.Artifact(f"{file_name(longest)}-{'0' * 8}", type="arrays")


def test_keys_that_differ_never_share_a_file() -> None:
    keys = ["a/b", "a_b", "a-b", "a/b/c", "a_b/c", "ab"]
    assert all(FILE_KEY.fullmatch(key) for key in keys)
    assert len({file_name(key) for key in keys}) == len(keys)
    assert not any(FILE_KEY.fullmatch(key) for key in ("a.b", "", "/a", "a//b", "a/", "..", "a\n"))
