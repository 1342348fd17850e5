"""From a policy and frames to densities: predict in bounded memory, calibrate, see what runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from landscapes.baselines import BaselineFrames, Baselines, baselines
from landscapes.density import MIN_SCALE, fit_bandwidth, fit_scale, smallest_scale
from landscapes.grid import Grid
from landscapes.landscape import HORIZONS, Predictions, predict
from landscapes.latent import LatentUse, evidence, latent_use
from landscapes.metrics import N_DRAWS, LandscapeMetrics, measure, measure_dimensions
from landscapes.space import ActionSpace, Plane
from policies.act import ACTPolicy
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Batch, SamplingPolicyView


@dataclass(frozen=True)
class Frames:
    """Frames to study, with the demonstrated actions just before them."""

    batch: Batch
    previous: Float[Tensor, "frame 2 action"]
    """Actions two and one steps ago; NaN where the episode had not begun."""

    @classmethod
    def of_episode(cls, episode: Batch, stride: int = 1, max_steps: int | None = None) -> "Frames":
        """Take frames of one whole episode.

        Args:
            episode: All its steps, in order.
            stride: Take every n-th.
            max_steps: Look at the first steps only.
        """
        actions = episode.actions[:, 0]
        unknown = torch.full_like(actions[:1], torch.nan)
        one_ago = torch.cat([unknown, actions[:-1]])
        two_ago = torch.cat([unknown, one_ago[:-1]])
        previous = torch.stack([two_ago, one_ago], dim=1)
        chosen = slice(0, max_steps, stride)
        return cls(episode.rows(chosen), previous[chosen])

    @classmethod
    def spread(cls, episodes: Sequence[Batch], n_frames: int) -> "Frames":
        """Take about ``n_frames`` frames, evenly spread over several whole episodes."""
        total = sum(map(len, episodes))
        stride = max(1, round(total / n_frames))
        return cls.concatenate([cls.of_episode(episode, stride) for episode in episodes])

    def rows(self, index: slice | Int[Tensor, " row"]) -> "Frames":
        """Some of the frames."""
        return Frames(self.batch.rows(index), self.previous[index])

    @classmethod
    def concatenate(cls, parts: "Sequence[Frames]") -> "Frames":
        """Join frames of several episodes."""
        return cls(
            Batch.concatenate([part.batch for part in parts]),
            torch.cat([part.previous for part in parts]),
        )

    def to(self, device: torch.device | str) -> "Frames":
        """Return a copy on ``device``."""
        return Frames(self.batch.to(device), self.previous.to(device))

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class Calibration:
    """Frames of other episodes, that scales are fitted on."""

    frames: Frames
    predictions: Predictions | None = None
    """The policy's answers there; None where its kernels are not fitted to demonstrations."""


