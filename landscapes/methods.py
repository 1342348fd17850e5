"""How a cell of the board is scored: one class per method, named by ``--scoring_method``.

No method stands in for another: what a policy cannot answer is an error that says so. Scores of
different methods have different units, and each method has one fixed colour range.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from landscapes.density import Mixture, conditional_log_weights, ensemble_belief
from landscapes.diffusion import noise_prediction_scores
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions
from landscapes.regions import CREDIBLE_LEVELS, credible_thresholds, mass_below
from landscapes.space import Plane
from policies.act import ACTPolicy
from policies.interface import Batch, Observation, SamplingPolicyView
from policies.lerobot_view import LeRobotPolicyView

DISPLAY_RANGE_NATS = (-4.0, 8.0)
"""Nats above the uniform density at the ends of the colour map, for every density."""
FLOOR_NATS = 30.0
"""Densities this far below a frame's best cell are all drawn alike."""

Scores = Float[Tensor, "frame query row column"]


@dataclass(frozen=True)
class Probe:
    """Some frames, what the policy answered there, and the board."""

    view: SamplingPolicyView
    batch: Batch
    """Observations and demonstrated chunks of the frames, on the policy's device."""
    predictions: Predictions
    """At least at ``horizons``; at every chunk step for methods with ``needs_whole_chunk``."""
    scale: Float[Tensor, "#frame query action"]
    """Laplace scale b of the kernels at each of the predictions' queries."""
    horizons: tuple[int, ...]
    """Chunk steps to show."""
    grid: Grid
    plane: Plane | None = None
    """Dimensions that the board is over; None where actions have no others."""
    plane_scale: Float[Tensor, "#frame query 2"] | None = None
    """Scale b of the kernels over the board's dimensions alone, for their marginal; that of whole
    actions when None."""

    def shown(self) -> Predictions:
        """The predictions at the horizons, in the dimensions of the board."""
        at_horizons = self.predictions.at(self.horizons)
        return at_horizons if self.plane is None else at_horizons.dimensions(self.plane.dims)

    def shown_scale(self) -> Float[Tensor, "#frame query action"]:
        """The scale at the horizons, in the dimensions of the board."""
        places = [self.predictions.queries.index(query) for query in self.horizons]
        scale = self.density_scale()[:, places]
        return scale if self.plane is None else scale[..., list(self.plane.dims)]

    def density_scale(self) -> Float[Tensor, "#frame query action"]:
        """The scale of the density over the board: its own in its dimensions, if it has one."""
        if self.plane is None or self.plane_scale is None:
            return self.scale
        scale = self.scale.clone()
        scale[..., list(self.plane.dims)] = self.plane_scale
        return scale

    def mixture(self, log_weights: Float[Tensor, "frame query sample"] | None = None) -> Mixture:
        """The density of every frame and horizon over the board.

        Args:
            log_weights: Of the samples; equal ones when None, which is p(a_k | o).
        """
        whole = replace(self, scale=self.density_scale(), plane=None)
        predictions = whole.shown()
        mixture = predictions.mixture(whole.shown_scale())
        return self.cut(replace(mixture, log_weights=log_weights), predictions.point)

    def cut(self, mixture: Mixture, held: Float[Tensor, "*batch action"]) -> Mixture:
        """Cut a density over whole actions down to the board.

        Args:
            mixture: Over all dimensions.
            held: The action whose other dimensions a conditional slice holds.
        """
        if self.plane is None:
            return mixture
        if self.plane.is_conditional:
            return mixture.conditional(self.plane.dims, held)
        return mixture.marginal(self.plane.dims)


