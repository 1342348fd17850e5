"""LeRobot's policy configurations, built from plain values and from the data they are made for.

LeRobot is imported inside the functions: it takes seconds, and most of this project works without.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from policies.interface import DataSchema, DataStatistics, FeatureStatistics
from policies.lerobot_format import LeRobotFormatError, Statistics, camera_name, image_key
from policies.normalisation import STD_FLOOR

if TYPE_CHECKING:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy

ImageStatistics = Literal["data", "imagenet", "symmetric"]
STATE_KEY = "observation.state"
ENVIRONMENT_STATE_KEY = "observation.environment_state"

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_WINDOW_FIELDS = ("chunk_size", "horizon")
_STATISTICS_OF_MODE = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "IDENTITY": (),
}
_WITHOUT_CHUNKS = {
    "gaussian_actor": "it is for reinforcement learning",
    "lingbot_va": "it remembers the episode",
    "multi_task_dit": "it reads its own queue of observations",
    "tdmpc": "it plans on from its own last plan",
}


@dataclass(frozen=True)
class DataNeeds:
    """How samples must be cut for a policy; the names are the data modules' arguments."""

    n_obs_steps: int
    """Steps of observation history."""
    chunk_size: int
    """Steps of the demonstrated action window."""
    action_start: int
    """First step of that window relative to the observed one."""
    drop_n_last_frames: int
    """Frames at the end of an episode that start no training sample."""

    def require(self, datamodule: object, policy_type: str) -> None:
        """Check the settings of a data module.

        Raises:
            ValueError: If they differ; it names the values to set.
        """
        wrong = {
            field.name: (getattr(self, field.name), getattr(datamodule, field.name))
            for field in fields(self)
            if getattr(datamodule, field.name) != getattr(self, field.name)
        }
        if wrong:
            found = ", ".join(f"{name} {need} (it is {has})" for name, (need, has) in wrong.items())
            flags = " ".join(f"--data.init_args.{name} {need}" for name, (need, _) in wrong.items())
            raise ValueError(
                f"LeRobot's {policy_type} as configured needs samples cut differently: {found}. "
                f"Set {flags}, or change model.init_args.policy_config"
            )


def build_config(
    policy_type: str,
    policy_config: Mapping[str, Any],
    schema: DataSchema,
    chunk_size: int,
) -> "PreTrainedConfig":
    """Build one of LeRobot's configurations for a data set.

    What ``policy_config`` leaves open is LeRobot's default, but for three things: the action window
    is as long as the data's, ``n_action_steps`` is cut to what fits in it, and nothing is
    downloaded (``pretrained_backbone_weights`` is null).

    Args:
        policy_type: LeRobot's name of the policy, e.g. ``diffusion``.
        policy_config: Fields of the policy's configuration, as plain values.
        schema: The data the policy is made for.
        chunk_size: Steps of the action window that the data module gives.

    Raises:
        ValueError: If the type or a field is unknown, or LeRobot refuses a value.
    """
    import draccus

    config_class = _config_class(policy_type)
    known = {field.name: field for field in fields(config_class)}
    for name in policy_config:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ValueError(
                f"policy_config.{name} is no field of LeRobot's {config_class.__name__}{hint}"
            )
    values: dict[str, Any] = {"device": "cpu", "push_to_hub": False, **policy_config}
    values["input_features"] = _input_features(schema)
    values["output_features"] = {"action": {"type": "ACTION", "shape": [schema.action_dim]}}
    if "pretrained_backbone_weights" in known:
        values.setdefault("pretrained_backbone_weights", None)
    window = next((name for name in _WINDOW_FIELDS if name in known), None)
    try:
        if window is not None:
            values.setdefault(window, chunk_size)
            if "n_action_steps" in known:
                n_obs_steps = values.get("n_obs_steps", known["n_obs_steps"].default)
                usable = values[window] - (n_obs_steps - 1 if window == "horizon" else 0)
                values.setdefault("n_action_steps", min(known["n_action_steps"].default, usable))
        return draccus.decode(config_class, values)
    except _decoding_errors() as error:
        raise ValueError(
            f"LeRobot refuses policy_config of {policy_type}: {error.__cause__ or error}"
        ) from error


