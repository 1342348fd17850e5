"""Stop before a loss or gradient that is not finite reaches the weights."""

from typing import Any, override

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from policies.interface import Batch

SHOWN_SAMPLES = 8


class NonFiniteError(ValueError):
    """Loss or gradients are NaN or infinite; the message names step and samples."""


class NonFiniteStop(Callback):
    """Checks the loss and all gradients between the backward pass and the optimiser's step.

    The weights are still good when it stops, and so is the checkpoint that is then written. Of
    several processes all stop at the same step, also when only one has met a bad value, and each
    says what all of them found.

    Args:
        every_n_steps: Optimiser steps between two checks; each check waits for the GPU.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps {every_n_steps}: must be 1 or more")
        self.every_n_steps = every_n_steps
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach())

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check what the accumulated batches brought.

        Raises:
            NonFiniteError: If the loss or a gradient is not finite.
        """
        batches, self._batches = self._batches, []
        losses, self._losses = self._losses, []
        if not losses or trainer.global_step % self.every_n_steps:
            return
        # With a loss scaler, infinite gradients are normal: it skips the step and scales down.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [p.grad for p in pl_module.parameters() if p.grad is not None]
        checks = [torch.stack([torch.isfinite(loss).all() for loss in losses]).all()]
        if gradients:
            # The largest magnitude, unlike a sum of squares, does not overflow.
            largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            checks.append(torch.isfinite(largest).to(checks[0].device))
        is_finite = bool(torch.stack(checks).all())
        if trainer.strategy.reduce_boolean_decision(is_finite, all=True):
            return
        found = "" if is_finite else f"{_culprit(pl_module, losses, scaled)}; {_samples(batches)}"
        raise NonFiniteError(
            f"step {trainer.global_step}: {_of_all(trainer, found)}. The weights are still those "
            "of the last good step. Look at these samples, lower the learning rate, or clip "
            "gradients (--trainer.gradient_clip_val)"
        )


def _of_all(trainer: Trainer, found: str) -> str:
    """Join what each process found; one whose own data are at fault comes first."""
    if trainer.world_size == 1:
        return found
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, found)
    named = [f"process {rank}: {text}" for rank, text in enumerate(everyone) if text]
    # A bad loss of one makes the averaged gradients of all bad.
    return "; ".join(sorted(named, key=lambda text: "the loss is" not in text))


def _culprit(module: LightningModule, losses: list[Tensor], scaled: bool) -> str:
    if not all(bool(torch.isfinite(loss).all()) for loss in losses):
        return f"the loss is {', '.join(f'{float(loss):g}' for loss in losses)}"
    names = [
        name
        for name, weight in module.named_parameters()
        if weight.grad is not None and not bool(torch.isfinite(weight.grad).all())
    ]
    assert names or scaled
    return f"the gradient of {names[0]} is not finite ({len(names)} tensors in all)"


def _samples(batches: list[Any]) -> str:
    """Name the samples of the batches; those with bad values in them when there are any."""
    known = [batch for batch in batches if isinstance(batch, Batch)]
    if not known:
        return "the batch does not say which samples it holds"
    everyone, guilty = [], []
    for batch in known:
        bad = _bad_rows(batch)
        for row in range(len(batch)):
            label = f"episode {int(batch.episode_index[row])} frame {int(batch.frame_index[row])}"
            everyone.append(label)
            if bool(bad[row]):
                guilty.append(label)
    if guilty:
        return f"samples with values that are not finite: {_shorten(guilty)}"
    return f"samples of the batch: {_shorten(everyone)}"


def _bad_rows(batch: Batch) -> Tensor:
    observation = batch.observation
    tensors = [batch.actions, observation.state, observation.environment_state]
    tensors += [image for image in observation.images.values() if image.is_floating_point()]
    bad = torch.zeros(len(batch), dtype=torch.bool, device=batch.actions.device)
    for tensor in tensors:
        if tensor is not None:
            bad |= ~torch.isfinite(tensor).flatten(1).all(dim=1)
    return bad


def _shorten(labels: list[str]) -> str:
    more = len(labels) - SHOWN_SAMPLES
    return ", ".join(labels[:SHOWN_SAMPLES]) + (f" and {more} more" if more > 0 else "")
