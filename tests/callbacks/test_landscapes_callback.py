"""Landscapes at checkpoints: what they find is true, in one row, and training never notices."""

import json
import math
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
    LEROBOT_ACT,
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

from callbacks.dashboard import read_index
from callbacks.landscapes import TRAIN_NUMBERS, Landscapes
from callbacks.loggers import CsvLog, read_metrics
from callbacks.schedule import undisturbed
from datamodules.hdf5 import HDF5DataModule
from envs.push_t import PushT, PushTTask
from landscapes.density import fit_scale
from landscapes.grid import Grid
from landscapes.landscape import predict
from landscapes.latent import latent_use
from landscapes.methods import Distance, Energy, Reconstruction
from policies.interface import Findings, SamplingPolicyView
from rendering.landscape import board_px

HORIZONS = [0, 4]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_pusht(tmp_path_factory.mktemp("demos") / "demos.hdf5", SIZE)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """LeRobot's policies want pictures that survive a ResNet."""
    return write_pusht(tmp_path_factory.mktemp("demos") / "larger.hdf5", 32)


def studying(**changes: Any) -> Landscapes:
    settings = {
        "horizons": HORIZONS,
        "n_samples": 4,
        "action_resolution": 24,
        "frame_stride": 4,
        "n_train_episodes": 0,
        "n_evidence_frames": 2,
        "n_video_steps": 5,
        "n_strip_frames": 2,
        "target_height": 180,
        "strict": True,
        "max_share": None,
    }
    return Landscapes(**{**settings, **changes})


def study(
    folder: Path, datamodule: HDF5DataModule, module: LightningModule, **knobs: Any
) -> Findings:
    folder.mkdir(parents=True, exist_ok=True)
    with undisturbed(module):
        return studying(**knobs).diagnose(DataOnly(datamodule), module, folder)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def untrained(demonstrations):
    datamodule = data(demonstrations)
    return datamodule, ready(datamodule, act(datamodule))


@pytest.fixture(scope="module")
def plain(untrained, tmp_path_factory) -> Findings:
    """A study without training episodes, to compare others with."""
    return study(tmp_path_factory.mktemp("plain"), *untrained)


# In training


