"""Sparse autoencoders: activations as few, named parts. One class per way of being sparse.

With s the input scale, z = W_enc (s x - b_dec) + b_enc, f a sparse selection of ReLU(z), and
x^ = (W_dec^T f + b_dec) / s with decoder rows of unit length. Activations and codes are in the
network's own units outside: codes are f / s, so that adding c times a latent's direction to an
activation is adding c to its code. Parameters and thresholds live inside, in scaled units, in which
activations have the length sqrt(d) on average.

Every class but :class:`TopK` encodes alike once it is trained: f = ReLU(z) where z > threshold.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from autoencoders.sparse import (
    Entries,
    decode_entries,
    encode_entries,
    entries_above,
    largest_of_all,
    largest_of_rows,
    nested_errors,
)

SHORTLIST_SHARE = 0.8
"""Entries above this share of the last batch's smallest kept one are searched for the largest."""
FIRST_ROWS = 4096
"""Activations, about, that the first threshold and length of encoder directions are fitted to."""
DENSE_AUXILIARY_SETS = 4
"""With more dead latents than this many times ``n_auxiliary``, sparse arithmetic is cheaper."""
MAX_CALIBRATION_ENTRIES = 2**25
"""Candidates for the threshold that are held while calibrating; 128 MiB of float32."""


@dataclass(frozen=True)
class Codes:
    """Sparse codes of some vectors: active latents only, sorted by row, then by latent."""

    row: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    """In the network's units; always above 0."""
    n_rows: int
    n_latents: int

    def dense(self) -> Float[Tensor, "row latent"]:
        """The same numbers with their zeros."""
        codes = self.value.new_zeros(self.n_rows, self.n_latents)
        codes[self.row, self.latent] = self.value
        return codes


@dataclass(frozen=True)
class SAELoss:
    """What a batch costs, in shares of the data's variance, and which latents it used."""

    total: Float[Tensor, ""]
    """To be minimised."""
    fvu: Float[Tensor, ""]
    """Squared error over the variance measured at initialisation: linear in the batch, and
    comparable between layers and policies."""
    auxiliary: Float[Tensor, ""]
    """What dead latents leave unexplained of the error; 0 while none is dead."""
    sparsity: Float[Tensor, ""]
    """Penalty on codes, unweighted; 0 where their number is fixed."""
    l0: Float[Tensor, ""]
    """Active latents of a vector, on average."""
    fired: Bool[Tensor, " latent"]
    """Latents that were active."""


