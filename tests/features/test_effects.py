from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_act import frames, tiny_act
from tiny_sae import tiny_sae

from autoencoders.sae import BatchTopK
from features.effects import (
    FeatureProbe,
    attribution,
    behaviour_recovered,
    decoder_arrows,
    dose_response,
    feature_effects,
    local_arrows,
    random_direction_effects,
)
from features.resampling import auroc, episode_sums, interval, resample_counts, wilson_estimate
from features.splice import Intervention, splice
from features.taps import read_activations


@pytest.fixture(scope="module")
def policy():
    return tiny_act().requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    return frames(12, n_padded=3)


@pytest.fixture(scope="module")
def saes(policy, batch):
    return {
        layer: tiny_sae(policy, layer, batch.observation)
        for layer in ("encoder", "decoder", "backbone")
    }


def slow_changes(policy, layer, sae, observation, latent, factor, queries):
    """Ablate with a hook, in all frames, and keep those where the feature is active."""
    codes = sae.encode(read_activations(policy, observation, layer))[..., latent]
    tokens = list(queries) if layer == "decoder" else list(range(codes.shape[1]))
    is_active = (codes[:, tokens] > 0).any(1)
    edited = splice(policy, layer, Intervention((latent,), scale=factor).edit(sae))
    change = edited.predict_chunk(observation, queries) - policy.predict_chunk(observation, queries)
    return change[is_active]


@pytest.mark.parametrize("layer", ["encoder", "decoder", "backbone"])
def test_effects_are_those_of_one_hooked_policy_for_each_feature(policy, batch, saes, layer):
    sae, queries, factors = saes[layer], [0, 4], (0.0, 3.0)
    probe = FeatureProbe(
        policy, layer, sae, batch.observation, latents=range(8), queries=queries, max_columns=7
    )
    effects = feature_effects(probe, factors)
    n_checked = 0
    for latent in range(8):
        for place, factor in enumerate(factors):
            change = slow_changes(policy, layer, sae, batch.observation, latent, factor, queries)
            assert int(effects.n_active[latent]) == len(change)
            if not len(change):
                assert effects.mean_px[latent].isnan().all()
                assert not effects.has_no_effect(1.0)[latent].any()
                continue
            n_checked += 1
            found = (
                effects.mean_px[latent, place],
                effects.magnitude_px[latent, place],
                effects.consistency[latent, place],
            )
            length = change.norm(dim=-1, keepdim=True)
            expected = (
                change.mean(0),
                length[..., 0].mean(0),
                (change / length.clamp_min(1e-12)).mean(0).norm(dim=-1),
            )
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)
    assert n_checked > 6


