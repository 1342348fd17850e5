"""An exponential moving average of the weights: what is validated, watched, saved and deployed."""

from typing import Any, override

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from callbacks.exact_resume import refuse_spread_weights


class EMA(WeightAveraging):
    """Averages the weights as ``average += (1 - d) (weights - average)`` after each step.

    ``d = min(decay, (1 + t) / (10 + t))`` after ``t`` updates, so that the first, random weights
    are forgotten quickly and short runs profit too (the schedule of TensorFlow's
    ``ExponentialMovingAverage``).

    Lightning's own callback puts the raw weights back in ``on_validation_epoch_end``, where
    diagnostics run: whether they see the average would depend on the order of callbacks. Here the
    average stays until ``on_validation_end``, and what a checkpoint holds does not depend on
    whether it is written before or after that.

    Args:
        decay: Largest ``d``; 0.999 averages over about the last 1000 steps.
        every_n_steps: Optimiser steps between two updates.
        device: Where the average lives; beside the model when None.
    """

    def __init__(
        self, decay: float = 0.999, every_n_steps: int = 1, device: str | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: must be at least 0 and below 1")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps {every_n_steps}: must be 1 or more")
        # Buffers are statistics and counters, not weights: they are copied.
        super().__init__(device=device, use_buffers=False, multi_avg_fn=self._move_average)
        self.decay = decay
        self.every_n_steps = every_n_steps
        self._swapped = False

    @torch.no_grad()
    def _move_average(
        self, averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor
    ) -> None:
        updates = int(num_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates))
        if averages[0].is_floating_point():
            # lerp leaves what does not change exactly as it is.
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        else:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the weights to average.

        Raises:
            ValueError: If no process holds all of them.
        """
        refuse_spread_weights(trainer, "EMA")
        if stage == "fit":
            # A second fit in one process goes on with the weights, not with their average.
            self._show_weights(pl_module)
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        average = self._average_model
        if average is not None and not average.n_averaged:
            # The copy was made before the module's own setup, which may fit a normaliser.
            average.module.load_state_dict(pl_module.state_dict())

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show_average(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the average in place: diagnostics run in this hook."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show_weights(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show_average(pl_module)

    def _show_average(self, pl_module: LightningModule) -> None:
        if self._average_model is not None and not self._swapped:
            self._swap_models(pl_module)
            self._swapped = True

    def _show_weights(self, pl_module: LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as ``state_dict`` and the raw weights as ``current_model_state``."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped and "current_model_state" in checkpoint:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = average

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up average and weights; outside training the average is all there is to load."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
