"""One row for each validation: every number, and the pictures and tables beside them."""

import contextlib
import itertools
import json
import math
import re
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self, override, runtime_checkable

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.run_folder import MEDIA
from policies.atomic_files import write_atomically
from policies.interface import Findings, Table
from policies.json_files import json_text

INDEX = "index.json"
TABLES = "tables"
FILE_KINDS = ("images", "videos", TABLES, "arrays")
"""Kinds of findings that ``index.json`` knows the files of."""
ROW_KINDS = ("scalars", "images", "videos", TABLES, "histograms")
"""Kinds of findings that share the names of one row."""
MAX_ROWS = 10_000
"""Rows of a table that W&B shows (``wandb.Table.MAX_ROWS``)."""
ERROR_FILE = "diagnostic_errors.log"
MAX_BINS = 512
"""Bins of a histogram that W&B takes (``wandb.Histogram.MAX_LENGTH``)."""
FILE_KEY = re.compile(r"(?=.{1,100}$)[\w-]+(/[\w-]+)*", re.ASCII)
"""Keys that :func:`file_name` makes into names that disks and W&B accept."""


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
        """Write what was gathered, ``metrics`` and ``media`` (without scalars) as one row."""
        ...

    def rewind(self, step: int) -> None:
        """Forget rows later than ``step``: they are about to be computed again."""
        ...


class Dashboard(Callback):
    """Gathers the findings of all diagnostics and logs them with the validation's metrics.

    Numbers also become callback metrics, so that checkpoints and early stopping can monitor them.
    Of several processes only the first writes and logs; all know the same numbers.

    Args:
        patience_h: How long the other processes wait for a diagnostic of the first before they
            give up, in h. One that died is as a rule noticed at once.
    """

    def __init__(self, patience_h: float = 6.0) -> None:
        if patience_h <= 0:
            raise ValueError(f"patience_h {patience_h}: must be above 0")
        self.patience_h = patience_h
        self.latest: dict[str, float] = {}
        """Last value of every number that diagnostics found."""
        self.failed: list[str] = []
        """Names of diagnostics that raised, once per failure."""
        self._owners: dict[tuple[str, str], str] = {}
        self._metrics: dict[str, float] = {}
        self._media = Findings()
        self._diagnosing_s = 0.0
        self._training_since: float | None = None
        self._trained_before_s = 0.0
        self._step_offset = 0
        self._waiting_group: Any = None

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

    def media_folder(self, trainer: Trainer) -> Path:
        """Return the folder for the files of these weights."""
        return Path(trainer.default_root_dir) / MEDIA / f"step_{self.step(trainer):06d}"

    @property
    def elapsed_s(self) -> float:
        """Wall time since training began, earlier processes included, in s."""
        if self._training_since is None:
            return self._trained_before_s
        return time.perf_counter() - self._training_since + self._trained_before_s

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._step_offset = 0
        for logger in _gathering(trainer.loggers):
            logger.follow(trainer, 0)
        if trainer.world_size > 1:
            # Waiting for a diagnostic takes longer than an exchange of gradients may.
            patience = timedelta(hours=self.patience_h)
            self._waiting_group = dist.new_group(backend="gloo", timeout=patience)

    def from_first[Kind](self, trainer: Trainer, value: Kind) -> Kind:
        """Return the first process's value in all processes, as late as ``patience_h`` allows."""
        if trainer.world_size == 1:
            return value
        carried: list[Any] = [value]
        dist.broadcast_object_list(carried, src=0, group=self._waiting_group)
        return carried[0]

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        step = int(checkpoint["global_step"])
        if trainer.state.fn == "fit":
            for logger in _gathering(trainer.loggers):
                logger.rewind(step)
            if trainer.is_global_zero:
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

    def claim(self, name: str, findings: Findings) -> None:
        """Make the keys of ``findings`` those of one diagnostic, from now on.

        Args:
            name: Name of the diagnostic.
            findings: What it found.

        Raises:
            ValueError: If a key is another diagnostic's; none is taken then.
        """
        claimed = [("row", key) for kind in ROW_KINDS for key in getattr(findings, kind)]
        claimed += [("arrays", key) for key in findings.arrays]
        for claim in claimed:
            owner = self._owners.get(claim, name)
            if owner != name:
                raise ValueError(
                    f"{claim[1]!r} is returned by two diagnostics, {owner!r} and {name!r}: let "
                    "each put a word of its own in front"
                )
        self._owners |= dict.fromkeys(claimed, name)

    @property
    def has_media(self) -> bool:
        """Whether a diagnostic drew something that is not logged yet."""
        return self._media != Findings()

    def note(self, metrics: Mapping[str, float]) -> None:
        """Add numbers about the diagnostics themselves to the next row."""
        self._metrics |= metrics

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
        merged = {
            kind.name: getattr(self._media, kind.name) | getattr(findings, kind.name)
            for kind in fields(Findings)
        }
        self._media = replace(Findings(**merged), scalars={})
        if trainer.validating or trainer.testing:
            if findings.scalars:
                # Every process has the first one's numbers: there is nothing to average.
                module.log_dict(
                    {key: float(value) for key, value in findings.scalars.items()},
                    sync_dist=True,
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
                metrics["diagnostics/share"] = self._diagnosing_s / max(self.elapsed_s, 1e-9)
        self.latest |= metrics
        if not trainer.is_global_zero:
            return
        step = self.step(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, GatheringLogger):
                logger.release(metrics, media)
            elif metrics:
                logger.log_metrics(metrics, step=step)
        try:
            files = {
                "images": media.images,
                "videos": media.videos,
                TABLES: _write_tables(self.media_folder(trainer) / TABLES, media.tables),
                "arrays": media.arrays,
            }
            if any(files.values()):
                self._write_index(Path(trainer.default_root_dir), step, files)
        except (OSError, ValueError) as error:
            # A full disk, or an index that somebody damaged: the numbers are logged already.
            note_failure(trainer, MEDIA, error)

    @staticmethod
    def _write_index(run: Path, step: int, files: Mapping[str, Mapping[str, str]]) -> None:
        file = run / MEDIA / INDEX
        index = read_index(file)
        entry = index.setdefault(str(step), {kind: {} for kind in FILE_KINDS})
        for kind, paths in files.items():
            entry[kind] |= {
                key: str(Path(path).resolve().relative_to(run.resolve(), walk_up=True))
                for key, path in paths.items()
            }
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(index, indent=1) + "\n")

    @staticmethod
    def _forget_media_after(folder: Path, step: int) -> None:
        file = folder / INDEX
        if file.is_file():
            index = read_index(file)
            kept = {key: entry for key, entry in index.items() if int(key) <= step}
            if len(kept) < len(index):
                write_atomically(file, json.dumps(kept, indent=1) + "\n")

    @override
    def state_dict(self) -> dict[str, Any]:
        finite = {key: value for key, value in self.latest.items() if math.isfinite(value)}
        return {"latest": finite, "diagnosing_s": self._diagnosing_s, "trained_s": self.elapsed_s}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = dict(state_dict["latest"])
        self._diagnosing_s = state_dict["diagnosing_s"]
        self._trained_before_s = state_dict["trained_s"]


