"""Has the policy seen anything like this? Scores of frames, from what it computes anyway.

Every score is high where a frame is unlike the training data. Thresholds come from calibration
episodes, which neither the policy nor the scores were fitted to, by conformal prediction. What is
exchangeable are whole episodes, not their frames, and so are the guarantees, both over the draw of
the calibration episodes and of a new one:

- *per episode*: the largest score of a new episode exceeds the threshold with probability at most
  alpha (split conformal prediction on maxima; Vovk et al. 2005, Angelopoulos & Bates,
  arXiv:2107.07511, equation 1).
- *per frame*: the expected share of a new episode's frames above the threshold is at most alpha
  (conformal risk control; Angelopoulos et al., arXiv:2208.02814, theorem 1). Nothing is promised of
  a single frame of an episode that has begun badly.

Both hold for one score at a time, and for policies whose episodes come as the calibration's did: a
rollout of the policy is not exchangeable with demonstrations. Calibrate on rollouts for those.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from autoencoders.sae import SparseAutoencoder
from features.resampling import Estimate, auroc, interval, resample_counts, wilson_estimate
from features.taps import ActivationCapture, capture_activations
from policies.atomic_files import write_atomically
from policies.interface import Observation, PolicyView, WrappedPolicy
from policies.json_files import read_json
from policies.tensor_files import load_tensors, save_tensors

WEIGHTS_FILE, CONFIG_FILE = "ood.safetensors", "ood.json"
_FRAMES = 256
"""That are scored together."""
MAX_COVARIANCE_DIM = 8192
"""Of the Mahalanobis distance: its whitening then takes 256 MB."""
Activations = Float[Tensor, "frame token dim"]
Pool = Literal["concatenate", "mean"]
"""How a frame's tokens become one vector: one behind the other, which knows what is where, or their
mean, which is short."""


class Novelty(ABC):
    """A score of how little a frame resembles the training data."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, activations: Activations) -> Float[Tensor, " frame"]:
        """High for what is unlike the training data."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was fitted, to be saved."""


@dataclass(frozen=True, eq=False)
class ReconstructionNovelty(Novelty):
    """What the autoencoder leaves unexplained of a frame, in shares of the training variance.

    ``sum_t ||x_t - x^_t||^2 / E sum_t ||x_t - E x_t||^2``, t over tokens; its mean over the
    training frames is their FVU, around the mean of each token.
    """

    name = "reconstruction"
    sae: SparseAutoencoder
    variance: Float[Tensor, ""]

    @classmethod
    @torch.no_grad()
    def fit(cls, sae: SparseAutoencoder, training: Activations) -> "ReconstructionNovelty":
        """Measure the training frames' variance.

        Raises:
            ValueError: If the frames are all alike.
        """
        if not (training != training[0]).any():
            raise ValueError("the training frames are all alike: their variance is 0")
        return cls(sae, (training - training.mean(0)).square().sum((1, 2)).mean())

    def score(self, activations: Activations) -> Float[Tensor, " frame"]:
        """High where the frame is made of other parts than the training data."""
        error = (activations - self.sae(activations)).square().sum((1, 2))
        return error / self.variance.to(error)

    def tensors(self) -> dict[str, Tensor]:
        """The variance; the autoencoder has files of its own."""
        return {"variance": self.variance}


@dataclass(frozen=True, eq=False)
class ActiveSetNovelty(Novelty):
    """How surprising it is that just these features are active.

    ``-log p`` of the pattern of active features in nats, mean over tokens, if each fired by itself
    as often as it does at that token on the training data.
    """

    name = "active_set"
    sae: SparseAutoencoder
    rate: Float[Tensor, "token latent"]
    """How often each feature fires at each token, never 0 or 1."""

    @classmethod
    @torch.no_grad()
    def fit(cls, sae: SparseAutoencoder, training: Activations) -> "ActiveSetNovelty":
        """Count, with half a frame added to either side (Krichevsky & Trofimov 1981)."""
        counts = sum((sae.encode(frames) > 0).double().sum(0) for frames in training.split(_FRAMES))
        assert isinstance(counts, Tensor)
        return cls(sae, ((counts + 0.5) / (len(training) + 1)).to(training.dtype))

    def score(self, activations: Activations) -> Float[Tensor, " frame"]:
        """High where rare features are active, or common ones are not."""
        rate = self.rate.to(activations)
        is_active = (self.sae.encode(activations) > 0).to(activations.dtype)
        silence = -torch.log1p(-rate)
        firing = -rate.log()
        return (silence.sum(-1) + (is_active * (firing - silence)).sum(-1)).mean(-1)

    def tensors(self) -> dict[str, Tensor]:
        """The rates; the autoencoder has files of its own."""
        return {"rate": self.rate}


