"""Continue an interrupted run as if nothing had happened, bit for bit.

What it takes, and who does it:

1. The order of samples is a function of seed and epoch; the data module's ``resume_at`` puts its
   sampler at the right epoch and batch *before* the first iterator exists, because loader workers
   read ahead at once (Lightning issue 21938).
2. Random states are stored after each optimiser step and restored before the next batch is
   fetched. Validation and diagnostics leave them alone, so training does not depend on how often
   either happens. Of several processes, each but the first draws the numbers of a batch from a seed
   of its own for that batch: noise differs between processes, and the first knows everything that a
   checkpoint needs, even when the others are gone.
3. Lightning's loop counters mean different things depending on the hook that saved; they are
   rewritten to one of two states on loading: between two batches, or between two epochs.
4. A checkpoint says whether the validation of its step is still due; then it is run before anything
   else, also when no step is left to train.
5. What would silently change the sequence of batches is refused: another size of the batches of
   all processes together, gradient accumulation, or data set. The same batches may be dealt to
   another number of processes; noise and the order of sums differ then.
"""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, override

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from policies.checkpoint_files import CheckpointError

RandomState = dict[str, Any]


def random_state() -> RandomState:
    """Capture the global generators of Python, NumPy, torch and CUDA, as tensors and plain values.

    NumPy's own state is an array, which ``weights_only`` loading refuses.
    """
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(algorithm),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached_gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put all global generators back to where :func:`random_state` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state(
        (algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached_gauss)
    )
    torch.set_rng_state(state["torch"].cpu())
    # On a machine with another number of GPUs the run cannot be exact anyway.
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])


def seed_process(seed: int, rank: int, batch: int) -> None:
    """Start the global generators of a process afresh for a batch.

    Args:
        seed: Of the run.
        rank: Of the process.
        batch: Batches since the start of the run.
    """
    words = np.random.SeedSequence([seed, rank, batch]).generate_state(3, np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[1] & 0xFFFFFFFF)
    torch.manual_seed(words[2] >> 1)


class ExactResume(Callback):
    """Stores and restores everything that decides the next batch and the next random number.

    Raises:
        ValueError: In ``setup``, if a strategy would save a checkpoint in parts.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._boundary: dict[str, Any] | None = None
        self._restore: RandomState | None = None
        self._before_validation: RandomState | None = None
        self._first_batch = False
        self._step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharded(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._boundary is None:
            # Without seed_everything each process has another.
            self._seed = trainer.strategy.broadcast(torch.initial_seed() & (2**63 - 1))
        if self._restore is not None:
            restore_random_state(self._restore)
            self._restore = None
            self._first_batch = True
        elif self._boundary is None:
            self._boundary = _boundary(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first_batch:
            # Lightning counts one too few or too many, depending on the hook that saved; the
            # count decides which steps are logged.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._first_batch = False
        self._differ(trainer, validating=False)

    def _differ(self, trainer: Trainer, validating: bool) -> None:
        """Give each process but the first random numbers of its own."""
        if trainer.global_rank:
            batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
            seed_process(self._seed, trainer.global_rank, 2 * batches + validating)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            fit_loop = trainer.fit_loop
            assert fit_loop._data_fetcher is not None
            due = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
            self._boundary = {**_boundary(trainer), "validation_due": due}
            self._step = trainer.global_step

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._before_validation = random_state()
            self._differ(trainer, validating=True)
            # Whether it takes place may have been decided after the end of the batch.
            self._note_validation(trainer, due=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            restore_random_state(self._before_validation)
            self._before_validation = None
            # Diagnostics are done by now; the callbacks that save come last.
            self._note_validation(trainer, due=False)

    def _note_validation(self, trainer: Trainer, due: bool) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        # In the middle of accumulating gradients it belongs to a batch that will be repeated.
        if self._boundary is not None and self._boundary["batches_in_all"] == batches:
            self._boundary["validation_due"] = due

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["exact_resume"] = {
            **(self._boundary or _boundary(trainer)),
            "seed": self._seed,
            "conditions": conditions(trainer),
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Arm the sampler and the generators.

        Raises:
            CheckpointError: If the run could not continue with the same batches.
        """
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get("exact_resume")
        if saved is None:
            raise CheckpointError(
                "the checkpoint was saved without random states, it cannot be continued exactly; "
                "use it with validate, test or predict"
            )
        _refuse_changes(saved["conditions"], conditions(trainer))
        rewrite_loops(
            checkpoint["loops"]["fit_loop"],
            epoch=saved["epoch"],
            batch=saved["batch"],
            batches_in_all=saved["batches_in_all"],
        )
        datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
        resume_at = getattr(datamodule, "resume_at", None)
        if callable(resume_at):
            resume_at(epoch=saved["epoch"], batch=saved["batch"])
        elif saved["batch"]:
            raise CheckpointError(
                f"{type(datamodule).__name__} has no resume_at(epoch, batch): a run cannot "
                "continue in the middle of an epoch with it"
            )
        self._restore = saved["random_state"]
        self._boundary = {
            key: value for key, value in saved.items() if key not in {"conditions", "seed"}
        }
        # Checkpoints of earlier versions do not say.
        self._seed = saved.get("seed", 0)
        if self._boundary.setdefault("validation_due", False):
            # No hook comes before a loop that finds nothing left to train.
            trainer.fit_loop.__class__ = _ValidateFirst


