"""Densities of single dimensions and boards over planes: all at its place, values upwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from landscapes.landscape import Predictions
from landscapes.marginals import marginals
from landscapes.methods import Likelihood, Probe
from landscapes.space import ActionSpace, Axis
from policies.interface import Batch, DataSchema, Observation
from rendering import marks
from rendering.landscape import (
    AXIS_PX,
    SIDE_PX,
    Markers,
    Panel,
    Scene,
    draw_landscape,
    landscape_strip,
    side_by_side,
    ticks,
)
from rendering.landscape_scenes import Column, scenes
from rendering.marginals import (
    BAND_PX,
    NAME_PX,
    PANEL_PX,
    TONES,
    Values,
    draw_density,
    marginal_history,
    marginal_panels,
    panel_frames,
)
from rendering.video import CAPTION_PX

SPACE = ActionSpace(
    (Axis("waist", "rad", -2.0, 2.0), Axis("elbow", "rad", 0.0, 1.0), Axis("grip", "", 0.0, 10.0)),
    True,
)
QUERIES = (0, 4)


def answers(points: list[list[float]], shift: float = 0.0) -> Predictions:
    """One narrow mode at each frame's point, the demonstration ``shift`` axes further up."""
    point = torch.tensor(points, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    expert = point + shift * torch.tensor(SPACE.size, dtype=torch.float64)
    is_valid = torch.ones(len(points), 2, dtype=torch.bool)
    return Predictions(QUERIES, point[:, None].expand(-1, 5, -1, -1), point, expert, is_valid)


def scale_of(share: float = 0.02) -> torch.Tensor:
    return (share * torch.tensor(SPACE.size, dtype=torch.float64)).expand(1, 2, -1)


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == np.array(colour)).all(-1)


def is_reddish(picture: np.ndarray) -> np.ndarray:
    """A thin line in between pixels has no pixel of its own colour."""
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return (red > 140) & (green < 90) & (blue < 90)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_a_panel_shows_density_and_values_at_their_places(share):
    axis = SPACE.axes[1]
    values = [[0.0, share, 5.0]]
    found = marginals(answers(values), scale_of(), SPACE, QUERIES)
    mass, thresholds = found.mass[0, 0, 1].numpy(), found.thresholds[0, 0, 1].numpy()
    expert = share + 0.08
    panel = draw_density(mass, thresholds, 0.0, axis, Values(expert=expert))
    plot = panel[CAPTION_PX : CAPTION_PX + PANEL_PX[1]]
    columns = np.flatnonzero(is_colour(plot, TONES[0]).any(0))
    assert columns.mean() == pytest.approx(share * PANEL_PX[0], abs=2)
    red = np.flatnonzero(is_colour(plot, marks.RED).sum(0) > PANEL_PX[1] / 2)
    assert red.mean() == pytest.approx(expert * PANEL_PX[0], abs=2)


def test_regions_lie_within_each_other():
    found = marginals(answers([[0.0, 0.5, 5.0]]), scale_of(0.06), SPACE, QUERIES)
    panel = draw_density(
        found.mass[0, 0, 1].numpy(), found.thresholds[0, 0, 1].numpy(), 0.0, SPACE.axes[1], Values()
    )
    plot = panel[CAPTION_PX : CAPTION_PX + PANEL_PX[1]]
    last_row = plot[-4]
    widths = [int(is_colour(last_row[None], tone).sum()) for tone in TONES]
    # A Laplace density: 50, 80 and 95 % lie within ln 2, ln 5 and ln 20 scales on either side.
    reach = np.cumsum(widths) / PANEL_PX[0] / (2 * 0.06)
    np.testing.assert_allclose(reach, np.log([2, 5, 20]), atol=0.25)


def test_values_beyond_the_axis_are_wedges():
    found = marginals(answers([[0.0, 0.5, 5.0]]), scale_of(), SPACE, QUERIES)
    panel = draw_density(
        found.mass[0, 0, 1].numpy(),
        found.thresholds[0, 0, 1].numpy(),
        0.0,
        SPACE.axes[1],
        Values(expert=1.5),
    )
    red = is_colour(panel[CAPTION_PX : CAPTION_PX + PANEL_PX[1]], marks.RED)
    assert red[:, -14:].any()
    assert not red[:, :-14].any()
    nothing = draw_density(
        np.zeros(96, np.float32), np.full(3, np.inf, np.float32), 1.0, SPACE.axes[1], Values()
    )
    assert not any(is_colour(nothing, tone).any() for tone in TONES)


