"""Where features fire most: frames to look at, distinct in time and from many episodes."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from features.record import FeatureRecord


@dataclass(frozen=True)
class Peaks:
    """Frames of each feature, the strongest first; places that are left over have row -1."""

    row: Int64[Tensor, "latent place"]
    """Of the record."""
    episode_index: Int64[Tensor, "latent place"]
    frame_index: Int64[Tensor, "latent place"]
    token: Int64[Tensor, "latent place"]
    """Where the feature is strongest there."""
    value: Float32[Tensor, "latent place"]
    """NaN in places that are left over."""

    @property
    def is_there(self) -> Bool[Tensor, "latent place"]:
        """Which places hold a frame."""
        return self.row >= 0


def find_peaks(
    record: FeatureRecord,
    fps: float,
    n_frames: int = 9,
    n_per_episode: int = 2,
    min_gap_s: float = 1.0,
) -> Peaks:
    """Choose frames of every feature by its strongest token.

    The best frame of every episode comes before the second best of any; within an episode, frames
    lie apart.

    Args:
        record: Of some frames.
        fps: Their steps in a second.
        n_frames: Of each feature, at most.
        n_per_episode: Of each feature in an episode, at most.
        min_gap_s: Between two frames of an episode.

    Raises:
        ValueError: If a number is not positive, or the gap negative.
    """
    if n_frames < 1 or n_per_episode < 1 or min_gap_s < 0 or fps <= 0:
        raise ValueError(
            f"n_frames {n_frames}, n_per_episode {n_per_episode}, min_gap_s {min_gap_s}, fps {fps}:"
            " give at least one frame, and no negative gap"
        )
    activity = record.frame_activity
    n_pairs = record.n_latents * record.n_episodes
    gap = max(1, math.ceil(min_gap_s * fps - 1e-6))
    entry = torch.arange(len(activity.latent))
    chosen, rounds = [], []
    for turn in range(n_per_episode):
        frame = activity.frame[entry].long()
        pair = activity.latent[entry].long() * record.n_episodes + record.episode_place[frame]
        value = activity.value[entry]
        largest = torch.full((n_pairs,), -torch.inf).scatter_reduce(0, pair, value, "amax")
        is_largest = value == largest[pair]
        best = torch.full((n_pairs,), len(activity.latent)).scatter_reduce(
            0, pair[is_largest], entry[is_largest], "amin"
        )
        found = best[best < len(activity.latent)]
        chosen.append(found)
        rounds.append(torch.full_like(found, turn))
        near = record.frame_index[activity.frame[best[pair]].long()]
        entry = entry[(record.frame_index[frame] - near).abs() >= gap]
    taken, turns = torch.cat(chosen), torch.cat(rounds)
    latent, value = activity.latent[taken].long(), activity.value[taken]
    # Sorted by feature, within it by round, within that by value: the last key first.
    order = value.argsort(descending=True, stable=True)
    order = order[(latent * n_per_episode + turns)[order].argsort(stable=True)]
    order = order[_place_in_group(latent[order]) < n_frames]
    order = order[value[order].argsort(descending=True, stable=True)]
    order = order[latent[order].argsort(stable=True)]
    taken, latent = taken[order], latent[order]
    place = _place_in_group(latent)

    def lay_out(values: Tensor, empty: float) -> Tensor:
        table = torch.full((record.n_latents, n_frames), empty, dtype=values.dtype)
        table[latent, place] = values
        return table

    row = activity.frame[taken].long()
    return Peaks(
        row=lay_out(row, -1),
        episode_index=lay_out(record.episode_index[row].long(), -1),
        frame_index=lay_out(record.frame_index[row].long(), -1),
        token=lay_out(activity.token[taken].long(), -1),
        value=lay_out(activity.value[taken], torch.nan),
    )


def _place_in_group(group: Int64[Tensor, " entry"]) -> Int64[Tensor, " entry"]:
    """Count from 0 within stretches of equal numbers."""
    place = torch.arange(len(group))
    is_new = torch.ones_like(group, dtype=torch.bool)
    is_new[1:] = group[1:] != group[:-1]
    first = torch.where(is_new, place, 0)
    return place - (first.cummax(0).values if len(group) else first)
