"""Ray, on this machine with one CPU, in one process of its own: it starts servers and processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PROGRAM = """
import json, os, sys
from pathlib import Path
import pieces
from commands import sweep_ray, sweep_trials
from commands.sweep_file import read_sweep
from policies.workers import map_over

STAND_IN = os.environ["STAND_IN"]
sweep_trials.TRAIN = Path(STAND_IN)
found = [*map_over(pieces.square, range(4), 1, "ray")]
try:
    list(map_over(pieces.refuse, [5], 1, "ray"))
except ValueError as error:
    refused = str(error)
train_one = sweep_ray._train


def with_stand_in(config, sweep, folder, cwd):
    # In the worker, where modules are imported anew.
    sweep_trials.TRAIN = Path(STAND_IN)
    train_one(config, sweep, folder, cwd)


sweep_ray._train = with_stand_in
search = (read_sweep(Path(sys.argv[1])), Path(sys.argv[2]))
sweep_ray.search_with_ray(*search, 1, 1, 0)
# One more is added to the one that is there.
trials = sweep_ray.search_with_ray(*search, 2, 1, 0)
print(json.dumps({
    "squares": [square for square, _, _ in found],
    "threads": [threads for _, threads, _ in found],
    "refused": refused,
    "trials": [[t.number, t.state, t.value, dict(t.values), t.curve[-1][0]] for t in trials],
}))
"""


@pytest.mark.slow
def test_ray_answers_as_processes_do_and_tunes_the_same_file(tmp_path):
    (tmp_path / "base.yaml").write_text("{}\n")
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(
            {
                "configs": ["base.yaml"],
                "metric": "val/loss",
                "parameters": {
                    "lr": {"low": 1.0e-5, "high": 1.0e-1, "log": True},
                    "kl_weight": {"values": [0.5, 2]},
                },
            }
        )
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "STAND_IN": str(HERE / "stand_in_train.py"),
    }
    environment.pop("RAY_ADDRESS", None)
    # The paths of Ray's sockets may not be long.
    with tempfile.TemporaryDirectory(prefix="ray") as short:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "sweep.yaml"), str(tmp_path / "out")],
            env={**environment, "RAY_TMPDIR": short},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["squares"] == [0, 1, 4, 9]
    assert set(found["threads"]) == {1}
    assert "5 is no good" in found["refused"]
    assert [trial[0] for trial in found["trials"]] == [0, 1]
    for number, state, value, values, last in found["trials"]:
        assert state in ("complete", "pruned")
        assert 1e-5 <= values["lr"] <= 1e-1
        assert value > values["kl_weight"]
        assert last == 4 or state == "pruned"
        assert (tmp_path / f"out/runs/trial_{number:04d}/last/metrics.csv").is_file()
