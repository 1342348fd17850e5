"""Signals, errors and kills of one of two processes, and what is left of their run."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from ranks import Rows, all_of, together, trainer
from toy import Shout, ToyModule, same

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


@pytest.fixture(autouse=True, scope="module")
def _no_sync() -> Iterator[None]:
    """A killed process loses nothing that it has written: syncing only takes time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


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


def resumed_differences(
    folder: Path, steps: list[int], workers: int, world_size: int, timeout_s: float = 120
) -> list[dict[int, list[str]]]:
    """Compare runs that failed after some steps and were continued with one that went through."""

    def first(*place: Any) -> None:
        train(folder / "whole", workers=workers)
        for step in steps:
            stumble(folder / str(step), step, workers=workers)

    # A process that failed knows nothing of the checkpoint that another is still writing.
    def then(*place: Any) -> dict[int, list[str]]:
        whole = read_checkpoint(folder / "whole" / "checkpoints" / "last.ckpt")
        return {
            step: differences(train(folder / str(step), resume=True, workers=workers), whole)
            for step in steps
        }

    all_of(first, folder / "first", world_size, timeout_s)
    return all_of(then, folder / "then", world_size, timeout_s)


@pytest.mark.fault(4)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("workers", "steps"), [(0, [1, 8, 11]), (2, [13])])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, workers: int, steps: list[int], world_size: int
) -> None:
    for found in resumed_differences(tmp_path, steps, workers, world_size):
        assert found == {step: [] for step in steps}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.fault(4)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_after_any_of_its_steps_ends_with_the_same_bits(
    tmp_path: Path, workers: int, world_size: int
) -> None:
    steps = [*range(1, STEPS)]

    for found in resumed_differences(tmp_path, steps, workers, world_size, timeout_s=280):
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


@pytest.fixture(scope="module")
def signalled(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, int], list[dict[str, list[str]]]]:
    """Steps at which runs ended whose processes were asked to, and differences after going on."""
    home = tmp_path_factory.mktemp("signalled")
    asked = {"first": 0, "second": 1, "both": None}

    def work(own: int, world_size: int, folder: Path) -> Any:
        for name, rank in asked.items():
            with pytest.raises(SIGTERMException):
                train(folder / name, At(3, "SIGTERM", rank), save_every=0)

    def go_on(own: int, world_size: int, folder: Path) -> Any:
        whole = train(folder / "whole", save_every=0)
        return {
            name: differences(train(folder / name, resume=True, save_every=0), whole)
            for name in asked
        }

    all_of(work, home)
    steps = {
        name: read_checkpoint(home / name / "checkpoints" / "last.ckpt")["global_step"]
        for name in asked
    }
    return steps, all_of(go_on, home)


@pytest.mark.fault(5)
@pytest.mark.parametrize("name", ["first", "second", "both"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(signalled: Any, name: str) -> None:
    steps, resumed = signalled
    assert steps[name] == 4
    assert [found[name] for found in resumed] == [[], []]


class Signals(Shout):
    """A diagnostic during which a process is asked to stop."""

    process: int

    def diagnose(self, *arguments: Any) -> Any:
        os.kill(self.process, signal.SIGTERM)
        return super().diagnose(*arguments)


@pytest.mark.fault(5)
def test_a_signal_during_a_diagnostic_ends_all_processes_after_it(tmp_path: Path) -> None:
    """Also one to the process that waits meanwhile."""

    def one(folder: Path, process: int) -> Any:
        first, *later = diagnostics = [Signals(), Shout(name="next"), Shout(name="last")]
        first.process = process
        with pytest.raises(SIGTERMException):
            train(folder, *diagnostics, save_every=0)
        return first.steps, [diagnostic.steps for diagnostic in later]

    def work(own: int, world_size: int, folder: Path) -> Any:
        dist.init_process_group("gloo")
        processes: list[Any] = [None] * world_size
        dist.all_gather_object(processes, os.getpid())
        return [one(folder / f"to{rank}", process) for rank, process in enumerate(processes)]

    ran, waited = all_of(work, tmp_path)
    assert ran == [([4], [[], []])] * 2
    assert waited == [([], [[], []])] * 2
    for rank in (0, 1):
        saved = read_checkpoint(tmp_path / f"to{rank}" / "checkpoints" / "last.ckpt")
        assert saved["global_step"] == 4
        assert saved["exact_resume"]["validation_due"], "the diagnostics left out are made up for"


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
    # The first is killed before it saves its last step: that one is lost, and no more.
    assert saved["global_step"] == (7 if rank else 6)


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
