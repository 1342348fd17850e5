import pytest
import torch
from tiny_act import frames, tiny_act
from tiny_sae import tiny_sae

from features.splice import (
    DirectionIntervention,
    Intervention,
    SplicedPolicy,
    data_directions,
    matched_latents,
    mean_ablation_edit,
    random_directions,
    reconstruction_edit,
    splice,
    zero_ablation_edit,
)
from features.taps import continue_from, read_activations
from policies.interface import PolicyView, SamplingPolicyView

LAYERS = ["encoder", "decoder", "backbone", "network.encoder.layers.0"]


@pytest.fixture(scope="module")
def policy():
    return tiny_act(n_encoder_layers=2)


@pytest.fixture(scope="module")
def observation():
    return frames(6).observation


def live(sae, x) -> int:
    """A latent that is active on some tokens and silent on others."""
    share = (sae.encode(x) > 0).double().mean((0, 1))
    return int((share - 0.4).abs().argmin())


@pytest.mark.parametrize("layer", LAYERS)
def test_unchanged_codes_change_no_bit(policy, observation, layer):
    sae = tiny_sae(policy, layer, observation)
    x = read_activations(policy, observation, layer)
    latent = live(sae, x)
    silent = int((sae.encode(x) == 0).all((0, 1)).nonzero()[0])
    with torch.no_grad():
        clean = policy.predict_chunk(observation)
        for intervention in (
            Intervention((latent,), scale=1.0),
            Intervention((silent,), scale=0.0),
            Intervention((silent,), clamp=0.0),
            Intervention((latent,), scale=0.0, tokens=()),
            DirectionIntervention(torch.ones(sae.d_in), Intervention((silent,), scale=0.0)),
        ):
            spliced = SplicedPolicy(policy, layer, intervention.edit(sae))
            assert torch.equal(spliced.predict_chunk(observation), clean)
        ablated = splice(policy, layer, Intervention((latent,), scale=0.0).edit(sae))
        assert not torch.equal(ablated.predict_chunk(observation), clean)
        # Nothing stays behind.
        assert torch.equal(policy.predict_chunk(observation), clean)


def test_signed_zeros_survive_a_change_of_other_tokens(policy, observation):
    sae = tiny_sae(policy, "encoder", observation)
    x = read_activations(policy, observation, "encoder")
    x[:, 0] = -0.0
    edited = Intervention((live(sae, x),), scale=0.0, tokens=(1,)).edit(sae)(x)
    assert edited[:, 0].signbit().all()
    assert not torch.equal(edited[:, 1], x[:, 1])
    assert torch.equal(edited[:, 2:], x[:, 2:])


def test_the_error_of_the_reconstruction_stays(policy, observation):
    """x' - x^' = x - x^: what the codes do not explain is not touched."""
    sae = tiny_sae(policy, "encoder", observation)
    x = read_activations(policy, observation, "encoder")
    codes = sae.encode(x)
    latents = (live(sae, x), int(codes.sum((0, 1)).argmax()))
    for intervention, changed in (
        (Intervention(latents, scale=0.25), codes[..., latents] * 0.25),
        (Intervention(latents, clamp=1.5), torch.full_like(codes[..., latents], 1.5)),
    ):
        new_codes = codes.clone()
        new_codes[..., latents] = changed
        expected = sae.decode(new_codes) + (x - sae(x))
        torch.testing.assert_close(intervention.edit(sae)(x), expected)


def test_interventions_of_different_features_add_up(policy, observation):
    sae = tiny_sae(policy, "encoder", observation)
    x = read_activations(policy, observation, "encoder")
    one, two, both = (
        Intervention(latents, scale=2.0).displacement(sae, x) for latents in ((3,), (7,), (3, 7))
    )
    torch.testing.assert_close(one + two, both)


def test_the_control_moves_every_token_as_far(policy, observation):
    sae = tiny_sae(policy, "encoder", observation)
    x = read_activations(policy, observation, "encoder")
    feature = Intervention((live(sae, x),), clamp=2.0)
    control = DirectionIntervention(5 * random_directions(1, sae.d_in)[0], feature)
    of_feature, of_control = (each.displacement(sae, x) for each in (feature, control))
    assert of_feature.norm(dim=-1).std() > 0.1
    torch.testing.assert_close(of_control.norm(dim=-1), of_feature.norm(dim=-1))
    rows = of_control.flatten(0, 1)
    assert torch.linalg.matrix_rank(rows, rtol=1e-6) == 1


def test_a_splice_is_what_follows_from_the_changed_activations(policy, observation):
    for layer in ("encoder", "decoder"):
        sae = tiny_sae(policy, layer, observation)
        x = read_activations(policy, observation, layer)
        with torch.no_grad():
            for edit, changed in (
                (reconstruction_edit(sae), sae(x)),
                (mean_ablation_edit(x.mean(0)), x.mean(0).expand_as(x)),
                (mean_ablation_edit(x.mean((0, 1))), x.mean((0, 1)).expand_as(x)),
                (zero_ablation_edit(), torch.zeros_like(x)),
            ):
                spliced = splice(policy, layer, edit).predict_chunk(observation, [1, 4])
                expected = continue_from(policy, layer, changed, observation, [1, 4])
                torch.testing.assert_close(spliced, expected)