@dataclass(frozen=True, eq=False)
class NeighbourNovelty(Novelty):
    """Euclidean distance to the k-th nearest training frame (Sun et al., arXiv:2204.06507).

    A frame is one vector, scaled to unit length, so that the distance is ``sqrt(2 - 2 cos)``.
    """

    name = "neighbours"
    memory: Float[Tensor, "row dim"]
    """Some of the training frames."""
    k: Int[Tensor, ""]
    pool: Pool = "concatenate"

    @classmethod
    def fit(
        cls,
        training: Activations,
        pool: Pool = "concatenate",
        k: int = 10,
        n_memory: int = 2048,
        seed: int = 0,
    ) -> "NeighbourNovelty":
        """Remember training frames.

        Args:
            training: Activations of training episodes.
            pool: How tokens become one vector.
            k: Which neighbour counts.
            n_memory: How many frames to remember, at most, drawn without replacement.
            seed: Of the draw.

        Raises:
            ValueError: If there are fewer than ``k`` frames.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(training), generator=generator)[:n_memory]
        if not 1 <= k <= len(drawn):
            raise ValueError(f"k is {k}: {len(drawn)} frames are remembered")
        chosen = training[drawn.to(training.device)]
        return cls(F.normalize(_vectors(chosen, pool), dim=-1), torch.tensor(k), pool)

    def score(self, activations: Activations) -> Float[Tensor, " frame"]:
        """High where no training frame is near."""
        vectors = F.normalize(_vectors(activations, self.pool), dim=-1)
        distance = torch.cdist(vectors, self.memory.to(vectors))
        return distance.kthvalue(int(self.k), dim=1).values

    def tensors(self) -> dict[str, Tensor]:
        """The remembered frames, and which neighbour counts."""
        return {"memory": self.memory, "k": self.k}


@dataclass(frozen=True, eq=False)
class MahalanobisNovelty(Novelty):
    """Mahalanobis distance to the mean training frame (Lee et al., arXiv:1807.03888, one class).

    The covariance is shrunk towards a multiple of the identity as far as Ledoit & Wolf (2004) find
    best.
    """

    name = "mahalanobis"
    mean: Float[Tensor, " dim"]
    whitening: Float[Tensor, "dim dim"]
    """``W`` with ``W^T W`` the inverse covariance."""
    pool: Pool = "concatenate"

    @classmethod
    def fit(cls, training: Activations, pool: Pool = "concatenate") -> "MahalanobisNovelty":
        """Estimate mean and covariance.

        Args:
            training: Activations of training episodes.
            pool: How tokens become one vector.

        Raises:
            ValueError: If there are fewer than two frames, all are alike, or the vectors are too
                long for a covariance.
        """
        vectors = _vectors(training, pool).double()
        if vectors.shape[1] > MAX_COVARIANCE_DIM:
            raise ValueError(
                f"{training.shape[1]} tokens of {training.shape[2]} dimensions make vectors of "
                f"{vectors.shape[1]}, whose covariance is too large: give fewer tokens "
                "(features.token_sampling), or pool='mean'"
            )
        if len(vectors) < 2 or not (vectors != vectors[0]).any():
            raise ValueError(f"{len(vectors)} training frames: at least 2 must differ")
        whitening = torch.linalg.inv(torch.linalg.cholesky(shrunk_covariance(vectors)))
        dtype = training.dtype
        return cls(vectors.mean(0).to(dtype), whitening.to(dtype).contiguous(), pool)

    def score(self, activations: Activations) -> Float[Tensor, " frame"]:
        """High far from the mean, in directions in which training frames hardly vary."""
        centred = _vectors(activations, self.pool) - self.mean.to(activations)
        return (centred @ self.whitening.to(activations).T).norm(dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Mean and whitening."""
        return {"mean": self.mean, "whitening": self.whitening}


def _vectors(activations: Activations, pool: Pool) -> Float[Tensor, "frame _"]:
    return activations.mean(1) if pool == "mean" else activations.flatten(1)


