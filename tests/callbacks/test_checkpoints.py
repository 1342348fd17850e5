"""Checkpoints: whole or absent, finite or refused, read without running code."""

import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from toy import BATCHES, Shout, ToyData, ToyModule, same

from callbacks.checkpoints import AtomicCheckpointIO, Checkpoint, LastCheckpoint
from callbacks.dashboard import Dashboard
from callbacks.ema import EMA
from policies.checkpoint_files import CheckpointError, newest_valid_checkpoint, read_checkpoint

CONTENT = {"state_dict": {"weight": torch.arange(64.0), "count": torch.tensor(3)}, "epoch": 2}


def write(path: Path, **changes: Any) -> Path:
    AtomicCheckpointIO().save_checkpoint({**CONTENT, **changes}, path)
    return path


def test_what_was_saved_is_read_again(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / "a.ckpt"))
    assert same(checkpoint["state_dict"], CONTENT["state_dict"]) == []
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("key", ["state_dict", "current_model_state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_replace_good_ones(
    tmp_path: Path, key: str, value: float
) -> None:
    path = write(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"\['net.bias'\]"):
        write(path, **{key: {"net.weight": torch.ones(2), "net.bias": torch.tensor([1.0, value])}})
    assert same(read_checkpoint(path)["state_dict"], CONTENT["state_dict"]) == []


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.ckpt")

    def half_a_save(checkpoint: Any, file: Any) -> None:
        file.write(b"PK half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are untouched"):
        write(path, epoch=3)
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_checkpoint(path)


def test_flipped_bits_in_the_weights_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt")
    raw = bytearray(path.read_bytes())
    at = raw.find(torch.arange(64.0).numpy().tobytes())
    assert at > 0
    raw[at + 40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return Path.touch, (self.victim,)


def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    zipped, plain, wrapped = (tmp_path / name for name in ("zip.ckpt", "plain.ckpt", "x.ckpt"))
    torch.save({"policyscope": {"checkpoint_format": 1}, "state_dict": Evil(victim)}, zipped)
    plain.write_bytes(pickle.dumps(Evil(victim)))
    torch.save(Evil(victim), wrapped, _use_new_zipfile_serialization=False)
    for path in (zipped, plain, wrapped):
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path)
        with pytest.raises(CheckpointError, match=path.name):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not victim.exists()


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    foreign, empty = tmp_path / "foreign.ckpt", tmp_path / "empty.ckpt"
    torch.save({"state_dict": {}}, foreign)
    empty.touch()
    with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as archive:
        archive.writestr("beach.txt", "sand")
    for name, reason in (
        ("foreign.ckpt", "not a checkpoint of this project"),
        ("empty.ckpt", "is empty"),
        ("photos.ckpt", "damaged"),
        ("absent.ckpt", "no such checkpoint; beside it: .*foreign.ckpt"),
        ("", "is not a file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="local files only"):
        read_checkpoint("https://example.org/a.ckpt")


def test_the_newest_checkpoint_that_can_be_read_is_found(tmp_path: Path) -> None:
    for age, name in enumerate(("best.ckpt", "older.ckpt", "last.ckpt")):
        write(tmp_path / name, epoch=age)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert newest_valid_checkpoint(tmp_path).path.name == "last.ckpt"
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    newest = newest_valid_checkpoint(tmp_path)
    assert newest.path.name == "older.ckpt"
    assert newest.checkpoint["epoch"] == 1
    assert "last.ckpt" in str(newest.damaged[0])
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        newest_valid_checkpoint(tmp_path / "nowhere")


def fit(
    folder: Path, *callbacks: Any, steps: int = 12, enable_progress_bar: bool = False
) -> Trainer:
    """Train the toy for a few steps; the tests beside this one use it, too."""
    torch.manual_seed(0)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=enable_progress_bar,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[Dashboard(), *callbacks],
    )
    trainer.fit(ToyModule(3, 2), ToyData(), weights_only=True)
    return trainer


def test_last_is_always_the_newest_and_costs_no_second_write(tmp_path: Path) -> None:
    best = Checkpoint(monitor="val/loss", save_top_k=-1, dirpath=str(tmp_path / "checkpoints"))
    fit(tmp_path, best, LastCheckpoint())
    folder = tmp_path / "checkpoints"
    names = sorted(file.name for file in folder.iterdir())
    assert names == [f"best-step{step:06d}.ckpt" for step in (4, 8, 12)] + ["last.ckpt"]
    assert (folder / "last.ckpt").samefile(folder / "best-step000012.ckpt")


def test_last_advances_when_the_metric_does_not_improve(tmp_path: Path) -> None:
    best = Checkpoint(
        monitor="val/loss", mode="max", save_top_k=1, dirpath=str(tmp_path / "checkpoints")
    )
    fit(tmp_path, best, LastCheckpoint(every_n_train_steps=5), EMA(), steps=11)
    kept = [file.name for file in (tmp_path / "checkpoints").glob("best*")]
    assert len(kept) == 1
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 11
    assert BATCHES == 11, "the last step is the end of an epoch, not a validation"


def test_only_weights_that_were_measured_are_ranked(tmp_path: Path) -> None:
    """The diagnostic runs at every second validation; steps between have no value of their own."""
    best = Checkpoint(
        monitor="shout/loudness",
        mode="max",
        save_top_k=-1,
        dirpath=str(tmp_path / "checkpoints"),
    )
    with pytest.warns(UserWarning, match="no best checkpoint at step 4: 'shout/loudness'"):
        fit(tmp_path, Shout(every_n_validations=2), best, LastCheckpoint(), steps=20)
    kept = sorted(file.name for file in (tmp_path / "checkpoints").glob("best*"))
    assert kept == [f"best-step{step:06d}.ckpt" for step in (8, 16, 20)]


def test_the_ranking_survives_a_move_of_the_run(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    best = Checkpoint(monitor="val/loss", save_top_k=2, dirpath=str(old / "checkpoints"))
    fit(old, best, LastCheckpoint())
    state = read_checkpoint(old / "checkpoints" / "last.ckpt")["callbacks"]
    old.rename(new)
    moved = Checkpoint(monitor="val/loss", save_top_k=2, dirpath=str(new / "checkpoints"))
    moved.load_state_dict(state[moved.state_key])
    assert Path(moved.best_model_path) == (new / "checkpoints" / Path(best.best_model_path).name)
    assert len(moved.best_k_models) == 2
    elsewhere = Checkpoint(monitor="val/loss", save_top_k=2, dirpath=str(tmp_path / "branch"))
    elsewhere.load_state_dict(state[elsewhere.state_key])
    assert elsewhere.best_k_models == {}
