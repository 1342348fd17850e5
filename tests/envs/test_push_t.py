import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.push_t import GOAL_POSE, PushT, PushTTask, agent_path

COORDINATE = st.floats(100, 400)


@pytest.fixture(scope="module")
def env() -> PushT:
    return PushT()


@pytest.fixture(scope="module")
def gym_env():
    from gym_pusht.envs.pusht import PushTEnv

    return PushTEnv(obs_type="state")


@pytest.fixture
def pushed(env):
    """A state in the middle of things: the agent has run into the block."""
    env.reset_to(np.array([150.0, 300.0, 256.0, 250.0, 0.4]))
    for step in range(12):
        env.step(np.array([160.0 + 15 * step, 300.0]))
    assert abs(env.state()[4] - 0.4) > 0.05
    return env.state(), env.image()


@settings(max_examples=30)
@given(st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE), st.floats(-7, 7))
def test_reset_lands_on_the_state(env, position, angle):
    env.reset_to(np.array([*position, angle]))
    np.testing.assert_allclose(env.state()[:4], position, atol=1e-9)
    assert np.exp(1j * env.state()[4]) == pytest.approx(np.exp(1j * angle), abs=1e-9)


def test_reset_shows_the_state_it_lands_on(env, gym_env, pushed):
    state, picture = pushed
    env.reset(seed=3)
    env.image()
    env.reset_to(state)
    np.testing.assert_array_equal(env.image(), picture)
    # The reset of gym-pusht itself does neither: the reason for ours.
    gym_env.reset(options={"reset_to_state": state})
    assert np.abs(gym_env.get_obs() - state).max() > 5


def test_goal_pose_is_covered_entirely(env):
    env.reset_to(np.array([50.0, 50.0, *GOAL_POSE]))
    assert env.coverage() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("size", [48, 96, 300])
def test_rendering_is_gym_pushts_to_the_pixel(gym_env, size):
    env = PushT(size)
    gym_env.observation_width = gym_env.observation_height = size
    for seed in range(5):
        env.reset(seed)
        gym_env.reset(seed=seed)
        np.testing.assert_array_equal(env.observe()["images"]["image"], gym_env._render())


@pytest.mark.parametrize("goal_pose", [GOAL_POSE, (200.0, 310.0, 2.0)])
def test_a_played_episode_is_drawn_as_gym_pusht_does(goal_pose):
    """Through contacts, over the goal and against the walls, on one board after another."""
    env = PushT(goal_pose=goal_pose)
    generator = np.random.default_rng(1)
    n_colors = set()
    for start in ([256, 320, 256, 280, 0.3], [60, 250, 90, 200, 1.5], [470, 470, 440, 400, -2.0]):
        env.reset_to(np.array(start))
        for _ in range(12):
            env.step(generator.uniform(0, 512, 2))
            board = np.frombuffer(env._env._draw().get_buffer(), np.uint8).reshape(512, 512, 4)
            np.testing.assert_array_equal(env.image(512), board[:, :, 2::-1])
            n_colors.add(len(np.unique(board.reshape(-1, 4), axis=0)))
    assert max(n_colors) > min(n_colors), "no contact was drawn"
    assert (env.pictures_without("agent")["image"] != without_goal(env)).any()
    np.testing.assert_array_equal(env.pictures_without("goal")["image"], without_goal(env))


def without_goal(env: PushT) -> np.ndarray:
    spare = PushT(goal_pose=(-1000.0, -1000.0, 0.0))
    spare.reset_to(env.state())
    return spare.image()


def test_steps_are_gym_pushts_to_the_bit(env, gym_env):
    env.reset(seed=5)
    gym_env.reset(seed=5)
    generator = np.random.default_rng(0)
    for _ in range(60):
        action = generator.uniform(100, 400, 2).astype(np.float32)
        outcome = env.step(action)
        state, reward, _, _, info = gym_env.step(action)
        np.testing.assert_array_equal(env.state(), state)
        # gym-pusht adds areas in the order of a set.
        assert outcome[:2] == pytest.approx((info["coverage"], reward), rel=1e-12)
        assert outcome[2] == info["is_success"]
    np.testing.assert_array_equal(
        env.observe()["environment_state"],
        gym_env.get_keypoints(gym_env._block_shapes).ravel().astype(np.float32),
    )


def test_the_agents_path_is_foreseen_through_contact(env):
    env.reset_to(np.array([150.0, 300.0, 256.0, 250.0, 0.4]))
    targets = np.array([[400.0, 310.0], [300.0, 250.0], [120.0, 90.0]])
    path, velocity = agent_path(env.state()[:2], env.agent_velocity(), targets)
    for step, target in enumerate(targets):
        env.step(target)
        np.testing.assert_allclose(path[10 * step + 9], env.state()[:2], atol=1e-9)
    np.testing.assert_allclose(velocity, env.agent_velocity(), atol=1e-9)


@pytest.mark.parametrize("action", [(-1.0, 5.0), (5.0, 513.0), (np.nan, 5.0)])
def test_actions_off_the_board_are_refused(env, action):
    with pytest.raises(ValueError, match="off the board"):
        env.step(np.array(action))


@pytest.mark.parametrize("state", [np.zeros(4), np.array([1, 2, 3, 4, np.inf])])
def test_impossible_states_are_refused(env, state):
    # A wrong shape is a TypeError where shapes are checked at run time.
    with pytest.raises((ValueError, TypeError), match=r"angle|shape|5"):
        env.reset_to(state)


def test_the_task_clips_to_the_board_and_demands_more_than_the_threshold():
    task = PushTTask()
    np.testing.assert_array_equal(task.clip_actions(np.array([[-3.0, 600.0]])), [[0.0, 512.0]])
    assert task.is_success(0.9500001, 0.95)
    assert not task.is_success(0.95, 0.95)


@pytest.mark.parametrize("thresholds", [(), (0.9, 0.85), (0.5, 1.5)])
def test_impossible_thresholds_are_refused(thresholds):
    with pytest.raises(ValueError, match="success_thresholds"):
        PushTTask(success_thresholds=thresholds)


def test_observations_fit_the_schema():
    task = PushTTask(image_size=64)
    env = task.make()
    env.reset(seed=0)
    seen, schema = env.observe(), task.data_schema()
    assert {name: image.shape[:2] for name, image in seen["images"].items()} == schema.cameras
    assert len(seen["state"]) == schema.state_dim
