"""Numbers as figures: densities, curves, tables of strengths, arrows, bars with intervals.

Drawn with matplotlib, some 0.2 s each: for reports and checkpoints, not for frames of a video.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = UInt8[np.ndarray, "_ _ 3"]
INK = "#333333"
PALETTE = ("#3366aa", "#dd7733", "#339966", "#aa3377", "#998833", "#666666")


def density_chart(edges: Sequence[float], counts: Sequence[float], title: str = "") -> Picture:
    """Draw how often latents fire.

    Args:
        edges: log10 of the density, rising; latents of the first bin never fire.
        counts: Latents in each bin.
        title: Above the figure.
    """
    figure, axes = _figure(5.2, 3.0)
    widths = np.diff(edges)
    colours = [PALETTE[5], *[PALETTE[0]] * (len(counts) - 1)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=colours)
    axes.set_xlabel("log10 of the share of vectors a latent fires on (grey: never)")
    axes.set_ylabel("latents")
    axes.set_title(title)
    return _picture(figure)


def curves_chart(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    title: str = "",
) -> Picture:
    """Draw curves over one axis; gaps where a value is NaN.

    Args:
        x: Places.
        curves: Name to values at them.
        x_label: Of the axis, with its unit.
        y_label: Of the values, with their unit.
        title: Above the figure.
    """
    figure, axes = _figure(5.2, 3.2)
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(x, values, "o-", ms=3, lw=1.4, color=PALETTE[index % len(PALETTE)], label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _picture(figure)


def strength_chart(
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Picture:
    """Draw a table of strengths as colours with their numbers; NaN stays white.

    Args:
        values: One for each row and column.
        rows: Names from the top down.
        columns: Names from left to right.
        title: Above the figure.
        value_range: Values at the ends of the colours.
    """
    # Wide enough for the title, too.
    width = max(1.6 + 0.55 * len(columns), 0.1 * len(title))
    figure, axes = _figure(width, 1.4 + 0.28 * len(rows))
    axes.imshow(values, cmap="viridis", vmin=value_range[0], vmax=value_range[1], aspect="auto")
    middle = sum(value_range) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour
            )
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title)
    return _picture(figure)


def arrows_chart(
    arrows: Float[np.ndarray, "arrow 2"],
    names: Sequence[str],
    unit: str = "px",
    title: str = "",
) -> Picture:
    """Draw effects on a planar action as arrows from one point, y downwards as on the board.

    Args:
        arrows: x and y of each effect.
        names: Of each.
        unit: Of the effects.
        title: Above the figure.
    """
    figure, axes = _figure(4.4, 4.4)
    reach = 1.15 * max(float(np.abs(arrows).max(initial=0.0)), 1e-6)
    for index, ((x, y), name) in enumerate(zip(arrows, names, strict=True)):
        colour = PALETTE[index % len(PALETTE)]
        style = {"arrowstyle": "->", "color": colour, "lw": 1.4}
        axes.annotate("", (x, y), (0, 0), arrowprops=style)
        axes.annotate(name, (x, y), fontsize=7, color=colour)
    axes.axhline(0, color="#dddddd", lw=0.8, zorder=0)
    axes.axvline(0, color="#dddddd", lw=0.8, zorder=0)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(reach, -reach)
    axes.set_aspect("equal")
    axes.set_xlabel(f"x, {unit}")
    axes.set_ylabel(f"y, {unit}")
    axes.set_title(title)
    return _picture(figure)


def bars_chart(
    groups: Sequence[str],
    means: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    y_label: str,
    title: str = "",
) -> Picture:
    """Draw means with their intervals.

    Args:
        groups: Names from left to right.
        means: Of each.
        intervals: Low and high end of each.
        y_label: What is measured, with its unit.
        title: Above the figure.
    """
    figure, axes = _figure(1.6 + 0.7 * len(groups), 3.2)
    places = np.arange(len(groups))
    middle = np.asarray(means, np.float64)
    ends = np.asarray(intervals, np.float64).reshape(-1, 2)
    errors = np.maximum(np.stack([middle - ends[:, 0], ends[:, 1] - middle]), 0)
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(groups))]
    axes.bar(places, middle, 0.6, yerr=errors, color=colours, capsize=4, ecolor=INK)
    axes.set_xticks(places, groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    return _picture(figure)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure, outside pyplot, whose state is global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.title.set_fontsize(9)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    return figure, axes


def _picture(figure: "Figure") -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
