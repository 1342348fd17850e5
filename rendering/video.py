"""Frames in, a video out that every browser plays (H.264, yuv420p, mp4)."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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


class VideoWriter:
    """Encode frames one by one, in constant memory; the file appears complete or not at all.

    A context manager: leaving it completes the file and puts it in its place. Leaving it by an
    exception removes what was written, and a file that was there before stays.

    Args:
        path: Of the mp4; replaced when it is there.
        fps: Frames per second.

    Raises:
        ValueError: On leaving, when there were no frames.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path = Path(path)
        # Frame rates such as 12.5 are exact as fractions; mp4 stores no floats.
        self._rate = Fraction(round(fps * 1000), 1000)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._first_shape: tuple[int, ...] | None = None
        self.n_frames = 0
        """Written so far."""

    def __enter__(self) -> "VideoWriter":
        import av
        from av.video.reformatter import ColorRange, Colorspace

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._temporary.unlink, missing_ok=True)
            options = {"movflags": "faststart"}
            self._file = stack.enter_context(
                av.open(str(self._temporary), "w", format="mp4", options=options)
            )
            self._stream = self._file.add_stream(
                "libx264", rate=self._rate, options={"crf": "20", "preset": "veryfast"}
            )
            self._stream.pix_fmt = "yuv420p"
            # BT.601 and said so: it is what readers that ignore the tags assume, too.
            self._stream.codec_context.colorspace = Colorspace.ITU601
            self._stream.codec_context.color_primaries = 1
            self._stream.codec_context.color_trc = 1
            self._stream.codec_context.color_range = ColorRange.MPEG
            self._open = stack.pop_all()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame.

        Args:
            frame: RGB, uint8 (height, width, 3), of the first one's size; odd sizes grow by one
                row or column, as 4:2:0 needs.

        Raises:
            ValueError: When it is not an RGB picture of the first one's size.
        """
        import av
        from av.video.reformatter import ColorRange, Colorspace

        shape = np.shape(frame)
        is_picture = len(shape) == 3 and shape[2] == 3
        if self._first_shape is None:
            self._first_shape = shape
            if is_picture:
                self._stream.height, self._stream.width = (n + n % 2 for n in shape[:2])
        if frame.dtype != np.uint8 or shape != self._first_shape or not is_picture:
            raise ValueError(
                f"{self.path}: frame {self.n_frames} is {frame.dtype} {shape}; give uint8 "
                f"pictures (height, width, 3), all of the first one's size {self._first_shape}"
            )
        picture = av.VideoFrame.from_ndarray(even(frame), format="rgb24")
        encoded = picture.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
        )
        encoded.pts = self.n_frames
        encoded.duration = 1
        encoded.time_base = 1 / self._rate
        self._file.mux(self._stream.encode(encoded))
        self.n_frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open:
            if kind is None:
                if not self.n_frames:
                    raise ValueError(f"{self.path}: there are no frames to write")
                self._file.mux(self._stream.encode())
                self._file.close()
                os.replace(self._temporary, self.path)


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
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.write(frame)
            # Else it would live on while the next one is drawn.
            del frame
    return video.path


def write_videos(
    paths: Mapping[str, str | Path],
    frames: Iterable[Mapping[str, UInt8[np.ndarray, "_ _ 3"]]],
    fps: float,
) -> dict[str, Path]:
    """Write several videos from one pass over their frames, in constant memory.

    Args:
        paths: Name to mp4, each another one.
        frames: At each instant one picture for every name; sizes may differ between names.
        fps: Frames per second.

    Returns:
        The paths by name. A frame that does not fit leaves no video at all.

    Raises:
        ValueError: When names differ, two videos share a path, there are no frames, or one is not
            an RGB picture of the size of its video's first one.
    """
    wanted = {name: Path(path) for name, path in paths.items()}
    if not wanted or len(set(wanted.values())) < len(wanted):
        raise ValueError(f"paths: {wanted}; give at least one, and each video its own")
    with ExitStack() as stack:
        videos = {name: stack.enter_context(VideoWriter(wanted[name], fps)) for name in wanted}
        for pictures in frames:
            if pictures.keys() != wanted.keys():
                n_frames = min(video.n_frames for video in videos.values())
                raise ValueError(
                    f"frame {n_frames} has pictures {sorted(pictures)} for videos "
                    f"{sorted(wanted)}; give one picture for each video"
                )
            for name, video in videos.items():
                video.write(pictures[name])
            # Else they would live on while the next ones are drawn.
            del pictures
    return wanted


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
