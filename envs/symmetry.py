"""Does a mirrored world do in a mirror what the original does? The same actions in both, compared.

A script (a start and actions of the original world) is played twice: in the original, and mirrored
in the mirrored world. What the second shows must be the mirror image of what the first showed.
Controls break one part of the mirror on purpose: a test that they pass would show nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from envs.mirrored import mirrored_picture
from envs.task import ArmTask, Environment, EnvironmentObservation, Task
from policies.mirror import Mirror

EXACT = 1e-6
"""Largest difference of states (in their unit, e.g. px; angles in rad) and of scores that counts as
none: rounding adds up to some 1e-12 px over an episode of PushT."""
EXACT_OBSERVED = 1e-3
"""Largest difference of keypoints, which are observed as float32 (PushT: up to 3e-5 px each)."""
VISIBLE = 8
"""Levels of 255 by which a pixel differs visibly."""


@dataclass(frozen=True)
class Script:
    """What is done in the original world."""

    name: str
    """For tables, e.g. ``seed 3``."""
    start: Float[np.ndarray, " simulator"]
    """State of the simulator."""
    actions: Float[np.ndarray, "step action"]
    """One for each control step, in data units."""

    def __post_init__(self) -> None:
        if not len(self.actions):
            raise ValueError(f"{self.name}: there are no actions to replay")


@dataclass(frozen=True)
class MirroredWorld:
    """A world that is to behave as the mirror image of a task's original one."""

    name: str
    """Part of file names, e.g. ``arm1``."""
    title: str
    """What it is, for tables."""
    mirror: Mirror
    """Between the original and this world."""
    make: Callable[[], Environment]
    """Build its environment."""
    exact: Literal["always", "undisturbed", "often"]
    """When anything but the exact mirror image is an error: at any instant; until something that is
    not symmetric is touched; never, since it is no more than usual."""
    disturbed: Callable[[Float[np.ndarray, "instant simulator"]], Bool[np.ndarray, " instant"]] = (
        lambda states: np.zeros(len(states), bool)
    )
    """Whether something that is not symmetric touches the original world in these states."""


@runtime_checkable
class ScriptedTask(Protocol):
    """A task with a player of its own: an optional capability.

    With it the symmetry test needs no demonstrations.
    """

    def script(self, seed: int, n_steps: int) -> Script:
        """Play the episode that belongs to a seed for exactly ``n_steps`` steps."""
        ...


@runtime_checkable
class SymmetricTask(Protocol):
    """A task that knows of mirrored worlds beside its arms: an optional capability."""

    def mirrored_worlds(self) -> tuple[MirroredWorld, ...]:
        """Worlds to compare with the original."""
        ...


@dataclass(frozen=True)
class Played:
    """What happened when a script was played."""

    states: Float[np.ndarray, "instant simulator"]
    """Before the first step and after each one."""
    scores: Float[np.ndarray, " step"]
    rewards: Float[np.ndarray, " step"]
    terminated: Bool[np.ndarray, " step"]
    seen: tuple[EnvironmentObservation, ...]
    """Some of the instants, from the first one on."""


