"""The command line: where runs go, how they end, how they go on, and what is refused."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "callbacks"))

from toy import repeatable, same

import train
from callbacks.loggers import read_metrics
from policies.checkpoint_files import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "name": "toy",
    "model": {"class_path": "toy.ToyModule"},
    "data": {"class_path": "toy.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 12,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}},
            {
                "class_path": "callbacks.checkpoints.Checkpoint",
                "init_args": {"monitor": "val/loss", "save_top_k": 2},
            },
            {"class_path": "toy.Shout"},
        ],
    },
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds ``toy.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def fit(*words: str) -> train.TrainCLI:
    return train.main(["fit", "-c", "toy.yaml", *words])


def stopped(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        train.main(list(words))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def last(folder: Path) -> Path:
    return folder / "outputs" / "toy" / "last"


def at(step: int, number: int, in_validation: bool = False) -> list[str]:
    signal_at = {
        "class_path": "toy.SignalAt",
        "init_args": {"step": step, "number": number, "in_validation": in_validation},
    }
    return [f"--trainer.callbacks+={json.dumps(signal_at)}"]


def test_a_run_has_a_folder_with_everything_in_it(here: Path) -> None:
    cli = fit()
    run = last(here)
    assert run.resolve() == cli.run_folder
    assert os.readlink(run) == cli.run_folder.name
    assert [path.name for path in here.iterdir()] in (
        ["toy.yaml", "outputs"],
        ["outputs", "toy.yaml"],
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == 12
    assert summary["shout/loudness"] == 0.1 * 12
    assert "rollout/success" not in summary, "a run without rollouts promises none"
    assert summary["wall_s"] > 0
    assert summary["video"] == "media/step_000012/shout/square.mp4"
    assert (run / summary["video"]).is_file()
    assert read_checkpoint(run / summary["last_checkpoint"])["global_step"] == 12
    rows = read_metrics(run / "metrics.csv")
    best = min((row for row in rows if "val/loss" in row), key=lambda row: row["val/loss"])
    assert summary["checkpoint"] == f"checkpoints/best-step{int(best['step']):06d}.ckpt"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"] == "python train.py fit -c toy.yaml"
    assert environment["packages"]["lightning"]


def test_the_config_snapshot_starts_the_same_run_in_a_folder_of_its_own(here: Path) -> None:
    first = fit("--model.init_args.hidden", "5")
    again = train.main(["fit", "-c", str(first.run_folder / "config.yaml")])
    assert again.run_folder != first.run_folder
    files = [cli.run_folder / "checkpoints" / "last.ckpt" for cli in (first, again)]
    one, other = (read_checkpoint(file) for file in files)
    assert one["hyper_parameters"]["hidden"] == 5
    assert same(one["state_dict"], other["state_dict"]) == []
    configs = [(cli.run_folder / "config.yaml").read_text() for cli in (first, again)]
    assert configs[0] == configs[1]


def test_last_goes_on_in_the_same_folder_as_if_never_stopped(here: Path) -> None:
    whole = fit("--name", "whole")
    assert stopped("fit", "-c", "toy.yaml", *at(6, signal.SIGTERM)) == train.EXIT_TERMINATED
    run = last(here).resolve()
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    # No -c: the run knows its configuration, and the signal with it comes too early to repeat.
    cli = fit("--ckpt_path", "last")
    assert cli.run_folder == run
    assert len(list((here / "outputs" / "toy").iterdir())) == 2
    one, other = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, whole.run_folder)
    )
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert same(one[key], other[key], key) == []
    mine, theirs = (repeatable(folder / "metrics.csv") for folder in (run, whole.run_folder))
    assert mine == theirs, "the record has no gap and no repetition"


@pytest.mark.parametrize("in_diagnostic", [False, True])
@pytest.mark.parametrize("step", [8, 12])
def test_an_interrupted_validation_is_made_up_for(
    here: Path, step: int, in_diagnostic: bool
) -> None:
    whole = fit("--name", "whole")
    if in_diagnostic:
        # The signal comes in the first of two diagnostics.
        killer = {"terminate_at": step, "name": "killer"}
        first = {"class_path": "toy.Shout", "init_args": killer}
        trainer = {**CONFIG["trainer"], "callbacks": [first, *CONFIG["trainer"]["callbacks"]]}
        (here / "killed.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))
        words = ["-c", "killed.yaml"]
    else:
        words = ["-c", "toy.yaml", *at(step, signal.SIGTERM, in_validation=True)]
    assert stopped("fit", *words) == train.EXIT_TERMINATED
    run = last(here)
    rows = [row for row in read_metrics(run / "metrics.csv") if "val/loss" in row]
    assert [row["step"] for row in rows] == list(range(4, step, 4)), "not measured yet"
    train.main(["fit", "-c", "toy.yaml", "--ckpt_path", "last"])
    mine, theirs = (repeatable(folder / "metrics.csv") for folder in (run, whole.run_folder))
    assert mine == theirs
    assert all("shout/loudness" in row for row in mine if "val/loss" in row)
    one, other = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, whole.run_folder)
    )
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert same(one[key], other[key], key) == []
    ranked = [
        sorted(path.name for path in (folder / "checkpoints").iterdir())
        for folder in (run, whole.run_folder)
    ]
    assert ranked[0] == ranked[1]


def test_the_wall_time_of_a_continued_run_is_that_of_all_its_processes(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps, age_s, total_s in (("2", 100.0, 100.0), ("4", 20.0, 120.0), ("6", 3.0, 123.0)):
        monkeypatch.setattr("callbacks.summary.process_age_s", lambda age_s=age_s: age_s)
        fit("--trainer.max_steps", steps, "--ckpt_path", "auto")
        summary = json.loads((last(here) / "summary.json").read_text())
        assert summary["wall_s"] == total_s


def test_without_a_config_the_one_of_the_run_is_used(here: Path) -> None:
    fit("--trainer.max_steps", "4")
    cli = train.main(["fit", "--name", "toy", "--ckpt_path", "last", "--trainer.max_steps", "8"])
    assert cli.run_folder == last(here).resolve()
    assert cli.trainer.global_step == 8
    checkpoint = str(cli.run_folder / "checkpoints" / "last.ckpt")
    validated = train.main(["validate", "--ckpt_path", checkpoint])
    assert validated.run_folder.name.endswith("-validate")
    assert last(here).resolve() == cli.run_folder, "only training moves it"
    rows = read_metrics(validated.run_folder / "metrics.csv")
    trained = [row for row in read_metrics(cli.run_folder / "metrics.csv") if "val/loss" in row]
    assert [row["step"] for row in rows] == [8]
    assert rows[0]["val/loss"] == trained[-1]["val/loss"], "the average is what is loaded"


def test_a_torn_last_checkpoint_falls_back_to_the_newest_whole_one(
    here: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fit("--trainer.max_steps", "10")
    torn = last(here) / "checkpoints" / "last.ckpt"
    assert read_checkpoint(torn)["global_step"] == 10
    torn.write_bytes(torn.read_bytes()[:-200])
    cli = fit("--ckpt_path", "last")
    assert cli.trainer.global_step == 12
    assert cli._checkpoint is not None
    assert cli._checkpoint.name == "best-step000008.ckpt"
    steps = [row["step"] for row in read_metrics(last(here) / "metrics.csv")]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--data.init_args.fail", "demos.hdf5 lacks action"], "error: demos.hdf5 lacks action"),
        (["--model.init_args.fail", "width is odd"], "error: width is odd"),
        (["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.callbacks.decay=3"], "decay 3.0"),
        (["--name", "../up"], "name '../up': is not a folder name"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt: no such checkpoint"),
        (["--ckpt_path", "https://example.org/a.ckpt"], "local files only"),
        (["--ckpt_path", "last", "--name", "new"], "no earlier run of this name"),
        (["--output_dir", "toy.yaml/x"], "choose another place with --output_dir"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_leaves_nothing_behind(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert stopped("fit", "-c", "toy.yaml", *words) == 1
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert reason in said[0]
    assert "Traceback" not in error
    assert [path.name for path in here.rglob("*") if path.is_file()] == ["toy.yaml"]


def test_the_traceback_is_there_on_request(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(train.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="width is odd"):
        fit("--model.init_args.fail", "width is odd")


def test_a_defect_keeps_its_traceback(here: Path) -> None:
    with pytest.raises(RuntimeError, match="ink is out"):
        fit(
            '--trainer.callbacks+={"class_path": "toy.Shout", "init_args": '
            '{"fail": true, "strict": true, "name": "broken"}}'
        )


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_a_defect_in_an_evaluation_keeps_its_traceback_and_its_folder(
    here: Path, subcommand: str
) -> None:
    with pytest.raises(ValueError, match="shapes do not match"):
        train.main([subcommand, "-c", "toy.yaml", "--trainer.callbacks+=toy.Trip"])
    (folder,) = (here / "outputs" / "toy").iterdir()
    assert folder.name.endswith(f"-{subcommand}")


def test_what_is_wrong_with_the_data_of_the_sanity_check_is_for_the_user_to_mend(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped("fit", "-c", "toy.yaml", "--trainer.callbacks+=toy.Trip") == 1
    assert "error: shapes do not match" in capsys.readouterr().err
    assert [path.name for path in here.rglob("*") if path.is_file()] == ["toy.yaml"]


@pytest.mark.parametrize("key", ["--trainer.max_stepz", "--model.init_args.hiden", "--nam"])
def test_unknown_keys_are_rejected(
    here: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert stopped("fit", "-c", "toy.yaml", key, "3") == train.EXIT_USAGE
    assert key.rpartition(".")[2].lstrip("-") in capsys.readouterr().err
    assert not (here / "outputs").exists()


def test_print_config_shows_overrides_and_makes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped("fit", "-c", "toy.yaml", "--model.init_args.hidden=77", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["hidden"] == 77
    assert printed["name"] == "toy"
    assert "weights_only" not in printed, "nobody may switch safe loading off"
    assert not (here / "outputs").exists()


def test_a_model_without_linked_arguments_trains_and_its_checkpoint_says_so(here: Path) -> None:
    fit(
        "--model",
        "toy.LonelyModule",
        "--trainer.limit_val_batches",
        "0",
        "--trainer.callbacks",
        "callbacks.ema.EMA",
    )
    saved = read_checkpoint(last(here) / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert saved["width"] == 2
    assert not saved.keys() & set(train.DATA_LINKS)


def test_a_linked_model_gets_the_data_dimensions(here: Path) -> None:
    cli = fit("--trainer.max_steps", "1")
    assert (cli.model.hparams["state_dim"], cli.model.hparams["action_dim"]) == (3, 2)
    from toy import ToyModule

    file = cli.run_folder / "checkpoints" / "last.ckpt"
    again = ToyModule.load_from_checkpoint(file, weights_only=True)
    assert again.net[0].in_features == 3


def test_a_checkpoint_of_another_model_names_what_differs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.max_steps", "2")
    words = ["fit", "-c", "toy.yaml", "--ckpt_path", "last", "--model.init_args.hidden", "9"]
    assert stopped(*words) == 1
    assert "hidden: 8 in the checkpoint, 9 configured" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_a_malicious_checkpoint_does_not_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plain.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save({"policyscope": {"checkpoint_format": 1}, "x": Evil()}, "zip.ckpt")
    for name in ("plain.ckpt", "zip.ckpt"):
        for subcommand in ("fit", "validate"):
            assert stopped(subcommand, "-c", "toy.yaml", "--ckpt_path", name) == 1
            assert name in capsys.readouterr().err
    assert not Path("executed").exists()


def test_the_command_line_starts_without_heavy_packages() -> None:
    heavy = ("wandb", "lerobot", "gym_pusht", "pymunk", "gymnasium", "h5py", "av", "imageio")
    code = f"import sys, train; print([name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
