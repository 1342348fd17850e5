"""Samples of a data set whose pictures fit neither memory nor disk: decoded while training.

Everything but the pictures lies in a frame store without cameras. Episodes are read in a seeded
random order, and their frames pass through a shuffle buffer. The order of an epoch is a pure
function of seed and epoch, known before anything is decoded: an epoch has every sample once, and
an interrupted one resumes exactly.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from torch import Tensor

from datamodules.chunking import ChunkDataset
from datamodules.frame_store import FrameStore
from datamodules.sampling import EpochBatchSampler
from policies.interface import Batch

Picture = UInt8[np.ndarray, "height width 3"]


@runtime_checkable
class PictureSource(Protocol):
    """Where pictures come from, in the size that batches have."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        ...

    def pictures(self, camera: str, episode: int, frames: Sequence[int]) -> Iterator[Picture]:
        """Pictures of one episode at ascending steps."""
        ...


class StreamRequest(list[int]):
    """Samples of a training batch, and which batch of which epoch it is."""

    def __init__(self, samples: Sequence[int], epoch: int, batch: int) -> None:
        super().__init__(samples)
        self.epoch = epoch
        self.batch = batch


class StreamSampler(EpochBatchSampler):
    """Order of an epoch: episodes at random, and their samples through a shuffle buffer.

    All ranks read all episodes, and each keeps the pictures of its own share of each batch.

    Args:
        sample_counts: Samples of each episode, in the order of the data set.
        batch_size: Samples of a batch on one rank.
        shuffle_buffer: Samples that wait in the buffer.
        seed: Of the order.
        shuffle: Whether samples are permuted.
        drop_last: Whether a smaller last batch is left out.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(
        self,
        sample_counts: Sequence[int],
        batch_size: int,
        shuffle_buffer: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1")
        self._counts = np.asarray(sample_counts, np.int64)
        self._buffer = shuffle_buffer
        super().__init__(
            int(self._counts.sum()), batch_size, seed, shuffle, drop_last, rank, world_size
        )

    def reading_order(self, epoch: int) -> Int64[np.ndarray, " episode"]:
        """Positions of the episodes in the order in which an epoch reads them."""
        if not self._shuffle:
            return np.arange(len(self._counts))
        return np.random.default_rng([self._seed, epoch, 1]).permutation(len(self._counts))

    def order(self, epoch: int) -> Int64[np.ndarray, " sample"]:
        """All samples in the order in which they leave the buffer."""
        ends = np.cumsum(self._counts).tolist()
        starts = [0, *ends]
        read = np.concatenate(
            [np.arange(starts[at], ends[at]) for at in self.reading_order(epoch).tolist()]
        )
        if not self._shuffle:
            return read
        rng = np.random.default_rng([self._seed, epoch, 2])
        waiting = read[: self._buffer].tolist()
        arriving = read[self._buffer :].tolist()
        left = []
        chosen = rng.integers(0, max(1, len(waiting)), len(arriving)).tolist()
        for place, sample in zip(chosen, arriving, strict=True):
            left.append(waiting[place])
            waiting[place] = sample
        return np.asarray(left + rng.permutation(waiting).tolist(), np.int64)

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch on this rank."""
        whole = copy(self)
        whole.resume_at(epoch, 0)
        return list(EpochBatchSampler.__iter__(whole))

    def __iter__(self) -> Iterator[list[int]]:
        """Deal the batches of this rank as :class:`StreamRequest`."""
        epoch, start = self._epoch, self._start_batch
        for batch, samples in enumerate(super().__iter__(), start):
            yield StreamRequest(samples, epoch, batch)


