"""Every reader refuses damaged inputs with its own error: the kept ones, and some new ones."""

from importlib import import_module

import pytest
from fuzzing import TARGETS, drive

N_CASES = 200


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_end_in_one_clear_error(name):
    report = drive(import_module(f"fuzz_{name}").TARGET, N_CASES)
    assert not report.findings, str(report)
    # A target whose cases all look alike tries nothing.
    assert report.refused > N_CASES // 10