def test_a_density_beyond_its_axis_fills_no_region_and_says_so():
    """A mode 1.5 scales beyond the end: 11 % of the mass is on the axis, less than any region."""
    low = SPACE.axes[1].low
    found = marginals(answers([[0.0, low - 0.15, 5.0]]), scale_of(0.1), SPACE, QUERIES)
    assert float(found.beyond[0, 0, 1]) == pytest.approx(1 - 0.5 * np.exp(-1.5), abs=1e-4)
    mass, thresholds = found.mass[0, 0, 1].numpy(), found.thresholds[0, 0, 1].numpy()
    silent, said = (
        draw_density(mass, thresholds, beyond, SPACE.axes[1], Values()) for beyond in (0.0, 0.89)
    )
    assert not any(is_colour(said, tone).any() for tone in TONES)
    assert (said[:CAPTION_PX] != silent[:CAPTION_PX]).any()
    assert np.array_equal(said[CAPTION_PX:], silent[CAPTION_PX:])


def test_numbers_of_steps_stand_below_what_happens_at_them():
    """The demonstration jumps at step 4 of 0 to 8: at the tick between 2 and 6 of five."""
    n_frames = 9
    points = [[-1.5 if step < 4 else 1.5, 0.5, 5.0] for step in range(n_frames)]
    predictions = answers(points)
    found = marginals(predictions, scale_of(), SPACE, QUERIES)
    picture = marginal_history(found, predictions, 0, np.arange(n_frames), "episode")
    inner = picture[:, NAME_PX:]
    tick_row = inner[CAPTION_PX + 3 * (BAND_PX + 4) + 1]
    ticks_at = np.flatnonzero((tick_row == np.array(marks.CASING)).all(-1))
    # Steps 0 to 8, each in the middle of its frame.
    width = inner.shape[1]
    middle = (np.arange(n_frames) + 0.5) / n_frames * width - 0.5
    np.testing.assert_allclose(ticks_at, middle, atol=1)
    red = is_reddish(band(picture, 0))
    columns = np.flatnonzero(red.any(0))
    assert columns.min() == pytest.approx(ticks_at[0], abs=3)
    assert columns.max() == pytest.approx(ticks_at[-1], abs=3)


def test_all_panels_of_an_instant_and_of_a_video():
    predictions = answers([[0.0, 0.5, 5.0], [1.0, 0.2, 9.0]])
    found = marginals(predictions, scale_of(), SPACE, QUERIES)
    now = np.array([0.0, 0.5, 5.0])
    plain = marginal_panels(found, predictions, 0, 0, "title")
    ringed = marginal_panels(found, predictions, 0, 0, "title", now)
    assert is_colour(ringed, marks.ORANGE).sum() > 30
    assert not is_colour(plain, marks.ORANGE).any()
    executed = np.stack([now, now])
    frames = list(panel_frames(found, predictions, 4, np.array([3, 4]), executed))
    assert len(frames) == 2
    assert frames[0].shape == frames[1].shape
    assert not is_colour(frames[0], marks.ORANGE).any(), "executed now, not four steps ahead"
    assert (frames[0] != frames[1]).any()
    gone = replace(predictions, is_valid=torch.zeros(2, 2, dtype=torch.bool))
    unknown = marginal_panels(found, gone, 0, 0, "title")
    assert is_colour(unknown, marks.RED).sum() < is_colour(plain, marks.RED).sum()


def band(picture: np.ndarray, dim: int) -> np.ndarray:
    top = CAPTION_PX + dim * (BAND_PX + 4)
    return picture[top : top + BAND_PX, NAME_PX:]


def test_along_an_episode_larger_values_lie_higher_and_later_ones_further_right():
    n_frames = 40
    rise = np.linspace(0.1, 0.9, n_frames)
    points = [[-2 + 4 * up, 0.3, 10 * (1 - up)] for up in rise]
    predictions = answers(points, shift=0.0)
    hidden = replace(predictions, is_valid=torch.zeros(n_frames, 2, dtype=torch.bool))
    found = marginals(predictions, scale_of(), SPACE, QUERIES)
    picture = marginal_history(found, hidden, 4, np.arange(n_frames), "episode")
    for dim, upwards in ((0, rise), (2, 1 - rise)):
        bright = band(picture, dim).astype(int).sum(-1)
        inner = bright.shape[1]
        for frame in (2, 20, 37):
            column = int((frame + 0.5) * inner / n_frames)
            row = bright[:, column - 2 : column + 3].mean(1).argmax()
            assert row == pytest.approx((1 - upwards[frame]) * BAND_PX, abs=3)
    assert not any(is_reddish(band(picture, dim)).any() for dim in range(3))
    shown = answers(points, shift=0.2)
    shown.is_valid[30:] = False
    drawn = marginal_history(found, shown, 4, np.arange(n_frames), "episode")
    red = is_reddish(band(drawn, 0))
    rows, columns = np.nonzero(red)
    assert columns.max() == pytest.approx(29.5 / 40 * red.shape[1], abs=4)
    early = rows[columns < 40].mean()
    assert early == pytest.approx((1 - 0.3) * BAND_PX, abs=3)


