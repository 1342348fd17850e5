"""ALOHA's transfer cube: one arm picks a cube up and hands it to the other (gym-aloha 0.1.5).

The model, the start, the physics, the reward and the pictures are gym-aloha's own (Zhao et al.
2023). gym-aloha draws three pictures of 480 x 640 at every step; this file draws when somebody
looks, and only what is looked at, adds an exact state reset, and knows where an action leads.

Frames: the *world* has its origin on the table, x rightwards as seen from the top camera, y away
from the operator, z upwards, in m. Actions and states are rad, and 0 (closed) to 1 (open) for the
grippers.
"""

import atexit
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from envs.task import ActionDimension, EnvironmentObservation, PoseParameter, Task, Transition

if TYPE_CHECKING:
    from mujoco import Renderer
    from mujoco._structs import MjModel

    from policies.interface import DataSchema

SIDES = ("left", "right")
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
"""Of one arm, from the base to the gripper; in a state and an action the gripper follows."""
CAMERAS = ("top", "angle", "front_close", "left_wrist", "right_wrist")
"""gym-aloha names front_close ``vis`` in its observations."""
SUBSTEPS = 10
"""Physics steps of 2 ms in a control step."""
MAX_REWARD = 4
"""1: the right gripper touches the cube, 2: lifts it, 3: the left one touches it, 4: holds it."""
GRIP_POINT_M = (0.135, 0.0, 0.0)
"""Between the finger pads, in the frame of a gripper, whose x axis points along the fingers."""
FULL_HEIGHT_PX = 480
"""Of the pictures that the benchmark shows."""
FULL_SHADOW_PX = 4096
"""Side of the shadow map that belongs to them."""
CUBE_QPOS = slice(16, 23)
"""Position in m and quaternion of the cube among MuJoCo's positions."""
HIDDEN_GROUP = 5
"""Of geoms that MuJoCo does not draw unless asked to."""
MARKS = ((64, 200, 255), (255, 120, 220))
"""Colours of the crosses on what an action aims at, left and right: those of landscapes over
pictures."""

_open_renderers: "WeakSet[Renderer]" = WeakSet()


@cache
def load_mujoco() -> ModuleType:
    """Import MuJoCo on first use, set up to draw without a screen where there is none.

    Raises:
        ValueError: When gym-aloha or the graphics library is missing.
    """
    has_screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform == "linux" and not has_screen and "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import gym_aloha  # noqa: F401
        import mujoco
    except ImportError as error:
        raise ValueError(
            f"ALOHA needs gym-aloha ({error}); install it with: uv sync --extra aloha"
        ) from error
    # PyOpenGL fails with the first where a library is not there, MuJoCo with the second where
    # MUJOCO_GL is no way to draw.
    except (AttributeError, RuntimeError) as error:
        raise ValueError(_no_graphics(error)) from error
    return mujoco


def _no_graphics(error: Exception) -> str:
    return (
        f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({error}); install "
        "libegl1, libgl1 and libgl1-mesa-dri (Debian's names) and set MUJOCO_GL=egl, or glfw on a "
        "machine with a screen"
    )


@cache
def compiled_model() -> "MjModel":
    """The benchmark's model; every environment takes a copy."""
    mujoco = load_mujoco()
    from gym_aloha.constants import ASSETS_DIR

    return mujoco.MjModel.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))


@cache
def _close_at_exit() -> None:
    """Free graphics contexts that nobody closed, while their library is still at work.

    Exit functions run in reverse: call this once the library has registered its own.
    """

    def close() -> None:
        for renderer in list(_open_renderers):
            renderer.close()

    atexit.register(close)


def joint_targets(action: Float[np.ndarray, " 14"]) -> Float[np.ndarray, " 16"]:
    """What gym-aloha's motors are told: per arm six joints in rad and both fingers in m.

    Args:
        action: Per arm six joints in rad and the gripper, 0 (closed) to 1 (open).
    """
    from gym_aloha.constants import unnormalize_puppet_gripper_position

    targets = []
    for arm in np.split(np.asarray(action, np.float64), 2):
        finger = unnormalize_puppet_gripper_position(arm[6])
        targets += [*arm[:6], finger, -finger]
    return np.array(targets)


