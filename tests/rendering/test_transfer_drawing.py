"""Pictures of the transfer experiment: every bar at its height, every landscape over its board."""

from dataclasses import replace

import numpy as np
import pytest

from features.resampling import Estimate
from landscapes.grid import Grid
from rendering.landscape import Markers, Panel
from rendering.transfer import (
    OPACITY,
    UNTRAINED,
    Bar,
    BoardLandscape,
    draw_over_board,
    landscapes_by_arm,
    transfer_chart,
)

BLUE, ORANGE = (0x33, 0x66, 0xAA), (0xDD, 0x77, 0x33)
GREY = tuple(int(UNTRAINED[0][start : start + 2], 16) for start in (1, 3, 5))


def sure(value):
    return Estimate(value, value, value)


def bars(seen=0.8, unseen=0.4, untrained=0.2):
    return [
        Bar("arm 0", sure(seen), sure(seen)),
        Bar("arm 1", sure(unseen), sure(unseen)),
        Bar("arm 0, untrained", sure(untrained), sure(untrained), is_trained=False),
    ]


def chart(groups):
    return transfer_chart(groups, 0.7, "success", "coverage")


def n_rows(picture, colour):
    """Height of the tallest bar of a colour in the left half, in px."""
    near = (np.abs(picture.astype(int) - colour).max(-1) < 12)[:, : picture.shape[1] // 2]
    return int(near[: int(0.85 * len(picture))].sum(0).max())


def test_bars_are_as_high_as_their_values():
    picture = chart({"queue": bars()})
    heights = [n_rows(picture, colour) for colour in (BLUE, ORANGE, GREY)]
    assert heights[0] > 100
    assert heights[1] / heights[0] == pytest.approx(0.5, abs=0.05)
    assert heights[2] / heights[0] == pytest.approx(0.25, abs=0.05)
    higher = chart({"queue": bars(unseen=0.8)})
    assert n_rows(higher, ORANGE) == pytest.approx(n_rows(higher, BLUE), abs=2)


def test_groups_without_the_same_conditions_are_refused():
    assert chart({"queue": bars(), "ensemble": bars()}).shape[2] == 3
    for groups in ({}, {"queue": []}, {"queue": bars(), "ensemble": bars()[:2]}):
        with pytest.raises(ValueError, match="same ones in each"):
            chart(groups)


def panel(title="", markers=None):
    scores = np.full((8, 8), -np.inf)
    scores[2, 5] = 1.0
    return Panel(title, scores, Grid(8), (-1.0, 1.0), "nats", markers=markers or Markers())


def test_what_is_unlikely_leaves_the_board_as_it_is():
    board = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    drawn = draw_over_board(BoardLandscape(board, panel()), 64)
    far = np.ones((64, 64), bool)
    far[16:24, 40:48] = False  # the likely cell
    np.testing.assert_array_equal(drawn[far], board[far])
    yellow = np.array([253, 231, 36])
    expected = board[20, 44] + (yellow - board[20, 44].astype(float)) * OPACITY
    np.testing.assert_allclose(drawn[20, 44], expected, atol=2)


def test_a_star_stands_where_the_policy_would_go():
    board = np.zeros((128, 128, 3), np.uint8)
    markers = Markers(prediction=np.array([384.0, 128.0]))
    drawn = draw_over_board(BoardLandscape(board, panel(markers=markers)), 128)
    white = np.argwhere((drawn == 255).all(-1))
    np.testing.assert_allclose(white.mean(0), (32, 96), atol=2)  # row, column


def test_each_instant_is_a_row_and_each_arm_a_column():
    board = np.full((64, 64, 3), 200, np.uint8)
    cell = BoardLandscape(board, panel("arm 0"))
    one = landscapes_by_arm([[cell, cell, cell]], size_px=96)
    two = landscapes_by_arm([[cell, cell, cell]] * 2, size_px=96)
    assert one.shape[1] == two.shape[1] == 3 * 96 + 2 * 8
    assert two.shape[0] - one.shape[0] == 96 + 20
    other = replace(cell, panel=replace(cell.panel, unit="px"))
    for rows in ([], [[cell], [cell, cell]], [[cell, other]]):
        with pytest.raises(ValueError, match="of one method"):
            landscapes_by_arm(rows)
