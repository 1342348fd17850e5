"""Draw recorded instants again as they were not: without an object, or with one a little elsewhere.

Nothing is stepped, and a picture shows what a move leads to even where physics would not allow it:
an agent 4 px inside the block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from attention.counterfactuals import PoseMove, SceneVariants
from envs.replay import can_replay
from envs.task import Scene, Task
from policies.interface import Batch, Observation

Pictures = Mapping[str, UInt8[np.ndarray, "_ _ 3"]]
"""Camera name to what it shows at one instant."""


def scene_variants(task: Task, batch: Batch, dilation_px: float = 15.0) -> SceneVariants:
    """Draw every frame again: as it is, without each object, each pose parameter to either side.

    Args:
        task: Whose simulator to use; its environment must be a :class:`Scene`.
        batch: Frames with the simulator's states, as a policy without a history sees them.
        dilation_px: Reach of the masks around the objects, in the unit of the scene (PushT: px on
            the 512 x 512 board, so that 15 px are 2.8 px of a 96 x 96 picture; ALOHA: px of a
            picture 480 px high). The masks are those of the batch's first camera.

    Returns:
        Pictures as ``uint8`` in the cameras and sizes of the batch, on its device.

    Raises:
        ValueError: If the task's environment is no scene, or the frames hold no states of it, have
            no pictures or a history of them, or have cameras that it does not show.
    """
    seen = batch.observation.images
    if batch.simulator_state is None or not can_replay(task, batch):
        raise ValueError(
            f"the frames hold no states of task {task.name}, so it cannot draw them again; give "
            "data with simulator states"
        )
    if not len(batch) or not seen or any(images.ndim != 4 for images in seen.values()):
        shapes = {name: tuple(images.shape) for name, images in seen.items()}
        raise ValueError(f"pictures {shapes}: give frames, with pictures of one instant each")
    camera, first = next(iter(seen.items()))
    size_px = first.shape[-2], first.shape[-1]
    env = task.make()
    try:
        if not isinstance(env, Scene):
            raise ValueError(
                f"task {task.name}: {type(env).__name__} is no Scene, so nothing can be taken out "
                "of its pictures or moved; implement envs.task.Scene"
            )
        as_is: list[Pictures] = []
        without: dict[str, list[Pictures]] = {name: [] for name in env.objects}
        masks: dict[str, list[np.ndarray]] = {name: [] for name in env.objects}
        moved: dict[tuple[str, int], list[Pictures]] = {
            (parameter.name, sign): [] for parameter in env.pose_parameters for sign in (1, -1)
        }
        for state in batch.simulator_state.double().cpu().numpy():
            env.reset_to(state)
            as_is.append(env.observe()["images"])
            _check_cameras(batch.observation, as_is[-1])
            for name, mask in env.masks(camera, size_px, dilation_px).items():
                masks[name].append(mask)
            for name in env.objects:
                without[name].append(env.pictures_without(name))
            for parameter in env.pose_parameters:
                for sign in (1, -1):
                    elsewhere = state.copy()
                    elsewhere[parameter.index] += sign * parameter.step * parameter.per_unit
                    env.reset_to(elsewhere)
                    moved[parameter.name, sign].append(env.observe()["images"])
        return SceneVariants(
            as_is=_shown(batch.observation, as_is),
            without={name: _shown(batch.observation, each) for name, each in without.items()},
            moves=tuple(
                PoseMove(
                    name=parameter.name,
                    unit=parameter.unit,
                    owner=parameter.owner,
                    step=parameter.step,
                    plus=_shown(batch.observation, moved[parameter.name, 1]),
                    minus=_shown(batch.observation, moved[parameter.name, -1]),
                )
                for parameter in env.pose_parameters
            ),
            masks={
                name: torch.from_numpy(np.stack(each)).to(first.device)
                for name, each in masks.items()
            },
        )
    finally:
        env.close()


def _check_cameras(observation: Observation, pictures: Pictures) -> None:
    """What is drawn again must be the pictures of the batch, in their sizes."""
    wanted = {name: tuple(images.shape[-2:]) for name, images in observation.images.items()}
    offered = {name: picture.shape[:2] for name, picture in pictures.items()}
    if any(offered.get(name) != size for name, size in wanted.items()):
        raise ValueError(
            f"the frames' cameras are {wanted} px, the task's {offered}; make the task for the "
            "data, e.g. with their image_size"
        )


def _shown(observation: Observation, pictures: Sequence[Pictures]) -> Observation:
    """The recorded observation with other pictures."""

    def stacked(name: str) -> Tensor:
        drawn = torch.from_numpy(np.stack([each[name] for each in pictures]))
        # Networks compute in the order of memory: equal pictures are to give equal actions.
        return rearrange(drawn, "batch height width rgb -> batch rgb height width").contiguous()

    return replace(
        observation,
        images={
            name: stacked(name).to(images.device) for name, images in observation.images.items()
        },
    )
