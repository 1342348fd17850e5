"""The transfer experiment at checkpoints: numbers of each arm, a video, and only when wanted."""

import json
import re

import pytest
import torch
from pusht_runs import SIZE, DataOnly, act, data, frames_of, ready, trainer, write_pusht

from callbacks.dashboard import read_index
from callbacks.loggers import CsvLog, read_metrics
from callbacks.schedule import undisturbed
from callbacks.transfer import Transfer
from envs.push_t import PushTTask
from policies.interface import DataSchema
from rendering.report.explanations import family, meaning, picture, reference, section

CONDITIONS = ("arm0", "arm1", "arm1_flipped")
TASK = PushTTask(image_size=SIZE, max_steps=6)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    return write_pusht(tmp_path_factory.mktemp("demos") / "demos.hdf5", SIZE)


@pytest.fixture(scope="module")
def untrained(demonstrations):
    datamodule = data(demonstrations)
    return datamodule, ready(datamodule, act(datamodule))


def diagnose(folder, untrained, **knobs):
    datamodule, module = untrained
    callback = Transfer(TASK, n_trials=3, **knobs)
    folder.mkdir()
    with undisturbed(module):
        return callback.diagnose(DataOnly(datamodule), module, folder)


@pytest.fixture(scope="module")
def found(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found") / "transfer"
    return diagnose(folder, untrained, n_videos=1), folder


def test_each_arm_has_numbers_with_intervals_and_the_flip_makes_them_equal(found):
    findings, folder = found
    scalars = findings.scalars
    for condition in CONDITIONS:
        for name in ("success", "mean_max_coverage"):
            key = f"transfer/{condition}/{name}"
            assert scalars[f"{key}_low"] <= scalars[key] <= scalars[f"{key}_high"]
    assert scalars["transfer/arm1_flipped/mean_max_coverage"] == pytest.approx(
        scalars["transfer/arm0/mean_max_coverage"], abs=1e-4
    )
    document = json.loads((folder / "transfer.json").read_text())
    assert document["flip_check"]["arm1"]["n_equal"] == 3
    assert document["episodes"].keys() == set(CONDITIONS)
    assert document["differences"].keys() == {
        "arm1 - arm0",
        "arm1_flipped - arm1",
        "arm1_flipped - arm0",
    }


def test_the_video_shows_the_arms_side_by_side(found):
    findings, _ = found
    frames = frames_of(findings.videos["transfer/video"])
    assert len(frames) == 7
    assert frames[0].shape[:2] == (288 + 20, 3 * 288)


class Centred:
    """Goes to the middle of the board, whatever it sees: respects the mirror."""

    data_schema = DataSchema(cameras={"image": (SIZE, SIZE)}, state_dim=2, action_dim=2)
    chunk_size, n_action_steps, n_obs_steps = 4, 2, 1
    target = (256.0, 100.0)

    def predict_chunk(self, observation, queries=None):
        return torch.tensor(self.target).expand(len(observation.state), self.chunk_size, -1)


class OffCentre(Centred):
    target = (200.0, 100.0)


@pytest.mark.parametrize(("view", "error_px"), [(Centred(), 0.0), (OffCentre(), 112.0)])
def test_the_error_is_the_distance_from_the_mirrored_action(untrained, tmp_path, view, error_px):
    _, module = untrained

    class Holder:
        device = module.device

        def __init__(self):
            self.view = view

    callback = Transfer(TASK, n_trials=2, n_videos=0)
    findings = callback.diagnose(None, Holder(), tmp_path)
    assert findings.scalars["transfer/equivariance_px"] == pytest.approx(error_px)
    assert not findings.videos
    is_equal = findings.scalars["transfer/arm0/mean_max_coverage"] == pytest.approx(
        findings.scalars["transfer/arm1/mean_max_coverage"], abs=1e-6
    )
    assert is_equal or error_px > 0


class Noisy(Centred):
    """Draws its chunks."""

    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        chunk = self.predict_chunk(observation)[:, None].expand(-1, n_samples, -1, -1)
        return chunk + torch.tensor([3.0, 4.0]) * seed


def test_another_name_keeps_two_apart_and_a_drawn_chunk_has_a_floor(untrained, tmp_path):
    _, module = untrained

    class Holder:
        device = module.device
        view = Noisy()

    findings = Transfer(TASK, n_trials=2, n_videos=0, name="transfer_gentle").diagnose(
        None, Holder(), tmp_path
    )
    assert {name.partition("/")[0] for name in findings.scalars} == {"transfer_gentle"}
    assert findings.scalars["transfer_gentle/redrawn_px"] == pytest.approx(5)
    assert Transfer(TASK, name="transfer_gentle").state_key != Transfer(TASK).state_key
    assert Transfer(TASK).name == "transfer"


def test_out_of_reach_means_at_the_last_validation_only(demonstrations, tmp_path):
    datamodule = data(demonstrations)
    callback = Transfer(
        TASK, n_trials=2, n_videos=1, every_n_validations=1_000_000, strict=True, max_share=0.0
    )
    run = trainer(tmp_path, callback, steps=6, logger=[CsvLog(str(tmp_path))])
    run.fit(act(datamodule), datamodule)
    steps = [
        row["step"]
        for row in read_metrics(tmp_path / "metrics.csv")
        if "transfer/arm1/success" in row
    ]
    assert steps == [6]
    (entry,) = read_index(tmp_path / "media/index.json").values()
    assert entry["videos"].keys() == {"transfer/video"}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"arms": (0, 2)}, "arms 0 to 1"),
        ({"n_trials": 1}, "give at least 2"),
        ({"n_action_steps": 2, "temporal_ensemble_coeff": 0.01}, "set one of the two to null"),
    ],
)
def test_what_cannot_be_is_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Transfer(TASK, **knobs)


