"""What several commands are given: a device, a task, switches, policies, demonstrations."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datamodules.opening import DataShape, episode_lengths, open_demonstrations
from policies.interface import DataSchema, DataStatistics

if TYPE_CHECKING:
    from envs.task import Task
    from policies.ensembling import ActionQueue, TemporalEnsembler
    from policies.loading import LoadedPolicy

DEFAULT_TASK = "envs.push_t.PushTTask"
"""Of ``--task``."""


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
            f"--task {class_path}: no such class ({error}); built in are "
            "envs.push_t.PushTTask and envs.aloha.AlohaTransferCubeTask"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"--task {class_path}: is no envs.task.Task")
    return found


def task_for(class_path: str, schema: DataSchema) -> "Task | None":
    """Make the task that ``--task`` names; None where it is not what the policy was made for.

    The default is left out silently; of a task that somebody asked for, the reason is printed.

    Raises:
        ValueError: If there is no such task.
    """
    task = task_class(class_path)
    try:
        return task.for_policy(schema)
    except ValueError as error:
        if class_path != DEFAULT_TASK:
            print(f"--task {class_path} is left out: {error}", file=sys.stderr)
        return None


def ensemble_coefficient(
    policy: "LoadedPolicy", temporal_ensemble_coeff: float | None, n_action_steps: int | None
) -> float | None:
    """What was asked for, else what the policy is configured to do; None for a queue."""
    if temporal_ensemble_coeff is not None or n_action_steps is not None:
        return temporal_ensemble_coeff
    return policy.temporal_ensemble_coeff


def controller_for(
    policy: "LoadedPolicy", temporal_ensemble_coeff: float | None, n_action_steps: int | None
) -> "ActionQueue | TemporalEnsembler":
    """Build what turns the policy's chunks into actions.

    Args:
        policy: Does what it is configured to do when nothing is asked for.
        temporal_ensemble_coeff: As given on the command line.
        n_action_steps: As given on the command line.

    Raises:
        ValueError: If both are given, or a queue is longer than the chunk.
    """
    from policies.ensembling import controller_of

    if n_action_steps is not None and temporal_ensemble_coeff is not None:
        raise ValueError(
            "--n_action_steps has no meaning with --temporal_ensemble_coeff, which predicts at "
            "every step: give one of them"
        )
    view = policy.view
    coefficient = ensemble_coefficient(policy, temporal_ensemble_coeff, n_action_steps)
    if n_action_steps is not None and n_action_steps > view.chunk_size:
        raise ValueError(
            f"--n_action_steps {n_action_steps}: the policy predicts chunks of {view.chunk_size}"
        )
    return controller_of(view, n_action_steps, coefficient)


def load_policies(
    policy_paths: Sequence[str],
    dataset_repo_id: str,
    device: str,
    revision: str | None = None,
    stats_from_data: bool = False,
) -> "list[LoadedPolicy]":
    """Load the policies that a command is to look at on a data set.

    Args:
        policy_paths: Checkpoints, run folders, LeRobot folders or hub ids.
        dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id.
        device: As :func:`device` resolved it.
        revision: Branch, tag or commit of a policy's hub id.
        stats_from_data: Scale LeRobot policies that bring no statistics by those of all episodes.

    Raises:
        ValueError: If a policy cannot be loaded, has no statistics, or does not fit the data that
            are to scale it; if all of them bring statistics and ``stats_from_data`` is set.
    """
    from policies.loading import load_policy

    def statistics(schema: DataSchema, chunk_size: int) -> DataStatistics:
        everything = sorted(episode_lengths(dataset_repo_id))
        data = open_demonstrations(dataset_repo_id, DataShape(schema, chunk_size), everything)
        data.setup()
        return data.statistics

    source = statistics if stats_from_data else None
    loaded = [load_policy(path, device, revision, source) for path in policy_paths]
    if stats_from_data and not any(policy.scaled_by_data for policy in loaded):
        raise ValueError(
            f"--stats_from_data has no effect on {', '.join(policy_paths)}: statistics that a "
            "policy brings are never replaced. Leave it out"
        )
    return loaded


def choose_episodes(given: Sequence[int | str] | None, available: Sequence[int]) -> list[int]:
    """Resolve ``--episode_idx``: numbers in the order given, ``all``, or the first when None.

    Args:
        given: Numbers, or the word all alone.
        available: Numbers of the data set's episodes.

    Raises:
        ValueError: If there is no such episode, or something is named twice.
    """
    numbers = sorted(available)
    if not numbers:
        raise ValueError("the data set has no usable episode; look at it with analyze.py inspect")
    if not given:
        return numbers[:1]
    if len(set(given)) < len(given):
        raise ValueError(f"--episode_idx names something twice: {list(given)}")
    if list(given) == ["all"]:
        return numbers
    chosen = [number for number in given if isinstance(number, int)]
    if len(chosen) < len(given):
        raise ValueError(f"--episode_idx {list(given)}: give numbers, or the word all alone")
    if unknown := sorted({*chosen} - {*numbers}):
        raise ValueError(
            f"--episode_idx {unknown}: the data set has {len(numbers)} episodes, "
            f"{numbers[0]} to {numbers[-1]}"
        )
    return chosen
