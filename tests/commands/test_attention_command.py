"""``analyze.py attention`` and ``saliency`` from the outside, on short demonstrations of PushT."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import cv2
import h5py
import numpy as np
import pytest
import torch
from lerobot_folders import (  # pyright: ignore[reportMissingImports]
    lerobot_policy,
    write_folder,
)
from pyarrow import parquet
from test_rollout_and_export import save_policy

import analyze
import commands.attention
import commands.rollout
import datamodules.progress
import envs.rollout
import rendering.attention
from attention.attribution import Attribution
from attention.gradients import GradCAM, IntegratedGradients, Relevancy
from attention.maps import CrossAttention, EncoderAttention, Rollout
from attention.method import Method, Target
from attention.occlusion import Occlusion
from attention.study import explain, numbers
from commands.attention import _on_patches, _spread
from commands.inputs import DataShape, open_demonstrations
from envs.push_t import PushT, PushTTask
from policies.interface import Batch
from policies.loading import load_policy

LENGTHS = (12, 14, 13)
CAMERAS = {"top": [32, 48], "wrist": [40, 32]}
ATTENTION = ("cross_attention", "encoder_attention", "rollout", "relevancy")
SALIENCY = ("grad_cam", "integrated_gradients", "occlusion")


class ShortPushT(PushTTask):
    """PushT that ends after nine steps, for ``--task``."""

    def __init__(self, image_size: int = 32, max_steps: int = 9, **changes: Any):
        super().__init__(image_size=image_size, max_steps=max_steps, **changes)


def with_picture_scale(checkpoint: Path) -> Path:
    """Let a policy see its pictures, whose scale is that of positions in px else."""
    content = torch.load(checkpoint, weights_only=True)
    for name, value in content["state_dict"].items():
        if "normaliser.images" in name:
            value.fill_(0.5 if name.endswith("offset") else 0.25)
    torch.save(content, checkpoint)
    return checkpoint


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "100")
        yield


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Three episodes in which the agent walks about."""
    path = tmp_path_factory.mktemp("data") / "demos.hdf5"
    env = PushT(32)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update(num_demos=len(LENGTHS), fps=10)
        for number, length in enumerate(LENGTHS):
            env.reset(number)
            rows: dict[str, list] = {"image": [], "qpos": [], "state": []}
            actions = rng.uniform(100, 400, (length, 2)).astype(np.float32)
            for action in actions:
                seen = env.observe()
                rows["image"].append(seen["images"]["image"])
                rows["qpos"].append(seen["state"])
                rows["state"].append(seen["simulator_state"].astype(np.float32))
                env.step(action)
            for name, values in rows.items():
                file[f"demo_{number}/observations/{name}"] = np.stack(values)
            file[f"demo_{number}/actions"] = actions
    env.close()
    return path


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory) -> Path:
    """Episodes seen by two cameras of different sizes, without states of a simulator."""
    path = tmp_path_factory.mktemp("two") / "demos.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update(num_demos=2, fps=25)
        for number in range(2):
            for name, (height, width) in CAMERAS.items():
                pictures = rng.integers(0, 256, (5, height, width, 3), dtype=np.uint8)
                file[f"demo_{number}/observations/images/{name}"] = pictures
            for name in ("observations/qpos", "actions"):
                values = rng.uniform(0, 512, (5, 2)).astype(np.float32)
                file[f"demo_{number}/{name}"] = values
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """16 tokens, two encoder layers, a chunk of 8."""
    path = tmp_path_factory.mktemp("policy") / "act.ckpt"
    return with_picture_scale(save_policy(path, chunk_size=8, n_encoder_layers=2))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    policy = lerobot_policy("diffusion", n_obs_steps=2, horizon=8)
    return write_folder(tmp_path_factory.mktemp("diffusion") / "pretrained_model", *policy)


def call(command: str, policy: Any, dataset: Any, folder: Any, *more: Any, **options: Any) -> int:
    """Call a command with small settings."""
    small = {
        "max_steps": 3,
        "n_faithfulness_frames": 0,
        "target_height": 64,
        "videos": False,
        "device": "cpu",
        **options,
    }
    words = [command, "--policy_path", policy, "--output_dir", folder]
    words += [] if dataset is None else ["--dataset_repo_id", dataset]
    for name, value in small.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return analyze.main([str(word) for word in [*words, *more]])