# Boards


class Arm:
    """As much of a policy as a landscape asks for."""

    data_schema = DataSchema(cameras={}, state_dim=3, action_dim=3)
    chunk_size = 5
    n_action_steps = 1
    n_obs_steps = 1

    def predict_chunk(self, observation, queries=None):
        raise NotImplementedError

    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        raise NotImplementedError


def board(points: list[list[float]], dims: tuple[int, int]) -> Column:
    predictions = answers(points, shift=0.0)
    plane = SPACE.plane(*dims)
    probe = Probe(
        Arm(), batch(len(points)), predictions, scale_of(), QUERIES, plane.grid(32), plane
    )
    return Column(Likelihood().landscape(probe), 0, predictions)


def batch(n_frames: int) -> Batch:
    return Batch(
        observation=Observation(images={}, state=torch.zeros(n_frames, 3)),
        actions=torch.zeros(n_frames, 5, 3),
        action_is_pad=torch.zeros(n_frames, 5, dtype=torch.bool),
        episode_index=torch.zeros(n_frames, dtype=torch.long),
        frame_index=torch.arange(n_frames),
    )


def test_the_second_dimension_of_a_plane_points_upwards():
    """Waist to the right, grip upwards: at (1, 9) of (-2..2, 0..10), in the upper right corner."""
    (scene,) = scenes([board([[1.0, 0.5, 9.0]], (0, 2))], batch(1))
    (panel,) = scene.panels
    bare = replace(panel, markers=Markers(), mass=None, thresholds=None, levels=())
    picture = draw_landscape(bare, 320).astype(int).sum(-1)
    row, column = np.unravel_index(picture.argmax(), picture.shape)
    assert column == pytest.approx(0.75 * 320, abs=10)
    assert row == pytest.approx(0.1 * 320, abs=10)
    crossed = replace(bare, markers=Markers(expert=np.array([-1.0, 2.0])))
    red = np.argwhere(is_colour(draw_landscape(crossed, 320), marks.RED))
    np.testing.assert_allclose(red.mean(0), [0.8 * 320, 0.25 * 320], atol=2)
    # Outlines lie where the colours are.
    outlined = replace(panel, markers=Markers())
    white = np.argwhere(is_colour(draw_landscape(outlined, 320), marks.WHITE))
    np.testing.assert_allclose(white.mean(0), [0.1 * 320, 0.75 * 320], atol=10)


def test_every_marker_of_a_plane_lies_at_its_own_dimensions():
    """Grip to the right, waist upwards: dimensions (2, 0), and everything at another place."""
    predictions = answers([[1.0, 0.5, 9.0]])
    predictions = replace(
        predictions, expert=torch.tensor([[[-1.0, 0.2, 3.0]] * 2], dtype=torch.float64)
    )
    plane = SPACE.plane(2, 0)
    probe = Probe(Arm(), batch(1), predictions, scale_of(), QUERIES, plane.grid(32), plane)
    executed = torch.tensor([[0.0, 0.9, 6.0]])
    seen = batch(1)
    seen.actions[:, 0] = torch.tensor([-1.5, 0.1, 2.0])
    seen.actions[:, 4] = torch.tensor([-1.0, 0.2, 3.0])
    column = Column(Likelihood().landscape(probe), 0, predictions, executed=executed)
    (now,) = next(scenes([column], seen)).panels
    (ahead,) = next(scenes([replace(column, query=4)], seen)).panels
    np.testing.assert_allclose(now.markers.prediction, [9.0, 1.0])
    np.testing.assert_allclose(now.markers.expert, [3.0, -1.0])
    np.testing.assert_allclose(now.markers.executed, [6.0, 0.0])
    np.testing.assert_allclose(ahead.markers.expert_trace[[0, -1]], [[2.0, -1.5], [3.0, -1.0]])
    assert ahead.markers.executed is None
    bare = replace(now, mass=None, thresholds=None, levels=())

    def centre(colour: tuple[int, int, int], panel: Panel, **shown: np.ndarray) -> np.ndarray:
        drawn = draw_landscape(replace(panel, markers=Markers(**shown)), 320)
        rows, columns = np.nonzero(is_colour(drawn, colour))
        return np.array([columns.mean(), rows.mean()]) / 320

    star = centre(marks.WHITE, bare, prediction=now.markers.prediction)
    cross = centre(marks.RED, bare, expert=now.markers.expert)
    ring = centre(marks.ORANGE, bare, executed=now.markers.executed)
    trace = centre(marks.RED, bare, expert_trace=ahead.markers.expert_trace[[0, -1]])
    np.testing.assert_allclose(star, [0.9, 0.25], atol=0.01)
    np.testing.assert_allclose(cross, [0.3, 0.75], atol=0.01)
    np.testing.assert_allclose(ring, [0.6, 0.5], atol=0.01)
    np.testing.assert_allclose(trace, [0.25, 0.8125], atol=0.02)


