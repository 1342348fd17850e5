"""What the simulator knows of each frame, in words: ground truth for a policy's features.

A task offers concepts by one method; nothing else has to know of them.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from envs.push_t import AGENT_RADIUS_PX, BOARD_PX, GOAL_POSE, T_BOXES_PX, T_OUTLINE_PX
from envs.task import Task
from features.concepts import Concepts, onsets, seconds_since_last_frame, time_in_episode
from features.episodes import number_episodes, starts

CONTACT_MARGIN_PX = 0.5
"""Gap between agent and T up to which they touch. In 3776 steps of the scripted expert, 97.4 % of
frames so judged agree with whether the physics found a contact in the 0.1 s before (0 px: 94.2 %,
2 px: 94.1 %): within a step the agent rebounds."""
MOVING_PX_PER_S = 5.0
"""Speed from which the block moves: without a contact it drifts by less than 0.5 px in a step."""
PUSH_GRACE_S = 0.3
"""A block that still moves this long after a contact is being pushed."""
BOARD_THIRDS = 3
"""Cells of the board along each axis, from the upper left: as coarse as the demo's tokens."""
SIDES = ("bar", "stem", "left", "right")
"""Of the T, as it stands upright in its own frame with the bar on top (y points down)."""


@runtime_checkable
class ConceptTask(Protocol):
    """A task that can say what happens in a frame: an optional capability."""

    def concepts(
        self,
        simulator_states: Float[Tensor, "frame simulator"],
        episode_index: Int[Tensor, " frame"],
        frame_index: Int[Tensor, " frame"],
    ) -> Concepts:
        """Describe frames.

        Args:
            simulator_states: As the simulator gave them, episode by episode in the order of time.
            episode_index: Number of each frame's episode.
            frame_index: Its step there.

        Raises:
            ValueError: If the states are not the task's, or frames are not in order.
        """
        ...


def known_concepts(
    task: Task | None,
    simulator_states: Float[Tensor, "frame simulator"] | None,
    episode_index: Int[Tensor, " frame"],
    frame_index: Int[Tensor, " frame"],
) -> Concepts | None:
    """What a task says of frames; None where there is none, or the states are not its own.

    Args:
        task: Of the simulator, or not.
        simulator_states: As the data have them, if they do.
        episode_index: As for :meth:`ConceptTask.concepts`.
        frame_index: As for :meth:`ConceptTask.concepts`.
    """
    if not isinstance(task, ConceptTask) or simulator_states is None:
        return None
    env = task.make()
    try:
        env.reset(0)
        if simulator_states.shape[1] != len(env.state()):
            return None
    finally:
        env.close()
    return task.concepts(simulator_states.cpu(), episode_index.cpu(), frame_index.cpu())


def push_t_concepts(
    simulator_states: Float[Tensor, "frame simulator"],
    episode_index: Int[Tensor, " frame"],
    frame_index: Int[Tensor, " frame"],
    fps: float,
    goal_pose: tuple[float, float, float] = GOAL_POSE,
) -> Concepts:
    """Describe frames of PushT by agent x, y, block x, y in px and the block's angle in rad.

    Continuous: ``agent_x_px``, ``agent_y_px``, ``block_x_px``, ``block_y_px``,
    ``block_angle_sin``, ``block_angle_cos``; ``distance_px`` from the agent's edge to the T's
    (negative where they overlap); ``coverage`` of the goal, 0..1; ``block_speed_px_s``, the mean
    speed of the T's corners, hence also of a T that turns, and ``agent_speed_px_s``, both since the
    frame before; ``time``, the share of the episode that is over.

    Binary: ``contact`` (a gap of at most :data:`CONTACT_MARGIN_PX`) and ``contact_onset``;
    ``side_bar``, ``side_stem``, ``side_left``, ``side_right``: from which side of the T the agent's
    centre comes, one of the quadrants between the diagonals of the T's bounding square (120 px, in
    its own frame: along the bar, at the stem's end, and the two sides between);
    ``phase_approach``, before the episode's first contact; ``phase_push``, in contact, or within
    :data:`PUSH_GRACE_S` after one while the block moves; ``phase_re_approach``, all else;
    ``agent_cell_<row>_<column>`` and ``block_cell_<row>_<column>``: in which ninth of the board the
    agent's centre and the T's origin are, counted from the upper left.

    Args:
        simulator_states: Five numbers a frame, episode by episode in the order of time.
        episode_index: Number of each frame's episode.
        frame_index: Its step there.
        fps: Steps in a second.
        goal_pose: x px, y px, angle rad of the goal: another one in a mirror.

    Raises:
        ValueError: If the states are not PushT's, or frames are not in order.
    """
    if simulator_states.shape[1] != 5 or not simulator_states.isfinite().all():
        raise ValueError(
            f"simulator_states of shape {tuple(simulator_states.shape)}: give agent x, y, block x, "
            "y, angle, all finite"
        )
    if len(simulator_states) != len(episode_index):
        raise ValueError(
            f"{len(simulator_states)} simulator states for {len(episode_index)} frames; give one "
            "for each"
        )
    places = number_episodes(episode_index, frame_index)
    states = simulator_states.double().cpu()
    agent, poses = states[:, :2], states[:, 2:]
    in_block_frame = _in_block_frame(agent, poses)
    corners = _corners(poses)
    gap_px = _distance_to_t(in_block_frame) - AGENT_RADIUS_PX
    contact = gap_px <= CONTACT_MARGIN_PX

    passed_s = seconds_since_last_frame(episode_index, frame_index, fps).cpu()
    agent_speed = _step(agent).norm(dim=-1) / passed_s
    block_speed = _step(corners).norm(dim=-1).mean(-1) / passed_s

    frames = torch.arange(len(states))
    first = frames[starts(episode_index).cpu()][places.cpu()]
    last_contact = torch.where(contact, frames, -1)
    if len(frames):
        last_contact = last_contact.cummax(0).values
    was_touched = last_contact >= first
    time_s = frame_index.double().cpu() / fps
    since_s = time_s - time_s[last_contact.clamp_min(0)]
    # A step of 1/fps is not exact in binary; half a millisecond is no step of any robot.
    is_recent = was_touched & (since_s <= PUSH_GRACE_S + 5e-4)
    push = contact | (is_recent & (block_speed > MOVING_PX_PER_S))

    cells = {
        f"{name}_cell_{row}_{column}": cell
        for name, xy in (("agent", agent), ("block", poses[:, :2]))
        for (row, column), cell in _board_cells(xy)
    }
    x, y = in_block_frame[:, 0], in_block_frame[:, 1] - 60.0
    side = torch.stack([-y, y, -x, x], dim=-1).argmax(-1)
    return Concepts.from_columns(
        continuous={
            "agent_x_px": (agent[:, 0], "px"),
            "agent_y_px": (agent[:, 1], "px"),
            "block_x_px": (poses[:, 0], "px"),
            "block_y_px": (poses[:, 1], "px"),
            "block_angle_sin": (poses[:, 2].sin(), "1"),
            "block_angle_cos": (poses[:, 2].cos(), "1"),
            "distance_px": (gap_px, "px"),
            "coverage": (push_t_coverage(poses, goal_pose), "1"),
            "block_speed_px_s": (block_speed, "px/s"),
            "agent_speed_px_s": (agent_speed, "px/s"),
            "time": (time_in_episode(episode_index, frame_index).cpu(), "1"),
        },
        binary={
            "contact": contact,
            "contact_onset": onsets(contact, episode_index.cpu()),
            **{f"side_{name}": side == place for place, name in enumerate(SIDES)},
            "phase_approach": ~was_touched,
            "phase_push": push,
            "phase_re_approach": was_touched & ~push,
            **cells,
        },
    )


