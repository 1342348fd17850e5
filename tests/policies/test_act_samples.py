"""Drawn chunks: the fast path is the network itself, random numbers are common, nothing leaks."""

import math
from dataclasses import replace

import pytest
import torch
from lerobot_folders import (
    episode,
    lerobot_policy,
    lerobot_step,
    to_lerobot,
    with_history,
    write_folder,
)
from test_act import observe, tiny

from landscapes.grid import Grid
from landscapes.methods import Likelihood, Probe
from landscapes.study import kernel_scale, predict_frames
from policies.act import ACTPolicy, Posterior, prior_latents
from policies.interface import Batch, SamplingPolicyView
from policies.lerobot_view import LeRobotPolicyView
from policies.loading import load_policy

VARIANTS = {
    "default": {},
    "two_decoder_layers": {"n_decoder_layers": 2},
    "pre_norm": {"pre_norm": True, "n_decoder_layers": 2},
    "relative_actions": {"relative_actions": True},
}
LATENT = 32


def latents(n_batch=1, n_samples=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_batch, n_samples, LATENT, generator=generator, dtype=torch.float64)


def exactly(actual, expected):
    """Equal but for float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=VARIANTS)
def policy(request):
    torch.manual_seed(0)
    return tiny(**VARIANTS[request.param]).double()


@torch.no_grad()
def test_zero_latents_decode_what_is_executed(policy):
    observation = observe(4)
    chunk = policy.predict_chunk(observation)
    decoded = policy.decode_latents(observation, torch.zeros(1, 3, LATENT))
    exactly(decoded, chunk[:, None].expand_as(decoded))
    single = policy.float()
    torch.testing.assert_close(
        single.decode_latents(observation, torch.zeros(1, 1, LATENT))[:, 0],
        single.predict_chunk(observation),
        rtol=1e-5,
        atol=1e-5,
    )


@torch.no_grad()
def test_each_latent_is_decoded_with_its_own_observation(policy):
    """Against one pass of the network for each pair; own latents, and one set for all."""
    observation, z = observe(3), latents(3, 4)
    own = policy.decode_latents(observation, z)
    shared = policy.decode_latents(observation, z[:1])
    for row in range(3):
        alone = observation.rows(slice(row, row + 1))
        tokens = policy.encode_observation(alone)
        for sample in range(4):
            for decoded, latent in ((own, z[row, sample]), (shared, z[0, sample])):
                expected = policy.network.decode(tokens, latent[None])
                exactly(decoded[row, sample], policy.unnormalise_actions(expected, alone)[0])
    assert own.std(dim=1).mean() > 1e-2  # z matters, so that a mix-up would show


@torch.no_grad()
def test_single_steps_are_those_of_the_whole_chunk(policy):
    observation, z = observe(3), latents(1, 4)
    whole = policy.decode_latents(observation, z)
    for queries in ([0], [4, 0, 2]):
        exactly(policy.decode_latents(observation, z, queries), whole[:, :, queries])


@pytest.mark.parametrize("max_columns", [1, 5, 12])
def test_pieces_change_no_number(policy, max_columns):
    """Pieces of 5 begin and end within an observation's samples."""
    observation, z = observe(3), latents(3, 4)
    with torch.no_grad():
        exactly(
            policy.decode_latents(observation, z, max_columns=max_columns),
            policy.decode_latents(observation, z),
        )


