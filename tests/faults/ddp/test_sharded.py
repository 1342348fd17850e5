"""Weights that are spread over processes (FSDP): what of it can be checked without a GPU.

Lightning refuses FSDP on a CPU; torch's own ``fully_shard`` runs there over gloo.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from ranks import Rows, all_of
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy import Shout, ToyModule, same

from autoencoders.sae import ARCHITECTURES, SparseAutoencoder, build_autoencoder
from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume
from callbacks.non_finite import NonFiniteStop
from policies.act import ACTPolicy
from policies.checkpoint_files import read_checkpoint
from policies.interface import Batch, Observation

JOINED = 8
VECTORS = torch.randn(JOINED, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Step(nn.Module):
    """A training step as FSDP sees it: a forward pass that returns the loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, rows: Any) -> torch.Tensor:
        return self._loss(self.model, rows)


def act() -> Step:
    """ACT without a posterior, so without noise."""
    torch.manual_seed(0)
    policy = ACTPolicy(
        cameras={"top": [16, 16]},
        state_dim=2,
        action_dim=2,
        chunk_size=3,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        n_encoder_layers=1,
        use_latent=False,
        dropout=0.0,
        backbone="small_cnn",
        backbone_width=8,
        token_stride=8,
    )
    batch = Batch(
        observation=Observation(
            images={"top": torch.rand(JOINED, 3, 16, 16).double()},
            state=torch.randn(JOINED, 2).double(),
        ),
        actions=torch.randn(JOINED, 3, 2).double(),
        action_is_pad=torch.zeros(JOINED, 3, dtype=torch.bool),
        episode_index=torch.zeros(JOINED, dtype=torch.int64),
        frame_index=torch.arange(JOINED),
    )
    return Step(policy.double(), lambda model, rows: model.loss(batch.rows(rows), 0.1).total)


def autoencoder(architecture: str) -> Step:
    torch.manual_seed(0)
    sae = build_autoencoder(architecture, d_in=6, n_latents=32).double()
    return Step(sae, lambda model, rows: model.loss(VECTORS[rows]).total)


def halves(world_size: int) -> list[slice]:
    return [slice(rank, None, world_size) for rank in range(world_size)]


