"""Numbers of an autoencoder against their definitions, computed at once in float64."""

import math

import pytest
import torch

from autoencoders.metrics import ReconstructionMetrics, density_histogram

OFFSET = 1000.0


def measured(x, hat, codes, batch_size=7):
    metrics = ReconstructionMetrics(x.shape[1], codes.shape[1])
    for part in torch.arange(len(x)).split(batch_size):
        metrics.update(x[part], hat[part], (codes[part] > 0).sum(0))
    return metrics.compute()


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    x = OFFSET + torch.randn(50, 6, generator=generator) * torch.arange(1, 7)
    hat = x + 0.3 * torch.randn(50, 6, generator=generator)
    codes = torch.rand(50, 9, generator=generator) * (torch.rand(50, 9, generator=generator) > 0.6)
    codes[:, 4] = 0
    return x, hat, codes


def test_fvu_is_the_share_of_variance_around_each_dimensions_mean(vectors):
    x, hat, codes = vectors
    quality = measured(x, hat, codes)
    x, hat = x.double(), hat.double()
    expected = (x - hat).square().sum() / (x - x.mean(0)).square().sum()
    assert quality.fvu == pytest.approx(float(expected), rel=1e-6)
    assert quality.explained_variance == 1 - quality.fvu


def test_the_mean_of_the_data_leaves_all_variance(vectors):
    x, _, codes = vectors
    # A scalar mean over all dimensions would flatter: dimensions differ in offset.
    x = x * torch.arange(1, 7)
    assert measured(x, x.mean(0).expand_as(x), codes).fvu == pytest.approx(1, abs=1e-5)


def test_batches_of_any_size_give_the_same_numbers(vectors):
    one, other = (measured(*vectors, batch_size=size).scalars() for size in (1, 50))
    assert one == pytest.approx(other, rel=1e-9)


def test_sparsity_counts_what_is_above_zero(vectors):
    _, _, codes = vectors
    quality = measured(*vectors)
    assert quality.l0 == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert quality.dead_fraction == pytest.approx(1 / 9)
    assert quality.density[4] == 0


def test_a_shrunken_reconstruction_shows_in_the_relative_bias(vectors):
    x, _, codes = vectors
    centre = x.mean(0)
    quality = measured(x, centre + 0.8 * (x - centre), codes)
    assert quality.relative_bias == pytest.approx(0.8, rel=1e-4)
    assert measured(x, x, codes).relative_bias == pytest.approx(1, rel=1e-6)


def test_the_histogram_holds_every_latent_once_and_the_dead_in_the_first_bin():
    density = torch.tensor([0.0, 0.0, 1e-9, 0.01, 0.5, 1.0])
    edges, counts = density_histogram(density, n_bins=6)
    assert sum(counts) == 6
    assert counts[0] == 3
    assert counts[-1] == 2
    assert edges[0] == pytest.approx(-6)
    assert edges[-1] == 0


def test_nothing_measured_is_an_error_and_constant_data_have_no_fvu():
    metrics = ReconstructionMetrics(2, 3)
    with pytest.raises(ValueError, match="at least one"):
        metrics.compute()
    metrics.update(torch.ones(4, 2), torch.ones(4, 2), torch.zeros(3, dtype=torch.int64))
    assert math.isnan(metrics.compute().fvu)
