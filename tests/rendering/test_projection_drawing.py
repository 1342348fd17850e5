"""Actions in pictures: planar arms whose ends are known on paper, and PushT's own red cross."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_arms import BASES, LINK, ToyArms, ToyArmsTask

from envs.projection import can_project, project_along
from envs.push_t import PushT, PushTTask
from envs.task import ActionProjection
from landscapes.landscape import Predictions
from landscapes.projection import actions_to_project, projected_density
from policies.interface import Batch, Observation
from rendering import marks
from rendering.projection import (
    COLOURS,
    CameraView,
    EndEffector,
    camera_views,
    draw_view,
    projection_frame,
    projection_strip,
)
from rendering.video import CAPTION_PX

SIZE = (150, 200)
N_DIMS = 14
EXPERT = 0.5
"""What the demonstrator does with every joint, rad."""


def batch(states: np.ndarray | None, n_frames: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(60, 90, (n_frames, 3, 30, 40), dtype=torch.uint8, generator=generator)
    return Batch(
        observation=Observation(images={"top": pictures, "side": pictures}, state=None),
        actions=torch.zeros(n_frames, 9, N_DIMS),
        action_is_pad=torch.zeros(n_frames, 9, dtype=torch.bool),
        episode_index=torch.zeros(n_frames, dtype=torch.long),
        frame_index=torch.arange(n_frames),
        simulator_state=None if states is None else torch.from_numpy(states),
    )


def predictions(point: np.ndarray, noise: float = 0.0) -> Predictions:
    """All samples around one action at steps 0 and 8, the demonstration elsewhere."""
    at = torch.from_numpy(point).double()[:, None].expand(-1, 2, -1)
    generator = torch.Generator().manual_seed(1)
    samples = at[:, None] + noise * torch.randn(len(point), 6, 2, N_DIMS, generator=generator)
    is_valid = torch.ones(len(point), 2, dtype=torch.bool)
    return Predictions((0, 8), samples, at, torch.full_like(at, EXPERT), is_valid)


def test_ends_of_a_three_link_arm_are_where_they_are_on_paper():
    arms = ToyArms(n_links=3)
    quarter = np.pi / 2
    straight, bent = np.zeros(6), np.array([quarter, -quarter, 0.0, np.pi, 0.0, -quarter])
    places = arms.project_actions("top", np.stack([straight, bent]), SIZE)
    (left_x, left_y), (right_x, right_y) = BASES
    metres = np.array(
        [
            [[left_x + 3 * LINK, left_y], [right_x + 3 * LINK, right_y]],
            [[left_x + 2 * LINK, left_y + LINK], [right_x - 2 * LINK, right_y + LINK]],
        ]
    )
    px = np.stack([(metres[..., 0] + 1) * 100, (0.75 - metres[..., 1]) * 100], -1)
    np.testing.assert_allclose(places, px)
    assert isinstance(arms, ActionProjection)


def test_a_camera_is_asked_where_it_stood_at_each_recorded_instant():
    """The side camera moves by 0.1 for every rad of the first joint: 10 px here."""
    states = np.zeros((2, N_DIMS))
    states[1, 0] = 0.5
    actions = {"point": np.zeros((2, 3, N_DIMS))}
    sizes = {"top": SIZE, "side": SIZE}
    found = project_along(ToyArmsTask(), batch(states), actions, sizes)
    assert found.end_effectors == ("left", "right")
    top, side = found.px["top"]["point"], found.px["side"]["point"]
    assert top.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(side[0], top[0])
    np.testing.assert_allclose(side[1] - top[1], np.broadcast_to([-5.0, 0.0], (3, 2, 2)))
    unknown = project_along(ToyArmsTask(), batch(None), actions, {"top": SIZE})
    np.testing.assert_allclose(unknown.px["top"]["point"], top)
    with pytest.raises(ValueError, match="camera 'back'"):
        project_along(ToyArmsTask(), batch(states), actions, {"back": SIZE})


def test_pusht_is_projected_to_where_it_draws_the_target():
    env = PushT(96)
    env.reset(0)
    try:
        for target in ([100.0, 300.0], [400.0, 60.0], [256.0, 256.0]):
            here = np.array(target)
            (place,) = env.project_actions("image", here, (512, 512))
            changed = (env.frame(512, here) != env.frame(512)).any(-1)
            rows, columns = np.nonzero(changed)
            middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
            np.testing.assert_allclose(place[::-1], middle, atol=1.0)
            half = env.project_actions("image", here, (48, 96))[0]
            np.testing.assert_allclose(half, place * [96 / 512, 48 / 512])
        with pytest.raises(ValueError, match="camera 'top'"):
            env.project_actions("top", here, (96, 96))
    finally:
        env.close()


def test_who_can_project():
    assert can_project(PushTTask())
    assert can_project(ToyArmsTask())
    assert not can_project(None)
    assert not can_project(PushTTask(arm_idx=1))
    with pytest.raises(ValueError, match=r"implement envs\.task\.ActionProjection"):
        project_along(PushTTask(arm_idx=1), batch(None), {}, {})


def views_of(answer: Predictions, states: np.ndarray) -> list[tuple[CameraView, ...]]:
    seen = batch(states)
    scale = torch.full((1, 2, N_DIMS), 0.02, dtype=torch.float64)
    actions = actions_to_project(answer, scale, 8, 0)
    sizes = {"top": SIZE, "side": SIZE}
    found = project_along(ToyArmsTask(), seen, actions, sizes)
    pictures = {
        camera: [np.full((30, 40, 3), 70, np.uint8)] * len(seen) for camera in ("top", "side")
    }
    titles = ["step 0", "step 1"]
    return list(camera_views(pictures, found.px, found.end_effectors, answer, 8, titles, sizes))


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Places (x, y) of the pixels of a colour, below the caption."""
    # Thin lines in between pixels have no pixel of exactly their colour.
    distance = np.abs(picture[CAPTION_PX:].astype(int) - np.array(colour)).sum(-1)
    rows, columns = np.nonzero(distance < 60)
    return np.stack([columns, rows], -1)