class Method(ABC):
    """A score for every cell of the board, at every frame and horizon."""

    name: ClassVar[str]
    unit: ClassVar[str]
    value_range: ClassVar[tuple[float, float]] = DISPLAY_RANGE_NATS
    needs_whole_chunk: ClassVar[bool] = False
    """Whether predictions must hold every step of the chunk."""
    has_planes: ClassVar[bool] = True
    """Whether it can score two of more dimensions: not where a candidate is a whole action."""
    is_density: ClassVar[bool] = False
    """Whether scores follow from :meth:`density`, so that they have a conditional slice."""

    def check(self, view: SamplingPolicyView, plane: Plane | None = None) -> None:
        """Refuse a policy or a plane that this method cannot score.

        Args:
            view: The policy.
            plane: Dimensions that the board is to be over; None for both of two.

        Raises:
            ValueError: Saying which method, which policy and what to use instead.
        """
        n_dims = view.data_schema.action_dim
        if n_dims != 2 and plane is None:
            raise ValueError(
                f"scoring_method {self.name}: a board has 2 dimensions, the policy's actions have "
                f"{n_dims}: choose two"
            )
        if plane is not None and not self.has_planes:
            raise ValueError(
                f"scoring_method {self.name}: scores whole actions and has no boards over two of "
                f"{n_dims} dimensions; choose likelihood"
            )
        if plane is not None and plane.is_conditional and not self.is_density:
            raise ValueError(
                f"scoring_method {self.name}: is no density, so nothing can be held; choose "
                "--slice marginal"
            )

    @abstractmethod
    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Score every cell.

        Args:
            probe: Frames and predictions.
            mass: Probability of every cell under :meth:`density`.
        """

    def density(self, probe: Probe) -> Mixture:
        """The density whose credible regions are drawn."""
        return probe.mixture()

    def mass(self, probe: Probe) -> Scores:
        """Probability of every cell under the method's density."""
        return self.density(probe).cell_mass(probe.grid)

    def landscape(self, probe: Probe) -> Landscape:
        """Compute scores and credible regions.

        Raises:
            ValueError: If the policy cannot answer this method, or predictions lack chunk steps.
        """
        self.check(probe.view, probe.plane)
        if self.needs_whole_chunk and len(probe.predictions.queries) < probe.view.chunk_size:
            raise ValueError(
                f"scoring_method {self.name}: needs predictions of all {probe.view.chunk_size} "
                f"chunk steps, given: {list(probe.predictions.queries)}"
            )
        mass = self.mass(probe)
        unit, value_range = self.colour_scale(probe.plane)
        return Landscape(
            method=self.name,
            unit=unit,
            value_range=value_range,
            grid=probe.grid,
            queries=probe.horizons,
            scores=self.scores(probe, mass).float().cpu(),
            mass=mass.float().cpu(),
            thresholds=credible_thresholds(mass, CREDIBLE_LEVELS).float().cpu(),
            plane=probe.plane,
        )

    def colour_scale(self, plane: Plane | None) -> tuple[str, tuple[float, float]]:
        """Unit of the scores, and those at the ends of the colour map."""
        return self.unit, self.value_range


class Length(Method):
    """A method whose scores are lengths in the unit of the axes, from the longer axis to 0."""

    value_range = (-512.0, 0.0)

    def colour_scale(self, plane: Plane | None) -> tuple[str, tuple[float, float]]:
        """In the unit that both axes share."""
        if plane is None:
            return self.unit, self.value_range
        unit = f", {plane.x.unit}" if plane.x.unit == plane.y.unit != "" else ""
        longest = max(plane.grid(1).size)
        return self.unit.removesuffix(", px") + unit, (-longest, 0.0)


class Likelihood(Method):
    """``log p(a_k | o)``: the policy's own density of one chunk step, the rest marginalised."""

    name = "likelihood"
    unit = "nats above uniform"
    is_density = True

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Log of the mean density over each cell, above the uniform density."""
        return nats_above_uniform(mass, probe.grid)


class LikelihoodZ0(Likelihood):
    """``log Lap(a; f(o, z = 0), b)``: the noise model of the policy as it is executed."""

    name = "likelihood_z0"

    def check(self, view: SamplingPolicyView, plane: Plane | None = None) -> None:
        """Only ACT is executed at z = 0."""
        super().check(view, plane)
        _require_act(self.name, view)

    def density(self, probe: Probe) -> Mixture:
        """One kernel at the executed prediction."""
        point = probe.shown().point
        return Mixture(point[:, :, None], probe.shown_scale()[:, :, None])


class Confidence(Method):
    """Mass of the less dense cells: where it exceeds 1 - q lies the smallest region of mass q."""

    name = "confidence"
    unit = "mass of less likely actions"
    value_range = (0.0, 1.0)
    is_density = True

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """One minus the level of the highest-density region at each cell."""
        return mass_below(mass)


class L1Loss(Length):
    """``-E_z |a - f_k(o, z)|_1``, the training loss of one chunk step, per cell.

    With one sample this is ``b * likelihood_z0`` plus a constant: a pyramid.
    """

    name = "l1_loss"
    unit = "-L1 distance, px"

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Separable: a mean distance along x plus one along y."""
        samples = probe.shown().samples
        centres = probe.grid.centres(samples.device)
        x, y = (
            (
                line[:, None]
                - rearrange(samples[..., axis], "frame sample query -> frame query 1 sample")
            )
            .abs()
            .mean(-1)
            for axis, line in ((0, centres[0, :, 0]), (1, centres[:, 0, 1]))
        )
        return -(y[..., :, None] + x[..., None, :])