class _ValidateFirst(_FitLoop):
    """Runs the validation that a checkpoint owes; then it is an ordinary loop again."""

    @property
    @override
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0

    @override
    def on_run_start(self) -> None:
        # Callbacks must know that training began before they see a validation.
        super().on_run_start()
        self.__class__ = _FitLoop  # pyright: ignore[reportAttributeAccessIssue]
        if self.trainer.enable_validation:
            with _end_of_epoch(self):
                self.trainer.validating = True
                self.epoch_loop.val_loop.run()
                self.trainer.training = True


@contextlib.contextmanager
def _end_of_epoch(fit_loop: _FitLoop) -> Iterator[None]:
    """Count as in the validation of an epoch's last batch, when that is the one that is due."""
    batches = fit_loop.epoch_loop.batch_progress
    epochs: Any = fit_loop.epoch_progress.current
    if batches.current.ready:
        yield
        return
    epochs.processed, epochs.completed = epochs.processed - 1, epochs.completed - 1
    batches.is_last_batch = True
    if fit_loop.max_batches != float("inf"):
        batches.current.ready = int(fit_loop.max_batches)
    yield
    epochs.processed, epochs.completed = epochs.processed + 1, epochs.completed + 1
    batches.is_last_batch = False
    batches.current.ready = 0


def refuse_sharded(trainer: Trainer) -> None:
    """Refuse a strategy whose checkpoints this project could not read.

    Raises:
        ValueError: If it saves in parts: ``--ckpt_path``, analyses and exports need one file.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            "DeepSpeedStrategy saves a folder, and a checkpoint is one file here; use the strategy "
            "ddp"
        )
    if getattr(trainer.strategy, "_state_dict_type", "full") == "sharded" or getattr(
        trainer.strategy, "_save_distributed_checkpoint", False
    ):
        raise ValueError(
            f"{type(trainer.strategy).__name__} saves a checkpoint in parts; set its "
            "state_dict_type to full (FSDPStrategy), or save_distributed_checkpoint to false "
            "(ModelParallelStrategy)"
        )


def refuse_spread_weights(trainer: Trainer, what: str) -> None:
    """Refuse a strategy under which no process holds the whole policy.

    Args:
        trainer: The trainer.
        what: The callback that needs all weights, as the user knows it.

    Raises:
        ValueError: If the weights are spread: asking for them in one process alone would wait for
            the others without end.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"{what} needs all weights in one process, and {type(trainer.strategy).__name__} "
            f"spreads them: leave {what} out of trainer.callbacks, or use the strategy ddp"
        )


def conditions(trainer: Trainer) -> dict[str, Any]:
    """Gather what must not change between a run and its continuation.

    Batch size and number of processes may, as long as their product stays.
    """
    datamodule = getattr(trainer, "datamodule", None)
    fingerprint = getattr(datamodule, "fingerprint", None)
    return {
        "batch_size": getattr(datamodule, "batch_size", None),
        "processes": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "data_fingerprint": None if fingerprint is None else str(fingerprint),
    }


def _refuse_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    differing = {key for key in saved if saved[key] != current.get(key)}
    dealt = {"batch_size", "processes"}
    if differing & dealt and None not in {saved["batch_size"], current["batch_size"]}:
        if _joined(saved) == _joined(current):
            differing -= dealt
        else:
            differing |= dealt
    changed = [
        f"{key}: {saved[key]} then, {current.get(key)} now" for key in saved if key in differing
    ]
    if changed:
        raise CheckpointError(
            f"cannot continue this run with other batches ({'; '.join(changed)}); restore these, "
            "or start a new run"
        )


def _joined(batches: Mapping[str, Any]) -> Any:
    return batches["batch_size"] * batches["processes"]


def _boundary(trainer: Trainer) -> dict[str, Any]:
    """Describe the state between two batches: what comes next, and the random states before it."""
    fit_loop = trainer.fit_loop
    batches = fit_loop.epoch_loop.batch_progress
    epochs: Any = fit_loop.epoch_progress.current
    epoch = epochs.processed
    finished = batches.is_last_batch or (
        fit_loop.max_batches != float("inf") and batches.current.ready >= fit_loop.max_batches
    )
    return {
        "epoch": epoch + 1 if finished else epoch,
        "batch": 0 if finished else batches.current.ready,
        "batches_in_all": batches.total.ready,
        "random_state": random_state(),
        "validation_due": False,
    }


def rewrite_loops(fit_loop: dict[str, Any], epoch: int, batch: int, batches_in_all: int) -> None:
    """Set Lightning's saved loop counters to "``batch`` batches of epoch ``epoch`` are done".

    Lightning 2.6 replays, skips or miscounts batches and epochs for some of the places a
    checkpoint can be written from. The counters of optimiser steps are right and stay.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``, changed in place.
        epoch: Epochs completed, all hooks included.
        batch: Batches completed in the current epoch.
        batches_in_all: Batches completed since the start of the run.
    """
    started = epoch + 1 if batch else epoch
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
    fit_loop["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}

    batches = fit_loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    _set(batches["total"], batches_in_all)
    _set(batches["current"], batch)

    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    _set(validation["total"], 0)
    _set(validation["current"], 0)

    if not batch:
        optimiser = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        _set(fit_loop["epoch_loop.scheduler_progress"]["current"], 0)
        _set(optimiser["step"]["current"], 0)
        _set(optimiser["zero_grad"]["current"], 0)


def _set(counters: dict[str, int], count: int) -> None:
    for key in counters:
        counters[key] = count
