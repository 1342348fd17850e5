"""Mirror images of a planar task: what an observation, an action and a policy become in a mirror.

A mirror is its own inverse, so one function serves both ways. It maps a point p of the plane that
the camera looks down on to ``M p + t``, with M a reflection:

==============  ===========================  ============================  ====================
mirror          point                        angle of a symmetric object   picture
==============  ===========================  ============================  ====================
XFlip           (extent - x, y)              -angle                        columns reversed
AntiDiagonal    (extent - y, extent - x)     pi / 2 - angle                anti-transposed
==============  ===========================  ============================  ====================
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor

from policies.interface import Batch, Observation, PolicyView, SamplingPolicyView, WrappedPolicy


@dataclass(frozen=True)
class Mirror(ABC):
    """A reflection of a square board seen from above.

    State, actions and environment state are points (x, y), one after the other, in the frame of the
    pictures: x to the right, y downwards, both from 0 to ``extent``.

    Raises:
        ValueError: If ``extent`` is not positive and finite, or ``point_order`` not its own
            inverse.
    """

    extent: float = 512.0
    """Width and height of the board, in the unit of the data (PushT: px)."""
    point_order: tuple[int, ...] = ()
    """Places of the environment state's points after the reflection: keypoints of a symmetric
    object exchange their names. Empty where they keep them."""
    angle_columns: tuple[int, ...] = ()
    """Columns of the simulator's state, all behind its points, that are angles in rad of objects
    symmetric about their own y axis."""

    def __post_init__(self) -> None:
        if not 0 < self.extent < math.inf:
            raise ValueError(
                f"extent is {self.extent}: give the width of the board, above 0 and finite"
            )
        order = self.point_order
        n_points = len(order)
        if any(not 0 <= at < n_points or order[at] != place for place, at in enumerate(order)):
            raise ValueError(
                f"point_order is {order}: points exchange places in pairs or keep them; give each "
                f"of 0 to {n_points - 1} once, and where i has j, let j have i"
            )

    @abstractmethod
    def points(self, points: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """Reflect points of the board."""

    @abstractmethod
    def angles(self, angles: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Reflect angles in rad; the result lies in 0..2 pi."""

    @abstractmethod
    def pictures(
        self, pictures: Num[Tensor, "*batch height width"]
    ) -> Num[Tensor, "*batch row column"]:
        """Reflect pictures, to the pixel."""

    def vectors(self, values: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Reflect rows of coordinates (x, y, x, y, ...): states and actions.

        Raises:
            ValueError: If a row has an odd number of them.
        """
        if values.shape[-1] % 2:
            raise ValueError(
                f"{values.shape[-1]} numbers are no points (x, y): {type(self).__name__} mirrors "
                "tasks whose states and actions are points of the board"
            )
        points = rearrange(values, "... (point coordinate) -> ... point coordinate", coordinate=2)
        return rearrange(self.points(points), "... point coordinate -> ... (point coordinate)")

    def environment_state(self, values: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Reflect keypoints, and put them where the mirrored object has them.

        Raises:
            ValueError: If there are not as many points as ``point_order`` names.
        """
        if not self.point_order:
            return self.vectors(values)
        if values.shape[-1] != 2 * len(self.point_order):
            raise ValueError(
                f"the environment state has {values.shape[-1]} numbers, and point_order names "
                f"{len(self.point_order)} points of 2"
            )
        points = rearrange(values, "... (point coordinate) -> ... point coordinate", coordinate=2)
        points = points[..., list(self.point_order), :]
        return rearrange(self.points(points), "... point coordinate -> ... (point coordinate)")

    def simulator_state(self, states: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Reflect states of the simulator: points, then angles."""
        n_angles = len(self.angle_columns)
        n_coordinates = states.shape[-1] - n_angles
        if self.angle_columns != tuple(range(n_coordinates, states.shape[-1])):
            raise ValueError(
                f"angle_columns {self.angle_columns} are not the last of {states.shape[-1]}"
            )
        coordinates, angles = states.split([n_coordinates, n_angles], dim=-1)
        return torch.cat([self.vectors(coordinates), self.angles(angles)], dim=-1)

    def observation(self, observation: Observation) -> Observation:
        """Reflect all that a policy sees.

        Raises:
            ValueError: If a state is no row of points.
        """
        state, environment_state = observation.state, observation.environment_state
        return Observation(
            images={name: self.pictures(each) for name, each in observation.images.items()},
            state=None if state is None else self.vectors(state),
            environment_state=None
            if environment_state is None
            else self.environment_state(environment_state),
        )

    def batch(self, batch: Batch) -> Batch:
        """Reflect demonstrated frames: observations, actions and simulator states."""
        states = batch.simulator_state
        return replace(
            batch,
            observation=self.observation(batch.observation),
            actions=self.vectors(batch.actions),
            simulator_state=None if states is None else self.simulator_state(states),
        )


@dataclass(frozen=True)
class XFlip(Mirror):
    """Left and right exchanged: (x, y) to (extent - x, y)."""

    def points(self, points: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """Reflect points of the board."""
        x, y = points.unbind(-1)
        return torch.stack([self.extent - x, y], dim=-1)

    def angles(self, angles: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Reflect angles in rad; the result lies in 0..2 pi."""
        return (-angles) % (2 * math.pi)

    def pictures(
        self, pictures: Num[Tensor, "*batch height width"]
    ) -> Num[Tensor, "*batch row column"]:
        """Reverse the columns."""
        return pictures.flip(-1)


@dataclass(frozen=True)
class AntiDiagonal(Mirror):
    """Reflected at the line from the lower left to the upper right of the board.

    (x, y) to (extent - y, extent - x): PushT's goal lies on that line and stays where it is.
    """

    def points(self, points: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """Reflect points of the board."""
        return self.extent - points.flip(-1)

    def angles(self, angles: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Reflect angles in rad; the result lies in 0..2 pi."""
        return (math.pi / 2 - angles) % (2 * math.pi)

    def pictures(
        self, pictures: Num[Tensor, "*batch height width"]
    ) -> Num[Tensor, "*batch row column"]:
        """Exchange rows and columns, both from the other end.

        Raises:
            ValueError: If pictures are not square.
        """
        height, width = pictures.shape[-2:]
        if height != width:
            raise ValueError(
                f"pictures of {height} x {width} px: only square ones have an anti-diagonal"
            )
        return pictures.flip(-2, -1).transpose(-2, -1)


class MirroredPolicy(WrappedPolicy):
    """A policy that sees its world in a mirror, and whose actions come back out of it.

    Args:
        view: Made for the world on the other side of the mirror.
        mirror: Between this world and the policy's own.
    """

    def __init__(self, view: PolicyView, mirror: Mirror) -> None:
        super().__init__(view)
        self.mirror = mirror

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units, as the policy within does for the mirrored observation.

        Args:
            observation: What is seen on this side, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        answer = self.view.predict_chunk(self.mirror.observation(observation), queries)
        return self.mirror.vectors(answer)

    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Draw action chunks in data units, as the policy within does.

        Args:
            observation: What is seen on this side, on the policy's device.
            n_samples: Chunks per observation.
            seed: Of the random numbers.
            queries: Chunk steps to return; all when None.

        Raises:
            TypeError: If the policy within draws no chunks.
        """
        if not isinstance(self.view, SamplingPolicyView):
            raise TypeError(f"{type(self.view).__name__} draws no action chunks")
        reflected = self.mirror.observation(observation)
        return self.mirror.vectors(self.view.sample_chunks(reflected, n_samples, seed, queries))
