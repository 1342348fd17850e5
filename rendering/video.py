"""Frames in, a video out that every browser plays (H.264, yuv420p, mp4)."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

CAPTION_PX = 20
"""Height of the strip that a caption adds."""


@dataclass(frozen=True)
class Clip:
    """One tile of a grid of videos."""

    frames: Iterable[UInt8[np.ndarray, "height width 3"]]
    captions: Iterable[str]
    """One line of ASCII per frame."""


def write_video(
    path: str | Path, frames: Iterable[UInt8[np.ndarray, "height width 3"]], fps: float
) -> Path:
    """Encode frames one by one, in constant memory; the file appears complete or not at all.

    Args:
        path: Of the mp4; replaced when it is there.
        frames: RGB, all of one size; odd sizes grow by one row or column, as 4:2:0 needs.
        fps: Frames per second.

    Raises:
        ValueError: When there are no frames, or one is not an RGB picture of the first one's size.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    first_shape: tuple[int, ...] | None = None
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as file:
            # Frame rates such as 12.5 are exact as fractions; mp4 stores no floats.
            rate = Fraction(round(fps * 1000), 1000)
            stream = file.add_stream(
                "libx264", rate=rate, options={"crf": "20", "preset": "veryfast"}
            )
            stream.pix_fmt = "yuv420p"
            # BT.601 and said so: it is what readers that ignore the tags assume, too.
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_primaries = 1
            stream.codec_context.color_trc = 1
            stream.codec_context.color_range = ColorRange.MPEG
            for index, frame in enumerate(frames):
                shape = np.shape(frame)
                if first_shape is None:
                    if len(shape) == 3 and shape[2] == 3:
                        stream.height, stream.width = (size + size % 2 for size in shape[:2])
                    first_shape = shape
                if (
                    frame.dtype != np.uint8
                    or shape != first_shape
                    or len(shape) != 3
                    or shape[2] != 3
                ):
                    raise ValueError(
                        f"{path}: frame {index} is {frame.dtype} {shape}; give uint8 pictures "
                        f"(height, width, 3), all of the first one's size {first_shape}"
                    )
                picture = av.VideoFrame.from_ndarray(even(frame), format="rgb24")
                encoded = picture.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU601,
                    dst_color_range=ColorRange.MPEG,
                )
                encoded.pts = index
                encoded.duration = 1
                encoded.time_base = 1 / rate
                file.mux(stream.encode(encoded))
            if first_shape is None:
                raise ValueError(f"{path}: there are no frames to write")
            file.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def even(frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height2 width2 3"]:
    """Repeat the last row and column where a size is odd."""
    height, width, _ = frame.shape
    if height % 2 == 0 and width % 2 == 0:
        return np.ascontiguousarray(frame)
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def tile(
    frames: Sequence[UInt8[np.ndarray, "height width 3"]], columns: int
) -> UInt8[np.ndarray, "grid_height grid_width 3"]:
    """Lay pictures of one size side by side, row by row; missing ones are white.

    Raises:
        ValueError: When there is no picture or no column, or sizes differ.
    """
    if not frames or columns < 1:
        raise ValueError(f"{len(frames)} pictures in {columns} columns; give at least one of each")
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"pictures of sizes {[frame.shape for frame in frames]}; give one size")
    columns = min(columns, len(frames))
    white = np.full_like(frames[0], 255)
    cells = [*frames, *[white] * (-len(frames) % columns)]
    rows = [
        np.concatenate(cells[start : start + columns], axis=1)
        for start in range(0, len(cells), columns)
    ]
    return np.concatenate(rows)


def captioned(
    frame: UInt8[np.ndarray, "height width 3"], text: str
) -> UInt8[np.ndarray, "taller width 3"]:
    """Put one line of text above a picture; text too long for it is set smaller."""
    import cv2

    strip = np.full((CAPTION_PX, frame.shape[1], 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.42
    (width, _), _ = cv2.getTextSize(text, font, scale, 1)
    scale = min(scale, scale * (frame.shape[1] - 8) / max(width, 1))
    cv2.putText(strip, text, (4, CAPTION_PX - 6), font, scale, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([strip, frame])


def write_clips(path: str | Path, clips: Sequence[Clip], fps: float, columns: int = 4) -> Path:
    """Write several episodes as one video, side by side; who has ended stays on the last frame.

    Args:
        path: Of the mp4.
        clips: Pictures of one size, with a caption each.
        fps: Frames per second.
        columns: Tiles in a row.

    Raises:
        ValueError: When there are no clips, one is empty, or sizes differ.
    """

    def grids() -> Iterator[UInt8[np.ndarray, "grid_height grid_width 3"]]:
        shown: list[np.ndarray | None] = [None] * len(clips)
        pairs = [zip(clip.frames, clip.captions, strict=True) for clip in clips]
        for row in zip_longest(*pairs):
            shown = [
                before if now is None else captioned(now[0], now[1])
                for before, now in zip(shown, row, strict=True)
            ]
            tiles = [picture for picture in shown if picture is not None]
            if len(tiles) != len(clips):
                raise ValueError(f"{path}: a clip without frames; leave it out")
            yield tile(tiles, columns)

    return write_video(path, grids(), fps)
