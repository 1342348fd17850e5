"""``train.py`` on the demo's own config, made tiny: all that it leaves, and a kill it survives."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from policies.checkpoint_files import read_checkpoint
from policies.loading import load_policy

ROOT = Path(__file__).parent.parent
GUARANTEED = {
    "val/first_action_l1_px",
    "baseline/hold_position_l1_px",
    "baseline/mean_action_l1_px",
    "rollout/mean_max_coverage",
    "rollout/success",
    "untrained/mean_max_coverage",
    "wall_s",
    "checkpoint",
}


def words(folder, name):
    tiny = {
        "name": name,
        "output_dir": folder / "outputs",
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 6,
        "trainer.log_every_n_steps": 3,
        "model.init_args.dim_model": 16,
        "model.init_args.dim_feedforward": 16,
        "model.init_args.dropout": 0.1,
        "model.init_args.shift_px": 1,
        "model.init_args.warmup_steps": 4,
        "model.init_args.backbone_width": 16,
        "data.init_args.batch_size": 16,
        "data.init_args.progress": "false",
        "data.init_args.demonstrations.init_args.n_episodes": 3,
        "data.init_args.demonstrations.init_args.image_size": 16,
        "data.init_args.demonstrations.init_args.cache_dir": folder / "data",
        "data.init_args.demonstrations.init_args.progress": "false",
    }
    rollouts = folder / "rollouts.yaml"
    rollouts.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: callbacks.ema.EMA\n"
        "    - class_path: callbacks.checkpoints.Checkpoint\n"
        "      init_args: {monitor: rollout/mean_max_coverage, mode: max}\n"
        "    - class_path: callbacks.rollouts.Rollouts\n"
        "      init_args:\n"
        "        task:\n"
        "          class_path: envs.push_t.PushTTask\n"
        "          init_args: {image_size: 16, max_steps: 6}\n"
        "        n_episodes: 2\n        at_start: true\n        strict: true\n"
    )
    configs = ["-c", str(ROOT / "configs/demo.yaml"), "-c", str(rollouts)]
    return ["fit", *configs, *[f"--{key}={value}" for key, value in tiny.items()]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
    train.main(words(folder, "whole"))
    return folder / "outputs/whole/last"


def test_a_run_leaves_what_the_readme_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary.keys() >= GUARANTEED
    checkpoint = whole / summary["checkpoint"]
    assert load_policy(str(whole)).source == checkpoint
    for name in ("metrics.csv", "config.yaml", "environment.json", "media/index.json"):
        assert (whole / name).is_file(), name
    assert list(whole.glob("media/step_*/rollouts/rollouts.mp4"))
    assert list(whole.glob("wandb/offline-run-*"))
    with (whole / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert {0, 6, 12} <= set(steps)


def test_a_killed_run_resumes_to_the_same_bits(folder, whole):
    # W&B hands its service to children; this one is to die without taking ours along.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment["OMP_NUM_THREADS"] = "1"  # as here: sums depend on the number of threads
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words(folder, "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    last = folder / "outputs/killed/last/checkpoints/last.ckpt"
    deadline = time.monotonic() + 200
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    train.main([*words(folder, "killed"), "--ckpt_path=last"])
    resumed = read_checkpoint(last)
    uninterrupted = read_checkpoint(whole / "checkpoints/last.ckpt")
    assert resumed["global_step"] == uninterrupted["global_step"] == 12
    for name, value in uninterrupted["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, atol=0, rtol=0)