@dataclass(frozen=True)
class EpisodeSymmetry:
    """How far a mirrored world was from the mirror image of one script."""

    name: str
    """Of the script."""
    position: Float[np.ndarray, " instant"]
    """Largest difference of any coordinate of the state, in its unit."""
    angle_rad: Float[np.ndarray, " instant"]
    """Largest difference of any angle of the state; NaN for a state without one."""
    score: Float[np.ndarray, " step"]
    """Difference of the score."""
    reward: Float[np.ndarray, " step"]
    """Difference of the reward."""
    ends_apart: Bool[np.ndarray, " step"]
    """Whether one world is terminated and the other is not."""
    picture_error: Float[np.ndarray, " look"]
    """Mean absolute difference of all cameras' pixels, in levels of 255; NaN without a camera."""
    pixel_share: Float[np.ndarray, " look"]
    """Share of pixels that differ by more than :data:`VISIBLE` in a channel."""
    keypoints: Float[np.ndarray, " look"]
    """Largest difference of the environment state; NaN where there is none."""
    looked_every: int
    """Steps between two instants that were looked at."""
    first_disturbed: int | None
    """First instant at which the original was touched by what is not symmetric."""

    @cached_property
    def is_apart(self) -> Bool[np.ndarray, " instant"]:
        """Whether states differ by more than :data:`EXACT`."""
        return (self.position > EXACT) | (self.angle_rad > EXACT)

    @property
    def first_divergence(self) -> int | None:
        """First instant at which states differ; None for none."""
        return int(self.is_apart.argmax()) if self.is_apart.any() else None

    @property
    def undisturbed(self) -> slice:
        """Instants before the first disturbance."""
        return slice(0, self.first_disturbed)

    @property
    def agreeing_looks(self) -> slice:
        """Looks before states differ: what they show is comparable."""
        first = self.first_divergence
        return slice(0, None if first is None else -(-first // self.looked_every))

    def to_dict(self) -> dict:
        """Plain values; null for what there is nothing to say of."""
        return {
            "name": self.name,
            "n_steps": len(self.position) - 1,
            **_known(
                {
                    "position_median": float(np.median(self.position)),
                    "position_max": float(self.position.max()),
                    "angle_rad_max": float(self.angle_rad.max()),
                    "score_difference": float(self.score.max()),
                    "reward_difference": float(self.reward.max()),
                    "n_ends_apart": int(self.ends_apart.sum()),
                    "picture_error": float(self.picture_error.mean()),
                    "pixel_share": float(self.pixel_share.mean()),
                    "keypoints": float(self.keypoints.max()),
                }
            ),
            "first_disturbed": self.first_disturbed,
            "first_divergence": self.first_divergence,
        }


@dataclass(frozen=True)
class Check:
    """A number, and the side of its tolerance on which it belongs."""

    world: str
    what: str
    value: float
    tolerance: float
    unit: str
    must_hold: bool
    """Whether a failure is an error, and not a fact about the world."""
    is_control: bool = False
    """Whether the value belongs above the tolerance: something was broken on purpose."""

    @property
    def passed(self) -> bool:
        """Whether the value is where it belongs; what is not finite is not."""
        if self.is_control:
            return self.value > self.tolerance
        return self.value <= self.tolerance

    def to_dict(self) -> dict:
        """Plain values."""
        return {
            "world": self.world,
            "what": self.what,
            "value": self.value,
            "tolerance": self.tolerance,
            "unit": self.unit,
            "must_hold": self.must_hold,
            "is_control": self.is_control,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class WorldSymmetry:
    """How far a mirrored world is from the mirror image of the original."""

    world: MirroredWorld
    episodes: tuple[EpisodeSymmetry, ...]
    twice: float
    """Largest change of an observation, state or action that was mirrored twice."""
    controls: tuple[Check, ...]
    """What the same comparison says of mirrors that were broken on purpose."""

    @property
    def positions(self) -> Float[np.ndarray, " instant"]:
        """Differences of states of all episodes, one after the other."""
        return np.concatenate([episode.position for episode in self.episodes])

    def summary(self) -> dict[str, float | int]:
        """Numbers over all episodes; pictures and keypoints of instants with equal states.

        What nobody could look at is NaN.
        """
        episodes = self.episodes

        def worst(values: Iterable[np.ndarray]) -> float:
            joined = np.concatenate(list(values))
            return float(joined.max()) if len(joined) else float("nan")

        def mean(values: Iterable[np.ndarray]) -> float:
            joined = np.concatenate(list(values))
            return float(joined.mean()) if len(joined) else float("nan")

        return {
            "n_episodes": len(episodes),
            "n_steps": sum(len(each.score) for each in episodes),
            "position_median": float(np.median(self.positions)),
            "position_p99": float(np.quantile(self.positions, 0.99)),
            "position_max": float(self.positions.max()),
            "position_max_undisturbed": worst(each.position[each.undisturbed] for each in episodes),
            "angle_rad_max": worst(each.angle_rad for each in episodes),
            "angle_rad_max_undisturbed": worst(
                each.angle_rad[each.undisturbed] for each in episodes
            ),
            "share_exact": float(np.mean([not each.is_apart.any() for each in episodes])),
            "share_of_instants_exact": 1 - mean(each.is_apart for each in episodes),
            "n_disturbed": sum(each.first_disturbed is not None for each in episodes),
            "n_diverged": sum(each.first_divergence is not None for each in episodes),
            "n_diverged_undisturbed": sum(
                bool(each.is_apart[each.undisturbed].any()) for each in episodes
            ),
            "score_difference": worst(each.score for each in episodes),
            "reward_difference": worst(each.reward for each in episodes),
            "n_ends_apart": int(sum(each.ends_apart.sum() for each in episodes)),
            "n_looks": sum(len(each.picture_error[each.agreeing_looks]) for each in episodes),
            "picture_error": mean(each.picture_error[each.agreeing_looks] for each in episodes),
            "pixel_share": mean(each.pixel_share[each.agreeing_looks] for each in episodes),
            "keypoints": worst(each.keypoints[each.agreeing_looks] for each in episodes),
            "twice": self.twice,
        }

    def checks(self, unit: str, score_name: str) -> tuple[Check, ...]:
        """What has to hold; of worlds that may differ, what would hold if they did not; controls.

        Args:
            unit: Of coordinates, e.g. ``px``.
            score_name: What the score measures.
        """
        found, must = self.summary(), self.world.exact == "always"
        undisturbed = must or self.world.exact == "undisturbed"
        exact_pictures, exact_pixels = (0.0, 0.0) if must else (1.0, 0.01)
        rows = [
            ("mirrored twice", "twice", EXACT, unit, True),
            ("keypoints", "keypoints", EXACT_OBSERVED, unit, True),
            ("state, undisturbed", "position_max_undisturbed", EXACT, unit, undisturbed),
            ("angle, undisturbed", "angle_rad_max_undisturbed", EXACT, "rad", undisturbed),
            ("state", "position_max", EXACT, unit, must),
            ("angle", "angle_rad_max", EXACT, "rad", must),
            (score_name, "score_difference", EXACT, "", must),
            ("reward", "reward_difference", EXACT, "", must),
            ("steps that end in one world only", "n_ends_apart", 0.0, "", must),
            ("pictures, mean error", "picture_error", exact_pictures, "of 255", must),
            (f"share of pixels off by > {VISIBLE}", "pixel_share", exact_pixels, "", must),
        ]
        checks = [
            Check(self.world.name, what, float(found[key]), tolerance, its_unit, needed)
            for what, key, tolerance, its_unit, needed in rows
            # Where nothing can disturb, "undisturbed" says the same twice; NaN says nothing.
            if not (must and key.endswith("_undisturbed")) and np.isfinite(found[key])
        ]
        return (*checks, *self.controls)


@dataclass(frozen=True)
class SymmetryResult:
    """The symmetry test of a task."""

    task_name: str
    score_name: str
    unit: str
    worlds: tuple[WorldSymmetry, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        """Of all worlds."""
        return tuple(
            check for world in self.worlds for check in world.checks(self.unit, self.score_name)
        )

    @property
    def passed(self) -> bool:
        """Whether all holds that must."""
        return all(check.passed for check in self.checks if check.must_hold)

    def to_dict(self) -> dict:
        """Plain values."""
        return {
            "task": self.task_name,
            "score": self.score_name,
            "unit": self.unit,
            "passed": self.passed,
            "checks": [check.to_dict() for check in self.checks],
            "worlds": [
                {
                    "name": each.world.name,
                    "title": each.world.title,
                    "exact": each.world.exact,
                    "summary": _known(each.summary()),
                    "episodes": [episode.to_dict() for episode in each.episodes],
                }
                for each in self.worlds
            ],
        }


def mirrored_worlds(task: Task) -> tuple[MirroredWorld, ...]:
    """All worlds to compare with a task's arm 0: its other arms, and those that it knows beside.

    Raises:
        ValueError: If the task has no second arm.
    """
    if not isinstance(task, ArmTask) or task.n_arms < 2:
        raise ValueError(
            f"task {task.name} has no second arm, so there is no mirror to test; implement "
            "envs.task.ArmTask"
        )
    worlds = []
    for arm_idx in range(1, task.n_arms):
        mirror = task.arm_mirror(arm_idx)
        if mirror is None:
            raise ValueError(f"task {task.name}: arm {arm_idx} has no mirror; give arm_mirror one")
        make = task.of_arm(arm_idx).make
        worlds.append(MirroredWorld(f"arm{arm_idx}", "mirrored arm", mirror, make, "always"))
    return (*worlds, *(task.mirrored_worlds() if isinstance(task, SymmetricTask) else ()))


def mirrored_script(script: Script, mirror: Mirror) -> Script:
    """The mirror image of what is done."""
    return replace(
        script,
        start=_state(mirror, script.start),
        actions=mirror.vectors(torch.from_numpy(script.actions)).numpy(),
    )


def play(env: Environment, script: Script, look_every: int) -> Played:
    """Do what a script says; the episode goes on where the benchmark would end it.

    Args:
        env: Put into the script's start.
        script: In the frame of ``env``.
        look_every: Steps between two observations, each of which renders.

    Raises:
        ValueError: If ``look_every`` is not positive.
    """
    if look_every < 1:
        raise ValueError(f"look_every is {look_every}: give at least 1 step")
    env.reset_to(script.start)
    states, outcomes, seen = [env.state()], [], [env.observe()]
    for step, action in enumerate(script.actions, start=1):
        outcomes.append(env.step(action))
        states.append(env.state())
        if step % look_every == 0:
            seen.append(env.observe())
    return Played(
        states=np.array(states, np.float64),
        scores=np.array([outcome.score for outcome in outcomes], np.float64),
        rewards=np.array([outcome.reward for outcome in outcomes], np.float64),
        terminated=np.array([outcome.terminated for outcome in outcomes], bool),
        seen=tuple(seen),
    )


def compare(
    world: MirroredWorld, script: Script, original: Played, mirrored: Played, look_every: int
) -> EpisodeSymmetry:
    """Hold what a mirrored world did against the mirror image of the original.

    Args:
        world: That was played in.
        script: That was played.
        original: In the original world.
        mirrored: In the mirrored world.
        look_every: As both were played.
    """
    mirror = world.mirror
    position, angle_rad = _state_difference(mirror, original.states, mirrored.states)
    errors, shares, keypoints = [], [], []
    for first, second in zip(original.seen, mirrored.seen, strict=True):
        pictures = [
            _picture_difference(mirrored_picture(mirror, picture), second["images"][camera])
            for camera, picture in first["images"].items()
        ]
        levels = np.concatenate([np.empty((0, 3)), *(each.reshape(-1, 3) for each in pictures)])
        errors.append(levels.mean() if len(levels) else np.nan)
        shares.append((levels.max(axis=-1) > VISIBLE).mean() if len(levels) else np.nan)
        keypoints.append(_keypoint_difference(mirror, first, second))
    disturbed = world.disturbed(original.states)
    return EpisodeSymmetry(
        name=script.name,
        position=position,
        angle_rad=angle_rad,
        score=np.abs(original.scores - mirrored.scores),
        reward=np.abs(original.rewards - mirrored.rewards),
        ends_apart=original.terminated != mirrored.terminated,
        picture_error=np.array(errors),
        pixel_share=np.array(shares),
        keypoints=np.array(keypoints),
        looked_every=look_every,
        first_disturbed=int(disturbed.argmax()) if disturbed.any() else None,
    )


def measure_symmetry(
    task: Task,
    scripts: Sequence[Script],
    look_every: int = 5,
    progress: Callable[[int], object] = lambda n_done: None,
) -> SymmetryResult:
    """Play every script in the original world and, mirrored, in all mirrored ones.

    Args:
        task: With two arms at least.
        scripts: Of arm 0.
        look_every: Steps between two observations.
        progress: Called with the number of scripts that are done.

    Raises:
        ValueError: If the task has no second arm, or there is no script.
    """
    worlds = mirrored_worlds(task)
    if not scripts:
        raise ValueError("there is no script to replay")
    assert isinstance(task, ArmTask)
    original_env = task.of_arm(0).make()
    envs = [world.make() for world in worlds]
    episodes: list[list[EpisodeSymmetry]] = [[] for _ in worlds]
    controls: list[list[dict[str, float]]] = [[] for _ in worlds]
    twice = [0.0] * len(worlds)
    try:
        for n_done, script in enumerate(scripts):
            progress(n_done)
            original = play(original_env, script, look_every)
            for place, (world, env) in enumerate(zip(worlds, envs, strict=True)):
                mirrored = play(env, mirrored_script(script, world.mirror), look_every)
                episodes[place].append(compare(world, script, original, mirrored, look_every))
                twice[place] = max(twice[place], _change_by_two(world.mirror, script, original))
                looks = episodes[place][-1].agreeing_looks
                controls[place].append(_broken(world, env, script, original, mirrored, looks))
        progress(len(scripts))
    finally:
        for env in (original_env, *envs):
            env.close()
    unit = _unit(original_env)
    return SymmetryResult(
        task_name=task.name,
        score_name=task.score_name,
        unit=unit,
        worlds=tuple(
            WorldSymmetry(
                world,
                tuple(episodes[place]),
                twice[place],
                _control_checks(world, controls[place], episodes[place], unit),
            )
            for place, world in enumerate(worlds)
        ),
    )


CONTROL_TOLERANCES = {
    "actions not mirrored": EXACT,
    "angle of the start not mirrored": EXACT,
    "keypoints keep their places": EXACT_OBSERVED,
    "pictures not mirrored": 0.0,
}
"""What is broken on purpose, and the tolerance that the difference must exceed: of pictures, more
than they are off when they are mirrored, however small the objects."""


def _broken(
    world: MirroredWorld,
    env: Environment,
    script: Script,
    original: Played,
    mirrored: Played,
    looks: slice,
) -> dict[str, float]:
    """What the comparison says when one part of the mirror is left out, by the part's name."""
    mirror, found = world.mirror, {}
    right = mirrored_script(script, mirror)

    def way_off(wrong: Script) -> float:
        played = play(env, wrong, len(wrong.actions) + 1)
        # The start is as it was put: it says nothing of what came of it.
        return float(_state_difference(mirror, original.states, played.states)[0][1:].max())

    # Worlds that may differ from their mirror image show no more in these two than they are.
    if world.exact == "always":
        wrong = replace(right, actions=script.actions)
        found["actions not mirrored"] = way_off(wrong)
    columns = list(mirror.angle_columns)
    # What nothing turned would have stood anywhere at any angle.
    if world.exact == "always" and np.ptp(original.states[:, columns], axis=0).any():
        start = right.start.copy()
        start[columns] = script.start[columns]
        found["angle of the start not mirrored"] = way_off(replace(right, start=start))
    pairs = list(zip(original.seen, mirrored.seen, strict=True))[looks]
    if mirror.point_order and pairs:
        unordered = replace(mirror, point_order=())
        found["keypoints keep their places"] = max(
            _keypoint_difference(unordered, *pair) for pair in pairs
        )
    differences = [
        _picture_difference(picture, second["images"][camera]).mean()
        for first, second in pairs
        for camera, picture in first["images"].items()
    ]
    if differences:
        found["pictures not mirrored"] = float(np.mean(differences))
    return found


def _control_checks(
    world: MirroredWorld,
    found: Sequence[dict[str, float]],
    episodes: Sequence[EpisodeSymmetry],
    unit: str,
) -> tuple[Check, ...]:
    """The largest of every control: it shows in some episode, or the test sees nothing."""
    tolerances = dict(CONTROL_TOLERANCES)
    errors = np.concatenate([each.picture_error[each.agreeing_looks] for each in episodes])
    if world.exact != "always" and len(errors):
        tolerances["pictures not mirrored"] = float(errors.mean())
    return tuple(
        Check(
            world.name,
            f"control: {name}",
            max(each[name] for each in found if name in each),
            tolerance,
            "of 255" if name.startswith("pictures") else unit,
            must_hold=True,
            is_control=True,
        )
        for name, tolerance in tolerances.items()
        if any(name in each for each in found)
    )


def _change_by_two(mirror: Mirror, script: Script, original: Played) -> float:
    """How far what is mirrored twice is from what it was; angles in rad, pictures in levels."""

    def change(back: Tensor, values: Tensor) -> float:
        difference = (back.double() - values.double()).abs()
        return float(difference.max()) if difference.numel() else 0.0

    actions, states = torch.from_numpy(script.actions), torch.from_numpy(original.states)
    n_angles = len(mirror.angle_columns)
    angles = states[:, states.shape[1] - n_angles :]
    twice = mirror.simulator_state(mirror.simulator_state(states))
    turn = mirror.angles(mirror.angles(angles)) - angles
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    found = [
        change(mirror.vectors(mirror.vectors(actions)), actions),
        change(twice[:, : states.shape[1] - n_angles], states[:, : states.shape[1] - n_angles]),
        change(turn, torch.zeros_like(turn)),
    ]
    for seen in original.seen:
        keypoints = torch.from_numpy(seen["environment_state"]).double()
        found.append(
            change(mirror.environment_state(mirror.environment_state(keypoints)), keypoints)
        )
        for picture in seen["images"].values():
            back = mirrored_picture(mirror, mirrored_picture(mirror, picture))
            found.append(float(_picture_difference(back, picture).max()))
    return max(found)


def _known(values: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """Null in the place of NaN, which JSON has not."""
    return {name: None if value != value else value for name, value in values.items()}


def _unit(env: Environment) -> str:
    """Unit of the state's coordinates, where the environment says so."""
    parameters = getattr(env, "pose_parameters", ())
    return parameters[0].unit if parameters else ""


def _state(mirror: Mirror, state: Float[np.ndarray, "*instant simulator"]) -> np.ndarray:
    return mirror.simulator_state(torch.from_numpy(np.asarray(state, np.float64))).numpy()


def _state_difference(
    mirror: Mirror,
    original: Float[np.ndarray, "instant simulator"],
    mirrored: Float[np.ndarray, "instant simulator"],
) -> tuple[Float[np.ndarray, " instant"], Float[np.ndarray, " instant"]]:
    """Largest difference of coordinates, and of angles in rad on the circle."""
    difference = _state(mirror, original) - mirrored
    is_angle = np.isin(np.arange(difference.shape[1]), mirror.angle_columns)
    position = np.abs(difference[:, ~is_angle]).max(axis=1)
    if not is_angle.any():
        return position, np.full(len(position), np.nan)
    angles = np.abs((difference[:, is_angle] + np.pi) % (2 * np.pi) - np.pi)
    return position, angles.max(axis=1)


def _keypoint_difference(
    mirror: Mirror, first: EnvironmentObservation, second: EnvironmentObservation
) -> float:
    keypoints = torch.from_numpy(first["environment_state"]).double()
    difference = mirror.environment_state(keypoints).numpy() - second["environment_state"]
    return float(np.abs(difference).max()) if difference.size else float("nan")


def _picture_difference(
    first: UInt8[np.ndarray, "height width 3"], second: UInt8[np.ndarray, "height width 3"]
) -> Int[np.ndarray, "height width 3"]:
    """In levels of 255."""
    return np.abs(first.astype(np.int16) - second.astype(np.int16))
