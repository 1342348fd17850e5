"""Checkpoints that are never torn, never poisoned, and load without running code."""

import io
import os
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast, override

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.run_folder import CHECKPOINTS
from policies.atomic_files import sync
from policies.checkpoint_files import (
    CHECKPOINT_FORMAT,
    LAST_CHECKPOINT,
    MARK_KEY,
    CheckpointError,
    read_checkpoint,
)

PART_SUFFIX = ".part"
WEIGHT_KEYS = ("state_dict", "current_model_state")
"""Entries of a checkpoint that hold weights: the ones to use, and under EMA the raw ones too."""
CLOCK_STEPS = 10
"""With several processes, optimiser steps from one look at the clock to the next."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, brings it to the disk, then renames it.

    Lightning stages in ``$TMPDIR`` and moves: on another file system the move is a copy, and a
    kill in the middle of it leaves half a file under the final name. It does not sync either.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all.

        Raises:
            CheckpointError: If a weight is not finite, or the disk refuses.
        """
        refuse_non_finite(checkpoint, Path(path))
        target = Path(path)
        part = target.parent / f".{target.name}{PART_SUFFIX}"
        marked = {**checkpoint, MARK_KEY: {"checkpoint_format": CHECKPOINT_FORMAT}}
        watched: _Watched | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                watched = _Watched(file)
                torch.save(marked, cast(BinaryIO, watched))
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            sync(target.parent)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            # torch reports what ails the disk as a RuntimeError about its own positions.
            cause = (watched and watched.error) or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise CheckpointError(
                f"{target}: cannot be written ({reason}); earlier checkpoints are untouched, "
                "make room and continue with --ckpt_path last"
            ) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of ours; tensors and plain values only, whatever the caller asks.

        Raises:
            CheckpointError: If it cannot be read, is damaged or foreign.
        """
        del weights_only
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        return read_checkpoint(path, map_location=device)


class _Watched(io.RawIOBase):
    """Passes on what is written, and remembers why the disk refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    @override
    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    @override
    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise


def refuse_non_finite(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Keep weights that no longer mean anything from replacing good ones.

    Raises:
        CheckpointError: Naming the first tensor with NaN or infinity.
    """
    for key in WEIGHT_KEYS:
        for name, value in checkpoint.get(key, {}).items():
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and not bool(torch.isfinite(value).all())
            ):
                count = int((~torch.isfinite(value)).sum())
                raise CheckpointError(
                    f"{path}: not written, {count} of {value.numel()} values of {key}[{name!r}] "
                    "are not finite; continue from an earlier checkpoint with a lower learning "
                    "rate"
                )


def sweep_parts(folder: Path) -> list[Path]:
    """Delete what a killed process left half-written in a folder and below, and say what it was."""
    parts = sorted(folder.rglob(f".*{PART_SUFFIX}")) if folder.is_dir() else []
    for part in parts:
        part.unlink(missing_ok=True)
    return parts


class Checkpoint(ModelCheckpoint):
    """Keeps the best checkpoints by a validation metric; :class:`LastCheckpoint` keeps the newest.

    Args:
        monitor: Metric to judge by; the newest is kept when None.
        mode: Whether a small (``min``) or a large (``max``) value is good.
        save_top_k: How many to keep; -1 for all.
        filename: Name without suffix; may contain ``{step}`` and metrics as ``{val/loss:.3f}``.
        dirpath: Folder; ``checkpoints`` in the run folder when None.
        every_n_epochs: Least number of epochs between two, counted at validation.
        verbose: Whether to announce each.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        filename: str = "best-step{step:06d}",
        dirpath: str | None = None,
        every_n_epochs: int = 1,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            every_n_epochs=every_n_epochs,
            verbose=verbose,
            save_last=False,
            auto_insert_metric_name=False,
            # At the end of an epoch Lightning's loop counters are ambiguous on resume.
            save_on_train_epoch_end=False,
            # A resumed run writes the same step again: it replaces, it does not add "-v1".
            enable_version_counter=False,
        )
        self._warned = False

    @override
    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Rank what was measured; a diagnostic that failed or was not due must not end training."""
        if self.monitor is not None and self.monitor not in monitor_candidates:
            if not self._warned:
                known = ", ".join(sorted(set(monitor_candidates) - {"epoch", "step"}))
                rank_zero_warn(
                    f"no best checkpoint at step {trainer.global_step}: {self.monitor!r} was not "
                    f"measured (known: {known})"
                )
            self._warned = True
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the ranking again, also when the run folder has moved since."""
        folder = Path(str(self.dirpath)).resolve()

        def moved(path: str) -> str:
            here = folder / Path(path).name
            return str(here) if path and here.is_file() else ""

        ranking = {
            moved(path): score for path, score in state_dict["best_k_models"].items() if moved(path)
        }
        best = moved(state_dict["best_model_path"])
        worst = moved(state_dict["kth_best_model_path"])
        if not best or (state_dict["kth_best_model_path"] and not worst):
            # Another folder: this is a branch of the old run, which ranks its own checkpoints.
            return
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_k_models": ranking,
                "best_model_path": best,
                "kth_best_model_path": worst,
                "last_model_path": "",
            }
        )


