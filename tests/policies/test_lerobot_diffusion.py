"""The denoising process of LeRobot's Diffusion Policy, taken apart in data units."""

import math

import pytest
import torch
from lerobot_folders import STATISTICS, episode, lerobot_policy, with_history

from landscapes.diffusion import ActionDiffusion, noise_prediction_scores, ode_log_likelihood
from policies.interface import Batch, Observation
from policies.lerobot_view import LeRobotPolicyView, processors_for

POLICIES = {
    "ddpm": {},
    "ddim": {"noise_scheduler_type": "DDIM", "num_inference_steps": 3},
    "linear_schedule": {"beta_schedule": "linear"},
    "predicts_actions": {"prediction_type": "sample"},
    "sees_one_step": {"n_obs_steps": 1},
}


def observe(n_obs_steps: int, n_frames: int = 2) -> Observation:
    steps = episode(n_frames + 2)
    seen = [with_history(steps, frame + 1, n_obs_steps) for frame in range(n_frames)]
    observation = Observation(
        images={"image": torch.cat([each.images["image"] for each in seen])},
        state=torch.cat([each.state for each in seen]),
    )
    if n_obs_steps > 1:
        return observation
    return Observation({"image": observation.images["image"][:, 0]}, observation.state[:, 0])


def demonstrated(n_frames: int, horizon: int = 8) -> torch.Tensor:
    return 512 * torch.rand(n_frames, horizon, 2, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def view():
    return LeRobotPolicyView(*lerobot_policy("diffusion"))


@pytest.mark.parametrize("name", POLICIES)
def test_noise_is_predicted_as_lerobot_trains_it(name, monkeypatch):
    """Its loss at given noise and timesteps, from pictures and actions in px, is ours."""
    view = LeRobotPolicyView(*lerobot_policy("diffusion", **POLICIES[name]))
    policy, config = view.policy, view.policy.config
    observation = observe(config.n_obs_steps)
    actions = demonstrated(2)
    index = torch.zeros(2, dtype=torch.long)
    is_pad = torch.zeros(2, 8, dtype=torch.bool)
    batch = view.training_batch(Batch(observation, actions, is_pad, index, index))
    eps = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(3))
    diffusion = view.diffusion(observation)
    assert isinstance(diffusion, ActionDiffusion)
    levels = diffusion.noise_levels
    assert len(levels) == config.num_train_timesteps
    for timestep in (0, 2, 5):
        monkeypatch.setattr(torch, "randn", lambda *_, **__: eps)
        monkeypatch.setattr(
            torch, "randint", lambda *_, t=timestep, **__: torch.full((2,), t, dtype=torch.long)
        )
        expected, _ = policy.forward(batch)
        monkeypatch.undo()
        level = float(levels[timestep])
        noised = actions.double() + level * diffusion.scale * eps
        predicted = diffusion.predict_noise(noised, level, torch.arange(2))
        error = (predicted - eps).square().mean()
        if config.prediction_type == "sample":
            error = error * level**2  # eps is known from the actions, whose error LeRobot takes
        torch.testing.assert_close(error.float(), expected, rtol=1e-3, atol=1e-6)


def test_between_timesteps_the_prediction_changes_steadily(view):
    """Levels are continuous, trained ones are hit exactly, others are not served."""
    diffusion = view.diffusion(observe(2))
    horizons, rows = demonstrated(2).double(), torch.arange(2)
    low, high = diffusion.noise_levels[2:4].tolist()

    def ask(level):
        return diffusion.predict_noise(horizons, level, rows).detach()

    torch.testing.assert_close(ask(low * (1 + 1e-6)), ask(low), rtol=0, atol=1e-4)
    torch.testing.assert_close(ask(high * (1 - 1e-6)), ask(high), rtol=0, atol=1e-4)
    middle = ask((low + high) / 2)
    assert (middle - ask(low)).norm() < (ask(high) - ask(low)).norm()
    first, last = diffusion.noise_levels[[0, -1]].tolist()
    for level in (first / 2, last * 2):
        with pytest.raises(ValueError, match=f"noise level {level} must lie in"):
            ask(level)


@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_sampled_horizons_hold_the_sampled_chunks(n_obs_steps):
    view = LeRobotPolicyView(*lerobot_policy("diffusion", n_obs_steps=n_obs_steps))
    observation = observe(n_obs_steps)
    diffusion = view.diffusion(observation)
    assert (diffusion.n_past, diffusion.horizon) == (n_obs_steps - 1, 8)
    for seed in (0, 4):
        horizons = diffusion.sample_horizons(seed)
        expected = view.sample_chunks(observation, 1, seed)[:, 0]
        torch.testing.assert_close(
            horizons[:, diffusion.n_past :].float(), expected, rtol=1e-6, atol=1e-4
        )


