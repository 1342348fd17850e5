"""Has a feature learnt something general, or one demonstration by heart?

Four statistics after Swann et al. 2026 (arXiv:2603.19183), who classify with them: how often a
feature sets in, how much of an episode it covers, how strong it is, and how long it stays. One that
stores a demonstration fires in few episodes, seldom anew, and is silent in episodes that the policy
never saw. Their classifier was fitted to labels by hand; there are none here, so a rule that can be
said in a sentence decides (:attr:`Memorisation.rule`), and the numbers stand beside it.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from features.record import FeatureRecord
from features.resampling import Z_95, Estimate

LEAST_EPISODE_SHARE = 0.1
"""Share of the episodes, trained and held out, in which a general feature fires at least."""
LEAST_KEPT = 0.5
"""Share of its training density that a general feature keeps at least on held-out frames."""
_RULE = (
    f"fires in at least {LEAST_EPISODE_SHARE:.0%} of the training and of the held-out episodes, "
    f"and on held-out frames at least {LEAST_KEPT:.0%} as often as on training frames"
)


@dataclass(frozen=True)
class EpisodeStatistics:
    """How each feature spreads over the episodes of one record.

    A feature fires in a frame when it does at any token. What has no value where it never fires, a
    mean for instance, is NaN there.
    """

    density: Float64[Tensor, " latent"]
    """Share of the frames in which it fires."""
    episode_share: Float64[Tensor, " latent"]
    """Share of the episodes in which it fires."""
    onset_count: Float64[Tensor, " latent"]
    """How often it sets in, mean over the episodes in which it fires; an episode that begins with
    it counts as an onset."""
    episode_coverage: Float64[Tensor, " latent"]
    """Share of the frames in which it fires, mean over the episodes in which it fires."""
    mean_activation: Float64[Tensor, " latent"]
    """Mean of its value, over the frames in which it fires."""
    relative_run_length: Float64[Tensor, " latent"]
    """Frames of an unbroken run over those of its episode, mean over runs."""
    episode_entropy: Float64[Tensor, " latent"]
    """Entropy of its mass over episodes, each by its mean over frames, over that of equal masses:
    0 when it lies in one episode, 1 when all have the same."""
    fires: Bool[Tensor, "latent episode"]
    """Whether it fires in an episode."""
    frames_fired: Int64[Tensor, "latent episode"]
    """Frames of each episode in which it fires."""
    episode_frames: Int64[Tensor, " episode"]
    """Frames of each episode."""


@dataclass(frozen=True)
class Memorisation:
    """Every feature on what the policy was trained on, and on what it never saw."""

    train: EpisodeStatistics
    held_out: EpisodeStatistics

    @property
    def generalisation_gap(self) -> Float64[Tensor, " latent"]:
        """``1 - density held out / density in training``, a share of frames each.

        1 for a feature that is silent on held-out frames, 0 for one that fires as often there,
        below 0 for more often; NaN for one that is silent in training.
        """
        return 1 - self.held_out.density / self.train.density

    @property
    def is_general(self) -> Bool[Tensor, " latent"]:
        """Whether each feature passes the rule, :attr:`rule`."""
        return _passes(
            self.train.episode_share,
            self.train.density,
            self.held_out.episode_share,
            self.held_out.density,
        )

    @property
    def rule(self) -> str:
        """The rule in words."""
        return _RULE

    def general_share(self) -> Estimate:
        """Share of the features that are general, among those that fire in training.

        The interval is the estimate -/+ 1.96 standard errors of the jackknife over episodes of both
        records. A bootstrap would be off: it repeats episodes, so that features near the rule's
        limits fall below them more often than they rise above.
        """
        fires = self.train.frames_fired.sum(1) > 0
        if not fires.any():
            return Estimate(torch.nan, torch.nan, torch.nan)
        value = float(self.is_general[fires].double().mean())
        n_train, n_held_out = len(self.train.episode_frames), len(self.held_out.episode_frames)
        if min(n_train, n_held_out) < 2:
            return Estimate(value, torch.nan, torch.nan)
        (share, density), (held_share, held_density) = (
            (side.episode_share[fires, None], side.density[fires, None])
            for side in (self.train, self.held_out)
        )
        variance = 0.0
        for passes in (
            _passes(*_without_each(self.train, fires), held_share, held_density),
            _passes(share, density, *_without_each(self.held_out, fires)),
        ):
            shares = passes.double().mean(0)
            variance += float((shares - shares.mean()).square().sum() * (1 - 1 / len(shares)))
        half = Z_95 * math.sqrt(variance)
        return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))


def memorisation(train: FeatureRecord, held_out: FeatureRecord) -> Memorisation:
    """Compare how features spread over episodes that were trained on, and over others.

    Args:
        train: Of episodes on which the policy, and the autoencoder, were trained.
        held_out: Of other episodes.

    Raises:
        ValueError: If the records are of different autoencoders, or share an episode.
    """
    if train.n_latents != held_out.n_latents:
        raise ValueError(
            f"{train.n_latents} features in training, {held_out.n_latents} held out; give records "
            "of the same autoencoder"
        )
    both = set(train.episode_index.tolist()) & set(held_out.episode_index.tolist())
    if both:
        raise ValueError(f"episodes {sorted(both)[:10]} are in both records; split by episode")
    return Memorisation(episode_statistics(train), episode_statistics(held_out))


def episode_statistics(record: FeatureRecord) -> EpisodeStatistics:
    """Count onsets, runs and masses of all features.

    Steps that were left out of a record do not end a run: what comes next counts as neighbour.
    """
    activity = record.frame_activity
    latent, frame = activity.latent.long(), activity.frame.long()
    episode = record.episode_place[frame]
    n_latents, n_episodes = record.n_latents, record.n_episodes
    size = n_latents * n_episodes
    pair = latent * n_episodes + episode
    lengths = torch.bincount(record.episode_place, minlength=n_episodes)

    def per_pair(weights: Tensor | None = None) -> Tensor:
        return torch.bincount(pair, weights, minlength=size).view(n_latents, n_episodes)

    fired = per_pair()
    mass = per_pair(activity.value.double()) / lengths
    fires = fired > 0
    n_firing = fires.sum(1)

    is_onset = torch.ones_like(frame, dtype=torch.bool)
    is_onset[1:] = (pair[1:] != pair[:-1]) | (frame[1:] != frame[:-1] + 1)
    n_onsets = torch.bincount(latent[is_onset], minlength=n_latents)
    # Every frame of a run adds one over the length of its episode.
    runs = torch.bincount(latent, 1 / lengths[episode].double(), minlength=n_latents)
    total = torch.bincount(latent, activity.value.double(), minlength=n_latents)
    share = mass / mass.sum(1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(1)
    return EpisodeStatistics(
        density=fired.sum(1).double() / max(len(record), 1),
        episode_share=n_firing.double() / max(n_episodes, 1),
        onset_count=n_onsets / n_firing.double(),
        episode_coverage=(fired.double() / lengths).sum(1) / n_firing,
        mean_activation=total / fired.sum(1),
        relative_run_length=runs / n_onsets,
        episode_entropy=entropy / torch.log(torch.tensor(float(n_episodes)).double()),
        fires=fires,
        frames_fired=fired,
        episode_frames=lengths,
    )


def _without_each(
    side: EpisodeStatistics, is_chosen: Bool[Tensor, " latent"]
) -> tuple[Float64[Tensor, "chosen episode"], Float64[Tensor, "chosen episode"]]:
    """Episode share and density of some features when one episode is missing, for each episode."""
    fires, fired = side.fires[is_chosen].double(), side.frames_fired[is_chosen].double()
    n_episodes, n_frames = len(side.episode_frames), side.episode_frames.sum()
    return (
        (fires.sum(1, keepdim=True) - fires) / (n_episodes - 1),
        (fired.sum(1, keepdim=True) - fired) / (n_frames - side.episode_frames),
    )


def _passes(
    train_share: Float[Tensor, "latent *#variant"],
    train_density: Float[Tensor, "latent *#variant"],
    held_out_share: Float[Tensor, "latent *#variant"],
    held_out_density: Float[Tensor, "latent *#variant"],
) -> Bool[Tensor, "latent *variant"]:
    return (
        (train_share >= LEAST_EPISODE_SHARE)
        & (held_out_share >= LEAST_EPISODE_SHARE)
        & (held_out_density >= LEAST_KEPT * train_density)
        & (train_density > 0)
    )