class SparseAutoencoder(nn.Module, ABC):
    """What all of them share.

    A new one has random unit directions, encoder tied to decoder, and expects activations that need
    no scaling, of unit variance in each dimension; :meth:`initialise` fits it to data.

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture: ClassVar[str]
    trains_threshold: ClassVar[bool] = False
    W_enc: Float[Tensor, "latent dim"]
    b_enc: Float[Tensor, " latent"]
    W_dec: Float[Tensor, "latent dim"]
    b_dec: Float[Tensor, " dim"]
    scale: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    threshold: Float[Tensor, " latent"]
    is_initialised: Bool[Tensor, ""]

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("n_latents", n_latents)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.d_in = d_in
        self.n_latents = n_latents
        self.auxiliary_weight = auxiliary_weight
        self.n_auxiliary = max(d_in // 2, 1) if n_auxiliary is None else n_auxiliary
        self.hyper_parameters: dict[str, Any] = {
            "d_in": d_in,
            "n_latents": n_latents,
            "auxiliary_weight": auxiliary_weight,
            "n_auxiliary": n_auxiliary,
        }
        directions = F.normalize(torch.randn(n_latents, d_in), dim=-1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("variance", torch.tensor(float(d_in)))
        self.register_buffer("is_initialised", torch.zeros((), dtype=torch.bool))
        if self.trains_threshold:
            self.threshold = nn.Parameter(torch.zeros(n_latents))
        else:
            self.register_buffer("threshold", torch.zeros(n_latents))

    @property
    def directions(self) -> Float[Tensor, "latent dim"]:
        """Unit vectors: adding c times one to an activation adds c to its latent's code."""
        return self.W_dec

    def encode(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading latent"]:
        """Codes of activations, as at inference."""
        return self._select(self._pre_activations(self.centred(x))) / self.scale

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "row dim"]) -> Codes:
        """The codes of :meth:`encode` without their zeros, and without ever holding those."""
        place, value = self._select_entries(self.centred(x))
        row, latent = place // self.n_latents, place % self.n_latents
        return Codes(row, latent, value / self.scale, len(x), self.n_latents)

    def decode(self, codes: Float[Tensor, "*leading latent"]) -> Float[Tensor, "*leading dim"]:
        """Activations that codes stand for."""
        return codes @ self.W_dec + self.b_dec / self.scale

    def forward(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
        """Reconstruct activations, in their own precision; sparsely where no gradient is asked."""
        if torch.is_grad_enabled():
            return self.decode(self.encode(x)).to(x.dtype)
        codes = self.encode_sparse(x.reshape(-1, self.d_in))
        entries = Entries(codes.row, codes.latent, codes.n_rows, codes.n_latents)
        found = entries.sum_by_bag(codes.value, self.W_dec) + self.b_dec / self.scale
        return found.view_as(x).to(x.dtype)

    @abstractmethod
    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None = None,
        step_fraction: float = 1.0,
    ) -> SAELoss:
        """Cost of a batch of activations.

        Args:
            x: Activations in the network's units.
            is_dead: Latents that have been silent for long; they learn from the error. None leaves
                the auxiliary loss out.
            step_fraction: Share of the training that is over; penalties on codes warm up.
        """

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "row dim"]) -> None:
        """Fit scale, centre and variance to data, and tie the encoder to the decoder.

        Encoder directions are those of the decoder times one factor, with which the first
        reconstruction has the least error: overlapping directions would add up to too much, and
        latents die while that is unlearned.

        Args:
            sample: Training activations, some thousands.

        Raises:
            ValueError: If the sample has no variance or holds what is not finite.
        """
        sample = sample.to(self.W_enc.device, self.W_enc.dtype)
        scale = math.sqrt(self.d_in) / sample.norm(dim=-1).mean()
        scaled = sample * scale
        variance = float((scaled - scaled.mean(0)).square().sum(-1).mean())
        if not 0 < variance < math.inf:
            raise ValueError(
                f"the variance of {len(sample)} activations, scaled by {float(scale):g}, is "
                f"{variance}; give several that differ and are finite"
            )
        self.scale.copy_(scale)
        self.variance.fill_(variance)
        self.is_initialised.fill_(True)
        self.b_dec.copy_(geometric_median(scaled))
        self.b_enc.zero_()
        self.constrain_weights()
        self.W_enc.copy_(self.W_dec)
        some = sample[:: max(len(sample) // FIRST_ROWS, 1)]
        self._fit_threshold(some)
        centred = self.centred(some)
        place, value = self._select_entries(centred)
        first = self._entries(place, len(centred)).sum_by_bag(value, self.W_dec)
        factor = (first * centred).sum() / first.square().sum().clamp_min(1e-12)
        self.W_enc.mul_(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "row dim"]]) -> None:
        """Set what inference needs to know of held-out activations; of most architectures nothing.

        Args:
            batches: Activations, read once.
        """

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Remove the part of the decoder's gradient that would only change its rows' length."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = (gradient * self.W_dec).sum(-1, keepdim=True)
            gradient.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Give the decoder's rows unit length again, after every step of an optimiser."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    def _fit_threshold(self, sample: Float[Tensor, "row dim"]) -> None:
        """Set the threshold of an untrained autoencoder."""
        self.calibrate([sample])

    def centred(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
        """Activations in scaled units, around ``b_dec``."""
        return x.to(self.W_enc.dtype) * self.scale - self.b_dec

    def _pre_activations(
        self, centred: Float[Tensor, "*leading dim"]
    ) -> Float[Tensor, "*leading latent"]:
        return F.linear(centred, self.W_enc, self.b_enc)

    def _select(self, pre: Float[Tensor, "*leading latent"]) -> Float[Tensor, "*leading latent"]:
        """Codes at inference."""
        return pre.relu() * (pre > self.threshold)

    def _select_entries(
        self, centred: Float[Tensor, "row dim"]
    ) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        """Where codes are not 0 at inference, ascending in the flattened matrix, and what."""
        return entries_above(centred, self.W_enc, self.b_enc, self.threshold.clamp_min(0))

    def _fvu(self, error: Float[Tensor, "*leading dim"]) -> Float[Tensor, ""]:
        return error.square().sum() / (self.variance * (error.numel() // self.d_in))

    def _auxiliary(
        self,
        centred: Float[Tensor, "batch dim"],
        error: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None,
    ) -> Float[Tensor, ""]:
        """||e - e^||^2 / ||e - mean e||^2, e^ from the dead (Gao, arXiv:2406.04093, A.2).

        e^ sums the directions of the largest ``n_auxiliary`` dead latents of each vector, whose
        encoders learn as well: otherwise the dead would never come back.
        """
        if is_dead is None or not is_dead.any():
            return error.new_zeros(())
        error = error.detach()
        if is_dead.is_cuda or is_dead.sum() > DENSE_AUXILIARY_SETS * self.n_auxiliary:
            # The living get a bias that keeps them out.
            bias = self.b_enc.masked_fill(~is_dead, -math.inf).detach()
            n = min(self.n_auxiliary, self.n_latents)
            fixed = centred.detach()
            place, value = largest_of_rows(fixed, self.W_enc, bias, n)
            entries = self._entries(place, len(fixed))
            value = encode_entries(fixed, self.W_enc, self.b_enc, self.b_dec, entries, value)
            part = decode_entries(value, self.W_dec, entries)
        else:
            dead = is_dead.nonzero()[:, 0]
            W_enc, W_dec = self.W_enc.index_select(0, dead), self.W_dec.index_select(0, dead)
            codes = F.linear(centred, W_enc, self.b_enc.index_select(0, dead)).relu()
            if len(dead) > self.n_auxiliary:
                codes = keep_largest(codes, self.n_auxiliary)
            part = codes @ W_dec
        left = (error - part).square().sum()
        return left / (error - error.mean(0)).square().sum().clamp_min(1e-12)

    def _entries(self, place: Int[Tensor, " active"], n_rows: int) -> Entries:
        return Entries(place // self.n_latents, place % self.n_latents, n_rows, self.n_latents)


class TopK(SparseAutoencoder):
    """The k largest latents of every activation (Gao et al., arXiv:2406.04093).

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        k: Active latents of an activation.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "topk"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int = 32,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        if not 1 <= k <= n_latents:
            raise ValueError(f"k is {k}; it must be between 1 and n_latents = {n_latents}")
        super().__init__(d_in, n_latents, auxiliary_weight, n_auxiliary)
        self.k = k
        self.hyper_parameters["k"] = k

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None = None,
        step_fraction: float = 1.0,
    ) -> SAELoss:
        """Share of the variance unexplained, and what the dead could add."""
        centred = self.centred(x)
        fixed = centred.detach()
        place, value = self._train_entries(fixed, step_fraction)
        entries, value = self._bags(place, value, len(x))
        value = encode_entries(fixed, self.W_enc, self.b_enc, self.b_dec, entries, value)
        parts = decode_entries(value, self.W_dec, entries)
        squares, error = nested_errors(centred, parts, entries.n_groups)
        shares = squares / (self.variance * len(x))
        auxiliary = self._auxiliary(centred, error, is_dead)
        value = value.detach()
        uses = value.new_zeros(self.n_latents).index_add_(0, entries.latent, value)
        return SAELoss(
            total=shares.mean() + self.auxiliary_weight * auxiliary,
            fvu=shares[-1],
            auxiliary=auxiliary,
            sparsity=torch.zeros_like(auxiliary),
            l0=(value > 0).sum() / len(x),
            fired=uses > 0,
        )

    def _select(self, pre: Float[Tensor, "*leading latent"]) -> Float[Tensor, "*leading latent"]:
        return keep_largest(pre.relu(), self.k)

    def _select_entries(
        self, centred: Float[Tensor, "row dim"]
    ) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        place, value = largest_of_rows(centred, self.W_enc, self.b_enc, self.k)
        return place[value > 0], value[value > 0]

    def _train_entries(
        self, centred: Float[Tensor, "batch dim"], step_fraction: float
    ) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        """Where codes may be other than 0 in training, ascending, and what."""
        return largest_of_rows(centred, self.W_enc, self.b_enc, self.k)

    def _bags(
        self, place: Int[Tensor, " active"], value: Float[Tensor, " active"], n_rows: int
    ) -> tuple[Entries, Float[Tensor, " active"]]:
        """What is to be summed together, and values in that order."""
        return self._entries(place, n_rows), value


class BatchTopK(TopK):
    """The B k largest entries of a batch of B; at inference, what exceeds one threshold.

    Bussmann et al., arXiv:2412.06410. A running average of each batch's smallest kept entry, as
    published, keeps another number of latents than k at inference; the threshold here is an exact
    quantile of held-out data. Calibrate before reading codes.

    Other than published, each activation keeps k of its own in the first part of a training: with a
    common budget from the start, fewer features of a planted dictionary are found
    (``benchmarks/sae_recovery.py``).

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        k: Active latents of an activation, on average.
        equal_share: Share of the training in which each activation has exactly k.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "batch_topk"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int = 32,
        equal_share: float = 0.5,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, k, auxiliary_weight, n_auxiliary)
        self.equal_share = equal_share
        self.hyper_parameters["equal_share"] = equal_share
        self._cutoff = 0.0

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "row dim"]]) -> None:
        """Set the threshold so that these activations have exactly k active latents on average.

        One pass. Of N activations the threshold lies between the N k-th and the next largest
        entry. All entries above a bound are held; whenever they are more than
        ``MAX_CALIBRATION_ENTRIES``, the bound rises to their median. The result is exact as long as
        N k entries are held at the end, whatever the order of the activations. Without N k positive
        entries the threshold is 0.

        Args:
            batches: Activations, read once.

        Raises:
            ValueError: If there are none, or too many.
        """
        threshold = exact_threshold(self, batches, self.k)
        self.threshold.fill_(threshold)

    def _select(self, pre: Float[Tensor, "*leading latent"]) -> Float[Tensor, "*leading latent"]:
        return SparseAutoencoder._select(self, pre)

    def _select_entries(
        self, centred: Float[Tensor, "row dim"]
    ) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        return SparseAutoencoder._select_entries(self, centred)

    def _train_entries(
        self, centred: Float[Tensor, "batch dim"], step_fraction: float
    ) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
        if step_fraction < self.equal_share:
            return super()._train_entries(centred, step_fraction)
        n = self.k * len(centred)
        place, value = largest_of_all(centred, self.W_enc, self.b_enc, n, self._cutoff)
        if not value.is_cuda:
            self._cutoff = SHORTLIST_SHARE * float(value.min()) if len(value) == n else 0.0
        return place, value