def note_failure(trainer: Trainer, name: str, error: Exception) -> None:
    """Count what failed without stopping training: warn the first time, keep every traceback."""
    dashboard = Dashboard.of(trainer)
    file = Path(trainer.default_root_dir) / ERROR_FILE
    # A disk that is full for a picture is full for the traceback too.
    with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as log:
        log.write(
            f"step {trainer.global_step}, {name}\n{''.join(traceback.format_exception(error))}\n"
        )
    if name not in dashboard.failed:
        rank_zero_warn(
            f"{name} failed ({type(error).__name__}: {error}); training goes on, details in {file}"
        )
    dashboard.failed.append(name)


def check_findings(findings: Findings) -> None:
    """Make sure that findings can be logged, so that it is their diagnostic that fails if not.

    Raises:
        ValueError: Naming the first key that cannot be logged, and why.
    """
    kinds_of: dict[str, str] = {}
    for kind in ROW_KINDS:
        for key in getattr(findings, kind):
            if (other := kinds_of.setdefault(key, kind)) != kind:
                raise ValueError(f"{key!r} is in {other} and in {kind}: a row has one of each name")
    for key in [*findings.tables, *findings.arrays]:
        if not FILE_KEY.fullmatch(key):
            raise ValueError(
                f"{key!r} names a file: use at most 100 letters, digits, '_' and '-', in words "
                "separated by '/'"
            )
    for key, value in findings.scalars.items():
        try:
            float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"scalar {key!r}: {value!r} is no number") from error
    for key, path in {**findings.images, **findings.videos, **findings.arrays}.items():
        if not Path(path).is_file():
            raise ValueError(f"media {key!r}: {path} is not a file; write it before returning it")
    for key, table in findings.tables.items():
        if len(table.rows) > MAX_ROWS:
            raise ValueError(
                f"table {key!r}: {len(table.rows)} rows, W&B shows at most {MAX_ROWS}; "
                "summarise them, or put them into arrays"
            )
    for key, (edges, counts) in findings.histograms.items():
        if not 1 <= len(counts) <= MAX_BINS or len(edges) != len(counts) + 1:
            raise ValueError(
                f"histogram {key!r}: {len(counts)} counts and {len(edges)} edges; it takes 1 to "
                f"{MAX_BINS} counts and one edge more"
            )
        if not (
            all(low < high for low, high in itertools.pairwise(edges))
            and all(math.isfinite(value) for value in [*edges, *counts])
        ):
            raise ValueError(f"histogram {key!r}: edges must rise, edges and counts be finite")


def read_index(file: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Read ``media/index.json``: step, then one of ``FILE_KINDS``, then key to path.

    Paths are relative to the run folder. A table's file is JSON with ``columns`` and ``rows``, null
    for what is None or not finite. A missing file is an empty index, a missing kind an empty one.
    """
    if not file.is_file():
        return {}
    index = json.loads(file.read_text(encoding="utf-8"))
    return {step: {kind: {} for kind in FILE_KINDS} | entry for step, entry in index.items()}


def file_name(key: str) -> str:
    """Return a name without folders for the file or artifact of a key; no two keys share one."""
    return key.replace("/", ".")


def _write_tables(folder: Path, tables: Mapping[str, Table]) -> dict[str, str]:
    """Write tables as JSON, for reports that do without W&B, and return their paths."""
    paths = {}
    for key, table in tables.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{file_name(key)}.json"
        write_atomically(file, json_text({"columns": table.columns, "rows": table.rows}, None))
        paths[key] = str(file)
    return paths


def _gathering(loggers: Iterable[Any]) -> list[GatheringLogger]:
    return [logger for logger in loggers if isinstance(logger, GatheringLogger)]
