"""Features at checkpoints: latents keep their numbers, over a resume, too."""

import json
from pathlib import Path

import cv2
import pytest
import torch
from pusht_runs import SIZE, act, data, trainer, write_pusht

from autoencoders.files import load_autoencoder
from callbacks.feature_dynamics import FeatureDynamics
from envs.push_t import PushTTask

SMALL = {"n_latents": 24, "k": 3, "n_steps": 12, "batch_size": 32, "n_behaviour_frames": 8}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_pusht(tmp_path_factory.mktemp("demos") / "demos.hdf5", SIZE)


def run(folder: Path, demonstrations: Path, *callbacks, steps: int = 4, **options):
    datamodule = data(demonstrations)
    module = act(datamodule)
    run_trainer = trainer(folder, *callbacks, steps=steps)
    run_trainer.fit(module, datamodule, weights_only=True, **options)
    return module, run_trainer


def found(folder: Path, step: int) -> dict[str, float]:
    media = folder / "media" / f"step_{step:06d}" / "feature_dynamics"
    return json.loads((media / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(demonstrations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = FeatureDynamics(task=PushTTask(SIZE), strict=True, max_share=None, **SMALL)
    run(folder, demonstrations, callback)
    return folder


def test_every_live_feature_has_persisted_or_is_new(finished):
    first, second = found(finished, 2), found(finished, 4)
    assert "features/born" not in first
    live = round(24 * (1 - second["features/dead_fraction"]))
    assert second["features/persisting"] + second["features/born"] == live
    was_live = round(24 * (1 - first["features/dead_fraction"]))
    assert second["features/persisting"] + second["features/died"] == was_live
    assert second["features/persisting"] > 0


def turned(folder: Path) -> float:
    """Median cosine between the directions of both checkpoints."""
    media = folder / "media"
    saes = [
        load_autoencoder(media / f"step_{step:06d}" / "feature_dynamics" / "autoencoder").sae
        for step in (2, 4)
    ]
    return float((saes[0].directions * saes[1].directions).sum(-1).median())


def test_later_checkpoints_go_on_from_the_earlier_ones(finished):
    # Directions drawn anew in 16 dimensions would be nearly orthogonal.
    assert turned(finished) > 0.9


def test_numbers_and_picture_are_there(finished):
    numbers = found(finished, 4)
    assert numbers["features/l0"] == pytest.approx(3, abs=1.0)
    assert 0 < numbers["features/fvu"] < 1
    assert numbers["features/action_score"] <= 1
    assert any(key.startswith("features/r_") for key in numbers)
    strip = cv2.imread(str(finished / "media" / "step_000004" / "feature_dynamics" / "strip.png"))
    assert strip is not None
    assert strip.std() > 0


def test_training_is_the_same_with_and_without(demonstrations, tmp_path):
    callback = FeatureDynamics(strict=True, max_share=None, **SMALL)
    with_features, _ = run(tmp_path / "with", demonstrations, callback)
    without, _ = run(tmp_path / "without", demonstrations)
    for name, weight in without.state_dict().items():
        assert torch.equal(weight, with_features.state_dict()[name]), name


def test_a_resumed_run_compares_with_the_checkpoint_before(demonstrations, finished, tmp_path):
    settings = {"task": PushTTask(SIZE), "strict": True, "max_share": None, **SMALL}
    _, stopped = run(tmp_path, demonstrations, FeatureDynamics(**settings), steps=2)
    stopped.save_checkpoint(tmp_path / "at2.ckpt")
    run(tmp_path, demonstrations, FeatureDynamics(**settings), ckpt_path=str(tmp_path / "at2.ckpt"))
    assert "features/persisting" in found(tmp_path, 4)
    assert turned(tmp_path) > 0.9


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": 30}, "k is 30"),
        ({"n_val_episodes": 3}, "n_val_episodes"),
        ({"layer": "network.encodr"}, "encodr"),
    ],
)
def test_what_cannot_work_is_said_before_training(changes, named, demonstrations, tmp_path):
    def start():
        callback = FeatureDynamics(**{**SMALL, **changes})
        run(tmp_path, demonstrations, callback)

    with pytest.raises(ValueError, match=named):
        start()


def test_with_too_few_held_out_episodes_training_goes_on_without(demonstrations, tmp_path):
    datamodule = data(demonstrations, val_fraction=0.2)
    with pytest.warns(UserWarning, match="val_fraction"):
        trainer(tmp_path, FeatureDynamics(strict=True, **SMALL)).fit(act(datamodule), datamodule)
    assert not [*tmp_path.glob("media/*/feature_dynamics/*")]


def test_every_live_feature_is_listed_with_its_birth(finished):
    (file,) = (finished / "media" / "step_000004").glob("**/*births*.json")
    table = json.loads(file.read_text())
    assert table["columns"][:2] == ["feature", "born_at_step"]
    born_at = [row[1] for row in table["rows"]]
    numbers = found(finished, 4)
    assert born_at.count(2) == numbers["features/persisting"]
    assert born_at.count(4) == numbers["features/born"]