class MatryoshkaBatchTopK(BatchTopK):
    """Nested dictionaries: the first latents alone must reconstruct, too (arXiv:2503.17547).

    The objective is the mean FVU over prefixes of the latents, so that early ones hold what is
    coarse and later ones cannot absorb it.

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        k: Active latents of an activation, on average.
        group_fractions: Share of the latents that each prefix adds to the one before.
        equal_share: Share of the training in which each activation has exactly k.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "matryoshka_batch_topk"
    group: Int[Tensor, " latent"]

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int = 32,
        group_fractions: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32),
        equal_share: float = 0.5,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, k, equal_share, auxiliary_weight, n_auxiliary)
        ends = [round(share * n_latents) for share in accumulate(group_fractions)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        if not sizes or min(sizes) < 1 or ends[-1] != n_latents:
            raise ValueError(
                f"group_fractions {list(group_fractions)} make groups of {sizes} of {n_latents} "
                "latents; they must add up to 1 and leave no group empty"
            )
        self.prefixes = tuple(ends)
        self.hyper_parameters["group_fractions"] = [float(share) for share in group_fractions]
        self.register_buffer(
            "group",
            torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
            persistent=False,
        )

    def _bags(
        self, place: Int[Tensor, " active"], value: Float[Tensor, " active"], n_rows: int
    ) -> tuple[Entries, Float[Tensor, " active"]]:
        row, latent = place // self.n_latents, place % self.n_latents
        bag, order = (self.group[latent] * n_rows + row).sort(stable=True)
        groups = len(self.prefixes)
        return Entries(bag, latent[order], n_rows, self.n_latents, groups), value[order]


class JumpReLU(SparseAutoencoder):
    """A learned threshold for every latent (Rajamanoharan et al., arXiv:2407.14435).

    Thresholds have no true gradient; its estimate counts the entries within half a bandwidth, of
    the values before any ReLU: above and below the threshold.

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        k: Active latents of an activation, on average, that the penalty (L0 / k - 1)^2 aims at.
        sparsity_weight: lambda, weight of the penalty.
        bandwidth: epsilon, width of the kernel in scaled units.
        warm_up: Share of the training over which lambda grows from 0.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "jumprelu"
    trains_threshold = True

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int = 32,
        sparsity_weight: float = 3.0,
        bandwidth: float = 1.0,
        warm_up: float = 0.1,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        super().__init__(d_in, n_latents, auxiliary_weight, n_auxiliary)
        self.k = k
        self.sparsity_weight = sparsity_weight
        self.bandwidth = bandwidth
        self.warm_up = warm_up
        self.hyper_parameters |= {
            "k": k,
            "sparsity_weight": sparsity_weight,
            "bandwidth": bandwidth,
            "warm_up": warm_up,
        }

    def _fit_threshold(self, sample: Float[Tensor, "row dim"]) -> None:
        # 2 k: codes thin out while directions form, faster than a step size lets thresholds fall.
        self.threshold.fill_(exact_threshold(self, [sample], 2 * self.k))

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Unit rows, and thresholds not below 0."""
        super().constrain_weights()
        self.threshold.clamp_(min=0)

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None = None,
        step_fraction: float = 1.0,
    ) -> SAELoss:
        """FVU and the penalty on L0."""
        centred = self.centred(x)
        pre = self._pre_activations(centred)
        codes, active = _Jump.apply(pre, self.threshold, self.bandwidth)  # pyright: ignore[reportGeneralTypeIssues]
        error = centred - codes @ self.W_dec
        fvu = self._fvu(error)
        auxiliary = self._auxiliary(centred, error, is_dead)
        l0 = active.sum() / len(x)
        sparsity = (l0 / self.k - 1).square()
        weight = self.sparsity_weight * _warmed_up(step_fraction, self.warm_up)
        return SAELoss(
            total=fvu + weight * sparsity + self.auxiliary_weight * auxiliary,
            fvu=fvu,
            auxiliary=auxiliary,
            sparsity=sparsity,
            l0=l0.detach(),
            fired=(active > 0).any(0),
        )


class _Jump(torch.autograd.Function):
    """ReLU(z) H(z - theta) and H(z - theta), with estimated gradients for theta."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Any:
        is_active = pre > threshold.clamp_min(0)
        ctx.save_for_backward(pre, threshold, is_active)
        ctx.bandwidth = bandwidth
        return pre * is_active, is_active.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        pre, threshold, is_active = ctx.saved_tensors
        to_codes, to_active = gradients
        # Equations 11 and 12: the kernel is a rectangle.
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) / -ctx.bandwidth
        to_threshold = (near * (threshold * to_codes + to_active)).sum(0)
        return to_codes * is_active, to_threshold, None


