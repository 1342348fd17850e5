"""Pictures of the transfer experiment: bars of all conditions, and landscapes of both arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from features.resampling import Estimate
from rendering.charts import INK, PALETTE
from rendering.colour import colour_table, colours
from rendering.landscape import (
    Panel,
    draw_colour_bar,
    draw_markers,
    draw_regions,
)
from rendering.layout import below, beside, note_lines
from rendering.video import captioned

Picture = UInt8[np.ndarray, "_ _ 3"]
GAP_PX = 8
"""White between boards."""
OPACITY = 0.85
"""Of a landscape's highest score over its board."""
UNTRAINED = ("#a5a5a5", "#cccccc")
"""Greys of bars that say what fresh weights do."""


@dataclass(frozen=True)
class Bar:
    """One condition of a group."""

    label: str
    """The same in every group."""
    success: Estimate
    score: Estimate
    is_trained: bool = True


def transfer_chart(
    groups: Mapping[str, Sequence[Bar]],
    threshold: float,
    success_label: str,
    score_label: str,
    title: str = "",
) -> Picture:
    """Draw success and score of every condition, with intervals and the share that was asked for.

    Args:
        groups: Name to its conditions, e.g. one group for each way of executing chunks; the same
            conditions in all of them.
        threshold: Share of successes that supports the hypothesis; a dashed line.
        success_label: Of the left axis.
        score_label: Of the right axis.
        title: Above the figure.

    Raises:
        ValueError: If there are no conditions, or groups have different ones.
    """
    labels = [tuple(bar.label for bar in bars) for bars in groups.values()]
    if not labels or not labels[0] or len(set(labels)) > 1:
        raise ValueError(f"groups of conditions {labels}: give the same ones in each, at least one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_bars = len(labels[0])
    width = 0.84 / n_bars
    offsets = (np.arange(n_bars) - (n_bars - 1) / 2) * width
    size = (max(3.2 + 2 * 0.42 * n_bars * len(groups), 7.2), 4.0)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colours = _bar_colours(next(iter(groups.values())))
    for axes, label, kind in zip(
        figure.subplots(1, 2), (success_label, score_label), ("success", "score"), strict=True
    ):
        estimates: list[Estimate] = [getattr(bar, kind) for bars in groups.values() for bar in bars]
        values = np.array([each.value for each in estimates])
        errors = np.array([[e.value - e.low, e.high - e.value] for e in estimates]).T
        axes.bar(
            np.add.outer(np.arange(len(groups)), offsets).ravel(),
            values,
            0.9 * width,
            yerr=np.maximum(errors, 0),
            color=colours * len(groups),
            capsize=3,
            ecolor=INK,
            error_kw={"lw": 1},
            label=[*labels[0], *["_nolegend_"] * (len(estimates) - n_bars)],
        )
        if kind == "success":
            text = f"hypothesis: {threshold:.0%}"
            axes.axhline(threshold, color=INK, lw=1, ls="--", label=text)
        axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = min(n_bars + 1, 3)
    place = "outside lower center"
    figure.legend(handles, names, loc=place, ncols=columns, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _bar_colours(bars: Sequence[Bar]) -> list[str]:
    trained, untrained, found = 0, 0, []
    for bar in bars:
        if bar.is_trained:
            found.append(PALETTE[trained % len(PALETTE)])
            trained += 1
        else:
            found.append(UNTRAINED[untrained % len(UNTRAINED)])
            untrained += 1
    return found


@dataclass(frozen=True)
class BoardLandscape:
    """A landscape over the board that it belongs to."""

    board: UInt8[np.ndarray, "height width 3"]
    """Picture of the whole board."""
    panel: Panel
    """Its title stands above the board."""


def draw_over_board(
    cell: BoardLandscape, size_px: int, colormap: str = "viridis"
) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a landscape over its board, the more opaque the likelier, outlines and markers on top.

    A score at the low end of the range leaves the board as it is, one at the high end hides
    :data:`OPACITY` of it.

    Args:
        cell: What to draw.
        size_px: Height and width.
        colormap: Name of a matplotlib colour map.
    """
    panel = cell.panel
    table, (low, high) = colour_table(colormap), panel.value_range
    weight = OPACITY * np.clip((panel.scores - low) / (high - low), 0, 1).astype(np.float32)
    heat = colours(panel.scores, panel.value_range, table)
    is_finer = panel.grid.resolution > size_px
    sampling = cv2.INTER_AREA if is_finer else cv2.INTER_NEAREST_EXACT
    heat, weight = (
        cv2.resize(each, (size_px, size_px), interpolation=sampling) for each in (heat, weight)
    )
    method = cv2.INTER_AREA if len(cell.board) > size_px else cv2.INTER_CUBIC
    board = cv2.resize(cell.board, (size_px, size_px), interpolation=method)
    mixed = board + (heat.astype(np.float32) - board) * weight[..., None]
    picture = np.rint(mixed).astype(np.uint8)
    draw_regions(picture, panel)
    draw_markers(picture, panel.grid, panel.markers)
    return picture


def landscapes_by_arm(
    rows: Sequence[Sequence[BoardLandscape]],
    note: str = "",
    size_px: int = 256,
    colormap: str = "viridis",
) -> Picture:
    """Draw a row for each instant and a column for each arm and way of acting.

    Args:
        rows: From left to right the same arms in every row; landscapes of one method.
        note: Below it all; ASCII.
        size_px: Height of a board.
        colormap: Name of a matplotlib colour map.

    Raises:
        ValueError: If there is no landscape, rows differ in length, or landscapes in their range.
    """
    lengths = {len(row) for row in rows}
    scales = {(cell.panel.value_range, cell.panel.unit) for row in rows for cell in row}
    if len(lengths) != 1 or len(scales) != 1:
        raise ValueError(
            f"rows of {sorted(lengths)} landscapes with colour bars {sorted(scales)}; give rows "
            "alike, of one method"
        )
    drawn = [
        beside(
            [captioned(draw_over_board(cell, size_px, colormap), cell.panel.title) for cell in row],
            GAP_PX,
        )
        for row in rows
    ]
    width = drawn[0].shape[1]
    ((value_range, unit),) = scales
    bar = draw_colour_bar(value_range, unit, min(width, 2 * size_px), colormap)
    return below(*drawn, bar, *note_lines(note, width))
