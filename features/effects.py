"""What features do to the action: measured by changing them, and foretold from the weights.

Open loop, on recorded frames. Three questions:

- How much of the behaviour is in the codes? (:func:`behaviour_recovered`)
- What does each feature do? (:func:`feature_effects`, beside the same displacements along other
  directions, :func:`random_direction_effects`)
- Can it be foretold? At the decoder's output the answer is exact, for only a linear layer follows
  (:func:`decoder_arrows`, :func:`attribution`); at the encoder's it is a derivative
  (:func:`local_arrows`). :func:`dose_response` holds both against what happens.

What is asked of single features is asked of a :class:`FeatureProbe`, which reads and encodes the
frames once for all questions. Distances of actions are Euclidean, in data units (PushT: px).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from attention.faithfulness import spearman
from autoencoders.sae import Codes, SparseAutoencoder
from features.resampling import Estimate, episode_sums, interval, resample_counts
from features.splice import (
    Edit,
    WholeFrames,
    mean_ablation_edit,
    random_directions,
    reconstruction_edit,
    splice,
)
from features.taps import continue_from, edit_activations, read_activations
from policies.act import ACTPolicy
from policies.interface import Batch, Observation, PolicyView

ZERO_EFFECT_SHARE = 1 / 512
"""An action that moves by less than this share of its range has not moved (PushT: 1 px, a fifth of
a pixel of a 96 px picture)."""
DOSES = (-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0)
_FRAMES, _LATENTS = 256, 128
"""That are worked on together."""


@dataclass(frozen=True)
class BehaviourRecovered:
    """What a policy does on reconstructed activations, and on none, frame by frame."""

    sae_px: Float[Tensor, "frame query"]
    """Distance of the action on reconstructions from the policy's own."""
    mean_px: Float[Tensor, "frame query"]
    """The same with the mean in the activations' place."""
    clean_l1: Float[Tensor, "frame query"]
    """Mean absolute error of the policy's own action against the demonstrated one."""
    sae_l1: Float[Tensor, "frame query"]
    """The same on reconstructions."""
    mean_l1: Float[Tensor, "frame query"]
    """The same with the mean in the activations' place."""
    is_valid: Bool[Tensor, "frame query"]
    """Where there is a demonstrated action: not beyond the end of the episode."""
    episode_index: Int[Tensor, " frame"]

    def scores_by_query(self) -> Float64[Tensor, " query"]:
        """The action score of each chunk step."""
        return 1 - self.sae_px.double().mean(0) / self.mean_px.double().mean(0)

    def summary(self) -> dict[str, Estimate]:
        """Numbers with intervals over episodes.

        Returns:
            ``sae_px`` and ``mean_px``, over all frames and chunk steps; ``action_score``,
            ``1 - E|a_sae - a| / E|a_mean - a|``: 1 where the codes keep the behaviour, 0 where they
            keep no more than the mean; the errors ``clean_l1``, ``sae_l1``, ``mean_l1`` where there
            is a demonstrated action; ``dl1`` and ``relative_dl1``, the error that reconstruction
            adds, also as a share of the policy's own; ``l1_recovered``, the share of the gap
            between ``mean_l1`` and ``clean_l1`` that it closes. Intervals are NaN for one episode.
        """
        weight = self.is_valid.double()
        columns = torch.stack(
            [
                torch.ones_like(weight).sum(1),
                self.sae_px.double().sum(1),
                self.mean_px.double().sum(1),
                weight.sum(1),
                (self.clean_l1.double() * weight).sum(1),
                (self.sae_l1.double() * weight).sum(1),
                (self.mean_l1.double() * weight).sum(1),
            ],
            dim=1,
        )
        sums = episode_sums(columns, self.episode_index)
        values = _behaviour(sums.sum(0)[None])
        if len(sums) < 2:
            return {name: Estimate(float(v), math.nan, math.nan) for name, v in values.items()}
        resampled = _behaviour(resample_counts(len(sums)) @ sums)
        return {
            name: Estimate(float(value), *interval(resampled[name]))
            for name, value in values.items()
        }


