"""Any finished policy from a path: our checkpoints and runs, LeRobot folders, hub ids."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch

from policies.act import ACTPolicy
from policies.checkpoint_files import CheckpointError, progress_of, read_checkpoint
from policies.interface import DataSchema, DataStatistics, PolicyView
from policies.lerobot_config import lerobot_statistics
from policies.lerobot_format import (
    CONFIG_FILE,
    Statistics,
    load_lerobot_act,
    read_config,
    trained_on_imagenet_scale,
)

DataStatisticsSource = Callable[[DataSchema, int], DataStatistics]
"""Statistics of a data set as a policy with this schema and this chunk size reads it."""
_POLICY_PREFIX = "policy."


class PolicyNotFoundError(ValueError):
    """A policy path that leads nowhere."""


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy ready to act, and how it was configured to act."""

    view: PolicyView
    source: Path
    """The checkpoint file or LeRobot folder it came from."""
    kind: Literal["policyscope", "lerobot"]
    temporal_ensemble_coeff: float | None = None
    """What the policy's own config asks for; None for its action queue."""
    action_unit: str = "px"
    split: Mapping[str, list[int]] | None = None
    """Episodes of its data set that the run trained on (``train``) and held out (``val``)."""
    scaled_by_data: bool = False
    """Whether it brought no statistics, so that those of a data set scale it."""


def load_policy(
    policy_path: str,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    data_statistics: DataStatisticsSource | None = None,
) -> LoadedPolicy:
    """Load a policy for analysis, in eval mode, scaled by its own statistics.

    Args:
        policy_path: A checkpoint file (``.ckpt``), a run folder (its best
            checkpoint that can be read, else the newest), a LeRobot policy folder (also one
            that holds ``pretrained_model/``), or a hub id ``user/name``.
        device: Where the policy goes.
        revision: Branch, tag or commit of a hub id.
        data_statistics: Asked for statistics only if a LeRobot folder brings none at all.

    Raises:
        PolicyNotFoundError: If the path is none of these; it says what was looked for.
        CheckpointError: If a checkpoint is damaged or not ours.
        LeRobotFormatError: If a LeRobot folder is incomplete or damaged, statistics included.
    """
    path = find_policy(policy_path, revision)
    if path.is_file():
        return _load_checkpoint(path, device)
    config = read_config(path)
    substitute = None if data_statistics is None else _DataScale(path, data_statistics)
    coefficient = None
    if config.get("type", "act") == "act":
        loaded = load_lerobot_act(path, substitute, device)
        view, coefficient = loaded.policy, loaded.temporal_ensemble_coeff
    else:
        from policies.lerobot_view import load_lerobot_policy

        view = load_lerobot_policy(path, device, statistics=substitute)
    is_scaled_by_data = substitute is not None and substitute.was_asked
    return LoadedPolicy(view, path, "lerobot", coefficient, scaled_by_data=is_scaled_by_data)


class _DataScale:
    """A data set's statistics as LeRobot would have scaled a policy by them in training.

    Args:
        folder: Of the policy; what is left of its training settings decides.
        data_statistics: Of the data set.
    """

    def __init__(self, folder: Path, data_statistics: DataStatisticsSource):
        self._folder = folder
        self._data_statistics = data_statistics
        self.was_asked = False

    def __call__(self, schema: DataSchema, chunk_size: int, relative_actions: bool) -> Statistics:
        self.was_asked = True
        images = "imagenet" if trained_on_imagenet_scale(self._folder) else "data"
        found = self._data_statistics(schema, chunk_size)
        if relative_actions:
            if found.relative_action is None:
                raise ValueError(
                    f"{self._folder}: its actions are relative to the state, and those of the data "
                    "set cannot be: states and actions differ in dimensions"
                )
            found = replace(found, action=found.relative_action)
        return lerobot_statistics(found, schema, images)


def find_policy(policy_path: str, revision: str | None = None) -> Path:
    """Resolve a policy path to a checkpoint file or a LeRobot folder.

    Raises:
        PolicyNotFoundError: If nothing is there, naming what was looked for.
    """
    path = Path(policy_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (path, path / "pretrained_model", path / "last" / "pretrained_model"):
            if (folder / CONFIG_FILE).is_file():
                return folder
        checkpoints = [*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt")]
        if checkpoints:
            return _best_readable(checkpoints)
        raise PolicyNotFoundError(
            f"{path}: holds neither {CONFIG_FILE} (a LeRobot policy) nor checkpoints/*.ckpt (a "
            "run of ours). Give the folder that does"
        )
    if policy_path.count("/") != 1 or path.suffix == ".ckpt" or policy_path.startswith((".", "/")):
        raise PolicyNotFoundError(
            f"{policy_path}: no such file or folder, and no hub id of the form user/name"
        )
    return _download(policy_path, revision)


def _best_readable(checkpoints: Sequence[Path]) -> Path:
    """A run's best checkpoint if it ranks them, and of several the one that got farthest.

    Those that cannot be read are passed over with a warning, unless none can.
    """
    files = sorted(
        checkpoints,
        key=lambda file: (file.name.startswith("best"), progress_of(file)),
        reverse=True,
    )
    damaged = []
    for file in files:
        try:
            read_checkpoint(file)
        except CheckpointError as error:
            damaged.append(error)
            continue
        for error in damaged:
            warnings.warn(f"{error}; taking {file.name}", stacklevel=3)
        return file
    return files[0]


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolicyNotFoundError(
            f"{repo_id}: no such local folder, and the hub did not give it ({reason}). Check the "
            "name and the network, or download the folder and give its path"
        ) from error


def _load_checkpoint(path: Path, device: str | torch.device) -> LoadedPolicy:
    checkpoint = read_checkpoint(path)
    arguments = checkpoint.get("hyper_parameters", {})
    coefficient = None
    if "policy_type" in arguments:
        from policies.lerobot_view import lerobot_policy_from_checkpoint

        view, coefficient = lerobot_policy_from_checkpoint(checkpoint, path, device)
    else:
        view = policy_from_checkpoint(checkpoint, path).to(device).eval()
    data = [value for value in checkpoint.values() if isinstance(value, dict) and "split" in value]
    return LoadedPolicy(
        view,
        path,
        "policyscope",
        coefficient,
        arguments.get("action_unit", "px"),
        data[0]["split"] if data else None,
    )


def policy_from_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> ACTPolicy:
    """Rebuild our ACT from a training checkpoint's plain values and weights.

    Raises:
        CheckpointError: If the checkpoint holds another kind of module.
    """
    import inspect

    arguments = checkpoint.get("hyper_parameters", {})
    known = set(inspect.signature(ACTPolicy.__init__).parameters) - {"self"}
    weights = {
        name.removeprefix(_POLICY_PREFIX): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(_POLICY_PREFIX)
    }
    if "kl_weight" not in arguments or not weights:
        raise CheckpointError(
            f"{path}: it holds no ACT policy; give a checkpoint of an ActModule run"
        )
    try:
        policy = ACTPolicy(**{key: value for key, value in arguments.items() if key in known})
        policy.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its weights and its hyper-parameters make no ACT policy "
            f"({type(error).__name__}: {shorten(str(error), 300)}); give a file as train.py "
            "wrote it"
        ) from error
    return policy
