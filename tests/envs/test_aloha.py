import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.aloha import MARKS, AlohaTransferCube, AlohaTransferCubeTask, shadow_px
from envs.rollout import rollout
from envs.task import ActionProjection, DescribedActions, Scene
from policies.ensembling import ActionQueue
from policies.interface import DataSchema
from rendering.projection import COLOURS

ROOT = Path(__file__).parents[2]
SMALL = (24, 32)


@pytest.fixture
def table():
    env = AlohaTransferCube(("top", "left_wrist"), SMALL)
    yield env
    env.close()


def moved(env, generator, n_steps):
    """Disturbed actions, none of them held for long."""
    action = env.joints()
    actions = []
    for _ in range(n_steps):
        action = action + generator.normal(size=14) * 0.05
        actions.append(action)
    return actions


def test_physics_reward_and_pictures_are_those_of_gym_aloha(graphics):
    # In a process of its own: dm_control tears its graphics down when the interpreter ends.
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from envs.aloha import AlohaTransferCube
from envs.aloha_expert import AlohaExpert
env = AlohaTransferCube(("top", "front_close"))
import gymnasium, gym_aloha, os
theirs = gymnasium.make(
    "gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos", disable_env_checker=True
).unwrapped
seen, _ = theirs.reset(seed=5)
env.reset(5)
start = AlohaExpert().plan(env, 5)
assert np.array_equal(seen["pixels"]["top"], env.image("top"))
# The task itself, without its pictures: three of them in each of gym-aloha's steps.
physics, task = theirs._env.physics, theirs._env.task
rewards = []
for step, action in enumerate(start[:200]):
    task.before_step(action, physics)
    physics.step(10)
    outcome = env.step(action)
    assert outcome.reward == task.get_reward(physics), step
    rewards.append(outcome.reward)
assert set(rewards) == {{0, 1, 2}}, set(rewards)
seen, reward, *_ = theirs.step(start[200])
assert env.step(start[200]).reward == reward == 2
assert np.array_equal(seen["agent_pos"], env.joints())
assert np.array_equal(physics.data.qpos[16:], env.cube_pose())
assert np.array_equal(seen["pixels"]["top"], env.image("top"))
assert np.array_equal(task.get_qvel(physics), env.joint_velocities())
assert np.array_equal(theirs._env.physics.render(480, 640, "front_close"), env.image("front_close"))
for step, action in enumerate(start[201:], 201):
    task.before_step(action, physics)
    physics.step(10)
    outcome = env.step(action)
    assert outcome.reward == task.get_reward(physics), step
    assert outcome.terminated == (outcome.reward == 4)
    rewards.append(outcome.reward)
assert np.array_equal(physics.data.qpos[16:], env.cube_pose())
assert set(rewards) == {{0, 1, 2, 4}}, set(rewards)
# The cube lies on the table between the left fingers.
from envs.aloha import joint_targets
state = env.state()
arm = np.array([0.0, 0.044, 0.753, 0.0, 0.338, 0.0, 0.3])
state[:16] = joint_targets(np.concatenate([arm, env.joints()[7:]]))
state[16:] = 0.0
state[16:20] = -0.1, 0.5, 0.0199, 1.0
for height, reward in ((0.0199, 3), (0.024, 4)):
    state[18] = height
    env.reset_to(state)
    physics.data.qpos[:] = state[:23]
    physics.data.qvel[:] = 0.0
    physics.forward()
    assert env.reward() == task.get_reward(physics) == reward, (height, env.reward())
print("the same")
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "the same" in done.stdout, done.stderr[-2000:]


def test_a_rollout_goes_on_from_a_restored_state_to_the_bit(table):
    generator = np.random.default_rng(0)
    table.reset(3)
    for action in moved(table, generator, 15):
        table.step(action)
    between = table.state()
    actions = moved(table, generator, 15)
    first = [(table.step(action), table.state()) for action in actions]
    other = AlohaTransferCube(("top",), SMALL)
    other.reset_to(between)
    np.testing.assert_array_equal(other.state(), between)
    for action, (outcome, state) in zip(actions, first, strict=True):
        assert other.step(action) == outcome
        np.testing.assert_array_equal(other.state(), state)


def test_a_start_depends_on_its_seed_alone(table):
    table.reset(1)
    first = table.state()
    for action in moved(table, np.random.default_rng(0), 5):
        table.step(action)
    table.reset(2)
    assert not np.array_equal(table.cube_pose(), first[16:23])
    table.reset(1)
    np.testing.assert_array_equal(table.state(), first)


def test_looking_moves_nothing(table, graphics):
    watched, alone = table, AlohaTransferCube(("top",), SMALL)
    for env in (watched, alone):
        env.reset(4)
    for action in moved(watched, np.random.default_rng(1), 4):
        watched.observe()
        watched.masks("top", SMALL, 3.0)
        watched.pictures_without("cube")
        watched.project_actions("left_wrist", action, SMALL)
        assert watched.step(action) == alone.step(action)
    np.testing.assert_array_equal(watched.state(), alone.state())


