"""``analyze.py landscape`` on a policy with 14 dimensions, and on chosen planes of any policy."""

import json
import re
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import torch
from test_landscape_command import landscape
from test_rollout_and_export import save_policy
from toy_arms import ToyArmsTask, write_arms

from analyze import SHARED
from commands.inputs import DEFAULT_TASK
from landscapes.density import Mixture
from landscapes.space import ActionSpace
from policies.interface import DataSchema

TASK = "toy_arms.ToyArmsTask"


class OtherArms(ToyArmsTask):
    """For ``--task``: a task that these policies do not fit."""

    @classmethod
    def for_policy(cls, schema: DataSchema) -> ToyArmsTask:
        raise ValueError("wants six legs")


NAMES = [axis.name for axis in ToyArmsTask().action_dimensions]


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> Path:
    return write_arms(tmp_path_factory.mktemp("arms") / "arms.hdf5")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """An untrained one that answers within the arms' range, and differently for different z."""
    cameras = {"top": [24, 32], "side": [24, 32]}
    path = tmp_path_factory.mktemp("policy") / "arms.ckpt"
    save_policy(path, cameras=cameras, state_dim=14, action_dim=14, chunk_size=10)
    checkpoint = torch.load(path, weights_only=True)
    for key, value in checkpoint["state_dict"].items():
        if re.search(r"normaliser\.(action|state)\.", key):
            value.fill_(0.1 if key.endswith("offset") else 0.4)
        if key.endswith("latent_projection.weight"):
            value.mul_(4)
    torch.save(checkpoint, path)
    return path


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["policies"][0]


def config(folder: Path, number: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"episode_{number}_config.json").read_text())


@pytest.fixture(scope="module")
def whole(arms, policy, tmp_path_factory) -> Path:
    """All that there is, of two episodes."""
    folder = tmp_path_factory.mktemp("whole")
    assert landscape(policy, arms, folder, task=TASK, episode_idx=(0, 1)) == 0
    return folder


def test_everything_is_written_for_fourteen_dimensions(whole):
    board = "right_0-right_1"
    for number in (0, 1):
        stem = f"episode_{number}"
        expected = {
            f"{stem}_environment.mp4",
            f"{stem}_heatmaps_likelihood_{board}.mp4",
            f"{stem}_combined_likelihood_{board}.mp4",
            f"{stem}_landscapes_likelihood_{board}.npz",
            f"{stem}_marginals.npz",
            f"{stem}_marginals_along_k0.png",
            f"{stem}_marginals_along_k5.png",
            f"{stem}_marginals_k0.png",
            f"{stem}_marginals_k5.png",
            f"{stem}_marginals_k5.mp4",
            f"{stem}_projection.png",
            f"{stem}_projection.mp4",
            f"{stem}_config.json",
        }
        assert {path.name for path in whole.glob(f"{stem}_*")} == expected
        for video in whole.glob(f"{stem}_*.mp4"):
            with av.open(str(video)) as file:
                assert sum(1 for _ in file.decode(video=0)) == 6


def test_numbers_are_there_for_all_at_once_for_each_dimension_and_for_the_plane(whole):
    found = numbers(whole)
    summary = found["summary"]
    for k in (0, 5):
        for part in ("", *(f"{name}/" for name in NAMES), "right_0-right_1/"):
            for name in ("nll", "c80", "c95", "energy", "skill_vs_agent"):
                key = f"k{k}/{part}{name}"
                assert np.isfinite(summary[key]), key
                low, high = found["intervals"][key]
                assert low <= summary[key] <= high
        assert f"k{k}/right_0-right_1/modes_mean" in summary
        assert f"k{k}/hdr80_px2" not in summary
        assert f"k{k}/left_0/modes_mean" not in summary
    assert "k0/R_z" in found["trust"]
    assert not [key for key in found["trust"] if key.endswith("_px")]


def test_files_say_what_the_dimensions_are(whole):
    said = config(whole)
    assert [axis["name"] for axis in said["action_dimensions"]] == NAMES
    assert said["action_dimensions"][0] == {
        "name": "left_0",
        "unit": "rad",
        "low": -3.0,
        "high": 3.0,
    }
    assert said["planes"] == ["right_0-right_1"]
    scales = said["kernel_scales"]
    assert len(scales["joint"]["k5"]) == len(scales["single"]["k5"]) == 14
    assert len(scales["right_0-right_1"]["k5"]) == 2
    assert said["slice"] == "marginal"


def test_arrays_of_a_plane_are_the_marginal_of_the_samples(whole):
    """The board can be computed again from the samples and the scale beside it."""
    board_name = "right_0-right_1"
    with np.load(whole / f"episode_0_landscapes_likelihood_{board_name}.npz") as file:
        board, samples = file["board"], file["samples"]
        mass = file["mass"]
        assert file["dims"].tolist() == [7, 8]
        assert file["names"].tolist() == NAMES
        assert set(file["units"].tolist()) == {"rad"}
        assert str(file["slice"]) == "marginal"
    scale = torch.tensor(config(whole)["kernel_scales"][board_name]["k5"], dtype=torch.float64)
    np.testing.assert_array_equal(board, [[-3, -3], [3, 3]])
    space = ActionSpace.of(ToyArmsTask().action_dimensions, torch.zeros(14), torch.ones(14))
    grid = space.plane(7, 8).grid(24)
    density = Mixture(torch.from_numpy(samples[:, :, 1, 7:9]).double(), scale.expand(1, 1, 2))
    expected = density.cell_mass(grid)
    np.testing.assert_allclose(mass[:, 1], expected.numpy(), rtol=2e-3, atol=1e-4)


