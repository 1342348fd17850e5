"""``analyze.py transfer`` from the outside, on a small untrained policy."""

import contextlib
import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from lerobot_folders import lerobot_policy, write_folder
from pusht_runs import write_pusht
from test_rollout_and_export import save_policy

import analyze
import commands.transfer
from commands.rollout import Variant
from commands.transfer import _in_words
from envs import transfer as trials
from envs.push_t import PushTTask
from envs.task import Task
from policies.loading import load_policy

SIZE = 32
CONDITIONS = ["arm0", "arm1", "arm1_flipped", "arm0_untrained", "arm1_untrained"]
FILES = {
    "transfer.json",
    "transfer.csv",
    "transfer.png",
    "transfer.mp4",
    "landscapes.png",
    "attention.png",
}


@dataclass(frozen=True)
class QuickPushT(PushTTask):
    """Episodes of four chunks."""

    max_steps: int = 12


@dataclass(frozen=True)
class LongerPushT(PushTTask):
    """Enough chunks for noise to part what began alike."""

    max_steps: int = 60


class OneArm(Task):
    """PushT without its mirror image."""

    name, fps, score_name, reward_name = "one_arm", 10.0, "coverage", "overlap"
    max_steps, success_thresholds = 1, (0.95,)
    is_success, clip_actions = PushTTask.is_success, PushTTask.clip_actions
    data_schema, make = PushTTask.data_schema, PushTTask.make

    @classmethod
    def for_policy(cls, schema):
        return cls()


def moved_away(policy: Path) -> Path:
    """Give a saved policy weights that no fresh copy has."""
    checkpoint = torch.load(policy, weights_only=False)
    noise = torch.Generator().manual_seed(7)
    for name, value in checkpoint["state_dict"].items():
        if "network" in name and value.is_floating_point():
            value += 0.05 * torch.randn(value.shape, generator=noise)
    torch.save(checkpoint, policy)
    return policy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return (
        moved_away(save_policy(folder / "act.ckpt")),
        write_pusht(folder / "demos.hdf5", SIZE),
    )


def transfer(policy: Path, folder: Path, *more: str) -> int:
    return analyze.main(
        [
            "transfer",
            "--policy_path",
            str(policy),
            "--output_dir",
            str(folder),
            "--n_trials",
            "2",
            "--device",
            "cpu",
            *(() if "--task" in more else ("--task", "test_transfer_command.QuickPushT")),
            *more,
        ]
    )


@pytest.fixture(scope="module")
def played() -> list:
    """Results with recordings, in the order of the rows, once ``whole`` has run."""
    return []


@pytest.fixture(scope="module")
def whole(inputs, played, tmp_path_factory) -> tuple[Path, dict]:
    policy, demonstrations = inputs
    folder = tmp_path_factory.mktemp("transfer") / "out"
    more = ("--dataset_repo_id", str(demonstrations), "--n_frames", "2", "--n_videos", "1")

    def act_on_arm(*given):
        played.append(trials.act_on_arm(*given))
        return played[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.transfer, "act_on_arm", act_on_arm)
        assert transfer(policy, folder, *more) == 0
    return folder, json.loads((folder / "transfer.json").read_text())


