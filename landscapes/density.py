r"""Densities over actions: mixtures of Laplace kernels, their scales, masses and belief.

A policy trained with an L1 loss is a mixture of Laplace densities over its latent. Chunk steps are
independent given z, so the marginal of one step needs no completion of the chunk:

    p(a_k | o) = E_z prod_d Lap(a_kd; f_kd(o, z), b_kd)  ~=  1/K sum_j Lap(a_k; mu_jk, b_k)

with ``Lap(a; m, b) = exp(-|a - m| / b) / 2b``. All of it is float64 and in data units (PushT: px),
whatever precision the network ran in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from landscapes.grid import Grid

MIN_SCALE = 0.5
"""Smallest scale b of a kernel, in px: a mixture may not put infinite density on one pixel."""
MIN_SHARE = MIN_SCALE / 512
"""The same as a share of an axis, PushT's being 512 px long."""


@dataclass(frozen=True)
class Mixture:
    """``p(a) = sum_j w_j prod_d Lap(a_d; centres_jd, scale_jd)``, one for each leading index."""

    centres: Float[Tensor, "*batch sample action"]
    """Predicted actions, float64, data units."""
    scale: Float[Tensor, "*#batch #sample action"]
    """Laplace scale b of each kernel, data units."""
    log_weights: Float[Tensor, "*#batch sample"] | None = None
    """Log of weights that sum to one; equal weights when None."""

    def _log_weights(self) -> Float[Tensor, "*#batch sample"]:
        if self.log_weights is not None:
            return self.log_weights
        n_samples = self.centres.shape[-2]
        return self.centres.new_full((n_samples,), -math.log(n_samples))

    def log_density(
        self, actions: Float[Tensor, "*batch point action"]
    ) -> Float[Tensor, "*batch point"]:
        """Exact log density at points, nats per unit area."""
        log_kernel = laplace_log_density(
            actions.double()[..., :, None, :],
            self.centres[..., None, :, :],
            self.scale[..., None, :, :],
        )
        return torch.logsumexp(log_kernel + self._log_weights()[..., None, :], dim=-1)

    def cell_mass(self, grid: Grid) -> Float[Tensor, "*batch row column"]:
        """Exact probability of every cell: products of differences of the Laplace CDF.

        ``mass = Y^T diag(w) X`` with one-dimensional masses X, Y of K kernels in N cells, so the
        cost does not depend on N^2 K. What lies outside the board is left out, not renormalised.

        Raises:
            ValueError: If actions are not two-dimensional: take a :meth:`marginal` first.
        """
        if self.centres.shape[-1] != 2:
            raise ValueError(
                f"a board has 2 dimensions, the actions have {self.centres.shape[-1]}: choose two"
            )
        device = self.centres.device
        x, y = (
            laplace_interval_mass(
                self.centres[..., axis],
                self.scale[..., axis],
                grid.edges(axis, device),
            )
            for axis in (0, 1)
        )
        weighted = y * self._log_weights().exp()[..., None]
        return weighted.transpose(-1, -2) @ x

    def sample(
        self, n_samples: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch drawn action"]:
        """Draw actions from each mixture.

        Args:
            n_samples: Actions per mixture.
            generator: On the mixture's device; torch's global one when None.
        """
        *batch, n_kernels, n_dims = self.centres.shape
        weights = self._log_weights().exp().expand(*batch, n_kernels)
        chosen = torch.multinomial(
            weights.reshape(-1, n_kernels), n_samples, replacement=True, generator=generator
        ).reshape(*batch, n_samples, 1)
        index = chosen.expand(*batch, n_samples, n_dims)
        centres = self.centres.gather(-2, index)
        scale = self.scale.expand(*batch, n_kernels, n_dims).gather(-2, index)
        uniform = torch.rand(
            centres.shape, dtype=torch.float64, device=centres.device, generator=generator
        )
        # Inverse CDF; the distance from 1/2 keeps both tails exact.
        distance = uniform - 0.5
        return centres - scale * distance.sign() * torch.log1p(-2 * distance.abs())

    def marginal(self, dims: Sequence[int]) -> "Mixture":
        """The exact density of some dimensions: kernels are products, so the others drop out."""
        chosen = list(dims)
        return Mixture(self.centres[..., chosen], self.scale[..., chosen], self.log_weights)

    def conditional(self, dims: Sequence[int], held: Float[Tensor, "*batch action"]) -> "Mixture":
        """The exact density of some dimensions once the others are known.

        ``p(a_I | a_J) = sum_j w_j' Lap(a_I; mu_jI, b_I)`` with
        ``w_j' = softmax_j(log w_j + log Lap(a_J; mu_jJ, b_J))``.

        Args:
            dims: I.
            held: Whole actions, of which the other dimensions J count.
        """
        others = [dim for dim in range(self.centres.shape[-1]) if dim not in dims]
        log_kernel = laplace_log_density(
            held.double()[..., None, others], self.centres[..., others], self.scale[..., others]
        )
        weights = torch.log_softmax(self._log_weights() + log_kernel, dim=-1)
        return replace(self.marginal(dims), log_weights=weights)

    def select(self, index: int | slice | Sequence[int]) -> "Mixture":
        """Mixtures of some leading indices."""
        chosen = list(index) if isinstance(index, Sequence) else index
        n_batch = len(self.centres)

        def pick(tensor: Tensor) -> Tensor:
            return tensor[chosen] if len(tensor) == n_batch else tensor

        n_axes = self.centres.ndim
        weights = self.log_weights
        return Mixture(
            self.centres[chosen],
            pick(self.scale) if self.scale.ndim == n_axes else self.scale,
            pick(weights) if weights is not None and weights.ndim == n_axes - 1 else weights,
        )


def laplace_log_density(
    actions: Float[Tensor, "*#batch action"],
    centres: Float[Tensor, "*#batch action"],
    scale: Float[Tensor, "*#batch action"],
) -> Float[Tensor, "*batch"]:
    """``sum_d -|a_d - m_d| / b_d - log 2 b_d``, nats."""
    return -((actions - centres).abs() / scale + torch.log(2 * scale)).sum(-1)


def laplace_interval_mass(
    centre: Float[Tensor, "*#batch"], scale: Float[Tensor, "*#batch"], edges: Float[Tensor, " edge"]
) -> Float[Tensor, "*batch cell"]:
    """Probability of each interval between neighbouring edges, to full relative precision.

    Each side uses the tail that does not cancel: far from the centre a difference of CDFs near one
    would lose every digit.
    """
    z = (edges - centre[..., None]) / scale[..., None]
    left, right = z[..., :-1], z[..., 1:]
    width = right - left
    below = 0.5 * torch.exp(right.clamp_max(0)) * -torch.expm1(-width)
    above = 0.5 * torch.exp(-left.clamp_min(0)) * -torch.expm1(-width)
    across = -0.5 * (torch.expm1(left.clamp_max(0)) + torch.expm1(-right.clamp_min(0)))
    return torch.where(right <= 0, below, torch.where(left >= 0, above, across))


def smallest_scale(
    size: Sequence[float], device: torch.device | str | None = None
) -> Float[Tensor, " action"]:
    """Floor of b for each dimension: its axis' share of ``MIN_SHARE`` (PushT: 0.5 px), float64.

    Args:
        size: Length of each axis, data units.
        device: Of the result.
    """
    return MIN_SHARE * torch.tensor(list(size), dtype=torch.float64, device=device)


def fit_scale(
    centres: Float[Tensor, "frame sample query action"],
    expert: Float[Tensor, "frame query action"],
    is_valid: Bool[Tensor, "frame query"],
    n_iterations: int = 20,
    min_scale: float | Float[Tensor, " action"] = MIN_SCALE,
) -> Float[Tensor, "query action"]:
    """Fit b for each chunk step and dimension by expectation maximisation.

    Responsibilities ``r_ij = softmax_j(-sum_d |a_id - mu_ijd| / b_d)``, then
    ``b_d = mean_i sum_j r_ij |a_id - mu_ijd|``. A fit with z = 0 alone would count the distance
    between modes as noise.

    Args:
        centres: Predicted actions of calibration frames, data units.
        expert: Demonstrated actions there.
        is_valid: False where the demonstration is padded.
        n_iterations: Steps of EM.
        min_scale: Floor of b, data units; of every dimension, or for each.

    Raises:
        ValueError: If a chunk step has no valid frame.
    """
    counts = is_valid.sum(0)
    if not bool((counts > 0).all()):
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"no demonstrated action to fit the scale of query {missing} on")
    residual = (expert.double()[:, None] - centres.double()).abs()
    weight = is_valid.double()[..., None]
    total = weight.sum(0)
    scale = ((residual.mean(1) * weight).sum(0) / total).clamp_min(min_scale)
    for _ in range(n_iterations):
        responsibility = torch.softmax(-(residual / scale).sum(-1), dim=1)[..., None]
        expected = (responsibility * residual).sum(1)
        scale = ((expected * weight).sum(0) / total).clamp_min(min_scale)
    return scale


