"""What a rollout needs to know of a task: a new task is one file, and no change elsewhere."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

if TYPE_CHECKING:
    from policies.interface import DataSchema
    from policies.mirror import Mirror


class EnvironmentObservation(TypedDict):
    """What one environment shows at one instant, before it becomes a batch of tensors."""

    images: Mapping[str, UInt8[np.ndarray, "height width 3"]]
    """Camera name to RGB picture."""
    state: Float[np.ndarray, " state"]
    """Proprioception (qpos), in the units of the data."""
    environment_state: Float[np.ndarray, " environment"]
    """Privileged features, for policies that ask for them."""
    simulator_state: Float[np.ndarray, " simulator"]
    """What resets the simulator to this instant."""


class Transition(NamedTuple):
    """Outcome of one control step."""

    score: float
    """How far the task is solved, in the task's own measure (PushT: coverage)."""
    reward: float
    """The reward that the benchmark itself reports."""
    terminated: bool
    """True when the benchmark ends the episode here."""


@runtime_checkable
class Environment(Protocol):
    """One simulated episode at a time."""

    def reset(self, seed: int) -> None:
        """Start the episode that belongs to ``seed``."""
        ...

    def reset_to(self, state: Float[np.ndarray, " simulator"]) -> None:
        """Put the simulator exactly into a state that :meth:`state` gave, at rest."""
        ...

    def state(self) -> Float[np.ndarray, " simulator"]:
        """Read the simulator's state, without rendering."""
        ...

    def observe(self) -> EnvironmentObservation:
        """Look at the scene: this renders, so it is only called when somebody looks."""
        ...

    def step(self, action: Float[np.ndarray, " action"]) -> Transition:
        """Advance one control step; the action must lie within the task's bounds."""
        ...

    def frame(
        self, size_px: int, target: Float[np.ndarray, " action"] | None = None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Draw the scene for a viewer, with the action in execution where it can be drawn."""
        ...

    def close(self) -> None:
        """Free the simulator; nothing to do for one that holds nothing."""


@dataclass(frozen=True)
class PoseParameter:
    """One number of the simulator's state that says where an object is."""

    name: str
    """E.g. ``agent_x``."""
    owner: str
    """The object that it moves."""
    index: int
    """Its place in the simulator's state."""
    unit: str
    """``deg`` for an angle, else that of a place, the same for all of them (PushT: ``px``)."""
    step: float
    """Of a move to either side, in ``unit``: small against the task, yet to be seen."""
    per_unit: float = 1.0
    """How much of the simulator's state is one ``unit`` (deg: pi / 180)."""


@runtime_checkable
class Scene(Environment, Protocol):
    """An environment that knows its objects: what an optional capability adds.

    With it the simulator can be asked what a picture would show without an object, or with an
    object elsewhere, and where in the picture every object is.
    """

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of what can be taken out of the picture."""
        ...

    @property
    def pose_parameters(self) -> tuple[PoseParameter, ...]:
        """What can be moved: numbers of the state for :meth:`Environment.reset_to`."""
        ...

    def pictures_without(self, name: str) -> Mapping[str, UInt8[np.ndarray, "_ _ 3"]]:
        """Draw the present state without one object, as :meth:`Environment.observe` would.

        The simulation goes on as if nobody had asked.

        Args:
            name: One of :attr:`objects`.

        Returns:
            Camera name to RGB picture.

        Raises:
            ValueError: If there is no such object.
        """
        ...

    def masks(
        self, camera: str, size_px: tuple[int, int], dilation_px: float
    ) -> Mapping[str, Bool[np.ndarray, "height width"]]:
        """Say which pixels of a camera belong to each object, also where another one hides it.

        Args:
            camera: Its name.
            size_px: Height and width of the masks.
            dilation_px: Reach around each object, in the unit of the scene and not in pixels of
                the masks (PushT: px on the 512 x 512 board).

        Returns:
            Object name to True where the centre of a pixel is within reach.

        Raises:
            ValueError: If there is no such camera, or the reach is negative.
        """
        ...


class Task(ABC):
    """A benchmark: how to make its environment, and how it is scored.

    A new task says its name, frequency, step limit and thresholds, describes its actions
    (:class:`DescribedActions`) and makes its environment; the rest follows from these.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files."""

    @property
    @abstractmethod
    def fps(self) -> float:
        """Control frequency in Hz."""

    max_steps: int
    """Control steps after which an episode ends unsolved."""

    @property
    def score_name(self) -> str:
        """What :attr:`Transition.score` measures, e.g. ``coverage``."""
        return "score"

    @property
    def reward_name(self) -> str:
        """What :attr:`Transition.reward` measures, e.g. ``overlap``."""
        return "reward"

    success_thresholds: tuple[float, ...]
    """Scores at which success is reported, ascending; the last is the benchmark's own."""

    def is_success(self, score: float, threshold: float) -> bool:
        """Whether an episode with this best score counts as solved at ``threshold``: reached it."""
        return score >= threshold

    def clip_actions(
        self, actions: Float[np.ndarray, "*batch action"]
    ) -> Float[np.ndarray, "*batch action"]:
        """Bring actions into the bounds that the environment accepts.

        Raises:
            ValueError: If the task does not say what its actions are.
        """
        dimensions = _described(self)
        return np.clip(
            actions, [each.low for each in dimensions], [each.high for each in dimensions]
        )

    def data_schema(self) -> "DataSchema":
        """Columns that demonstrations of this task have: what one look at an environment shows.

        Raises:
            ValueError: If the task does not say what its actions are.
        """
        from policies.interface import DataSchema

        n_actions = len(_described(self))
        env = self.make()
        try:
            env.reset(0)
            seen = env.observe()
        finally:
            env.close()
        sizes = {name: picture.shape for name, picture in seen["images"].items()}
        return DataSchema(
            cameras={name: (height, width) for name, (height, width, _) in sizes.items()},
            state_dim=len(seen["state"]),
            action_dim=n_actions,
            fps=self.fps,
        )

    @classmethod
    def for_policy(cls, schema: "DataSchema") -> "Task":
        """The task as a policy made for ``schema`` sees it, e.g. with pictures of its size.

        Here the task as it is without arguments, for policies that look through its cameras, read
        its state, if any, and give its actions.

        Raises:
            ValueError: When the task cannot show what the policy wants to see, or an argument of it
                has no default.
        """
        try:
            inspect.signature(cls).bind()
        except TypeError as error:
            raise ValueError(
                f"task {cls.__name__} cannot be made without arguments ({error}): give each a "
                "default, or the task a for_policy of its own"
            ) from error
        task = cls()
        offered = task.data_schema()
        others = {
            name: size for name, size in schema.cameras.items() if offered.cameras.get(name) != size
        }
        if (
            others
            or schema.state_dim not in (0, offered.state_dim)
            or schema.action_dim != offered.action_dim
        ):
            raise ValueError(
                f"the policy has cameras {schema.cameras}, a state of {schema.state_dim} and "
                f"actions of {schema.action_dim} dimensions, task {task.name} {offered.cameras}, "
                f"{offered.state_dim} and {offered.action_dim}; give a policy that was trained on "
                "this task"
            )
        return task

    @abstractmethod
    def make(self) -> Environment:
        """Build one environment."""


@dataclass(frozen=True)
class ActionDimension:
    """One number of an action: what axes of pictures are called, and how far they reach."""

    name: str
    """E.g. ``left_waist``."""
    unit: str
    """E.g. ``px`` or ``rad``; empty for a number without one."""
    low: float
    """Smallest value that the environment accepts."""
    high: float
    """Largest value that the environment accepts."""


@runtime_checkable
class DescribedActions(Protocol):
    """A task that says what its actions are: an optional capability.

    With it, landscapes of actions with more than two dimensions have named axes.
    """

    @property
    def action_dimensions(self) -> tuple[ActionDimension, ...]:
        """One for each number of an action, in order."""
        ...


def _described(task: Task) -> tuple[ActionDimension, ...]:
    if not isinstance(task, DescribedActions):
        raise ValueError(
            f"task {task.name} does not say what its actions are: give {type(task).__name__} "
            "action_dimensions, or clip_actions and data_schema of its own"
        )
    return task.action_dimensions


@runtime_checkable
class ActionProjection(Environment, Protocol):
    """An environment that knows where in a picture an action leads: an optional capability.

    With it, landscapes of any number of dimensions are drawn over what the camera sees.
    """

    @property
    def end_effectors(self) -> tuple[str, ...]:
        """Names of what an action moves, e.g. ``left``, ``right``."""
        ...

    def project_actions(
        self, camera: str, actions: Float[np.ndarray, "*batch action"], size_px: tuple[int, int]
    ) -> Float[np.ndarray, "*batch end_effector 2"]:
        """Find where end effectors would be in a picture, had they reached their targets.

        Args:
            camera: Its name.
            actions: In data units.
            size_px: Height and width of the picture.

        Returns:
            x (rightwards) and y (downwards) in px of the picture, from its upper left corner; also
            beyond its borders, and NaN for what lies behind the camera.

        Raises:
            ValueError: If there is no such camera.
        """
        ...


@runtime_checkable
class ArmTask(Protocol):
    """A task with several arms that are mirror images of the first: what transfer is tested on."""

    @property
    def n_arms(self) -> int:
        """How many there are; they are numbered from 0."""
        ...

    def of_arm(self, arm_idx: int) -> Task:
        """The same task with another arm.

        Raises:
            ValueError: If there is no such arm.
        """
        ...

    def arm_mirror(self, arm_idx: int) -> "Mirror | None":
        """What turns an arm's world into that of arm 0, and back; None for arm 0 itself.

        Raises:
            ValueError: If there is no such arm.
        """
        ...