def test_marks_lie_where_the_arms_would_be():
    point = np.full((2, N_DIMS), 0.2)
    views = views_of(predictions(point), np.zeros((2, N_DIMS)))
    assert len(views) == 2
    top = views[0][0]
    drawn = draw_view(top)
    assert drawn.shape == (CAPTION_PX + 150, 200, 3)
    arms = ToyArms()
    rest = arms.project_actions("top", np.full(N_DIMS, EXPERT), SIZE)
    red = near(drawn, marks.RED)
    for end in rest:
        assert np.hypot(*(red - end).T).min() < 2
    assert np.hypot(*(red[:, None] - rest).transpose(2, 0, 1)).min(1).max() < 14
    goal = arms.project_actions("top", point[0], SIZE)
    for end, effector in zip(goal, top.end_effectors, strict=True):
        np.testing.assert_allclose(effector.prediction[1], end)
        # The density has its mass around the prediction: within a few lengths of 7 * 0.02 rad.
        mass = effector.mass / effector.mass.sum()
        x, y = (np.arange(96) + 0.5) * 200 / 96, (np.arange(96) + 0.5) * 150 / 96
        centre = np.array([(mass.sum(0) * x).sum(), (mass.sum(1) * y).sum()])
        assert np.hypot(*(centre - end)) < 8


def test_each_end_effector_has_its_colour():
    point = np.full((2, N_DIMS), 0.2)
    drawn = draw_view(views_of(predictions(point, 0.05), np.zeros((2, N_DIMS)))[0][0])
    left, right = (near(drawn, colour) for colour in COLOURS[:2])
    ends = ToyArms().project_actions("top", point[0], SIZE)
    assert np.hypot(*(left.mean(0) - ends[0])) < 20
    assert np.hypot(*(right.mean(0) - ends[1])) < 20