def _behaviour(sums: Float64[Tensor, "resample 7"]) -> dict[str, Float64[Tensor, " resample"]]:
    n, sae_px, mean_px, n_valid, clean, sae, mean = sums.unbind(1)
    return {
        "sae_px": sae_px / n,
        "mean_px": mean_px / n,
        "action_score": 1 - sae_px / mean_px,
        "clean_l1": clean / n_valid,
        "sae_l1": sae / n_valid,
        "mean_l1": mean / n_valid,
        "dl1": (sae - clean) / n_valid,
        "relative_dl1": (sae - clean) / clean,
        "l1_recovered": (mean - sae) / (mean - clean),
    }


@torch.no_grad()
def behaviour_recovered(
    view: PolicyView,
    layer: str,
    sae: SparseAutoencoder | WholeFrames,
    mean: Float[Tensor, "*token dim"],
    batch: Batch,
    activations: Float[Tensor, "frame token dim"] | None = None,
    batch_size: int = _FRAMES,
) -> BehaviourRecovered:
    """Let a policy act on reconstructed activations.

    Args:
        view: In evaluation mode, on the batch's device.
        layer: Whose activations; as for :func:`features.taps.find_tap`.
        sae: Fitted to them.
        mean: Of the activations: of all tokens, or of each; see
            :func:`features.splice.mean_ablation_edit`.
        batch: Frames with their demonstrated chunks, best of held-out episodes.
        activations: Of the frames, where they are known already.
        batch_size: Frames that go through the network together.

    Raises:
        ValueError: If there is no frame, or activations do not fit.
    """
    if not len(batch):
        raise ValueError("there is no frame")
    if activations is not None and len(activations) != len(batch):
        raise ValueError(f"activations of {len(activations)} frames, for {len(batch)}")
    edits: tuple[Edit, ...] = (lambda x: x, reconstruction_edit(sae), mean_ablation_edit(mean))
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(batch), batch_size):
        piece = slice(start, start + batch_size)
        rows, seen = batch.rows(piece), batch.observation.rows(piece)
        if _can_go_on(view, layer):
            x = read_activations(view, seen, layer) if activations is None else activations[piece]
            actions = [continue_from(view, layer, edit(x), seen) for edit in edits]
        else:
            actions = [splice(view, layer, edit).predict_chunk(seen) for edit in edits]
        clean, by_sae, by_mean = (each.double() for each in actions)
        steps = slice(0, clean.shape[1])
        parts.append(
            (
                (by_sae - clean).norm(dim=-1),
                (by_mean - clean).norm(dim=-1),
                *(
                    (each - rows.actions[:, steps]).abs().mean(-1)
                    for each in (clean, by_sae, by_mean)
                ),
                ~rows.action_is_pad[:, steps],
            )
        )
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    return BehaviourRecovered(*columns, episode_index=batch.episode_index.cpu())


@dataclass(frozen=True)
class FeatureBlock:
    """Some features of a probe, and the frames in which they are changed, one pair for each."""

    latents: tuple[int, ...]
    place: Int[Tensor, " pair"]
    """Of the pair's feature in ``latents``."""
    frame: Int[Tensor, " pair"]
    codes: Float[Tensor, "pair token"]
    """Of the pair's feature in its frame."""
    unit: Float[Tensor, " latent"]
    """Root mean square of the active codes, over all frames."""
    directions: Float[Tensor, "latent dim"]

    def slopes(
        self, jacobian: Float[Tensor, "frame query action token dim"]
    ) -> Float64[Tensor, "pair query action"]:
        """Derivative of the action by the code, on the tokens where the feature is active."""
        per_token = einsum(
            jacobian,
            self.directions,
            "frame query action token dim, latent dim -> frame latent query action token",
        )[self.frame, self.place]
        is_active = (self.codes > 0).to(per_token)
        slopes = einsum(
            per_token, is_active, "pair query action token, pair token -> pair query action"
        )
        return slopes.double().cpu()

    def mean(self, values: Float[Tensor, "pair *value"]) -> Float64[Tensor, "latent *value"]:
        """Over the frames of each feature; NaN where there are none."""
        place = self.place.cpu()
        sums = torch.zeros(len(self.latents), *values.shape[1:], dtype=torch.float64)
        sums.index_add_(0, place, values.double().cpu())
        counts = torch.bincount(place, minlength=len(sums)).double()
        return sums / counts.view(-1, *[1] * (values.ndim - 1))


