"""The symmetry test finds what is not symmetric, and only that."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from envs.mirrored import MirroredScene
from envs.push_t import PushT, PushTTask, wander, x_flip
from envs.symmetry import (
    Check,
    MirroredWorld,
    Played,
    Script,
    ScriptedTask,
    SymmetricTask,
    WorldSymmetry,
    compare,
    measure_symmetry,
    mirrored_script,
    mirrored_worlds,
    play,
)
from envs.task import ArmTask, EnvironmentObservation, Transition
from policies.mirror import XFlip

TASK = PushTTask(image_size=48)
PUSH = Script(
    "a push",
    np.array([150.0, 300.0, 256.0, 250.0, 0.4]),
    np.stack([np.linspace(160, 340, 15), np.linspace(300, 320, 15)], axis=1),
)
"""The agent runs into the block and takes it along, far from the walls."""
SHOVE = Script(
    "a shove",
    np.array([330.0, 300.0, 150.0, 250.0, 0.4]),
    np.stack([np.linspace(320, 10, 30), np.linspace(300, 280, 30)], axis=1),
)
"""The agent shoves the block against the left wall and along it."""


def verdicts(result, world: str) -> dict[str, Check]:
    return {check.what: check for check in result.checks if check.world == world}


@pytest.fixture(scope="module")
def result():
    return measure_symmetry(TASK, [PUSH, SHOVE], look_every=5)


def test_push_t_offers_all_capabilities():
    assert isinstance(TASK, ArmTask)
    assert isinstance(TASK, ScriptedTask)
    assert isinstance(TASK, SymmetricTask)
    assert [each.name for each in mirrored_worlds(TASK)] == ["arm1", "native", "anti_diagonal"]


def test_arm_1_passes_with_room_to_spare(result):
    assert result.passed
    found = verdicts(result, "arm1")
    assert all(check.passed and check.must_hold for check in found.values())
    assert found["state"].value < 1e-9
    assert found["pictures, mean error"].value == 0
    assert result.worlds[0].episodes[1].first_disturbed is None


def test_a_simulator_of_its_own_agrees_until_a_wall_is_touched(result):
    push, shove = result.worlds[1].episodes
    assert push.first_disturbed is None
    assert push.position.max() <= 1e-6
    assert shove.first_disturbed is not None
    assert shove.first_divergence is not None
    assert shove.first_divergence >= shove.first_disturbed > 0
    assert shove.position[shove.undisturbed].max() <= 1e-6
    assert shove.position.max() > 0.1
    found = verdicts(result, "native")
    assert found["state, undisturbed"].passed
    assert not found["state"].passed
    assert not found["state"].must_hold


def test_controls_are_seen(result):
    controls = [check for check in result.checks if check.is_control]
    assert {check.world for check in controls} == {"arm1", "native", "anti_diagonal"}
    assert len([check for check in controls if check.world == "arm1"]) == 4
    for check in controls:
        assert check.passed
        assert check.value > 2 * check.tolerance


def test_results_are_plain_values(result):
    import json

    text = json.dumps(result.to_dict(), allow_nan=False)
    again = json.loads(text)
    assert again["passed"] is True
    assert [world["name"] for world in again["worlds"]] == ["arm1", "native", "anti_diagonal"]
    assert again["worlds"][1]["summary"]["n_disturbed"] == 1


class Deaf(MirroredScene):
    """Takes actions as they come."""

    def step(self, action):
        return self.scene.step(action)


@dataclass(frozen=True)
class WrongMirror(PushTTask):
    """Says of its second arm what is not true."""

    broken: str = "points"

    def arm_mirror(self, arm_idx):
        flip = x_flip()
        if arm_idx == 0:
            return None
        if self.broken == "points":
            return replace(flip, point_order=())
        return replace(flip, extent=511.0) if self.broken == "extent" else flip

    def make(self):
        board = PushT(self.image_size)
        if self.arm_idx == 0 or self.broken == "goal":
            return board
        if self.broken == "walls":
            return PushT(self.image_size, goal_pose=self.goal_pose)
        return (Deaf if self.broken == "actions" else MirroredScene)(board, x_flip())


@pytest.mark.parametrize(
    ("broken", "blamed"),
    [
        ("points", "keypoints"),
        ("actions", "state"),
        # The same physics a px further on: only the camera shows it.
        ("extent", "pictures, mean error"),
        ("goal", "share of pixels off by > 8"),
        ("walls", "state"),
    ],
)
def test_an_arm_that_is_no_mirror_image_fails(broken, blamed):
    task = WrongMirror(image_size=48, broken=broken)
    result = measure_symmetry(task, [PUSH, SHOVE], look_every=5)
    assert not result.passed
    check = verdicts(result, "arm1")[blamed]
    assert check.must_hold
    assert not check.passed


def test_a_task_without_a_second_arm_is_refused():
    class OneArm(PushTTask):
        n_arms = 1

    with pytest.raises(ValueError, match="push_t has no second arm"):
        measure_symmetry(OneArm(), [PUSH])
    with pytest.raises(ValueError, match="no script"):
        measure_symmetry(TASK, [])


def seen(state: np.ndarray, level: int = 0) -> EnvironmentObservation:
    return {
        "images": {"image": np.full((4, 4, 3), level, np.uint8)},
        "state": state[:2].astype(np.float32),
        "environment_state": np.zeros(0, np.float32),
        "simulator_state": state,
    }


def test_differences_are_counted_where_they_are():
    """Four instants; from the third on the mirrored world is 3 px off and turned too far."""
    states = np.array([[10.0, 20.0, 0.1]] * 4)
    mirror = XFlip(100.0, angle_columns=(2,))
    theirs = np.array([[90.0, 20.0, 2 * np.pi - 0.1]] * 4)
    theirs[2:] += [3.0, 0.0, 0.2]
    original = Played(
        states,
        np.zeros(3),
        np.zeros(3),
        np.array([False, False, True]),
        (seen(states[0]), seen(states[2])),
    )
    mirrored = replace(
        original,
        states=theirs,
        scores=np.array([0.0, 0.5, 0.25]),
        terminated=np.zeros(3, bool),
        seen=(seen(theirs[0], 10), seen(theirs[2])),
    )
    world = MirroredWorld("toy", "toy", mirror, TASK.make, "always")
    script = Script("toy", states[0], np.zeros((3, 2)))
    found = compare(world, script, original, mirrored, look_every=2)
    np.testing.assert_allclose(found.position, [0, 0, 3, 3], atol=1e-9)
    np.testing.assert_allclose(found.angle_rad, [0, 0, 0.2, 0.2], atol=1e-9)
    assert found.first_divergence == 2
    assert found.first_disturbed is None
    assert found.picture_error.tolist() == [10, 0]
    assert found.pixel_share.tolist() == [1, 0]
    assert found.picture_error[found.agreeing_looks].tolist() == [10]
    assert found.score.tolist() == [0, 0.5, 0.25]
    assert found.ends_apart.tolist() == [False, False, True]
    assert found.to_dict()["n_ends_apart"] == 1


def test_a_number_that_is_none_never_passes():
    check = Check("world", "state", float("nan"), 1.0, "px", must_hold=True)
    assert not check.passed
    assert not replace(check, is_control=True).passed


def test_a_script_is_as_long_as_asked_and_starts_where_the_seed_says():
    script = TASK.script(3, 12)
    assert script.actions.shape == (12, 2)
    board = PushT()
    board.reset(3)
    np.testing.assert_array_equal(script.start, board.state())
    board.close()
    # float32 values: mirrored twice they are what they were, to the bit.
    back = mirrored_script(mirrored_script(script, x_flip()), x_flip())
    np.testing.assert_array_equal(back.actions, script.actions)


def test_playing_looks_as_often_as_asked():
    board = PushT(32)
    script = Script("walk", PUSH.start, wander(PUSH.start[:2], 7, 0))
    played = play(board, script, look_every=3)
    assert len(played.seen) == 3
    np.testing.assert_array_equal(played.seen[2]["simulator_state"], played.states[6])
    with pytest.raises(ValueError, match="look_every is 0"):
        play(board, script, 0)
    board.close()
    with pytest.raises(ValueError, match="no actions to replay"):
        replace(script, actions=np.zeros((0, 2)))


class Point:
    """A point on a line that goes where it is told: the least that a task can be."""

    def __init__(self, mirrored: bool) -> None:
        self.sign, self.place = (-1.0 if mirrored else 1.0), np.array([0.5, 0.5])

    def reset(self, seed: int) -> None:
        self.place = np.random.default_rng(seed).random(2)

    def reset_to(self, state) -> None:
        self.place = np.array(state)

    def state(self) -> np.ndarray:
        return self.place.copy()

    def observe(self) -> EnvironmentObservation:
        picture = np.full((3, 3, 3), 9, np.uint8)
        picture[:, :: int(self.sign)][:, 0] = 200
        return {**seen(self.place), "images": {"image": picture}}

    def step(self, action) -> Transition:
        self.place = np.array(action)
        return Transition(float(self.place[1]), float(self.place[1]), False)

    def frame(self, size_px, target=None) -> np.ndarray:
        return np.zeros((size_px, size_px, 3), np.uint8)

    def close(self) -> None: ...


@dataclass(frozen=True)
class PointTask(PushTTask):
    """No angle, no keypoints, no simulator of PushT's, and no other mirrored worlds."""

    mirrored_worlds = None

    def arm_mirror(self, arm_idx):
        return XFlip(1.0) if arm_idx else None

    def make(self):
        return Point(mirrored=self.arm_idx == 1)


