"""Attention at checkpoints: numbers are those of the maps, and training never notices."""

import json
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from pusht_runs import (
    DIFFUSION,
    LENGTHS,
    SIZE,
    DataOnly,
    NeverTrain,
    act,
    data,
    fit_with_wandb,
    frames_of,
    lerobot,
    ready,
    trainer,
    write_pusht,
)
from pyarrow import parquet

from callbacks.attention import Attention
from callbacks.dashboard import read_index
from callbacks.ema import EMA
from callbacks.landscapes import Landscapes
from callbacks.loggers import CsvLog, read_metrics
from callbacks.schedule import undisturbed
from datamodules.hdf5 import HDF5DataModule
from envs.push_t import PushTTask
from policies.interface import Findings

QUICK = {"cross_attention", "rollout", "relevancy"}
SLOW = {"grad_cam", "integrated_gradients", "occlusion"}
TESTED = ("deletion_ratio", "insertion_ratio", "ssim_randomised")
OBJECTS = ("agent", "block", "goal")


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_pusht(tmp_path_factory.mktemp("demos") / "demos.hdf5", SIZE)


def with_camera(path: Path, name: str, states: bool = True) -> Path:
    """Another camera looks on, of another size."""
    write_pusht(path, SIZE, states)
    rng = np.random.default_rng(1)
    with h5py.File(path, "a") as file:
        for number, length in enumerate(LENGTHS):
            pictures = rng.integers(0, 256, (length, 24, 32, 3), np.uint8)
            file[f"demo_{number}/observations/images/{name}"] = pictures
    return path


def explaining(**changes: Any) -> Attention:
    settings = {
        "n_frames": 5,
        "n_val_episodes": 3,
        "task": PushTTask(),
        "n_faithfulness_frames": 2,
        "n_strip_frames": 2,
        "n_video_steps": 4,
        "target_height": 64,
        "strict": True,
        "max_share": None,
    }
    return Attention(**{**settings, **changes})


def explain(
    folder: Path, datamodule: HDF5DataModule, module: LightningModule, **knobs: Any
) -> Findings:
    folder.mkdir(parents=True, exist_ok=True)
    callback = explaining(**{"faithfulness": "never", **knobs})
    with undisturbed(module):
        return callback.diagnose(DataOnly(datamodule), module, folder)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def untrained(demonstrations):
    datamodule = data(demonstrations)
    return datamodule, ready(datamodule, act(datamodule))


@pytest.fixture(scope="module")
def plain(untrained, tmp_path_factory) -> Findings:
    """Without tests of the maps, to compare others with."""
    return explain(tmp_path_factory.mktemp("plain"), *untrained)


@pytest.fixture(scope="module")
def tested(demonstrations, tmp_path_factory) -> Findings:
    """What ``validate`` finds: of a finished policy, every checkpoint is the last one."""
    folder, datamodule = tmp_path_factory.mktemp("tested"), data(demonstrations)
    run = trainer(folder, explaining())
    (values,) = run.validate(act(datamodule), datamodule, verbose=False)
    media = folder / "media/step_000000/attention"
    scalars = json.loads((media / "metrics.json").read_text())
    assert {name: values[name] for name in scalars} == pytest.approx(scalars)
    return Findings(scalars=scalars, arrays={"attention": str(media / "maps.parquet")})


def rows_of(findings: Findings) -> list[dict[str, Any]]:
    return parquet.read_table(findings.arrays["attention"]).to_pylist()


def methods_of(names: Any) -> set[str]:
    """Methods that metrics speak of."""
    return {name.split("/")[1] for name in names if name.startswith("attention/")}


def check_shares(values: dict[str, Any], methods: set[str]) -> None:
    """The kinds of input, and the objects, share one whole."""
    for method in methods:
        prefix = f"attention/{method}/share_"
        shares = [value for name, value in values.items() if name.startswith(prefix)]
        assert sum(shares) == pytest.approx(1, abs=1e-5), method
        assert min(shares) >= 0
    effects = [values[f"counterfactual/share_{name}"] for name in OBJECTS]
    assert sum(effects) == pytest.approx(1, abs=1e-5)


