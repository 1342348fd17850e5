"""Numbers with honest intervals: what is resampled are whole episodes, never their frames.

Frames of one episode resemble each other, so that intervals over frames would be far too narrow.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
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
    # At 0 and 1 an end is the rate itself, which rounding would miss.
    return Estimate(rate, min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate))


@dataclass(frozen=True)
class PairedRates:
    """How often two treatments of the same trials succeed, one against the other."""

    difference: Estimate
    """First rate minus second, with Newcombe's 95 % interval for pairs."""
    n_first_only: int
    """Trials that only the first treatment solved."""
    n_second_only: int
    """Trials that only the second treatment solved."""
    p_value: float
    """Exact McNemar test, two-sided: chance of trials so one-sided if both rates were equal."""


def paired_rates(first: Bool[Tensor, " trial"], second: Bool[Tensor, " trial"]) -> PairedRates:
    """Compare two rates over the same trials.

    The interval is the square-and-add one of Newcombe 1998 (Statistics in Medicine 17, 2635,
    method 10): Wilson's intervals of both rates, joined with the correlation of the pairs. It is
    not empty where the two agree on every trial.

    Args:
        first: Whether each trial succeeded under the first treatment.
        second: The same under the second, in the same order.

    Raises:
        ValueError: If there is no trial, or the treatments differ in their number.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"{len(first)} and {len(second)} trials: give the same ones, at least one, twice"
        )
    n_trials = len(first)
    n_both = int((first & second).sum())
    n_first_only = int((first & ~second).sum())
    n_second_only = int((~first & second).sum())
    n_neither = n_trials - n_both - n_first_only - n_second_only
    one = wilson_estimate(n_both + n_first_only, n_trials)
    other = wilson_estimate(n_both + n_second_only, n_trials)
    correlation = _correlation(n_both, n_first_only, n_second_only, n_neither)
    difference = one.value - other.value

    def reach(of_one: float, of_other: float) -> float:
        return math.sqrt(max(of_one**2 - 2 * correlation * of_one * of_other + of_other**2, 0.0))

    below = reach(one.value - one.low, other.high - other.value)
    above = reach(one.high - one.value, other.value - other.low)
    n_discordant = n_first_only + n_second_only
    tail = sum(math.comb(n_discordant, k) for k in range(min(n_first_only, n_second_only) + 1))
    return PairedRates(
        difference=Estimate(difference, difference - below, difference + above),
        n_first_only=n_first_only,
        n_second_only=n_second_only,
        p_value=min(1.0, 2 * tail / 2**n_discordant),
    )


def _correlation(n_both: int, n_first_only: int, n_second_only: int, n_neither: int) -> float:
    """Newcombe's phi of a table of pairs: a positive one is corrected for continuity."""
    margins = (
        (n_both + n_first_only)
        * (n_second_only + n_neither)
        * (n_both + n_second_only)
        * (n_first_only + n_neither)
    )
    if not margins:
        return 0.0
    excess = n_both * n_neither - n_first_only * n_second_only
    if excess > 0:
        n_trials = n_both + n_first_only + n_second_only + n_neither
        excess = max(excess - n_trials / 2, 0.0)
    return excess / math.sqrt(margins)


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
