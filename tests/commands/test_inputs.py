"""What commands share: episodes to take, policies with the statistics of data, options."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_landscape_command import to_lerobot
from test_rollout_and_export import save_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))

from lerobot_folders import lerobot_policy, write_folder  # pyright: ignore[reportMissingImports]

import analyze
from commands.inputs import (
    DataShape,
    choose_episodes,
    episode_lengths,
    load_policies,
    open_demonstrations,
)
from policies.act import ACTPolicy
from policies.interface import DataSchema

LENGTHS = (16, 12, 14)
SCHEMA = DataSchema(cameras={"image": (32, 32)}, state_dim=2, action_dim=2)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Three demonstrations on a board of 512 px, each in a corner of its own."""
    path = tmp_path_factory.mktemp("data") / "demos.hdf5"
    rng = np.random.default_rng(0)

    def numbers(low: float, high: float, length: int, dim: int) -> np.ndarray:
        return rng.uniform(low, high, (length, dim)).astype(np.float32)

    with h5py.File(path, "w") as file:
        file.attrs.update(num_demos=len(LENGTHS), fps=10)
        for number, length in enumerate(LENGTHS):
            group = file.create_group(f"demo_{number}")
            pictures = rng.integers(80 * number, 80 * number + 90, (length, 32, 32, 3))
            group["observations/image"] = pictures.astype(np.uint8)
            low, high = 140 * number, 140 * number + 160
            group["observations/qpos"] = numbers(low, high, length, 2)
            group["observations/state"] = numbers(0, 512, length, 5)
            group["actions"] = numbers(low, high, length, 2)
    return path


@pytest.fixture(scope="module")
def lerobot_data(demonstrations, tmp_path_factory) -> Path:
    """The first twelve steps of each, as a LeRobotDataset that keeps the last one from training."""
    folder = to_lerobot(demonstrations, tmp_path_factory.mktemp("lerobot") / "demos")
    info = json.loads((folder / "meta/info.json").read_text())
    info["splits"] = {"train": "0:2", "val": "2:3"}
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """An ACT that LeRobot saved, with statistics."""
    folder = tmp_path_factory.mktemp("complete") / "pretrained_model"
    return write_folder(folder, *lerobot_policy("act"))


@pytest.fixture(scope="module")
def bare(complete, tmp_path_factory) -> Path:
    """The same without statistics."""
    folder = shutil.copytree(complete, tmp_path_factory.mktemp("bare") / "pretrained_model")
    for file in folder.glob("policy_*"):
        file.unlink()
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Episodes


@pytest.mark.parametrize(
    ("given", "chosen"),
    [(None, [3]), (["all"], [3, 5, 8]), ([8], [8]), ([8, 3], [8, 3])],
)
def test_episodes_are_the_first_all_or_those_named_in_their_order(given, chosen):
    assert choose_episodes(given, [5, 3, 8]) == chosen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([4, 3, 9], r"--episode_idx \[4, 9\]: the data set has 3 episodes, 3 to 8"),
        ([-1], r"\[-1\]: the data set has 3 episodes"),
        ([3, 3], r"names something twice: \[3, 3\]"),
        (["all", "all"], "names something twice"),
        (["all", 3], "the word all alone"),
    ],
)
def test_episodes_that_cannot_be_chosen_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        choose_episodes(given, [3, 5, 8])
    with pytest.raises(ValueError, match="no usable episode"):
        choose_episodes(given, [])


def test_lengths_are_known_without_a_policy(demonstrations, lerobot_data):
    assert episode_lengths(str(demonstrations)) == dict(enumerate(LENGTHS))
    assert episode_lengths(str(lerobot_data)) == dict.fromkeys(range(3), 12)
    with pytest.raises(ValueError, match="no such file or folder"):
        episode_lengths("nowhere.hdf5")


# Options


def parse(*words: str) -> argparse.Namespace:
    needed = ("--policy_path", "p", "--dataset_repo_id", "d", "--output_dir", "o")
    return analyze.build_parser("landscape").parse_args(["landscape", *needed, *words])


def test_episodes_are_numbers_or_the_word_all(capsys):
    assert parse("--episode_idx", "0", "3").episode_idx == [0, 3]
    assert parse("--episode_idx", "all").episode_idx == ["all"]
    assert parse().episode_idx is None
    for wrong in ("every", "1.5", "All"):
        with pytest.raises(SystemExit):
            parse("--episode_idx", wrong)
        said = capsys.readouterr().err
        assert f"'{wrong}' is neither the number of an episode nor the word all" in said


