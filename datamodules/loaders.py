"""Loaders of a data module whose batches ranks share; the same wherever the samples come from."""

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.sampling import own_share


class SharedDataModule(LightningDataModule):
    """A data module that knows its rank, and makes loaders that draw from no global generator."""

    seed: int

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _loader(
        self,
        dataset: Dataset[Any],
        batch_sampler: Sampler[list[int]],
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
    ) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            generator=self._generator(),
        )

    def _share_loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate_fn: Callable[[Any], Any],
        num_workers: int = 0,
    ) -> DataLoader:
        """Load this rank's share of the samples; together, ranks load each sample once.

        Through torch's own batch sampler: Lightning wraps it to know the indices of a batch.
        """
        return DataLoader(
            dataset,
            sampler=own_share(len(cast(Sized, dataset)), self._rank, self._world),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn,
            generator=self._generator(),
        )

    def _generator(self) -> torch.Generator:
        # A loader without one draws from the global generator, which must not depend on loaders.
        return torch.Generator().manual_seed(self.seed)
