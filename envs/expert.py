"""A scripted expert for PushT: plan a straight push, walk around the block, push, look again.

Three facts make straight pushes enough. The block is quasi-static (it stops when the agent stops),
so only the agent's path matters, not its speed. The agent is kinematic, so its path is known in
advance. And physics is cheap: a few hundred pushes are tried side by side, each in its own board of
one large planning space, in about ten milliseconds.

Costs are counted in *env steps* (control steps of 0.1 s), the currency that demonstrations pay in.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int

from envs.push_t import (
    AGENT_RADIUS_PX,
    BOARD_PX,
    CENTRE_OF_GRAVITY_PX,
    GOAL_POSE,
    T_BOXES_PX,
    T_OUTLINE_PX,
    WALL_RADIUS_PX,
    WALLS_PX,
    agent_path,
)

EXPERT_VERSION = 1
"""Raise whenever the same seed would give other actions: caches of demonstrations depend on it."""

SPEED_PX_PER_S = 100.0
"""Of the agent in the planning space; the block does not care."""
LANE_SPACING_PX = 2000.0
"""Between the boards of the planning space."""


@dataclass(frozen=True)
class ExpertConfig:
    """How the expert plans and moves."""

    settle_waits: bool = False
    """Wait for the agent to stand still before and after every push, as the prototype did; without,
    the expert anticipates the agent's lag and hardly ever stands still."""
    plan_noise: float = 0.0
    """Softmax temperature of the choice among plans, in env steps; 0 takes the best. It fades
    below ``noise_fade_px`` of error, where few plans finish the job."""
    noise_fade_px: float = 40.0
    """Error below which the plan noise fades."""
    approach_speed: tuple[float, float] = (14.0, 20.0)
    """Range of the target's speed on the way to a push, in px per env step; drawn per push."""
    push_speed: tuple[float, float] = (8.0, 12.0)
    """Range of the target's speed while pushing, in px per env step; drawn per push."""
    error_floor_px: float = 0.7
    """Error below which nothing is gained."""
    log_value: float = 20.0
    """Env steps that halving the error is worth, divided by ln 2: keeps 1 px corrections alive."""
    linear_value: float = 1.0
    """Env steps that 1 px of error is worth."""
    contact_spacing_px: float = 10.0
    """Between the points of the outline where a push may start."""
    headings_deg: tuple[float, ...] = (-50.0, -25.0, 0.0, 25.0, 50.0)
    """Of the push, against the inward normal of the outline."""
    start_gap_px: float = 4.0
    """Between agent and block where a push starts."""
    run_up_px: float = 24.0
    """Straight way before the start, on which the agent's lag across the push dies out."""
    max_push_px: float = 180.0
    """Longest push."""
    min_push_px: float = 40.0
    """Longest push considered when the block is almost home."""
    arena_px: tuple[float, float] = (16.0, 496.0)
    """Where the agent's centre may go, both axes."""
    clearance_px: float = 17.5
    """Between the agent's centre and the block on the way to a push."""
    free_px: float = 19.0
    """Distance of the agent's centre from the block at which it counts as free."""
    corner_offset_px: float = 19.2
    """Of the way points beyond the T's corners, along both axes of the block."""
    bend_cost_px: float = 8.0
    """Detour that one bend of the way is worth."""
    wall_margin_px: float = 4.0
    """Gap between block and wall below which a plan is penalised."""
    wall_penalty: float = 40.0
    """In env steps."""
    min_gain_px: tuple[float, float] = (1.0, 15.0)
    """Bounds of the least displacement of a plan (a quarter of the error): without it, doing
    nothing wins far from the goal."""
    back_off_px: float = 15.0
    """The agent's target behind the end of a push."""
    lateral_tolerance_px: float = 2.5
    """Deviation from the line of the push that is accepted at first contact."""
    settled_px: tuple[float, float] = (6.0, 3.0)
    """With settle waits: distance to the target that ends an approach, and a push."""

    def __post_init__(self) -> None:
        # Configuration files give lists; caches need hashable values.
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("approach_speed", "push_speed"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: ({low}, {high}); give 0 < low <= high px per env step")
        if self.plan_noise < 0:
            raise ValueError(f"plan_noise: {self.plan_noise}; give 0 or more env steps")


class Pose(NamedTuple):
    """Of the block frame on the board, in px and rad."""

    x: float
    y: float
    angle: float

    @property
    def rotation(self) -> Float[np.ndarray, "2 2"]:
        """From the block frame to the board."""
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        return np.array([[cosine, -sine], [sine, cosine]])

    def to_board(self, points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Move points of the block frame onto the board."""
        return points @ self.rotation.T + (self.x, self.y)

    def to_block(self, points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Inverse of :meth:`to_board`."""
        return (points - (self.x, self.y)) @ self.rotation


@dataclass(frozen=True)
class Push:
    """One plan: a way to walk and a line to push along."""

    way: Float[np.ndarray, "point 2"]
    """Way points on the board, from where the target is to where the push starts, in px."""
    heading: Float[np.ndarray, " 2"]
    """Unit vector of the push."""
    length_px: float
    """From the last way point to where the agent's centre turns back."""
    approach_speed: float
    """In px per env step."""
    push_speed: float
    """In px per env step."""


def distance_to_block(points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch"]:
    """Signed distance to the T, in px; exact outside (both in the block frame)."""
    distances = []
    for x_min, y_min, x_max, y_max in T_BOXES_PX:
        dx = np.abs(points[..., 0] - (x_min + x_max) / 2) - (x_max - x_min) / 2
        dy = np.abs(points[..., 1] - (y_min + y_max) / 2) - (y_max - y_min) / 2
        outside = np.hypot(np.maximum(dx, 0.0), np.maximum(dy, 0.0))
        distances.append(outside + np.minimum(np.maximum(dx, dy), 0.0))
    return np.asarray(np.minimum(*distances))


def least_distance(
    starts: Float[np.ndarray, "*#segment 2"], ends: Float[np.ndarray, "*#segment 2"]
) -> Float[np.ndarray, "..."]:
    """Least distance of segments to the T, sampled at most 5 px apart (block frame)."""
    starts, ends = np.broadcast_arrays(starts, ends)
    longest = float(np.max(np.hypot(*np.moveaxis(ends - starts, -1, 0)), initial=0.0))
    along = np.linspace(0.0, 1.0, int(np.ceil(longest / 5.0)) + 2)[:, None]
    points = starts[..., None, :] + (ends - starts)[..., None, :] * along
    return np.asarray(distance_to_block(points).min(axis=-1))


def corners_of(poses: Float[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "2 8 *batch"]:
    """Place the T's corners on the board: x and y, in px."""
    x, y, angle = np.moveaxis(poses, -1, 0)
    cosine, sine = np.cos(angle), np.sin(angle)
    # The corners come first: numpy is slow over a short last axis.
    corner_x, corner_y = np.array(T_OUTLINE_PX).T.reshape(2, -1, *(1,) * angle.ndim)
    return np.stack(
        [cosine * corner_x - sine * corner_y + x, sine * corner_x + cosine * corner_y + y]
    )


def block_error(
    corners: Float[np.ndarray, "2 8 *batch"], reference: Pose
) -> Float[np.ndarray, "*batch"]:
    """Mean distance of the T's corners to where they are in the reference pose, in px.

    Args:
        corners: From :func:`corners_of`.
        reference: The pose they are compared with.
    """
    there = reference.to_board(np.array(T_OUTLINE_PX))
    away = corners - there.T.reshape(2, -1, *(1,) * (corners.ndim - 2))
    d = np.sqrt(away[0] * away[0] + away[1] * away[1])
    # In the order in which numpy adds eight numbers that lie side by side.
    total = (d[0] + d[1]) + (d[2] + d[3]) + ((d[4] + d[5]) + (d[6] + d[7]))
    return np.asarray(total / len(d))


def wall_gap(corners: Float[np.ndarray, "2 8 *batch"]) -> Float[np.ndarray, "*batch"]:
    """Least gap between the T and a wall, in px; negative inside the wall.

    Args:
        corners: From :func:`corners_of`.
    """
    low, high = WALLS_PX[0] + WALL_RADIUS_PX, WALLS_PX[1] - WALL_RADIUS_PX
    return np.asarray(np.minimum(corners.min(axis=(0, 1)) - low, high - corners.max(axis=(0, 1))))


class PlanningSpace:
    """Several PushT boards side by side in one pymunk space, stepped and read together.

    It cannot be a copy of gym-pusht's own space (pymunk spaces do not copy), so it repeats the
    shapes and is put back in place before every use.

    Args:
        n_lanes: Boards.
    """

    def __init__(self, n_lanes: int) -> None:
        import pymunk
        from pymunk import batch

        self.n_lanes = n_lanes
        self._batch = batch
        self._space = pymunk.Space()
        self._space.damping = 0.0
        columns = int(np.ceil(np.sqrt(n_lanes)))
        lanes = np.arange(n_lanes)
        self._offset = np.stack([lanes % columns, lanes // columns], axis=-1) * LANE_SPACING_PX
        low, high = WALLS_PX
        ends = [(low, high), (low, low), (high, low), (high, high), (low, high)]
        bar = [(x, y) for x, y in T_OUTLINE_PX if y <= 30.0 and abs(x) == 60.0]
        stem = [(x, y) for x, y in T_OUTLINE_PX if abs(x) == 15.0]
        # gym-pusht weighs the stem as a second bar.
        moment = 2 * pymunk.moment_for_poly(1.0, bar)
        agents, blocks = [], []
        for dx, dy in self._offset.tolist():
            walls = [
                pymunk.Segment(
                    self._space.static_body,
                    (a[0] + dx, a[1] + dy),
                    (b[0] + dx, b[1] + dy),
                    WALL_RADIUS_PX,
                )
                for a, b in pairwise(ends)
            ]
            agent = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
            block = pymunk.Body(1.0, moment)
            shapes = [pymunk.Poly(block, bar), pymunk.Poly(block, stem)]
            block.center_of_gravity = CENTRE_OF_GRAVITY_PX
            self._space.add(*walls, agent, pymunk.Circle(agent, AGENT_RADIUS_PX), block, *shapes)
            agents.append(agent)
            blocks.append(block)
        names = batch.BodyFields
        self._all_fields = names.POSITION | names.ANGLE | names.VELOCITY | names.ANGULAR_VELOCITY
        buffer = batch.Buffer()
        batch.get_space_bodies(self._space, names.BODY_ID | self._all_fields, buffer)
        ids = np.frombuffer(buffer.int_buf(), np.uintp).tolist()
        self._agents = np.array([ids.index(agent.id) for agent in agents])
        self._blocks = np.array([ids.index(block.id) for block in blocks])
        self._bodies = np.frombuffer(buffer.float_buf(), np.float64).reshape(-1, 6).copy()
        self._poses = batch.Buffer()

    def push(
        self,
        block: Pose,
        starts: Float[np.ndarray, "lane 2"],
        headings: Float[np.ndarray, "lane 2"],
        stride_px: float,
        n_strides: int,
    ) -> Float[np.ndarray, "stride lane 3"]:
        """Push the same block along one straight line per lane.

        Args:
            block: Where the block lies at first.
            starts: Of the agent's centre, in px; a lane with a zero heading stands still.
            headings: Unit vectors.
            stride_px: Way of the agent in one physics step.
            n_strides: Physics steps.

        Returns:
            x px, y px and angle rad of the block after each physics step.
        """
        bodies = self._bodies
        bodies[self._agents, :2] = starts + self._offset
        bodies[self._agents, 3:5] = headings * SPEED_PX_PER_S
        bodies[self._blocks, :2] = self._offset + np.array([block.x, block.y])
        bodies[self._blocks, 2] = block.angle
        bodies[self._blocks, 3:] = 0.0
        state = self._batch.Buffer()
        state.set_float_buf(bodies)
        # Turning a body moves it, about its centre of gravity: the second pass puts it back.
        for _ in range(2):
            self._batch.set_space_bodies(self._space, self._all_fields, state)
        poses = np.empty((n_strides, self.n_lanes, 3))
        pose_fields = self._batch.BodyFields.POSITION | self._batch.BodyFields.ANGLE
        for stride in range(n_strides):
            self._space.step(stride_px / SPEED_PX_PER_S)
            self._poses.clear()
            self._batch.get_space_bodies(self._space, pose_fields, self._poses)
            every = np.frombuffer(self._poses.float_buf(), np.float64).reshape(-1, 3)
            poses[stride] = every[self._blocks]
        poses[..., :2] -= self._offset
        return poses


class ContactGrid:
    """Where and along which headings the T may be pushed, in the block frame.

    Args:
        config: How the expert plans and moves.
    """

    def __init__(self, config: ExpertConfig) -> None:
        self._config = config
        outline = np.array(T_OUTLINE_PX)
        sides = np.roll(outline, -1, axis=0) - outline
        points, normals = [], []
        for corner, side in zip(outline, sides, strict=True):
            length = np.hypot(*side)
            n_points = round(length / config.contact_spacing_px)
            along = (np.arange(n_points) + 0.5) / n_points
            points.append(corner + along[:, None] * side)
            normals.append(np.tile([side[1], -side[0]] / length, (n_points, 1)))
        point, normal = np.concatenate(points), np.concatenate(normals)
        turns = np.deg2rad(config.headings_deg)
        cosine, sine = np.cos(turns), np.sin(turns)
        turn = np.array([[cosine, -sine], [sine, cosine]])
        gap = AGENT_RADIUS_PX + config.start_gap_px
        reach = point + gap * normal
        free = distance_to_block(reach) >= gap - 0.5
        n_headings = len(config.headings_deg)
        self.starts = np.repeat(reach[free], n_headings, axis=0)
        """Agent's centre just before contact: (push, 2), px."""
        self.headings = rearrange(
            np.einsum("ijh,pj->phi", turn, -normal[free]), "point heading xy -> (point heading) xy"
        )
        """Unit vectors: (push, 2)."""
        self.run_ups = self.starts - config.run_up_px * self.headings
        """Where the straight way to the start begins: (push, 2), px."""
        self.run_up_clear = least_distance(self.run_ups, self.starts) >= config.clearance_px

    @cached_property
    def corners(self) -> Float[np.ndarray, "corner 2"]:
        """Way points around the T's convex corners."""
        convex = np.array([(x, y) for x, y in T_OUTLINE_PX if (abs(x), y) != (15.0, 30.0)])
        middles = np.where(np.abs(convex[:, :1]) == 60.0, (0.0, 15.0), (0.0, 75.0))
        return convex + self._config.corner_offset_px * np.sign(convex - middles)

    @cached_property
    def corner_ways(self) -> Float[np.ndarray, "corner corner"]:
        """Length of the straight ways between corners, bend included; infinite when blocked."""
        return self._ways(self.corners[:, None], self.corners[None])

    @cached_property
    def start_ways(self) -> Float[np.ndarray, "corner push"]:
        """The same from the corners to the starts."""
        return self._ways(self.corners[:, None], self.starts[None])

    @cached_property
    def run_up_ways(self) -> Float[np.ndarray, "corner push"]:
        """The same from the corners to the beginnings of the run-ups."""
        return self._ways(self.corners[:, None], self.run_ups[None])

    def _ways(
        self, starts: Float[np.ndarray, "*#way 2"], ends: Float[np.ndarray, "*#way 2"]
    ) -> Float[np.ndarray, "..."]:
        clear = least_distance(starts, ends) >= self._config.clearance_px
        lengths = np.hypot(*np.moveaxis(ends - starts, -1, 0)) + self._config.bend_cost_px
        return np.where(clear, lengths, np.inf)

    def ways_from(
        self,
        start: Float[np.ndarray, " 2"],
        ends: Float[np.ndarray, "push 2"],
        last_ways: Float[np.ndarray, "corner push"],
        corner_usable: Bool[np.ndarray, " corner"],
    ) -> tuple[Float[np.ndarray, " push"], Int[np.ndarray, " push"], Int[np.ndarray, " corner"]]:
        """Shortest ways around the T from one point to many.

        Args:
            start: In the block frame.
            ends: In the block frame.
            last_ways: Lengths from the corners to the ends.
            corner_usable: Corners inside the arena.

        Returns:
            Length px per end; last corner per end (-1: straight); predecessor per corner (-1: the
            start).
        """
        direct = self._ways(start[None], np.concatenate([self.corners, ends]))
        n_corners = len(self.corners)
        to_corner = np.where(corner_usable, direct[:n_corners], np.inf)
        before = np.full(n_corners, -1)
        between = np.where(corner_usable[:, None] & corner_usable[None], self.corner_ways, np.inf)
        for _ in range(n_corners - 1):
            through = to_corner[:, None] + between
            best = through.argmin(axis=0)
            shorter = through.min(axis=0) < to_corner
            before = np.where(shorter, best, before)
            to_corner = np.where(shorter, through.min(axis=0), to_corner)
        around = to_corner[:, None] + last_ways
        last = np.where(direct[n_corners:] <= around.min(axis=0), -1, around.argmin(axis=0))
        return np.minimum(direct[n_corners:], around.min(axis=0)), last, before


class PushTExpert:
    """Solves PushT from the simulator's state, one control step at a time.

    Args:
        config: How to plan and move.
        goal: Pose of the goal; any pose works.
    """

    def __init__(
        self, config: ExpertConfig | None = None, goal: tuple[float, float, float] = GOAL_POSE
    ) -> None:
        self.config = config or ExpertConfig()
        self.goal = Pose(*goal)
        self._grid = ContactGrid(self.config)
        self.reset(seed=0)

    def reset(self, seed: int) -> None:
        """Begin an episode; the same seed and the same states give the same actions."""
        self._generator = np.random.default_rng(seed)
        # A new space: pymunk's caches must not carry one episode into the next.
        self._lanes = PlanningSpace(len(self._grid.starts))
        self._phase: Literal["plan", "approach", "push", "back off", "settle"] = "plan"
        self._push: Push | None = None
        self._target: Float[np.ndarray, " 2"] | None = None
        self._turning_point = np.zeros(2)
        self._walked_px = 0.0
        self._waited = 0
        self._jitter = 0.0
        self._planned_from: Pose | None = None

    def act(
        self, state: Float[np.ndarray, " 5"], velocity: Float[np.ndarray, " 2"]
    ) -> Float32[np.ndarray, " 2"]:
        """Choose the agent's next target.

        Args:
            state: Agent x, y, block x, y in px, block angle in rad.
            velocity: Of the agent, in px/s.

        Returns:
            Target on the board, in px.
        """
        agent = np.asarray(state[:2], dtype=np.float64)
        block = Pose(*(float(value) for value in state[2:]))
        target = self._next_target(agent, np.asarray(velocity, dtype=np.float64), block)
        self._target = np.clip(target, 0.0, float(BOARD_PX))
        return self._target.astype(np.float32)

    def _next_target(
        self, agent: Float[np.ndarray, " 2"], velocity: Float[np.ndarray, " 2"], block: Pose
    ) -> Float[np.ndarray, " 2"]:
        if self._phase == "back off":
            self._phase = "plan"
            return self._turning_point
        if self._phase == "settle":
            assert self._target is not None
            if np.hypot(*(self._target - agent)) >= self.config.settled_px[1]:
                return self._target
            self._phase = "plan"
        if self._phase == "plan":
            self._push = self._plan(agent, velocity, block)
            self._walked_px = 0.0
            self._waited = 0
            self._phase = "approach"
        push = self._push
        assert push is not None
        if self._phase == "approach":
            if not self._may_push(push, agent, velocity, block):
                return self._approach(push, agent, velocity, block)
            self._phase = "push"
            self._walked_px = 0.0
        return self._advance(push, agent, velocity)

    # Planning

    def _plan(
        self, agent: Float[np.ndarray, " 2"], velocity: Float[np.ndarray, " 2"], block: Pose
    ) -> Push:
        config, grid = self.config, self._grid
        error = float(block_error(corners_of(np.array(block)), self.goal))
        approach_speed = self._generator.uniform(*config.approach_speed)
        push_speed = self._generator.uniform(*config.push_speed)

        way_out = self._way_out(agent, velocity, block)
        origin = block.to_block(way_out[-1])
        starts, headings = block.to_board(grid.starts), grid.headings @ block.rotation.T
        corner_usable = self._inside(block.to_board(grid.corners))
        run_up = (
            grid.run_up_clear
            & self._inside(block.to_board(grid.run_ups))
            & (not config.settle_waits)
        )
        far = grid.ways_from(origin, grid.run_ups, grid.run_up_ways, corner_usable)
        near = grid.ways_from(origin, grid.starts, grid.start_ways, corner_usable)
        run_up &= np.isfinite(far[0])
        way_px = np.where(run_up, far[0], near[0])
        reachable = self._inside(starts) & np.isfinite(way_px)

        # Fine corrections are tried in finer strides and not for long.
        longest = float(np.clip(4 * error + 30.0, config.min_push_px, config.max_push_px))
        n_strides = 60
        stride = longest / n_strides
        poses = self._lanes.push(
            block, starts, np.where(reachable[:, None], headings, 0.0), stride, n_strides
        )
        lengths = stride * np.arange(1, n_strides + 1)
        agents = starts + lengths[:, None, None] * headings
        places = corners_of(poses)
        moved = block_error(places, block)
        least = np.clip(0.25 * error, *config.min_gain_px)
        allowed = reachable & self._inside(agents) & (moved >= least)
        cost = self._value(block_error(places, self.goal)) + lengths[:, None] / push_speed
        cost += np.where(wall_gap(places) < config.wall_margin_px, config.wall_penalty, 0.0)
        cost = np.where(allowed, cost, np.inf)

        stop = cost.argmin(axis=0)
        run_up_px = np.where(run_up, config.run_up_px, 0.0)
        total = cost.min(axis=0) + way_px / approach_speed + run_up_px / push_speed
        if not np.isfinite(total).any():
            return self._walk_away(way_out, block, approach_speed)
        best = int(self._disturbed(total, error, block).argmin())
        _, last, before = far if run_up[best] else near
        end = (grid.run_ups if run_up[best] else grid.starts)[best]
        corners, corner = [], int(last[best])
        while corner >= 0:
            corners.insert(0, grid.corners[corner])
            corner = int(before[corner])
        way = np.concatenate([way_out, block.to_board(np.array([*corners, end]))])
        return Push(
            way=way,
            heading=headings[best],
            length_px=float(run_up_px[best] + lengths[stop[best]]),
            approach_speed=approach_speed,
            push_speed=push_speed,
        )

    def _value(self, error_px: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
        """Env steps that the remaining error costs."""
        floor = self.config.error_floor_px
        error = np.maximum(error_px, floor)
        return self.config.log_value * np.log(error / floor) + self.config.linear_value * (
            error - floor
        )

    def _disturbed(
        self, cost: Float[np.ndarray, " push"], error: float, block: Pose
    ) -> Float[np.ndarray, " push"]:
        """Blur the costs: on purpose, for several modes of behaviour, and to leave a dead end."""
        stuck = (
            self._planned_from is not None
            and float(block_error(corners_of(np.array(block)), self._planned_from)) < 0.5
        )
        self._jitter = self._jitter + 4.0 if stuck else 0.0
        self._planned_from = block
        # Gumbel noise of scale s makes the argmin a draw from softmax(-cost / s).
        scale = self.config.plan_noise * min(error / self.config.noise_fade_px, 1.0)
        cost = cost - scale * self._generator.gumbel(size=len(cost))
        return cost + self._jitter * self._generator.exponential(size=len(cost))

    def _way_out(
        self, agent: Float[np.ndarray, " 2"], velocity: Float[np.ndarray, " 2"], block: Pose
    ) -> Float[np.ndarray, "point 2"]:
        """Start of the way: where the target is, or a free place near a hemmed-in agent."""
        config = self.config
        if self._target is not None and self._inside(self._target):
            # The agent is already on its way there.
            path, _ = agent_path(agent, velocity, np.repeat(self._target[None], 4, axis=0))
            here = float(distance_to_block(block.to_block(agent)))
            free = float(distance_to_block(block.to_block(self._target))) >= config.free_px
            touch = distance_to_block(block.to_block(path)).min()
            if free and touch >= min(here, AGENT_RADIUS_PX) - 0.3:
                return self._target[None]
        here = float(distance_to_block(block.to_block(agent)))
        if here >= config.free_px:
            return agent[None]
        radii = np.arange(3.0, 90.0, 3.0)
        angles = np.linspace(0.0, 2 * np.pi, 24, endpoint=False)
        fan = rearrange(
            radii[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1),
            "radius angle xy -> (radius angle) xy",
        )
        there = agent + fan
        clear = least_distance(block.to_block(agent)[None], block.to_block(there))
        distance = distance_to_block(block.to_block(there))
        good = self._inside(there) & (clear >= min(here, AGENT_RADIUS_PX) - 0.05)
        enough = good & (distance >= config.free_px)
        if enough.any():
            return np.stack([agent, there[int(enough.argmax())]])
        if good.any():
            return np.stack([agent, there[int(np.where(good, distance, -np.inf).argmax())]])
        return agent[None]

    def _walk_away(
        self, way_out: Float[np.ndarray, "point 2"], block: Pose, approach_speed: float
    ) -> Push:
        """Without any plan: go somewhere else and look again."""
        low, high = self.config.arena_px
        places = self._generator.uniform(low, high, size=(64, 2))
        clear = least_distance(block.to_block(way_out[-1])[None], block.to_block(places))
        place = places[int(clear.argmax())]
        return Push(
            way=np.concatenate([way_out, place[None]]),
            heading=np.zeros(2),
            length_px=0.0,
            approach_speed=approach_speed,
            push_speed=self.config.push_speed[0],
        )

    def _inside(self, points: Float[np.ndarray, "*batch 2"]) -> Bool[np.ndarray, "*batch"]:
        low, high = self.config.arena_px
        return np.asarray(np.all((points >= low) & (points <= high), axis=-1))

    # Walking

    def _along(
        self, push: Push, walked_px: Float[np.ndarray, " step"]
    ) -> Float[np.ndarray, "step 2"]:
        """Points of the way at these lengths from its beginning."""
        lengths = np.hypot(*np.diff(push.way, axis=0).T)
        reached = np.concatenate([[0.0], np.cumsum(lengths)])
        return np.stack(
            [np.interp(walked_px, reached, push.way[:, axis]) for axis in range(2)], axis=-1
        )

    def _way_px(self, push: Push) -> float:
        return float(np.hypot(*np.diff(push.way, axis=0).T).sum())

    def _approach(
        self,
        push: Push,
        agent: Float[np.ndarray, " 2"],
        velocity: Float[np.ndarray, " 2"],
        block: Pose,
    ) -> Float[np.ndarray, " 2"]:
        """Next target on the way, as far as the agent will not brush the block."""
        here = float(distance_to_block(block.to_block(agent)))
        allowed = min(here, AGENT_RADIUS_PX + 0.5) - 0.05
        remaining = self._way_px(push) - self._walked_px
        if remaining <= 1e-9:
            self._waited += 1
            return push.way[-1]
        speed = push.approach_speed
        for speed in (push.approach_speed, 12.0, 8.0, 5.0, 3.0):
            targets = self._along(push, self._walked_px + speed * np.arange(1, 6))
            path, _ = agent_path(agent, velocity, targets)
            if distance_to_block(block.to_block(path)).min() >= allowed:
                break
        self._walked_px += min(speed, remaining)
        return self._along(push, np.array([self._walked_px]))[0]

    def _may_push(
        self,
        push: Push,
        agent: Float[np.ndarray, " 2"],
        velocity: Float[np.ndarray, " 2"],
        block: Pose,
    ) -> bool:
        """Whether the target may leave the way's end along the line of the push."""
        remaining = self._way_px(push) - self._walked_px
        if self.config.settle_waits:
            lag = np.hypot(*(push.way[-1] - agent))
            settled = bool(lag < self.config.settled_px[0])
            return remaining <= 1e-9 and (settled or self._waited >= 8)
        if remaining > push.approach_speed:
            return False
        if self._waited >= 8:
            return True
        ahead = push.push_speed * np.arange(1, 17)
        targets = push.way[-1] + ahead[:, None] * push.heading
        path, _ = agent_path(agent, velocity, targets)
        touching = distance_to_block(block.to_block(path)) < AGENT_RADIUS_PX + 0.3
        if not touching.any():
            return True
        touch = int(touching.argmax())
        beside = path[touch] - push.way[-1]
        lateral = abs(beside[0] * push.heading[1] - beside[1] * push.heading[0])
        return bool(lateral <= self.config.lateral_tolerance_px)

    # Pushing

    def _advance(
        self,
        push: Push,
        agent: Float[np.ndarray, " 2"],
        velocity: Float[np.ndarray, " 2"],
    ) -> Float[np.ndarray, " 2"]:
        """Move the target along the push; at its end, turn back in time."""
        origin = push.way[-1]
        if self.config.settle_waits:
            n_steps = max(int(np.ceil(push.length_px / push.push_speed)), 1)
            self._walked_px = min(self._walked_px + push.length_px / n_steps, push.length_px)
            if self._walked_px >= push.length_px - 1e-9:
                self._phase = "settle"
            return origin + self._walked_px * push.heading
        progress = float((agent - origin) @ push.heading)
        forward = float(velocity @ push.heading)
        behind = push.length_px - self.config.back_off_px

        def peak(target: float) -> float:
            """Farthest the agent gets when its target turns back after this step."""
            path, _ = agent_path(
                np.array([progress, 0.0]),
                np.array([forward, 0.0]),
                np.array([[target, 0.0], [behind, 0.0]]),
            )
            return float(path[:, 0].max())

        ahead = self._walked_px + push.push_speed
        if peak(ahead) < push.length_px:
            self._walked_px = ahead
            return origin + ahead * push.heading
        low, high = behind, ahead
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if peak(middle) < push.length_px else (low, middle)
        self._turning_point = origin + behind * push.heading
        self._phase = "back off"
        return origin + low * push.heading