def fit_bandwidth(
    samples: Float[Tensor, "*batch sample action"],
    n_iterations: int = 20,
    min_scale: float | Float[Tensor, " action"] = MIN_SCALE,
) -> Float[Tensor, "*batch action"]:
    """Bandwidth of a kernel estimate per dimension by leave-one-out maximum likelihood.

    The same fixed point as :func:`fit_scale` with each sample explained by the others; unlike
    Scott's or Silverman's rule it does not smear over the distance between modes.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    n_samples = samples.shape[-2]
    if n_samples < 2:
        raise ValueError(f"n_samples {n_samples}: a bandwidth needs at least 2")
    samples = samples.double()
    distance = (samples[..., :, None, :] - samples[..., None, :, :]).abs()
    itself = torch.eye(n_samples, dtype=torch.bool, device=samples.device)
    scale = (distance.sum(-2) / (n_samples - 1)).mean(-2).clamp_min(min_scale)
    for _ in range(n_iterations):
        logits = -(distance / scale[..., None, None, :]).sum(-1)
        responsibility = torch.softmax(logits.masked_fill(itself, -math.inf), dim=-1)
        scale = (responsibility[..., None] * distance).sum(-2).mean(-2).clamp_min(min_scale)
    return scale


def conditional_log_weights(
    centres: Float[Tensor, "frame sample query action"],
    scale: Float[Tensor, "#frame query action"],
    chunk: Float[Tensor, "frame query action"],
    is_valid: Bool[Tensor, "frame query"],
    temperature: float = 8.0,
) -> Float[Tensor, "frame sample"]:
    """Weights of the latent samples once a continuation of the chunk is known.

    ``p(a_0 | a_{1:C} = c, o) = sum_j w_j Lap(a_0; mu_j0, b_0)`` with
    ``w_j = softmax_j (1 / tau) sum_k log Lap(c_k; mu_jk, b_k)``: what, if committed to this plan
    (c from the policy), or which mode the demonstrator is in (c from the data).

    Args:
        centres: Predicted chunks, data units.
        scale: Laplace scale of each step.
        chunk: The continuation c.
        is_valid: Steps of c that count; leave out the step whose density is wanted.
        temperature: tau; residuals of neighbouring steps are correlated, so that the bare product
            (tau = 1) would put all weight on one sample.
    """
    log_kernel = laplace_log_density(
        chunk.double()[:, None], centres.double(), scale.double()[:, None]
    )
    evidence = (log_kernel * is_valid[:, None]).sum(-1) / temperature
    return torch.log_softmax(evidence, dim=-1)


def ensemble_weights(n_predictions: int, coefficient: float) -> Float[Tensor, " prediction"]:
    """Weights of ACT's temporal ensemble, ``exp(-m i)`` with i = 0 the oldest, normalised."""
    weights = torch.exp(-coefficient * torch.arange(n_predictions, dtype=torch.float64))
    return weights / weights.sum()


