"""How features go with concepts, all pairs at once, and how strong a coincidence would look.

With every statistic a sum of products over frames, a block of features and all concepts take one
matrix product. Chance is judged by giving every episode the concepts of another one
(:func:`shuffles`), which keeps their persistence in time and cuts their tie to the features. The
largest statistic over all features in each such pairing gives thresholds that hold for the family
(Westfall & Young 1993): 95 % of the pairings let no feature at all pass.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.nn import functional as F

from features.concepts import Concepts
from features.episodes import starts

Kind = Literal["auroc", "pearson"]

_KINDS: tuple[tuple[Kind, bool], ...] = (("auroc", True), ("pearson", False))
"""Statistic, and whether it is for binary concepts."""
LEVEL = 0.05
"""Chance that any feature of the family passes a threshold by coincidence."""
CONCEPT_BINS = 8
"""Quantile bins of a continuous concept, for mutual information."""
ACTIVE_BINS = 4
"""Quantile bins of a feature's activations, beside one for not firing."""
_COLUMNS_AT_ONCE = 256
"""Shuffled concepts in one matrix product."""


@dataclass(frozen=True)
class Associations:
    """Every feature with every concept."""

    names: tuple[str, ...]
    """Of the concepts."""
    is_binary: tuple[bool, ...]
    strength: Float64[Tensor, "unit concept"]
    """AUROC for a binary concept: the probability that the feature is stronger where it holds, 0.5
    for no relation. Pearson's r for a continuous one. NaN where undefined: a concept that never
    changes, and r of a feature that never does."""
    mutual_information_nats: Float64[Tensor, "unit concept"] | None = None
    """As :func:`mutual_information` has it; None where it was not measured."""
    threshold: Float64[Tensor, " concept"] | None = None
    """Deviation that chance exceeds, in any feature, with a probability of :data:`LEVEL`; None
    where chance was not asked for."""
    p: Float64[Tensor, "unit concept"] | None = None
    """Of the deviation, corrected for the number of features, not for that of concepts."""

    @property
    def deviation(self) -> Float64[Tensor, "unit concept"]:
        """``|AUROC - 0.5|`` or ``|r|``: 0 for no relation, in either direction."""
        neutral = torch.tensor([0.5 if binary else 0.0 for binary in self.is_binary])
        return (self.strength - neutral).abs()

    def of_kind(self, is_binary: bool) -> "Associations":
        """Only those with binary or with continuous concepts."""
        kept = [place for place, kind in enumerate(self.is_binary) if kind == is_binary]
        return replace(
            self,
            names=tuple(self.names[place] for place in kept),
            is_binary=(is_binary,) * len(kept),
            strength=self.strength[:, kept],
            mutual_information_nats=_columns(self.mutual_information_nats, kept),
            threshold=None if self.threshold is None else self.threshold[kept],
            p=_columns(self.p, kept),
        )


def associate(
    blocks: Iterable[Float[Tensor, "frame _"]],
    concepts: Concepts,
    episode_index: Int[Tensor, " frame"],
    n_permutations: int = 0,
    seed: int = 0,
    with_information: bool = True,
) -> Associations:
    """Measure every feature against every concept, and against chance.

    Frames in which a concept is not known are left out for that concept.

    Args:
        blocks: Features in the frames, some features at a time.
        concepts: Of the same frames.
        episode_index: Number of each frame's episode, in the order of time.
        n_permutations: Chance pairings of episodes; 0 for no thresholds. No p is below
            1 / (n_permutations + 1).
        seed: Of the pairings.
        with_information: Measure mutual information, of features that are never below 0.

    Raises:
        ValueError: If there are no features, they are of other frames than the concepts, or they
            are negative and mutual information is asked for.
    """
    groups = list(_groups(concepts, episode_index, n_permutations, seed))
    strengths: list[Tensor] = []
    information: list[Tensor] = []
    maxima: list[Tensor] = []
    for block in blocks:
        if len(block) != len(concepts):
            raise ValueError(f"features of {len(block)} frames, concepts of {len(concepts)}")
        if with_information and (block < 0).any():
            raise ValueError(
                f"a feature of {float(block.min())}: mutual information is of features that are "
                "never below 0; leave it out"
            )
        strength = torch.full((block.shape[1], len(concepts.names)), torch.nan).double()
        nats = strength.clone()
        largest = torch.full((n_permutations, len(concepts.names)), torch.nan).double()
        for group in groups:
            units = block if group.is_known.all() else block[group.is_known]
            ranks = midranks(units)
            if with_information:
                nats[:, group.columns] = _information(units, ranks, group.bins)
            for kind, columns, values in group.kinds:
                standard = _standardised(units if kind == "pearson" else ranks, kind)
                strength[:, columns] = _statistic(standard, _prepared(values, kind), kind)
                if n_permutations:
                    largest[:, columns] = _null_maxima(standard, values, group.pairings, kind)
        strengths.append(strength)
        information.append(nats)
        maxima.append(largest)
    if not strengths:
        raise ValueError("there is no feature to hold against concepts")
    result = Associations(
        names=concepts.names,
        is_binary=concepts.is_binary,
        strength=torch.cat(strengths),
        mutual_information_nats=torch.cat(information) if with_information else None,
    )
    if not n_permutations:
        return result
    largest = torch.stack(maxima)
    is_constant = largest.isnan().all(0)
    largest = torch.where(is_constant, torch.nan, largest.nan_to_num(0).amax(0))
    threshold, p = family_wise(result.deviation, largest)
    return replace(result, threshold=threshold, p=p)


