"""PushT: an agent disc pushes a T-shaped block onto its goal outline (gym-pusht 0.1.8).

The physics, the rendering and the score are gym-pusht's own; this file adds an exact state reset,
a faster pixel-identical rendering, and no rendering unless somebody looks.

Frames: the *board* is 512 x 512 px with the origin at the upper left and y downwards; the *block
frame* has its origin in the middle of the top edge of the T's bar, the stem along +y.
"""

import os
import warnings
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from envs.task import ActionDimension, EnvironmentObservation, PoseParameter, Task, Transition

if TYPE_CHECKING:
    from torch import Tensor

    from envs.mirrored import MirroredScene
    from envs.push_t_drawing import BoardPainter
    from envs.symmetry import MirroredWorld, Script
    from features.concepts import Concepts
    from policies.interface import DataSchema
    from policies.mirror import AntiDiagonal, Mirror, XFlip

BOARD_PX = 512
AGENT_RADIUS_PX = 15.0
GOAL_POSE = (256.0, 256.0, np.pi / 4)
"""x px, y px, angle rad of the block frame on the goal."""
CENTRE_OF_GRAVITY_PX = (0.0, 45.0)
"""In the block frame."""
T_BOXES_PX = ((-60.0, 0.0, 60.0, 30.0), (-15.0, 30.0, 15.0, 120.0))
"""Bar and stem as (x_min, y_min, x_max, y_max) in the block frame."""
T_OUTLINE_PX = (
    (-60.0, 0.0),
    (60.0, 0.0),
    (60.0, 30.0),
    (15.0, 30.0),
    (15.0, 120.0),
    (-15.0, 120.0),
    (-15.0, 30.0),
    (-60.0, 30.0),
)
"""Corners of the T in the block frame, in order around it."""
FAR_OFF_PX = -1000.0
"""Where nothing is drawn and nothing is touched, on either axis."""
WALLS_PX = (5.0, 506.0)
"""Centre lines of the walls, the same on both axes."""
WALL_RADIUS_PX = 2.0
SUBSTEP_S = 0.01
SUBSTEPS = 10
"""Physics steps in a control step."""
PROPORTIONAL_GAIN = 100.0
"""Of the agent's controller, in 1/s^2."""
DERIVATIVE_GAIN = 20.0
"""Of the agent's controller, in 1/s: critically damped."""
N_ARMS = 2
"""The benchmark and its mirror image."""
MIRRORED_KEYPOINTS = (1, 0, 3, 2, 5, 4, 7, 6)
"""Which of gym-pusht's keypoints stands where in a mirror: the T is symmetric about its stem."""
ANGLE_COLUMNS = (4,)
"""Of the state, in rad."""
WALL_MARGIN_PX = 0.5
"""Gap up to which the T counts as touching a wall."""
WANDER_STEP_PX = 18.0
"""Of the target in a control step, while wandering: as fast as the scripted expert walks."""


@cache
def _gym_pusht() -> ModuleType:
    """Import gym-pusht on first use: it brings pygame, pymunk and shapely."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        from gym_pusht.envs import pusht
    return pusht


def _outline(body: Any, shapes: Any) -> Any:
    """The T's outline on the board, as gym-pusht makes it, both parts at once."""
    import shapely

    corners = [[body.local_to_world(vertex) for vertex in shape.get_vertices()] for shape in shapes]
    parts: Any = shapely.polygons(np.array(corners))
    return shapely.multipolygons(parts)


def x_flip() -> "XFlip":
    """Left and right exchanged: another goal, hence another task."""
    from policies.mirror import XFlip

    return XFlip(float(BOARD_PX), MIRRORED_KEYPOINTS, ANGLE_COLUMNS)


def anti_diagonal() -> "AntiDiagonal":
    """The reflection that leaves the goal where it is: the same task again."""
    from policies.mirror import AntiDiagonal

    return AntiDiagonal(float(BOARD_PX), MIRRORED_KEYPOINTS, ANGLE_COLUMNS)


def _check_arm(arm_idx: int) -> None:
    if not 0 <= arm_idx < N_ARMS:
        raise ValueError(f"arm_idx {arm_idx}: PushT has the arms 0 and {N_ARMS - 1}")


