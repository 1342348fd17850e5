"""LeRobot's ACT folders, read into our ACT and written from it, without importing LeRobot.

A folder holds ``config.json``, ``model.safetensors`` and two processor pipelines whose statistics
lie in safetensors of their own. Before LeRobot 0.4 the statistics were buffers among the weights;
both layouts are read, the newer one is written.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from policies.act import ACT, ACTPolicy
from policies.atomic_files import write_atomically
from policies.interface import DataSchema
from policies.json_files import read_json
from policies.normalisation import AffineFeature
from policies.safe_paths import inside
from policies.tensor_files import load_tensors, save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"
TRAIN_CONFIG_FILE = "train_config.json"
RELATIVE_STEP = "relative_actions_processor"
"""LeRobot's processor step that subtracts the state from actions."""
MAX_CAMERA_PX = 1 << 13
"""Of a side of a picture; a config that asks for more is damaged."""
LEROBOT_EPS = 1e-8
"""What LeRobot's normaliser adds to a standard deviation before dividing by it."""

Statistics = dict[str, dict[str, Tensor]]
"""LeRobot's feature key to statistic name to values."""
StatisticsSource = Callable[[DataSchema, int, bool], Statistics]
"""What finds statistics for a policy that brings none, given its data schema, its chunk size and
whether its actions are relative to the state; it is called for no other policy."""

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"network\.backbone\.(?P<rest>.+)", r"model.backbone.\g<rest>"),
    (r"network\.image_projection\.(?P<rest>.+)", r"model.encoder_img_feat_input_proj.\g<rest>"),
    (r"network\.latent_projection\.(?P<rest>.+)", r"model.encoder_latent_input_proj.\g<rest>"),
    (r"network\.state_projection\.(?P<rest>.+)", r"model.encoder_robot_state_input_proj.\g<rest>"),
    (
        r"network\.environment_state_projection\.(?P<rest>.+)",
        r"model.encoder_env_state_input_proj.\g<rest>",
    ),
    (r"network\.vector_positions", r"model.encoder_1d_feature_pos_embed.weight"),
    (r"network\.query_positions", r"model.decoder_pos_embed.weight"),
    (r"network\.action_head\.(?P<rest>.+)", r"model.action_head.\g<rest>"),
    (r"network\.posterior\.class_token", r"model.vae_encoder_cls_embed.weight"),
    (
        r"network\.posterior\.state_projection\.(?P<rest>.+)",
        r"model.vae_encoder_robot_state_input_proj.\g<rest>",
    ),
    (
        r"network\.posterior\.action_projection\.(?P<rest>.+)",
        r"model.vae_encoder_action_input_proj.\g<rest>",
    ),
    (
        r"network\.posterior\.latent_head\.(?P<rest>.+)",
        r"model.vae_encoder_latent_output_proj.\g<rest>",
    ),
    (r"network\.posterior\.encoder\.(?P<rest>.+)", r"model.vae_encoder.\g<rest>"),
    (r"network\.(?P<stack>encoder|decoder)\.(?P<rest>.+)", r"model.\g<stack>.\g<rest>"),
)
_LAYER_RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"\.feed_forward\.", "."),
)


def lerobot_name(name: str) -> str:
    """Translate one of our parameter names (of ``ACTPolicy``) into LeRobot's.

    Raises:
        ValueError: If the name has no counterpart.
    """
    for pattern, replacement in _RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            renamed = match.expand(replacement)
            for layer_pattern, layer_replacement in _LAYER_RENAMES:
                renamed = re.sub(layer_pattern, layer_replacement, renamed)
            return renamed
    raise ValueError(f"parameter {name!r} has no counterpart in LeRobot's ACT")


def network_to_lerobot(network: ACT) -> dict[str, Tensor]:
    """Return the network's weights under LeRobot's names (prefix ``model.``)."""
    weights = {
        lerobot_name(f"network.{name}"): value for name, value in network.state_dict().items()
    }
    if network.posterior is not None:
        weights["model.vae_encoder_pos_enc"] = network.posterior.positions[None]
    return weights


