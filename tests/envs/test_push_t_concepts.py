"""PushT's concepts against the simulator itself, and on scenes drawn up by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from envs.concepts import CONTACT_MARGIN_PX, ConceptTask, push_t_coverage
from envs.push_t import (
    AGENT_RADIUS_PX,
    GOAL_POSE,
    T_BOXES_PX,
    PushT,
    PushTTask,
    distance_to_t_px,
)
from features.concepts import Concepts

TASK = PushTTask()


def described(states, episode_index=None, frame_index=None) -> Concepts:
    states = torch.as_tensor(np.asarray(states), dtype=torch.float64)
    n = len(states)
    episode_index = torch.zeros(n).long() if episode_index is None else torch.tensor(episode_index)
    frame_index = torch.arange(n) if frame_index is None else torch.tensor(frame_index)
    return TASK.concepts(states, episode_index, frame_index)


def on_board(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points of the block's frame, on the board."""
    cosine, sine = np.cos(pose[2]), np.sin(pose[2])
    return points @ np.array([[cosine, sine], [-sine, cosine]]) + pose[:2]


@pytest.fixture(scope="module")
def pushed():
    """States, and whether the physics found contacts in the step before: there, back, and away."""
    env = PushT()
    env.reset_to(np.array([120.0, 300.0, 256.0, 300.0, 0.4]))
    states, contacts = [env.state()], [False]
    there = [np.array([120.0 + 15 * step, 303.0]) for step in range(18)]
    back = [there[11] - [30.0 * step, 0.0] for step in range(1, 7)]
    for target in [*there[:12], *back, *there]:
        env.step(target)
        states.append(env.state())
        contacts.append(env._env.n_contact_points > 0)
    env.close()
    return np.array(states), np.array(contacts)


def test_push_t_offers_concepts():
    assert isinstance(TASK, ConceptTask)
    assert not isinstance(object(), ConceptTask)


def test_coverage_is_gym_pushts_own():
    generator = np.random.default_rng(0)
    env = PushT()
    near = np.array(GOAL_POSE) + generator.normal(0, 1, (12, 3)) * [20, 20, 0.3]
    far = generator.uniform([80, 80, -7], [430, 430, 7], (12, 3))
    poses = np.concatenate([near, far, near[:3], np.array([GOAL_POSE])])
    expected = []
    for pose in poses:
        env.reset_to(np.array([30.0, 30.0, *pose]))
        expected.append(env.coverage())
    env.close()
    found = push_t_coverage(torch.tensor(poses)).numpy()
    assert max(expected[:12]) > 0.5
    assert expected[-1] == pytest.approx(1)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_distance_is_that_of_the_agents_edge():
    generator = np.random.default_rng(1)
    states = generator.uniform([0, 0, 100, 100, -7], [512, 512, 400, 400, 7], (50, 5))
    found = described(states).column("distance_px").numpy()
    expected = [distance_to_t_px(state[None, :2], state[2:])[0] for state in states]
    np.testing.assert_allclose(found + AGENT_RADIUS_PX, expected, atol=1e-4)


def test_contact_agrees_with_the_physics(pushed):
    states, contacts = pushed
    concepts = described(states)
    found = concepts.column("contact").numpy() > 0
    assert contacts.sum() > 8
    assert (~contacts).sum() > 8
    # The physics reports what happened during the 0.1 s before; the state is that of their end.
    assert (found == contacts).mean() > 0.9
    gap = concepts.column("distance_px").numpy()
    np.testing.assert_array_equal(found, gap <= CONTACT_MARGIN_PX)


def test_phases_follow_each_other(pushed):
    states, _ = pushed
    concepts = described(states)
    approach, push, again = (
        concepts.column(f"phase_{name}").numpy() for name in ("approach", "push", "re_approach")
    )
    np.testing.assert_array_equal(approach + push + again, 1)
    contact = concepts.column("contact").numpy()
    first = int(contact.argmax())
    assert first > 2
    assert approach[:first].all()
    assert not approach[first:].any()
    # Pushing lasts until the agent leaves, is over while it is away, and begins again.
    kinds = np.where(push, "push", np.where(again, "again", "approach"))
    order = [
        kinds[0],
        *(now for before, now in pairwise(kinds) if before != now),
    ]
    assert order == ["approach", "push", "again", "push"]
    assert push[contact > 0].all()
    onset = concepts.column("contact_onset").numpy()
    assert np.isnan(onset[0])
    assert np.nansum(onset) == (np.diff(contact) > 0).sum()


