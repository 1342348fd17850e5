"""Each scene holds what belongs to its frame: boards, markers, the way the demonstrator took."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from landscapes.density import Mixture
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions
from landscapes.regions import credible_thresholds
from policies.interface import Batch, Observation
from rendering.landscape import Scene
from rendering.landscape_scenes import Column, Overlay, demonstrated, scenes

CHUNK = 6
QUERIES = (0, 4)
LENGTH = 9


def action(episode: int, step: int) -> list[float]:
    """A different one at every step of every episode."""
    return [100.0 * episode + 10 * step + 5, 300.0 + 3 * step]


def episode(number: int = 1, length: int = LENGTH, stride: int = 1) -> Batch:
    """Demonstrated chunks of one episode; the last action repeats beyond its end."""
    steps = torch.arange(0, length, stride)
    ahead = steps[:, None] + torch.arange(CHUNK)
    actions = torch.tensor([action(number, step) for step in range(length)])
    return Batch(
        observation=Observation(images={}, state=torch.zeros(len(steps), 2)),
        actions=actions[ahead.clamp_max(length - 1)],
        action_is_pad=ahead >= length,
        episode_index=torch.full((len(steps),), number),
        frame_index=steps,
    )


def predictions(batch: Batch) -> Predictions:
    """Samples around a point that lies 7 px beside the demonstration."""
    expert = batch.actions[:, list(QUERIES)].double()
    point = expert + 7
    samples = point[:, None] + torch.tensor([-20.0, 0, 20])[None, :, None, None]
    return Predictions(QUERIES, samples, point, expert, ~batch.action_is_pad[:, list(QUERIES)])


def column(batch: Batch, query: int = 0, **more) -> Column:
    answers = predictions(batch)
    grid = Grid(16)
    mass = Mixture(
        answers.samples.transpose(1, 2), torch.tensor(12.0, dtype=torch.float64).expand(1, 1, 1, 2)
    ).cell_mass(grid)
    landscape = Landscape(
        method="likelihood",
        unit="nats",
        value_range=(-4.0, 8.0),
        grid=grid,
        queries=QUERIES,
        scores=mass.log().float(),
        mass=mass.float(),
        thresholds=credible_thresholds(mass).float(),
    )
    return Column(landscape, query, answers, **more)


def composed(batch: Batch, *columns: Column, **more) -> list[Scene]:
    return list(scenes(columns, batch, **more))


def test_one_scene_a_frame_with_the_boards_of_that_frame():
    batch = episode()
    both = column(batch), column(batch, 4)
    found = composed(batch, *both)
    assert len(found) == LENGTH
    for frame, scene in enumerate(found):
        for place, panel in enumerate(scene.panels):
            landscape = both[0].landscape
            np.testing.assert_array_equal(panel.scores, landscape.scores[frame, place])
            np.testing.assert_array_equal(panel.mass, landscape.mass[frame, place])
            answers = both[0].predictions
            np.testing.assert_array_equal(panel.markers.prediction, answers.point[frame, place])


def test_the_cross_is_the_action_of_that_chunk_step_until_the_demonstration_ends():
    batch = episode()
    for frame, scene in enumerate(composed(batch, column(batch), column(batch, 4))):
        now, later = (panel.markers.expert for panel in scene.panels)
        np.testing.assert_allclose(now, action(1, frame))
        if frame + 4 < LENGTH:
            np.testing.assert_allclose(later, action(1, frame + 4))
        else:
            assert later is None
            assert not len(scene.panels[1].markers.expert_trace)


def test_what_is_executed_belongs_to_now_alone_and_says_its_age():
    batch = episode()
    executed, ages = torch.rand(LENGTH, 2) * 512, torch.arange(LENGTH) % 3
    columns = [column(batch, query, executed=executed, executed_age=ages) for query in QUERIES]
    for frame, scene in enumerate(composed(batch, *columns)):
        now, later = (panel.markers for panel in scene.panels)
        np.testing.assert_allclose(now.executed, executed[frame])
        assert now.executed_age == frame % 3
        assert later.executed is None
        assert later.executed_age is None
    ensemble = column(batch, executed=executed)
    assert composed(batch, ensemble)[2].panels[0].markers.executed_age is None


def test_hidden_predictions_are_hidden_whoever_executes_them():
    batch = episode()
    shown = column(batch, executed=torch.rand(LENGTH, 2), executed_age=torch.zeros(LENGTH).long())
    (markers,) = (
        scene.panels[0].markers
        for scene in composed(batch, shown, overlay=Overlay(show_policy_prediction=False))[3:4]
    )
    assert markers.prediction is None
    assert markers.executed is None
    assert markers.executed_age is None
    assert markers.expert is not None
    assert len(markers.expert_trace) == 4


def test_hidden_regions_leave_the_scores_alone():
    batch = episode()
    with_regions = composed(batch, column(batch))[0].panels[0]
    overlay = Overlay(show_confidence_intervals=False)
    without = composed(batch, column(batch), overlay=overlay)[0].panels[0]
    assert (with_regions.mass is None, without.mass is None) == (False, True)
    np.testing.assert_array_equal(with_regions.scores, without.scores)


# The trace


@pytest.mark.parametrize("query", [0, 3])
@pytest.mark.parametrize("length", [1, 4, 100])
def test_the_trace_ends_at_the_cross_and_has_every_step_before_it(query, length):
    batch = episode()
    for frame in range(LENGTH):
        trace = demonstrated(batch, frame, query, length)
        if frame + query >= LENGTH:
            assert len(trace) == 0
            continue
        steps = range(max(frame + query + 1 - length, 0), frame + query + 1)
        np.testing.assert_allclose(trace, [action(1, step) for step in steps])


def test_no_trace_when_none_is_wanted():
    assert demonstrated(episode(), 5, 0, 0).shape == (0, 2)


def test_the_trace_never_reaches_into_another_episode():
    batch = Batch.concatenate([episode(0), episode(1)])
    trace = demonstrated(batch, LENGTH + 2, 0, 10)
    np.testing.assert_allclose(trace, [action(1, step) for step in range(3)])


def test_the_trace_does_not_leap_over_frames_that_are_left_out():
    """Every third frame: the way between is not known, save for the chunk itself."""
    trace = demonstrated(episode(length=18, stride=3), 4, 2, 10)
    np.testing.assert_allclose(trace, [action(1, step) for step in (12, 13, 14)])


# Titles and the environment


def test_titles_say_episode_step_method_and_chunk_step():
    batch = episode(7)
    columns = [column(batch, query, label="broad energy") for query in QUERIES]
    pictures = [np.full((8, 8, 3), step, np.uint8) for step in range(LENGTH)]
    scene = composed(batch, *columns, environment=pictures)[5]
    assert scene.title == "episode 7  step 5"
    assert [panel.title for panel in scene.panels] == [
        "broad energy  action now (k = 0)",
        "broad energy  k = 4 steps ahead",
    ]
    assert scene.environment is pictures[5]


def test_boards_alone_say_the_step_themselves():
    batch = episode()
    for frame, scene in enumerate(composed(batch, column(batch), column(batch, 4))):
        assert scene.environment is None
        assert [panel.title for panel in scene.panels] == [
            f"step {frame}  action now (k = 0)",
            "k = 4 steps ahead",
        ]


@pytest.mark.parametrize("n_pictures", [LENGTH - 1, LENGTH + 1])
def test_pictures_that_do_not_fit_the_frames_are_an_error(n_pictures):
    batch = episode()
    pictures = [np.zeros((8, 8, 3), np.uint8)] * n_pictures
    with pytest.raises(ValueError, match="zip"):
        composed(batch, column(batch), environment=iter(pictures))


def test_a_prediction_off_the_board_is_kept_as_it_is():
    """The drawing marks it at the border; clipping it here would lie."""
    batch = episode()
    plain = column(batch)
    far = replace(plain.predictions, point=plain.predictions.point + 600)
    scene = composed(batch, replace(plain, predictions=far))[0]
    assert (scene.panels[0].markers.prediction > 512).all()