# In training


@pytest.fixture(scope="module")
def logged(demonstrations, tmp_path_factory):
    """Beside landscapes, as in the demo."""
    folder = tmp_path_factory.mktemp("run")
    datamodule = data(demonstrations)
    beside = Landscapes(
        horizons=[0],
        n_samples=2,
        action_resolution=24,
        n_val_episodes=2,
        n_train_episodes=0,
        frame_stride=5,
        n_evidence_frames=1,
        n_video_steps=0,
        n_strip_frames=1,
        strict=True,
    )
    run, records = fit_with_wandb(folder, act(datamodule), datamodule, beside, explaining())
    return folder, run, records


def test_all_that_a_checkpoint_shows_is_one_row(logged):
    folder, run, records = logged
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    first, last = (row for row in rows if "attention/relevancy/entropy_nats" in row)
    for row, methods in ((first, QUICK), (last, QUICK | SLOW)):
        assert "val/loss" in row
        assert "landscape/val/k0/nll" in row
        assert row["diagnostics/errors"] == 0
        for key in ("attention/strip.path", "attention/video_image.path"):
            assert (run / "files" / row[key]).stat().st_size > 0
        check_shares(row, methods)
        for name in OBJECTS:
            assert row[f"counterfactual/effect_{name}_px"] >= 0
            assert f"attention/relevancy/lift_{name}" in row
    assert [row["trainer/global_step"] for row in (first, last)] == [2, 4]
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    maps = [each for each in artifacts if each["name"].startswith("attention-")]
    assert ["step-2" in maps[0]["aliases"], "step-4" in maps[1]["aliases"]] == [True, True]
    assert len({artifact["name"] for artifact in maps}) == 1
    index = read_index(folder / "media/index.json")
    assert [*index] == ["2", "4"]
    for entry in index.values():
        assert {"attention/strip", "attention/video_image", "attention"} <= {
            key for files in entry.values() for key in files
        }


def test_maps_are_put_to_the_test_at_the_end_and_no_other_name_comes_or_goes(logged):
    folder, _, _ = logged
    rows = read_metrics(folder / "metrics.csv")
    first, last = (
        {name for name in row if name.startswith(("attention/", "counterfactual/"))}
        for row in rows
        if "val/loss" in row and row["step"] in (2, 4)
    )
    assert methods_of(first) == QUICK
    assert methods_of(last) == QUICK | SLOW
    assert first < last
    new = {f"attention/{method}/{name}" for method in QUICK | SLOW for name in TESTED}
    assert new <= last - first
    files = [
        {file.name for file in (folder / f"media/step_00000{step}/attention").iterdir()}
        for step in (2, 4)
    ]
    assert files[0] == files[1]


def test_training_is_bitwise_the_same_with_and_without(demonstrations, tmp_path):
    """Dropout and the posterior draw from the generator, and gradients add up.

    A step follows the run at step 2, which is the last one of three steps.
    """

    def weights(*callbacks: Callback) -> dict[str, torch.Tensor]:
        datamodule = data(demonstrations)
        module = act(datamodule)
        torch.manual_seed(7)
        trainer(tmp_path / str(len(callbacks)), *callbacks, steps=3).fit(module, datamodule)
        assert module.training
        return {**module.state_dict(), "random": torch.get_rng_state()}

    alone, watched = weights(), weights(explaining())
    file = tmp_path / "1/media/step_000002/attention/metrics.json"
    assert methods_of(json.loads(file.read_text())) == QUICK | SLOW
    assert alone.keys() == watched.keys()
    for name, value in alone.items():
        torch.testing.assert_close(watched[name], value, atol=0, rtol=0, msg=name)


