"""A task that says only what is its own, and demonstrations of it by a script."""

import h5py
import numpy as np
import pytest
import torch

from datamodules.inspect import inspect_dataset
from envs.push_t import PushTTask
from envs.recording import record_demonstrations
from envs.replay import can_replay
from envs.task import ActionDimension, Environment, Task, Transition
from policies.interface import Batch, DataSchema, Observation


class Line(Environment):
    """A point on a line that is pulled to where the action says, one unit a step."""

    def reset(self, seed):
        self.place = np.random.default_rng(seed).uniform(2, 9, 1)

    def reset_to(self, state):
        self.place = np.array(state)

    def state(self):
        return self.place.copy()

    def observe(self):
        picture = np.full((4, 6, 3), round(self.place.item()), np.uint8)
        return {
            "images": {"side": picture},
            "state": self.place.astype(np.float32),
            "environment_state": np.empty(0, np.float32),
            "simulator_state": self.state(),
        }

    def step(self, action):
        assert 0 <= action.item() <= 10
        self.place = self.place + np.clip(action - self.place, -1, 1)
        return Transition(-self.place.item(), 0.5, self.place.item() <= 1)

    def frame(self, size_px, target=None):
        return np.zeros((size_px, size_px, 3), np.uint8)


class LineTask(Task):
    name, fps, max_steps, success_thresholds = "line", 5.0, 6, (-4.0, -1.0)
    action_dimensions = (ActionDimension("x", "m", 0.0, 10.0),)

    def make(self):
        return Line()


def to_the_left(env):
    return np.array([0.0])


def test_what_follows_from_a_look_is_what_push_t_declares():
    task = PushTTask(image_size=24)
    beyond = np.array([[-5.0, 100.0], [600.0, 512.5]])
    assert Task.data_schema(task) == task.data_schema()
    np.testing.assert_array_equal(Task.clip_actions(task, beyond), task.clip_actions(beyond))


def test_a_task_that_does_not_describe_its_actions_says_what_is_missing():
    class Mute(Task):
        name, fps, max_steps, success_thresholds = "mute", 5.0, 6, (1.0,)

        def make(self):
            return Line()

    for ask in (Mute().data_schema, lambda: Mute().clip_actions(np.zeros(1))):
        with pytest.raises(ValueError, match="mute does not say what its actions are: give Mute"):
            ask()


@pytest.mark.parametrize(("width", "fits"), [(1, True), (2, False)])
def test_recorded_states_are_recognised_by_an_environment_that_was_never_reset(width, fits):
    none = torch.zeros(2, dtype=torch.long)
    chunk, padding = torch.zeros(2, 1, 1), torch.zeros(2, 1, dtype=torch.bool)
    batch = Batch(Observation({}), chunk, padding, none, none, torch.ones(2, width))
    assert can_replay(LineTask(), batch) == fits


def test_a_policy_with_other_cameras_or_actions_is_another_tasks():
    offered = LineTask().data_schema()
    assert offered == DataSchema({"side": (4, 6)}, state_dim=1, action_dim=1, fps=5.0)
    assert LineTask.for_policy(offered).name == "line"
    LineTask.for_policy(DataSchema({}, state_dim=1, action_dim=1))  # a policy may be blind
    for cameras, n_actions in (({"top": (4, 6)}, 1), ({"side": (6, 4)}, 1), ({"side": (4, 6)}, 2)):
        with pytest.raises(ValueError, match="trained on this task"):
            LineTask.for_policy(DataSchema(cameras, state_dim=1, action_dim=n_actions))


def test_a_policy_that_reads_another_state_is_another_tasks():
    with pytest.raises(ValueError, match=r"a state of 3 and actions of 1 .* and 1; give a policy"):
        LineTask.for_policy(DataSchema({}, state_dim=3, action_dim=1))
    LineTask.for_policy(DataSchema({}, state_dim=0, action_dim=1))


def test_a_task_with_arguments_that_have_no_defaults_says_what_to_do():
    class Long(LineTask):
        def __init__(self, length):
            self.length = length

    with pytest.raises(ValueError, match=r"task Long cannot be made without .*'length'.*a default"):
        Long.for_policy(LineTask().data_schema())


def test_success_is_reaching_the_threshold():
    assert LineTask().is_success(-1.0, -1.0)
    assert not LineTask().is_success(-1.01, -1.0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("line") / "new" / "line.hdf5"
    n_kept = record_demonstrations(path, LineTask(), to_the_left, range(20))
    return path, n_kept


def test_only_solved_episodes_are_kept(recorded):
    path, n_kept = recorded
    starts = {seed: np.random.default_rng(seed).uniform(2, 9, 1).item() for seed in range(20)}
    solved = [seed for seed, start in starts.items() if start - 6 <= 1]
    assert 0 < len(solved) < 20
    assert inspect_dataset(path, progress=False)[0].problems == []
    with h5py.File(path) as file:
        assert file.attrs["num_demos"] == n_kept == len(solved)
        assert [file[f"demo_{i}"].attrs["seed"] for i in range(n_kept)] == solved


def test_a_recorded_action_leads_from_its_row_to_the_next(recorded):
    env = Line()
    with h5py.File(recorded[0]) as file:
        for group in file.values():
            states, actions = group["observations/state"][()], group["actions"][()]
            for state, action, after in zip(states, actions, states[1:], strict=False):
                env.reset_to(state)
                env.step(action)
                np.testing.assert_array_equal(env.state(), after)
            shown = group["observations/images/side"][:, 0, 0, 0]
            np.testing.assert_array_equal(shown, np.rint(states[:, 0]))


def test_a_file_is_never_replaced_and_never_left_half_done(recorded, tmp_path):
    before = recorded[0].read_bytes()

    def never(env):
        raise AssertionError("an episode is played for a file that cannot be written")

    with pytest.raises(FileExistsError, match="give another path, or delete the file"):
        record_demonstrations(recorded[0], LineTask(), never, range(1))
    assert recorded[0].read_bytes() == before
    with pytest.raises(ValueError, match="solved no episode of task line within 6 steps"):
        record_demonstrations(tmp_path / "none.hdf5", LineTask(), Line.state, range(3))
    assert not list(tmp_path.iterdir())
