"""A diagnostic that fails, and a disk that takes nothing of it, end no training unless asked to."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from toy import Shout, ToyData, ToyModule, same

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint
from callbacks.dashboard import ERROR_FILE, Dashboard
from callbacks.exact_resume import ExactResume
from callbacks.loggers import CsvLog, read_metrics
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(18), pytest.mark.filterwarnings("ignore::UserWarning")]


def fit(folder: Path, *callbacks: Callback, logger: Any = False) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=12,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), ExactResume(), *callbacks, LastCheckpoint()],
    )
    trainer.fit(ToyModule(3, 2), ToyData())
    return trainer


def test_a_failing_diagnostic_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    broken, working = Shout(fail=True, name="broken"), Shout()
    trainer = fit(tmp_path, broken, working)
    assert Dashboard.of(trainer).failed == ["broken"] * 3
    log = (tmp_path / ERROR_FILE).read_text()
    assert "step 12, broken" in log
    assert working.steps == [4, 8, 12]


def test_a_strict_diagnostic_stops_training_and_what_was_saved_stays(tmp_path: Path) -> None:
    class Later(Shout):
        def diagnose(self, trainer: Trainer, *arguments: Any) -> Any:
            self.fail = trainer.global_step == 8
            return super().diagnose(trainer, *arguments)

    with pytest.raises(RuntimeError, match="ink is out"):
        fit(tmp_path, Later(strict=True))
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 8
    assert saved["exact_resume"]["validation_due"], "a continued run makes up for it"


@pytest.mark.parametrize("way", ["index", "tables", "folder", "damaged"])
def test_media_that_cannot_be_written_are_counted_and_training_goes_on(
    tmp_path: Path, way: str
) -> None:
    """Something lies where a file or folder should go; permissions do not stop root."""
    media = tmp_path / "run" / "media"
    media.mkdir(parents=True)
    if way == "index":
        (media / "index.json").mkdir()
    elif way == "damaged":
        (media / "index.json").write_text('{"2": ')
    elif way == "tables":
        (media / "step_000004").mkdir()
        (media / "step_000004" / "tables").write_text("in the way")
    else:
        (media / "step_000004").write_text("in the way")
    shout = Shout()
    trainer = fit(tmp_path / "run", shout, logger=[CsvLog(str(tmp_path / "run"))])
    assert trainer.global_step == 12
    assert Dashboard.of(trainer).failed
    assert (tmp_path / "run" / ERROR_FILE).is_file()
    whole = fit(tmp_path / "whole", Shout(), logger=[CsvLog(str(tmp_path / "whole"))])
    assert whole.global_step == 12
    kept, expected = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("run", "whole")
    )
    assert kept.keys() == expected.keys()
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("run", "whole")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


def test_a_failing_diagnostic_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    import torch

    kept = []
    for name, diagnostics in (("with", [Shout(fail=True)]), ("without", [])):
        torch.manual_seed(0)
        fit(tmp_path / name, *diagnostics)
        kept.append(read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"])
    assert same(*kept) == []