def test_the_averaged_weights_are_explained(plain, demonstrations, tmp_path):
    """Those that a run with a moving average ends with."""
    found = {}
    knobs = {"faithfulness": "never", "n_video_steps": 0}
    for name, averages in (("raw", []), ("average", [EMA(0.9)])):
        datamodule = data(demonstrations)
        module = act(datamodule)
        folder = tmp_path / name
        run = trainer(folder, *averages, explaining(at_start=True, **knobs), steps=2)
        run.fit(module, datamodule)
        untrained, found[name] = (
            json.loads((folder / f"media/step_00000{step}/attention/metrics.json").read_text())
            for step in (0, 2)
        )
        assert explain(folder / "after", datamodule, module, **knobs).scalars == found[name]
        assert untrained == pytest.approx(plain.scalars)
    assert found["raw"] != found["average"]


def test_a_finished_policy_is_explained_in_test_too(plain, demonstrations, tmp_path):
    datamodule = data(demonstrations)
    run = trainer(tmp_path, explaining(faithfulness="never"))
    (values,) = run.test(act(datamodule), datamodule, verbose=False)
    assert {name: values[name] for name in plain.scalars} == pytest.approx(plain.scalars)
    assert methods_of(values) == QUICK
    assert list(tmp_path.glob("media/step_000000/attention/maps.parquet"))


def test_what_would_take_too_long_is_skipped_but_for_the_first_and_last(demonstrations, tmp_path):
    datamodule = data(demonstrations)
    callback = explaining(max_share=0.0, faithfulness="never", n_video_steps=0)
    logger = CsvLog(str(tmp_path))
    trainer(tmp_path, callback, steps=6, logger=logger).fit(act(datamodule), datamodule)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    assert [row["diagnostics/attention_skipped"] for row in rows] == [0, 1, 0]
    assert [methods_of(row) for row in rows] == [QUICK, set(), QUICK]


# Refused before training starts


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        ({}, {"val_fraction": 0.0}, "val_fraction holds out none"),
        ({"queries": [0, 6]}, {}, "predicts chunk steps 0 to 5"),
    ],
)
def test_what_cannot_be_explained_is_refused_before_training(
    demonstrations, tmp_path, callback, arguments, message
):
    datamodule = data(demonstrations, **arguments)
    run = trainer(tmp_path, explaining(**callback), NeverTrain())
    with pytest.raises(ValueError, match=message):
        run.fit(act(datamodule), datamodule)


@pytest.mark.parametrize(
    ("camera", "callback", "message"),
    [
        ("wrist", {}, "one square camera.*task to null"),
        ("side_by_side", {"task": None}, "side_by_side.*rename"),
        ("latent", {"task": None}, "latent.*rename"),
    ],
)
def test_cameras_that_cannot_be_drawn_are_refused_before_training(
    tmp_path, camera, callback, message
):
    datamodule = data(with_camera(tmp_path / "demos.hdf5", camera))
    run = trainer(tmp_path, explaining(**callback), NeverTrain())
    with pytest.raises(ValueError, match=message):
        run.fit(act(datamodule), datamodule)


