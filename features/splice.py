"""Change features of a policy while it predicts, and leave all else as it was.

A feature i of an activation x has a code f_i and a direction d_i. An intervention replaces the code
by g_i(f_i), and the activation by

    x' = x + sum_i (g_i(f_i) - f_i) d_i,

so that what the autoencoder leaves unexplained stays (the error term of Marks et al. 2024,
arXiv:2403.19647, section 2): where no code changes, not one bit does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from autoencoders.sae import SparseAutoencoder
from features.taps import edit_activations
from policies.interface import (
    Observation,
    PolicyView,
    SamplingPolicyView,
    WrappedPolicy,
)

Tokens = Float[Tensor, "batch token dim"]
Edit = Callable[[Tokens], Tokens]
"""What :func:`features.taps.edit_activations` takes."""


@runtime_checkable
class Splicing(Protocol):
    """A named change of activations, for whatever autoencoder belongs to them."""

    @property
    def name(self) -> str:
        """For tables and captions."""
        ...

    def edit(self, sae: SparseAutoencoder) -> Edit:
        """The change as it is made."""
        ...


@dataclass(frozen=True)
class Intervention:
    """Scale the codes of some features, or hold them at a value.

    A clamped code has its value on every chosen token, also where the feature was silent.

    Raises:
        ValueError: If there is no latent, one occurs twice, or not exactly one of ``scale`` and
            ``clamp`` is given.
    """

    latents: tuple[int, ...]
    scale: float | None = None
    """Factor of the codes; 0 ablates the features."""
    clamp: float | None = None
    """Code to hold, in the activation's units."""
    tokens: tuple[int, ...] | None = None
    """Places of the tokens to change; all when None."""

    def __post_init__(self) -> None:
        if not self.latents or len(set(self.latents)) < len(self.latents):
            raise ValueError(f"latents {self.latents}: name at least one, and each once")
        if (self.scale is None) == (self.clamp is None):
            raise ValueError(
                f"scale {self.scale} and clamp {self.clamp}: give exactly one (scale 0 ablates)"
            )

    @property
    def name(self) -> str:
        """For tables and captions."""
        features = ", ".join(str(latent) for latent in self.latents)
        if self.clamp is not None:
            return f"{features} = {self.clamp:g}"
        return f"{features} x {self.scale:g}"

    def displacement(self, sae: SparseAutoencoder, x: Tokens) -> Tokens:
        """What is added to each token.

        Raises:
            ValueError: If there is no such latent or token.
        """
        chosen = list(self.latents)
        if not all(0 <= latent < sae.n_latents for latent in chosen):
            raise ValueError(f"latents {chosen}: the autoencoder has 0..{sae.n_latents - 1}")
        codes = sae.encode(x)[..., chosen]
        if self.clamp is not None:
            changes = self.clamp - codes
        else:
            assert self.scale is not None
            changes = (self.scale - 1) * codes
        if self.tokens is not None:
            if not all(0 <= token < x.shape[1] for token in self.tokens):
                raise ValueError(f"tokens {self.tokens}: there are 0..{x.shape[1] - 1}")
            is_chosen = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
            is_chosen[list(self.tokens)] = True
            changes = changes * is_chosen[:, None]
        directions = sae.directions[chosen]
        moved = einsum(changes, directions, "batch token latent, latent dim -> batch token dim")
        return moved.to(x.dtype)

    def edit(self, sae: SparseAutoencoder) -> Edit:
        """The intervention as it changes activations."""
        return lambda x: _displaced(x, self.displacement(sae, x))


@dataclass(frozen=True, eq=False)
class DirectionIntervention:
    """The control of an intervention: moves every token as far, but along one fixed direction."""

    direction: Float[Tensor, " dim"]
    """Of any length but 0: random, or that of another feature."""
    reference: Intervention
    """Whose displacement, token by token, says how far."""
    name: str = "direction"

    def __post_init__(self) -> None:
        length = float(self.direction.norm())
        if not 0 < length < float("inf"):
            raise ValueError(f"direction of length {length}: points nowhere")

    def displacement(self, sae: SparseAutoencoder, x: Tokens) -> Tokens:
        """What is added to each token."""
        distance = self.reference.displacement(sae, x).norm(dim=-1, keepdim=True)
        return distance * (self.direction / self.direction.norm()).to(x)

    def edit(self, sae: SparseAutoencoder) -> Edit:
        """The intervention as it changes activations."""
        return lambda x: _displaced(x, self.displacement(sae, x))


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction in the activations' place: goal of an autoencoder that keeps behaviour."""

    name: str = "reconstruction"

    def edit(self, sae: SparseAutoencoder) -> Edit:
        """:func:`reconstruction_edit`."""
        return reconstruction_edit(sae)


def _displaced(x: Tokens, displacement: Tokens) -> Tokens:
    # Adding 0 would turn -0 into 0.
    return torch.where((displacement != 0).any(-1, keepdim=True), x + displacement, x)


