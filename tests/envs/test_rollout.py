import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import repeat

from envs.expert import PushTExpert
from envs.push_t import T_OUTLINE_PX, PushT, PushTTask, agent_path
from envs.rollout import RolloutError, bootstrap_interval, rollout, wilson_interval
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import DataSchema, Observation


class Queue:
    """Executes ``n_action_steps`` of every chunk."""

    def __init__(self, n_action_steps: int) -> None:
        self.n_action_steps = n_action_steps

    def reset(self, n_envs: int) -> None:
        self.step_in_chunk = self.n_action_steps
        self.n_envs = n_envs

    def wants_prediction(self) -> bool:
        return self.step_in_chunk == self.n_action_steps

    def steps_used(self):
        return None

    def step(self, chunk):
        assert (chunk is not None) == self.wants_prediction()
        if chunk is not None:
            assert len(chunk) == self.n_envs
            self.chunk, self.step_in_chunk = chunk, 0
        self.step_in_chunk += 1
        return self.chunk[:, self.step_in_chunk - 1]


class Swirl:
    """Goes around the middle of the board, depending on what it sees."""

    chunk_size = n_action_steps = 4

    def __init__(self, n_obs_steps: int = 1, schema: DataSchema | None = None) -> None:
        self.n_obs_steps = n_obs_steps
        self.data_schema = schema or PushTTask(image_size=32).data_schema()
        self.seen: list[Observation] = []

    def predict_chunk(self, observation, queries=None):
        self.seen.append(observation)
        state = observation.state if self.n_obs_steps == 1 else observation.state[:, -1]
        brightness = observation.images["image"].double().flatten(1).mean(1, keepdim=True)
        arm = state.double() - 256
        turn = torch.stack([-arm[:, 1], arm[:, 0]], -1)
        goal = 256 + 0.7 * arm + 0.5 * turn + (brightness - 230)
        return repeat(goal, "batch action -> batch chunk action", chunk=self.chunk_size)


class Oracle:
    """The expert behind the policy's interface: it sees the block's corners."""

    chunk_size = n_action_steps = n_obs_steps = 1

    def __init__(self, n_envs: int) -> None:
        self.data_schema = replace(PushTTask().data_schema(), environment_state_dim=16)
        self.experts = [PushTExpert() for _ in range(n_envs)]
        self.velocities = [np.zeros(2)] * n_envs

    def predict_chunk(self, observation, queries=None):
        assert observation.environment_state is not None
        actions = []
        for row, expert in enumerate(self.experts):
            # gym-pusht's first keypoints are corners of the bar, in pymunk's order.
            corners = observation.environment_state[row].double().numpy().reshape(8, 2)
            agent = observation.state[row].double().numpy()
            pose = fit_pose(corners)
            target = expert.act(np.array([*agent, *pose]), self.velocities[row])
            _, self.velocities[row] = agent_path(agent, self.velocities[row], target[None])
            actions.append(target)
        return torch.tensor(np.array(actions))[:, None]


def fit_pose(corners: np.ndarray) -> tuple[float, float, float]:
    """Pose of the block from the corners of its two boxes, in any order within a box."""
    bar, stem = corners[:4].mean(axis=0), corners[4:].mean(axis=0)
    down = (stem - bar) / np.hypot(*(stem - bar))
    origin = bar - 15 * down
    return *origin, float(np.arctan2(-down[0], down[1]))


@pytest.fixture(scope="module")
def task() -> PushTTask:
    return PushTTask(image_size=32, max_steps=30)


def test_the_grouping_of_episodes_changes_nothing(task):
    results = [
        rollout(Swirl(), task, range(5), Queue(4), n_parallel=n, record=3) for n in (1, 2, 5)
    ]
    assert results[0].episodes == results[1].episodes == results[2].episodes
    assert [episode.seed for episode in results[0].episodes] == list(range(5))
    assert len({episode.max_score for episode in results[0].episodes}) > 1
    for result in results:
        assert [recording.seed for recording in result.recordings] == [0, 1, 2]
        for one, other in zip(results[0].recordings, result.recordings, strict=True):
            np.testing.assert_array_equal(one.simulator_states, other.simulator_states)


def test_the_expert_behind_the_interface_solves_the_task():
    result = rollout(Oracle(4), PushTTask(), range(900, 904), Queue(1), n_parallel=4)
    assert all(episode.max_score > 0.95 for episode in result.episodes)
    assert all(episode.terminated and episode.n_steps < 300 for episode in result.episodes)
    assert result.summary()["success"] == 1.0
    assert result.summary()["mean_max_overlap"] == 1.0


