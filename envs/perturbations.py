"""Pictures as they were not: another light, a hidden object, a camera that was knocked, noise.

States and actions stay. Most perturbations need the pictures alone and so also work while a policy
acts (:class:`PerturbedPolicy`); hiding an object takes the simulator's states.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional as F

from envs.replay import can_replay
from envs.task import Scene, Task
from policies.interface import Batch, Observation, PolicyView, WrappedPolicy

Pictures = Float[Tensor, "picture 3 height width"]
"""In 0..1."""


class Perturbation(ABC):
    """A change of what a policy sees."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables: what is done, and how much of it."""

    @abstractmethod
    def apply(self, batch: Batch) -> Batch:
        """Change the pictures of recorded frames, and nothing else."""


class PicturePerturbation(Perturbation):
    """A change that needs nothing but the pictures; a picture's own, whatever is in its batch."""

    @abstractmethod
    def pictures(self, pictures: Pictures) -> Pictures:
        """Change pictures in 0..1; values beyond are clipped by the caller."""

    def observe(self, observation: Observation) -> Observation:
        """Change what a policy is shown, in every camera and at every instant of a history."""

        def change(images: Num[Tensor, "batch *obs_step 3 height width"]) -> Tensor:
            is_bytes = images.dtype == torch.uint8
            in_unit = images.float() / 255 if is_bytes else images
            changed = self.pictures(in_unit.flatten(0, -4)).clamp(0, 1)
            if is_bytes:
                changed = (changed * 255).round()
            return changed.to(images.dtype).view(images.shape)

        images = {name: change(images) for name, images in observation.images.items()}
        return replace(observation, images=images)

    def apply(self, batch: Batch) -> Batch:
        """Change the pictures of recorded frames, and nothing else."""
        return replace(batch, observation=self.observe(batch.observation))


@dataclass(frozen=True)
class Lighting(PicturePerturbation):
    """``picture * gain * colour + offset``, in 0..1."""

    gain: float = 1.0
    """Below 1 it is darker."""
    offset: float = 0.0
    """Of every channel, in 0..1: above 0 there is haze."""
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Gain of red, green and blue."""

    @property
    def name(self) -> str:
        """E.g. ``light x 0.5 + 0.1``."""
        tint = "" if self.colour == (1.0, 1.0, 1.0) else f" rgb {self.colour}"
        return f"light x {self.gain:g} + {self.offset:g}{tint}"

    def pictures(self, pictures: Pictures) -> Pictures:
        """Change gain and offset."""
        gain = self.gain * pictures.new_tensor(self.colour)
        return pictures * gain[:, None, None] + self.offset


@dataclass(frozen=True)
class Noise(PicturePerturbation):
    """Gaussian noise, independent for each pixel and channel.

    Its seed is the picture itself, so that a picture is always disturbed alike.

    Raises:
        ValueError: If ``std`` is negative.
    """

    std: float
    """In 0..1."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.std < 0:
            raise ValueError(f"std is {self.std}; it must not be negative")

    @property
    def name(self) -> str:
        """E.g. ``noise 0.1``."""
        return f"noise {self.std:g}"

    def pictures(self, pictures: Pictures) -> Pictures:
        """Add noise."""
        noise = torch.empty(pictures.shape, dtype=torch.float32)
        for picture, drawn in zip(pictures.detach().cpu(), noise, strict=True):
            seed = zlib.crc32(picture.contiguous().numpy().tobytes(), self.seed)
            torch.randn(drawn.shape, generator=torch.Generator().manual_seed(seed), out=drawn)
        return pictures + self.std * noise.to(pictures)


@dataclass(frozen=True)
class ShiftedCamera(PicturePerturbation):
    """The camera was knocked: pictures are turned about their middle, then shifted.

    Pixels from beyond the edge repeat the edge.
    """

    right_px: float = 0.0
    """Shift of what is seen, in px of the picture."""
    down_px: float = 0.0
    rotation_deg: float = 0.0
    """Clockwise turn of what is seen."""

    @property
    def name(self) -> str:
        """E.g. ``camera +3 +0 px, 5 deg``."""
        return f"camera {self.right_px:+g} {self.down_px:+g} px, {self.rotation_deg:g} deg"

    def pictures(self, pictures: Pictures) -> Pictures:
        """Turn and shift, with bilinear interpolation; whole pixels are exact."""
        height, width = pictures.shape[-2:]
        dtype = torch.float64
        # Centres of pixels, in px from the middle of the picture; y points downwards, where a turn
        # by a positive angle is clockwise.
        y = torch.arange(height, dtype=dtype) - (height - 1) / 2 - self.down_px
        x = torch.arange(width, dtype=dtype) - (width - 1) / 2 - self.right_px
        y, x = torch.meshgrid(y, x, indexing="ij")
        angle = np.deg2rad(self.rotation_deg)
        cosine, sine = float(np.cos(angle)), float(np.sin(angle))
        source_x = cosine * x + sine * y
        source_y = cosine * y - sine * x
        grid = torch.stack([2 * source_x / width, 2 * source_y / height], dim=-1)
        return F.grid_sample(
            pictures,
            grid.to(pictures).expand(len(pictures), -1, -1, -1),
            padding_mode="border",
            align_corners=False,
        )


