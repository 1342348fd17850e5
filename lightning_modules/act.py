"""Train ACT: the loss, the optimiser, and the names under which numbers are logged."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_modules.augmentation import (
    ImageAugmentation,
    MirrorKind,
    mirror_for_training,
    require_points,
)
from lightning_modules.data_schema import refuse_other_data, store_schema
from lightning_modules.metrics import (
    ChunkL1,
    Mean,
    baseline_l1,
    chunk_l1_scalars,
    epoch_weight,
    mean_over_processes,
)
from lightning_modules.optimisation import (
    ParameterGroup,
    Schedule,
    build_adamw,
    build_schedule,
    gradient_norm,
    training_steps,
)
from policies.act import ACTLoss, ACTPolicy
from policies.interface import Batch
from policies.lerobot_format import export_lerobot_act


class ActModule(LightningModule):
    """Action Chunking with Transformers (Zhao et al. 2023), trained by masked L1 and KL.

    Args:
        kl_weight: Weight of the KL term, against the mean normalised L1.
        lr: Learning rate.
        lr_backbone: Learning rate of the image encoder; null for ``lr``.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's moment decays.
        lr_schedule: Learning rate after the warm-up.
        warmup_steps: Optimiser steps of linear warm-up.
        decay_steps: Step at which the cosine ends; null for the end of the run.
        shift_px: Augmentation: largest random shift of the pictures along each axis.
        brightness: Augmentation: largest relative change of brightness.
        contrast: Augmentation: largest relative change of contrast.
        mirror: Augmentation: mirror half of the samples, pictures, states and actions together.
            x_flip also trains for the mirrored arm; anti_diagonal keeps PushT's goal.
        mirror_extent: Width of the board that states and actions are points of, in their unit.
            Data that reach from 0 to between half of it and all of it are not told from points
            of such a board: a width that is wrong by less than that mirrors at the wrong line.
        mirror_point_order: Places of the environment state's points after the reflection; empty
            where they keep theirs. Only for policies that read one.
        augmentation_seed: Seed of the augmentation, a function of it, epoch and batch alone.
        compile: Compile the loss with torch.compile.
        action_unit: Unit of the data's actions, as it appears in metric names.
        policy: Arguments of ``policies.act.ACTPolicy``.
    """

    def __init__(
        self,
        kl_weight: float = 0.1,
        lr: float = 1e-4,
        lr_backbone: float | None = None,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        lr_schedule: Schedule = "constant",
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        shift_px: int = 0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        mirror: MirrorKind | None = None,
        mirror_extent: float = 512.0,
        mirror_point_order: tuple[int, ...] | None = None,
        augmentation_seed: int = 0,
        compile: bool = False,
        action_unit: str = "px",
        **policy: Any,
    ):
        super().__init__()
        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight} must not be negative")
        self.save_hyperparameters()
        self.policy = ACTPolicy(**policy)
        self.kl_weight = kl_weight
        self.unit = action_unit
        self.augmentation = ImageAugmentation(shift_px, brightness, contrast)
        self.mirror = (
            None
            if mirror is None
            else mirror_for_training(
                mirror, mirror_extent, self.policy.data_schema, mirror_point_order
            )
        )
        self._compute_loss = self.policy.loss
        chunk_size = self.policy.chunk_size
        self.train_reconstruction = ChunkL1(chunk_size)
        self.val_reconstruction = ChunkL1(chunk_size)
        self.val_prediction = ChunkL1(chunk_size)
        self.val_l1 = Mean()
        self.val_kl = Mean()

    @property
    def view(self) -> ACTPolicy:
        """The policy as rollouts and diagnostics see it."""
        return self.policy

    def setup(self, stage: str) -> None:
        """Fit the normaliser, unless the weights already hold one; compile the loss if asked to.

        Raises:
            ValueError: If the data module cuts samples that ACT cannot learn from.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        for name, needed in (("n_obs_steps", 1), ("action_start", 0)):
            given = getattr(datamodule, name, needed)
            if given != needed:
                raise ValueError(
                    f"{name} is {given}, but ACT sees one instant and predicts from it on: "
                    f"set --data.init_args.{name} {needed}"
                )
        if self.mirror is not None and stage == "fit":
            require_points(self.hparams["mirror_extent"], datamodule.statistics)
        if not self.policy.normaliser.is_fitted:
            self.policy.fit_normaliser(datamodule.statistics)
        if self.hparams["compile"] and stage == "fit":
            self._compute_loss = torch.compile(self.policy.loss)

    def _augmented(self, batch: Batch, batch_idx: int) -> Batch:
        """Change the samples, as a function of seed, epoch and batch alone."""
        if self.mirror is None and not self.augmentation.is_active:
            return batch
        place = (self.current_epoch, batch_idx, self.global_rank)
        seed = hash((self.hparams["augmentation_seed"], *place))
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        if self.mirror is not None:
            batch = self.mirror(batch, generator)
        return self.augmentation(batch, generator)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch; L1 in data units is accumulated for the epoch."""
        batch = self._augmented(batch, batch_idx)
        loss: ACTLoss = self._compute_loss(batch, self.kl_weight)
        self.train_reconstruction.update(loss.prediction, batch.actions, batch.action_is_pad)
        scalars = {"train/loss": loss.total, "train/l1": loss.l1, "train/kl_nats": loss.kl}
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            scalars = mean_over_processes(self, scalars)
        self.log("train/loss", scalars.pop("train/loss"), prog_bar=True)
        self.log_dict(scalars)
        return loss.total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.global_step + 1) % every == 0:
            self.log("train/grad_norm", gradient_norm(self.policy.parameters()))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def on_validation_epoch_start(self) -> None:
        """Report the training error accumulated since the last validation, then start afresh."""
        if self.trainer.state.fn == "fit" and self.train_reconstruction.update_called:
            self._log_chunk_l1("train/reconstruction_l1", self.train_reconstruction)
            self.train_reconstruction.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the loss as in training, and the error of what the policy would do (z = 0)."""
        loss = self.policy.loss(batch, self.kl_weight)
        predicted = self.policy.predict_chunk(batch.observation)
        self.val_reconstruction.update(loss.prediction, batch.actions, batch.action_is_pad)
        self.val_prediction.update(predicted, batch.actions, batch.action_is_pad)
        self.val_l1.update(loss.l1, (~batch.action_is_pad).sum())
        self.val_kl.update(loss.kl, len(batch))
        mean_action = self.trainer.datamodule.statistics.action.mean  # type: ignore[attr-defined]
        state = batch.observation.state
        values = baseline_l1(batch.actions[:, 0], state, mean_action, self.unit)
        weight = epoch_weight(self, len(batch))
        self.log_dict(values, on_epoch=True, sync_dist=True, batch_size=weight)

    def on_validation_epoch_end(self) -> None:
        """Log the loss over all samples, and errors in data units, per chunk step."""
        l1, kl = self.val_l1.compute(), self.val_kl.compute()
        losses = {"val/loss": l1 + self.kl_weight * kl, "val/l1": l1, "val/kl_nats": kl}
        self.log_dict({name: value.float() for name, value in losses.items()}, sync_dist=True)
        self.val_l1.reset()
        self.val_kl.reset()
        self._log_chunk_l1("val/reconstruction_l1", self.val_reconstruction)
        per_step = self._log_chunk_l1("val/l1", self.val_prediction)
        name = f"val/first_action_l1_{self.unit}"
        self.log(name, per_step[0].float(), prog_bar=True, sync_dist=True)
        self.val_reconstruction.reset()
        self.val_prediction.reset()

    def _log_chunk_l1(self, name: str, metric: ChunkL1) -> Tensor:
        per_step, scalars = chunk_l1_scalars(name, self.unit, metric)
        # Of all processes already; Lightning warns where nothing is to be averaged.
        self.log_dict(scalars, sync_dist=True)
        return per_step

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict chunks in data units, (batch, chunk, action)."""
        return self.policy.predict_chunk(batch.observation)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a group of its own for the image encoder, and a schedule per step."""
        hparams = self.hparams
        named = list(self.policy.named_parameters())
        backbone = [p for name, p in named if name.startswith("network.backbone.")]
        rest = [p for name, p in named if not name.startswith("network.backbone.")]
        lr_backbone = hparams["lr"] if hparams["lr_backbone"] is None else hparams["lr_backbone"]
        groups = [ParameterGroup("policy", rest, hparams["lr"])]
        if backbone:
            groups.append(ParameterGroup("backbone", backbone, lr_backbone))
        optimizer = build_adamw(groups, hparams["weight_decay"], tuple(hparams["betas"]))
        decay_steps = hparams["decay_steps"] or training_steps(self.trainer)
        schedule = build_schedule(
            optimizer, hparams["lr_schedule"], hparams["warmup_steps"], decay_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def export_lerobot(self, folder: Path) -> None:
        """Write a LeRobot policy folder.

        Raises:
            LeRobotFormatError: If LeRobot's ACT cannot represent the policy.
        """
        export_lerobot_act(self.policy, folder, kl_weight=self.kl_weight)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the policy was made for, so that the file is usable alone."""
        store_schema(checkpoint, self.policy.data_schema)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was made for other data.

        Raises:
            ValueError: If cameras or dimensions differ from the data set's; all are named.
        """
        refuse_other_data(checkpoint, self._trainer)
