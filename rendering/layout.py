"""Pictures and lines of text laid out on white."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from rendering import marks
from rendering.video import captioned

NOTE_SCALE = 0.42
"""Of the font that :func:`rendering.video.captioned` writes in where there is room."""

Picture = UInt8[np.ndarray, "_ _ 3"]


def note_lines(text: str, width_px: int) -> list[Picture]:
    """Break a text between words into lines of at most a width."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and marks.text_width(longer, NOTE_SCALE) <= width_px - 8:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line(each, width_px) for each in lines]


def line(text: str, width_px: int) -> Picture:
    """Write one line on white; text too long for it is set smaller."""
    return captioned(np.empty((0, width_px, 3), np.uint8), text)


def blank(height_px: int, width_px: int) -> Picture:
    """Make a white picture."""
    return np.full((height_px, width_px, 3), 255, np.uint8)


def beside(pictures: Sequence[Picture], gap_px: int) -> Picture:
    """Lay pictures side by side on white, their upper edges level."""
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap_px * (len(pictures) - 1)
    frame = blank(height, width)
    left = 0
    for picture in pictures:
        frame[: len(picture), left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap_px
    return frame


def below(*pictures: Picture) -> Picture:
    """Lay pictures below each other on white, their left edges in line."""
    frame = blank(sum(map(len, pictures)), max(picture.shape[1] for picture in pictures))
    top = 0
    for picture in pictures:
        frame[top : top + len(picture), : picture.shape[1]] = picture
        top += len(picture)
    return frame
