"""What the numbers of an action are called and how far they reach; any two of them make a board."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from landscapes.grid import Grid

MARGIN = 0.1
"""Added to the demonstrated range on either side, as a share of it."""


@runtime_checkable
class Described(Protocol):
    """What a task says of one number of its actions (:class:`envs.task.ActionDimension`)."""

    @property
    def name(self) -> str:
        """E.g. ``left_waist``."""
        ...

    @property
    def unit(self) -> str:
        """Empty for a number without one."""
        ...

    @property
    def low(self) -> float:
        """Smallest accepted value."""
        ...

    @property
    def high(self) -> float:
        """Largest accepted value."""
        ...


@dataclass(frozen=True)
class Axis:
    """One number of an action, as the axis of a picture."""

    name: str
    """Names metrics and files, too."""
    unit: str
    """Empty for a number without one."""
    low: float
    """Where the axis begins, in data units."""
    high: float
    """Where it ends."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"action dimension {self.name!r}: a name is not empty and holds no /")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"action dimension {self.name}: from {self.low} to {self.high}; give two finite, "
                "ascending values"
            )

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True)
class Plane:
    """Two dimensions of an action: the axes of a board."""

    dims: tuple[int, int]
    """Their places in an action: x, then y."""
    x: Axis
    y: Axis
    is_conditional: bool = False
    """Whether the other dimensions are held at the policy's prediction; they are marginalised
    otherwise."""

    @property
    def name(self) -> str:
        """For metrics and files."""
        return f"{self.x.name}-{self.y.name}"

    def grid(self, resolution: int) -> Grid:
        """The board over both axes."""
        return Grid(resolution, (self.x.low, self.y.low), (self.x.high, self.y.high))


@dataclass(frozen=True)
class ActionSpace:
    """The box that actions lie in, with a name for each dimension."""

    axes: tuple[Axis, ...]
    is_described: bool
    """Whether a task said what the axes are; otherwise the demonstrations did."""

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"action dimensions {names}: give each a name of its own")

    @classmethod
    def of(
        cls,
        described: Sequence[Described] | None,
        low: Float[Tensor, " action"],
        high: Float[Tensor, " action"],
    ) -> "ActionSpace":
        """Take the axes from a task's description, else from the demonstrations.

        Two dimensions that no task describes are taken for PushT's board.

        Args:
            described: One for each dimension; None where no task describes these actions.
            low: Smallest demonstrated action.
            high: Largest demonstrated action.

        Raises:
            ValueError: If the description is of another number of dimensions.
        """
        if described is None and len(low) == 2:
            return PUSH_T
        if described is None:
            unnamed = tuple(Axis(f"action_{i}", "", 0.0, 1.0) for i in range(len(low)))
            return cls(unnamed, False).around(low, high)
        if len(described) != len(low):
            raise ValueError(
                f"the task describes {len(described)} action dimensions, the data have {len(low)}: "
                "give the task that they are of"
            )
        axes = tuple(Axis(each.name, each.unit, each.low, each.high) for each in described)
        return cls(axes, True)

    def around(
        self, low: Float[Tensor, " action"], high: Float[Tensor, " action"]
    ) -> "ActionSpace":
        """The same dimensions over the range of demonstrations, with a margin.

        A dimension that never moves gets an axis of length 1.
        """
        axes = []
        for axis, least, most in zip(self.axes, low.tolist(), high.tolist(), strict=True):
            margin = MARGIN * (most - least) or 0.5
            axes.append(replace(axis, low=least - margin, high=most + margin))
        return replace(self, axes=tuple(axes))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dimensions, in order."""
        return tuple(axis.name for axis in self.axes)

    @property
    def size(self) -> tuple[float, ...]:
        """Length of each axis, data units."""
        return tuple(axis.high - axis.low for axis in self.axes)

    @property
    def log_uniform(self) -> float:
        """Log density of the uniform distribution over the box, nats per unit volume."""
        return -sum(math.log(length) for length in self.size)

    @property
    def board(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Smallest and largest (x, y) of a space of two dimensions, as :class:`Grid` has them."""
        x, y = self.axes
        return (x.low, y.low), (x.high, y.high)

    def plane(self, x: int | str, y: int | str, is_conditional: bool = False) -> Plane:
        """Two dimensions, each by its name or its place.

        Raises:
            ValueError: If there is no such dimension, or both are the same.
        """
        first, second = self._place(x), self._place(y)
        if first == second:
            raise ValueError(f"action_dims {x} {y}: give two different dimensions")
        return Plane((first, second), self.axes[first], self.axes[second], is_conditional)

    def planes(
        self, pairs: Sequence[Sequence[int | str]], is_conditional: bool = False
    ) -> tuple[Plane, ...]:
        """Several planes, whose names tell them from each other and from single dimensions.

        Raises:
            ValueError: As :meth:`plane`; if a pair is named twice, or a name would mean two things.
        """
        found = tuple(self.plane(x, y, is_conditional) for x, y in pairs)
        if len({plane.dims for plane in found}) < len(found):
            raise ValueError(f"action_dims names a pair twice: {[list(pair) for pair in pairs]}")
        names = [*self.names, *(plane.name for plane in found)]
        if both := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"action_dims {[list(pair) for pair in pairs]}: {both} would be the name of two "
                "things; give the task's action dimensions names without -"
            )
        return found

    def widest(self, std: Float[Tensor, " action"]) -> tuple[int, int]:
        """The two dimensions of the largest variance, in their order.

        Raises:
            ValueError: If there are fewer than two.
        """
        if len(self.axes) < 2:
            raise ValueError(
                f"a board has 2 dimensions, the actions have {len(self.axes)}: they have none"
            )
        first, second = sorted(torch.argsort(std, descending=True, stable=True)[:2].tolist())
        return first, second

    def _place(self, given: int | str) -> int:
        if given in self.names:
            return self.names.index(str(given))
        if str(given).isdecimal() and int(given) < len(self.axes):
            return int(given)
        raise ValueError(
            f"action_dims {given}: the actions have the dimensions 0 to {len(self.axes) - 1}: "
            f"{', '.join(self.names)}"
        )


PUSH_T = ActionSpace((Axis("x", "px", 0.0, 512.0), Axis("y", "px", 0.0, 512.0)), True)
"""The board of PushT."""
