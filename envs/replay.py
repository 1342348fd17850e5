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


def episode_pictures(
    task: Task | None, batch: Batch, size_px: int
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Draw what each frame looked like, as well as the data allow.

    The simulator in its recorded state, with the demonstrated action, if :func:`can_replay`; else
    what the first camera recorded, brought to the same height.

    Args:
        task: Whose simulator to use; None for recorded pictures.
        batch: Consecutive frames.
        size_px: Height of the pictures; the simulator's are square.

    Raises:
        ValueError: If the simulator cannot draw the frames, and nothing was recorded.
    """
    if can_replay(task, batch):
        assert task is not None
        assert batch.simulator_state is not None
        states = batch.simulator_state.double().cpu().numpy()
        targets = batch.actions[:, 0].double().cpu().numpy()
        return replay(task, states, targets, size_px)
    return _scaled(recorded_pictures(batch.observation), size_px)


def can_replay(task: Task | None, batch: Batch) -> bool:
    """Whether there is a task, and the frames hold states of its simulator."""
    if task is None or batch.simulator_state is None:
        return False
    env = task.make()
    try:
        env.reset(0)
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


def _scaled(
    pictures: Iterator[UInt8[np.ndarray, "height width 3"]], height_px: int
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    import cv2

    for picture in pictures:
        height, width = picture.shape[:2]
        # Enlarged pixels stay pixels: nothing is shown that the camera did not see.
        method = cv2.INTER_AREA if height > height_px else cv2.INTER_NEAREST
        size = round(height_px * width / height), height_px
        yield np.asarray(cv2.resize(picture, size, interpolation=method), np.uint8)
