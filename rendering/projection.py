"""Where a policy's actions lead, drawn over what each camera saw: for actions of any dimensions.

For each end effector, thin lines are sampled chunks through the horizons; the outlines hold 50 %
(solid) and 80 % (dashed) of its density at one of them, noise of the kernels included. White is the
prediction, red the demonstration; what lies outside the picture is a triangle at its border.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8

from landscapes.landscape import Predictions
from landscapes.projection import projected_density
from rendering import marks
from rendering.landscape import DASHES_PX, region_outlines, to_height
from rendering.layout import below, beside, blank, line
from rendering.marginals import NOTED_BEYOND, beyond_note, legend_width, write_legend

COLOURS = ((64, 200, 255), (255, 120, 220), (120, 255, 120), (255, 190, 60))
"""Of the end effectors, in order."""
PATH_OPACITY = 0.45
GAP_PX = 8
LEGEND_PX = 20
MAX_WIDTH_PX = 1400
"""Of a still picture with several instants in a row."""

Picture = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True)
class EndEffector:
    """What is known of one end effector in one camera's picture at one instant, in px of it.

    NaN is not drawn: what lies behind the camera, or beyond the end of the demonstration.
    """

    name: str
    samples: Float[np.ndarray, "sample query 2"]
    """Drawn chunks."""
    prediction: Float[np.ndarray, "query 2"]
    """What the policy would do: white line, star at the horizon."""
    expert: Float[np.ndarray, "query 2"]
    """What the demonstrator did: red line, cross at the horizon."""
    mass: Float[np.ndarray, "row column"]
    """Density at the horizon, in cells of the picture."""
    thresholds: Float[np.ndarray, " level"]
    """Mass of the last cell inside each region, smallest region first; infinite for one that the
    picture does not hold."""
    beyond: float
    """Mass outside the picture; NaN where some of it lies behind the camera."""

    @property
    def note(self) -> str:
        """What is to be said of the mass that is not seen; empty if all of it is."""
        if np.isnan(self.beyond):
            return f"{self.name}: behind the camera"
        return f"{self.name}: {beyond_note(self.beyond)}" if self.beyond > NOTED_BEYOND else ""


@dataclass(frozen=True)
class CameraView:
    """One camera at one instant."""

    title: str
    """One line of ASCII above the picture."""
    picture: Picture
    end_effectors: tuple[EndEffector, ...]
    horizon: int
    """Place among the queries that is marked, and whose density is outlined."""


def camera_views(
    pictures: Mapping[str, Iterable[Picture]],
    px: Mapping[str, Mapping[str, Float[np.ndarray, "frame *rest end_effector 2"]]],
    end_effectors: Sequence[str],
    predictions: Predictions,
    query: int,
    titles: Sequence[str],
    sizes_px: Mapping[str, tuple[int, int]],
) -> Iterator[tuple[CameraView, ...]]:
    """Compose what every camera shows, frame by frame.

    Args:
        pictures: Camera name to a picture of each frame.
        px: Camera name, then name of the actions (:func:`landscapes.projection.actions_to_project`)
            to their places.
        end_effectors: Names, in the order of the places.
        predictions: That were projected.
        query: Chunk step that is marked, and that the draws are of.
        titles: One for each frame.
        sizes_px: Camera name to the height and width that places are in.
    """
    place = predictions.queries.index(query)
    is_valid = predictions.is_valid.cpu().numpy()[..., None, None]
    densities = {
        (camera, effector): projected_density(
            torch.from_numpy(parts["draws"][:, :, number]).double(), sizes_px[camera]
        )
        for camera, parts in px.items()
        for number, effector in enumerate(end_effectors)
    }
    for frame, shown in enumerate(zip(*pictures.values(), strict=True)):
        views = []
        for camera, picture in zip(pictures, shown, strict=True):
            parts = px[camera]
            expert = np.where(is_valid[frame], parts["expert"][frame], np.nan)
            effectors = tuple(
                EndEffector(
                    name=effector,
                    samples=parts["samples"][frame, :, :, number],
                    prediction=parts["prediction"][frame, :, number],
                    expert=expert[:, number],
                    mass=densities[camera, effector].mass[frame].numpy(),
                    thresholds=densities[camera, effector].thresholds[frame].numpy(),
                    beyond=float(densities[camera, effector].beyond[frame]),
                )
                for number, effector in enumerate(end_effectors)
            )
            title = f"{titles[frame]}  {camera}  k = {query}"
            height = sizes_px[camera][0]
            views.append(CameraView(title, to_height(picture, height), effectors, place))
        yield tuple(views)


def draw_view(view: CameraView) -> Picture:
    """Draw one camera's picture with what lies on top of it."""
    picture = view.picture.copy()
    paths = picture.copy()
    for place, effector in enumerate(view.end_effectors):
        colour = COLOURS[place % len(COLOURS)]
        for sample in effector.samples:
            known = sample[np.isfinite(sample).all(-1)]
            _line(paths, known, colour)
    picture = np.asarray(cv2.addWeighted(paths, PATH_OPACITY, picture, 1 - PATH_OPACITY, 0))
    for place, effector in enumerate(view.end_effectors):
        _outline(picture, effector, COLOURS[place % len(COLOURS)])
    radius = max(picture.shape[1] / 60, 5.0)
    for place, effector in enumerate(view.end_effectors):
        _route(picture, effector.prediction, marks.WHITE)
        _route(picture, effector.expert, marks.RED)
        star = _visible(picture, effector.prediction[view.horizon], marks.WHITE, radius)
        if star is not None:
            marks.draw_star(picture, star, marks.WHITE, radius)
            if len(view.end_effectors) > 1:
                colour = COLOURS[place % len(COLOURS)]
                marks.draw_tag(picture, effector.name, star, colour, radius, is_left=False)
        cross = _visible(picture, effector.expert[view.horizon], marks.RED, radius)
        if cross is not None:
            marks.draw_cross(picture, cross, marks.RED, round(2.4 * radius), 2)
    notes = filter(None, (effector.note for effector in view.end_effectors))
    return below(line("  ".join([view.title, *notes]), picture.shape[1]), picture)