def agent_path(
    position: Float[np.ndarray, " 2"],
    velocity: Float[np.ndarray, " 2"],
    targets: Float[np.ndarray, "step 2"],
) -> tuple[Float[np.ndarray, "substep 2"], Float[np.ndarray, " 2"]]:
    """Foresee the agent, which is kinematic: nothing it touches can deflect it.

    Args:
        position: Of the agent, in px.
        velocity: Of the agent, in px/s.
        targets: Actions of the coming control steps, in px.

    Returns:
        Positions after each physics step, and the velocity after the last.
    """
    positions = np.empty((len(targets) * SUBSTEPS, 2))
    row = 0
    x, y = float(position[0]), float(position[1])
    u, v = float(velocity[0]), float(velocity[1])
    for target_x, target_y in targets.tolist():
        for _ in range(SUBSTEPS):
            u += (PROPORTIONAL_GAIN * (target_x - x) - DERIVATIVE_GAIN * u) * SUBSTEP_S
            v += (PROPORTIONAL_GAIN * (target_y - y) - DERIVATIVE_GAIN * v) * SUBSTEP_S
            x += u * SUBSTEP_S
            y += v * SUBSTEP_S
            positions[row] = x, y
            row += 1
    return positions, np.array([u, v])


def wander(start: Float[np.ndarray, " 2"], n_steps: int, seed: int) -> Float[np.ndarray, "step 2"]:
    """Targets along straight lines between random places of the board.

    Args:
        start: Where to begin, in px.
        n_steps: How many targets.
        seed: Of the places.
    """
    generator = np.random.default_rng(seed)
    at, corner = np.asarray(start, np.float64), np.asarray(start, np.float64)
    targets = np.empty((n_steps, 2))
    for step in range(n_steps):
        way = corner - at
        if np.hypot(*way) <= WANDER_STEP_PX:
            corner = generator.uniform(0, BOARD_PX, 2)
            way = corner - at
        at = at + way * min(WANDER_STEP_PX / np.hypot(*way), 1.0)
        targets[step] = at.astype(np.float32)
    return targets


def distance_to_t_px(
    points_px: Float[np.ndarray, "*point 2"], pose: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, "*point"]:
    """Measure how far points lie outside a T; 0 within it.

    Args:
        points_px: x and y on the board.
        pose: x px, y px, angle rad of the T's frame.
    """
    cosine, sine = np.cos(pose[2]), np.sin(pose[2])
    x, y = points_px[..., 0] - pose[0], points_px[..., 1] - pose[1]
    in_frame = np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)
    boxes = np.array(T_BOXES_PX).reshape(2, 2, 2)
    outside = [np.maximum(np.maximum(low - in_frame, in_frame - high), 0) for low, high in boxes]
    return np.minimum(*(np.hypot(each[..., 0], each[..., 1]) for each in outside))


