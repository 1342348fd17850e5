"""The transfer experiment: trials are paired, the flip is exact, and differences are honest."""

from dataclasses import dataclass, replace
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from tiny_act import tiny_act

from envs.equivariance import (
    equivariance_error,
    in_mirror,
    instants,
    look_at_both_sides,
    redraw_distance,
)
from envs.push_t import PushTTask, anti_diagonal, x_flip
from envs.rollout import EpisodeResult, RolloutResult, rollout
from envs.task import Task
from envs.transfer import (
    Condition,
    act_on_arm,
    agreement,
    check_arms,
    comparisons,
    conditions,
    difference,
    mirrors_between,
    through_mirrors,
    untrained_copy,
    verdict,
)
from features.resampling import Estimate, paired_rates, wilson_estimate
from landscapes.study import predict_frames
from policies.ensembling import ActionQueue
from policies.interface import DataSchema, Observation
from policies.mirror import MirroredPolicy

SIZE = 16
TASK = PushTTask(image_size=SIZE, max_steps=30)
SCHEMA = DataSchema(cameras={"image": (SIZE, SIZE)}, state_dim=2, action_dim=2)


class Planned:
    """Answers with a function of where the agent is."""

    data_schema = SCHEMA
    chunk_size = 4
    n_action_steps = 2
    n_obs_steps = 1

    def __init__(self, plan):
        self.plan = plan

    def predict_chunk(self, observation, queries=None):
        steps = self.chunk_size if queries is None else len(queries)
        return self.plan(observation.state)[:, None].expand(-1, steps, -1)

    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        chunk = self.predict_chunk(observation, queries)
        noise = torch.randn(n_samples, 1, 2, generator=torch.Generator().manual_seed(seed))
        return chunk[:, None] + 10 * noise


def to_the_left(state):
    """Not the same in the mirror, and never at rest."""
    return torch.stack([0.8 * state[:, 0], 0.5 * state[:, 1] + 80], dim=-1)


def stays(state):
    return state


def played(condition, view=None, seen=0, task=TASK):
    view = view or Planned(to_the_left)
    return act_on_arm(view, task, condition, seen, range(4), ActionQueue(2))


@pytest.fixture(scope="module")
def results():
    return {condition: played(condition) for condition in conditions((0, 1), untrained=False)}


# Conditions


def test_each_condition_is_tried_once_and_each_pair_answers_a_question():
    names = [condition.name for condition in conditions((0, 1), untrained=True)]
    assert names == ["arm0", "arm1", "arm1_flipped", "arm0_untrained", "arm1_untrained"]
    pairs = [(a.name, b.name) for a, b in comparisons((0, 1), untrained=True)]
    assert pairs == [
        ("arm1", "arm0"),
        ("arm1_flipped", "arm1"),
        ("arm1_flipped", "arm0"),
        ("arm0", "arm0_untrained"),
        ("arm1", "arm1_untrained"),
        ("arm1_flipped", "arm1_untrained"),
    ]
    assert len(comparisons((0, 1), untrained=False)) == 3


class Armless(Task):
    """A task of one arm."""

    name, fps, score_name, reward_name = "armless", 10.0, "score", "reward"
    max_steps, success_thresholds = 1, (0.5,)

    def is_success(self, score, threshold):
        return score > threshold

    def clip_actions(self, actions):
        return actions

    def data_schema(self):
        return SCHEMA

    @classmethod
    def for_policy(cls, schema):
        return cls()

    def make(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("task", "arms", "message"),
    [
        (Armless(), (0, 1), r"armless.*ArmTask"),
        (TASK, (0, 2), r"arms \[2\].*0 to 1"),
        (TASK, (0,), "at least one other"),
        (TASK, (0, 0), "each of them once"),
    ],
)
def test_what_cannot_be_transferred_between_is_refused(task, arms, message):
    with pytest.raises(ValueError, match=message):
        check_arms(task, arms)


def test_without_the_flip_an_unseen_arm_is_another_world_and_with_it_the_same(results):
    seen, plain, flipped = results.values()
    mirrors = mirrors_between(TASK, 0, 1)
    same = agreement(seen, flipped, mirrors)
    assert same.n_equal == same.n_equal_outcomes == 4
    assert same.largest_px < 1e-3
    other = agreement(seen, plain, mirrors)
    assert other.n_equal == 0
    assert other.largest_px > 10


