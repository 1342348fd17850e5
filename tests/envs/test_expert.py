import numpy as np
import pytest

from envs.expert import (
    ContactGrid,
    ExpertConfig,
    PlanningSpace,
    Pose,
    PushTExpert,
    block_error,
    corners_of,
    distance_to_block,
)
from envs.push_t import GOAL_POSE, PushT


@pytest.fixture(scope="module")
def env() -> PushT:
    return PushT()


def play(env: PushT, expert: PushTExpert, max_steps: int = 300) -> tuple[np.ndarray, float]:
    """Actions, and the best coverage."""
    actions, best = [], 0.0
    for _ in range(max_steps):
        actions.append(expert.act(env.state(), env.agent_velocity()))
        outcome = env.step(actions[-1])
        best = max(best, outcome.score)
        if outcome.terminated:
            break
    return np.array(actions), best


def episode(env: PushT, seed: int, config: ExpertConfig) -> tuple[np.ndarray, float]:
    env.reset(seed)
    expert = PushTExpert(config)
    expert.reset(seed)
    return play(env, expert)


@pytest.mark.parametrize("settle_waits", [False, True])
def test_the_expert_solves_the_task(env, settle_waits):
    n_episodes = 8 if settle_waits else 20
    seeds = range(500, 500 + n_episodes)
    best = [episode(env, seed, ExpertConfig(settle_waits))[1] for seed in seeds]
    assert sum(coverage > 0.95 for coverage in best) >= 0.95 * n_episodes


def test_the_same_seed_gives_the_same_actions_whatever_came_before(env):
    config = ExpertConfig(plan_noise=10.0)
    fresh, _ = episode(env, 7, config)
    expert = PushTExpert(config)
    env.reset(3)
    expert.reset(3)
    play(env, expert, max_steps=40)
    env.reset(7)
    expert.reset(7)
    np.testing.assert_array_equal(play(env, expert)[0], fresh)


def test_without_settle_waits_the_target_keeps_moving(env):
    def idle_share(settle_waits: bool) -> float:
        steps = [
            np.hypot(*np.diff(episode(env, seed, ExpertConfig(settle_waits))[0], axis=0).T)
            for seed in range(4)
        ]
        return float((np.concatenate(steps) < 1.0).mean())

    assert idle_share(False) < 0.05 < 0.1 < idle_share(True)


def test_plan_noise_gives_several_ways_to_begin(env):
    def first_ways(plan_noise: float) -> np.ndarray:
        ends = []
        for seed in range(8):
            env.reset_to(np.array([100.0, 100.0, 300.0, 300.0, 3.0]))
            steady = ExpertConfig(
                plan_noise=plan_noise, approach_speed=(18.0, 18.0), push_speed=(9.0, 9.0)
            )
            expert = PushTExpert(steady)
            expert.reset(seed)
            ends.append(play(env, expert, max_steps=20)[0][-1])
        return np.array(ends)

    assert np.ptp(first_ways(0.0), axis=0).max() == 0.0
    assert np.ptp(first_ways(30.0), axis=0).max() > 30.0


def test_other_goals_are_reached_too(env):
    goal = (200.0, 300.0, 2.0)
    env.reset(4)
    expert = PushTExpert(goal=goal)
    errors = []
    for _ in range(200):
        state = env.state()
        errors.append(float(block_error(corners_of(state[2:]), Pose(*goal))))
        env.step(expert.act(state, env.agent_velocity()))
    assert errors[0] > 50
    assert min(errors) < 3


def test_an_agent_in_the_inner_corner_finds_its_way_out(env):
    pose = Pose(256.0, 200.0, 0.0)
    agent = pose.to_board(np.array([30.5, 45.5]))
    env.reset_to(np.array([*agent, *pose]))
    expert = PushTExpert()
    assert play(env, expert)[1] > 0.95


def test_the_planning_space_foresees_what_gym_pusht_does(env):
    pose = Pose(256.0, 220.0, 0.5)
    start, heading = pose.to_board(np.array([40.0, -19.0])), pose.rotation @ [0.2, 0.98]
    heading /= np.hypot(*heading)
    space = PlanningSpace(3)
    still = np.zeros(2)
    foreseen = space.push(pose, np.tile(start, (3, 1)), np.stack([still, heading, still]), 1.0, 90)
    env.reset_to(np.array([*start, *pose]))
    for step in range(1, 30):
        env.step(start + min(9.0 * step, 90.0) * heading)
    assert block_error(corners_of(foreseen[-1, 1]), pose) > 20
    assert block_error(corners_of(env.state()[2:]), Pose(*foreseen[-1, 1])) < 1.0
    np.testing.assert_allclose(foreseen[-1, [0, 2]], [pose, pose], atol=1e-9)


def test_distances_to_the_block():
    points = np.array([[0.0, -7.0], [63.0, -4.0], [0.0, 15.0], [40.0, 60.0], [15.0, 40.0]])
    np.testing.assert_allclose(distance_to_block(points), [7.0, 5.0, -15.0, 25.0, 0.0], atol=1e-12)


def test_pushes_start_free_of_the_block_and_head_for_it():
    grid = ContactGrid(ExpertConfig())
    before = distance_to_block(grid.starts)
    assert before.min() > 15
    assert (distance_to_block(grid.starts + 8 * grid.headings) < before - 4).all()


def test_the_goal_has_no_error():
    assert block_error(corners_of(np.array(GOAL_POSE)), Pose(*GOAL_POSE)) == 0.0


@pytest.mark.parametrize("wrong", [{"push_speed": (9.0, 3.0)}, {"plan_noise": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExpertConfig(**wrong)
