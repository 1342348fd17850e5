"""A model and data small enough to train in milliseconds, with everything that makes resuming hard.

Dropout (random numbers in training), noise in validation (random numbers there), shuffling, AdamW
with warm-up and cosine; batches are the project's own :class:`Batch`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks.loggers import read_metrics
from callbacks.schedule import Diagnostic
from policies.interface import Batch, Findings, Observation, Table

SAMPLES = 44
BATCH_SIZE = 4
BATCHES = SAMPLES // BATCH_SIZE


class ToyModule(LightningModule):
    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden: int = 8,
        learning_rate: float = 0.05,
        fail: str = "",
    ) -> None:
        """A module.

        Args:
            state_dim: Linked.
            action_dim: Linked.
            hidden: Width.
            learning_rate: Step size.
            fail: Raise this message.
        """
        super().__init__()
        if fail:
            raise ValueError(fail)
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Linear(state_dim, hidden),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(hidden, action_dim),
        )
        self.register_buffer("scale", torch.tensor(0.1))

    def loss(self, batch: Batch) -> torch.Tensor:
        assert batch.observation.state is not None
        return nn.functional.mse_loss(self.net(batch.observation.state), batch.actions[:, 0])

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        torch.rand(3)
        self.log("val/loss", self.loss(batch), batch_size=len(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        warm_up = LinearLR(optimizer, 0.1, total_iters=5)
        cosine = CosineAnnealingLR(optimizer, 40)
        schedule = SequentialLR(optimizer, [warm_up, cosine], milestones=[5])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class LonelyModule(LightningModule):
    """Takes nothing from the data module."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch.observation.state is not None
        return self.layer(batch.observation.state).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class ToyDataset(Dataset):
    def __init__(self, poisoned: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.state = torch.randn(SAMPLES, 3, generator=generator)
        self.actions = torch.randn(SAMPLES, 2, 2, generator=generator)
        if poisoned is not None:
            self.actions[poisoned] = torch.nan

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        return Batch(
            observation=Observation(images={}, state=self.state[rows]),
            actions=self.actions[rows],
            action_is_pad=torch.zeros(len(rows), 2, dtype=torch.bool),
            episode_index=rows // 10,
            frame_index=rows % 10,
        )


class ToySampler(Sampler[list[int]]):
    """Batches in an order that is a function of the epoch, starting anywhere once."""

    def __init__(self) -> None:
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> "ToySampler":
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        order = torch.randperm(SAMPLES, generator=generator).tolist()
        start, self.start = self.start, 0
        for batch in range(start, BATCHES):
            yield order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]


class ToyData(LightningDataModule):
    def __init__(
        self,
        num_workers: int = 0,
        batch_size: int = BATCH_SIZE,
        poisoned: int | None = None,
        fail: str = "",
    ) -> None:
        """Data.

        Args:
            num_workers: Loader processes.
            batch_size: Only stated.
            poisoned: Sample with NaN actions.
            fail: Raise this message in setup.
        """
        super().__init__()
        self.num_workers = num_workers
        self.batch_size = batch_size
        self.fail = fail
        self.poisoned = poisoned
        self.fingerprint = "toy"
        self.sampler = ToySampler()
        self.cameras = {"top": (4, 4)}
        self.state_dim = 3
        self.action_dim = 2
        self.chunk_size = 2

    def setup(self, stage: str) -> None:
        if self.fail:
            raise ValueError(self.fail)

    def resume_at(self, epoch: int, batch: int) -> None:
        self.sampler.epoch, self.sampler.start = epoch, batch

    def _loader(self, workers: int = 0, **how: Any) -> DataLoader:
        dataset = ToyDataset(self.poisoned)
        return DataLoader(
            dataset,
            collate_fn=dataset.collate,
            num_workers=workers,
            generator=torch.Generator().manual_seed(1),
            **how,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.num_workers, batch_sampler=self.sampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader(batch_size=22)

    def test_dataloader(self) -> DataLoader:
        return self._loader(batch_size=22)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(batch_size=22)


class KillAt(Callback):
    """``kill -9`` this very process after some steps."""

    def __init__(self, step: int, hook: str = "on_train_batch_start") -> None:
        self.step = step
        self.hook = hook

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.hook == "on_train_batch_start" and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Trip(Callback):
    """Fails as a defect would, with an error that is no class of this project's."""

    def _fall(self, *_: Any) -> None:
        raise ValueError("shapes do not match")

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _fall


class SignalAt(Callback):
    """Send this process a signal after some steps."""

    def __init__(self, step: int, number: int, in_validation: bool = False) -> None:
        self.step = step
        self.number = number
        self.in_validation = in_validation

    def _maybe(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.in_validation:
            self._maybe(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.in_validation and not trainer.sanity_checking:
            self._maybe(trainer)


class Shout(Diagnostic):
    """Finds something of each kind, and tries to disturb everything on the way."""

    def __init__(
        self,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        name: str | None = None,
        fail: bool = False,
        terminate_at: int = 0,
        max_share: float | None = None,
    ) -> None:
        super().__init__(every_n_validations, at_start, strict, name, max_share)
        self.fail = fail
        self.terminate_at = terminate_at
        self.weights: list[torch.Tensor] = []
        self.steps: list[int] = []

    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Any) -> Findings:
        import random

        import numpy as np
        from PIL import Image

        assert not module.training
        self.weights.append(next(module.parameters()).detach().clone())
        self.steps.append(trainer.global_step)
        torch.rand(5), np.random.rand(5), random.random()
        module.train()
        with torch.enable_grad():
            loss = sum(weight.sum() for weight in module.parameters())
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        for weight in module.parameters():
            weight.requires_grad_(False)
        if self.terminate_at == trainer.global_step > 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fail:
            raise RuntimeError("ink is out")
        if self.terminate_at:
            return Findings()
        step = trainer.global_step
        picture, film, wave = folder / "square.png", folder / "square.mp4", folder / "wave.npz"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture)
        film.write_bytes(TINY_MP4)
        np.savez_compressed(wave, pressure=np.arange(3, dtype=np.float16) + step)
        return Findings(
            scalars={f"{self.name}/loudness": 0.1 * step},
            images={f"{self.name}/square": str(picture)},
            videos={f"{self.name}/film": str(film)},
            tables={
                f"{self.name}/words": Table(
                    columns=("word", "step", "loudness", "heard"),
                    rows=(("hey", step, 0.1 * step, True), ("ho", step, None, False)),
                )
            },
            histograms={f"{self.name}/pitch": ((0.0, 0.5, 2.0), (3, step))},
            arrays={f"{self.name}/wave": str(wave)},
        )


TINY_MP4 = b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isommp42\x00\x00\x00\x08free"


def same(one: Any, other: Any, where: str = "") -> list[str]:
    """Name every entry of two nested structures that is not bitwise the same."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        equal = (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and torch.equal(one, other)
        )
        return [] if equal else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other}, key=str)
        return [d for k in keys for d in same(one.get(k), other.get(k), f"{where}.{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            d
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for d in same(a, b, f"{where}[{i}]")
        ]
    return [] if one == other else [where]


def repeatable(file: Path) -> list[dict[str, float]]:
    """Read the rows of a run without times and sizes, which differ each time."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(("diagnostics/", "resources/"))
        }
        for row in read_metrics(file)
    ]