def test_trials_of_both_arms_start_as_mirror_images(results):
    seen, plain, _ = results.values()
    for one, other in zip(seen.recordings, plain.recordings, strict=True):
        start = torch.from_numpy(other.simulator_states[:1])
        reflected = x_flip().simulator_state(start)[0].numpy()
        np.testing.assert_allclose(reflected[:4], one.simulator_states[0, :4], atol=1e-9)
        turned = reflected[4] - one.simulator_states[0, 4]
        assert np.cos(turned) == pytest.approx(1, abs=1e-12)


def test_a_policy_of_arm_1_sees_arm_1_through_the_flip_of_arm_0():
    own, through = (
        played(Condition(1), seen=1),
        played(Condition(0, is_flipped=True), seen=1),
    )
    assert agreement(own, through, mirrors_between(TASK, 1, 0)).n_equal == 4


def test_several_mirrors_are_passed_from_the_outside_in():
    view = Planned(lambda state: state + torch.tensor([7.0, 3.0]))
    wrapped = through_mirrors(view, (x_flip(), anti_diagonal()))
    assert isinstance(wrapped, MirroredPolicy)
    assert wrapped.mirror == x_flip()
    at = Observation(images={"image": torch.zeros(1, 3, SIZE, SIZE)}, state=torch.zeros(1, 2))
    # x-flip: (512, 0); anti-diagonal: (512, 0); the step: (519, 3); and back.
    assert wrapped.predict_chunk(at, [0])[0, 0].tolist() == [3.0, -7.0]


# Differences


def test_success_is_compared_trial_by_trial():
    first, second = torch.tensor([1, 1, 1, 1, 1, 0, 1]) > 0, torch.tensor([0, 0, 0, 0, 0, 0, 1]) > 0
    found = paired_rates(first, second)
    assert (found.n_first_only, found.n_second_only) == (5, 0)
    assert found.p_value == pytest.approx(2 / 2**5)
    assert found.difference.value == pytest.approx(5 / 7)
    assert found.difference.low > 0
    back = paired_rates(second, first).difference
    assert (back.low, back.high) == pytest.approx((-found.difference.high, -found.difference.low))


def test_trials_that_agree_leave_doubt_but_no_evidence():
    solved = torch.ones(10) > 0
    same = paired_rates(solved, solved)
    assert same.p_value == 1
    assert same.difference.value == 0
    assert same.difference.low < -0.1 < 0.1 < same.difference.high
    # With all of one and none of the other, the ends are those of one rate.
    opposite = paired_rates(solved, ~solved).difference
    apart = 1 - wilson_estimate(10, 10).low
    assert opposite.low == pytest.approx(1 - apart * 2**0.5)
    assert opposite.high == pytest.approx(1)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    n_trials, coverages = 14, []
    tables = [
        (a, b, c, n_trials - a - b - c)
        for a, b, c in product(range(n_trials + 1), repeat=3)
        if a + b + c <= n_trials
    ]
    # Success under both, only one, only the other, neither.
    for truth in ((0.5, 0.25, 0.05, 0.2), (0.1, 0.3, 0.1, 0.5)):
        held = 0.0
        for a, b, c, d in tables:
            weight = comb(n_trials, a) * comb(n_trials - a, b) * comb(n_trials - a - b, c)
            weight *= truth[0] ** a * truth[1] ** b * truth[2] ** c * truth[3] ** d
            if weight < 1e-5:
                held += weight  # too rare to be looked at: less than 0.007 in all
                continue
            first = torch.tensor([True] * (a + b) + [False] * (c + d))
            second = torch.tensor([True] * a + [False] * b + [True] * c + [False] * d)
            interval = paired_rates(first, second).difference
            held += weight * (interval.low <= truth[1] - truth[2] <= interval.high)
        coverages.append(held)
    assert all(0.93 < coverage < 0.98 for coverage in coverages), coverages


def test_what_is_hard_about_a_start_cancels():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.7, 20)

    def result(scores):
        episodes = tuple(
            EpisodeResult(seed, 1, score, score, score, score, (score > 0.5,), False, 0)
            for seed, score in enumerate(scores.tolist())
        )
        return RolloutResult("toy", "score", "reward", (0.5,), episodes)

    gap = difference(result(hard + 0.1), result(hard)).mean_max_score
    assert gap.value == pytest.approx(0.1)
    assert gap.high - gap.low < 1e-9
    with pytest.raises(ValueError, match="same seeds"):
        difference(result(hard), result(hard[1:]))
    one = result(hard)
    with pytest.raises(ValueError, match="same seeds"):
        difference(one, replace(one, episodes=one.episodes[::-1]))


@pytest.mark.parametrize(
    ("n_successes", "said"), [(45, "supported"), (35, "undecided"), (20, "not supported")]
)
def test_the_interval_decides(n_successes, said):
    assert verdict(wilson_estimate(n_successes, 50), 0.7) == said


