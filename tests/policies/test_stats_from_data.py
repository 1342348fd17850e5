"""A policy's own statistics scale it; a data set's only if it brings none and somebody asks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lerobot_folders import (
    SCHEMA,
    STATISTICS,
    WINDOW,
    episode,
    lerobot_policy,
    with_history,
    write_folder,
)
from safetensors.torch import load_file, save_file

from policies.interface import DataSchema, DataStatistics, FeatureStatistics
from policies.lerobot_format import LeRobotFormatError
from policies.loading import load_policy

CHUNK_SIZE = {"act": WINDOW["act"], "diffusion": WINDOW["diffusion"] - 1}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FLAG = "--stats_from_data"


def feature(key: str) -> FeatureStatistics:
    values = {name: value.flatten() for name, value in STATISTICS[key].items()}
    return FeatureStatistics(**values, q01=values["min"], q99=values["max"])


DATA = DataStatistics(
    images={"image": feature("observation.image")},
    state=feature("observation.state"),
    action=feature("action"),
)


class Asked:
    """A data set that remembers who asked for its statistics."""

    def __init__(self, statistics: DataStatistics = DATA):
        self.statistics = statistics
        self.calls: list[tuple[DataSchema, int]] = []

    def __call__(self, schema: DataSchema, chunk_size: int) -> DataStatistics:
        self.calls.append((schema, chunk_size))
        return self.statistics


def never(schema: DataSchema, chunk_size: int) -> DataStatistics:
    raise AssertionError("a policy with statistics of its own must not ask for others")


@pytest.fixture(scope="module", params=["act", "diffusion"])
def original(request, tmp_path_factory) -> Path:
    """A policy that LeRobot saved, with its statistics."""
    folder = tmp_path_factory.mktemp(request.param) / "pretrained_model"
    return write_folder(folder, *lerobot_policy(request.param))


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to take statistics from."""
    return shutil.copytree(original, tmp_path / "pretrained_model")


@pytest.fixture
def act(tmp_path) -> Path:
    return write_folder(tmp_path / "act", *lerobot_policy("act"))


def without_processors(folder: Path) -> None:
    """What ``policy.save_pretrained`` alone leaves."""
    for file in folder.glob("policy_*"):
        file.unlink()


