"""Slices of the ELBO and the ODE's likelihood, for noise predictors whose density is known."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from landscapes.diffusion import noise_prediction_scores, ode_log_likelihood
from landscapes.grid import Grid

HORIZON, PAST, DIMS = 6, 1, 2
SCALE = torch.tensor([249.5, 240.0], dtype=torch.float64)
OFFSET = torch.tensor([261.5, 265.0], dtype=torch.float64)


def squared_cosine(n_timesteps: int = 100) -> torch.Tensor:
    """Noise levels of Diffusion Policy's schedule (Nichol and Dhariwal 2021, eq. 17)."""
    time = torch.arange(n_timesteps + 1, dtype=torch.float64) / n_timesteps
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - signal[1:] / signal[:-1]).clamp_max(0.999)
    kept = torch.cumprod(1 - beta, dim=0)
    return ((1 - kept) / kept).sqrt()


def independent(width: float) -> torch.Tensor:
    return width**2 * torch.eye(HORIZON * DIMS, dtype=torch.float64)


def smooth() -> torch.Tensor:
    """Steps of a chunk that hang together, x and y on their own and a little with each other."""
    step = torch.arange(HORIZON, dtype=torch.float64)
    along = 0.3**2 * torch.exp(-((step[:, None] - step) ** 2) / 18)
    across = torch.tensor([[1.0, 0.5], [0.5, 0.7]], dtype=torch.float64)
    return torch.kron(along, across) + independent(0.03)


@dataclass
class GaussianMixture:
    """Optimal noise predictions for a mixture of Gaussians with one covariance, data units."""

    means: torch.Tensor
    """(frame, component, horizon, action), data units."""
    covariance: torch.Tensor
    """Of normalised horizons, step-major."""
    log_weights: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    noise_levels: torch.Tensor = field(default_factory=squared_cosine)
    asked: list = field(default_factory=list)
    horizon, n_past, scale = HORIZON, PAST, SCALE

    @property
    def offset(self):
        return OFFSET.expand(len(self.means), DIMS)

    def __post_init__(self):
        self.variances, self.axes = torch.linalg.eigh(self.covariance)

    def posterior(self, noised, level, frames):
        """Log density of normalised noised horizons, and its slope."""
        z = ((noised[:, None] - self.means[frames]) / SCALE).flatten(2) @ self.axes
        variances = self.variances + level**2
        kernel = -(z.square() / variances + torch.log(2 * math.pi * variances)).sum(-1) / 2
        log_joint = kernel + self.log_weights
        share = torch.softmax(log_joint, dim=-1)
        slope = -(share[..., None] * z / variances).sum(1) @ self.axes.T
        return torch.logsumexp(log_joint, dim=-1), slope

    def log_density(self, horizons):
        """Of horizons with noise of the smallest level, nats in data units."""
        frames = torch.arange(len(horizons))
        normalised, _ = self.posterior(horizons, float(self.noise_levels[0]), frames)
        return normalised - HORIZON * torch.log(SCALE).sum()

    def predict_noise(self, noised, level, frames):
        """``eps = -level d log p / dx`` (Tweedie)."""
        self.asked.append((noised.detach(), level, frames))
        return -level * self.posterior(noised, level, frames)[1].reshape(noised.shape)

    def sample_horizons(self, seed=0):
        return self.means[:, 0].clone()


def gaussian(covariance, n_frames=2) -> GaussianMixture:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(n_frames, 1, HORIZON, DIMS, dtype=torch.float64, generator=generator)
    return GaussianMixture(OFFSET + SCALE * 0.3 * means, covariance)


