"""The board that landscapes are computed on: cells over two action dimensions, as pictures lie.

Row 0 is the top (smallest y), column 0 the left (smallest x), as in ``env.render``. A cell is an
area, not a point: its centre lies half a cell inside its edges.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Square cells counts over a rectangle of actions (x, y)."""

    resolution: int = 128
    """Cells along each axis (``--action_resolution``)."""
    low: tuple[float, float] = (0.0, 0.0)
    """Smallest (x, y) on the board, in data units (PushT: px)."""
    high: tuple[float, float] = (512.0, 512.0)
    """Largest (x, y) on the board."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"action_resolution {self.resolution}: give at least 1 cell")
        if not (self.low[0] < self.high[0] and self.low[1] < self.high[1]):
            raise ValueError(f"the board from {self.low} to {self.high} is empty")

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the board."""
        return self.high[0] - self.low[0], self.high[1] - self.low[1]

    @property
    def area(self) -> float:
        """Of the board; PushT: px^2."""
        return self.size[0] * self.size[1]

    @property
    def cell_area(self) -> float:
        """Of one cell; PushT: px^2."""
        return self.area / self.resolution**2

    @property
    def cell_size(self) -> tuple[float, float]:
        """Width and height of a cell."""
        return self.size[0] / self.resolution, self.size[1] / self.resolution

    @property
    def log_uniform(self) -> float:
        """Log density of the uniform distribution over the board, nats per unit area."""
        return -math.log(self.area)

    def edges(self, axis: int, device: torch.device | str | None = None) -> Float[Tensor, " edge"]:
        """Borders between cells along x (axis 0) or y (axis 1), float64."""
        return torch.linspace(
            self.low[axis],
            self.high[axis],
            self.resolution + 1,
            dtype=torch.float64,
            device=device,
        )

    def centres(self, device: torch.device | str | None = None) -> Float[Tensor, "row column 2"]:
        """Action (x, y) in the middle of every cell, float64."""
        x, y = (
            (edges[1:] + edges[:-1]) / 2 for edges in (self.edges(0, device), self.edges(1, device))
        )
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([columns, rows], dim=-1)

    def cells(self, actions: Float[Tensor, "*batch 2"]) -> Int[Tensor, "*batch 2"]:
        """(row, column) of the cell that holds each action; the nearest cell for those outside."""
        low = actions.new_tensor(self.low)
        size = actions.new_tensor(self.cell_size)
        column_row = ((actions - low) / size).floor().long().clamp(0, self.resolution - 1)
        return column_row.flip(-1)
