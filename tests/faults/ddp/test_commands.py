"""Two processes by command line: Lightning's own launcher and torchrun make one run of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from callbacks.dashboard import read_index
from callbacks.loggers import read_metrics
from policies.checkpoint_files import read_checkpoint

ROOT = Path(__file__).parents[3]
LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
}


def train(folder: Path, launcher: str, *more: str) -> subprocess.CompletedProcess[str]:
    config = {
        "name": "pair",
        "output_dir": str(folder / "outputs"),
        "model": {"class_path": "toy.ToyModule"},
        "data": {"class_path": "ranks.Rows"},
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "devices": 2,
            "max_steps": 4,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "toy.Shout"},
                {
                    "class_path": "callbacks.checkpoints.Checkpoint",
                    "init_args": {"monitor": "shout/loudness", "mode": "max"},
                },
            ],
            "logger": [
                {"class_path": "callbacks.loggers.CsvLog"},
                {"class_path": "callbacks.loggers.WandbLog", "init_args": {"offline": True}},
            ],
        },
    }
    config["model"]["init_args"] = {"state_dim": 3, "action_dim": 2}
    file = folder / "pair.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = list(LAUNCHERS[launcher])
    if launcher == "torchrun":
        command.append("2")
    paths = [str(ROOT / "tests" / part) for part in ("callbacks", "faults/ddp")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "WANDB_SILENT": "true"}
    return subprocess.run(
        [*command, str(ROOT / "train.py"), "fit", "-c", str(file), *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_make_one_run(launcher: str, tmp_path: Path) -> None:
    done = train(tmp_path, launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    home = tmp_path / "outputs" / "pair"
    (run,) = (folder for folder in home.iterdir() if not folder.is_symlink())
    assert (home / "last").resolve() == run
    steps = [row["step"] for row in read_metrics(run / "metrics.csv")]
    assert steps == [1, 2, 2, 3, 4, 4]
    for name in ("last.ckpt", "best-step000004.ckpt"):
        assert read_checkpoint(run / "checkpoints" / name)["global_step"] == 4
    assert {"2", "4"} == read_index(run / "media" / "index.json").keys()
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "finished"
    assert [str(page.relative_to(run)) for page in run.rglob("*.html")] == [summary["report"]]
    assert not list(run.rglob("*.part"))
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "pair.yaml"}