def test_tokens_of_the_decoder_are_chunk_steps_whatever_is_asked_for(policy, observation):
    sae = tiny_sae(policy, "decoder", observation)
    x = read_activations(policy, observation, "decoder")
    latent = int((sae.encode(x)[:, 4] > 0).sum(0).argmax())
    edit = Intervention((latent,), clamp=3.0, tokens=(4,)).edit(sae)
    with torch.no_grad():
        clean = policy.predict_chunk(observation)
        spliced = splice(policy, "decoder", edit)
        whole, some = spliced.predict_chunk(observation), spliced.predict_chunk(observation, [4, 1])
    moved = (whole - clean).abs().amax((0, 2))
    assert moved[4] > 0.1
    assert moved[[0, 1, 2, 3, 5]].max() < 1e-9
    torch.testing.assert_close(some, whole[:, [4, 1]])


def test_samples_are_drawn_only_where_the_policy_draws(policy, observation):
    sae = tiny_sae(policy, "encoder", observation)
    unchanged = splice(policy, "encoder", Intervention((0,), scale=1.0).edit(sae))
    assert isinstance(unchanged, SamplingPolicyView)
    with torch.no_grad():
        drawn = unchanged.sample_chunks(observation, 3, seed=5)
        assert torch.equal(drawn, policy.sample_chunks(observation, 3, seed=5))
        moved = splice(policy, "encoder", zero_ablation_edit()).sample_chunks(observation, 3, 5)
        assert not torch.equal(drawn, moved)

    class Deterministic:
        data_schema, chunk_size, n_action_steps, n_obs_steps = policy.data_schema, 6, 6, 1

        def __init__(self):
            self.policy = policy

        def predict_chunk(self, observation, queries=None):
            return policy.predict_chunk(observation, queries)

    quiet = splice(Deterministic(), "policy.network.encoder", zero_ablation_edit())
    assert isinstance(quiet, PolicyView)
    assert not isinstance(quiet, SamplingPolicyView)
    with torch.no_grad():
        clean = policy.predict_chunk(observation)
        assert not torch.equal(quiet.predict_chunk(observation), clean)


def test_hooks_are_gone_after_an_error(policy, observation):
    def fail(x):
        raise RuntimeError("in the edit")

    with torch.no_grad():
        clean = policy.predict_chunk(observation)
        with pytest.raises(RuntimeError, match="in the edit"):
            splice(policy, "encoder", fail).predict_chunk(observation)
        assert torch.equal(policy.predict_chunk(observation), clean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": (), "scale": 0.0}, "name at least one"),
        ({"latents": (1, 1), "scale": 0.0}, "each once"),
        ({"latents": (1,)}, "exactly one"),
        ({"latents": (1,), "scale": 0.0, "clamp": 1.0}, "exactly one"),
    ],
)
def test_impossible_interventions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Intervention(**arguments)


def test_missing_latents_and_tokens_are_named(policy, observation):
    sae = tiny_sae(policy, "encoder", observation)
    x = read_activations(policy, observation, "encoder")
    with pytest.raises(ValueError, match=r"0\.\.47"):
        Intervention((48,), scale=0.0).displacement(sae, x)
    with pytest.raises(ValueError, match=r"tokens \(6,\)"):
        Intervention((0,), scale=0.0, tokens=(6,)).displacement(sae, x)
    with pytest.raises(ValueError, match="points nowhere"):
        DirectionIntervention(torch.zeros(3), Intervention((0,), scale=0.0))


def test_strict_controls_point_where_the_data_vary():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([5.0, 1.0, 0.1, 0.1])
    vectors = 3 + torch.randn(2000, 4, generator=generator) * spread
    anywhere, strict = random_directions(400, 4, seed=1), data_directions(400, vectors, seed=1)
    for directions in (anywhere, strict):
        torch.testing.assert_close(directions.norm(dim=-1), torch.ones(400))
    torch.testing.assert_close(anywhere.square().mean(0), torch.full((4,), 0.25), atol=0.05, rtol=0)
    assert strict.square().mean(0)[0] > 0.8
    assert strict.square().mean(0)[2:].max() < 0.01
    assert not torch.equal(strict, data_directions(400, vectors, seed=2))


def test_controls_fire_about_as_often():
    density = torch.logspace(-4, -0.5, 40)
    density[::7] = 0
    controls = matched_latents(density, [20], n=3, seed=0)
    assert len(set(controls)) == 3
    assert 20 not in controls
    ratio = density[list(controls)] / density[20]
    assert (ratio.log10().abs() < 0.9).all()
    with pytest.raises(ValueError, match="never fires"):
        matched_latents(density, [7], n=3)
    with pytest.raises(ValueError, match="33 other live"):
        matched_latents(density, [20], n=34)
