"""Laws of every autoencoder: units, sparsity, constraints, thresholds, recovery of known parts."""

import json

import pytest
import torch
import torch.nn.functional as F

from autoencoders import sae as sae_module
from autoencoders.fit import fit_autoencoder
from autoencoders.matching import mean_correlation_coefficient
from autoencoders.planted import PlantedDictionary
from autoencoders.sae import (
    ARCHITECTURES,
    BatchTopK,
    Gated,
    JumpReLU,
    MatryoshkaBatchTopK,
    TopK,
    Vanilla,
    build_autoencoder,
    geometric_median,
)

D_IN, N_LATENTS, K = 16, 64, 4
EVERY = sorted(ARCHITECTURES)


def built(architecture, **options):
    if "k" not in options and architecture not in ("vanilla", "gated"):
        options["k"] = K
    return build_autoencoder(architecture, d_in=D_IN, n_latents=N_LATENTS, **options)


def activations(n_rows=400, seed=0):
    return PlantedDictionary.draw(D_IN, 32, 3, seed).sample(n_rows, seed + 1) * 2.5 + 0.3


def in_use(architecture, x):
    """Fitted to data, and off its symmetric beginning."""
    torch.manual_seed(0)
    sae = built(architecture)
    sae.initialise(x)
    with torch.no_grad():
        sae.b_enc.add_(0.1 * torch.randn(N_LATENTS))
        sae.W_enc.add_(0.05 * torch.randn(N_LATENTS, D_IN))
        if sae.trains_threshold:
            sae.threshold.add_(0.1 * torch.randn(N_LATENTS))
    sae.calibrate([x])
    return sae


@pytest.mark.parametrize("architecture", EVERY)
def test_sparse_codes_are_the_dense_ones(architecture):
    x = activations()
    sae = in_use(architecture, x)
    dense, codes = sae.encode(x), sae.encode_sparse(x)
    assert (dense >= 0).all()
    assert (codes.value > 0).all()
    assert (dense > 0).any()
    torch.testing.assert_close(codes.dense(), dense)
    places = codes.row * N_LATENTS + codes.latent
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("architecture", EVERY)
def test_forward_decodes_what_is_encoded_with_and_without_gradients(architecture):
    x = activations(60).view(3, 20, D_IN)
    sae = in_use(architecture, x.flatten(0, 1))
    expected = sae.decode(sae.encode(x))
    torch.testing.assert_close(sae(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(sae(x), expected)
        assert sae(x[:0]).shape == (0, 20, D_IN)


@pytest.mark.parametrize("architecture", EVERY)
def test_a_code_counts_in_units_of_the_network(architecture):
    x = activations()
    sae = in_use(architecture, x)
    codes = sae.encode(x[:5])
    more = codes.clone()
    more[:, 7] += 0.8
    moved = sae.decode(more) - sae.decode(codes)
    torch.testing.assert_close(moved, 0.8 * sae.directions[7].expand(5, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.directions.norm(dim=-1), torch.ones(N_LATENTS))


@pytest.mark.parametrize("architecture", EVERY)
def test_the_unit_of_activations_does_not_matter(architecture):
    x = activations()
    small, large = in_use(architecture, x), in_use(architecture, 100 * x)
    torch.testing.assert_close(large.encode(100 * x), 100 * small.encode(x), rtol=1e-3, atol=1e-2)
    is_dead = torch.arange(N_LATENTS) < 3
    for name in ("total", "fvu", "auxiliary", "sparsity", "l0"):
        one, other = (
            getattr(sae.loss(data, is_dead), name) for sae, data in ((small, x), (large, 100 * x))
        )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_low_precision_activations_train_full_precision_weights(architecture):
    x = activations()
    sae = in_use(architecture, x)
    half = x.bfloat16()
    assert sae(half).dtype == torch.bfloat16
    found, expected = sae.loss(half).total, sae.loss(half.float()).total
    assert torch.equal(found, expected)
    found.backward()
    assert all(p.grad.dtype == torch.float32 for p in sae.parameters() if p.grad is not None)
    assert sae.W_enc.grad.norm() > 0


@pytest.mark.parametrize("architecture", EVERY)
def test_it_is_rebuilt_from_plain_hyper_parameters_and_its_state(architecture):
    x = activations()
    sae = in_use(architecture, x)
    again = build_autoencoder(architecture, **json.loads(json.dumps(sae.hyper_parameters)))
    again.load_state_dict(sae.state_dict())
    assert again.is_initialised
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.loss(x).total, sae.loss(x).total)


@pytest.mark.parametrize("architecture", EVERY)
def test_fvu_is_one_where_nothing_but_the_mean_is_known(architecture):
    x = activations()
    sae = in_use(architecture, x)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1.0)
        sae.b_dec.copy_((x * sae.scale).mean(0))
    loss = sae.loss(x)
    assert float(loss.fvu.detach()) == pytest.approx(1, abs=1e-4)
    assert not loss.fired.any()
    assert float(loss.l0) == 0
    assert float(loss.auxiliary) == 0


@pytest.mark.parametrize("architecture", EVERY)
def test_the_first_reconstruction_has_the_best_length(architecture):
    x = activations()
    torch.manual_seed(0)
    sae = built(architecture)
    sae.initialise(x)
    torch.testing.assert_close((x * sae.scale).norm(dim=-1).mean(), torch.tensor(D_IN**0.5))
    bias = (sae.b_dec / sae.scale).detach()
    with torch.no_grad():
        error, rest = x - sae(x), sae(x) - bias
    # Least squares: the error is orthogonal to what was scaled.
    assert abs(float((error * rest).sum() / (rest * rest).sum())) < 1e-2
    assert float(error.square().sum()) < float((x - bias).square().sum())


def test_steps_do_not_change_the_length_of_directions():
    x = activations()
    sae = in_use("batch_topk", x)
    sae.loss(x).total.backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() > 1e-4
    sae.constrain_gradients()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6
    with torch.no_grad():
        sae.W_dec.sub_(0.5 * sae.W_dec.grad)
    sae.constrain_weights()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N_LATENTS))


