"""A scripted expert for ALOHA's transfer cube: it knows where the cube is, and plans the rest.

The right arm reaches over the cube, closes its fingers on the near and the far side, and lifts it
to a meeting point between the arms. The left arm waits there with its gripper turned by 90 degrees,
so that its fingers close above and below the cube, where the right one does not hold it.

A plan is a list of poses of each gripper, joined by smooth motion (minimum jerk, and the shortest
turn), and turned into joint angles by damped least squares, each instant from the one before.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from envs.aloha import (
    GRIP_POINT_M,
    JOINTS,
    SIDES,
    AlohaTransferCube,
    compiled_model,
    load_mujoco,
)

if TYPE_CHECKING:
    from numpy.random import Generator

EXPERT_VERSION = 1
"""Raise whenever the same settings would give other actions: caches depend on it."""
PLAN_STEPS = 400
"""Control steps of a plan: the length of an episode in the ACT paper."""
DAMPING = 1e-5
"""Of the least squares, in m^2 or rad^2: joints stay calm where an arm is stretched."""
MAX_ITERATIONS = 100
WRIST_GUESS = ((-0.5, np.pi / 2), (1.0, 0.0))
"""Of each arm, wrist_angle and wrist_rotate in rad from which the first pose is sought. With a
straight wrist two axes fall together, and on the way past it the forearm would have to turn about;
so the way there leads through joint angles, and later ones stay on this side of it."""
MAX_CHANGE = 0.2
"""Of a joint in one iteration, in rad: the arm is linear no further."""
TOLERANCE = 1e-4
"""Of a pose, in m and rad."""


@dataclass(frozen=True)
class AlohaExpertConfig:
    """How the expert plans.

    Raises:
        ValueError: When ``variation`` is not in 0..1.
    """

    variation: float = 0.0
    """Spread of the plans: 0 for the same way of doing it always; at 1 the meeting point moves by
    up to 3 cm, the pitch of the right gripper by up to 10 degrees and each motion's end by up to 10
    steps, all uniformly."""

    def __post_init__(self) -> None:
        if not 0 <= self.variation <= 1:
            raise ValueError(f"variation: {self.variation}; give 0 to 1")


@dataclass(frozen=True)
class Waypoint:
    """Where a gripper is to be at one step."""

    step: int
    position_m: Float[np.ndarray, " 3"]
    """Of the point between the finger pads."""
    quaternion: Float[np.ndarray, " 4"]
    """(w, x, y, z): the fingers point along x and open along y."""
    opening: float
    """0 (closed) to 1 (open)."""


class AlohaExpert:
    """Plans an episode of transfer cube from where the cube is at its start.

    Args:
        config: How it plans.
    """

    def __init__(self, config: AlohaExpertConfig | None = None) -> None:
        self.config = config or AlohaExpertConfig()
        self._kinematics = _Kinematics()

    def plan(self, env: AlohaTransferCube, seed: int) -> Float[np.ndarray, "400 14"]:
        """Foresee all actions of an episode.

        Args:
            env: At the episode's start; it is not moved.
            seed: Of what varies from plan to plan.

        Raises:
            ValueError: When a pose is out of an arm's reach.
        """
        spread = _Spread(np.random.default_rng(seed), self.config.variation)
        cube_m = env.cube_pose()[:3]
        # At the start it hangs above the table; it is gripped when it lies.
        cube_m[2] = 0.02
        joints = env.joints().reshape(len(SIDES), -1)
        plans = (_left_plan, _right_plan)
        meeting_m = np.array([0.0, 0.5, 0.25]) + spread.uniform(0.03, 3)
        actions = np.empty((PLAN_STEPS, len(SIDES), 7))
        for side, (plan, start) in enumerate(zip(plans, joints, strict=True)):
            actions[:, side] = self._joined(side, start, plan(cube_m, meeting_m, spread))
        return actions.reshape(PLAN_STEPS, -1)

    def _joined(
        self, side: int, start: Float[np.ndarray, " 7"], waypoints: list[Waypoint]
    ) -> Float[np.ndarray, "400 7"]:
        """Joint angles and opening at every step, from the present pose through the waypoints."""
        here = waypoints[0]
        guess = start[:6].copy()
        guess[-2:] = WRIST_GUESS[side]
        joints = self._kinematics.solve(side, guess, here.position_m, here.quaternion)
        there = np.array([*joints, here.opening])
        actions = np.empty((PLAN_STEPS, 7))
        for step in range(here.step):
            actions[step] = start + _minimum_jerk((step + 1) / here.step) * (there - start)
        for before, after in pairwise(waypoints):
            for step in range(before.step, after.step):
                share = _minimum_jerk((step + 1 - before.step) / (after.step - before.step))
                position = before.position_m + share * (after.position_m - before.position_m)
                quaternion = _turned(before.quaternion, after.quaternion, share)
                joints = self._kinematics.solve(side, joints, position, quaternion)
                opening = before.opening + share * (after.opening - before.opening)
                actions[step] = [*joints, opening]
        return actions


def _right_plan(
    cube_m: Float[np.ndarray, " 3"], meeting_m: Float[np.ndarray, " 3"], spread: "_Spread"
) -> list[Waypoint]:
    pitch = np.radians(65.0) + spread.uniform(np.radians(10.0), 1)[0]
    # Turned to face the other arm, then downwards.
    grip = _product(_about("z", np.pi), _about("y", pitch))
    above = cube_m + np.array([0.0, 0.0, 0.1])
    hold = cube_m + np.array([0.0, 0.0, 0.004])
    aside = meeting_m + np.array([0.15, 0.0, 0.0])
    return [
        Waypoint(spread.step(80), above, grip, 1.0),
        Waypoint(spread.step(120), hold, grip, 1.0),
        Waypoint(150, hold, grip, 0.0),
        Waypoint(spread.step(230), meeting_m, grip, 0.0),
        Waypoint(315, meeting_m, grip, 0.0),
        Waypoint(335, meeting_m, grip, 1.0),
        Waypoint(375, aside, grip, 1.0),
        Waypoint(PLAN_STEPS, aside, grip, 1.0),
    ]


def _left_plan(
    cube_m: Float[np.ndarray, " 3"], meeting_m: Float[np.ndarray, " 3"], spread: "_Spread"
) -> list[Waypoint]:
    grip = _about("x", np.pi / 2)
    ready = meeting_m + np.array([-0.12, 0.0, 0.0])
    take = meeting_m + np.array([-0.008, 0.0, 0.0])
    aside = meeting_m + np.array([-0.08, 0.0, 0.0])
    return [
        Waypoint(spread.step(120), ready, grip, 1.0),
        Waypoint(245, ready, grip, 1.0),
        Waypoint(spread.step(280), take, grip, 1.0),
        Waypoint(310, take, grip, 0.0),
        Waypoint(345, take, grip, 0.0),
        Waypoint(385, aside, grip, 0.0),
        Waypoint(PLAN_STEPS, aside, grip, 0.0),
    ]


class _Spread:
    """Draws what varies from plan to plan."""

    def __init__(self, generator: "Generator", variation: float) -> None:
        self._generator = generator
        self._variation = variation

    def uniform(self, reach: float, n: int) -> Float[np.ndarray, " n"]:
        return self._variation * self._generator.uniform(-reach, reach, n)

    def step(self, step: int) -> int:
        return step + round(self.uniform(10.0, 1)[0])


class _Kinematics:
    """Poses of the grippers from joint angles, and back."""

    def __init__(self) -> None:
        self._mujoco = load_mujoco()
        self._model = compiled_model()
        self._data = self._mujoco.MjData(self._model)
        self._bodies = [self._model.body(f"vx300s_{side}/gripper_link").id for side in SIDES]
        joints = [[self._model.joint(f"vx300s_{side}/{name}") for name in JOINTS] for side in SIDES]
        self._places = [[joint.qposadr[0] for joint in arm] for arm in joints]
        self._columns = [[joint.dofadr[0] for joint in arm] for arm in joints]
        self._limits = [np.array([joint.range for joint in arm]) for arm in joints]

    def pose(
        self, side: int, joints: Float[np.ndarray, " 6"]
    ) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 4"]]:
        """Position in m of the point between the pads, and the gripper's quaternion."""
        self._data.qpos[self._places[side]] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_comPos(self._model, self._data)
        body = self._bodies[side]
        rotation = self._data.xmat[body].reshape(3, 3)
        position = self._data.xpos[body] + rotation @ np.array(GRIP_POINT_M)
        return position, self._data.xquat[body].copy()

    def solve(
        self,
        side: int,
        joints: Float[np.ndarray, " 6"],
        position_m: Float[np.ndarray, " 3"],
        quaternion: Float[np.ndarray, " 4"],
    ) -> Float[np.ndarray, " 6"]:
        """Joint angles that lead to a pose, near those given.

        Raises:
            ValueError: When there are none.
        """
        columns, limits = self._columns[side], self._limits[side]
        by_position = np.empty((3, self._model.nv))
        by_turning = np.empty((3, self._model.nv))
        turn = np.empty(3)
        difference = np.empty(4)
        inverse = np.empty(4)
        error = np.full(6, np.inf)
        for _ in range(MAX_ITERATIONS):
            at, facing = self.pose(side, joints)
            self._mujoco.mju_negQuat(inverse, facing)
            self._mujoco.mju_mulQuat(difference, quaternion, inverse)
            self._mujoco.mju_quat2Vel(turn, difference, 1.0)
            error = np.concatenate([position_m - at, turn])
            if np.abs(error).max() < TOLERANCE:
                return joints
            self._mujoco.mj_jac(
                self._model, self._data, by_position, by_turning, at, self._bodies[side]
            )
            jacobian = np.concatenate([by_position[:, columns], by_turning[:, columns]])
            squared = jacobian @ jacobian.T + DAMPING * np.eye(6)
            change = jacobian.T @ np.linalg.solve(squared, error)
            change *= min(1.0, MAX_CHANGE / np.abs(change).max())
            joints = np.clip(joints + change, *limits.T)
        raise ValueError(
            f"the {SIDES[side]} gripper cannot be at {position_m.round(3).tolist()} m with the "
            f"quaternion {quaternion.round(3).tolist()}: {np.abs(error).max():.3f} is left"
        )


def _minimum_jerk(share: float) -> float:
    """Share of the way at a share of the time: speed and acceleration begin and end at zero."""
    return share**3 * (10 - 15 * share + 6 * share**2)


def _about(axis: str, angle: float) -> Float[np.ndarray, " 4"]:
    """Quaternion (w, x, y, z) of a turn about an axis."""
    quaternion = np.zeros(4)
    quaternion[0] = np.cos(angle / 2)
    quaternion[1 + "xyz".index(axis)] = np.sin(angle / 2)
    return quaternion


def _product(
    first: Float[np.ndarray, " 4"], second: Float[np.ndarray, " 4"]
) -> Float[np.ndarray, " 4"]:
    product = np.empty(4)
    load_mujoco().mju_mulQuat(product, first, second)
    return product


def _turned(
    start: Float[np.ndarray, " 4"], end: Float[np.ndarray, " 4"], share: float
) -> Float[np.ndarray, " 4"]:
    """Go a share of the shortest turn between two orientations (slerp)."""
    mujoco = load_mujoco()
    velocity, turned = np.empty(3), start.copy()
    mujoco.mju_subQuat(velocity, end, start)
    mujoco.mju_quatIntegrate(turned, velocity, share)
    return turned
