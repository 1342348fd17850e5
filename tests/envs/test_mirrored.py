"""Arm 1 of PushT is the mirror image of arm 0: episodes, pictures, objects, concepts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.expert import corners_of, wall_gap
from envs.mirrored import MirroredScene
from envs.push_t import (
    FAR_OFF_PX,
    GOAL_POSE,
    PushT,
    PushTTask,
    anti_diagonal,
    wander,
    x_flip,
)
from envs.task import ArmTask, Scene

TASK = PushTTask()
ARM = TASK.of_arm(1)
STATE = np.array([120.0, 90.0, 330.0, 300.0, 0.7])
"""Agent, block and goal apart."""


def flipped(picture: np.ndarray) -> np.ndarray:
    return picture[:, ::-1]


def mirrored_state(mirror, state: np.ndarray) -> np.ndarray:
    return mirror.simulator_state(torch.from_numpy(state)).numpy()


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference of states, angles on the circle."""
    difference = first - second
    difference[..., 4] = (difference[..., 4] + np.pi) % (2 * np.pi) - np.pi
    return float(np.abs(difference).max())


@pytest.fixture(scope="module")
def boards():
    both = TASK.make(), ARM.make()
    yield both
    for board in both:
        board.close()


def test_push_t_has_two_arms():
    assert isinstance(TASK, ArmTask)
    assert (TASK.n_arms, ARM.arm_idx, ARM.name) == (2, 1, "push_t_arm1")
    assert TASK.arm_mirror(0) is None
    assert TASK.of_arm(0) == TASK
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="the arms 0 and 1"):
            TASK.of_arm(wrong)
        with pytest.raises(ValueError, match="the arms 0 and 1"):
            TASK.arm_mirror(wrong)


@pytest.mark.parametrize(
    ("kind", "seed"), [("expert", 2), *(("wandering", seed) for seed in (1, 5, 7))]
)
def test_an_episode_of_arm_1_is_the_mirror_image_of_one_of_arm_0(boards, kind, seed):
    original, arm = boards
    mirror = ARM.arm_mirror(1)
    for board in boards:
        board.reset(seed)
    assert apart(mirrored_state(mirror, original.state()), arm.state()) == 0
    n_steps = 200
    script = TASK.script(seed, n_steps).actions if kind == "expert" else None
    actions = wander(original.state()[:2], n_steps, seed) if script is None else script
    states = []
    for step, action in enumerate(actions):
        first = original.step(action)
        second = arm.step(mirror.vectors(torch.from_numpy(action)).numpy())
        assert apart(mirrored_state(mirror, original.state()), arm.state()) <= 1e-6
        assert second.score == pytest.approx(first.score, abs=1e-9)
        assert second.reward == pytest.approx(first.reward, abs=1e-9)
        assert second.terminated == first.terminated
        states.append(original.state())
        if step % 50 == 0:
            seen, there = original.observe(), arm.observe()
            np.testing.assert_array_equal(
                flipped(seen["images"]["image"]), there["images"]["image"]
            )
            frames = original.frame(80), arm.frame(80)
            np.testing.assert_array_equal(flipped(frames[0]), frames[1])
    poses = np.array(states)[:, 2:]
    assert np.ptp(poses[:, :2], axis=0).max() > 50, "the block was hardly pushed"
    if (kind, seed) in (("wandering", 1), ("wandering", 5)):
        assert wall_gap(corners_of(poses)).min() < 0, "no wall was touched: choose another seed"


def test_actions_of_the_wrong_side_do_something_else(boards):
    original, arm = boards
    for board in boards:
        board.reset(5)
    for action in TASK.script(5, 60).actions:
        original.step(action)
        arm.step(action)
    assert apart(mirrored_state(x_flip(), original.state()), arm.state()) > 20


@pytest.mark.parametrize("mirror", [x_flip(), anti_diagonal()], ids=["x_flip", "anti_diagonal"])
def test_keypoints_of_the_mirrored_state_are_the_mirrored_keypoints(mirror):
    """The simulator finds them in the mirrored state, knowing nothing of the mirror."""
    board = PushT()
    board.reset_to(STATE)
    keypoints = torch.from_numpy(board.observe()["environment_state"]).double()
    board.reset_to(mirrored_state(mirror, STATE))
    found = board.observe()["environment_state"]
    board.close()
    np.testing.assert_allclose(mirror.environment_state(keypoints).numpy(), found, atol=1e-4)
    unordered = replace(mirror, point_order=()).environment_state(keypoints).numpy()
    assert np.abs(unordered - found).max() > 50


def test_the_anti_diagonal_leaves_the_goal_where_it_is():
    x, y, angle = GOAL_POSE
    pose = torch.tensor([x, y, angle], dtype=torch.float64)
    diagonal = anti_diagonal()
    torch.testing.assert_close(diagonal.points(pose[:2]), pose[:2], atol=0, rtol=0)
    torch.testing.assert_close(diagonal.angles(pose[2]), pose[2], atol=1e-12, rtol=0)

    board = PushT(128)
    board.reset_to(np.array([FAR_OFF_PX] * 4 + [0.0]))
    picture = board.image().astype(int)
    board.close()
    green = (picture == (144, 238, 144)).all(-1)
    assert green.sum() > 300
    turned = np.asarray(green)[::-1, ::-1].T
    # One pixel of the 512 px board is a quarter of one here.
    assert (turned != green).mean() < 0.01
    assert (green[:, ::-1] != green).mean() > 0.02


