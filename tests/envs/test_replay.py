"""Recorded demonstrations drawn again: every frame from its own state, nothing stepped."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from envs.push_t import PushT, PushTTask
from envs.replay import can_replay, recorded_pictures, replay
from policies.interface import Batch, Observation


class Counting(PushTTask):
    """Counts the boards that were made and not closed again."""

    open_boards = 0

    def make(self) -> PushT:
        board = super().make()
        close = board.close
        Counting.open_boards += 1

        def counted() -> None:
            Counting.open_boards -= 1
            close()

        board.close = counted  # pyright: ignore[reportAttributeAccessIssue]
        return board


@pytest.fixture(scope="module")
def played() -> tuple[np.ndarray, np.ndarray]:
    """States and actions of an agent that pushes the block aside."""
    env = PushT()
    env.reset_to(np.array([150.0, 300.0, 256.0, 300.0, 0.4]))
    states, targets = [], []
    for step in range(12):
        target = np.array([150.0 + 16 * step, 300.0 + 3 * step])
        states.append(env.state())
        targets.append(target)
        env.step(target)
    env.close()
    assert np.abs(np.ptp(np.array(states)[:, 2:4], axis=0)).max() > 20, "the block never moved"
    return np.array(states), np.array(targets)


def drawn(states: np.ndarray, targets: np.ndarray, size: int = 128) -> list[np.ndarray]:
    return list(replay(PushTTask(), states, targets, size))


def test_each_frame_is_the_simulator_in_that_state_with_that_action(played):
    states, targets = played
    for frame, state, target in zip(drawn(states, targets), states, targets, strict=True):
        env = PushT()
        env.reset_to(state)
        np.testing.assert_array_equal(frame, env.frame(128, target))
        env.close()


def test_the_frames_before_leave_no_trace(played):
    """An open-loop replay would drift, most of all once velocities and contacts are lost."""
    states, targets = played
    forwards = drawn(states, targets)
    backwards = drawn(states[::-1], targets[::-1])
    for one, other in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(drawn(states[5:6], targets[5:6])[0], forwards[5])


def test_the_cross_is_at_the_action_and_not_at_the_agent(played):
    states, _ = played
    (with_cross,) = drawn(states[:1], np.array([[400.0, 100.0]]), 512)
    env = PushT()
    env.reset_to(states[0])
    rows, columns = np.nonzero((with_cross != env.frame(512)).any(-1))
    env.close()
    assert (columns.min() + columns.max()) / 2 == pytest.approx(400, abs=1)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(100, abs=1)


def test_the_board_is_closed_also_when_nobody_looks_to_the_end(played):
    states, targets = played
    frames = replay(Counting(), states, targets, 32)
    assert isinstance(frames, Iterator)
    next(frames)
    frames.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert can_replay(Counting(), batch(torch.zeros(2, 5)))
    assert Counting.open_boards == 0


def test_states_that_are_none_are_refused(played):
    _, targets = played
    with pytest.raises(ValueError, match="agent x, y, block x, y, angle"):
        drawn(np.full((1, 5), np.nan), targets[:1])


def batch(simulator_state: torch.Tensor | None) -> Batch:
    return Batch(
        observation=Observation(images={}, state=torch.zeros(2, 2)),
        actions=torch.zeros(2, 1, 2),
        action_is_pad=torch.zeros(2, 1, dtype=torch.bool),
        episode_index=torch.zeros(2, dtype=torch.long),
        frame_index=torch.arange(2),
        simulator_state=simulator_state,
    )


@pytest.mark.parametrize(
    ("states", "answer"), [(None, False), (torch.zeros(2, 5), True), (torch.zeros(2, 14), False)]
)
def test_only_states_of_the_tasks_own_simulator_are_replayed(states, answer):
    assert can_replay(PushTTask(), batch(states)) is answer


# Recorded pictures


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).remainder(256).reshape(shape)


def test_recorded_pictures_are_what_was_seen():
    images = ramp(3, 3, 4, 5).to(torch.uint8)
    pictures = list(recorded_pictures(Observation({"top": images})))
    assert len(pictures) == 3
    for picture, image in zip(pictures, images, strict=True):
        assert picture.flags.c_contiguous
        np.testing.assert_array_equal(picture, image.permute(1, 2, 0))


def test_pictures_in_0_to_1_become_the_same_bytes():
    images = ramp(2, 3, 16, 16).to(torch.uint8)
    for scaled in (images.float() / 255, images.double() / 255):
        for one, other in zip(
            recorded_pictures(Observation({"top": scaled})),
            recorded_pictures(Observation({"top": images})),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


def test_of_a_history_the_newest_picture_is_shown():
    images = ramp(2, 3, 3, 4, 5).to(torch.uint8)
    pictures = list(recorded_pictures(Observation({"top": images})))
    np.testing.assert_array_equal(pictures[1], images[1, -1].permute(1, 2, 0))


def test_a_camera_is_chosen_by_name_and_the_first_one_otherwise():
    one, other = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    seen = Observation({"top": one, "wrist": other})
    assert next(recorded_pictures(seen)).max() == 0
    assert next(recorded_pictures(seen, "wrist")).min() == 255
    with pytest.raises(ValueError, match=r"camera 'front': the data have \['top', 'wrist'\]"):
        next(recorded_pictures(seen, "front"))
    with pytest.raises(ValueError, match=r"the data have \[\]"):
        next(recorded_pictures(Observation({}, state=torch.zeros(1, 2))))
