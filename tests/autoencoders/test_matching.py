"""Dictionaries are compared by the best one-to-one assignment."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoders.matching import assign, match, mean_correlation_coefficient
from autoencoders.planted import PlantedDictionary


@settings(max_examples=60)
@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 10**6), ties=st.booleans())
def test_no_other_assignment_is_better(n, m, seed, ties):
    scores = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = scores.round()
    pairs = assign(scores)
    wide = scores if n <= m else scores.T
    rows = torch.arange(len(wide))
    best = max(float(wide[rows, list(p)].sum()) for p in permutations(range(max(n, m)), min(n, m)))
    assert float(scores[pairs[:, 0], pairs[:, 1]].sum()) == pytest.approx(best, abs=1e-5)
    assert len(pairs) == min(n, m) == len(pairs[:, 1].unique())
    assert (pairs[:, 0].diff() > 0).all()


def test_order_sign_and_spare_latents_cost_nothing():
    true = torch.randn(40, 16)
    order = torch.randperm(40)
    signs = torch.randn(40, 1).sign()
    found = torch.cat([3 * true[order] * signs, torch.randn(20, 16)])
    assert mean_correlation_coefficient(found, true) == pytest.approx(1)


def test_what_is_missing_counts_zero():
    true = torch.eye(8)
    assert mean_correlation_coefficient(true[:6], true) == pytest.approx(6 / 8)


def test_dictionaries_are_matched_by_direction():
    torch.manual_seed(0)
    a = torch.randn(50, 32)
    order = torch.randperm(50)
    b = a[order] + 0.05 * torch.randn(50, 32)
    pairs, cosines = match(a, b)
    assert torch.equal(order[pairs[:, 1]], pairs[:, 0])
    expected = F.cosine_similarity(a[pairs[:, 0]], b[pairs[:, 1]])
    torch.testing.assert_close(cosines, expected)
    # Codes only add: the opposite of a direction is another feature.
    _, opposite = match(torch.eye(4), -torch.eye(4))
    assert float(opposite.max()) <= 0


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="NaN"):
        assign(torch.tensor([[0.0, float("nan")]]))


def test_planted_activations_are_sums_of_a_few_features():
    planted = PlantedDictionary.draw(24, 50, 5, seed=3)
    codes = planted.codes(20_000, seed=1)
    assert float((codes > 0).sum(1).float().mean()) == pytest.approx(5, rel=0.02)
    assert 0.5 <= float(codes[codes > 0].min()) < float(codes.max()) <= 1.5
    torch.testing.assert_close(planted.features.norm(dim=-1), torch.ones(50))
    assert torch.equal(planted.sample(7, 2), planted.sample(7, 2))
    assert not torch.equal(planted.sample(7, 2), planted.sample(7, 4))
    with pytest.raises(ValueError, match="at most 50"):
        PlantedDictionary.draw(24, 50, 51, seed=3)


def test_an_autoencoder_of_the_same_seed_does_not_begin_with_the_answer():
    planted = PlantedDictionary.draw(24, 50, 5, seed=3)
    torch.manual_seed(3)
    directions = F.normalize(torch.randn(100, 24), dim=-1)
    assert mean_correlation_coefficient(directions, planted.features) < 0.8