def auroc(
    units: Float[Tensor, "frame unit"], holds: Float[Tensor, "frame concept"]
) -> Float64[Tensor, "unit concept"]:
    """Probability that a unit is stronger where a concept holds than where not; ties count half.

    Mann & Whitney's U over the number of pairs, from mean ranks.

    Args:
        units: Any numbers.
        holds: 1 or 0.

    Returns:
        NaN for a concept that always or never holds.
    """
    return _statistic(_standardised(midranks(units), "auroc"), _prepared(holds, "auroc"), "auroc")


def pearson(
    units: Float[Tensor, "frame unit"], values: Float[Tensor, "frame concept"]
) -> Float64[Tensor, "unit concept"]:
    """Correlation of all pairs; NaN where one of them is constant."""
    return _statistic(_standardised(units, "pearson"), _prepared(values, "pearson"), "pearson")


def spearman(
    units: Float[Tensor, "frame unit"], values: Float[Tensor, "frame concept"]
) -> Float64[Tensor, "unit concept"]:
    """Correlation of the mean ranks of all pairs; NaN where one of them is constant."""
    return pearson(midranks(units), midranks(values))


def mutual_information(
    units: Float[Tensor, "frame unit"],
    values: Float[Tensor, "frame concept"],
    n_bins: int = CONCEPT_BINS,
) -> Float64[Tensor, "unit concept"]:
    """Nats that a unit and a concept say about each other, whatever the form of their relation.

    From counts: a unit is silent (0) or in one of :data:`ACTIVE_BINS` quantile bins of its values,
    a concept in one of ``n_bins`` quantile bins, or in one of its two values. Miller & Madow's
    correction for the number of occupied bins, ``(K_xy - K_x - K_y + 1) / 2N``, is subtracted; it
    counts frames as independent, so that what is left of a coincidence in slow signals is still
    above 0. At least 0.

    Args:
        units: Never below 0.
        values: Known everywhere.
        n_bins: Of a concept.
    """
    bins = [_one_hot_bins(column, n_bins) for column in values.unbind(1)]
    return _information(units, midranks(units), bins)


def midranks(values: Float[Tensor, "frame unit"]) -> Float64[Tensor, "frame unit"]:
    """Rank of each value in its column, from 1; equal values share the mean of their ranks."""
    n = len(values)
    # Each column in one piece of memory: sorting is seven times as fast.
    columns = rearrange(values, "frame unit -> unit frame").contiguous()
    ordered, order = columns.sort(-1)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_last = torch.ones_like(is_new)
    is_last[:, :-1] = is_new[:, 1:]
    place = torch.arange(n, dtype=torch.int32)
    first = torch.where(is_new, place, 0)
    last = torch.where(is_last, place, n)
    if n:
        first = first.cummax(-1).values
        last = last.flip(-1).cummin(-1).values.flip(-1)
    ranks = torch.zeros(ordered.shape, dtype=torch.float64)
    ranks.scatter_(-1, order, (first + last).double() / 2 + 1)
    return rearrange(ranks, "unit frame -> frame unit")


