"""Features as place cells: how strongly each fires, by where something is on the board.

Rates are divided by occupancy, so that a place where the robot often is does not look special.
Skaggs et al. 1993 measure how much a rate map tells of the place; chance is judged by giving every
episode the places of another one, which keeps both signals' persistence and cuts their tie.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from features.record import FeatureRecord
from features.statistics import shuffles
from landscapes.grid import Grid

LEAST_FRAMES = 3
"""Frames in a cell from which it has a rate: a mean of fewer is mostly chance."""
DEFAULT_GRID = Grid(16)


@dataclass(frozen=True)
class PlaceFields:
    """Rate maps of all features, and how telling they are."""

    rates: Float32[Tensor, "latent row column"]
    """Mean activation in each cell, of the strongest token of each frame; NaN where a cell has
    fewer than :data:`LEAST_FRAMES` frames."""
    frames: Int64[Tensor, "row column"]
    """Frames in each cell."""
    information_bits: Float64[Tensor, " latent"]
    """Skaggs information: bits about the place in each unit of activity; NaN for a silent
    feature."""
    p: Float64[Tensor, " latent"]
    """Share of chance pairings, this one included, that are as telling; not corrected for the
    number of features."""
    grid: Grid = field(default=DEFAULT_GRID)

    def significant_share(self, level: float = 0.01) -> float:
        """Share of the features that fire whose p is at most ``level``; chance gives ``level``."""
        return float((self.p[~self.p.isnan()] <= level).double().mean())


def place_fields(
    record: FeatureRecord,
    xy: Float[Tensor, "frame 2"],
    grid: Grid = DEFAULT_GRID,
    n_permutations: int = 200,
    seed: int = 0,
) -> PlaceFields:
    """Map features over the places of an object.

    Args:
        record: Of some frames, of several episodes.
        xy: Where the object is in each frame, in the units of the grid; known everywhere.
        grid: Cells over the board; what lies outside counts for the nearest cell.
        n_permutations: Chance pairings of episodes.
        seed: Of the pairings.

    Raises:
        ValueError: If places are of other frames, or not finite.
    """
    if len(xy) != len(record) or not xy.isfinite().all():
        raise ValueError(
            f"xy: {len(xy)} places, {int((~xy.isfinite()).sum())} numbers not finite, for "
            f"{len(record)} frames; give one known place for each"
        )
    n_cells = grid.resolution**2
    row, column = grid.cells(xy.double()).unbind(-1)
    cell = row * grid.resolution + column
    activity = record.frame_activity
    base = activity.latent.long() * n_cells
    frame, value = activity.frame.long(), activity.value.double()

    def rates(
        cell: Int64[Tensor, " frame"],
    ) -> tuple[Float64[Tensor, "latent cell"], Int64[Tensor, " cell"]]:
        frames = torch.bincount(cell, minlength=n_cells)
        total = torch.bincount(base + cell[frame], value, minlength=record.n_latents * n_cells)
        return total.view(record.n_latents, n_cells) / frames.clamp_min(1), frames

    def information(
        rate: Float64[Tensor, "latent cell"], frames: Int64[Tensor, " cell"]
    ) -> Float64[Tensor, " latent"]:
        is_visited = frames >= LEAST_FRAMES
        share = frames[is_visited].double() / frames[is_visited].sum()
        relative = rate[:, is_visited] / (rate[:, is_visited] @ share)[:, None]
        return torch.xlogy(relative, relative) @ share / math.log(2)

    found, frames = rates(cell)
    bits = information(found, frames)
    as_telling = torch.ones(record.n_latents, dtype=torch.float64)
    for pairing in shuffles(record.episode_index, n_permutations, seed):
        # Rounding must not tell apart what is equal; a map without mass is not telling.
        by_chance = information(*rates(cell[pairing])).nan_to_num(0)
        as_telling += (by_chance >= bits - 1e-9).double()
    rate_maps = torch.where(frames >= LEAST_FRAMES, found, torch.nan).float()
    return PlaceFields(
        rates=rate_maps.view(-1, grid.resolution, grid.resolution),
        frames=frames.view(grid.resolution, grid.resolution),
        information_bits=bits,
        p=torch.where(bits.isnan(), torch.nan, as_telling / (1 + n_permutations)),
        grid=grid,
    )