def drawn(model: GaussianMixture, seed=0) -> torch.Tensor:
    """A demonstration of each frame, with noise of the smallest level."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(
        model.covariance + float(model.noise_levels[0]) ** 2 * torch.eye(HORIZON * DIMS)
    )
    normal = torch.randn(len(model.means), HORIZON * DIMS, dtype=torch.float64, generator=generator)
    return model.means[:, 0] + SCALE * (normal @ root.T).reshape(-1, HORIZON, DIMS)


def likelihood(model, horizons, **settings):
    chunk = horizons[:, PAST:]
    is_pad = torch.zeros(chunk.shape[:2], dtype=torch.bool)
    return ode_log_likelihood(model, chunk, is_pad, horizons[:, :PAST], **settings)


COVARIANCES = {
    "narrow": independent(0.02),
    "as_wide_as_the_noise": independent(0.05),
    "wide": independent(0.4),
    "smooth": smooth(),
}


@pytest.mark.parametrize("name", COVARIANCES)
def test_the_ode_gives_a_gaussians_log_density_in_data_units(name):
    model = gaussian(COVARIANCES[name])
    horizons = drawn(model)
    exact = model.log_density(horizons)
    to_the_end = likelihood(model, horizons, n_steps=30, last_level=math.inf)
    torch.testing.assert_close(to_the_end, exact, rtol=0, atol=1e-2)
    finer = likelihood(model, horizons, n_steps=80, last_level=math.inf)
    torch.testing.assert_close(finer, exact, rtol=0, atol=1e-3)
    # Three times what ending at level 64 neglects, for means of 0.3 in 12 dimensions.
    torch.testing.assert_close(
        likelihood(model, horizons), exact, rtol=0, atol=3 * 0.3 * math.sqrt(12) / 64
    )


def test_the_ode_gives_the_density_between_and_in_two_modes():
    """Here the trace changes along the path, and paths bend."""
    centre = OFFSET.expand(2, HORIZON, DIMS)
    means = torch.stack([centre - 0.1 * SCALE, centre + 0.12 * SCALE], dim=1)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    model = GaussianMixture(means, independent(0.2), weights)
    aside = torch.tensor([0.05, -0.1], dtype=torch.float64) * SCALE
    horizons = torch.stack([means[0, 1] + aside / 2, centre[0] + aside])
    few, more, many = (
        likelihood(model, horizons, n_steps=n_steps, last_level=math.inf)
        for n_steps in (20, 40, 160)
    )
    torch.testing.assert_close(more, model.log_density(horizons), rtol=0, atol=1e-3)
    # Nearly a sixteenth of the error in steps of half the length.
    assert ((many - few).abs() > 10 * (many - more).abs()).all()


def test_random_probes_agree_with_the_exact_trace():
    model = gaussian(smooth(), n_frames=1)
    horizons = drawn(model)
    exact = likelihood(model, horizons, n_steps=6)
    estimates = torch.cat(
        [likelihood(model, horizons, n_steps=6, n_probes=20, seed=seed) for seed in range(20)]
    )
    error = estimates.std() / math.sqrt(len(estimates))
    assert 0 < error < 0.5
    assert abs(estimates.mean() - exact) < 3 * error
    # The signs of one probe cancel nothing where dimensions are alike and independent.
    alike = gaussian(independent(0.3))
    torch.testing.assert_close(
        likelihood(alike, horizons.expand(2, -1, -1), n_steps=4, n_probes=1),
        likelihood(alike, horizons.expand(2, -1, -1), n_steps=4),
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_likelihood_is_the_same_wherever_and_in_whatever_blocks(mode):
    model = gaussian(smooth())
    horizons = drawn(model)
    expected = likelihood(model, horizons, n_steps=4)
    with mode():
        inside = likelihood(model, horizons.clone(), n_steps=4, max_columns=5)
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=0)
    model.asked.clear()
    likelihood(model, horizons, n_steps=1, max_columns=5)
    assert max(len(noised) for noised, _, _ in model.asked) == 5


def test_the_past_is_the_policys_where_none_is_given():
    model = gaussian(smooth())
    horizons = drawn(model)
    is_pad = torch.zeros(2, HORIZON - PAST, dtype=torch.bool)
    mixed = torch.cat([model.means[:, 0, :PAST], horizons[:, PAST:]], dim=1)
    torch.testing.assert_close(
        ode_log_likelihood(model, horizons[:, PAST:], is_pad, n_steps=4),
        likelihood(model, mixed, n_steps=4),
    )


def test_what_has_no_likelihood_is_refused():
    model = gaussian(smooth())
    chunk = drawn(model)[:, PAST:]
    is_pad = torch.zeros(2, HORIZON - PAST, dtype=torch.bool)
    padded = is_pad.clone()
    padded[1, -1] = True
    with pytest.raises(ValueError, match=r"frames \[1\] are padded"):
        ode_log_likelihood(model, chunk, padded)
    with pytest.raises(ValueError, match=r"\(1, 4\) steps.* has 1 and 5"):
        ode_log_likelihood(model, chunk[:, 1:], is_pad[:, 1:])
    with pytest.raises(ValueError, match="n_steps 0"):
        ode_log_likelihood(model, chunk, is_pad, n_steps=0)
    with pytest.raises(ValueError, match="n_probes 0"):
        ode_log_likelihood(model, chunk, is_pad, n_probes=0)
    with pytest.raises(ValueError, match=r"last_level 0.03: .* 0.02513, 0.04184"):
        ode_log_likelihood(model, chunk, is_pad, last_level=0.03)


def moved(model: GaussianMixture, query: int, points: torch.Tensor) -> torch.Tensor:
    """The first frame's mean with its step ``query`` at each of the points."""
    steps = torch.arange(HORIZON)
    share = 0.9 ** (steps - PAST - query).abs().double()
    share[:PAST] = 0
    shift = points - model.means[0, 0, PAST + query]
    return model.means[0, 0] + share[:, None] * shift[:, None]


