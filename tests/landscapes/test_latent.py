"""Use of ACT's latent: closed forms, and evidence against integrals over z."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_act import CHUNK, LinearACT, frames, tiny_act
from torch.distributions import Laplace, Normal, kl_divergence

from landscapes.density import MIN_SCALE
from landscapes.landscape import Predictions, predict
from landscapes.latent import Evidence, evidence, latent_use
from landscapes.study import Frames, latent_numbers
from policies.act import ACTPolicy, Posterior
from policies.interface import Batch

QUERIES = (0, 4)
SCALE = torch.tensor([[20.0, 12.0], [25.0, 30.0]], dtype=torch.float64)


class KnownPosterior(LinearACT):
    """Its posterior was written by hand; the decoder ignores z unless told."""

    def __init__(self, posterior: Posterior, directions: torch.Tensor | None = None):
        nothing = torch.zeros(posterior.mean.shape[1], CHUNK, 2)
        super().__init__(nothing if directions is None else directions)
        self.known = posterior

    def encode_posterior(self, batch: Batch) -> Posterior:
        return self.known


def stretched(policy: LinearACT, along_x: float) -> Batch:
    """Demonstrations that lie at ``z = along_x``, plus noise."""
    batch = frames(3, n_padded=2)
    assert batch.observation.state is not None
    plan = policy.decode_latents(
        batch.observation, torch.full((1, 1, len(policy.directions)), along_x)
    )[:, 0]
    noise = torch.randn(plan.shape, generator=torch.Generator().manual_seed(3)).double()
    return replace(batch, actions=(plan + 8 * noise).float())


def one_direction(size=30.0, posterior_std=0.5) -> LinearACT:
    steps = torch.arange(1, CHUNK + 1, dtype=torch.float64)
    return LinearACT(
        torch.stack([size * steps / CHUNK, -0.3 * size * steps / CHUNK], -1)[None], posterior_std
    )


# Use of the latent


def test_kl_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn(5, 3, generator=generator).double() for _ in range(2))
    policy = KnownPosterior(Posterior(mean, log_variance))
    batch = frames(5)
    use = latent_use(policy, batch, predict(policy, batch, QUERIES, 4), SCALE)
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(3), torch.ones(3))
    )
    torch.testing.assert_close(use.kl_per_dim_nats, expected.mean(0))
    assert use.kl_nats == pytest.approx(expected.sum(-1).mean().item())
    assert use.kl_nats == pytest.approx(policy.encode_posterior(batch).kl().mean().item())


def test_active_units_are_those_whose_mean_follows_the_data():
    """A large but constant mean says nothing about the chunk; 0.01 is Burda et al.'s bound."""
    wobble = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    mean = torch.stack([wobble, 0.09 * wobble, 0.11 * wobble, torch.full((4,), 7.0)], dim=1)
    policy = KnownPosterior(Posterior(mean, torch.zeros(4, 4, dtype=torch.float64)))
    batch = frames(4)
    assert latent_use(policy, batch, predict(policy, batch, QUERIES, 4), SCALE).active_units == 2


