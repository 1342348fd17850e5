"""Some real processes that train together over gloo, started as torchrun starts them.

Forked from the test's process, so that nothing is imported again.
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from toy import ToyDataset

from callbacks.checkpoints import AtomicCheckpointIO
from datamodules.sampling import EpochBatchSampler, EvaluationBatchSampler

FORK = multiprocessing.get_context("fork")
Work = Callable[[int, int, Path], Any]
"""What a process does, given its rank, the number of processes and a folder."""


@dataclass(frozen=True)
class Ended:
    """How processes ended, in the order of their ranks."""

    exit_codes: list[int | None]
    """None where it had to be killed in the end."""
    results: list[Any]
    """What each returned; None where it returned nothing."""
    errors: list[str]
    """Traceback of each; empty where it raised nothing."""


def together(work: Work, folder: Path, world_size: int = 2, timeout_s: float = 120) -> Ended:
    """Let processes work together, and wait until all have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    # As torchrun's agent does, the parent keeps the store through which they find each other.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        FORK.Process(target=_enter, args=(work, rank, world_size, store.port, folder))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    exit_codes = []
    for process in processes:
        process.join(timeout_s)
        exit_codes.append(process.exitcode)
        process.kill()
        process.join()
    results, errors = [], []
    for rank in range(world_size):
        result, error = folder / f"{rank}.pickle", folder / f"{rank}.error"
        results.append(pickle.loads(result.read_bytes()) if result.is_file() else None)
        errors.append(error.read_text() if error.is_file() else "")
    return Ended(exit_codes, results, errors)


def all_of(work: Work, folder: Path, world_size: int = 2, timeout_s: float = 120) -> list[Any]:
    """Return what every process returned; none may fail."""
    ended = together(work, folder, world_size, timeout_s)
    assert ended.errors == [""] * world_size, "\n".join(ended.errors)
    assert ended.exit_codes == [0] * world_size
    return ended.results


def _enter(work: Work, rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }
    try:
        result = work(rank, world_size, folder)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process is gone)
        os._exit(1)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    os._exit(0)


def trainer(folder: Path, *callbacks: Callback, timeout_s: float = 60, **settings: Any) -> Trainer:
    """A trainer of as many processes as there are."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy: Any = "auto"
    if world_size > 1:
        timeout = timedelta(seconds=timeout_s)
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timeout)
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "devices": world_size,
            "strategy": strategy,
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "plugins": [AtomicCheckpointIO()],
            "callbacks": list(callbacks),
            **settings,
        }
    )


class Rows(LightningDataModule):
    """The toy's samples, dealt to processes as the project's data modules do."""

    fingerprint = "rows"

    def __init__(
        self, joined_batch_size: int = 4, workers: int = 0, poisoned: int | None = None
    ) -> None:
        super().__init__()
        self._joined = joined_batch_size
        self._workers = workers
        self._dataset = ToyDataset(poisoned)
        self._sampler: EpochBatchSampler | None = None
        self._resume: tuple[int, int] | None = None

    @property
    def batch_size(self) -> int:
        assert self.trainer is not None
        return self._joined // self.trainer.world_size

    def resume_at(self, epoch: int, batch: int) -> None:
        self._resume = (epoch, batch)

    def _loader(self, sampler: Any, workers: int = 0) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_sampler=sampler,
            collate_fn=self._dataset.collate,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator().manual_seed(1),
        )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if self._sampler is None:
            self._sampler = EpochBatchSampler(len(self._dataset), self.batch_size, 5, **place)
            if self._resume is not None:
                self._sampler.resume_at(*self._resume)
        return self._loader(self._sampler, self._workers)

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        place = (self.trainer.global_rank, self.trainer.world_size)
        return self._loader(EvaluationBatchSampler(len(self._dataset), 7, *place))
