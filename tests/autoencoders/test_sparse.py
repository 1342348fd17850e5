"""Sparse arithmetic is dense arithmetic: same losses, same gradients."""

import pytest
import torch
import torch.nn.functional as F

from autoencoders import sparse
from autoencoders.sae import (
    DENSE_AUXILIARY_SETS,
    BatchTopK,
    MatryoshkaBatchTopK,
    TopK,
    keep_largest,
)
from autoencoders.sparse import Entries, entries_above, largest_of_all, nested_errors

D_IN, N_LATENTS, K, N_ROWS = 24, 96, 5, 200
FEW, MANY = 9, 90


def perturbed(kind, **options):
    """An autoencoder in no special state, and activations off the origin."""
    torch.manual_seed(0)
    sae = kind(d_in=D_IN, n_latents=N_LATENTS, k=K, **options)
    x = 3 * torch.randn(N_ROWS, D_IN) + 1
    sae.initialise(x)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_enc, sae.b_dec):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sae, x


def dense_loss(sae, x, is_dead):
    """The published equations, with matrices full of zeros."""
    centred = x * sae.scale - sae.b_dec
    codes = F.linear(centred, sae.W_enc, sae.b_enc).relu()
    if isinstance(sae, BatchTopK):
        kept = keep_largest(codes.flatten(), K * len(x)).view_as(codes)
    else:
        kept = keep_largest(codes, K)
    ends = getattr(sae, "prefixes", (N_LATENTS,))
    errors = [centred - kept[:, :end] @ sae.W_dec[:end] for end in ends]
    variance = (x * sae.scale).var(0, unbiased=False).sum()
    total = sum((error**2).sum(-1).mean() / variance for error in errors) / len(ends)
    if is_dead is not None and is_dead.any():
        error = errors[-1].detach()
        dead = keep_largest(codes * is_dead, D_IN // 2)
        left = ((error - dead @ sae.W_dec) ** 2).sum()
        total = total + left / ((error - error.mean(0)) ** 2).sum() / 32
    return total, kept


@pytest.mark.parametrize("n_dead", [None, 0, FEW, 30, MANY])
@pytest.mark.parametrize("kind", [TopK, BatchTopK, MatryoshkaBatchTopK])
def test_loss_and_gradients_are_those_of_dense_arithmetic(kind, n_dead):
    assert D_IN // 2 * DENSE_AUXILIARY_SETS < MANY  # both ways to the auxiliary loss
    sae, x = perturbed(kind)
    is_dead = None if n_dead is None else torch.randperm(N_LATENTS) < n_dead
    expected, kept = dense_loss(sae, x, is_dead)
    expected.backward()
    dense = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    found = sae.loss(x, is_dead)
    found.total.backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=0)
    assert torch.equal(found.fired, (kept > 0).any(0))
    assert float(found.l0) == pytest.approx(float((kept > 0).sum() / len(x)))
    for name, parameter in sae.named_parameters():
        difference = (parameter.grad - dense[name]).norm() / dense[name].norm()
        assert difference < 1e-5, f"{name}: {float(difference)}"


def test_dead_latents_get_a_gradient_in_their_encoders():
    # A fused backward pass that drops it leaves them dead for good.
    sae, x = perturbed(BatchTopK)
    with torch.no_grad():
        sae.W_enc[:FEW] *= 0.2
    is_dead = torch.arange(N_LATENTS) < FEW
    fired = sae.loss(x, is_dead).fired
    assert not fired[:FEW].any()
    for flags, moves in ((None, False), (is_dead, True)):
        sae.zero_grad()
        sae.loss(x, flags).total.backward()
        assert bool((sae.W_enc.grad[:FEW].norm(dim=-1) > 0).all()) == moves


@pytest.mark.parametrize("cutoff", [0.0, 0.5, 2.0, 1e6])
def test_the_largest_are_found_whatever_the_guess(cutoff):
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(50, D_IN), torch.randn(N_LATENTS, D_IN), torch.randn(N_LATENTS)
    pre = F.linear(x, W_enc, b_enc).relu().flatten()
    place, value = largest_of_all(x, W_enc, b_enc, 400, cutoff)
    assert torch.equal(place, pre.topk(400).indices.sort().values)
    torch.testing.assert_close(value, pre[place])


def test_all_positive_entries_where_there_are_too_few():
    x, W_enc = torch.randn(10, D_IN), torch.randn(N_LATENTS, D_IN)
    b_enc = torch.full((N_LATENTS,), -1e3)
    b_enc[0] = 1e3
    place, value = largest_of_all(x, W_enc, b_enc, 400, 0.3)
    assert torch.equal(place, N_LATENTS * torch.arange(10))
    assert (value > 0).all()


def test_blocks_do_not_show(monkeypatch):
    x, W_enc, b_enc = torch.randn(50, D_IN), torch.randn(N_LATENTS, D_IN), torch.zeros(N_LATENTS)
    whole = entries_above(x, W_enc, b_enc, 0.2)
    monkeypatch.setattr(sparse, "BLOCK_ENTRIES", 7 * N_LATENTS)
    parts = entries_above(x, W_enc, b_enc, 0.2)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


def test_no_vectors_have_no_entries():
    place, value = entries_above(
        torch.randn(0, D_IN), torch.randn(N_LATENTS, D_IN), torch.zeros(N_LATENTS), 0.0
    )
    assert len(place) == len(value) == 0


def test_errors_shrink_to_what_all_groups_leave():
    target = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    parts = torch.randn(3 * 6, 4, dtype=torch.float64, requires_grad=True)
    squares, left = nested_errors(target, parts, 3)
    assert torch.allclose(left, target - parts.view(3, 6, 4).sum(0))
    assert torch.allclose(squares[-1], left.square().sum())
    assert torch.autograd.gradcheck(lambda a, b: nested_errors(a, b, 3)[0], (target, parts))


def test_entries_differentiate_with_respect_to_everything():
    torch.manual_seed(0)
    entries = Entries(
        bag=torch.tensor([0, 0, 1, 4, 5]),
        latent=torch.tensor([1, 3, 3, 0, 2]),
        n_rows=3,
        n_latents=4,
        n_groups=2,
    )
    x, W_enc, b_enc, centre, W_dec = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5), (4, 5), (4,), (5,), (4, 5))
    )

    def codes(x, W_enc, b_enc, centre):
        # 9: far from where ReLU has no derivative.
        fixed = (x - centre).detach()
        pre = F.linear(fixed, W_enc, b_enc + 9)[entries.row, entries.latent].detach()
        return sparse.encode_entries(x - centre.detach(), W_enc, b_enc, centre, entries, pre)

    def function(x, W_enc, b_enc, centre, W_dec):
        return sparse.decode_entries(codes(x, W_enc, b_enc, centre), W_dec, entries)

    assert torch.autograd.gradcheck(function, (x, W_enc, b_enc, centre, W_dec))
