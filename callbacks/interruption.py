"""Stop between two batches when asked to, so that the checkpoint written is exact."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType
from typing import Any, TextIO, override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info

TERMINATING = (signal.SIGTERM, signal.SIGHUP)
"""What schedulers, ``kill`` and a terminal that closes send."""
REQUEUING = signal.SIGUSR1
"""What SLURM is asked to send before the time of a job is up."""

REQUEUE_TIMEOUT_S = 30.0

Handler = Callable[[int, FrameType | None], None]


class Reason(IntEnum):
    """Why a run stops before its end; of several processes' reasons the largest counts."""

    NONE = 0
    TERMINATED = 1
    REQUEUE = 2
    INTERRUPTED = 3


class Stopped(SIGTERMException):
    """A signal came where no :class:`StopOnSignal` listens."""

    def __init__(self, reason: Reason) -> None:
        super().__init__()
        self.reason = reason


class StopOnSignal(Callback):
    """Lets Ctrl-C, SIGTERM and SIGHUP finish the batch at hand, write ``last.ckpt``, and end.

    In a SLURM job SIGUSR1 does the same, for a job that is to be queued again. A second Ctrl-C
    stops at once; further signals of the other kinds change nothing, so none can disturb the
    checkpoint. A signal to one of several processes stops all of them after the same batch.
    Validation is cut short; the checkpoint owes it, and
    :class:`~callbacks.exact_resume.ExactResume` runs it first.
    """

    def __init__(self) -> None:
        self.reason = Reason.NONE
        """Why the run ends early, the same in all processes."""
        self._asked = Reason.NONE
        self._previous: dict[int, Any] = {}
        self._trainer: Trainer | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning's own handler talks to the other processes from wherever the signal meets it.
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = _own(_leaving(Reason.TERMINATED))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self.reason = self._asked = Reason.NONE
        if threading.current_thread() is not threading.main_thread():
            return
        for number, reason in _reasons().items():
            _take(number, self._asking(reason))
        self._previous[signal.SIGINT] = signal.signal(
            signal.SIGINT, _own(self._asking(Reason.INTERRUPTED))
        )

    def _asking(self, reason: Reason) -> Handler:
        def ask(number: int, frame: FrameType | None) -> None:
            assert self._trainer is not None
            self._asked = max(self._asked, reason)
            if reason is Reason.INTERRUPTED:
                self._restore()
                # The signal may have come in the middle of another line.
                with contextlib.suppress(RuntimeError):
                    rank_zero_info("\nStopping after this batch; Ctrl-C again to stop at once.")
            if self._trainer.world_size == 1:
                self.agree(self._trainer)

        return ask

    def agree(self, trainer: Trainer) -> None:
        """Make known to all processes what any of them was asked; all must call it together."""
        reason = self._asked
        if trainer.world_size > 1:
            asked = torch.tensor(int(reason), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            reason = Reason(int(asked))
        self.reason = max(self.reason, reason)
        if self.reason:
            # Lightning's loops look at this flag between two batches.
            trainer._signal_connector.received_sigterm = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.agree(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.agree(trainer)
            if trainer.received_sigterm:
                raise SIGTERMException

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # The other signals stay harmless until the last checkpoint is written: Lightning puts back
        # what was there before when it is done.
        self._restore()

    def _restore(self) -> None:
        if signal.SIGINT in self._previous:
            signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))


@contextlib.contextmanager
def leaving_in_order() -> Iterator[None]:
    """Make signals :class:`Stopped` where no :class:`StopOnSignal` listens yet.

    A terminal that goes away takes no exception along: what is printed from then on is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _reasons()}
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_outliving(stream) for stream in streams)
    for number, reason in _reasons().items():
        _take(number, _leaving(reason))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = streams


def _reasons() -> dict[int, Reason]:
    """Signals to listen to, and what they ask for."""
    reasons: dict[int, Reason] = dict.fromkeys(TERMINATING, Reason.TERMINATED)
    if os.environ.get("SLURM_JOB_ID"):
        reasons[REQUEUING] = Reason.REQUEUE
    return reasons


def _leaving(reason: Reason) -> Handler:
    """Handle a signal by ending now, once: what is half made is cleared away undisturbed."""

    def leave(number: int, frame: FrameType | None) -> None:
        ignore_termination()
        raise Stopped(reason)

    return leave


def ignore_termination() -> None:
    """Let further signals change nothing more: this process is about to end."""
    if threading.current_thread() is threading.main_thread():
        for number in _reasons():
            signal.signal(number, signal.SIG_IGN)


class _Outliving:
    """A stream to a terminal, and to nowhere once that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            _forget_terminal(self._stream, error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            _forget_terminal(self._stream, error)


def _outliving(stream: TextIO) -> Any:
    return _Outliving(stream) if stream is not None and stream.isatty() else stream


def _forget_terminal(stream: TextIO, error: OSError) -> None:
    if error.errno != errno.EIO:
        raise error
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def requeue() -> str:
    """Put the SLURM job of this process back into its queue.

    Returns:
        What was done, or why not: a sentence for the user.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=REQUEUE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} is not queued again ({error})"
    if done.returncode:
        reason = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        return f"job {job} is not queued again ({reason})"
    return f"job {job} is queued again"


def _take(number: int, handler: Handler) -> None:
    # nohup has SIGHUP ignored: whoever used it wants the run to go on.
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, _own(handler))


def _own(handler: Handler) -> Handler:
    """Leave processes that are forked from this one to end as others do."""
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            handler(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    return handle