def build_policy(config: "PreTrainedConfig") -> "PreTrainedPolicy":
    """Build a policy with random weights.

    Raises:
        ValueError: If packages are missing, naming LeRobot's extra, or LeRobot refuses the config.
    """
    with extras_explained(f"policy type {config.type!r}", config.type):
        from lerobot.policies.factory import get_policy_class

        return get_policy_class(config.type)(config=config)


def config_to_dict(config: "PreTrainedConfig") -> dict[str, Any]:
    """The configuration as ``config.json`` holds it: plain values only."""
    import draccus
    from lerobot.configs import PreTrainedConfig

    return json.loads(json.dumps(draccus.encode(config, PreTrainedConfig)))


def config_from_dict(values: Mapping[str, Any], source: Path) -> "PreTrainedConfig":
    """Read what ``config.json`` holds.

    The image encoder's weights come with the policy's, so none are downloaded for it first.

    Raises:
        LeRobotFormatError: If the type is unknown, or LeRobot refuses a field.
    """
    import draccus

    fields_given = {name: value for name, value in values.items() if name != "type"}
    try:
        config_class = _config_class(str(values.get("type")))
        # Its default may name some.
        if any(field.name == "pretrained_backbone_weights" for field in fields(config_class)):
            fields_given["pretrained_backbone_weights"] = None
        fields_given["device"] = "cpu"
        return draccus.decode(config_class, fields_given)
    except _decoding_errors() as error:
        raise LeRobotFormatError(
            source,
            f"LeRobot refuses this policy config: {error.__cause__ or error}",
            "Check the config, or install the version of LeRobot that wrote it",
        ) from error


def data_needs(config: "PreTrainedConfig") -> DataNeeds:
    """How samples must be cut for a policy, from LeRobot's own ``delta_indices``.

    Raises:
        ValueError: If the policy needs more than demonstrations hold.
    """
    refuse_without_chunks(config)
    n_obs_steps = config.n_obs_steps
    observed = config.observation_delta_indices
    actions = config.action_delta_indices
    start = actions[0] if actions else 0
    if observed not in (None, list(range(1 - n_obs_steps, 1))) or not (
        actions and list(actions) == list(range(start, start + len(actions)))
    ):
        raise ValueError(
            f"LeRobot's {config.type} asks for observations at {observed} and actions at "
            f"{actions} relative to now; samples hold past observations and one action window"
        )
    return DataNeeds(
        n_obs_steps=n_obs_steps,
        chunk_size=len(actions),
        action_start=start,
        drop_n_last_frames=getattr(config, "drop_n_last_frames", 0),
    )


def refuse_without_chunks(config: "PreTrainedConfig") -> None:
    """Refuse policies that cannot answer an observation by itself.

    Raises:
        ValueError: If the policy has no chunk that depends on the observation alone.
    """
    if config.type in _WITHOUT_CHUNKS:
        raise ValueError(
            f"LeRobot's {config.type} does not predict action chunks from an observation "
            f"({_WITHOUT_CHUNKS[config.type]}); use diffusion, act, vqbet or another imitation "
            "policy"
        )


def schema_of(config: "PreTrainedConfig") -> DataSchema:
    """The data a policy was made for."""
    state, environment = config.robot_state_feature, config.env_state_feature
    assert config.action_feature is not None
    return DataSchema(
        cameras={
            camera_name(key): (int(feature.shape[1]), int(feature.shape[2]))
            for key, feature in config.image_features.items()
        },
        state_dim=0 if state is None else int(state.shape[0]),
        action_dim=int(config.action_feature.shape[0]),
        environment_state_dim=0 if environment is None else int(environment.shape[0]),
    )