def options(command: str) -> dict[str, argparse.Action]:
    parser = analyze.build_parser(command)
    (below,) = (
        action for action in parser._actions if hasattr(action, "choices") and action.choices
    )
    return {action.dest: action for action in dict(below.choices or {})[command]._actions}


def test_commands_that_share_an_option_say_the_same_of_it():
    rollout, landscape = options("rollout"), options("landscape")
    for name in ("device", "revision", "task"):
        assert (rollout[name].help, rollout[name].default) == (
            landscape[name].help,
            landscape[name].default,
        )
    assert (landscape["device"].default, landscape["revision"].default) == ("auto", None)
    assert landscape["stats_from_data"].default is False
    # A policy that acts in a simulator has no data to take statistics from.
    assert "stats_from_data" not in rollout


# Statistics from the data


def frames(path: Path, key: str, length: int | None = None) -> np.ndarray:
    with h5py.File(path) as file:
        parts = [np.asarray(file[f"demo_{n}/{key}"])[:length] for n in range(len(LENGTHS))]
    return np.concatenate(parts).astype(np.float64)


def scales(view: Any) -> dict[str, list[float]]:
    assert isinstance(view, ACTPolicy)
    normaliser = view.normaliser
    assert normaliser.state is not None
    return {
        "observations/qpos": [*normaliser.state.offset.tolist(), *normaliser.state.scale.tolist()],
        "actions": [*normaliser.action.offset.tolist(), *normaliser.action.scale.tolist()],
        "observations/image": [
            *normaliser.image("image").offset.tolist(),
            *normaliser.image("image").scale.tolist(),
        ],
    }


@pytest.mark.parametrize("kind", ["hdf5", "lerobot"])
def test_all_frames_of_the_data_scale_a_policy_without_statistics(
    bare, demonstrations, lerobot_data, kind
):
    """Also those that the data set keeps from training."""
    data = demonstrations if kind == "hdf5" else lerobot_data
    (policy,) = load_policies([str(bare)], str(data), "cpu", stats_from_data=True)
    assert policy.scaled_by_data
    for key, found in scales(policy.view).items():
        values = frames(demonstrations, key, None if kind == "hdf5" else 12)
        if key.endswith("image"):
            values = values.reshape(-1, 3) / 255
        expected = np.concatenate([values.mean(0), values.std(0)])
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=key)


def test_only_the_policy_that_brings_none_takes_them(bare, complete, demonstrations):
    paths = [str(complete), str(bare)]
    whole, stripped = load_policies(paths, str(demonstrations), "cpu", stats_from_data=True)
    assert (whole.scaled_by_data, stripped.scaled_by_data) == (False, True)
    (unasked,) = load_policies([str(complete)], str(demonstrations), "cpu")
    assert scales(whole.view) == scales(unasked.view) != scales(stripped.view)


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_asking_for_nothing_is_an_error_before_the_data_are_read(complete, tmp_path, kind):
    policy = complete if kind == "folder" else save_policy(tmp_path / "policy.ckpt")
    with pytest.raises(ValueError, match=r"has no effect on .*never replaced\. Leave it out"):
        load_policies([str(policy)], "nowhere.hdf5", "cpu", stats_from_data=True)


def test_data_that_the_policy_cannot_read_do_not_scale_it(bare, demonstrations, tmp_path):
    other = tmp_path / "other.hdf5"
    with h5py.File(demonstrations) as old, h5py.File(other, "w") as new:
        new.attrs.update(old.attrs)
        for name, group in old.items():
            old.copy(group, new, name)
            qpos = np.asarray(group["observations/qpos"])  # pyright: ignore[reportIndexIssue]
            del new[f"{name}/observations/qpos"]
            new[f"{name}/observations/qpos"] = np.repeat(qpos, 2, axis=1)
    with pytest.raises(ValueError, match="does not fit the policy: state_dim: 2 != 4"):
        load_policies([str(bare)], str(other), "cpu", stats_from_data=True)


