"""A scene in a mirror: the second arm, exact by construction, walls, score and goal included."""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8

from envs.task import EnvironmentObservation, PoseParameter, Scene, Transition
from policies.mirror import Mirror


def mirrored_picture(
    mirror: Mirror, picture: UInt8[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "row column 3"]:
    """Reflect a picture as simulators draw them, to the pixel."""
    channels_first = rearrange(torch.from_numpy(picture), "row column rgb -> rgb row column")
    mirrored = rearrange(mirror.pictures(channels_first), "rgb row column -> row column rgb")
    return mirrored.contiguous().numpy()


class MirroredScene:
    """What is seen of a scene in a mirror, and what is done to it from there.

    The simulator is the original one: states, pictures and keypoints come out mirrored, and actions
    go in mirrored. A simulator of its own for the mirrored world would not be exact: gym-pusht's
    walls are not symmetric (``benchmarks/mirror_replay.py`` measures what comes of it).

    Args:
        scene: The original.
        mirror: Between the original and what is seen.
    """

    def __init__(self, scene: Scene, mirror: Mirror) -> None:
        self.scene = scene
        self.mirror = mirror

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of what can be taken out of the picture."""
        return self.scene.objects

    @property
    def pose_parameters(self) -> tuple[PoseParameter, ...]:
        """What can be moved: numbers of the mirrored state."""
        return self.scene.pose_parameters

    def reset(self, seed: int) -> None:
        """Start the mirror image of the episode that belongs to ``seed``."""
        self.scene.reset(seed)

    def reset_to(self, state: Float[np.ndarray, " simulator"]) -> None:
        """Put the simulator into the mirror image of a state, at rest."""
        self.scene.reset_to(self._state(np.asarray(state, dtype=np.float64)))

    def state(self) -> Float[np.ndarray, " simulator"]:
        """Read the mirror image of the simulator's state, without rendering."""
        return self._state(self.scene.state())

    def observe(self) -> EnvironmentObservation:
        """Look at the scene in the mirror."""
        seen = self.scene.observe()
        return {
            "images": {
                name: mirrored_picture(self.mirror, each) for name, each in seen["images"].items()
            },
            "state": self._vector(seen["state"]),
            "environment_state": self.mirror.environment_state(
                torch.from_numpy(seen["environment_state"])
            ).numpy(),
            "simulator_state": self._state(seen["simulator_state"]),
        }

    def step(self, action: Float[np.ndarray, " action"]) -> Transition:
        """Advance one control step by the mirrored action."""
        # In float32 a mirrored coordinate would lose its last bits.
        return self.scene.step(self._vector(np.asarray(action, np.float64)))

    def frame(
        self, size_px: int, target: Float[np.ndarray, " action"] | None = None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw the mirrored scene for a viewer, with the action in execution."""
        original = None if target is None else self._vector(target)
        return mirrored_picture(self.mirror, self.scene.frame(size_px, original))

    def pictures_without(self, name: str) -> Mapping[str, UInt8[np.ndarray, "_ _ 3"]]:
        """Draw the mirrored state without one object.

        Args:
            name: One of :attr:`objects`.

        Raises:
            ValueError: If there is no such object.
        """
        pictures = self.scene.pictures_without(name)
        return {
            camera: mirrored_picture(self.mirror, picture) for camera, picture in pictures.items()
        }

    def masks(
        self, camera: str, size_px: tuple[int, int], dilation_px: float
    ) -> Mapping[str, Bool[np.ndarray, "height width"]]:
        """Say which pixels of a camera belong to each object.

        Args:
            camera: Its name.
            size_px: Height and width of the masks.
            dilation_px: Reach around each object, in the unit of the scene.

        Raises:
            ValueError: If there is no such camera, or the reach is negative.
        """
        masks = self.scene.masks(camera, size_px, dilation_px)
        return {
            name: self.mirror.pictures(torch.from_numpy(mask)).contiguous().numpy()
            for name, mask in masks.items()
        }

    def close(self) -> None:
        """Free the simulator."""
        self.scene.close()

    def _vector(self, values: Float[np.ndarray, " dim"]) -> Float[np.ndarray, " dim"]:
        return self.mirror.vectors(torch.from_numpy(np.asarray(values))).numpy()

    def _state(self, state: Float[np.ndarray, " simulator"]) -> Float[np.ndarray, " simulator"]:
        return self.mirror.simulator_state(torch.from_numpy(state)).numpy()
