"""How well codes reconstruct activations, and how latents share the work: exact over a whole set.

Sums run in float64 around the first batch's mean, so that neither the size of the set nor an
offset of the activations costs digits.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int64
from torch import Tensor

DENSE_SHARES = (0.01, 0.1)
"""Densities above which a latent counts as dense (SAEBench's core evaluation)."""


@dataclass(frozen=True)
class ReconstructionQuality:
    """Numbers over all vectors that were seen."""

    fvu: float
    """Fraction of variance unexplained: sum ||x - x^||^2 / sum ||x - mean||^2, with the mean of
    each dimension over the whole set. 0 is perfect, 1 no better than the mean."""
    l0: float
    """Active latents of a vector, on average."""
    dead_fraction: float
    """Share of the latents that were never active."""
    dense_fraction_01: float
    """Share of the latents active on more than 1 % of the vectors."""
    dense_fraction_10: float
    """Share of the latents active on more than 10 % of the vectors."""
    relative_bias: float
    """E||x^||^2 / E[x . x^], both around the mean; below 1 where codes shrink (Gated SAE,
    arXiv:2404.16014, appendix B)."""
    n_vectors: int
    density: Float64[Tensor, " latent"]
    """Share of the vectors on which each latent is active."""

    @property
    def explained_variance(self) -> float:
        """1 - FVU."""
        return 1 - self.fvu

    def scalars(self) -> dict[str, float]:
        """Everything but the densities, by the names that logs use."""
        return {
            "fvu": self.fvu,
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            "dead_fraction": self.dead_fraction,
            "dense_fraction_01": self.dense_fraction_01,
            "dense_fraction_10": self.dense_fraction_10,
            "relative_bias": self.relative_bias,
        }


class ReconstructionMetrics:
    """Accumulates :class:`ReconstructionQuality` batch by batch."""

    def __init__(self, d_in: int, n_latents: int) -> None:
        self._d_in = d_in
        self._n_latents = n_latents
        self.reset()

    @property
    def n_vectors(self) -> int:
        """Vectors since the last reset."""
        return self._n

    def reset(self) -> None:
        """Forget everything seen."""
        self._n = 0
        self._centre: Tensor | None = None
        self._sum = torch.zeros(self._d_in, dtype=torch.float64)
        self._sum_square = 0.0
        self._residual = 0.0
        self._sum_hat = torch.zeros(self._d_in, dtype=torch.float64)
        self._sum_hat_square = 0.0
        self._cross = 0.0
        self._fires = torch.zeros(self._n_latents, dtype=torch.int64)

    def update(
        self,
        x: Float[Tensor, "batch dim"],
        reconstruction: Float[Tensor, "batch dim"],
        fires: Int64[Tensor, " latent"],
    ) -> None:
        """Add a batch.

        Args:
            x: Activations.
            reconstruction: Of them.
            fires: On how many of them each latent is active.
        """
        x, hat = x.detach().double().cpu(), reconstruction.detach().double().cpu()
        if self._centre is None:
            self._centre = x.mean(0)
        self._residual += float((x - hat).square().sum())
        x, hat = x - self._centre, hat - self._centre
        self._n += len(x)
        self._sum += x.sum(0)
        self._sum_square += float(x.square().sum())
        self._sum_hat += hat.sum(0)
        self._sum_hat_square += float(hat.square().sum())
        self._cross += float((x * hat).sum())
        self._fires += fires.cpu()

    @property
    def sums(self) -> Float64[Tensor, " number"]:
        """Everything since the last reset as numbers, to be gathered from several processes."""
        centre = torch.zeros_like(self._sum) if self._centre is None else self._centre
        scalars = (self._n, self._sum_square, self._residual, self._sum_hat_square, self._cross)
        return torch.cat(
            [
                torch.tensor(scalars, dtype=torch.float64),
                centre,
                self._sum,
                self._sum_hat,
                self._fires.double(),
            ]
        )

    def take(self, sums: Float64[Tensor, "process number"]) -> None:
        """Replace what was seen by what several processes saw together.

        Sums around one centre become sums around another c' = c - d exactly:
        sum (x + d) = sum x + n d, sum (x + d)^2 = sum x^2 + 2 d . sum x + n d^2.

        Args:
            sums: Of each process.
        """
        self.reset()
        widths = [1, 1, 1, 1, 1, self._d_in, self._d_in, self._d_in, self._n_latents]
        for row in rearrange(sums.cpu(), "process number -> process 1 number"):
            n, square, residual, hat_square, cross, centre, total, total_hat, fires = (
                part[0] for part in row.split(widths, dim=-1)
            )
            if not n:
                continue
            middle = self._centre = centre if self._centre is None else self._centre
            d = centre - middle
            shift = float(n * (d @ d))
            self._n += int(n)
            self._residual += float(residual)
            self._sum += total + n * d
            self._sum_hat += total_hat + n * d
            self._sum_square += float(square + 2 * d @ total) + shift
            self._sum_hat_square += float(hat_square + 2 * d @ total_hat) + shift
            self._cross += float(cross + d @ total + d @ total_hat) + shift
            self._fires += fires.long()

    def compute(self) -> ReconstructionQuality:
        """Numbers over everything since the last reset.

        Raises:
            ValueError: If nothing was seen.
        """
        if not self._n:
            raise ValueError("no activations were measured; give at least one vector")
        n = self._n
        mean = self._sum / n
        variance = self._sum_square - n * float(mean.square().sum())
        hat_energy = self._sum_hat_square - 2 * float(mean @ self._sum_hat) + n * float(mean @ mean)
        cross = self._cross - float(mean @ self._sum_hat)
        density = self._fires.double() / n
        small, large = (float((density > share).double().mean()) for share in DENSE_SHARES)
        return ReconstructionQuality(
            fvu=self._residual / variance if variance > 0 else math.nan,
            l0=float(density.sum()),
            dead_fraction=float((self._fires == 0).double().mean()),
            dense_fraction_01=small,
            dense_fraction_10=large,
            relative_bias=hat_energy / cross if cross > 0 else math.nan,
            n_vectors=n,
            density=density,
        )


def density_histogram(
    density: Float[Tensor, " latent"], n_bins: int = 50, lowest: float = 1e-6
) -> tuple[list[float], list[float]]:
    """Count latents by log10 of their density; dead ones lie in the first bin.

    Args:
        density: Share of vectors on which each latent is active.
        n_bins: Of equal width in log10, up to 1.
        lowest: Density of the first edge; smaller ones are counted there.

    Returns:
        Edges (log10), and counts, one fewer.
    """
    edges = torch.linspace(math.log10(lowest), 0.0, n_bins + 1, dtype=torch.float64)
    places = density.double().clamp_min(lowest).log10()
    counts = torch.histogram(places.cpu(), edges).hist
    return edges.tolist(), counts.tolist()