class Vanilla(SparseAutoencoder):
    """ReLU codes with a penalty on their sum (Bricken et al., Towards Monosemanticity, 2023).

    The penalty is sum_i f_i ||d_i|| over the root of the data's variance: no scale of inputs or
    directions evades it.

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        sparsity_weight: lambda, weight of the penalty.
        warm_up: Share of the training over which lambda grows from 0.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "vanilla"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        sparsity_weight: float = 0.2,
        warm_up: float = 0.1,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, auxiliary_weight, n_auxiliary)
        self.sparsity_weight = sparsity_weight
        self.warm_up = warm_up
        self.hyper_parameters |= {"sparsity_weight": sparsity_weight, "warm_up": warm_up}

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None = None,
        step_fraction: float = 1.0,
    ) -> SAELoss:
        """FVU and the penalty on codes."""
        centred = self.centred(x)
        codes = self._pre_activations(centred).relu()
        error = centred - codes @ self.W_dec
        fvu = self._fvu(error)
        auxiliary = self._auxiliary(centred, error, is_dead)
        sparsity = _weighted_l1(codes, self.W_dec) / self.variance.sqrt()
        weight = self.sparsity_weight * _warmed_up(step_fraction, self.warm_up)
        active = codes > 0
        return SAELoss(
            total=fvu + weight * sparsity + self.auxiliary_weight * auxiliary,
            fvu=fvu,
            auxiliary=auxiliary,
            sparsity=sparsity,
            l0=active.sum() / len(x),
            fired=active.any(0),
        )


class Gated(SparseAutoencoder):
    """Which latents are active is learned apart from how much (arXiv:2404.16014).

    The gate g = (z - threshold) exp(-r) opens where z exceeds a threshold of any sign: this is the
    published pair of tied encoders, written such that an encoder, its bias and its threshold say
    all that inference needs (appendix E there). The penalty falls on ReLU(g), which also has to
    reconstruct, through a frozen decoder; codes themselves do not shrink.

    Args:
        d_in: Dimensions of an activation.
        n_latents: Width of the dictionary.
        sparsity_weight: lambda, weight of the penalty.
        warm_up: Share of the training over which lambda grows from 0.
        auxiliary_weight: alpha, weight of the loss of dead latents.
        n_auxiliary: Dead latents that explain the error of one vector; half of ``d_in`` when None.
    """

    architecture = "gated"
    trains_threshold = True

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        sparsity_weight: float = 0.6,
        warm_up: float = 0.1,
        auxiliary_weight: float = 1 / 32,
        n_auxiliary: int | None = None,
    ) -> None:
        super().__init__(d_in, n_latents, auxiliary_weight, n_auxiliary)
        self.sparsity_weight = sparsity_weight
        self.warm_up = warm_up
        self.log_gate_scale = nn.Parameter(torch.zeros(n_latents))
        self.hyper_parameters |= {"sparsity_weight": sparsity_weight, "warm_up": warm_up}

    def loss(
        self,
        x: Float[Tensor, "batch dim"],
        is_dead: Bool[Tensor, " latent"] | None = None,
        step_fraction: float = 1.0,
    ) -> SAELoss:
        """FVU of codes and of gates, and the penalty on gates."""
        centred = self.centred(x)
        pre = self._pre_activations(centred)
        gate = ((pre - self.threshold) * (-self.log_gate_scale).exp()).relu()
        codes = pre.relu() * (gate > 0)
        error = centred - codes @ self.W_dec
        frozen = centred.detach()
        gate_fvu = self._fvu(frozen - gate @ self.W_dec.detach())
        fvu = self._fvu(error)
        auxiliary = self._auxiliary(centred, error, is_dead)
        sparsity = _weighted_l1(gate, self.W_dec) / self.variance.sqrt()
        weight = self.sparsity_weight * _warmed_up(step_fraction, self.warm_up)
        active = codes > 0
        return SAELoss(
            total=fvu + gate_fvu + weight * sparsity + self.auxiliary_weight * auxiliary,
            fvu=fvu,
            auxiliary=auxiliary,
            sparsity=sparsity,
            l0=active.sum() / len(x),
            fired=active.any(0),
        )


def exact_threshold(
    sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "row dim"]], k: int
) -> float:
    """The threshold above which activations have k pre-activations on average, exactly.

    Args:
        sae: Whose encoder.
        batches: Activations, read once.
        k: Entries of each, on average.

    Returns:
        In scaled units; 0 when fewer are positive.

    Raises:
        ValueError: If there are no activations, or more than can be held.
    """
    held = [sae.W_enc.new_empty(0)]
    bound, n_held, n_rows = 0.0, 0, 0
    for x in batches:
        n_rows += len(x)
        for part in x.split(max(MAX_CALIBRATION_ENTRIES // sae.n_latents, 1)):
            centred = sae.centred(part.to(sae.W_enc.device))
            held.append(entries_above(centred, sae.W_enc, sae.b_enc, bound)[1])
            n_held += len(held[-1])
            if n_held > MAX_CALIBRATION_ENTRIES:
                n_held = MAX_CALIBRATION_ENTRIES // 2
                held = [torch.cat(held).topk(n_held, sorted=False).values]
                bound = float(held[0].min())
    n = n_rows * k
    if n == 0:
        raise ValueError("calibration got no activations; give at least one")
    if n < n_held:
        largest = torch.cat(held).topk(n + 1, sorted=False).values
        return float(largest.topk(2, largest=False).values.mean())
    if bound == 0:
        return 0.0
    raise ValueError(
        f"calibration on {n_rows} activations with k {k} needs their {n + 1} largest entries, of "
        f"which {n_held} are held; give at most {MAX_CALIBRATION_ENTRIES // (2 * k)} activations"
    )


def keep_largest(
    values: Float[Tensor, "*leading latent"], k: int
) -> Float[Tensor, "*leading latent"]:
    """The k largest of each row's values, the rest 0."""
    top = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)