def test_the_border_itself_supports():
    assert verdict(Estimate(0.8, 0.7, 0.9), 0.7) == "supported"


# The untrained level


def small_act():
    return tiny_act(cameras={"image": [SIZE, SIZE]}, token_stride=8, chunk_size=4)


def test_fresh_weights_know_the_scale_of_the_data_and_nothing_else():
    trained = small_act()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.1)
    state = torch.get_rng_state()
    fresh = untrained_copy(trained)
    assert torch.equal(torch.get_rng_state(), state)
    assert not fresh.training
    for name, value in trained.normaliser.state_dict().items():
        assert torch.equal(fresh.normaliser.state_dict()[name], value)
    weights = trained.network.state_dict()
    again = untrained_copy(small_act()).network.state_dict()
    for name, value in fresh.network.state_dict().items():
        assert torch.equal(value, again[name])  # of the seed alone, not of what was trained
        assert not value.is_floating_point() or not torch.equal(value, weights[name])


def test_fresh_weights_start_from_no_pretrained_backbone():
    pretrained = small_act()
    # A backbone with pretrained weights would be downloaded, and small_cnn refuses them.
    pretrained.hyper_parameters["backbone_weights"] = "ResNet18_Weights.IMAGENET1K_V1"
    assert untrained_copy(pretrained).hyper_parameters["backbone_weights"] is None


# Both sides


@pytest.fixture(scope="module")
def batch(results):
    return instants(Planned(stays), TASK, next(iter(results.values())).recordings, 9)


def test_instants_are_spread_over_all_episodes_as_they_were_seen(results):
    recordings = next(iter(results.values())).recordings
    batch = instants(Planned(stays), TASK, recordings, 9)
    assert len(batch) == 9
    assert set(batch.episode_index.tolist()) == {0, 1, 2, 3}
    for row in range(9):
        recording = recordings[int(batch.episode_index[row])]
        step = int(batch.frame_index[row])
        agent = batch.observation.state[row].numpy()
        np.testing.assert_allclose(agent, recording.simulator_states[step, :2], atol=1e-3)
        np.testing.assert_allclose(batch.actions[row, 0], recording.actions[step], atol=1e-3)
        left = len(recording.actions) - step
        assert (~batch.action_is_pad[row]).sum() == min(left, 4)
    with pytest.raises(ValueError, match="at least one"):
        instants(Planned(stays), TASK, recordings, 0)


@dataclass(frozen=True)
class Recalling:
    """Answers with where the agent was, one step ago and now."""

    data_schema = SCHEMA
    chunk_size = 2
    n_action_steps = 1
    n_obs_steps = 2

    def predict_chunk(self, observation, queries=None):
        return observation.state


def test_a_policy_with_a_history_is_shown_its_past():
    recordings = rollout(Planned(to_the_left), TASK, range(2), ActionQueue(2), record=2).recordings
    batch = instants(Recalling(), TASK, recordings, 4)
    for row in range(4):
        states = recordings[int(batch.episode_index[row])].simulator_states
        step = int(batch.frame_index[row])
        expected = states[[max(step - 1, 0), step], :2]
        np.testing.assert_allclose(batch.observation.state[row], expected, atol=1e-3)


def test_a_policy_that_respects_the_mirror_has_no_error(batch):
    assert equivariance_error(Planned(stays), batch, (x_flip(),)).max() < 1e-3


def test_the_error_is_the_distance_from_the_mirrored_action(batch):
    fixed = Planned(lambda state: torch.tensor([[100.0, 200.0]]).expand(len(state), -1))
    error = equivariance_error(fixed, batch, (x_flip(),), batch_size=2)
    assert error.shape == (9, 4)
    torch.testing.assert_close(error, torch.full((9, 4), 312.0, dtype=torch.float64))


def other_side(results, mirrors, view=None):
    """What the environment of arm 1 shows at the same instants."""
    recordings = in_mirror(next(iter(results.values())).recordings, mirrors)
    return instants(view or Planned(stays), TASK.of_arm(1), recordings, 9)


def test_the_other_arms_environment_shows_the_mirror_image(batch, results):
    other = other_side(results, (x_flip(),))
    expected = x_flip().batch(batch)
    assert torch.equal(other.observation.images["image"], expected.observation.images["image"])
    torch.testing.assert_close(other.observation.state, expected.observation.state)
    torch.testing.assert_close(other.actions, expected.actions)
    assert torch.equal(other.frame_index, batch.frame_index)


