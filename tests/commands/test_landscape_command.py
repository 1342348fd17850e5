"""``analyze.py landscape`` from the outside, on scripted demonstrations and untrained policies."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import h5py
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize
from test_rollout_and_export import save_policy

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))

from lerobot_folders import lerobot_policy, write_folder

import analyze
import policies.loading
from commands.inputs import device, open_demonstrations, switch
from commands.landscape import _labels
from envs.demonstrations import collect
from envs.push_t import PushT
from landscapes.baselines import BaselineFrames, baselines
from landscapes.density import MIN_SCALE, fit_bandwidth, fit_scale
from landscapes.grid import Grid
from landscapes.landscape import predict
from landscapes.metrics import measure
from landscapes.regions import credible_thresholds
from landscapes.study import Frames
from policies.ensembling import TemporalEnsembler
from policies.interface import Batch, DataSchema
from policies.loading import LoadedPolicy, load_policy
from rendering.landscape import GAP_PX, LEGEND_PX, board_px

LENGTH = 30
HEIGHT = 180
EVERYTHING = sorted(
    f"episode_{number}_{rest}"
    for number in (0, 2)
    for rest in (
        "environment.mp4",
        "heatmaps_likelihood.mp4",
        "combined_likelihood.mp4",
        "landscapes_likelihood.npz",
        "heatmaps_distance.mp4",
        "combined_distance.mp4",
        "landscapes_distance.npz",
        "comparison.mp4",
        "config.json",
    )
)


def rewrite(source: Path, target: Path, **leave_out: bool) -> Path:
    """The first steps of each demonstration, perhaps without a column."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update(old.attrs)
        for name, group in old.items():
            for key in ("image", "qpos", "state"):
                if not leave_out.get(key):
                    new[f"{name}/observations/{key}"] = group[f"observations/{key}"][:LENGTH]
            new[f"{name}/actions"] = group["actions"][:LENGTH]
    return target


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Four scripted demonstrations of PushT, their first 30 steps."""
    folder = tmp_path_factory.mktemp("demonstrations")
    collect(folder / "whole.hdf5", 4, image_size=32, n_workers=0, progress=False)
    return rewrite(folder / "whole.hdf5", folder / "demos.hdf5")


@pytest.fixture(scope="module")
def stateless(demonstrations, tmp_path_factory) -> Path:
    """The same, without states of the simulator."""
    return rewrite(demonstrations, tmp_path_factory.mktemp("data") / "stateless.hdf5", state=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "act.ckpt"
    return save_policy(path, chunk_size=10, n_action_steps=4)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    policy = lerobot_policy("diffusion", n_obs_steps=2, horizon=8)
    return write_folder(tmp_path_factory.mktemp("diffusion") / "pretrained_model", *policy)


def landscape(policy: Any, dataset: Any, folder: Path, *more: Any, **options: Any) -> int:
    """Call the command with small settings."""
    small = {
        "horizons": (0, 5),
        "max_steps": 6,
        "n_samples": 4,
        "action_resolution": 24,
        "n_calibration_frames": 20,
        "n_evidence_frames": 2,
        "target_height": HEIGHT,
        "device": "cpu",
        **options,
    }
    words = ["landscape", "--output_dir", folder, "--dataset_repo_id", dataset, "--policy_path"]
    words += policy if isinstance(policy, list) else [policy]
    for name, value in small.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return analyze.main([str(word) for word in [*words, *more]])


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def read(path: Path) -> Any:
    """JSON as others read it, who know no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def recorded(dataset: Path, view: Any, number: int, n_steps: int | None = None) -> Batch:
    data = open_demonstrations(str(dataset), view, [number], progress=False)
    data.setup()
    return data.episode(number).rows(slice(n_steps))


@pytest.fixture(scope="module")
def made(checkpoint, demonstrations, tmp_path_factory) -> Path:
    """Two episodes and two methods of one policy."""
    folder = tmp_path_factory.mktemp("made") / "out"
    methods = ("--scoring_method", "likelihood", "distance")
    wanted = ("--episode_idx", "0", "2", "--calibration_episodes", "1")
    assert landscape(checkpoint, demonstrations, folder, *methods, *wanted) == 0
    return folder


# What is written


