"""Train LeRobot's own policies under our trainer: their loss and presets, our data and metrics."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_modules.data_schema import refuse_other_data, store_schema
from lightning_modules.metrics import (
    ChunkL1,
    baseline_l1,
    chunk_l1_scalars,
    epoch_weight,
    mean_over_processes,
)
from lightning_modules.optimisation import (
    Schedule,
    build_schedule,
    gradient_norm,
    training_steps,
)
from policies.interface import Batch, DataSchema
from policies.lerobot_chunks import chunk_source
from policies.lerobot_config import (
    ImageStatistics,
    build_config,
    build_policy,
    config_to_dict,
    data_needs,
    lerobot_statistics,
)
from policies.lerobot_format import Statistics
from policies.lerobot_view import CHECKPOINT_KEY, LeRobotPolicyView, processors_for


class LeRobotPolicyModule(LightningModule):
    """A policy of LeRobot: Diffusion Policy, ACT, VQ-BeT, or another whose extra is installed.

    Loss, optimiser, schedule and gradient clipping are LeRobot's own unless set otherwise. In
    validation the loss is LeRobot's in eval mode (for ACT that is the L1 term alone, z = 0), with
    the same noise at every validation.

    Args:
        policy_type: LeRobot's name of the policy, e.g. diffusion, act or vqbet.
        cameras: Camera name to [height, width] in px.
        state_dim: Dimensions of the proprioceptive state; 0 for none.
        action_dim: Dimensions of one action.
        chunk_size: Steps of the action window that the data module gives.
        policy_config: Fields of LeRobot's configuration of the policy; LeRobot's defaults for the
            rest, but the window is as long as the data's and no pretrained weights are downloaded.
        environment_state_dim: Dimensions of a privileged environment state to read; 0 for none.
        image_statistics: How pictures are scaled: by the data's moments, by ImageNet's (with
            pretrained weights), or symmetric to -1..1.
        lr: Learning rate; null for LeRobot's preset. Groups with a rate of their own keep it.
        weight_decay: Weight decay; null for LeRobot's preset.
        lr_schedule: LeRobot's preset, or the learning rate after the warm-up.
        warmup_steps: Optimiser steps of linear warm-up; with the preset, null for its own.
        validation_seed: Seed of the noise in the validation loss.
        action_unit: Unit of the data's actions, as it appears in metric names.
        task: What a language-conditioned policy is told to do.

    Raises:
        ValueError: If the policy is unknown, needs packages that are not installed, or refuses its
            configuration.
    """

    def __init__(
        self,
        policy_type: str,
        cameras: dict[str, list[int]],
        state_dim: int,
        action_dim: int,
        chunk_size: int,
        policy_config: dict[str, Any] | None = None,
        environment_state_dim: int = 0,
        image_statistics: ImageStatistics = "data",
        lr: float | None = None,
        weight_decay: float | None = None,
        lr_schedule: Literal["preset"] | Schedule = "preset",
        warmup_steps: int | None = None,
        validation_seed: int = 0,
        action_unit: str = "px",
        task: str | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        schema = DataSchema(
            cameras={name: (int(size[0]), int(size[1])) for name, size in cameras.items()},
            state_dim=state_dim,
            action_dim=action_dim,
            environment_state_dim=environment_state_dim,
        )
        config = build_config(policy_type, policy_config or {}, schema, chunk_size)
        self.needs = data_needs(config)
        self.policy = build_policy(config)
        self.data_schema = schema
        self.unit = action_unit
        self._statistics: Statistics | None = None
        self._view: LeRobotPolicyView | None = None
        self.val_prediction = ChunkL1(chunk_source(self.policy).chunk_size)

    @property
    def view(self) -> LeRobotPolicyView:
        """The policy as rollouts and diagnostics see it.

        Raises:
            RuntimeError: Before the statistics of the training split are known.
        """
        if self._view is None:
            raise RuntimeError("the policy has no statistics yet: they are set in setup()")
        return self._view

    def prepare_data(self) -> None:
        """Check that the data module cuts samples as the policy needs them, before frames load.

        Raises:
            ValueError: If not; it names the values to set.
        """
        self.needs.require(self._datamodule, self.hparams["policy_type"])

    def setup(self, stage: str) -> None:
        """Take the statistics of the training split, unless a checkpoint already brought some."""
        self.needs.require(self._datamodule, self.hparams["policy_type"])
        if self._statistics is None:
            self._use(
                lerobot_statistics(
                    self._datamodule.statistics,
                    self.data_schema,
                    self.hparams["image_statistics"],
                )
            )

    @property
    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _use(self, statistics: Statistics) -> None:
        self._statistics = statistics
        processors = processors_for(self.policy.config, statistics)
        self._view = LeRobotPolicyView(self.policy, *processors, task=self.hparams["task"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """LeRobot's loss of one batch."""
        loss, parts = self.policy.forward(self.view.training_batch(batch))
        scalars = {"train/loss": loss} | {
            f"train/{name}": torch.as_tensor(value, device=loss.device)
            for name, value in _scalars(parts).items()
        }
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            scalars = mean_over_processes(self, scalars)
        self.log("train/loss", scalars.pop("train/loss"), prog_bar=True)
        self.log_dict(scalars)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if (self.global_step + 1) % every == 0:
            self.log("train/grad_norm", gradient_norm(self.policy.parameters()))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; if it says nothing, at LeRobot's preset."""
        if gradient_clip_val is None:
            gradient_clip_val = self.policy.config.get_optimizer_preset().grad_clip_norm
        self.clip_gradients(
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm or "norm",
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure LeRobot's loss, and the error of what the policy would do."""
        number = batch_idx * self.trainer.world_size + self.global_rank
        seed = self.hparams["validation_seed"] + number
        with _without_trace(self.policy, seed):
            loss, _ = self.policy.forward(self.view.training_batch(batch))
        now = -self.needs.action_start
        window = slice(now, now + self.view.chunk_size)
        actions = batch.actions[:, window]
        self.val_prediction.update(
            self.view.predict_chunk(batch.observation), actions, batch.action_is_pad[:, window]
        )
        state = batch.observation.state
        if state is not None and self.needs.n_obs_steps > 1:
            state = state[:, -1]
        mean_action = self._datamodule.statistics.action.mean
        values = {"val/loss": loss, **baseline_l1(actions[:, 0], state, mean_action, self.unit)}
        weight = epoch_weight(self, len(batch))
        self.log_dict(values, on_epoch=True, sync_dist=True, batch_size=weight)

    def on_validation_epoch_end(self) -> None:
        """Log errors in data units, per chunk step."""
        per_step, scalars = chunk_l1_scalars("val/l1", self.unit, self.val_prediction)
        self.log_dict(scalars, sync_dist=True)
        name = f"val/first_action_l1_{self.unit}"
        self.log(name, per_step[0].float(), prog_bar=True, sync_dist=True)
        self.val_prediction.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predict chunks in data units, (batch, chunk, action)."""
        return self.view.predict_chunk(batch.observation)

    def configure_optimizers(self) -> Any:
        """LeRobot's preset for the policy, changed where an argument says so.

        Raises:
            ValueError: If a schedule needs an end and the trainer has none.
        """
        preset = self.policy.config.get_optimizer_preset()
        changes = {
            name: self.hparams[name]
            for name in ("lr", "weight_decay")
            if self.hparams[name] is not None
        }
        optimizer = dataclasses.replace(preset, **changes).build(self.policy.get_optim_params())
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"LeRobot's {self.hparams['policy_type']} wants {len(optimizer)} optimisers; "
                "policies that are trained by one are supported"
            )
        schedule = self._schedule(optimizer)
        if schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        warmup_steps = self.hparams["warmup_steps"]
        if self.hparams["lr_schedule"] != "preset":
            return build_schedule(
                optimizer, self.hparams["lr_schedule"], warmup_steps or 0, self._training_steps()
            )
        preset = self.policy.config.get_scheduler_preset()
        if preset is None:
            if warmup_steps:
                return build_schedule(optimizer, "constant", warmup_steps, 0)
            return None
        if warmup_steps is not None:
            preset = dataclasses.replace(preset, num_warmup_steps=warmup_steps)
        return preset.build(optimizer, self._training_steps())

    def _training_steps(self) -> int:
        steps = training_steps(self.trainer)
        if not steps:
            raise ValueError(
                "the learning rate schedule needs an end: set trainer.max_steps or "
                "trainer.max_epochs"
            )
        return steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store config and statistics, so that the file is usable alone."""
        store_schema(checkpoint, self.data_schema)
        checkpoint[CHECKPOINT_KEY] = {
            "config": config_to_dict(self.policy.config),
            "statistics": self._statistics,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the statistics of the checkpoint, and refuse one that was made for other data.

        Raises:
            ValueError: If cameras or dimensions differ from the data set's; all are named.
        """
        refuse_other_data(checkpoint, self._trainer)
        self._use(checkpoint[CHECKPOINT_KEY]["statistics"])

    def export_lerobot(self, folder: str | Path) -> None:
        """Write a folder that LeRobot's ``from_pretrained`` and ``lerobot-eval`` run.

        Raises:
            FileExistsError: If the folder holds something.
        """
        self.view.export_lerobot(Path(folder))


def _scalars(parts: dict[str, Any] | None) -> dict[str, float]:
    """What a policy reports beside its loss, where it is a number."""
    return {
        name: float(value)
        for name, value in (parts or {}).items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }


@contextlib.contextmanager
def _without_trace(policy: nn.Module, seed: int) -> Iterator[None]:
    """Draw from ``seed``, then put random numbers, buffers and frozen parameters back.

    VQ-BeT counts and moves its codebook in every forward pass, in eval mode too.
    """
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    device = next(policy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for name, buffer in policy.named_buffers():
                buffer.copy_(buffers[name])
            for parameter in trained:
                parameter.requires_grad_(True)
