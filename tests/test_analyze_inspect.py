"""``analyze.py inspect`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from analyze import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "demos.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = 2
        for index in range(2):
            group = file.create_group(f"demo_{index}")
            group["observations/image"] = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
            group["observations/qpos"] = rng.normal(size=(6, 2))
            group["actions"] = rng.normal(size=(6, 2))
    return path


def inspect(path, *options):
    return main(["inspect", "--dataset_repo_id", str(path), *options])


def test_good_file(path, capsys):
    assert inspect(path) == 0
    text = capsys.readouterr().out
    assert "episodes  2 usable; 12 frames" in text
    assert "No problem found." in text


def drop_actions(path):
    with h5py.File(path, "a") as file:
        del file["demo_1/actions"]


def spoil_actions(path):
    with h5py.File(path, "a") as file:
        file["demo_1/actions"][3, 1] = np.nan


def miscount(path):
    with h5py.File(path, "a") as file:
        file.attrs["num_demos"] = 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-900])


def point_elsewhere(path):
    with h5py.File(path, "a") as file:
        del file["demo_0/actions"]
        file["demo_0/actions"] = h5py.ExternalLink("/etc/secret.hdf5", "/x")


@pytest.mark.parametrize(
    ("breaks", "what"),
    [
        (drop_actions, "/demo_1/actions: missing key"),
        (spoil_actions, "/demo_1/actions: 1 of 12 values are not finite"),
        (miscount, "@num_demos: num_demos is 5 but the file holds 2 episodes"),
        (truncate, "the file is truncated"),
        (point_elsewhere, "/demo_0/actions: is an external link to /x in /etc/secret.hdf5"),
    ],
)
def test_broken_files_end_with_status_1_and_a_mend(path, capsys, breaks, what):
    breaks(path)
    assert inspect(path) == 1
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if what in line)
    assert str(path) in line
    assert "Mend: " in line
    assert inspect(path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["mend"]


def test_json_says_the_same_as_the_text(path, capsys):
    assert inspect(path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["episodes"], found["frames"], found["layout"]) == (2, 12, "demos")
    assert found["cameras"] == {"image": [8, 8]}


def test_files_are_written_but_never_overwritten_unasked(path, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert inspect(path, "--output_dir", str(folder)) == 0
    assert (folder / "frames.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "inspect.json").read_text())["episodes"] == 2
    (folder / "inspect.json").write_text("mine")
    assert inspect(path, "--output_dir", str(folder)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "inspect.json").read_text() == "mine"
    assert inspect(path, "--output_dir", str(folder), "--overwrite") == 0


def lerobot(folder, **changes):
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_episodes": 3,
        "total_frames": 30,
        "features": {
            "observation.images.top": {"dtype": "video", "shape": [96, 128, 3]},
            "action": {"dtype": "float32", "shape": [2]},
        },
        **changes,
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def test_lerobot_folder_without_episodes_is_unusable(tmp_path, capsys):
    assert inspect(lerobot(tmp_path / "set")) == 1
    assert "meta/episodes: holds no table of episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"codebase_version": "v2.1"}, "convert_dataset_v21_to_v30"),
        ({"codebase_version": "v9.0"}, "fetch the revision v3.0"),
        ({"features": None}, "download or copy the data set again"),
        ({"fps": "fast"}, "download or copy the data set again"),
    ],
)
def test_unusable_lerobot_folders(tmp_path, capsys, changes, what):
    assert inspect(lerobot(tmp_path / "set", **changes)) == 1
    assert what in capsys.readouterr().out


def test_nothing_at_the_path(tmp_path, capsys):
    assert inspect(tmp_path / "nothing") == 1
    assert "no such file or folder" in capsys.readouterr().out


NAME_SLOW_IMPORTS = """
import sys
from analyze import main
try:
    main(sys.argv[1:])
finally:
    print("slow:", *(name for name in ("torch", "lightning", "lerobot") if name in sys.modules))
"""


def test_help_and_inspect_do_not_wait_for_torch(path):
    """Torch and Lightning take seconds to import, which neither needs."""
    for words in (["--help"], ["inspect", "--dataset_repo_id", str(path)]):
        command = [sys.executable, "-c", NAME_SLOW_IMPORTS, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == "slow:", done.stdout + done.stderr
