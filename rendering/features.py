"""Features of an autoencoder as pictures: the frames they fire on, and where in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from rendering.attention import fit_height, overlay
from rendering.colour import colour_table
from rendering.layout import Picture, below, beside, blank, line, note_lines
from rendering.video import captioned

GAP_PX = 6
COLORMAP = "inferno"


@dataclass(frozen=True)
class FeatureFrame:
    """A frame on which a feature fires."""

    picture: UInt8[np.ndarray, "height width 3"]
    """RGB."""
    caption: str
    """One line of ASCII: which frame, and how strongly."""
    values: Float[np.ndarray, "row column"] | None = None
    """Activation in each cell of the picture; None where tokens are no cells."""
    cell_px: int | None = None
    """As in :class:`rendering.attention.CameraMap`."""


@dataclass(frozen=True)
class FeatureRow:
    """One feature, and the frames that show what it means."""

    title: str
    """One line of ASCII: its number, and what is known of it."""
    frames: Sequence[FeatureFrame]


def feature_strip(
    rows: Sequence[FeatureRow], note: str = "", height_px: int = 112, alpha: float = 0.45
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw features below each other, each with its frames side by side.

    Colours run from 0 to the feature's largest activation among the frames shown.

    Args:
        rows: At least one; a feature without frames is a line of text.
        note: How to read it, below.
        height_px: Of each picture.
        alpha: Weight of the colours of the map.

    Raises:
        ValueError: If there is no feature.
    """
    if not rows:
        raise ValueError("there is no feature to draw")
    table = colour_table(COLORMAP)
    strips = []
    for row in rows:
        tops = [float(frame.values.max()) for frame in row.frames if frame.values is not None]
        top = max(tops, default=0.0)
        strips.append([_cell(frame, top, table, height_px, alpha) for frame in row.frames])
    widths = [sum(cell.shape[1] + GAP_PX for cell in strip) for strip in strips]
    width = max(*widths, 4 * height_px)
    parts: list[Picture] = []
    for row, strip in zip(rows, strips, strict=True):
        parts.append(line(row.title, width))
        if strip:
            parts.append(beside(strip, GAP_PX))
        parts.append(blank(GAP_PX, width))
    return below(*parts, *note_lines(note, width))


def _cell(
    frame: FeatureFrame,
    top: float,
    table: UInt8[np.ndarray, "256 3"],
    height_px: int,
    alpha: float,
) -> Picture:
    if frame.values is None or top <= 0:
        drawn = fit_height(frame.picture, height_px)
    else:
        drawn = overlay(
            frame.picture,
            frame.values,
            (0.0, top),
            table,
            alpha,
            cell_px=frame.cell_px,
            height_px=height_px,
        )
    return captioned(drawn, frame.caption)
