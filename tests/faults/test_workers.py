"""A process that loads data is killed, as by the kernel when memory runs out."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyDataset
from toy_runs import errors_in, exit_code, forked, last, write_config

from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(7), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("sample", [30, 43])
def test_a_dead_worker_is_explained_and_what_was_learnt_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, log_every_n_steps=1)

    def fatal(self: ToyDataset, index: int) -> int:
        worker: Any = torch.utils.data.get_worker_info()
        if worker is not None and index == sample:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    monkeypatch.setattr(ToyDataset, "__getitem__", fatal)
    # In the given order, so that the sample comes after some steps.
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    words = ["fit", "-c", "toy.yaml", "--data.init_args.num_workers"]
    assert exit_code(*words, "0", "--trainer.max_steps", "4") == 0
    said = tmp_path / "said"
    code = forked(lambda: exit_code(*words, "2", "--ckpt_path", "last"), said)
    assert code == 1, said.read_text()
    (error,) = errors_in(said.read_text())
    for word in ("DataLoader worker", "memory", "num_workers", "--shm-size", "--ckpt_path last"):
        assert word in error
    saved = read_checkpoint(last(tmp_path) / "checkpoints" / "last.ckpt")["global_step"]
    # Torch may interrupt an optimiser's step: then the checkpoint before stands.
    assert 4 <= saved <= sample // 4
