"""The density of where an action leads in a picture, from actions drawn from the policy's own."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from landscapes.density import Mixture, fit_bandwidth, smallest_scale
from landscapes.grid import Grid
from landscapes.landscape import Predictions
from landscapes.regions import total_thresholds

N_DRAWS = 128
"""Actions drawn from each density and projected."""
N_CELLS = 96
"""Along each side of a picture."""
LEVELS = (0.5, 0.8)
"""Regions that so many draws can tell; the tails of more would be a few kernels."""
FRAMES_AT_ONCE = 16
"""Frames whose draws are compared together: a matter of memory alone."""


def actions_to_project(
    predictions: Predictions, scale: Float[Tensor, "#frame query action"], query: int, seed: int
) -> dict[str, Float[np.ndarray, "frame *rest action"]]:
    """What is to be found in pictures: drawn chunks, prediction, demonstration, and their density.

    Args:
        predictions: At all chunk steps that paths go through.
        scale: Laplace scale b of the kernels, at the predictions' queries.
        query: Chunk step whose density is wanted.
        seed: Of the draws.

    Returns:
        ``samples`` [frame, sample, query], ``prediction`` and ``expert`` [frame, query], ``draws``
        [frame, draw] from the density of ``query``.
    """
    place = predictions.queries.index(query)
    mixture = predictions.at([query]).mixture(scale[:, [place]])
    generator = torch.Generator(predictions.samples.device).manual_seed(seed)
    draws = mixture.sample(N_DRAWS, generator)[:, 0]
    found = {
        "samples": predictions.samples,
        "prediction": predictions.point,
        "expert": predictions.expert,
        "draws": draws,
    }
    return {name: values.double().cpu().numpy() for name, values in found.items()}


@dataclass(frozen=True)
class ProjectedDensity:
    """Mass of a picture's cells, and the borders of its credible regions."""

    mass: Float[Tensor, "frame row column"]
    thresholds: Float[Tensor, "frame level"]
    """Infinite where the picture does not hold as much: no region."""
    beyond: Float[Tensor, " frame"]
    """Mass beyond the borders of the picture; NaN where a draw lies behind the camera."""
    levels: tuple[float, ...] = LEVELS
    """Share of all mass that each region holds."""


def projected_density(
    points_px: Float[Tensor, "frame draw 2"], size_px: tuple[int, int]
) -> ProjectedDensity:
    """Estimate a density in a picture with Laplace kernels of leave-one-out bandwidth.

    The map from actions to the picture is no product of its dimensions, so the kernels of the
    policy's density do not carry over: its draws do.

    Args:
        points_px: x and y of projected draws; a frame with a NaN among them gets no density.
        size_px: Height and width of the picture.
    """
    height, width = size_px
    grid = Grid(N_CELLS, (0.0, 0.0), (float(width), float(height)))
    is_seen = points_px.isfinite().all(-1).all(-1)
    seen = points_px[is_seen].double()
    mass = torch.zeros(len(points_px), N_CELLS, N_CELLS, dtype=torch.float64)
    thresholds = torch.full((len(points_px), len(LEVELS)), torch.inf, dtype=torch.float64)
    beyond = torch.full((len(points_px),), torch.nan, dtype=torch.float64)
    floor = smallest_scale(grid.size)
    if len(seen):
        pieces = seen.split(FRAMES_AT_ONCE)
        scale = torch.cat([fit_bandwidth(piece, min_scale=floor) for piece in pieces])
        found = Mixture(seen, scale[:, None]).cell_mass(grid)
        mass[is_seen] = found
        thresholds[is_seen] = total_thresholds(found, LEVELS)
        beyond[is_seen] = (1 - found.sum((-1, -2))).clamp_min(0)
    return ProjectedDensity(mass, thresholds, beyond)
