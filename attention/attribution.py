"""What every method answers: relevance of picture regions and of the other inputs, per frame."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Attribution:
    """Relevance of the inputs of a batch of frames for what a policy does there.

    Relevance is not negative and has the unit of its method; only its proportions are compared.
    """

    method: str
    """As ``--method`` calls it."""
    queries: tuple[int, ...]
    """Chunk steps that it speaks of, on average."""
    maps: Mapping[str, Float[Tensor, "batch row column"]]
    """Camera name to relevance, in token order; of token cells, patches or single pixels."""
    cells_px: Mapping[str, float]
    """Camera name to the side of a square cell, in image px. The last row and column overhang a
    picture whose size is no multiple of it."""
    image_sizes: Mapping[str, tuple[int, int]]
    """Camera name to (height, width) in px."""
    vectors: Mapping[str, Float[Tensor, " batch"]]
    """``latent``, ``state``, ``environment_state`` to relevance; empty if the method says nothing
    of them."""
    dimensions: Mapping[str, Float[Tensor, "batch dimension"]]
    """``state`` and ``environment_state`` to signed relevance of each dimension, where known."""
    completeness_error: Float[Tensor, " batch"] | None = None
    """How far relevances are from adding up as they should, as a share of what they explain."""

    def __len__(self) -> int:
        parts = [*self.maps.values(), *self.vectors.values()]
        return len(parts[0]) if parts else 0

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Attribution":
        """Some of the frames."""
        error = self.completeness_error
        return replace(
            self,
            maps={name: values[index] for name, values in self.maps.items()},
            vectors={name: values[index] for name, values in self.vectors.items()},
            dimensions={name: values[index] for name, values in self.dimensions.items()},
            completeness_error=None if error is None else error[index],
        )

    def cpu(self) -> "Attribution":
        """In single precision, on the CPU, without a graph."""

        def move(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.detach().float().cpu() for name, value in values.items()}

        error = self.completeness_error
        return replace(
            self,
            maps=move(self.maps),
            vectors=move(self.vectors),
            dimensions=move(self.dimensions),
            completeness_error=None if error is None else error.detach().float().cpu(),
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Attribution]") -> "Attribution":
        """Join batches of one method and policy, in order."""

        def join(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([each[name] for each in values]) for name in values[0]}

        errors = [part.completeness_error for part in parts]
        known = [error for error in errors if error is not None]
        return replace(
            parts[0],
            maps=join([part.maps for part in parts]),
            vectors=join([part.vectors for part in parts]),
            dimensions=join([part.dimensions for part in parts]),
            completeness_error=torch.cat(known) if known else None,
        )

    def shares(self) -> dict[str, Float[Tensor, " batch"]]:
        """Relevance of each kind of input over that of all: vector tokens, then cameras.

        They add up to 1, or are all 0 where a method found nothing relevant.
        """
        parts = {
            **self.vectors,
            **{
                name: reduce(values, "batch row column -> batch", "sum")
                for name, values in self.maps.items()
            },
        }
        total = sum(parts.values(), torch.zeros(len(self), device=_device(parts)))
        # Not the floor of the clamp itself: relevances may be tiny in their unit.
        safe = torch.where(total > 0, total, torch.ones_like(total))
        return {name: values / safe for name, values in parts.items()}

    def picture_mass(self) -> dict[str, Float[Tensor, "batch row column"]]:
        """The maps, scaled to add up to 1 over all cameras; uniform where nothing is relevant."""
        total = sum(
            (reduce(values, "batch row column -> batch", "sum") for values in self.maps.values()),
            torch.zeros(len(self), device=_device(self.maps)),
        )[:, None, None]
        n_cells = sum(values[0].numel() for values in self.maps.values())
        safe = torch.where(total > 0, total, torch.ones_like(total))
        return {
            name: torch.where(total > 0, values / safe, torch.full_like(values, 1 / n_cells))
            for name, values in self.maps.items()
        }

    def entropy_nats(self) -> Float[Tensor, " batch"]:
        """Entropy of the distribution over the cells of all cameras; at most log(n cells)."""
        masses = [
            rearrange(mass, "batch row column -> batch (row column)")
            for mass in self.picture_mass().values()
        ]
        mass = torch.cat(masses, dim=-1)
        return -torch.special.xlogy(mass, mass).sum(-1)

    def uniform_nats(self) -> float:
        """Entropy of a map that prefers nothing."""
        return math.log(sum(values[0].numel() for values in self.maps.values()))

    def top_cells(self) -> dict[str, Int[Tensor, "batch 2"]]:
        """Camera name to (row, column) of its most relevant cell."""
        cells = {}
        for name, values in self.maps.items():
            place = rearrange(values, "batch row column -> batch (row column)").argmax(-1)
            columns = values.shape[-1]
            cells[name] = torch.stack([place // columns, place % columns], dim=-1)
        return cells

    def densities(
        self, n_cells: Mapping[str, tuple[int, int]] | None = None
    ) -> dict[str, Float[Tensor, "batch height width"]]:
        """Mass per pixel, or per cell of another grid: each cell's mass lies evenly over it.

        Args:
            n_cells: Camera name to (rows, columns) of a grid over the picture; its pixels when
                None.

        Returns:
            Adding up to 1 over all cameras; what overhangs a picture counts for its edge.
        """
        found = {}
        for name, mass in self.picture_mass().items():
            size = self.image_sizes[name]
            rows, columns = size if n_cells is None else n_cells[name]
            down = _overlaps(mass.shape[-2], self.cells_px[name], size[0], rows).to(mass)
            right = _overlaps(mass.shape[-1], self.cells_px[name], size[1], columns).to(mass)
            found[name] = down.T @ mass @ right
        return found


def _overlaps(n_cells: int, cell_px: float, size_px: int, n_others: int) -> Tensor:
    """Share of each cell that falls into each of ``n_others`` even parts of a side.

    Returns:
        (cell, other); every row adds up to 1.
    """
    edges = (torch.arange(n_cells + 1, dtype=torch.float64) * cell_px).clamp(max=size_px)
    others = torch.linspace(0, size_px, n_others + 1, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], others[None, :-1])
    high = torch.minimum(edges[1:, None], others[None, 1:])
    within = (high - low).clamp_min(0)
    return within / within.sum(1, keepdim=True).clamp_min(1e-12)


def _device(parts: Mapping[str, Tensor]) -> torch.device | None:
    return next((values.device for values in parts.values()), None)
