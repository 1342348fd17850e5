"""Fit an autoencoder to activations that lie in memory: no Lightning, no files.

For probes at checkpoints, baselines and tests; a long training is ``lightning_modules/sae.py``, by
the same rules: gradients along decoder rows are dropped, then clipped, rows are brought back to
norm 1, and what has been silent for long learns from the error.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from autoencoders.sae import SparseAutoencoder, default_learning_rate

WARMUP_FRACTION = 0.05
DECAY_FRACTION = 0.2
GRADIENT_CLIP = 1.0
DEAD_AFTER_EPOCHS = 0.2
"""Epochs of silence after which a latent is dead. Of those silent for a whole epoch few come back:
on a policy's activations that left 10 % dead where a fifth of an epoch left 1 to 3 %."""


def trapezoid(
    step: int,
    n_steps: int,
    warmup_fraction: float = WARMUP_FRACTION,
    decay_fraction: float = DECAY_FRACTION,
) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear to zero at the end.

    Args:
        step: Steps taken so far.
        n_steps: Of the whole run.
        warmup_fraction: Share of them that warms up.
        decay_fraction: Share of them that decays.

    Raises:
        ValueError: If the run has no end, or the shares do not fit into it.
    """
    if n_steps < 1:
        raise ValueError(
            "the learning rate decays at the end of the run, and nothing ends it: set "
            "trainer.max_steps or trainer.max_epochs"
        )
    if warmup_fraction < 0 or decay_fraction < 0 or warmup_fraction + decay_fraction > 1:
        raise ValueError(
            f"warmup_fraction {warmup_fraction} and decay_fraction {decay_fraction} are shares of "
            "one run: give numbers >= 0 that sum to at most 1"
        )
    warmup, decay, left = warmup_fraction * n_steps, decay_fraction * n_steps, n_steps - step
    rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
    falling = max(left, 0) / decay if decay and left < decay else 1.0
    return min(rising, falling)


def fit_autoencoder(
    sae: SparseAutoencoder,
    vectors: Float[Tensor, "row dim"],
    n_steps: int,
    batch_size: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> SparseAutoencoder:
    """Train on vectors in random order; an autoencoder that was trained before goes on.

    Leaves torch's global generator alone. The threshold is not fitted: ``sae.calibrate`` does that,
    on vectors that were not trained on.

    Args:
        sae: Initialised on the vectors if it never was; on the device of the vectors.
        vectors: Activations.
        n_steps: Optimiser steps.
        batch_size: Vectors of a step, drawn without repetition within an epoch.
        lr: Learning rate; :func:`default_learning_rate` when None.
        seed: Of the order.
        advance: Called with 1 after each step.

    Returns:
        The same autoencoder, in eval mode.

    Raises:
        ValueError: If there are no vectors, or no steps.
    """
    if not len(vectors) or n_steps < 1:
        raise ValueError(f"{len(vectors)} vectors, {n_steps} steps: give at least one of each")
    if not sae.is_initialised:
        sae.initialise(vectors)
    batch_size = min(batch_size, len(vectors))
    lr = default_learning_rate(sae.n_latents) if lr is None else lr
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    silent_for = torch.zeros(sae.n_latents, dtype=torch.int64, device=vectors.device)
    order = torch.empty(0, dtype=torch.int64)
    sae.train()
    with torch.enable_grad():
        for step in range(n_steps):
            if len(order) < batch_size:
                order = torch.randperm(len(vectors), generator=generator)
            rows, order = order[:batch_size], order[batch_size:]
            for group in optimizer.param_groups:
                group["lr"] = lr * trapezoid(step, n_steps)
            is_dead = silent_for >= max(DEAD_AFTER_EPOCHS * len(vectors), batch_size)
            loss = sae.loss(vectors[rows.to(vectors.device)], is_dead, step / n_steps)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            sae.constrain_gradients()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), GRADIENT_CLIP)
            optimizer.step()
            sae.constrain_weights()
            silent_for = torch.where(loss.fired, 0, silent_for + batch_size)
            if advance is not None:
                advance(1)
    return sae.eval()
