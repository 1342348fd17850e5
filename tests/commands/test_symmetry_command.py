"""``analyze.py symmetry`` from the outside."""

import json

import h5py
import numpy as np
import pytest

import analyze
from envs.push_t import PushT, PushTTask


class UnmirroredTask(PushTTask):
    """Its second arm is the first one again."""

    def make(self):
        return PushT(self.image_size)


class ArmlessTask(PushTTask):
    """There is one arm."""

    n_arms = 1


class PlayerlessTask(PushTTask):
    """Nobody knows how to play."""

    script = None


def symmetry(folder, *more: str) -> int:
    return analyze.main(["symmetry", "--output_dir", str(folder), "--size_px", "64", *more])


SHORT = ("--n_episodes", "1", "--n_steps", "12", "--look_every", "4")


def test_arm_1_passes_and_everything_is_written(tmp_path, capsys):
    import av
    import cv2

    assert symmetry(tmp_path, *SHORT) == 0
    record = json.loads((tmp_path / "symmetry.json").read_text())
    assert record["passed"] is True
    assert [world["name"] for world in record["worlds"]] == ["arm1", "native", "anti_diagonal"]
    assert record["worlds"][0]["episodes"][0]["n_steps"] == 12
    picture = cv2.imread(str(tmp_path / "symmetry.png"))
    assert picture.shape[1] == 4 * 64 + 3 * 8
    with av.open(str(tmp_path / "symmetry.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 13
    printed = capsys.readouterr().out
    assert "arm1" in printed
    assert "PASS" in printed
    assert "FAIL" not in printed
    # What is there is not replaced unasked.
    assert symmetry(tmp_path, *SHORT) == 1
    assert "add --overwrite" in capsys.readouterr().err


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two pushes as a data set, with and without states."""
    folder = tmp_path_factory.mktemp("demos")
    board, generator = PushT(32), np.random.default_rng(0)
    for name, has_states in (("whole.hdf5", True), ("stateless.hdf5", False)):
        with h5py.File(folder / name, "w") as file:
            file.attrs.update(num_demos=2, fps=10.0)
            for demo in range(2):
                board.reset(demo)
                group = file.create_group(f"demo_{demo}")
                states, images, actions = [], [], []
                for _ in range(9):
                    states.append(board.state())
                    images.append(board.image())
                    actions.append((states[-1][:2] + generator.normal(0, 20, 2)).clip(0, 512))
                    board.step(actions[-1])
                group["observations/image"] = np.array(images)
                group["observations/qpos"] = np.array(states, np.float32)[:, :2]
                group["actions"] = np.array(actions, np.float32)
                if has_states:
                    group["observations/state"] = np.array(states, np.float32)
    board.close()
    return folder


def test_recorded_actions_are_replayed(demonstrations, tmp_path):
    path = str(demonstrations / "whole.hdf5")
    assert symmetry(tmp_path, "--dataset_repo_id", path, "--episode_idx", "1", "0") == 0
    record = json.loads((tmp_path / "symmetry.json").read_text())
    names = [episode["name"] for episode in record["worlds"][0]["episodes"]]
    assert names == ["episode 1", "episode 0"]
    assert record["worlds"][0]["episodes"][0]["n_steps"] == 9


def test_an_arm_that_is_no_mirror_image_is_a_failure(tmp_path, capsys):
    task = f"{__name__}.UnmirroredTask"
    assert symmetry(tmp_path, *SHORT, "--task", task) == 1
    assert "FAIL" in capsys.readouterr().out
    assert json.loads((tmp_path / "symmetry.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", f"{__name__}.ArmlessTask"), "has no second arm"),
        (("--task", f"{__name__}.PlayerlessTask"), "give --dataset_repo_id"),
        (("--task", "envs.push_t.Nothing"), "no such class"),
        (("--n_steps", "0"), "--n_steps 0: give at least 1"),
        (("--size_px", "8"), "--size_px 8"),
        (("--episode_idx", "1"), "no effect without --dataset_repo_id"),
        (("--dataset_repo_id", "nowhere.hdf5"), "no such file"),
        (("--dataset_repo_id", "nowhere.hdf5", "--first_seed", "3"), "--first_seed has no effect"),
    ],
)
def test_what_cannot_be_tested_is_said_in_one_line(more, message, tmp_path, capsys):
    assert symmetry(tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_without_states_are_refused(demonstrations, tmp_path, capsys):
    path = str(demonstrations / "stateless.hdf5")
    assert symmetry(tmp_path / "out", "--dataset_repo_id", path) == 1
    assert "give data with simulator states" in capsys.readouterr().err


def test_the_result_is_kept_where_drawing_fails(tmp_path, monkeypatch):
    from commands import symmetry as command

    def refuse(*args):
        raise ValueError("nothing can be drawn here")

    monkeypatch.setattr(command, "_draw", refuse)
    assert symmetry(tmp_path, *SHORT) == 1
    assert json.loads((tmp_path / "symmetry.json").read_text())["passed"] is True
