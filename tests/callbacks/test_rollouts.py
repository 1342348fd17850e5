"""Rollouts at checkpoints: same seeds, same numbers, a video, and nothing left behind."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule

from callbacks.rollouts import Rollouts
from callbacks.summary import default_keys
from envs.push_t import PushTTask
from envs.rollout import RolloutError
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import DataSchema


class HoldStill:
    """A policy that stays where it is."""

    data_schema = DataSchema(cameras={"image": (32, 32)}, state_dim=2, action_dim=2)
    chunk_size = 4
    n_action_steps = 2
    n_obs_steps = 1

    def predict_chunk(self, observation, queries=None):
        return observation.state[:, None].expand(-1, self.chunk_size, -1)


class Module(LightningModule):
    def __init__(self, view):
        super().__init__()
        self.view = view


@dataclass
class State:
    fn: str = "fit"


@dataclass
class FakeTrainer:
    global_step: int
    state: State


def diagnose(tmp_path, step, **arguments):
    task = PushTTask(image_size=32, max_steps=6)
    callback = Rollouts(task, n_episodes=3, n_videos=2, **arguments)
    return callback.diagnose(FakeTrainer(step, State()), Module(HoldStill()), tmp_path)


def test_an_idle_policy_scores_what_the_start_gives_and_the_video_has_every_frame(tmp_path):
    import av

    findings = diagnose(tmp_path, step=10)
    env = PushTTask(image_size=32).make()
    coverages = []
    for seed in range(100_000, 100_003):
        env.reset(seed)
        coverages.append(env.coverage())
    env.close()
    episodes = json.loads((tmp_path / "episodes.json").read_text())["episodes"]
    assert [episode["seed"] for episode in episodes] == [100_000, 100_001, 100_002]
    expected = sum(coverages) / 3
    assert findings.scalars["rollout/mean_max_coverage"] == pytest.approx(expected, abs=0.02)
    with av.open(findings.videos["rollout/video"]) as video:
        assert sum(1 for _ in video.decode(video=0)) == 7  # the start and six steps


def test_the_untrained_policy_has_names_of_its_own_and_no_video(tmp_path):
    findings = diagnose(tmp_path, step=0)
    assert "untrained/mean_max_coverage" in findings.scalars
    assert not any(name.startswith("rollout/") for name in findings.scalars)
    assert not findings.videos


def test_the_controller_is_the_one_asked_for():
    task = PushTTask(image_size=32)
    assert isinstance(Rollouts(task).controller(HoldStill()), ActionQueue)
    assert Rollouts(task).controller(HoldStill()).n_action_steps == 2
    assert Rollouts(task, n_action_steps=3).controller(HoldStill()).n_action_steps == 3
    ensembler = Rollouts(task, temporal_ensemble_coeff=0.1).controller(HoldStill())
    assert isinstance(ensembler, TemporalEnsembler)
    assert ensembler.coefficient == 0.1


def test_queue_and_ensemble_exclude_each_other():
    with pytest.raises(ValueError, match="n_action_steps=4 has no meaning"):
        Rollouts(PushTTask(), n_action_steps=4, temporal_ensemble_coeff=0.01)


def test_a_module_without_a_policy_is_refused(tmp_path):
    callback = Rollouts(PushTTask(image_size=32))
    with pytest.raises(TypeError, match="LightningModule has no policy view"):
        callback.diagnose(FakeTrainer(1, State()), LightningModule(), tmp_path)


def test_torch_is_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    diagnose(tmp_path, step=3)
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_a_second_way_of_acting_has_numbers_and_films_of_its_own(tmp_path):
    findings = diagnose(tmp_path, step=10, name="rollout_ensembled", temporal_ensemble_coeff=0.01)
    assert {name.split("/")[0] for name in findings.scalars} == {"rollout_ensembled"}
    assert set(findings.videos) == {"rollout_ensembled/video"}
    untrained = diagnose(tmp_path, step=0, name="rollout_ensembled")
    assert {name.split("/")[0] for name in untrained.scalars} == {"untrained_rollout_ensembled"}


def test_a_task_that_the_policy_does_not_fit_is_refused_before_training():
    module = Module(HoldStill())
    Rollouts(PushTTask(image_size=32)).on_fit_start(FakeTrainer(0, State()), module)
    with pytest.raises(RolloutError, match=r"'image' is .48, 48. px, not .32, 32."):
        Rollouts(PushTTask(image_size=48)).on_fit_start(FakeTrainer(0, State()), module)


def test_the_summary_asks_for_the_untrained_policy_where_it_was_measured_alone():
    task = PushTTask(image_size=32)
    callbacks = [Rollouts(task, at_start=True), Rollouts(task, name="rollout_scaled")]
    keys = default_keys(SimpleNamespace(lightning_module=None, callbacks=callbacks))
    assert "untrained/mean_max_coverage" in keys
    assert "rollout_scaled/mean_max_coverage" in keys
    assert not [key for key in keys if key.startswith("untrained_rollout_scaled")]
