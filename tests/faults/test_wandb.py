"""W&B that is down, slow, misconfigured or killed: training goes on and no row is lost."""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, Trainer
from toy import ToyData, ToyModule
from wandb_server import (
    FailingLater,
    accepting_server,
    failing_server,
    free_port,
    hanging_server,
)

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.dashboard import Dashboard
from callbacks.loggers import WANDB_ERRORS, CsvLog, WandbLog, read_metrics

pytestmark = pytest.mark.usefixtures("without_wandb_account")

STEPS = 8


def train(folder: Path, *callbacks: Callback, **settings: Any) -> tuple[WandbLog, list[str]]:
    """Train the toy; return the logger and what W&B's own lines warned of."""
    log = WandbLog(save_dir=str(folder), init_timeout_s=2, finish_timeout_s=2, **settings)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=-1,
        max_steps=STEPS,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=[CsvLog(str(folder)), log],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), *callbacks],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(ToyModule(3, 2), ToyData())
        log.close()
    rows = read_metrics(folder / "metrics.csv")
    assert {row["step"] for row in rows if "train/loss" in row} == set(range(1, STEPS + 1))
    assert {row["step"] for row in rows if "val/loss" in row} == {4, 8}
    return log, [str(each.message) for each in caught if str(each.message).startswith("W&B")]


@contextlib.contextmanager
def address(kind: str) -> Iterator[str]:
    if kind == "refused":
        yield f"http://127.0.0.1:{free_port()}"
    elif kind == "dead name":
        yield "http://nope.invalid"
    elif kind == "hanging":
        with hanging_server() as url:
            yield url
    elif kind == "no address":
        yield "not an address"
    else:
        with failing_server(int(kind)) as url:
            yield url


@pytest.mark.fault(17)
@pytest.mark.parametrize("kind", ["refused", "dead name", "hanging", "no address", "503", "401"])
def test_a_server_that_cannot_be_used_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with address(kind) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        _, said = train(tmp_path)
    assert len(said) == 1, said
    assert "going on offline" in said[0] or "training goes on" in said[0]


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({"WANDB_MODE": ""}, None),
        ({"WANDB_MODE": "ofline"}, "'ofline' is not one of"),
        ({"WANDB_API_KEY": ""}, None),
        ({"WANDB_API_KEY": "short", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "going on offline"),
    ],
)
def test_without_a_usable_key_or_mode_the_run_is_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    warned: str | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, said = train(tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(said) == (warned is not None), said
    assert warned is None or warned in said[0]


@pytest.mark.fault(16)
def test_a_file_in_the_way_of_w_and_b_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("mine")
    log, said = train(tmp_path)
    assert len(said) == 1
    assert "given up" in said[0]
    assert log.errors
    assert (tmp_path / "wandb").read_text() == "mine"


class Fail(Callback):
    """Have the server fail in the middle of training."""

    def __init__(self, server: FailingLater, kind: str) -> None:
        self.server = server
        self.kind = kind

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            assert trainer.loggers[1].address, "online until now"
            if self.kind == "hangs":
                self.server.hanging.set()
            else:
                self.server.die()


@pytest.mark.fault(17)
@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_a_server_that_fails_in_the_middle_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with accepting_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        log, said = train(tmp_path, Fail(server, kind))
    assert len(said) == 1, said
    assert "upload not finished; wandb sync " in said[0]
    folder = Path(said[0].rpartition(" ")[2])
    assert list(folder.glob("*.wandb")), "what was not sent is there"
    assert log.errors == 1


class KillCore(Callback):
    """``kill -9`` the process that W&B writes with."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            killed = [
                child
                for child in psutil.Process().children(recursive=True)
                if "wandb-core" in " ".join(child.cmdline())
            ]
            assert killed
            for child in killed:
                os.kill(child.pid, signal.SIGKILL)
            psutil.wait_procs(killed, timeout=10)


@pytest.mark.fault(17)
def test_w_and_b_killed_in_the_middle_loses_no_row_of_the_record(tmp_path: Path) -> None:
    log, said = train(tmp_path, KillCore())
    assert len(said) == 1, said
    assert "training goes on" in said[0]
    assert log.errors >= STEPS - 4
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[-1][WANDB_ERRORS] > 0
