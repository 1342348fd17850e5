"""Signals, errors and kills of one of two processes, and what is left of their run."""

import os
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from ranks import Rows, all_of, together, trainer
from toy import ToyModule, same

from callbacks.checkpoints import LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume
from callbacks.interruption import StopOnSignal
from callbacks.non_finite import NonFiniteStop
from policies.checkpoint_files import CheckpointError, newest_valid_checkpoint, read_checkpoint

STEPS = 24
"""More than two epochs of 11 batches."""
SAVED_AT = 5
STATE = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "exact_resume",
    "global_step",
    "epoch",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:.*max number of worker"),
]


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written: syncing only takes time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class At(Callback):
    """Does something to one process when some steps are done."""

    def __init__(self, step: int, what: str, rank: int | None = None) -> None:
        self.step = step
        self.what = what
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self.step or self.rank not in {None, trainer.global_rank}:
            return
        if self.what == "error":
            raise RuntimeError("stumbled")
        os.kill(os.getpid(), getattr(signal, self.what))


def train(
    folder: Path,
    *extra: Callback,
    resume: bool = False,
    joined: int = 4,
    workers: int = 0,
    save_every: int = 1,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Train, in as many processes as there are; returns what ``last.ckpt`` holds at the end."""
    seed_everything(3, verbose=False)
    last = LastCheckpoint(every_n_train_steps=save_every)
    run = trainer(
        folder,
        *extra,
        StopOnSignal(),
        ExactResume(),
        NonFiniteStop(),
        Dashboard(),
        EMA(decay=0.9),
        last,
        enable_checkpointing=True,
        max_steps=steps,
        val_check_interval=4,
    )
    newest = str(newest_valid_checkpoint(folder / "checkpoints").path) if resume else None
    run.fit(ToyModule(3, 2), datamodule=Rows(joined, workers), ckpt_path=newest, weights_only=True)
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def stumble(folder: Path, step: int, **how: Any) -> None:
    """Train until all processes fail after the same step."""
    with pytest.raises(RuntimeError, match="stumbled"):
        train(folder, At(step, "error"), **how)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [entry for key in STATE for entry in same(one[key], other[key], key)]


def every_step(rank: int, world_size: int, folder: Path, steps: list[int], workers: int) -> Any:
    whole = train(folder / "whole", workers=workers)
    found = {}
    for step in steps:
        stumble(folder / str(step), step, workers=workers)
        found[step] = differences(train(folder / str(step), resume=True, workers=workers), whole)
    return found


@pytest.mark.fault(4)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("workers", "steps"), [(0, [1, 4, 8, 11, 17]), (2, [13])])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, workers: int, steps: list[int], world_size: int
) -> None:
    def work(*place: Any) -> Any:
        return every_step(*place, steps=steps, workers=workers)

    for found in all_of(work, tmp_path, world_size):
        assert found == {step: [] for step in steps}


@pytest.mark.slow
@pytest.mark.fault(4)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_after_any_of_its_steps_ends_with_the_same_bits(
    tmp_path: Path, workers: int, world_size: int
) -> None:
    steps = [*range(1, STEPS)]

    def work(*place: Any) -> Any:
        return every_step(*place, steps=steps, workers=workers)

    for found in all_of(work, tmp_path, world_size):
        assert found == {step: [] for step in steps}


@pytest.mark.fault(4)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_continues_on_another_number_of_processes_with_the_same_batches(
    tmp_path: Path, before: int, after: int
) -> None:
    class Seen(Callback):
        samples: list[list[int]] = []  # noqa: RUF012  (one run in each process)

        def on_train_batch_end(self, *hook: Any) -> None:
            batch = hook[3]
            self.samples.append((10 * batch.episode_index + batch.frame_index).tolist())

    def first(rank: int, world_size: int, folder: Path) -> Any:
        stumble(folder / "run", SAVED_AT)

    def then(rank: int, world_size: int, folder: Path) -> Any:
        saved = train(folder / "run", Seen(), resume=True)
        return Seen.samples, saved["global_step"]

    def whole(rank: int, world_size: int, folder: Path) -> Any:
        train(folder / "whole", Seen())
        return Seen.samples

    all_of(first, tmp_path, before)
    results = all_of(then, tmp_path, after)
    (expected,) = all_of(whole, tmp_path, 1)
    assert [step for _, step in results] == [STEPS] * after
    dealt = zip(*(samples for samples, _ in results), strict=True)
    assert [[*chain(*shares)] for shares in dealt] == expected[SAVED_AT:]


@pytest.mark.fault(4)
def test_other_batches_on_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    def first(rank: int, world_size: int, folder: Path) -> Any:
        stumble(folder / "run", SAVED_AT)

    def then(rank: int, world_size: int, folder: Path) -> Any:
        with pytest.raises(
            CheckpointError, match=r"batch_size: 2 then, 2 now; processes: 2 then, 1 now"
        ):
            train(folder / "run", resume=True, joined=2)
        with pytest.raises(CheckpointError, match=r"batch_size: 2 then, 4 now"):
            train(folder / "run", resume=True, joined=4 * 2)

    all_of(first, tmp_path, 2)
    (_,) = together(then, tmp_path, 1).results


@pytest.mark.fault(5)
@pytest.mark.parametrize("rank", [0, 1, None], ids=["the first", "the second", "both"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, rank: int | None
) -> None:
    def work(own: int, world_size: int, folder: Path) -> Any:
        with pytest.raises(SIGTERMException):
            train(folder / "run", At(3, "SIGTERM", rank), save_every=0)

    def go_on(own: int, world_size: int, folder: Path) -> Any:
        return differences(train(folder / "run", resume=True), train(folder / "whole"))

    all_of(work, tmp_path)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 4
    assert all_of(go_on, tmp_path) == [[], []]


@pytest.mark.fault(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_process_ends_the_other_and_loses_nothing(tmp_path: Path, rank: int) -> None:
    """The other does not wait for the one that is gone until its patience ends."""

    def work(own: int, world_size: int, folder: Path) -> Any:
        train(folder / "run", At(7, "SIGKILL", rank))

    began = time.monotonic()
    ended = together(work, tmp_path)
    assert time.monotonic() - began < 50, "the patience is 60 s"
    assert ended.exit_codes[rank] == -signal.SIGKILL
    assert ended.exit_codes[1 - rank] == 1
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 7


@pytest.mark.fault(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_shown_and_ends_both(tmp_path: Path, rank: int) -> None:
    def work(own: int, world_size: int, folder: Path) -> Any:
        train(folder / "run", At(7, "error", rank), save_every=3)

    ended = together(work, tmp_path)
    assert ended.exit_codes == [1, 1]
    assert "RuntimeError: stumbled" in ended.errors[rank]
    assert "stumbled" not in ended.errors[1 - rank]
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 7, "written by the first process without the other"
    assert all(bool(torch.isfinite(value).all()) for value in saved["state_dict"].values())