def test_another_task_needs_nothing_but_arms():
    script = Script("walk", np.array([0.2, 0.3]), np.random.default_rng(0).random((6, 2)))
    task = PointTask()
    worlds = [each for each in mirrored_worlds(replace(task)) if each.name == "arm1"]
    assert len(worlds) == 1
    result = measure_symmetry(task, [script], look_every=2)
    assert result.passed
    assert result.unit == ""
    names = [check.what for check in result.checks if check.is_control]
    assert names == ["control: actions not mirrored", "control: pictures not mirrored"]
    # Nor has it rows that could not fail, of what it has not.
    rows = {check.what for check in result.checks}
    assert not rows & {"keypoints", "angle"}
    assert {"state", "pictures, mean error"} <= rows


class Dot(Point):
    """One dot of 2 px in a picture of 96."""

    def observe(self) -> EnvironmentObservation:
        picture = np.full((96, 96, 3), 255, np.uint8)
        x, y = self.place
        column, row = np.rint(np.array([x if self.sign > 0 else 1 - x, y]) * 90).astype(int)
        picture[row : row + 2, column : column + 2] = 0
        shown = picture[:, :: int(self.sign)]
        return {**seen(self.place), "images": {"image": np.ascontiguousarray(shown)}}


class Blind(Point):
    """Nobody films it."""

    def observe(self) -> EnvironmentObservation:
        return {**seen(self.place), "images": {}}


