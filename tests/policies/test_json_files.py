"""JSON that we write: every program reads it."""

import json
import math

import pytest

from policies.json_files import json_text, parse_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_is_not_finite_is_null_wherever_it_stands():
    value = {"r": math.nan, "interval": (0.5, -math.inf), "rows": [{"p": math.inf, "n": 3}]}
    text = json_text(value)
    found = json.loads(text, parse_constant=refuse)
    assert found == {"r": None, "interval": [0.5, None], "rows": [{"p": None, "n": 3}]}
    assert parse_json(text) == found


def test_everything_else_is_as_it_was():
    value = {"a": 1.5e-300, "b": [True, None, "NaN"], "c": {"d": -0.0}}
    assert json_text(value, None) == json.dumps(value) + "\n"
    assert json_text(value) == json.dumps(value, indent=1) + "\n"


def test_values_that_json_does_not_know_are_still_refused():
    with pytest.raises(TypeError, match="set"):
        json_text({"a": {1, 2}})