@pytest.fixture(scope="module")
def logged(demonstrations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    datamodule = data(demonstrations)
    callback = studying(task=PushTTask(), n_train_episodes=2)
    return folder, *fit_with_wandb(folder, act(datamodule), datamodule, callback)


def test_all_that_a_checkpoint_shows_is_one_row(logged):
    folder, run, records = logged
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    studied = [row for row in rows if "landscape/val/k0/nll" in row]
    assert [row["trainer/global_step"] for row in studied] == [2, 4]
    for row in studied:
        assert "val/loss" in row
        for key in ("landscape/strip.path", "landscape/video.path", "landscape/episodes.path"):
            assert (run / "files" / row[key]).stat().st_size > 0
        for k in HORIZONS:
            assert len(row[f"landscape/val/k{k}/hpd_level.bins"]) == 21
            assert f"landscape/train/k{k}/nll" in row
            assert f"landscape/val/k{k}/nll_low" in row
            assert f"latent/k{k}/R_z" in row
        assert row["latent/kl_nats"] > 0
        assert row["diagnostics/errors"] == 0
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    arrays = [artifact for artifact in artifacts if artifact["type"] == "arrays"]
    assert ["step-2" in arrays[0]["aliases"], "step-4" in arrays[1]["aliases"]] == [True, True]
    assert len({artifact["name"] for artifact in arrays}) == 1
    index = read_index(folder / "media/index.json")
    assert [*index] == ["2", "4"]
    assert {kind: [*files] for kind, files in index["4"].items()} == {
        "images": ["landscape/strip"],
        "videos": ["landscape/video"],
        "tables": ["landscape/episodes"],
        "arrays": ["landscapes"],
    }
    rows = read_metrics(folder / "metrics.csv")
    (last,) = [row for row in rows if row["step"] == 4 and "val/loss" in row]
    assert last["landscape/val/k4/nll"] == pytest.approx(studied[-1]["landscape/val/k4/nll"])


def test_training_is_bitwise_the_same_with_and_without(demonstrations, tmp_path):
    """Dropout and the posterior draw from the generator that a study must give back."""

    def weights(*callbacks: Callback) -> dict[str, torch.Tensor]:
        datamodule = data(demonstrations)
        module = act(datamodule)
        torch.manual_seed(7)
        trainer(tmp_path / str(len(callbacks)), *callbacks).fit(module, datamodule)
        assert module.training
        return {**module.state_dict(), "random": torch.get_rng_state()}

    alone, watched = weights(), weights(studying(at_start=True, n_train_episodes=2))
    assert alone.keys() == watched.keys()
    for name, value in alone.items():
        torch.testing.assert_close(watched[name], value, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_finished_policy_is_studied_too(demonstrations, tmp_path, stage):
    datamodule = data(demonstrations)
    run = trainer(tmp_path, studying())
    (values,) = getattr(run, stage)(act(datamodule), datamodule, verbose=False)
    assert math.isfinite(values["landscape/val/k4/nll"])
    assert list(tmp_path.glob("media/step_000000/landscapes/landscapes.npz"))


def test_a_study_that_would_take_too_long_is_skipped_but_for_the_first_and_last(
    demonstrations, tmp_path
):
    datamodule = data(demonstrations)
    callback = studying(max_share=0.0)
    logger = CsvLog(str(tmp_path))
    trainer(tmp_path, callback, steps=6, logger=logger).fit(act(datamodule), datamodule)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "val/loss" in row]
    assert [row["diagnostics/landscapes_skipped"] for row in rows] == [0, 1, 0]
    assert ["landscape/val/k0/nll" in row for row in rows] == [True, False, True]


# Refused before training starts


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        ({}, {"val_fraction": 0.0}, "val_fraction holds out 0"),
        ({}, {"val_fraction": 0.1}, "val_fraction holds out 1"),
        ({"horizons": [0, 6]}, {}, "predicts chunks of 6"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_training(
    demonstrations, tmp_path, callback, arguments, message
):
    datamodule = data(demonstrations, **arguments)
    run = trainer(tmp_path, studying(**callback), NeverTrain())
    with pytest.raises(ValueError, match=message):
        run.fit(act(datamodule), datamodule)


def test_a_method_that_the_policy_cannot_answer_is_refused_before_training(
    demonstrations, tmp_path
):
    datamodule = data(demonstrations)
    run = trainer(tmp_path, studying(method=Reconstruction()), NeverTrain())
    with pytest.raises(ValueError, match="without a latent"):
        run.fit(act(datamodule, use_latent=False), datamodule)


def test_a_policy_with_one_answer_only_is_refused_before_training(larger, tmp_path):
    datamodule = data(larger)
    module = lerobot(datamodule, "act", LEROBOT_ACT)
    with pytest.raises(ValueError, match="there is nothing to sample"):
        trainer(tmp_path, studying(), NeverTrain()).fit(module, datamodule)


def test_a_module_without_a_policy_is_refused_before_training(demonstrations, tmp_path):
    class Nobody(LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(TypeError, match="Nobody has no policy view"):
        trainer(tmp_path, studying(), NeverTrain()).fit(Nobody(), data(demonstrations))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_samples": 1}, "n_samples is 1"),
        ({"n_val_episodes": 1}, "n_val_episodes is 1"),
        ({"n_train_episodes": 1}, "n_train_episodes is 1"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"action_resolution": 0}, "action_resolution 0"),
        ({"colormap": "viridi"}, "try .*viridis"),
        ({"target_height": 60}, "height 60 px"),
        ({"max_share": 2.0}, "max_share 2"),
    ],
)
def test_impossible_settings_are_refused_at_once(wrong, message):
    with pytest.raises(ValueError, match=message):
        studying(**wrong)


# What is found


