"""Train a sparse autoencoder on a policy's activations."""

import inspect
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from autoencoders.files import save_autoencoder
from autoencoders.fit import DEAD_AFTER_EPOCHS, DECAY_FRACTION, WARMUP_FRACTION, trapezoid
from autoencoders.metrics import ReconstructionMetrics, ReconstructionQuality
from autoencoders.sae import (
    ARCHITECTURES,
    MAX_CALIBRATION_ENTRIES,
    build_autoencoder,
    default_learning_rate,
)
from lightning_modules.metrics import mean_over_processes
from lightning_modules.optimisation import clippable, gradient_norm, training_steps

N_CALIBRATION_VECTORS = 262_144
"""Calibration vectors that the threshold is fitted to, at most."""
N_INITIAL_VECTORS = 16_384
"""Training vectors that scale, data variance and geometric median are measured on."""


@runtime_checkable
class Activations(Protocol):
    """What the module asks its data module for, beside batches of vectors."""

    @property
    def d_in(self) -> int:
        """Dimensions of a vector."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the activations come from, as plain values."""
        ...

    def sample(self, n: int, split: str, seed: int = 0) -> Float[Tensor, "row dim"]:
        """Draw vectors of a split."""
        ...


class SAEModule(LightningModule):
    """Sparse autoencoder: BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) and its relatives.

    Initialised on training activations; its threshold is the exact quantile of the calibration
    episodes, found anew at every validation, and its numbers come from episodes that neither
    training nor calibration has seen.

    On several processes scale, centre, variance and threshold come from the same vectors on each,
    the silence of latents and the numbers of a validation are those of all processes together. Each
    process selects the active latents of its own share of a batch: k of each vector, or k times the
    share. While every vector has k of its own, gradients are those of one process with the joined
    batch; with a common budget (the second part of batch_topk), with dead latents to revive, and
    with jumprelu's squared penalty, they are means over shares instead.

    Args:
        d_in: Dimensions of an activation vector.
        architecture: Which codes are active: batch_topk, topk, matryoshka_batch_topk, jumprelu,
            vanilla, gated.
        n_latents: Latents, also called features.
        k: Active latents of a vector: exactly (topk), on average (batch_topk), or aimed at
            (jumprelu).
        options: Further arguments of the architecture's class in autoencoders.
        lr: Learning rate; 8e-4 sqrt(2^14 / n_latents) when null.
        warmup_fraction: Share of the run in which the learning rate rises.
        decay_fraction: Share of the run in which it falls to zero, at the end.
        dead_after: Vectors without activity after which a latent is dead and auxiliary training
            revives it; a fifth of an epoch when null.
    """

    silent_for: Tensor

    def __init__(
        self,
        d_in: int,
        architecture: Literal[
            "batch_topk", "topk", "matryoshka_batch_topk", "jumprelu", "vanilla", "gated"
        ] = "batch_topk",
        n_latents: int = 2048,
        k: int = 32,
        options: dict[str, Any] | None = None,
        lr: float | None = None,
        warmup_fraction: float = WARMUP_FRACTION,
        decay_fraction: float = DECAY_FRACTION,
        dead_after: int | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        arguments = {"d_in": d_in, "n_latents": n_latents, **(options or {})}
        if "k" in inspect.signature(ARCHITECTURES[architecture]).parameters:
            arguments["k"] = k
        self.sae = build_autoencoder(architecture, **arguments)
        self.lr = default_learning_rate(n_latents) if lr is None else lr
        self.register_buffer("silent_for", torch.zeros(n_latents, dtype=torch.int64))
        self._val = ReconstructionMetrics(d_in, n_latents)
        self._dead_after = dead_after

    @property
    def quality(self) -> ReconstructionQuality | None:
        """Of the newest validation, as soon as its last batch is measured; None before."""
        # Lightning asks callbacks before the module when a validation ends.
        return self._val.compute() if self._val.n_vectors else None

    @property
    def activations(self) -> Activations:
        """The data module.

        Raises:
            ValueError: If it serves something else.
        """
        datamodule = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(datamodule, Activations):
            raise ValueError(
                f"{type(datamodule).__name__} serves no activations: set data to "
                "datamodules.activations.ActivationDataModule"
            )
        return datamodule

    def setup(self, stage: str) -> None:
        """Start from the data's scale, centre and variance, unless the weights already do.

        Raises:
            ValueError: If the data module serves no activations.
        """
        if stage == "fit" and not self.sae.is_initialised:
            self.sae.initialise(self.activations.sample(N_INITIAL_VECTORS, "train"))

    def on_train_start(self) -> None:
        """Count the vectors after which a silent latent is dead."""
        if self._dead_after is None:
            loader = self.trainer.train_dataloader
            assert loader is not None
            per_process = self.trainer.num_training_batches * self.trainer.datamodule.batch_size  # pyright: ignore
            self._dead_after = int(DEAD_AFTER_EPOCHS * per_process * self.trainer.world_size)

    def training_step(self, batch: Float[Tensor, "batch dim"], batch_idx: int) -> Tensor:
        """Loss of one batch of vectors; counts for how long each latent has been silent."""
        assert self._dead_after is not None
        is_dead = self.silent_for >= self._dead_after
        progress = self.global_step / max(training_steps(self.trainer), 1)
        loss = self.sae.loss(batch, is_dead, progress)
        fired = loss.fired
        if self.trainer.world_size > 1:
            fired = self.all_gather(fired.to(torch.uint8)).any(0).bool()  # pyright: ignore
        n_vectors = len(batch) * self.trainer.world_size
        self.silent_for = torch.where(fired, 0, self.silent_for + n_vectors)
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.global_step % every == 0:
            scalars = {
                "train/fvu": loss.fvu,
                "train/loss": loss.total,
                "train/auxiliary": loss.auxiliary,
                "train/sparsity": loss.sparsity,
                "train/l0": loss.l0,
                "train/dead_fraction": is_dead.float().mean(),
            }
            scalars = mean_over_processes(self, scalars)
            self.log("train/fvu", scalars.pop("train/fvu"), prog_bar=True)
            self.log_dict(scalars)
        return loss.total

    def on_after_backward(self) -> None:
        """Keep decoder rows on the unit sphere: drop gradients along them, before clipping."""
        self.sae.constrain_gradients()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.global_step % every == 0:
            self.log("train/grad_norm", gradient_norm(self.sae.parameters()))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Bring decoder rows back to norm 1 after the step."""
        self.sae.constrain_weights()

    def on_validation_epoch_start(self) -> None:
        """Fit the threshold on the calibration episodes."""
        self._val.reset()
        if not self.trainer.sanity_checking:
            n_most = min(N_CALIBRATION_VECTORS, MAX_CALIBRATION_ENTRIES // (2 * self.hparams["k"]))
            vectors = self.activations.sample(n_most, "calibration")
            self.sae.calibrate(part.to(self.device) for part in vectors.split(4096))

    def validation_step(self, batch: Float[Tensor, "batch dim"], batch_idx: int) -> None:
        """Reconstruct held-out vectors as at inference."""
        codes = self.sae.encode(batch)
        fires = (codes > 0).sum(0)
        if self.trainer.world_size == 1:
            self._val.update(batch, self.sae.decode(codes), fires)
            return
        # Callbacks ask for the quality before any hook in which an epoch could be summed up.
        share = ReconstructionMetrics(self.sae.d_in, self.sae.n_latents)
        share.update(batch, self.sae.decode(codes), fires)
        shares = self.all_gather(share.sums.to(self.device))
        assert isinstance(shares, Tensor)
        self._val.take(torch.cat([self._val.sums[None], shares.cpu()]))

    def on_validation_epoch_end(self) -> None:
        """Log fidelity and sparsity over all held-out vectors."""
        quality = self._val.compute()
        scalars = {f"val/{name}": value for name, value in quality.scalars().items()}
        # The same in each process; Lightning warns where nothing is to be averaged.
        self.log_dict(scalars, prog_bar=False, sync_dist=True)

    def test_step(self, batch: Float[Tensor, "batch dim"], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        """Forget what a validation measured; the threshold stays as trained."""
        self._val.reset()

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Float[Tensor, "batch dim"], batch_idx: int) -> Tensor:
        """Codes of vectors, (batch, latent)."""
        return self.sae.encode(batch)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with warm-up and a linear decay at the end."""
        adam = torch.optim.Adam(self.sae.parameters(), lr=self.lr, fused=True)
        optimizer = clippable(adam)
        hparams = self.hparams
        shape = (
            training_steps(self.trainer),
            hparams["warmup_fraction"],
            hparams["decay_fraction"],
        )
        schedule = LambdaLR(optimizer, lambda step: trapezoid(step, *shape))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def save_autoencoder(self, folder: Path) -> Path:
        """Write the autoencoder so that it loads alone, here and in SAELens."""
        density = None if self.quality is None else self.quality.density
        return save_autoencoder(self.sae, folder, self.activations.provenance, density)