def reachable_horizons(view: SamplingPolicyView, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Chunk steps to show: those asked for, else the usual ones that the chunk holds.

    Raises:
        ValueError: If one was asked for that the policy does not predict.
    """
    if wanted is None:
        return tuple(horizon for horizon in HORIZONS if horizon < view.chunk_size)
    beyond = [horizon for horizon in wanted if not 0 <= horizon < view.chunk_size]
    if beyond or not wanted:
        raise ValueError(
            f"horizons {list(wanted)}: the policy predicts chunks of {view.chunk_size}; give steps "
            f"in 0..{view.chunk_size - 1}"
        )
    return tuple(sorted(set(wanted)))


def predict_frames(
    view: SamplingPolicyView,
    batch: Batch,
    queries: Sequence[int],
    n_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    advance: Callable[[int], object] | None = None,
) -> Predictions:
    """Ask a policy about many frames, in pieces of bounded memory.

    Args:
        view: The policy, in eval mode, on the device of ``batch``.
        batch: Frames with their demonstrated chunks.
        queries: Chunk steps.
        n_samples: Action chunks drawn per frame (K).
        seed: Of the random numbers that all frames share.
        batch_size: Frames that go through the network together.
        advance: Told how many frames are done after each piece.

    Raises:
        ValueError: If there are no frames, or a query lies beyond a chunk.
    """
    if not len(batch):
        raise ValueError("there are no frames to ask the policy about")
    pieces = []
    for start in range(0, len(batch), batch_size):
        piece = batch.rows(slice(start, start + batch_size))
        pieces.append(predict(view, piece, queries, n_samples, seed))
        if advance is not None:
            advance(len(piece))
    return Predictions.concatenate(pieces)


def is_calibrated(view: SamplingPolicyView) -> bool:
    """Whether the scale of a policy's kernels is a residual that demonstrations tell.

    ACT's is: the L1 loss makes it a Laplace likelihood. The samples of other policies are smoothed
    by a bandwidth that the samples themselves choose.
    """
    return isinstance(view, ACTPolicy)


def kernel_scale(
    view: SamplingPolicyView,
    predictions: Predictions,
    calibration: Predictions | None,
    min_scale: float | Float[Tensor, " action"] = MIN_SCALE,
) -> Float[Tensor, "#frame query action"]:
    """Scale b of the kernels for :meth:`Predictions.mixture`.

    Args:
        view: Whose predictions they are.
        predictions: To be turned into densities.
        calibration: Predictions on other episodes, at the same queries. Given, b is fitted there
            by expectation maximisation, one for each query and dimension. None: leave-one-out
            bandwidths, one for each frame, query and dimension.
        min_scale: Floor of b, data units; of every dimension, or for each.

    Raises:
        ValueError: If the policy needs calibration frames and there are none, or they were asked
            about other chunk steps.
    """
    if calibration is not None:
        if calibration.queries != predictions.queries:
            raise ValueError(
                f"calibration is of chunk steps {list(calibration.queries)}, the predictions of "
                f"{list(predictions.queries)}"
            )
        scale = fit_scale(
            calibration.samples, calibration.expert, calibration.is_valid, min_scale=min_scale
        )
        return scale[None]
    if is_calibrated(view):
        raise ValueError("ACT's landscapes need calibration episodes: give at least one")
    return fit_bandwidth(predictions.samples.transpose(1, 2), min_scale=min_scale)


@dataclass(frozen=True)
class Scales:
    """Laplace scale b of the kernels, each fitted on what it is for.

    The scale that explains whole actions best is too wide for a part of them: where no sample is
    near in all dimensions at once, it has to bridge what lies between.
    """

    joint: Float[Tensor, "#frame query action"]
    """Of whole actions."""
    single: Float[Tensor, "#frame query action"]
    """Of every dimension by itself."""
    planes: Mapping[str, Float[Tensor, "#frame query 2"]]
    """Of boards over two of the dimensions, by the name of the plane."""

    @classmethod
    def fit(
        cls,
        view: SamplingPolicyView,
        predictions: Predictions,
        calibration: Predictions | None,
        space: ActionSpace,
        planes: Sequence[Plane] = (),
    ) -> "Scales":
        """Fit all of them as :func:`kernel_scale` does.

        Args:
            view: Whose predictions they are.
            predictions: To be turned into densities.
            calibration: Predictions on other episodes, or None.
            space: Of whole actions.
            planes: The boards; without any, actions have no parts to look at, and the joint scale
                stands for every dimension.

        Raises:
            ValueError: As :func:`kernel_scale`.
        """
        floor = smallest_scale(space.size, predictions.samples.device)

        def fitted(dims: Sequence[int]) -> Float[Tensor, "#frame query part"]:
            known = None if calibration is None else calibration.dimensions(dims)
            return kernel_scale(view, predictions.dimensions(dims), known, floor[list(dims)])

        joint = kernel_scale(view, predictions, calibration, floor)
        if not planes:
            return cls(joint, joint, {})
        single = torch.cat([fitted([dim]) for dim in range(len(space.axes))], dim=-1)
        return cls(joint, single, {plane.name: fitted(plane.dims) for plane in planes})

    @classmethod
    def same(cls, scale: Float[Tensor, "#frame query action"], planes: Sequence[Plane]) -> "Scales":
        """One scale for all, where it is given."""
        return cls(scale, scale, {plane.name: scale[..., list(plane.dims)] for plane in planes})

    @classmethod
    def concatenate(cls, parts: "Sequence[Scales]", n_frames: Sequence[int]) -> "Scales":
        """Join those of several groups of frames.

        Args:
            parts: Of each group.
            n_frames: Its frames.
        """

        def joined(each: Sequence[Tensor]) -> Tensor:
            whole = zip(each, n_frames, strict=True)
            return torch.cat([scale.expand(length, -1, -1) for scale, length in whole])

        return cls(
            joined([part.joint for part in parts]),
            joined([part.single for part in parts]),
            {name: joined([part.planes[name] for part in parts]) for name in parts[0].planes},
        )

    def at(self, places: Sequence[int]) -> "Scales":
        """Only those of some of the predictions' queries.

        Args:
            places: Of the queries.
        """
        chosen = list(places)
        planes = {name: scale[:, chosen] for name, scale in self.planes.items()}
        return Scales(self.joint[:, chosen], self.single[:, chosen], planes)

    def of_marginal(self, plane: Plane | None) -> Float[Tensor, "#frame query 2"] | None:
        """For the board over a plane; None for one that needs whole actions."""
        return None if plane is None or plane.is_conditional else self.planes[plane.name]


def measure_frames(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    frames: Frames,
    horizons: Sequence[int],
    grid: Grid | ActionSpace,
    calibration: Calibration | None = None,
    seed: int = 0,
    n_draws: int = N_DRAWS,
) -> LandscapeMetrics:
    """Measure densities against the demonstration and against baselines.

    Args:
        predictions: On ``frames``, at least at ``horizons``.
        scale: Of the kernels, at the predictions' queries.
        frames: What was predicted.
        horizons: Chunk steps to measure.
        grid: The board of two dimensions; else the box that actions lie in.
        calibration: Frames that baselines are fitted on; none are compared without.
        seed: Of the draws.
        n_draws: Actions drawn from each density.
    """
    places = [predictions.queries.index(horizon) for horizon in horizons]
    known = _known_to_baselines(frames, calibration, horizons)
    return measure(
        predictions.at(horizons),
        scale[:, places],
        grid,
        frames.batch.episode_index,
        frames.batch.frame_index,
        None if known is None else baselines(*known, grid),
        n_draws,
        seed,
    )


def measure_parts(
    predictions: Predictions,
    scales: Scales,
    frames: Frames,
    horizons: Sequence[int],
    space: ActionSpace,
    planes: Sequence[Plane],
    resolution: int,
    calibration: Calibration | None = None,
    seed: int = 0,
    n_draws: int = N_DRAWS,
    single: bool = True,
) -> dict[str, LandscapeMetrics]:
    """Measure every single dimension, and the boards over two of them.

    Always marginals: what a conditional slice holds is a prediction, not what was demonstrated.

    Args:
        predictions: On ``frames``, at least at ``horizons``.
        scales: Of the kernels, at the predictions' queries.
        frames: What was predicted.
        horizons: Chunk steps to measure.
        space: Of whole actions.
        planes: The boards.
        resolution: Cells along each axis of a board.
        calibration: Frames that baselines are fitted on; none are compared without.
        seed: Of the draws.
        n_draws: Actions drawn from each density.
        single: Whether to measure single dimensions, most of the work, or planes alone.

    Returns:
        Metrics by the name of the dimension or plane.
    """
    shown = predictions.at(horizons)
    places = [predictions.queries.index(horizon) for horizon in horizons]
    episode_index, frame_index = frames.batch.episode_index, frames.batch.frame_index
    known = _known_to_baselines(frames, calibration, horizons)

    def compared(dims: Sequence[int], grid: Grid | ActionSpace) -> Baselines | None:
        if known is None:
            return None
        fitted, scored = (each.dimensions(dims) for each in known)
        return baselines(fitted, scored, grid)

    parts: dict[str, LandscapeMetrics] = {}
    if single:
        lines = {
            axis.name: compared([dim], replace(space, axes=(axis,)))
            for dim, axis in enumerate(space.axes)
        }
        parts |= measure_dimensions(
            shown,
            scales.single[:, places],
            space,
            episode_index,
            frame_index,
            {name: each for name, each in lines.items() if each is not None} or None,
            n_draws,
            seed,
        )
    for plane in planes:
        grid = plane.grid(resolution)
        parts[plane.name] = measure(
            shown.dimensions(plane.dims),
            scales.planes[plane.name][:, places],
            grid,
            episode_index,
            frame_index,
            compared(plane.dims, grid),
            n_draws,
            seed,
        )
    return parts


def _known_to_baselines(
    frames: Frames, calibration: Calibration | None, horizons: Sequence[int]
) -> tuple[BaselineFrames, BaselineFrames] | None:
    """What baselines are fitted on and scored on; None without calibration frames."""
    if calibration is None:
        return None
    fitted, scored = (
        BaselineFrames.of(each.batch, horizons, each.previous)
        for each in (calibration.frames, frames)
    )
    return fitted, scored


def sample_gap(
    predictions: Predictions, scale: Float[Tensor, "#frame query action"]
) -> dict[str, float]:
    """NLL of half the samples minus that of all, nats: below 0.05 more samples change little."""
    half = predictions.samples.shape[1] // 2
    fewer = replace(predictions, samples=predictions.samples[:, :half])
    values = {}
    all_nll, half_nll = (
        -each.mixture(scale).log_density(predictions.expert[:, :, None])[..., 0]
        for each in (predictions, fewer)
    )
    for place, query in enumerate(predictions.queries):
        valid = predictions.is_valid[:, place]
        if bool(valid.any()):
            gap = (half_nll - all_nll)[valid, place].mean()
            values[f"k{query}/sample_gap"] = float(gap)
    return values


def latent_numbers(
    policy: ACTPolicy,
    frames: Frames,
    predictions: Predictions,
    scale: Float[Tensor, "query action"],
    n_evidence_frames: int,
    seed: int = 0,
    min_scale: float | Float[Tensor, " action"] = MIN_SCALE,
) -> tuple[LatentUse, dict[str, float]]:
    """How much ACT's latent is used, and whether samples from its prior find the demonstration.

    Args:
        policy: With a posterior.
        frames: Demonstrated frames.
        predictions: On them, at the queries of ``scale``.
        scale: Laplace scale b of each query.
        n_evidence_frames: Frames for the importance-weighted evidence, spread over the frames.
        seed: Of the posterior's samples.
        min_scale: Floor of scales, data units; of every dimension, or for each.

    Returns:
        What :func:`latent_use` says, and all metric names with values. ``sigma_z_px``, a mean over
        dimensions, is left out where there may be several units.
    """
    use = latent_use(policy, frames.batch, predictions, scale)
    rows = torch.linspace(0, len(frames) - 1, min(n_evidence_frames, len(frames))).round().long()
    chosen = predictions.rows(rows)
    prior = chosen.mixture(scale[None]).log_density(chosen.expert[:, :, None])[..., 0]
    found = evidence(
        policy,
        frames.batch.rows(rows),
        predictions.queries,
        scale,
        n_samples=predictions.samples.shape[1],
        seed=seed,
        min_scale=min_scale,
    )
    queries = predictions.queries
    values = use.scalars(queries) | found.scalars(queries, prior)
    if predictions.point.shape[-1] != 2:
        values = {name: each for name, each in values.items() if not name.endswith("sigma_z_px")}
    return use, values


def executed_actions(
    chunks: Float[Tensor, "frame chunk action"], controller: ActionQueue | TemporalEnsembler
) -> tuple[Float[Tensor, "frame action"], Int[Tensor, " frame"] | None]:
    """What a controller would execute at each step of an episode, and how old its chunk is.

    Args:
        chunks: Predicted at consecutive steps from the start of an episode.
        controller: Queue or ensemble; it is reset.

    Returns:
        Actions, and the steps since their chunk was predicted (None for an ensemble).
    """
    controller.reset(1)
    actions, ages, age = [], [], 0
    for chunk in chunks:
        fresh = controller.wants_prediction()
        age = 0 if fresh else age + 1
        actions.append(controller.step(chunk[None] if fresh else None)[0])
        ages.append(age)
    is_queue = isinstance(controller, ActionQueue)
    return torch.stack(actions), torch.tensor(ages) if is_queue else None


def executed_along(
    view: SamplingPolicyView,
    batch: Batch,
    controller: ActionQueue | TemporalEnsembler,
    batch_size: int = 64,
) -> tuple[Float[Tensor, "frame action"], Int[Tensor, " frame"] | None]:
    """What a policy would execute along an episode, had it been acting since the first frame.

    A queue asks for a chunk now and then: only those are predicted.

    Args:
        view: The policy, on the device of ``batch``.
        batch: Consecutive frames of one episode.
        controller: Queue or ensemble; it is reset.
        batch_size: Frames that go through the network together.

    Returns:
        As :func:`executed_actions`.
    """
    stride = controller.n_action_steps if isinstance(controller, ActionQueue) else 1
    needed = torch.arange(0, len(batch), stride)
    fresh = torch.cat(
        [view.predict_chunk(batch.observation.rows(rows)) for rows in needed.split(batch_size)]
    )
    chunks = fresh.new_full((len(batch), *fresh.shape[1:]), torch.nan)
    chunks[needed] = fresh
    return executed_actions(chunks, controller)
