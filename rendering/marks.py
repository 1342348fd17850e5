"""Marks on pictures that stay visible on every colour: each has a dark casing or shadow.

Coordinates are px of OpenCV: (x, y) from the upper left, whole numbers in the middle of pixels.
"""

import cv2
import numpy as np
from jaxtyping import Float, Int, Num, UInt8

RED, YELLOW, ORANGE = (255, 0, 0), (255, 225, 0), (255, 150, 20)
WHITE, CASING = (255, 255, 255), (30, 30, 30)
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.4
FRACTION_BITS = 4
"""OpenCV takes sub-pixel coordinates as whole numbers, here sixteenths."""

Colour = tuple[int, int, int]

_ANGLES = np.pi * (np.arange(10) / 5 - 0.5)
_STAR = (
    np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], -1) * np.where(np.arange(10) % 2, 0.42, 1)[:, None]
)


def draw_lines(
    picture: UInt8[np.ndarray, "height width 3"],
    lines: list[Float[np.ndarray, "_ 2"]],
    colour: Colour,
    thickness: int = 1,
) -> None:
    """Draw open lines; the pixels beside them are halved, which hides less than a black casing."""
    if not lines:
        return
    # All vertices at once: there are hundreds of dashes. All ink lies near them: leave the rest.
    vertices = _fixed(np.concatenate(lines))
    reach = thickness + 3
    left, top = np.maximum((vertices.min(0) >> FRACTION_BITS) - reach, 0)
    right, bottom = np.maximum((vertices.max(0) >> FRACTION_BITS) + reach, 0)
    near = picture[top:bottom, left:right]
    if not near.size:
        return
    vertices -= np.array([left, top], np.int32) << FRACTION_BITS
    ends = np.cumsum([len(line) for line in lines]).tolist()
    fixed = [vertices[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    shadow = np.zeros(near.shape[:2], np.uint8)
    cv2.polylines(shadow, fixed, False, 255, thickness + 2, cv2.LINE_8, FRACTION_BITS)
    cv2.copyTo(near >> 1, shadow, near)
    cv2.polylines(near, fixed, False, colour, thickness, cv2.LINE_AA, FRACTION_BITS)


def draw_cross(
    picture: UInt8[np.ndarray, "height width 3"],
    at: Int[np.ndarray, " 2"],
    colour: Colour,
    length: int,
    thickness: int,
) -> None:
    """Draw a cross of ``length`` px."""
    centre = (int(at[0]), int(at[1]))
    cross = cv2.MARKER_CROSS
    cv2.drawMarker(picture, centre, CASING, cross, length + 2, thickness + 2)
    cv2.drawMarker(picture, centre, colour, cross, length, thickness)


def draw_star(
    picture: UInt8[np.ndarray, "height width 3"],
    at: Int[np.ndarray, " 2"],
    colour: Colour,
    radius: float,
) -> None:
    """Draw a star of five points."""
    _polygon(picture, at + radius * _STAR, colour)


def draw_ring(
    picture: UInt8[np.ndarray, "height width 3"],
    at: Int[np.ndarray, " 2"],
    colour: Colour,
    radius: float,
) -> None:
    """Draw a circle."""
    centre = (int(at[0]), int(at[1]))
    cv2.circle(picture, centre, round(radius), CASING, 4, cv2.LINE_AA)
    cv2.circle(picture, centre, round(radius), colour, 2, cv2.LINE_AA)


def draw_arrow(
    picture: UInt8[np.ndarray, "height width 3"],
    start: Num[np.ndarray, " 2"],
    end: Num[np.ndarray, " 2"],
    colour: Colour,
    head: float,
    margin: float = 0.0,
) -> None:
    """Draw an arrow; none where there is no room for it.

    Args:
        picture: Drawn on in place.
        start: Where it comes from.
        end: Where it points.
        colour: RGB.
        head: Length of its head, px.
        margin: Left free at both ends, px.
    """
    way = end - start
    length = float(np.hypot(*way))
    if length < 1.5 * head + 2 * margin:
        return
    along = way / length
    start, end = start + margin * along, end - margin * along
    across = np.array([-along[1], along[0]])
    neck = end - head * along
    corners = np.stack(
        [end.astype(np.float64), neck + 0.5 * head * across, neck - 0.5 * head * across]
    )
    shaft = [_fixed(np.stack([start, neck]))]
    cv2.polylines(picture, shaft, False, CASING, 4, cv2.LINE_AA, FRACTION_BITS)
    _polygon(picture, corners, colour)
    cv2.polylines(picture, shaft, False, colour, 2, cv2.LINE_AA, FRACTION_BITS)


def draw_wedge(
    picture: UInt8[np.ndarray, "height width 3"],
    tip: Int[np.ndarray, " 2"],
    outwards: Float[np.ndarray, " 2"],
    colour: Colour,
    radius: float,
) -> None:
    """Draw a triangle that points at something outside of the picture."""
    along = outwards / np.hypot(*outwards)
    across = np.array([-along[1], along[0]])
    base, side = tip - 2 * radius * along, radius * across
    _polygon(picture, np.stack([tip, base + side, base - side]), colour)


def draw_text(
    picture: UInt8[np.ndarray, "height width 3"],
    text: str,
    at: tuple[int, int],
    colour: Colour = CASING,
    scale: float = FONT_SCALE,
) -> None:
    """Write one line of ASCII from its lower left corner ``at`` on."""
    cv2.putText(picture, text, at, FONT, scale, colour, 1, cv2.LINE_AA)


def draw_tag(
    picture: UInt8[np.ndarray, "height width 3"],
    text: str,
    at: Int[np.ndarray, " 2"],
    colour: Colour,
    away: float,
    is_left: bool,
) -> None:
    """Write a short text on a dark plate above and beside a point, within the picture.

    Args:
        picture: Drawn on in place.
        text: ASCII.
        at: The point.
        colour: Of the text.
        away: Distance from the point along each axis, px.
        is_left: On the left of the point, if there is room, rather than on its right.
    """
    height, width, _ = picture.shape
    plate = np.array([text_width(text) + 6, 14])
    on_left, on_right = at[0] - away - plate[0], at[0] + away
    if is_left:
        x = on_left if on_left >= 0 else on_right
    else:
        x = on_right if on_right + plate[0] <= width else on_left
    corner = np.rint([x, at[1] - away - plate[1]])
    left, top = np.clip(corner, 0, np.maximum((width, height) - plate, 0)).astype(int).tolist()
    right, bottom = left + int(plate[0]) - 1, top + int(plate[1]) - 1
    cv2.rectangle(picture, (left, top), (right, bottom), CASING, cv2.FILLED)
    draw_text(picture, text, (left + 3, bottom - 3), colour)


def text_width(text: str, scale: float = FONT_SCALE) -> int:
    """In px."""
    (width, _), _ = cv2.getTextSize(text, FONT, scale, 1)
    return width


def _polygon(
    picture: UInt8[np.ndarray, "height width 3"],
    corners: Float[np.ndarray, "vertex 2"],
    colour: Colour,
) -> None:
    fixed = [_fixed(corners)]
    cv2.polylines(picture, fixed, True, CASING, 3, cv2.LINE_AA, FRACTION_BITS)
    cv2.fillPoly(picture, fixed, colour, cv2.LINE_AA, FRACTION_BITS)


def _fixed(line: Float[np.ndarray, "vertex 2"]) -> Int[np.ndarray, "vertex 2"]:
    return np.rint(line * 2**FRACTION_BITS).astype(np.int32)


def dashes(
    line: Float[np.ndarray, "vertex 2"], dash_px: float, gap_px: float
) -> list[Float[np.ndarray, "3 2"]]:
    """Cut a line into dashes of three vertices each."""
    steps = np.hypot(*np.diff(line, axis=0).T)
    distance = np.concatenate([[0], np.cumsum(steps)])
    starts = np.arange(0, distance[-1], dash_px + gap_px)
    wanted = starts[:, None] + dash_px * np.array([0, 0.5, 1])
    return list(np.stack([np.interp(wanted, distance, line[:, axis]) for axis in (0, 1)], -1))