def test_planes_by_name_and_by_number_are_the_same(arms, policy, tmp_path, capsys):
    small = {"task": TASK, "videos": "false", "marginals": "false", "projection": "false"}
    pairs = ["--action_dims", "left_3", "right_6", "--action_dims", "0", "1"]
    assert landscape(policy, arms, tmp_path / "names", *pairs, **small) == 0
    assert "vary most" not in capsys.readouterr().out
    numbered = ["--action_dims", "3", "13", "--action_dims", "left_0", "1"]
    assert landscape(policy, arms, tmp_path / "numbers", *numbered, **small) == 0
    for folder in ("names", "numbers"):
        assert config(tmp_path / folder)["planes"] == ["left_3-right_6", "left_0-left_1"]
    files = [
        sorted(path.name for path in (tmp_path / folder).iterdir())
        for folder in ("names", "numbers")
    ]
    assert files[0] == files[1]
    assert not [name for name in files[0] if name.endswith((".png", ".mp4"))]
    summary = numbers(tmp_path / "names")["summary"]
    assert "k0/left_3-right_6/nll" in summary
    assert "k0/left_3/nll" not in summary, "what is not wanted is not measured"


def test_without_a_task_dimensions_have_numbers_and_the_range_of_the_data(
    arms, policy, tmp_path, capsys
):
    assert landscape(policy, arms, tmp_path, videos="false", max_steps=3) == 0
    printed = capsys.readouterr().out
    assert "boards over action_7-action_8" in printed
    assert "--action_dims" in printed
    said = config(tmp_path)
    assert said["action_dimensions"][5]["name"] == "action_5"
    assert said["action_dimensions"][5]["unit"] == ""
    assert -1 < said["action_dimensions"][5]["low"] < said["action_dimensions"][5]["high"] < 1
    assert "k0/action_13/c80" in numbers(tmp_path)["summary"]
    assert (tmp_path / "episode_0_marginals_along_k0.png").exists()
    assert not list(tmp_path.glob("*projection*")), "no task says where actions lead"


def test_axes_and_planes_are_of_the_whole_data_set_whatever_is_shown(policy, tmp_path, capsys):
    """One episode that is neither shown nor calibrates moves two other dimensions further."""
    path = write_arms(tmp_path / "arms.hdf5")
    with h5py.File(path, "r+") as file:
        actions = file["demo_3/actions"]
        assert isinstance(actions, h5py.Dataset)
        actions[:, 2:4] = np.linspace(-50, 50, len(actions))[:, None]
    knobs = {"videos": "false", "marginals": "false", "max_steps": 2}
    calibrate = ["--calibration_episodes", "1"]
    for number in (0, 2):
        folder = tmp_path / str(number)
        assert landscape(policy, path, folder, *calibrate, episode_idx=(number,), **knobs) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "boards over action_2-action_3" in printed
        assert "vary most in all 4 episodes" in printed
        assert "axes hold the actions of all 4 episodes" in printed
    first, second = (config(tmp_path / str(n), n)["action_dimensions"] for n in (0, 2))
    assert first == second
    assert first[2]["high"] == pytest.approx(60)


def test_a_task_that_does_not_fit_is_left_out_with_its_reason(arms, policy, tmp_path, capsys):
    class_path = "test_landscape_dimensions.OtherArms"
    knobs = {"videos": "false", "marginals": "false", "max_steps": 2}
    assert landscape(policy, arms, tmp_path / "asked", task=class_path, **knobs) == 0
    assert f"--task {class_path} is left out: wants six legs" in capsys.readouterr().err
    assert landscape(policy, arms, tmp_path / "default", **knobs) == 0
    assert "left out" not in capsys.readouterr().err


def test_the_default_task_is_the_one_that_is_silent():
    assert SHARED["task"]["default"] == DEFAULT_TASK


def test_a_conditional_slice_is_another_board(arms, policy, tmp_path):
    small = {"task": TASK, "videos": "false", "marginals": "false", "max_steps": 3}
    boards = []
    for kind in ("marginal", "conditional"):
        assert landscape(policy, arms, tmp_path / kind, slice=kind, **small) == 0
        (path,) = (tmp_path / kind).glob("*_landscapes_*.npz")
        assert ("_conditional" in path.name) == (kind == "conditional")
        with np.load(path) as file:
            assert str(file["slice"]) == kind
            boards.append(file["mass"].astype(float))
        summary = numbers(tmp_path / kind)["summary"]
        boards.append(summary["k5/right_0-right_1/nll"])
    assert not np.allclose(boards[0], boards[2], atol=1e-3)
    assert boards[1] == boards[3], "numbers measure the marginal"
    assert boards[0].sum() > 1, "there is something on the board"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--action_dims", "0", "0"], "give two different dimensions"),
        (["--action_dims", "0", "wrist"], "action_dims wrist: the actions have the dimensions 0"),
        (["--action_dims", "0", "1", "--action_dims", "0", "1"], "names a pair twice"),
        (["--scoring_method", "recon"], "recon: scores whole actions"),
        (["--scoring_method", "distance", "--slice", "conditional"], "distance: is no density"),
        (
            ["--task", "envs.push_t.PushTTask", "--projection", "true"],
            "or no environment that implements",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(arms, policy, tmp_path, capsys, options, message):
    given = {} if "--task" in options else {"task": TASK}
    assert landscape(policy, arms, tmp_path, *options, videos="false", max_steps=2, **given) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
