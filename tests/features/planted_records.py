"""Records whose activations are written by hand, frame by frame."""

import torch
from torch import Tensor

from features.record import FeatureRecord
from features.taps import TokenPosition

POSITIONS = (TokenPosition("state"), TokenPosition("image", 0, 0), TokenPosition("image", 0, 1))


def record_of(
    values: Tensor, episode_lengths: list[int], first_episode: int = 0, **parts
) -> FeatureRecord:
    """A record of dense activations [frame token latent]."""
    frame, token, latent = values.nonzero(as_tuple=True)
    episode_index = torch.repeat_interleave(
        torch.arange(len(episode_lengths)) + first_episode, torch.tensor(episode_lengths)
    )
    return FeatureRecord(
        frame=frame.int(),
        token=token.short(),
        latent=latent.int(),
        value=values[frame, token, latent].float(),
        episode_index=episode_index,
        frame_index=torch.cat([torch.arange(length) for length in episode_lengths]),
        n_latents=values.shape[2],
        positions=POSITIONS[: values.shape[1]],
        **parts,
    )


def record_of_frames(
    values: Tensor, episode_lengths: list[int], first_episode: int = 0
) -> FeatureRecord:
    """A record of one token, of dense activations [frame latent]."""
    return record_of(values[:, None], episode_lengths, first_episode)