def test_projected_points_are_where_the_pixels_are(graphics):
    env = AlohaTransferCube(("top",), (240, 320))
    generator = np.random.default_rng(2)
    for seed in (0, 1):
        env.reset(seed)
        for action in moved(env, generator, 10):
            env.step(action)
        for camera in ("top", "angle"):
            size = (240, 320)
            mask = env.masks(camera, size, 0.0)["cube"]
            rows, columns = np.nonzero(mask)
            seen = np.array([columns.mean(), rows.mean()]) + 0.5
            x, y = env.project(camera, env.cube_pose()[:3], size)
            # Nearer faces are larger, so the middle of the pixels is not quite the cube's.
            np.testing.assert_allclose([x, y], seen, atol=1.5)
            # An arm that is where it was sent covers the place it was sent to.
            masks = env.masks(camera, size, 8.0)
            for side, (x, y) in zip(
                env.end_effectors, env.project_actions(camera, env.joints(), size), strict=True
            ):
                assert masks[f"{side}_arm"][int(y), int(x)]
                assert not masks["cube"][int(y), int(x)]
    env.close()


def test_a_point_behind_a_camera_is_nowhere(table):
    behind = np.array([[0.0, 0.6, 0.9], [0.0, 0.6, 0.0]])
    there = table.project("top", behind, SMALL)
    assert np.isnan(there[0]).all()
    # The camera looks at the middle of the table.
    np.testing.assert_allclose(there[1], (16.0, 12.0), atol=1e-6)