def shrunk_covariance(rows: Float64[Tensor, "row dim"]) -> Float64[Tensor, "dim dim"]:
    """``(1 - b) S + b tr(S)/dim I`` with the b of Ledoit & Wolf 2004, lemmas 3.2 to 3.4."""
    n, dim = rows.shape
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / n
    mean_variance = covariance.trace() / dim
    identity = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    distance = (covariance - mean_variance * identity).square().sum()
    # sum_k ||x_k x_k^T - S||^2 / n^2, without the outer products.
    noise = (centred.square().sum(1).square().sum() / n - covariance.square().sum()) / n
    shrinkage = float((noise / distance).clamp(0, 1)) if distance > 0 else 1.0
    return (1 - shrinkage) * covariance + shrinkage * mean_variance * identity


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one score; the module says what they promise."""

    alpha: float
    """False-alarm rate that is promised."""
    frame_threshold: float
    episode_threshold: float
    n_episodes: int
    """Calibration episodes."""


def calibrate(
    scores: Float[Tensor, " frame"], episode_index: Int[Tensor, " frame"], alpha: float = 0.05
) -> Calibration:
    """Find the smallest thresholds that keep the promised false-alarm rate.

    Args:
        scores: Of all frames of the calibration episodes.
        episode_index: Of the frames.
        alpha: The rate.

    Raises:
        ValueError: If there are too few episodes for the rate, or a score is no number.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must lie in (0, 1)")
    if not scores.isfinite().all():
        raise ValueError("some scores of the calibration frames are no numbers")
    episodes, place = episode_index.cpu().unique(return_inverse=True)
    n = len(episodes)
    # Rounding must not cost an episode: 20 * 0.95 is 19.
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        raise ValueError(
            f"{n} calibration episodes promise no false-alarm rate of {alpha}: give at least "
            f"{math.ceil(1 / alpha - 1 - 1e-9)}, or a higher alpha"
        )
    values = scores.detach().double().cpu()
    maxima = _largest(values, place, n)
    # Conformal risk control: the risk of a threshold is the mean over episodes of the share of
    # frames above it, and (n risk + 1) / (n + 1) must not exceed alpha.
    order = values.argsort(descending=True)
    shares = 1 / torch.bincount(place, minlength=n).double()[place[order]]
    summed_risk = shares.cumsum(0) - shares
    ordered = values[order]
    is_allowed = summed_risk <= alpha * (n + 1) - 1 + 1e-9
    # Frames that tie with a threshold are not above it: the first of them decides.
    return Calibration(
        alpha=alpha,
        frame_threshold=float(ordered[is_allowed].min()),
        episode_threshold=float(maxima.sort().values[rank - 1]),
        n_episodes=n,
    )


@dataclass(frozen=True)
class OODReading:
    """What the detector says of some frames."""

    scores: Mapping[str, Float[Tensor, " frame"]]
    """By score."""
    frame_alarms: Mapping[str, Bool[Tensor, " frame"]]
    """Above the threshold per frame."""
    episode_alarms: Mapping[str, Bool[Tensor, " frame"]]
    """Above the threshold per episode: one of them is an alarm for its episode."""


@dataclass(frozen=True, eq=False)
class OODDetector:
    """Several scores of the same activations, each with its thresholds."""

    layer: str
    """Whose activations."""
    novelties: tuple[Novelty, ...]
    calibrations: Mapping[str, Calibration]
    """By score."""

    @torch.no_grad()
    def read(self, activations: Activations) -> OODReading:
        """Score frames and compare with the thresholds; everything on the CPU."""
        scores = {novelty.name: _scores(novelty, activations) for novelty in self.novelties}
        return OODReading(
            scores=scores,
            frame_alarms={
                name: values > self.calibrations[name].frame_threshold
                for name, values in scores.items()
            },
            episode_alarms={
                name: values > self.calibrations[name].episode_threshold
                for name, values in scores.items()
            },
        )


def fit_detector(
    layer: str,
    sae: SparseAutoencoder,
    training: Float[Tensor, "train_frame token dim"],
    calibration: Float[Tensor, "frame token dim"],
    calibration_episodes: Int[Tensor, " frame"],
    alpha: float = 0.05,
    pool: Pool = "concatenate",
) -> OODDetector:
    """Fit all scores to training episodes and calibrate each on episodes of their own.

    Args:
        layer: Whose activations.
        sae: Fitted to them, on training episodes.
        training: Activations of training frames.
        calibration: Activations of all frames of the calibration episodes.
        calibration_episodes: Episode of each of those frames.
        alpha: False-alarm rate to promise.
        pool: How tokens become one vector, where a score takes vectors.

    Raises:
        ValueError: As :func:`calibrate` and the scores' ``fit``.
    """
    novelties = (
        ReconstructionNovelty.fit(sae, training),
        ActiveSetNovelty.fit(sae, training),
        NeighbourNovelty.fit(training, pool),
        MahalanobisNovelty.fit(training, pool),
    )
    return OODDetector(
        layer=layer,
        novelties=novelties,
        calibrations={
            novelty.name: calibrate(_scores(novelty, calibration), calibration_episodes, alpha)
            for novelty in novelties
        },
    )


