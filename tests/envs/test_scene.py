"""What the board would show without an object, or with one elsewhere; and where objects are."""

from dataclasses import replace

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.counterfactuals import measure_counterfactuals
from envs.push_t import AGENT_RADIUS_PX, GOAL_POSE, T_OUTLINE_PX, PushT, PushTTask
from envs.scene import scene_variants
from envs.task import Environment, Scene
from policies.interface import Batch, Observation

SIZE = 96
APART = np.array([100.0, 120.0, 380.0, 300.0, 1.2])
"""Agent, block and goal; the block hides a part of the goal."""
STATE = st.tuples(*[st.floats(40, 470)] * 4, st.floats(0, 6.28)).map(np.array)


@pytest.fixture(scope="module")
def env() -> PushT:
    return PushT(SIZE)


@pytest.fixture
def pushing() -> PushT:
    """In the middle of a push: the agent moves and touches the block, the block a wall."""
    env = PushT(SIZE)
    env.reset_to(np.array([270.0, 60.0, 400.0, 20.0, 0.0]))
    for _ in range(8):
        env.step(np.array([400.0, 60.0]))
    assert np.hypot(*env.agent_velocity()) > 1
    return env


def drawn(env: PushT, state: np.ndarray) -> np.ndarray:
    env.reset_to(state)
    return env.image()


def shapes_of(state: np.ndarray) -> dict[str, shapely.Geometry]:
    def t_at(pose) -> shapely.Geometry:
        turned = shapely.affinity.rotate(
            shapely.Polygon(T_OUTLINE_PX), pose[2], origin=(0, 0), use_radians=True
        )
        return shapely.affinity.translate(turned, *pose[:2])

    return {
        "agent": shapely.Point(state[:2]).buffer(AGENT_RADIUS_PX, quad_segs=64),
        "block": t_at(state[2:]),
        "goal": t_at(GOAL_POSE),
    }


def test_push_t_is_a_scene(env):
    assert isinstance(env, Scene)
    assert [parameter.index for parameter in env.pose_parameters] == list(range(5))
    assert {parameter.owner for parameter in env.pose_parameters} < set(env.objects)


# Masks


@settings(max_examples=20)
@given(STATE, st.sampled_from([(SIZE, SIZE), (64, 48)]), st.sampled_from([0.0, 7.0, 15.0]))
def test_masks_are_the_shapes_widened_on_the_board(env, state, size_px, dilation_px):
    env.reset_to(state)
    masks = env.masks("image", size_px, dilation_px)
    assert tuple(masks) == env.objects
    height, width = size_px
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    # Where cv2.resize takes a pixel from.
    x = (columns + 0.5) * 512 / width - 0.5
    y = (rows + 0.5) * 512 / height - 0.5
    for name, shape in shapes_of(env.state()).items():
        certain = shapely.contains_xy(shape.buffer(dilation_px - 0.02, quad_segs=64), x, y)
        possible = shapely.contains_xy(shape.buffer(dilation_px + 0.02, quad_segs=64), x, y)
        assert (masks[name] >= certain).all()
        assert (masks[name] <= possible).all()


def test_what_is_drawn_lies_under_the_mask():
    """The mask is of the picture, neither shifted nor mirrored."""
    env = PushT(512)
    as_is = drawn(env, np.array([100.0, 120.0, 420.0, 340.0, 1.2]))
    narrow, wide = (env.masks("image", (512, 512), dilation) for dilation in (0.0, 3.5))
    for name in env.objects:
        differs = (env.pictures_without(name)["image"] != as_is).any(-1)
        assert wide[name][differs].all()
        assert differs.sum() > 0.95 * narrow[name].sum()
        # pygame draws a disc half a pixel towards the origin.
        np.testing.assert_allclose(
            np.argwhere(differs).mean(0), np.argwhere(narrow[name]).mean(0), atol=0.75
        )


def test_impossible_masks_are_refused(env):
    with pytest.raises(ValueError, match="'wrist'"):
        env.masks("wrist", (SIZE, SIZE), 1.0)
    with pytest.raises(ValueError, match=r"dilation_px -1\.0"):
        env.masks("image", (SIZE, SIZE), -1.0)


# Without an object


@settings(max_examples=25)
@given(STATE)
def test_only_the_object_disappears(env, state):
    as_is = drawn(env, state)
    masks = env.masks("image", (SIZE, SIZE), 15.0)
    for name in env.objects:
        picture = env.pictures_without(name)["image"]
        np.testing.assert_array_equal(picture[~masks[name]], as_is[~masks[name]])