def test_landscapes_lie_elsewhere_exactly_where_the_policy_does_not_mirror(batch, results):
    other = other_side(results, (x_flip(),))
    for plan, moved in ((stays, (0.0, 0.35)), (to_the_left, (0.9, 1.0))):
        both = look_at_both_sides(Planned(plan), batch, other, (x_flip(),), (0, 2), resolution=64)
        plain = both.total_variation(both.plain)
        assert plain.shape == (9, 2)
        assert moved[0] <= float(plain.median()) <= moved[1]
        assert both.total_variation(both.flipped).max() < 1e-3
        # The flipped side is drawn where the other arm has it.
        expected = x_flip().vectors(both.seen.point)
        torch.testing.assert_close(both.flipped.point, expected, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="no attention maps"):
        both.map_correlation(both.plain)


def test_a_wrong_mirror_shows_in_numbers_and_pictures(batch, results):
    # The environment's world is left and right exchanged; the policy looks through the diagonal.
    other = other_side(results, (x_flip(),))
    wrong = (anti_diagonal(),)
    both = look_at_both_sides(Planned(to_the_left), batch, other, wrong, (0,), resolution=64)
    assert both.total_variation(both.flipped).median() > 0.5
    apart = (both.flipped.point - x_flip().vectors(both.seen.point)).norm(dim=-1)
    assert apart.median() > 20


class Wide(Planned):
    """Draws far apart: few samples of a broad distribution."""

    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        chunk = self.predict_chunk(observation, queries)
        noise = torch.randn(n_samples, 1, 2, generator=torch.Generator().manual_seed(seed))
        return chunk[:, None] + 80 * noise


def test_what_lies_elsewhere_has_the_floor_of_samples_drawn_anew(batch, results):
    other = other_side(results, (x_flip(),))
    floors = []
    for view, n_samples in ((Wide(to_the_left), 4), (Wide(to_the_left), 256)):
        both = look_at_both_sides(
            view, batch, other, (x_flip(),), (0,), n_samples=n_samples, resolution=64
        )
        assert both.noise_floor().shape == (9, 1)
        floors.append(float(both.noise_floor().median()))
    assert floors[0] > 0.2
    assert 0 < floors[1] < floors[0] / 2


def test_two_drawn_chunks_are_as_far_apart_as_their_noise(batch):
    apart = redraw_distance(Planned(stays), batch, batch_size=2)
    # The same two draws for every frame and step: common random numbers.
    draws = [
        10 * torch.randn(1, 1, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    expected = (draws[0] - draws[1]).norm().double()
    torch.testing.assert_close(apart, expected.expand(9, 4), rtol=1e-4, atol=0)
    assert redraw_distance(small_act(), batch) is None


class OneAnswer(Planned):
    def sample_chunks(self, observation, n_samples, seed=0, queries=None):
        raise ValueError("one way only")


def test_a_policy_with_one_answer_has_no_floor(batch):
    assert redraw_distance(OneAnswer(stays), batch) is None


def test_behind_two_mirrors_act_does_what_it_did(batch):
    # Axes change places in the diagonal: kernels of residuals have to do so, too.
    policy = small_act()
    mirrors = (x_flip(), anti_diagonal())
    other = batch
    for mirror in reversed(mirrors):
        other = mirror.batch(other)
    calibration = predict_frames(policy, batch, (0,), 32)
    calibration = replace(calibration, expert=calibration.point + torch.tensor([5.0, 60.0]))
    both = look_at_both_sides(policy, batch, other, mirrors, (0,), calibration, resolution=32)
    assert both.total_variation(both.flipped).max() < 1e-3
    torch.testing.assert_close(
        both.map_correlation(both.flipped), torch.ones(9, dtype=torch.float64), atol=1e-3, rtol=0
    )


def test_with_the_flip_act_looks_where_it_looked(batch, results):
    policy, mirrors = small_act(), (x_flip(),)
    other = other_side(results, mirrors, policy)
    calibration = predict_frames(policy, batch, (0,), 32)
    both = look_at_both_sides(policy, batch, other, mirrors, (0,), calibration, resolution=32)
    flipped = both.map_correlation(both.flipped)
    torch.testing.assert_close(flipped, torch.ones_like(flipped), atol=1e-3, rtol=0)
    plain = both.map_correlation(both.plain)
    assert (plain <= 1 + 1e-9).all()
    assert float(plain.min()) < 0.999
    assert both.total_variation(both.flipped).max() < 1e-3
    with pytest.raises(ValueError, match="calibration"):
        look_at_both_sides(policy, batch, other, mirrors, (0,))
