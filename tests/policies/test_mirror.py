"""Mirrors: reflections of points, pictures and angles that agree with each other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.interface import Batch, DataSchema, Observation
from policies.mirror import AntiDiagonal, MirroredPolicy, XFlip

ORDER = (1, 0, 3, 2)
"""Of four keypoints in pairs."""
MIRRORS = [XFlip(512.0, ORDER, (4,)), AntiDiagonal(512.0, ORDER, (4,))]
each_mirror = pytest.mark.parametrize("mirror", MIRRORS, ids=lambda each: type(each).__name__)
POINTS = st.lists(st.tuples(st.floats(-50, 600), st.floats(-50, 600)), min_size=1, max_size=6)


def observation(history: tuple[int, ...] = ()) -> Observation:
    torch.manual_seed(0)
    return Observation(
        images={"image": torch.randint(0, 256, (3, *history, 3, 8, 8), dtype=torch.uint8)},
        state=torch.rand(3, *history, 2) * 512,
        environment_state=torch.rand(3, *history, 8) * 512,
    )


def batch() -> Batch:
    return Batch(
        observation=observation(),
        actions=torch.rand(3, 5, 2).double() * 512,
        action_is_pad=torch.zeros(3, 5).bool(),
        episode_index=torch.arange(3),
        frame_index=torch.arange(3),
        simulator_state=torch.rand(3, 5).double() * 6,
    )


def assert_same(found: Observation, expected: Observation) -> None:
    torch.testing.assert_close(found.images["image"], expected.images["image"], atol=0, rtol=0)
    torch.testing.assert_close(found.state, expected.state, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.environment_state, expected.environment_state, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("mirror", "expected"), [(MIRRORS[0], (502.0, 20.0)), (MIRRORS[1], (492.0, 502.0))]
)
def test_points_go_where_the_table_says(mirror, expected):
    assert mirror.points(torch.tensor([10.0, 20.0])).tolist() == list(expected)


@each_mirror
@settings(max_examples=40)
@given(POINTS)
def test_a_mirror_is_a_reflection_and_its_own_inverse(mirror, points):
    points = torch.tensor(points, dtype=torch.float64)
    there = mirror.points(points)
    torch.testing.assert_close(mirror.points(there), points, atol=1e-9, rtol=0)
    torch.testing.assert_close(torch.cdist(there, there), torch.cdist(points, points))
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    origin, right, down = mirror.points(corner)
    handedness = torch.linalg.det(torch.stack([right - origin, down - origin]))
    assert float(handedness) == pytest.approx(-1)


@each_mirror
@pytest.mark.parametrize("history", [(), (2,)], ids=["one instant", "history"])
def test_observations_come_back(mirror, history):
    seen = observation(history)
    there = mirror.observation(seen)
    assert not torch.equal(there.images["image"], seen.images["image"])
    assert_same(mirror.observation(there), seen)


@each_mirror
def test_batches_come_back_with_actions_and_states(mirror):
    first = batch()
    there = mirror.batch(first)
    back = mirror.batch(there)
    assert float((there.actions - first.actions).abs().max()) > 50
    torch.testing.assert_close(back.actions, first.actions, atol=1e-9, rtol=0)
    torch.testing.assert_close(back.simulator_state, first.simulator_state, atol=1e-9, rtol=0)
    assert_same(back.observation, first.observation)


@each_mirror
def test_what_is_absent_stays_absent(mirror):
    seen = Observation({"image": observation().images["image"]})
    there = mirror.observation(seen)
    assert there.state is None
    assert there.environment_state is None
    assert mirror.batch(replace(batch(), simulator_state=None)).simulator_state is None


@each_mirror
@pytest.mark.parametrize("place", [(0, 0), (3, 12), (15, 4)])
def test_a_picture_shows_a_point_where_the_point_went(mirror, place):
    """A board of 16 px: the pixel (column, row) has its centre at (column + 0.5, row + 0.5)."""
    mirror = replace(mirror, extent=16.0)
    column, row = place
    picture = torch.zeros(1, 16, 16)
    picture[0, row, column] = 1
    x, y = mirror.points(torch.tensor([column + 0.5, row + 0.5])).tolist()
    lit = mirror.pictures(picture).nonzero()[:, 1:]
    assert lit.tolist() == [[int(y - 0.5), int(x - 0.5)]]


@each_mirror
@given(st.floats(-7, 7))
@settings(max_examples=40)
def test_a_turned_symmetric_object_stays_one(mirror, angle):
    """Its stem, (0, 1) in its own frame, goes where the mirror sends a line along it."""

    def stem(turned):
        return torch.stack([-torch.sin(turned), torch.cos(turned)])

    angle = torch.tensor(angle, dtype=torch.float64)
    origin = torch.zeros(2, dtype=torch.float64)
    expected = mirror.points(stem(angle)) - mirror.points(origin)
    found = mirror.angles(angle)
    assert 0 <= float(found) <= 2 * math.pi
    torch.testing.assert_close(stem(found), expected, atol=1e-9, rtol=0)


@each_mirror
def test_keypoints_of_a_symmetric_object_exchange_their_names(mirror):
    """Left and right ends of a bar, and of a shorter one below, symmetric about x = 100."""
    ends = torch.tensor([[70.0, 40.0], [130.0, 40.0], [90.0, 80.0], [110.0, 80.0]])
    on_axis = torch.tensor([[100.0, 40.0], [100.0, 80.0]])
    found = mirror.environment_state(ends.flatten()).reshape(4, 2)
    # In its own frame the mirrored object has its left end where left is: the same handedness.
    across, along = found[1] - found[0], mirror.points(on_axis)[1] - mirror.points(on_axis)[0]
    assert float(across[0] * along[1] - across[1] * along[0]) == pytest.approx(60 * 40)
    unordered = replace(mirror, point_order=()).environment_state(ends.flatten()).reshape(4, 2)
    torch.testing.assert_close(unordered[list(ORDER)], found)
    assert float((unordered - found).norm(dim=-1).max()) == pytest.approx(60)


def test_what_cannot_be_mirrored_is_refused():
    with pytest.raises(ValueError, match="extent is 0"):
        XFlip(0.0)
    with pytest.raises(ValueError, match="7 numbers are no points"):
        XFlip().vectors(torch.zeros(7))
    with pytest.raises(ValueError, match="has 6 numbers, and point_order names 4"):
        MIRRORS[0].environment_state(torch.zeros(6))
    with pytest.raises(ValueError, match="8 x 9 px: only square ones"):
        AntiDiagonal().pictures(torch.zeros(3, 8, 9))
    with pytest.raises(ValueError, match=r"angle_columns \(4,\) are not the last of 7"):
        MIRRORS[0].simulator_state(torch.zeros(7))


class Recorder:
    """Acts by all that it sees, in no symmetric way, and remembers what that was."""

    data_schema = DataSchema({"image": (8, 8)}, 2, 2, environment_state_dim=8)
    chunk_size = 4
    n_action_steps = 2
    n_obs_steps = 1

    def predict_chunk(self, observation, queries=None):
        self.seen = observation
        steps = torch.arange(self.chunk_size)[list(queries or range(self.chunk_size))]
        ramp = torch.linspace(0, 1, 64).reshape(8, 8)
        light = (observation.images["image"].float() * ramp).mean((1, 2, 3))
        start = observation.state * 0.3 + light[:, None] + observation.environment_state[:, 2:4]
        return start[:, None] + steps[None, :, None] * torch.tensor([1.0, 3.0])

    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        noise = torch.randn(n_samples, generator=torch.Generator().manual_seed(seed))
        chunk = self.predict_chunk(observation, queries)
        return chunk[:, None] + noise[None, :, None, None]


class Deterministic:
    """Draws nothing."""

    data_schema, chunk_size, n_action_steps, n_obs_steps = Recorder.data_schema, 4, 2, 1

    def predict_chunk(self, observation, queries=None):
        return torch.zeros(len(observation.state), 4, 2)


@each_mirror
def test_a_mirrored_policy_sees_the_mirror_image_and_answers_out_of_it(mirror):
    policy, seen = Recorder(), observation()
    mirrored = MirroredPolicy(policy, mirror)
    answer = mirrored.predict_chunk(seen, queries=[0, 2])
    assert_same(policy.seen, mirror.observation(seen))
    expected = mirror.vectors(policy.predict_chunk(mirror.observation(seen), [0, 2]))
    torch.testing.assert_close(answer, expected, atol=0, rtol=0)
    assert (mirrored.chunk_size, mirrored.n_action_steps) == (4, 2)
    assert mirrored.data_schema == policy.data_schema


@each_mirror
def test_mirrored_twice_a_policy_is_itself(mirror):
    policy, seen = Recorder(), observation()
    once = MirroredPolicy(policy, mirror)
    twice = MirroredPolicy(once, mirror)
    plain = policy.predict_chunk(seen)
    assert float((once.predict_chunk(seen) - plain).abs().max()) > 1
    torch.testing.assert_close(twice.predict_chunk(seen), plain, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        twice.sample_chunks(seen, 5, seed=3),
        policy.sample_chunks(seen, 5, seed=3),
        atol=1e-3,
        rtol=0,
    )


def test_a_policy_that_draws_nothing_says_so():
    with pytest.raises(TypeError, match="Deterministic draws no action chunks"):
        MirroredPolicy(Deterministic(), XFlip()).sample_chunks(observation(), 2)


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 0), (2, 1), (-1, 0)])
def test_places_that_points_do_not_exchange_in_pairs_are_refused(order):
    with pytest.raises(ValueError, match="point_order is"):
        XFlip(512.0, order)


@pytest.mark.parametrize("extent", [-1.0, math.inf, math.nan])
def test_a_board_has_a_width(extent):
    with pytest.raises(ValueError, match=f"extent is {extent}"):
        AntiDiagonal(extent)