def test_numbers_are_those_of_the_reported_half_with_the_scale_of_the_other(untrained, tmp_path):
    datamodule, module = untrained
    held_out = datamodule.split["val"]
    assert len(held_out) == 4
    findings = study(tmp_path, datamodule, module)

    def answers(numbers):
        parts = [datamodule.episode(number) for number in numbers]
        rows = [part.rows(slice(0, None, 4)) for part in parts]
        return rows, [predict(module.eval().view, each, HORIZONS, 4, 0) for each in rows]

    _, calibration = answers([held_out[1], held_out[3]])
    batches, reported = answers([held_out[0], held_out[2]])
    scale = fit_scale(
        torch.cat([each.samples for each in calibration]),
        torch.cat([each.expert for each in calibration]),
        torch.cat([each.is_valid for each in calibration]),
    )
    nll = torch.cat(
        [
            -each.mixture(scale[None]).log_density(each.expert[:, :, None])[..., 0]
            for each in reported
        ]
    )
    valid = torch.cat([each.is_valid for each in reported])
    for place, k in enumerate(HORIZONS):
        expected = float(nll[valid[:, place], place].mean())
        assert findings.scalars[f"landscape/val/k{k}/nll"] == pytest.approx(expected, rel=1e-5)
        for axis, direction in enumerate("xy"):
            assert findings.scalars[f"calib/val/k{k}/b_{direction}"] == pytest.approx(
                float(scale[place, axis]), rel=1e-5
            )
    batch, predictions = batches[0].concatenate(batches), reported[0].concatenate(reported)
    use = latent_use(module.view, batch, predictions, scale)
    assert findings.scalars["latent/kl_nats"] == pytest.approx(use.kl_nats, rel=1e-5)
    table = findings.tables["landscape/episodes"]
    assert [row[:2] for row in table.rows] == [
        (number, k) for number in sorted([held_out[0], held_out[2]]) for k in HORIZONS
    ]
    column = table.columns.index("nll")
    counts = table.columns.index("n_frames")
    weighed = [row[column] * row[counts] for row in table.rows if row[1] == 0]
    frames = sum(row[counts] for row in table.rows if row[1] == 0)
    assert sum(weighed) / frames == pytest.approx(findings.scalars["landscape/val/k0/nll"])
    edges, counts = findings.histograms["landscape/val/k0/hpd_level"]
    assert (edges[0], edges[-1], sum(counts)) == (0, 1, frames)


def test_training_episodes_have_numbers_of_their_own(untrained, plain, tmp_path):
    both = study(tmp_path, *untrained, n_train_episodes=2).scalars
    alone = plain.scalars
    extra = both.keys() - alone.keys()
    assert {key for key in extra if key.startswith("landscape")} == {
        f"landscape/train/k{k}/{name}" for k in HORIZONS for name in TRAIN_NUMBERS
    }
    assert {key: both[key] for key in alone} == alone
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document["train"]["k0/nll"] == both["landscape/train/k0/nll"]
    assert document["val"]["k0/nll"] == both["landscape/val/k0/nll"]
    assert isinstance(document["reading"], list)