def test_every_condition_acts_from_the_same_seeds_with_both_controllers(whole):
    folder, document = whole
    assert {path.name for path in folder.iterdir()} == FILES
    assert document["complete"]
    for controller in ("queue3", "ensemble0.01"):
        rows = [row for row in document["rows"] if row["controller"] == controller]
        assert [row["condition"] for row in rows] == CONDITIONS
        for row in rows:
            assert [each["seed"] for each in row["episodes"]] == [100_000, 100_001]
    with (folder / "transfer.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["condition"] for line in lines] == CONDITIONS * 2
    for line, row in zip(lines, document["rows"], strict=True):
        assert float(line["success"]) == row["summary"]["success"]
        assert float(line["mean_max_coverage"]) == row["summary"]["mean_max_coverage"]


def test_conditions_and_controllers_differ_in_what_is_done(whole, played):
    rows = whole[1]["rows"]
    done = {
        (row["controller"], row["condition"]): result.recordings[0]
        for row, result in zip(rows, played, strict=True)
    }
    queue, ensemble = "queue3", "ensemble0.01"
    assert done[queue, "arm0"].predicted.tolist() == [True, False, False] * 4
    assert done[ensemble, "arm0"].predicted.all()
    for controller in (queue, ensemble):
        for arm in ("arm0", "arm1"):
            trained, fresh = done[controller, arm], done[controller, f"{arm}_untrained"]
            np.testing.assert_allclose(trained.simulator_states[0], fresh.simulator_states[0])
            assert np.abs(trained.actions - fresh.actions).max() > 1
            assert (trained.predicted == fresh.predicted).all()
        plain, flipped = done[controller, "arm1"], done[controller, "arm1_flipped"]
        assert np.abs(plain.actions - flipped.actions).max() > 1
    for condition in CONDITIONS:
        apart = np.abs(done[queue, condition].actions - done[ensemble, condition].actions)
        assert apart.max() > 0


def test_the_numbers_are_those_of_the_episodes(whole):
    _, document = whole
    scores = {
        (row["controller"], row["condition"]): [each["max_score"] for each in row["episodes"]]
        for row in document["rows"]
    }
    assert len(document["comparisons"]) == 12
    for row in document["comparisons"]:
        first, second = (scores[row["controller"], row[side]] for side in ("first", "second"))
        gap = sum(a - b for a, b in zip(first, second, strict=True)) / 2
        assert row["mean_max_coverage"]["value"] == pytest.approx(gap)
        assert set(row["success"]) == {"0.85", "0.90", "0.95"}
    # Nobody solves anything in 12 steps: two trials cannot exclude 65 %, but they exclude 70 %.
    verdicts = {row["condition"]: row for row in document["hypothesis"]}
    assert verdicts.keys() == {"arm0", "arm1", "arm1_flipped"}
    assert verdicts["arm1"]["share"]["high"] == pytest.approx(0.6576, abs=1e-4)
    assert verdicts["arm1"]["verdict"] == "not supported"
    assert verdicts["arm0"]["is_seen"]
    assert all(row["is_seen_arm_below"] for row in document["hypothesis"])
    for row in document["flip_check"]:
        assert row["n_equal"] == row["n_episodes"] == 2


def test_both_sides_of_the_mirror_are_looked_at(whole):
    folder, document = whole
    (sides,) = document["both_sides"]
    assert sides["n_frames"] == 24  # all there are
    assert sides["equivariance"]["median"] > 0
    moved = sides["landscape"]["total_variation"]
    assert moved["plain"].keys() == {"k0"}
    assert moved["flipped"]["k0"] < 1e-3
    assert 0 <= moved["redrawn"]["k0"] < moved["plain"]["k0"]
    assert sides["equivariance"]["redrawn_median"] is None
    assert sides["attention"]["correlation"]["flipped"] == pytest.approx(1, abs=1e-3)
    pictures = {
        name: cv2.imread(str(folder / f"{name}.png")) for name in ("landscapes", "attention")
    }
    assert pictures["landscapes"].shape[1] == 3 * 256 + 2 * 8
    with av.open(str(folder / "transfer.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 13
    assert frames[0].shape[:2] == (352 + 20, 3 * 352)
    # The second board starts as the mirror image of the first, but for the action in execution.
    left, middle = (frames[0][20:, start : start + 352].astype(int) for start in (0, 352))
    assert abs(left - middle[:, ::-1]).mean() < 0.5 * abs(left - middle).mean()


def test_without_pictures_no_demonstrations_are_needed(inputs, tmp_path, capsys):
    policy, demonstrations = inputs
    folder = tmp_path / "out"
    quick = ("--n_action_steps", "2", "--no-untrained", "--n_frames", "0", "--n_videos", "0")
    assert transfer(policy, folder, *quick) == 0
    assert {path.name for path in folder.iterdir()} == {
        "transfer.json",
        "transfer.csv",
        "transfer.png",
    }
    document = json.loads((folder / "transfer.json").read_text())
    assert [row["condition"] for row in document["rows"]] == CONDITIONS[:3]
    assert {row["controller"] for row in document["rows"]} == {"queue2"}
    assert document["both_sides"][0]["landscape"] is None
    printed = capsys.readouterr().out
    assert "arm1_flipped - arm1" in printed
    assert "arm 1, with the flip: 0 of 2 (0% [0%, 66%]) against 70%: not supported" in printed
    assert "not supported (the seen arm itself is below 70%: says nothing of transfer)" in printed
    assert "0 respects the mirror" in printed
    assert "noise is redrawn" not in printed
    assert "2 of 2 trials are those of the seen arm step for step" in printed
    # A second call does not overwrite.
    assert transfer(policy, folder, *quick) == 1
    assert "is there already" in capsys.readouterr().err
    assert transfer(policy, tmp_path / "x", *quick, "--dataset_repo_id", str(demonstrations)) == 1
    assert "nothing here is fitted to it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> tuple[Path, dict]:
    """A policy that draws noise, for as long as it takes noise to part what began alike."""
    policy = lerobot_policy("diffusion", n_obs_steps=2, horizon=8)
    path = write_folder(tmp_path_factory.mktemp("noisy") / "pretrained_model", *policy)
    folder = path.parent / "out"
    more = ("--n_action_steps", "3", "--n_frames", "2", "--n_videos", "0")
    task = ("--task", "test_transfer_command.LongerPushT")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.transfer, "N_MEASURED_FRAMES", 8)
        assert transfer(path, folder, *more, *task) == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder, json.loads((folder / "transfer.json").read_text())


def test_another_policy_goes_without_what_only_act_has(noisy):
    folder, document = noisy
    assert "no untrained level: only ACT" in (folder / "printed.txt").read_text()
    written = {each.name for each in folder.iterdir()} - {"printed.txt"}
    assert written == FILES - {"attention.png", "transfer.mp4"}
    assert [row["condition"] for row in document["rows"]] == CONDITIONS[:3]
    (sides,) = document["both_sides"]
    assert sides["attention"] is None
    assert sides["landscape"]["kernels"] == "leave-one-out bandwidth of the samples"


def test_noise_that_is_redrawn_is_not_held_against_the_mirror(noisy):
    folder, document = noisy
    printed = (folder / "printed.txt").read_text()
    (check,) = document["flip_check"]
    assert check["draws_noise"]
    assert check["largest_px"] > 1  # and yet nothing is wrong with the mirror
    assert "noise is redrawn: judge by the interval of arm1_flipped - arm0" in printed
    assert "0 respects the mirror" not in printed
    (sides,) = document["both_sides"]
    floor = sides["equivariance"]["redrawn_median"]
    assert floor > 0
    assert f"two chunks drawn for one observation are {floor:.0f} px apart" in printed
    # Landscapes share their random numbers, so that they show the mirror alone.
    moved = sides["landscape"]["total_variation"]
    assert moved["flipped"]["k0"] < 0.01 < moved["redrawn"]["k0"]


def test_a_policy_that_ensembles_does_so_with_its_own_coefficient(
    inputs, tmp_path, capsys, monkeypatch
):
    def ensembling(*given):
        return replace(load_policy(*given), temporal_ensemble_coeff=0.3)

    monkeypatch.setattr(commands.transfer, "load_policy", ensembling)
    quick = ("--no-untrained", "--n_frames", "0", "--n_videos", "0")
    assert transfer(inputs[0], tmp_path / "out", *quick) == 0
    assert "the policy's own controller: ensemble0.3" in capsys.readouterr().out
    document = json.loads((tmp_path / "out/transfer.json").read_text())
    assert document["own_controller"] == "ensemble0.3"
    assert list(dict.fromkeys(row["controller"] for row in document["rows"])) == [
        "ensemble0.3",
        "queue3",
    ]


def test_actions_can_be_scaled_where_the_task_knows_how(inputs, tmp_path):
    quick = ("--n_action_steps", "3", "--no-untrained", "--n_frames", "0", "--n_videos", "0")
    errors_px = []
    for scale in ("1", "0.2"):
        folder = tmp_path / scale
        assert transfer(inputs[0], folder, *quick, "--action_scale", scale) == 0
        document = json.loads((folder / "transfer.json").read_text())
        assert document["action_scale"] == float(scale)
        errors_px.append(document["both_sides"][0]["equivariance"]["median"])
    # The policy is at other places, where it does other things.
    assert errors_px[0] != errors_px[1]


def test_what_was_broken_off_is_called_unfinished(inputs, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "transfer.json").write_text('{"complete": false}')
    assert transfer(inputs[0], folder) == 1
    assert "is there already, unfinished" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said_before_anything_acts(
    inputs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(commands.transfer, "act_on_arm", None)
    (tmp_path / "file").touch()
    assert transfer(inputs[0], tmp_path / "file/out", "--n_frames", "0") == 1
    assert "no folder can be made there" in capsys.readouterr().err


def test_the_table_is_printed_before_anything_is_drawn(inputs, tmp_path, capsys, monkeypatch):
    def fails(*given):
        raise ValueError("no ink")

    monkeypatch.setattr(commands.transfer, "_draw", fails)
    quick = ("--n_action_steps", "3", "--no-untrained", "--n_frames", "0")
    assert transfer(inputs[0], tmp_path / "out", *quick) == 1
    said = capsys.readouterr()
    assert "arm1_flipped - arm1" in said.out
    assert "no ink" in said.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--arms", "0", "2"), "push_t has arms 0 to 1"),
        (("--arms", "0"), "at least one other"),
        (("--task", "test_transfer_command.OneArm"), "has no arms; implement envs.task.ArmTask"),
        (("--n_trials", "1"), "--n_trials is 1"),
        (("--n_frames", "-1"), "--n_frames is -1"),
        (("--first_seed", "-5"), "--first_seed is -5: give at least 0"),
        (("--n_action_steps", "2", "3", "2"), "give each value once"),
        (("--temporal_ensemble_coeff", "0.1", "0.10"), "give each value once"),
        (("--action_scale", "2"), "give a share above 0 and at most 1"),
        (("--task", "test_transfer_command.OneArm", "--action_scale", "0.5"), "no action_scale"),
        (("--threshold", "70"), "--threshold is 70.0: give a share"),
        (("--n_action_steps", "7"), "predicts chunks of 6"),
        ((), "or give --n_frames 0"),
        (("--dataset_repo_id", "nowhere"), "no such file or folder"),
    ],
)
def test_wrong_arguments_are_one_message_and_leave_nothing(inputs, tmp_path, capsys, more, message):
    assert transfer(inputs[0], tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_policy_that_does_not_fit_is_refused_at_once(tmp_path, capsys):
    policy = save_policy(tmp_path / "act.ckpt", cameras={"wrist": [32, 32]})
    assert transfer(policy, tmp_path / "out") == 1
    assert "PushT has one square camera" in capsys.readouterr().err
    policy = save_policy(tmp_path / "other.ckpt", state_dim=3)
    assert transfer(policy, tmp_path / "out", "--n_frames", "0") == 1
    assert "the state has 2 dimensions, not 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_controllers_are_named_in_words():
    assert _in_words(Variant("queue8", 8, None)) == "chunked: 8 steps of each chunk"
    assert _in_words(Variant("ensemble0.01", None, 0.01)) == "ensembled: every step, m = 0.01"
