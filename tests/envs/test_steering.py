from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny_act import tiny_act
from tiny_sae import tiny_sae

from envs.perturbations import Lighting, PerturbedPolicy
from envs.push_t import PushT, PushTTask
from envs.rollout import rollout
from envs.steering import monitored_rollouts, steer_rollouts
from features.effects import decoder_arrows
from features.ood import fit_detector
from features.splice import DirectionIntervention, Intervention, Reconstruction
from features.taps import read_activations
from policies.ensembling import ActionQueue
from policies.interface import Observation

SEEDS = range(4)


@pytest.fixture(scope="module")
def task() -> PushTTask:
    return PushTTask(image_size=32, max_steps=12)


@pytest.fixture(scope="module")
def policy():
    return tiny_act(n_action_steps=3).requires_grad_(False)


@pytest.fixture(scope="module")
def observation():
    env = PushT(32)
    seen = []
    for seed in range(40):
        env.reset(seed)
        seen.append(env.observe())
    env.close()
    pictures = np.stack([each["images"]["image"] for each in seen]).transpose(0, 3, 1, 2)
    return Observation(
        images={"image": torch.from_numpy(np.ascontiguousarray(pictures))},
        state=torch.from_numpy(np.stack([each["state"] for each in seen])),
    )


@pytest.fixture(scope="module")
def sae(policy, observation):
    return tiny_sae(policy, "decoder", observation)


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_an_intervention_that_changes_no_code_changes_no_episode(task, policy, observation, layer):
    sae = tiny_sae(policy, layer, observation)
    nothing = Intervention((0, 1), scale=1.0)
    result = steer_rollouts(
        task, policy, layer, sae, nothing, SEEDS, [nothing], n_parallel=2, n_recordings=2
    )
    for name, values in result.baseline.values.items():
        np.testing.assert_array_equal(result.steered.values[name], values)
        np.testing.assert_array_equal(result.controls[0].values[name], values)
    assert all(
        (each.value, each.low, each.high) == (0, 0, 0) for each in result.differences().values()
    )
    assert result.seeds == tuple(SEEDS)
    plain = rollout(policy, task, SEEDS, ActionQueue(3), n_parallel=2, record=2)
    for recording, other in zip(result.steered.recordings, plain.recordings, strict=True):
        np.testing.assert_allclose(recording.simulator_states, other.simulator_states, atol=1e-9)
    np.testing.assert_allclose(
        result.baseline.values["max_coverage"], [each.max_score for each in plain.episodes]
    )


def test_a_feature_pulls_the_agent_along_its_arrow(task, policy, sae):
    """At the decoder the arrow is exact, and so is the change of every chunk in closed loop."""
    arrows = decoder_arrows(policy, sae).float()
    latent = int(arrows.norm(dim=-1).argmax())
    x_axis, n_units = arrows[latent], 40.0 / float(arrows[latent].norm())
    sae = deepcopy(sae)
    sae.threshold[latent] = torch.inf  # silent by itself, so that a clamp adds just its value
    clamp = Intervention((latent,), clamp=n_units)
    across = DirectionIntervention(
        torch.linalg.svd(policy.network.action_head.weight)[2][-1], clamp, name="blind"
    )
    result = steer_rollouts(
        task, policy, "decoder", sae, clamp, SEEDS, [across], n_parallel=3, n_recordings=0
    )
    for dimension in range(2):
        found = result.steered.values[f"action_change_{dimension}"]
        expected = n_units * float(x_axis[dimension])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.steered.values["action_change"], 40.0, rtol=1e-5)
    # As long, but where the head is blind: nothing happens, so all of the effect is the feature's.
    np.testing.assert_allclose(result.controls[0].values["action_change"], 0.0, atol=1e-6)
    assert result.controls[0].name == "blind"
    axis = int(x_axis.abs().argmax())
    sign = int(np.sign(float(x_axis[axis])))
    quantity = ("net_agent_x", "net_agent_y")[axis]
    assert result.sign_rate(quantity, sign).value == 1.0
    assert result.sign_rate(quantity, -sign).value == 0.0
    assert result.sign_rate(quantity, sign, result.controls[0]).value < 1.0
    pulled = result.differences()[quantity]
    assert sign * pulled.value > 5
    assert min(sign * pulled.low, sign * pulled.high) > 0
    assert result.beyond_controls()[quantity].value == pytest.approx(pulled.value, abs=1e-3)
    summary = result.summary()
    assert summary[f"difference/{quantity}"] == pytest.approx(pulled.value)
    assert summary["n_episodes"] == 4
    assert all(isinstance(value, float) for value in summary.values())
    assert not result.steered.recordings
    with pytest.raises(ValueError, match="net_cup_x"):
        result.sign_rate("net_cup_x", 1)