def test_frames_lie_evenly_between_strong_and_weak(policy, batch, saes):
    sae = saes["encoder"]
    probe = FeatureProbe(policy, "encoder", sae, batch.observation)
    latent = int(probe.n_active.argmax())
    assert int(probe.n_active[latent]) >= 8
    strength = sae.encode(probe.activations)[..., latent].sum(1)
    block = next(iter(FeatureProbe(
        policy, "encoder", sae, batch.observation, latents=[latent]
    ).blocks(4)))  # fmt: skip
    taken = strength[block.frame]
    ranks = (strength > taken[:, None]).sum(1)
    n = int(probe.n_active[latent])
    assert ranks.tolist() == [0, n // 4, 2 * n // 4, 3 * n // 4]


def test_zero_effect_counts_live_features_alone(policy, batch, saes):
    sae = saes["decoder"]
    probe = FeatureProbe(policy, "decoder", sae, batch.observation)
    effects = feature_effects(probe)
    is_live = effects.n_active > 0
    assert 0 < is_live.sum() < sae.n_latents
    below = effects.magnitude_px[is_live, 0, 0] < 1
    assert effects.zero_effect_rate(1.0) == pytest.approx(float(below.double().mean()))
    # In another unit, the same effects and a bound a hundred times as small say the same.
    finer = replace(effects, magnitude_px=effects.magnitude_px / 100)
    assert finer.zero_effect_rate(0.01) == effects.zero_effect_rate(1.0)
    with pytest.raises(ValueError, match="measured were"):
        effects.zero_effect_rate(1.0, 0.5)
    # A head that reads nothing: no feature does anything.
    deaf = tiny_act().requires_grad_(False)
    deaf.network.action_head.weight.zero_()
    nothing = feature_effects(FeatureProbe(deaf, "encoder", saes["encoder"], batch.observation))
    assert nothing.zero_effect_rate(1.0) == 1.0


def test_a_planted_direction_stands_out_and_a_blind_one_does_not(policy, batch):
    """A feature along what the head reads is significant; one that it cannot see is not."""
    layer = "decoder"
    sae = tiny_sae(policy, layer, batch.observation)
    head = policy.network.action_head.weight
    is_active = sae.encode(read_activations(policy, batch.observation, layer))[:, 0] > 0
    first, second = is_active.sum(0).topk(2)[1].tolist()
    seen = head[0] / head[0].norm()
    blind = torch.linalg.svd(head)[2][-1]
    sae.W_dec[first], sae.W_dec[second] = seen, blind
    probe = FeatureProbe(policy, layer, sae, batch.observation, latents=[first, second])
    found = random_direction_effects(probe)
    assert found.control_px.shape == (2, 100, 1)
    assert found.is_significant[:, 0].tolist() == [True, False]
    assert found.p_value[1, 0] == 1.0
    assert found.p_value[0, 0] < 0.05
    assert found.significant_share() == 0.5
    # As far as the feature: along its own direction the control does what the feature does.
    own = random_direction_effects(probe, directions=seen[None].float())
    torch.testing.assert_close(own.control_px[0, 0], own.feature_px[0], rtol=1e-4, atol=1e-4)


def test_decoder_arrows_are_exact(policy, batch, saes):
    """Goal G6: slope 1 and cosine 1 for doses of -4 to 4."""
    sae = saes["decoder"]
    probe = FeatureProbe(policy, "decoder", sae, batch.observation, queries=[0, 3])
    response = dose_response(probe)
    is_live = response.n_frames > 0
    for values in (response.slope, response.cosine, response.spearman):
        at_first = values[is_live][:, 0]
        known = at_first[~at_first.isnan()]
        assert len(known) > 5
        torch.testing.assert_close(known, torch.ones_like(known), atol=1e-5, rtol=0)
    # By automatic differentiation, without the closed form.
    arrows = decoder_arrows(policy, sae)
    alone = FeatureProbe(policy, "decoder", sae, batch.observation, queries=[2])
    derived = local_arrows(alone)[:, 0]
    is_live = alone.n_active > 0
    torch.testing.assert_close(derived[is_live], arrows[is_live].float(), rtol=1e-5, atol=1e-5)


def test_local_arrows_foretell_small_doses(policy, batch, saes):
    probe = FeatureProbe(policy, "encoder", saes["encoder"], batch.observation, queries=[0, 5])
    small = dose_response(probe, doses=(-1e-4, 1e-4))
    is_live = small.n_frames > 0
    assert is_live.sum() > 10
    one = torch.ones_like(small.slope[is_live])
    torch.testing.assert_close(small.slope[is_live], one, atol=2e-2, rtol=0)
    torch.testing.assert_close(small.cosine[is_live], one, atol=1e-3, rtol=0)
    arrows = local_arrows(probe, n_frames_per_latent=16)[is_live]
    unit = small.unit[is_live][:, None, None]
    torch.testing.assert_close(small.predicted_px[is_live, 1], 1e-4 * unit * arrows)
    # Far from the frame the derivative is no law.
    large = dose_response(probe, doses=(-40.0, 40.0))
    assert (large.slope[is_live] - 1).abs().median() > 0.2


def test_features_and_residual_add_up_to_the_action(policy, batch):
    for relative in (False, True):
        view = tiny_act(relative_actions=relative).requires_grad_(False)
        sae = tiny_sae(view, "decoder", batch.observation)
        x = read_activations(view, batch.observation, "decoder")
        parts = attribution(view, sae, x, batch.observation)
        torch.testing.assert_close(parts.total, view.predict_chunk(batch.observation))
        assert parts.residual.abs().max() > 0.1
        # One term by hand: what is lost without the feature is its contribution.
        row, latent = int(parts.row[0]), int(parts.latent[0])
        edited = splice(view, "decoder", Intervention((latent,), scale=0.0).edit(sae))
        lost = view.predict_chunk(batch.observation) - edited.predict_chunk(batch.observation)
        torch.testing.assert_close(lost.flatten(0, 1)[row], parts.contribution[0])
        assert ((parts.residual_share >= 0) & (parts.residual_share < 10)).all()


def test_arrows_are_for_what_follows_linearly(policy, batch, saes):
    with pytest.raises(ValueError, match="takes 16 dimensions, the decoder gives 32"):
        decoder_arrows(tiny_act(dim_model=32), saes["decoder"])
    probe = FeatureProbe(tiny_act(), "backbone", saes["backbone"], batch.observation)
    with pytest.raises(ValueError, match="encoder' and 'decoder"):
        local_arrows(probe)


def test_an_exact_reconstruction_recovers_everything_and_the_mean_nothing(policy, batch, saes):
    episodes = torch.arange(12) // 3
    several = replace(batch, episode_index=episodes)

    sae = saes["encoder"]
    x = read_activations(policy, batch.observation, "encoder")

    class Exact(BatchTopK):
        def forward(self, x):
            return x

    class Mean(BatchTopK):
        def forward(self, activations):
            return x.mean(0).expand_as(activations)

    exact, by_mean = (
        behaviour_recovered(policy, "encoder", kind(16, 48), x.mean(0), several, batch_size=5)
        for kind in (Exact, Mean)
    )
    found = exact.summary()
    assert found["action_score"].value == found["action_score"].low == 1.0
    assert found["dl1"].value == 0.0
    assert found["l1_recovered"].value == 1.0
    found = by_mean.summary()
    assert found["action_score"].value == pytest.approx(0.0, abs=1e-9)
    assert found["l1_recovered"].value == pytest.approx(0.0, abs=1e-9)

    between = behaviour_recovered(policy, "encoder", sae, x.mean(0), several)
    summary = between.summary()
    clean = policy.predict_chunk(batch.observation)
    by_hand = (clean - batch.actions).abs().mean(-1)[~batch.action_is_pad].mean()
    assert summary["clean_l1"].value == pytest.approx(float(by_hand))
    assert summary["action_score"].low < summary["action_score"].value
    assert summary["action_score"].value < summary["action_score"].high
    assert between.scores_by_query().shape == (6,)
    ratio = between.sae_px.double().mean() / between.mean_px.double().mean()
    assert summary["action_score"].value == pytest.approx(float(1 - ratio))
    assert np.isnan(
        behaviour_recovered(policy, "encoder", sae, x.mean(0), batch).summary()["dl1"].low
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": [48]}, r"0\.\.47"),
        ({"latents": [1, 1]}, "named twice"),
        ({"queries": [6]}, r"0\.\.5"),
        ({"max_columns": 0}, "at least 1"),
        ({"activations": torch.zeros(3, 6, 16).double()}, "12 frames"),
    ],
)
def test_impossible_probes_are_refused(policy, batch, saes, changes, message):
    with pytest.raises(ValueError, match=message):
        FeatureProbe(policy, "encoder", saes["encoder"], batch.observation, **changes)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    negative = torch.randint(6, (40,), generator=generator).float()
    positive = torch.randint(2, 9, (30,), generator=generator).float()
    pairs = positive[:, None] - negative
    by_hand = (pairs > 0).double().mean() + (pairs == 0).double().mean() / 2
    assert float(auroc(negative, positive)[0]) == pytest.approx(float(by_hand))
    assert float(auroc(negative, negative)[0]) == pytest.approx(0.5)
    # A weight of 2 is a frame that occurs twice.
    weight = torch.randint(0, 3, (1, 40), generator=generator).double()
    repeated = negative.repeat_interleave(weight[0].long())
    weighted = auroc(negative, positive, weight, torch.ones(1, 30).double())
    torch.testing.assert_close(weighted, auroc(repeated, positive))


def test_intervals_are_those_of_independent_episodes():
    """Frames that repeat within an episode say nothing new."""
    generator = torch.Generator().manual_seed(3)
    of_episode = torch.randn(200, generator=generator)
    values, index = of_episode.repeat_interleave(9), torch.arange(200).repeat_interleave(9)
    sums = episode_sums(torch.stack([values, torch.ones_like(values)], 1), index)
    resampled = resample_counts(200, n_resamples=4000) @ sums
    low, high = interval(resampled[:, 0] / resampled[:, 1])
    half = 1.96 * float(of_episode.std()) / 200**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert (high + low) / 2 == pytest.approx(float(of_episode.mean()), abs=0.02)
    with pytest.raises(ValueError, match="at least 2"):
        resample_counts(1)


def test_wilson_intervals_solve_their_equation():
    """|rate - p| = z sqrt(p (1 - p) / n) at both ends."""
    for n_events, n in ((3, 10), (40, 50)):
        found = wilson_estimate(n_events, n)
        for p in (found.low, found.high):
            assert abs(found.value - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5)
    assert wilson_estimate(0, 10).low == 0.0
    assert wilson_estimate(0, 10).high == pytest.approx(0.2775, abs=1e-4)
