"""Numbers that say whether to believe a landscape: likelihood, calibration, sharpness, modes.

Everything is computed per frame and chunk step, float64 and in data units (PushT: px). Frames of
one episode resemble each other, so every interval resamples whole episodes.

Actions of any number of dimensions are measured (:func:`measure`), whole or part by part
(:func:`measure_parts`): single dimensions and planes of two, whose densities are exact marginals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from landscapes.baselines import AGENT, Baselines
from landscapes.density import Mixture, laplace_log_density
from landscapes.grid import Grid
from landscapes.landscape import Predictions
from landscapes.latent import COLLAPSE_KL_NATS, LatentUse
from landscapes.regions import modes, region_area
from landscapes.space import ActionSpace

N_DRAWS = 2000
"""Actions drawn from each density, for its entropy and for the level of the expert's action."""
DRAWS_AT_ONCE = 500
"""Draws whose distances to all samples are held together: a matter of speed alone."""
FROZEN_SHARE = 10 / 512
"""Scale b of the NLL that does not drift with calibration, as a share of the board's or the axis'
length (PushT: 10 px)."""
ON_A_BOARD = frozenset(
    (
        "area_rank",
        "hdr50_px2",
        "hdr80_px2",
        "effective_area_px2",
        "modes",
        "out_of_board",
        "area_rank_med",
        "modes_mean",
        "multimodal_frac",
    )
)
"""What is known of two dimensions only."""
AT_THE_PEAK = frozenset(("dist_mean_argmax", "dist_executed_argmax", "regret", "regret_med"))
"""What is known of one or two dimensions only: the densest action has no closed form in more."""
PART_NUMBERS = (
    "nll",
    "skill_vs_agent",
    "energy",
    "c50",
    "c80",
    "c95",
    "ks",
    "modes_mean",
    "multimodal_frac",
    "out_of_board",
)
"""What is reported of single dimensions and planes, where it is known."""

NEGLIGIBLE_NATS = 0.05
"""Differences below this are none: a Laplace kernel blurred by 0.2 b gains 0.04 nats."""
COLLAPSE_SPREAD_RATIO = 0.2
"""R_z below which the latent moves predictions less than the noise does."""
MULTIMODAL_SHARE = 0.05
"""Share of frames with several modes above which a policy is called multimodal."""
MULTIMODAL_EXCESS_NATS = 0.2
"""Excess entropy from which several modes are more than decoration."""
MULTIMODAL_VALUE_NATS = 0.1
"""Likelihood that the mixture must gain over its executed action alone."""
BETWEEN_MODES_NATS = 2.0
"""Regret from which the executed action lies where the policy itself expects none."""
OVERCONFIDENT_C95 = 0.9
"""Coverage of 95 % regions below which they are too small; b x 0.8 gives 0.89."""
UNDERCONFIDENT_C50 = 0.6
"""Coverage of 50 % regions above which they are too large; b x 1.25 gives 0.62."""
OVERFIT_SCALE_RATIO = 1.3
"""Residual scale on held-out over training episodes from which a policy has memorised."""

Column = Float[np.ndarray, "frame query"]


