"""Shuffled vectors from a source that is only fast for neighbours: each byte is read once a pass.

Pieces of consecutive frames arrive in random order and fill a buffer; its vectors leave it in
random order, and the next pieces fill it. The order of a pass is a pure function of its seeds, so
a pass can begin anywhere. What fits the buffer as a whole is read once for all passes.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.sampling import EpochBatchSampler
from datamodules.streaming import StreamRequest

Per = Literal["token", "frame"]
Order = tuple[int, ...] | None
"""Seeds of a pass; None for the order of time."""


@runtime_checkable
class PieceSource(Protocol):
    """Where pieces of consecutive frames come from."""

    def read(self, frames: range) -> Float[Tensor, "frame token dim"]:
        """Activations of a piece."""
        ...


class ShuffleBuffer:
    """Vectors of some pieces, in any order that a pass asks for.

    Args:
        source: Where the pieces come from.
        pieces: Frames of each piece, in order of time.
        n_tokens: Tokens of a frame.
        dim: Length of a token's vector.
        itemsize: Bytes of a number.
        per: What a vector is: a token, or all tokens of a frame one behind the other.
        capacity_bytes: Memory for vectors and their order.

    Raises:
        ValueError: If a piece alone is larger than the buffer.
    """

    def __init__(
        self,
        source: PieceSource,
        pieces: Sequence[range],
        n_tokens: int,
        dim: int,
        itemsize: int,
        per: Per,
        capacity_bytes: int,
    ) -> None:
        self._source = source
        self._pieces = list(pieces)
        self._dim = dim if per == "token" else n_tokens * dim
        per_frame = n_tokens if per == "token" else 1
        self._counts = np.asarray([len(piece) * per_frame for piece in self._pieces], np.int64)
        bytes_per_vector = self._dim * itemsize + np.dtype(np.int64).itemsize
        self._capacity = capacity_bytes // bytes_per_vector
        largest = int(self._counts.max(initial=0))
        if largest > self._capacity:
            raise ValueError(
                f"buffer_mb is {capacity_bytes / 2**20:g}, but {largest} vectors of one batch of "
                f"frames take {largest * bytes_per_vector / 2**20:.1f} MB; make buffer_mb larger, "
                "or frames_per_batch smaller"
            )
        self._plan: tuple[tuple[Order, int], list[list[int]], np.ndarray] | None = None
        self._held: tuple[list[int], Tensor] | None = None
        self._shuffled: tuple[tuple[Order, int, int], Tensor] | None = None

    def __len__(self) -> int:
        """Vectors of all pieces."""
        return int(self._counts.sum())

    @property
    def holds_all(self) -> bool:
        """Whether everything fits the buffer at once, so that it is read but once."""
        return len(self) <= self._capacity

    def fills(self, order: Order, capacity: int | None = None) -> list[list[int]]:
        """Pieces that are in the buffer together, from the first filling of a pass on.

        Args:
            order: Of the pass.
            capacity: Vectors of a filling at most, but at least one piece; all that fit when None.
        """
        if self.holds_all:
            return [list(range(len(self._pieces)))]
        if order is None:
            return [[piece] for piece in range(len(self._pieces))]
        most = self._capacity if capacity is None else min(capacity, self._capacity)
        fills: list[list[int]] = []
        n_vectors = most
        for piece in np.random.default_rng([*order, 0]).permutation(len(self._pieces)).tolist():
            n_new = int(self._counts[piece])
            if not fills or n_vectors + n_new > most:
                fills.append([])
                n_vectors = 0
            fills[-1].append(piece)
            n_vectors += n_new
        return fills

    def take(
        self, order: Order, places: Int64[Tensor, " row"], capacity: int | None = None
    ) -> Float[Tensor, "row dim"]:
        """Vectors at some places of a pass; fast when places rise from call to call.

        Args:
            order: Of the pass.
            places: In 0..len(self) - 1.
            capacity: As for :meth:`fills`.
        """
        fills, ends = self._planned(order, capacity)
        which = torch.from_numpy(np.searchsorted(ends, places.numpy(), side="right"))
        parts = []
        for number in which.unique().tolist():
            rows = (which == number).nonzero().flatten()
            start = int(ends[number - 1]) if number else 0
            inside = places[rows] - start
            vectors = self._fill(fills[number])
            if order is not None:
                inside = self._permutation(order, number, len(vectors))[inside]
            parts.append((rows, vectors.index_select(0, inside)))
        if len(parts) == 1:
            return parts[0][1]
        taken = parts[0][1].new_empty(len(places), self._dim)
        for rows, vectors in parts:
            taken[rows] = vectors
        return taken

    def _planned(self, order: Order, capacity: int | None) -> tuple[list[list[int]], np.ndarray]:
        key = (order, -1 if capacity is None else capacity)
        if self._plan is None or self._plan[0] != key:
            fills = self.fills(order, capacity)
            ends = np.cumsum([int(self._counts[fill].sum()) for fill in fills])
            self._plan = (key, fills, ends)
        return self._plan[1], self._plan[2]

    def _fill(self, pieces: list[int]) -> Tensor:
        """Vectors of some pieces, one behind the other."""
        if self._held is None or self._held[0] != pieces:
            # Two fillings at once would be twice the memory.
            self._held = None
            self._held = (pieces, self._read(pieces))
        return self._held[1]

    def _read(self, pieces: list[int]) -> Tensor:
        vectors: Tensor | None = None
        filled = 0
        for piece in pieces:
            frames = self._source.read(self._pieces[piece]).reshape(-1, self._dim)
            if vectors is None:
                vectors = frames.new_empty(int(self._counts[pieces].sum()), self._dim)
            vectors[filled : filled + len(frames)] = frames
            filled += len(frames)
        assert vectors is not None
        return vectors

    def _permutation(self, order: tuple[int, ...], fill: int, n: int) -> Int64[Tensor, " row"]:
        key = (order, fill, n)
        if self._shuffled is None or self._shuffled[0] != key:
            rng = np.random.default_rng([*order, 1, fill])
            self._shuffled = (key, torch.from_numpy(rng.permutation(n)))
        return self._shuffled[1]


class VectorSampler(EpochBatchSampler):
    """Batches as places in an epoch's pass, one after the other; the buffer shuffles."""

    def __iter__(self) -> Iterator[list[int]]:
        """Deal the batches of this rank as :class:`datamodules.streaming.StreamRequest`."""
        epoch, start, self._start_batch = self._epoch, self._start_batch, 0
        together = self._per_rank * self._world_size
        for batch in range(start, len(self)):
            first = batch * together
            n_shared = min(together, self._n_samples - first)
            share = -(-n_shared // self._world_size)
            mine = range(self._rank * share, (self._rank + 1) * share)
            yield StreamRequest([first + place % n_shared for place in mine], epoch, batch)


class VectorDataset(Dataset[Tensor]):
    """Whole batches of vectors from a buffer.

    A request of a :class:`VectorSampler` is served in the order of its epoch, if a seed is given;
    other indices in order of time.

    Args:
        buffer: Of the vectors.
        seed: Of the order of epochs; in order of time when None.
        dtype: Of the vectors that leave.
    """

    def __init__(
        self, buffer: ShuffleBuffer, seed: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self._buffer = buffer
        self._seed = seed
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._buffer)

    def __getitem__(self, index: int) -> Float[Tensor, "1 dim"]:
        """A batch of one vector."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Float[Tensor, "batch dim"]:
        """A batch of vectors."""
        order: Order = None
        if self._seed is not None and isinstance(indices, StreamRequest):
            order = (self._seed, indices.epoch)
        return self._buffer.take(order, torch.tensor(indices)).to(self._dtype)
