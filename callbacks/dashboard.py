"""One row for each validation: every number, and the pictures beside them."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, override, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_folder import MEDIA, write_atomically
from policies.interface import Findings

INDEX = "index.json"


@runtime_checkable
class GatheringLogger(Protocol):
    """A logger that counts in optimiser steps and can gather several logs in one row."""

    def follow(self, trainer: Trainer, step_offset: int) -> None:
        """Count rows by the optimiser steps of ``trainer``, plus ``step_offset``."""
        ...

    def hold(self) -> None:
        """Gather what is logged from now on instead of writing rows."""
        ...

    def release(self, metrics: Mapping[str, float], media: Findings) -> None:
        """Write what was gathered, ``metrics`` and ``media`` as one row."""
        ...

    def rewind(self, step: int) -> None:
        """Forget rows later than ``step``: they are about to be computed again."""
        ...


class Dashboard(Callback):
    """Gathers the findings of all diagnostics and logs them with the validation's metrics.

    Numbers also become callback metrics, so that checkpoints and early stopping can monitor them.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """Last value of every number that diagnostics found."""
        self.failed: list[str] = []
        """Names of diagnostics that raised, once per failure."""
        self._metrics: dict[str, float] = {}
        self._media = Findings()
        self._diagnosing_s = 0.0
        self._training_since: float | None = None
        self._trained_before_s = 0.0
        self._step_offset = 0

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Return the dashboard of ``trainer``.

        Raises:
            ValueError: If it has none.
        """
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, cls):
                return callback
        raise ValueError(
            "the trainer has no dashboard to take findings: add "
            "callbacks.dashboard.Dashboard to trainer.callbacks"
        )

    def step(self, trainer: Trainer) -> int:
        """Return the optimiser steps behind the weights, also those of a loaded checkpoint."""
        return trainer.global_step + self._step_offset

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._step_offset = 0
        for logger in _gathering(trainer.loggers):
            logger.follow(trainer, 0)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        step = int(checkpoint["global_step"])
        if trainer.state.fn == "fit":
            for logger in _gathering(trainer.loggers):
                logger.rewind(step)
            self._forget_media_after(Path(trainer.default_root_dir) / MEDIA, step)
        else:
            # Outside fit Lightning does not restore the step count.
            self._step_offset = step
            for logger in _gathering(trainer.loggers):
                logger.follow(trainer, step)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Diagnostics may run as soon as training starts, before this callback hears of it.
        self._training_since = time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for key in self.latest:
                # A value of earlier weights must not rank the checkpoint of these.
                trainer.callback_metrics.pop(key, None)
            self._hold(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._release(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold(trainer)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(trainer)

    def receive(
        self,
        trainer: Trainer,
        module: LightningModule,
        name: str,
        findings: Findings,
        took_s: float,
    ) -> None:
        """Take what a diagnostic found; it is logged when the validation ends.

        Before training, when no validation is running, it is logged at once.

        Args:
            trainer: The trainer that runs.
            module: Its module.
            name: Name of the diagnostic.
            findings: Numbers, and files already on disk.
            took_s: How long it took, drawing included.
        """
        self._diagnosing_s += took_s
        self._metrics |= {key: float(value) for key, value in findings.scalars.items()}
        self._metrics[f"diagnostics/{name}_s"] = took_s
        self._media = Findings(
            images={**self._media.images, **findings.images},
            videos={**self._media.videos, **findings.videos},
        )
        if trainer.validating or trainer.testing:
            if findings.scalars:
                module.log_dict(
                    {key: float(value) for key, value in findings.scalars.items()},
                    rank_zero_only=True,
                    batch_size=1,
                )
        else:
            self._release(trainer)

    def _hold(self, trainer: Trainer) -> None:
        for logger in _gathering(trainer.loggers):
            logger.hold()

    def _release(self, trainer: Trainer) -> None:
        metrics, media = self._metrics, self._media
        self._metrics, self._media = {}, Findings()
        if metrics:
            metrics["diagnostics/errors"] = float(len(self.failed))
            if trainer.state.fn == "fit" and self._training_since is not None:
                elapsed_s = time.perf_counter() - self._training_since + self._trained_before_s
                metrics["diagnostics/share"] = self._diagnosing_s / max(elapsed_s, 1e-9)
        self.latest |= metrics
        if not trainer.is_global_zero:
            return
        step = self.step(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, GatheringLogger):
                logger.release(metrics, media)
            elif metrics:
                logger.log_metrics(metrics, step=step)
        if media.images or media.videos:
            self._write_index(Path(trainer.default_root_dir), step, media)

    @staticmethod
    def _write_index(run: Path, step: int, media: Findings) -> None:
        def inside(files: Mapping[str, str]) -> dict[str, str]:
            return {
                key: str(Path(path).resolve().relative_to(run.resolve(), walk_up=True))
                for key, path in files.items()
            }

        file = run / MEDIA / INDEX
        index = read_index(file)
        entry = index.setdefault(str(step), {"images": {}, "videos": {}})
        entry["images"] |= inside(media.images)
        entry["videos"] |= inside(media.videos)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(index, indent=1) + "\n")

    @staticmethod
    def _forget_media_after(folder: Path, step: int) -> None:
        file = folder / INDEX
        if file.is_file():
            kept = {key: entry for key, entry in read_index(file).items() if int(key) <= step}
            write_atomically(file, json.dumps(kept, indent=1) + "\n")

    @override
    def state_dict(self) -> dict[str, Any]:
        trained_s = self._trained_before_s
        if self._training_since is not None:
            trained_s += time.perf_counter() - self._training_since
        finite = {key: value for key, value in self.latest.items() if math.isfinite(value)}
        return {"latest": finite, "diagnosing_s": self._diagnosing_s, "trained_s": trained_s}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = dict(state_dict["latest"])
        self._diagnosing_s = state_dict["diagnosing_s"]
        self._trained_before_s = state_dict["trained_s"]


def check_media(findings: Findings) -> None:
    """Make sure that all pictures and videos are on disk.

    Raises:
        ValueError: Naming the first that is not.
    """
    for key, path in {**findings.images, **findings.videos}.items():
        if not Path(path).is_file():
            raise ValueError(f"media {key!r}: {path} is not a file; encode it before returning it")


def read_index(file: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Read ``media/index.json``: step, then ``images`` or ``videos``, then key to path.

    Paths are relative to the run folder. A missing file is an empty index.
    """
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))


def _gathering(loggers: Iterable[Any]) -> list[GatheringLogger]:
    return [logger for logger in loggers if isinstance(logger, GatheringLogger)]