def test_exactly_the_promised_files_are_written(made):
    assert sorted(path.name for path in made.iterdir()) == sorted([*EVERYTHING, "metrics.json"])
    config = read(made / "episode_2_config.json")
    beside = {f"episode_2_{name}" for name in ("config.json", "comparison.mp4")}
    assert {*config["files"]} | beside == {
        name for name in EVERYTHING if "episode_2" in name and not name.endswith(".npz")
    }
    assert config["policy"].endswith("act.ckpt")
    assert (config["episode"], config["n_frames"], config["horizons"]) == (2, 6, [0, 5])
    assert config["calibration_episodes"] == [1]
    assert config["scores"]["distance"]["max"] <= 0
    assert config["frames_per_s"] == pytest.approx(6 / config["wall_s"])


def test_videos_have_every_frame_and_the_asked_height(made):
    board = board_px(HEIGHT)
    legend = GAP_PX + LEGEND_PX
    boards = 2 * board + GAP_PX
    for name, width in (
        ("environment", HEIGHT),
        ("heatmaps_likelihood", boards + legend),
        ("combined_distance", boards + GAP_PX + board + legend),
        ("comparison", boards + GAP_PX + board + legend),
    ):
        frames = frames_of(made / f"episode_0_{name}.mp4")
        assert len(frames) == 6
        assert frames[0].shape == (HEIGHT, width + width % 2, 3), name