@dataclass(frozen=True)
class LandscapeMetrics:
    """What the landscapes of some frames are worth, for each frame and chunk step.

    What needs the demonstrated action is NaN where the demonstration has ended; all summaries leave
    those frames out. What actions of this many dimensions do not have is NaN throughout, and gives
    no key (:data:`ON_A_BOARD`, :data:`AT_THE_PEAK`).
    """

    queries: tuple[int, ...]
    """Chunk steps."""
    episode_index: Int[np.ndarray, " frame"]
    """Number of each frame's episode."""
    frame_index: Int[np.ndarray, " frame"]
    """Step within the episode."""
    is_valid: Bool[np.ndarray, "frame query"]
    """False where the demonstration has ended before that step."""
    log_area: float
    """Log of the area of the board, or of the volume of the box that actions lie in: NLL of the
    uniform density, nats."""
    scale: Float[np.ndarray, "query action"]
    """Laplace scale b of the kernels, mean over frames, data units."""
    baselines: Mapping[str, Column]
    """NLL of each baseline on the same frames, nats."""
    nll: Column
    """``-log p(a* | o)`` of the demonstrated action a*, nats; exact, not read off the board."""
    nll_z0: Column
    """The same for one kernel at the executed action."""
    nll_frozen: Column
    """The same for the mixture with b at ``FROZEN_SHARE`` of the axes."""
    energy: Column
    """``E|A - a*| - E|A - A'| / 2`` of the raw samples (Gneiting and Raftery 2007), data units:
    strictly proper and free of a bandwidth, so that it compares policies of different kinds. In
    one dimension it is the CRPS."""
    hpd_level: Column
    """u, mass of the actions that are denser than the demonstrated one: uniform in 0..1 when the
    density is calibrated; near 1 the demonstration is a surprise."""
    area_rank: Column
    """Share of the board that is at least as dense as the cell of the demonstrated action."""
    entropy: Column
    """H, nats."""
    excess_entropy: Column
    """H minus the kernels' own ``sum_d 1 + log 2 b_d``: what differing samples add, in 0..log K."""
    hdr50_px2: Column
    """Area of the smallest region that holds half of the mass on the board, data units^2."""
    hdr80_px2: Column
    """Area of the smallest region that holds 80 %."""
    modes: Column
    """Pieces of the 80 % region that hold at least 5 % of the mass (:func:`regions.modes`)."""
    dist_mean_argmax: Column
    """From the mean of the density to its densest action, data units."""
    dist_executed_argmax: Column
    """From the executed to the densest action, data units."""
    regret: Column
    """``max log p - log p(executed)``, nats: large when execution averages across modes."""
    out_of_board: Column
    """Mass outside the board."""

    @property
    def gain_over_uniform(self) -> Column:
        """Nats by which the demonstrated action is more likely than under the uniform density."""
        return self.log_area - self.nll

    @property
    def z_value(self) -> Column:
        """``nll_z0 - nll``, nats: what all samples explain beyond the executed action alone."""
        return self.nll_z0 - self.nll

    @property
    def effective_area_px2(self) -> Column:
        """``e^H``: area of the uniform density of the same entropy, data units^2."""
        return np.exp(self.entropy)

    def summary(self) -> dict[str, float]:
        """Mean over frames (``_med``: median) of each quantity, as ``k{query}/{name}``.

        ``c50``, ``c80``, ``c95`` are the shares of demonstrated actions inside the policy's
        credible regions (``mean[u <= q]``). ``ks`` is the Kolmogorov-Smirnov distance
        ``sup |F(u) - u|`` of u from uniform; no factor sqrt(n), so that it does not grow with the
        number of frames (n independent frames of a calibrated density stay below
        ``1.36 / sqrt(n)`` in 95 % of cases). ``skill_vs_agent`` is the NLL of the agent baseline
        minus the policy's. A chunk step without a valid frame gives no key.
        """
        ones = np.ones((1, len(self.episode_index)))
        return {
            f"k{query}/{name}": float(value[0])
            for place, query in enumerate(self.queries)
            for name, value in self._statistics(place, ones).items()
        }

    def intervals(
        self,
        n_bootstrap: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of :meth:`summary`, whole episodes resampled.

        A chunk step that only one episode reaches gives no key: one episode says nothing about
        others. Resampling adds some distance to ``ks``; its interval leans upwards.

        Args:
            n_bootstrap: Resamples.
            level: Of the intervals.
            seed: Of the resamples.
            names: Of the quantities; all when None.
        """
        values = {}
        for place, query in enumerate(self.queries):
            weights = self._resample(place, n_bootstrap, seed)
            if weights is not None:
                for name, resampled in self._statistics(place, weights, names).items():
                    values[f"k{query}/{name}"] = _interval(resampled, level)
        return values

    def rows(self) -> list[dict[str, int | float]]:
        """One row per valid frame and chunk step, for a table."""
        columns = self._columns()
        return [
            {
                "episode": int(self.episode_index[frame]),
                "frame": int(self.frame_index[frame]),
                "k": query,
                **{name: float(values[frame, place]) for name, values in columns.items()},
            }
            for frame in range(len(self.episode_index))
            for place, query in enumerate(self.queries)
            if self.is_valid[frame, place]
        ]

    def episode_rows(self) -> list[dict[str, int | float]]:
        """One row per episode and chunk step, with the names of :meth:`summary`."""
        rows: list[dict[str, int | float]] = []
        for place, query in enumerate(self.queries):
            episodes = np.unique(self.episode_index[self.is_valid[:, place]])
            if not len(episodes):
                continue
            belongs = self.episode_index == episodes[:, None]
            statistics = self._statistics(place, belongs.astype(float))
            counts = (belongs & self.is_valid[:, place]).sum(1)
            rows += [
                {
                    "episode": int(episode),
                    "k": query,
                    "n_frames": int(counts[row]),
                    **{name: float(values[row]) for name, values in statistics.items()},
                }
                for row, episode in enumerate(episodes)
            ]
        return sorted(rows, key=lambda row: (row["episode"], row["k"]))

    def reading(
        self, latent: LatentUse | None = None, train: "LandscapeMetrics | None" = None
    ) -> list[str]:
        """Say in plain sentences what the numbers mean; no sentence where nothing stands out.

        Args:
            latent: Of the same policy at the same chunk steps. Given, a collapse is one only if the
                latent itself carries nothing.
            train: The same policy on training episodes, with the scale fitted there.

        Raises:
            ValueError: If ``latent`` or ``train`` has other chunk steps.
        """
        if latent is not None and len(latent.spread_ratio) != len(self.queries):
            raise ValueError(
                f"latent holds {len(latent.spread_ratio)} chunk steps, the metrics "
                f"{list(self.queries)}"
            )
        if train is not None and train.queries != self.queries:
            raise ValueError(
                f"train holds chunk steps {list(train.queries)}, the metrics {list(self.queries)}"
            )
        summary = self.summary()
        sentences = []
        for place, query in enumerate(self.queries):
            if self.is_valid[:, place].any():
                prefix = f"k{query}/"
                values = {
                    key.removeprefix(prefix): value
                    for key, value in summary.items()
                    if key.startswith(prefix)
                }
                found = [
                    *self._read_modes(place, values, latent),
                    *self._read_calibration(place, values, train),
                ]
                sentences += [f"k={query}: {sentence}" for sentence in found]
        return sentences

    def _read_modes(
        self, place: int, values: dict[str, float], latent: LatentUse | None
    ) -> list[str]:
        """Collapse, real and decorative modes, execution between modes."""
        found = []
        excess, z_value = values["excess_entropy"], values["z_value"]
        is_collapsed = excess < NEGLIGIBLE_NATS and abs(z_value) < NEGLIGIBLE_NATS
        evidence = f"excess entropy {excess:.3f} nats, nll(z0) - nll {z_value:+.3f} nats"
        if latent is not None:
            ratio = float(latent.spread_ratio[place])
            is_collapsed &= latent.kl_nats < COLLAPSE_KL_NATS and ratio < COLLAPSE_SPREAD_RATIO
            evidence += f", KL {latent.kl_nats:.3f} nats, R_z {ratio:.2f}"
        if is_collapsed:
            found.append(f"collapse: all samples agree within the noise b ({evidence}).")
        share = values.get("multimodal_frac", 0.0)
        if share > MULTIMODAL_SHARE:
            evidence = (
                f"{share:.0%} of frames have several modes, excess entropy {excess:.2f} nats, "
                f"nll(z0) - nll {z_value:+.2f} nats"
            )
            is_informed = values["nll"] < self.log_area
            if excess > MULTIMODAL_EXCESS_NATS and z_value > MULTIMODAL_VALUE_NATS and is_informed:
                found.append(f"real multimodality: the modes explain demonstrations ({evidence}).")
            else:
                found.append(
                    f"decorative modes: they hardly help to explain demonstrations ({evidence})."
                )
        # NaN, where it is not known, is not large.
        regret = self.regret[self.is_valid[:, place], place]
        between = float((regret > BETWEEN_MODES_NATS).mean())
        if between > MULTIMODAL_SHARE:
            found.append(
                "between modes: the policy itself hardly expects the executed action (ACT: z=0; "
                f"regret above {BETWEEN_MODES_NATS:g} nats in {between:.0%} of frames, median "
                f"{values['regret_med']:.2f} nats)."
            )
        return found

    def _read_calibration(
        self, place: int, values: dict[str, float], train: "LandscapeMetrics | None"
    ) -> list[str]:
        """Regions that are too small or too large, and residuals that grew off the training set."""
        found = []
        if values["c95"] < OVERCONFIDENT_C95:
            found.append(
                f"overconfident: 95 % regions hold {values['c95']:.0%} of the demonstrated actions "
                f"(below {OVERCONFIDENT_C95:.0%}; KS {values['ks']:.2f})."
            )
            if train is not None:
                ratio = float(np.mean(self.scale[place] / train.scale[place]))
                if ratio > OVERFIT_SCALE_RATIO:
                    found.append(
                        f"overfit: residuals are {ratio:.2f} times those on training episodes "
                        f"(above {OVERFIT_SCALE_RATIO:g})."
                    )
        if values["c50"] > UNDERCONFIDENT_C50:
            found.append(
                f"underconfident: 50 % regions hold {values['c50']:.0%} of the demonstrated "
                f"actions (above {UNDERCONFIDENT_C50:.0%}; KS {values['ks']:.2f})."
            )
        return found

    def _columns(self) -> dict[str, Column]:
        """Everything that is known of single frames, by the name it has in tables."""
        columns = {
            "nll": self.nll,
            "nll_z0": self.nll_z0,
            "nll_frozen": self.nll_frozen,
            "z_value": self.z_value,
            "gain_over_uniform": self.gain_over_uniform,
            "energy": self.energy,
            "hpd_level": self.hpd_level,
            "area_rank": self.area_rank,
            "entropy": self.entropy,
            "excess_entropy": self.excess_entropy,
            "effective_area_px2": self.effective_area_px2,
            "hdr50_px2": self.hdr50_px2,
            "hdr80_px2": self.hdr80_px2,
            "modes": self.modes,
            "dist_mean_argmax": self.dist_mean_argmax,
            "dist_executed_argmax": self.dist_executed_argmax,
            "regret": self.regret,
            "out_of_board": self.out_of_board,
        }
        if AGENT in self.baselines:
            columns["skill_vs_agent"] = self.baselines[AGENT] - self.nll
        return {name: values for name, values in columns.items() if name not in self._unknown()}

    def _unknown(self) -> frozenset[str]:
        """Names of what actions of this many dimensions do not have."""
        n_dims = self.scale.shape[-1]
        if n_dims == 2:
            return frozenset()
        return ON_A_BOARD if n_dims == 1 else ON_A_BOARD | AT_THE_PEAK

    def _statistics(
        self,
        place: int,
        weights: Float[np.ndarray, "resample frame"],
        names: Sequence[str] | None = None,
    ) -> dict[str, Float[np.ndarray, " resample"]]:
        """Summaries of one chunk step for several weightings of the frames; all, or some names.

        Empty when no frame is valid; a weighting without any valid frame is the caller's mistake.
        """
        valid = self.is_valid[:, place]
        if not valid.any():
            return {}
        columns = {name: values[valid, place] for name, values in self._columns().items()}
        weights = weights[:, valid]
        total = weights.sum(1)

        def mean(values: Float[np.ndarray, " frame"]) -> Float[np.ndarray, " resample"]:
            return weights @ values / total

        def median(values: Float[np.ndarray, " frame"]) -> Float[np.ndarray, " resample"]:
            return _weighted_median(values, weights)

        level = columns["hpd_level"]
        found = {
            "nll": lambda: mean(columns["nll"]),
            "skill_vs_agent": lambda: mean(columns["skill_vs_agent"]),
            "energy": lambda: mean(columns["energy"]),
            "c50": lambda: mean((level <= 0.5).astype(float)),
            "c80": lambda: mean((level <= 0.8).astype(float)),
            "c95": lambda: mean((level <= 0.95).astype(float)),
            "ks": lambda: _weighted_ks(level, weights),
            "area_rank_med": lambda: median(columns["area_rank"]),
            "excess_entropy": lambda: mean(columns["excess_entropy"]),
            "hdr80_px2": lambda: mean(columns["hdr80_px2"]),
            "modes_mean": lambda: mean(columns["modes"]),
            "multimodal_frac": lambda: mean((columns["modes"] >= 2).astype(float)),
            "regret_med": lambda: median(columns["regret"]),
            "out_of_board": lambda: mean(columns["out_of_board"]),
            "nll_frozen": lambda: mean(columns["nll_frozen"]),
            "nll_z0": lambda: mean(columns["nll_z0"]),
            "z_value": lambda: mean(columns["z_value"]),
        }
        left_out = self._unknown() | (set() if AGENT in self.baselines else {"skill_vs_agent"})
        return {
            name: compute()
            for name, compute in found.items()
            if name not in left_out and (names is None or name in names)
        }

    def _resample(
        self, place: int, n_bootstrap: int, seed: int
    ) -> Float[np.ndarray, "resample frame"] | None:
        """How often each frame occurs when the episodes that reach a chunk step are resampled."""
        reached = np.unique(self.episode_index[self.is_valid[:, place]])
        if len(reached) < 2:
            return None
        generator = np.random.default_rng(seed)
        uniform = np.full(len(reached), 1 / len(reached))
        counts = generator.multinomial(len(reached), uniform, size=n_bootstrap)
        belongs = self.episode_index == reached[:, None]
        return (counts @ belongs).astype(float)


def part_summary(parts: Mapping[str, LandscapeMetrics]) -> dict[str, float]:
    """What is reported of single dimensions and planes, as ``k{query}/{part}/{name}``."""
    return {
        _part_key(part, key): value
        for part, metrics in parts.items()
        for key, value in metrics.summary().items()
        if key.split("/")[1] in PART_NUMBERS
    }


def part_intervals(parts: Mapping[str, LandscapeMetrics]) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of :func:`part_summary`, whole episodes resampled."""
    return {
        _part_key(part, key): ends
        for part, metrics in parts.items()
        for key, ends in metrics.intervals(names=PART_NUMBERS).items()
    }


def _part_key(part: str, key: str) -> str:
    query, name = key.split("/")
    return f"{query}/{part}/{name}"


@dataclass(frozen=True)
class PairedDifference:
    """One summary of a minus that of b, on the same frames."""

    key: str
    difference: float
    low: float
    """Lower end of the bootstrap interval over episodes."""
    high: float
    """Upper end."""
    n_episodes: int
    """Episodes that were resampled."""


def paired_difference(
    a: LandscapeMetrics,
    b: LandscapeMetrics,
    key: str,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compare two policies or checkpoints on the same frames.

    Both are resampled together, so that what is hard for both cancels.

    Args:
        a: Metrics of the one.
        b: Metrics of the other.
        key: Of :meth:`LandscapeMetrics.summary`, such as ``k8/nll``.
        n_bootstrap: Resamples of whole episodes.
        level: Of the interval.
        seed: Of the resamples.

    Raises:
        ValueError: If the frames differ, one lacks the key, or there is but one episode.
    """
    mine, theirs = a.summary(), b.summary()
    if key not in mine or key not in theirs:
        both = sorted(mine.keys() & theirs.keys())
        raise ValueError(f"{key!r} is not a summary of both: choose one of {both}")
    query, name = key.split("/")
    place_a = a.queries.index(int(query.removeprefix("k")))
    place_b = b.queries.index(int(query.removeprefix("k")))
    is_same = (
        np.array_equal(a.episode_index, b.episode_index)
        and np.array_equal(a.frame_index, b.frame_index)
        and np.array_equal(a.is_valid[:, place_a], b.is_valid[:, place_b])
    )
    if not is_same:
        raise ValueError("the two were measured on different frames: measure both on the same")
    weights = a._resample(place_a, n_bootstrap, seed)
    if weights is None:
        raise ValueError(f"only one episode reaches {query}: an interval needs at least two")
    resampled = a._statistics(place_a, weights)[name] - b._statistics(place_b, weights)[name]
    low, high = _interval(resampled, level)
    n_episodes = len(np.unique(a.episode_index[a.is_valid[:, place_a]]))
    return PairedDifference(key, mine[key] - theirs[key], low, high, n_episodes)


def measure(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    grid: Grid | ActionSpace,
    episode_index: Int[Tensor, " frame"],
    frame_index: Int[Tensor, " frame"],
    baselines: Baselines | None = None,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> LandscapeMetrics:
    """Measure the densities of a policy on demonstrated frames.

    Frame by frame, in bounded memory. The random numbers of a frame depend on the seed and on which
    frame it is, not on the frames around it: two checkpoints are compared on equal draws.

    Args:
        predictions: Samples, executed actions and demonstrations.
        scale: Laplace scale b of the kernels, as for :meth:`Predictions.mixture`.
        grid: The board of two dimensions; else the box that actions lie in.
        episode_index: Number of each frame's episode.
        frame_index: Step of each frame within its episode.
        baselines: On the same frames and queries; no ``skill_vs_agent`` without.
        n_draws: Actions drawn from each density.
        seed: Of the draws.

    Raises:
        ValueError: If there are no frames, predictions or scales are not finite, actions have other
            dimensions than the board or the box, or the baselines were computed at other queries or
            frames.
    """
    _check(predictions, scale, grid, baselines)
    frozen = FROZEN_SHARE * torch.tensor(grid.size, dtype=torch.float64)
    columns = _measure_frames(
        predictions,
        scale,
        frozen.expand(len(predictions.queries), -1),
        grid if isinstance(grid, Grid) else None,
        episode_index,
        frame_index,
        n_draws,
        seed,
    )
    return LandscapeMetrics(
        queries=predictions.queries,
        episode_index=episode_index.cpu().numpy(),
        frame_index=frame_index.cpu().numpy(),
        is_valid=predictions.is_valid.cpu().numpy(),
        log_area=-grid.log_uniform,
        scale=scale.double().expand(len(predictions.point), -1, -1).mean(0).cpu().numpy(),
        baselines={} if baselines is None else baselines.nll,
        **columns,
    )


def measure_dimensions(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    space: ActionSpace,
    episode_index: Int[Tensor, " frame"],
    frame_index: Int[Tensor, " frame"],
    baselines: Mapping[str, Baselines] | None = None,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> dict[str, LandscapeMetrics]:
    """Measure the exact marginal density of every single dimension, in one pass.

    Args:
        predictions: Samples, executed actions and demonstrations.
        scale: Laplace scale b of the kernels.
        space: Names of the dimensions and the box that actions lie in.
        episode_index: Number of each frame's episode.
        frame_index: Step of each frame within its episode.
        baselines: Of each dimension by its name; no ``skill_vs_agent`` without.
        n_draws: Values drawn from each density.
        seed: Of the draws.

    Returns:
        Name of a dimension to its metrics.

    Raises:
        ValueError: As :func:`measure`.
    """
    _check(predictions, scale, space, None)
    n_dims = len(space.axes)
    # A dimension of a chunk step is measured like a chunk step of one dimension.
    flat = replace(
        predictions,
        queries=tuple(range(n_dims * len(predictions.queries))),
        samples=rearrange(
            predictions.samples, "frame sample query action -> frame sample (query action) 1"
        ),
        point=rearrange(predictions.point, "frame query action -> frame (query action) 1"),
        expert=rearrange(predictions.expert, "frame query action -> frame (query action) 1"),
        is_valid=predictions.is_valid.repeat_interleave(n_dims, dim=1),
    )
    frozen = FROZEN_SHARE * torch.tensor(space.size, dtype=torch.float64)
    columns = _measure_frames(
        flat,
        rearrange(scale, "frame query action -> frame (query action) 1"),
        frozen.repeat(len(predictions.queries))[:, None],
        None,
        episode_index,
        frame_index,
        n_draws,
        seed,
    )
    mean_scale = scale.double().mean(0).cpu().numpy()
    return {
        axis.name: LandscapeMetrics(
            queries=predictions.queries,
            episode_index=episode_index.cpu().numpy(),
            frame_index=frame_index.cpu().numpy(),
            is_valid=predictions.is_valid.cpu().numpy(),
            log_area=math.log(axis.high - axis.low),
            scale=mean_scale[:, dim : dim + 1],
            baselines={} if baselines is None else baselines[axis.name].nll,
            **{name: values[:, dim::n_dims] for name, values in columns.items()},
        )
        for dim, axis in enumerate(space.axes)
    }


def _measure_frames(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    frozen: Float[Tensor, "query action"],
    grid: Grid | None,
    episode_index: Int[Tensor, " frame"],
    frame_index: Int[Tensor, " frame"],
    n_draws: int,
    seed: int,
) -> dict[str, Column]:
    """Everything about the densities of all frames, by the names of LandscapeMetrics."""
    scale = scale.double().expand(len(predictions.point), -1, -1)
    device = predictions.samples.device
    measured = []
    for frame, (episode, step) in enumerate(
        zip(episode_index.tolist(), frame_index.tolist(), strict=True)
    ):
        state = np.random.SeedSequence([seed, episode, step]).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
        measured.append(
            _measure_frame(
                rearrange(
                    predictions.samples[frame], "sample query action -> query sample action"
                ).double(),
                predictions.point[frame].double(),
                predictions.expert[frame].double(),
                scale[frame],
                frozen.to(device),
                grid,
                n_draws,
                generator,
            )
        )
    columns = {
        name: torch.stack([frame[name] for frame in measured]).double().cpu().numpy()
        for name in measured[0]
    }
    is_valid = predictions.is_valid.cpu().numpy()
    for name in ("nll", "nll_z0", "nll_frozen", "energy", "hpd_level", "area_rank"):
        columns[name] = np.where(is_valid, columns[name], np.nan)
    return columns


def area_rank(
    scores: Float[Tensor, "*batch row column"], actions: Float[Tensor, "*batch 2"], grid: Grid
) -> Float[Tensor, "*batch"]:
    """Share of the board that scores at least as high as the cell of an action.

    Invariant to monotone transforms of the scores, so that it compares methods of any unit. An
    action beyond the border counts as in the nearest cell; a flat map gives 1.
    """
    row, column = grid.cells(actions).unbind(-1)
    flat = scores.flatten(-2)
    here = flat.gather(-1, (row * grid.resolution + column)[..., None])
    return (flat >= here).double().mean(-1)


def energy_score(
    samples: Float[Tensor, "*batch sample action"], actions: Float[Tensor, "*batch action"]
) -> Float[Tensor, "*batch"]:
    """``E|A - a| - E|A - A'| / 2`` with A' another sample than A, data units.

    Unbiased for the policy's own density. A single sample stands for a policy that answers in one
    way only.
    """
    n_samples = samples.shape[-2]
    distance = (samples - actions[..., None, :]).norm(dim=-1).mean(-1)
    spread = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist")
    return distance - spread.sum((-1, -2)) / (2 * max(n_samples * (n_samples - 1), 1))


def densest(
    centres: Float[Tensor, "*batch sample action"], scale: Float[Tensor, "*batch action"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch action"]]:
    """Find the highest log density of an equally weighted Laplace mixture, and where it is. Exact.

    For one dimension or two.

    Along each axis the density is a sum of ``exp(-|.|)``, convex between neighbouring centres, so
    that the maximum lies where the x of one centre meets the y of another: not always on a centre,
    and never elsewhere. Costs K^3.
    """
    n_samples, n_dims = centres.shape[-2:]
    kernels = [
        torch.exp(
            -(centres[..., :, None, axis] - centres[..., None, :, axis]).abs()
            / scale[..., axis, None, None]
        )
        for axis in range(n_dims)
    ]
    if n_dims == 1:
        density, place = kernels[0].sum(-1).max(-1)
        log_density = density.log() - math.log(n_samples) - torch.log(2 * scale).sum(-1)
        return log_density, centres.gather(-2, place[..., None, None])[..., 0, :]
    x, y = kernels
    density, place = (y @ x.transpose(-1, -2)).flatten(-2).max(-1)
    corner = torch.stack(
        [
            centres[..., axis].gather(-1, index[..., None])[..., 0]
            for axis, index in ((0, place % n_samples), (1, place // n_samples))
        ],
        dim=-1,
    )
    return density.log() - math.log(n_samples) - torch.log(2 * scale).sum(-1), corner


def _measure_frame(
    samples: Float[Tensor, "query sample action"],
    executed: Float[Tensor, "query action"],
    expert: Float[Tensor, "query action"],
    scale: Float[Tensor, "query action"],
    frozen_scale: Float[Tensor, "query action"],
    grid: Grid | None,
    n_draws: int,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, " query"] | Int[Tensor, " query"]]:
    """Everything about the densities of one frame, by the names of LandscapeMetrics."""
    mixture = Mixture(samples, scale[:, None])
    frozen = Mixture(samples, frozen_scale[:, None])
    at_expert, at_executed = mixture.log_density(torch.stack([expert, executed], dim=1)).unbind(1)
    at_draws, excess = _at_draws(samples, scale, mixture.sample(n_draws, generator))
    kernel_entropy = (1 + torch.log(2 * scale)).sum(-1)
    measured = {
        "nll": -at_expert,
        "nll_z0": -laplace_log_density(expert, executed, scale),
        "nll_frozen": -frozen.log_density(expert[:, None])[:, 0],
        "energy": energy_score(samples, expert),
        "hpd_level": (at_draws > at_expert[:, None]).double().mean(-1),
        "entropy": kernel_entropy + excess,
        "excess_entropy": excess,
    }
    unknown = torch.full_like(at_expert, math.nan)
    return (
        measured
        | _at_the_peak(samples, executed, scale, at_executed, unknown)
        | _on_a_board(mixture, expert, grid, unknown)
    )


def _at_the_peak(
    samples: Float[Tensor, "query sample action"],
    executed: Float[Tensor, "query action"],
    scale: Float[Tensor, "query action"],
    at_executed: Float[Tensor, " query"],
    unknown: Float[Tensor, " query"],
) -> dict[str, Float[Tensor, " query"]]:
    """How far from the densest action the policy acts; unknown in more than two dimensions."""
    if samples.shape[-1] > 2:
        return dict.fromkeys(("dist_mean_argmax", "dist_executed_argmax", "regret"), unknown)
    highest, argmax = densest(samples, scale)
    return {
        "dist_mean_argmax": (samples.mean(1) - argmax).norm(dim=-1),
        "dist_executed_argmax": (executed - argmax).norm(dim=-1),
        # Not below zero where the executed action is the densest one.
        "regret": (highest - at_executed).clamp_min(0),
    }


def _on_a_board(
    mixture: Mixture,
    expert: Float[Tensor, "query action"],
    grid: Grid | None,
    unknown: Float[Tensor, " query"],
) -> dict[str, Float[Tensor, " query"] | Int[Tensor, " query"]]:
    """What the cells of a board tell; unknown where there is none."""
    if grid is None:
        names = ("area_rank", "hdr50_px2", "hdr80_px2", "modes", "out_of_board")
        return dict.fromkeys(names, unknown)
    mass, scale = mixture.cell_mass(grid), mixture.scale
    # Narrower kernels than a cell would count as modes of their own.
    wide = torch.maximum(scale, scale.new_tensor(grid.cell_size))
    smooth = mass if torch.equal(wide, scale) else replace(mixture, scale=wide).cell_mass(grid)
    return {
        "area_rank": area_rank(mass, expert, grid),
        "hdr50_px2": region_area(mass, 0.5, grid),
        "hdr80_px2": region_area(mass, 0.8, grid),
        "modes": modes(smooth).count,
        "out_of_board": (1 - mass.sum((-1, -2))).clamp_min(0),
    }


def _at_draws(
    samples: Float[Tensor, "query sample action"],
    scale: Float[Tensor, "query action"],
    draws: Float[Tensor, "query draw action"],
) -> tuple[Float[Tensor, "query draw"], Float[Tensor, " query"]]:
    """Log density at draws from the mixture, and its entropy beyond that of one kernel.

    ``H - h = I(a; j) = E_a KL(r(a) || 1/K)`` with the responsibilities ``r_j(a)`` of the kernels.
    As an average over draws this is exactly zero when all kernels coincide, where ``-mean log p``
    would scatter by ``sqrt(2 / S)``. A sum over the board would be biased: cells blur the density.
    """
    log_n_samples = math.log(samples.shape[1])
    scaled_samples = (samples / scale[:, None])[..., None]
    scaled_draws = rearrange(draws / scale[:, None], "query draw action -> action query 1 draw")
    totals, divergences = [], []
    # In pieces that stay in the cache, with the draws innermost: five times as fast as at once.
    pieces = zip(*(line.split(DRAWS_AT_ONCE, dim=-1) for line in scaled_draws), strict=True)
    for first, *others in pieces:
        distance = (first - scaled_samples[:, :, 0]).abs_()
        for dim, other in enumerate(others, 1):
            distance += (other - scaled_samples[:, :, dim]).abs_()
        # No shift before exp: a draw is never far, in units of b, from the kernel it came from.
        kernels = torch.exp(-distance)
        total = kernels.sum(1)
        # log r_j = -distance_j - log total
        mean_distance = kernels.mul_(distance).sum(1) / total
        totals.append(total)
        divergences.append(log_n_samples - total.log() - mean_distance)
    log_kernels = torch.cat(totals, dim=-1).log() - log_n_samples
    log_density = log_kernels - torch.log(2 * scale).sum(-1, keepdim=True)
    return log_density, torch.cat(divergences, dim=-1).mean(-1).clamp_min(0)


def _check(
    predictions: Predictions,
    scale: Float[Tensor, "#frame query action"],
    grid: Grid | ActionSpace,
    baselines: Baselines | None,
) -> None:
    shape = predictions.point.shape
    if not shape[0]:
        raise ValueError("there are no frames to measure")
    if shape[-1] != len(grid.size):
        kind = "board" if isinstance(grid, Grid) else "box"
        raise ValueError(
            f"a {kind} has {len(grid.size)} dimensions, the actions have {shape[-1]}: choose "
            f"{len(grid.size)} of them, or give the space of all"
        )
    for name, tensor in (
        ("samples", predictions.samples),
        ("executed actions", predictions.point),
        ("scales", scale),
        ("demonstrated actions", predictions.expert[predictions.is_valid]),
    ):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} are not finite: look at the policy's weights and the data")
    if baselines is not None and (
        baselines.queries != predictions.queries
        or any(nll.shape != shape[:2] for nll in baselines.nll.values())
    ):
        raise ValueError(
            f"the baselines are of chunk steps {list(baselines.queries)}, the predictions of "
            f"{list(predictions.queries)} on {shape[0]} frames: compute both on the same"
        )


def _interval(resampled: Float[np.ndarray, " resample"], level: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weighted_median(
    values: Float[np.ndarray, " frame"], weights: Float[np.ndarray, "resample frame"]
) -> Float[np.ndarray, " resample"]:
    """Median of each weighting; the mean of the middle two where they tie."""
    order = np.argsort(values)
    ordered, cumulative = values[order], np.cumsum(weights[:, order], axis=1)
    half = cumulative[:, -1:] / 2
    lower, upper = (cumulative >= half).argmax(1), (cumulative > half).argmax(1)
    return (ordered[lower] + ordered[upper]) / 2


def _weighted_ks(
    levels: Float[np.ndarray, " frame"], weights: Float[np.ndarray, "resample frame"]
) -> Float[np.ndarray, " resample"]:
    """Largest distance of each weighted distribution of levels from the uniform one."""
    order = np.argsort(levels)
    ordered, weights = levels[order], weights[:, order]
    cumulative = np.cumsum(weights, axis=1)
    total = cumulative[:, -1:]
    above = (cumulative / total - ordered).max(1)
    below = (ordered - (cumulative - weights) / total).max(1)
    return np.maximum(above, below)