def difference(make: Callable[[], Step], rank: int, world_size: int) -> dict[str, Any]:
    """Compare gradients of sharded weights with those of whole ones on the joined batch."""
    whole, sharded = make(), make()
    torch.stack([whole(rows) for rows in halves(world_size)]).mean().backward()
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (world_size,)))
    sharded(halves(world_size)[rank]).backward()
    for step in (whole, sharded):
        if isinstance(step.model, SparseAutoencoder):
            step.model.constrain_gradients()
            step.model.constrain_weights()
    worst, n_compared = 0.0, 0
    weights = zip(sharded.parameters(), whole.parameters(), strict=True)
    for part, one in weights:
        assert isinstance(part, DTensor)
        if one.grad is None:
            continue
        assert isinstance(part.grad, DTensor)
        for ours, theirs in ((part.grad, one.grad), (part.detach(), one.detach())):
            assert isinstance(ours, DTensor)
            worst = max(worst, float((ours.full_tensor() - theirs).abs().max()))
        n_compared += 1
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    return {
        "worst": worst,
        "n_compared": n_compared,
        "saved": {name: tuple(value.shape) for name, value in full.items()},
        "expected": {name: tuple(value.shape) for name, value in whole.state_dict().items()},
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    def work(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
        dist.init_process_group("gloo")
        found = {"act": difference(act, rank, world_size)}
        for name in ARCHITECTURES:
            found[name] = difference(lambda name=name: autoencoder(name), rank, world_size)
        return found

    return all_of(work, tmp_path_factory.mktemp("sharded"))


@pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks")
@pytest.mark.parametrize("name", ["act", *ARCHITECTURES])
def test_sharded_weights_get_the_gradients_of_whole_ones(compared: Any, name: str) -> None:
    first, second = (each[name] for each in compared)
    assert first["worst"] <= 1e-12
    assert second["worst"] <= 1e-12
    assert first["n_compared"] > 3
    assert first["saved"] == first["expected"], "a full state dict, under the usual names"


def trainer(folder: Path, strategy: Any, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "strategy": strategy,
            "logger": False,
            "max_steps": 4,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "plugins": [AtomicCheckpointIO()],
            **settings,
        }
    )


class Sharded(ToyModule):
    """Spreads its weights as FSDP2 wants it done."""

    def configure_model(self) -> None:
        if not any(isinstance(weight, DTensor) for weight in self.parameters()):
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in (self.net[0], self.net[3], self.net):
                fully_shard(layer, mesh=mesh)


class Look(Shout):
    """A diagnostic that asks the policy for something, as all real ones do."""

    def diagnose(self, trainer: Any, module: Any, folder: Path) -> Any:
        module.net(torch.zeros(2, 3))
        return super().diagnose(trainer, module, folder)


def spread(folder: Path, steps: int, *callbacks: Any, newest: Path | None = None) -> Any:
    """Train a toy with FSDP2, by Lightning's strategy for it."""
    seed_everything(3, verbose=False)
    strategy = ModelParallelStrategy(
        save_distributed_checkpoint=False, process_group_backend="gloo"
    )
    run = trainer(
        folder,
        strategy,
        devices=2,
        max_steps=steps,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[*callbacks, ExactResume(), NonFiniteStop(), LastCheckpoint()],
    )
    path = None if newest is None else str(newest)
    run.fit(Sharded(3, 2), datamodule=Rows(), ckpt_path=path, weights_only=True)
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def spread_runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    def refusal(folder: Path, *callbacks: Any) -> str:
        with pytest.raises(ValueError, match="needs all weights") as refused:
            spread(folder, 4, *callbacks)
        return str(refused.value)

    def work(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
        whole = spread(folder / "whole", 6)
        stopped = spread(folder / "run", 4)
        last = folder / "run" / "checkpoints" / "last.ckpt"
        return {
            "whole": whole["state_dict"],
            "stopped": stopped["state_dict"],
            "resumed": spread(folder / "run", 6, newest=last)["state_dict"],
            "diagnostic": refusal(folder / "look", Look(), Dashboard()),
            "average": refusal(folder / "average", EMA()),
        }

    return all_of(work, tmp_path_factory.mktemp("spread"))


def test_a_run_with_spread_weights_saves_them_whole_and_goes_on(spread_runs: Any) -> None:
    expected = {name: value.shape for name, value in ToyModule(3, 2).state_dict().items()}
    for run in spread_runs:
        saved = {name: value.shape for name, value in run["whole"].items()}
        assert saved == expected
        assert same(run["resumed"], run["whole"]) == []
        assert same(run["stopped"], run["whole"]) != []


def test_what_needs_all_weights_in_one_process_is_refused_before_it_waits(spread_runs: Any) -> None:
    for run in spread_runs:
        assert "leave Look out of trainer.callbacks, or use the strategy ddp" in run["diagnostic"]
        assert "leave EMA out of trainer.callbacks, or use the strategy ddp" in run["average"]


class Stand:
    """A trainer as far as callbacks look before a run."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.callbacks: list[Any] = []


@pytest.mark.parametrize(
    ("strategy", "mend"),
    [
        (lambda: FSDPStrategy(state_dict_type="sharded"), "state_dict_type to full"),
        (lambda: ModelParallelStrategy(), "save_distributed_checkpoint to false"),
        # Its package is not installed, and without it there is no way to make one.
        (lambda: object.__new__(DeepSpeedStrategy), "use the strategy ddp"),
    ],
    ids=["FSDP", "FSDP2", "DeepSpeed"],
)
def test_a_checkpoint_in_parts_is_refused_before_training(strategy: Any, mend: str) -> None:
    trainer: Any = Stand(strategy())
    with pytest.raises(ValueError, match=mend):
        ExactResume().setup(trainer, ToyModule(3, 2), "fit")
    trainer.strategy = FSDPStrategy(state_dict_type="full")
    ExactResume().setup(trainer, ToyModule(3, 2), "fit")


@pytest.mark.parametrize("callback", [EMA, Shout])
def test_fsdp_with_what_needs_all_weights_is_refused(callback: Any) -> None:
    trainer: Any = Stand(FSDPStrategy())
    with pytest.raises(ValueError, match=r"or use the strategy ddp"):
        callback().setup(trainer, ToyModule(3, 2), "fit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sharded_run_on_gpus_writes_a_checkpoint_that_continues(tmp_path: Path) -> None:
    for steps, newest in ((4, None), (6, str(tmp_path / "checkpoints" / "last.ckpt"))):
        run = trainer(
            tmp_path,
            FSDPStrategy(state_dict_type="full"),
            accelerator="gpu",
            devices=torch.cuda.device_count(),
            max_steps=steps,
            callbacks=[ExactResume(), LastCheckpoint()],
        )
        run.fit(ToyModule(3, 2), datamodule=Rows(16), ckpt_path=newest, weights_only=True)
        saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
        assert saved["global_step"] == steps
        assert saved["state_dict"].keys() == ToyModule(3, 2).state_dict().keys()