def test_numbers_are_those_of_the_functions(made, checkpoint, demonstrations):
    view = load_policy(str(checkpoint)).view
    horizons, episodes = (0, 5), (0, 2)
    with torch.no_grad():
        calibration = Frames.spread([recorded(demonstrations, view, 1)], 20)
        fitted = predict(view, calibration.batch, horizons, 4, 0)
        scale = fit_scale(fitted.samples, fitted.expert, fitted.is_valid)[None]
        frames = Frames.concatenate(
            [Frames.of_episode(recorded(demonstrations, view, n), max_steps=6) for n in episodes]
        )
        predictions = predict(view, frames.batch, horizons, 4, 0)
    grid = Grid(24)
    metrics = measure(
        predictions,
        scale,
        grid,
        frames.batch.episode_index,
        frames.batch.frame_index,
        baselines(
            BaselineFrames.of(calibration.batch, horizons, calibration.previous),
            BaselineFrames.of(frames.batch, horizons, frames.previous),
            grid,
        ),
    )
    (found,) = read(made / "metrics.json")["policies"]
    assert found["summary"].keys() == metrics.summary().keys()
    for name, value in metrics.summary().items():
        assert found["summary"][name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert found["n_frames"] == 12
    exact = -predictions.mixture(scale).log_density(predictions.expert[:, :, None])[..., 0]
    for place, k in enumerate(horizons):
        assert found["summary"][f"k{k}/nll"] == pytest.approx(float(exact[:, place].mean()))
        assert found["baselines"][f"k{k}/nll_uniform"] == pytest.approx(2 * np.log(512))
        config = read(made / "episode_0_config.json")
        assert config["kernel_scale_px"][f"k{k}"] == pytest.approx(scale[0, place].tolist())
    assert {row["episode"] for row in found["per_episode"]} == {0, 2}
    assert found["intervals"].keys() == found["summary"].keys()
    low, high = found["intervals"]["k0/nll"]
    assert low <= found["summary"]["k0/nll"] <= high


def test_arrays_draw_the_same_picture_again(made, checkpoint, demonstrations):
    arrays = arrays_of(made / "episode_0_landscapes_likelihood.npz")
    view = load_policy(str(checkpoint)).view
    batch = recorded(demonstrations, view, 0, 6)
    with torch.no_grad():
        predictions = predict(view, batch, (0, 5), 4, 0)
    np.testing.assert_allclose(arrays["samples"], predictions.samples, atol=1e-2)
    np.testing.assert_array_equal(arrays["expert"], predictions.expert)
    scale = torch.tensor(list(read(made / "episode_0_config.json")["kernel_scale_px"].values()))
    mass = predictions.mixture(scale[None].double()).cell_mass(Grid(24))
    np.testing.assert_allclose(arrays["mass"], mass, rtol=2e-3, atol=1e-6)
    above = torch.log(mass * 24**2)
    shown = above > -4
    np.testing.assert_allclose(arrays["scores"][shown], above[shown], atol=0.01)
    # Rounding must not throw the last cell out of its region.
    thresholds = credible_thresholds(mass)
    for place, level in enumerate(arrays["levels"]):
        inside = arrays["mass"] >= arrays["thresholds"][..., place, None, None]
        assert (inside >= (mass >= thresholds[..., place, None, None]).numpy()).all()
        held = (mass * torch.from_numpy(inside)).sum((-1, -2)) / mass.sum((-1, -2))
        assert (held >= level - 1e-9).all()
    # The queue executes step j of the chunk of j steps ago.
    with torch.no_grad():
        chunks = view.predict_chunk(batch.observation)
    expected = torch.stack([chunks[step // 4 * 4, step % 4] for step in range(6)])
    np.testing.assert_allclose(arrays["executed"], expected, atol=1e-2)


def test_an_ensemble_is_marked_as_it_would_act(checkpoint, demonstrations, tmp_path):
    more = ("--temporal_ensemble_coeff", "0.3", "--scoring_method", "likelihood", "belief")
    assert landscape(checkpoint, demonstrations, tmp_path, *more, videos="false") == 0
    arrays = arrays_of(tmp_path / "episode_0_landscapes_likelihood.npz")
    belief = arrays_of(tmp_path / "episode_0_landscapes_belief.npz")
    view = load_policy(str(checkpoint)).view
    ensembler = TemporalEnsembler(0.3, view.chunk_size)
    with torch.no_grad():
        chunks = view.predict_chunk(recorded(demonstrations, view, 0, 6).observation)
    expected = torch.stack([ensembler.step(chunk[None])[0] for chunk in chunks])
    np.testing.assert_allclose(arrays["executed"], expected, atol=1e-2)
    # The first chunk is all that there is to believe; later ones have a memory.
    np.testing.assert_array_equal(belief["mass"][0], arrays["mass"][0])
    assert not np.array_equal(belief["mass"][5], arrays["mass"][5])
    assert not list(tmp_path.glob("*.mp4"))


def test_a_policys_own_ensemble_is_the_default(checkpoint, demonstrations, tmp_path, monkeypatch):
    ensembled = LoadedPolicy(load_policy(str(checkpoint)).view, checkpoint, "lerobot", 0.3)
    monkeypatch.setattr(policies.loading, "load_policy", lambda *_: ensembled)
    asked = ("--temporal_ensemble_coeff", "0.3")
    for folder, more in (("own", ()), ("asked", asked), ("queue", ("--n_action_steps", "2"))):
        words = ("--scoring_method", "belief", *more)
        assert landscape(checkpoint, demonstrations, tmp_path / folder, *words, videos=False) == 0
    own, same, queue = (
        arrays_of(tmp_path / folder / "episode_0_landscapes_belief.npz")
        for folder in ("own", "asked", "queue")
    )
    for name in ("executed", "scores"):
        np.testing.assert_array_equal(own[name], same[name])
        assert not np.array_equal(own[name], queue[name])


@pytest.mark.parametrize("method", ["likelihood", "recon"])
def test_the_batch_size_changes_no_number(checkpoint, demonstrations, tmp_path, method):
    words = ("--scoring_method", method)
    # Two frames at once, or all three; candidates of recon in parts that do not fit evenly.
    for size in (2, 50):
        folder = tmp_path / str(size)
        n_steps = 3 if method == "likelihood" else 1
        options = {"batch_size": size, "videos": False, "max_steps": n_steps, "horizons": 5}
        assert landscape(checkpoint, demonstrations, folder, *words, **options) == 0
    few, many = (read(tmp_path / f"{size}/metrics.json")["policies"][0] for size in (2, 50))
    for part in ("summary", "baselines", "trust"):
        assert few[part].keys() == many[part].keys()
        for name, value in many[part].items():
            assert few[part][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    few, many = (
        arrays_of(tmp_path / f"{size}/episode_0_landscapes_{method}.npz") for size in (2, 50)
    )
    for name in ("scores", "samples", "executed", "prediction"):
        np.testing.assert_allclose(few[name], many[name], atol=0.02, rtol=1e-3)


# What is drawn


def white_in_boards(path: Path) -> int:
    """Bright pixels without colour; heat maps have none."""
    size = board_px(HEIGHT)
    boards = np.stack(frames_of(path))[:, -size - 56 : -56, : 2 * size + GAP_PX]
    gap = slice(size - 2, size + GAP_PX + 2)
    boards = np.delete(boards, np.arange(gap.start, gap.stop), axis=2)
    return int((boards.min(-1) > 200).sum())


def test_switches_that_are_off_draw_nothing(checkpoint, demonstrations, tmp_path):
    pixels = {}
    for prediction, regions in ((True, True), (True, False), (False, True), (False, False)):
        folder = tmp_path / f"{prediction}{regions}"
        options = {
            "show_policy_prediction": str(prediction).lower(),
            "show_confidence_intervals": str(regions).lower(),
            "trace_length": 0,
        }
        assert landscape(checkpoint, demonstrations, folder, **options) == 0
        pixels[prediction, regions] = white_in_boards(folder / "episode_0_heatmaps_likelihood.mp4")
    assert pixels[False, False] == 0
    assert pixels[True, False] > 50
    assert pixels[False, True] > 50
    scores = [arrays_of(path)["scores"] for path in tmp_path.glob("*/*.npz")]
    assert all(np.array_equal(scores[0], each) for each in scores)


@pytest.mark.parametrize("words", ["False", "false", "0", "no"])
def test_false_is_false(words):
    assert switch(words) is False
    assert switch("True") is True


@pytest.mark.parametrize("name", ["viridis", "coolwarm"])
def test_the_board_is_the_scores_in_the_colours_asked_for(
    checkpoint, demonstrations, tmp_path, name
):
    options = {
        "colormap": name,
        "show_policy_prediction": False,
        "show_confidence_intervals": False,
        "trace_length": 0,
    }
    assert landscape(checkpoint, demonstrations, tmp_path, **options) == 0
    arrays = arrays_of(tmp_path / "episode_0_landscapes_likelihood.npz")
    size = board_px(HEIGHT)
    cells = (np.arange(size) + 0.5) * 24 // size
    rows = cells.astype(int)
    for step, frame in enumerate(frames_of(tmp_path / "episode_0_heatmaps_likelihood.mp4")):
        board = frame[-size - 56 : -56, :size].astype(int)
        colours = matplotlib.colormaps[name](Normalize(-4, 8)(arrays["scores"][step, 0]))
        expected = (colours[..., :3] * 255)[rows][:, rows]
        # Only the cross, and what the codec does at the borders of cells.
        assert np.median(np.abs(board - expected)) < 4


def test_the_environment_is_the_simulator_put_into_each_recorded_state(made, demonstrations):
    """Stepping it would drift, and the last frame would differ most."""
    assert read(made / "episode_2_config.json")["environment"] == "simulator"
    env = PushT()
    with h5py.File(demonstrations) as file:
        states = file["demo_2/observations/state"][:].astype(np.float64)
        actions = file["demo_2/actions"][:].astype(np.float64)
    frames = frames_of(made / "episode_2_environment.mp4")
    for step, frame in enumerate(frames):
        env.reset_to(states[step])
        expected = env.frame(HEIGHT, actions[step]).astype(int)
        error = np.abs(frame - expected).mean()
        assert error < 0.8  # what the codec makes of it
    assert np.abs(frames[0].astype(int) - expected).mean() > 2 * error, "nothing moved: no test"
    env.close()


def test_without_states_the_recorded_pictures_are_shown(checkpoint, stateless, tmp_path):
    assert landscape(checkpoint, stateless, tmp_path) == 0
    assert read(tmp_path / "episode_0_config.json")["environment"] == "recorded"
    with h5py.File(stateless) as file:
        pictures = file["demo_0/observations/image"][:6]
    for frame, picture in zip(
        frames_of(tmp_path / "episode_0_environment.mp4"), pictures, strict=True
    ):
        small = frame[2::6, 2::6][:30, :30].astype(int)
        rows = (np.arange(2, HEIGHT, 6) * 32 // HEIGHT)[:30]
        assert np.abs(small - picture[rows][:, rows]).mean() < 12
    # Enlarged, no pixel of the simulator's sharp cross is there.
    assert (tmp_path / "episode_0_combined_likelihood.mp4").is_file()


def test_a_policy_that_sees_another_size_gets_it(demonstrations, tmp_path):
    policy = save_policy(tmp_path / "small.ckpt", cameras={"image": [24, 24]}, chunk_size=10)
    assert landscape(policy, demonstrations, tmp_path / "out") == 0
    view = load_policy(str(policy)).view
    data = open_demonstrations(str(demonstrations), view, [0], progress=False)
    data.setup()
    assert data.episode(0).observation.images["image"].shape[-2:] == (24, 24)
    assert read(tmp_path / "out/episode_0_config.json")["environment"] == "simulator"


# Several policies


def test_policies_are_compared_under_names_that_tell_them_apart(
    checkpoint, diffusion, demonstrations, tmp_path
):
    runs = [tmp_path / "outputs" / name / "last" for name in ("broad", "narrow")]
    for run in runs:
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, run / "checkpoints/best.ckpt")
    folder = tmp_path / "out"
    methods = ("--scoring_method", "likelihood", "energy")
    policies = [*runs, diffusion]
    assert landscape(policies, demonstrations, folder, *methods, max_steps=3) == 0
    labels = [row["label"] for row in read(folder / "metrics.json")["policies"]]
    assert labels == ["broad", "narrow", diffusion.parent.name]
    assert {path.name for path in folder.iterdir()} == {
        *labels,
        "metrics.json",
        "episode_0_comparison.mp4",
    }
    frames = frames_of(folder / "episode_0_comparison.mp4")
    n_boards = 3 * len(methods[1:])
    assert len(frames) == 3
    assert frames[0].shape[1] == (n_boards + 1) * (board_px(HEIGHT) + GAP_PX) + LEGEND_PX
    for label in labels:
        assert (folder / label / "episode_0_combined_energy.mp4").is_file()
    scores = [arrays_of(path)["scores"] for path in folder.glob("*/*_likelihood.npz")]
    assert len(scores) == 3


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["run/last"], [""]),
        (["outputs/a/last", "outputs/b/last"], ["a", "b"]),
        (["x/a/checkpoints/step=10.ckpt", "x/a/checkpoints/step=20.ckpt"], ["step=10", "step=20"]),
        (["lerobot/diffusion_pusht", "lerobot/act_pusht"], ["diffusion_pusht", "act_pusht"]),
        (["kl0.1/last", "kl0.01/last"], ["kl0.1", "kl0.01"]),
        (["same", "same"], ["policy_0", "policy_1"]),
        (["p.ckpt", "x/p.ckpt"], ["policy", "x"]),
        (["x/seed0/a", "x/seed1/b", "y/seed1/a"], ["seed0_a", "seed1_b", "seed1_a"]),
        (["a/../b", "c"], ["b", "c"]),
        (["..", "."], None),
    ],
)
def test_labels_tell_policies_apart_and_are_names_of_folders(paths, labels, monkeypatch, tmp_path):
    below = tmp_path / "here"
    for folder in ("a", "b", "c"):
        (below / folder).mkdir(parents=True)
    monkeypatch.chdir(below)
    found = _labels(paths)
    assert labels is None or found == labels
    assert len({*found}) == len(paths)
    if len(paths) > 1:
        assert all(Path(label).name == label and ".." not in label for label in found)


# Diffusion Policy


def to_lerobot(dataset: Path, folder: Path) -> Path:
    """Make a LeRobotDataset of the same demonstrations, with LeRobot's own API."""
    from datasets import disable_progress_bars
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    disable_progress_bars()
    sizes = {"observation.state": 2, "observation.environment_state": 5, "action": 2}
    names = {"observation.state": "qpos", "observation.environment_state": "state"}
    picture = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    features = {"observation.image": picture} | {
        key: {"dtype": "float32", "shape": (dim,), "names": None} for key, dim in sizes.items()
    }
    made = LeRobotDataset.create("local/pusht", 10, features, folder, use_videos=False)
    with h5py.File(dataset) as file:
        for number in range(3):
            group = file[f"demo_{number}"]
            for step in range(12):
                values = {key: group[f"observations/{names[key]}"][step] for key in names}
                values["action"] = group["actions"][step]
                values["observation.image"] = group["observations/image"][step]
                made.add_frame({**values, "task": "push"})
            made.save_episode()
    made.finalize()
    return folder


@pytest.fixture(scope="module")
def lerobot_dataset(demonstrations, tmp_path_factory) -> Path:
    return to_lerobot(demonstrations, tmp_path_factory.mktemp("lerobot") / "pusht")


def test_a_lerobot_policy_and_data_set_fit_together(
    diffusion, lerobot_dataset, demonstrations, tmp_path
):
    """The same demonstrations from both kinds of files give the same numbers."""
    words = ("--scoring_method", "likelihood", "energy", "confidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert landscape(diffusion, lerobot_dataset, tmp_path / "lerobot", *words) == 0
    assert landscape(diffusion, demonstrations, tmp_path / "hdf5", *words) == 0
    configs = [read(tmp_path / f"{kind}/episode_0_config.json") for kind in ("lerobot", "hdf5")]
    assert [config["environment"] for config in configs] == ["simulator"] * 2
    first, second = (
        arrays_of(tmp_path / f"{kind}/episode_0_landscapes_likelihood.npz")
        for kind in ("lerobot", "hdf5")
    )
    for name in ("expert", "samples", "scores"):
        np.testing.assert_allclose(first[name], second[name], atol=0.02)
    view = load_policy(str(diffusion)).view
    batch = recorded(demonstrations, view, 0, 6)
    np.testing.assert_array_equal(first["expert"][:, 0], batch.actions[:, 0])
    samples = predict(view, batch, (0, 5), 4, 0).samples
    np.testing.assert_allclose(first["samples"], samples, atol=0.02)
    scale = fit_bandwidth(samples.transpose(1, 2)).mean(0)
    assert configs[1]["kernel_scale_px"]["k5"] == pytest.approx(scale[1].tolist(), rel=1e-3)


def test_episodes_that_the_data_set_keeps_from_training_can_be_shown(
    diffusion, lerobot_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(lerobot_dataset, tmp_path / "split"))
    info = json.loads((folder / "meta/info.json").read_text())
    info["splits"] = {"train": "0:1", "val": "1:2"}
    (folder / "meta/info.json").write_text(json.dumps(info))
    for number, other in ((1, 2), (2, 1)):
        words = ("--episode_idx", number, "--calibration_episodes", other)
        out = tmp_path / f"out{number}"
        assert landscape(diffusion, folder, out, *words, videos=False) == 0
        assert read(out / f"episode_{number}_config.json")["n_frames"] == 6


def test_from_the_hub_only_what_is_shown_is_fetched(
    diffusion, lerobot_dataset, tmp_path, monkeypatch
):
    """A hub of one repository; the shown episode and those for baselines are asked for."""
    import huggingface_hub

    from datamodules import lerobot

    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def fetch(folder, repo_id, numbers, cameras):
        asked.append((repo_id, list(numbers)))

    monkeypatch.setattr(lerobot, "fetch_files", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(lerobot_dataset))
    words = ("--episode_idx", "1", "--calibration_episodes", "2")
    assert landscape(diffusion, "user/name", tmp_path / "out", *words, videos=False) == 0
    assert asked == [("user/name", [1, 2])]


# The example


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = Path(__file__).parents[2] / "examples/landscapes.py"
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs_every_view_that_it_describes(
    example, checkpoint, demonstrations, tmp_path, capsys
):
    words = ["--policy_path", checkpoint, "--dataset_repo_id", demonstrations]
    words += ["--output_dir", tmp_path / "out", "--max_steps", "2", "--n_samples", "4"]
    words += ["--device", "cpu", "--target_height", "180", "--n_evidence_frames", "1"]
    assert example.main([str(word) for word in words]) == 0
    described = set(re.findall(r"^(\w+)\n    ", example.__doc__, re.MULTILINE))
    assert described == {*example.RUNS} == {path.name for path in (tmp_path / "out").iterdir()}
    for name, options in example.RUNS.items():
        folder = tmp_path / "out" / name
        methods = read(folder / "episode_0_config.json")["scoring_method"]
        assert {*methods} <= {*options}
        for method in methods:
            assert len(frames_of(folder / f"episode_0_combined_{method}.mp4")) == 2
    # It stops at the first run that fails, and says why.
    capsys.readouterr()
    assert example.main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.out.count("==") == 2
    assert "add --overwrite" in said.err


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring_method": "likelyhood"}, "--scoring_method likelyhood: choose from likelihood,"),
        ({"scoring_method": ("energy", "energy")}, "names something twice"),
        ({"scoring_method": "noise_pred"}, "predicts no noise"),
        ({"colormap": "viridi"}, "'viridi': matplotlib has none of that name; try ['viridis'"),
        ({"episode_idx": 9}, "has 4 episodes, 0 to 3"),
        ({"episode_idx": (0, 0)}, "names something twice"),
        ({"horizons": (0, 10)}, "predicts chunks of 10"),
        ({"horizons": -1}, "predicts chunks of 10"),
        ({"action_resolution": 0}, "action_resolution 0"),
        ({"target_height": 60}, "height 60 px: give at least"),
        ({"n_samples": 1}, "--n_samples 1"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_steps": 0}, "--max_steps 0"),
        ({"trace_length": -1}, "--trace_length -1"),
        ({"seed": -1}, "--seed -1"),
        ({"kernel_scale": 0}, "--kernel_scale 0"),
        ({"kernel_scale": "nan"}, "--kernel_scale nan"),
        ({"n_action_steps": 0}, "--n_action_steps 0"),
        ({"n_action_steps": 11}, "predicts chunks of 10"),
        ({"n_action_steps": 2, "temporal_ensemble_coeff": 0.1}, "give one of them"),
        ({"calibration_episodes": (0, 1)}, "[0]: they are shown, too"),
        ({"calibration_episodes": 7}, "--calibration_episodes [7]"),
        ({"device": "cuda:99"}, "no CUDA device"),
        ({"device": "abacus"}, "no such device"),
        ({"task": "envs.push_t.Nowhere"}, "no such class"),
        ({"dataset_repo_id": "nowhere.hdf5"}, "no such file or folder"),
        ({"policy_path": "nowhere/at/all"}, "no such file or folder"),
    ],
    ids=lambda value: (
        " ".join(map(str, *value.items())) if isinstance(value, dict) and len(value) == 1 else ""
    ),
)
def test_what_cannot_be_is_one_line_before_any_work(
    checkpoint, demonstrations, tmp_path, capsys, options, message
):
    assert landscape(checkpoint, demonstrations, tmp_path / "out", **options) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("analyze.py landscape: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dim": 3}, "state_dim: 3 != 2"),
        ({"action_dim": 3}, "action_dim: 3 != 2"),
        ({"cameras": {"wrist": [32, 32]}}, "cameras: {'wrist'"),
        ({"chunk_size": 40}, "every episode is shorter than chunk_size"),
    ],
)
def test_data_that_do_not_fit_the_policy_are_refused(
    demonstrations, tmp_path, capsys, changes, message
):
    policy = save_policy(tmp_path / "other.ckpt", **{"chunk_size": 10, **changes})
    assert landscape(policy, demonstrations, tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_result_is_kept_unless_it_may_go(made, checkpoint, demonstrations, capsys):
    before = (made / "metrics.json").read_text()
    assert landscape(checkpoint, demonstrations, made, videos=False) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert (made / "metrics.json").read_text() == before
    other = made.parent / "copy"
    shutil.copytree(made, other)
    assert landscape(checkpoint, demonstrations, other, "--overwrite", videos=False) == 0
    assert (other / "metrics.json").read_text() != before


def single_episode(source: Path, target: Path) -> Path:
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        new.attrs.update({**old.attrs, "num_demos": 1, "total_frames": LENGTH})
        old.copy("demo_0", new)
    return target


def test_a_scale_cannot_be_fitted_without_another_episode(
    checkpoint, diffusion, demonstrations, tmp_path, capsys
):
    alone = single_episode(demonstrations, tmp_path / "alone.hdf5")
    assert landscape(checkpoint, alone, tmp_path / "out", videos=False) == 1
    said = capsys.readouterr().err
    assert "the data set has no other" in said
    assert "--kernel_scale" in said
    assert not (tmp_path / "out").exists()
    given = {"kernel_scale": 12.5, "videos": False}
    assert landscape(checkpoint, alone, tmp_path / "given", **given) == 0
    config = read(tmp_path / "given/episode_0_config.json")
    assert config["kernel_scale_px"] == {"k0": [12.5, 12.5], "k5": [12.5, 12.5]}
    (numbers,) = read(tmp_path / "given/metrics.json")["policies"]
    assert numbers["baselines"] == {}
    assert "k0/skill_vs_agent" not in numbers["summary"]
    assert numbers["summary"]["k0/nll_frozen"] != numbers["summary"]["k0/nll"]
    # Samples choose their own bandwidth: one episode is enough.
    assert landscape(diffusion, alone, tmp_path / "diffusion", videos=False) == 0
    scales = read(tmp_path / "diffusion/episode_0_config.json")["kernel_scale_px"]
    assert min(scales["k0"]) >= MIN_SCALE


class HoldStill:
    """A policy that has one answer."""

    data_schema = DataSchema(cameras={"image": (32, 32)}, state_dim=2, action_dim=2)
    chunk_size = 10
    n_action_steps = 2
    n_obs_steps = 1

    def predict_chunk(self, observation: Any, queries: Any = None) -> torch.Tensor:
        return observation.state[:, None].expand(-1, self.chunk_size, -1)


def test_a_policy_that_draws_nothing_is_refused(demonstrations, tmp_path, capsys, monkeypatch):
    still = LoadedPolicy(HoldStill(), Path("still"), "policyscope")
    monkeypatch.setattr(policies.loading, "load_policy", lambda *_: still)
    assert landscape("still", demonstrations, tmp_path / "out") == 1
    assert "it draws no action chunks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_last_steps_of_an_episode_have_no_demonstration_ahead(
    checkpoint, demonstrations, tmp_path
):
    """Beyond the end nothing is scored, and no cross is drawn."""
    options = {"max_steps": LENGTH, "horizons": (0, 9), "videos": False}
    assert landscape(checkpoint, demonstrations, tmp_path, **options) == 0
    arrays = arrays_of(tmp_path / "episode_0_landscapes_likelihood.npz")
    assert arrays["is_valid"][:, 1].tolist() == [True] * (LENGTH - 9) + [False] * 9
    (numbers,) = read(tmp_path / "metrics.json")["policies"]
    counts = {row["k"]: row["n_frames"] for row in numbers["per_episode"]}
    assert counts == {0: LENGTH, 9: LENGTH - 9}