class PushT:
    """One PushT board.

    Args:
        image_size: Height and width of the observed picture, in px.
        action_scale: Share of the way from the agent to an action's target that its controller is
            given, 0..1: below 1 the agent moves more slowly.
        goal_pose: x px, y px, angle rad of the goal; the benchmark's own unless given.

    Raises:
        ValueError: When ``image_size`` is not positive, or ``action_scale`` not in (0, 1].
    """

    objects = ("agent", "block", "goal")
    end_effectors = ("agent",)
    # A picture of 96 px is a sample of the board without antialiasing: a T with upright edges that
    # moves by 8 px is seen to move by 5.3 or by 10.7, so sensitivities scatter between frames.
    pose_parameters = (
        PoseParameter("agent_x", "agent", 0, "px", 4.0),
        PoseParameter("agent_y", "agent", 1, "px", 4.0),
        PoseParameter("block_x", "block", 2, "px", 4.0),
        PoseParameter("block_y", "block", 3, "px", 4.0),
        # About the origin of the block frame, in the middle of the bar's edge.
        PoseParameter("block_angle", "block", 4, "deg", 5.0, per_unit=np.pi / 180),
    )

    def __init__(
        self,
        image_size: int = 96,
        action_scale: float = 1.0,
        goal_pose: tuple[float, float, float] = GOAL_POSE,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size: {image_size} px; give at least 1")
        if not 0 < action_scale <= 1:
            raise ValueError(f"action_scale: {action_scale}; give a share above 0 and at most 1")
        self.image_size = image_size
        self.action_scale = action_scale
        self.goal_pose = goal_pose
        self._env = _gym_pusht().PushTEnv(obs_type="state")
        self._goal: tuple[tuple[float, ...], Any, float] | None = None
        self.reset(seed=0)
        self._painter: BoardPainter | None = None
        self._spare: PushT | None = None

    def reset(self, seed: int) -> None:
        """Draw the start that gym-pusht draws for ``seed``."""
        self._env.reset(seed=seed)
        self._env.goal_pose = np.array(self.goal_pose)

    def reset_to(self, state: Float[np.ndarray, " 5"]) -> None:
        """Put agent and block exactly where ``state`` says, both at rest.

        gym-pusht's own ``reset_to_state`` sets the position before the angle, and the angle turns
        the block about its centre of gravity: the block lands up to 90 px off.

        Args:
            state: Agent x, y, block x, y in px, block angle in rad.

        Raises:
            ValueError: When ``state`` is not five finite numbers.
        """
        values = np.asarray(state, dtype=np.float64)
        if values.shape != (5,) or not np.isfinite(values).all():
            raise ValueError(f"state: {state!r}; give agent x, y, block x, y, angle")
        agent_x, agent_y, block_x, block_y, angle = values.tolist()
        env = self._env
        env._setup()
        env.goal_pose = np.array(self.goal_pose)
        env._last_action = None
        env.agent.position = agent_x, agent_y
        env.block.angle = angle
        env.block.position = block_x, block_y
        # At rest a physics step moves nothing, but finds the contacts: the next step resolves
        # overlaps as it would have, and the renderer draws contacts and cached vertices.
        env.space.step(env.dt)

    def state(self) -> Float[np.ndarray, " 5"]:
        """Agent x, y, block x, y in px, and the block's angle in 0..2 pi."""
        return self._env.get_obs()

    def agent_velocity(self) -> Float[np.ndarray, " 2"]:
        """In px/s."""
        return np.array(self._env.agent.velocity)

    def coverage(self) -> float:
        """Share of the goal that the block covers, 0..1.

        gym-pusht's, with the block's parts in their order: it goes over a set of them, which has no
        order, and the last bit of a sum depends on it.
        """
        env = self._env
        pose = tuple(env.goal_pose.tolist())
        if self._goal is None or self._goal[0] != pose:
            goal = _outline(env.get_goal_pose_body(env.goal_pose), env._block_shapes)
            self._goal = pose, goal, goal.area
        _, goal, goal_area = self._goal
        return float(goal.intersection(_outline(env.block, env._block_shapes)).area / goal_area)

    def image(self, size_px: int | None = None) -> UInt8[np.ndarray, "height width 3"]:
        """Draw the board as gym-pusht does, to the pixel.

        Args:
            size_px: Height and width; the observed size when None.
        """
        import cv2

        size = size_px or self.image_size
        if self._painter is None:
            from envs.push_t_drawing import BoardPainter

            self._painter = BoardPainter()
        bgrx = self._painter.paint(self._env)
        return np.ascontiguousarray(cv2.resize(bgrx, (size, size))[:, :, 2::-1])

    def observe(self) -> EnvironmentObservation:
        """Render the board and read the poses; camera ``image``, state = agent position in px."""
        state = self.state()
        keypoints = self._env.get_keypoints(self._env._block_shapes)
        return {
            "images": {"image": self.image()},
            "state": state[:2].astype(np.float32),
            "environment_state": keypoints.reshape(-1).astype(np.float32),
            "simulator_state": state,
        }

    def step(self, action: Float[np.ndarray, " 2"]) -> Transition:
        """Move the agent's target to ``action`` for 0.1 s.

        Args:
            action: Target position in px, within the board.

        Raises:
            ValueError: When the target is not two finite numbers on the board.
        """
        x, y = (float(value) for value in action)
        if not (0.0 <= x <= BOARD_PX and 0.0 <= y <= BOARD_PX):
            raise ValueError(
                f"action: ({x}, {y}) px is off the board of 0..{BOARD_PX}; clip it with the task"
            )
        if self.action_scale != 1:
            agent_x, agent_y = self._env.agent.position
            x = agent_x + self.action_scale * (x - agent_x)
            y = agent_y + self.action_scale * (y - agent_y)
        # gym-pusht's step, in numbers instead of vectors and without what nobody reads.
        env, agent, dt = self._env, self._env.agent, self._env.dt
        env.n_contact_points = 0
        for _ in range(SUBSTEPS):
            (agent_x, agent_y), (u, v) = agent.position, agent.velocity
            agent.velocity = (
                u + (env.k_p * (x - agent_x) - env.k_v * u) * dt,
                v + (env.k_p * (y - agent_y) - env.k_v * v) * dt,
            )
            env.space.step(dt)
        coverage = self.coverage()
        reward = min(max(coverage / env.success_threshold, 0.0), 1.0)
        return Transition(coverage, reward, coverage > env.success_threshold)

    def frame(
        self, size_px: int, target: Float[np.ndarray, " 2"] | None = None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw the board for a viewer, with a red cross on the target in execution."""
        import cv2

        picture = self.image(size_px)
        if target is not None:
            scale = size_px / BOARD_PX
            centre = (round(float(target[0]) * scale), round(float(target[1]) * scale))
            cv2.drawMarker(
                picture,
                centre,
                (255, 0, 0),
                cv2.MARKER_CROSS,
                size_px // 16,
                max(size_px // 128, 1),
            )
        return picture

    def pictures_without(self, name: str) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """Draw the board without an object and without the marks of its contacts.

        Args:
            name: ``agent``, ``block`` or ``goal``.

        Raises:
            ValueError: If there is no such object.
        """
        if name not in self.objects:
            raise ValueError(f"object {name!r}: PushT has {', '.join(self.objects)}")
        state = self.state()
        if name == "agent":
            state[:2] = FAR_OFF_PX
        elif name == "block":
            state[2:4] = FAR_OFF_PX
        # On a board of its own: a state holds no velocities, so this one could not be restored.
        if self._spare is None:
            self._spare = PushT(self.image_size, goal_pose=self.goal_pose)
        self._spare.reset_to(state)
        if name == "goal":
            self._spare._env.goal_pose = np.array([FAR_OFF_PX, FAR_OFF_PX, 0.0])
        return {"image": self._spare.image()}

    def masks(
        self, camera: str, size_px: tuple[int, int], dilation_px: float
    ) -> dict[str, Bool[np.ndarray, "height width"]]:
        """Say which pixels belong to the agent's disc, the block and the goal.

        The shapes are the physical ones: gym-pusht draws the block 2 px wider. The dilation is
        exact, not counted in pixels.

        Args:
            camera: ``image``.
            size_px: Height and width of the masks.
            dilation_px: Reach around each object, in px of the 512 x 512 board.

        Raises:
            ValueError: If there is no such camera, or the reach is negative.
        """
        if camera != "image" or dilation_px < 0:
            raise ValueError(
                f"camera {camera!r}, dilation_px {dilation_px}: PushT's camera is 'image', and a "
                "dilation is not negative"
            )
        height, width = size_px
        # A pixel of the board is at whole coordinates, where its centre is.
        x = (np.arange(width) + 0.5) * BOARD_PX / width - 0.5
        y = (np.arange(height) + 0.5) * BOARD_PX / height - 0.5
        points = np.stack(np.meshgrid(x, y), axis=-1)
        state = self.state()
        from_agent = points - state[:2]
        distance_px = {
            "agent": np.hypot(from_agent[..., 0], from_agent[..., 1]) - AGENT_RADIUS_PX,
            "block": distance_to_t_px(points, state[2:]),
            "goal": distance_to_t_px(points, np.array(self.goal_pose)),
        }
        return {name: distance <= dilation_px for name, distance in distance_px.items()}

    def project_actions(
        self, camera: str, actions: Float[np.ndarray, "*batch 2"], size_px: tuple[int, int]
    ) -> Float[np.ndarray, "*batch 1 2"]:
        """Find targets in a picture of the board: where :meth:`frame` draws its cross.

        Args:
            camera: ``image``.
            actions: Targets, in px of the board.
            size_px: Height and width of the picture.

        Raises:
            ValueError: If there is no such camera.
        """
        if camera != "image":
            raise ValueError(f"camera {camera!r}: PushT's camera is 'image'")
        height, width = size_px
        return (actions * (np.array([width, height]) / BOARD_PX))[..., None, :]

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()
        if self._spare is not None:
            self._spare.close()


@dataclass(frozen=True)
class PushTTask(Task):
    """PushT as Diffusion Policy scores it.

    Args:
        image_size: Height and width of the observed picture, in px.
        max_steps: Control steps after which an episode ends unsolved.
        success_thresholds: Coverages at which success is reported, ascending; gym-pusht ends an
            episode above 0.95.
        arm_idx: 0 for the benchmark itself; 1 for its exact mirror image, left and right exchanged,
            whose goal lies elsewhere: a new task.
        action_scale: Share of the way from the agent to an action's target that its controller is
            given, above 0 and at most 1.
    """

    image_size: int = 96
    max_steps: int = 300
    success_thresholds: tuple[float, ...] = (0.85, 0.90, 0.95)
    arm_idx: int = 0
    action_scale: float = 1.0

    def __post_init__(self) -> None:
        # Configuration files give lists.
        object.__setattr__(self, "success_thresholds", tuple(self.success_thresholds))
        if self.image_size < 1 or self.max_steps < 1:
            raise ValueError(
                f"image_size {self.image_size} px and max_steps {self.max_steps}; give at least 1"
            )
        ascending = list(self.success_thresholds) == sorted(set(self.success_thresholds))
        if (
            not self.success_thresholds
            or not ascending
            or not all(0 <= threshold < 1 for threshold in self.success_thresholds)
        ):
            raise ValueError(
                f"success_thresholds: {self.success_thresholds}; give ascending coverages in 0..1"
            )
        _check_arm(self.arm_idx)
        if not 0 < self.action_scale <= 1:
            raise ValueError(
                f"action_scale: {self.action_scale}; give a share above 0 and at most 1"
            )

    @property
    def name(self) -> str:
        """Short name for tables and files."""
        return "push_t" if self.arm_idx == 0 else f"push_t_arm{self.arm_idx}"

    @property
    def n_arms(self) -> int:
        """The original and its mirror image."""
        return N_ARMS

    def of_arm(self, arm_idx: int) -> "PushTTask":
        """The same task with another arm.

        Raises:
            ValueError: When there is no such arm.
        """
        return replace(self, arm_idx=arm_idx)

    def arm_mirror(self, arm_idx: int) -> "Mirror | None":
        """What turns an arm's world into that of arm 0, and back; None for arm 0 itself.

        Raises:
            ValueError: When there is no such arm.
        """
        _check_arm(arm_idx)
        return x_flip() if arm_idx else None

    @property
    def goal_pose(self) -> tuple[float, float, float]:
        """Where the arm sees the goal: x px, y px, angle rad."""
        x, y, angle = GOAL_POSE
        return (x, y, angle) if self.arm_idx == 0 else (BOARD_PX - x, y, -angle)

    @property
    def action_dimensions(self) -> tuple[ActionDimension, ...]:
        """The target's place on the board."""
        return tuple(ActionDimension(axis, "px", 0.0, float(BOARD_PX)) for axis in "xy")

    @property
    def fps(self) -> float:
        """Control frequency in Hz."""
        return 10.0

    @property
    def score_name(self) -> str:
        """Share of the goal that the block covers."""
        return "coverage"

    @property
    def reward_name(self) -> str:
        """Coverage / 0.95, at most 1: gym-pusht's reward, the literature's overlap."""
        return "overlap"

    def is_success(self, score: float, threshold: float) -> bool:
        """Strictly above, as in gym-pusht."""
        return score > threshold

    def clip_actions(self, actions: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Bring targets onto the board; gym-pusht itself would follow them beyond the walls."""
        return np.clip(actions, 0.0, float(BOARD_PX))

    def data_schema(self) -> "DataSchema":
        """Columns that demonstrations of this task have."""
        from policies.interface import DataSchema

        return DataSchema(
            cameras={"image": (self.image_size, self.image_size)},
            state_dim=2,
            action_dim=2,
            fps=self.fps,
        )

    @classmethod
    def for_policy(cls, schema: "DataSchema") -> "PushTTask":
        """PushT with one square camera ``image`` of the policy's size.

        Raises:
            ValueError: When the policy wants other cameras, or one that is not square, or its
                actions are no targets on a board.
        """
        if schema.action_dim != 2:
            raise ValueError(
                f"the policy's actions have {schema.action_dim} dimensions, PushT's 2. Give a "
                "policy that was trained on PushT"
            )
        sizes = dict(schema.cameras)
        height, width = sizes.pop("image", (96, 96))
        if sizes or height != width:
            raise ValueError(
                f"the policy's cameras are {dict(schema.cameras)}; PushT has one square camera, "
                "image. Give a policy that was trained on PushT"
            )
        return cls(image_size=height)

    def make(self) -> "PushT | MirroredScene":
        """Build one board."""
        board = PushT(self.image_size, self.action_scale)
        mirror = self.arm_mirror(self.arm_idx)
        if mirror is None:
            return board
        from envs.mirrored import MirroredScene

        return MirroredScene(board, mirror)

    def script(self, seed: int, n_steps: int) -> "Script":
        """Let the scripted expert play on arm 0, then wander: it pushes the T into the walls.

        Args:
            seed: Of the start, the expert's choices and the wandering.
            n_steps: Length of the script, in control steps.
        """
        from envs.expert import PushTExpert
        from envs.symmetry import Script

        board, expert = PushT(self.image_size, self.action_scale), PushTExpert()
        try:
            board.reset(seed)
            expert.reset(seed)
            start, actions, is_solved = board.state(), [], False
            while len(actions) < n_steps and not is_solved:
                action = expert.act(board.state(), board.agent_velocity())
                # As data sets store them: exactly the mirror image of its mirror image.
                actions.append(action.astype(np.float32).astype(np.float64))
                is_solved = board.step(actions[-1]).terminated
            before = actions[-1] if actions else start[:2]
            wandering = wander(before, n_steps - len(actions), seed)
            return Script(f"seed {seed}", start, np.array([*actions, *wandering]))
        finally:
            board.close()

    def mirrored_worlds(self) -> "tuple[MirroredWorld, ...]":
        """A simulator with the mirrored goal, and the benchmark seen in its own diagonal.

        The walls are not symmetric: once one of them stops the T, both worlds may go other ways.
        """
        from envs.expert import corners_of, wall_gap
        from envs.symmetry import MirroredWorld

        mirrored_goal = self.of_arm(1).goal_pose

        def native() -> PushT:
            return PushT(self.image_size, self.action_scale, mirrored_goal)

        def benchmark() -> PushT:
            return PushT(self.image_size, self.action_scale)

        def touches_wall(states: np.ndarray) -> Bool[np.ndarray, " instant"]:
            # The walls of the mirrored world are up to 1 px further in.
            return wall_gap(corners_of(states[:, 2:])) <= 1.0 + WALL_MARGIN_PX

        flip, diagonal = x_flip(), anti_diagonal()
        return (
            MirroredWorld("native", "mirrored goal", flip, native, "undisturbed", touches_wall),
            # It may part without a wall, too: once in 180 human demonstrations.
            MirroredWorld("anti_diagonal", "same goal", diagonal, benchmark, "often", touches_wall),
        )

    def concepts(
        self, simulator_states: "Tensor", episode_index: "Tensor", frame_index: "Tensor"
    ) -> "Concepts":
        """Describe frames in words: :func:`envs.concepts.push_t_concepts`.

        Args:
            simulator_states: [frame, 5], episode by episode in the order of time.
            episode_index: Number of each frame's episode, [frame].
            frame_index: Its step there, [frame].

        Raises:
            ValueError: If the states are not PushT's, or frames are not in order.
        """
        from envs.concepts import push_t_concepts

        return push_t_concepts(
            simulator_states, episode_index, frame_index, self.fps, self.goal_pose
        )
