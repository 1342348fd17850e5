"""gym-pusht's picture of the board, to the pixel, in less than half of its time.

What never moves (ground, goal, walls) is drawn once; what gym-pusht draws twice in the same colour,
once; colours are computed once.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pygame
from gym_pusht.envs import pymunk_override
from jaxtyping import Bool, UInt8, UInt32

if TYPE_CHECKING:
    from pymunk import Vec2d
    from pymunk.space_debug_draw_options import SpaceDebugColor

Color = tuple[int, int, int, int]

BOARD_PX = 512
EDGE_RADIUS_PX = 2
"""Of the lines around the block, which gym-pusht draws over its edges."""
MARGIN_PX = 4
"""Beyond what is drawn, for lines that are wider at their ends."""
NOTHING = 0
"""Pixels of a new surface."""


def _pixels(surface: pygame.Surface) -> UInt32[np.ndarray, "height width"]:
    """Look into a surface's memory; nothing can be copied onto it while somebody looks."""
    return np.frombuffer(cast(Any, surface.get_buffer()), np.uint32).reshape(surface.get_size())


@cache
def _colors(fill_color: "SpaceDebugColor") -> tuple[Color, Color]:
    """Of an outline and of what it encloses."""
    return fill_color.as_int(), pymunk_override.light_color(fill_color).as_int()


def _draw_edge(
    surface: pygame.Surface, start: tuple[int, int], end: tuple[int, int], color: Color
) -> None:
    """Draw a line of twice the radius, without its round ends."""
    pygame.draw.lines(surface, color, False, [start, end], 2 * EDGE_RADIUS_PX)
    along = (abs(end[0] - start[0]), abs(end[1] - start[1]))
    if along == (0, 0):
        return
    scale = EDGE_RADIUS_PX / (along[1] * along[1] + along[0] * along[0]) ** 0.5
    dx, dy = round(along[1] * scale), round(along[0] * scale)
    sides = [
        (start[0] - dx, start[1] - dy),
        (start[0] + dx, start[1] + dy),
        (end[0] + dx, end[1] + dy),
        (end[0] - dx, end[1] - dy),
    ]
    pygame.draw.polygon(surface, color, sides)


class _Wall(NamedTuple):
    place: tuple[slice, slice]
    color: np.uint32
    is_wall: Bool[np.ndarray, "row column"]


class BoardPainter(pymunk_override.DrawOptions):
    """Draws boards, again and again on the same surface."""

    def __init__(self) -> None:
        super().__init__(pygame.Surface((BOARD_PX, BOARD_PX)))
        self._pixels = _pixels(self.surface)
        self._ground = self._pixels.copy()
        self._goal_pose: tuple[float, ...] | None = None
        self._painted: list[tuple[slice, slice]] = []
        self._walls: dict[tuple[Any, ...], _Wall] = {}

    def paint(self, env: Any) -> UInt8[np.ndarray, "512 512 4"]:
        """Draw the board of a ``gym_pusht`` environment.

        Returns:
            Blue, green, red and a byte that means nothing; valid until the next is drawn.
        """
        goal_pose = tuple(env.goal_pose.tolist())
        if goal_pose != self._goal_pose:
            self._draw_ground(env)
            self._goal_pose = goal_pose
        for place in self._painted:
            self._pixels[place] = self._ground[place]
        self._painted = []
        env.space.debug_draw(self)
        return self._pixels.view(np.uint8).reshape(BOARD_PX, BOARD_PX, 4)

    def _draw_ground(self, env: Any) -> None:
        self.surface.fill((255, 255, 255))
        goal = env.get_goal_pose_body(env.goal_pose)
        for shape in env._block_shapes:
            corners = [goal.local_to_world(corner) for corner in shape.get_vertices()]
            places = [(round(x), round(y)) for x, y in corners]
            pygame.draw.polygon(self.surface, pygame.Color("LightGreen"), [*places, places[0]])
        self._ground = self._pixels.copy()

    def _mark(self, corners: Sequence[tuple[float, float]], reach_px: int) -> None:
        """Remember where the ground is painted over."""
        columns, rows = [x for x, _ in corners], [y for _, y in corners]
        self._painted.append(
            (
                slice(max(int(min(rows)) - reach_px, 0), max(int(max(rows)) + reach_px, 0)),
                slice(max(int(min(columns)) - reach_px, 0), max(int(max(columns)) + reach_px, 0)),
            )
        )

    def draw_circle(
        self,
        pos: "Vec2d",
        angle: float,
        radius: float,
        outline_color: "SpaceDebugColor",
        fill_color: "SpaceDebugColor",
    ) -> None:
        """Draw the agent."""
        edge, inside = _colors(fill_color)
        centre = round(pos[0]), round(pos[1])
        pygame.draw.circle(self.surface, edge, centre, round(radius))
        pygame.draw.circle(self.surface, inside, centre, round(radius - 4))
        self._mark([centre], round(radius) + MARGIN_PX)

    def draw_segment(self, a: "Vec2d", b: "Vec2d", color: "SpaceDebugColor") -> None:
        """Draw a contact."""
        super().draw_segment(a, b, color)
        self._mark([a, b], MARGIN_PX)

    def draw_fat_segment(
        self,
        a: tuple[float, float],
        b: tuple[float, float],
        radius: float,
        outline_color: "SpaceDebugColor",
        fill_color: "SpaceDebugColor",
    ) -> None:
        """Draw a wall: the first time as gym-pusht does, later from memory."""
        key = (a, b, radius, fill_color)
        if key not in self._walls:
            sheet = pygame.Surface(self.surface.get_size())
            board, self.surface = self.surface, sheet
            super().draw_fat_segment(a, b, radius, outline_color, fill_color)
            self.surface = board
            drawn = _pixels(sheet)
            is_wall = drawn != NOTHING
            rows, columns = np.flatnonzero(is_wall.any(1)), np.flatnonzero(is_wall.any(0))
            place = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            self._walls[key] = _Wall(place, drawn[place].max(), is_wall[place])
        wall = self._walls[key]
        np.copyto(self._pixels[wall.place], wall.color, where=wall.is_wall)

    def draw_polygon(
        self,
        verts: Sequence[tuple[float, float]],
        radius: float,
        outline_color: "SpaceDebugColor",
        fill_color: "SpaceDebugColor",
    ) -> None:
        """Draw a part of the block."""
        edge, inside = _colors(fill_color)
        corners = [(round(x), round(y)) for x, y in verts]
        pygame.draw.polygon(self.surface, inside, [*corners, corners[0]])
        for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
            _draw_edge(self.surface, start, end, edge)
            pygame.draw.circle(self.surface, edge, end, EDGE_RADIUS_PX)
        self._mark(corners, EDGE_RADIUS_PX + MARGIN_PX)
