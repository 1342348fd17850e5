"""One page of a run, kept up to date while it trains."""

import json
import re
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from callbacks.dashboard import INDEX, Dashboard, read_index
from callbacks.loggers import CSV_FILE, read_metrics
from callbacks.run_config import CONFIG_FILE, ENVIRONMENT_FILE
from callbacks.run_folder import CHECKPOINTS, MEDIA
from callbacks.schedule import ERROR_FILE
from callbacks.summary import REPORT_FILE, SUMMARY_FILE, RunSummary
from policies.atomic_files import write_atomically
from rendering.report.embedding import Encodings
from rendering.report.page import MAX_SIZE_MIB, Page, report_page
from rendering.report.records import RunRecord

NAME = "report"


class Report(Callback):
    """Writes ``<run>/report/index.html`` after each validation and at the end, however it comes.

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
            self._write(trainer, "running")

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
        dashboard = Dashboard.of(trainer)
        try:
            record = read_run(run, status, _wall_s(trainer))
            write_report([record], run / REPORT_FILE, self.max_size_mib, self._encodings)
        except Exception as error:
            with (run / ERROR_FILE).open("a", encoding="utf-8") as file:
                file.write(f"step {trainer.global_step}, {NAME}\n{traceback.format_exc()}\n")
            if NAME not in dashboard.failed:
                rank_zero_warn(
                    f"{NAME} failed ({type(error).__name__}: {error}); training goes on, "
                    f"details in {run / ERROR_FILE}"
                )
            dashboard.failed.append(NAME)
        dashboard.note({f"diagnostics/{NAME}_s": time.perf_counter() - began})


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
    write_atomically(file, page.html)
    return page


def read_run(folder: Path, status: str | None = None, wall_s: float | None = None) -> RunRecord:
    """Read what a run folder holds, whether its run is over or not.

    Args:
        folder: The run folder.
        status: How the run is going; from ``summary.json`` when None.
        wall_s: Wall time of the run, in s; from ``summary.json`` when None.

    Raises:
        ValueError: If it is no run folder, or one of its files cannot be read.
    """
    folder = folder.resolve()
    if not any((folder / name).is_file() for name in (CSV_FILE, CONFIG_FILE)):
        raise ValueError(
            f"{folder}: holds neither {CSV_FILE} nor {CONFIG_FILE}; give a folder that train.py "
            "made, e.g. outputs/demo/last"
        )
    summary = _read_json(folder / SUMMARY_FILE)
    config = folder / CONFIG_FILE
    index = read_index(folder / MEDIA / INDEX)
    return RunRecord(
        name=f"{folder.parent.name}/{folder.name}",
        folder=folder,
        status=status or summary.get("status", "ended without a summary"),
        rows=read_metrics(folder / CSV_FILE),
        media={int(step): kinds for step, kinds in index.items()},
        best_step=_best_step(folder, summary),
        wall_s=summary.get("wall_s") if wall_s is None else wall_s,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=_read_json(folder / ENVIRONMENT_FILE),
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error}); move it away") from error


def _best_step(folder: Path, summary: Mapping[str, Any]) -> int | None:
    """Return the step in the name of the best checkpoint, the newest if there are several."""
    # During training the summary is of an earlier process, or not there yet.
    names = [file.name for file in (folder / CHECKPOINTS).glob("best*step*.ckpt")]
    steps = [
        int(match[1])
        for name in names or [str(summary.get("checkpoint"))]
        if (match := re.search(r"step=?(\d+)", name))
    ]
    return max(steps, default=None)


def _wall_s(trainer: Trainer) -> float | None:
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = (callback.wall_s for callback in callbacks if isinstance(callback, RunSummary))
    return next(found, None)