@pytest.mark.parametrize("kind", [BatchTopK, MatryoshkaBatchTopK])
def test_calibrated_on_a_stream_k_latents_are_active_on_average(kind, monkeypatch):
    x = activations(3000)
    torch.manual_seed(0)
    sae = kind(D_IN, N_LATENTS, k=K)
    sae.initialise(x[:500])
    sae.calibrate(part for part in x.split(700))
    assert len(sae.encode_sparse(x).value) == K * len(x)
    whole = sae.threshold.clone()
    # So little memory that the bound must rise, and still exact.
    monkeypatch.setattr(sae_module, "MAX_CALIBRATION_ENTRIES", 2 * K * len(x) + 8)
    sae.calibrate(part for part in x.split(700))
    torch.testing.assert_close(sae.threshold, whole, rtol=1e-5, atol=0)
    monkeypatch.setattr(sae_module, "MAX_CALIBRATION_ENTRIES", K * len(x))
    with pytest.raises(ValueError, match=f"at most {len(x) // 2} activations"):
        sae.calibrate(part for part in x.split(700))
    with pytest.raises(ValueError, match="no activations"):
        sae.calibrate([])


def test_a_running_average_of_the_smallest_kept_entry_is_no_threshold():
    planted = PlantedDictionary.draw(D_IN, 32, K, 0)
    torch.manual_seed(0)
    sae = built("batch_topk")
    x = planted.sample(8192, 1)
    sae.initialise(x)
    average = 0.0
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(150):
        batch = x[step % 16 * 512 :][:512]
        sae.loss(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.constrain_weights()
        smallest = F.linear(sae.centred(batch), sae.W_enc, sae.b_enc).flatten().topk(K * 512)
        average = 0.99 * average + 0.01 * float(smallest.values.min().detach())

    def l0(unseen):
        return len(sae.encode_sparse(unseen).value) / len(unseen)

    sae.calibrate([planted.sample(8192, 2)])
    unseen = planted.sample(8192, 3)
    assert l0(unseen) == pytest.approx(K, rel=0.01)
    sae.threshold.fill_(average)
    assert abs(l0(unseen) / K - 1) > 0.05


def test_each_activation_has_its_own_k_at_first_and_shares_later():
    x = activations(20)
    x[0] *= 30
    torch.manual_seed(0)
    sae = built("batch_topk", equal_share=0.5)
    sae.initialise(x)
    centred = sae.centred(x).detach()
    for share, largest in ((0.2, K), (0.9, 3 * K)):
        place, _ = sae._train_entries(centred, share)
        counts = torch.bincount(place // N_LATENTS, minlength=20)
        assert counts.sum() == K * 20
        assert counts[0] == counts.max() >= largest
        assert (counts == K).all() == (share < 0.5)


def test_prefixes_of_a_matryoshka_are_autoencoders():
    x = activations()
    sae = in_use("matryoshka_batch_topk", x)
    assert sae.prefixes == (2, 6, 14, 30, 64)
    # Of a dictionary whose later groups are silent, every later prefix costs the same.
    with torch.no_grad():
        sae.b_enc[2:] = -1e3
    loss = sae.loss(x)
    torch.testing.assert_close(loss.total, loss.fvu)
    with pytest.raises(ValueError, match="add up to 1"):
        MatryoshkaBatchTopK(D_IN, N_LATENTS, group_fractions=[0.5, 0.4])
    with pytest.raises(ValueError, match="no group empty"):
        MatryoshkaBatchTopK(D_IN, 15, k=K)


def test_thresholds_feel_entries_on_both_sides():
    # z uniform on 0 .. 4: L0 = P(z > theta), so that d L0 / d theta = -1/4.
    z = torch.linspace(0, 4, 4001)[:, None]
    sae = JumpReLU(1, 1, k=1, bandwidth=0.5)
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.W_dec.fill_(1.0)
        sae.threshold.fill_(1.0)
    loss = sae.loss(z)
    assert float(loss.l0) == pytest.approx(0.75, abs=1e-3)
    (gradient,) = torch.autograd.grad(loss.sparsity, sae.threshold)
    assert float(gradient) == pytest.approx(2 * (0.75 - 1) * -0.25, rel=1e-2)
    # Equation 11: d f / d theta = -theta / epsilon within the kernel; codes above theta are exact,
    # so that the error is z below it and 0 above: mean over the kernel's lower half.
    loss = sae.loss(z)
    (gradient,) = torch.autograd.grad(loss.fvu, sae.threshold)
    lower_half = torch.linspace(0.75, 1, 251)
    share = 0.25 / 4
    expected = share * float((2 * lower_half / 0.5).mean())
    assert float(gradient) == pytest.approx(expected, rel=1e-2)


def test_thresholds_stay_at_or_above_zero():
    sae = built("jumprelu")
    with torch.no_grad():
        sae.threshold.sub_(1.0)
    sae.constrain_weights()
    assert (sae.threshold == 0).all()


def test_gates_are_the_published_pair_of_encoders():
    x = activations()
    torch.manual_seed(0)
    sae = Gated(D_IN, N_LATENTS)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.threshold, sae.log_gate_scale):
            parameter.copy_(torch.randn_like(parameter))
    # Rajamanoharan et al., equations 6 and 7: W_mag = exp(r) W_gate.
    r = sae.log_gate_scale
    W_gate = sae.W_enc * (-r).exp()[:, None]
    b_gate = (sae.b_enc - sae.threshold) * (-r).exp()
    is_open = F.linear(x, W_gate, b_gate) > 0
    magnitude = F.linear(x, W_gate * r.exp()[:, None], sae.b_enc).relu()
    torch.testing.assert_close(sae.encode(x), is_open * magnitude)
    assert (is_open & (magnitude == 0)).any()
    assert (~is_open & (magnitude > 0)).any()


@pytest.mark.parametrize("kind", [JumpReLU, Vanilla, Gated])
def test_penalties_warm_up(kind):
    x = activations()
    torch.manual_seed(0)
    sae = kind(D_IN, N_LATENTS, warm_up=0.5)
    sae.initialise(x)
    none, half, full, later = (
        float(sae.loss(x, step_fraction=share).total.detach()) for share in (0, 0.25, 0.5, 1)
    )
    assert none < half < full == later
    assert half - none == pytest.approx(full - half, rel=1e-3)


def test_a_shorter_decoder_does_not_evade_the_penalty():
    x = activations()
    sae = in_use("vanilla", x)
    with torch.no_grad():
        whole = sae.loss(x)
        sae.W_enc.mul_(0.5)
        sae.b_enc.mul_(0.5)
        sae.W_dec.mul_(2.0)
        evasive = sae.loss(x)
    torch.testing.assert_close(evasive.fvu, whole.fvu)
    torch.testing.assert_close(evasive.sparsity, whole.sparsity)


def test_the_geometric_median_ignores_how_far_outliers_are():
    points = torch.zeros(9, 2)
    points[:4] = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(points), torch.zeros(2), atol=1e-3, rtol=0)
    points[8] = torch.tensor([1e4, 1e4])
    assert geometric_median(points).norm() < 0.1
    assert points.mean(0).norm() > 1e3


