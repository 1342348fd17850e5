"""Where numbers go: a CSV file that is the record of truth, and W&B, with or without an account.

Both count in optimiser steps. Lightning's own count is one behind, and drifts on resume; with
:meth:`GatheredRows.follow` a training row, a validation row and a checkpoint of the same weights
carry the same step.
"""

import contextlib
import csv
import errno
import io
import netrc
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, override
from urllib.parse import urlsplit

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.dashboard import file_name
from callbacks.run_folder import written
from policies.atomic_files import write_atomically
from policies.interface import Findings

CSV_FILE = "metrics.csv"
WANDB_FOLDER = "wandb"
WANDB_ID_FILE = "run_id"
PROJECT = "policyscope"
"""W&B project of runs that name none."""
WANDB_MODES = ("online", "offline", "dryrun", "shared", "run", "disabled")
WANDB_ERRORS = "diagnostics/wandb_errors"


class GatheredRows:
    """Turns several logs of one step into one row; the two loggers below share it."""

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._step_offset = 0
        self._held: dict[str, Any] | None = None

    def follow(self, trainer: Trainer, step_offset: int) -> None:
        """Count rows by the optimiser steps of ``trainer``, plus ``step_offset``."""
        self._trainer = trainer
        self._step_offset = step_offset

    def hold(self) -> None:
        """Gather what is logged from now on instead of writing rows."""
        if self._held is None:
            self._held = {}

    def release(self, metrics: Mapping[str, float], media: Findings) -> None:
        """Write what was gathered, ``metrics`` and ``media`` (without scalars) as one row."""
        row = {**(self._held or {}), **metrics}
        self._held = None
        if row or media != Findings():
            self._write(row, media, self._step(None))

    def rewind(self, step: int) -> None:
        """Forget rows later than ``step``: they are about to be computed again."""
        del step

    def _take(self, metrics: Mapping[str, Any], step: int | None) -> None:
        if self._held is not None:
            self._held |= metrics
        else:
            self._write(dict(metrics), Findings(), self._step(step))

    def _step(self, step: int | None) -> int:
        if self._trainer is not None:
            return self._trainer.global_step + self._step_offset
        return step or 0

    def _write(self, row: dict[str, Any], media: Findings, step: int) -> None:
        raise NotImplementedError