@dataclass(frozen=True)
class DetectionQuality:
    """How well one score tells perturbed frames from clean ones, with 95 % intervals.

    Of rates per episode Wilson's, of all else the bootstrap's over episodes.
    """

    auroc: Estimate
    """Of frames."""
    episode_auroc: Estimate
    """Of the episodes' largest scores."""
    frame_false_alarms: Estimate
    """Mean over clean episodes of the share of frames with an alarm."""
    frame_detections: Estimate
    """The same for perturbed episodes."""
    episode_false_alarms: Estimate
    """Share of the clean episodes with an alarm."""
    episode_detections: Estimate
    """Share of the perturbed episodes with an alarm."""


def detection_quality(
    calibration: Calibration,
    clean: Float[Tensor, " clean_frame"],
    clean_episodes: Int[Tensor, " clean_frame"],
    perturbed: Float[Tensor, " perturbed_frame"],
    perturbed_episodes: Int[Tensor, " perturbed_frame"],
) -> DetectionQuality:
    """Hold a score against held-out episodes that neither fitted nor calibrated it.

    Args:
        calibration: Thresholds of the score.
        clean: Scores of frames as they are.
        clean_episodes: Their episodes.
        perturbed: Scores of perturbed frames, of the same episodes or others. Episodes are
            resampled by number, so that a clean and a perturbed one of the same number go together.
        perturbed_episodes: Their episodes.

    Raises:
        ValueError: If there are fewer than two episodes.
    """
    numbers = torch.cat([clean_episodes, perturbed_episodes]).cpu().unique()
    counts = resample_counts(len(numbers))

    def side(scores: Tensor, episodes: Tensor) -> tuple[Tensor, ...]:
        place = torch.searchsorted(numbers, episodes.cpu())
        present, of_episode = place.unique(return_inverse=True)
        values = scores.double().cpu()
        is_alarm = (values > calibration.frame_threshold).double()
        n_frames = torch.bincount(of_episode).double()
        shares = torch.zeros(len(present), dtype=torch.float64).index_add_(0, of_episode, is_alarm)
        return (
            values,
            counts[:, place],
            _largest(values, of_episode, len(present)),
            counts[:, present],
            shares / n_frames,
        )

    low, low_weight, low_maxima, low_episode_weight, low_shares = side(clean, clean_episodes)
    high, high_weight, high_maxima, high_episode_weight, high_shares = side(
        perturbed, perturbed_episodes
    )

    def rate(shares: Tensor, weight: Tensor) -> Estimate:
        resampled = (weight @ shares) / weight.sum(1)
        return Estimate(float(shares.mean()), *interval(resampled[resampled.isfinite()]))

    def alarms(maxima: Tensor) -> Estimate:
        n_alarms = int((maxima > calibration.episode_threshold).sum())
        return wilson_estimate(n_alarms, len(maxima))

    return DetectionQuality(
        auroc=_auroc(low, high, low_weight, high_weight),
        episode_auroc=_auroc(low_maxima, high_maxima, low_episode_weight, high_episode_weight),
        frame_false_alarms=rate(low_shares, low_episode_weight),
        frame_detections=rate(high_shares, high_episode_weight),
        episode_false_alarms=alarms(low_maxima),
        episode_detections=alarms(high_maxima),
    )


@dataclass(frozen=True)
class FailureForecast:
    """How well a score, early in an episode, says whether it will fail."""

    auroc: Estimate
    """Of the mean score up to the cut, failures being positive; NaN where all end alike."""
    n_failed: int
    n_succeeded: int
    """Episodes that were still going on at the cut."""
    n_over: int
    """Episodes that had ended by then: there is nothing left to foresee."""


