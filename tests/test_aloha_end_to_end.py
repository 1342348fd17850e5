"""ALOHA from demonstrations to features: what the framework does for PushT, with 14 dimensions."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from aloha_pictures import draw_rarely

import analyze
import train
from envs.aloha import AlohaTransferCubeTask
from envs.aloha_demonstrations import collect
from policies.loading import load_policy

ROOT = Path(__file__).parent.parent
CAMERAS = ("top", "angle")
SIZE = (24, 32)
TASK = "envs.aloha.AlohaTransferCubeTask"
CALLBACKS = f"""
trainer:
  callbacks:
    - class_path: callbacks.checkpoints.Checkpoint
      init_args: {{monitor: rollout/mean_max_progress, mode: max}}
    - class_path: callbacks.rollouts.Rollouts
      init_args:
        task:
          class_path: {TASK}
          init_args: {{cameras: [top, angle], image_size: [24, 32], max_steps: 6}}
        n_episodes: 2
        n_videos: 1
        strict: true
"""
WITHOUT_ROLLOUTS = """
trainer:
  callbacks:
    - class_path: callbacks.autoencoder_folder.AutoencoderFolder
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, graphics):
    folder = tmp_path_factory.mktemp("aloha")
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_rarely(monkeypatch)
        collect(folder / "demos", 1, cameras=CAMERAS, image_size=SIZE, n_workers=0, progress=False)
    # One to train on, the others for what is held out of training and of the autoencoder's.
    for number in range(1, 4):
        shutil.copy(folder / "demos/episode_0.hdf5", folder / f"demos/episode_{number}.hdf5")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    callbacks = folder / "callbacks.yaml"
    callbacks.write_text(CALLBACKS)
    tiny = {
        "name": "tiny",
        "output_dir": folder / "outputs",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "model.init_args.dim_model": 16,
        "model.init_args.dim_feedforward": 16,
        "model.init_args.backbone_width": 16,
        "model.init_args.warmup_steps": 2,
        "data.init_args.demonstrations": "null",
        "data.init_args.path": folder / "demos",
        "data.init_args.val_fraction": 0.5,
        "data.init_args.progress": "false",
    }
    experiment = str(ROOT / "configs/experiment/act_aloha_small.yaml")
    train.main(
        ["fit", "-c", experiment, "-c", str(callbacks), *[f"--{k}={v}" for k, v in tiny.items()]]
    )
    return folder / "outputs/tiny/last"


def test_training_leaves_a_policy_that_fits_the_task(run):
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["rollout/mean_max_progress"] <= 1
    # Twelve joints in rad and two grippers in 0..1 have no unit in common.
    assert summary["val/first_action_l1_mixed"] > 0
    assert not [name for name in summary if name.endswith("_rad")]
    report = (run / "report/index.html").read_text()
    assert "val/first_action_l1_mixed" in report
    assert "clipped to the task's range" in html.unescape(report)
    schema = load_policy(str(run)).view.data_schema
    task = AlohaTransferCubeTask.for_policy(schema)
    assert set(task.cameras) == set(CAMERAS)
    assert task.image_size == SIZE
    assert list(run.glob("media/step_*/rollouts/rollouts.mp4"))


def test_the_rollout_command_lets_it_act(run, folder):
    words = ["--policy_path", str(run), "--output_dir", str(folder / "rollout"), "--task", TASK]
    assert (
        analyze.main(
            ["rollout", *words, "--n_episodes", "1", "--n_videos", "0", "--n_action_steps", "50"]
        )
        == 0
    )
    row = json.loads((folder / "rollout/rollout.json").read_text())["rows"][0]
    assert row["task"] == "aloha_transfer_cube"
    assert row["episodes"][0]["n_steps"] == 400


def test_the_attention_command_explains_every_camera(run, folder):
    words = ["--policy_path", str(run), "--dataset_repo_id", str(folder / "demos"), "--task", TASK]
    more = ["--max_steps", "6", "--n_faithfulness_frames", "1", "--method", "relevancy"]
    out = folder / "attention"
    assert analyze.main(["attention", *words, *more, "--output_dir", str(out)]) == 0
    found = json.loads((out / "metrics.json").read_text())
    text = json.dumps(found)
    for camera in CAMERAS:
        assert f"share_{camera}" in text
    # Masks and outlines are those of one camera, and the file says of which.
    assert found["object_camera"] == next(iter(load_policy(str(run)).view.data_schema.cameras))


def test_an_autoencoder_reads_it_and_its_features_are_recorded(run, folder):
    callbacks = folder / "sae.yaml"
    callbacks.write_text(WITHOUT_ROLLOUTS)
    tiny = {
        "name": "sae",
        "output_dir": folder / "outputs",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "model.init_args.n_latents": 32,
        "model.init_args.k": 4,
        "data.init_args.policy_path": run,
        "data.init_args.dataset_repo_id": folder / "demos",
        "data.init_args.batch_size": 256,
        "data.init_args.storage": "stream",
    }
    experiment = str(ROOT / "configs/experiment/sae_aloha.yaml")
    train.main(
        ["fit", "-c", experiment, "-c", str(callbacks), *[f"--{k}={v}" for k, v in tiny.items()]]
    )
    words = ["--policy_path", str(run), "--sae_path", str(folder / "outputs/sae/last")]
    data = ["--dataset_repo_id", str(folder / "demos"), "--episode_idx", "1"]
    out = folder / "record"
    assert analyze.main(["features", "record", *words, *data, "--output_dir", str(out)]) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["n_frames"] == 400
    assert numbers["n_tokens"] == 2 + 2 * 2 * 2
    assert np.isclose(numbers["l0"], 4, atol=3)
