"""Whether ACT uses its latent: the posterior's information, and what it is worth to the density.

A collapsed latent makes every landscape unimodal whatever the data are; training and validation
loss hardly show it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from landscapes.density import MIN_SCALE, laplace_log_density
from landscapes.landscape import Predictions
from policies.act import ACTPolicy
from policies.interface import Batch

ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean over the data above which a unit is active (Burda et al. 2016)."""
COLLAPSE_KL_NATS = 0.1
"""Total KL below which the latent carries no information worth the name."""


@dataclass(frozen=True)
class LatentUse:
    """How much ACT's latent knows of a demonstrated chunk, on some frames."""

    kl_nats: float
    """Mean KL divergence of q(z | state, chunk) from the prior, over all latent dimensions."""
    kl_per_dim_nats: Float[Tensor, " latent"]
    active_units: int
    """Latent dimensions whose posterior mean varies over the data."""
    sigma_z: Float[Tensor, " query"]
    """Spread of the prediction over z ~ N(0, I), mean over frames and dimensions, data units."""
    spread_ratio: Float[Tensor, " query"]
    """R_z = sigma_z / b: below 0.2 the samples are one blob."""

    def scalars(self, queries: tuple[int, ...]) -> dict[str, float]:
        """Metric names and values."""
        values = {"kl_nats": self.kl_nats, "active_units": float(self.active_units)}
        for place, query in enumerate(queries):
            values[f"k{query}/sigma_z_px"] = float(self.sigma_z[place])
            values[f"k{query}/R_z"] = float(self.spread_ratio[place])
        return values


@torch.no_grad()
def latent_use(
    policy: ACTPolicy,
    batch: Batch,
    predictions: Predictions,
    scale: Float[Tensor, "query action"],
) -> LatentUse:
    """Measure the latent of a policy on demonstrated chunks.

    Args:
        policy: With a posterior, in eval mode.
        batch: Frames with demonstrated chunks as long as the policy's.
        predictions: The policy's samples on these frames.
        scale: Laplace scale b of each query.

    Raises:
        ValueError: If the policy was built without a latent.
    """
    posterior = policy.encode_posterior(batch)
    mean, log_variance = posterior.mean.double(), posterior.log_variance.double()
    kl = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance)
    spread = predictions.samples.std(dim=1, correction=0).mean(0)
    return LatentUse(
        kl_nats=float(kl.sum(-1).mean()),
        kl_per_dim_nats=kl.mean(0),
        active_units=int((mean.var(0, correction=0) > ACTIVE_VARIANCE).sum()),
        sigma_z=spread.mean(-1),
        spread_ratio=(spread / scale).mean(-1),
    )


@dataclass(frozen=True)
class Evidence:
    """Log density of demonstrated chunks, with the latent drawn from the posterior, nats."""

    elbo: Float[Tensor, " frame"]
    """Mean of log p(chunk | z) p(z) / q(z): a lower bound (Kingma and Welling 2014)."""
    iwae: Float[Tensor, " frame"]
    """The tighter bound of S samples (Burda et al. 2016, equation 8)."""
    marginal: Float[Tensor, "frame query"]
    """Importance-weighted log p(a_k | o) of single steps, NaN where padded."""

    def scalars(
        self, queries: tuple[int, ...], prior: Float[Tensor, "frame query"]
    ) -> dict[str, float]:
        """Metric names and values.

        Args:
            queries: Chunk steps.
            prior: Log density of the same actions under samples from the prior. Where the posterior
                finds clearly more, the prior's samples miss modes, and so does the landscape.
        """
        gap = (self.marginal - prior).nanmean(0)
        values = {
            "elbo_nats": float(self.elbo.mean()),
            "iwae_nats": float(self.iwae.mean()),
            "iwae_gap_nats": float((self.iwae - self.elbo).mean()),
        }
        for place, query in enumerate(queries):
            if bool(gap[place].isfinite()):
                values[f"k{query}/prior_gap_nats"] = float(gap[place])
        return values


@torch.no_grad()
def evidence(
    policy: ACTPolicy,
    batch: Batch,
    queries: Sequence[int],
    scale: Float[Tensor, "query action"],
    n_samples: int = 64,
    seed: int = 0,
    min_scale: float | Float[Tensor, " action"] = MIN_SCALE,
) -> Evidence:
    """Estimate log p(chunk | o) of demonstrated chunks by importance sampling from the posterior.

    ``log 1/S sum_s p(c | z_s) p(z_s) / q(z_s | c)`` with ``z_s ~ q(z | state, c)``, over the steps
    of the chunk that are not padded, in data units. The scale of the joint density is the one that
    maximises the bound on these frames, ``b_k = E_q |c_k - f_k(o, z)|``; single steps are scored
    with the scale of the landscapes, so that they compare with the prior's samples.

    Args:
        policy: With a posterior, in eval mode.
        batch: Frames with demonstrated chunks as long as the policy's.
        queries: Chunk steps whose marginals are wanted.
        scale: Laplace scale b of the landscapes at the queries.
        n_samples: S.
        seed: Of the posterior's samples.
        min_scale: Floor of the joint density's scale, data units.

    Raises:
        ValueError: If the policy was built without a latent.
    """
    expert = batch.actions.double()
    is_valid = ~batch.action_is_pad
    posterior = policy.encode_posterior(batch)
    mean, std = posterior.mean.double(), (0.5 * posterior.log_variance.double()).exp()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(
        len(mean), n_samples, mean.shape[-1], dtype=torch.float64, generator=generator
    ).to(mean.device)
    latents = mean[:, None] + std[:, None] * noise
    log_ratio = (
        -0.5 * latents.square().sum(-1)
        + 0.5 * noise.square().sum(-1)
        + std.log().sum(-1, keepdim=True)
    )
    chunks = policy.decode_latents(batch.observation, latents).double()
    valid = is_valid[..., None].double()
    residual = ((expert[:, None] - chunks).abs().mean(1) * valid).sum(0)
    joint_scale = (residual / valid.sum(0).clamp_min(1)).clamp_min(min_scale)
    log_steps = laplace_log_density(expert[:, None], chunks, joint_scale)
    log_joint = (log_steps * is_valid[:, None]).sum(-1) + log_ratio
    columns, log_s = list(queries), math.log(n_samples)
    single = laplace_log_density(expert[:, None, columns], chunks[:, :, columns], scale)
    marginal = torch.logsumexp(single + log_ratio[..., None], dim=1) - log_s
    return Evidence(
        elbo=log_joint.mean(-1),
        iwae=torch.logsumexp(log_joint, dim=-1) - log_s,
        marginal=marginal.masked_fill(~is_valid[:, columns], math.nan),
    )
