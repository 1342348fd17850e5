"""Order of the samples as a pure function of seed and epoch, so that a run resumes exactly."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of sample indices for a ``DataLoader``'s ``batch_sampler``.

    Each rank gets its slice of a common global batch, so that n ranks with batch b see in every
    step what one rank with batch n * b would see. At the end of an epoch ranks get equally many
    batches of equal size; missing samples are taken from the start of the order.

    Lightning looks for ``set_epoch`` on ``batch_sampler.sampler`` (``_set_sampler_epoch``), which
    is why :attr:`sampler` is the sampler itself. Batch size and ``drop_last`` are private so that
    Lightning refuses to replace this sampler by a distributed one that would lose the order; set
    ``Trainer(use_distributed_sampler=False)``.

    Args:
        n_samples: Samples of the data set.
        batch_size: Samples of a batch on one rank.
        seed: Of the order; together with the epoch it is everything the order depends on.
        shuffle: Whether samples are permuted.
        drop_last: Whether a smaller last batch is left out.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: When an epoch would have no batch, or a number is out of range.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if n_samples < 1 or batch_size < 1:
            raise ValueError(
                f"n_samples is {n_samples} and batch_size {batch_size}; both must be positive"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self._n_samples = n_samples
        self._per_rank = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._start_batch = 0
        if not len(self):
            raise ValueError(
                f"batch_size {batch_size} on {world_size} ranks exceeds the {n_samples} samples "
                "and drop_last leaves no batch; make batch_size smaller"
            )

    @property
    def sampler(self) -> "EpochBatchSampler":
        """Itself, where Lightning looks for ``set_epoch``."""
        return self

    @property
    def epoch(self) -> int:
        """Epoch whose order the next pass follows."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; another epoch disarms :meth:`resume_at`."""
        if epoch != self._epoch:
            self._start_batch = 0
        self._epoch = epoch

    def resume_at(self, epoch: int, start_batch: int) -> None:
        """Let the next pass begin in the middle of an epoch; later passes are whole again.

        Args:
            epoch: The interrupted epoch.
            start_batch: Batches of it that were already used on this rank.

        Raises:
            ValueError: When the epoch has no such batch.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(
                f"cannot resume at batch {start_batch}: an epoch has {len(self)} batches; "
                "batch_size or the data differ from the interrupted run"
            )
        self._epoch = epoch
        self._start_batch = start_batch

    def order(self, epoch: int) -> Int64[np.ndarray, " sample"]:
        """All samples in the order of an epoch, before they are dealt to the ranks."""
        if not self._shuffle:
            return np.arange(self._n_samples)
        return np.random.default_rng([self._seed, epoch]).permutation(self._n_samples)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when the next pass begins later."""
        together = self._per_rank * self._world_size
        whole, rest = divmod(self._n_samples, together)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Deal the batches of this rank; epoch and start are taken at the first one."""
        order = self.order(self._epoch)
        start, self._start_batch = self._start_batch, 0
        together = self._per_rank * self._world_size
        for batch in range(start, len(self)):
            shared = order[batch * together : (batch + 1) * together]
            if lacking := -len(shared) % self._world_size:
                shared = np.concatenate([shared, np.resize(order, lacking)])
            share = len(shared) // self._world_size
            yield shared[self._rank * share : (self._rank + 1) * share].tolist()


class EvaluationBatchSampler(Sampler[list[int]]):
    """Batches in order for metrics: all ranks together see every sample exactly once.

    Ranks get equally many batches, so that each can wait for the others in every step, and none of
    them is empty. A batch may have a sample less than that of another rank; those of a rest with
    fewer samples than ranks join the batch before, which then has one more on some ranks.

    Args:
        n_samples: Samples of the data set.
        batch_size: Samples of a batch on one rank.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: When there are fewer samples than processes.
    """

    def __init__(self, n_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if n_samples < world_size:
            raise ValueError(
                f"{n_samples} validation samples on {world_size} processes: hold out more "
                "(val_fraction), or use fewer processes"
            )
        self._n_samples = n_samples
        self._together = batch_size * world_size
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        """Batches on each rank."""
        whole, rest = divmod(self._n_samples, self._together)
        return whole + (rest >= self._world_size or not whole)

    def __iter__(self) -> Iterator[list[int]]:
        """Deal the batches of this rank."""
        n_batches = len(self)
        for batch in range(n_batches):
            start = batch * self._together
            last = batch + 1 == n_batches
            stop = self._n_samples if last else start + self._together
            share = own_share(stop - start, self._rank, self._world_size)
            yield list(range(start + share.start, start + share.stop))


def own_share(n_samples: int, rank: int, world_size: int) -> range:
    """Consecutive samples of one rank; all ranks together have each once, sizes differ by 1."""
    return range(n_samples * rank // world_size, n_samples * (rank + 1) // world_size)