def reconstruction_edit(sae: "SparseAutoencoder | WholeFrames") -> Edit:
    """Put the reconstruction in the activation's place: what is lost with the error term?"""
    return lambda x: sae(x)


class WholeFrames:
    """Reconstruct all tokens of a frame at once, by an autoencoder whose vectors are frames.

    Args:
        sae: Of vectors that are all tokens of a frame, one behind the other.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae

    def __call__(self, x: Tokens) -> Tokens:
        """Reconstruct activations."""
        frames = rearrange(x, "batch token dim -> batch (token dim)")
        return rearrange(self.sae(frames), "batch (token dim) -> batch token dim", token=x.shape[1])


def mean_ablation_edit(mean: Float[Tensor, "*token dim"]) -> Edit:
    """Put the mean in the activation's place: what is lost with everything?

    Args:
        mean: One vector for all tokens, or one for each. The latter still knows which token it is,
            and is the stricter yardstick.
    """
    return lambda x: mean.to(x).expand_as(x)


def zero_ablation_edit() -> Edit:
    """Put 0 in the activation's place."""
    return torch.zeros_like


class SplicedPolicy(WrappedPolicy):
    """A policy that predicts with changed activations.

    Stateless: hooks are there while it predicts, and only then. Not for several threads at once.

    Args:
        view: The policy.
        layer: Where, as for :func:`features.taps.find_tap`.
        edit: What becomes of the activations there, e.g. :meth:`Intervention.edit`.
    """

    def __init__(self, view: PolicyView, layer: str, edit: Edit) -> None:
        super().__init__(view)
        self.layer = layer
        self.edit = edit

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units.

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to predict; all when None.
        """
        with edit_activations(self.view, self.layer, self.edit):
            return super().predict_chunk(observation, queries)


class SplicedSamplingPolicy(SplicedPolicy):
    """A policy that predicts and draws chunks with changed activations.

    Args:
        view: The policy.
        layer: As for :class:`SplicedPolicy`.
        edit: As for :class:`SplicedPolicy`.
    """

    def __init__(self, view: SamplingPolicyView, layer: str, edit: Edit) -> None:
        super().__init__(view, layer, edit)
        self._sampling_view = view

    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Draw action chunks in data units, from the random numbers of the policy as it is.

        Args:
            observation: What the policy sees, on the policy's device.
            n_samples: Chunks per observation.
            seed: Of the random numbers.
            queries: Chunk steps to return; all when None.
        """
        with edit_activations(self.view, self.layer, self.edit):
            return self._sampling_view.sample_chunks(observation, n_samples, seed, queries)


def splice(view: PolicyView, layer: str, edit: Edit) -> SplicedPolicy:
    """Change a policy's activations; what can draw chunks still can."""
    if isinstance(view, SamplingPolicyView):
        return SplicedSamplingPolicy(view, layer, edit)
    return SplicedPolicy(view, layer, edit)


def random_directions(n: int, dim: int, seed: int = 0) -> Float[Tensor, "direction dim"]:
    """Unit vectors, uniform on the sphere: the weakest control.

    Activations vary along few directions, and most of these miss them all.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1).float()


def data_directions(
    n: int, vectors: Float[Tensor, "row dim"], seed: int = 0
) -> Float[Tensor, "direction dim"]:
    """Unit vectors drawn with the activations' own covariance: the strict control.

    They point where the activations vary, and so to what the layers behind are used to read.

    Args:
        n: How many.
        vectors: Activations.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = vectors.detach().double().cpu()
    centred = centred - centred.mean(0)
    mixing = torch.randn(n, len(centred), generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(mixing @ centred, dim=-1).float()


def matched_latents(
    density: Float[Tensor, " latent"], latents: Sequence[int], n: int, seed: int = 0
) -> tuple[int, ...]:
    """Other features that fire about as often: controls for an intervention on ``latents``.

    Drawn from the ``4 n`` live latents whose log density is nearest to that of the given ones.

    Args:
        density: Share of the vectors on which each latent is active.
        latents: Whose like is sought; their mean log density counts.
        n: How many.
        seed: Of the draw.

    Raises:
        ValueError: If a given latent is dead, or there are fewer than ``n`` live others.
    """
    given = list(latents)
    log_density = density.double().cpu().log()
    if not log_density[given].isfinite().all():
        raise ValueError(f"latents {given}: one of them never fires, so it has no like")
    distance = (log_density - log_density[given].mean()).abs()
    distance[given] = torch.inf
    n_live = int(distance.isfinite().sum())
    if n_live < n:
        raise ValueError(f"{n} controls: there are {n_live} other live latents")
    near = distance.argsort(stable=True)[: min(4 * n, n_live)]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(len(near), generator=generator)[:n]
    return tuple(near[picks].tolist())