def test_what_cannot_work_says_what_would():
    with pytest.raises(ValueError, match="choose one of batch_topk, topk"):
        build_autoencoder("dense", d_in=2, n_latents=2)
    for kind, k in ((TopK, 65), (BatchTopK, 65), (JumpReLU, 0)):
        with pytest.raises(ValueError, match=f"k is {k}"):
            kind(D_IN, N_LATENTS, k=k)
    with pytest.raises(ValueError, match="d_in is 0"):
        Vanilla(0, N_LATENTS)
    for sample in (torch.ones(5, D_IN), torch.zeros(5, D_IN), torch.full((5, D_IN), torch.nan)):
        with pytest.raises(ValueError, match="differ and are finite"):
            TopK(D_IN, N_LATENTS, k=K).initialise(sample)


LEAST_RECOVERED = {
    "batch_topk": 0.98,
    "topk": 0.98,
    "matryoshka_batch_topk": 0.88,
    "jumprelu": 0.95,
    "vanilla": 0.95,
    "gated": 0.95,
}


@pytest.mark.parametrize("architecture", EVERY)
def test_a_planted_dictionary_is_found(architecture):
    planted = PlantedDictionary.draw(32, 64, 4, seed=0)
    torch.manual_seed(0)
    options = {} if architecture in ("vanilla", "gated") else {"k": 4}
    sae = build_autoencoder(architecture, d_in=32, n_latents=128, **options)
    assert mean_correlation_coefficient(sae.directions.detach(), planted.features) < 0.6
    fit_autoencoder(sae, planted.sample(8192, 1), n_steps=400, batch_size=256)
    found = mean_correlation_coefficient(sae.directions, planted.features)
    assert found > LEAST_RECOVERED[architecture]
