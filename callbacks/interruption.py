"""Stop between two batches when asked to, so that the checkpoint written is exact."""

import signal
import threading
from types import FrameType
from typing import Any, override

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info


class StopOnSignal(Callback):
    """Lets Ctrl-C and SIGTERM finish the batch at hand, write ``last.ckpt``, and end.

    A second Ctrl-C stops at once; further SIGTERMs change nothing. Validation is cut short; the
    checkpoint owes it, and :class:`~callbacks.exact_resume.ExactResume` runs it first.
    """

    def __init__(self) -> None:
        self.interrupted = False
        """Whether it was Ctrl-C that ended the run."""
        self._previous: Any = None
        self._trainer: Trainer | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        self.interrupted = True
        self._restore()
        rank_zero_info("\nStopping after this batch; Ctrl-C again to stop at once.")
        # Lightning's loops look at this flag between two batches.
        self._trainer._signal_connector.received_sigterm = True

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
        if trainer.state.fn == "fit" and trainer.received_sigterm:
            raise SIGTERMException

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