def test_projection_scales_with_the_picture(table):
    actions = np.array(moved(table, np.random.default_rng(0), 6)).reshape(2, 3, 14)
    small, large = (table.project_actions("top", actions, (h, h * 4 // 3)) for h in (24, 480))
    assert small.shape == (2, 3, 2, 2)
    np.testing.assert_allclose(large, small * 20, rtol=1e-9)


def test_an_object_taken_out_changes_its_pixels_and_its_shadow_alone(graphics):
    env = AlohaTransferCube(("top",), (60, 80))
    env.reset(0)
    shown = env.image("top")
    assert set(env.masks("top", (60, 80), 0.0)) == set(env.objects)
    for name in env.objects:
        without = env.pictures_without(name)["top"]
        changed = (np.abs(shown.astype(int) - without) > 8).any(axis=-1)
        own = env.masks("top", (60, 80), 20.0)[name]
        assert changed[own].any()
        if name == "cube":
            red = shown[..., 0].astype(int) - shown[..., 1] > 60
            assert red.any()
            assert not (red & ~own).any()
            assert not (without[..., 0].astype(int) - without[..., 1] > 60).any()
    np.testing.assert_array_equal(env.image("top"), shown)
    env.close()


def test_dilated_masks_grow_with_the_reach(table, graphics):
    masks = [table.masks("top", (48, 64), reach)["cube"] for reach in (0.0, 10.0, 40.0)]
    sizes = [int(mask.sum()) for mask in masks]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert not (masks[0] & ~masks[1]).any()
    assert not (masks[1] & ~masks[2]).any()


def test_the_first_camera_is_framed_with_marks_where_the_grippers_go(table, graphics):
    plain = table.frame(48)
    assert plain.shape == (48, 64, 3)
    marked = table.frame(48, table.joints())
    assert COLOURS[: len(MARKS)] == MARKS
    for (x, y), colour in zip(
        table.project_actions("top", table.joints(), (48, 64)), MARKS, strict=True
    ):
        np.testing.assert_array_equal(marked[int(y), int(x)], colour)
    changed = np.argwhere((plain != marked).any(axis=-1))
    targets = table.project_actions("top", table.joints(), (48, 64))[:, ::-1]
    assert len(changed)
    distances = np.linalg.norm(changed[:, None] + 0.5 - targets, axis=-1)
    assert (distances.min(axis=1) <= 4).all()
    assert (distances.min(axis=0) <= 1).all()


def test_it_has_every_optional_capability(table):
    task = AlohaTransferCubeTask(image_size=SMALL)
    assert isinstance(table, Scene)
    assert isinstance(table, ActionProjection)
    assert isinstance(task, DescribedActions)
    names = [dimension.name for dimension in task.action_dimensions]
    assert len(set(names)) == 14
    assert names[6] == "left_gripper"
    assert names[7] == "right_waist"
    poses = {parameter.name: parameter for parameter in table.pose_parameters}
    state = table.state()
    state[poses["cube_x"].index] += 5 * poses["cube_x"].per_unit
    before = table.cube_pose()
    table.reset_to(state)
    np.testing.assert_allclose(table.cube_pose() - before, [0.005, *[0.0] * 6], atol=1e-12)


def test_clipping_changes_nothing_that_the_motors_do(table):
    task = AlohaTransferCubeTask(image_size=SMALL)
    wild = np.random.default_rng(0).uniform(-4, 4, (5, 14))
    clipped = task.clip_actions(wild)
    np.testing.assert_array_equal(task.clip_actions(clipped), clipped)
    other = AlohaTransferCube(("top",), SMALL)
    for one, two in zip(wild, clipped, strict=True):
        table.step(one)
        other.step(two)
    np.testing.assert_array_equal(table.state(), other.state())


def test_the_task_takes_the_policys_cameras():
    schema = DataSchema({"angle": (12, 16), "top": (12, 16)}, state_dim=14, action_dim=14, fps=50)
    task = AlohaTransferCubeTask.for_policy(schema)
    assert task.data_schema() == schema
    wrong = DataSchema({"top": (12, 16), "angle": (24, 32)}, state_dim=14, action_dim=14, fps=50)
    with pytest.raises(ValueError, match="all of one size"):
        AlohaTransferCubeTask.for_policy(wrong)
    with pytest.raises(ValueError, match="trained on it"):
        AlohaTransferCubeTask.for_policy(
            DataSchema({"image": (96, 96)}, state_dim=2, action_dim=2, fps=10)
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cameras": ("side",)}, "side"),
        ({"cameras": ()}, "at least one"),
        ({"image_size": (0, 4)}, "at least 1"),
        ({"max_steps": 0}, "max_steps"),
        ({"success_thresholds": (1.0, 0.5)}, "ascending"),
    ],
)
def test_impossible_tasks_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        AlohaTransferCubeTask(**wrong)


def test_fractions_of_a_pixel_are_refused():
    # In a process of its own, where nobody checks annotations.
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from envs.aloha import AlohaTransferCubeTask\n"
        "try:\n    AlohaTransferCubeTask(image_size=(24, 32.5))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "[24, 32.5] px; give height and width, whole numbers" in done.stdout, done.stderr[-500:]


def test_impossible_requests_are_refused(table):
    with pytest.raises(ValueError, match="67 finite numbers"):
        table.reset_to(np.full(67, np.inf))
    with pytest.raises(ValueError, match="14 finite numbers"):
        table.step(np.full(14, np.nan))
    with pytest.raises(ValueError, match="camera 'side'"):
        table.image("side")
    with pytest.raises(ValueError, match="object 'lamp'"):
        table.pictures_without("lamp")


class _Holding:
    """A policy that stays where it is."""

    n_obs_steps = 1
    chunk_size = n_action_steps = 3

    def __init__(self, schema):
        self.data_schema = schema

    def predict_chunk(self, observation, queries=None):
        assert observation.images["top"].shape[1:] == (3, *SMALL)
        return observation.state[:, None].repeat(1, 3, 1)


def test_a_policy_acts_in_it(graphics):
    task = AlohaTransferCubeTask(image_size=SMALL, max_steps=6)
    result = rollout(_Holding(task.data_schema()), task, [0, 1], ActionQueue(3), record=1)
    summary = result.summary()
    assert summary["success"] == summary["success_0.25"] == 0
    assert summary["mean_max_reward"] == 0
    frames = list(result.recordings[0].frames(task, 24))
    assert len(frames) == 7


def test_shadows_are_gym_alohas_at_full_size_and_never_finer_than_the_picture():
    assert shadow_px(480) == shadow_px(1000) == 4096
    sizes = [shadow_px(height) for height in (16, 48, 120, 240, 480)]
    assert sizes == sorted(sizes)
    assert sizes[2] == 1024


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("osmesa", "MUJOCO_GL='osmesa'"),
        ("glfw", "MUJOCO_GL='glfw'"),
        ("foo", "MUJOCO_GL='foo'"),
    ],
)
def test_missing_graphics_are_named_with_the_mend(setting, said):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from envs.aloha import AlohaTransferCube\n"
        "try:\n    AlohaTransferCube(image_size=(16, 16)).observe()\n"
        "except ValueError as error:\n    print(error)\n"
        "else:\n    print('drawn')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "MUJOCO_GL": setting},
    )
    if done.stdout == "drawn\n":
        pytest.skip(f"{setting} draws on this machine")
    assert said in done.stdout, done.stderr[-500:]
    assert "libegl1" in done.stdout


def test_a_missing_gym_aloha_is_named_with_the_mend():
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.modules['gym_aloha'] = None\n"
        "from envs.aloha import AlohaTransferCubeTask\n"
        "try:\n    AlohaTransferCubeTask().make()\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "uv sync --extra aloha" in done.stdout, done.stderr[-500:]