class FeatureProbe:
    """A policy on some frames, what its features were there, and what it does when they change.

    Args:
        view: In evaluation mode. Our ACT goes on from the encoder's or decoder's activations;
            everything else predicts anew for each feature and frame.
        layer: As for :func:`features.taps.find_tap`. At ``decoder`` a feature counts as active
            where it is so at one of the queries: no other step reaches their actions.
        sae: Fitted to the layer's activations.
        observation: Frames, on the policy's device.
        latents: Features to look at; all when None.
        queries: Chunk steps to look at.
        activations: Of the frames, where they are known already.
        max_columns: Pairs of feature and frame that are computed together.

    Raises:
        ValueError: If there is no such latent or query, or activations do not fit.
    """

    @torch.no_grad()
    def __init__(
        self,
        view: PolicyView,
        layer: str,
        sae: SparseAutoencoder,
        observation: Observation,
        latents: Sequence[int] | None = None,
        queries: Sequence[int] = (0,),
        activations: Float[Tensor, "frame token dim"] | None = None,
        max_columns: int = 512,
    ) -> None:
        chosen = tuple(range(sae.n_latents)) if latents is None else tuple(latents)
        if not chosen or not all(0 <= latent < sae.n_latents for latent in chosen):
            raise ValueError(f"latents {list(chosen)}: the autoencoder has 0..{sae.n_latents - 1}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"latents {list(chosen)}: one is named twice")
        if not queries or not all(0 <= query < view.chunk_size for query in queries):
            raise ValueError(f"queries {list(queries)} must lie in 0..{view.chunk_size - 1}")
        if max_columns < 1:
            raise ValueError(f"max_columns {max_columns}: give at least 1")
        n_frames = _n_frames(observation)
        if activations is None:
            activations = torch.cat(
                [
                    read_activations(view, observation.rows(slice(start, start + _FRAMES)), layer)
                    for start in range(0, n_frames, _FRAMES)
                ]
            )
        if len(activations) != n_frames or activations.shape[-1] != sae.d_in:
            raise ValueError(
                f"activations {tuple(activations.shape)} of {n_frames} frames, for an autoencoder "
                f"of {sae.d_in} dimensions: give those of the observed frames, at its layer"
            )
        self.view = view
        self.layer = layer
        self.sae = sae
        self.observation = observation
        self.latents = chosen
        self.queries = tuple(queries)
        self.activations = activations
        self.max_columns = max_columns
        self._seen = replace(observation, images={})
        self._goes_on = _can_go_on(view, layer)
        self._tokens = list(queries) if layer == "decoder" else list(range(activations.shape[1]))
        self._codes = _sparse(sae, activations)
        everything = torch.arange(n_frames, device=activations.device)
        self._clean = torch.cat(
            [
                self._go_on(rows, torch.zeros_like(activations[rows]))
                for rows in everything.split(max_columns)
            ]
        )
        self.n_active: Int[Tensor, " latent"] = torch.cat(
            [(self._strength(codes) > 0).sum(0).cpu() for _, codes in self._dense()]
        )
        """Frames in which each feature is active."""

    def blocks(self, n_frames_per_latent: int) -> Iterator[FeatureBlock]:
        """Choose the frames for each feature, some features at a time.

        Of more than ``n_frames_per_latent`` frames with the feature those are taken that lie evenly
        in the order of its summed code, from strong to weak: a fair sample of where it is active,
        unlike the strongest, whose effects are larger than the feature's.

        Raises:
            ValueError: If the number is not positive.
        """
        if n_frames_per_latent < 1:
            raise ValueError(f"n_frames_per_latent {n_frames_per_latent}: give at least 1")
        for latents, codes in self._dense():
            frame, place = _spread(self._strength(codes), n_frames_per_latent)
            yield FeatureBlock(
                latents=latents,
                place=place,
                frame=frame,
                codes=codes[frame, :, place],
                unit=(codes.square().sum((0, 1)) / (codes > 0).sum((0, 1))).sqrt(),
                directions=self.sae.directions.detach()[list(latents)].to(self.activations),
            )

    @torch.no_grad()
    def changes(
        self,
        frame: Int[Tensor, " column"],
        moved: Float[Tensor, "column token"],
        directions: Float[Tensor, "direction dim"],
        which: Int[Tensor, " column"],
    ) -> Float64[Tensor, "column query action"]:
        """Change of the action when activations are moved along directions.

        Args:
            frame: Whose activations.
            moved: How far, each token.
            directions: Unit vectors.
            which: The direction of each column.

        Returns:
            In data units, on the CPU.
        """
        parts = [torch.empty(0, *self._clean.shape[1:], dtype=torch.float64)]
        for some in torch.arange(len(frame), device=frame.device).split(self.max_columns):
            along = directions[which[some]]
            actions = self._go_on(frame[some], moved[some][..., None] * along[:, None])
            parts.append((actions - self._clean[frame[some]]).double().cpu())
        return torch.cat(parts)

    def jacobian(self) -> Float[Tensor, "frame query action token dim"]:
        """Derivative of the action by the activations, in every frame.

        Raises:
            ValueError: If the policy is not our ACT, or the layer another than its encoder's or
                decoder's output.
        """
        parts = []
        for start in range(0, len(self.activations), _FRAMES):
            rows = slice(start, start + _FRAMES)
            at = self.activations[rows].detach().requires_grad_()
            with torch.enable_grad():
                actions = continue_from(
                    self.view, self.layer, at, self._seen.rows(rows), self.queries
                )
                # Frames do not see each other: the gradient of the sum is that of each.
                outputs = reduce(actions, "frame query action -> (query action)", "sum")
                gradients = [
                    torch.autograd.grad(output, at, retain_graph=True)[0] for output in outputs
                ]
            parts.append(
                rearrange(
                    gradients,
                    "(query action) frame token dim -> frame query action token dim",
                    query=len(self.queries),
                )
            )
        return torch.cat(parts)

    def _go_on(
        self, frames: Int[Tensor, " column"], displacement: Float[Tensor, "column token dim"]
    ) -> Float[Tensor, "column query action"]:
        if self._goes_on:
            moved = self.activations[frames] + displacement
            return continue_from(
                self.view, self.layer, moved, self._seen.rows(frames), self.queries
            )
        with edit_activations(self.view, self.layer, lambda x: x + displacement):
            return self.view.predict_chunk(self.observation.rows(frames), self.queries)

    def _dense(self) -> Iterator[tuple[tuple[int, ...], Float[Tensor, "frame token latent"]]]:
        """Codes with their zeros, some features at a time."""
        n_frames, n_tokens, _ = self.activations.shape
        codes = self._codes
        for start in range(0, len(self.latents), _LATENTS):
            latents = self.latents[start : start + _LATENTS]
            place = torch.full((self.sae.n_latents,), -1, device=codes.latent.device)
            place[list(latents)] = torch.arange(len(latents), device=place.device)
            column = place[codes.latent]
            is_wanted = column >= 0
            dense = codes.value.new_zeros(n_frames * n_tokens, len(latents))
            dense[codes.row[is_wanted], column[is_wanted]] = codes.value[is_wanted]
            yield (
                latents,
                rearrange(dense, "(frame token) latent -> frame token latent", token=n_tokens),
            )

    def _strength(
        self, codes: Float[Tensor, "frame token latent"]
    ) -> Float[Tensor, "frame latent"]:
        """How active features are, on the tokens that reach the queries."""
        return codes[:, self._tokens].sum(1)


def _sparse(sae: SparseAutoencoder, activations: Float[Tensor, "frame token dim"]) -> Codes:
    """Codes of all tokens, encoded some frames at a time."""
    parts = [sae.encode_sparse(x.flatten(0, 1)) for x in activations.split(_FRAMES)]
    n_before = 0
    rows = []
    for part in parts:
        rows.append(part.row + n_before)
        n_before += part.n_rows
    return Codes(
        row=torch.cat(rows),
        latent=torch.cat([part.latent for part in parts]),
        value=torch.cat([part.value for part in parts]).to(activations),
        n_rows=n_before,
        n_latents=sae.n_latents,
    )


def _spread(
    strength: Float[Tensor, "frame latent"], n_wanted: int
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Frames of each feature, evenly spaced in the order of its strength; and whose they are."""
    order = strength.argsort(dim=0, descending=True, stable=True)
    n_active = (strength > 0).sum(0)
    step = torch.arange(min(n_wanted, len(strength)), device=strength.device)[:, None]
    is_taken = step < n_active.clamp(max=n_wanted)
    rank = torch.where(n_active > n_wanted, step * n_active // n_wanted, step)
    frame = order.gather(0, rank)
    place = torch.arange(strength.shape[1], device=strength.device).expand_as(frame)
    # Feature by feature.
    return frame.T[is_taken.T], place.T[is_taken.T]


@dataclass(frozen=True)
class FeatureEffects:
    """How the action changes when one feature's code is multiplied. NaN for silent features."""

    latents: tuple[int, ...]
    factors: tuple[float, ...]
    """Of the code: 0 is the feature's ablation."""
    queries: tuple[int, ...]
    """Chunk steps."""
    n_active: Int[Tensor, " latent"]
    """Frames in which the feature is active."""
    n_frames: Int[Tensor, " latent"]
    """Frames in which it was changed."""
    displacement: Float[Tensor, "latent factor"]
    """How far the activations were moved: root of the sum of squares over tokens, mean over
    frames."""
    mean_px: Float[Tensor, "latent factor query action"]
    """Change of the action, mean over frames: the feature's arrow."""
    magnitude_px: Float[Tensor, "latent factor query"]
    """Length of the change, mean over frames."""
    consistency: Float[Tensor, "latent factor query"]
    """Length of the mean unit vector: 1 where all changes point one way, about ``0.9 /
    sqrt(n_frames)`` by chance."""

    def has_no_effect(self, least: float) -> Bool[Tensor, "latent factor"]:
        """Where no chunk step moves by ``least``, in data units; False for silent features."""
        return (self.magnitude_px < least).all(-1)

    def zero_effect_rate(self, least: float, factor: float = 0.0) -> float:
        """Share of the live features without effect.

        Args:
            least: Smallest effect, in data units: :data:`ZERO_EFFECT_SHARE` of the action's range.
            factor: Of the codes.

        Raises:
            ValueError: If the factor was not measured.
        """
        if factor not in self.factors:
            raise ValueError(f"factor {factor}: measured were {self.factors}")
        is_live = self.n_frames > 0
        without = self.has_no_effect(least)[is_live, self.factors.index(factor)]
        return float(without.double().mean())


def feature_effects(
    probe: FeatureProbe, factors: Sequence[float] = (0.0, 2.0), n_frames_per_latent: int = 32
) -> FeatureEffects:
    """Multiply each feature's code on all tokens, one feature at a time, where it is active.

    Args:
        probe: Features, frames and chunk steps.
        factors: Of the codes.
        n_frames_per_latent: Frames in which each is changed, at most; :meth:`FeatureProbe.blocks`
            says which.

    Raises:
        ValueError: If ``n_frames_per_latent`` is not positive.
    """
    parts: list[tuple[Tensor, ...]] = []
    for block in probe.blocks(n_frames_per_latent):
        by_factor: list[tuple[Tensor, ...]] = []
        for factor in factors:
            moved = (factor - 1) * block.codes
            changes = probe.changes(block.frame, moved, block.directions, block.place)
            by_factor.append(
                (
                    block.mean(moved.norm(dim=-1)),
                    block.mean(changes),
                    block.mean(changes.norm(dim=-1)),
                    block.mean(F.normalize(changes, dim=-1)).norm(dim=-1),
                )
            )
        parts.append(tuple(torch.stack(column, dim=1) for column in zip(*by_factor, strict=True)))
    displacement, mean, magnitude, consistency = (
        torch.cat(column).float() for column in zip(*parts, strict=True)
    )
    return FeatureEffects(
        latents=probe.latents,
        factors=tuple(float(factor) for factor in factors),
        queries=probe.queries,
        n_active=probe.n_active,
        n_frames=probe.n_active.clamp(max=n_frames_per_latent),
        displacement=displacement,
        mean_px=mean,
        magnitude_px=magnitude,
        consistency=consistency,
    )


@dataclass(frozen=True)
class ControlComparison:
    """Features beside the same displacements along other directions, on the same frames."""

    latents: tuple[int, ...]
    factor: float
    queries: tuple[int, ...]
    n_frames: Int[Tensor, " latent"]
    feature_px: Float[Tensor, "latent query"]
    """Length of the action's change, mean over frames; NaN for silent features."""
    control_px: Float[Tensor, "latent direction query"]
    """The same along each direction: every token moved as far as by the feature."""

    @property
    def p_value(self) -> Float[Tensor, "latent query"]:
        """Share of the directions that do at least as much, the feature itself counted in.

        One-sided; exact if the feature's direction were drawn as the others were. NaN for silent
        features.
        """
        at_least = (self.control_px >= self.feature_px[:, None]).sum(1)
        p = (1 + at_least) / (1 + self.control_px.shape[1])
        return torch.where(self.feature_px.isnan(), torch.nan, p)

    @property
    def is_significant(self) -> Bool[Tensor, "latent query"]:
        """Where the effect exceeds the 95 % quantile of the directions; by chance in 5 %."""
        return self.feature_px > self.control_px.quantile(0.95, dim=1)

    def significant_share(self) -> float:
        """Of the live features, at any of the queries."""
        is_live = self.n_frames > 0
        return float(self.is_significant[is_live].any(-1).double().mean())


def random_direction_effects(
    probe: FeatureProbe,
    factor: float = 0.0,
    directions: Float[Tensor, "direction dim"] | None = None,
    n_frames_per_latent: int = 8,
) -> ControlComparison:
    """Do features more than anything of the same size would?

    Each feature's displacement is repeated along other directions: the same frames and tokens, the
    same length on each token. That takes a prediction for each feature, frame and direction.

    Args:
        probe: Features, frames and chunk steps.
        factor: Of the codes; 0 ablates.
        directions: Unit vectors, e.g. :func:`features.splice.data_directions` for a strict control;
            100 of :func:`features.splice.random_directions` when None.
        n_frames_per_latent: Frames for each feature, at most; :meth:`FeatureProbe.blocks` says
            which.

    Raises:
        ValueError: If ``n_frames_per_latent`` is not positive.
    """
    if directions is None:
        directions = random_directions(100, probe.sae.d_in)
    directions = directions.to(probe.activations)
    n_others = len(directions)
    parts: list[tuple[Tensor, Tensor]] = []
    for block in probe.blocks(n_frames_per_latent):
        moved = (factor - 1) * block.codes
        own = probe.changes(block.frame, moved, block.directions, block.place)
        others = probe.changes(
            block.frame.repeat_interleave(n_others),
            moved.abs().repeat_interleave(n_others, dim=0),
            directions,
            torch.arange(n_others, device=directions.device).repeat(len(block.frame)),
        )
        lengths = rearrange(
            others.norm(dim=-1), "(pair other) query -> pair other query", other=n_others
        )
        parts.append((block.mean(own.norm(dim=-1)), block.mean(lengths)))
    feature, control = (torch.cat(column).float() for column in zip(*parts, strict=True))
    return ControlComparison(
        latents=probe.latents,
        factor=float(factor),
        queries=probe.queries,
        n_frames=probe.n_active.clamp(max=n_frames_per_latent),
        feature_px=feature,
        control_px=control,
    )


@torch.no_grad()
def decoder_arrows(view: PolicyView, sae: SparseAutoencoder) -> Float[Tensor, "latent action"]:
    """What a unit of each code adds to the action, exactly: ``scale * W_head d_i``.

    Behind the decoder's output only the action head follows, which is linear, and the scale of
    actions.

    Args:
        view: Our ACT.
        sae: Fitted to the activations of layer ``decoder``.

    Returns:
        Data units of the action per unit of code; the same for every chunk step.

    Raises:
        ValueError: If the policy is another, or the autoencoder has other dimensions.
    """
    act = _act(view)
    weight = act.network.action_head.weight
    if sae.d_in != weight.shape[1]:
        raise ValueError(
            f"the autoencoder takes {sae.d_in} dimensions, the decoder gives {weight.shape[1]}; "
            "fit one to layer 'decoder'"
        )
    arrows = einsum(sae.directions.to(weight), weight, "latent dim, action dim -> latent action")
    return arrows * act.normaliser.action.scale


@dataclass(frozen=True)
class ActionAttribution:
    """Predicted actions as a sum: baseline + one term for each active feature + residual."""

    row: Int[Tensor, " active"]
    """Of each term: ``frame * n_queries + chunk step``."""
    latent: Int[Tensor, " active"]
    contribution: Float[Tensor, "active action"]
    """Code times arrow, in data units."""
    baseline: Float[Tensor, "batch query action"]
    """The action where all codes are 0 and nothing is left unexplained."""
    residual: Float[Tensor, "batch query action"]
    """What the error of the reconstruction adds."""

    @property
    def total(self) -> Float[Tensor, "batch query action"]:
        """The predicted actions, put together again."""
        shape = self.baseline.shape
        terms = self.contribution.new_zeros(shape[0] * shape[1], shape[2])
        terms = terms.index_add(0, self.row, self.contribution)
        return self.baseline + terms.view(shape) + self.residual

    @property
    def residual_share(self) -> Float[Tensor, "batch query"]:
        """Length of the residual over that of all that codes and residual do together."""
        together = (self.total - self.baseline).norm(dim=-1)
        return self.residual.norm(dim=-1) / together


@torch.no_grad()
def attribution(
    view: PolicyView,
    sae: SparseAutoencoder,
    activations: Float[Tensor, "batch query dim"],
    observation: Observation,
) -> ActionAttribution:
    """Take predicted actions apart into what each feature adds; exact, by linearity.

    Args:
        view: Our ACT.
        sae: Fitted to the activations of layer ``decoder``.
        activations: Of that layer.
        observation: What the policy saw; only its state is read, where actions are relative.

    Raises:
        ValueError: As :func:`decoder_arrows`.
    """
    arrows = decoder_arrows(view, sae)
    codes = sae.encode_sparse(activations.flatten(0, 1))
    reconstruction = sae(activations)
    nothing = sae.decode(codes.value.new_zeros(sae.n_latents)).to(activations.dtype)
    at_nothing, on_codes, on_all = (
        continue_from(view, "decoder", each, observation)
        for each in (nothing.expand_as(activations), reconstruction, activations)
    )
    return ActionAttribution(
        row=codes.row,
        latent=codes.latent,
        contribution=codes.value[:, None].to(arrows) * arrows[codes.latent],
        baseline=at_nothing,
        residual=on_all - on_codes,
    )


def local_arrows(
    probe: FeatureProbe, n_frames_per_latent: int = 32
) -> Float[Tensor, "latent query action"]:
    """Derivative of the action by each code, on all tokens where the feature is active.

    Args:
        probe: Of our ACT, at ``encoder`` or ``decoder``.
        n_frames_per_latent: Frames for each feature, at most; :meth:`FeatureProbe.blocks` says
            which.

    Returns:
        Data units per unit of code, mean over frames; NaN for silent features.

    Raises:
        ValueError: For other policies and layers, or if ``n_frames_per_latent`` is not positive.
    """
    jacobian = probe.jacobian()
    blocks = probe.blocks(n_frames_per_latent)
    return torch.cat([block.mean(block.slopes(jacobian)) for block in blocks]).float()


@dataclass(frozen=True)
class DoseResponse:
    """What happens when more and more of a feature is added, beside what was foretold.

    Added on the tokens where the feature is active, in frames where it is. NaN for silent features.
    """

    latents: tuple[int, ...]
    queries: tuple[int, ...]
    doses: tuple[float, ...]
    """Multiples of ``unit``; a negative dose takes away."""
    unit: Float[Tensor, " latent"]
    """Root mean square of the feature's active codes."""
    n_frames: Int[Tensor, " latent"]
    measured_px: Float[Tensor, "latent dose query action"]
    """Change of the action, mean over frames."""
    predicted_px: Float[Tensor, "latent dose query action"]
    """Dose times unit times arrow, mean over frames: :func:`decoder_arrows` at the decoder, the
    frame's own derivative at the encoder."""
    slope: Float[Tensor, "latent query"]
    """Of measured on predicted, over frames, doses and action dimensions; 1 where it came true."""
    cosine: Float[Tensor, "latent query"]
    """Between measured and predicted, over the same."""
    spearman: Float[Tensor, "latent query"]
    """Rank correlation of the dose with the displacement along the predicted arrow, within each
    frame, mean over frames: 1 where more does more."""


def dose_response(
    probe: FeatureProbe, doses: Sequence[float] = DOSES, n_frames_per_latent: int = 16
) -> DoseResponse:
    """Add doses of each feature and hold the change of the action against the prediction.

    Args:
        probe: Of our ACT, at ``encoder`` or ``decoder``.
        doses: In root mean squares of the feature's active codes.
        n_frames_per_latent: Frames for each feature, at most; :meth:`FeatureProbe.blocks` says
            which.

    Raises:
        ValueError: As :func:`local_arrows`.
    """
    is_linear = probe.layer == "decoder"
    arrows = decoder_arrows(probe.view, probe.sae).double().cpu() if is_linear else None
    jacobian = None if is_linear else probe.jacobian()
    strength = torch.tensor(doses, dtype=torch.float64)
    parts: list[tuple[Tensor, ...]] = []
    for block in probe.blocks(n_frames_per_latent):
        is_active = block.codes > 0
        if arrows is not None:
            own = arrows[list(block.latents)][block.place.cpu()]
            # Only a step's own token reaches its action.
            reached = is_active[:, list(probe.queries)].double().cpu()
            slopes = einsum(reached, own, "pair query, pair action -> pair query action")
        else:
            assert jacobian is not None
            slopes = block.slopes(jacobian)
        unit = block.unit[block.place]
        measured = [
            probe.changes(
                block.frame, dose * unit[:, None] * is_active, block.directions, block.place
            )
            for dose in doses
        ]
        sizes = strength * unit.double().cpu()[:, None]
        predicted = einsum(sizes, slopes, "pair dose, pair query action -> pair dose query action")
        parts.append(_agreement(torch.stack(measured, dim=1), predicted, slopes, strength, block))
    unit, measured, predicted, slope, cosine, rank = (
        torch.cat(column).float() for column in zip(*parts, strict=True)
    )
    return DoseResponse(
        latents=probe.latents,
        queries=probe.queries,
        doses=tuple(float(dose) for dose in doses),
        unit=unit,
        n_frames=probe.n_active.clamp(max=n_frames_per_latent),
        measured_px=measured,
        predicted_px=predicted,
        slope=slope,
        cosine=cosine,
        spearman=rank,
    )


def _agreement(
    measured: Float64[Tensor, "pair dose query action"],
    predicted: Float64[Tensor, "pair dose query action"],
    slopes: Float64[Tensor, "pair query action"],
    doses: Float64[Tensor, " dose"],
    block: FeatureBlock,
) -> tuple[Tensor, ...]:
    """The columns of :class:`DoseResponse` for the features of one block."""

    def inner(one: Tensor, other: Tensor) -> Float64[Tensor, "latent query"]:
        return block.mean(reduce(one * other, "pair dose query action -> pair query", "sum"))

    both, foretold = inner(measured, predicted), inner(predicted, predicted)
    along = einsum(
        measured,
        F.normalize(slopes, dim=-1),
        "pair dose query action, pair query action -> pair dose query",
    )
    rank = spearman(
        repeat(doses, "dose -> (pair query) dose", pair=along.shape[0], query=along.shape[2]),
        rearrange(along, "pair dose query -> (pair query) dose"),
    ).view(along.shape[0], along.shape[2])
    # At the decoder a frame may be active at another query only, where the dose reaches nothing.
    is_known = rank.isfinite()
    return (
        block.unit.double().cpu(),
        block.mean(measured),
        block.mean(predicted),
        both / foretold,
        both / (foretold * inner(measured, measured)).sqrt(),
        block.mean(rank.nan_to_num()) / block.mean(is_known.double()),
    )


def _can_go_on(view: PolicyView, layer: str) -> bool:
    """Whether :func:`features.taps.continue_from` applies: what follows then costs little."""
    return isinstance(view, ACTPolicy) and layer in ("encoder", "decoder")


def _act(view: PolicyView) -> ACTPolicy:
    if not isinstance(view, ACTPolicy):
        raise ValueError(
            f"{type(view).__name__}: the arrows are our ACT's (LeRobot's ACT folders load as it); "
            "measure other policies with feature_effects"
        )
    return view


def _n_frames(observation: Observation) -> int:
    parts = (*observation.images.values(), observation.state, observation.environment_state)
    return next(len(part) for part in parts if part is not None)