@pytest.mark.parametrize(("name", "moved"), [("agent", slice(0, 2)), ("block", slice(2, 5))])
def test_nothing_of_the_object_remains(env, name, moved):
    """Without the object nobody can tell where it was."""
    pictures = []
    for place in ([100.0, 120.0, 0.1], [330.0, 250.0, 2.0]):
        state = np.array([60.0, 440.0, 420.0, 380.0, 0.5])
        state[moved] = place[: len(state[moved])]
        as_is = drawn(env, state)
        pictures.append(env.pictures_without(name)["image"])
        assert (as_is != pictures[-1]).any()
    np.testing.assert_array_equal(*pictures)


def test_without_the_goal_no_green_is_left(env):
    assert drawn(env, APART).max() == 255
    picture = env.pictures_without("goal")["image"].astype(int)
    assert (picture[..., 1] - picture[..., 2]).max() < 10
    # The next board has its goal again, whoever draws it.
    assert (env.pictures_without("agent")["image"].astype(int)[..., 1] > 230).any()
    np.testing.assert_array_equal(
        env.pictures_without("agent")["image"][env.masks("image", (SIZE, SIZE), 0.0)["goal"]],
        drawn(env, APART)[env.masks("image", (SIZE, SIZE), 0.0)["goal"]],
    )


def test_a_look_leaves_the_simulation_as_it_was(pushing):
    state, picture, velocity = pushing.state(), pushing.image(), pushing.agent_velocity()
    for name in pushing.objects:
        pushing.pictures_without(name)
    pushing.masks("image", (SIZE, SIZE), 15.0)
    np.testing.assert_array_equal(pushing.state(), state)
    np.testing.assert_array_equal(pushing.image(), picture)
    np.testing.assert_array_equal(pushing.agent_velocity(), velocity)
    ends = []
    for looks in (True, False):
        env = PushT(SIZE)
        env.reset_to(np.array([270.0, 60.0, 400.0, 20.0, 0.0]))
        for _ in range(15):
            env.step(np.array([400.0, 70.0]))
            if looks:
                env.pictures_without("block")
        ends.append(env.state())
    np.testing.assert_array_equal(*ends)


def test_contact_marks_of_a_missing_object_are_gone_and_others_stay(pushing):
    as_is = pushing.image().astype(int)
    red = as_is[..., 0] - as_is[..., 2] > 60
    assert red.any(), "nothing touches"
    without = pushing.pictures_without("agent")["image"].astype(int)
    still_red = without[..., 0] - without[..., 2] > 60
    near_agent = pushing.masks("image", (SIZE, SIZE), 6.0)["agent"]
    assert not (still_red & near_agent).any()
    np.testing.assert_array_equal(still_red, red & ~near_agent)


def test_an_object_that_is_not_there_is_refused(env):
    with pytest.raises(ValueError, match="object 'door': PushT has agent, block, goal"):
        env.pictures_without("door")


# Variants of recorded frames


def recorded(states: np.ndarray, size: int = SIZE) -> Batch:
    env = PushT(size)
    seen = []
    for state in states:
        env.reset_to(state)
        seen.append(env.observe())
    n = len(states)
    return Batch(
        observation=Observation(
            images={
                "image": torch.from_numpy(
                    np.stack([each["images"]["image"] for each in seen])
                ).permute(0, 3, 1, 2)
            },
            state=torch.from_numpy(np.stack([each["state"] for each in seen])),
        ),
        actions=torch.zeros(n, 1, 2),
        action_is_pad=torch.zeros(n, 1, dtype=torch.bool),
        episode_index=torch.zeros(n, dtype=torch.long),
        frame_index=torch.arange(n),
        simulator_state=torch.from_numpy(states),
    )


STATES = np.array(
    [APART, [420.0, 80.0, 200.0, 330.0, 4.0], [230.5, 91.2, 300.0, 300.0, 2.5]], dtype=float
)


class Watching:
    """Goes to what it sees in the picture.

    Args:
        where: From pictures in 0..255 to weights of their pixels.
    """

    n_obs_steps = chunk_size = n_action_steps = 1
    data_schema = PushTTask(SIZE).data_schema()

    def __init__(self, where):
        self.where = where

    def predict_chunk(self, observation, queries=None):
        weight = self.where(observation.images["image"].double())
        size = weight.shape[-1]
        place = (torch.arange(size) + 0.5) * 512 / size - 0.5
        total = weight.sum((1, 2)) + 1e-9
        x = (weight.sum(1) * place).sum(1) / total
        y = (weight.sum(2) * place).sum(1) / total
        return torch.stack([x, y], -1)[:, None]


def of_agent(images):
    return (images[:, 2] - images[:, 0] - 60).clamp(0, 60)