class LastCheckpoint(CheckpointCallback):
    """Writes ``last.ckpt``: after each validation, now and then, at the end, and when stopped.

    When the best checkpoint was just written at the same step, ``last.ckpt`` becomes a second name
    (a hard link) of that file instead of a second write; no file is ever changed in place, so
    neither name can be torn.

    After an error in one of several processes the others wait elsewhere or are gone: then the first
    process writes alone, where it holds all that a checkpoint needs.

    Args:
        every_n_train_steps: Optimiser steps between two saves; 0 for none between validations.
        train_time_interval: Longest time between two saves.
        dirpath: Folder; ``checkpoints`` in the run folder when None.
    """

    def __init__(
        self,
        every_n_train_steps: int = 0,
        train_time_interval: timedelta | None = timedelta(minutes=5),
        dirpath: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_train_steps < 0:
            raise ValueError(f"every_n_train_steps {every_n_train_steps}: must be 0 or more")
        self.every_n_train_steps = every_n_train_steps
        self.train_time_interval = train_time_interval
        self.dirpath = dirpath
        self._saved_step = -1
        self._complete_step = -1
        self._saved_at_s = time.monotonic()
        self._due = False
        self.alone = False
        """Whether this process must not wait for others while it writes."""

    def path(self, trainer: Trainer) -> Path:
        """Return where ``last.ckpt`` is or will be."""
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / CHECKPOINTS)
        return folder / LAST_CHECKPOINT

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            sweep_parts(self.path(trainer).parent)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nothing to save before the first step, or before the first one after resuming.
        self._saved_step = self._complete_step = trainer.global_step
        self._due = False
        self._saved_at_s = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = self._complete_step = trainer.global_step
        due = bool(self.every_n_train_steps) and step % self.every_n_train_steps == 0
        if not due and self.train_time_interval is not None:
            elapsed_s = time.monotonic() - self._saved_at_s
            due = elapsed_s >= self.train_time_interval.total_seconds()
            if trainer.world_size > 1:
                # Processes read different clocks, and saving takes all of them.
                due = step % CLOCK_STEPS == 0 and trainer.strategy.broadcast(due)
        # The numbers of this step are logged after this hook; no checkpoint may be ahead of them.
        self._due |= due

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._save_what_is_due(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_what_is_due(trainer)

    def _save_what_is_due(self, trainer: Trainer) -> None:
        if self._due:
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # Also when this step is saved already: ranking and findings are newer now.
            self._saved_step = -1
            self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        # Between the optimiser's step and the end of the batch, weights and counters disagree.
        consistent = trainer.global_step == self._complete_step
        if not (in_training and consistent) or isinstance(exception, CheckpointError):
            return
        # Asked to stop, all processes do so after the same batch.
        if trainer.world_size == 1 or isinstance(exception, SIGTERMException):
            self._save(trainer)
        elif trainer.is_global_zero and self._owed(trainer):
            self._save_alone(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._owed(trainer):
            return
        step = trainer.global_step
        target = self.path(trainer)
        # Another node may not see the file yet.
        twin = trainer.strategy.broadcast(_written_at(trainer, step))
        if twin is None:
            trainer.save_checkpoint(target, weights_only=False)
        elif trainer.is_global_zero:
            link_atomically(twin, target)
        self._saved_step, self._saved_at_s = step, time.monotonic()
        self._due = False

    def _owed(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return not getattr(trainer, "fast_dev_run", False) and step not in {0, self._saved_step}

    def _save_alone(self, trainer: Trainer) -> None:
        sharded = any(hasattr(each, "consolidate_state_dict") for each in trainer.optimizers)
        if not isinstance(trainer.strategy, DDPStrategy) or sharded:
            rank_zero_warn(
                f"nothing saved after the error: each of {trainer.world_size} processes holds a "
                f"part of the state; {self.path(trainer)} is as it was"
            )
            return
        self.alone = True
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.path(trainer))
        self._saved_step = trainer.global_step


def saving_alone(trainer: Trainer) -> bool:
    """Tell whether a checkpoint is being written after an error of one of several processes.

    Whoever adds to it must not talk to the other processes then: they would never answer.
    """
    return any(
        isinstance(callback, LastCheckpoint) and callback.alone
        for callback in trainer.checkpoint_callbacks
    )


def _written_at(trainer: Trainer, step: int) -> Path | None:
    """Return a complete checkpoint that another callback has just written for this very step."""
    for callback in trainer.checkpoint_callbacks:
        if (
            isinstance(callback, ModelCheckpoint)
            and not callback.save_weights_only
            and callback._last_global_step_saved == step
            and callback._last_checkpoint_saved
        ):
            file = Path(callback._last_checkpoint_saved)
            if file.is_file():
                return file
    return None


def link_atomically(source: Path, target: Path) -> None:
    """Give ``source`` a second name; a copy where the file system knows no hard links."""
    part = target.parent / f".{target.name}{PART_SUFFIX}"
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    part.replace(target)
    # When both are already names of one file, POSIX rename does nothing and leaves the source.
    part.unlink(missing_ok=True)
    sync(target.parent)