def geometric_median(points: Float[Tensor, "row dim"], n_steps: int = 100) -> Float[Tensor, " dim"]:
    """The point of the smallest summed distance to others (Weiszfeld's algorithm)."""
    median = points.mean(0)
    spread = float((points - median).norm(dim=-1).mean())
    for _ in range(n_steps):
        weight = 1 / (points - median).norm(dim=-1).clamp_min(1e-6 * spread + 1e-30)
        moved = (weight @ points) / weight.sum()
        shift = float((moved - median).norm())
        median = moved
        if shift <= 1e-5 * spread:
            break
    return median


def default_learning_rate(n_latents: int) -> float:
    """Adam's step size for a width: 8e-4 sqrt(2^14 / width).

    Four times the rule of Gao et al. (arXiv:2406.04093), which is for billions of activations: in
    the thousands of steps that a robot's data give, smaller ones do not converge.
    """
    return 8e-4 * math.sqrt(2**14 / n_latents)


def _weighted_l1(
    codes: Float[Tensor, "batch latent"], W_dec: Float[Tensor, "latent dim"]
) -> Float[Tensor, ""]:
    return (codes @ W_dec.norm(dim=-1)).mean()


def _warmed_up(step_fraction: float, warm_up: float) -> float:
    return min(step_fraction / warm_up, 1.0) if warm_up > 0 else 1.0


ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {
    kind.architecture: kind
    for kind in (BatchTopK, TopK, MatryoshkaBatchTopK, JumpReLU, Vanilla, Gated)
}


def build_autoencoder(architecture: str, **hyper_parameters: Any) -> SparseAutoencoder:
    """Make an autoencoder by name.

    Args:
        architecture: A key of ``ARCHITECTURES``.
        **hyper_parameters: Arguments of its class.

    Raises:
        ValueError: If there is none of that name.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture](**hyper_parameters)