class CsvLog(GatheredRows, Logger):
    """One row a step in ``metrics.csv``; columns may appear late, nothing is ever thrown away.

    Each row reaches the operating system at once, so that killing the process loses none; it is
    brought to the disk every ``sync_every_s`` and with each validation. After a resume, rows later
    than the checkpoint are dropped: the steps in the file only rise.

    Args:
        save_dir: Folder of the file; the run folder when None.
        sync_every_s: Longest time that a power cut may cost, in s.
    """

    def __init__(self, save_dir: str | None = None, sync_every_s: float = 5.0) -> None:
        super().__init__()
        self._save_dir = save_dir or "."
        self._sync_every_s = sync_every_s
        self._synced_at_s = 0.0
        self._columns: list[str] | None = None

    @property
    @override
    def name(self) -> str:
        return "csv"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._save_dir) / CSV_FILE

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._take({key: _number(value) for key, value in metrics.items()}, step)

    @override
    @rank_zero_only
    def release(self, metrics: Mapping[str, float], media: Findings) -> None:
        row = {key: _number(value) for key, value in metrics.items()}
        loggers = [] if self._trainer is None else self._trainer.loggers
        refused = sum(logger.errors for logger in loggers if isinstance(logger, WandbLog))
        if refused:
            row[WANDB_ERRORS] = float(refused)
        super().release(row, Findings())
        self.sync()

    @override
    @rank_zero_only
    def rewind(self, step: int) -> None:
        with written(self.path):
            self._columns = self._continue_file()
            columns, rows = _read_rows(self.path)
            kept = [row for row in rows if float(row.get("step") or 0) <= step]
            if len(kept) < len(rows):
                write_atomically(self.path, _as_text(columns, kept, header=True))

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._held:
            self.release({}, Findings())
        self._held = None
        self.sync()

    def _continue_file(self) -> list[str]:
        """Return the columns of an earlier process, without a last line that it did not finish."""
        columns, rows = _read_rows(self.path)
        # Only who writes the run mends its file: a reader may look while a line is written.
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            write_atomically(self.path, _as_text(columns, rows, header=True))
        return columns

    def sync(self) -> None:
        """Bring all rows to the disk.

        Raises:
            RunFolderError: If the disk refuses.
        """
        if self.path.is_file():
            with written(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())
        self._synced_at_s = time.monotonic()

    @override
    def _write(self, row: dict[str, Any], media: Findings, step: int) -> None:
        row = {"step": step, **row}
        with written(self.path):
            self._append(row)
        if time.monotonic() - self._synced_at_s > self._sync_every_s:
            self.sync()

    def _append(self, row: dict[str, Any]) -> None:
        if self._columns is None:
            self._columns = self._continue_file()
        new = [key for key in row if key not in self._columns]
        if new:
            columns = [*self._columns, *new]
            _, rows = _read_rows(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, _as_text(columns, [*rows, row], header=True))
            self._columns = columns
            return
        # One write call for one row: a kill leaves all of it or nothing.
        text = _as_text(self._columns, [row], header=False)
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                taken = file.write(text.encode())
                if taken != len(text.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                # A full disk may take the beginning of a row.
                with contextlib.suppress(OSError):
                    file.truncate(whole)
                raise


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read ``metrics.csv``: one dictionary a row, without the empty cells."""
    _, rows = _read_rows(Path(path))
    return [{key: float(value) for key, value in row.items() if value != ""} for row in rows]


def read_columns(path: str | os.PathLike[str]) -> list[str]:
    """Read the names of all numbers in ``metrics.csv``, in the order in which they appeared."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows; a last line that was cut short is left out."""
    if not path.is_file():
        return [], []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    return list(reader.fieldnames or []), list(reader)


def _as_text(columns: list[str], rows: list[dict[str, Any]], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


class WandbLog(GatheredRows, WandbLogger):
    """W&B that needs no account, never hangs, and keeps its files in the run folder.

    Whatever ails it, training goes on without it: one warning, and ``diagnostics/wandb_errors`` in
    the rows of the other loggers.

    Online when a key is there (``WANDB_API_KEY`` or ``wandb login``) and the server answers,
    otherwise offline; one line says which. A resumed run keeps its id, so that ``wandb sync``
    appends. Checkpoints are not uploaded; raw arrays are, as versions ``step-N`` of one artifact
    for each key.

    Args:
        project: W&B project.
        name: Name of the run in W&B; the run folder's when None.
        offline: Whether to stay offline; decided by the key when None.
        save_dir: The run folder; filled in when None.
        entity: User or team.
        group: Runs to show together.
        tags: Words to filter by.
        init_timeout_s: How long the server may take to answer, in s.
        finish_timeout_s: How long the last upload may take, in s; the rest can be synced later.
    """

    def __init__(
        self,
        project: str = PROJECT,
        name: str | None = None,
        offline: bool | None = None,
        save_dir: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        init_timeout_s: float = 30.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        GatheredRows.__init__(self)
        WandbLogger.__init__(self, project=project, name=name, save_dir=save_dir or ".")
        self._stay_offline = offline
        self._more_init = {"entity": entity, "group": group, "tags": tags}
        self._init_timeout_s = init_timeout_s
        self._finish_timeout_s = finish_timeout_s
        self.errors = 0
        """Rows that W&B did not take."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started when first asked for; one that takes nothing after an error."""
        if self._experiment is None and not self.errors:
            try:
                self._experiment = self._start()
            except Exception as error:
                self._give_up(error)
        return _Nothing() if self._experiment is None else self._experiment

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._take(dict(metrics), step)

    @override
    @rank_zero_only
    def release(self, metrics: Mapping[str, float], media: Findings) -> None:
        super().release(metrics, media)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        try:
            super().log_hyperparams(params)
        except Exception as error:
            self._give_up(error)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still gathered; :meth:`close` ends the run."""
        if self._held:
            self.release({}, Findings())
        self._held = None

    @rank_zero_only
    def close(self, exit_code: int = 0) -> None:
        """End the W&B run; a later process may take it up again."""
        if self._experiment is not None:
            with _quiet():
                folder = self.folder
                try:
                    self._experiment.finish(exit_code=exit_code)
                except TimeoutError:
                    rank_zero_warn(f"W&B: upload not finished; wandb sync {folder}")
                    self.errors += 1
                except Exception as error:
                    self._give_up(error)
            self._experiment = None
        if self.errors:
            import wandb

            # Its last words at the end of the process would be a traceback.
            with contextlib.suppress(Exception):
                wandb.teardown()

    @property
    def folder(self) -> Path | None:
        """Folder to give to ``wandb sync``; None before the run has started."""
        directory = getattr(self._experiment, "dir", None)
        return Path(directory).parent if directory else None

    @property
    def address(self) -> str | None:
        """Web page of the run, when online."""
        return getattr(self._experiment, "url", None)

    def _give_up(self, error: Exception) -> None:
        """Go on without W&B: the file of numbers has everything."""
        if not self.errors:
            reason = (str(error).splitlines() or [""])[0][:160]
            rank_zero_warn(
                f"W&B: given up ({type(error).__name__}: {reason}); training goes on, all numbers "
                f"are in {CSV_FILE}"
            )
        self.errors += 1
        self._experiment = None

    @override
    def _write(self, row: dict[str, Any], media: Findings, step: int) -> None:
        if self.errors:
            self.errors += 1
            return
        run = self.experiment
        if isinstance(run, _Nothing):
            return
        try:
            self._send(run, row, media, step)
        except Exception as error:
            self._give_up(error)

    def _send(self, run: Any, row: dict[str, Any], media: Findings, step: int) -> None:
        if media != Findings():
            import wandb

            caption = f"step {step}"
            row |= (
                {key: wandb.Image(path, caption=caption) for key, path in media.images.items()}
                | {
                    key: wandb.Video(path, caption=caption, format="mp4")
                    for key, path in media.videos.items()
                }
                # A new table for each row: one that is logged again keeps its first file.
                | {
                    key: wandb.Table(
                        columns=list(table.columns),
                        data=[list(cells) for cells in table.rows],
                        log_mode="IMMUTABLE",
                    )
                    for key, table in media.tables.items()
                }
                | {
                    key: wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
                    for key, (edges, counts) in media.histograms.items()
                }
            )
            for key, path in media.arrays.items():
                artifact = wandb.Artifact(f"{file_name(key)}-{run.id}", type="arrays")
                # Staged as a copy: after a resume the file in the run folder is written again.
                artifact.add_file(path)
                run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
        run.log({**row, "trainer/global_step": step})

    def _start(self) -> Any:
        import wandb

        run_folder = Path(self._save_dir or ".").absolute()
        home = run_folder / WANDB_FOLDER
        home.mkdir(parents=True, exist_ok=True)
        # Offline, W&B stages artifacts outside the run unless told where; a sync needs them.
        os.environ["WANDB_DIR"] = str(run_folder)
        os.environ["WANDB_DATA_DIR"] = str(home / "data")
        os.environ["WANDB_CACHE_DIR"] = str(home / "cache")
        run_id = _run_id(home / WANDB_ID_FILE)
        mode, reason = self._mode()

        def begin(mode: str) -> Any:
            return wandb.init(
                project=self._project,
                name=self._name or run_folder.name,
                dir=str(run_folder),
                id=run_id,
                resume="allow",
                mode=cast(Any, mode),
                entity=self._more_init["entity"],
                group=self._more_init["group"],
                tags=self._more_init["tags"],
                settings=wandb.Settings(
                    init_timeout=self._init_timeout_s,
                    finish_timeout=self._finish_timeout_s,
                    finish_timeout_raises=True,
                    console="off",
                    silent=True,
                ),
            )

        with _quiet():
            try:
                run = begin(mode)
            except Exception as error:
                if mode != "online":
                    raise
                # Whatever ails the service or the network must leave us training.
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                wandb.teardown()
                mode, run = "offline", begin("offline")
                rank_zero_warn(f"W&B: the server cannot be used ({reason}); going on offline")
        if mode == "offline":
            where = Path(run.dir).parent
            rank_zero_info(f"W&B: offline ({reason}); upload later with: wandb sync {where}")
        elif mode == "online":
            rank_zero_info(f"W&B: online at {run.url}")
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def _mode(self) -> tuple[str, str]:
        """Decide between online, offline and disabled, and say why."""
        asked = os.environ.get("WANDB_MODE", "").lower()
        if asked not in WANDB_MODES:
            # W&B itself ends the process over a word that it does not know.
            if asked:
                rank_zero_warn(
                    f"W&B: WANDB_MODE={asked!r} is not one of {', '.join(WANDB_MODES)}; ignored"
                )
            os.environ.pop("WANDB_MODE", None)
            asked = ""
        if asked == "disabled":
            return "disabled", "WANDB_MODE=disabled"
        if self._stay_offline is not None:
            return ("offline", "offline: true") if self._stay_offline else ("online", "")
        if asked in {"offline", "dryrun"}:
            return "offline", f"WANDB_MODE={asked}"
        if asked == "online" or os.environ.get("WANDB_API_KEY") or logged_in():
            return "online", ""
        return "offline", "no WANDB_API_KEY"


class _Nothing:
    """A W&B run that takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def logged_in() -> bool:
    """Tell whether ``wandb login`` left a key for the server in use."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(urlsplit(server).hostname or "") is not None
    return False


def _run_id(file: Path) -> str:
    if file.is_file() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    fresh = secrets.token_hex(4)
    write_atomically(file, fresh + "\n")
    return fresh


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep W&B from printing its banner and tips; our one line says it all."""
    before = os.environ.get("WANDB_SILENT")
    os.environ["WANDB_SILENT"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_SILENT"]
        else:
            os.environ["WANDB_SILENT"] = before
