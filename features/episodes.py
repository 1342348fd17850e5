"""Frames in the order of time: what tells episodes apart, and what begins where."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def number_episodes(
    episode_index: Int[Tensor, " frame"], frame_index: Int[Tensor, " frame"]
) -> Int[Tensor, " frame"]:
    """Number the episodes 0, 1, ... in the order in which they come.

    Args:
        episode_index: Number of each frame's episode in the data set.
        frame_index: Its step there; steps may be left out.

    Raises:
        ValueError: If an episode comes in several pieces, or its frames do not rise: onsets, runs
            and speeds would be wrong.
    """
    if len(episode_index) != len(frame_index):
        raise ValueError(
            f"{len(episode_index)} episode numbers and {len(frame_index)} steps; give both of each "
            "frame"
        )
    is_first = starts(episode_index)
    places = is_first.long().cumsum(0) - 1
    if int(is_first.sum()) != len(episode_index.unique()):
        once = episode_index[is_first]
        numbers, counts = once.unique(return_counts=True)
        raise ValueError(
            f"episode {int(numbers[counts > 1][0])} comes in several pieces; give the frames "
            "episode by episode"
        )
    falls = ~is_first[1:] & (frame_index[1:] <= frame_index[:-1])
    if falls.any():
        place = int(falls.nonzero()[0])
        raise ValueError(
            f"episode {int(episode_index[place])}: step {int(frame_index[place + 1])} comes after "
            f"step {int(frame_index[place])}; give each frame once, in the order of time"
        )
    return places


def starts(episode_index: Int[Tensor, " frame"]) -> Bool[Tensor, " frame"]:
    """Tell which frames are the first of their episode among those given."""
    is_first = torch.ones_like(episode_index, dtype=torch.bool)
    is_first[1:] = episode_index[1:] != episode_index[:-1]
    return is_first
