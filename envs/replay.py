"""Draw a demonstration again: the simulator put into each recorded state, or what was recorded.

Nothing is stepped: an open-loop replay would drift away from what the policy saw.
"""

from collections.abc import Iterator

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from envs.task import Task
from policies.interface import Batch, Observation


def replay(
    task: Task,
    simulator_states: Float[np.ndarray, "frame simulator"],
    targets: Float[np.ndarray, "frame action"],
    size_px: int,
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Draw recorded states, each with the action whose turn it is.

    Args:
        task: Whose simulator to use.
        simulator_states: As the simulator gave them.
        targets: One action per state.
        size_px: Height and width of the pictures.

    Raises:
        ValueError: If the states are not the task's.
    """
    env = task.make()
    try:
        for state, target in zip(simulator_states, targets, strict=True):
            env.reset_to(state)
            yield env.frame(size_px, target)
    finally:
        env.close()


def can_replay(task: Task, batch: Batch) -> bool:
    """Whether the frames hold states of this task's simulator."""
    if batch.simulator_state is None:
        return False
    env = task.make()
    try:
        return batch.simulator_state.shape[-1] == len(env.state())
    finally:
        env.close()


def recorded_pictures(
    observation: Observation, camera: str | None = None
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Yield what one camera saw, the newest picture where there is a history.

    Args:
        observation: Of consecutive frames.
        camera: Name; the first camera when None.

    Raises:
        ValueError: If there is no such camera.
    """
    if not observation.images or (camera is not None and camera not in observation.images):
        raise ValueError(f"camera {camera!r}: the data have {list(observation.images)}")
    images = observation.images[camera or next(iter(observation.images))]
    newest = images if images.ndim == 4 else images[:, -1]
    for picture in newest:
        values = rearrange(picture, "rgb height width -> height width rgb").cpu().numpy()
        if values.dtype != np.uint8:
            values = np.rint(values * 255).clip(0, 255).astype(np.uint8)
        yield np.ascontiguousarray(values)
