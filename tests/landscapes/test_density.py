import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily
from toy_policies import ToyPolicy, demonstrated

from landscapes.density import (
    Mixture,
    conditional_log_weights,
    ensemble_belief,
    ensemble_weights,
    fit_bandwidth,
    fit_scale,
    laplace_interval_mass,
)
from landscapes.grid import Grid
from landscapes.landscape import predict
from policies.ensembling import TemporalEnsembler


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_mixture(n=5, n_samples=7, seed=0, low=0.0, high=512.0) -> Mixture:
    """Weights and scales of every kernel differ; some centres lie near the border."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return Mixture(
        low + (high - low) * uniform(n, n_samples, 2),
        1 + 30 * uniform(n, n_samples, 2),
        torch.log_softmax(3 * uniform(n, n_samples), dim=-1),
    )


def as_torch(mixture: Mixture) -> MixtureSameFamily:
    assert mixture.log_weights is not None
    kernels = Independent(Laplace(mixture.centres, mixture.scale), 1)
    return MixtureSameFamily(Categorical(logits=mixture.log_weights), kernels)


def laplace_cdf(x: float, m: float, b: float) -> float:
    return 0.5 * math.exp((x - m) / b) if x < m else 1 - 0.5 * math.exp((m - x) / b)


@pytest.mark.parametrize("resolution", [1, 50, 128])
def test_mass_on_the_board_is_one_minus_the_analytic_leak(resolution):
    mixture = random_mixture(low=-20.0, high=540.0)
    assert mixture.log_weights is not None
    mass = mixture.cell_mass(Grid(resolution)).sum((-1, -2))
    for row in range(5):
        inside = 0.0
        for kernel in range(7):
            along = [
                laplace_cdf(512, m, b) - laplace_cdf(0, m, b)
                for m, b in zip(
                    mixture.centres[row, kernel].tolist(),
                    mixture.scale[row, kernel].tolist(),
                    strict=True,
                )
            ]
            inside += math.exp(mixture.log_weights[row, kernel]) * along[0] * along[1]
        assert mass[row].item() == pytest.approx(inside, abs=1e-12)
    assert mass.min() < 0.99  # there is something to leak


def test_mass_of_a_coarse_cell_is_that_of_its_fine_cells():
    fine, coarse = (random_mixture().cell_mass(Grid(n)) for n in (128, 32))
    summed = fine.unflatten(-1, (32, 4)).unflatten(-3, (32, 4)).sum((-1, -3))
    torch.testing.assert_close(summed, coarse, rtol=1e-12, atol=1e-15)


def test_mass_of_a_small_cell_is_density_times_area():
    grid = Grid(200, (0.0, 0.0), (2.0, 2.0))
    mixture = Mixture(doubles([[1.3, 0.2], [0.4, 1.7]]), doubles([[5.0, 3.0]]))
    density = mixture.log_density(grid.centres().reshape(-1, 2)).exp().reshape(200, 200)
    mass = mixture.cell_mass(grid) / grid.cell_area
    torch.testing.assert_close(mass, density, rtol=2e-3, atol=0)


def test_mass_keeps_its_digits_far_in_the_tail():
    edges = doubles([-500.0, -499.0, 499.0, 500.0])
    mass = laplace_interval_mass(doubles(0.0), doubles(1.0), edges)
    tail = 0.5 * math.exp(-499) * (1 - math.exp(-1))
    torch.testing.assert_close(mass[[0, 2]], doubles([tail, tail]), rtol=1e-12, atol=0)


def test_density_at_the_lower_left_lies_in_the_lower_left_cell():
    mass = Mixture(doubles([[100.0, 400.0]]), doubles([[8.0, 8.0]])).cell_mass(Grid(128))
    assert divmod(int(mass.argmax()), 128) in {(99, 24), (99, 25), (100, 24), (100, 25)}
    off_border = Mixture(doubles([[101.0, 401.0]]), doubles([[8.0, 8.0]])).cell_mass(Grid(128))
    assert divmod(int(off_border.argmax()), 128) == (100, 25)


def test_log_density_is_that_of_torch_distributions():
    mixture = random_mixture()
    points = 600 * torch.rand(5, 30, 2, dtype=torch.float64) - 40
    expected = as_torch(mixture).log_prob(points.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(mixture.log_density(points), expected)


def test_samples_fall_into_cells_as_often_as_their_mass_says():
    mixture = random_mixture(n=2)
    grid = Grid(6)
    draws = mixture.sample(40_000, torch.Generator().manual_seed(1))
    is_inside = ((draws >= 0) & (draws < 512)).all(-1)
    cells = grid.cells(draws)
    for row in range(2):
        flat = (cells[row] @ torch.tensor([6, 1]))[is_inside[row]]
        counts = torch.bincount(flat, minlength=36).double()
        expected = 40_000 * mixture.cell_mass(grid)[row].flatten()
        deviation = (counts - expected) / expected.clamp_min(1).sqrt()
        assert deviation.abs().max() < 4.5
        assert deviation.square().mean() < 2


def test_selected_mixtures_are_those_of_their_index():
    mixture = random_mixture()
    points = doubles([[[10.0, 20.0], [300.0, 400.0]]]).expand(5, -1, -1)
    whole = mixture.log_density(points)
    torch.testing.assert_close(mixture.select([3, 1]).log_density(points[:2]), whole[[3, 1]])
    shared = Mixture(mixture.centres, doubles([[[8.0, 8.0]]]))
    torch.testing.assert_close(
        shared.select(slice(2, 4)).log_density(points[:2]), shared.log_density(points)[2:4]
    )


def test_a_board_needs_two_dimensions():
    with pytest.raises(ValueError, match="actions have 3"):
        Mixture(torch.zeros(4, 3).double(), torch.ones(1, 3).double()).cell_mass(Grid(8))


BIMODAL = ToyPolicy([[156.0, 256.0], [356.0, 256.0]])


def test_em_recovers_the_scale_between_modes():
    batch = demonstrated(BIMODAL, 500, scale=8.0, n_steps=1)
    predictions = predict(BIMODAL, batch, [0], n_samples=16)
    scale = fit_scale(predictions.samples, predictions.expert, predictions.is_valid)
    torch.testing.assert_close(scale, doubles([[8.0, 8.0]]), rtol=0.06, atol=0)
    # One kernel at z = 0, between the modes, takes half their distance for noise.
    alone = fit_scale(predictions.point[:, None], predictions.expert, predictions.is_valid)
    assert alone[0, 0].item() == pytest.approx(100, rel=0.05)
    assert alone[0, 1].item() == pytest.approx(8, rel=0.1)


def test_padding_has_no_part_in_the_scale():
    batch = demonstrated(BIMODAL, 60, scale=8.0, n_steps=2)
    predictions = predict(BIMODAL, batch, [0, 1], n_samples=4)
    is_valid = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    damaged = torch.where(is_valid[..., None], predictions.expert, 1e5)
    scale = fit_scale(predictions.samples, damaged, is_valid)
    for query in range(2):
        rows = is_valid[:, query]
        alone = fit_scale(
            predictions.samples[rows][:, :, [query]],
            predictions.expert[rows][:, [query]],
            is_valid[rows][:, [query]],
        )
        torch.testing.assert_close(scale[[query]], alone)
    with pytest.raises(ValueError, match=r"query \[1\]"):
        fit_scale(predictions.samples, predictions.expert, is_valid & torch.tensor([True, False]))


def left_out_log_density(samples: torch.Tensor, scale: torch.Tensor) -> float:
    total = 0.0
    for index, sample in enumerate(samples):
        others = samples[torch.arange(len(samples)) != index]
        total += Mixture(others, scale[None]).log_density(sample[None]).item()
    return total


def test_bandwidth_maximises_the_likelihood_of_samples_left_out():
    noise = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = BIMODAL.centres[torch.arange(40) % 2] + noise * doubles([5.0, 12.0])
    scale = fit_bandwidth(samples, n_iterations=200)
    best = left_out_log_density(samples, scale)
    for factors in ([0.9, 1.0], [1.1, 1.0], [1.0, 0.9], [1.0, 1.1]):
        assert left_out_log_density(samples, scale * doubles(factors)) < best
    assert scale.max() < 12  # the modes are 200 apart
    with pytest.raises(ValueError, match="at least 2"):
        fit_bandwidth(samples[:1])


def test_a_known_continuation_picks_its_mode():
    generator = torch.Generator().manual_seed(0)
    plans = doubles([[[0.0, 0.0], [-20.0, 0.0], [-40.0, 0.0]], [[0, 0], [20, 0], [40, 0]]])
    centres = plans[torch.arange(10) % 2] + torch.randn(1, 10, 3, 2, generator=generator)
    scale = doubles([[[8.0, 8.0]] * 3])
    later = torch.tensor([[False, True, True]])
    for mode in range(2):
        weights = conditional_log_weights(
            centres, scale, plans[[mode]], later, temperature=1.0
        ).exp()[0]
        assert weights[mode::2].sum() > 0.99
        tempered = conditional_log_weights(centres, scale, plans[[mode]], later).exp()[0]
        assert 0.6 < tempered[mode::2].sum() < weights[mode::2].sum()
    nothing = conditional_log_weights(centres, scale, plans[[0]], later & False)
    torch.testing.assert_close(nothing.exp(), torch.full((1, 10), 0.1, dtype=torch.float64))


def test_belief_is_centred_where_the_ensemble_acts():
    """The mean of the belief is the executed action, with ACT's weights for m = 0.01."""
    generator = torch.Generator().manual_seed(0)
    chunk_size, n_steps = 6, 15
    chunks = 500 * torch.rand(n_steps, 1, chunk_size, 2, generator=generator, dtype=torch.float64)
    scale = 2 + 5 * torch.rand(chunk_size, 2, generator=generator, dtype=torch.float64)
    ensembler = TemporalEnsembler(0.01, chunk_size)
    for step in range(n_steps):
        executed = ensembler.step(chunks[step])[0]
        belief = ensemble_belief(chunks, scale, 0.01, step)
        assert belief.log_weights is not None
        mean = (belief.log_weights.exp()[:, None] * belief.centres).sum(0)
        torch.testing.assert_close(mean, executed, rtol=1e-6, atol=1e-5)
        assert len(belief.centres) == min(step + 1, chunk_size)
        # The newest chunk comes last, and each has the scale of its own step.
        torch.testing.assert_close(belief.scale, scale[: len(belief.centres)].flip(0))
    ratio = ensemble_weights(4, 0.01)
    torch.testing.assert_close(ratio[1:] / ratio[:-1], torch.full((3,), math.exp(-0.01)).double())


def test_belief_of_agreeing_chunks_is_one_density():
    chunks = doubles([[7.0, 9.0]]).expand(5, 3, 4, 2)
    scale = doubles([[8.0, 8.0]]).expand(4, 2)
    points = doubles([[7.0, 9.0], [30.0, 2.0]])
    one = Mixture(doubles([[7.0, 9.0]]), doubles([[8.0, 8.0]]))
    for horizon in (0, 2):
        belief = ensemble_belief(chunks, scale, 0.3, frame=4, horizon=horizon)
        torch.testing.assert_close(belief.log_density(points), one.log_density(points))


@pytest.mark.parametrize("queries", [[], [-1], [40]])
def test_horizons_beyond_the_chunk_are_refused(queries):
    with pytest.raises(ValueError, match="within the chunk"):
        predict(BIMODAL, demonstrated(BIMODAL, 2, 8.0), queries)