def test_numbers_of_the_printed_table_are_whole_on_80_columns(
    checkpoint, demonstrations, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert landscape(checkpoint, demonstrations, tmp_path, videos=False) == 0
    printed = capsys.readouterr().out
    (numbers,) = read(tmp_path / "metrics.json")["policies"]
    assert "…" not in printed
    for k in (0, 5):
        for name in ("nll", "skill_vs_agent", "c80", "hdr80_px2"):
            value = numbers["summary"][f"k{k}/{name}"]
            form = {"hdr80_px2": ".0f", "skill_vs_agent": "+.2f"}.get(name, ".2f")
            assert f"{value:{form}}" in printed


# The parts by themselves


def test_a_device_is_resolved_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda",
        "cuda",
        "cuda:0",
        "cpu",
    ]
    with pytest.raises(ValueError, match="--device cuda:1: no CUDA device here"):
        device("cuda:1")


def test_only_the_command_that_takes_several_gets_a_list():
    parse = lambda *words: analyze.build_parser(words[0]).parse_args(words)  # noqa: E731
    few = parse(
        "landscape", "--policy_path", "a", "b", "--dataset_repo_id", "d", "--output_dir", "o"
    )
    assert (few.policy_path, few.episode_idx, few.dataset_repo_id) == (["a", "b"], None, "d")
    one = parse("rollout", "--policy_path", "a", "--output_dir", "o")
    assert one.policy_path == "a"


def test_the_scale_is_fitted_on_episodes_the_policy_has_not_seen():
    from types import SimpleNamespace

    from commands.landscape import _calibration_episodes, _held_out

    policy = SimpleNamespace(split={"train": [0, 1, 2, 4], "val": [3, 5]})
    assert _held_out(policy, range(6)) == {3, 5}
    assert _held_out(policy, range(7)) is None  # another data set
    assert _held_out(SimpleNamespace(split=None), range(6)) is None
    arguments = SimpleNamespace(calibration_episodes=None, episode_idx=[3])
    assert _calibration_episodes(arguments, range(6), {3, 5}) == [5]
    assert _calibration_episodes(arguments, range(6), {3}) == [0, 1, 2, 4, 5]
    assert _calibration_episodes(arguments, range(6), None) == [0, 1, 2, 4, 5]
