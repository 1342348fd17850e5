import cv2
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize

from envs.push_t import PushT
from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.landscape import Landscape
from landscapes.regions import CREDIBLE_LEVELS, credible_thresholds
from rendering.colour import colour_table, colours
from rendering.landscape import (
    FOOTER_PX,
    LEGEND_PX,
    SYMBOLS,
    Markers,
    Panel,
    Scene,
    board_px,
    draw_colour_bar,
    draw_landscape,
    draw_legend,
    draw_regions,
    landscape_strip,
    region_outlines,
    side_by_side,
)

RED, WHITE, ORANGE = (255, 0, 0), (255, 255, 255), (255, 150, 20)
RANGE = (-4.0, 8.0)


def likelihood(centres, b=10.0, grid=None) -> Landscape:
    """One frame, one chunk step, of equal Laplace kernels with the given centres."""
    grid = grid or Grid()
    centres = torch.tensor(centres, dtype=torch.float64)
    mass = Mixture(centres, torch.full((1, 2), b, dtype=torch.float64)).cell_mass(grid)[None, None]
    scores = (mass / grid.cell_area).log() - grid.log_uniform
    thresholds = credible_thresholds(mass)
    return Landscape(
        "likelihood", "nats above uniform", RANGE, grid, (0,), scores, mass, thresholds
    )


def bare(scores, grid=None, value_range=RANGE, markers=None) -> Panel:
    scores = np.asarray(scores, np.float64)
    grid = grid or Grid(len(scores))
    return Panel("title", scores, grid, value_range, "unit", markers=markers or Markers())


def policy_at(action, markers=None, regions=True, b=10.0, grid=None) -> Panel:
    return Panel.of(likelihood([action], b, grid), 0, 0, "k = 0", markers, regions)