class AlohaTransferCube:
    """One table with two arms and a cube.

    Args:
        cameras: Which of :data:`CAMERAS` are observed.
        image_size: Height and width of the observed pictures, in px.

    Raises:
        ValueError: When there is no such camera, a size is not positive, or gym-aloha is missing.
    """

    objects = ("cube", "left_arm", "right_arm")
    end_effectors = SIDES
    pose_parameters = (
        PoseParameter("cube_x", "cube", 16, "mm", 10.0, per_unit=0.001),
        PoseParameter("cube_y", "cube", 17, "mm", 10.0, per_unit=0.001),
        PoseParameter("left_waist", "left_arm", 0, "deg", 2.0, per_unit=np.pi / 180),
        PoseParameter("right_waist", "right_arm", 8, "deg", 2.0, per_unit=np.pi / 180),
    )

    def __init__(
        self,
        cameras: tuple[str, ...] = ("top",),
        image_size: tuple[int, int] = (FULL_HEIGHT_PX, 640),
    ) -> None:
        _check_look(cameras, image_size)
        mujoco = load_mujoco()
        import copy

        self.cameras = cameras
        self.image_size = image_size
        self._model = copy.copy(compiled_model())
        self._data = mujoco.MjData(self._model)
        self._imagined = mujoco.MjData(self._model)
        self._renderers: dict[tuple[int, int], Renderer] = {}
        # Positions, velocities and the solver's first guess decide all that follows; forces from
        # outside are zero, and each step brings its own control.
        self._spec = int(
            mujoco.mjtState.mjSTATE_QPOS
            | mujoco.mjtState.mjSTATE_QVEL
            | mujoco.mjtState.mjSTATE_WARMSTART
        )
        geom = {self._model.geom(index).name: index for index in range(self._model.ngeom)}
        self._cube = geom["red_box"]
        self._table = geom["table"]
        self._fingers = [geom[f"vx300s_{side}/10_{side}_gripper_finger"] for side in SIDES]
        self._geoms: dict[str, np.ndarray] = {
            "cube": np.array([self._cube]),
            **{
                f"{side}_arm": np.array(
                    [index for name, index in geom.items() if name.startswith(f"vx300s_{side}/")]
                )
                for side in SIDES
            },
        }
        self._grippers = [self._model.body(f"vx300s_{side}/gripper_link").id for side in SIDES]
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Put the cube where gym-aloha puts it for ``seed``, and the arms at rest above it."""
        mujoco = load_mujoco()
        from gym_aloha.constants import START_ARM_POSE
        from gym_aloha.utils import sample_box_pose

        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:16] = START_ARM_POSE
        self._data.ctrl[:] = START_ARM_POSE
        self._data.qpos[CUBE_QPOS] = sample_box_pose(seed)
        # dm_control finds the contacts of a start with the motors off.
        actuation = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
        self._model.opt.disableflags |= actuation
        mujoco.mj_forward(self._model, self._data)
        self._model.opt.disableflags &= ~actuation

    def reset_to(self, state: Float[np.ndarray, " 67"]) -> None:
        """Put arms and cube exactly where ``state`` says, with their velocities.

        A rollout goes on from here as it did, to the bit.

        Args:
            state: Positions (23: per arm six joints in rad and two fingers in m, then position in m
                and quaternion of the cube), velocities (22) and the solver's first guess (22).

        Raises:
            ValueError: When ``state`` is not 67 finite numbers.
        """
        mujoco = load_mujoco()
        values = np.asarray(state, dtype=np.float64)
        n_numbers = mujoco.mj_stateSize(self._model, self._spec)
        if values.shape != (n_numbers,) or not np.isfinite(values).all():
            raise ValueError(f"state: {state!r}; give {n_numbers} finite numbers, as state() does")
        mujoco.mj_resetData(self._model, self._data)
        mujoco.mj_setState(self._model, self._data, values, self._spec)
        mujoco.mj_step1(self._model, self._data)

    def state(self) -> Float[np.ndarray, " 67"]:
        """Positions, velocities and the solver's first guess, as :meth:`reset_to` takes them."""
        mujoco = load_mujoco()
        state = np.empty(mujoco.mj_stateSize(self._model, self._spec))
        mujoco.mj_getState(self._model, self._data, state, self._spec)
        return state

    def joints(self) -> Float[np.ndarray, " 14"]:
        """Per arm six joints in rad and the gripper, 0 (closed) to 1 (open)."""
        from gym_aloha.constants import normalize_puppet_gripper_position

        left, right = self._data.qpos[:8], self._data.qpos[8:16]
        return np.concatenate(
            [[*arm[:6], normalize_puppet_gripper_position(arm[6])] for arm in (left, right)]
        )

    def joint_velocities(self) -> Float[np.ndarray, " 14"]:
        """Per arm six joints in rad/s and the gripper in 1/s."""
        from gym_aloha.constants import normalize_puppet_gripper_velocity

        left, right = self._data.qvel[:8], self._data.qvel[8:16]
        return np.concatenate(
            [[*arm[:6], normalize_puppet_gripper_velocity(arm[6])] for arm in (left, right)]
        )

    def cube_pose(self) -> Float[np.ndarray, " 7"]:
        """Position in m and quaternion (w, x, y, z) of the cube."""
        return self._data.qpos[CUBE_QPOS].copy()

    def reward(self) -> int:
        """The benchmark's reward at this instant, 0 to :data:`MAX_REWARD`."""
        touching = {tuple(pair) for pair in self._data.contact.geom.tolist()}
        left, right = ((self._cube, finger) in touching for finger in self._fingers)
        lifted = (self._cube, self._table) not in touching
        if left:
            return 4 if lifted else 3
        if right:
            return 2 if lifted else 1
        return 0

    def observe(self) -> EnvironmentObservation:
        """Draw what the cameras see and read the joints; the environment's state is the cube's."""
        return {
            "images": {name: self.image(name) for name in self.cameras},
            "state": self.joints().astype(np.float32),
            "environment_state": self.cube_pose().astype(np.float32),
            "simulator_state": self.state(),
        }

    def step(self, action: Float[np.ndarray, " 14"]) -> Transition:
        """Move the joints towards ``action`` for 0.02 s.

        Args:
            action: Per arm six joints in rad and the gripper, 0 (closed) to 1 (open); the motors
                stop at their limits.

        Raises:
            ValueError: When the action is not 14 finite numbers.
        """
        mujoco = load_mujoco()
        if np.shape(action) != (14,) or not np.isfinite(action).all():
            raise ValueError(f"action: {action!r}; give 14 finite numbers")
        self._data.ctrl[:] = joint_targets(action)
        # As dm_control does: what follows from the positions is up to date before and after.
        mujoco.mj_step2(self._model, self._data)
        mujoco.mj_step(self._model, self._data, nstep=SUBSTEPS - 1)
        mujoco.mj_step1(self._model, self._data)
        reward = self.reward()
        return Transition(reward / MAX_REWARD, float(reward), reward == MAX_REWARD)

    def image(
        self, camera: str, size_px: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw what a camera sees; at 480 x 640 as gym-aloha does, to the pixel.

        Args:
            camera: One of :data:`CAMERAS`.
            size_px: Height and width; the observed size when None.

        Raises:
            ValueError: When there is no such camera, or nothing can be drawn on this machine.
        """
        _check_camera(camera)
        renderer = self._renderer(size_px or self.image_size)
        renderer.disable_segmentation_rendering()
        renderer.update_scene(self._data, camera)
        return renderer.render()

    def frame(
        self, size_px: int, target: Float[np.ndarray, " 14"] | None = None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw the top camera, or else the first, with a cross where each gripper is sent.

        The left gripper's is blue, the right one's pink.

        Args:
            size_px: Height of the picture, in px.
            target: The action in execution.
        """
        import cv2

        camera = "top" if "top" in self.cameras else self.cameras[0]
        height, width = self.image_size
        size = size_px, round(size_px * width / height)
        picture = self.image(camera, size)
        if target is not None:
            places = self.project_actions(camera, target, size)
            for (x, y), mark in zip(places, MARKS, strict=True):
                if 0 <= x < size[1] and 0 <= y < size[0]:
                    cv2.drawMarker(
                        picture,
                        (int(x), int(y)),
                        mark,
                        cv2.MARKER_CROSS,
                        max(size_px // 24, 3),
                        max(size_px // 240, 1),
                    )
        return picture

    def grip_points(
        self, actions: Float[np.ndarray, "*batch 14"]
    ) -> Float[np.ndarray, "*batch side 3"]:
        """Find where the finger pads would be, had the joints reached their targets.

        Args:
            actions: As for :meth:`step`.

        Returns:
            x, y and z in m, left before right.
        """
        mujoco = load_mujoco()
        data = self._imagined
        points = np.empty((*actions.shape[:-1], len(SIDES), 3))
        for index in np.ndindex(actions.shape[:-1]):
            data.qpos[:16] = joint_targets(actions[index])
            mujoco.mj_kinematics(self._model, data)
            for side, body in enumerate(self._grippers):
                points[(*index, side)] = data.xpos[body] + data.xmat[body].reshape(3, 3) @ np.array(
                    GRIP_POINT_M
                )
        return points

    def project_actions(
        self, camera: str, actions: Float[np.ndarray, "*batch 14"], size_px: tuple[int, int]
    ) -> Float[np.ndarray, "*batch side 2"]:
        """Find where the finger pads would be in a picture, had the joints reached their targets.

        The camera stands where it stands now, also one that an arm carries.

        Args:
            camera: One of :data:`CAMERAS`.
            actions: As for :meth:`step`.
            size_px: Height and width of the picture.

        Raises:
            ValueError: If there is no such camera.
        """
        _check_camera(camera)
        return self.project(camera, self.grip_points(actions), size_px)

    def project(
        self, camera: str, points_m: Float[np.ndarray, "*batch 3"], size_px: tuple[int, int]
    ) -> Float[np.ndarray, "*batch 2"]:
        """Find where points of the world are in a picture.

        Args:
            camera: One of :data:`CAMERAS`.
            points_m: x, y and z.
            size_px: Height and width of the picture.

        Returns:
            x and y in px from the upper left corner; NaN behind the camera.

        Raises:
            ValueError: If there is no such camera.
        """
        _check_camera(camera)
        height, width = size_px
        index = self._model.camera(camera).id
        # A camera of MuJoCo looks along its -z axis, with y upwards.
        rotation = self._data.cam_xmat[index].reshape(3, 3)
        x, y, z = np.moveaxis((points_m - self._data.cam_xpos[index]) @ rotation, -1, 0)
        focal_px = height / 2 / math.tan(math.radians(self._model.cam_fovy[index]) / 2)
        depth = np.where(z < 0, -z, np.nan)
        return np.stack(
            [width / 2 + focal_px * x / depth, height / 2 - focal_px * y / depth], axis=-1
        )

    def pictures_without(self, name: str) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """Draw what the cameras see without an object, and without its shadow.

        Args:
            name: ``cube``, ``left_arm`` or ``right_arm``.

        Raises:
            ValueError: If there is no such object.
        """
        if name not in self.objects:
            raise ValueError(f"object {name!r}: ALOHA has {', '.join(self.objects)}")
        with self._hidden(self._geoms[name]):
            return {camera: self.image(camera) for camera in self.cameras}

    def masks(
        self, camera: str, size_px: tuple[int, int], dilation_px: float
    ) -> dict[str, Bool[np.ndarray, "height width"]]:
        """Say which pixels belong to the cube and to each arm, also where something hides them.

        Args:
            camera: One of :data:`CAMERAS`.
            size_px: Height and width of the masks.
            dilation_px: Reach around each object, in px of a picture 480 px high.

        Raises:
            ValueError: If there is no such camera, or the reach is negative.
        """
        import cv2

        _check_camera(camera)
        if dilation_px < 0:
            raise ValueError(f"dilation_px {dilation_px}: a dilation is not negative")
        reach = dilation_px * size_px[0] / FULL_HEIGHT_PX
        everything = np.arange(self._model.ngeom)
        masks = {}
        for name, geoms in self._geoms.items():
            with self._hidden(np.setdiff1d(everything, geoms)):
                seen = self._segmented(camera, size_px) >= 0
            if reach and seen.any():
                seen = cv2.distanceTransform((~seen).astype(np.uint8), cv2.DIST_L2, 5) <= reach
            masks[name] = seen
        return masks

    def close(self) -> None:
        """Free the graphics contexts; the next picture makes a new one."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _segmented(self, camera: str, size_px: tuple[int, int]) -> Int[np.ndarray, "height width"]:
        """Number of the geom that each pixel shows; -1 where there is none."""
        renderer = self._renderer(size_px)
        renderer.enable_segmentation_rendering()
        renderer.update_scene(self._data, camera)
        return renderer.render()[..., 0]

    @contextmanager
    def _hidden(self, geoms: Int[np.ndarray, " geom"]) -> Iterator[None]:
        """Leave geoms out of every picture."""
        groups = self._model.geom_group.copy()
        self._model.geom_group[geoms] = HIDDEN_GROUP
        try:
            yield
        finally:
            self._model.geom_group[:] = groups

    def _renderer(self, size_px: tuple[int, int]) -> "Renderer":
        if size_px not in self._renderers:
            mujoco = load_mujoco()
            height, width = size_px
            visual = self._model.vis
            # On a CPU an empty margin, and shadows finer than the picture shows, cost more than it.
            visual.global_.offheight, visual.global_.offwidth = height, width
            visual.quality.shadowsize = shadow_px(height)
            try:
                renderer = mujoco.Renderer(self._model, height, width)
            # Each platform library fails in its own way.
            except (mujoco.FatalError, ImportError, RuntimeError, AttributeError) as error:
                raise ValueError(_no_graphics(error)) from error
            self._renderers[size_px] = renderer
            _open_renderers.add(renderer)
            _close_at_exit()
        return self._renderers[size_px]


def shadow_px(height_px: int) -> int:
    """Side of the shadow map for a picture: gym-aloha's at 480 px, in proportion below."""
    share = min(height_px / FULL_HEIGHT_PX, 1.0)
    return max(FULL_SHADOW_PX >> math.ceil(-math.log2(share)), 64)


def _check_camera(camera: str) -> None:
    if camera not in CAMERAS:
        raise ValueError(f"camera {camera!r}: ALOHA has {', '.join(CAMERAS)}")


def _check_look(cameras: tuple[str, ...], image_size: tuple[int, int]) -> None:
    for camera in cameras:
        _check_camera(camera)
    if not cameras or len(set(cameras)) < len(cameras):
        raise ValueError(f"cameras: {list(cameras)}; give at least one, and each once")
    whole = all(isinstance(side, int) for side in image_size)
    if len(image_size) != 2 or not whole or min(image_size) < 1:
        raise ValueError(
            f"image_size: {list(image_size)} px; give height and width, whole numbers of at least 1"
        )


@dataclass(frozen=True)
class AlohaTransferCubeTask(Task):
    """Transfer cube as gym-aloha scores it, over the 400 steps of the ACT paper.

    The score is the reward / 4, so that the thresholds are the paper's: touched, lifted,
    transferred.

    Args:
        cameras: Which are observed: top, angle, front_close, left_wrist, right_wrist.
        image_size: Height and width of the observed pictures, in px.
        max_steps: Control steps after which an episode ends unsolved.
        success_thresholds: Shares of the highest reward at which success is reported, ascending:
            0.25 the right gripper touches the cube, 0.5 lifts it, 0.75 the left one touches it, 1
            holds it in the air, where gym-aloha ends the episode.
    """

    cameras: tuple[str, ...] = ("top",)
    image_size: tuple[int, int] = (FULL_HEIGHT_PX, 640)
    max_steps: int = 400
    success_thresholds: tuple[float, ...] = (0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        # Configuration files give lists.
        for name in ("cameras", "image_size", "success_thresholds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_look(self.cameras, self.image_size)
        if self.max_steps < 1:
            raise ValueError(f"max_steps: {self.max_steps}; give at least 1")
        ascending = list(self.success_thresholds) == sorted(set(self.success_thresholds))
        if (
            not self.success_thresholds
            or not ascending
            or not all(0 < threshold <= 1 for threshold in self.success_thresholds)
        ):
            raise ValueError(
                f"success_thresholds: {self.success_thresholds}; give ascending shares, above 0 "
                "and at most 1"
            )

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return "aloha_transfer_cube"

    @property
    def fps(self) -> float:
        """Control frequency in Hz."""
        return 50.0

    @property
    def score_name(self) -> str:
        """Share of the highest reward."""
        return "progress"

    @property
    def action_dimensions(self) -> tuple[ActionDimension, ...]:
        """Per arm six joints within the motors' limits, and the gripper."""
        limits = compiled_model().actuator_ctrlrange.reshape(len(SIDES), 8, 2)
        return tuple(
            dimension
            for side, arm in zip(SIDES, limits.tolist(), strict=True)
            for dimension in (
                *(
                    ActionDimension(f"{side}_{joint}", "rad", low, high)
                    for joint, (low, high) in zip(JOINTS, arm[:6], strict=True)
                ),
                ActionDimension(f"{side}_gripper", "", 0.0, 1.0),
            )
        )

    def data_schema(self) -> "DataSchema":
        """Columns that demonstrations of this task have."""
        from policies.interface import DataSchema

        return DataSchema(
            cameras=dict.fromkeys(self.cameras, self.image_size),
            state_dim=14,
            action_dim=14,
            fps=self.fps,
        )

    @classmethod
    def for_policy(cls, schema: "DataSchema") -> "AlohaTransferCubeTask":
        """Transfer cube with the policy's cameras in their size.

        Raises:
            ValueError: When the policy wants other cameras, or several sizes.
        """
        sizes = set(schema.cameras.values())
        if len(sizes) > 1 or not set(schema.cameras) <= set(CAMERAS):
            raise ValueError(
                f"the policy's cameras are {dict(schema.cameras)}; ALOHA has "
                f"{', '.join(CAMERAS)}, all of one size. Give a policy that was trained on it"
            )
        if not sizes:
            return cls()
        return cls(cameras=tuple(schema.cameras), image_size=sizes.pop())

    def make(self) -> AlohaTransferCube:
        """Build one table."""
        return AlohaTransferCube(self.cameras, self.image_size)
