"""Densities of single action dimensions as pictures: one small panel each, or along an episode.

For actions of any number of dimensions. A panel shows one instant: the density, filled in tones for
its credible regions, and lines for the demonstration and the policy. Along an episode each
dimension is a band: time to the right, values upwards, the density as colour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from landscapes.landscape import Predictions
from landscapes.marginals import Marginals
from landscapes.space import Axis
from rendering import marks
from rendering.colour import colour_table, colours
from rendering.landscape import draw_colour_bar, ticks
from rendering.layout import below, beside, blank, line

RANGE_NATS = (-2.0, 4.0)
"""Nats above the uniform density of the axis at the ends of the colour map."""
PANEL_PX = (176, 84)
"""Width and height of one density."""
MAX_COLUMNS = 7
GAP_PX = 10
TICKS_PX = 18
"""Height of the numbers below a density or a band."""
NAME_PX = 176
"""Width of names and numbers beside the bands."""
BAND_PX = 54
"""Height of one dimension along an episode."""
LEGEND_PX = 22
LEGEND_GAP_PX = 16
"""Between two entries."""
TONES = ((52, 104, 176), (118, 164, 216), (186, 212, 240))
"""Fill of the regions of 50, 80 and 95 %, smallest first."""
OUTSIDE = (228, 236, 244)
"""Fill beyond them."""
NOTED_BEYOND = 0.01
"""Mass beyond an axis or a picture from which on that is said."""
GRID_GREY = (216, 216, 216)

Picture = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True)
class Values:
    """What is marked in the panel of one dimension, in data units; None is not drawn."""

    expert: float | None = None
    """What the demonstrator did: red line."""
    prediction: float | None = None
    """What the policy would do: black line with a star."""
    executed: float | None = None
    """What is executed, from a chunk that may be old: orange ring."""


def marginal_panels(
    densities: Marginals,
    predictions: Predictions,
    frame: int,
    query: int,
    title: str,
    executed: Float[np.ndarray, " action"] | None = None,
) -> Picture:
    """Draw the density of every dimension at one instant.

    Args:
        densities: Of the frames.
        predictions: On them, at least at the query.
        frame: Place in the frames.
        query: Chunk step.
        title: One line of ASCII above all.
        executed: What is executed at this instant; for chunk step 0.
    """
    place, answered = densities.queries.index(query), predictions.queries.index(query)
    expert = predictions.expert[frame, answered].cpu().numpy()
    is_known = bool(predictions.is_valid[frame, answered])
    point = predictions.point[frame, answered].cpu().numpy()
    panels = [
        draw_density(
            densities.mass[frame, place, dim].numpy(),
            densities.thresholds[frame, place, dim].numpy(),
            float(densities.beyond[frame, place, dim]),
            axis,
            Values(
                expert=float(expert[dim]) if is_known else None,
                prediction=float(point[dim]),
                executed=None if executed is None else float(executed[dim]),
            ),
        )
        for dim, axis in enumerate(densities.space.axes)
    ]
    n_columns = _columns(len(panels))
    rows = [
        beside(panels[start : start + n_columns], GAP_PX)
        for start in range(0, len(panels), n_columns)
    ]
    width = max(rows[0].shape[1], 3 * PANEL_PX[0])
    return below(line(title, width), *rows, _legend(densities.levels, executed is not None, width))


def panel_frames(
    densities: Marginals,
    predictions: Predictions,
    query: int,
    frame_index: Int[np.ndarray, " frame"],
    executed: Float[np.ndarray, "frame action"] | None = None,
) -> Iterator[Picture]:
    """Draw :func:`marginal_panels` of every frame, for a video.

    Args:
        densities: Of the frames.
        predictions: On them, at least at the query.
        query: Chunk step.
        frame_index: Step of each frame within its episode.
        executed: What is executed at each frame; drawn where the query is 0.
    """
    for frame, step in enumerate(frame_index.tolist()):
        now = executed[frame] if executed is not None and query == 0 else None
        title = f"step {step}  {_ahead(query)}"
        yield marginal_panels(densities, predictions, frame, query, title, now)


def draw_density(
    mass: Float[np.ndarray, " cell"],
    thresholds: Float[np.ndarray, " level"],
    beyond: float,
    axis: Axis,
    values: Values,
) -> Picture:
    """Draw one dimension: its name, its density on a scale of its own, its axis.

    Args:
        mass: Of each cell.
        thresholds: Mass of the last cell inside each region, smallest region first; infinite for
            one that the axis does not hold.
        beyond: Mass beyond the ends of the axis.
        axis: Where the cells lie.
        values: Marked on top.
    """
    width, height = PANEL_PX
    panel = blank(height, width)
    peak = float(mass.max())
    if peak > 0:
        here = mass[np.minimum(np.arange(width) * len(mass) // width, len(mass) - 1)]
        tops = np.rint((1 - here / peak) * (height - 14)).astype(np.int64) + 12
        # Regions lie within each other: how many a column belongs to tells its tone.
        n_regions = (here >= thresholds[:, None]).sum(0)
        tones = np.array([OUTSIDE, *TONES[: len(thresholds)][::-1]], np.uint8)[n_regions]
        is_under = np.arange(height)[:, None] >= tops
        panel[is_under] = np.broadcast_to(tones, panel.shape)[is_under]
        outline = np.stack([np.arange(width), np.minimum(tops, height - 1)], -1)
        cv2.polylines(panel, [outline.astype(np.int32)], False, marks.CASING, 1, cv2.LINE_AA)
    panel[-1] = marks.CASING
    if values.expert is not None:
        _mark(panel, values.expert, axis, marks.RED, 2)
    if values.prediction is not None:
        at = _mark(panel, values.prediction, axis, marks.CASING, 1)
        if at is not None:
            marks.draw_star(panel, np.array([at, 8]), marks.WHITE, 6.0)
    if values.executed is not None and (x := _place(values.executed, axis, width)) is not None:
        marks.draw_ring(panel, np.array([x, height - 9]), marks.ORANGE, 5.0)
    numbers = blank(TICKS_PX, width)
    for value in ticks(axis.low, axis.high, 4):
        x = round((value - axis.low) / (axis.high - axis.low) * (width - 1))
        numbers[:4, x] = marks.CASING
        text = f"{value:.3g}"
        length = marks.text_width(text)
        marks.draw_text(numbers, text, (min(max(x - length // 2, 0), width - length), 15))
    label = f"{axis.label}  ({beyond_note(beyond)})" if beyond > NOTED_BEYOND else axis.label
    return below(line(label, width), panel, numbers)


def beyond_note(beyond: float) -> str:
    """Say how much of the mass lies outside of what is shown."""
    return f"{beyond:.0%} beyond"


def marginal_history(
    densities: Marginals,
    predictions: Predictions,
    query: int,
    frame_index: Int[np.ndarray, " frame"],
    title: str,
    width_px: int = 1000,
    colormap: str = "viridis",
) -> Picture:
    """Draw the densities of every dimension along an episode, the demonstration on top.

    Args:
        densities: Of consecutive frames.
        predictions: On them, at least at the query.
        query: Chunk step; everything is drawn at the step that the action is for.
        frame_index: Step of each frame within its episode.
        title: One line of ASCII above all.
        width_px: Of the picture.
        colormap: Name of a matplotlib colour map.
    """
    place, answered = densities.queries.index(query), predictions.queries.index(query)
    nats = densities.nats_above_uniform()[:, place].numpy()
    expert = predictions.expert[:, answered].cpu().numpy()
    point = predictions.point[:, answered].cpu().numpy()
    is_valid = predictions.is_valid[:, answered].cpu().numpy()
    # One number for the whole band: the mean over the frames.
    beyond = densities.beyond[:, place].mean(0).tolist()
    inner = width_px - NAME_PX
    bands = []
    for dim, axis in enumerate(densities.space.axes):
        cells = colours(nats[:, dim].T[::-1], RANGE_NATS, colour_table(colormap))
        band = np.asarray(
            cv2.resize(cells, (inner, BAND_PX), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8
        )
        _path(band, point[:, dim], axis, marks.WHITE, 1)
        _path(band, np.where(is_valid, expert[:, dim], np.nan), axis, marks.RED, 1)
        bands += [beside([_names(axis, beyond[dim]), band], 0), blank(4, width_px)]
    steps = blank(TICKS_PX, inner)
    first, n_frames = int(frame_index[0]) + query, len(frame_index)
    stride = int(frame_index[1] - frame_index[0]) if n_frames > 1 else 1
    for value in ticks(first, first + stride * max(n_frames - 1, 1), 8):
        # In the middle of its frame, where the paths are.
        x = min(round(((value - first) / stride + 0.5) / n_frames * inner - 0.5), inner - 1)
        steps[:4, x] = marks.CASING
        text = f"{value:g}"
        length = marks.text_width(text)
        marks.draw_text(steps, text, (min(max(x - length // 2, 0), inner - length), 15))
    label = blank(TICKS_PX, NAME_PX)
    marks.draw_text(label, "step", (NAME_PX - 40, 15))
    bar = draw_colour_bar(RANGE_NATS, "nats above uniform", min(inner, 480), colormap)
    legend = blank(bar.shape[0], width_px - bar.shape[1] - GAP_PX)
    write_legend(legend, 34, [("expert", marks.RED), ("policy", marks.WHITE)])
    return below(
        line(title, width_px), *bands, beside([label, steps], 0), beside([legend, bar], GAP_PX)
    )


def _names(axis: Axis, beyond: float) -> Picture:
    """Name, unit and ends of an axis, beside its band, and the mass beyond the ends."""
    side = blank(BAND_PX, NAME_PX)
    name = line(axis.name, NAME_PX - 44)
    said = [axis.unit, beyond_note(beyond) if beyond > NOTED_BEYOND else ""]
    below_name = "  ".join(filter(None, said))
    middle = BAND_PX // 2 - (10 if below_name else 0)
    side[middle - 10 : middle - 10 + len(name), : name.shape[1]] = name
    if below_name:
        marks.draw_text(side, below_name, (4, middle + 22))
    for value in ticks(axis.low, axis.high, 3):
        row = round((axis.high - value) / (axis.high - axis.low) * (BAND_PX - 1))
        side[row, -4:] = marks.CASING
        text = f"{value:.3g}"
        at = NAME_PX - 6 - marks.text_width(text), min(max(row + 4, 9), BAND_PX - 1)
        marks.draw_text(side, text, at)
    return side


def _path(
    band: Picture, values: Float[np.ndarray, " frame"], axis: Axis, colour: marks.Colour, width: int
) -> None:
    """Draw values over time, each in the middle of its frame; a gap where one is NaN."""
    height, length, _ = band.shape
    x = (np.arange(len(values)) + 0.5) / len(values) * length - 0.5
    y = (axis.high - values) / (axis.high - axis.low) * height - 0.5
    y = np.clip(y, -height, 2.0 * height)
    pieces = np.split(np.stack([x, y], -1), np.flatnonzero(~np.isfinite(y)))
    whole = [piece[np.isfinite(piece[:, 1])] for piece in pieces]
    marks.draw_lines(band, [piece for piece in whole if len(piece) > 1], colour, width)


def _place(value: float, axis: Axis, width: int) -> int | None:
    """Column of a value in a panel; None beyond its ends."""
    if not axis.low <= value <= axis.high:
        return None
    return round((value - axis.low) / (axis.high - axis.low) * (width - 1))


def _mark(
    panel: Picture, value: float, axis: Axis, colour: marks.Colour, thickness: int
) -> int | None:
    """Draw an upright line at a value, and say where; beyond the axis a wedge, and None."""
    height, width, _ = panel.shape
    x = _place(value, axis, width)
    if x is None:
        outwards = np.array([1.0 if value > axis.high else -1.0, 0.0])
        tip = np.array([width - 1 if value > axis.high else 0, height // 2])
        marks.draw_wedge(panel, tip, outwards, colour, 5.0)
        return None
    cv2.line(panel, (x, 2), (x, height - 2), colour, thickness)
    return x


def _columns(n_panels: int) -> int:
    """How many panels stand in a row: as few gaps as can be, then as many as can be."""
    if n_panels <= MAX_COLUMNS:
        return n_panels
    return min(range(3, MAX_COLUMNS + 1), key=lambda n: (-n_panels % n, -n))


def _legend(levels: tuple[float, ...], is_executed: bool, width: int) -> Picture:
    entries = [("expert", marks.RED), ("policy", marks.WHITE)]
    if is_executed:
        entries.append(("executed", marks.ORANGE))
    entries += [(f"{level:.0%} of mass", tone) for level, tone in zip(levels, TONES, strict=False)]
    legend = blank(LEGEND_PX, max(width, legend_width(entries)))
    write_legend(legend, 15, entries)
    return legend


def write_legend(
    strip: Picture, baseline: int, entries: Sequence[tuple[str, marks.Colour]]
) -> None:
    """Write names beside squares of their colours, in place."""
    left = LEGEND_GAP_PX // 4
    for name, colour in entries:
        cv2.rectangle(strip, (left, baseline - 10), (left + 12, baseline), colour, cv2.FILLED)
        cv2.rectangle(strip, (left, baseline - 10), (left + 12, baseline), marks.CASING, 1)
        marks.draw_text(strip, name, (left + 18, baseline))
        left += 18 + marks.text_width(name) + LEGEND_GAP_PX


def legend_width(entries: Sequence[tuple[str, marks.Colour]]) -> int:
    """Width that :func:`write_legend` needs, px."""
    return sum(18 + marks.text_width(name) + LEGEND_GAP_PX for name, _ in entries)


def _ahead(query: int) -> str:
    return "action now (k = 0)" if query == 0 else f"k = {query} steps ahead"