def test_a_task_with_pictures_of_another_size_is_refused_before_training(untrained):
    _, module = untrained
    Transfer(TASK).on_fit_start(None, module)
    with pytest.raises(ValueError, match=r"does not fit the policy.*image_size"):
        Transfer(PushTTask(image_size=SIZE + 1)).on_fit_start(None, module)


def test_a_report_knows_what_the_names_mean(found):
    findings, _ = found
    for name in findings.scalars:
        if not name.endswith(("_low", "_high")):
            assert meaning(name), name
            assert section(name) == "rollout"
    assert picture("transfer/video").reading
    logged = set(findings.scalars)
    other = reference("transfer/arm1/success", logged)
    assert other == ("with the flip", "transfer/arm1_flipped/success")
    # Whichever arm was seen: it has no flip.
    assert reference("transfer/arm0/success", logged) is None
    assert reference("transfer/equivariance_px", logged) == ("respects the mirror", 0.0)
    drawn = logged | {"transfer/redrawn_px"}
    assert reference("transfer/equivariance_px", drawn) == ("drawn anew", "transfer/redrawn_px")
    assert meaning("transfer/redrawn_px")
    assert {family(f"transfer/{each}/success")[0] for each in CONDITIONS} == {"transfer/*/success"}


def test_a_report_knows_another_transfer_by_its_name(found):
    findings, _ = found
    renamed = {name.replace("transfer/", "transfer_gentle/") for name in findings.scalars}
    for name in renamed:
        if not name.endswith(("_low", "_high")):
            assert meaning(name) == meaning(name.replace("_gentle", "")), name
            assert section(name) == "rollout"
    entry = picture("transfer_gentle/video")
    assert entry.reading
    rows = {
        match["of"] for each in renamed if (match := re.fullmatch(entry.trust[1].pattern, each))
    }
    assert rows == {f"transfer_gentle/{each}" for each in CONDITIONS}
    other = reference("transfer_gentle/arm1/success", renamed)
    assert other == ("with the flip", "transfer_gentle/arm1_flipped/success")
    charts = {family(f"transfer_gentle/{each}/success") for each in CONDITIONS}
    assert charts == {("transfer_gentle/*/success", each) for each in CONDITIONS}
