"""Concepts of any task: their kinds, and what is counted along episodes."""

import pytest
import torch

from features.concepts import Concepts, onsets, seconds_since_last_frame, time_in_episode

EPISODE = torch.tensor([4, 4, 4, 2, 2])
STEP = torch.tensor([0, 1, 4, 3, 5])


def test_time_runs_from_the_first_to_the_last_step_of_each_episode():
    assert time_in_episode(EPISODE, STEP).tolist() == pytest.approx([0, 0.25, 1, 0.6, 1])
    assert time_in_episode(torch.tensor([3]), torch.tensor([0])).tolist() == [0]


def test_seconds_count_the_steps_that_were_left_out():
    passed = seconds_since_last_frame(EPISODE, STEP, fps=10.0)
    assert passed.isnan().tolist() == [True, False, False, True, False]
    assert passed[~passed.isnan()].tolist() == pytest.approx([0.1, 0.3, 0.2])


def test_an_onset_is_known_only_where_the_frame_before_is():
    holds = torch.tensor([True, False, True, True, True])
    found = onsets(holds, EPISODE)
    assert found.isnan().tolist() == [True, False, False, True, False]
    assert found[~found.isnan()].tolist() == [0, 1, 0]


def test_frames_out_of_order_are_refused():
    with pytest.raises(ValueError, match="episode 2: step 3 comes after step 5"):
        time_in_episode(EPISODE, torch.tensor([0, 1, 4, 5, 3]))
    with pytest.raises(ValueError, match="episode 4 comes in several pieces"):
        time_in_episode(torch.tensor([4, 2, 4]), torch.tensor([0, 0, 1]))


def test_kinds_and_rows():
    concepts = Concepts.from_columns(
        continuous={"x": (torch.tensor([1.0, 2.0, torch.nan]), "px")},
        binary={"up": torch.tensor([True, False, True]), "on": torch.tensor([torch.nan, 0.0, 1.0])},
    )
    assert concepts.of_kind(True).names == ("up", "on")
    assert concepts.of_kind(False).units == ("px",)
    assert concepts.of("on", "x").is_binary == (True, False)
    assert concepts.rows(torch.tensor([False, True, False])).values.tolist() == [[2.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="'down': there are x, up, on"):
        concepts.column("down")


@pytest.mark.parametrize(
    ("values", "is_binary", "message"),
    [
        ([0.5, 1.0], True, "is binary"),
        ([torch.inf, 1.0], False, "infinite"),
    ],
)
def test_impossible_values_are_refused(values, is_binary, message):
    with pytest.raises(ValueError, match=message):
        Concepts(("a",), torch.tensor(values)[:, None], (is_binary,), ("1",))
    with pytest.raises(ValueError, match="each needs a name"):
        Concepts(("a", "a"), torch.zeros(2, 2), (False, False), ("1", "1"))
