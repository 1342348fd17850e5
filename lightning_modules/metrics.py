"""Metrics in the data's own units, accumulated over whole epochs and all processes."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric


class ChunkL1(Metric):
    """Mean absolute action error per chunk step, padding excluded, averaged over dimensions."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, chunk_size: int):
        super().__init__()
        zeros = torch.zeros(chunk_size, dtype=torch.float64)
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", zeros.clone(), dist_reduce_fx="sum")

    def update(
        self,
        predicted: Float[Tensor, "batch chunk action"],
        actions: Float[Tensor, "batch chunk action"],
        action_is_pad: Bool[Tensor, "batch chunk"],
    ) -> None:
        """Add a batch, in data units."""
        valid = ~action_is_pad
        error = (predicted - actions).abs().mean(-1)
        # Not in place: inference mode may have made the sums.
        self.total = self.total + torch.where(valid, error, 0).sum(0, dtype=torch.float64)
        self.count = self.count + valid.sum(0)

    def compute(self) -> tuple[Float[Tensor, " chunk"], Float[Tensor, ""]]:
        """Mean error of each chunk step (NaN where none was valid), and over all valid steps."""
        return self.total / self.count, self.total.sum() / self.count.sum()


class Mean(Metric):
    """Mean of what batches say, each weighted by how much of it there was."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero.clone(), dist_reduce_fx="sum")
        self.add_state("weight", zero.clone(), dist_reduce_fx="sum")

    def update(self, value: Float[Tensor, ""], weight: int | Tensor) -> None:
        """Add the mean of a batch."""
        # Not in place: inference mode may have made the sums.
        self.total = self.total + value.detach().double() * weight
        self.weight = self.weight + weight

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all batches and processes; NaN when all weights were 0."""
        return self.total / self.weight


def mean_over_processes(
    module: LightningModule, scalars: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Average what each process measured on its share of a batch, where there are several.

    Shares of a training batch are of equal size. One exchange for all numbers; Lightning's own
    averaging would take two for each, in every step.
    """
    values = {name: value.detach() for name, value in scalars.items()}
    if module.trainer.world_size == 1:
        return values
    stacked = torch.stack([value.float() for value in values.values()])
    gathered = module.all_gather(stacked)
    assert isinstance(gathered, Tensor)
    return dict(zip(values, gathered.mean(0), strict=True))


def epoch_weight(module: LightningModule, n_samples: int) -> int:
    """Weight of a batch in an epoch's mean over all processes, for ``log(batch_size=...)``.

    Lightning divides the weights of an epoch by the number of processes and drops the remainder;
    a multiple of that number has none.
    """
    return n_samples * module.trainer.world_size


def shown_chunk_steps(chunk_size: int) -> list[int]:
    """Chunk steps worth a curve of their own: 0, powers of two, and the last."""
    steps = {0, chunk_size - 1}
    step = 1
    while step < chunk_size:
        steps.add(step)
        step *= 2
    return sorted(steps)


def chunk_l1_scalars(
    name: str, unit: str, metric: ChunkL1
) -> tuple[Float[Tensor, " chunk"], dict[str, Tensor]]:
    """Errors of each chunk step, and what to log of them: the mean, and the steps worth a curve."""
    per_step, mean = metric.compute()
    shown = {
        f"{name}_{unit}/k{step:02d}": per_step[step].float()
        for step in shown_chunk_steps(len(per_step))
        if torch.isfinite(per_step[step])
    }
    return per_step, {f"{name}_{unit}": mean.float(), **shown}


def baseline_l1(
    first_action: Float[Tensor, "batch action"],
    state: Float[Tensor, "batch state"] | None,
    mean_action: Float[Tensor, " action"],
    unit: str,
) -> dict[str, Tensor]:
    """Errors of two policies that look at nothing: the mean action, and staying where one is.

    Args:
        first_action: Demonstrated actions at the observed instant.
        state: Observed states; staying is left out when they are not positions like the actions.
        mean_action: Over the training split.
        unit: Of actions, as it appears in metric names.
    """
    errors = {
        f"baseline/mean_action_l1_{unit}": (first_action - mean_action.to(first_action))
        .abs()
        .mean()
    }
    if state is not None and state.shape == first_action.shape:
        errors[f"baseline/hold_position_l1_{unit}"] = (first_action - state).abs().mean()
    return errors
