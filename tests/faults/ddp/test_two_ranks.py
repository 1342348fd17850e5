"""Two processes train as one would: gradients, metrics, samples, and what only the first does."""

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from ranks import Rows, all_of, together, trainer
from torch import Tensor
from torch.utils.data import DataLoader
from toy import Shout, ToyModule

from autoencoders.metrics import ReconstructionMetrics
from autoencoders.planted import PlantedDictionary
from callbacks.checkpoints import Checkpoint, LastCheckpoint
from callbacks.dashboard import Dashboard, read_index
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, read_metrics
from callbacks.non_finite import NonFiniteStop
from datamodules.hdf5 import HDF5DataModule
from datamodules.sampling import EpochBatchSampler, EvaluationBatchSampler
from lightning_modules.act import ActModule
from lightning_modules.sae import SAEModule
from policies.checkpoint_files import read_checkpoint
from policies.interface import Batch

SMALL = {
    "dim_model": 16,
    "n_heads": 2,
    "dim_feedforward": 16,
    "n_encoder_layers": 1,
    "n_posterior_layers": 1,
    "latent_dim": 4,
    "dropout": 0.0,
    "backbone": "small_cnn",
    "backbone_width": 8,
    "token_stride": 8,
}
CHUNK = 3
JOINED = 16
"""Samples of a training batch, all processes together."""
D_IN, K, N_LATENTS = 8, 2, 64
PLANTED = PlantedDictionary.draw(D_IN, 16, K, seed=0)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks"),
]


class Samples(Callback):
    """Notes what a process trains and validates on, and numbers it would draw."""

    def __init__(self) -> None:
        self.trained: list[list[tuple[int, int]]] = []
        self.validated: list[tuple[int, int]] = []
        self.drawn: list[float] = []

    @staticmethod
    def _names(batch: Any) -> list[tuple[int, int]]:
        return list(zip(batch.episode_index.tolist(), batch.frame_index.tolist(), strict=True))

    def on_train_batch_end(self, *hook: Any) -> None:
        self.trained.append(self._names(hook[3]))
        state = torch.get_rng_state()
        self.drawn.append(float(torch.rand(())))
        torch.set_rng_state(state)

    def on_validation_batch_end(self, *hook: Any) -> None:
        self.validated += self._names(hook[3])


def weights(module: torch.nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy() for parameter in module.parameters()]


def numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


class Double(ActModule):
    """Computes in float64; Lightning's own way cannot convert frozen batches."""

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        seen = batch.observation
        assert seen.state is not None
        images = {name: image.double() / 255 for name, image in seen.images.items()}
        observation = replace(seen, state=seen.state.double(), images=images)
        return replace(batch, actions=batch.actions.double(), observation=observation)


def act_data(file: Path, world_size: int, dropped: int = CHUNK - 1) -> HDF5DataModule:
    """Samples without padding: each process weighs the valid steps of its own share alike."""
    return HDF5DataModule(
        path=str(file),
        batch_size=JOINED // world_size,
        val_batch_size=8 // world_size,
        chunk_size=CHUNK,
        drop_n_last_frames=dropped,
        val_fraction=0.5,
        progress=False,
    )


def act_module(data: HDF5DataModule, use_latent: bool) -> Double:
    """ACT in float64; without a posterior there is no noise."""
    return Double(
        cameras=data.cameras,
        state_dim=data.state_dim,
        action_dim=data.action_dim,
        chunk_size=CHUNK,
        use_latent=use_latent,
        lr=1e-3,
        **SMALL,
    ).double()


def act(file: Path, folder: Path, world_size: int, use_latent: bool) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    data = act_data(file, world_size)
    module = act_module(data, use_latent)
    samples = Samples()
    run = trainer(
        folder,
        samples,
        ExactResume(),
        NonFiniteStop(),
        max_steps=6,
        val_check_interval=3,
    )
    run.fit(module, datamodule=data)
    metrics = numbers(run.callback_metrics)
    predicted = run.predict(module, datamodule=data)
    assert predicted is not None
    shout = Shout()
    padded = trainer(folder, shout, Dashboard())
    padded.validate(module, datamodule=act_data(file, world_size, dropped=0), verbose=False)
    return {
        "weights": weights(module),
        "metrics": metrics,
        "padded metrics": numbers(padded.callback_metrics),
        "shouted": shout.steps,
        "trained": samples.trained,
        "validated": samples.validated,
        "drawn": samples.drawn,
        "n_predicted": sum(len(part) for part in predicted),
        "n_val": len(data.val_dataset or ()),
    }