@dataclass(frozen=True)
class OccludedObject(Perturbation):
    """An object is gone, or a grey patch lies over it.

    Raises:
        ValueError: If ``grey`` is not in 0..1.
    """

    task: Task
    """Whose simulator draws the frames; its environment must be a :class:`Scene`."""
    object_name: str = "block"
    mode: Literal["removed", "patch"] = "removed"
    dilation_px: float = 15.0
    """Reach of the patch around the object, in the unit of the scene."""
    grey: float = 0.5
    """Of the patch, in 0..1."""

    def __post_init__(self) -> None:
        if not 0 <= self.grey <= 1:
            raise ValueError(f"grey is {self.grey}; it must lie in 0..1")

    @property
    def name(self) -> str:
        """E.g. ``block removed``."""
        return f"{self.object_name} {'removed' if self.mode == 'removed' else 'under a patch'}"

    def apply(self, batch: Batch) -> Batch:
        """Hide the object in every frame.

        Raises:
            ValueError: If the task's environment is no scene or has no such object, or the frames
                hold no states of it or show a history.
        """
        seen = batch.observation.images
        if batch.simulator_state is None or not can_replay(self.task, batch):
            raise ValueError(
                f"the frames hold no states of task {self.task.name}, so nobody knows where the "
                f"{self.object_name} is; give data with simulator states"
            )
        if any(images.ndim != 4 for images in seen.values()):
            raise ValueError("the frames show a history: give frames with pictures of one instant")
        env = self.task.make()
        try:
            if not isinstance(env, Scene):
                raise ValueError(
                    f"task {self.task.name}: {type(env).__name__} is no Scene, so nothing can be "
                    "hidden; implement envs.task.Scene"
                )
            if self.object_name not in env.objects:
                raise ValueError(
                    f"object {self.object_name!r}: task {self.task.name} has {list(env.objects)}"
                )
            changed = {name: images.clone() for name, images in seen.items()}
            for row, state in enumerate(batch.simulator_state.double().cpu().numpy()):
                env.reset_to(state)
                for camera, images in changed.items():
                    images[row] = self._hidden(env, camera, images[row])
        finally:
            env.close()
        return replace(batch, observation=replace(batch.observation, images=changed))

    def _hidden(
        self, env: Scene, camera: str, picture: Num[Tensor, "3 height width"]
    ) -> Num[Tensor, "3 height width"]:
        is_bytes = picture.dtype == torch.uint8
        height, width = picture.shape[-2:]
        if self.mode == "patch":
            mask = env.masks(camera, (height, width), self.dilation_px)[self.object_name]
            value = round(self.grey * 255) if is_bytes else self.grey
            return picture.masked_fill(torch.from_numpy(mask).to(picture.device), value)
        drawn = torch.from_numpy(env.pictures_without(self.object_name)[camera])
        if tuple(drawn.shape[:2]) != (height, width):
            raise ValueError(
                f"camera {camera!r} is {(height, width)} px in the frames and "
                f"{tuple(drawn.shape[:2])} px in the task; make the task for the data, e.g. with "
                "their image_size"
            )
        drawn = rearrange(drawn, "height width rgb -> rgb height width").to(picture.device)
        return drawn if is_bytes else (drawn.float() / 255).to(picture.dtype)


class PerturbedPolicy(WrappedPolicy):
    """A policy that sees the world perturbed, while it acts.

    Args:
        view: The policy.
        perturbation: What happens to everything it is shown.
    """

    def __init__(self, view: PolicyView, perturbation: PicturePerturbation) -> None:
        super().__init__(view)
        self.perturbation = perturbation

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict from the perturbed observation.

        Args:
            observation: What there is to see, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        return self.view.predict_chunk(self.perturbation.observe(observation), queries)