def demonstrations(observation, chunk=5, seed=2):
    n = len(observation.state)
    generator = torch.Generator().manual_seed(seed)
    is_pad = torch.zeros(n, chunk, dtype=torch.bool)
    is_pad[-1, 3:] = True
    return Batch(
        observation,
        observation.state[:, None] + torch.randn(n, chunk, 2, generator=generator),
        is_pad,
        torch.zeros(n, dtype=torch.long),
        torch.arange(n),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_latents_of_the_posterior_decode_what_training_sees(name, monkeypatch):
    torch.manual_seed(0)
    policy = tiny(**VARIANTS[name], dropout=0.0).double().train()
    batch = demonstrations(observe(3))
    noise = latents(3, 1, seed=5)[:, 0]

    def sample(posterior):
        return posterior.mean + (posterior.log_variance / 2).exp() * noise

    monkeypatch.setattr(Posterior, "sample", sample)
    trained = policy.loss(batch, kl_weight=1.0).prediction
    policy.eval()
    with torch.no_grad():
        z = sample(policy.encode_posterior(batch))
        exactly(policy.decode_latents(batch.observation, z[:, None])[:, 0], trained)
        assert (policy.predict_chunk(batch.observation) - trained).abs().max() > 1e-2


def test_a_policy_of_lerobots_decodes_as_lerobot_does(tmp_path, monkeypatch):
    """Its ACT.forward in train mode, without dropout, with known noise; and its own chunk."""
    theirs = lerobot_policy("act", dropout=0.0)
    lerobot, _, postprocessor = theirs
    ours = load_policy(str(write_folder(tmp_path / "act", *theirs))).view
    assert isinstance(ours, ACTPolicy)
    seen = episode(3)
    observation = replace(
        seen[0],
        images={"image": torch.cat([each.images["image"] for each in seen])},
        state=torch.cat([each.state for each in seen if each.state is not None]),
    )
    batch = demonstrations(observation, chunk=7)
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    values = LeRobotPolicyView(*theirs).training_batch(batch)
    values["observation.images"] = [values["observation.image"]]
    lerobot.train()
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn_like", lambda _: noise)
            normalised, (mean, log_variance) = lerobot.model(values)
        posterior = ours.encode_posterior(batch)
        torch.testing.assert_close(posterior.mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.log_variance, log_variance, rtol=1e-4, atol=1e-5)
        z = mean + (log_variance / 2).exp() * noise
        decoded = ours.decode_latents(observation, z[:, None])[:, 0]
        torch.testing.assert_close(decoded, postprocessor(normalised), rtol=1e-5, atol=1e-3)
        lerobot.eval()
        executed = postprocessor(lerobot.predict_action_chunk(theirs[1](to_lerobot(observation))))
        decoded = ours.decode_latents(observation, torch.zeros(1, 1, 6))[:, 0]
        torch.testing.assert_close(decoded, executed, rtol=1e-5, atol=1e-3)
        assert (executed - postprocessor(normalised)).abs().max() > 1  # px: z matters


def test_prior_latents_are_standard_normal():
    z = prior_latents(4096, LATENT)
    ordered = z.sort(dim=0).values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    ranks = (torch.arange(4096, dtype=torch.float64)[:, None] + 0.5) / 4096
    assert (cdf - ranks).abs().max() < 1.36 / math.sqrt(4096)
    covariance = torch.cov(z.T)
    assert (covariance - torch.eye(LATENT)).abs().max() < 0.07
    assert z.mean(0).abs().max() < 0.005
    assert (z.pow(4).mean(0) - 3).abs().max() < 0.2


def test_prior_latents_are_the_same_for_the_same_seed_and_grow_at_the_end():
    state = torch.get_rng_state()
    z = prior_latents(64, LATENT, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, prior_latents(64, LATENT, seed=7))
    assert (z - prior_latents(64, LATENT, seed=8)).abs().mean() > 0.5
    assert torch.equal(z[:32], prior_latents(32, LATENT, seed=7))


@torch.no_grad()
def test_samples_share_their_random_numbers(policy):
    observation = observe(3).rows(torch.tensor([0, 1, 0]))
    samples = policy.sample_chunks(observation, 4)
    exactly(samples[0], samples[2])
    exactly(policy.sample_chunks(observation.rows(slice(1, 2)), 4)[0], samples[1])
    exactly(policy.sample_chunks(observation, 8)[:, :4], samples)
    exactly(policy.sample_chunks(observation, 4, queries=[3, 1]), samples[:, :, [3, 1]])
    assert torch.equal(policy.sample_chunks(observation, 4), samples)
    assert (policy.sample_chunks(observation, 4, seed=1) - samples).abs().max() > 1e-2
    exactly(samples, policy.decode_latents(observation, prior_latents(4, LATENT)[None]))
    assert isinstance(policy, SamplingPolicyView)


def test_pictures_are_encoded_once(policy):
    seen = []
    policy.network.backbone.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    with torch.no_grad():
        policy.decode_latents(observe(3), latents(1, 40), max_columns=7)
    assert seen == [3]


def test_without_a_latent_all_samples_are_the_executed_chunk():
    policy, observation = tiny(use_latent=False), observe(2)
    with torch.no_grad():
        samples = policy.sample_chunks(observation, 5, queries=[3, 0])
        chunk = policy.predict_chunk(observation, [3, 0])
    assert torch.equal(samples, chunk[:, None].expand(-1, 5, -1, -1))


def test_what_cannot_be_drawn_is_refused():
    policy, observation = tiny(), observe(1)
    with pytest.raises(ValueError, match="n_samples=0"):
        policy.sample_chunks(observation, 0)
    for queries in ([5], [-1]):
        with pytest.raises(ValueError, match=r"must lie in 0\.\.4"):
            policy.sample_chunks(observation, 2, queries=queries)


def landscape_of(view, observation, horizons=(0, 2)):
    n = len(observation.state)
    batch = Batch(
        observation,
        torch.full((n, view.chunk_size, 2), 256.0),
        torch.zeros(n, view.chunk_size, dtype=torch.bool),
        torch.zeros(n, dtype=torch.long),
        torch.arange(n),
    )
    predictions = predict_frames(view, batch, horizons, n_samples=4)
    scale = kernel_scale(view, predictions, None)
    return Likelihood().landscape(Probe(view, batch, predictions, scale, horizons, Grid(16)))


def test_landscapes_leave_lerobots_queues_and_random_numbers_alone():
    """LeRobot plays the same actions whether or not somebody looks at landscapes in between."""
    theirs = lerobot_policy("diffusion")
    view = LeRobotPolicyView(*theirs)
    observations = episode(8)

    def play(look):
        theirs[0].reset()
        torch.manual_seed(4)
        actions, landscapes = [], []
        for step, observation in enumerate(observations):
            if look:
                landscapes.append(landscape_of(view, with_history(observations, step, 2)))
            actions.append(lerobot_step(*theirs, observation))
        return torch.cat(actions), landscapes

    undisturbed, _ = play(look=False)
    watched, landscapes = play(look=True)
    assert torch.equal(watched, undisturbed)
    # What is seen belongs to the present observation, not to the queue that LeRobot plays from.
    again = landscape_of(view, with_history(observations, 4, 2))
    assert torch.equal(again.scores, landscapes[4].scores)
    assert not torch.equal(landscapes[4].scores, landscapes[3].scores)