def test_another_policy_than_act_is_refused_before_training(tmp_path):
    demos = write_pusht(tmp_path / "larger.hdf5", 32)
    datamodule = data(demos, chunk_size=8, n_obs_steps=2, action_start=-1, drop_n_last_frames=2)
    module = lerobot(datamodule, "diffusion", DIFFUSION)
    with pytest.raises(ValueError, match=r"leave callbacks\.attention\.Attention out"):
        trainer(tmp_path, explaining(), NeverTrain()).fit(module, datamodule)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_frames": 0}, "n_frames is 0"),
        ({"n_val_episodes": 0}, "n_val_episodes is 0"),
        ({"n_faithfulness_frames": 0}, "n_faithfulness_frames is 0"),
        ({"n_strip_frames": 0}, "n_strip_frames is 0"),
        ({"n_video_steps": -1}, "n_video_steps is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"n_strip_frames": 3}, "n_strip_frames 3, n_faithfulness_frames 2"),
        ({"n_frames": 1}, "n_faithfulness_frames 2, n_frames 1"),
        ({"queries": []}, "queries"),
        ({"queries": [3, 1]}, "rising"),
        ({"faithfulness": "often"}, "'often': give end"),
        ({"colormap": "viridi"}, "try .*viridis"),
        ({"overlay_alpha": 2.0}, "overlay_alpha: 2"),
        ({"target_height": 8}, "target_height: 8"),
        ({"scale": "fixed"}, "with scale 'fixed'"),
        ({"max_share": 2.0}, "max_share 2"),
    ],
)
def test_impossible_settings_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        explaining(**wrong)


# What is found


def test_numbers_are_means_of_the_maps_beside_them(tested):
    rows = rows_of(tested)
    assert {row["method"] for row in rows} == QUICK | SLOW
    for method, n_frames in (("relevancy", 5), ("integrated_gradients", 2)):
        own = [row for row in rows if row["method"] == method]
        assert len(own) == n_frames
        for name in ("share_state", "share_image", "entropy_nats"):
            mean = np.mean([row[name] for row in own])
            assert tested.scalars[f"attention/{method}/{name}"] == pytest.approx(mean, rel=1e-4)
        for row in own:
            assert sum(row["map_image"]) == pytest.approx(1, abs=1e-4)
    check_shares(tested.scalars, QUICK | SLOW)


def test_what_is_measured_every_time_is_the_same_when_maps_are_tested(plain, tested):
    assert {name: tested.scalars[name] for name in plain.scalars} == plain.scalars
    assert [row for row in rows_of(tested) if row["method"] in QUICK] == [
        {name: row.get(name) for name in rows_of(tested)[0]} for row in rows_of(plain)
    ]


def test_frames_are_those_of_held_out_episodes_from_the_first_to_the_last(untrained, plain):
    datamodule, _ = untrained
    episodes = datamodule.split["val"][:3]
    frames = [(number, step) for number in episodes for step in range(LENGTHS[number])]
    places = np.rint(np.linspace(0, len(frames) - 1, 5)).astype(int)
    own = [row for row in rows_of(plain) if row["method"] == "rollout"]
    assert [(row["episode_index"], row["frame_index"]) for row in own] == [
        frames[place] for place in places
    ]


def test_the_simulator_draws_what_the_policy_saw(plain):
    """In its size, not in that of the task as configured."""
    assert plain.scalars["counterfactual/rerender_px"] == pytest.approx(0, abs=0.01)
    assert plain.scalars["counterfactual/effect_block_px"] > 0


def test_a_policy_that_does_not_see_the_pictures_shares_nothing_with_them(untrained, tmp_path):
    """What it does without an object is the same, and it makes no difference where it looks."""
    datamodule, module = untrained
    blind = ready(datamodule, act(datamodule))
    blind.load_state_dict(module.state_dict())
    with torch.no_grad():
        for weight in blind.view.network.image_projection.parameters():
            weight.zero_()
    found = explain(tmp_path, datamodule, blind).scalars
    for name in OBJECTS:
        assert found[f"counterfactual/effect_{name}_px"] == 0
        assert found[f"counterfactual/share_{name}"] == pytest.approx(1 / 3)


def test_data_without_simulator_states_go_without_counterfactuals(tmp_path):
    datamodule = data(write_pusht(tmp_path / "demos.hdf5", SIZE, states=False))
    run = trainer(tmp_path, explaining(faithfulness="never"), steps=2)
    run.fit(act(datamodule), datamodule)
    document = json.loads((tmp_path / "media/step_000002/attention/metrics.json").read_text())
    assert methods_of(document) == QUICK
    assert not [name for name in document if "counterfactual" in name or "_agent" in name]


