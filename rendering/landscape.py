"""Action landscapes as pictures: heat map, credible regions and markers, beside the environment.

All of it lies in one frame, that of the environment's own picture: origin at the upper left, y
downwards. On a board of ``size`` px, an action a lies ``(a - low) / (high - low) * size`` px from
the left and upper edges, and N cells have their borders at ``linspace(0, size, N + 1)``. Colours
have the fixed range of the method, so that frames, checkpoints and policies compare.

A board over two of more dimensions shows no environment: it has axes with names and numbers, and
its second dimension points upwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from landscapes.grid import Grid
from landscapes.landscape import Landscape
from landscapes.space import Axis
from rendering import marks
from rendering.colour import colour_table, colours
from rendering.video import CAPTION_PX, captioned

GAP_PX = 8
"""White between boards."""
LEGEND_PX = 134
"""Width of a column of the legend."""
LEGEND_ROW_PX = 18
SWATCH_PX = 24
"""Width of a symbol in the legend."""
FOOTER_PX = 3 * LEGEND_ROW_PX + 2
"""Height below a board: colour bar, or the legend of the markers."""
MIN_BOARD_PX = 96
AXIS_PX = 32
"""Below a board with axes: numbers and a name."""
SIDE_PX = 54
"""Left of a board with axes: a name and numbers."""
DASHES_PX = (None, (7.0, 5.0), (1.0, 5.0))
"""Dash and gap of the border of each credible region, smallest region first; None is solid."""
SWATCH = (72, 72, 96)
"""Behind the symbols of the legend, which are made for colour maps."""
SYMBOLS = {
    "expert": "expert",
    "prediction": "policy",
    "arrow": "policy to expert",
    "executed": "executed",
    "trace": "expert's trace",
    "wedge": "off the board",
}
"""What the legend calls the markers."""


@dataclass(frozen=True)
class Markers:
    """Points of interest on one board, in data units; what is None or empty is not drawn.

    A point off the board becomes a triangle at the border, of the same colour.
    """

    expert: Float[np.ndarray, " 2"] | None = None
    """What the demonstrator did: red cross."""
    prediction: Float[np.ndarray, " 2"] | None = None
    """What the policy would do, asked now: white star, with a yellow arrow to the expert."""
    executed: Float[np.ndarray, " 2"] | None = None
    """What was executed, from a chunk that may be old: orange circle."""
    executed_age: int | None = None
    """Control steps since that chunk was predicted; None where chunks were mixed."""
    expert_trace: Float[np.ndarray, "step 2"] = field(default_factory=lambda: np.empty((0, 2)))
    """The demonstrator's last actions, oldest first: red line."""

    def __post_init__(self) -> None:
        for name in ("expert", "prediction", "executed", "expert_trace"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"{name}: {values} is not finite; leave out what is not known")


