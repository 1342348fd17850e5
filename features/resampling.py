"""Numbers with honest intervals: what is resampled are whole episodes, never their frames.

Frames of one episode resemble each other, so that intervals over frames would be far too narrow.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

N_RESAMPLES = 1000
LEVEL = 0.95
Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


def episode_sums(
    values: Float[Tensor, "frame *value"], episode_index: Int[Tensor, " frame"]
) -> Float64[Tensor, "episode *value"]:
    """Add up the frames of each episode, episodes in ascending order: what is to be resampled."""
    episodes, place = episode_index.cpu().unique(return_inverse=True)
    sums = torch.zeros(len(episodes), *values.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, place, values.detach().double().cpu())


def resample_counts(
    n_episodes: int, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Float64[Tensor, "resample episode"]:
    """How often each episode occurs in each bootstrap resample of all of them.

    Raises:
        ValueError: If there are fewer than two episodes: nothing is to be said of their spread.
    """
    if n_episodes < 2:
        raise ValueError(f"{n_episodes} episodes: an interval needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(n_episodes, (n_resamples, n_episodes), generator=generator)
    counts = torch.zeros(n_resamples, n_episodes, dtype=torch.float64)
    return counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))


def interval(resampled: Float[Tensor, " resample"]) -> tuple[float, float]:
    """95 % percentile bootstrap interval."""
    tail = (1 - LEVEL) / 2
    low, high = resampled.double().quantile(torch.tensor([tail, 1 - tail]).double()).tolist()
    return low, high


def wilson_estimate(n_events: int, n_trials: int) -> Estimate:
    """A rate with its 95 % score interval (Wilson 1927): honest at 0 and 1 and for few trials."""
    rate, z2 = n_events / n_trials, Z_95**2
    centre = (rate + z2 / (2 * n_trials)) / (1 + z2 / n_trials)
    spread = rate * (1 - rate) / n_trials + z2 / (4 * n_trials**2)
    half = Z_95 * spread**0.5 / (1 + z2 / n_trials)
    return Estimate(rate, max(centre - half, 0.0), min(centre + half, 1.0))


def auroc(
    negative: Float[Tensor, " negative"],
    positive: Float[Tensor, " positive"],
    negative_weight: Float64[Tensor, "#resample negative"] | None = None,
    positive_weight: Float64[Tensor, "#resample positive"] | None = None,
) -> Float64[Tensor, " resample"]:
    """Probability that a positive scores above a negative, ties counting half (Mann & Whitney).

    Args:
        negative: Scores of what should score low.
        positive: Scores of what should score high.
        negative_weight: How often each negative counts, in each resample; once when None.
        positive_weight: How often each positive counts.

    Returns:
        One for each resample; NaN where one side has no weight.
    """
    scores = torch.cat([negative, positive]).double().cpu()
    place = scores.unique(return_inverse=True)[1]

    def mass(places: Tensor, weight: Tensor | None) -> Tensor:
        weight = torch.ones(1, len(places), dtype=torch.float64) if weight is None else weight
        totals = torch.zeros(len(weight), int(place.max()) + 1, dtype=torch.float64)
        return totals.index_add_(1, places, weight)

    low = mass(place[: len(negative)], negative_weight)
    high = mass(place[len(negative) :], positive_weight)
    below = low.cumsum(1) - low / 2
    return (high * below).sum(1) / (high.sum(1) * low.sum(1))