def load_lerobot_weights(network: ACT, weights: Mapping[str, Tensor]) -> None:
    """Load LeRobot's ACT weights into our network, strictly.

    LeRobot's own loader is lenient, so that a misnamed tensor stays random there; this one is not.
    Weights of the posterior may be absent as a whole: they play no part in execution.

    Raises:
        ValueError: If a tensor is missing, superfluous, or of another shape; all are named.
    """
    own = network.state_dict()
    expected = {lerobot_name(f"network.{name}"): name for name in own}
    given = {name: value for name, value in weights.items() if name != "model.vae_encoder_pos_enc"}
    posterior_given = any(name.startswith("model.vae_encoder") for name in given)
    problems = [f"unknown tensor {name}" for name in given if name not in expected]
    for theirs, ours in expected.items():
        if theirs not in given:
            if posterior_given or not theirs.startswith("model.vae_encoder"):
                problems.append(f"missing tensor {theirs}")
        elif given[theirs].shape != own[ours].shape:
            shape, expected_shape = tuple(given[theirs].shape), tuple(own[ours].shape)
            problems.append(f"{theirs} has shape {shape}, expected {expected_shape}")
    if problems:
        raise ValueError("the weights do not fit this ACT: " + "; ".join(problems))
    loaded = {expected[name]: value for name, value in given.items()}
    network.load_state_dict(loaded, strict=posterior_given or network.posterior is None)


class LeRobotFormatError(ValueError):
    """A LeRobot folder that cannot be read, or a policy that LeRobot cannot represent."""

    def __init__(self, path: Path | str, problem: str, mend: str):
        super().__init__(f"{path}: {problem}. {mend}")


@dataclass(frozen=True)
class LeRobotACT:
    """A LeRobot ACT folder, read."""

    policy: ACTPolicy
    temporal_ensemble_coeff: float | None
    """The coefficient the policy was configured to act with; None for the action queue."""
    config: dict[str, Any]
    """``config.json`` as it stands in the folder."""


def camera_name(key: str) -> str:
    """Our name of a LeRobot image feature.

    ``observation.images.top`` is ``top`` and ``observation.image`` is ``image``; any other key is
    its own name, so that :func:`image_key` gives every key back.
    """
    if key == "observation.image":
        return "image"
    name = key.removeprefix("observation.images.")
    unambiguous = name != key and name != "image" and not name.startswith("observation.")
    return name if unambiguous else key


def image_key(camera: str) -> str:
    """LeRobot's feature key of a camera, the inverse of :func:`camera_name`."""
    if camera == "image":
        return "observation.image"
    return camera if camera.startswith("observation.") else f"observation.images.{camera}"


def load_lerobot_act(
    folder: Path,
    statistics: Statistics | StatisticsSource | None = None,
    device: str | torch.device = "cpu",
) -> LeRobotACT:
    """Read a LeRobot ACT folder into our ACT, in eval mode.

    Args:
        folder: The folder with ``config.json``.
        statistics: Used only if the folder brings none, as LeRobot feature key to ``mean``, ``std``
            and so on, or what finds them.
        device: Where the policy goes.

    Raises:
        LeRobotFormatError: If a file is missing or damaged, the policy is no ACT, or a feature that
            must be scaled has no statistics; it names the file and the mend.
    """
    config = read_config(folder)
    if config.get("type", "act") != "act":
        raise LeRobotFormatError(
            folder / CONFIG_FILE,
            f"type is {shorten(ascii(config['type']), 80)}, not 'act'",
            "Load it as one of LeRobot's own policies",
        )
    weights = read_weights(folder)
    legacy = {name: value for name, value in weights.items() if name.startswith(_LEGACY_PREFIXES)}
    preprocessor = read_processor(folder / PREPROCESSOR_FILE)
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        _refuse_steps_that_act_lacks(folder / name)
    found = _legacy_statistics(legacy) or _processor_statistics(folder, preprocessor)
    # LeRobot scales as its processors say, whatever config.json says beside them.
    norm_map = _processor_norm_map(preprocessor)
    with as_format_error(folder / PREPROCESSOR_FILE):
        are_relative = has_relative_actions(preprocessor, folder)
    return act_from_lerobot(
        config if norm_map is None else {**config, "normalization_mapping": norm_map},
        {name: value for name, value in weights.items() if name not in legacy},
        found or statistics or {},
        folder,
        relative_actions=are_relative,
        device=device,
    )