def failure_forecast(
    scores: Sequence[Float[Tensor, " _"]],
    steps: Sequence[Int[Tensor, " _"]],
    n_steps: Sequence[int],
    has_failed: Sequence[bool],
    max_steps: int,
    fraction: float = 0.25,
) -> FailureForecast:
    """Foresee failures from what was seen in the first part of each episode.

    The cut is a fraction of the time that an episode may take at most, the same for all: a fraction
    of its own length would tell the failures, which run to the end.

    Args:
        scores: Of each episode's frames.
        steps: Control step of each of those frames.
        n_steps: Control steps that each episode took.
        has_failed: Whether it failed.
        max_steps: Control steps after which an episode ends unsolved.
        fraction: Of ``max_steps``.

    Raises:
        ValueError: If the parts differ in length, or an episode has no score before the cut.
    """
    if len({len(scores), len(steps), len(n_steps), len(has_failed)}) > 1:
        raise ValueError(
            f"{len(scores)} scores, {len(steps)} steps, {len(n_steps)} lengths and "
            f"{len(has_failed)} outcomes: give one of each for every episode"
        )
    cut = fraction * max_steps
    early: dict[bool, list[float]] = {True: [], False: []}
    n_over = 0
    for values, at, length, failed in zip(scores, steps, n_steps, has_failed, strict=True):
        if length <= cut:
            n_over += 1
            continue
        seen = values[at < cut]
        if not len(seen):
            raise ValueError(f"an episode has no score before step {cut:g}: give a later cut")
        early[failed].append(float(seen.double().mean()))
    succeeded, failures = (torch.tensor(early[failed]).double() for failed in (False, True))
    n = len(succeeded) + len(failures)
    if len(succeeded) and len(failures):
        counts = resample_counts(n)
        weights = counts[:, : len(succeeded)], counts[:, len(succeeded) :]
        estimate = _auroc(succeeded, failures, *weights)
    else:
        estimate = Estimate(math.nan, math.nan, math.nan)
    return FailureForecast(estimate, len(failures), len(succeeded), n_over)