def _board_cells(
    xy: Float[Tensor, "frame 2"],
) -> Iterator[tuple[tuple[int, int], Bool[Tensor, " frame"]]]:
    """Where something is, in thirds of the board: (row, column) and whether it is there."""
    thirds = (xy * BOARD_THIRDS / BOARD_PX).floor().clamp(0, BOARD_THIRDS - 1)
    for row in range(BOARD_THIRDS):
        for column in range(BOARD_THIRDS):
            yield (row, column), (thirds[:, 1] == row) & (thirds[:, 0] == column)


def push_t_coverage(
    poses: Float[Tensor, "frame 3"], goal_pose: tuple[float, float, float] = GOAL_POSE
) -> Float[Tensor, " frame"]:
    """Share of the goal that the T covers, exactly as gym-pusht computes it.

    A pose that comes often is computed once: a resting block costs nothing. About 10 us each.

    Args:
        poses: x px, y px, angle rad of the block.
        goal_pose: The same of the goal.
    """
    import shapely

    distinct, places = torch.unique(poses.double().cpu(), dim=0, return_inverse=True)
    goal = _polygons(torch.tensor([goal_pose], dtype=torch.float64))[0]
    overlap = shapely.area(shapely.intersection(_polygons(distinct), goal))
    return torch.from_numpy(np.asarray(overlap / shapely.area(goal)))[places]


def _polygons(poses: Float[Tensor, "frame 3"]) -> Shaped[np.ndarray, " frame"]:
    """Outlines of the T as shapely sees them."""
    import shapely

    return np.asarray(shapely.polygons(_corners(poses).numpy()))


def _corners(poses: Float[Tensor, "frame 3"]) -> Float[Tensor, "frame corner 2"]:
    """Corners of the T on the board, in px."""
    outline = torch.tensor(T_OUTLINE_PX, dtype=torch.float64)
    turned = einsum(_rotations(poses), outline, "frame to at, corner at -> frame corner to")
    return turned + rearrange(poses[:, :2], "frame xy -> frame 1 xy")


def _in_block_frame(
    points: Float[Tensor, "frame 2"], poses: Float[Tensor, "frame 3"]
) -> Float[Tensor, "frame 2"]:
    """One point of the board in each frame, as the T sees it."""
    return einsum(_rotations(poses), points - poses[:, :2], "frame to at, frame to -> frame at")


def _rotations(poses: Float[Tensor, "frame 3"]) -> Float[Tensor, "frame 2 2"]:
    """From the block's frame to the board."""
    cosine, sine = poses[:, 2].cos(), poses[:, 2].sin()
    return rearrange(
        torch.stack([cosine, -sine, sine, cosine], dim=-1), "frame (to at) -> frame to at", to=2
    )


def _distance_to_t(in_block_frame: Float[Tensor, "frame 2"]) -> Float[Tensor, " frame"]:
    """How far points lie outside the T, in px; 0 within."""
    boxes = rearrange(
        torch.tensor(T_BOXES_PX, dtype=torch.float64), "box (end xy) -> end box xy", end=2
    )
    points = rearrange(in_block_frame, "frame xy -> frame 1 xy")
    outside = torch.maximum(boxes[0] - points, points - boxes[1]).clamp_min(0)
    return outside.norm(dim=-1).amin(-1)


def _step(values: Float[Tensor, "frame *other"]) -> Float[Tensor, "frame *other"]:
    """Change since the frame before; 0 in the first."""
    return torch.cat([torch.zeros_like(values[:1]), values.diff(dim=0)])