class Distance(Length):
    """``-|a - a*|_2`` from one action: ACT's at z = 0, another policy's from fixed noise."""

    name = "distance"
    unit = "-distance, px"

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Negative distance in data units."""
        shown = probe.shown()
        if isinstance(probe.view, ACTPolicy):
            return -_mean_distance(shown.point[:, None], probe.grid)
        # Execution draws fresh noise for each observation: one fixed draw does not flicker.
        return -_mean_distance(shown.samples[:, :1], probe.grid)


class Energy(Length):
    """``-E_j |a - a_j|_2``: mean distance to the policy's samples; no bandwidth enters."""

    name = "energy"
    unit = "-mean distance, px"

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Negative mean distance in data units."""
        return -_mean_distance(probe.shown().samples, probe.grid)


class Belief(Likelihood):
    """What ACT's temporal ensemble believes: the densities of all chunks that reach this step.

    Args:
        temporal_ensemble_coeff: m of the weights exp(-m i), i = 0 for the oldest chunk.
    """

    name = "belief"
    needs_whole_chunk = True

    def __init__(self, temporal_ensemble_coeff: float = 0.01):
        self.temporal_ensemble_coeff = temporal_ensemble_coeff

    def mass(self, probe: Probe) -> Scores:
        """Mass under the ensemble's mixture, frame by frame: they differ in length.

        Raises:
            ValueError: If the frames are not consecutive steps of one episode.
        """
        _require_consecutive(self.name, probe.batch)
        scale = probe.density_scale().expand(len(probe.batch), -1, -1)
        steps = torch.arange(scale.shape[1], device=scale.device)

        def mass(frame: int, horizon: int) -> Tensor:
            # A chunk has the scale of the frame that it was predicted at.
            predicted_at = (frame + horizon - steps).clamp(0, len(scale) - 1)
            belief = ensemble_belief(
                probe.predictions.samples,
                scale[predicted_at, steps],
                self.temporal_ensemble_coeff,
                frame,
                horizon,
            )
            # The whole chunk is there: a horizon is its own place.
            held = probe.predictions.point[frame, horizon]
            return probe.cut(belief, held).cell_mass(probe.grid)

        return torch.stack(
            [
                torch.stack([mass(frame, horizon) for horizon in probe.horizons])
                for frame in range(len(probe.batch))
            ]
        )


class Committed(Likelihood):
    """``p(a_k | o, rest of the chunk = the policy's own plan)``: what, if committed to this plan.

    Args:
        temperature: tau; the evidence of the other steps counts 1 / tau.
    """

    name = "committed"
    needs_whole_chunk = True

    def __init__(self, temperature: float = 8.0):
        self.temperature = temperature

    def density(self, probe: Probe) -> Mixture:
        """The prior's samples, weighted by how well they explain the continuation."""
        chunk, is_valid = self.continuation(probe.predictions)
        weights = []
        for horizon in probe.horizons:
            counted = is_valid.clone()
            counted[:, probe.predictions.queries.index(horizon)] = False
            weights.append(
                conditional_log_weights(
                    probe.predictions.samples, probe.scale, chunk, counted, self.temperature
                )
            )
        return probe.mixture(torch.stack(weights, dim=1))

    def continuation(self, predictions: Predictions) -> tuple[Tensor, Tensor]:
        """The known chunk, and which of its steps count."""
        return predictions.point, torch.ones_like(predictions.is_valid)


class ExpertMode(Committed):
    """``p(a_k | o, rest of the chunk = the demonstration)``: which mode the demonstrator is in."""

    name = "expert_mode"

    def continuation(self, predictions: Predictions) -> tuple[Tensor, Tensor]:
        """The demonstrated chunk, padding left out."""
        return predictions.expert, predictions.is_valid


class Reconstruction(Method):
    """Can the policy express this chunk? Each candidate goes through ACT's posterior and back.

    The candidate chunk is the policy's own plan, shifted so that step k hits the cell and its
    neighbours follow with a decaying offset: ``c(a)_j = mu_j + (a - mu_k) g^|j - k|``. The score is
    ``-mean |c(a) - f(o, mean of q(z | c(a)))|``.

    Args:
        resolution: Candidates along each axis; every one costs a pass through the whole network.
        decay: g.
        batch_size: Candidates that go through the network at once.
    """

    name = "recon"
    unit = "-reconstruction L1, px"
    value_range = (-64.0, 0.0)
    has_planes = False

    def __init__(self, resolution: int = 16, decay: float = 0.9, batch_size: int = 256):
        self.resolution = resolution
        self.decay = decay
        self.batch_size = batch_size

    def check(self, view: SamplingPolicyView, plane: Plane | None = None) -> None:
        """Only ACT trained as a CVAE has a posterior."""
        super().check(view, plane)
        if _require_act(self.name, view).network.posterior is None:
            raise ValueError(
                f"scoring_method {self.name}: this ACT was trained without a latent; choose "
                "likelihood"
            )

    @torch.no_grad()
    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Mean L1 per step in data units; each fine cell shows its nearest candidate."""
        policy = _require_act(self.name, probe.view)
        coarse = Grid(min(self.resolution, probe.grid.resolution), probe.grid.low, probe.grid.high)
        candidates = rearrange(
            coarse.centres(mass.device), "row column action -> (row column) action"
        )
        steps = torch.arange(policy.chunk_size, device=mass.device)
        scores = mass.new_empty(len(probe.batch), len(probe.horizons), len(candidates))
        for frame in range(len(probe.batch)):
            observation = probe.batch.observation.rows(slice(frame, frame + 1))
            plan = policy.predict_chunk(observation)[0].double()
            for place, horizon in enumerate(probe.horizons):
                fade = self.decay ** (steps - horizon).abs().double()
                offset = candidates - plan[horizon]
                chunks = plan + offset[:, None] * fade[:, None]
                errors = [
                    _reconstruction_error(policy, observation, part)
                    for part in chunks.split(self.batch_size)
                ]
                scores[frame, place] = -torch.cat(errors)
        return _spread(scores, coarse.resolution, probe.grid.resolution)


class NoisePrediction(Method):
    """A slice of Diffusion Policy's evidence bound through whole-chunk space, not a marginal.

    Args:
        resolution: Candidates along each axis; each costs ``n_draws`` evaluations of the U-Net.
        n_draws: Pairs of time and noise, the same for every cell.
        seed: Of the pairs.
        batch_size: Evaluations of the U-Net at once.
    """

    name = "noise_pred"
    unit = "ELBO slice, nats below best"
    value_range = (-50.0, 0.0)
    has_planes = False

    def __init__(
        self, resolution: int = 16, n_draws: int = 8, seed: int = 0, batch_size: int = 256
    ):
        self.resolution = resolution
        self.n_draws = n_draws
        self.seed = seed
        self.batch_size = batch_size

    def check(self, view: SamplingPolicyView, plane: Plane | None = None) -> None:
        """Only Diffusion Policy predicts noise."""
        super().check(view, plane)
        kind = kind_of(view)
        if kind != "diffusion":
            raise ValueError(
                f"scoring_method {self.name}: the policy is {kind} and predicts no noise; "
                "choose likelihood"
            )

    def scores(self, probe: Probe, mass: Scores) -> Scores:
        """Evidence bound relative to each frame's best cell; fine cells show the nearest one."""
        assert isinstance(probe.view, LeRobotPolicyView)
        coarse = Grid(min(self.resolution, probe.grid.resolution), probe.grid.low, probe.grid.high)
        candidates = rearrange(coarse.centres(), "row column action -> 1 1 (row column) action")
        scores = noise_prediction_scores(
            probe.view.diffusion(probe.batch.observation),
            candidates.to(mass.device),
            probe.horizons,
            n_draws=self.n_draws,
            seed=self.seed,
            max_columns=self.batch_size,
        )
        best = scores.amax(-1, keepdim=True)
        return _spread(scores - best, coarse.resolution, probe.grid.resolution)


METHODS: dict[str, Callable[[], Method]] = {
    method.name: method
    for method in (
        Likelihood,
        LikelihoodZ0,
        L1Loss,
        Confidence,
        Reconstruction,
        Distance,
        Energy,
        NoisePrediction,
        Belief,
        Committed,
        ExpertMode,
    )
}
"""The built-in methods by the name that commands use; others are named by ``class_path``."""


def queries_for(
    methods: Sequence[Method], view: SamplingPolicyView, horizons: Sequence[int]
) -> Sequence[int]:
    """Chunk steps that predictions must hold for these methods to show these horizons."""
    if any(method.needs_whole_chunk for method in methods):
        return range(view.chunk_size)
    return horizons


def nats_above_uniform(
    mass: Float[Tensor, "*batch row column"], grid: Grid
) -> Float[Tensor, "*batch row column"]:
    """Log density of each cell minus the uniform one, floored ``FLOOR_NATS`` below the best."""
    tiny = torch.finfo(mass.dtype).tiny
    log_density = mass.clamp_min(tiny).log() - torch.log(mass.new_tensor(grid.cell_area))
    above = log_density - grid.log_uniform
    return torch.maximum(above, above.amax((-1, -2), keepdim=True) - FLOOR_NATS)


def _mean_distance(
    centres: Float[Tensor, "frame sample query action"], grid: Grid
) -> Float[Tensor, "frame query row column"]:
    """Mean Euclidean distance of every cell from the centres."""
    cells = grid.centres(centres.device).reshape(-1, 2)
    points = rearrange(centres, "frame sample query action -> frame query sample action")
    # Its default squares and subtracts, which near a centre loses digits.
    distances = [
        torch.cdist(cells, frame, compute_mode="donot_use_mm_for_euclid_dist").mean(-1)
        for frame in points.double().flatten(0, 1)
    ]
    return torch.stack(distances).reshape(*points.shape[:2], grid.resolution, grid.resolution)


def _reconstruction_error(
    policy: ACTPolicy, observation: Observation, chunks: Float[Tensor, "candidate chunk action"]
) -> Float[Tensor, " candidate"]:
    n = len(chunks)
    batch = Batch(
        # The posterior sees no picture.
        observation=replace(observation, images={}).rows(torch.zeros(n, dtype=torch.long)),
        actions=chunks.float(),
        action_is_pad=torch.zeros(chunks.shape[:2], dtype=torch.bool, device=chunks.device),
        episode_index=torch.zeros(n, dtype=torch.long),
        frame_index=torch.zeros(n, dtype=torch.long),
    )
    latents = policy.encode_posterior(batch).mean
    decoded = policy.decode_latents(observation, latents[None])[0]
    return (decoded - chunks).abs().mean((-1, -2)).double()


def _spread(
    scores: Float[Tensor, "frame query cell"], coarse: int, fine: int
) -> Float[Tensor, "frame query row column"]:
    """Give every fine cell the score of the coarse cell that holds its centre."""
    nearest = ((torch.arange(fine, device=scores.device) + 0.5) * coarse / fine).long()
    square = rearrange(scores, "frame query (row column) -> frame query row column", row=coarse)
    return square[:, :, nearest][..., nearest]


def kind_of(view: SamplingPolicyView) -> str:
    """What to call a policy in a message."""
    if isinstance(view, LeRobotPolicyView):
        return view.policy.config.type
    return "ACT" if isinstance(view, ACTPolicy) else type(view).__name__


def _require_act(method: str, view: SamplingPolicyView) -> ACTPolicy:
    if not isinstance(view, ACTPolicy):
        raise ValueError(
            f"scoring_method {method}: needs ACT's latent, the policy is {kind_of(view)}; "
            "choose likelihood"
        )
    return view


def _require_consecutive(method: str, batch: Batch) -> None:
    steps, episodes = batch.frame_index, batch.episode_index
    if not bool((steps.diff() == 1).all() and (episodes == episodes[0]).all()):
        raise ValueError(
            f"scoring_method {method}: an ensemble needs consecutive steps of one episode"
        )
