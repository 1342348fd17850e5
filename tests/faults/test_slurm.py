"""A SLURM job whose time is up: a checkpoint, back into the queue, and on with the same run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from toy import ToyModule, same
from toy_runs import also, exit_code, last, write_config

import train
from callbacks.loggers import read_metrics
from policies.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.fault(6), pytest.mark.filterwarnings("ignore")]

JOB = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "localhost",
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a job, with a stub of ``scontrol`` that writes down what it is asked."""
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    write_config(tmp_path, logger=[{"class_path": "callbacks.loggers.WandbLog"}])
    return tmp_path


def up_at(step: int) -> str:
    """The signal that ``sbatch --signal=SIGUSR1@90`` asks for."""
    return also("toy.SignalAt", step=step, number=int(signal.SIGUSR1))


def test_the_requeued_job_goes_on_with_its_run_as_if_never_stopped(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "-c", "toy.yaml"]
    assert exit_code(*words, "--name", "whole", "--trainer.logger", "false") == 0
    assert exit_code(*words, up_at(5)) == train.EXIT_TERMINATED
    assert "job 4242 is queued again" in capsys.readouterr().out
    assert (job / "asked").read_text() == "requeue 4242\n"
    run = last(job).resolve()
    assert not list(run.rglob("hpc_ckpt*")), "saved in the middle of a batch"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 6
    run_id = (run / "wandb" / "run_id").read_text()

    # Meanwhile another job of the same name has begun.
    monkeypatch.setenv("SLURM_JOB_ID", "4243")
    assert exit_code(*words, "--trainer.max_steps", "1", "--trainer.logger", "false") == 0
    assert last(job).resolve() != run

    # The very same command line, in the job's second life.
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert exit_code(*words, up_at(5)) == 0
    assert last(job).resolve() == run
    assert (run / "wandb" / "run_id").read_text() == run_id
    assert len(list(run.glob(f"wandb/offline-run-*-{run_id.strip()}"))) >= 1
    one, other = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")
        for folder in (run, job / "outputs" / "whole" / "last")
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(one[key], other[key], key) == []
    steps = [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert steps == list(range(1, 13))


def test_a_queue_that_refuses_is_told_and_the_checkpoint_is_there(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job / "bin" / "scontrol").write_text("#!/bin/sh\necho 'no such job' >&2\nexit 1\n")
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false", up_at(5)]
    assert exit_code(*words) == train.EXIT_TERMINATED
    said = capsys.readouterr().out
    assert "job 4242 is not queued again (no such job)" in said
    assert "continue with: python train.py fit --name toy --ckpt_path last" in said
    assert read_checkpoint(last(job) / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_a_task_of_an_array_is_requeued_alone(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4000")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false", up_at(1)]
    assert exit_code(*words) == train.EXIT_TERMINATED
    assert (job / "asked").read_text() == "requeue 4000_7\n"


@pytest.mark.parametrize("stage", ["setup", "on_fit_start"])
def test_a_signal_before_the_first_batch_requeues_but_not_for_ever(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    def out_of_time(self: ToyModule, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(ToyModule, stage, out_of_time)
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false"]
    before = signal.getsignal(signal.SIGUSR1)
    for life, said in enumerate(("queued again", "not queued again (twice without a step gained")):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(life))
        assert exit_code(*words) == train.EXIT_TERMINATED
        assert said in capsys.readouterr().out
    assert (job / "asked").read_text() == "requeue 4242\n"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_last_step_changes_nothing_about_it(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def late(self: ToyModule) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ToyModule, "on_fit_end", late)
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false", "--trainer.max_steps", "2"]
    assert exit_code(*words) in {0, train.EXIT_TERMINATED}
    assert json.loads((last(job) / "summary.json").read_text())["status"] == "finished"
    assert "continue with" not in capsys.readouterr().out
    assert not (job / "asked").exists()


def test_commands_of_one_job_keep_apart(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sweep() -> set[str]:
        for seed in ("1", "2"):
            words = ["--trainer.logger", "false", "--trainer.max_steps", "2"]
            assert exit_code("fit", "-c", "toy.yaml", *words, "--seed_everything", seed) == 0
        return {path.name for path in (job / "outputs" / "toy").glob("20*")}

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    runs = sweep()
    assert len(runs) == 2, "the second seed was trained"
    assert sweep() == runs, "and neither is trained again"


@pytest.mark.parametrize(("run_id", "n_runs"), [("none", 2), ("a7", 1)])
def test_torchruns_default_id_names_no_job(
    job: Path, monkeypatch: pytest.MonkeyPatch, run_id: str, n_runs: int
) -> None:
    for name in JOB:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false", "--trainer.max_steps", "1"]
    for life in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", life)
        assert exit_code(*words) == 0
    assert len(list((job / "outputs" / "toy").glob("20*"))) == n_runs


def test_a_job_killed_while_it_wrote_its_first_checkpoint_starts_afresh_in_its_folder(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "true", "--trainer.max_steps", "4"]
    assert exit_code(*words) == 0
    run = last(job).resolve()
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    checkpoint.rename(run / "checkpoints" / ".last.ckpt.part")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert exit_code(*words) == 0
    assert last(job).resolve() == run
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    steps = [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
    assert steps == [1, 2, 3, 4]
    # Damage is another matter: the user decides.
    checkpoint.write_bytes(b"damaged")
    assert exit_code(*words) == 1
    assert "none of its 1 checkpoints can be read" in capsys.readouterr().err
    assert checkpoint.read_bytes() == b"damaged"


def test_a_job_that_was_stopped_before_its_first_checkpoint_starts_afresh(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    words = ["fit", "-c", "toy.yaml", "--trainer.logger", "false", "--trainer.max_steps", "1"]
    assert exit_code(*words) == 0
    assert read_checkpoint(last(job) / "checkpoints" / "last.ckpt")["global_step"] == 1