def shuffles(
    episode_index: Int[Tensor, " frame"], n_permutations: int, seed: int
) -> Int64[Tensor, "permutation frame"]:
    """Draw chance pairings of frames: each frame's row, and whose concepts it gets.

    Every episode gets the concepts of an episode drawn by a permutation, stretched to its own
    length and shifted by a random part of it, round and round. What is slow stays slow, and what
    hardly changes within an episode still hardly does. One shift along all episodes, laid end to
    end, would break that: its pieces of two episodes average out, and of families of features that
    have nothing to do with a concept 10 to 48 % passed a threshold of 5 % (walks, autoregressive
    noise and constants of 24 episodes; 2 to 7 % with these pairings).

    Args:
        episode_index: Number of each frame's episode, in the order of time.
        n_permutations: Pairings.
        seed: Of the draw.
    """
    is_first = starts(episode_index)
    places = is_first.long().cumsum(0) - 1
    first = is_first.nonzero()[:, 0]
    lengths = torch.bincount(places, minlength=len(first))
    share = (torch.arange(len(places)) - first[places] + 0.5) / lengths[places].double()
    generator = torch.Generator().manual_seed(seed)
    pairings = []
    for _ in range(n_permutations):
        partner = torch.randperm(len(first), generator=generator)[places]
        shift = torch.rand(len(first), generator=generator, dtype=torch.float64)[places]
        step = ((share + shift) % 1 * lengths[partner]).long()
        pairings.append(first[partner] + step.minimum(lengths[partner] - 1))
    return torch.stack(pairings) if pairings else torch.zeros(0, len(places), dtype=torch.long)


def family_wise(
    deviation: Float[Tensor, "unit concept"], maxima: Float[Tensor, "permutation concept"]
) -> tuple[Float64[Tensor, " concept"], Float64[Tensor, "unit concept"]]:
    """Hold deviations against the largest ones that chance gave (Westfall & Young 1993).

    Args:
        deviation: Of every unit.
        maxima: Largest over all units, in each pairing; NaN counts as none.

    Returns:
        What a deviation must exceed to have p <= :data:`LEVEL`, infinite where there are too few
        pairings for that; and ``p = (1 + pairings with a maximum as large) / (1 + pairings)``. NaN
        where a deviation, or all of a concept's maxima, are.
    """
    is_there = ~maxima.isnan().all(0)
    ordered = maxima.double().nan_to_num(0).sort(0).values
    n = len(ordered)
    # Of n pairings, at most this many may be as large.
    n_allowed = int(LEVEL * (1 + n) + 1e-9) - 1
    threshold = torch.full((maxima.shape[1],), torch.inf, dtype=torch.float64)
    if n_allowed >= 0:
        threshold = ordered[n - 1 - n_allowed]
    # Rounding must not tell apart what is equal.
    tolerant = rearrange(deviation.double() - 1e-6, "unit concept -> concept unit").contiguous()
    ordered = rearrange(ordered, "permutation concept -> concept permutation").contiguous()
    n_below = torch.searchsorted(ordered, tolerant)
    n_as_large = rearrange(n - n_below, "concept unit -> unit concept").double()
    p = torch.where(is_there & ~deviation.isnan(), (1 + n_as_large) / (1 + n), torch.nan)
    return torch.where(is_there, threshold, torch.nan), p


@dataclass(frozen=True)
class _Group:
    """Concepts that are known in the same frames."""

    columns: list[int]
    is_known: Bool[Tensor, " frame"]
    kinds: list[tuple[Kind, list[int], Tensor]]
    """Statistic, columns that it is for, and those concepts [known concept]."""
    bins: list[Tensor]
    pairings: Int64[Tensor, "permutation known"]


def _groups(
    concepts: Concepts, episode_index: Int[Tensor, " frame"], n_permutations: int, seed: int
) -> Iterator[_Group]:
    known = ~concepts.values.isnan()
    patterns: dict[bytes, list[int]] = {}
    for column in range(len(concepts.names)):
        patterns.setdefault(known[:, column].numpy().tobytes(), []).append(column)
    for columns in patterns.values():
        is_known = known[:, columns[0]]
        if not is_known.any():
            continue
        values = concepts.values[is_known]
        kinds: list[tuple[Kind, list[int], Tensor]] = []
        for kind, is_binary in _KINDS:
            of_kind = [place for place in columns if concepts.is_binary[place] == is_binary]
            if of_kind:
                kinds.append((kind, of_kind, values[:, of_kind]))
        yield _Group(
            columns=columns,
            is_known=is_known,
            kinds=kinds,
            bins=[_one_hot_bins(values[:, place], CONCEPT_BINS) for place in columns],
            pairings=shuffles(episode_index[is_known], n_permutations, seed),
        )


def _columns(values: Tensor | None, kept: list[int]) -> Tensor | None:
    return None if values is None else values[:, kept]


