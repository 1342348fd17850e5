r"""What Diffusion Policy's own network says of an action: slices of its ELBO, the ODE's density.

Both speak of a whole horizon x of actions, past steps included, not of one step: they are densities
of the joint distribution, and a map over one action is a *slice* through it, not a marginal. Noise
of level s turns x into ``x + s * scale * eps``; a network that predicts eps knows the density of
that sum, and no more: likelihoods below are those of actions blurred by the smallest level of the
training schedule (100 squared-cosine timesteps: 0.025, on PushT 6 px). What LeRobot's sampler adds,
``clip_sample`` above all, is in none of them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

LAST_LEVEL = 100.0
"""Noise level, actions being of order one, beyond which they no longer matter. 100 squared-
cosine timesteps end with a jump from 64 to 2029, because beta is capped: there is nothing to learn
there, yet a network's mistakes add up over a third of the whole range of log s."""


@runtime_checkable
class ActionDiffusion(Protocol):
    """Diffusion over horizons given some observations, in data units.

    ``noised = horizon + level * scale * eps`` with eps ~ N(0, 1).
    """

    @property
    def horizon(self) -> int:
        """Steps of a horizon, past ones included."""
        ...

    @property
    def n_past(self) -> int:
        """Steps of a horizon before the observed instant."""
        ...

    @property
    def noise_levels(self) -> Float[Tensor, " timestep"]:
        """Levels of the training schedule, ascending."""
        ...

    @property
    def offset(self) -> Float[Tensor, "frame action"]:
        """Mean of what denoising starts from, float64."""
        ...

    @property
    def scale(self) -> Float[Tensor, " action"]:
        """Data units of one unit of noise, float64."""
        ...

    def predict_noise(
        self,
        noised: Float[Tensor, "row horizon action"],
        level: float,
        frames: Int[Tensor, " row"],
    ) -> Float[Tensor, "row horizon action"]:
        """Predict eps; gradients flow.

        Args:
            noised: Horizons with noise.
            level: Of the noise, within :attr:`noise_levels`.
            frames: Observation that each row belongs to.
        """
        ...

    def sample_horizons(self, seed: int = 0) -> Float[Tensor, "frame horizon action"]:
        """Draw one horizon per observation, float64, equal for equal seeds."""
        ...


@torch.no_grad()
def noise_prediction_scores(
    diffusion: ActionDiffusion,
    candidates: Float[Tensor, "#frame #query point action"],
    queries: Sequence[int],
    n_draws: int = 8,
    seed: int = 0,
    decay: float = 0.9,
    max_columns: int = 512,
) -> Float[Tensor, "frame query point"]:
    r"""Score candidate actions by how well the network recognises the noise on their horizon.

    The evidence lower bound in continuous time (Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630), over noise levels s:

        score(a) = - int E_eps ||eps - eps_theta(x(a) + s scale eps, s)||^2 d log s

    Nats. ``score - sum_jd log(sqrt(2 pi e) s_0 scale_d)`` bounds from below the mean log density of
    x(a) with noise of the smallest level s_0, and equals it for a perfect network. DDPM's sum over
    timesteps, ``w_t = beta_t^2 / (2 s_t^2 alpha_t (1 - abar_t))``, is this integral's upper sum: on
    100 timesteps it makes a Gaussian of normalised width 0.05 (0.3) 1.4 (1.1) times as curved as it
    is. Its term of t = 0, of infinite weight, would be the part below s_0.

    Every frame, query and candidate meets the same n_draws pairs of (s, eps), so that their
    differences are far more certain than the scores: levels are stratified in proportion to
    ``d log s / (1 + s^2)``, what a candidate can change, and each comes with eps and -eps, which
    cancels the noise that is linear in a. The estimate has no bias.

    x(a) is one sampled horizon mu, moved so that its step k is a: step j from now on moves by
    ``(a - mu_k) decay^|j - k|``, steps of the past stay.

    Args:
        diffusion: The policy and its observations.
        candidates: Actions, data units.
        queries: Chunk step k that the candidates of each column are for.
        n_draws: Network evaluations per candidate, an even number.
        seed: Of the sampled horizon, the levels and the noise.
        decay: Share of a step's shift that its neighbour takes over.
        max_columns: Horizons per network call, a bound on memory.

    Raises:
        ValueError: If a query lies outside the chunk, or ``n_draws`` is odd or not positive.
    """
    if n_draws < 2 or n_draws % 2:
        raise ValueError(f"n_draws {n_draws}: noise comes in pairs, give an even number")
    chunk_size = diffusion.horizon - diffusion.n_past
    if not queries or not all(0 <= query < chunk_size for query in queries):
        raise ValueError(f"queries {list(queries)} must lie in 0..{chunk_size - 1}")
    reference = diffusion.sample_horizons(seed)
    device = reference.device
    low, high = _trained_range(diffusion, LAST_LEVEL)
    levels, weights, noise = _draw_noise(low, high, n_draws, seed, reference.shape[1:])
    noise = noise.to(device)
    candidates = candidates.double().expand(len(reference), len(queries), -1, -1)
    steps = torch.tensor(list(queries), device=device) + diffusion.n_past
    distance = torch.arange(diffusion.horizon, device=device) - steps[:, None]
    share = decay ** distance.abs().double()
    share[:, : diffusion.n_past] = 0
    shape = candidates.shape[:3]
    scores = []
    for rows in torch.arange(math.prod(shape), device=device).split(max_columns):
        frame, query, point = torch.unravel_index(rows, shape)
        horizon = reference[frame]
        shift = (
            candidates[frame, query, point]
            - horizon[torch.arange(len(rows), device=device), steps[query]]
        )
        horizon = horizon + share[query][..., None] * shift[:, None]
        score = horizon.new_zeros(len(rows))
        for level, weight, eps in zip(levels, weights, noise, strict=True):
            predicted = diffusion.predict_noise(
                horizon + level * diffusion.scale * eps, level, frame
            )
            score -= weight * (predicted - eps).square().sum((-1, -2))
        scores.append(score)
    return torch.cat(scores).reshape(shape)


