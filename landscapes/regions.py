"""Highest-density regions of a landscape: credible sets, their areas, and its modes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from landscapes.grid import Grid

CREDIBLE_LEVELS = (0.5, 0.8, 0.95)
"""Masses of the regions that are drawn and reported."""
MIN_MODE_MASS = 0.05
"""Share of the mass below which a separate piece of a region is no mode."""


def mass_below(mass: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch row column"]:
    """Probability of all cells that are no denser than each cell: one minus its HPD level.

    The set where this exceeds ``1 - q`` is the smallest region that holds q of the mass on the
    board (:func:`credible_thresholds`). Cells of equal density share one value, so that the order
    of cells plays no part: it is 1 at the densest cell, and everywhere on a flat board.
    """
    *batch, rows, columns = mass.shape
    flat = mass.reshape(-1, rows * columns)
    ordered, order = flat.sort(dim=-1, descending=True)
    denser = torch.cumsum(ordered, dim=-1) - ordered
    # The first cell of each run of equal ones stands for all of them.
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] < ordered[:, :-1]
    place = torch.where(new, torch.arange(ordered.shape[-1], device=mass.device), 0)
    denser = denser.gather(-1, place.cummax(dim=-1).values)
    total = flat.sum(-1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    below = torch.empty_like(flat).scatter_(-1, order, (1 - denser / total).clamp_min(0))
    return below.reshape(*batch, rows, columns)


def credible_thresholds(
    mass: Float[Tensor, "*batch row column"], levels: Sequence[float] = CREDIBLE_LEVELS
) -> Float[Tensor, "*batch level"]:
    """Cell mass from which on cells belong to the smallest region that holds each level.

    Levels are shares of the mass on the board.
    """
    *batch, rows, columns = mass.shape
    flat = mass.reshape(*batch, rows * columns)
    total = flat.sum(-1, keepdim=True)
    # Cells below this hold less than 1 - level together: no region ends there, so leave them
    # unsorted.
    floor = (1 - max(levels)) * total / flat.shape[-1]
    n_sorted = int((flat >= floor).sum(-1).max())
    ordered = flat.topk(n_sorted, dim=-1).values
    share = torch.cumsum(ordered, dim=-1) / total.clamp_min(torch.finfo(mass.dtype).tiny)
    wanted = mass.new_tensor(list(levels)).expand(*batch, len(levels)).contiguous()
    # Rounding must not push 1.0 past the end.
    place = torch.searchsorted(share, wanted).clamp_max(n_sorted - 1)
    return ordered.gather(-1, place)


def total_thresholds(
    mass: Float[Tensor, "*batch row column"], levels: Sequence[float] = CREDIBLE_LEVELS
) -> Float[Tensor, "*batch level"]:
    """The same for levels that are shares of all mass, also of what lies off the board.

    Infinite where the board holds less than the level: no cell then belongs to the region.
    """
    *batch, rows, columns = mass.shape
    ordered = mass.reshape(*batch, rows * columns).sort(dim=-1, descending=True).values
    held = torch.cumsum(ordered, dim=-1)
    wanted = mass.new_tensor(list(levels)).expand(*batch, len(levels)).contiguous()
    place = torch.searchsorted(held, wanted)
    found = ordered.gather(-1, place.clamp_max(ordered.shape[-1] - 1))
    return torch.where(place < ordered.shape[-1], found, torch.inf)


def region_area(
    mass: Float[Tensor, "*batch row column"], level: float, grid: Grid
) -> Float[Tensor, "*batch"]:
    """Area of the smallest region that holds ``level`` of the mass, in squared data units."""
    threshold = credible_thresholds(mass, [level])[..., None]
    return (mass >= threshold).sum((-1, -2)).double() * grid.cell_area


@dataclass(frozen=True)
class Modes:
    """Separate pieces of the 80 % region that each hold at least 5 % of the mass."""

    count: Int[Tensor, "*batch"]
    region: Bool[Tensor, "*batch row column"]
    """The whole region."""


def modes(
    mass: Float[Tensor, "*batch row column"], level: float = 0.8, min_mass: float = MIN_MODE_MASS
) -> Modes:
    """Count the separate pieces (8-connected) of a highest-density region.

    Local maxima would not do: every Laplace kernel has a cusp and is a maximum of its own. Use
    kernels at least one cell wide.
    """
    import cv2

    *batch, rows, columns = mass.shape
    threshold = credible_thresholds(mass, [level])[..., None]
    region = mass >= threshold
    flat_region = region.reshape(-1, rows, columns).cpu().numpy().astype(np.uint8)
    flat_mass = mass.reshape(-1, rows * columns).cpu().numpy()
    counts = []
    for place, masses in enumerate(flat_mass):
        n_labels, labels = cv2.connectedComponents(flat_region[place], connectivity=8)
        held = np.bincount(labels.ravel(), weights=masses, minlength=n_labels)[1:]
        counts.append(int((held >= min_mass * masses.sum()).sum()))
    return Modes(torch.tensor(counts, dtype=torch.long).reshape(batch), region)
