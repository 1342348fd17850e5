"""One page of a run, kept up to date while it trains."""

import csv
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, override

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.checkpoints import sweep_parts
from callbacks.dashboard import FILE_KINDS, INDEX, Dashboard
from callbacks.loggers import CSV_FILE, read_columns, read_metrics
from callbacks.run_config import CONFIG_FILE, ENVIRONMENT_FILE
from callbacks.run_folder import CHECKPOINTS, MEDIA
from callbacks.schedule import note_failure
from callbacks.summary import REPORT_FILE, SUMMARY_FILE, RunSummary
from policies.atomic_files import whole_file
from policies.json_files import MAX_BYTES, read_json
from rendering.report.embedding import Encodings
from rendering.report.page import MAX_SIZE_MIB, Page, facts, report_page
from rendering.report.records import RunRecord

NAME = "report"
RUNNING = "running when written"
"""Status of a run that goes on; a page that a killed one leaves behind stays true."""
MAX_CELLS = 1 << 25
MAX_METRICS_BYTES = 512 * 2**20
"""Numbers of a run that are read for its page: 80,000 rows of 400 columns."""


class Report(Callback):
    """Writes ``<run>/report/index.html`` after each validation, at the end and after an error.

    An error of the page never stops training: it is written down and counted, as a diagnostic's.

    Args:
        max_size_mib: Largest size of the page, in MiB; videos, then pictures of checkpoints in the
            middle are left out to stay below.
        enabled: Whether to write one at all.
    """

    def __init__(self, max_size_mib: float = MAX_SIZE_MIB, enabled: bool = True) -> None:
        if not max_size_mib > 0:
            raise ValueError(
                f"max_size_mib {max_size_mib:g}: must be above 0; enabled: false writes no report"
            )
        self.max_size_mib = max_size_mib
        self.enabled = enabled
        self._encodings = Encodings()
        self._is_due = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            sweep_parts((Path(trainer.default_root_dir) / REPORT_FILE).parent)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = not trainer.sanity_checking

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not when the validation ends: its row and its checkpoints are whole only now.
        if self._is_due:
            self._write(trainer, RUNNING)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "finished")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._is_due and stage != "fit":
            self._write(trainer, "finished")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.global_step:
            self._write(trainer, "stopped")

    def _write(self, trainer: Trainer, status: str) -> None:
        self._is_due = False
        if (
            not self.enabled
            or not trainer.is_global_zero
            or getattr(trainer, "fast_dev_run", False)
        ):
            return
        began = time.perf_counter()
        run = Path(trainer.default_root_dir)
        try:
            record = read_run(run, status, _wall_s(trainer), _best_checkpoint(trainer))
            write_report([record], run / REPORT_FILE, self.max_size_mib, self._encodings)
        except Exception as error:
            note_failure(trainer, NAME, error)
        Dashboard.of(trainer).note({f"diagnostics/{NAME}_s": time.perf_counter() - began})