def ode_log_likelihood(
    diffusion: ActionDiffusion,
    chunk: Float[Tensor, "frame chunk action"],
    is_pad: Bool[Tensor, "frame chunk"],
    past: Float[Tensor, "frame past action"] | None = None,
    n_steps: int = 20,
    n_probes: int | None = None,
    last_level: float = LAST_LEVEL,
    seed: int = 0,
    max_columns: int = 512,
) -> Float[Tensor, " frame"]:
    r"""Log density of whole demonstrated chunks under the probability flow ODE.

    Song et al. 2021 (https://arxiv.org/abs/2011.13456, D.2), in noise levels s as in Karras et
    al. 2022 (https://arxiv.org/abs/2206.00364): ``dx / ds = scale eps_theta(x, s)`` takes a horizon
    to the noise that denoising starts from, and

        log p(x) = log N(x_T; offset, (1 + s_T^2) scale^2) + int tr(scale d eps_theta / d x) ds

    Nats per data unit to the power of (horizon x action): the joint density of all steps, past ones
    included, blurred by the smallest noise level. Being in data units it needs no Jacobian of the
    normalisation. Paths are fourth-order Runge-Kutta in s, the integral Simpson's rule in log s.

    Args:
        diffusion: The policy and its observations.
        chunk: Demonstrated actions from the observed instant on, data units.
        is_pad: True where the demonstration has ended; such chunks are no demonstrations.
        past: Demonstrated actions of the horizon before the observed instant; None takes them from
            a sampled horizon, which the demonstration need not continue.
        n_steps: Steps, equal in log s. For Gaussian actions of any width 20 are within 0.003 nats
            per ten dimensions; the error falls with the fourth power.
        n_probes: None sums the trace exactly, a gradient for each of (horizon x action) dimensions;
            a number estimates it (Hutchinson) from as many random signs, the same for all frames
            and levels. Without bias, but noisy where dimensions hang together.
        last_level: The path ends at the last level of the schedule up to this one, which neglects
            ``|normalised horizon| / level`` nats (standard deviation); ``math.inf``: at the end.
        seed: Of the sampled past and the random signs.
        max_columns: Horizons per network call, a bound on memory.

    Raises:
        ValueError: If a chunk is padded or does not fill the horizon, a number of steps or probes
            is not positive, or ``last_level`` leaves no level.
    """
    padded = is_pad.any(1).nonzero().flatten().tolist()
    if padded:
        raise ValueError(f"frames {padded} are padded: leave them out, their chunks are no data")
    if n_steps < 1 or (n_probes is not None and n_probes < 1):
        raise ValueError(f"n_steps {n_steps} and n_probes {n_probes} must be at least 1")
    low, *trained = diffusion.noise_levels.tolist()
    if last_level < trained[0]:
        raise ValueError(
            f"last_level {last_level}: the schedule begins {low:.4g}, {trained[0]:.4g}"
        )
    high = max(level for level in trained if level <= last_level)
    levels = [low * (high / low) ** (step / n_steps) for step in range(n_steps + 1)]
    # Callers may be in inference mode, whose tensors take no part in gradients.
    with torch.inference_mode(False), torch.no_grad():
        if past is None:
            past = diffusion.sample_horizons(seed)[:, : diffusion.n_past]
        steps = past.shape[1], chunk.shape[1]
        if steps != (diffusion.n_past, diffusion.horizon - diffusion.n_past):
            raise ValueError(
                f"{steps} steps of past and chunk: the policy's horizon has {diffusion.n_past} and "
                f"{diffusion.horizon - diffusion.n_past}"
            )
        flow = _ProbabilityFlow(diffusion, max_columns)
        x = torch.cat([past.double(), chunk.double()], dim=1)
        probes = _probes(x.shape[1:], n_probes, seed).to(x.device)
        slope = flow.slope(x, levels[0])
        trace = flow.trace(x, levels[0], probes)
        integral = torch.zeros_like(trace)
        for start, end in pairwise(levels):
            step, centre = end - start, (start + end) / 2
            second = flow.slope(x + step / 2 * slope, centre)
            third = flow.slope(x + step / 2 * second, centre)
            fourth = flow.slope(x + step * third, end)
            x_end = x + step / 6 * (slope + 2 * second + 2 * third + fourth)
            slope_end = flow.slope(x_end, end)
            # Simpson's middle is that of log s; the path there is a cubic through both ends.
            middle = math.sqrt(start * end)
            c = (middle - start) / step
            x_middle = (
                (1 + 2 * c) * (1 - c) ** 2 * x
                + c**2 * (3 - 2 * c) * x_end
                + step * c * (1 - c) * ((1 - c) * slope - c * slope_end)
            )
            trace_end = flow.trace(x_end, end, probes)
            trace_middle = flow.trace(x_middle, middle, probes)
            integral += math.log(end / start) / 6 * (trace + 4 * trace_middle + trace_end)
            x, slope, trace = x_end, slope_end, trace_end
        spread = diffusion.scale * math.hypot(1, levels[-1])
        z = (x - diffusion.offset[:, None]) / spread
        log_normal = -(z.square() / 2 + torch.log(spread * math.sqrt(2 * math.pi)))
        return log_normal.sum((-1, -2)) + integral