@pytest.mark.parametrize("name", COVARIANCES)
def test_differences_between_cells_are_those_of_the_log_density(name):
    model = gaussian(COVARIANCES[name], n_frames=1)
    queries = (0, 3)
    aside = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -1.0], [2.0, 2.0], [-8.0, 3.0]])
    width = model.covariance[0, 0].sqrt()
    candidates = [model.means[0, 0, PAST + query] + aside * width * SCALE for query in queries]
    scores = noise_prediction_scores(model, torch.stack(candidates)[None], queries, n_draws=128)
    for column, query in enumerate(queries):
        horizons = moved(model, query, candidates[column])
        alike = GaussianMixture(model.means.expand(len(aside), 1, -1, -1), model.covariance)
        expected = alike.log_density(horizons)
        torch.testing.assert_close(
            scores[0, column, 1:] - scores[0, column, 0],
            expected[1:] - expected[0],
            rtol=0.01,
            atol=0.01,
        )


def test_the_height_of_the_scores_is_that_of_the_blurred_log_density():
    model = gaussian(independent(0.3))
    peak = model.means[:, :, PAST : PAST + 1]
    score = noise_prediction_scores(model, peak, [0], n_draws=4096)[:, 0, 0]
    first = float(model.noise_levels[0])
    entropy = torch.log(math.sqrt(2 * math.pi * math.e) * first * SCALE).sum() * HORIZON
    noise = HORIZON * DIMS * first**2 / (0.3**2 + first**2) / 2
    expected = model.log_density(model.means[:, 0]) - noise
    # The noise of 4096 draws is 0.3 nats.
    torch.testing.assert_close(score - entropy, expected, rtol=0, atol=1.0)


def test_few_draws_already_place_the_peak_and_give_a_smooth_map():
    """Pairs of opposite noise leave no slope at the peak; common noise leaves no grain."""
    model = gaussian(smooth(), n_frames=2)
    # A row of cells through the mean of the first frame, which is the middle one.
    mean = model.means[0, 0, PAST + 2]
    row = mean + torch.arange(-5.0, 6.0).double()[:, None] * torch.tensor([16.0, 0.0])
    scores = noise_prediction_scores(model, row[None, None], [2], n_draws=2)[0, 0]
    assert scores.argmax() == 5
    assert torch.diff(scores, n=2).max() < 0
    torch.testing.assert_close(torch.diff(scores, n=3), torch.zeros(8).double(), rtol=0, atol=1e-8)


def test_neither_the_order_of_cells_nor_blocks_nor_neighbours_matter():
    model = gaussian(smooth(), n_frames=3)
    grid = Grid(5)
    points = grid.centres().reshape(1, 1, -1, 2)
    scores = noise_prediction_scores(model, points, [0, 4], n_draws=4)
    assert scores.shape == (3, 2, 25)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    shuffled = noise_prediction_scores(model, points[:, :, order], [0, 4], n_draws=4)
    torch.testing.assert_close(shuffled, scores[:, :, order], rtol=1e-12, atol=0)
    model.asked.clear()
    blocks = noise_prediction_scores(model, points, [0, 4], n_draws=4, max_columns=7)
    torch.testing.assert_close(blocks, scores, rtol=1e-12, atol=0)
    assert max(len(noised) for noised, _, _ in model.asked) == 7
    last = GaussianMixture(model.means[2:], model.covariance)
    alone = noise_prediction_scores(last, points, [4], n_draws=4)
    torch.testing.assert_close(alone[0, 0], scores[2, 1], rtol=1e-12, atol=0)


def test_a_candidate_takes_its_neighbours_along_but_not_the_past():
    model = gaussian(smooth(), n_frames=1)
    query = 3
    action = torch.tensor([100.0, 400.0], dtype=torch.float64)
    noise_prediction_scores(model, action[None, None, None], [query], n_draws=2, decay=0.5)
    (one, _, _), (opposite, _, _) = model.asked
    horizon = (one + opposite)[0] / 2
    torch.testing.assert_close(horizon[PAST + query], action)
    reference = model.means[0, 0]
    torch.testing.assert_close(horizon[:PAST], reference[:PAST])
    moved = (horizon - reference)[PAST:] / (action - reference[PAST + query])
    expected = torch.tensor([0.125, 0.25, 0.5, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(moved, expected[:, None].expand(-1, DIMS))


def test_a_slice_that_makes_no_sense_is_refused():
    model = gaussian(smooth(), n_frames=1)
    points = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="n_draws 3"):
        noise_prediction_scores(model, points, [0], n_draws=3)
    for queries in ([], [-1], [HORIZON - PAST]):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.4"):
            noise_prediction_scores(model, points, queries)