def test_a_policy_that_tracks_the_agent_is_found_out():
    batch = recorded(STATES)
    variants = scene_variants(PushTTask(SIZE), batch)
    effects = measure_counterfactuals(Watching(of_agent), variants, recorded=batch.observation)
    torch.testing.assert_close(
        effects.shares, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(3, 3), atol=1e-6, rtol=0
    )
    for axis in ("agent_x", "agent_y"):
        torch.testing.assert_close(
            effects.sensitivity[axis], torch.ones(3).double(), atol=0.1, rtol=0
        )
    for other in ("block_x", "block_y", "block_angle"):
        assert effects.sensitivity[other].max() < 1e-6
    assert effects.rerender_px is not None
    assert effects.rerender_px.max() == 0


def test_a_policy_that_tracks_the_block_moves_with_it_and_turns_by_its_lever():
    def of_block(images):
        # Nothing else is in this part of the board.
        part = slice(40, 320), slice(330, 495)
        darkness = torch.zeros(len(images), 512, 512).double()
        darkness[:, *part] = 255 - images[:, 0, *part]
        return darkness

    # A picture of 96 px has no antialiasing: a move of 8 px shows as one of 5.3 or of 10.7.
    state = np.array([[60.0, 60.0, 420.0, 120.0, 0.0]])
    variants = scene_variants(PushTTask(512), recorded(state, 512))
    effects = measure_counterfactuals(Watching(of_block), variants)
    assert effects.shares[0].tolist() == [0.0, 1.0, 0.0]
    for axis in ("block_x", "block_y"):
        assert effects.sensitivity[axis].item() == pytest.approx(1.0, abs=0.02)
    # Bar and stem have their centroid (15 * 3600 + 75 * 2700) / 6300 px beside the axis,
    # before gym-pusht draws their rims.
    lever = 40.7 * np.pi / 180
    assert effects.sensitivity["block_angle"].item() == pytest.approx(lever, rel=0.05)


def test_variants_show_the_simulator_in_the_changed_state(env):
    batch = recorded(STATES)
    variants = scene_variants(PushTTask(SIZE), batch, dilation_px=5.0)
    torch.testing.assert_close(
        variants.as_is.images["image"], batch.observation.images["image"], rtol=0, atol=0
    )
    steps = np.diag([4.0, 4.0, 4.0, 4.0, np.radians(5.0)])
    assert [move.name for move in variants.moves] == [each.name for each in env.pose_parameters]
    for move, step in zip(variants.moves, steps, strict=True):
        for shown, sign in ((move.plus, 1), (move.minus, -1)):
            for picture, state in zip(shown.images["image"], STATES, strict=True):
                np.testing.assert_array_equal(
                    picture.permute(1, 2, 0), drawn(env, state + sign * step)
                )
            assert shown.state is batch.observation.state
    for row, state in enumerate(STATES):
        env.reset_to(state)
        for name, mask in env.masks("image", (SIZE, SIZE), 5.0).items():
            np.testing.assert_array_equal(variants.masks[name][row], mask)
            np.testing.assert_array_equal(
                variants.without[name].images["image"][row].permute(1, 2, 0),
                env.pictures_without(name)["image"],
            )


class Sceneless:
    """A board that only does what every environment does."""

    def __init__(self, board: PushT) -> None:
        for name in ("reset", "reset_to", "state", "observe", "step", "frame", "close"):
            setattr(self, name, getattr(board, name))


class ScenelessTask(PushTTask):
    def make(self):
        board = Sceneless(super().make())
        assert isinstance(board, Environment)
        return board


def test_frames_that_cannot_be_drawn_again_are_refused():
    batch, task = recorded(STATES), PushTTask(SIZE)
    with pytest.raises(ValueError, match="Sceneless is no Scene"):
        scene_variants(ScenelessTask(SIZE), batch)
    with pytest.raises(ValueError, match="hold no states"):
        scene_variants(task, replace(batch, simulator_state=None))
    with pytest.raises(ValueError, match="hold no states"):
        scene_variants(task, replace(batch, simulator_state=torch.zeros(3, 14)))
    with pytest.raises(ValueError, match=r"\(96, 96\).*\(64, 64\)"):
        scene_variants(PushTTask(64), batch)
    for images in ({}, {"image": torch.zeros(3, 2, 3, SIZE, SIZE)}):
        observation = Observation(images=images, state=batch.observation.state)
        with pytest.raises(ValueError, match="pictures of one instant"):
            scene_variants(task, replace(batch, observation=observation))
    renamed = Observation(images={"top": batch.observation.images["image"]})
    with pytest.raises(ValueError, match=r"top.*image"):
        scene_variants(task, replace(batch, observation=renamed))