class _ProbabilityFlow:
    """Slope of the ODE and its divergence, in blocks of rows that fit the memory."""

    def __init__(self, diffusion: ActionDiffusion, max_columns: int):
        self.diffusion = diffusion
        self.max_columns = max_columns

    def slope(
        self, x: Float[Tensor, "frame horizon action"], level: float
    ) -> Float[Tensor, "frame horizon action"]:
        """``dx / ds``, data units."""
        frames = torch.arange(len(x), device=x.device).split(self.max_columns)
        eps = [self.diffusion.predict_noise(x[rows], level, rows) for rows in frames]
        return self.diffusion.scale * torch.cat(eps)

    def trace(
        self,
        x: Float[Tensor, "frame horizon action"],
        level: float,
        probes: Float[Tensor, "probe horizon action"],
    ) -> Float[Tensor, " frame"]:
        """``s tr(d slope / d x)`` as the sum of ``probe^T J probe``: dimensionless, per log s."""
        n_probes, scale = len(probes), self.diffusion.scale
        products = []
        pairs = torch.arange(len(x) * n_probes, device=x.device)
        for rows in pairs.split(self.max_columns):
            frames, probe = rows // n_probes, probes[rows % n_probes]
            with torch.enable_grad():
                point = x[frames].requires_grad_()
                eps = self.diffusion.predict_noise(point, level, frames)
                (gradient,) = torch.autograd.grad((eps * probe).sum(), point)
            products.append((gradient * scale * probe).sum((-1, -2)))
        per_probe = rearrange(torch.cat(products), "(frame probe) -> frame probe", probe=n_probes)
        return level * per_probe.sum(-1)


def _probes(
    shape: Sequence[int], n_probes: int | None, seed: int
) -> Float[Tensor, "probe horizon action"]:
    """Vectors whose outer products sum to the identity, exactly or on average."""
    n_dims = math.prod(shape)
    if n_probes is None:
        return torch.eye(n_dims, dtype=torch.float64).reshape(n_dims, *shape)
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (n_probes, *shape), generator=generator) - 1
    return signs.double() / math.sqrt(n_probes)


def _trained_range(diffusion: ActionDiffusion, last_level: float) -> tuple[float, float]:
    """First level of the schedule, and the last one up to ``last_level``.

    Raises:
        ValueError: If they are the same.
    """
    low, *trained = diffusion.noise_levels.tolist()
    if last_level < trained[0]:
        raise ValueError(
            f"last_level {last_level}: the schedule begins {low:.4g}, {trained[0]:.4g}"
        )
    return low, max(level for level in trained if level <= last_level)


def _draw_noise(
    low: float, high: float, n_draws: int, seed: int, shape: Sequence[int]
) -> tuple[list[float], list[float], Float[Tensor, "draw horizon action"]]:
    """Levels, weights and noise whose weighted sum is the integral over log s, on average."""
    n_pairs = n_draws // 2
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(n_pairs, dtype=torch.float64, generator=generator)
    # d log s / (1 + s^2) = d log sin(atan s): stratified uniformly in that.
    first, last = (math.log(math.sin(math.atan(level))) for level in (low, high))
    sine = torch.exp(first + (last - first) * (torch.arange(n_pairs) + within) / n_pairs)
    levels = sine / (1 - sine**2).sqrt()
    weights = (last - first) / n_draws * (1 + levels**2)
    noise = torch.randn(n_pairs, *shape, dtype=torch.float64, generator=generator)
    return levels.repeat(2).tolist(), weights.repeat(2).tolist(), torch.cat([noise, -noise])