def with_empty_processors(folder: Path) -> None:
    """What LeRobot saves of processors that were made without statistics."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    without_processors(folder)
    for pipeline in make_pre_post_processors(PreTrainedConfig.from_pretrained(folder)):
        pipeline.save_pretrained(folder)
    assert not list(folder.glob("policy_*.safetensors"))


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit(path: Path, change: Callable) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def chunk(folder: Path, statistics: Callable | None = None) -> torch.Tensor:
    n_obs_steps = config(folder)["n_obs_steps"]
    seen = episode(3)
    observation = seen[2] if n_obs_steps == 1 else with_history(seen, 2, n_obs_steps)
    with torch.no_grad():
        view = load_policy(str(folder), data_statistics=statistics).view
        return view.predict_chunk(observation)


@pytest.mark.parametrize("strip", [without_processors, with_empty_processors])
def test_the_statistics_of_its_training_data_bring_a_policy_back(original, folder, strip):
    strip(folder)
    data = Asked()
    torch.testing.assert_close(chunk(folder, data), chunk(original), rtol=1e-5, atol=1e-3)
    ((schema, chunk_size),) = data.calls
    assert (schema, chunk_size) == (SCHEMA, CHUNK_SIZE[config(folder)["type"]])
    assert load_policy(str(folder), data_statistics=data).scaled_by_data
    moved = replace(DATA, action=replace(DATA.action, mean=DATA.action.mean + 50))
    moved = replace(moved, action=replace(moved.action, min=moved.action.min + 50))
    assert not torch.allclose(chunk(folder, Asked(moved)), chunk(original), atol=1)


def test_a_policys_own_statistics_are_never_replaced(original):
    assert torch.equal(chunk(original, never), chunk(original))
    assert not load_policy(str(original), data_statistics=never).scaled_by_data


@pytest.mark.parametrize("strip", [without_processors, with_empty_processors])
def test_without_statistics_it_stops_and_says_what_may_be_done(folder, strip):
    strip(folder)
    with pytest.raises(LeRobotFormatError, match=r"no statistics for .*action") as error:
        load_policy(str(folder))
    assert str(folder) in str(error.value)
    assert FLAG in str(error.value)


def test_a_folder_that_lost_only_some_statistics_is_damaged(folder):
    """Half of its own and half of others would be neither."""
    for path in folder.glob("policy_*.safetensors"):
        kept = {name: v for name, v in load_file(path).items() if not name.startswith("action.")}
        save_file(kept, path)
    for statistics in (None, never):
        with pytest.raises(LeRobotFormatError, match="no statistics for action") as error:
            load_policy(str(folder), data_statistics=statistics)
        assert FLAG not in str(error.value)


def test_what_scales_nothing_asks_for_nothing(tmp_path):
    mapping = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
    for kind in CHUNK_SIZE:
        made = lerobot_policy(kind, normalization_mapping=mapping)
        folder = write_folder(tmp_path / kind, *made)
        expected = chunk(folder)
        without_processors(folder)
        assert torch.equal(chunk(folder, never), expected)


@pytest.mark.parametrize("strip", [without_processors, with_empty_processors])
def test_statistics_that_the_data_cannot_give_are_an_error(tmp_path, strip):
    """No data module counts the 10 % quantile."""
    mapping = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    for kind in CHUNK_SIZE:
        made = lerobot_policy(kind, normalization_mapping=mapping)
        folder = write_folder(tmp_path / kind, *made)
        edit(
            folder / "config.json",
            lambda values: values["normalization_mapping"].update(STATE="QUANTILE10"),
        )
        strip(folder)
        with pytest.raises(LeRobotFormatError, match=r"no statistics for observation.state .QUANT"):
            load_policy(str(folder), data_statistics=Asked())


# What LeRobot's training made of the data set's statistics


def image_scale(folder: Path, data: Callable) -> tuple[list[float], list[float]]:
    normaliser = load_policy(str(folder), data_statistics=data).view.normaliser  # pyright: ignore[reportAttributeAccessIssue]
    image = normaliser.image("image")
    return image.offset.tolist(), image.scale.tolist()


@pytest.mark.parametrize("dataset", [None, {}, {"use_imagenet_stats": False}])
def test_pictures_are_scaled_by_the_data(act, dataset):
    without_processors(act)
    if dataset is not None:
        (act / "train_config.json").write_text(json.dumps({"dataset": dataset}))
    offset, scale = image_scale(act, Asked())
    assert offset == pytest.approx(DATA.images["image"].mean.tolist())
    assert scale == pytest.approx(DATA.images["image"].std.tolist())


def test_pictures_are_scaled_by_imagenet_where_the_training_was(act):
    without_processors(act)
    (act / "train_config.json").write_text(json.dumps({"dataset": {"use_imagenet_stats": True}}))
    offset, scale = image_scale(act, Asked())
    assert offset == pytest.approx(IMAGENET_MEAN)
    assert scale == pytest.approx(IMAGENET_STD)


def make_relative(folder: Path, **settings) -> None:
    step = {
        "registry_name": "relative_actions_processor",
        "config": {"enabled": True, "exclude_joints": [], "action_names": None, **settings},
    }
    back = {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
    edit(folder / "policy_preprocessor.json", lambda values: values["steps"].insert(3, step))
    edit(folder / "policy_postprocessor.json", lambda values: values["steps"].insert(1, back))


@pytest.mark.parametrize("kind", CHUNK_SIZE)
def test_relative_actions_are_scaled_by_relative_statistics(kind, tmp_path):
    """An action is the network's, times the scale of differences, plus the state."""
    folder = write_folder(tmp_path / kind, *lerobot_policy(kind, n_obs_steps=1))
    expected = chunk(folder)
    if kind == "act":
        network = (expected - DATA.action.mean) / DATA.action.std
    else:
        network = 2 * (expected - DATA.action.min) / (DATA.action.max - DATA.action.min) - 1
    with_empty_processors(folder)
    make_relative(folder)
    zero, one = torch.zeros(2), torch.ones(2)
    unit = FeatureStatistics(mean=zero, std=one, min=-one, max=one, q01=-one, q99=one)
    state = episode(3)[2].state
    assert state is not None
    found = chunk(folder, Asked(replace(DATA, relative_action=unit)))
    torch.testing.assert_close(found, network + state[:, None], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="relative to the state"):
        load_policy(str(folder), data_statistics=Asked())


def test_actions_that_are_partly_relative_have_no_statistics_in_the_data(folder):
    with_empty_processors(folder)
    make_relative(folder, exclude_joints=["gripper"], action_names=["x", "gripper"])
    with pytest.raises(LeRobotFormatError, match="in some dimensions only"):
        load_policy(str(folder), data_statistics=never)


# Before LeRobot 0.4


def add_buffers(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Statistics among the weights."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for key, values in STATISTICS.items():
        for name in ("mean", "std"):
            for part in ("normalize_inputs", "normalize_targets", "unnormalize_outputs"):
                if (part == "normalize_inputs") == (key != "action"):
                    buffer = f"{part}.buffer_{key.replace('.', '_')}.{name}"
                    weights[buffer] = change(values[name]).clone()
    save_file(weights, path)


def test_statistics_among_the_weights_are_a_policys_own(act):
    expected = chunk(act)
    without_processors(act)
    add_buffers(act, lambda values: values)
    torch.testing.assert_close(chunk(act, never), expected, rtol=1e-5, atol=1e-3)


def test_infinite_statistics_among_the_weights_are_none(act):
    """LeRobot saved those of a policy that was made without statistics."""
    expected = chunk(act)
    without_processors(act)
    add_buffers(act, lambda values: torch.full_like(values, torch.inf))
    with pytest.raises(LeRobotFormatError, match=FLAG):
        load_policy(str(act))
    torch.testing.assert_close(chunk(act, Asked()), expected, rtol=1e-5, atol=1e-3)


def test_other_policies_of_that_time_are_to_be_converted_first(tmp_path):
    folder = write_folder(tmp_path / "diffusion", *lerobot_policy("diffusion"))
    without_processors(folder)
    add_buffers(folder, lambda values: values)
    for statistics in (None, never):
        with pytest.raises(LeRobotFormatError, match="migrate_policy_normalization"):
            load_policy(str(folder), data_statistics=statistics)
