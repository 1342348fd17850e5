"""Samples of demonstrations: an observation, and the chunk of actions that follows it.

Sample t of an episode of length T holds the observation at t and the actions t, ..., t + chunk - 1.
Beyond the end the last action repeats and ``action_is_pad`` is true, as in LeRobot
(``DatasetReader._get_query_indices``) and in ACT.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.frame_store import FrameStore
from policies.interface import Batch, Observation


class ChunkDataset(Dataset[Batch]):
    """Every sample of some episodes; whole batches are gathered at once.

    Args:
        store: Frames to gather from.
        episodes: Numbers of the episodes to sample from.
        chunk_size: Steps of an action chunk.
        n_obs_steps: Steps of observation history; before the start the first frame repeats. With 1
            the ``obs_step`` axis is absent.
        drop_n_last_frames: Frames at the end of each episode that start no sample, because most of
            their chunk would be padding (Diffusion Policy).
        sample_every: Take every k-th frame of an episode only.
        action_start: First step of the chunk relative to the observed one. Diffusion Policy's
            horizon starts with the oldest observation, 1 - n_obs_steps; steps before the start of
            an episode are padded with its first action.

    Raises:
        ValueError: When no sample remains, or one would have no action but padding.
    """

    def __init__(
        self,
        store: FrameStore,
        episodes: Sequence[int],
        chunk_size: int,
        n_obs_steps: int = 1,
        drop_n_last_frames: int = 0,
        sample_every: int = 1,
        action_start: int = 0,
    ) -> None:
        self.store = store
        self.episodes = tuple(episodes)
        self.chunk_size = chunk_size
        self.n_obs_steps = n_obs_steps
        device = store.device
        frames, first, last, numbers = [], [], [], []
        for number in self.episodes:
            rows = store.rows(number)
            kept = torch.arange(
                rows.start, max(rows.start, rows.stop - drop_n_last_frames), sample_every
            )
            frames.append(kept)
            first.append(torch.full_like(kept, rows.start))
            last.append(torch.full_like(kept, rows.stop - 1))
            numbers.append(torch.full_like(kept, number))
        if not sum(map(len, frames)):
            raise ValueError(
                f"no sample remains of {len(self.episodes)} episodes: drop_n_last_frames is "
                f"{drop_n_last_frames}; make it smaller than the longest episode"
            )
        self._frames: Int64[Tensor, " sample"] = torch.cat(frames).to(device)
        self._first: Int64[Tensor, " sample"] = torch.cat(first).to(device)
        self._last: Int64[Tensor, " sample"] = torch.cat(last).to(device)
        self._numbers: Int64[Tensor, " sample"] = torch.cat(numbers).to(device)
        beyond = self._frames + action_start > self._last
        beyond |= self._frames + action_start + chunk_size <= self._first
        if beyond.any():
            at = int(beyond.nonzero()[0])
            raise ValueError(
                f"frame {int(self._frames[at] - self._first[at])} of episode "
                f"{int(self._numbers[at])} would be followed by nothing but padding, with "
                f"action_start {action_start} and chunk_size {chunk_size}: choose an action_start "
                f"above {-chunk_size}, and at most drop_n_last_frames, which is "
                f"{drop_n_last_frames}"
            )
        self._ahead = torch.arange(action_start, action_start + chunk_size, device=device)
        self._back = torch.arange(1 - n_obs_steps, 1, device=device)

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one sample."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather samples; pictures come as channels-first views of channels-last memory."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.store.device)
        frame, first, last = self._frames[chosen], self._first[chosen], self._last[chosen]
        steps = rearrange(frame, "batch -> batch 1") + self._ahead
        within = torch.clamp(
            steps, rearrange(first, "batch -> batch 1"), rearrange(last, "batch -> batch 1")
        )
        is_pad: Bool[Tensor, "batch chunk"] = steps != within
        columns = self.store.columns
        simulator_state = columns.get("simulator_state")
        return Batch(
            observation=self._observe(frame, first),
            actions=_take(columns["action"], within),
            action_is_pad=is_pad,
            episode_index=self._numbers[chosen],
            frame_index=frame - first,
            simulator_state=None if simulator_state is None else _take(simulator_state, frame),
        )

    def samples_of(self, episode: int) -> list[int]:
        """Indices of the samples of one episode, in order of time."""
        return torch.nonzero(self._numbers == episode).flatten().tolist()

    def _observe(
        self, frame: Int64[Tensor, " batch"], first: Int64[Tensor, " batch"]
    ) -> Observation:
        rows = frame
        if self.n_obs_steps > 1:
            history = rearrange(frame, "batch -> batch 1") + self._back
            rows = torch.maximum(history, rearrange(first, "batch -> batch 1"))
        columns = self.store.columns
        state, environment_state = columns.get("state"), columns.get("environment_state")
        return Observation(
            images={
                name: rearrange(
                    _take(pictures, rows), "... height width rgb -> ... rgb height width"
                )
                for name, pictures in self.store.images.items()
            },
            state=None if state is None else _take(state, rows),
            environment_state=(
                None if environment_state is None else _take(environment_state, rows)
            ),
        )


def _take(values: Tensor, rows: Int64[Tensor, "*batch"]) -> Tensor:
    # index_select copies whole rows; plain indexing of uint8 pictures is seven times slower.
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def whole_batch(batch: Any) -> Batch:
    """Collate function of a loader whose data set already returns batches."""
    return batch
