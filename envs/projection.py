"""Where actions lead in what cameras saw: the environment put into each recorded state, and asked.

For any task whose environment implements :class:`~envs.task.ActionProjection`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from envs.replay import can_replay
from envs.task import ActionProjection, Task
from policies.interface import Batch


@dataclass(frozen=True)
class ProjectedActions:
    """Actions of some frames as places in the pictures of their cameras."""

    end_effectors: tuple[str, ...]
    """Names of what actions move."""
    px: Mapping[str, Mapping[str, Float[np.ndarray, "frame *rest end_effector 2"]]]
    """Camera name, then name of the actions, to x and y in px; NaN behind the camera."""


def can_project(task: Task | None) -> bool:
    """Whether there is a task whose environment knows where in a picture actions lead."""
    if task is None:
        return False
    env = task.make()
    try:
        return isinstance(env, ActionProjection)
    finally:
        env.close()


def project_along(
    task: Task,
    batch: Batch,
    actions: Mapping[str, Float[np.ndarray, "frame *rest action"]],
    sizes_px: Mapping[str, tuple[int, int]],
) -> ProjectedActions:
    """Find where actions of some frames lead.

    Without recorded states, cameras stand where an episode begins: right for those that do not
    move.

    Args:
        task: One with :func:`can_project`.
        batch: The frames.
        actions: By any names, data units; one row for each frame.
        sizes_px: Camera name to height and width of its picture.

    Raises:
        ValueError: If the environment has no such camera, or cannot project.
    """
    env = task.make()
    try:
        if not isinstance(env, ActionProjection):
            raise ValueError(
                f"task {task.name}: {type(env).__name__} does not say where actions lead; "
                "implement envs.task.ActionProjection"
            )
        states = None
        if batch.simulator_state is not None and can_replay(task, batch):
            states = batch.simulator_state.double().cpu().numpy()
        env.reset(0)
        found: dict[str, dict[str, list[np.ndarray]]] = {
            camera: {name: [] for name in actions} for camera in sizes_px
        }
        for frame in range(len(batch)):
            if states is not None:
                env.reset_to(states[frame])
            for camera, size_px in sizes_px.items():
                for name, values in actions.items():
                    here = env.project_actions(camera, values[frame], size_px)
                    found[camera][name].append(here)
        px = {
            camera: {name: np.stack(each) for name, each in parts.items()}
            for camera, parts in found.items()
        }
        return ProjectedActions(tuple(env.end_effectors), px)
    finally:
        env.close()