class StreamDataset(ChunkDataset):
    """Samples whose pictures are decoded when a batch asks for them.

    Batches of a :class:`StreamSampler` are served by one pass through the episodes; any other
    indices by looking up single frames, which is slow. For a loader without workers.

    Args:
        store: Columns to gather from; it holds no pictures.
        source: Where the pictures come from.
        episodes: Numbers of the episodes to sample from.
        chunk_size: Steps of an action chunk.
        n_obs_steps: Steps of observation history.
        drop_n_last_frames: Frames at the end of each episode that start no sample.
        sample_every: Take every k-th frame of an episode only.
        action_start: First step of the chunk relative to the observed one.

    Raises:
        ValueError: When no sample remains.
    """

    def __init__(
        self,
        store: FrameStore,
        source: PictureSource,
        episodes: Sequence[int],
        chunk_size: int,
        n_obs_steps: int = 1,
        drop_n_last_frames: int = 0,
        sample_every: int = 1,
        action_start: int = 0,
    ) -> None:
        super().__init__(
            store, episodes, chunk_size, n_obs_steps, drop_n_last_frames, sample_every, action_start
        )
        self._source = source
        self.plan: StreamSampler | None = None
        self._expected: tuple[int, int] | None = None
        self._arriving: Iterator[tuple[int, Mapping[str, list[Picture]]]] = iter(())
        self._waiting: dict[int, Mapping[str, list[Picture]]] = {}
        self._remaining: dict[int, int] = {}

    @property
    def waiting(self) -> int:
        """Decoded samples that no batch has taken yet."""
        return len(self._waiting)

    @property
    def sample_counts(self) -> list[int]:
        """Samples of each episode, in the order of the data set."""
        return [len(self.samples_of(number)) for number in self.episodes]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather samples; pictures come as channels-first views of channels-last memory."""
        batch = super().__getitems__(indices)
        if isinstance(indices, StreamRequest):
            pictures = self._streamed(indices)
        else:
            pictures = self._looked_up(batch.episode_index.tolist(), batch.frame_index.tolist())
        images = {camera: self._stack(frames) for camera, frames in pictures.items()}
        return replace(batch, observation=replace(batch.observation, images=images))

    def _stack(self, samples: list[list[Picture]]) -> Tensor:
        if self.n_obs_steps == 1:
            stacked = np.stack([history[0] for history in samples])
        else:
            stacked = np.stack([np.stack(history) for history in samples])
        return rearrange(torch.from_numpy(stacked), "... height width rgb -> ... rgb height width")

    def _history(self, frame: int) -> list[int]:
        return [max(0, frame + back) for back in self._back.tolist()]

    def _looked_up(
        self, episodes: Sequence[int], frames: Sequence[int]
    ) -> dict[str, list[list[Picture]]]:
        wanted: dict[int, set[int]] = {}
        for episode, frame in zip(episodes, frames, strict=True):
            wanted.setdefault(episode, set()).update(self._history(frame))
        found: dict[str, list[list[Picture]]] = {}
        for camera in self._source.cameras:
            held = {
                episode: dict(
                    zip(steps, self._source.pictures(camera, episode, steps), strict=True)
                )
                for episode, steps in ((number, sorted(some)) for number, some in wanted.items())
            }
            found[camera] = [
                [held[episode][step] for step in self._history(frame)]
                for episode, frame in zip(episodes, frames, strict=True)
            ]
        return found

    def _streamed(self, request: StreamRequest) -> dict[str, list[list[Picture]]]:
        if self._expected != (request.epoch, request.batch):
            self._start(request.epoch, request.batch)
        while not self._waiting.keys() >= set(request):
            sample, pictures = next(self._arriving)
            self._waiting[sample] = pictures
        taken = [self._waiting[sample] for sample in request]
        for sample in request:
            self._remaining[sample] -= 1
            if not self._remaining[sample]:
                del self._waiting[sample]
        self._expected = (request.epoch, request.batch + 1)
        return {camera: [each[camera] for each in taken] for camera in self._source.cameras}

    def _start(self, epoch: int, batch: int) -> None:
        """Begin reading at a batch; frames that only earlier batches used are not kept."""
        if self.plan is None:
            raise RuntimeError("a StreamRequest needs the sampler that made it; set plan")
        remaining: dict[int, int] = {}
        for sample in chain.from_iterable(self.plan.batches(epoch)[batch:]):
            remaining[sample] = remaining.get(sample, 0) + 1
        self._remaining = remaining
        self._waiting = {}
        self._arriving = self._read(self.plan.reading_order(epoch).tolist(), set(remaining))

    def _read(
        self, positions: Sequence[int], wanted: set[int]
    ) -> Iterator[tuple[int, Mapping[str, list[Picture]]]]:
        """Wanted samples and their pictures, episode after episode."""
        first = (self._frames - self._first).tolist()
        for position in positions:
            number = self.episodes[position]
            samples = {
                first[sample]: sample for sample in self.samples_of(number) if sample in wanted
            }
            steps = sorted({step for frame in samples for step in self._history(frame)})
            readers = {
                camera: self._source.pictures(camera, number, steps)
                for camera in self._source.cameras
            }
            recent: OrderedDict[int, dict[str, Picture]] = OrderedDict()
            for step in steps:
                recent[step] = {camera: next(reader) for camera, reader in readers.items()}
                while next(iter(recent)) <= step - self.n_obs_steps and len(recent) > 1:
                    recent.popitem(last=False)
                if step in samples:
                    yield (
                        samples[step],
                        {
                            camera: [recent[back][camera] for back in self._history(step)]
                            for camera in readers
                        },
                    )
