"""Is a feature more than a neuron? Single units of several bases held against the same concepts.

Units are chosen on training frames and measured on held-out ones, so that a basis with more units
wins nothing by chance. What every basis is measured with is the same: pooled over tokens alike, one
unit alone and a few together (k-sparse probing, Gurnee et al. 2023, arXiv:2305.01610).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Float, Float64
from torch import Tensor

from features.concepts import Concepts
from features.statistics import associate, auroc
from policies.interface import Table

_UNITS_AT_ONCE = 128


@dataclass(frozen=True)
class BasisScore:
    """How well one basis tells one concept."""

    basis: str
    concept: str
    is_binary: bool
    n_units: int
    """What there was to choose from."""
    unit: int
    """The best one on training frames; -1 where no unit has a value."""
    single_train: float
    """Its AUROC (binary), or r, on training frames; below 0.5, or 0, where it stands for the
    opposite."""
    single: float
    """The same on held-out frames."""
    units: tuple[int, ...]
    """A few, chosen one after the other on training frames (orthogonal matching pursuit)."""
    several: float
    """What they tell together on held-out frames by least squares: R2 of a continuous concept,
    below 0 where its mean would do better, AUROC of a binary one."""


def compare_bases(
    bases: Mapping[str, tuple[Float[Tensor, "train_frame _"], Float[Tensor, "held_out_frame _"]]],
    train: Concepts,
    held_out: Concepts,
    n_several: int = 5,
) -> tuple[BasisScore, ...]:
    """Let bases compete for each concept.

    Args:
        bases: Name to units in training frames and in held-out frames, e.g. from
            :meth:`FeatureRecord.frames_by_latents` and from :func:`signed_units`.
        train: Concepts of the training frames.
        held_out: The same concepts of the held-out frames.
        n_several: Units together.

    Returns:
        One score for each concept and basis. NaN for a concept that is constant, or known nowhere.

    Raises:
        ValueError: If concepts differ, or there are fewer units than ``n_several``.
    """
    if train.names != held_out.names:
        raise ValueError(f"concepts {train.names} and {held_out.names}: give the same of both")
    scores = []
    for name, (here, there) in bases.items():
        if here.shape[1] < n_several or here.shape[1] != there.shape[1]:
            raise ValueError(
                f"basis {name!r}: {here.shape[1]} and {there.shape[1]} units; give the same number "
                f"for both, and at least {n_several}"
            )
        index = torch.zeros(len(here), dtype=torch.long)
        found = associate(_blocks(here), train, index, with_information=False)
        spread = here.std(0)
        best = found.deviation.nan_to_num(-1).argmax(0).tolist()
        for place, concept in enumerate(train.names):
            is_binary = train.is_binary[place]
            unit = best[place]
            single_train = float(found.strength[unit, place])
            chosen = there[:, [unit]]
            alone = held_out.of(concept)
            single = associate(
                [chosen], alone, torch.zeros(len(there), dtype=torch.long), with_information=False
            )
            units, several = _several(
                here,
                there,
                spread,
                train.column(concept),
                held_out.column(concept),
                is_binary,
                n_several,
            )
            scores.append(
                BasisScore(
                    basis=name,
                    concept=concept,
                    is_binary=is_binary,
                    n_units=here.shape[1],
                    unit=unit if single_train == single_train else -1,
                    single_train=single_train,
                    single=float(single.strength[0, 0]),
                    units=units,
                    several=several,
                )
            )
    return tuple(scores)


def basis_table(scores: tuple[BasisScore, ...]) -> Table:
    """One row for each concept and basis."""

    def number(value: float) -> float | None:
        return value if value == value else None

    return Table(
        columns=("concept", "basis", "units", "unit", "single_train", "single", "several"),
        rows=tuple(
            (
                score.concept,
                score.basis,
                score.n_units,
                score.unit,
                number(score.single_train),
                number(score.single),
                number(score.several),
            )
            for score in scores
        ),
    )


def signed_units(activations: Float[Tensor, "frame token unit"]) -> Float[Tensor, "frame unit_2"]:
    """Pool neurons over tokens as features are pooled: the maximum, of each and of its negative.

    A neuron may say something by being small; a feature cannot, so that both directions are units.

    Args:
        activations: Of neurons, or of projections on other directions.
    """
    return torch.cat(
        [
            reduce(activations, "frame token unit -> frame unit", "max"),
            -reduce(activations, "frame token unit -> frame unit", "min"),
        ],
        dim=-1,
    )


def principal_directions(vectors: Float[Tensor, "row dim"]) -> Float[Tensor, "direction dim"]:
    """Unit vectors of falling variance (PCA), as many as dimensions."""
    covariance = torch.cov(vectors.double().T)
    return torch.linalg.eigh(covariance).eigenvectors.T.flip(0).to(vectors.dtype)


def _blocks(units: Float[Tensor, "frame unit"]) -> Iterator[Float[Tensor, "frame _"]]:
    yield from units.split(_UNITS_AT_ONCE, dim=1)


def _several(
    here: Float[Tensor, "train_frame unit"],
    there: Float[Tensor, "held_out_frame unit"],
    spread: Float[Tensor, " unit"],
    values_here: Float[Tensor, " train_frame"],
    values_there: Float[Tensor, " held_out_frame"],
    is_binary: bool,
    n_units: int,
) -> tuple[tuple[int, ...], float]:
    """Units by orthogonal matching pursuit (Pati et al. 1993), and what they tell elsewhere."""
    known, known_there = ~values_here.isnan(), ~values_there.isnan()
    if known.sum() <= n_units or values_here[known].unique().numel() < 2 or not known_there.any():
        return (), torch.nan
    target = torch.where(known, values_here, 0.0).double()
    chosen: list[int] = []
    residual = torch.where(known, target - target[known].mean(), 0.0)
    weights = target.new_zeros(1)
    for _ in range(n_units):
        # The residual has mean 0, so that units need not be centred.
        fit = einsum(here, residual.to(here), "frame unit, frame -> unit").abs() / spread
        fit[spread == 0] = -1
        fit[chosen] = -1
        chosen.append(int(fit.nan_to_num(-1).argmax()))
        inputs = _with_constant(here[:, chosen])
        # Units may repeat each other; the least squares with the smallest weights are unique.
        weights = torch.linalg.lstsq(inputs[known], target[known], driver="gelsd").solution
        residual = torch.where(known, target - inputs @ weights, 0.0)
    predicted = (_with_constant(there[:, chosen]) @ weights)[known_there]
    actual = values_there[known_there].double()
    if is_binary:
        return tuple(chosen), float(auroc(predicted[:, None], actual[:, None]))
    unexplained = (actual - predicted).square().sum() / (actual - actual.mean()).square().sum()
    return tuple(chosen), float(1 - unexplained) if unexplained.isfinite() else torch.nan


def _with_constant(units: Float[Tensor, "frame unit"]) -> Float64[Tensor, "frame unit_1"]:
    return torch.cat([units.double(), units.new_ones(len(units), 1).double()], dim=1)
