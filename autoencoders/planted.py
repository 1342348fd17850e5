"""Activations with a known answer: sums of a few directions of a dictionary that is planted."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SEED_OFFSET = 2**31
"""Keeps features away from the numbers that ``torch.manual_seed`` gives a new autoencoder: drawn in
the same way from the same seed, its first directions would be the answer."""


@dataclass(frozen=True)
class PlantedDictionary:
    """True features, and activations made of them.

    A feature is active with probability l0 / n_features, independently of the others, with a
    magnitude uniform in 0.5 .. 1.5. With more features than dimensions they interfere: not even
    the true dictionary encodes without error.
    """

    features: Float[Tensor, "feature dim"]
    """Unit directions."""
    l0: float
    """Active features of an activation, on average."""

    @classmethod
    def draw(cls, d_in: int, n_features: int, l0: float, seed: int) -> "PlantedDictionary":
        """Random directions.

        Raises:
            ValueError: If more features would be active than there are.
        """
        if not 0 < l0 <= n_features:
            raise ValueError(f"l0 is {l0}; it must be above 0 and at most {n_features}")
        generator = torch.Generator().manual_seed(SEED_OFFSET + seed)
        return cls(F.normalize(torch.randn(n_features, d_in, generator=generator), dim=-1), l0)

    def codes(self, n_rows: int, seed: int) -> Float[Tensor, "row feature"]:
        """Magnitudes of every feature in some activations; most are 0."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n_rows, len(self.features))
        is_active = torch.rand(shape, generator=generator) < self.l0 / len(self.features)
        return (0.5 + torch.rand(shape, generator=generator)) * is_active

    def sample(self, n_rows: int, seed: int) -> Float[Tensor, "row dim"]:
        """Activations; the same for the same seed."""
        return self.codes(n_rows, seed) @ self.features
