"""Recordings of everything that was to be seen, without a change to what is done."""

import numpy as np
import pytest
import torch
from einops import repeat

from envs.push_t import PushT, PushTTask
from envs.rollout import Controller, EpisodeRecording, episode_observation, rollout
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Observation

CHUNK = 4
N_STEPS = 14


class Swirl:
    """Goes around the middle, depending on picture, state and the oldest instant it remembers."""

    chunk_size = n_action_steps = CHUNK
    data_schema = PushTTask(image_size=32).data_schema()

    def __init__(self, n_obs_steps: int) -> None:
        self.n_obs_steps = n_obs_steps
        self.seen: list[Observation] = []

    def predict_chunk(self, observation, queries=None):
        self.seen.append(observation)
        states = observation.state.double()
        oldest, newest = (
            (states, states) if self.n_obs_steps == 1 else (states[:, 0], states[:, -1])
        )
        brightness = observation.images["image"].double().flatten(1).mean(1, keepdim=True)
        arm = newest - 256
        turn = torch.stack([-arm[:, 1], arm[:, 0]], -1)
        goal = 256 + 0.7 * arm + 0.5 * turn + (brightness - 230) + 2 * (newest - oldest)
        chunk = repeat(goal, "batch action -> batch chunk action", chunk=CHUNK)
        chunk = chunk + 3 * torch.arange(CHUNK)[:, None]
        return chunk if queries is None else chunk[:, list(queries)]


@pytest.fixture(scope="module")
def task() -> PushTTask:
    return PushTTask(image_size=32, max_steps=N_STEPS)


CONTROLLERS = {
    "queue": lambda: ActionQueue(3),
    "ensembler": lambda: TemporalEnsembler(0.01, CHUNK),
}


def recordings(
    task: PushTTask, controller: Controller, n_obs_steps: int, observed: bool
) -> tuple[tuple[EpisodeRecording, ...], Swirl]:
    policy = Swirl(n_obs_steps)
    result = rollout(
        policy, task, [0, 1, 2], controller, n_parallel=2, record=3, observe_every_step=observed
    )
    return result.recordings, policy


@pytest.mark.parametrize("n_obs_steps", [1, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_not_one_bit_of_an_action_changes(task, controller, n_obs_steps):
    plain, policy = recordings(task, CONTROLLERS[controller](), n_obs_steps, False)
    watched, other = recordings(task, CONTROLLERS[controller](), n_obs_steps, True)
    for one, two in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(one.actions, two.actions)
        np.testing.assert_array_equal(one.simulator_states, two.simulator_states)
        np.testing.assert_array_equal(one.predicted, two.predicted)
        assert one.observations is None
    for one, two in zip(policy.seen, other.seen, strict=True):
        torch.testing.assert_close(one.state, two.state, rtol=0, atol=0)
        torch.testing.assert_close(one.images, two.images, rtol=0, atol=0)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_step_is_seen_before_its_action(task, controller):
    (recording, *_), _ = recordings(task, CONTROLLERS[controller](), 1, True)
    assert recording.observations is not None
    assert len(recording.observations) == len(recording.actions) == N_STEPS
    env = task.make()
    for seen, state in zip(recording.observations, recording.simulator_states[:-1], strict=True):
        np.testing.assert_array_equal(seen["simulator_state"], state)
        env.reset_to(state)
        np.testing.assert_array_equal(seen["images"]["image"], env.image())


def test_predictions_are_marked_where_they_were_made(task):
    (recording, *_), _ = recordings(task, ActionQueue(3), 1, True)
    assert np.flatnonzero(recording.predicted).tolist() == [0, 3, 6, 9, 12]
    (recording, *_), _ = recordings(task, TemporalEnsembler(0.01, CHUNK), 1, False)
    assert recording.predicted.all()
    assert len(recording.predicted) == N_STEPS


@pytest.mark.parametrize("n_obs_steps", [1, 2, 3])
def test_recorded_observations_become_what_the_policy_saw(task, n_obs_steps):
    """History, order of axes and dtype: the policy would answer the same once more."""
    (recording, *_), policy = recordings(task, ActionQueue(3), n_obs_steps, True)
    assert recording.observations is not None
    again = episode_observation(policy, recording.observations)
    for step, seen in zip(np.flatnonzero(recording.predicted), policy.seen, strict=False):
        assert seen.state is not None
        assert again.state is not None
        torch.testing.assert_close(again.state[step], seen.state[0], rtol=0, atol=0)
        torch.testing.assert_close(
            again.images["image"][step], seen.images["image"][0], rtol=0, atol=0
        )
    assert again.images["image"].dtype == torch.uint8


def test_only_recorded_episodes_are_watched(task, monkeypatch):
    looks = []
    image = PushT.image
    monkeypatch.setattr(PushT, "image", lambda *a: (looks.append(1), image(*a))[1])
    rollout(Swirl(1), task, [0, 1, 2], ActionQueue(4), record=1, observe_every_step=True)
    assert len(looks) == N_STEPS + 2 * 4


def test_nothing_recorded_is_refused(task):
    with pytest.raises(ValueError, match="observe_every_step"):
        episode_observation(Swirl(1), ())