def test_the_goal_of_arm_1_is_covered_where_the_task_says(boards):
    board = boards[1]
    board.reset_to(np.array([60.0, 60.0, *ARM.goal_pose]))
    # Away from the T nothing happens: the score after a step is that of the start.
    assert board.step(np.array([60.0, 60.0])).score == pytest.approx(1, abs=1e-6)
    board.reset_to(np.array([60.0, 60.0, *GOAL_POSE]))
    assert board.step(np.array([60.0, 60.0])).score == pytest.approx(0.286, abs=2e-3)


def test_a_board_with_its_own_goal_keeps_it_through_resets():
    board = PushT(96, goal_pose=ARM.goal_pose)
    for reset in (lambda: board.reset(3), lambda: board.reset_to(STATE)):
        reset()
        board.reset_to(np.array([60.0, 60.0, *ARM.goal_pose]))
        assert board.coverage() == pytest.approx(1, abs=1e-9)
    board.reset(3)
    np.testing.assert_allclose(board._env.goal_pose, ARM.goal_pose)
    board.reset_to(STATE)
    with_block = board.masks("image", (96, 96), 0.0)
    without = board.pictures_without("block")["image"]
    board.close()
    assert (without[with_block["goal"]] == (144, 238, 144)).all(-1).mean() > 0.9


def test_a_mirrored_board_is_a_scene_with_everything_on_the_other_side(boards):
    original, arm = boards
    assert isinstance(arm, MirroredScene)
    assert isinstance(arm, Scene)
    assert arm.objects == original.objects
    original.reset_to(mirrored_state(x_flip(), STATE))
    arm.reset_to(STATE)
    assert apart(arm.state(), STATE) < 1e-9
    picture = arm.observe()["images"]["image"].astype(int)
    masks = arm.masks("image", (96, 96), 8.0)
    theirs = original.masks("image", (96, 96), 8.0)
    for name in arm.objects:
        np.testing.assert_array_equal(masks[name], theirs[name][:, ::-1])
        changed = np.abs(picture - arm.pictures_without(name)["image"]).max(-1) > 8
        assert changed.sum() > 20
        assert masks[name][changed].all(), f"{name} is drawn outside its mask"
        assert not masks[name][:, ::-1][changed].all(), "the mask of the other side fits as well"
    # The agent of the state is where the picture shows it.
    row, column = (np.array([STATE[1], STATE[0]]) * 96 / 512).astype(int)
    assert masks["agent"][row, column]


def test_a_move_of_a_pose_is_one_of_the_mirrored_state(boards):
    arm = boards[1]
    arm.reset_to(STATE)
    before = np.argwhere(arm.masks("image", (512, 512), 0.0)["agent"]).mean(0)
    moved = STATE.copy()
    parameter = next(each for each in arm.pose_parameters if each.name == "agent_x")
    moved[parameter.index] += 10
    arm.reset_to(moved)
    after = np.argwhere(arm.masks("image", (512, 512), 0.0)["agent"]).mean(0)
    assert (after - before).tolist() == pytest.approx([0, 10], abs=0.2)


def test_the_cross_marks_the_target_on_the_mirrored_side(boards):
    arm = boards[1]
    arm.reset_to(STATE)
    frame = arm.frame(256, np.array([400.0, 100.0])).astype(int)
    red = np.argwhere((frame == (255, 0, 0)).all(-1))
    assert red.mean(0).tolist() == pytest.approx([50, 200], abs=1.5)


def test_concepts_of_arm_1_are_what_is_to_be_seen_there():
    generator = np.random.default_rng(0)
    states = generator.uniform([0, 0, 100, 100, -7], [512, 512, 400, 400, 7], (60, 5))
    states[:20, 2:] = np.array(GOAL_POSE) + generator.normal(0, 1, (20, 3)) * [20, 20, 0.3]
    theirs = torch.from_numpy(states)
    ours = x_flip().simulator_state(theirs)
    episode, frame = torch.zeros(60).long(), torch.arange(60)
    original = TASK.concepts(theirs, episode, frame)
    arm = ARM.concepts(ours, episode, frame)

    same = ["coverage", "distance_px", "contact", "agent_y_px", "block_y_px", "agent_speed_px_s"]
    same += ["block_speed_px_s", "block_angle_cos", "phase_push", "side_bar", "side_stem"]
    pairs = {name: name for name in same}
    pairs |= {"side_left": "side_right", "side_right": "side_left"}
    pairs |= {
        f"{who}_cell_{row}_{column}": f"{who}_cell_{row}_{2 - column}"
        for who in ("agent", "block")
        for row in range(3)
        for column in range(3)
    }
    for here, there in pairs.items():
        torch.testing.assert_close(
            arm.column(here), original.column(there), atol=1e-4, rtol=0, equal_nan=True
        )
    assert float(original.column("coverage").max()) > 0.5
    torch.testing.assert_close(
        arm.column("agent_x_px"), 512 - original.column("agent_x_px"), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        arm.column("block_angle_sin"), -original.column("block_angle_sin"), atol=1e-5, rtol=0
    )
    # With the goal of the other arm it would say something else.
    wrong = TASK.concepts(ours, episode, frame).column("coverage")
    assert float((wrong - arm.column("coverage")).abs().max()) > 0.3


def test_wandering_stays_on_the_board_at_its_pace():
    targets = wander(np.array([10.0, 500.0]), 300, seed=4)
    assert targets.min() >= 0
    assert targets.max() <= 512
    steps = np.hypot(*np.diff(targets, axis=0).T)
    assert steps.max() <= 18.01
    assert np.ptp(targets, axis=0).min() > 300
    np.testing.assert_array_equal(targets, wander(np.array([10.0, 500.0]), 300, seed=4))