def test_nothing_is_drawn_behind_the_camera_or_after_the_demonstration():
    point = np.full((2, N_DIMS), 0.2)
    answer = predictions(point)
    ended = replace(answer, is_valid=torch.zeros(2, 2, dtype=torch.bool))
    (view, _) = views_of(ended, np.zeros((2, N_DIMS)))[0]
    assert len(near(draw_view(view), marks.RED)) == 0
    unseen = EndEffector(
        "left",
        np.full((3, 2, 2), np.nan),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.nan),
        np.zeros((96, 96)),
        np.full(2, np.inf),
        np.nan,
    )
    empty = replace(view, end_effectors=(unseen,))
    assert np.array_equal(draw_view(empty)[CAPTION_PX:], view.picture)
    assert unseen.note == "left: behind the camera"


def test_what_lies_outside_the_picture_is_told_at_its_border():
    """Both ends 60 px beyond the right border: no outline, two triangles, and a note."""
    view = views_of(predictions(np.full((2, N_DIMS), 0.2)), np.zeros((2, N_DIMS)))[0][0]
    inside = view.end_effectors[0]
    places = np.array([[260.0, 40.0], [260.0, 40.0]])
    draws = torch.tensor([260.0, 40.0]).double() + torch.randn(1, 128, 2).double()
    found = projected_density(draws, SIZE)
    assert torch.isinf(found.thresholds).all()
    beyond = float(found.beyond[0])
    assert beyond == pytest.approx(1.0, abs=1e-6)
    away = replace(
        inside,
        samples=np.full((1, 2, 2), np.nan),
        prediction=places,
        expert=places + np.array([0.0, 60.0]),
        mass=found.mass[0].numpy(),
        thresholds=found.thresholds[0].numpy(),
        beyond=beyond,
    )
    assert away.note == "left: 100% beyond"
    assert inside.note == ""
    drawn = draw_view(replace(view, end_effectors=(away,)))
    for colour, row in ((marks.WHITE, 40), (marks.RED, 100)):
        at = near(drawn, colour)
        assert at[:, 0].min() > 185
        assert at[:, 1].mean() == pytest.approx(row, abs=2)
    assert not len(near(drawn, COLOURS[0]))
    # Half of the mass outside: the region of 80 % cannot be reached, that of 50 % would be all.
    edge = torch.tensor([200.0, 75.0]).double()
    spread = torch.randn(1, 128, 2, generator=torch.Generator().manual_seed(0)).double()
    half = projected_density(edge + 10 * spread, SIZE)
    assert float(half.beyond[0]) == pytest.approx(0.5, abs=0.1)
    assert torch.isinf(half.thresholds[0, 1])


def test_two_stars_say_whose_they_are():
    view = views_of(predictions(np.full((2, N_DIMS), 0.2)), np.zeros((2, N_DIMS)))[0][0]
    left, right = view.end_effectors
    both = draw_view(view)
    renamed = draw_view(replace(view, end_effectors=(replace(left, name="other"), right)))
    changed = np.argwhere((both != renamed).any(-1))[:, ::-1] - [0, CAPTION_PX]
    at = left.prediction[1]
    assert len(changed)
    assert np.abs(changed - at).max() < 60
    alone = replace(view, end_effectors=(left,))
    anonymous = replace(view, end_effectors=(replace(left, name="other"),))
    assert np.array_equal(draw_view(alone), draw_view(anonymous))


def test_cameras_and_instants_stand_side_by_side_while_there_is_room():
    views = views_of(predictions(np.full((2, N_DIMS), 0.2)), np.zeros((2, N_DIMS)))
    frame = projection_frame(views[0])
    assert frame.shape[1] > 2 * 200
    in_a_row = projection_strip(views)
    assert in_a_row.shape[1] > 4 * 200
    assert len(in_a_row) == len(frame)
    below = projection_strip(views * 2)
    assert below.shape[1] <= 1400
    assert len(below) == len(frame) + CAPTION_PX + 150
    # A legend needs its room, whatever lies above it.
    alone = projection_frame(views[0][:1])
    assert (alone[-20:, -8:] == 255).all()
    assert alone.shape[1] > 200
    for wrong in (projection_frame, projection_strip):
        with pytest.raises(ValueError, match="give at least one"):
            wrong([])
