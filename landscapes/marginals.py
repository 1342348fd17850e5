"""The exact density of each single dimension of an action, on cells along its axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from landscapes.density import laplace_interval_mass
from landscapes.landscape import Predictions
from landscapes.regions import CREDIBLE_LEVELS, total_thresholds
from landscapes.space import ActionSpace

N_CELLS = 96
"""Along each axis."""
FRAMES_AT_ONCE = 64
"""Frames whose kernels are held together: a matter of memory alone."""


@dataclass(frozen=True)
class Marginals:
    """Densities of all single dimensions, with their credible regions."""

    space: ActionSpace
    """Names, units and the range that cells lie in."""
    queries: tuple[int, ...]
    """Chunk steps."""
    mass: Float[Tensor, "frame query action cell"]
    """Probability of each cell; what lies beyond the range is left out, not renormalised."""
    thresholds: Float[Tensor, "frame query action level"]
    """Cell mass at the border of the credible regions of :attr:`levels`; infinite where the axis
    does not hold as much."""
    levels: tuple[float, ...] = CREDIBLE_LEVELS
    """Share of all mass that each credible region holds."""

    @property
    def beyond(self) -> Float[Tensor, "frame query action"]:
        """Mass beyond the ends of each axis."""
        return (1 - self.mass.double().sum(-1)).clamp_min(0).float()

    def nats_above_uniform(self) -> Float[Tensor, "frame query action cell"]:
        """Log of the mean density of each cell over that of the uniform density of its axis."""
        tiny = torch.finfo(self.mass.dtype).tiny
        return (self.mass * self.mass.shape[-1]).clamp_min(tiny).log()


def marginals(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    space: ActionSpace,
    horizons: Sequence[int],
    n_cells: int = N_CELLS,
) -> Marginals:
    """Compute the density of every dimension: a mixture of one-dimensional Laplace kernels.

    Args:
        predictions: At least at ``horizons``.
        scale: Laplace scale b of the kernels of single dimensions, at the predictions' queries.
        space: Range of the cells.
        horizons: Chunk steps.
        n_cells: Along each axis.
    """
    shown = predictions.at(horizons)
    centres = rearrange(
        shown.samples, "frame sample query action -> frame query action sample"
    ).double()
    b = scale[:, [predictions.queries.index(horizon) for horizon in horizons]].double()
    masses = []
    for dim, axis in enumerate(space.axes):
        edges = torch.linspace(
            axis.low, axis.high, n_cells + 1, dtype=torch.float64, device=centres.device
        )
        width = b[:, :, dim, None].expand(len(centres), -1, -1)
        pieces = [
            laplace_interval_mass(near, wide, edges).mean(-2)
            for near, wide in zip(
                centres[:, :, dim].split(FRAMES_AT_ONCE), width.split(FRAMES_AT_ONCE), strict=True
            )
        ]
        masses.append(torch.cat(pieces))
    mass = torch.stack(masses, dim=2)
    # A line is a board of one row.
    thresholds = total_thresholds(mass[..., None, :], CREDIBLE_LEVELS)
    return Marginals(
        space, tuple(horizons), mass.float().cpu(), thresholds.float().cpu(), CREDIBLE_LEVELS
    )