def test_paths_are_those_of_the_recorded_states(task, policy, sae):
    result = steer_rollouts(
        task,
        policy,
        "decoder",
        sae,
        Intervention((3,), clamp=5.0),
        SEEDS,
        n_parallel=4,
        n_recordings=4,
    )
    for variant in (result.baseline, result.steered):
        for place, recording in enumerate(variant.recordings):
            states = recording.simulator_states
            way = np.hypot(*np.diff(states[:, :2], axis=0).T).sum()
            assert variant.values["path_agent_px"][place] == pytest.approx(way)
            moved = states[-1, 3] - states[0, 3]
            assert variant.values["net_block_y"][place] == pytest.approx(moved)
            turned = np.rad2deg(states[-1, 4] - states[0, 4])
            net = variant.values["net_block_angle"][place]
            assert (net - turned) % 360 == pytest.approx(0, abs=1e-6) or (
                net - turned
            ) % 360 == pytest.approx(360, abs=1e-6)
            assert abs(net) < 180
    with pytest.raises(ValueError, match="no controls"):
        result.beyond_controls()


class TurningPushT(PushT):
    """Ends after some steps that depend on the seed, and says that the block turns all the time."""

    def reset(self, seed):
        super().reset(seed)
        self.n_steps, self.last_step = 0, 4 + 5 * (seed % 3)

    def step(self, action):
        self.n_steps += 1
        return super().step(action)._replace(terminated=self.n_steps >= self.last_step)

    def state(self):
        state = super().state()
        state[4] = (6.0 + 0.1 * getattr(self, "n_steps", 0)) % (2 * np.pi)
        return state


class TurningTask(PushTTask):
    def make(self):
        return TurningPushT(self.image_size)


def test_episodes_of_different_length_are_told_apart_in_any_grouping(policy, sae):
    task = TurningTask(image_size=32, max_steps=18)
    results = [
        steer_rollouts(task, policy, "decoder", sae, Reconstruction(), range(6), n_parallel=n)
        for n in (1, 4)
    ]
    alone, together = (result.steered.values for result in results)
    assert alone["n_steps"].tolist() == [4, 9, 14, 4, 9, 14]
    assert len(np.unique(alone["action_change"].round(6))) == 6
    for name, values in alone.items():
        np.testing.assert_allclose(together[name], values, rtol=1e-6, atol=1e-6)
    # An angle goes on beyond a full turn.
    turned = np.rad2deg(0.1 * alone["n_steps"])
    np.testing.assert_allclose(alone["net_block_angle"], turned)


def test_a_lossy_reconstruction_acts_otherwise(task, policy, sae):
    result = steer_rollouts(task, policy, "decoder", sae, Reconstruction(), SEEDS)
    assert result.steered.name == "reconstruction"
    assert (result.steered.values["action_change"] > 0.1).all()
    assert result.differences()["path_agent_px"].value != 0


def test_every_prediction_of_every_episode_is_scored_and_no_action_changes(
    task, policy, observation
):
    x = read_activations(policy, observation, "encoder")
    sae = tiny_sae(policy, "encoder", observation)
    detector = fit_detector("encoder", sae, x[:20], x[20:], torch.arange(20))
    plain = rollout(policy, task, SEEDS, ActionQueue(3), n_parallel=2, record=4)
    watched = monitored_rollouts(task, policy, detector, SEEDS, n_parallel=2)
    assert watched.result.episodes == plain.episodes
    for place, recording in enumerate(watched.result.recordings):
        assert watched.steps[place].tolist() == list(range(0, 12, 3))
        # Scored again from what the policy saw, redrawn.
        env = task.make()
        seen = []
        for step in watched.steps[place].tolist():
            env.reset_to(recording.simulator_states[step])
            seen.append(env.observe())
        env.close()
        pictures = np.stack([each["images"]["image"] for each in seen]).transpose(0, 3, 1, 2)
        again = Observation(
            images={"image": torch.from_numpy(np.ascontiguousarray(pictures))},
            state=torch.from_numpy(np.stack([each["state"] for each in seen])),
        )
        expected = detector.read(read_activations(policy, again, "encoder")).scores
        first = expected["reconstruction"][0]
        assert watched.scores["reconstruction"][place][0] == pytest.approx(float(first))
        assert len(watched.scores["mahalanobis"][place]) == 4
    assert watched.has_failed == [True] * 4
    dark = monitored_rollouts(
        task,
        policy,
        detector,
        SEEDS,
        n_parallel=2,
        wrap=lambda view: PerturbedPolicy(view, Lighting(gain=0.2)),
    )
    for bright_scores, dark_scores in zip(
        watched.scores["neighbours"], dark.scores["neighbours"], strict=True
    ):
        assert dark_scores.mean() > bright_scores.mean()
