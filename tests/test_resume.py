"""A run that was killed ends with the same bits as one that was not."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))

from toy import BATCHES, ToyData, ToyModule, same

from callbacks.checkpoints import AtomicCheckpointIO, Checkpoint, LastCheckpoint
from callbacks.ema import EMA
from callbacks.exact_resume import ExactResume, random_state, restore_random_state
from policies.checkpoint_files import CheckpointError, newest_valid_checkpoint, read_checkpoint

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
STEPS = 26
"""More than two epochs of 11 batches."""

SCHEDULES = {
    "validation inside epochs": {"max_steps": STEPS, "val_check_interval": 4},
    "validation at the end of epochs": {"max_epochs": 3, "val_check_interval": 1.0},
    "validation across epochs": {
        "max_steps": STEPS,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
    },
    "no validation": {"max_steps": STEPS, "limit_val_batches": 0},
    "accumulated gradients": {
        "max_steps": 13,
        "val_check_interval": 4,
        "accumulate_grad_batches": 2,
    },
}


pytestmark = pytest.mark.filterwarnings(
    # A continued run keeps its folder.
    "ignore:.*Checkpoint directory .* exists and is not empty",
    # Two workers on one core are slow; here they only have to be exact.
    "ignore:.*max number of worker",
)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written: syncing only takes time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Stumble(Callback):
    """Fails at the start of the batch after some optimiser steps, or inside that batch."""

    def __init__(self, step: int, inside: bool = False) -> None:
        self.step = step
        self.inside = inside

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not self.inside and trainer.global_step == self.step:
            raise RuntimeError("stumbled")

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if self.inside and trainer.global_step == self.step:
            raise RuntimeError("stumbled")


class StumbleInValidation(Callback):
    """Fails inside the validation after some optimiser steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise RuntimeError("stumbled")


