"""When a diagnostic runs, and what it must leave as it found it."""

import contextlib
import re
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, override

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.dashboard import Dashboard, check_findings, note_failure
from callbacks.exact_resume import random_state, refuse_spread_weights, restore_random_state
from callbacks.interruption import StopOnSignal
from policies.interface import Findings


class Diagnostic(Callback):
    """Looks at the policy now and then, without leaving a trace in training.

    Runs at the end of a validation, with the weights that are being validated, at most once per
    optimiser step, never in the sanity check, and always at the last validation of a run. Its
    findings go to the :class:`~callbacks.dashboard.Dashboard`. Of several processes the first runs
    it while the others wait, for as long as it takes; then all have its numbers.

    With ``max_share`` it keeps out of the way of training: when one more run, as long as the one
    before, would lift its share of the wall time above that, it is skipped, except at the first
    validation that it is due and at the last. ``diagnostics/<name>_skipped`` (1 or 0) and
    ``diagnostics/<name>_share`` say so; training itself is the same, skipped or not.

    Args:
        every_n_validations: Validations from one run to the next.
        at_start: Whether to run before the first step, too.
        strict: Whether an error stops training; otherwise it is written down and counted.
        name: Folder of its files and key of its times; from the class name when None.
        max_share: Largest share of the wall time since training began, 0 to 1; unbounded when None.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        name: str | None = None,
        max_share: float | None = None,
    ) -> None:
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations {every_n_validations}: must be 1 or more")
        if max_share is not None and not 0 <= max_share <= 1:
            raise ValueError(f"max_share {max_share}: must be a share from 0 to 1, or null")
        self.every_n_validations = every_n_validations
        self.at_start = at_start
        self.strict = strict
        self.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        self.max_share = max_share
        self._validations = 0
        self._last_step = -1
        self._spent_s = 0.0
        self._last_s = 0.0
        self._keep_state()

    @abstractmethod
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Compute and draw; called in eval mode without gradients.

        Args:
            trainer: The trainer, e.g. for its data module.
            module: What is being trained or evaluated.
            folder: Empty folder of its own for pictures and videos.
        """

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    @override
    def state_dict(self) -> dict[str, Any]:
        # As of the last whole validation: one that is cut short is repeated on resuming.
        return dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]
        self._last_step = state_dict["last_step"]
        # Absent from checkpoints of before shares were bounded.
        self._spent_s = state_dict.get("spent_s", 0.0)
        self._last_s = state_dict.get("last_s", 0.0)
        self._keep_state()

    def _keep_state(self) -> None:
        self._state = {
            "validations": self._validations,
            "last_step": self._last_step,
            "spent_s": self._spent_s,
            "last_s": self._last_s,
        }

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights that no process has whole, and a name that another diagnostic has.

        Raises:
            ValueError: If the strategy spreads the weights, as FSDP does, or if two would share a
                folder and the keys of their times.
        """
        refuse_spread_weights(trainer, type(self).__name__)
        for other in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(other, Diagnostic) and other is not self and other.name == self.name:
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} are both called "
                    f"{self.name!r}: give one another name"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_start and trainer.global_step == 0:
            self._run(trainer, pl_module)
            self._keep_state()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._run(trainer, pl_module)
            return
        if trainer.global_step == self._last_step:
            return
        self._validations += 1
        last = is_last_validation(trainer)
        if last or self._validations % self.every_n_validations == 0:
            first = self._validations <= self.every_n_validations
            self._run(trainer, pl_module, may_skip=not (first or last))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_state()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module)

    def _run(self, trainer: Trainer, module: LightningModule, may_skip: bool = False) -> None:
        dashboard = Dashboard.of(trainer)
        if trainer.world_size > 1 and trainer.state.fn == "fit":
            # A signal may have come to any of them during the diagnostic before this one.
            for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, StopOnSignal):
                    callback.agree(trainer)
        outcome = None
        if trainer.is_global_zero:
            outcome = self._attempt(trainer, module, dashboard, may_skip)
        # The first process decides and works; the others wait for what it says.
        known = dashboard.from_first(trainer, outcome and outcome.message)
        assert known is not None
        if known.is_stopped:
            raise SIGTERMException
        self._last_step = trainer.global_step
        if outcome is not None and outcome.error is not None:
            raise outcome.error
        if known.failure is not None:
            raise DiagnosticError(f"{self.name} failed in the first process: {known.failure}")
        if known.took_s is None:
            if known.is_skipped:
                self._note_share(dashboard, skipped=True)
            return
        if trainer.state.fn == "fit":
            self._spent_s += known.took_s
            self._last_s = known.took_s
            if self.max_share is not None:
                self._note_share(dashboard, skipped=False)
        findings = Findings(scalars=known.scalars) if outcome is None else outcome.findings
        dashboard.receive(trainer, module, self.name, findings, known.took_s)

    def _attempt(
        self, trainer: Trainer, module: LightningModule, dashboard: Dashboard, may_skip: bool
    ) -> "_Outcome":
        """Run on the first process, if it is time."""
        # Someone waits for the process to end. A validation without this would count as done.
        if trainer.received_sigterm and trainer.state.fn == "fit" and trainer.validating:
            return _Outcome(_Message(is_stopped=True))
        # Outside a validation, hand over at the next safe point instead.
        if getattr(trainer, "fast_dev_run", False) or trainer.received_sigterm:
            return _Outcome(_Message())
        if may_skip and self.max_share is not None:
            spent_s = self._spent_s + self._last_s
            if spent_s > self.max_share * (dashboard.elapsed_s + self._last_s):
                return _Outcome(_Message(is_skipped=True))
        folder = dashboard.media_folder(trainer) / self.name
        began = time.perf_counter()
        findings = Findings()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with undisturbed(module):
                found = self.diagnose(trainer, module, folder)
            check_findings(found)
            dashboard.claim(self.name, found)
            findings = found
        except Exception as error:
            if self.strict:
                return _Outcome(_Message(failure=f"{type(error).__name__}: {error}"), error=error)
            note_failure(trainer, self.name, error)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when nothing was drawn
        scalars = {key: float(value) for key, value in findings.scalars.items()}
        message = _Message(took_s=time.perf_counter() - began, scalars=scalars)
        return _Outcome(message, findings)

    def _note_share(self, dashboard: Dashboard, skipped: bool) -> None:
        dashboard.note(
            {
                f"diagnostics/{self.name}_skipped": float(skipped),
                f"diagnostics/{self.name}_share": self._spent_s / max(dashboard.elapsed_s, 1e-9),
            }
        )


class DiagnosticError(ValueError):
    """A strict diagnostic failed in the first process; the message says how."""


@dataclass(frozen=True)
class _Message:
    """What the first process tells the others."""

    is_stopped: bool = False
    is_skipped: bool = False
    failure: str | None = None
    took_s: float | None = None
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outcome:
    """What came out on the first process."""

    message: _Message
    findings: Findings = field(default_factory=Findings)
    error: Exception | None = None


def is_last_validation(trainer: Trainer) -> bool:
    """Tell whether training ends before another validation, as far as that is known."""
    if trainer.should_stop:
        return True
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if trainer.max_steps != -1:
        steps_left = trainer.max_steps - trainer.global_step
        interval = trainer.val_check_batch
        across_epochs = trainer.check_val_every_n_epoch is None
        batches_to_go = interval if across_epochs and isinstance(interval, int) else 1
        if steps_left * trainer.accumulate_grad_batches < batches_to_go:
            return True
    if trainer.max_epochs in (None, -1):
        return False
    return trainer.current_epoch + 1 >= trainer.max_epochs and bool(batches.is_last_batch)


@contextlib.contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Evaluate ``module`` and leave modes, gradients and all random generators as they were.

    Gradients are off; a saliency method turns them on with ``torch.enable_grad()``, which works
    because inference mode is lifted.
    """
    training = [(part, part.training) for part in module.modules()]
    gradients = [(weight, weight.requires_grad, weight.grad) for weight in module.parameters()]
    random_before = random_state()
    try:
        for weight, _, _ in gradients:
            weight.grad = None
        module.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for part, mode in training:
            part.training = mode
        for weight, needed, gradient in gradients:
            weight.requires_grad_(needed)
            weight.grad = gradient
        restore_random_state(random_before)
