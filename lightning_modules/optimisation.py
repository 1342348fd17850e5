"""Optimiser and learning-rate schedule, shared by all modules."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str
    parameters: Iterable[nn.Parameter]
    lr: float


def build_adamw(
    groups: list[ParameterGroup], weight_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused implementation, one group per learning rate."""
    optimizer = AdamW(
        [
            {"params": list(group.parameters), "lr": group.lr, "name": group.name}
            for group in groups
        ],
        weight_decay=weight_decay,
        betas=betas,
        fused=True,
    )
    return clippable(optimizer)


def clippable[Kind: Optimizer](optimizer: Kind) -> Kind:
    """Let gradients be clipped under mixed precision, too.

    A fused optimiser offers to unscale gradients within its step, after they would be clipped, so
    that Lightning refuses to clip. Without the offer a scaler unscales them first; bfloat16 has
    none at all.
    """
    optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


def build_schedule(
    optimizer: Optimizer, schedule: Schedule, warmup_steps: int, decay_steps: int
) -> LambdaLR:
    """Linear warm-up from near zero, then a constant rate or a cosine to zero.

    Args:
        optimizer: Whose learning rates are scaled.
        schedule: What follows the warm-up.
        warmup_steps: Optimiser steps of warm-up.
        decay_steps: Optimiser step at which the cosine reaches zero.

    Raises:
        ValueError: If the cosine has no end. A run that ends within the warm-up is no error.
    """
    if schedule == "cosine" and decay_steps < 1:
        raise ValueError(
            "a cosine schedule needs an end: set trainer.max_steps or trainer.max_epochs, or "
            "decay_steps of the model"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def training_steps(trainer: Trainer) -> int:
    """Optimiser steps of the whole run; 0 when nothing bounds it."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return 0
    return int(trainer.estimated_stepping_batches)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """L2 norm over all gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients)