def _standardised(values: Float[Tensor, "frame unit"], kind: Kind) -> Float64[Tensor, "frame unit"]:
    """Units, or their ranks, such that a product with :func:`_prepared` is the statistic."""
    values = values.double()
    if kind == "auroc":
        return values - (len(values) + 1) / 2
    return _unit_length(values)


def _prepared(
    values: Float[Tensor, "frame concept"], kind: Kind
) -> Float64[Tensor, "frame concept"]:
    values = values.double()
    if kind == "auroc":
        n_held = values.sum(0)
        n_pairs = n_held * (len(values) - n_held)
        # 1 / 0 pairs: there is no such probability.
        return torch.where(n_pairs > 0, values / n_pairs, torch.nan)
    return _unit_length(values)


def _unit_length(values: Float64[Tensor, "frame unit"]) -> Float64[Tensor, "frame unit"]:
    """Centred columns of length 1; NaN for constant ones."""
    centred = values - values.mean(0)
    is_constant = values.amax(0) == values.amin(0)
    return torch.where(is_constant, torch.nan, centred / centred.norm(dim=0))


def _statistic(
    standard: Float64[Tensor, "frame unit"],
    prepared: Float64[Tensor, "frame concept"],
    kind: Kind,
) -> Float64[Tensor, "unit concept"]:
    products = einsum(standard, prepared, "frame unit, frame concept -> unit concept")
    # Rounding must not lead out of what is possible.
    return (products + 0.5).clamp(0, 1) if kind == "auroc" else products.clamp(-1, 1)


def _null_maxima(
    standard: Float64[Tensor, "frame unit"],
    values: Float[Tensor, "frame concept"],
    pairings: Int64[Tensor, "permutation frame"],
    kind: Kind,
) -> Float64[Tensor, "permutation concept"]:
    """Largest deviation over units, for each chance pairing with concepts."""
    # Scaled, so that single precision is enough for ranks, too.
    size = standard.nan_to_num(0).abs().amax().clamp_min(1e-300)
    units = rearrange((standard / size).nan_to_num(0).float(), "frame unit -> unit frame")
    units = units.contiguous()
    maxima = []
    for part in pairings.split(max(1, _COLUMNS_AT_ONCE // values.shape[1])):
        shuffled = rearrange(
            values[part], "permutation frame concept -> frame (permutation concept)"
        )
        products = units @ _prepared(shuffled, kind).float()
        found = reduce(products.abs(), "unit column -> column", "max")
        maxima.append(rearrange(found, "(part concept) -> part concept", part=len(part)))
    return torch.cat(maxima).double() * size


def _one_hot_bins(values: Float[Tensor, " frame"], n_bins: int) -> Float[Tensor, "frame bin"]:
    """Bins of about equal counts, or one for each value where there are no more values."""
    distinct = values.unique()
    if len(distinct) <= n_bins:
        places = torch.searchsorted(distinct, values.contiguous())
    else:
        share = (midranks(values[:, None])[:, 0] - 0.5) / len(values)
        places = (share * n_bins).long()
    return F.one_hot(places, n_bins).float()


def _information(
    units: Float[Tensor, "frame unit"],
    ranks: Float64[Tensor, "frame unit"],
    concept_bins: list[Tensor],
) -> Float64[Tensor, "unit concept"]:
    n = len(units)
    n_silent = (units == 0).sum(0)
    # Ranks of active frames begin behind those of silent ones.
    share = (ranks - n_silent - 0.5) / (n - n_silent).clamp_min(1)
    places = torch.where(units > 0, 1 + (share * ACTIVE_BINS).long(), 0)
    side_by_side = torch.cat(concept_bins, dim=1)
    joint = torch.stack(
        [
            einsum((places == place).float(), side_by_side, "frame unit, frame bin -> unit bin")
            for place in range(1 + ACTIVE_BINS)
        ],
        dim=1,
    ).double()
    found = []
    for counts in joint.split([each.shape[1] for each in concept_bins], dim=-1):
        unit, concept = counts.sum(2), counts.sum(1)
        entropy = [_entropy(each / n) for each in (unit, concept, counts.flatten(1))]
        n_bins = [(each > 0).sum(1) for each in (unit, concept, counts.flatten(1))]
        bias = (n_bins[2] - n_bins[0] - n_bins[1] + 1) / (2 * n)
        found.append((entropy[0] + entropy[1] - entropy[2] - bias).clamp_min(0))
    return torch.stack(found, dim=1)


def _entropy(share: Float64[Tensor, "unit bin"]) -> Float64[Tensor, " unit"]:
    """In nats."""
    return -torch.xlogy(share, share).sum(-1)
