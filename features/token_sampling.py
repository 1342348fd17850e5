"""Which of an observation's tokens are looked at: all, some, or averages of neighbours.

Latent and states are single and always stay. What is sampled are *axes* of many tokens: the cells
of one camera, row by row; the chunk steps; or the tokens of a module that nothing is known of. Each
axis is sampled by itself, so no camera is left out and no sample mixes two of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from features.taps import TokenPosition
from policies.tokens import ENVIRONMENT_STATE, LATENT, STATE

Method = Literal["all", "uniform", "stride", "block_average", "random_fixed"]

FIXED = (LATENT, STATE, ENVIRONMENT_STATE)
"""Names of the tokens that are always kept."""


@dataclass(frozen=True)
class SampledTokens:
    """Samples of a sequence of tokens: each is the mean of a group of tokens."""

    groups: tuple[tuple[int, ...], ...]
    """Of each sample, which tokens it is the mean of; one, unless blocks are averaged."""
    positions: tuple[TokenPosition, ...]
    """Of the first token of each group; of a block that is its upper left cell."""
    n_tokens: int
    """Length of the sequence that is sampled."""

    def apply(self, x: Float[Tensor, "*batch token dim"]) -> Float[Tensor, "*batch sample dim"]:
        """Sample activations; a token that is a sample by itself stays the same to the last bit.

        Raises:
            ValueError: If there are more or fewer tokens than the samples were made for.
        """
        if x.shape[-2] != self.n_tokens:
            raise ValueError(
                f"activations of {x.shape[-2]} tokens, the samples were chosen among "
                f"{self.n_tokens}: give those of the same layer of the same policy"
            )
        if self.groups == tuple((token,) for token in range(self.n_tokens)):
            return x
        order: list[int] = []
        means = []
        # One gather for each size of groups, in a fixed order of addition on every device.
        for size in sorted({len(group) for group in self.groups}):
            chosen = [place for place, group in enumerate(self.groups) if len(group) == size]
            tokens = torch.tensor([self.groups[place] for place in chosen], device=x.device)
            means.append(x[..., tokens, :].mean(-2) if size > 1 else x[..., tokens[:, 0], :])
            order += chosen
        back = torch.tensor(order, device=x.device).argsort()
        return torch.cat(means, dim=-2)[..., back, :]


@dataclass(frozen=True)
class TokenSampler:
    """How tokens are sampled.

    The samples of an axis of n tokens, for a ratio r:

    - ``all``: every token.
    - ``uniform``: evenly spread from the first to the last one; the middle one if there is but one.
    - ``stride``: every r-th from the first on, ceil(n / r).
    - ``block_average``: means of blocks of neighbours. A camera's grid is cut into blocks of r
      cells, a x b for the factors of r that are closest to each other and a <= b (8: 2 rows x 4
      columns; a prime ratio gives pieces of a row); blocks are smaller at the lower and the right
      edge, so there are ceil(rows / a) ceil(columns / b). Other axes: r tokens in a row.
    - ``random_fixed``: drawn once without replacement, the same for all frames.

    ``uniform`` and ``random_fixed`` take floor(n / r) of the n tokens of all axes together, dealt
    out in proportion: an axis gets as many as multiples of r end within it, and at least one.

    Example: two cameras of 480 x 640 px with 32 px per cell give 2 x 15 x 20 = 600 cells. At a
    ratio of 8 that is 37 + 38 = 75 of them (``uniform``, ``random_fixed``), 2 x 38 = 76
    (``stride``), or 2 x 8 x 5 = 80 blocks; each with latent and state besides.

    Args:
        method: One of the above.
        ratio: Tokens per sample.
        seed: Of ``random_fixed``.

    Raises:
        ValueError: If one of them is out of range.
    """

    method: Method = "all"
    ratio: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is {self.method!r}; choose one of {list(get_args(Method))}")
        if self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")

    def select(self, positions: Sequence[TokenPosition]) -> SampledTokens:
        """Choose among the tokens of a tap (:class:`features.taps.Tap`).

        Args:
            positions: What each token stands for, in order.

        Raises:
            ValueError: If there are none.
        """
        if not positions:
            raise ValueError("there are no tokens to choose from")
        generator = torch.Generator().manual_seed(self.seed)
        groups: list[tuple[int, ...]] = []
        n_before = 0
        for name, members in groupby(enumerate(positions), key=lambda member: member[1].name):
            axis = [token for token, _ in members]
            if name in FIXED:
                groups += [(token,) for token in axis]
                continue
            n_samples = max(
                (n_before + len(axis)) // self.ratio - n_before // self.ratio,
                1,
            )
            n_before += len(axis)
            groups += self._sample(axis, positions, n_samples, generator)
        return SampledTokens(
            tuple(groups), tuple(positions[group[0]] for group in groups), len(positions)
        )

    def _sample(
        self,
        axis: Sequence[int],
        positions: Sequence[TokenPosition],
        n_samples: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[int, ...]]:
        """Groups of one axis."""
        if self.method == "block_average":
            yield from self._blocks(axis, positions)
            return
        n = len(axis)
        if self.method == "all":
            places = range(n)
        elif self.method == "stride":
            places = range(0, n, self.ratio)
        elif self.method == "random_fixed":
            places = torch.randperm(n, generator=generator)[:n_samples].sort().values.tolist()
        elif n_samples == 1:
            places = [(n - 1) // 2]
        else:
            gaps = n_samples - 1
            places = [(2 * i * (n - 1) + gaps) // (2 * gaps) for i in range(n_samples)]
        yield from ((axis[place],) for place in places)

    def _blocks(
        self, axis: Sequence[int], positions: Sequence[TokenPosition]
    ) -> Iterator[tuple[int, ...]]:
        height = max(a for a in range(1, math.isqrt(self.ratio) + 1) if self.ratio % a == 0)
        width = self.ratio // height
        blocks: dict[tuple[int, int], list[int]] = {}
        for place, token in enumerate(axis):
            row, column = positions[token].row, positions[token].column
            if row is None or column is None:
                key = (0, place // self.ratio)
            else:
                key = (row // height, column // width)
            blocks.setdefault(key, []).append(token)
        yield from (tuple(blocks[key]) for key in sorted(blocks))
