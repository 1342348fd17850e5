"""Activations that worker processes computed are those of one process, byte for byte."""

from pathlib import Path

import pytest
import torch
from known_activations import SHAPES, Known, content
from recordings import write_demos
from test_activations import LENGTHS, save_policy

from datamodules.activation_store import Workers, open_or_build
from datamodules.activations import ActivationDataModule
from policies.workers import WorkerError

FRAME_BYTES = 2 * 8 * 2
SHARD_MB = 4 * FRAME_BYTES / 2**20
"""A shard for each piece."""


def build(folder: Path, workers: Workers | None):
    def compute(frames):
        assert workers is None, "the workers compute"
        return content()[frames.start : frames.stop]

    identity = {"policy": "old"}
    return open_or_build(folder, SHAPES, "float16", identity, compute, SHARD_MB, False, workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.fault(7)
def test_a_killed_worker_loses_no_more_than_its_shard(tmp_path):
    build(tmp_path / "alone", None)
    expected = contents(tmp_path / "alone")
    workers = Workers(1, "processes", Known(9, tmp_path / "died"))
    with pytest.raises(WorkerError, match="fewer workers"):
        build(tmp_path / "store", workers)
    # Frame 9 begins the fourth piece.
    kept = contents(tmp_path / "store")
    assert [name for name in kept if name.startswith("shard_")] == [
        f"shard_{number:05d}.safetensors" for number in range(3)
    ]
    assert all(kept[name] == expected[name] for name in kept if name.startswith("shard_"))
    build(tmp_path / "store", workers)
    assert contents(tmp_path / "store") == expected


@pytest.mark.slow
def test_a_policys_activations_do_not_depend_on_who_computes_them(tmp_path):
    demos = write_demos(tmp_path / "demos.hdf5", lengths=LENGTHS)
    policy = save_policy(tmp_path / "policy.ckpt", demos)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, n_workers in (("alone", 0), ("workers", 1)):
        data = ActivationDataModule(
            str(policy),
            frames_per_batch=8,
            cache_dir=str(tmp_path / name),
            device="cpu",
            progress=False,
            shard_mb=0.001,
            episodes=list(range(8)),
            n_workers=n_workers,
        )
        data.setup()
    torch.set_num_threads(threads)
    (alone,) = (path for path in (tmp_path / "alone").iterdir() if path.is_dir())
    (workers,) = (path for path in (tmp_path / "workers").iterdir() if path.is_dir())
    assert len(list(alone.glob("shard_*"))) > 4
    assert contents(workers) == contents(alone)