def test_a_shape_reads_what_its_policy_would(complete, demonstrations):
    (policy,) = load_policies([str(complete)], str(demonstrations), "cpu")
    shape = DataShape(SCHEMA, policy.view.chunk_size)
    batches = []
    for given in (policy.view, shape):
        data = open_demonstrations(str(demonstrations), given, [1], progress=False)
        data.setup()
        batches.append(data.episode(1))
    assert torch.equal(batches[0].actions, batches[1].actions)
    assert batches[0].actions.shape == (LENGTHS[1], policy.view.chunk_size, 2)
    assert torch.equal(
        batches[0].observation.images["image"], batches[1].observation.images["image"]
    )


# Through the command line


def landscape(policy: Any, dataset: Any, folder: Path, *more: Any) -> int:
    words = ["landscape", "--policy_path", policy, "--dataset_repo_id", dataset]
    words += ["--output_dir", folder, "--horizons", 0, "--max_steps", 3, "--n_samples", 4]
    words += ["--action_resolution", 16, "--n_calibration_frames", 6, "--n_evidence_frames", 1]
    words += ["--device", "cpu", "--videos", "false"]
    return analyze.main([str(word) for word in [*words, *more]])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_landscape_says_whose_statistics_scale_the_policy(
    bare, complete, demonstrations, tmp_path, capsys
):
    out = tmp_path / "out"
    assert landscape(bare, demonstrations, out) == 1
    said = capsys.readouterr().err
    assert "no statistics for observation.image" in said
    assert "--stats_from_data" in said
    assert said.count("\n") == 1
    assert landscape(complete, demonstrations, out, "--stats_from_data") == 1
    assert "Leave it out" in capsys.readouterr().err
    assert not out.exists()
    assert landscape(bare, demonstrations, out, "--stats_from_data") == 0
    printed = "".join(capsys.readouterr().out.split())
    assert f"bringsnostatistics:scaledbythoseof{demonstrations}" in printed
    assert read(out / "episode_0_config.json")["stats_from_data"] is True
    assert landscape(complete, demonstrations, tmp_path / "own") == 0
    assert "brings no statistics" not in capsys.readouterr().out
    assert read(tmp_path / "own/episode_0_config.json")["stats_from_data"] is False


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_policy(tmp_path / "policy.ckpt")


def test_all_episodes_are_shown_but_those_that_the_scale_is_fitted_on(
    checkpoint, demonstrations, tmp_path, capsys
):
    out = tmp_path / "out"
    everything = ("--episode_idx", "all")
    assert landscape(checkpoint, demonstrations, out, *everything) == 1
    said = capsys.readouterr().err
    assert "the data set has no other" in said
    assert "--calibration_episodes" in said
    chosen = (*everything, "--calibration_episodes", 0, 1, 2)
    assert landscape(checkpoint, demonstrations, out, *chosen) == 1
    assert "none is left to be shown" in capsys.readouterr().err
    assert not out.exists()
    chosen = (*everything, "--calibration_episodes", 1)
    assert landscape(checkpoint, demonstrations, out, *chosen) == 0
    (row,) = read(out / "metrics.json")["policies"]
    assert (row["episodes"], row["calibration_episodes"]) == ([0, 2], [1])
    assert {path.name for path in out.glob("*_config.json")} == {
        "episode_0_config.json",
        "episode_2_config.json",
    }


def test_without_a_fit_all_episodes_are_shown(checkpoint, demonstrations, tmp_path):
    words = ("--episode_idx", "all", "--kernel_scale", "20")
    assert landscape(checkpoint, demonstrations, tmp_path / "out", *words) == 0
    (row,) = read(tmp_path / "out/metrics.json")["policies"]
    assert (row["episodes"], row["calibration_episodes"]) == ([0, 1, 2], [])
    assert {each["episode"] for each in row["per_episode"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("held_out", "line"),
    [([], "was trained on episodes [0]"), ([1], "was trained on episodes [0]"), ([0], None)],
)
def test_an_episode_of_the_training_is_named_also_if_none_was_held_out(
    checkpoint, demonstrations, tmp_path, capsys, held_out, line
):
    content = torch.load(checkpoint, weights_only=True)
    train = [number for number in range(3) if number not in held_out]
    content["data"] = {"split": {"train": train, "val": held_out}}
    torch.save(content, checkpoint)
    assert landscape(checkpoint, demonstrations, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (line or "") in printed
    assert ("was trained on" in printed) == (line is not None)