@dataclass(frozen=True)
class Panel:
    """One landscape to draw, with what lies on top of it."""

    title: str
    """One line of ASCII above the board."""
    scores: Float[np.ndarray, "row column"]
    """Score of every cell; minus infinity lies below every range."""
    grid: Grid
    value_range: tuple[float, float]
    """Scores at the ends of the colour map."""
    unit: str
    """Of the scores, for the colour bar."""
    mass: Float[np.ndarray, "row column"] | None = None
    """Probability of every cell; None draws no credible regions."""
    thresholds: Float[np.ndarray, " level"] | None = None
    """Mass of the last cell inside each region."""
    levels: tuple[float, ...] = ()
    """Mass of each region, ascending."""
    markers: Markers = field(default_factory=Markers)
    axes: tuple[Axis, Axis] | None = None
    """Across and upwards; None for a board that lies like the environment's picture."""

    def __post_init__(self) -> None:
        cells = (self.grid.resolution, self.grid.resolution)
        for name, values in (("scores", self.scores), ("mass", self.mass)):
            if values is not None and values.shape != cells:
                raise ValueError(f"{name}: shape {values.shape}; the grid has {cells} cells")
        # NaN fails every comparison.
        if not (self.scores < np.inf).all():
            raise ValueError("scores: NaN or infinity; only minus infinity has a colour")
        if self.mass is not None and not (self.mass >= 0).all():
            raise ValueError("mass: NaN or negative; give the probability of every cell")
        low, high = self.value_range
        if not -np.inf < low < high < np.inf:
            raise ValueError(f"value_range: {self.value_range}; give two finite, ascending scores")
        n_thresholds = 0 if self.thresholds is None else len(self.thresholds)
        if (self.mass is None) != (not n_thresholds) or n_thresholds != len(self.levels):
            raise ValueError(
                f"{n_thresholds} thresholds for levels {self.levels}; give the mass of the cells "
                "with a threshold for each level, or none of them"
            )
        if n_thresholds > len(DASHES_PX):
            raise ValueError(f"levels: {self.levels}; at most {len(DASHES_PX)} can be told apart")

    @classmethod
    def of(
        cls,
        landscape: Landscape,
        frame: int,
        query: int,
        title: str,
        markers: Markers | None = None,
        regions: bool = True,
    ) -> "Panel":
        """Take one board out of a landscape.

        Args:
            landscape: What a method answered.
            frame: Its place in the landscape.
            query: Chunk step.
            title: One line of ASCII.
            markers: On the board.
            regions: Draw the credible regions (``--show_confidence_intervals``).
        """
        place = frame, landscape.queries.index(query)
        return cls(
            title=title,
            scores=landscape.scores[place].cpu().numpy(),
            grid=landscape.grid,
            value_range=landscape.value_range,
            unit=landscape.unit,
            mass=landscape.mass[place].cpu().numpy() if regions else None,
            thresholds=landscape.thresholds[place].cpu().numpy() if regions else None,
            levels=landscape.levels if regions else (),
            markers=markers or Markers(),
            axes=None if landscape.plane is None else (landscape.plane.x, landscape.plane.y),
        )


@dataclass(frozen=True)
class Scene:
    """One instant: the environment, and the landscapes beside it."""

    panels: Sequence[Panel]
    environment: UInt8[np.ndarray, "height width 3"] | None = None
    """Picture of the whole board, sharpest when drawn :func:`board_px` high; None for landscapes
    alone."""
    title: str = ""
    """One line of ASCII above the environment."""

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("a scene without a landscape; give at least one panel")


def board_px(height_px: int) -> int:
    """Height of the boards in a frame of :func:`side_by_side`.

    Raises:
        ValueError: When nothing could be seen at that height.
    """
    size = height_px - CAPTION_PX - FOOTER_PX
    if size < MIN_BOARD_PX:
        raise ValueError(f"height {height_px} px: give at least {height_px - size + MIN_BOARD_PX}")
    return size