def ensemble_belief(
    centres: Float[Tensor, "frame sample chunk action"],
    scale: Float[Tensor, "chunk action"],
    coefficient: float,
    frame: int,
    horizon: int = 0,
) -> Mixture:
    r"""What a temporal ensemble believes at ``frame`` about the action ``horizon`` steps ahead.

    ``p_TE(a) = sum_j w_j (1/K) sum_z Lap(a; mu_j^z, b_j)`` over the chunks predicted j = 0..J steps
    ago, each with the scale of its own step. Needs only the chunks that were predicted anyway.

    Args:
        centres: Chunks predicted at consecutive steps of one episode, all chunk steps; memory
            begins with the first of them.
        scale: Laplace scale of each chunk step.
        coefficient: m of the weights (:func:`ensemble_weights`).
        frame: Index into ``centres``.
        horizon: Steps ahead; 0 is the action executed now.
    """
    n_samples, chunk_size = centres.shape[1:3]
    oldest = min(frame, chunk_size - 1 - horizon)
    ages = range(oldest, -1, -1)
    weights = ensemble_weights(len(ages), coefficient).to(centres.device)
    mu = torch.stack([centres[frame - age, :, age + horizon] for age in ages]).double()
    b = torch.stack([scale[age + horizon] for age in ages]).double()
    return Mixture(
        rearrange(mu, "age sample action -> (age sample) action"),
        b.repeat_interleave(n_samples, dim=0),
        (weights.log() - math.log(n_samples)).repeat_interleave(n_samples),
    )