@dataclass(frozen=True)
class FilmedTask(PointTask):
    """The point in one of several looks."""

    look: type[Point] = Dot

    def make(self):
        return self.look(mirrored=self.arm_idx == 1)


WALK = Script("walk", np.array([0.2, 0.3]), np.random.default_rng(0).random((6, 2)) * 0.9)


def test_a_small_object_is_enough_to_see_that_pictures_were_mirrored():
    result = measure_symmetry(FilmedTask(), [WALK], look_every=2)
    control = verdicts(result, "arm1")["control: pictures not mirrored"]
    assert 0 < control.value < 1
    assert control.passed
    assert result.passed


def test_a_world_that_nobody_films_has_no_rows_of_pictures():
    import json

    result = measure_symmetry(FilmedTask(look=Blind), [WALK], look_every=2)
    assert result.passed
    assert not [check.what for check in result.checks if "pi" in check.what]
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["worlds"][0]["summary"]["picture_error"] is None
    assert record["worlds"][0]["episodes"][0]["picture_error"] is None


def test_the_picture_control_of_an_inexact_world_must_exceed_what_it_is_off(result):
    for world in result.worlds[1:]:
        control = verdicts(result, world.world.name)["control: pictures not mirrored"]
        assert control.tolerance == pytest.approx(world.summary()["picture_error"])
        assert control.tolerance > 0


def test_worlds_that_part_at_once_have_no_rows_of_what_was_never_compared():
    states = np.zeros((3, 2))
    look = {**seen(states[0]), "environment_state": np.zeros(2, np.float32)}
    original = Played(states, np.zeros(2), np.zeros(2), np.zeros(2, bool), (look, look))
    world = MirroredWorld("toy", "toy", XFlip(100.0), TASK.make, "often")
    script = Script("toy", states[0], np.zeros((2, 2)))
    # Not mirrored, so 100 off from the start.
    episode = compare(world, script, original, original, look_every=2)
    assert len(episode.picture_error[episode.agreeing_looks]) == 0
    checks = WorldSymmetry(world, (episode,), 0.0, ()).checks("px", "score")
    rows = {check.what for check in checks}
    assert "state" in rows
    assert not rows & {"keypoints", "pictures, mean error", "share of pixels off by > 8"}


class Weathercock(Point):
    """A point, and an arrow that the wind turns: it moves nothing."""

    def __init__(self, mirrored: bool) -> None:
        super().__init__(mirrored)
        self.place = np.array([0.5, 0.5, 0.0])

    def step(self, action) -> Transition:
        self.place = np.array([*action, self.place[2] + self.sign * 0.1])
        return Transition(0.0, 0.0, False)


@dataclass(frozen=True)
class WindTask(PointTask):
    def arm_mirror(self, arm_idx):
        return XFlip(1.0, angle_columns=(2,)) if arm_idx else None

    def make(self):
        return Weathercock(mirrored=self.arm_idx == 1)


def test_an_angle_of_the_start_is_seen_by_what_comes_of_it_alone():
    """Its own difference is no evidence: it was put there."""
    start = np.array([0.2, 0.3, 0.4])
    found = verdicts(measure_symmetry(WindTask(), [replace(WALK, start=start)]), "arm1")
    assert found["angle"].passed
    assert not found["control: angle of the start not mirrored"].passed
    # What nothing turned has no such row.
    still = Script("still", np.array([50.0, 60, 300, 300, 0.4]), np.tile([[50.0, 60.0]], (4, 1)))
    found = verdicts(measure_symmetry(TASK, [still]), "arm1")
    assert "control: actions not mirrored" in found
    assert "control: angle of the start not mirrored" not in found