def resumed_act(file: Path, folder: Path, world_size: int) -> list[np.ndarray]:
    """Stop after four of six steps and go on; returns the weights."""
    last = None
    for steps in (4, 6):
        seed_everything(0, verbose=False)
        data = act_data(file, world_size)
        module = act_module(data, use_latent=True)
        run = trainer(
            folder,
            ExactResume(),
            LastCheckpoint(),
            enable_checkpointing=True,
            max_steps=steps,
            val_check_interval=3,
        )
        run.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
        last = str(folder / "checkpoints" / "last.ckpt")
    return weights(module)


class Vectors(LightningDataModule):
    """Activations of a planted dictionary; the validation's last batch is an odd one."""

    provenance: dict[str, Any] = {}  # noqa: RUF012  (read by name, never changed)
    d_in = D_IN

    def __init__(self, joined_batch_size: int = 32) -> None:
        super().__init__()
        self._joined = joined_batch_size
        self.splits = {
            name: 7 * PLANTED.sample(n, seed) + 3
            for seed, (name, n) in enumerate((("train", 256), ("calibration", 200), ("val", 117)))
        }

    @property
    def batch_size(self) -> int:
        assert self.trainer is not None
        return self._joined // self.trainer.world_size

    def sample(self, n: int, split: str, seed: int = 0) -> Tensor:
        return self.splits[split][:n].float()

    def _place(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def train_dataloader(self) -> DataLoader:
        sampler = EpochBatchSampler(256, self.batch_size, 1, **self._place())
        return DataLoader(self.splits["train"], batch_sampler=sampler)  # pyright: ignore

    def val_dataloader(self) -> DataLoader:
        sampler = EvaluationBatchSampler(117, 20, **self._place())
        return DataLoader(self.splits["val"], batch_sampler=sampler)  # pyright: ignore


class Quality(Callback):
    """Asks for the quality where diagnostics do, which only the first process runs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_epoch_end(self, *hook: Any) -> None:
        if hook[0].is_global_zero:
            self.seen.append(hook[1].quality.scalars())


def sae(folder: Path, equal_share: float) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = SAEModule(
        D_IN,
        n_latents=N_LATENTS,
        k=K,
        lr=1e-3,
        dead_after=10**6,
        options={"equal_share": equal_share},
    ).double()
    module.sae.register_buffer("silent", torch.zeros(()), persistent=False)
    quality = Quality()
    run = trainer(folder, quality, max_steps=6, val_check_interval=3, precision="64-true")
    run.fit(module, datamodule=Vectors())
    return {
        "weights": weights(module),
        "silent_for": module.silent_for.numpy(),
        "threshold": module.sae.threshold.numpy(),
        "scale": float(module.sae.scale),
        "variance": float(module.sae.variance),
        "metrics": numbers(run.callback_metrics),
        "quality": quality.seen,
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes whose validation samples are an odd number."""
    path = tmp_path_factory.mktemp("data") / "demos.hdf5"
    random = np.random.default_rng(0)
    lengths = (21, 18, 22, 20)
    with h5py.File(path, "w") as demos:
        demos.attrs["num_demos"] = len(lengths)
        for number, length in enumerate(lengths):
            group = demos.create_group(f"demo_{number}")
            pictures = random.integers(0, 256, (length, 8, 8, 3), np.uint8)
            group["observations/image"] = pictures
            group["observations/qpos"] = random.normal(size=(length, 2)).astype(np.float32)
            group["actions"] = random.normal(size=(length, 2)).astype(np.float32)
    return path


@pytest.fixture(scope="module")
def runs(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What one process, and each of two, found in the same work."""

    def work(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
        return {
            "act": act(file, folder / "act", world_size, use_latent=False),
            "vae": act(file, folder / "vae", world_size, use_latent=True),
            "resumed vae": resumed_act(file, folder / "resumed", world_size),
            "sae": sae(folder / "sae", equal_share=1.0),
            "shared budget": sae(folder / "shared", equal_share=0.0),
        }

    home = tmp_path_factory.mktemp("runs")
    return {world: all_of(work, home / str(world), world) for world in (1, 2)}


def furthest(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["act", "sae"])
def test_two_processes_with_half_a_batch_make_the_steps_of_one(runs: Any, name: str) -> None:
    (alone,), pair = runs[1], runs[2]
    assert furthest(pair[0][name]["weights"], pair[1][name]["weights"]) == 0
    assert furthest(pair[0][name]["weights"], alone[name]["weights"]) <= 1e-12


def test_processes_share_each_epoch_without_repeats(runs: Any) -> None:
    (alone,), pair = runs[1], runs[2]
    steps = zip(*(run["act"]["trained"] for run in (*pair, alone)), strict=True)
    for first, second, whole in steps:
        assert len(first) == len(second)
        assert first + second == whole
    assert len({*alone["act"]["trained"][0]}) == JOINED


def test_validation_and_prediction_see_every_sample_once(runs: Any) -> None:
    (alone,), pair = runs[1], runs[2]
    seen = pair[0]["act"]["validated"] + pair[1]["act"]["validated"]
    n_val = alone["act"]["n_val"]
    assert n_val % 2 == 1, "an even number would need no padding"
    assert sorted(seen) == sorted(alone["act"]["validated"])
    assert len(seen) == 2 * n_val, "two validations"
    assert sum(run["act"]["n_predicted"] for run in pair) == n_val


@pytest.mark.parametrize("name", ["act", "sae"])
def test_metrics_of_two_processes_are_those_of_one(runs: Any, name: str) -> None:
    (alone,), pair = runs[1], runs[2]
    ours = {key: value for key, value in alone[name]["metrics"].items() if "grad_norm" not in key}
    assert len(ours) > 10
    assert {"act": "val/l1", "sae": "val/fvu"}[name] in ours
    for run in pair:
        assert {key: run[name]["metrics"][key] for key in ours} == pytest.approx(ours, rel=1e-6)


def test_validation_alone_weighs_every_valid_step_alike(runs: Any) -> None:
    """Episodes end within chunks here, and each process has batches and padding of its own."""
    (alone,), pair = runs[1], runs[2]
    ours = {
        key: value
        for key, value in alone["act"]["padded metrics"].items()
        if key.startswith(("val/", "baseline/"))
    }
    assert {"val/loss", "val/l1", "val/kl_nats", "val/l1_px"} <= ours.keys()
    for run in pair:
        found = run["act"]["padded metrics"]
        assert {key: found[key] for key in ours} == pytest.approx(ours, rel=1e-6)


@pytest.mark.fault(18)
def test_a_diagnostic_of_a_validation_alone_runs_in_the_first_process(runs: Any) -> None:
    first, second = (run["act"] for run in runs[2])
    assert (first["shouted"], second["shouted"]) == ([0], [])
    assert first["padded metrics"]["shout/loudness"] == 0
    assert first["padded metrics"].keys() == second["padded metrics"].keys()


@pytest.mark.fault(4)
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_on_a_file_goes_on_with_the_same_bits(runs: Any, world_size: int) -> None:
    for run in runs[world_size]:
        assert furthest(run["resumed vae"], run["vae"]["weights"]) == 0


def test_noise_differs_between_processes_and_nothing_is_left_unused(runs: Any) -> None:
    """Every parameter of the posterior gets a gradient, or DDP would have refused."""
    drawn = [run["vae"]["drawn"] for run in runs[2]]
    assert not set(drawn[0]) & set(drawn[1])
    assert len({*drawn[1]}) == len(drawn[1]) == 6
    assert furthest(runs[2][0]["vae"]["weights"], runs[2][1]["vae"]["weights"]) == 0


def test_silence_threshold_and_scale_of_latents_are_global(runs: Any) -> None:
    (alone,), pair = runs[1], runs[2]
    for run in pair:
        assert (run["sae"]["silent_for"] == alone["sae"]["silent_for"]).all()
        for number in ("threshold", "scale", "variance"):
            np.testing.assert_allclose(run["sae"][number], alone["sae"][number], rtol=1e-12)
    assert 0 < (alone["sae"]["silent_for"] > 0).sum() < N_LATENTS, "some fire, some do not"


def test_what_diagnostics_ask_of_the_quality_is_of_all_processes(runs: Any) -> None:
    (alone,), pair = runs[1], runs[2]
    assert pair[1]["sae"]["quality"] == []
    for ours, theirs in zip(pair[0]["sae"]["quality"], alone["sae"]["quality"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_shared_budget_is_shared_within_each_process(runs: Any) -> None:
    """Other latents are chosen than of the joined batch, equally many on average."""
    (alone,), pair = (runs[world] for world in (1, 2))
    assert furthest(pair[0]["shared budget"]["weights"], pair[1]["shared budget"]["weights"]) == 0
    for run in (*pair, alone):
        assert run["shared budget"]["metrics"]["train/l0"] == pytest.approx(K)
    assert pair[0]["shared budget"]["metrics"]["val/fvu"] == pytest.approx(
        alone["shared budget"]["metrics"]["val/fvu"], abs=0.05
    )
    np.testing.assert_array_equal(*[run["shared budget"]["threshold"] for run in pair])


@pytest.mark.parametrize("parts", [(10, 90), (50, 0, 50), (1, 1, 98)])
def test_sums_of_parts_are_those_of_the_whole(parts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1e3 + torch.randn(100, D_IN, generator=generator, dtype=torch.float64)
    hat = x + 0.3 * torch.randn(100, D_IN, generator=generator, dtype=torch.float64)
    fires = torch.rand(100, 5, generator=generator) > 0.7

    def seen(rows: slice) -> ReconstructionMetrics:
        metrics = ReconstructionMetrics(D_IN, 5)
        if len(x[rows]):
            metrics.update(x[rows], hat[rows], fires[rows].sum(0))
        return metrics

    ends = np.cumsum((0, *parts)).tolist()
    shares = [seen(slice(a, b)).sums for a, b in pairwise(ends)]
    joined = ReconstructionMetrics(D_IN, 5)
    joined.take(torch.stack(shares))
    whole = seen(slice(None)).compute()
    assert joined.compute().scalars() == pytest.approx(whole.scalars(), rel=1e-9)
    assert joined.n_vectors == 100
    assert torch.equal(joined.compute().density, whole.density)


@pytest.mark.parametrize("n_samples", [2, 3, 7, 8, 9, 16, 17, 100])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 2), (4, 2), (3, 3), (5, 1)])
def test_an_evaluation_has_every_sample_once(
    n_samples: int, batch_size: int, world_size: int
) -> None:
    if n_samples < world_size:
        with pytest.raises(ValueError, match="use fewer processes"):
            EvaluationBatchSampler(n_samples, batch_size, 0, world_size)
        return
    dealt = [
        list(EvaluationBatchSampler(n_samples, batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    assert sorted(i for batches in dealt for batch in batches for i in batch) == [*range(n_samples)]
    assert len({len(batches) for batches in dealt}) == 1
    sizes = [len(batch) for batches in dealt for batch in batches]
    assert 1 <= min(sizes) <= max(sizes) <= batch_size + 1


class Slow(Shout):
    """Takes longer than two processes may wait for each other's gradients."""

    def diagnose(self, *arguments: Any) -> Any:
        time.sleep(3)
        return super().diagnose(*arguments)


@pytest.mark.fault(18)
def test_diagnostics_run_once_and_may_take_longer_than_the_processes_patience(
    tmp_path: Path,
) -> None:
    def work(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
        shout, broken = Slow(name="shout"), Shout(name="broken", fail=True)
        best = Checkpoint(monitor="shout/loudness", mode="max", dirpath=str(folder / "checkpoints"))
        run = trainer(
            folder,
            shout,
            broken,
            Dashboard(),
            ExactResume(),
            best,
            LastCheckpoint(),
            timeout_s=2,
            enable_checkpointing=True,
            max_steps=4,
            val_check_interval=2,
            logger=[CsvLog(str(folder))],
        )
        run.fit(ToyModule(3, 2), datamodule=Rows())
        return {
            "metrics": numbers(run.callback_metrics),
            "ran": shout.steps,
            "best": best.best_model_path,
        }

    first, second = all_of(work, tmp_path)
    assert first["ran"] == [2, 4]
    assert second["ran"] == []
    assert first["metrics"]["shout/loudness"] == second["metrics"]["shout/loudness"]
    assert first["metrics"].keys() == second["metrics"].keys()
    assert Path(first["best"]).name == Path(second["best"]).name == "best-step000004.ckpt"
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert steps == [1, 2, 2, 3, 4, 4], "a row of training each step, and one of each validation"
    assert {"2", "4"} == read_index(tmp_path / "media" / "index.json").keys()
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


@pytest.mark.fault(18)
def test_a_strict_diagnostic_ends_all_processes_with_its_error(tmp_path: Path) -> None:
    def work(rank: int, world_size: int, folder: Path) -> None:
        run = trainer(
            folder, Shout(strict=True, fail=True), Dashboard(), max_steps=4, val_check_interval=2
        )
        run.fit(ToyModule(3, 2), datamodule=Rows())

    ended = together(work, tmp_path)
    assert ended.exit_codes == [1, 1]
    assert "RuntimeError: ink is out" in ended.errors[0]
    assert "failed in the first process: RuntimeError: ink is out" in ended.errors[1]


@pytest.mark.fault(13)
def test_a_nan_that_one_process_meets_stops_all_and_is_named(tmp_path: Path) -> None:
    def work(rank: int, world_size: int, folder: Path) -> None:
        run = trainer(
            folder, NonFiniteStop(), ExactResume(), LastCheckpoint(), enable_checkpointing=True
        )
        run.fit(ToyModule(3, 2), datamodule=Rows(poisoned=27))

    ended = together(work, tmp_path)
    assert ended.exit_codes == [1, 1]
    for error in ended.errors:
        assert "samples with values that are not finite: episode 2 frame 7" in error
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] > 0
    assert all(math.isfinite(float(value.sum())) for value in saved["state_dict"].values())
