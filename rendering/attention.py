"""Attention and saliency maps on camera pictures, and where the mass lies that is not in them.

A map covers its picture by the true extents of its cells and is drawn in its own resolution: a grid
of 3 x 3 tokens looks like one. Mass on tokens that are no pictures (robot state, latent) stands
beside the pictures and, in a range of its own, never covers them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from rendering import marks
from rendering.colour import colour_table, colours
from rendering.layout import Picture, below, beside, blank, line, note_lines
from rendering.video import CAPTION_PX, captioned

Scale = Literal["frame", "episode", "fixed", "global"]
Border = Literal["none", "magenta"]
Interpolation = Literal["nearest", "linear", "bicubic"]

SIDE_BY_SIDE = "side_by_side"
"""Name of the video with all cameras; no camera is called so."""
TOKEN_TYPES = {"latent": "latent", "state": "state", "environment_state": "environment state"}
"""Tokens that are no pictures, and what the legend calls them."""
TOKEN_COLOURS = {
    "latent": (150, 150, 150),
    "state": (255, 0, 255),
    "environment_state": (230, 159, 0),
}
CAMERA_COLOURS = ((0, 114, 178), (0, 158, 115), (86, 180, 233), (240, 228, 66), (213, 94, 0))
SCALE_LABELS = {
    "frame": "every instant's own range",
    "episode": "range of the episode",
    "fixed": "fixed range",
    "global": "every instant's own range, cells and state",
}
GAP_PX = 8
"""White between pictures."""
NARROW_GAP_PX = 3
"""White between the pictures of one cell of a strip."""
BAR_PX = 18
"""Width of the bar of shares in a frame."""
NARROW_BAR_PX = 7
"""Width of the bars of shares in a strip."""
LEGEND_ROW_PX = 18
RAMP_PX = 100
"""Width of the colour bar."""
MIN_PICTURE_PX = 32
SHARE_TOLERANCE = 0.01
"""By which shares may miss a sum of 1: what weights in bfloat16 lose."""
ROUNDING = 1e-6
"""A range this small, relative to its high end, is the rounding error of a uniform map."""
OUTLINE = marks.RED


@dataclass(frozen=True)
class CameraMap:
    """What one camera saw, and how much each part of it counts."""

    picture: UInt8[np.ndarray, "height width 3"]
    """RGB."""
    values: Float[np.ndarray, "row column"]
    """Non-negative, of any resolution: grid of tokens, patches, pixels."""
    cell_px: int | None = None
    """Height and width of a cell in pixels of the picture, the first one in its upper left corner
    and the last ones cut off at its border; None where cells divide the picture evenly."""
    masks: Sequence[Bool[np.ndarray, "_ _"]] = ()
    """Objects to outline, each a mask of the whole picture in any resolution."""

    def __post_init__(self) -> None:
        if not self.picture.size or not self.values.size:
            raise ValueError(
                f"picture of shape {self.picture.shape}, values of shape {self.values.shape}; "
                "give at least one pixel and one cell"
            )
        # NaN fails every comparison.
        if not ((self.values >= 0) & (self.values < np.inf)).all():
            raise ValueError(
                f"values: {self.values.min()}..{self.values.max()}; give finite numbers >= 0, "
                "of signed attributions their magnitude"
            )
        _check_cells(self.picture, self.values, self.cell_px)


@dataclass(frozen=True)
class AttentionScene:
    """One instant, seen by one method."""

    title: str
    """One line of ASCII: the method."""
    cameras: Mapping[str, CameraMap]
    """By name, from left to right."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Mass of each token type (:data:`TOKEN_TYPES`, and cameras by name). They sum to 1, or are all
    0 where nothing counts at this instant; empty where the method has none."""
    caption: str = ""
    """One line of ASCII: the instant."""
    unit: str = ""
    """Of the values, e.g. ``mass per cell``."""

    def __post_init__(self) -> None:
        if not self.cameras:
            raise ValueError("cameras: a scene without a picture; give at least one camera")
        if reserved := self.cameras.keys() & {*TOKEN_TYPES, SIDE_BY_SIDE}:
            raise ValueError(f"cameras: {sorted(reserved)} mean something else; rename them")
        if strangers := self.shares.keys() - self.cameras.keys() - TOKEN_TYPES.keys():
            raise ValueError(
                f"shares: {sorted(strangers)}; give shares of {list(TOKEN_TYPES)} and of the "
                f"cameras {list(self.cameras)}"
            )
        if self.shares:
            shares = np.array(list(self.shares.values()))
            is_whole = not shares.any() or abs(shares.sum() - 1) <= SHARE_TOLERANCE
            if not (shares >= 0).all() or not is_whole:
                raise ValueError(
                    f"shares: {dict(self.shares)} sum to {shares.sum():.4g}; give shares >= 0 "
                    "that sum to 1, zeros where nothing counts, or none"
                )


@dataclass(frozen=True)
class AttentionStyle:
    """How maps are drawn."""

    colormap: str = "viridis"
    """Name of a matplotlib colour map (``--colormap``); jet is that of the published tools."""
    overlay_alpha: float = 0.5
    """Weight of the map's colours, 0..1; the rest is the picture."""
    scale: Scale = "frame"
    """Values at the ends of the colour map, see :func:`scale_range`."""
    value_range: tuple[float, float] | None = None
    """These values, of scale ``fixed``; k / tokens is k times what uniform attention gives."""
    target_height: int = 360
    """Height of each picture in a frame, px; its proportions are kept."""
    border: Border = "none"
    """``magenta``: a frame around each picture, the brighter the larger the state's share."""
    proprio_border_width: int = 15
    """Width of that frame, px."""
    interpolation: Interpolation = "nearest"
    """Between the centres of cells; ``nearest`` shows the cells."""

    def __post_init__(self) -> None:
        colour_table(self.colormap)
        for name, choices in (
            ("scale", Scale),
            ("border", Border),
            ("interpolation", Interpolation),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}; give one of {list(get_args(choices))}"
                )
        if not 0 <= self.overlay_alpha <= 1:
            raise ValueError(f"overlay_alpha: {self.overlay_alpha}; give a weight in 0..1")
        if self.target_height < MIN_PICTURE_PX:
            raise ValueError(
                f"target_height: {self.target_height} px; give at least {MIN_PICTURE_PX}"
            )
        if self.proprio_border_width < 1:
            raise ValueError(
                f"proprio_border_width: {self.proprio_border_width} px; give at least 1, or "
                "border none"
            )
        if (self.value_range is None) != (self.scale != "fixed"):
            raise ValueError(
                f"value_range: {self.value_range} with scale {self.scale!r}; give a range with "
                "scale fixed, and with no other"
            )
        if self.value_range is not None:
            low, high = self.value_range
            if not 0 <= low < high < np.inf:
                raise ValueError(
                    f"value_range: {self.value_range}; give two finite, ascending values >= 0"
                )


