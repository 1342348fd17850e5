"""Which latent of one dictionary is which of another: the best assignment, one to one."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor


def mean_correlation_coefficient(
    found: Float[Tensor, "latent dim"], true: Float[Tensor, "feature dim"]
) -> float:
    """How much of a true dictionary was found: mean |cosine| of the best one-to-one assignment.

    1 for the same directions in any order and sign. Only assigned pairs count, so that spare
    latents cost nothing; true features that outnumber latents count 0.
    """
    cosines = (F.normalize(found.double(), dim=-1) @ F.normalize(true.double(), dim=-1).T).abs()
    pairs = assign(cosines)
    return float(cosines[pairs[:, 0], pairs[:, 1]].detach().sum()) / len(true)


def match(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"]
) -> tuple[Int[Tensor, "pair 2"], Float[Tensor, " pair"]]:
    """Pair the directions of two dictionaries one to one, such that cosines sum to the most.

    Opposite directions do not match: codes only add.

    Returns:
        Pairs (row of a, row of b), as many as the smaller dictionary has, ascending in a; and their
        cosines.
    """
    cosines = F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T
    pairs = assign(cosines)
    return pairs, cosines[pairs[:, 0], pairs[:, 1]].to(a.dtype)


def assign(scores: Float[Tensor, "n m"]) -> Int[Tensor, "pair 2"]:
    """Choose one place in each row and column such that their sum is the largest.

    The Hungarian problem, exactly, by shortest augmenting paths (Crouse, On implementing 2D
    rectangular assignment algorithms, 2016).

    Returns:
        (row, column) of min(n, m) places, ascending in rows.

    Raises:
        ValueError: If a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("scores to assign hold NaN or infinity; leave those rows out")
    costs = -scores.detach().double().cpu().numpy()
    is_wide = costs.shape[0] <= costs.shape[1]
    columns = _columns_of_rows(costs if is_wide else costs.T)
    pairs = np.stack([np.arange(len(columns)), columns], axis=1)
    if not is_wide:
        pairs = pairs[np.argsort(columns), ::-1]
    return torch.from_numpy(pairs.copy()).to(scores.device)


def _columns_of_rows(costs: Float64[ndarray, "n m"]) -> Int64[ndarray, " n"]:
    """The cheapest column of every row, each given once; there are at least as many as rows."""
    n, m = costs.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    column_of = np.full(n, -1)
    row_of = np.full(m, -1)
    for start in range(n):
        distance = np.full(m, np.inf)
        reached_from = np.full(m, -1)
        is_open = np.ones(m, dtype=bool)
        visited: list[int] = []
        row, column, shortest = start, -1, 0.0
        while column < 0 or row_of[column] >= 0:
            if column >= 0:
                row = int(row_of[column])
            visited.append(row)
            through = shortest + costs[row] - row_price[row] - column_price
            is_better = is_open & (through < distance)
            distance[is_better] = through[is_better]
            reached_from[is_better] = row
            column = int(np.argmin(np.where(is_open, distance, np.inf)))
            shortest = float(distance[column])
            is_open[column] = False
        row_price[start] += shortest
        for other in visited[1:]:
            row_price[other] += shortest - distance[column_of[other]]
        is_closed = ~is_open
        column_price[is_closed] -= shortest - distance[is_closed]
        while column >= 0:
            row = int(reached_from[column])
            row_of[column] = row
            column_of[row], column = column, int(column_of[row])
            if row == start:
                break
    return column_of