def test_each_axis_has_its_own_name_and_numbers():
    """Widening or renaming one axis changes the writing beside that axis, and no other."""
    (scene,) = scenes([board([[1.0, 0.5, 9.0]], (0, 2))], batch(1))
    (panel,) = scene.panels
    assert panel.axes == (SPACE.axes[0], SPACE.axes[2])

    def writing(axes: tuple[Axis, Axis]) -> tuple[np.ndarray, np.ndarray]:
        frame = side_by_side(replace(scene, panels=[replace(panel, axes=axes)]), 300)
        size = 300 - CAPTION_PX - 56 - AXIS_PX
        below = frame[CAPTION_PX + size : CAPTION_PX + size + AXIS_PX]
        return frame[CAPTION_PX : CAPTION_PX + size, :SIDE_PX], below

    x, y = panel.axes
    left, below = writing((x, y))
    for changed in (replace(x, name="other"), replace(x, high=7.0), replace(x, unit="m")):
        of_left, of_below = writing((changed, y))
        assert np.array_equal(of_left, left)
        assert not np.array_equal(of_below, below)
    for changed in (replace(y, name="other"), replace(y, high=17.0), replace(y, unit="m")):
        of_left, of_below = writing((x, changed))
        assert not np.array_equal(of_left, left)
        assert np.array_equal(of_below, below)
    # The numbers grow upwards: 10 at the upper edge, and a little below it once 12 is there.
    higher, _ = writing((x, replace(y, high=12.0)))
    tops = [
        np.flatnonzero((side[:, -4:] == np.array(marks.CASING)).all((-1, -2)))[0]
        for side in (left, higher)
    ]
    highest = [max(ticks(0.0, high, max(len(left) // 40, 1))) for high in (10.0, 12.0)]
    for top, value, high in zip(tops, highest, (10.0, 12.0), strict=True):
        assert top == pytest.approx((high - value) / high * (len(left) - 1), abs=1)
    assert tops[0] != tops[1]


def test_a_conditional_slice_says_what_it_is():
    predictions = answers([[1.0, 0.5, 9.0]])
    titles = []
    for is_conditional in (False, True):
        plane = SPACE.plane(0, 2, is_conditional)
        probe = Probe(Arm(), batch(1), predictions, scale_of(), QUERIES, plane.grid(8), plane)
        column = Column(Likelihood().landscape(probe), 0, predictions)
        titles.append(next(scenes([column], batch(1))).panels[0].title)
    assert titles[1] == f"{titles[0]}, others held at the prediction"


def test_axes_stand_beside_the_board_and_the_frame_keeps_its_height():
    (scene,) = scenes([board([[1.0, 0.5, 9.0]], (0, 2))], batch(1))
    frame = side_by_side(scene, 300)
    assert len(frame) == 300
    (panel,) = scene.panels
    without = side_by_side(replace(scene, panels=[replace(panel, axes=None)]), 300)
    assert len(without) == 300
    size = 300 - CAPTION_PX - 56 - AXIS_PX
    inside = frame[CAPTION_PX : CAPTION_PX + size, SIDE_PX : SIDE_PX + size]
    assert np.array_equal(inside, draw_landscape(panel, size))
    side = frame[CAPTION_PX : CAPTION_PX + size, :SIDE_PX]
    assert (side < 128).any(-1).sum() > 100
    strip = landscape_strip([scene, scene])
    assert strip.shape[1] >= 208


def test_a_panel_without_a_plane_has_no_axes():
    predictions = answers([[0.0, 0.5, 5.0]]).dimensions([0, 1])
    grid = SPACE.plane(0, 1).grid(16)
    flat = Arm()
    flat.data_schema = DataSchema(cameras={}, state_dim=2, action_dim=2)
    probe = Probe(flat, batch(1), predictions, scale_of()[..., :2], QUERIES, grid)
    found = Likelihood().landscape(probe)
    assert Panel.of(found, 0, 0, "title").axes is None
    assert Scene([Panel.of(found, 0, 0, "title")]).panels[0].markers.expert is None
