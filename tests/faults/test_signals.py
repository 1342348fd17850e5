"""Signals at awkward moments: an exact checkpoint, the right exit code, nothing half done."""

import json
import multiprocessing
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ToyData, ToyModule
from toy_runs import also, exit_code, last, write_config

import train
from callbacks.interruption import StopOnSignal, _own
from callbacks.loggers import read_metrics
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(5), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


def step_of(folder: Path) -> int:
    return read_checkpoint(last(folder) / "checkpoints" / "last.ckpt")["global_step"]


@pytest.mark.parametrize(
    ("number", "in_validation", "code"),
    [
        (signal.SIGTERM, False, train.EXIT_TERMINATED),
        (signal.SIGTERM, True, train.EXIT_TERMINATED),
        (signal.SIGHUP, False, train.EXIT_TERMINATED),
        (signal.SIGINT, False, train.EXIT_INTERRUPTED),
        (signal.SIGINT, True, train.EXIT_INTERRUPTED),
    ],
)
def test_signals_save_a_checkpoint_and_set_the_exit_code(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    in_validation: bool,
    code: int,
) -> None:
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(each) for each in watched]
    step = 8 if in_validation else 6
    at = also("toy.SignalAt", step=step, number=int(number), in_validation=in_validation)
    assert exit_code("fit", "-c", "toy.yaml", at) == code
    assert step_of(here) == (8 if in_validation else 7), "the batch at hand is finished"
    assert "--name toy --ckpt_path last" in capsys.readouterr().out
    assert [signal.getsignal(each) for each in watched] == before


def test_further_sigterms_while_the_last_checkpoint_is_written_are_harmless(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, sent = torch.save, []

    def interrupted_save(content: Any, file: Any) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
        sent.append(content["global_step"])
        save(content, file)

    monkeypatch.setattr(torch, "save", interrupted_save)
    at = also("toy.SignalAt", step=2, number=int(signal.SIGTERM))
    assert exit_code("fit", "-c", "toy.yaml", at) == train.EXIT_TERMINATED
    assert sent == [3]
    assert step_of(here) == 3


def test_a_sigterm_that_first_comes_while_a_checkpoint_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted_save(content: Any, file: Any) -> None:
        if content["global_step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted_save)
        assert exit_code("fit", "-c", "toy.yaml") == train.EXIT_TERMINATED
    assert step_of(here) == 4
    assert exit_code("fit", "-c", "toy.yaml", "--ckpt_path", "last") == 0
    assert step_of(here) == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_before_the_first_batch_nothing_is_left_behind(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def slow_setup(self: ToyData, stage: str) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("still setting up")

    monkeypatch.setattr(ToyData, "setup", slow_setup)
    assert exit_code("fit", "-c", "toy.yaml") == train.EXIT_TERMINATED
    assert [path.name for path in here.rglob("*") if path.is_file()] == ["toy.yaml"]


def test_an_earlier_checkpoint_survives_a_sigterm_before_the_first_batch(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4") == 0
    run = last(here).resolve()
    before = (run / "checkpoints" / "last.ckpt").read_bytes()

    def slow_setup(self: ToyData, stage: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ToyData, "setup", slow_setup)
    words = ["fit", "-c", "toy.yaml", "--ckpt_path", "last"]
    assert exit_code(*words) == train.EXIT_TERMINATED
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_under_nohup_outlives_its_terminal(here: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at = also("toy.SignalAt", step=2, number=int(signal.SIGHUP))
        assert exit_code("fit", "-c", "toy.yaml", "--trainer.max_steps", "4", at) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert step_of(here) == 4


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_that_closes_costs_nothing(here: Path, bar: bool) -> None:
    write_config(here, enable_progress_bar=bar, max_steps=10**6)
    child, terminal = pty.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)  # torch's threads do not survive a fork
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            code = exit_code("fit", "-c", "toy.yaml")
        finally:
            os._exit(code)
    record = last(here) / "metrics.csv"
    began = time.monotonic()
    while time.monotonic() - began < 120:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
        if record.is_file() and any(row["step"] > 6 for row in read_metrics(record)):
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == train.EXIT_TERMINATED
    rows = read_metrics(record)
    assert step_of(here) == max(row["step"] for row in rows) > 6
    assert json.loads((last(here) / "summary.json").read_text())["status"] == "stopped"


def test_no_command_is_given_that_cannot_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_start(self: ToyModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ToyModule, "on_fit_start", at_start)
    assert exit_code("fit", "-c", "toy.yaml") == train.EXIT_TERMINATED
    assert "continue with" not in capsys.readouterr().out


def test_a_forked_process_ends_as_any_other() -> None:
    asked: list[int] = []
    handler: Callable[..., None] = _own(lambda number, frame: asked.append(number))
    before = signal.signal(signal.SIGTERM, handler)
    try:
        context = multiprocessing.get_context("fork")
        awake = context.Event()

        def sleep() -> None:
            awake.set()
            time.sleep(60)

        child = context.Process(target=sleep)
        child.start()
        # Python forgets the signals that reach a forked process before its first line.
        assert awake.wait(30)
        child.terminate()
        child.join(30)
        assert child.exitcode == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_lightnings_handler_never_talks_to_other_processes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It broadcasts from within the handler, in the middle of whatever the process is at."""

    def loud(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective inside a signal handler")

    monkeypatch.setattr(torch.distributed, "broadcast", loud)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    stop = StopOnSignal()

    class Trainer:
        world_size = 2

        class strategy:  # noqa: N801
            root_device = torch.device("cpu")

        class _signal_connector:  # noqa: N801
            received_sigterm = False

    trainer: Any = Trainer()
    stop.on_train_start(trainer, Any)  # pyright: ignore[reportArgumentType]
    before = signal.getsignal(signal.SIGINT)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not trainer._signal_connector.received_sigterm, "only what all agreed on counts"
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        stop._restore()
    assert signal.getsignal(signal.SIGINT) is not before