def test_pictures_are_rendered_only_when_the_policy_looks(task, monkeypatch):
    looks = []
    image = PushT.image
    monkeypatch.setattr(PushT, "image", lambda *a: (looks.append(1), image(*a))[1])
    rollout(Swirl(), task, [0, 1], Queue(4), record=2)
    assert len(looks) == 2 * -(-task.max_steps // 4)


def test_history_starts_with_the_first_observation_and_runs_oldest_first(task):
    policy = Swirl(n_obs_steps=3)
    rollout(policy, task, [0, 1], Queue(4))
    first, second = policy.seen[0].state, policy.seen[1].state
    assert first.shape == (2, 3, 2)
    assert policy.seen[0].images["image"].shape == (2, 3, 3, 32, 32)
    assert (first == first[:, :1]).all()
    assert not (second[:, 1] == second[:, 2]).all()
    env = task.make()
    env.reset(1)
    np.testing.assert_array_equal(first[1, 0], env.state()[:2].astype(np.float32))


def test_an_action_that_is_no_number_is_named(task):
    class Poisoned(Swirl):
        def predict_chunk(self, observation, queries=None):
            chunk = super().predict_chunk(observation)
            if len(self.seen) == 3:
                return chunk.clone().index_fill_(0, torch.tensor([1]), torch.nan)
            return chunk

    with pytest.raises(RolloutError, match="seed 8, step 8"):
        rollout(Poisoned(), task, [7, 8], Queue(4))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cameras": {"top": (32, 32)}}, "camera 'top' is missing"),
        ({"cameras": {"image": (96, 96)}}, "not \\(96, 96\\)"),
        ({"action_dim": 14}, "not 14"),
        ({"state_dim": 14}, "not 14"),
        ({"environment_state_dim": 3}, "not 3"),
    ],
)
def test_a_policy_for_another_task_is_refused(task, change, problem):
    policy = Swirl(schema=replace(task.data_schema(), **change))
    with pytest.raises(RolloutError, match=problem):
        rollout(policy, task, [0], Queue(4))


def test_actions_off_the_board_are_clipped_and_counted(task):
    class Far(Swirl):
        def predict_chunk(self, observation, queries=None):
            return super().predict_chunk(observation) + 1000

    result = rollout(Far(), task, [0], Queue(4), record=1)
    assert result.episodes[0].n_clipped_steps == task.max_steps
    assert result.summary()["clipped_share"] == 1.0
    assert result.recordings[0].actions.max() == 512.0


def test_a_recording_can_be_drawn_at_any_size(task):
    recording = rollout(Swirl(), task, [3], Queue(4), record=1).recordings[0]
    frames = list(recording.frames(task, 64))
    assert len(frames) == len(recording.captions()) == task.max_steps + 1
    env = task.make()
    env.reset(3)
    np.testing.assert_array_equal(frames[0], env.frame(64, recording.actions[0]))
    red = (frames[0] == (255, 0, 0)).all(axis=-1)
    centre = np.argwhere(red).mean(axis=0)[::-1] * 512 / 64
    np.testing.assert_allclose(centre, recording.actions[0], atol=8)


def test_results_are_plain_values(task):
    result = rollout(Swirl(), task, [0, 1], Queue(4))
    assert json.loads(json.dumps(result.to_dict()))["summary"] == result.summary()
    summary = result.summary()
    assert summary["success"] == summary["success_0.95"] <= summary["success_0.85"]
    low, high = summary["mean_max_coverage_low"], summary["mean_max_coverage_high"]
    assert low <= summary["mean_max_coverage"] <= high


def test_wilsons_interval():
    # Newcombe (1998), Statistics in Medicine 17: 857-872, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    half = 1.96 * values.std() / 20
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.02)


def test_no_seeds_are_refused(task):
    with pytest.raises(ValueError, match="0 seeds"):
        rollout(Swirl(), task, [], Queue(4))


def test_the_corners_give_the_pose_back():
    env = PushT()
    env.reset_to(np.array([100.0, 100.0, 300.0, 200.0, 2.5]))
    corners = env.observe()["environment_state"].astype(float).reshape(8, 2)
    assert fit_pose(corners) == pytest.approx((300.0, 200.0, 2.5), abs=1e-3)
    assert len(T_OUTLINE_PX) == len(corners)


def test_only_the_steps_that_will_be_used_are_predicted():
    asked = []

    class Watching(Swirl):
        def predict_chunk(self, observation, queries=None):
            asked.append(None if queries is None else list(queries))
            chunk = super().predict_chunk(observation)
            return chunk if queries is None else chunk[:, list(queries)]

    task = PushTTask(image_size=32, max_steps=4)
    rollout(Watching(), task, [7], ActionQueue(2))
    assert asked == [[0, 1]] * 2
    asked.clear()
    rollout(Watching(), task, [7], TemporalEnsembler(0.01, Watching.chunk_size))
    assert asked == [None] * 4
