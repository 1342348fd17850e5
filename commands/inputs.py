"""What several commands are given: a device, a task, switches, demonstrations for a policy."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from policies.interface import PolicyView

if TYPE_CHECKING:
    from datamodules.base import DemonstrationDataModule
    from envs.task import Task


def device(name: str) -> str:
    """Resolve ``--device``.

    Raises:
        ValueError: If there is no such device, or not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; give cpu, cuda or auto") from error
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: no CUDA device here; give --device cpu")
    return name


def switch(text: str) -> bool:
    """Parse a flag that is written out, ``--flag true`` or ``--flag false``."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def task_class(class_path: str) -> "type[Task]":
    """Import the class that ``--task`` names.

    Raises:
        ValueError: If there is none, or it is no task.
    """
    from importlib import import_module

    from envs.task import Task

    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--task {class_path}: no such class ({error}); the one that is built in is "
            "envs.push_t.PushTTask"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"--task {class_path}: is no envs.task.Task")
    return found


def open_demonstrations(
    dataset_repo_id: str,
    view: PolicyView,
    episodes: Sequence[int] | None = None,
    progress: bool = True,
) -> "DemonstrationDataModule":
    """Describe a data set as a policy sees it; ``setup()`` then reads the frames.

    Pictures are resized to the policy's size, and batches get its history and chunk length.

    Args:
        dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id.
        view: The policy.
        episodes: Numbers of the episodes to read; all when None.
        progress: Show a bar while frames are read.

    Raises:
        ValueError: If the data lack something that the policy reads, naming it.
    """
    from datamodules import lerobot_files
    from datamodules.hdf5 import HDF5DataModule
    from datamodules.lerobot import LeRobotDataModule

    schema = view.data_schema
    sizes = set(schema.cameras.values())
    arguments = {
        "chunk_size": view.chunk_size,
        "n_obs_steps": view.n_obs_steps,
        "val_fraction": 0.0,
        "episodes": None if episodes is None else sorted(set(episodes)),
        "image_size": next(iter(sizes)) if len(sizes) == 1 else None,
        "progress": progress,
    }
    path = Path(dataset_repo_id).expanduser()
    on_hub = not path.exists() and lerobot_files.is_hub_id(dataset_repo_id)
    if on_hub or (path / lerobot_files.INFO).is_file():
        data = LeRobotDataModule(
            dataset_repo_id if on_hub else str(path),
            camera_names=list(schema.cameras),
            use_environment_state=bool(schema.environment_state_dim),
            **arguments,
        )
    elif path.exists():
        data = HDF5DataModule(str(path), **arguments)
    else:
        raise ValueError(
            f"--dataset_repo_id {dataset_repo_id}: no such file or folder, and no hub id of the "
            "form user/name"
        )
    differences = schema.differences(data.data_schema)
    if differences:
        raise ValueError(
            f"--dataset_repo_id {dataset_repo_id} does not fit the policy: {'; '.join(differences)}"
            " (policy != data)"
        )
    if episodes is not None:
        # What was asked for is read, also what the data set itself keeps from training.
        data.split = {"by": "command", "train": arguments["episodes"], "val": []}
    return data