def act_from_lerobot(
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    statistics: Statistics | StatisticsSource,
    source: Path,
    relative_actions: bool = False,
    device: str | torch.device = "cpu",
) -> LeRobotACT:
    """Build our ACT from what a LeRobot ACT is made of, in eval mode.

    Args:
        config: LeRobot's configuration, as in ``config.json``.
        weights: LeRobot's weights (prefix ``model.``).
        statistics: LeRobot feature key to statistics, or what finds them.
        source: Folder or checkpoint that these come from, for messages.
        relative_actions: Whether actions are relative to the state.
        device: Where the policy goes.

    Raises:
        LeRobotFormatError: If they do not fit together, or a feature that must be scaled has no
            statistics.
    """
    config_file = source / CONFIG_FILE if source.is_dir() else source
    weights_file = source / WEIGHTS_FILE if source.is_dir() else source
    with as_format_error(config_file):
        inputs, action_dim = _features(config)
        cameras = {
            camera_name(key): [shape[1], shape[2]]
            for key, (kind, shape) in inputs.items()
            if kind == "VISUAL"
        }
        dims = {key: shape[0] for key, (kind, shape) in inputs.items() if kind != "VISUAL"}
        modes = _normalisation_modes(config)
        _check_settings(config, weights)
    if config.get("replace_final_stride_with_dilation"):
        raise LeRobotFormatError(
            config_file,
            "replace_final_stride_with_dilation is true, which ResNet-18 does not support",
            "Export the policy without it",
        )
    try:
        policy = ACTPolicy(
            cameras=cameras,
            state_dim=dims.get("observation.state", 0),
            action_dim=action_dim,
            environment_state_dim=dims.get("observation.environment_state", 0),
            chunk_size=config["chunk_size"],
            n_action_steps=config["n_action_steps"],
            relative_actions=relative_actions,
            use_latent=config.get("use_vae", True),
            latent_dim=config.get("latent_dim", 32),
            dim_model=config.get("dim_model", 512),
            n_heads=config.get("n_heads", 8),
            dim_feedforward=config.get("dim_feedforward", 3200),
            n_encoder_layers=config.get("n_encoder_layers", 4),
            n_decoder_layers=config.get("n_decoder_layers", 1),
            n_posterior_layers=config.get("n_vae_encoder_layers", 4),
            dropout=config.get("dropout", 0.1),
            feedforward_activation=config.get("feedforward_activation", "relu"),
            pre_norm=config.get("pre_norm", False),
            backbone=config.get("vision_backbone", "resnet18"),
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LeRobotFormatError(
            config_file,
            f"cannot build an ACT from it ({type(error).__name__}: {shorten(str(error), 300)})",
            "Check the config",
        ) from error
    try:
        load_lerobot_weights(policy.network, weights)
    except ValueError as error:
        raise LeRobotFormatError(
            weights_file,
            shorten(str(error), 1500),
            "The weights must belong to this config.json",
        ) from error
    if callable(statistics):
        kinds = {"ACTION", *(kind for kind, _ in inputs.values())}
        is_scaled = any(modes[kind] != "IDENTITY" for kind in kinds)
        asked = policy.data_schema, policy.chunk_size, relative_actions
        found = statistics(*asked) if is_scaled else {}
    else:
        found = statistics
    _set_normaliser(policy, found, modes, source)
    return LeRobotACT(
        policy=policy.to(device).eval(),
        temporal_ensemble_coeff=config.get("temporal_ensemble_coeff"),
        config=config,
    )


_SIZES = (
    "chunk_size",
    "n_action_steps",
    "latent_dim",
    "dim_model",
    "n_heads",
    "dim_feedforward",
    "n_encoder_layers",
    "n_decoder_layers",
    "n_vae_encoder_layers",
)
_CHOICES = {
    "use_vae": bool,
    "pre_norm": bool,
    "feedforward_activation": str,
    "vision_backbone": str,
    "dropout": float | int,
    "temporal_ensemble_coeff": float | int | None,
}


def _check_settings(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Compare what a config says with the weights, before anything of its sizes is made.

    Raises:
        ValueError: Naming the first setting that cannot be.
    """
    largest = max((size for value in weights.values() for size in value.shape), default=0)
    for name in _SIZES:
        value = config.get(name, 1)
        if type(value) is not int or not 0 < value <= largest:
            raise ValueError(
                f"{name} is {value!a}, and no axis of the weights is longer than {largest}"
            )
    for name, stack in (
        ("n_encoder_layers", "encoder"),
        ("n_decoder_layers", "decoder"),
        ("n_vae_encoder_layers", "vae_encoder"),
    ):
        found = {
            match[1]
            for key in weights
            if (match := re.match(rf"model\.{stack}\.layers\.(\d+)", key))
        }
        if name in config and found and config[name] != len(found):
            raise ValueError(f"{name} is {config[name]}, and the weights have {len(found)}")
    for name, kind in _CHOICES.items():
        if name in config and not isinstance(config[name], kind):
            raise ValueError(f"{name} is {config[name]!a}")


def export_lerobot_act(
    policy: ACTPolicy,
    folder: Path,
    temporal_ensemble_coeff: float | None = None,
    kl_weight: float = 10.0,
) -> None:
    """Write a folder that LeRobot's ``ACTPolicy.from_pretrained`` and ``lerobot-eval`` run.

    Args:
        policy: What to export.
        folder: Where to; must not exist or be empty.
        temporal_ensemble_coeff: Configure LeRobot to ensemble; None for its action queue.
        kl_weight: Recorded in the config, for training on in LeRobot.

    Raises:
        LeRobotFormatError: If LeRobot's ACT cannot represent the policy, naming each reason.
        FileExistsError: If the folder holds something.
    """
    problems = export_problems(policy, temporal_ensemble_coeff)
    if problems:
        raise LeRobotFormatError(
            folder,
            "LeRobot's ACT cannot represent this policy: " + "; ".join(problems),
            "Train with a config that LeRobot knows, e.g. configs/experiment/act_reference.yaml",
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    network, schema = policy.network, policy.data_schema
    layer = network.encoder.layers[0]
    features: dict[str, dict[str, Any]] = {
        image_key(camera): {"type": "VISUAL", "shape": [3, *size]}
        for camera, size in schema.cameras.items()
    }
    if schema.state_dim:
        features["observation.state"] = {"type": "STATE", "shape": [schema.state_dim]}
    if schema.environment_state_dim:
        features["observation.environment_state"] = {
            "type": "ENV",
            "shape": [schema.environment_state_dim],
        }
    action = {"action": {"type": "ACTION", "shape": [schema.action_dim]}}
    ensembles = temporal_ensemble_coeff is not None
    config = {
        "type": "act",
        "n_obs_steps": 1,
        "input_features": features,
        "output_features": action,
        "device": "cpu",
        "push_to_hub": False,
        "chunk_size": policy.chunk_size,
        "n_action_steps": 1 if ensembles else policy.n_action_steps,
        "normalization_mapping": {kind: "MEAN_STD" for kind in _KINDS},
        "vision_backbone": policy.hyper_parameters["backbone"],
        "pretrained_backbone_weights": None,
        "replace_final_stride_with_dilation": False,
        "pre_norm": layer.pre_norm,
        "dim_model": policy.hyper_parameters["dim_model"],
        "n_heads": policy.hyper_parameters["n_heads"],
        "dim_feedforward": policy.hyper_parameters["dim_feedforward"],
        "feedforward_activation": policy.hyper_parameters["feedforward_activation"],
        "n_encoder_layers": len(network.encoder.layers),
        "n_decoder_layers": len(network.decoder.layers),
        "use_vae": network.posterior is not None,
        "latent_dim": network.latent_dim,
        "n_vae_encoder_layers": policy.hyper_parameters["n_posterior_layers"],
        "temporal_ensemble_coeff": temporal_ensemble_coeff,
        "dropout": policy.hyper_parameters["dropout"],
        "kl_weight": kl_weight,
    }
    _write_json(folder / CONFIG_FILE, config)
    weights = {
        name: value.detach().cpu().float().contiguous()
        for name, value in network_to_lerobot(network).items()
    }
    save_tensors(folder / WEIGHTS_FILE, weights)
    _write_processors(policy, folder, features, action)


def export_problems(policy: ACTPolicy, temporal_ensemble_coeff: float | None = None) -> list[str]:
    """Name everything about a policy that LeRobot's ACT has no place for; empty if it fits."""
    chosen = policy.hyper_parameters
    problems = []
    if not policy.normaliser.is_fitted:
        problems.append("it has no statistics yet")
    if policy.data_schema.cameras:
        if chosen["backbone"] == "small_cnn":
            problems.append("backbone small_cnn (LeRobot has ResNets)")
        else:
            if chosen["backbone_norm"] != "frozen_batch":
                problems.append(f"backbone_norm {chosen['backbone_norm']} (LeRobot: frozen_batch)")
            if chosen["token_stride"] != 32:
                problems.append(f"token_stride {chosen['token_stride']} (LeRobot: 32)")
    queue = temporal_ensemble_coeff is None and policy.n_action_steps > 1
    if policy.relative_actions and queue:
        problems.append(
            f"relative_actions with a queue of n_action_steps={policy.n_action_steps} (LeRobot "
            "adds the newest state, not the chunk's, to queued actions: set n_action_steps to 1)"
        )
    if policy.relative_actions and temporal_ensemble_coeff is not None:
        problems.append(
            "relative_actions with temporal ensembling (LeRobot averages before adding the state)"
        )
    return problems


_KINDS = ("VISUAL", "STATE", "ENV", "ACTION")
_MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10")
_ACT_STEPS = (
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
    RELATIVE_STEP,
    "absolute_actions_processor",
)
_LEGACY_PREFIXES = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a LeRobot policy folder.

    Raises:
        LeRobotFormatError: If it is missing or no JSON object.
    """
    path = _own_file(folder, CONFIG_FILE)
    if not path.is_file():
        raise LeRobotFormatError(
            path,
            "no such file",
            "Give the folder that holds config.json and model.safetensors (.../pretrained_model)",
        )
    return _read_json(path)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read ``model.safetensors`` of a LeRobot policy folder.

    Raises:
        LeRobotFormatError: If the file is missing, damaged or elsewhere.
    """
    return read_safetensors(_own_file(folder, WEIGHTS_FILE))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, with one clear error for a missing or damaged one.

    Raises:
        LeRobotFormatError: If the file is missing or damaged.
    """
    return load_tensors(path, lambda problem: LeRobotFormatError(path, problem, _COPY_AGAIN))


def read_processor(path: Path) -> dict[str, Any] | None:
    """Read a processor pipeline's JSON; None where the folder has none (before LeRobot 0.4).

    A step is known by its name in LeRobot's registry: one that names a class instead would have
    LeRobot import and run whatever the folder's author chose.

    Raises:
        LeRobotFormatError: If it is damaged, a step has no such name, or a step's file lies
            elsewhere.
    """
    if not _own_file(path.parent, path.name).is_file():
        return None
    pipeline = _read_json(path)
    steps = pipeline.setdefault("steps", [])
    if not (isinstance(steps, list) and all(isinstance(step, dict) for step in steps)):
        raise LeRobotFormatError(path, "steps is no list of objects", _COPY_AGAIN)
    for step in steps:
        if not isinstance(step.get("registry_name"), str):
            named = shorten(ascii(step.get("class", step.get("registry_name"))), 120)
            raise LeRobotFormatError(
                path,
                f"a step has no registry_name but names {named}: it would run code that is not "
                "LeRobot's",
                "Run the policy in LeRobot itself, if you trust where it comes from",
            )
        if not isinstance(step.setdefault("config", {}), dict):
            raise LeRobotFormatError(
                path, f"config of {step['registry_name']!a} is no object", _COPY_AGAIN
            )
        if step.get("state_file") is not None:
            state_file(path.parent, step)
    return pipeline


def state_file(folder: Path, step: Mapping[str, Any]) -> Path:
    """The file with a processor step's tensors.

    Raises:
        LeRobotFormatError: If it lies outside the folder.
    """

    def refuse(problem: str) -> LeRobotFormatError:
        return LeRobotFormatError(folder, f"state_file {problem}", "Do not trust this folder")

    return inside(folder, step["state_file"], refuse, _blobs_of(folder))


def _own_file(folder: Path, name: str) -> Path:
    """A file of a policy folder, which is there or not, but is no link to a file elsewhere."""

    def refuse(problem: str) -> LeRobotFormatError:
        return LeRobotFormatError(
            folder, problem, "Put the file itself there, or do not trust this folder"
        )

    return inside(folder, name, refuse, _blobs_of(folder))


def _blobs_of(folder: Path) -> Path | None:
    """Where the hub's cache keeps what the files of ``snapshots/<revision>/...`` link to."""
    resolved = folder.resolve()
    for revision in (resolved, *resolved.parents):
        if revision.parent.name == "snapshots":
            return revision.parents[1] / "blobs"
    return None


def _refuse_steps_that_act_lacks(path: Path) -> None:
    """Refuse a pipeline that does more to pictures, states or actions than our ACT does.

    Raises:
        LeRobotFormatError: Naming the step.
    """
    for step in (read_processor(path) or {"steps": []})["steps"]:
        if step["registry_name"] not in _ACT_STEPS:
            raise LeRobotFormatError(
                path,
                f"step {shorten(ascii(step['registry_name']), 80)} is none that our ACT can do: "
                "its actions would not be LeRobot's",
                "Run the policy in LeRobot itself",
            )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, lambda problem: LeRobotFormatError(path, problem, _COPY_AGAIN))


_COPY_AGAIN = "Copy or download it again"


@contextmanager
def as_format_error(path: Path) -> Iterator[None]:
    """Turn what goes wrong with values of a wrong kind into one clear error.

    Raises:
        LeRobotFormatError: In place of any of them.
    """
    try:
        yield
    except LeRobotFormatError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise LeRobotFormatError(
            path,
            f"a value is missing or of a wrong kind ({type(e).__name__}: {shorten(str(e), 300)})",
            "Check the file, or copy it again",
        ) from e


def _features(config: dict[str, Any]) -> tuple[dict[str, tuple[str, list[int]]], int]:
    """Input feature key to (kind, shape), and the action's dimensions; newer and older configs.

    Raises:
        ValueError, KeyError, ...: If they are missing or malformed.
    """
    kinds = {"observation.state": "STATE", "observation.environment_state": "ENV"}
    if "input_features" in config:
        inputs = {
            key: (value["type"], value["shape"]) for key, value in config["input_features"].items()
        }
        outputs = {key: value["shape"] for key, value in config["output_features"].items()}
    else:
        inputs = {
            key: (kinds.get(key, "VISUAL"), shape) for key, shape in config["input_shapes"].items()
        }
        outputs = config["output_shapes"]
    for key, (kind, shape) in {**inputs, "action": ("ACTION", outputs["action"])}.items():
        n_axes, most = (3, MAX_CAMERA_PX) if kind == "VISUAL" else (1, 1 << 16)
        sizes = [size for size in shape if type(size) is int and 0 < size <= most]
        if kind not in _KINDS or len(shape) != n_axes or len(sizes) != n_axes:
            raise ValueError(f"{key} is of type {kind!a} and shape {shape!a}")
    return inputs, outputs["action"][0]


def _processor_norm_map(preprocessor: dict[str, Any] | None) -> dict[str, str] | None:
    for step in [] if preprocessor is None else preprocessor["steps"]:
        if step["registry_name"] == "normalizer_processor":
            return step["config"].get("norm_map")
    return None


def _normalisation_modes(config: dict[str, Any]) -> dict[str, str]:
    modes = _chosen_modes(config)
    for kind, mode in modes.items():
        if mode not in _MODES:
            raise ValueError(f"{kind} is scaled by {mode!a}, LeRobot's modes are {list(_MODES)}")
    return modes


def _chosen_modes(config: dict[str, Any]) -> dict[str, str]:
    mapping = config.get("normalization_mapping")
    if mapping is None:  # before LeRobot 0.2: one mode per feature
        modes = {
            **config.get("input_normalization_modes", {}),
            **config.get("output_normalization_modes", {}),
        }
        if not modes:
            return dict.fromkeys(_KINDS, "MEAN_STD")  # the default of LeRobot's ACT
        kinds = {"observation.state": "STATE", "observation.environment_state": "ENV"}
        mapping = {
            "ACTION" if key == "action" else kinds.get(key, "VISUAL"): mode.upper()
            for key, mode in modes.items()
        }
    return {kind: mapping.get(kind, "IDENTITY") for kind in _KINDS}


def has_relative_actions(preprocessor: dict[str, Any] | None, folder: Path) -> bool:
    """Whether a policy's actions are relative to the state.

    Args:
        preprocessor: Its pipeline of observations, as in the JSON file.
        folder: For messages.

    Raises:
        LeRobotFormatError: If some dimensions are and others are not.
    """
    for step in [] if preprocessor is None else preprocessor["steps"]:
        if step["registry_name"] != RELATIVE_STEP:
            continue
        settings = step["config"]
        excluded = settings.get("exclude_joints") if settings.get("action_names") else None
        if settings.get("enabled") and excluded:
            raise LeRobotFormatError(
                folder / PREPROCESSOR_FILE,
                f"actions are relative to the state in some dimensions only (not in {excluded})",
                "Run this policy in LeRobot itself",
            )
        return bool(settings.get("enabled", False))
    return False


def _legacy_statistics(weights: Mapping[str, Tensor]) -> Statistics:
    """``normalize_inputs.buffer_observation_state.mean`` and its like, by feature key."""
    statistics: Statistics = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(?:\w+)\.buffer_(?P<feature>\w+)\.(?P<statistic>\w+)", name)
        # LeRobot left them infinite in a policy that was made without statistics.
        if match and value.isfinite().all():
            statistics.setdefault(match["feature"], {})[match["statistic"]] = value
    return statistics


def _processor_statistics(folder: Path, preprocessor: dict[str, Any] | None) -> Statistics:
    statistics: Statistics = {}
    postprocessor = read_processor(folder / POSTPROCESSOR_FILE)
    for pipeline in (preprocessor, postprocessor):
        for step in [] if pipeline is None else pipeline["steps"]:
            if step.get("state_file") is None or "normalizer" not in step["registry_name"]:
                continue
            for name, value in read_safetensors(state_file(folder, step)).items():
                key, _, statistic = name.rpartition(".")
                # Inputs are scaled by the first pipeline, actions scaled back by the second.
                if pipeline is preprocessor or key == "action":
                    statistics.setdefault(_flat(key), {})[statistic] = value
    return statistics


def _flat(key: str) -> str:
    return key.replace(".", "_")


def _affine(mode: str, values: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """LeRobot's scaling as (offset, scale); raises KeyError where a statistic is missing."""
    if mode == "MEAN_STD":
        return values["mean"].flatten(), values["std"].flatten() + eps
    low, high = {
        "MIN_MAX": ("min", "max"),
        "QUANTILES": ("q01", "q99"),
        "QUANTILE10": ("q10", "q90"),
    }[mode]
    lower, upper = values[low].flatten(), values[high].flatten()
    half = (upper - lower) / 2
    # LeRobot maps an input that never changed to -1, and an action that never changed to itself.
    constant = half == 0
    offset = torch.where(constant, lower + 1 if eps else lower, lower + half)
    return offset, torch.where(constant, torch.ones_like(half) if eps else half + LEROBOT_EPS, half)


def _set_normaliser(
    policy: ACTPolicy, statistics: Statistics, modes: dict[str, str], folder: Path
) -> None:
    flat = {_flat(key): value for key, value in statistics.items()}
    normaliser = policy.normaliser
    features: list[tuple[str, str, AffineFeature, float]] = [
        (image_key(camera), "VISUAL", normaliser.image(camera), LEROBOT_EPS)
        for camera in policy.data_schema.cameras
    ]
    if normaliser.state is not None:
        features.append(("observation.state", "STATE", normaliser.state, LEROBOT_EPS))
    if normaliser.environment_state is not None:
        features.append(
            ("observation.environment_state", "ENV", normaliser.environment_state, LEROBOT_EPS)
        )
    features.append(("action", "ACTION", normaliser.action, 0.0))
    missing = []
    for key, kind, feature, eps in features:
        if modes[kind] == "IDENTITY":
            feature.set(torch.zeros_like(feature.offset), torch.ones_like(feature.scale))
            continue
        try:
            offset, scale = _affine(modes[kind], flat[_flat(key)], eps)
        except KeyError:
            missing.append(f"{key} ({modes[kind]})")
            continue
        try:
            feature.set(offset.float(), scale.float())
        except ValueError as error:
            raise LeRobotFormatError(
                folder, f"{key}: {error}", "The statistics must belong to this config.json"
            ) from error
    if missing:
        raise no_statistics(folder, missing, statistics)


def no_statistics(
    source: Path, missing: Sequence[str], statistics: Statistics
) -> LeRobotFormatError:
    """What to say of a policy that cannot be scaled.

    Args:
        source: Folder or checkpoint.
        missing: Features without statistics.
        statistics: What there is.
    """
    mend = "Restore the processor files"
    if not statistics:
        mend += (
            ", or scale by the data set that the policy was trained on: --stats_from_data, in "
            "commands that take --dataset_repo_id"
        )
    return LeRobotFormatError(
        source,
        f"no statistics for {', '.join(missing)}; LeRobot would pass them through unscaled",
        mend,
    )


def trained_on_imagenet_scale(folder: Path) -> bool:
    """Whether ``lerobot-train`` put ImageNet's moments in place of the pictures' own.

    It does by default, also without pretrained weights, and says so in ``train_config.json``, which
    ``save_pretrained`` alone does not write.

    Raises:
        LeRobotFormatError: If that file is damaged.
    """
    path = _own_file(folder, TRAIN_CONFIG_FILE)
    if not path.is_file():
        return False
    dataset = _read_json(path).get("dataset")
    return isinstance(dataset, dict) and bool(dataset.get("use_imagenet_stats", False))


def _write_processors(
    policy: ACTPolicy,
    folder: Path,
    features: dict[str, dict[str, Any]],
    action: dict[str, dict[str, Any]],
) -> None:
    normaliser = policy.normaliser
    norm_map = {kind: "MEAN_STD" for kind in _KINDS}
    statistics: dict[str, Tensor] = {}

    def add(key: str, feature: AffineFeature, shape: tuple[int, ...]) -> None:
        statistics[f"{key}.mean"] = feature.offset.detach().cpu().float().reshape(shape)
        statistics[f"{key}.std"] = feature.scale.detach().cpu().float().reshape(shape)

    for camera in policy.data_schema.cameras:
        add(image_key(camera), normaliser.image(camera), (3, 1, 1))
    if normaliser.state is not None:
        add("observation.state", normaliser.state, (-1,))
    if normaliser.environment_state is not None:
        add("observation.environment_state", normaliser.environment_state, (-1,))
    add("action", normaliser.action, (-1,))
    statistics = {name: value.contiguous() for name, value in statistics.items()}

    normaliser_state = "policy_preprocessor_normalizer.safetensors"
    unnormaliser_state = "policy_postprocessor_unnormalizer.safetensors"
    save_tensors(folder / normaliser_state, statistics)
    save_tensors(folder / unnormaliser_state, statistics)
    relative = {
        "registry_name": RELATIVE_STEP,
        "config": {"enabled": True, "exclude_joints": [], "action_names": None},
    }
    absolute = {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}

    def scaling(name: str, scaled: dict[str, Any], state_file: str) -> dict[str, Any]:
        return {
            "registry_name": name,
            "config": {"eps": LEROBOT_EPS, "features": scaled, "norm_map": norm_map},
            "state_file": state_file,
        }

    preprocessor = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        device,
        *([relative] if policy.relative_actions else []),
        scaling("normalizer_processor", {**features, **action}, normaliser_state),
    ]
    postprocessor = [
        scaling("unnormalizer_processor", action, unnormaliser_state),
        *([absolute] if policy.relative_actions else []),
        device,
    ]
    _write_json(folder / PREPROCESSOR_FILE, {"name": "policy_preprocessor", "steps": preprocessor})
    _write_json(
        folder / POSTPROCESSOR_FILE, {"name": "policy_postprocessor", "steps": postprocessor}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")