class Validations(Callback):
    """Notes where the run is at each validation, and what came out."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            loss = float(trainer.callback_metrics["val/loss"])
            self.seen.append((trainer.global_step, trainer.current_epoch, loss))


def run(
    folder: Path,
    *extra: Callback,
    resume: bool = False,
    save_every: int = 1,
    workers: int = 0,
    **schedule: Any,
) -> dict[str, Any]:
    """Train in this process; returns what ``last.ckpt`` holds at the end."""
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    checkpoints = folder / "checkpoints"
    trainer = Trainer(
        **{"max_epochs": -1, "max_steps": -1, **schedule},
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            *extra,
            ExactResume(),
            EMA(decay=0.9),
            Checkpoint(monitor=None, dirpath=str(checkpoints)),
            LastCheckpoint(every_n_train_steps=save_every),
        ],
    )
    newest = str(newest_valid_checkpoint(checkpoints).path) if resume else None
    data = ToyData(num_workers=workers)
    trainer.fit(ToyModule(3, 2), data, ckpt_path=newest, weights_only=True)
    return read_checkpoint(checkpoints / "last.ckpt")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [entry for key in STATE for entry in same(one[key], other[key], key)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_resuming_after_any_step_is_bitwise_exact(schedule: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **schedule)
    last_step = whole["global_step"]
    ends_of_epochs = {BATCHES, 2 * BATCHES}
    for step in sorted({1, 3, 4, 5, 8, 12, 15, 20} | ends_of_epochs):
        if step >= last_step:
            continue
        folder = tmp_path / str(step)
        with pytest.raises(RuntimeError, match="stumbled"):
            run(folder, Stumble(step), **schedule)
        assert differences(run(folder, resume=True, **schedule), whole) == [], f"step {step}"


@pytest.mark.parametrize("step", [2, 8, BATCHES, 14])
def test_a_checkpoint_saved_because_of_an_error_inside_a_batch_is_exact(
    tmp_path: Path, step: int
) -> None:
    """Random numbers of that batch are drawn, its counters are up, gradients are there."""
    schedule = SCHEDULES["validation inside epochs"]
    whole = run(tmp_path / "whole", save_every=0, **schedule)
    with pytest.raises(RuntimeError, match="stumbled"):
        run(tmp_path / "torn", Stumble(step, inside=True), save_every=0, **schedule)
    saved = read_checkpoint(tmp_path / "torn" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == step
    again = run(tmp_path / "torn", resume=True, save_every=0, **schedule)
    assert differences(again, whole) == []


@pytest.mark.parametrize("save_every", [0, 1], ids=["saved by the error", "saved before"])
@pytest.mark.parametrize(
    "name",
    ["validation inside epochs", "validation at the end of epochs", "validation across epochs"],
)
def test_a_validation_that_was_cut_short_is_run_before_anything_else(
    tmp_path: Path, name: str, save_every: int
) -> None:
    """Also the last one, when no step is left to train."""
    schedule = SCHEDULES[name]
    if "max_steps" in schedule:
        schedule = schedule | {"max_steps": 20 if name.endswith("across epochs") else 19}
    whole = Validations()
    bits = run(tmp_path / "whole", whole, save_every=save_every, **schedule)
    assert whole.seen[-1][0] == bits["global_step"], "the last validation is the end of the run"
    for step, _, _ in whole.seen:
        folder, torn, again = tmp_path / str(step), Validations(), Validations()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="stumbled"):
                run(
                    folder,
                    torn,
                    StumbleInValidation(step),
                    resume=folder.exists(),
                    save_every=save_every,
                    **schedule,
                )
        saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")
        assert (saved["global_step"], saved["exact_resume"]["validation_due"]) == (step, True)
        assert (
            differences(run(folder, again, resume=True, save_every=save_every, **schedule), bits)
            == []
        ), f"step {step}"
        assert torn.seen + again.seen == whole.seen, f"step {step}"
        finished = Validations()
        run(folder, finished, resume=True, save_every=save_every, **schedule)
        assert finished.seen == [], "nothing is owed any more"


def test_an_interrupted_accumulation_starts_over(tmp_path: Path) -> None:
    schedule = SCHEDULES["accumulated gradients"]
    whole = run(tmp_path / "whole", save_every=0, **schedule)

    class HalfWay(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 4):
                raise RuntimeError("stumbled")

    with pytest.raises(RuntimeError, match="stumbled"):
        run(tmp_path / "torn", HalfWay(), save_every=0, **schedule)
    again = run(tmp_path / "torn", resume=True, save_every=0, **schedule)
    assert differences(again, whole) == []


def killed(folder: str, step: int, resume: bool, workers: int) -> None:
    """Train in a process of its own until it kills itself in mid-epoch."""
    from toy import KillAt

    # As outside of tests: loader workers are children of what is killed, and end with it.
    multiprocessing.set_start_method("fork", force=True)
    run(
        Path(folder),
        KillAt(step),
        resume=resume,
        save_every=3,
        workers=workers,
        **SCHEDULES["validation inside epochs"],
    )


@pytest.mark.parametrize(("workers", "kills"), [(0, 3), (2, 1)])
def test_kill_9_and_resume_again_and_again(
    tmp_path: Path, workers: int, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are three steps apart: what was trained since is trained again."""
    processes = multiprocessing.get_context("forkserver")
    # The server hears of this path in no other way; without it each victim imports everything.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    processes.set_forkserver_preload([__name__])
    chance = random.Random(workers)
    steps = sorted(chance.sample([5, 6, 7, 9, 10, 13, 14, 16, 17, 20, 21], kills))
    for count, step in enumerate(steps):
        victim = processes.Process(
            target=killed, args=(str(tmp_path / "torn"), step, count > 0, workers)
        )
        victim.start()
        victim.join(120)
        assert victim.exitcode == -signal.SIGKILL
    schedule = SCHEDULES["validation inside epochs"]
    whole = run(tmp_path / "whole", save_every=3, **schedule)
    again = run(tmp_path / "torn", resume=True, save_every=3, workers=workers, **schedule)
    assert differences(again, whole) == [], f"killed at steps {steps}"


def test_random_states_survive_a_file_that_holds_plain_values_only(tmp_path: Path) -> None:
    import numpy as np

    np.random.normal(size=3)  # leaves a cached second value behind
    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state.pt")
    drawn = [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1)]
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    again = [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.gauss(0, 1)]
    assert drawn == again


@pytest.mark.parametrize("change", ["batch_size", "fingerprint"])
def test_other_batches_are_refused(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = SCHEDULES["no validation"]
    with pytest.raises(RuntimeError, match="stumbled"):
        run(tmp_path, Stumble(5), **schedule)
    before = ToyData.__init__

    def changed(self: ToyData, **settings: Any) -> None:
        before(self, **settings)
        setattr(self, change, "other")

    monkeypatch.setattr(ToyData, "__init__", changed)
    with pytest.raises(CheckpointError, match=f"{change}.* then, other now"):
        run(tmp_path, resume=True, **schedule)


def test_a_data_module_that_cannot_jump_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = SCHEDULES["no validation"]
    with pytest.raises(RuntimeError, match="stumbled"):
        run(tmp_path, Stumble(5), **schedule)
    monkeypatch.setattr(ToyData, "resume_at", None)
    with pytest.raises(CheckpointError, match="no resume_at"):
        run(tmp_path, resume=True, **schedule)