def read(path: Path) -> Any:
    """JSON as others read it, who know no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def rows_of(path: Path, method: str) -> dict[str, list]:
    """Columns of one method."""
    table = parquet.read_table(path).to_pydict()
    chosen = [row for row, name in enumerate(table["method"]) if name == method]
    return {name: [values[row] for row in chosen] for name, values in table.items()}


def recorded(dataset: Path, policy: Any, number: int, n_steps: int = 3) -> tuple[Any, Batch]:
    """A policy, and what it sees in the first steps of an episode."""
    view = load_policy(str(policy)).view
    shape = DataShape(view.data_schema, 1, view.n_obs_steps)
    data = open_demonstrations(str(dataset), shape, [number], progress=False)
    data.setup()
    return view, data.episode(number).rows(slice(n_steps))


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def assert_says(rows: dict[str, list], found: Attribution) -> None:
    """A table holds what a method said."""
    masses = found.picture_mass()
    for name, mass in masses.items():
        np.testing.assert_allclose(
            np.array(rows[f"map_{name}"]), mass.flatten(1).numpy(), rtol=1e-4, atol=1e-6
        )
        assert set(rows[f"rows_{name}"]) == {mass.shape[1]}
    for name, share in found.shares().items():
        np.testing.assert_allclose(rows[f"share_{name}"], share.numpy(), rtol=1e-4, atol=1e-6)
    for name, values in found.dimensions.items():
        np.testing.assert_allclose(np.array(rows[name]), values.numpy(), rtol=1e-3, atol=1e-4)


# What is written


@pytest.fixture(scope="module")
def made(checkpoint, demonstrations, tmp_path_factory) -> tuple[Path, str]:
    """All methods of attention on two episodes, put to the test, and what was printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("made") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ("--episode_idx", "2", "0", "--method", *ATTENTION)
        options = {"n_faithfulness_frames": 4, "videos": True}
        assert call("attention", checkpoint, demonstrations, folder, *words, **options) == 0
    return folder, printed.getvalue()


def test_exactly_the_promised_files_are_written(made):
    folder, _ = made
    expected = ["faithfulness_strip.png", "metrics.json"]
    for number in (0, 2):
        expected += [f"episode_{number}.parquet", f"episode_{number}_strip.png"]
        expected += [f"episode_{number}_{method}_image.mp4" for method in ATTENTION]
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    for path in folder.glob("*.mp4"):
        assert len(frames_of(path)) == 3
    for path in folder.glob("*.png"):
        assert cv2.imread(str(path)).std() > 10


def test_tables_hold_what_the_methods_say(made, checkpoint, demonstrations):
    folder, _ = made
    view, batch = recorded(demonstrations, checkpoint, 2)
    methods = (CrossAttention(), EncoderAttention(), Rollout(), Relevancy())
    for method in methods:
        rows = rows_of(folder / "episode_2.parquet", method.name)
        assert_says(rows, explain(method, view, batch.observation, Target()))
        assert rows["episode_index"] == [2] * 3
        assert rows["frame_index"] == [0, 1, 2]
        assert rows["queries"] == [[0]] * 3


def test_numbers_are_means_over_all_frames_of_all_episodes(made, checkpoint, demonstrations):
    metrics = read(made[0] / "metrics.json")
    whole = []
    for number in (2, 0):
        view, batch = recorded(demonstrations, checkpoint, number)
        whole.append(explain(Rollout(), view, batch.observation, Target()))
    expected = numbers(Attribution.concatenate(whole))
    found = metrics["methods"]["rollout"]
    assert found["mean"] == pytest.approx({"n_frames": 6, **expected}, rel=1e-4)
    assert [row["episode"] for row in found["per_episode"]] == ["episode_2", "episode_0"]
    assert metrics["policy"].endswith("act.ckpt")
    assert metrics["queries"] == [0]
    assert metrics["note"] == "a token is a cell of 8 px and sees 33 px around it"


def test_maps_are_put_to_the_test_on_frames_of_all_episodes(made):
    folder, printed = made
    metrics = read(folder / "metrics.json")
    for method in ATTENTION:
        truth = metrics["methods"][method]["faithfulness"]
        assert {"deletion_ratio", "spearman_occlusion", "lift_agent", "ssim_randomised"} <= {*truth}
    effects = metrics["counterfactual"]
    assert effects["rerender_px"] < 0.1 * effects["effect_block_px"]
    assert f"agent {effects['effect_agent_px']:.3g} px" in printed
    # Four frames, a row for each method and one for occlusion, with red outlines.
    strip = cv2.imread(str(folder / "faithfulness_strip.png")).astype(int)
    assert strip.shape[0] > 6 * 160
    assert 4 * 160 < strip.shape[1] < 5 * 185
    blue, green, red = strip[..., 0], strip[..., 1], strip[..., 2]
    assert ((red > 200) & (green < 60) & (blue < 60)).sum() > 4 * 5 * 50
    plain = cv2.imread(str(folder / "episode_0_strip.png")).astype(int)
    assert ((plain[..., 2] > 200) & (plain[..., 1] < 60) & (plain[..., 0] < 60)).sum() < 50