# Ranges of values


def episode_range(
    maps: Iterable[Float[np.ndarray, "..."]],
    percentiles: tuple[float, float] = (0.0, 100.0),
) -> tuple[float, float]:
    """Find the values at the ends of the colour map for a whole episode.

    Args:
        maps: Rows and columns last, in any portions: an array per camera, or a map per instant.
            They are taken one by one, in constant memory, unless percentiles within the extremes
            need all of them.
        percentiles: Of all cells of all maps; the default gives the extremes.

    Raises:
        ValueError: When there are no maps, or percentiles do not ascend within 0..100.
    """
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(f"percentiles: {percentiles}; give two ascending ones within 0..100")
    if percentiles == (0, 100):
        low, high = np.inf, -np.inf
        for values in maps:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    else:
        cells = [values.reshape(-1) for values in maps]
        found = np.percentile(np.concatenate(cells), percentiles) if cells else [np.inf, -np.inf]
        low, high = (float(value) for value in found)
    if not low <= high:
        raise ValueError("maps: there are none; give at least one")
    return low, high


def scale_range(
    scene: AttentionScene,
    style: AttentionStyle,
    episode: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Find the values at the low and the high end of the colour map.

    ``frame``: the extremes of this instant, over all its cameras. ``episode``: those given.
    ``fixed``: those of the style. ``global``: the extremes of this instant over all cells and,
    where the scene has one, the state's share, as the published tools have it: much mass on the
    state then darkens the pictures.

    Args:
        scene: The instant.
        style: With the mode.
        episode: From :func:`episode_range`; needed for scale ``episode``.

    Returns:
        Two ascending values, or equal ones for a uniform map.

    Raises:
        ValueError: When the range of the episode is needed and missing, or it descends.
    """
    if style.value_range is not None:
        return style.value_range
    if style.scale == "episode":
        if episode is None or not -np.inf < episode[0] <= episode[1] < np.inf:
            raise ValueError(
                f"scale 'episode' with range {episode}; give what episode_range() finds"
            )
        return episode
    values = [camera.values for camera in scene.cameras.values()]
    low, high = episode_range(values)
    if style.scale == "global" and "state" in scene.shares:
        share = float(scene.shares["state"])
        return min(low, share), max(high, share)
    return low, high


def is_uniform(value_range: tuple[float, float]) -> bool:
    """Whether a range is empty but for rounding errors, which colours must not enlarge."""
    low, high = value_range
    return high - low <= ROUNDING * abs(high)


# One picture


def overlay(
    picture: UInt8[np.ndarray, "height width 3"],
    values: Float[np.ndarray, "row column"],
    value_range: tuple[float, float],
    table: UInt8[np.ndarray, "256 3"],
    alpha: float = 0.5,
    interpolation: Interpolation = "nearest",
    cell_px: int | None = None,
    height_px: int | None = None,
) -> UInt8[np.ndarray, "height_px width_px 3"]:
    """Mix the colours of a map into a picture: (1 - alpha) picture + alpha colour, both RGB.

    Args:
        picture: RGB.
        values: Of the cells; those beyond the range take the colour of its end.
        value_range: Values at the low and the high end of the table. A uniform range, see
            :func:`is_uniform`, gives the colour of the low end everywhere.
        table: From :func:`rendering.colour.colour_table`.
        alpha: Weight of the colours.
        interpolation: Of the values, between the centres of cells. Cells smaller than pixels are
            averaged in any case.
        cell_px: See :attr:`CameraMap.cell_px`.
        height_px: Of the result; that of the picture when None.

    Raises:
        ValueError: When cells of that size would not cover the picture, or lie beyond it.
    """
    _check_cells(picture, values, cell_px)
    enlarged = fit_height(picture, height_px or picture.shape[0])
    size = enlarged.shape[:2]
    if is_uniform(value_range):
        # Not (values - low) / 0, nor the noise of rounding.
        values, value_range = np.zeros((1, 1)), (0.0, 1.0)
        cell_px = None
    cells = np.array(values.shape)
    covered = np.array(size, np.float64)
    if cell_px is not None:
        covered *= cells * cell_px / np.array(picture.shape[:2])
    if interpolation == "nearest" and (cells <= covered).all():
        patches = colours(values, value_range, table)
        for axis in (1, 0):
            edges = np.rint(np.arange(cells[axis] + 1) / cells[axis] * covered[axis])
            n_px = np.diff(np.minimum(edges, size[axis]).astype(int))
            patches = np.repeat(patches, n_px, axis)
    else:
        is_finer = (cells > covered).any()
        smooth = {"linear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
        method = cv2.INTER_AREA if is_finer else smooth[interpolation]
        rows, columns = np.maximum(np.rint(covered).astype(int), size).tolist()
        spread = cv2.resize(np.asarray(values, np.float32), (columns, rows), interpolation=method)
        patches = colours(spread[: size[0], : size[1]], value_range, table)
    return np.asarray(cv2.addWeighted(enlarged, 1 - alpha, patches, alpha, 0), np.uint8)


def _check_cells(picture: Picture, values: np.ndarray, cell_px: int | None) -> None:
    """Refuse a grid that does not fit its picture."""
    if cell_px is None:
        return
    if cell_px < 1:
        raise ValueError(f"cell_px: {cell_px} px; give at least 1")
    height, width, _ = picture.shape
    needed = -(-height // cell_px), -(-width // cell_px)
    if values.shape != needed:
        raise ValueError(
            f"values: {values.shape} cells of {cell_px} px; a picture of {height} x {width} px "
            f"has {needed}"
        )


def fit_height(picture: Picture, height_px: int) -> Picture:
    """Bring a picture to a height, in its proportions."""
    height, width, _ = picture.shape
    if height == height_px:
        return picture
    method = cv2.INTER_AREA if height > height_px else cv2.INTER_CUBIC
    size = max(round(width * height_px / height), 1), height_px
    return np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)


def draw_outlines(
    picture: UInt8[np.ndarray, "height width 3"],
    masks: Sequence[Bool[np.ndarray, "_ _"]],
    colour: marks.Colour = OUTLINE,
) -> None:
    """Outline objects on a picture, in place, with a line along their inner border.

    It has no dark casing, which would fill a small object.

    Args:
        picture: Drawn on.
        masks: Each covers the whole picture, in any resolution.
        colour: RGB.
    """
    height, width, _ = picture.shape
    for mask in masks:
        grey = mask.astype(np.uint8) * 255
        method = cv2.INTER_AREA if len(mask) > height else cv2.INTER_LINEAR
        grey = np.asarray(cv2.resize(grey, (width, height), interpolation=method))
        inside = (grey > 127).astype(np.uint8)
        lines, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, lines, -1, colour, max(height // 180, 1), cv2.LINE_AA)


def draw_camera(
    scene: AttentionScene,
    name: str,
    style: AttentionStyle,
    value_range: tuple[float, float],
    height_px: int | None = None,
) -> Picture:
    """Draw one camera: picture, map and outlines, with the frame of the state's share around it.

    Args:
        scene: The instant.
        name: Of the camera.
        style: How to draw.
        value_range: From :func:`scale_range`.
        height_px: Of the picture instead of the style's; the frame shrinks alike.
    """
    camera = scene.cameras[name]
    height_px = height_px or style.target_height
    picture = overlay(
        camera.picture,
        camera.values,
        value_range,
        colour_table(style.colormap),
        style.overlay_alpha,
        style.interpolation,
        camera.cell_px,
        height_px,
    )
    draw_outlines(picture, camera.masks)
    border_px = _border_px(style, height_px)
    return _framed(picture, border_px, _border_colour(scene, style, value_range))


# Shares


def draw_shares(
    shares: Mapping[str, float],
    height_px: int,
    width_px: int = BAR_PX,
    palette: Mapping[str, marks.Colour] | None = None,
) -> UInt8[np.ndarray, "height_px width_px 3"]:
    """Draw a bar as high as all mass, with a piece as high as each token type's share.

    Args:
        shares: From the top down.
        height_px: Of the bar.
        width_px: Of the bar.
        palette: Colour of each share; :func:`share_colours` of these when None.
    """
    bar = np.full((height_px, width_px, 3), 255, np.uint8)
    total = np.minimum(np.cumsum([0.0, *shares.values()]), 1)
    edges = np.rint(total * height_px).astype(int).tolist()
    palette = palette or share_colours(tuple(shares))
    for name, top, bottom in zip(shares, edges[:-1], edges[1:], strict=True):
        bar[top:bottom] = palette[name]
    return bar


@lru_cache
def share_colours(names: tuple[str, ...]) -> Mapping[str, marks.Colour]:
    """Colour of each token type; a camera's depends on its place among the cameras."""
    cameras = [name for name in names if name not in TOKEN_TYPES]
    places = {name: place % len(CAMERA_COLOURS) for place, name in enumerate(cameras)}
    return {
        name: CAMERA_COLOURS[places[name]] if name in places else TOKEN_COLOURS[name]
        for name in names
    }


# Frames and strips


def attention_frame(
    scene: AttentionScene,
    style: AttentionStyle,
    episode: tuple[float, float] | None = None,
    note: str = "",
    cameras: Sequence[str] | None = None,
) -> Picture:
    """Draw one frame of a video: cameras side by side, the shares of mass, and the colour bar.

    Args:
        scene: What to draw; cameras of the same sizes and shares of the same tokens in every frame.
        style: How to draw it.
        episode: From :func:`episode_range`; needed for scale ``episode``.
        note: Below it all, e.g. ``3x3 cells; each sees the whole picture``; ASCII.
        cameras: Names of those to draw; all when None. The range of colours is that of all.

    Raises:
        ValueError: When a camera is unknown, or the range of the episode is missing.
    """
    names = list(scene.cameras) if cameras is None else list(cameras)
    if unknown := [name for name in names if name not in scene.cameras]:
        raise ValueError(f"cameras: {unknown} are not in {list(scene.cameras)}")
    value_range = scale_range(scene, style, episode)
    columns = [captioned(draw_camera(scene, name, style, value_range), name) for name in names]
    if scene.shares:
        # Level with the pictures, below their names and within their frames.
        above = blank(CAPTION_PX + _border_px(style, style.target_height), BAR_PX)
        columns.append(below(above, draw_shares(scene.shares, style.target_height)))
        columns.append(_legend(scene.shares))
    body = beside(columns, GAP_PX)
    low, high = value_range
    remark = ", uniform" if is_uniform(value_range) else ""
    low_text, high_text = f"{low:.3g}", f"{high:.3g}"
    label = SCALE_LABELS[style.scale]
    text, longest = (
        "  ".join(filter(None, (scene.unit, f"({label}{end})"))) for end in (remark, ", uniform")
    )
    number_px = marks.text_width("8.88e-88")
    scale = _colour_bar(low_text, high_text, text, style.colormap, number_px)
    # All frames of a video are equally wide, whatever they say.
    reserved = _colour_bar(low_text, high_text, longest, style.colormap, number_px)
    width = max(body.shape[1], reserved.shape[1])
    title = line("   ".join(filter(None, (scene.title, scene.caption))), width)
    return below(title, body, scale, *note_lines(note, width))


def attention_frames(
    scene: AttentionScene,
    style: AttentionStyle,
    episode: tuple[float, float] | None = None,
    note: str = "",
) -> dict[str, Picture]:
    """Draw a frame for each camera and, of several, all :data:`SIDE_BY_SIDE`.

    What :func:`rendering.video.write_videos` takes; arguments as :func:`attention_frame`.
    """
    frames = {name: attention_frame(scene, style, episode, note, [name]) for name in scene.cameras}
    if len(frames) > 1:
        frames[SIDE_BY_SIDE] = attention_frame(scene, style, episode, note)
    return frames


def video_paths(folder: Path, stem: str, cameras: Sequence[str]) -> dict[str, Path]:
    """Name a file for each video that :func:`attention_frames` draws the frames of."""
    names = [*cameras, SIDE_BY_SIDE] if len(cameras) > 1 else cameras
    # A camera's name without what separates folders.
    return {name: folder / f"{stem}_{name.replace('/', '_')}.mp4" for name in names}


def attention_strip(
    rows: Sequence[Sequence[AttentionScene]],
    style: AttentionStyle,
    episodes: Sequence[tuple[float, float]] | None = None,
    note: str = "",
    height_px: int = 160,
) -> Picture:
    """Draw many instants as one still picture: a column for each, a row for each method.

    The pictures alone come first, under the captions of the first method's scenes.

    Args:
        rows: For each method its scenes, of the same instants.
        style: How to draw them.
        episodes: For each method what :func:`episode_range` finds; needed for scale ``episode``.
        note: Below it all; ASCII.
        height_px: Of each picture, instead of the style's target height.

    Raises:
        ValueError: When there is no scene, rows differ in instants or cameras, or ranges of the
            episode are missing.
    """
    lengths = [len(row) for row in rows]
    if not rows or not lengths[0] or len(set(lengths)) > 1:
        raise ValueError(f"rows: {lengths} scenes; give every method equally many, at least one")
    for column, scenes in enumerate(zip(*rows, strict=True)):
        layouts = [_layout(scene) for scene in scenes]
        if any(layout != layouts[0] for layout in layouts):
            raise ValueError(
                f"column {column}: cameras of sizes {layouts}; give every method the same pictures"
            )
    if episodes is not None and len(episodes) != len(rows):
        raise ValueError(f"episodes: {len(episodes)} ranges for {len(rows)} methods")
    if height_px < MIN_PICTURE_PX:
        raise ValueError(f"height_px: {height_px} px; give at least {MIN_PICTURE_PX}")

    border_px = _border_px(style, height_px)
    # In every bar a camera has the same colour, whichever shares a method has.
    names = tuple(dict.fromkeys(name for row in rows for scene in row for name in scene.shares))
    palette = share_colours(names)

    def cell(pictures: Sequence[Picture], shares: Mapping[str, float]) -> Picture:
        """Lay pictures side by side, with a bar where others have one."""
        if not palette:
            return beside(pictures, NARROW_GAP_PX)
        bar = blank(height_px, NARROW_BAR_PX)
        if shares:
            bar = draw_shares(shares, height_px, NARROW_BAR_PX, palette)
        return beside([*pictures, below(blank(border_px, 1), bar)], NARROW_GAP_PX)

    def alone(scene: AttentionScene) -> Picture:
        pictures = [fit_height(camera.picture, height_px) for camera in scene.cameras.values()]
        return cell([_framed(picture, border_px, marks.WHITE) for picture in pictures], {})

    lines = [beside([captioned(alone(scene), scene.caption) for scene in rows[0]], GAP_PX)]
    width = lines[0].shape[1]
    has_uniform = False
    for index, row in enumerate(rows):
        episode = None if episodes is None else episodes[index]
        ranges = [scale_range(scene, style, episode) for scene in row]
        has_uniform |= any(is_uniform(value_range) for value_range in ranges)
        cells = []
        for scene, value_range in zip(row, ranges, strict=True):
            drawn = [
                draw_camera(scene, camera, style, value_range, height_px)
                for camera in scene.cameras
            ]
            cells.append(cell(drawn, scene.shares))
        low, high = ranges[0]
        values = f"{low:.3g} .. {high:.3g}" if style.scale == "episode" else ""
        title = "  ".join(filter(None, (row[0].title, values, row[0].unit)))
        lines += [line(title, width), beside(cells, GAP_PX)]
    low, high = "low", "high"
    if style.value_range is not None:
        low, high = (f"{value:.3g}" for value in style.value_range)
    remark = ", uniform maps at its low end" if has_uniform else ""
    footer = [_colour_bar(low, high, f"({SCALE_LABELS[style.scale]}{remark})", style.colormap)]
    footer += _wrapped_legend(names, max(width, footer[0].shape[1]))
    width = max(width, *(part.shape[1] for part in footer))
    return below(*lines, *footer, *note_lines(note, width))


def _layout(scene: AttentionScene) -> dict[str, tuple[int, ...]]:
    return {name: camera.picture.shape for name, camera in scene.cameras.items()}


def _border_px(style: AttentionStyle, height_px: int) -> int:
    """Width of the frame around a picture of a height; 0 for none."""
    if style.border == "none":
        return 0
    return max(round(style.proprio_border_width * height_px / style.target_height), 1)


def _border_colour(
    scene: AttentionScene, style: AttentionStyle, value_range: tuple[float, float]
) -> marks.Colour:
    """Magenta as bright as the state's share; on the cells' scale where the state is part of it.

    White, which is nothing, where the scene has no such share.
    """
    if "state" not in scene.shares:
        return marks.WHITE
    share = float(scene.shares["state"])
    if style.scale == "global":
        low, high = value_range
        share = 0.0 if is_uniform(value_range) else (share - low) / (high - low)
    brightness = round(255 * min(max(share, 0.0), 1.0))
    return brightness, 0, brightness


def _framed(picture: Picture, border_px: int, colour: marks.Colour) -> Picture:
    """Put a frame around a picture, which keeps all of its pixels."""
    if not border_px:
        return picture
    up = down = left = right = border_px
    framed = cv2.copyMakeBorder(picture, up, down, left, right, cv2.BORDER_CONSTANT, None, colour)
    return np.asarray(framed, np.uint8)


def _colour_bar(low: str, high: str, text: str, colormap: str, number_px: int = 0) -> Picture:
    """Draw a colour map between the values at its ends, and what they are.

    Args:
        low: Left of the colours.
        high: Right of them.
        text: Right of it all.
        colormap: Name of a matplotlib colour map.
        number_px: Left free for each number: nothing jumps from frame to frame.
    """
    number_px = max(number_px, marks.text_width(low), marks.text_width(high))
    left = 4 + number_px + 6
    right = left + RAMP_PX
    text_left = right + 6 + number_px + 8
    bar = blank(LEGEND_ROW_PX + 4, text_left + marks.text_width(text) + 4)
    steps = np.arange(RAMP_PX) * 256 // RAMP_PX
    bar[5 : LEGEND_ROW_PX + 1, left:right] = colour_table(colormap)[steps]
    baseline = LEGEND_ROW_PX - 2
    marks.draw_text(bar, low, (left - 6 - marks.text_width(low), baseline))
    marks.draw_text(bar, high, (right + 6, baseline))
    marks.draw_text(bar, text, (text_left, baseline))
    return bar


def _legend(shares: Mapping[str, float]) -> Picture:
    """Name the pieces of the bar of shares from its top down, with their percentages."""
    heading = "share of mass"
    names_px = max(_entry_px(name) for name in shares)
    width = max(names_px + 6 + marks.text_width("100.0%"), marks.text_width(heading)) + 8
    rows = [line(heading, width)]
    for name, share in shares.items():
        row = _entry(name, tuple(shares), width)
        percent = f"{share:.1%}"
        marks.draw_text(row, percent, (width - 4 - marks.text_width(percent), LEGEND_ROW_PX - 5))
        rows.append(row)
    return below(*rows)


def _wrapped_legend(names: tuple[str, ...], width_px: int) -> list[Picture]:
    """Name the colours of shares in as few rows as a width allows."""
    rows: list[list[Picture]] = []
    for name in names:
        entry = _entry(name, names, _entry_px(name) + GAP_PX)
        taken = sum(part.shape[1] for part in rows[-1]) if rows else width_px
        if taken + entry.shape[1] > width_px:
            rows.append([])
        rows[-1].append(entry)
    return [beside(row, 0) for row in rows]


def _entry(name: str, names: tuple[str, ...], width_px: int) -> Picture:
    """Draw the colour of a token type and what it is called."""
    row = blank(LEGEND_ROW_PX, width_px)
    row[4 : LEGEND_ROW_PX - 4, 4:14] = share_colours(names)[name]
    marks.draw_text(row, TOKEN_TYPES.get(name, name), (20, LEGEND_ROW_PX - 5))
    return row


def _entry_px(name: str) -> int:
    return 20 + marks.text_width(TOKEN_TYPES.get(name, name))