def projection_frame(views: Sequence[CameraView]) -> Picture:
    """Draw all cameras of one instant side by side, with a legend.

    Raises:
        ValueError: If there is no camera.
    """
    if not views:
        raise ValueError("no camera to draw on; give at least one view")
    drawn = beside([draw_view(view) for view in views], GAP_PX)
    return below(drawn, _legend([each.name for each in views[0].end_effectors], drawn.shape[1]))


def projection_strip(instants: Sequence[Sequence[CameraView]]) -> Picture:
    """Draw several instants as one still picture, as many in a row as there is room for.

    Raises:
        ValueError: If there is no instant.
    """
    if not instants:
        raise ValueError("no instant to draw; give at least one")
    drawn = [beside([draw_view(view) for view in views], GAP_PX) for views in instants]
    n_columns = max(MAX_WIDTH_PX // drawn[0].shape[1], 1)
    rows = [
        beside(drawn[start : start + n_columns], 2 * GAP_PX)
        for start in range(0, len(drawn), n_columns)
    ]
    width = max(row.shape[1] for row in rows)
    names = [each.name for each in instants[0][0].end_effectors]
    return below(*rows, _legend(names, width))


def _line(picture: Picture, points: Float[np.ndarray, "point 2"], colour: marks.Colour) -> None:
    """Draw a thin line, or a dot where there is one point only."""
    scaled = np.rint(_near(points, picture) * 2**marks.FRACTION_BITS).astype(np.int32)
    bits = marks.FRACTION_BITS
    if len(points) == 1:
        cv2.circle(picture, scaled[0].tolist(), 2 << bits, colour, cv2.FILLED, cv2.LINE_AA, bits)
    elif len(points):
        cv2.polylines(picture, [scaled], False, colour, 1, cv2.LINE_AA, bits)


def _route(picture: Picture, points: Float[np.ndarray, "point 2"], colour: marks.Colour) -> None:
    known = points[np.isfinite(points).all(-1)]
    if len(known) > 1:
        marks.draw_lines(picture, [_near(known, picture)], colour, 1)


def _outline(picture: Picture, effector: EndEffector, colour: marks.Colour) -> None:
    """Outline the credible regions of one end effector."""
    height, width, _ = picture.shape
    px_per_cell = np.array([width, height]) / len(effector.mass)
    outlines = region_outlines(effector.mass, effector.thresholds)
    drawn: list[np.ndarray] = []
    for outline, dash in zip(outlines, DASHES_PX, strict=False):
        lines = [np.clip(each * px_per_cell - 0.5, 0, (width - 1, height - 1)) for each in outline]
        drawn += lines if dash is None else [d for each in lines for d in marks.dashes(each, *dash)]
    marks.draw_lines(picture, drawn, colour)


def _near(points: Float[np.ndarray, "point 2"], picture: Picture) -> Float[np.ndarray, "point 2"]:
    """Bring points far outside nearer: OpenCV's coordinates are 32 bit."""
    size = np.array(picture.shape[1::-1])
    return np.clip(points - 0.5, -4 * size, 5 * size)


def _visible(
    picture: Picture, at: Float[np.ndarray, " 2"], colour: marks.Colour, radius: float
) -> np.ndarray | None:
    """Find the pixel of a place; outside the picture, mark the border and find none."""
    if not np.isfinite(at).all():
        return None
    size = np.array(picture.shape[1::-1])
    pixel = np.rint(np.clip(at, 0, size - 1)).astype(np.int64)
    outwards = np.greater(at, size) * 1.0 - np.less(at, 0)
    if not outwards.any():
        return pixel
    marks.draw_wedge(picture, pixel, outwards, colour, 0.7 * radius)
    return None


def _legend(names: Sequence[str], width: int) -> Picture:
    """Say which colour is whose, in as much width as that takes."""
    own = [
        (f"{name}: samples, 50 and 80% of mass", COLOURS[place % len(COLOURS)])
        for place, name in enumerate(names)
    ]
    entries = [("expert", marks.RED), ("policy", marks.WHITE), *own]
    strip = blank(LEGEND_PX, max(width, legend_width(entries)))
    write_legend(strip, 15, entries)
    return strip