def test_two_cameras_of_different_sizes(tmp_path):
    datamodule = data(with_camera(tmp_path / "demos.hdf5", "wrist"))
    module = ready(datamodule, act(datamodule))
    findings = explain(tmp_path / "out", datamodule, module, task=None, target_height=240)
    assert findings.videos.keys() == {
        f"attention/video_{name}" for name in ("image", "wrist", "side_by_side")
    }
    widths = {}
    for name, path in findings.videos.items():
        frames = frames_of(path)
        assert len(frames) == 4
        widths[name] = frames[0].shape[1]
    assert max(widths, key=lambda name: widths[name]) == "attention/video_side_by_side"
    for method in QUICK:
        shares = [
            value
            for name, value in findings.scalars.items()
            if name.startswith(f"attention/{method}/share_")
        ]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert findings.scalars[f"attention/{method}/share_wrist"] > 0
    row = rows_of(findings)[0]
    assert (row["rows_wrist"], row["columns_wrist"]) == (3, 4)


def test_how_many_frames_go_through_the_network_at_once_changes_nothing(untrained, plain, tmp_path):
    alone = explain(tmp_path, *untrained, batch_size=1).scalars
    assert alone.keys() == plain.scalars.keys()
    for name, value in plain.scalars.items():
        assert alone[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def strip_of(findings: Findings) -> np.ndarray:
    strip = cv2.imread(findings.images["attention/strip"])
    assert strip is not None
    return strip


def film_of(findings: Findings) -> list[np.ndarray]:
    return frames_of(findings.videos["attention/video_image"])


@pytest.mark.parametrize(
    ("knob", "law"),
    [
        ({"n_frames": 7}, lambda f: len(rows_of(f)) == 7 * len(QUICK)),
        ({"n_val_episodes": 1}, lambda f: len({r["episode_index"] for r in rows_of(f)}) == 1),
        ({"queries": [1, 4]}, lambda f: rows_of(f)[0]["queries"] == [1, 4]),
        ({"n_video_steps": 0}, lambda f: not f.videos),
        ({"n_video_steps": 3}, lambda f: len(film_of(f)) == 3),
        ({"task": None}, lambda f: not any("counterfactual" in name for name in f.scalars)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_knob_does_what_it_says(untrained, tmp_path, knob, law):
    assert law(explain(tmp_path, *untrained, **knob))


def test_pictures_follow_their_knobs_and_numbers_do_not(untrained, plain, tmp_path):
    numbers = {"n_faithfulness_frames": 3, "n_strip_frames": 3, "target_height": 96}
    other = explain(tmp_path, *untrained, colormap="magma", scale="episode", **numbers)
    assert other.scalars == plain.scalars
    assert film_of(other)[0].shape[0] == film_of(plain)[0].shape[0] + 32
    assert strip_of(other).shape[1] > strip_of(plain).shape[1]
    faint = explain(tmp_path / "faint", *untrained, overlay_alpha=0.1)
    assert strip_of(faint).shape == strip_of(plain).shape
    assert (strip_of(faint) != strip_of(plain)).any(-1).mean() > 0.2


def test_the_film_has_its_maps_beside_it(plain):
    file = Path(plain.arrays["attention"]).with_name("relevancy.parquet")
    rows = parquet.read_table(file).to_pylist()
    assert [row["frame_index"] for row in rows] == [0, 1, 2, 3]
    assert len(film_of(plain)) == 4


def test_a_task_that_shows_what_the_policy_sees_stays_as_configured(untrained):
    _, module = untrained
    task = PushTTask(image_size=SIZE, max_steps=7)
    assert Attention(task=task)._task(module.view) is task
    # One with pictures of another size is made anew.
    other = Attention(task=PushTTask(image_size=SIZE + 8))._task(module.view)
    assert other.image_size == SIZE