def lerobot_statistics(
    statistics: DataStatistics, schema: DataSchema, images: ImageStatistics
) -> Statistics:
    """Statistics of a training split under LeRobot's keys.

    Dimensions that (almost) never move get a scale of :data:`~policies.normalisation.STD_FLOOR`.

    Args:
        statistics: Of the training split.
        schema: The features to describe.
        images: How pictures are scaled: by the ``data``, by ``imagenet``'s moments, or
            ``symmetric`` to -1..1.

    Raises:
        ValueError: If a feature has no statistics.
    """
    described: Statistics = {}
    for camera in schema.cameras:
        if camera not in statistics.images:
            raise ValueError(
                f"no statistics for camera {camera!r}; the data has {list(statistics.images)}"
            )
        values = _described(statistics.images[camera])
        if images != "data":
            mean, std = _IMAGENET if images == "imagenet" else _SYMMETRIC
            values |= {"mean": torch.tensor(mean), "std": torch.tensor(std)}
        described[image_key(camera)] = {
            name: value.reshape(3, 1, 1) for name, value in values.items()
        }
    for key, dim, feature in (
        (STATE_KEY, schema.state_dim, statistics.state),
        (ENVIRONMENT_STATE_KEY, schema.environment_state_dim, statistics.environment_state),
        ("action", schema.action_dim, statistics.action),
    ):
        if not dim:
            continue
        if feature is None:
            raise ValueError(f"the policy reads {key}, but the data has none")
        described[key] = _described(feature)
    return described


def missing_statistics(config: "PreTrainedConfig", statistics: Statistics) -> list[str]:
    """Name features that must be scaled but have no statistics; LeRobot would pass them through."""
    modes = {
        str(getattr(kind, "value", kind)): mode.value
        for kind, mode in getattr(config, "normalization_mapping", {}).items()
    }
    missing = []
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        mode = modes.get(feature.type.value, "IDENTITY")
        given = statistics.get(key, {})
        absent = [name for name in _STATISTICS_OF_MODE[mode] if name not in given]
        if absent:
            missing.append(f"{key} ({mode} needs {' and '.join(absent)})")
    return missing


@contextlib.contextmanager
def extras_explained(source: Path | str, policy_type: str) -> Iterator[None]:
    """Turn an import that fails inside LeRobot into what to install.

    Raises:
        LeRobotFormatError: In place of the ImportError.
    """
    try:
        yield
    except ImportError as error:
        named = re.search(r"lerobot\[([\w-]+)\]", str(error))
        extra = named[1] if named else policy_type
        missing = str(error).split(". Install it")[0]
        raise LeRobotFormatError(
            source,
            f"LeRobot's {policy_type} needs packages that are not installed ({missing})",
            f"Install them: pip install 'lerobot[{extra}]'",
        ) from error


def _config_class(policy_type: str) -> "type[PreTrainedConfig]":
    import lerobot.policies  # noqa: F401  (registers the configurations)
    from lerobot.configs import PreTrainedConfig

    known = sorted(PreTrainedConfig.get_known_choices())
    if policy_type not in known:
        raise ValueError(f"policy type {policy_type!r} is unknown to LeRobot; it has {known}")
    return PreTrainedConfig.get_choice_class(policy_type)


def _decoding_errors() -> tuple[type[Exception], ...]:
    from draccus.utils import ParsingError

    return ValueError, TypeError, ParsingError


def _input_features(schema: DataSchema) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        image_key(camera): {"type": "VISUAL", "shape": [3, *size]}
        for camera, size in schema.cameras.items()
    }
    if schema.state_dim:
        features[STATE_KEY] = {"type": "STATE", "shape": [schema.state_dim]}
    if schema.environment_state_dim:
        features[ENVIRONMENT_STATE_KEY] = {"type": "ENV", "shape": [schema.environment_state_dim]}
    return features


def _described(feature: FeatureStatistics) -> dict[str, Tensor]:
    values = {
        "mean": feature.mean,
        "std": feature.std.clamp_min(STD_FLOOR),
        "min": feature.min,
        "max": feature.max,
        "q01": feature.q01,
        "q99": feature.q99,
    }
    for low, high in (("min", "max"), ("q01", "q99")):
        still = values[high] - values[low] < 2 * STD_FLOOR
        centre = (values[high] + values[low]) / 2
        values[low] = torch.where(still, centre - STD_FLOOR, values[low])
        values[high] = torch.where(still, centre + STD_FLOOR, values[high])
    return {name: value.float() for name, value in values.items()}