def test_how_many_frames_go_through_the_network_at_once_changes_nothing(untrained, plain, tmp_path):
    alone = study(tmp_path, *untrained, batch_size=1).scalars
    assert alone.keys() == plain.scalars.keys()
    for name, value in plain.scalars.items():
        assert alone[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def arrays_of(findings: Findings) -> dict[str, np.ndarray]:
    with np.load(findings.arrays["landscapes"]) as file:
        return dict(file)


@pytest.mark.parametrize(
    ("knob", "law"),
    [
        ({"frame_stride": 3}, lambda f: set(arrays_of(f)["frame_index"] % 3) == {0}),
        ({"n_samples": 6}, lambda f: arrays_of(f)["samples"].shape[1] == 6),
        ({"n_val_episodes": 2}, lambda f: len(set(arrays_of(f)["episode_index"])) == 1),
        ({"action_resolution": 10}, lambda f: arrays_of(f)["strip_mass"].shape[-2:] == (10, 10)),
        ({"horizons": None}, lambda f: arrays_of(f)["horizons"].tolist() == [0]),
        ({"n_strip_frames": 3}, lambda f: len(arrays_of(f)["strip_frame_index"]) == 3),
        # Without a video, the strip shows the whole episode.
        ({"n_video_steps": 0}, lambda f: not f.videos and arrays_of(f)["strip_frame_index"][1] > 8),
        ({"n_video_steps": 3}, lambda f: len(frames_of(f.videos["landscape/video"])) == 3),
        (
            {"target_height": 200},
            lambda f: frames_of(f.videos["landscape/video"])[0].shape[0] == 200,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_knob_does_what_it_says(untrained, tmp_path, knob, law):
    assert law(study(tmp_path, *untrained, **knob))


@pytest.mark.parametrize(
    ("knob", "key"),
    [
        ({"seed": 1}, "landscape/val/k4/nll"),
        ({"n_evidence_frames": 4}, "latent/elbo_nats"),
    ],
)
def test_knobs_of_numbers_change_the_number_they_are_for(untrained, plain, tmp_path, knob, key):
    assert study(tmp_path, *untrained, **knob).scalars[key] != plain.scalars[key]


def test_the_method_and_colours_are_those_asked_for(untrained, plain, tmp_path):
    likelihood = plain
    distance = study(tmp_path / "2", *untrained, method=Distance())
    coloured = study(tmp_path / "3", *untrained, colormap="magma")
    assert not np.array_equal(
        arrays_of(likelihood)["strip_scores"], arrays_of(distance)["strip_scores"]
    )
    np.testing.assert_array_equal(
        arrays_of(likelihood)["strip_scores"], arrays_of(coloured)["strip_scores"]
    )
    assert likelihood.scalars == distance.scalars == coloured.scalars
    strips = [cv2.imread(each.images["landscape/strip"]) for each in (likelihood, coloured)]
    assert strips[0].shape == strips[1].shape
    assert (strips[0] != strips[1]).any(-1).mean() > 0.2


def test_the_scores_are_those_of_the_arrays_beside_them(untrained, tmp_path):
    """Whoever plots again from the artifact sees what the run saw."""
    arrays = arrays_of(study(tmp_path, *untrained, method=Energy()))
    first = arrays["strip_frame_index"][0]
    assert arrays["frame_index"][0] == first == 0
    centres = Grid(24).centres().numpy()
    for place in range(len(HORIZONS)):
        samples = arrays["samples"][0, :, place]
        distance = np.linalg.norm(centres[:, :, None] - samples, axis=-1).mean(-1)
        np.testing.assert_allclose(arrays["strip_scores"][0, place], -distance, atol=0.3)


def test_the_environment_is_the_simulator_in_the_recorded_state(untrained, plain, tmp_path):
    """Only its board is sharp: the recorded picture has 16 px."""
    sharp = study(tmp_path, *untrained, task=PushTTask(), target_height=400)
    datamodule, _ = untrained
    batch = datamodule.episode(datamodule.split["val"][0])
    state, target = batch.simulator_state[2].double().numpy(), batch.actions[2, 0].double().numpy()
    env = PushT()
    env.reset_to(state)
    errors = []
    for findings, height in ((sharp, 400), (plain, 180)):
        size = board_px(height)
        board = frames_of(findings.videos["landscape/video"])[2][20 : 20 + size, :size].astype(int)
        errors.append(np.abs(board - env.frame(size, target)).mean())
        if findings is sharp:
            rows, columns = np.nonzero((board[..., 0] > 200) & (board[..., 1:] < 60).all(-1))
            cross = np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2
            np.testing.assert_allclose(cross, target / 512 * size, atol=1.5)
    env.close()
    assert errors[0] < 1.5  # what the codec makes of it
    assert errors[1] > 2 * errors[0]


# Diffusion Policy


def test_diffusion_policys_chunks_begin_with_the_observed_frame(larger, tmp_path):
    """Its data begin one step earlier: the demonstrated action k = 0 is that of the frame."""
    datamodule = data(larger, chunk_size=8, n_obs_steps=2, action_start=-1, drop_n_last_frames=2)
    module = lerobot(datamodule, "diffusion", DIFFUSION)
    callback = studying(horizons=[0, 6], n_video_steps=3)
    run = trainer(tmp_path, callback, steps=2)
    run.fit(module, datamodule)
    (path,) = tmp_path.glob("media/step_000002/landscapes/landscapes.npz")
    with np.load(path) as arrays:
        episodes, steps = arrays["episode_index"], arrays["frame_index"]
        expert, valid, samples = arrays["expert"], arrays["is_valid"], arrays["samples"]
        predicted = arrays["prediction"]
    with h5py.File(larger) as file:
        for row, (number, step) in enumerate(zip(episodes, steps, strict=True)):
            actions = file[f"demo_{number}/actions"][:]
            np.testing.assert_array_equal(expert[row, 0], actions[step])
            assert valid[row].tolist() == [True, step + 6 < len(actions)]
            if valid[row, 1]:
                np.testing.assert_array_equal(expert[row, 1], actions[step + 6])
    # The policy answers the same when it is asked about that frame alone.
    view = module.eval().view
    assert isinstance(view, SamplingPolicyView)
    number, step = int(episodes[1]), int(steps[1])
    seen = datamodule.episode(number).rows(slice(step, step + 1)).observation
    torch.testing.assert_close(
        torch.from_numpy(predicted[1]), view.predict_chunk(seen, [0, 6])[0], atol=1e-2, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.from_numpy(samples[1]),
        view.sample_chunks(seen, 4, 0, [0, 6])[0],
        atol=1e-2,
        rtol=1e-4,
    )