class OODMonitor:
    """Listens to a policy at work and scores what it sees, from its own forward passes.

    A context: within it no prediction costs a second pass and no action changes. It keeps no state
    of an episode, so nothing has to be reset.

    Args:
        view: The policy.
        detector: Fitted to it.
    """

    def __init__(self, view: PolicyView, detector: OODDetector) -> None:
        self.view = view
        self.detector = detector
        self._capture: ActivationCapture | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "OODMonitor":
        self._capture = self._stack.enter_context(
            capture_activations(self.view, self.detector.layer)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._capture = None
        self._stack.close()

    def take(self) -> OODReading | None:
        """Score the newest forward pass, once; None if there was none since, as for queued actions.

        Raises:
            RuntimeError: Outside of the context.
        """
        if self._capture is None:
            raise RuntimeError("the monitor is not listening: use it in a with statement")
        activations = self._capture.take()
        return None if activations is None else self.detector.read(activations)


class MonitoredPolicy(WrappedPolicy):
    """A policy that leaves a reading of every prediction, for rollouts within a monitor's context.

    Args:
        monitor: Listening.
    """

    def __init__(self, monitor: OODMonitor) -> None:
        super().__init__(monitor.view)
        self.monitor = monitor
        self.readings: list[OODReading] = []
        """Of each prediction so far."""

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict as the policy does, and note the reading.

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        chunk = super().predict_chunk(observation, queries)
        reading = self.monitor.take()
        assert reading is not None
        self.readings.append(reading)
        return chunk


def save_detector(detector: OODDetector, folder: Path) -> None:
    """Write ``ood.safetensors`` and ``ood.json``; the autoencoder is saved by its own room."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{novelty.name}.{key}": value.detach().cpu().contiguous()
        for novelty in detector.novelties
        for key, value in novelty.tensors().items()
    }
    config = {
        "layer": detector.layer,
        "autoencoder": next(
            (
                _fingerprint(novelty.sae)
                for novelty in detector.novelties
                if isinstance(novelty, ReconstructionNovelty | ActiveSetNovelty)
            ),
            None,
        ),
        "pool": {
            novelty.name: novelty.pool
            for novelty in detector.novelties
            if isinstance(novelty, NeighbourNovelty | MahalanobisNovelty)
        },
        "calibrations": {name: asdict(each) for name, each in detector.calibrations.items()},
    }
    save_tensors(folder / WEIGHTS_FILE, tensors)
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_detector(folder: Path, sae: SparseAutoencoder) -> OODDetector:
    """Read what :func:`save_detector` wrote.

    Args:
        folder: Where it lies.
        sae: The autoencoder that the detector was fitted with.

    Raises:
        ValueError: If a file is missing or damaged, or the autoencoder is another.
    """
    config = read_json(
        folder / CONFIG_FILE,
        lambda problem: ValueError(f"{folder / CONFIG_FILE}: {problem}; {_SAVED_DETECTOR}"),
    )
    tensors = load_tensors(
        folder / WEIGHTS_FILE,
        lambda problem: ValueError(f"{folder / WEIGHTS_FILE}: {problem}; {_SAVED_DETECTOR}"),
    )
    if config.get("autoencoder") not in (None, _fingerprint(sae)):
        raise ValueError(
            f"{folder}: the detector was fitted with another autoencoder; give that one, or fit a "
            "detector to this one"
        )
    try:
        layer, pool = config["layer"], config["pool"]
        if not isinstance(layer, str):
            raise ValueError(f"layer is {layer!a}")
        calibrations = {
            name: Calibration(**_checked_numbers(name, each))
            for name, each in config["calibrations"].items()
        }
        novelties = tuple(_novelty(name, tensors, pool, sae) for name in calibrations)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are no detector's "
            f"({type(error).__name__}: {shorten(str(error), 300)}); {_SAVED_DETECTOR}"
        ) from error
    return OODDetector(layer, novelties, calibrations)


_SAVED_DETECTOR = "give a folder with a saved detector, or fit it again"
_N_AXES = {
    "reconstruction": {"variance": 0},
    "active_set": {"rate": 2},
    "neighbours": {"memory": 2, "k": 0},
    "mahalanobis": {"mean": 1, "whitening": 2},
}
"""Of the tensors of each score."""


def _checked_numbers(name: str, calibration: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, value in calibration.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"{key} of {name!a} is {value!a}")
    return calibration


def _novelty(
    name: str, tensors: Mapping[str, Tensor], pool: Mapping[str, Pool], sae: SparseAutoencoder
) -> Novelty:
    """One score from its tensors.

    Raises:
        ValueError, KeyError: If they are of another kind.
    """
    values = {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    n_axes = {key: value.ndim for key, value in values.items()}
    if n_axes != _N_AXES[name]:
        raise ValueError(f"the tensors of {name} have {n_axes} axes instead of {_N_AXES[name]}")
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise ValueError(f"the tensors of {name} are not finite")
    if name == "reconstruction":
        return ReconstructionNovelty(sae, **values)
    if name == "active_set":
        if values["rate"].shape[1] != sae.n_latents:
            raise ValueError(f"rates of {values['rate'].shape[1]} features, not {sae.n_latents}")
        return ActiveSetNovelty(sae, **values)
    if pool[name] not in get_args(Pool):
        raise ValueError(f"pool of {name} is {pool[name]!a}")
    if name == "neighbours":
        k, n_memory = values["k"], len(values["memory"])
        if k.is_floating_point() or not 1 <= int(k) <= n_memory:
            raise ValueError(f"k is {k.item()}: {n_memory} frames are remembered")
        return NeighbourNovelty(**values, pool=pool[name])
    if values["whitening"].shape != 2 * values["mean"].shape:
        raise ValueError(
            f"a mean of {len(values['mean'])} dimensions, a whitening of "
            f"{tuple(values['whitening'].shape)}"
        )
    return MahalanobisNovelty(**values, pool=pool[name])


def _fingerprint(sae: SparseAutoencoder) -> str:
    """Of the numbers that codes and reconstructions depend on."""
    digest = hashlib.sha256()
    for value in sae.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _scores(novelty: Novelty, activations: Activations) -> Float[Tensor, " frame"]:
    with torch.no_grad():
        return torch.cat([novelty.score(x).cpu() for x in activations.split(_FRAMES)])


def _largest(
    values: Float64[Tensor, " frame"], place: Int[Tensor, " frame"], n: int
) -> Float64[Tensor, " episode"]:
    empty = torch.full((n,), -torch.inf, dtype=torch.float64)
    return empty.scatter_reduce_(0, place, values, "amax")


def _auroc(
    negative: Float64[Tensor, " negative"],
    positive: Float64[Tensor, " positive"],
    negative_weight: Float64[Tensor, "resample negative"],
    positive_weight: Float64[Tensor, "resample positive"],
) -> Estimate:
    resampled = auroc(negative, positive, negative_weight, positive_weight)
    # A resample may lack one side.
    low, high = interval(resampled[resampled.isfinite()])
    return Estimate(float(auroc(negative, positive)[0]), low, high)
