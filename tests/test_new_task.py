"""docs/new_task.md, followed to the letter: a task that the repository does not know is learned."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs/new_task.md"
MAX_LINES = 60
pytestmark = pytest.mark.timeout(900)


def blocks():
    """What the document says: path to the text of a file, and the commands."""
    text = DOCUMENT.read_text(encoding="utf-8")
    files = dict(re.findall(r"`([\w/]+\.\w+)`:\n```\w+\n(.*?)```", text, re.DOTALL))
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return files, commands


def test_the_document_is_short():
    assert len(DOCUMENT.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder in which somebody has done what the document says."""
    folder = tmp_path_factory.mktemp("new_task")
    for name in ("train.py", "analyze.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    files, commands = blocks()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    done = subprocess.run(
        ["bash", "-euxc", commands], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stderr  # a diagnostic that fails only warns
    return folder


@pytest.mark.slow
def test_it_names_an_environment_a_config_and_every_command(followed):
    files, commands = blocks()
    assert {Path(path).suffix for path in files} == {".py", ".yaml"}
    for command in ("inspect", "fit", "rollout", "landscape", "attention"):
        assert f".py {command} " in commands
    for path in ("data/reach.hdf5", "outputs/reach/last/checkpoints/last.ckpt"):
        assert (followed / path).is_file()


@pytest.mark.slow
def test_the_policy_learns_the_task(followed):
    summary = json.loads((followed / "outputs/reach/last/summary.json").read_text())
    assert summary["rollout/success_low"] > summary["untrained/success_high"]
    (row,) = json.loads((followed / "outputs/reach_rollout/rollout.json").read_text())["rows"]
    assert row["task"] == "reach"
    assert row["summary"]["success_low"] > 0.7
    assert (followed / "outputs/reach_rollout" / row["video"]).is_file()


@pytest.mark.slow
def test_its_numbers_are_in_its_own_unit(followed):
    summary = json.loads((followed / "outputs/reach/last/summary.json").read_text())
    assert summary["val/first_action_l1_cm"] < summary["baseline/mean_action_l1_cm"]
    assert not [name for name in summary if name.endswith("_px") or "coverage" in name]


@pytest.mark.slow
def test_landscapes_lie_on_the_tasks_own_board(followed):
    (found,) = (followed / "outputs/reach_landscape").glob("*landscapes*.npz")
    np.testing.assert_array_equal(np.load(found)["board"], [[0, 0], [100, 100]])


@pytest.mark.slow
def test_pictures_are_drawn(followed):
    for folder in ("reach_landscape", "reach_attention"):
        assert list((followed / "outputs" / folder).rglob("*.mp4"))