def test_a_moving_block_is_pushed_for_a_while_after_the_contact():
    """A block that slides on and on, beside an agent that touched it once."""
    block = np.array([256.0, 300.0, 0.0])
    states = [[256.0, 300.0 - AGENT_RADIUS_PX, *block]]
    for step in range(1, 7):
        states.append([256.0, 100.0, 256.0, 300.0 + 2.0 * step, 0.0])
    found = described(states).column("phase_push").tolist()
    assert found == [1, 1, 1, 1, 0, 0, 0]
    resting = [states[0]] + [[256.0, 100.0, *block]] * 6
    assert described(resting).column("phase_push").tolist() == [1, 0, 0, 0, 0, 0, 0]
    # Another episode knows nothing of it.
    found = described(states, [0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5])
    assert found.column("phase_push").tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert found.column("phase_approach").tolist() == [0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("angle", [0.0, 0.7, 3.0, -2.0])
def test_sides_turn_with_the_t(angle):
    pose = np.array([250.0, 260.0, angle])
    # Beside the bar's long edge and its ends, in the notches, at the stem's end.
    points = {
        "bar": [(0, -20), (40, -20), (-59, -18)],
        "stem": [(0, 140), (14, 136)],
        "left": [(-80, 15), (-31, 60), (-40, 46)],
        "right": [(80, 15), (31, 60), (31, 85)],
    }
    for name, places in points.items():
        agent = on_board(pose, np.array(places, dtype=float))
        states = np.concatenate([agent, np.tile(pose, (len(agent), 1))], axis=1)
        concepts = described(states)
        sides = {side: concepts.column(f"side_{side}").tolist() for side in points}
        assert sides == {side: [float(side == name)] * len(places) for side in points}


def test_quadrants_of_the_bounding_square_are_as_said():
    x_min, y_min, x_max, y_max = (
        min(box[0] for box in T_BOXES_PX),
        min(box[1] for box in T_BOXES_PX),
        max(box[2] for box in T_BOXES_PX),
        max(box[3] for box in T_BOXES_PX),
    )
    assert x_max - x_min == y_max - y_min == 120
    assert ((x_min + x_max) / 2, (y_min + y_max) / 2) == (0, 60)


def test_speeds_are_per_second_whatever_was_left_out():
    # 6 px right in 0.1 s; then nothing for 0.3 s; another episode; 4 px down in 0.2 s.
    agent = [[100, 100], [106, 100], [106, 100], [50, 50], [50, 54]]
    states = [[*each, 256.0, 300.0, 0.0] for each in agent]
    concepts = described(states, [0, 0, 0, 1, 1], [0, 1, 4, 0, 2])
    speed = concepts.column("agent_speed_px_s")
    assert speed.isnan().tolist() == [True, False, False, True, False]
    assert speed[~speed.isnan()].tolist() == pytest.approx([60, 0, 20])
    assert concepts.column("block_speed_px_s")[[1, 2, 4]].tolist() == [0, 0, 0]
    assert concepts.column("time").tolist() == pytest.approx([0, 0.25, 1, 0, 1])


def test_a_turning_block_moves():
    turns = described([[50.0, 50.0, 256.0, 300.0, 0.1 * step] for step in range(2)])
    corners = np.hypot([60, 60, 60, 60, 15, 15, 15, 15], [0, 0, 30, 30, 120, 120, 30, 30])
    expected = 2 * np.sin(0.05) * corners.mean() / 0.1
    assert float(turns.column("block_speed_px_s")[1]) == pytest.approx(expected, rel=1e-5)
    assert float(turns.column("block_angle_sin")[1]) == pytest.approx(np.sin(0.1))


def test_states_of_another_simulator_are_refused():
    with pytest.raises(ValueError, match="give agent x, y, block x, y, angle"):
        described(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="several pieces"):
        described(np.full((3, 5), 100.0), [0, 1, 0], [0, 0, 1])


def test_agent_and_block_are_each_in_exactly_one_ninth_of_the_board():
    places = torch.tensor([[10.0, 500.0], [256.0, 256.0], [511.0, 0.0], [-5.0, 600.0]])
    states = torch.cat([places, places.flip(1), torch.zeros(4, 1)], dim=1)
    found = TASK.concepts(states, torch.zeros(4).long(), torch.arange(4))
    cells = {
        name: torch.stack(
            [found.column(f"{name}_cell_{row}_{column}") for row in range(3) for column in range(3)]
        )
        for name in ("agent", "block")
    }
    assert cells["agent"].argmax(0).tolist() == [6, 4, 2, 6]
    assert cells["block"].argmax(0).tolist() == [2, 4, 6, 2]
    assert all((each.sum(0) == 1).all() for each in cells.values())