def centre_of(picture, colour) -> np.ndarray:
    """Middle (x, y) of all pixels that have exactly this colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    assert len(rows), f"nothing is {colour}"
    return np.array([(columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2])


def changed(before, after) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero((before != after).any(-1))


# Colours


@pytest.mark.parametrize("name", ["viridis", "plasma", "coolwarm", "Blues"])
def test_colours_are_those_of_matplotlib(name):
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.uniform(-6, 10, 4000), [-4.0, 8.0, -np.inf]])[None]
    expected = matplotlib.colormaps[name](Normalize(*RANGE)(values), bytes=True)[..., :3]
    np.testing.assert_array_equal(colours(values, RANGE, colour_table(name)), expected)


def test_every_colour_map_of_matplotlib_has_a_table():
    for name in matplotlib.colormaps:
        table = colour_table(name)
        expected = matplotlib.colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3]
        np.testing.assert_array_equal(table, expected)
        assert not table.flags.writeable


def test_an_unknown_colour_map_names_close_ones():
    with pytest.raises(ValueError, match=r"'virids'.*viridis"):
        colour_table("virids")
    with pytest.raises(ValueError, match=r"'blues'.*Blues"):
        colour_table("blues")
    with pytest.raises(ValueError, match="xyzzy"):
        colour_table("xyzzy")


# Orientation and place


@pytest.mark.parametrize("size", [404, 401, 160, 512])
@pytest.mark.parametrize("action", [(100.0, 400.0), (400.0, 100.0), (30.5, 277.3), (256.0, 3.0)])
def test_everything_lies_where_the_environment_draws_its_cross(action, size):
    env = PushT()
    env.reset_to(np.array([450.0, 450.0, 330.0, 330.0, 0.0]))
    expert = np.array(action)
    rows, columns = changed(env.frame(size), env.frame(size, expert))
    # The cross may be cut off at the border; its centre is where its arms meet.
    cross = np.array([np.bincount(columns).argmax(), np.bincount(rows).argmax()])

    board = draw_landscape(policy_at(action, Markers(expert=expert)), size)
    red = np.nonzero((board == RED).all(-1))
    mine = np.array([np.bincount(red[1]).argmax(), np.bincount(red[0]).argmax()])
    np.testing.assert_allclose(mine, cross, atol=1)

    panel = policy_at(action, regions=False)
    heat = draw_landscape(panel, size)
    cell = panel.scores.max()
    brightest = centre_of(
        heat, tuple(colours(np.array([[cell]]), RANGE, colour_table("viridis"))[0, 0])
    )
    np.testing.assert_allclose(brightest, cross, atol=1 + 0.5 * size / 128)
    np.testing.assert_allclose(brightest + 0.5, expert / 512 * size, atol=0.5 + 0.5 * size / 128)


def test_lower_left_stays_lower_left():
    board = draw_landscape(policy_at((100.0, 400.0), regions=False), 480)
    x, y = centre_of(board, board.reshape(-1, 3)[board.sum(-1).argmax()])
    assert x < 120 < 360 < y


def test_outlines_surround_the_marker_in_the_frame_of_the_heat_map():
    panel = policy_at((100.0, 400.0))
    plain = draw_landscape(policy_at((100.0, 400.0), regions=False), 480)
    outlined = plain.copy()
    draw_regions(outlined, panel)
    rows, columns = changed(plain, outlined)
    x, y = 100 / 512 * 480, 400 / 512 * 480
    reach = np.array([x - columns.min(), columns.max() + 1 - x, y - rows.min(), rows.max() + 1 - y])
    # The 95 % region of one Laplace kernel is the diamond |x| + |y| < 4.744 b.
    np.testing.assert_allclose(reach, 4.744 * 10 / 512 * 480, atol=3)


@pytest.mark.parametrize(
    ("cells", "size"), [(128, 404), (50, 404), (7, 333), (128, 128), (100, 161)]
)
def test_every_pixel_has_the_colour_of_the_cell_under_it(cells, size):
    scores = np.random.default_rng(0).uniform(*RANGE, (cells, cells))
    board = draw_landscape(bare(scores), size)
    under = ((np.arange(size) + 0.5) / size * cells).astype(int)
    expected = colours(scores, RANGE, colour_table("viridis"))[np.ix_(under, under)]
    np.testing.assert_array_equal(board, expected)


def test_a_peak_narrower_than_a_pixel_is_seen():
    for place in range(100, 108):
        scores = np.full((400, 400), -4.0)
        scores[place, place] = 8.0
        board = draw_landscape(bare(scores), 100)
        rows, columns = np.nonzero((board != board[0, 0]).any(-1))
        assert (rows.tolist(), columns.tolist()) == ([place // 4], [place // 4])


# One range for all


def test_equal_scores_have_equal_colours_whatever_else_is_on_the_board():
    low, high = np.zeros((16, 16)), np.zeros((16, 16))
    low[0, 0], high[0, 0] = -3.0, 7.5
    a, b = draw_landscape(bare(low), 96), draw_landscape(bare(high), 96)
    np.testing.assert_array_equal(a[6:], b[6:])
    assert (a[0, 0] != b[0, 0]).any()


def test_a_flat_landscape_looks_flat():
    scores = np.random.default_rng(0).normal(1.0, 0.005, (128, 128))
    board = draw_landscape(bare(scores), 256).reshape(-1, 3).astype(int)
    assert np.ptp(board, axis=0).max() <= 3


def test_the_colour_bar_puts_numbers_under_their_colours():
    table = colour_table("plasma")
    for low, high in [(-4.0, 8.0), (0.0, 1.0), (-512.0, 0.0), (-0.03, 0.05)]:
        bar = draw_colour_bar((low, high), "unit", 404, "plasma")
        ramp = bar[10, 14:-14]
        np.testing.assert_array_equal(ramp[[0, -1]], table[[0, 255]])
        ticks = np.nonzero((bar[22] < 64).all(-1))[0]
        assert 4 <= len(ticks) <= 9
        values = low + (ticks - 14) / (len(ramp) - 1) * (high - low)
        step = np.diff(values).mean()
        # Ticks sit at multiples of a round step, to half a pixel.
        multiples = values / step
        np.testing.assert_allclose(multiples, np.round(multiples), atol=0.05)
        mantissa = step / 10.0 ** np.floor(np.log10(step) + 1e-3)
        assert min(abs(mantissa - nice) for nice in (1, 2, 4, 5)) < 0.1


# Credible regions


def enclosed(mass, thresholds, px_per_cell=8) -> list[float]:
    """Share of the mass inside each outline, counted in pixels."""
    n_px = len(mass) * px_per_cell
    density = np.kron(mass, np.ones((px_per_cell, px_per_cell))) / px_per_cell**2
    shares = []
    for outline in region_outlines(mass, thresholds):
        inside = np.zeros((n_px, n_px), np.uint8)
        lines = [np.rint((line * px_per_cell - 0.5) * 16).astype(np.int32) for line in outline]
        cv2.fillPoly(inside, lines, 1, cv2.LINE_8, 4)
        shares.append((density * inside).sum() / mass.sum())
    return shares


@pytest.mark.parametrize(
    ("centres", "b", "cells"),
    [
        ([(203.3, 301.7)], 8.0, 128),
        ([(203.3, 301.7), (330.0, 250.0)], 12.0, 128),
        ([(203.3, 301.7), (330.0, 250.0)], 40.0, 50),
        ([(10.0, 500.0), (500.0, 20.0), (300.0, 300.0)], 30.0, 100),
    ],
)
def test_outlines_enclose_the_mass_they_say(centres, b, cells):
    found = likelihood(centres, b, Grid(cells))
    shares = enclosed(found.mass[0, 0].numpy(), found.thresholds[0, 0].numpy())
    np.testing.assert_allclose(shares, CREDIBLE_LEVELS, atol=0.03)


def test_a_region_that_is_the_whole_board_is_outlined_at_its_ends():
    flat = np.full((64, 64), 1 / 64**2)
    assert enclosed(flat, np.array([1 / 64**2])) == pytest.approx([1.0])
    panel = Panel("", np.zeros((64, 64)), Grid(64), RANGE, "", flat, np.array([1 / 64**2]), (0.95,))
    plain = draw_landscape(bare(np.zeros((64, 64))), 200)
    rows, columns = changed(plain, draw_landscape(panel, 200))
    assert {rows.min(), columns.min()} == {0}
    assert {rows.max(), columns.max()} == {199}
    assert not ((rows > 2) & (rows < 197) & (columns > 2) & (columns < 197)).any()


def test_a_box_of_equal_cells_is_outlined_along_its_cells():
    mass = np.zeros((32, 32))
    mass[10:20, 4:8] = 1 / 40
    ((outline,),) = region_outlines(mass, np.array([1 / 40]))
    np.testing.assert_allclose(outline.min(0), [4, 10], atol=1e-9)
    np.testing.assert_allclose(outline.max(0), [8, 20], atol=1e-9)


def test_a_board_without_mass_has_no_regions():
    empty = likelihood([(-1e6, -1e6)])
    assert region_outlines(empty.mass[0, 0].numpy(), empty.thresholds[0, 0].numpy()) == [[], [], []]
    draw_landscape(Panel.of(empty, 0, 0, "gone"), 200)


def test_each_region_has_its_own_line():
    legend = draw_legend((), CREDIBLE_LEVELS, 1)
    places = [
        legend[18 * row : 18 * row + 18, 4:28] for row in range(len(SYMBOLS), len(SYMBOLS) + 3)
    ]
    assert len({place.tobytes() for place in places}) == 3


# Markers


@pytest.mark.parametrize(
    ("name", "colour"), [("expert", RED), ("prediction", WHITE), ("executed", ORANGE)]
)
@pytest.mark.parametrize(
    ("action", "border"),
    [
        ((-50.0, 256.0), (0, 100)),
        ((700.0, 256.0), (199, 100)),
        ((256.0, -1e9), (100, 0)),
        ((256.0, 513.0), (100, 199)),
        ((600.0, 600.0), (199, 199)),
    ],
)
def test_a_marker_off_the_board_points_outwards_at_the_border(name, colour, action, border):
    plain = draw_landscape(bare(np.zeros((16, 16))), 200)
    away = Markers(**{name: np.array(action)})
    marked = draw_landscape(bare(np.zeros((16, 16)), markers=away), 200)
    rows, columns = changed(plain, marked)
    distance = np.hypot(columns - border[0], rows - border[1])
    assert distance.min() <= 2
    assert distance.max() <= 16
    assert (marked == colour).all(-1).any()
    # Another mark than that of a point which lies there.
    there = Markers(**{name: np.clip(np.array(action), 0, 512)})
    assert (draw_landscape(bare(np.zeros((16, 16)), markers=there), 200) != marked).any()


def test_ends_of_the_board_are_on_the_board():
    for action in [(0.0, 0.0), (512.0, 512.0)]:
        board = draw_landscape(bare(np.zeros((16, 16)), markers=Markers(np.array(action))), 200)
        rows, columns = np.nonzero((board == RED).all(-1))
        corner = 0 if action[0] == 0 else 199
        assert (np.bincount(columns).argmax(), np.bincount(rows).argmax()) == (corner, corner)


def test_markers_follow_the_grid_of_any_action_space():
    grid = Grid(16, (-1.0, 2.0), (3.0, 4.0))
    markers = Markers(expert=np.array([2.0, 2.5]))
    board = draw_landscape(bare(np.zeros((16, 16)), grid, markers=markers), 200)
    np.testing.assert_allclose(centre_of(board, RED), [150, 50], atol=0.5)


def test_the_arrow_leads_from_the_policy_to_the_expert():
    start, end = np.array([100.0, 100.0]), np.array([400.0, 250.0])
    flat = np.zeros((16, 16))
    both = draw_landscape(bare(flat, markers=Markers(expert=end, prediction=start)), 512)
    rows, columns = np.nonzero((both == (255, 225, 0)).all(-1))
    along = (columns - 100) * 300 + (rows - 100) * 150
    across = (columns - 100) * 150 - (rows - 100) * 300
    head = along / np.hypot(300, 150) > np.hypot(300, 150) - 25
    assert along.min() > 0
    # It is wider, and so are its pixels, near the expert.
    assert np.abs(across[head]).max() > 1.5 * np.abs(across[~head]).max()


def test_the_trace_and_the_age_are_drawn():
    flat = np.zeros((16, 16))
    plain = draw_landscape(bare(flat), 400)
    trace = np.array([[100.0, 100.0], [100.0, 300.0], [300.0, 300.0]])
    traced = draw_landscape(bare(flat, markers=Markers(expert_trace=trace)), 400)
    for action in (*trace, [100.0, 200.0], [200.0, 300.0]):
        x, y = np.rint(np.array(action) / 512 * 400).astype(int)
        assert (traced[y, x] == RED).all()
    rows, columns = changed(plain, traced)
    assert (rows.min(), columns.max()) >= (75, 230)

    at = np.array([500.0, 5.0])
    young = draw_landscape(bare(flat, markers=Markers(executed=at, executed_age=1)), 400)
    old = draw_landscape(bare(flat, markers=Markers(executed=at, executed_age=12)), 400)
    unknown = draw_landscape(bare(flat, markers=Markers(executed=at)), 400)
    assert (young != old).any()
    assert (young != unknown).any()


# Whole frames


@pytest.mark.parametrize("width", [300, 420])
def test_frames_have_the_asked_height_and_the_environment_in_it(width):
    size = board_px(481)
    environment = np.random.default_rng(0).integers(0, 255, (size, width, 3), np.uint8)
    panels = [policy_at((100.0, 400.0)), policy_at((300.0, 200.0))]
    scene = Scene(panels, environment, "episode 0  step 0")
    before = environment.copy()
    frame = side_by_side(scene, 481)
    # The legend stands below a wide picture, and to the right of all where there is no room.
    legend = LEGEND_PX + 8 if width == 300 else 0
    assert frame.shape == (481, width + 2 * (size + 8) + legend, 3)
    np.testing.assert_array_equal(frame[20 : 20 + size, :width], before)
    np.testing.assert_array_equal(environment, before)
    for column, panel in enumerate(panels):
        left = width + 8 + column * (size + 8)
        board = frame[20:-FOOTER_PX, left : left + size]
        np.testing.assert_array_equal(board, draw_landscape(panel, size))
    np.testing.assert_array_equal(side_by_side(scene, 481), frame)


def test_landscapes_alone_stand_beside_their_legend():
    panels = [policy_at((100.0, 400.0)), policy_at((300.0, 200.0))]
    alone = side_by_side(Scene(panels), 363)
    assert alone.shape == (363, 2 * (board_px(363) + 8) + LEGEND_PX, 3)
    legend = draw_legend((), CREDIBLE_LEVELS, 1)
    np.testing.assert_array_equal(alone[: len(legend), -LEGEND_PX:], legend)


def test_a_frame_too_low_to_see_anything_is_refused():
    scene = Scene([policy_at((100.0, 400.0))])
    assert side_by_side(scene, 172).shape[0] == 172
    with pytest.raises(ValueError, match=r"120 px: give at least 172"):
        side_by_side(scene, 120)


@pytest.mark.parametrize("height", [96, 1000])
def test_a_recorded_picture_of_another_size_keeps_its_places(height):
    recorded = np.full((height, height, 3), 255, np.uint8)
    recorded[3 * height // 4 :, : height // 4] = (0, 0, 255)
    frame = side_by_side(Scene([policy_at((100.0, 400.0))], recorded), 480)
    shown = frame[20:-FOOTER_PX, :404]
    blue = np.zeros((404, 404), bool)
    blue[303:, :101] = True
    found = shown[..., 0] < 128
    assert (found != blue).sum() <= 2 * 202


def test_a_strip_has_a_row_for_each_instant():
    environment = np.full((96, 96, 3), 200, np.uint8)
    actions = [(100.0, 400.0), (300.0, 200.0), (50.0, 60.0)]
    scenes = [
        Scene([policy_at(action), policy_at(action, b=40.0)], environment, str(action))
        for action in actions
    ]
    strip = landscape_strip(scenes, 131)
    assert strip.shape[1] == 3 * 131 + 2 * 8
    for row, scene in enumerate(scenes):
        top = row * 151 + 20
        assert (strip[top : top + 131, :131] == 200).all()
        for column, panel in enumerate(scene.panels, start=1):
            left = column * 139
            board = strip[top : top + 131, left : left + 131]
            np.testing.assert_array_equal(board, draw_landscape(panel, 131))
    single = landscape_strip([Scene([policy_at(actions[0])])], 101)
    assert (single[20:121, :101] == draw_landscape(policy_at(actions[0]), 101)).all()
    wide = landscape_strip([Scene([policy_at(actions[0])] * 6, environment)], 208)
    assert wide.shape == (208 + 20 + FOOTER_PX, 7 * 208 + 6 * 8, 3)


def test_a_strip_of_unlike_rows_is_refused():
    one = Scene([policy_at((100.0, 400.0))])
    two = Scene([policy_at((100.0, 400.0))] * 2)
    other = Scene([bare(np.zeros((16, 16)), value_range=(0.0, 1.0))])
    for scenes in ([], [one, two], [one, other]):
        with pytest.raises(ValueError, match=f"{len(scenes)} scenes"):
            landscape_strip(scenes)
    with pytest.raises(ValueError, match="at least one panel"):
        Scene([])


def test_symbols_of_the_legend_stay_at_their_places():
    everything = draw_legend(tuple(SYMBOLS), CREDIBLE_LEVELS, 3)
    union = np.full_like(everything, 255)
    pieces = [((name,), ()) for name in SYMBOLS] + [((), CREDIBLE_LEVELS)]
    for symbols, levels in pieces:
        piece = draw_legend(symbols, levels, 3)
        assert (piece < 255).any()
        union = np.minimum(union, piece)
    np.testing.assert_array_equal(union, everything)


def test_regions_of_different_levels_have_no_common_legend():
    found = likelihood([(100.0, 400.0)])
    mass = found.mass[0, 0].numpy()
    half = Panel(
        "", found.scores[0, 0].numpy(), found.grid, RANGE, "", mass, np.array([mass.max()]), (0.9,)
    )
    with pytest.raises(ValueError, match=r"0\.9"):
        side_by_side(Scene([half, policy_at((100.0, 400.0))]))


# What cannot be drawn


def test_what_has_no_colour_is_refused():
    for wrong in (np.nan, np.inf):
        scores = np.zeros((16, 16))
        scores[3, 4] = wrong
        with pytest.raises(ValueError, match="NaN or infinity"):
            bare(scores)
    scores = np.zeros((16, 16))
    scores[0, 0] = -np.inf
    board = draw_landscape(bare(scores), 160)
    np.testing.assert_array_equal(board[0, 0], colour_table("viridis")[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"grid": Grid(8)}, r"\(16, 16\); the grid has \(8, 8\)"),
        ({"value_range": (8.0, -4.0)}, "value_range"),
        ({"value_range": (0.0, np.inf)}, "value_range"),
        ({"mass": np.full((16, 16), 1 / 256)}, "0 thresholds"),
        ({"thresholds": np.array([0.1])}, "1 thresholds"),
        ({"levels": (0.5,)}, "0 thresholds"),
        ({"mass": np.full((16, 16), np.nan)}, "mass: NaN"),
        (
            {
                "mass": np.full((16, 16), 1 / 256),
                "thresholds": np.full(4, 1 / 256),
                "levels": (0.5, 0.8, 0.9, 0.95),
            },
            "at most 3",
        ),
    ],
)
def test_panels_that_do_not_fit_together_are_refused(change, problem):
    fitting = {
        "title": "",
        "scores": np.zeros((16, 16)),
        "grid": Grid(16),
        "value_range": RANGE,
        "unit": "",
    }
    with pytest.raises(ValueError, match=problem):
        Panel(**{**fitting, **change})


def test_markers_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="prediction"):
        Markers(prediction=np.array([1.0, np.nan]))
