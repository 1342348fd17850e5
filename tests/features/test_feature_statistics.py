"""Statistics against hand-made values and other implementations, and their rate of false alarms."""

import math

import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from features.concepts import Concepts
from features.statistics import (
    LEVEL,
    associate,
    auroc,
    family_wise,
    midranks,
    mutual_information,
    pearson,
    shuffles,
    spearman,
)


def drawn(n_frames: int, n_units: int, seed: int = 0) -> torch.Tensor:
    """Sparse and full of ties, as features are; the last unit never fires."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n_frames, n_units, generator=generator).mul(8).round() - 4
    values = values.clamp_min(0)
    values[:, -1] = 0
    return values


def slow(n_frames: int, n: int, seed: int, smoothing: int = 12) -> torch.Tensor:
    """Noise that persists in time."""
    noise = torch.randn(n_frames + smoothing, n, generator=torch.Generator().manual_seed(seed))
    return noise.unfold(0, smoothing + 1, 1).mean(-1)


def concepts_of(**columns) -> Concepts:
    binary = {name: each for name, each in columns.items() if name.startswith("is_")}
    rest = {name: (each, "1") for name, each in columns.items() if name not in binary}
    return Concepts.from_columns(continuous=rest, binary=binary)


def test_auroc_of_five_frames_by_hand():
    units = torch.tensor([[0.0, 3.0], [0.0, 2.0], [1.0, 2.0], [2.0, 0.0], [0.0, 1.0]])
    holds = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]])
    # Of six pairs, unit 0 wins four and ties two; unit 1 loses five and ties one.
    assert auroc(units, holds)[:, 0].tolist() == pytest.approx([5 / 6, 0.5 / 6])
    assert auroc(units, torch.ones(5, 1)).isnan().all()


def test_ranks_and_correlations_agree_with_other_libraries():
    units, values = drawn(60, 7), drawn(60, 3, seed=1)
    values[:, 2] = slow(60, 1, seed=2)[:, 0]
    frame, concepts = pd.DataFrame(units.numpy()), pd.DataFrame(values.numpy())
    ranks = torch.tensor(frame.rank(method="average").to_numpy())
    torch.testing.assert_close(midranks(units), ranks, rtol=0, atol=0)
    holds = (drawn(60, 3, seed=4)[:, :2] > 1).float()
    for unit in range(7):
        for place in range(2):
            scores = units[:, unit] / 10
            expected = float(binary_auroc(scores, holds[:, place].int()))
            assert float(auroc(units, holds)[unit, place]) == pytest.approx(expected, abs=1e-6)
        for place in (0, 2):
            # Pandas takes Spearman's from SciPy; ranks are all there is to it.
            found = pearson(units, values)[unit, place], spearman(units, values)[unit, place]
            if unit == 6:
                assert all(math.isnan(each) for each in found), "a silent unit has no r"
                continue
            assert float(found[0]) == pytest.approx(frame[unit].corr(concepts[place]), abs=1e-6)
            by_rank = frame[unit].rank().corr(concepts[place].rank())
            assert float(found[1]) == pytest.approx(by_rank, abs=1e-6)


def test_mutual_information_of_known_tables():
    # A unit that fires where the concept holds says all of it: its entropy, less the correction
    # (4 cells could be occupied, 2 are: (2 - 2 - 2 + 1) / 2N = -1 / 2N).
    holds = torch.tensor([1.0] * 20 + [0.0] * 60)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    found = mutual_information(torch.stack([holds, 1 - holds, 0 * holds], -1), holds[:, None])[:, 0]
    assert found.tolist() == pytest.approx([entropy + 1 / 160] * 2 + [0.0], abs=1e-9)
    # What rises and falls again has no correlation, and yet all its information.
    place = torch.linspace(-1, 1, 8001)[:, None]
    bump = (0.5 - place.abs()).clamp_min(0)
    assert float(pearson(bump, place).abs()) < 1e-6
    # It says one of eight bins, but for the side, and for which of four it is where it is silent:
    # ln 8 - (ln 2) / 2 - (ln 4) / 2.
    expected = 1.5 * math.log(2)
    assert float(mutual_information(bump, place)) == pytest.approx(expected, abs=0.01)


def test_the_correction_leaves_nothing_of_independent_signals():
    generator = torch.Generator().manual_seed(0)
    units = (torch.rand(400, 300, generator=generator) - 0.5).clamp_min(0)
    value = torch.rand(400, 1, generator=generator)
    found = mutual_information(units, value)
    # (5 - 1)(8 - 1) / 2N without it; with it, half of them lie at 0.
    assert float(found.median()) < 0.15 * 28 / 800


def test_all_pairs_in_blocks_are_single_pairs():
    units = drawn(200, 9)
    sign, value = (drawn(200, 2, seed=3)[:, 0] > 0).float(), slow(200, 1, seed=5)[:, 0]
    gaps = value.clone()
    gaps[[0, 50, 120]] = torch.nan
    concepts = concepts_of(a=value, is_b=sign, c=gaps, is_d=torch.ones(200))
    index = torch.arange(4).repeat_interleave(50)
    found = associate(units.split(4, dim=1), concepts, index, n_permutations=30)
    known = ~gaps.isnan()
    columns = {name: found.strength[:, place] for place, name in enumerate(found.names)}
    same = {"rtol": 0, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(columns["a"], pearson(units, value[:, None])[:, 0], **same)
    torch.testing.assert_close(columns["is_b"], auroc(units, sign[:, None])[:, 0], **same)
    some = pearson(units[known], gaps[known][:, None])[:, 0]
    torch.testing.assert_close(columns["c"], some, **same)
    assert columns["is_d"].isnan().all()
    nats = mutual_information(units[known], gaps[known][:, None])[:, 0]
    assert found.mutual_information_nats is not None
    torch.testing.assert_close(
        found.mutual_information_nats[:, found.names.index("c")], nats, **same
    )
    whole = associate([units], concepts, index, n_permutations=30)
    for one, other in ((found.p, whole.p), (found.threshold, whole.threshold)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)
    assert found.p is not None
    assert found.p[:, found.names.index("is_d")].isnan().all()


def test_pairings_shift_whole_episodes_into_each_other():
    index = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2, 9, 9, 9, 9])
    for pairing in shuffles(index, 20, seed=0):
        # Of episodes of the same length nothing is lost or doubled.
        assert pairing.sort().values.tolist() == list(range(12))
        for episode in pairing.view(3, 4):
            assert len({int(frame) // 4 for frame in episode}) == 1
            assert {int(step) for step in episode.diff() % 4} == {1}
    stretched = shuffles(torch.tensor([0] * 6 + [1] * 3), 40, seed=0)
    assert int(stretched.min()) == 0
    assert int(stretched.max()) == 8
    swapped = [pairing for pairing in stretched if pairing[0] > 5]
    assert 5 < len(swapped) < 35
    for pairing in swapped:
        # Three frames stand for six, twice each, in their order.
        assert sorted((pairing[:6] - 6).tolist()) == [0, 0, 1, 1, 2, 2]
        assert pairing[6:].max() < 6


def test_maxima_are_those_of_shuffled_concepts():
    units, value = drawn(80, 5, seed=8), slow(80, 1, seed=9)[:, 0]
    holds = (value > 0).float()
    index = torch.arange(4).repeat_interleave(20)
    found = associate([units], concepts_of(a=value, is_b=holds), index, 25, seed=3)
    for name, statistic, neutral in (("a", pearson, 0.0), ("is_b", auroc, 0.5)):
        column = value if name == "a" else holds
        by_hand = torch.stack(
            [
                statistic(units, column[pairing][:, None])[:, 0]
                for pairing in shuffles(index, 25, seed=3)
            ]
        )
        largest = (by_hand - neutral).abs().nan_to_num(0).amax(1)
        place = found.names.index(name)
        assert found.p is not None
        for unit in range(4):
            actual = float(found.deviation[unit, place])
            as_large = int((largest >= actual - 1e-6).sum())
            assert float(found.p[unit, place]) == pytest.approx((1 + as_large) / 26)


def test_threshold_and_p_say_the_same():
    maxima = torch.rand(99, 2, generator=torch.Generator().manual_seed(0)).double()
    deviation = torch.linspace(0, 1.2, 500).double()[:, None].expand(-1, 2)
    threshold, p = family_wise(deviation, maxima)
    # Of 99 shifts at most four may be as large: the fifth largest is the threshold.
    assert threshold.tolist() == maxima.sort(0, descending=True).values[4].tolist()
    passes = deviation > threshold + 1e-5
    assert bool((p[passes] <= LEVEL).all())
    assert bool((p[deviation < threshold - 1e-5] > LEVEL).all())
    assert float(p.min()) == pytest.approx(0.01)
    assert family_wise(deviation, maxima[:10])[0].isinf().all(), "10 shifts cannot give 0.05"


@pytest.mark.parametrize("level_of_episode", [0.0, 1.0])
def test_coincidences_pass_as_seldom_as_they_should(level_of_episode):
    """Slow features and slow concepts that have nothing to do with each other.

    With and without a level that is another one in each episode.
    """
    n_trials, n_episodes, length = 40, 18, 50
    n_frames = n_episodes * length
    index = torch.arange(n_episodes).repeat_interleave(length)
    alarms = naive = 0
    for trial in range(n_trials):
        generator = torch.Generator().manual_seed(trial)
        level = level_of_episode * torch.randn(n_episodes, 31, generator=generator)[index]
        signals = 3 * slow(n_frames, 31, seed=trial) + level
        value = signals[:, 30]
        concepts = concepts_of(a=value, is_b=(value > 0.1).float())
        units = (signals[:, :30] - 0.1).clamp_min(0)
        found = associate([units], concepts, index, 99, seed=trial, with_information=False)
        assert found.p is not None
        alarms += int((found.p.amin(0) <= LEVEL).sum())
        # What a textbook would say of 30 correlations of independent frames (Bonferroni).
        naive += bool(found.deviation[:, 0].amax() > 3.15 / math.sqrt(n_frames))
    # Of 80 families 4 are expected; of 40 pairs that always err together, 12 have p < 0.02.
    assert alarms <= 11
    assert naive > n_trials / 2, "these signals were to be deceptive"


def test_planted_features_are_found():
    n_frames = 900
    index = torch.arange(18).repeat_interleave(50)
    units = (slow(n_frames, 40, seed=0) - 0.1).clamp_min(0)
    value = slow(n_frames, 1, seed=1)[:, 0]
    holds = (value > 0.1).float()
    units[:, 7] += 0.5 * holds
    units[:, 11] = (value + 0.2 * slow(n_frames, 1, seed=2, smoothing=1)[:, 0]).clamp_min(0)
    units[:, 13] = 0.4 * (1 - holds)
    found = associate([units], concepts_of(a=value, is_b=holds), index, 199)
    assert found.p is not None
    best = found.p.argsort(0)[:3].sort(0).values
    assert best[:, 1].tolist() == [7, 11, 13]
    assert bool((found.p[[7, 11, 13]] <= LEVEL).all())
    assert float(found.strength[13, 1]) == pytest.approx(0), "fires where it does not hold"
    assert found.threshold is not None
    assert bool((found.deviation[11] > found.threshold).all())
    others = [place for place in range(40) if place not in (7, 11, 13)]
    assert int((found.p[others] <= LEVEL).sum()) <= 1


def test_negative_units_have_no_silence_to_be_informative():
    with pytest.raises(ValueError, match="never below 0"):
        associate([-drawn(20, 3)], concepts_of(a=torch.rand(20)), torch.zeros(20).long())