def test_the_table_is_whole_on_100_columns(made):
    folder, printed = made
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    assert "…" not in printed
    metrics = read(folder / "metrics.json")["methods"]
    rows = {line.strip()[:24].strip(): line for line in printed.splitlines() if line.strip()}
    for name, form in (("share state", ".3f"), ("deletion ratio", ".2f"), ("lift block", ".2f")):
        key = name.replace(" ", "_")
        for method in ATTENTION:
            value = {**metrics[method]["mean"], **metrics[method]["faithfulness"]}[key]
            assert f"{value:{form}}" in rows[name]
    assert "mean over 6 frames" in printed
    assert "n = 4" in printed


# Options


@pytest.mark.parametrize(
    ("words", "method", "target", "other"),
    [
        (
            ["--layer", 0, "--head", 1, "--queries", 4, 2],
            CrossAttention(0, 1),
            Target((2, 4)),
            CrossAttention(),
        ),
        (
            ["--layer", 0, "--token", "image:3,1"],
            EncoderAttention("image:3,1", 0),
            Target(),
            EncoderAttention("image:3,1"),
        ),
        (["--token", "state"], Rollout("state"), Target(), Rollout()),
        (
            ["--dimensions", 1, "--aggregation", "sum"],
            Relevancy(),
            Target((0,), (1,), "sum"),
            Relevancy(),
        ),
        (
            ["--dimensions", 1, 0, "--aggregation", "norm"],
            GradCAM(),
            Target((0,), (0, 1), "norm"),
            GradCAM(),
        ),
        (
            ["--n_steps", 2, "--baseline", "black", "--queries", 5],
            IntegratedGradients(2, "black"),
            Target((5,)),
            IntegratedGradients(2),
        ),
        (["--patch_px", 5, "--baseline", "black"], Occlusion(5, "black"), Target(), Occlusion(5)),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_options_reach_the_method(
    checkpoint, demonstrations, tmp_path, words, method, target, other
):
    command = "attention" if method.name in ATTENTION else "saliency"
    words = ("--method", method.name, *words)
    assert call(command, checkpoint, demonstrations, tmp_path, *words, max_steps=2) == 0
    view, batch = recorded(demonstrations, checkpoint, 0, 2)
    rows = rows_of(tmp_path / "episode_0.parquet", method.name)
    assert_says(rows, explain(method, view, batch.observation, target))
    with pytest.raises(AssertionError):
        assert_says(rows, explain(other, view, batch.observation, Target()))
    (mean,) = read(tmp_path / "metrics.json")["methods"].values()
    assert ("completeness_error" in mean["mean"]) == (method.name == "integrated_gradients")


@pytest.mark.parametrize(("command", "methods"), [("attention", ATTENTION), ("saliency", SALIENCY)])
def test_the_batch_size_and_the_pictures_change_no_number(
    checkpoint, demonstrations, tmp_path, command, methods
):
    words = ("--method", *methods, *(("--n_steps", 1) if command == "saliency" else ()))
    different = {
        "few": {"batch_size": 2, "scale": "episode", "videos": True},
        "all": {"batch_size": 50, "show_proprio_border": True},
    }
    for name, options in different.items():
        assert call(command, checkpoint, demonstrations, tmp_path / name, *words, **options) == 0
    for method in methods:
        few, many = (rows_of(tmp_path / name / "episode_0.parquet", method) for name in different)
        assert few["frame_index"] == many["frame_index"] == [0, 1, 2]
        np.testing.assert_allclose(few["map_image"], many["map_image"], rtol=1e-3, atol=1e-5)
        means = [read(tmp_path / name / "metrics.json")["methods"][method] for name in different]
        assert means[0]["mean"] == pytest.approx(means[1]["mean"], rel=1e-3, abs=1e-5)


def test_the_range_of_the_episode_is_known_before_its_first_frame_is_drawn(
    checkpoint, demonstrations, tmp_path, monkeypatch
):
    given = []
    draw = rendering.attention.attention_frames

    def spy(scene, style, episode, note):
        given.append((episode, scene.cameras["image"].values.max()))
        return draw(scene, style, episode, note)

    monkeypatch.setattr(rendering.attention, "attention_frames", spy)
    options = {"scale": "episode", "videos": True, "batch_size": 1}
    assert call("attention", checkpoint, demonstrations, tmp_path, **options) == 0
    ranges, largest = zip(*given, strict=True)
    assert len(given) == 3
    assert {high for _, high in ranges} == {max(largest)}
    assert len({*largest}) > 1, "all frames are alike: no test"


def test_maps_of_pixels_are_drawn_on_patches_that_hold_the_same():
    generator = torch.Generator().manual_seed(0)
    sizes = {"large": (150, 200), "small": (97, 131)}
    found = Attribution(
        method="integrated_gradients",
        queries=(0,),
        maps={name: torch.rand(2, *size, generator=generator) for name, size in sizes.items()},
        cells_px=dict.fromkeys(sizes, 1.0),
        image_sizes=sizes,
        vectors={"state": torch.rand(2, generator=generator)},
        dimensions={},
    )
    drawn = _on_patches(found)
    assert drawn.cells_px == {"large": 2.0, "small": 2.0}
    assert {name: tuple(each.shape) for name, each in drawn.maps.items()} == {
        "large": (2, 75, 100),
        "small": (2, 49, 66),
    }
    torch.testing.assert_close(drawn.shares(), found.shares())
    corner = found.maps["small"][:, -1, -1]
    torch.testing.assert_close(drawn.maps["small"][:, -1, -1], corner)
    tokens = Attribution("rollout", (0,), {"a": torch.rand(2, 15, 20)}, {}, {}, {}, {})
    assert _on_patches(tokens) is tokens


# Cameras, policies and data of other kinds


def test_each_camera_has_a_video_and_all_of_them_have_one(two_cameras, tmp_path):
    policy = with_picture_scale(save_policy(tmp_path / "act.ckpt", cameras=CAMERAS))
    folder = tmp_path / "out"
    words = ("--method", "integrated_gradients", "occlusion", "--n_steps", 1, "--patch_px", 8)
    options = {"videos": True, "episode_idx": "all", "max_steps": 2, "target_height": 320}
    assert call("saliency", policy, two_cameras, folder, *words, **options) == 0
    for number in range(2):
        for method in ("integrated_gradients", "occlusion"):
            widths = {}
            for name in (*CAMERAS, "side_by_side"):
                frames = frames_of(folder / f"episode_{number}_{method}_{name}.mp4")
                assert len(frames) == 2
                widths[name] = frames[0].shape[1]
            assert widths["side_by_side"] > widths["top"] > widths["wrist"]
        rows = rows_of(folder / f"episode_{number}.parquet", "integrated_gradients")
        assert sum(sum(rows[f"map_{name}"][0]) for name in CAMERAS) == pytest.approx(1, abs=1e-4)
        assert (rows["rows_wrist"][0], rows["columns_wrist"][0]) == (40, 32)
    with av.open(str(folder / "episode_0_occlusion_top.mp4")) as video:
        assert float(video.streams.video[0].average_rate) == 25


def test_a_lerobot_folder_and_our_checkpoint_have_the_same_maps(demonstrations, tmp_path, capsys):
    changes = {"backbone": "resnet18", "token_stride": 32, "cameras": {"image": [64, 64]}}
    ours = with_picture_scale(save_policy(tmp_path / "act.ckpt", **changes))
    theirs = tmp_path / "lerobot"
    assert analyze.main(["export", "--policy_path", str(ours), "--output_dir", str(theirs)]) == 0
    for command, methods in (("attention", ATTENTION), ("saliency", ("grad_cam", "occlusion"))):
        folders = [tmp_path / f"{command}_{name}" for name in ("ours", "theirs")]
        for folder, policy in zip(folders, (ours, theirs), strict=True):
            words = ("--method", *methods)
            assert call(command, policy, demonstrations, folder, *words, max_steps=2) == 0
        for method in methods:
            first, second = (rows_of(each / "episode_0.parquet", method) for each in folders)
            assert first.keys() == second.keys()
            np.testing.assert_allclose(
                first["map_image"], second["map_image"], rtol=0.01, atol=2e-5
            )
    assert "was trained on" not in capsys.readouterr().out


def test_occlusion_explains_what_attention_cannot(diffusion, demonstrations, tmp_path, capsys):
    for command, method in (("attention", "rollout"), ("saliency", "grad_cam")):
        out = tmp_path / "refused"
        assert call(command, diffusion, demonstrations, out, "--method", method) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"analyze.py {command}: --method {method}: looks inside ACT")
        assert "use analyze.py saliency --method occlusion" in said
        assert not out.exists()
    words = ("--method", "occlusion", "--patch_px", 16, "--n_rollouts", 1)
    options = {"n_faithfulness_frames": 1, "max_steps": 2}
    folder = tmp_path / "out"
    assert call("saliency", diffusion, demonstrations, folder, *words, **options) == 0
    view, batch = recorded(demonstrations, diffusion, 0, 2)
    assert batch.observation.images["image"].ndim == 5
    found = [
        explain(Occlusion(16), view, batch.observation.rows(slice(row, row + 1)), Target())
        for row in range(2)
    ]
    assert_says(rows_of(folder / "episode_0.parquet", "occlusion"), Attribution.concatenate(found))
    assert (folder / "rollout_100000.parquet").is_file()
    printed = capsys.readouterr().out
    assert "no masks and counterfactuals: the policy sees a history" in printed
    assert "a token is" not in printed


def test_a_policy_without_statistics_takes_those_of_the_data(demonstrations, tmp_path, capsys):
    complete = write_folder(tmp_path / "complete", *lerobot_policy("act"))
    bare = shutil.copytree(complete, tmp_path / "bare")
    for file in bare.glob("policy_*"):
        file.unlink()
    out = tmp_path / "out"
    assert call("attention", bare, demonstrations, out) == 1
    assert "--stats_from_data" in capsys.readouterr().err
    assert not out.exists()
    assert call("attention", bare, demonstrations, out, "--stats_from_data") == 0
    printed = capsys.readouterr().out
    assert f"brings no statistics: scaled by those of {demonstrations}" in printed
    assert read(out / "metrics.json")["stats_from_data"] is True
    assert call("attention", complete, demonstrations, tmp_path / "own") == 0
    own, scaled = (
        rows_of(tmp_path / name / "episode_0.parquet", "cross_attention")["share_state"]
        for name in ("own", "out")
    )
    assert not np.allclose(own, scaled, rtol=1e-4)


def test_an_episode_shorter_than_the_chunk_is_explained(demonstrations, tmp_path):
    policy = save_policy(tmp_path / "long.ckpt", chunk_size=100)
    words = ("--episode_idx", "2", "--queries", "99")
    options = {"max_steps": 50}
    assert call("attention", policy, demonstrations, tmp_path / "out", *words, **options) == 0
    rows = rows_of(tmp_path / "out/episode_2.parquet", "cross_attention")
    assert rows["frame_index"] == list(range(LENGTHS[2]))


@pytest.mark.parametrize(
    ("split", "line"),
    [
        ({"train": [0, 2], "val": [1]}, "was trained on episodes [0]"),
        ({"train": [1, 2], "val": [0]}, None),
        # Numbers of another data set.
        ({"train": [0, 2, 3], "val": [1]}, None),
    ],
)
def test_an_episode_of_the_training_is_named(
    checkpoint, demonstrations, tmp_path, capsys, split, line
):
    content = torch.load(checkpoint, weights_only=True)
    content["data"] = {"split": split}
    torch.save(content, tmp_path / "split.ckpt")
    assert call("attention", tmp_path / "split.ckpt", demonstrations, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert (line or "") in printed
    assert ("was trained on" in printed) == (line is not None)


# Rollouts


@pytest.fixture
def rollouts_seen(monkeypatch) -> list[envs.rollout.RolloutResult]:
    """What either command's rollouts were."""
    seen = []
    act = envs.rollout.rollout

    def spy(*given: Any, **named: Any) -> envs.rollout.RolloutResult:
        seen.append(act(*given, **named))
        return seen[-1]

    monkeypatch.setattr(envs.rollout, "rollout", spy)
    monkeypatch.setattr(commands.rollout, "rollout", spy)
    return seen


@pytest.mark.parametrize(
    "acting", [(), ("--n_action_steps", 2), ("--temporal_ensemble_coeff", 0.1)]
)
def test_nobody_acts_differently_for_being_watched(
    checkpoint, tmp_path, rollouts_seen, acting, capsys
):
    task = ("--task", f"{__name__}.ShortPushT", *acting)
    words = ["rollout", "--policy_path", checkpoint, "--output_dir", tmp_path / "rollout"]
    words += ["--n_episodes", 2, "--n_videos", 2, "--device", "cpu", *task]
    assert analyze.main([str(word) for word in words]) == 0
    watched = ("--n_rollouts", 2, *task)
    assert call("attention", checkpoint, None, tmp_path / "out", *watched, max_steps=400) == 0
    alone, observed = rollouts_seen
    for before, after in zip(alone.recordings, observed.recordings, strict=True):
        assert before.seed == after.seed
        np.testing.assert_array_equal(before.actions, after.actions)
        np.testing.assert_array_equal(before.predicted, after.predicted)
        np.testing.assert_array_equal(before.simulator_states, after.simulator_states)
    # Every step is explained, also those that the queue decided.
    view = load_policy(str(checkpoint)).view
    for recording in observed.recordings:
        seen = envs.rollout.episode_observation(view, recording.observations)
        rows = rows_of(tmp_path / f"out/rollout_{recording.seed}.parquet", "cross_attention")
        assert_says(rows, explain(CrossAttention(), view, seen, Target()))
        assert rows["frame_index"] == list(range(9))
        assert rows["episode_index"] == [recording.seed] * 9
    assert "100%" not in capsys.readouterr().out, "a progress bar in a log file"


def test_recorded_and_acted_episodes_are_explained_together(
    checkpoint, demonstrations, tmp_path, capsys
):
    """Also where only the acted ones have states of the simulator."""
    stateless = tmp_path / "stateless.hdf5"
    shutil.copy(demonstrations, stateless)
    with h5py.File(stateless, "r+") as file:
        for number in range(len(LENGTHS)):
            del file[f"demo_{number}/observations/state"]
    words = ("--n_rollouts", 2, "--first_seed", 7, "--method", "rollout")
    options = {"n_faithfulness_frames": 2, "max_steps": 3}
    found = {}
    for name, data in (("with", demonstrations), ("without", stateless)):
        assert call("attention", checkpoint, data, tmp_path / name, *words, **options) == 0
        assert {path.name for path in (tmp_path / name).glob("*.parquet")} == {
            "episode_0.parquet",
            "rollout_7.parquet",
            "rollout_8.parquet",
        }
        found[name] = read(tmp_path / name / "metrics.json")
        assert found[name]["methods"]["rollout"]["mean"]["n_frames"] == 9
    assert "effect_block_px" in found["with"]["counterfactual"]
    assert found["without"]["counterfactual"] == {}
    assert "not all of the frames hold states" in capsys.readouterr().out


# While it works


def test_a_bar_for_each_episode_ends_where_it_should(
    checkpoint, demonstrations, tmp_path, monkeypatch
):
    from contextlib import contextmanager

    bars = []

    @contextmanager
    def progress_bar(title, total, shown):
        done = []
        yield done.append
        bars.append((title, total, sum(done), shown))

    monkeypatch.setattr(datamodules.progress, "progress_bar", progress_bar)
    words = ("--episode_idx", 2, 0, "--method", "rollout", "relevancy", "--n_rollouts", 1)
    options = {"videos": True, "batch_size": 2}
    assert call("attention", checkpoint, demonstrations, tmp_path, *words, **options) == 0
    expected = 3 * 2 * 2
    assert bars == [
        ("episode_2 (1 of 3)", expected, expected, True),
        ("episode_0 (2 of 3)", expected, expected, True),
        ("rollout_100000 (3 of 3)", expected, expected, True),
    ]


def test_a_finished_result_is_kept_unless_it_may_go(made, checkpoint, demonstrations, capsys):
    before = (made[0] / "metrics.json").read_text()
    assert call("attention", checkpoint, demonstrations, made[0]) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert (made[0] / "metrics.json").read_text() == before
    other = shutil.copytree(made[0], made[0].parent / "copy")
    assert call("attention", checkpoint, demonstrations, other, "--overwrite") == 0
    assert {*read(other / "metrics.json")["methods"]} == {"cross_attention"}
    # It would be of methods and frames that are no longer spoken of.
    assert not (other / "faithfulness_strip.png").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_only_whole_files_and_no_result(
    made, checkpoint, demonstrations, tmp_path, monkeypatch, overwrite
):
    folder = shutil.copytree(made[0], tmp_path / "out") if overwrite else tmp_path / "out"
    drawn = []
    draw = rendering.attention.attention_frames

    def interrupted(*given: Any) -> Any:
        drawn.append(given)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(*given)

    words = ("--episode_idx", "0", "1", *(("--overwrite",) if overwrite else ()))
    with monkeypatch.context() as patch:
        patch.setattr(rendering.attention, "attention_frames", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call("attention", checkpoint, demonstrations, folder, *words, videos=True)
    there = {path.name for path in folder.iterdir()}
    assert "metrics.json" not in there
    assert not [name for name in there if name.endswith(".part")]
    assert len(frames_of(folder / "episode_0_cross_attention_image.mp4")) == 3
    assert not [name for name in there if name.startswith("episode_1")]
    # Nothing is finished, so nothing has to be overwritten.
    assert call("attention", checkpoint, demonstrations, folder, "--episode_idx", 0, 1) == 0


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 5}, "--layer 5: the policy has decoder layers 0 to 0"),
        ({"layer": 2, "method": "encoder_attention"}, "--layer 2: the policy has encoder layers"),
        ({"head": 9}, "--head 9: the policy has heads 0 to 1"),
        ({"method": "rollout", "head": 1}, "--head has no effect on rollout: leave it out"),
        ({"token": "state"}, "add --method encoder_attention or rollout"),
        ({"method": "rollout", "token": "arm"}, "--token 'arm': give one of ['latent', 'state']"),
        ({"method": "rollout", "token": "image:9,9"}, "--token: no token 'image', cell (9, 9)"),
        ({"dimensions": 0}, "--dimensions has no effect on cross_attention"),
        ({"method": "relevancy", "dimensions": 2}, "--dimensions [2]: actions have dimensions"),
        ({"method": ("rollout", "rollout")}, "--method names something twice"),
        ({"queries": 8}, "--queries [8]: the policy predicts chunk steps 0 to 7"),
        ({"queries": (0, 0)}, "--queries names something twice"),
        ({"queries": -1}, "--queries [-1]: give rising numbers from 0 on"),
        ({"colormap": "viridi"}, "--colormap 'viridi': matplotlib has none of that name"),
        ({"overlay_alpha": 2}, "--overlay_alpha: 2.0; give a weight in 0..1"),
        ({"scale": "fixed"}, "--value_range: None with scale 'fixed'"),
        ({"value_range": (0, 1)}, "--value_range: (0.0, 1.0) with scale 'frame'"),
        ({"scale": "fixed", "value_range": (1, "nan")}, "give two finite, ascending values"),
        ({"target_height": 9}, "--target_height: 9 px; give at least 32"),
        ({"proprio_border_width": 0}, "--proprio_border_width: 0 px"),
        ({"episode_idx": 9}, "--episode_idx [9]: the data set has 3 episodes, 0 to 2"),
        ({"episode_idx": (0, 0)}, "--episode_idx names something twice"),
        ({"max_steps": 0}, "--max_steps 0: give at least 1"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"n_faithfulness_frames": -1}, "--n_faithfulness_frames -1"),
        ({"n_rollouts": -1}, "--n_rollouts -1"),
        ({"seed": -1}, "--seed -1"),
        ({"n_action_steps": 2}, "--n_action_steps has no effect without --n_rollouts"),
        ({"temporal_ensemble_coeff": 0}, "--temporal_ensemble_coeff has no effect without"),
        ({"n_rollouts": 1, "n_action_steps": 9}, "--n_action_steps 9: the policy predicts chunks"),
        ({"stats_from_data": None}, "--stats_from_data has no effect on"),
        ({"device": "cuda:99"}, "no CUDA device"),
        ({"device": "abacus"}, "no such device"),
        ({"task": "envs.push_t.Nowhere"}, "no such class"),
        ({"dataset_repo_id": "nowhere.hdf5"}, "no such file or folder"),
        ({"policy_path": "nowhere/at/all"}, "no such file or folder"),
        ({"output_dir": __file__}, "is no folder that can be written to"),
        ({"output_dir": f"{__file__}/below"}, "is no folder that can be written to"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_line_before_any_work(
    checkpoint, demonstrations, tmp_path, capsys, monkeypatch, options, message
):
    from datamodules.base import DemonstrationDataModule

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("frames are read, or somebody acts")

    monkeypatch.setattr(DemonstrationDataModule, "setup", refuse)
    monkeypatch.setattr(envs.rollout, "rollout", refuse)
    more = []
    if "stats_from_data" in options:
        options, more = {}, ["--stats_from_data"]
    out = tmp_path / "out"
    assert call("attention", checkpoint, demonstrations, out, *more, **options) == 1
    said = capsys.readouterr().err
    assert said.startswith("analyze.py attention: ")
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "--n_steps 0: give at least 1"),
        ({"method": "occlusion", "patch_px": 0}, "--patch_px 0: give at least 1"),
        ({"method": "grad_cam", "baseline": "black"}, "--baseline has no effect on grad_cam"),
        ({"method": "occlusion", "n_steps": 3}, "add --method integrated_gradients"),
        ({"method": "occlusion", "aggregation": "sum"}, "add --method grad_cam or integrated"),
    ],
)
def test_options_of_saliency_are_checked(
    checkpoint, demonstrations, tmp_path, capsys, options, message
):
    assert call("saliency", checkpoint, demonstrations, tmp_path / "out", **options) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "relevancy" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give --dataset_repo_id for recorded episodes, --n_rollouts for"),
        (("--n_rollouts", 1, "--episode_idx", 0), "--episode_idx has no effect without"),
        (("--n_rollouts", 1, "--stats_from_data"), "--stats_from_data has no effect without"),
    ],
)
def test_without_data_somebody_has_to_act(checkpoint, tmp_path, capsys, more, message):
    assert call("attention", checkpoint, None, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"state_dim": 3}, (), "state_dim: 3 != 2"),
        ({"cameras": {"wrist": [32, 32]}}, (), "cameras: {'wrist'"),
        ({"cameras": {"wrist": [32, 32]}}, ("--n_rollouts", 1), "one square camera"),
    ],
)
def test_data_and_tasks_that_do_not_fit_the_policy_are_refused(
    demonstrations, tmp_path, capsys, changes, more, message
):
    policy = save_policy(tmp_path / "other.ckpt", **changes)
    assert call("attention", policy, demonstrations, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_frames_to_test_are_spread_over_all_episodes():
    lengths = (5, 1, 10)
    for n_wanted in (0, 1, 3, 16, 99):
        rows = _spread(lengths, n_wanted)
        assert sum(map(len, rows)) == min(n_wanted, sum(lengths))
        for each, length in zip(rows, lengths, strict=True):
            assert all(0 <= row < length for row in each.tolist())
            assert len({*each.tolist()}) == len(each)
    assert _spread(lengths, 2)[0].tolist() == [0]
    assert _spread(lengths, 2)[2].tolist() == [9]


# The examples


def example(name: str, monkeypatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["attention_over_episodes", "saliency_methods"])
def test_the_example_runs_everything_that_it_describes(
    name, checkpoint, demonstrations, tmp_path, monkeypatch, capsys
):
    module = example(name, monkeypatch)
    words = ["--policy_path", checkpoint, "--dataset_repo_id", demonstrations]
    words += ["--output_dir", tmp_path / "out", "--max_steps", 2, "--n_faithfulness_frames", 0]
    words += ["--videos", "false", "--device", "cpu"]
    words += ["--n_steps", 2] if name == "saliency_methods" else []
    assert module.main([str(word) for word in words]) == 0
    described = set(re.findall(r"^(\w+)\n    ", module.__doc__, re.MULTILINE))
    assert described == {*module.RUNS} == {path.name for path in (tmp_path / "out").iterdir()}
    for run, options in module.RUNS.items():
        methods = read(tmp_path / "out" / run / "metrics.json")["methods"]
        assert {*methods} == {*options} & {*ATTENTION, *SALIENCY}
    # It stops at the first run that fails, and says why.
    capsys.readouterr()
    assert module.main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.out.count("==") == 2
    assert "add --overwrite" in said.err


def test_the_example_films_what_acts(checkpoint, diffusion, tmp_path, monkeypatch, capsys):
    module = example("act_with_attention", monkeypatch)
    words = ["--output_dir", str(tmp_path), "--n_steps", "3", "--policy_path"]
    assert module.main([*words, str(checkpoint)]) == 0
    frames = frames_of(tmp_path / "act_with_attention.mp4")
    assert len(frames) == 3
    assert np.abs(frames[0].astype(int) - frames[2]).max() > 30
    assert module.main([*words, str(diffusion)]) == 1
    assert "give an ACTPolicy" in capsys.readouterr().err


def test_effects_are_called_by_the_unit_of_the_actions(checkpoint, demonstrations, tmp_path):
    stored = torch.load(checkpoint, weights_only=True)
    stored["hyper_parameters"]["action_unit"] = "cm"
    torch.save(stored, tmp_path / "cm.ckpt")
    words = ("--method", "rollout", "--videos", "false")
    options = {"n_faithfulness_frames": 1, "max_steps": 2}
    assert call("attention", tmp_path / "cm.ckpt", demonstrations, tmp_path, *words, **options) == 0
    found = read(tmp_path / "metrics.json")
    truth = found["methods"]["rollout"]["faithfulness"]
    assert {"deletion_auc_cm", "random_auc_cm"} <= truth.keys()
    assert {"effect_block_cm", "rerender_cm"} <= found["counterfactual"].keys()
    assert not [name for name in (*truth, *found["counterfactual"]) if name.endswith("_px")]
