"""Fitting in memory: it learns, repeats itself, and leaves the global generator alone."""

import pytest
import torch

from autoencoders.fit import fit_autoencoder, trapezoid
from autoencoders.sae import build_autoencoder


def made(seed=0):
    torch.manual_seed(seed)
    return build_autoencoder("batch_topk", d_in=8, n_latents=32, k=3)


def sparse_vectors(n=2000):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1)
    codes = torch.rand(n, 16, generator=generator)
    return (codes * (torch.rand(n, 16, generator=generator) < 0.12)) @ directions


def test_more_steps_leave_less_unexplained_and_rows_stay_unit():
    x = sparse_vectors()
    saes = [fit_autoencoder(made(), x, n_steps, batch_size=256) for n_steps in (1, 200)]
    few, many = (float((x - sae(x)).square().sum()) for sae in saes)
    assert many < 0.6 * few
    torch.testing.assert_close(saes[1].directions.norm(dim=1), torch.ones(32))


def test_equal_seeds_give_equal_autoencoders_and_the_global_generator_is_untouched():
    x = sparse_vectors(500)
    saes = []
    for _ in range(2):
        sae = made()
        before = torch.random.get_rng_state()
        saes.append(fit_autoencoder(sae, x, 10, seed=3))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(saes[0].W_enc, saes[1].W_enc)


def test_a_trained_one_goes_on_from_where_it_is():
    x = sparse_vectors(500)
    sae = fit_autoencoder(made(), x, 20)
    before = sae.W_dec.detach().clone()
    fit_autoencoder(sae, x, 1)
    assert 0 < float((sae.W_dec - before).abs().max()) < 0.05


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factors = [trapezoid(step, 100, 0.1, 0.2) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[10] == 1
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0


@pytest.mark.parametrize(("n_steps", "shares"), [(0, (0.1, 0.1)), (10, (0.6, 0.6))])
def test_a_run_without_end_or_with_too_much_in_it_is_refused(n_steps, shares):
    with pytest.raises(ValueError, match="run"):
        trapezoid(0, n_steps, *shares)
