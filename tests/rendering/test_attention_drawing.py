from dataclasses import replace

import av
import numpy as np
import pytest

from rendering.attention import (
    BAR_PX,
    GAP_PX,
    SIDE_BY_SIDE,
    AttentionScene,
    AttentionStyle,
    CameraMap,
    attention_frame,
    attention_frames,
    attention_strip,
    draw_camera,
    draw_outlines,
    draw_shares,
    episode_range,
    fit_height,
    overlay,
    scale_range,
    share_colours,
)
from rendering.colour import colour_table
from rendering.video import CAPTION_PX, write_videos

RED, GREEN, BLUE, MAGENTA = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)
VIRIDIS = colour_table("viridis")
RAMP = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
"""A grey colour table: the colour is the value."""


def plain(colour, height=96, width=96) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def noise(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def scene(*maps, shares=None, title="method", **names) -> AttentionScene:
    """Each map on a black picture of 96 px, in cameras a, b, ..."""
    cameras = {
        "abcdef"[place]: CameraMap(plain(0), np.asarray(values, np.float64))
        for place, values in enumerate(maps)
    }
    return AttentionScene(title, cameras, shares or {}, **names)


def cells_of(picture: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows and columns at which the colour changes, along the first column and the first row."""
    rows = np.flatnonzero((np.diff(picture[:, 0].astype(int), axis=0) != 0).any(-1)) + 1
    columns = np.flatnonzero((np.diff(picture[0].astype(int), axis=0) != 0).any(-1)) + 1
    return rows.tolist(), columns.tolist()


# Colours


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, (200, 100, 50)])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_pure_colours_mix_as_computed_by_hand(colour, alpha):
    # viridis ends at (68, 1, 84) and (253, 231, 36).
    mixed = overlay(plain(colour), np.array([[0.2, 0.7]]), (0.2, 0.7), VIRIDIS, alpha)
    low, high = np.array([68, 1, 84]), np.array([253, 231, 36])
    for half, end in ((mixed[:, :48], low), (mixed[:, 48:], high)):
        expected = (1 - alpha) * np.array(colour) + alpha * end
        # Two roundings: of the product, and of the pixel.
        np.testing.assert_allclose(half, np.broadcast_to(expected, half.shape), atol=0.75)


def test_red_stays_red_and_jet_is_red_where_attention_is():
    untouched = overlay(plain(RED, 40, 60), np.ones((1, 1)), (0.0, 1.0), VIRIDIS, 0.0, height_px=90)
    np.testing.assert_array_equal(untouched, plain(RED, 90, 135))
    hot = overlay(plain(0), np.array([[0.0, 0.9, 1.0]]), (0.0, 1.0), colour_table("jet"), 1.0)
    assert hot[0, 0, 2] > 100 > hot[0, 0, 0]
    assert hot[0, 60, 0] > 200 > hot[0, 60, 2]


def test_values_beyond_the_range_take_the_colours_of_its_ends():
    values = np.array([[0.0, 0.1, 0.2, 0.9]])
    shown = overlay(plain(0, 10, 40), values, (0.1, 0.2), RAMP, 1.0)
    assert shown[0, ::10, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [0.0, 1 / 9, 3e7])
@pytest.mark.parametrize("interpolation", ["nearest", "linear", "bicubic"])
def test_a_uniform_map_is_flat_at_the_low_end(value, interpolation):
    rounding = 1 + 1e-7 * np.random.default_rng(0).uniform(-1, 1, (3, 3))
    for values in (np.full((3, 3), value), value * rounding):
        found = scale_range(scene(values), AttentionStyle())
        shown = overlay(plain(0), values, found, VIRIDIS, 1.0, interpolation, 32)
        np.testing.assert_array_equal(shown, plain(VIRIDIS[0]))


# Cells


def test_cells_lie_where_a_stride_puts_them_and_overhang_the_picture():
    values = np.arange(16.0).reshape(4, 4)
    shown = overlay(plain(0, 100, 100), values, (0.0, 15.0), RAMP, 1.0, cell_px=32)
    expected = (values[np.ix_(np.arange(100) // 32, np.arange(100) // 32)] * 256 / 15).clip(0, 255)
    np.testing.assert_array_equal(shown[..., 0], expected.astype(np.uint8))
    # Evenly divided, borders would lie at 25, 50, 75.
    assert cells_of(overlay(plain(0, 100, 100), values, (0.0, 15.0), RAMP, 1.0)) == (
        [25, 50, 75],
        [25, 50, 75],
    )


@pytest.mark.parametrize("height_px", [100, 250, 360, 61])
def test_cells_are_enlarged_with_their_picture(height_px):
    values = np.arange(20.0).reshape(4, 5)
    shown = overlay(
        plain(0, 100, 140), values, (0.0, 19.0), RAMP, 1.0, cell_px=32, height_px=height_px
    )
    assert shown.shape[:2] == (height_px, round(1.4 * height_px))
    rows, columns = cells_of(shown)
    np.testing.assert_allclose(rows, np.array([32, 64, 96]) * height_px / 100, atol=0.5)
    expected = np.array([32, 64, 96, 128]) * shown.shape[1] / 140
    np.testing.assert_allclose(columns, expected, atol=0.5)


@pytest.mark.parametrize("interpolation", ["linear", "bicubic"])
@pytest.mark.parametrize("cell_px", [32, None])
def test_interpolation_goes_through_the_centres_of_cells(interpolation, cell_px):
    values = np.random.default_rng(0).uniform(50, 200, (4, 4))
    shown = overlay(
        plain(0, 100, 100), values, (0.0, 256.0), RAMP, 1.0, interpolation, cell_px, height_px=800
    )
    size = 8 * (cell_px or 25)
    centres = [size * cell + size // 2 for cell in range(4) if size * cell + size // 2 < 800]
    found = shown[np.ix_(centres, centres)][..., 0]
    np.testing.assert_allclose(found, values[: len(centres), : len(centres)], atol=2)
    assert len(np.unique(shown[..., 0])) > 50


def test_pixels_finer_than_the_drawing_are_averaged():
    values = np.random.default_rng(0).uniform(0, 256, (120, 150))
    shown = overlay(plain(0, 120, 150), values, (0.0, 256.0), RAMP, 1.0, height_px=40)
    blocks = values.reshape(40, 3, 50, 3).mean((1, 3))
    np.testing.assert_allclose(shown[..., 0], blocks, atol=1)


@pytest.mark.parametrize(("shape", "cell_px"), [((3, 3), 32), ((4, 5), 32), ((4, 4), 0)])
def test_a_grid_that_does_not_fit_is_refused(shape, cell_px):
    with pytest.raises(ValueError, match="cell"):
        CameraMap(plain(0, 100, 100), np.ones(shape), cell_px)
    with pytest.raises(ValueError, match="cell"):
        overlay(plain(0, 100, 100), np.ones(shape), (0.0, 1.0), VIRIDIS, cell_px=cell_px)


def test_the_grid_of_an_image_network_fits():
    CameraMap(plain(0, 480, 640), np.ones((15, 20)), 32)
    CameraMap(plain(0, 96, 96), np.ones((3, 3)), 32)


# Ranges


def test_each_scale_has_its_range():
    seen = scene([[0.1, 0.2]], [[0.05], [0.3]], shares={"state": 0.6, "a": 0.2, "b": 0.2})
    assert scale_range(seen, AttentionStyle()) == (0.05, 0.3)
    assert scale_range(seen, AttentionStyle(scale="global")) == (0.05, 0.6)
    fixed = AttentionStyle(scale="fixed", value_range=(0.0, 4 / 11))
    assert scale_range(seen, fixed) == (0.0, 4 / 11)
    assert scale_range(seen, AttentionStyle(scale="episode"), (0.0, 0.9)) == (0.0, 0.9)
    with pytest.raises(ValueError, match="episode_range"):
        scale_range(seen, AttentionStyle(scale="episode"))


def test_mass_on_the_state_darkens_pictures_only_on_the_global_scale():
    values = [[0.1, 0.2]]
    little = scene(values, shares={"state": 0.0, "a": 1.0})
    much = scene(values, shares={"state": 1.0, "a": 0.0})
    own, common = AttentionStyle(), AttentionStyle(scale="global")

    def brightness(seen, style) -> float:
        return float(draw_camera(seen, "a", style, scale_range(seen, style)).mean())

    assert brightness(little, own) == brightness(much, own)
    assert brightness(little, common) > 1.2 * brightness(much, common)


def test_equal_values_have_equal_colours_through_an_episode():
    first, second = scene([[0.1, 0.2]]), scene([[0.1, 0.4]])
    found = episode_range([np.array([[[0.1, 0.2]], [[0.1, 0.4]]])])
    style = AttentionStyle(scale="episode")
    shown = [draw_camera(seen, "a", style, found) for seen in (first, second)]
    np.testing.assert_array_equal(shown[0][:, :180], shown[1][:, :180])
    assert (shown[0][:, 180:] != shown[1][:, 180:]).any(-1).all()
    own = [attention_frame(seen, AttentionStyle()) for seen in (first, second)]
    np.testing.assert_array_equal(own[0][40:400], own[1][40:400])


def test_the_range_of_an_episode_needs_no_more_than_one_map_at_a_time():
    generator = np.random.default_rng(0)
    whole = [generator.random((30, 3, 3)), generator.random((30, 4, 5)).astype(np.float32)]
    parts = (values for camera in whole for values in camera)
    assert episode_range(parts) == episode_range(whole)
    assert episode_range(whole) == (min(v.min() for v in whole), max(v.max() for v in whole))


def test_percentiles_forgive_a_single_outlier():
    values = np.linspace(0, 1, 1001).reshape(1001, 1, 1)
    values[500] = 1e6
    low, high = episode_range([values[:600], values[600:]], (1.0, 99.0))
    assert (low, high) == pytest.approx((0.01, 0.99), abs=2e-3)


@pytest.mark.parametrize("percentiles", [(50.0, 50.0), (-1.0, 99.0), (0.0, 101.0)])
def test_percentiles_that_make_no_range_are_refused(percentiles):
    with pytest.raises(ValueError, match="percentiles"):
        episode_range([np.ones((2, 2))], percentiles)


@pytest.mark.parametrize("percentiles", [(0.0, 100.0), (1.0, 99.0)])
def test_no_maps_have_no_range(percentiles):
    with pytest.raises(ValueError, match="there are none"):
        episode_range(iter([]), percentiles)


# What lies outside of the picture


@pytest.mark.parametrize("width", [1, 15, 40])
def test_the_border_lies_around_the_picture(width):
    seen = AttentionScene(
        "m", {"a": CameraMap(noise(96, 128), np.ones((3, 4)))}, {"state": 0.25, "a": 0.75}
    )
    style = AttentionStyle(border="magenta", proprio_border_width=width)
    bare = draw_camera(seen, "a", AttentionStyle(), (0.0, 1.0))
    framed = draw_camera(seen, "a", style, (0.0, 1.0))
    np.testing.assert_array_equal(framed[width:-width, width:-width], bare)
    around = np.ones(framed.shape[:2], bool)
    around[width:-width, width:-width] = False
    assert (framed[around] == (64, 0, 64)).all()


def test_the_border_is_as_bright_as_the_state_is_important():
    style = AttentionStyle(border="magenta")

    def corner(share, style=style, values=((0.0, 0.5),)) -> list[int]:
        seen = scene(values, shares={"state": share, "a": 1 - share})
        return draw_camera(seen, "a", style, scale_range(seen, style))[0, 0].tolist()

    assert [corner(share)[0] for share in (0.0, 0.2, 0.6, 1.0)] == [0, 51, 153, 255]
    # On a common scale the state counts among the cells: 0.3 of 0.1..0.5 is half.
    common = replace(style, scale="global")
    assert corner(0.3, common, [[0.1, 0.5]]) == pytest.approx([128, 0, 128], abs=1)
    assert corner(0.7, common, [[0.1, 0.5]]) == list(MAGENTA)
    # No state, no statement.
    assert draw_camera(scene([[0.0, 1.0]]), "a", style, (0.0, 1.0))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("border", ["none", "magenta"])
def test_no_pixel_of_a_picture_is_covered_in_a_frame(border):
    shares = {"latent": 0.1, "state": 0.3, "environment_state": 0.1, "a": 0.2, "long name": 0.3}
    cameras = {
        "a": CameraMap(noise(96, 96), np.ones((3, 3)), 32),
        "long name": CameraMap(noise(100, 60, 1), np.arange(8.0).reshape(4, 2), 32),
    }
    seen = AttentionScene("m", cameras, shares, "step 1", "mass per cell")
    style = AttentionStyle(border=border, target_height=200)
    frame = attention_frame(seen, style, note="a note")
    edge = 15 if border == "magenta" else 0
    top, left = 2 * CAPTION_PX, 0
    for name, width in (("a", 200), ("long name", 120)):
        expected = draw_camera(seen, name, style, (0.0, 7.0))
        assert expected.shape[:2] == (200 + 2 * edge, width + 2 * edge)
        inside = frame[top : top + len(expected), left : left + expected.shape[1]]
        np.testing.assert_array_equal(inside, expected)
        left += expected.shape[1] + GAP_PX
    # The bar stands level with the pictures.
    bar = frame[top + edge : top + edge + 200, left : left + BAR_PX]
    np.testing.assert_array_equal(bar, draw_shares(shares, 200))
    assert (frame[top : top + edge, left : left + BAR_PX] == 255).all()


def test_pieces_of_the_bar_are_as_high_as_their_shares():
    shares = {"latent": 0.05, "state": 0.5, "left": 0.25, "right": 0.2}
    bar = draw_shares(shares, 200)
    colours = share_colours(tuple(shares))
    assert colours["state"] == MAGENTA
    assert len(set(colours.values())) == 4
    heights = {name: int((bar[:, 0] == colour).all(-1).sum()) for name, colour in colours.items()}
    assert heights == {"latent": 10, "state": 100, "left": 50, "right": 40}
    assert (bar[:10, 0] == colours["latent"]).all()


def test_a_method_without_shares_has_no_bar():
    values = np.arange(9.0).reshape(3, 3)
    colours = share_colours(("state", "a")).values()

    def has_bar(seen) -> bool:
        frame = attention_frame(seen, AttentionStyle(overlay_alpha=0.0))
        return any((frame == colour).all(-1).any() for colour in colours)

    assert has_bar(scene(values, shares={"state": 0.5, "a": 0.5}))
    assert not has_bar(scene(values))


def test_outlines_run_along_the_border_of_the_object():
    rows, columns = np.mgrid[:64, :64] + 0.5
    disc = np.hypot(rows - 30, columns - 40) < 12
    corner = (rows < 10) & (columns < 10)
    picture = plain(0, 320, 320)
    draw_outlines(picture, [disc, corner, np.zeros((7, 5), bool)], (0, 255, 0))
    y, x = np.nonzero(picture[..., 1] > 128)
    at_disc = np.hypot(y + 0.5 - 150, x + 0.5 - 200) < 80
    radius = np.hypot(y + 0.5 - 150, x + 0.5 - 200)[at_disc]
    np.testing.assert_allclose(radius, 60, atol=5)
    angles = np.arctan2(y - 150, x - 200)[at_disc]
    assert len(np.unique(np.round(angles, 1))) > 60
    # What reaches the edge of the picture is outlined there, too.
    at_corner = ~at_disc
    assert (y[at_corner].min(), x[at_corner].min()) == (0, 0)
    np.testing.assert_allclose((y[at_corner].max(), x[at_corner].max()), 50, atol=3)


# Frames, strips, videos


def test_a_note_is_broken_into_lines_and_kept_whole():
    seen = scene([[0.0, 1.0]])
    without = attention_frame(seen, AttentionStyle())
    one = attention_frame(seen, AttentionStyle(), note="3x3 cells")
    long = attention_frame(seen, AttentionStyle(), note="each sees the whole picture " * 8)
    assert len(one) == len(without) + CAPTION_PX
    assert (len(long) - len(without)) % CAPTION_PX == 0
    assert len(long) > len(one)
    assert long.shape[1] == without.shape[1]
    np.testing.assert_array_equal(one[: len(without)], without)
    # Every line is written, none beyond the edge.
    for top in range(len(without), len(long), CAPTION_PX):
        line = long[top : top + CAPTION_PX]
        assert (line < 128).any()
        assert (line[:, -2:] == 255).all()


def test_ragged_cameras_make_even_videos_of_every_frame(tmp_path):
    sizes = {"left": (96, 96), "right": (60, 101), "wrist": (333, 125)}

    def scenes():
        generator = np.random.default_rng(0)
        for step in range(5):
            cameras = {
                name: CameraMap(noise(*size), generator.random((3, 4)))
                for name, size in sizes.items()
            }
            state = step / 4
            shares = {"state": state, "left": 1 - state, "right": 0.0, "wrist": 0.0}
            yield AttentionScene("method", cameras, shares, f"step {step * 50}", "mass per cell")

    style = AttentionStyle(target_height=121, border="magenta")
    paths = {name: tmp_path / f"{name}.mp4" for name in [*sizes, SIDE_BY_SIDE]}
    write_videos(paths, (attention_frames(seen, style) for seen in scenes()), 10.0)
    shapes = {}
    for name, path in paths.items():
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == 5
        shapes[name] = frames[0].shape
        assert all(size % 2 == 0 for size in frames[0].shape[:2])
    heights = {shape[0] for shape in shapes.values()}
    assert len(heights) == 1
    assert shapes[SIDE_BY_SIDE][1] > max(shapes[name][1] for name in sizes)


def test_one_camera_makes_one_video():
    assert list(attention_frames(scene([[0.0, 1.0]]), AttentionStyle())) == ["a"]


def test_a_camera_alone_keeps_the_range_of_all():
    seen = scene([[0.0, 0.1]], [[0.0, 1.0]])
    alone = attention_frames(seen, AttentionStyle())["a"]
    expected = draw_camera(seen, "a", AttentionStyle(), (0.0, 1.0))
    np.testing.assert_array_equal(alone[40:400, :360], expected)
    with pytest.raises(ValueError, match=r"\['z'\] are not in \['a', 'b'\]"):
        attention_frame(seen, AttentionStyle(), cameras=["z"])


def strip_rows(n_methods=2, n_frames=3, height=100, width=140) -> list[list[AttentionScene]]:
    generator = np.random.default_rng(0)
    pictures = [noise(height, width, frame) for frame in range(n_frames)]
    shares = [{"state": 0.4, "camera": 0.6}, {}]
    return [
        [
            AttentionScene(
                f"method {method}",
                {"camera": CameraMap(picture, generator.random((4, 5)), 32)},
                shares[method % 2],
                f"step {frame}",
            )
            for frame, picture in enumerate(pictures)
        ]
        for method in range(n_methods)
    ]


def test_a_strip_has_the_pictures_first_and_a_row_for_each_method():
    rows = strip_rows()
    strip = attention_strip(rows, AttentionStyle(), height_px=80)
    tops = [CAPTION_PX, 2 * CAPTION_PX + 80, 3 * CAPTION_PX + 160]
    lefts = [frame * (112 + 3 + 7 + GAP_PX) for frame in range(3)]
    for column, left in enumerate(lefts):
        raw = fit_height(rows[0][column].cameras["camera"].picture, 80)
        np.testing.assert_array_equal(strip[tops[0] : tops[0] + 80, left : left + 112], raw)
        for row, top in zip(rows, tops[1:], strict=True):
            found = scale_range(row[column], AttentionStyle())
            cell = draw_camera(row[column], "camera", AttentionStyle(), found, 80)
            np.testing.assert_array_equal(strip[top : top + 80, left : left + 112], cell)
        # A bar where there are shares, white where there are none.
        bars = [strip[top : top + 80, left + 115 : left + 122] for top in tops]
        np.testing.assert_array_equal(bars[1], draw_shares(rows[0][0].shares, 80, 7))
        assert (bars[0] == 255).all()
        assert (bars[2] == 255).all()
    # Titles are written above the rows.
    for top in tops:
        assert (strip[top - CAPTION_PX : top] < 128).any()


def test_a_camera_has_one_colour_in_every_bar_of_a_strip():
    maps = [[[0.0, 1.0]], [[0.0, 1.0]]]
    both = scene(*maps, shares={"a": 0.5, "b": 0.5})
    one = scene(*maps, shares={"state": 0.5, "b": 0.5})
    strip = attention_strip([[both], [one]], AttentionStyle(overlay_alpha=0.0), height_px=80)
    bars = [strip[top : top + 80, 166:173] for top in (120, 220)]
    expected = share_colours(("a", "b"))["b"]
    for bar in bars:
        np.testing.assert_array_equal(bar[40:], plain(expected, 40, 7))


def test_each_method_of_a_strip_has_the_range_of_its_own_episode():
    rows = strip_rows()
    style = AttentionStyle(scale="episode")
    ranges = [(0.0, 1.0), (0.0, 2.0)]
    strip = attention_strip(rows, style, ranges, height_px=80)
    for row, found, top in zip(rows, ranges, (120, 220), strict=True):
        cell = draw_camera(row[0], "camera", style, found, 80)
        np.testing.assert_array_equal(strip[top : top + 80, :112], cell)
    with pytest.raises(ValueError, match="1 ranges for 2 methods"):
        attention_strip(rows, style, ranges[:1])
    with pytest.raises(ValueError, match="episode_range"):
        attention_strip(rows, style)


def test_strips_of_scenes_that_do_not_match_are_refused():
    rows = strip_rows()
    with pytest.raises(ValueError, match=r"\[3, 2\] scenes"):
        attention_strip([rows[0], rows[1][:2]], AttentionStyle())
    with pytest.raises(ValueError, match="scenes"):
        attention_strip([], AttentionStyle())
    with pytest.raises(ValueError, match="column 0"):
        attention_strip([rows[0], strip_rows(2, 3, 128, 160)[1]], AttentionStyle())


def test_drawing_leaves_the_scene_alone():
    pixels, mask = noise(64, 64), np.ones((64, 64), bool)
    seen = AttentionScene("m", {"a": CameraMap(pixels, np.ones((2, 2)), None, [mask])})
    before = pixels.copy()
    style = AttentionStyle(target_height=64, border="magenta", overlay_alpha=0.0)
    attention_frame(seen, style)
    attention_strip([[seen]], style, height_px=64)
    np.testing.assert_array_equal(pixels, before)


# What is refused


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_values_that_have_no_colour_are_refused(value):
    with pytest.raises(ValueError, match="values"):
        CameraMap(plain(0), np.array([[1.0, value]]))


@pytest.mark.parametrize(
    ("cameras", "shares", "problem"),
    [
        ("", {}, "at least one camera"),
        ("ab", {"state": 0.5, "a": 0.6}, r"sum to 1\.1"),
        ("ab", {"state": 1.5, "a": -0.5}, ">= 0"),
        ("ab", {"state": float("nan"), "a": 1.0}, "sum to nan"),
        ("ab", {"c": 1.0}, r"\['c'\]"),
        (["state"], {}, "rename"),
        ([SIDE_BY_SIDE], {}, "rename"),
    ],
)
def test_scenes_that_say_something_impossible_are_refused(cameras, shares, problem):
    maps = {name: CameraMap(plain(0), np.ones((1, 1))) for name in cameras}
    with pytest.raises(ValueError, match=problem):
        AttentionScene("m", maps, shares)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"colormap": "virids"}, "viridis"),
        ({"overlay_alpha": 1.5}, "overlay_alpha: 1.5"),
        ({"target_height": 8}, "target_height: 8 px"),
        ({"proprio_border_width": 0}, "proprio_border_width"),
        ({"scale": "fixed"}, "value_range: None"),
        ({"value_range": (0.0, 1.0)}, "scale 'frame'"),
        ({"scale": "fixed", "value_range": (1.0, 1.0)}, "ascending"),
        ({"scale": "fixed", "value_range": (0.0, float("inf"))}, "ascending"),
    ],
)
def test_styles_that_cannot_be_drawn_are_refused(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        AttentionStyle(**wrong)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("scale", "batch", "scale: 'batch'.*'episode'"),
        ("border", "red", "border: 'red'.*'magenta'"),
        ("interpolation", "cubic", "interpolation: 'cubic'.*'bicubic'"),
    ],
)
def test_words_that_no_style_knows_are_refused(name, value, problem):
    style = AttentionStyle()
    # Past the checker of signatures, which only tests have.
    object.__setattr__(style, name, value)
    with pytest.raises(ValueError, match=problem):
        style.__post_init__()