def test_an_observation_is_encoded_once_and_rows_find_theirs(view, monkeypatch):
    calls = []
    encode = view.policy.diffusion._prepare_global_conditioning
    monkeypatch.setattr(
        view.policy.diffusion,
        "_prepare_global_conditioning",
        lambda batch: calls.append(len(batch["observation.state"])) or encode(batch),
    )
    diffusion = view.diffusion(observe(2, n_frames=3))
    horizons = demonstrated(3).double()
    rows = torch.tensor([2, 0, 2, 1])
    several = diffusion.predict_noise(horizons[rows], 0.5, rows)
    assert calls == [3]
    torch.testing.assert_close(several[0], several[2], rtol=1e-5, atol=1e-5)
    other = diffusion.predict_noise(horizons[rows], 0.5, torch.tensor([0, 1, 1, 0]))
    assert (other - several).abs().amax((1, 2)).min() > 1e-4


def test_relative_actions_are_offset_by_the_state_of_their_own_frame():
    from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep

    policy, preprocessor, postprocessor = lerobot_policy("diffusion", n_obs_steps=1)
    observation = observe(1)
    plain = LeRobotPolicyView(policy, preprocessor, postprocessor).diffusion(observation)
    horizons = demonstrated(2).double()
    state = observation.state.double()
    expected = plain.predict_noise(horizons - state[:, None], 0.5, torch.arange(2))
    sampled = plain.sample_horizons() + state[:, None]
    relative = RelativeActionsProcessorStep(enabled=True)
    preprocessor.steps = [*preprocessor.steps[:3], relative, *preprocessor.steps[3:]]
    postprocessor.steps = [
        postprocessor.steps[0],
        AbsoluteActionsProcessorStep(enabled=True, relative_step=relative),
    ]
    view = LeRobotPolicyView(policy, preprocessor, postprocessor)
    diffusion = view.diffusion(observation)
    view.predict_chunk(Observation(observation.images, 0 * observation.state))
    torch.testing.assert_close(
        diffusion.predict_noise(horizons, 0.5, torch.arange(2)), expected, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(diffusion.sample_horizons(), sampled, rtol=0, atol=1e-3)


def test_policies_and_actions_without_noise_are_refused():
    act = LeRobotPolicyView(*lerobot_policy("act"))
    with pytest.raises(ValueError, match="LeRobot's act predicts no noise"):
        act.diffusion(episode(1)[0])
    policy, *_ = lerobot_policy("diffusion")
    action = {**STATISTICS["action"], "max": torch.tensor([511.0, 25.0])}
    flat = LeRobotPolicyView(
        policy, *processors_for(policy.config, {**STATISTICS, "action": action})
    )
    with pytest.raises(ValueError, match=r"action dimensions \[1\] never change"):
        flat.diffusion(observe(2))


def test_taking_it_apart_leaves_no_trace(view):
    view.policy.train()
    try:
        modes = [module.training for module in view.policy.modules()]
        random_state = torch.get_rng_state()
        diffusion = view.diffusion(observe(2))
        chunk = demonstrated(2, 7)
        first = ode_log_likelihood(
            diffusion, chunk, torch.zeros(2, 7, dtype=torch.bool), n_steps=1, n_probes=1
        )
        points = torch.full((1, 1, 1, 2), 256.0)
        noise_prediction_scores(diffusion, points, [0], n_draws=2)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [module.training for module in view.policy.modules()] == modes
    finally:
        view.policy.eval()
    assert all(parameter.grad is None for parameter in view.policy.parameters())
    # The crop is central and dropout off though the policy trains.
    with torch.inference_mode():
        again = ode_log_likelihood(
            view.diffusion(observe(2)),
            chunk,
            torch.zeros(2, 7, dtype=torch.bool),
            n_steps=1,
            n_probes=1,
        )
    torch.testing.assert_close(again, first, rtol=1e-6, atol=0)


def test_densities_change_with_the_unit_and_slices_do_not(view):
    """Twice the range of actions, by another origin: log 2 less for each of 16 dimensions."""
    doubled = {key: 2 * value + 7 for key, value in STATISTICS["action"].items()}
    other = LeRobotPolicyView(
        view.policy, *processors_for(view.policy.config, {**STATISTICS, "action": doubled})
    )
    seen = observe(2)
    diffusion, stretched = view.diffusion(seen), other.diffusion(seen)
    chunk, is_pad = demonstrated(2, 7), torch.zeros(2, 7, dtype=torch.bool)
    density = ode_log_likelihood(diffusion, chunk, is_pad, n_steps=2)
    torch.testing.assert_close(
        ode_log_likelihood(stretched, 2 * chunk + 7, is_pad, n_steps=2),
        density - 16 * math.log(2),
        rtol=1e-4,
        atol=0,
    )
    points = demonstrated(1, 6).double()[:, None]
    torch.testing.assert_close(
        noise_prediction_scores(stretched, 2 * points + 7, [0, 3]),
        noise_prediction_scores(diffusion, points, [0, 3], max_columns=5),
        rtol=1e-4,
        atol=0,
    )