def write_report(
    records: list[RunRecord],
    file: Path,
    max_size_mib: float = MAX_SIZE_MIB,
    encodings: Encodings | None = None,
) -> Page:
    """Make the page of one run, or of several, and write it whole.

    Args:
        records: The runs.
        file: Where to; its folder is made.
        max_size_mib: Largest size of the page, in MiB.
        encodings: What an earlier page of the same run has already encoded.

    Raises:
        ValueError: If the numbers alone are larger than ``max_size_mib``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    page = report_page(records, file.parent, max_size_mib, encodings)
    with whole_file(file) as unfinished:
        page.write(unfinished)
    return page


def read_run(
    folder: Path,
    status: str | None = None,
    wall_s: float | None = None,
    best_checkpoint: str = "",
) -> RunRecord:
    """Read what a run folder holds, whether its run is over or not.

    Args:
        folder: The run folder.
        status: How the run is going; from ``summary.json`` when None.
        wall_s: Wall time of the run, in s; from ``summary.json`` when None.
        best_checkpoint: The checkpoint that the run ranks first; from ``summary.json`` when empty.

    Raises:
        ValueError: If it is no run folder, or one of its files cannot be read.
    """
    folder = folder.resolve()
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(folder)!a}: is not a name in UTF-8; rename the folder") from error
    if not any((folder / name).is_file() for name in (CSV_FILE, CONFIG_FILE)):
        raise ValueError(
            f"{folder}: holds neither {CSV_FILE} nor {CONFIG_FILE}; give a folder that train.py "
            "made, e.g. outputs/demo/last"
        )
    with _reading(folder / CSV_FILE):
        _check_metrics(folder / CSV_FILE)
        rows = read_metrics(folder / CSV_FILE)
        last_step = max((_step(row["step"]) for row in rows), default=0)
    summary = _read_json(folder / SUMMARY_FILE)
    with _reading(folder / SUMMARY_FILE):
        _check_summary(summary)
        if summary.get("step", 0) < last_step:
            # It is an earlier process's: the one that went on from there has written none yet.
            summary = {}
    with _reading(folder / MEDIA / INDEX):
        media = _media(_read_json(folder / MEDIA / INDEX))
    *older_configs, config = _numbered(folder / CONFIG_FILE)
    *older_environments, environment = _numbered(folder / ENVIRONMENT_FILE)
    with _reading(config):
        text = config.read_text(encoding="utf-8") if _is_small_file(config) else ""
    record = RunRecord(
        name=f"{folder.parent.name}/{folder.name}",
        folder=folder,
        status=status or summary.get("status", "ended without a summary"),
        rows=rows,
        media=media,
        best_step=_best_step(folder, best_checkpoint or summary.get("checkpoint") or ""),
        wall_s=summary.get("wall_s") if wall_s is None else wall_s,
        config=text,
        environment=_read_json(environment),
        earlier=[file.name for file in (*older_configs, *older_environments)],
    )
    with _reading(environment):
        facts(record)
    return record


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Name the file in which something is not as it was written."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        csv.Error,
    ) as error:
        raise ValueError(
            f"{file}: is cut or not what train.py wrote ({type(error).__name__}: "
            f"{shorten(str(error), 300)}); mend it or move it away"
        ) from error


def _is_small_file(file: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Whether a file is there.

    Raises:
        ValueError: If it is too large to read.
    """
    if not file.is_file():
        return False
    size = file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{size:,} bytes, more than {max_bytes:,}")
    return True


def _check_metrics(file: Path) -> None:
    """Refuse numbers that would fill the memory.

    Raises:
        ValueError: Saying how many they are.
    """
    if not _is_small_file(file, MAX_METRICS_BYTES):
        return
    content = file.read_bytes()
    # A row that is cut short takes as much memory as a whole one.
    n_cells = len(read_columns(file)) * (content.count(b"\n") + content.count(b"\r"))
    if n_cells > MAX_CELLS:
        raise ValueError(f"{n_cells:,} cells, more than {MAX_CELLS:,}")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with _reading(file):
        return read_json(file, ValueError)


def _step(value: float) -> int:
    """A training step; its number goes into the page."""
    if not 0 <= value < 2**53:
        raise ValueError(f"a step is {value}")
    return int(value)


def _check_summary(summary: Mapping[str, Any]) -> None:
    """Refuse values that the page could not write."""
    for key, kind in {
        "step": int,
        "status": str,
        "wall_s": int | float | None,
        "checkpoint": str | None,
    }.items():
        if key in summary and not isinstance(summary[key], kind):
            raise ValueError(f"{key} is {summary[key]!a}")


def _media(index: Mapping[str, Any]) -> dict[int, dict[str, dict[str, str]]]:
    """What ``media/index.json`` says: step, kind of files, key, path."""
    media = {}
    for step, kinds in index.items():
        for files in kinds.values():
            if not all(isinstance(path, str) for path in files.values()):
                raise ValueError(f"step {step!a} names something that is no path")
        media[_step(int(step))] = {kind: {} for kind in FILE_KINDS} | kinds
    return media


def _numbered(file: Path) -> list[Path]:
    """List a file and those that continued runs wrote beside it, the newest last."""
    files = [file]
    while (following := file.with_stem(f"{file.stem}_{len(files) + 1}")).is_file():
        files.append(following)
    return files


def _best_step(folder: Path, checkpoint: str) -> int | None:
    """Return the step in the name of the best checkpoint, if it is known which one that is."""
    names = [checkpoint] if checkpoint else (folder / CHECKPOINTS).glob("best*step*.ckpt")
    steps = {
        int(match[1]) for name in names if (match := re.search(r"step=?(\d+)", Path(name).name))
    }
    # Of several that were kept, nothing in their names says which is first.
    return steps.pop() if len(steps) == 1 else None


def _best_checkpoint(trainer: Trainer) -> str:
    """Return the checkpoint that training ranks first so far; nothing when it ranks none."""
    paths = (
        callback.best_model_path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    )
    return next(filter(None, paths), "")


def _wall_s(trainer: Trainer) -> float | None:
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = (callback.wall_s for callback in callbacks if isinstance(callback, RunSummary))
    return next(found, None)