def side_by_side(
    scene: Scene, height_px: int = 480, colormap: str = "viridis"
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw one frame of a video: environment, landscapes, their colour bars and a legend.

    Args:
        scene: What to draw; equally many panels in every frame of a video.
        height_px: Of the frame (``--target_height``).
        colormap: Name of a matplotlib colour map.

    Raises:
        ValueError: When the frame is too low, or matplotlib has no such colour map.
    """
    size = board_px(height_px)
    symbols, levels = _symbols(scene.panels)
    columns = []
    for panel in scene.panels:
        board = _board(panel, size, colormap)
        bar = draw_colour_bar(panel.value_range, panel.unit, size, colormap)
        columns.append([_caption(panel.title, size), board, bar])
    is_room_below = False
    if scene.environment is not None:
        picture = to_height(scene.environment, size)
        width = picture.shape[1]
        columns.insert(0, [_caption(scene.title, width), picture])
        is_room_below = width >= 3 * LEGEND_PX
    if is_room_below:
        columns[0].append(draw_legend(symbols, levels, 3))
    else:
        columns.append([draw_legend(symbols, levels, 1)])
    return _lay_out(columns)


def landscape_strip(
    scenes: Sequence[Scene], size_px: int = 208, colormap: str = "viridis"
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw many instants as one still picture: a row for each, the environment first.

    Args:
        scenes: With as many panels each (a column for each chunk step, say), all of one method.
        size_px: Height of a board.
        colormap: Name of a matplotlib colour map.

    Raises:
        ValueError: When there is no scene, or scenes do not fit below each other.
    """
    layouts = {(scene.environment is None, len(scene.panels)) for scene in scenes}
    scales = {(panel.value_range, panel.unit) for scene in scenes for panel in scene.panels}
    if len(layouts) != 1 or len(scales) != 1:
        raise ValueError(
            f"{len(scenes)} scenes with {sorted(n for _, n in layouts)} panels and colour bars "
            f"{sorted(scales)}; give scenes alike, of one method"
        )
    rows = []
    for scene in scenes:
        columns = [
            [_caption(panel.title, size_px), _board(panel, size_px, colormap)]
            for panel in scene.panels
        ]
        if scene.environment is not None:
            picture = to_height(scene.environment, size_px)
            columns.insert(0, [_caption(scene.title, picture.shape[1]), picture])
        rows.append(_lay_out(columns))
    width = max(rows[0].shape[1], LEGEND_PX)
    ((value_range, unit),) = scales
    symbols, levels = _symbols([panel for scene in scenes for panel in scene.panels])
    legend = draw_legend(symbols, levels, min(width // LEGEND_PX, 3))
    room = width - legend.shape[1] - GAP_PX
    if room >= 2 * LEGEND_PX:
        bar = draw_colour_bar(value_range, unit, room, colormap)
        return _lay_out([[*rows, _lay_out([[legend], [bar]])]])
    return _lay_out([[*rows, draw_colour_bar(value_range, unit, width, colormap), legend]])


def draw_landscape(
    panel: Panel, size_px: int, colormap: str = "viridis"
) -> UInt8[np.ndarray, "size size 3"]:
    """Draw one board and nothing around it: heat map, credible regions, markers.

    Every cell has one colour, at its exact place: nothing is smoothed. Where the panel has axes,
    the second one points upwards.

    Args:
        panel: What to draw.
        size_px: Height and width.
        colormap: Name of a matplotlib colour map.
    """
    if panel.axes is not None:
        panel = _upright(panel)
    cells = colours(panel.scores, panel.value_range, colour_table(colormap))
    # More cells than pixels: mix their colours, lest a narrow peak falls between pixels.
    is_finer = panel.grid.resolution > size_px
    method = cv2.INTER_AREA if is_finer else cv2.INTER_NEAREST_EXACT
    picture = np.asarray(cv2.resize(cells, (size_px, size_px), interpolation=method), np.uint8)
    draw_regions(picture, panel)
    draw_markers(picture, panel.grid, panel.markers)
    return picture


def _upright(panel: Panel) -> Panel:
    """The panel upside down: its second dimension then grows upwards in a picture."""
    total = np.array([0.0, panel.grid.low[1] + panel.grid.high[1]])
    sign = np.array([1.0, -1.0])

    def turned(points: np.ndarray | None) -> np.ndarray | None:
        return None if points is None else total + sign * points

    markers = panel.markers
    return replace(
        panel,
        scores=panel.scores[::-1],
        mass=None if panel.mass is None else panel.mass[::-1],
        markers=replace(
            markers,
            expert=turned(markers.expert),
            prediction=turned(markers.prediction),
            executed=turned(markers.executed),
            expert_trace=total + sign * markers.expert_trace,
        ),
        axes=None,
    )


def _board(panel: Panel, size_px: int, colormap: str) -> UInt8[np.ndarray, "height width 3"]:
    """Draw one board ``size_px`` high, with the names and numbers of its axes if it has any."""
    if panel.axes is None:
        return draw_landscape(panel, size_px, colormap)
    size = size_px - AXIS_PX
    x, y = panel.axes
    framed = np.full((size_px, SIDE_PX + size, 3), 255, np.uint8)
    framed[:size, SIDE_PX:] = draw_landscape(panel, size, colormap)
    across = framed[size:, SIDE_PX:]
    draw_axis(across, x)
    # Drawn lying down, then put upright: OpenCV writes no other way.
    side = np.full((SIDE_PX, size, 3), 255, np.uint8)
    marks.draw_text(side, y.label, (max((size - marks.text_width(y.label)) // 2, 0), 12))
    framed[:size, :SIDE_PX] = np.rot90(side)
    for value in ticks(y.low, y.high, max(size // 40, 1)):
        row = round((y.high - value) / (y.high - y.low) * (size - 1))
        framed[row, SIDE_PX - 4 : SIDE_PX] = marks.CASING
        label = f"{value:.3g}"
        at = SIDE_PX - 6 - marks.text_width(label), min(max(row + 4, 9), size)
        marks.draw_text(framed, label, at)
    return framed


def draw_axis(strip: UInt8[np.ndarray, "height width 3"], axis: Axis) -> None:
    """Write numbers and the name of an axis across a white strip below a board, in place."""
    width = strip.shape[1]
    for value in ticks(axis.low, axis.high, max(width // 48, 1)):
        x = round((value - axis.low) / (axis.high - axis.low) * (width - 1))
        strip[:4, x] = marks.CASING
        label = f"{value:.3g}"
        length = marks.text_width(label)
        marks.draw_text(strip, label, (min(max(x - length // 2, 0), width - length), 15))
    marks.draw_text(strip, axis.label, (max((width - marks.text_width(axis.label)) // 2, 0), 28))


def draw_regions(picture: UInt8[np.ndarray, "height width 3"], panel: Panel) -> None:
    """Outline the credible regions on any picture of the whole board, in place."""
    if panel.mass is None or panel.thresholds is None:
        return
    height, width, _ = picture.shape
    px_per_cell = np.array([width, height]) / panel.grid.resolution
    outlines = region_outlines(panel.mass, panel.thresholds)
    drawn: list[np.ndarray] = []
    for outline, dash in zip(outlines, DASHES_PX, strict=False):
        # The edge of the picture is half a pixel from the middle of its first and last pixels.
        lines = [np.clip(line * px_per_cell - 0.5, 0, (width - 1, height - 1)) for line in outline]
        drawn += lines if dash is None else [d for line in lines for d in marks.dashes(line, *dash)]
    marks.draw_lines(picture, drawn, marks.WHITE)


def region_outlines(
    mass: Float[np.ndarray, "row column"], thresholds: Float[np.ndarray, " level"]
) -> list[list[Float[np.ndarray, "_ 2"]]]:
    """Trace the regions whose cells hold at least a threshold each.

    The log density is interpolated between the centres of cells, and a border runs halfway, in
    nats, between the last cell inside and the next one: it encloses the mass of its level to within
    0.03 as long as kernels are no narrower than a cell, and less below. A region that reaches the
    end of the board is closed there.

    Args:
        mass: Of every cell.
        thresholds: Mass of the last cell inside each region; 0 for a board that holds no mass,
            which has no regions, and infinite for a region that the board cannot hold.

    Returns:
        For each region its closed lines, in cells (x, y) from the upper left corner of the board.
    """
    from contourpy import contour_generator

    inside = mass >= thresholds.min()
    if thresholds.min() <= 0 or not inside.any():
        return [[] for _ in thresholds]
    # Far outside of every region; an empty cell has no logarithm.
    floor = float(np.log(thresholds.min())) - 30
    log_mass = np.log(np.maximum(mass, np.exp(floor)))
    # Only the neighbourhood of the largest region matters.
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    top, left = max(rows[0] - 1, 0), max(columns[0] - 1, 0)
    start = np.array([left, top]) - 1.5
    near = log_mass[top : rows[-1] + 2, left : columns[-1] + 2]
    # Outermost cells reach to the end of the board, and beyond it there is nothing.
    padded = np.pad(np.pad(near, 1, mode="edge"), 1, constant_values=floor)
    generator = contour_generator(z=padded, name="serial")
    outlines: list[list[np.ndarray]] = []
    for threshold in thresholds:
        if np.isinf(threshold):
            outlines.append([])
            continue
        next_mass = np.max(mass, initial=0, where=mass < threshold)
        next_log_mass = np.log(max(next_mass, np.exp(floor)))
        lines = generator.lines((np.log(threshold) + next_log_mass) / 2)
        # From indices of padded cells; what lies beyond the board comes back to its end.
        moved = [np.asarray(line) + start for line in lines]
        outlines.append([np.clip(line, 0, len(mass)) for line in moved])
    return outlines


def draw_markers(
    picture: UInt8[np.ndarray, "height width 3"], grid: Grid, markers: Markers
) -> None:
    """Draw markers on any picture of the whole board, in place."""
    height, width, _ = picture.shape
    last = width - 1, height - 1
    radius = max(width / 48, 6.0)

    def place(point: Float[np.ndarray, " 2"] | None, colour: marks.Colour) -> np.ndarray | None:
        """Find the pixel of a point; off the board, mark the border and find none."""
        if point is None:
            return None
        at = _pixels(point, grid, picture)
        outwards = _outwards(point, grid)
        at = np.clip(at, 0, last)
        if not outwards.any():
            return at
        marks.draw_wedge(picture, at, outwards, colour, 0.7 * radius)
        return None

    if len(markers.expert_trace) > 1:
        trace = _pixels(markers.expert_trace, grid, picture).astype(np.float64)
        marks.draw_lines(picture, [trace], marks.RED, 2)
    if markers.expert is not None and markers.prediction is not None:
        start = _pixels(markers.prediction, grid, picture)
        end = _pixels(markers.expert, grid, picture)
        marks.draw_arrow(picture, start, end, marks.YELLOW, radius, margin=radius)
    executed = markers.executed
    if executed is not None and (at := place(executed, marks.ORANGE)) is not None:
        marks.draw_ring(picture, at, marks.ORANGE, 0.8 * radius)
        if markers.executed_age is not None:
            # Beside the circle, where the star is not.
            star = markers.prediction
            is_left = star is not None and bool(star[0] > executed[0])
            text = f"age {markers.executed_age}"
            marks.draw_tag(picture, text, at, marks.ORANGE, radius, is_left)
    if (at := place(markers.prediction, marks.WHITE)) is not None:
        marks.draw_star(picture, at, marks.WHITE, radius)
    if (at := place(markers.expert, marks.RED)) is not None:
        marks.draw_cross(picture, at, marks.RED, width // 20, max(width // 200, 1))


@lru_cache
def draw_legend(
    symbols: tuple[str, ...], levels: tuple[float, ...], n_columns: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Say what the markers and lines mean, each symbol at its own place whoever else is there.

    Args:
        symbols: Names in :data:`SYMBOLS`.
        levels: Masses of the credible regions.
        n_columns: Symbols in a row; three fit below a board.

    Returns:
        A shared picture, read-only.
    """
    labels = {place: SYMBOLS[name] for place, name in enumerate(SYMBOLS) if name in symbols}
    labels |= {len(SYMBOLS) + i: f"{level:.0%} of mass" for i, level in enumerate(levels)}
    n_rows = -(-(len(SYMBOLS) + len(DASHES_PX)) // n_columns)
    legend = np.full((n_rows * LEGEND_ROW_PX + 2, n_columns * LEGEND_PX, 3), 255, np.uint8)
    for place, label in labels.items():
        x, y = place % n_columns * LEGEND_PX + 4, place // n_columns * LEGEND_ROW_PX + 3
        legend[y : y + LEGEND_ROW_PX - 3, x : x + SWATCH_PX] = _draw_symbol(place)
        marks.draw_text(legend, label, (x + SWATCH_PX + 4, y + 11))
    legend.flags.writeable = False
    return legend


@lru_cache
def draw_colour_bar(
    value_range: tuple[float, float], unit: str, width_px: int, colormap: str
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a colour map from its low to its high end, with numbers and their unit.

    Returns:
        A shared picture, read-only.
    """
    low, high = value_range
    left, right, top, bottom = 14, width_px - 14, 6, 20
    bar = np.full((FOOTER_PX, width_px, 3), 255, np.uint8)
    ramp = np.linspace(low, high, right - left)[None]
    bar[top:bottom, left:right] = colours(ramp, value_range, colour_table(colormap))
    for value in ticks(low, high, max((right - left) // 40, 1)):
        x = left + round((value - low) / (high - low) * (right - left - 1))
        bar[bottom : bottom + 4, x] = marks.CASING
        label = f"{value:g}"
        marks.draw_text(bar, label, (x - marks.text_width(label) // 2, bottom + 16))
    marks.draw_text(bar, unit, ((width_px - marks.text_width(unit)) // 2, FOOTER_PX - 6))
    bar.flags.writeable = False
    return bar


def _draw_symbol(place: int) -> UInt8[np.ndarray, "height width 3"]:
    """Draw what the legend's place stands for."""
    height, width = LEGEND_ROW_PX - 3, SWATCH_PX
    swatch = np.full((height, width, 3), SWATCH, np.uint8)
    centre = np.array([width // 2, height // 2])
    left, right = np.array([3, height // 2]), np.array([width - 4, height // 2])
    across = np.stack([left, right]).astype(np.float64)
    name = dict(enumerate(SYMBOLS)).get(place)
    if name == "expert":
        marks.draw_cross(swatch, centre, marks.RED, 9, 2)
    elif name == "prediction":
        marks.draw_star(swatch, centre, marks.WHITE, 6.0)
    elif name == "arrow":
        marks.draw_arrow(swatch, left, right, marks.YELLOW, 8.0)
    elif name == "executed":
        marks.draw_ring(swatch, centre, marks.ORANGE, 4.0)
    elif name == "trace":
        marks.draw_lines(swatch, [across], marks.RED, 2)
    elif name == "wedge":
        marks.draw_wedge(swatch, right, np.array([1.0, 0.0]), marks.WHITE, 4.0)
    else:
        dash = DASHES_PX[place - len(SYMBOLS)]
        lines = [across] if dash is None else marks.dashes(across, *dash)
        marks.draw_lines(swatch, lines, marks.WHITE)
    return swatch


def _symbols(panels: Sequence[Panel]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Find the markers in sight, by their names in :data:`SYMBOLS`, and the levels of the regions.

    Raises:
        ValueError: When panels have regions of different levels.
    """
    levels = {panel.levels for panel in panels} - {()}
    if len(levels) > 1:
        raise ValueError(f"credible regions of {sorted(levels)} in one picture; give one legend")
    in_sight: set[str] = set()
    for panel in panels:
        in_sight |= _markers_in_sight(panel)
    return tuple(name for name in SYMBOLS if name in in_sight), next(iter(levels), ())


def _markers_in_sight(panel: Panel) -> set[str]:
    markers = panel.markers
    points = {
        "expert": markers.expert,
        "prediction": markers.prediction,
        "executed": markers.executed,
    }
    known = {name: point for name, point in points.items() if point is not None}
    names = set(known)
    if len(markers.expert_trace) > 1:
        names.add("trace")
    if {"expert", "prediction"} <= names:
        names.add("arrow")
    if any(_outwards(point, panel.grid).any() for point in known.values()):
        names.add("wedge")
    return names


def _outwards(point: Float[np.ndarray, " 2"], grid: Grid) -> Float[np.ndarray, " 2"]:
    """Direction from the board to a point off it, by signs; zero for points on the board."""
    return np.greater(point, grid.high) * 1.0 - np.less(point, grid.low)


def to_height(
    picture: UInt8[np.ndarray, "height width 3"], height_px: int
) -> UInt8[np.ndarray, "height_px width_px 3"]:
    """Bring a picture to a height, in its proportions."""
    height, width, _ = picture.shape
    if height == height_px:
        return picture
    method = cv2.INTER_AREA if height > height_px else cv2.INTER_CUBIC
    size = max(round(width * height_px / height), 1), height_px
    return np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)


def _caption(text: str, width_px: int) -> UInt8[np.ndarray, "height width 3"]:
    """Write one line on a strip of white."""
    return captioned(np.empty((0, width_px, 3), np.uint8), text)


def _lay_out(
    columns: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
) -> UInt8[np.ndarray, "height width 3"]:
    """Stack pictures in columns, and put the columns side by side on white."""
    widths = [max(picture.shape[1] for picture in column) for column in columns]
    height = max(sum(len(picture) for picture in column) for column in columns)
    frame = np.full((height, sum(widths) + GAP_PX * (len(columns) - 1), 3), 255, np.uint8)
    left = 0
    for column, width in zip(columns, widths, strict=True):
        top = 0
        for picture in column:
            frame[top : top + len(picture), left : left + picture.shape[1]] = picture
            top += len(picture)
        left += width + GAP_PX
    return frame


def ticks(low: float, high: float, n_most: int) -> list[float]:
    """Choose up to ``n_most + 1`` round numbers of a range; its ends where there are none."""
    least = (high - low) / n_most
    decade = 10.0 ** np.floor(np.log10(least))
    step = next(factor * decade for factor in (1, 2, 4, 5, 10) if factor * decade >= least)
    # A whole number of steps may miss the end of the range by a rounding error.
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [index * step for index in range(first, last + 1)] if last > first else [low, high]


def _pixels(
    points: Float[np.ndarray, "*point 2"], grid: Grid, picture: UInt8[np.ndarray, "height width 3"]
) -> Int[np.ndarray, "*point 2"]:
    """Pixels (x, y) of actions, rounded as ``PushT.frame`` does; far away ones come nearer."""
    height, width, _ = picture.shape
    size = np.array([width, height])
    pixels = np.rint((points - np.array(grid.low)) / np.array(grid.size) * size)
    return np.clip(pixels, -4 * size, 5 * size).astype(np.int64)