def test_spread_over_the_prior_is_that_of_a_linear_decoder():
    directions = torch.zeros(2, CHUNK, 2, dtype=torch.float64)
    directions[0, :, 0] = 3.0 * torch.arange(CHUNK)  # grows along the chunk
    directions[1, :, 1] = 5.0
    policy, batch = LinearACT(directions), frames(3)
    use = latent_use(policy, batch, predict(policy, batch, QUERIES, 4096), SCALE)
    sigma = torch.tensor([[0.0, 5.0], [12.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(use.sigma_z, sigma.mean(-1), rtol=1e-3, atol=0)
    torch.testing.assert_close(use.spread_ratio, (sigma / SCALE).mean(-1), rtol=1e-3, atol=0)
    scalars = use.scalars(QUERIES)
    assert scalars["k4/R_z"] == pytest.approx((12 / 25 + 5 / 30) / 2, rel=1e-3)
    assert scalars["k0/sigma_z_px"] == pytest.approx(2.5, rel=1e-3)
    assert scalars.keys() == {
        "kl_nats",
        "active_units",
        "k0/sigma_z_px",
        "k0/R_z",
        "k4/sigma_z_px",
        "k4/R_z",
    }


def test_differences_between_frames_are_no_spread():
    policy, batch = LinearACT(torch.zeros(1, CHUNK, 2)), frames(4)
    use = latent_use(policy, batch, predict(policy, batch, QUERIES, 8), SCALE)
    assert use.sigma_z.abs().max() < 1e-9


def test_without_a_latent_there_is_nothing_to_measure():
    policy, batch = tiny_act(use_latent=False), frames(2)
    predictions = predict(policy, batch, QUERIES, 2)
    with pytest.raises(ValueError, match="use_latent=False"):
        latent_use(policy, batch, predictions, SCALE)
    with pytest.raises(ValueError, match="use_latent=False"):
        evidence(policy, batch, QUERIES, SCALE)


# Evidence


@torch.no_grad()
def integrals(policy: ACTPolicy, batch: Batch, n_points: int):
    """ELBO, log p(chunk | o) and log p(a_k | o) by quadrature over a latent of one dimension."""
    z = torch.linspace(-9, 9, n_points, dtype=torch.float64)
    log_step = math.log(18 / (n_points - 1))
    chunks = policy.decode_latents(batch.observation, z[None, :, None]).double()
    posterior = policy.encode_posterior(batch)
    q = Normal(posterior.mean.double(), (posterior.log_variance.double() / 2).exp())
    log_q = q.log_prob(z)  # [frame z]
    log_prior = Normal(0.0, 1.0).log_prob(z)
    expert, valid = batch.actions.double(), ~batch.action_is_pad
    residual = (expert[:, None] - chunks).abs()
    expected = torch.einsum("bz,bzcd->bcd", (log_q + log_step).exp(), residual)
    mean = torch.stack([expected[valid[:, step], step].mean(0) for step in range(CHUNK)])
    steps = Laplace(chunks, mean.clamp_min(MIN_SCALE)).log_prob(expert[:, None]).sum(-1)
    joint = (steps * valid[:, None]).sum(-1)
    elbo = ((log_q + log_step).exp() * (joint + log_prior - log_q)).sum(-1)
    log_evidence = torch.logsumexp(joint + log_prior + log_step, dim=-1)
    single = Laplace(chunks[:, :, QUERIES], SCALE).log_prob(expert[:, None, QUERIES]).sum(-1)
    marginal = torch.logsumexp(single + (log_prior + log_step)[:, None], dim=1)
    return elbo, log_evidence, marginal.masked_fill(~valid[:, QUERIES], math.nan)


@pytest.mark.parametrize("name", ["linear", "network"])
def test_evidence_converges_to_the_integral_over_z(name):
    if name == "linear":
        policy, n_points, n_samples = one_direction(posterior_std=0.9), 20_001, 50_000
        batch = stretched(policy, 0.7)
    else:
        policy, n_points, n_samples = tiny_act(latent_dim=1), 2001, 4000
        batch = frames(3, n_padded=2)
        with torch.no_grad():  # an untrained posterior may be narrow and far off
            assert policy.network.posterior is not None
            policy.network.posterior.latent_head.weight *= 0.05
    elbo, log_evidence, marginal = integrals(policy, batch, n_points)
    found = evidence(policy, batch, QUERIES, SCALE, n_samples)
    torch.testing.assert_close(found.elbo, elbo, rtol=0, atol=0.2)
    torch.testing.assert_close(found.iwae, log_evidence, rtol=0, atol=0.1)
    torch.testing.assert_close(found.marginal, marginal, rtol=0, atol=0.05, equal_nan=True)
    assert marginal.isnan().sum() == 1
    assert (log_evidence - elbo).min() > 0.05  # the bounds are apart, so that they are told apart


def test_more_samples_tighten_the_bound():
    policy = one_direction(posterior_std=0.9)
    batch = stretched(policy, 0.7)
    single = evidence(policy, batch, QUERIES, SCALE, n_samples=1)
    torch.testing.assert_close(single.iwae, single.elbo)
    few = [evidence(policy, batch, QUERIES, SCALE, 8, seed).iwae for seed in range(40)]
    many = [evidence(policy, batch, QUERIES, SCALE, 128, seed) for seed in range(40)]
    assert (torch.stack(few).mean(0) < torch.stack([each.iwae for each in many]).mean(0)).all()
    for each in many:
        assert (each.elbo < each.iwae).all()
        assert each.scalars(QUERIES, torch.zeros(3, 2))["iwae_gap_nats"] > 0


def test_a_latent_that_decodes_nothing_costs_its_kl():
    mean = torch.tensor([[0.5], [-1.0], [0.0]], dtype=torch.float64)
    # Wider than the prior, so that no weight is large.
    policy = KnownPosterior(Posterior(mean, torch.full_like(mean, 1.2**2).log()))
    batch = stretched(policy, 0.0)
    found = evidence(policy, batch, QUERIES, SCALE, n_samples=20_000)
    valid = ~batch.action_is_pad
    residual = (batch.actions.double() - policy.predict_chunk(batch.observation)).abs()
    b = torch.stack([residual[valid[:, step], step].mean(0) for step in range(CHUNK)])
    b = b.clamp_min(MIN_SCALE)
    log_density = (Laplace(torch.zeros(CHUNK, 2), b).log_prob(residual).sum(-1) * valid).sum(-1)
    kl = policy.encode_posterior(batch).kl()
    torch.testing.assert_close(found.elbo, log_density - kl, rtol=0, atol=0.02)
    torch.testing.assert_close(found.iwae, log_density, rtol=0, atol=0.03)


def test_padding_and_seed_of_the_evidence():
    policy = one_direction()
    batch = stretched(policy, 0.5)
    changed = torch.where(batch.action_is_pad[..., None], 1e4, batch.actions)
    # The network's own posterior is blind to padding, the linear one is not.
    policy = KnownPosterior(policy.encode_posterior(batch), policy.directions)
    first = evidence(policy, batch, QUERIES, SCALE, 16, seed=1)
    second = evidence(policy, replace(batch, actions=changed), QUERIES, SCALE, 16, seed=1)
    for field in ("elbo", "iwae", "marginal"):
        torch.testing.assert_close(
            getattr(first, field), getattr(second, field), rtol=0, atol=0, equal_nan=True
        )
    state = torch.get_rng_state()
    other = evidence(policy, batch, QUERIES, SCALE, 16, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert (other.elbo - first.elbo).abs().min() > 0


def test_gap_to_the_prior_leaves_padded_frames_out():
    marginal = torch.tensor([[-9.0, math.nan], [-8.0, math.nan]], dtype=torch.float64)
    found = Evidence(torch.tensor([-3.0, -5.0]), torch.tensor([-2.0, -3.0]), marginal)
    prior = torch.tensor([[-9.5, -1.0], [-8.1, -1.0]], dtype=torch.float64)
    scalars = found.scalars(QUERIES, prior)
    assert scalars == {
        "elbo_nats": -4.0,
        "iwae_nats": -2.5,
        "iwae_gap_nats": 1.5,
        "k0/prior_gap_nats": pytest.approx(0.3),
    }


# Both together


def numbers(policy: LinearACT, batch: Batch, n_samples: int, n_evidence_frames=3):
    predictions = predict(policy, batch, QUERIES, n_samples)
    studied = Frames(batch, torch.full((len(batch), 2, 2), torch.nan))
    return latent_numbers(policy, studied, predictions, SCALE, n_evidence_frames), predictions


def test_gap_tells_whether_samples_of_the_prior_find_the_demonstration():
    policy = one_direction(size=300.0)
    typical, rare = stretched(policy, 0.3), stretched(policy, -2.8)
    (_, enough), _ = numbers(policy, typical, 2048)
    assert abs(enough["k4/prior_gap_nats"]) < 0.15
    (_, few), _ = numbers(policy, rare, 8)
    assert few["k4/prior_gap_nats"] > 1


def test_latent_numbers_are_those_of_their_parts():
    policy = one_direction()
    batch = Batch.concatenate([stretched(policy, z) for z in (-1.0, 0.2, 0.9)])
    (use, values), predictions = numbers(policy, batch, 16, n_evidence_frames=4)
    assert use.kl_nats == values["kl_nats"]
    assert values.items() >= latent_use(policy, batch, predictions, SCALE).scalars(QUERIES).items()
    rows = torch.tensor([0, 3, 5, 8])  # evenly spread
    found = evidence(policy, batch.rows(rows), QUERIES, SCALE, n_samples=16)
    prior = _log_density(predictions.rows(rows))
    assert values.items() >= found.scalars(QUERIES, prior).items()
    assert len(values) == 2 + 4 + 3 + 2


def _log_density(predictions: Predictions) -> torch.Tensor:
    kernels = Laplace(predictions.samples, SCALE)
    log_kernel = kernels.log_prob(predictions.expert[:, None]).sum(-1)
    return torch.logsumexp(log_kernel, dim=1) - math.log(predictions.samples.shape[1])
