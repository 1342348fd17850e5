"""Which features a policy has at each checkpoint: an autoencoder follows its activations."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from autoencoders.files import AUTOENCODER_FOLDER, save_autoencoder
from autoencoders.fit import fit_autoencoder
from autoencoders.sae import BatchTopK, SparseAutoencoder
from callbacks.feature_findings import (
    draw_features,
    find_concepts,
    quality_of,
    read_in_parts,
    spread_frames,
    states_of,
)
from callbacks.schedule import Diagnostic, undisturbed
from callbacks.views import policy_view
from datamodules.base import DemonstrationDataModule
from envs.concepts import known_concepts
from envs.task import Task
from features.effects import behaviour_recovered
from features.record import record_features
from features.taps import find_tap
from policies.atomic_files import write_atomically
from policies.interface import Findings, Table, in_unit
from policies.json_files import json_text
from rendering.picture import write_png

PREFIX = "features"
N_LEAST_EPISODES = 4
N_MOST_VECTORS = 262_144
"""Activations that an autoencoder is fitted to, at most: random ones of the training episodes."""
SAME_FEATURE = 0.7
"""Cosine of directions from which a latent counts as the feature that it was."""


@dataclass(frozen=True)
class _Seen:
    """What the last checkpoint had."""

    sae: SparseAutoencoder
    is_live: Bool[Tensor, " latent"]
    born_at: Int[Tensor, " latent"]
    """Optimiser step of the checkpoint at which the present feature was first seen."""


class FeatureDynamics(Diagnostic):
    """Fit an autoencoder to the policy's activations, starting from the last checkpoint's.

    A latent keeps its number, so that features are seen to come and go: one *persists* that is
    live before and now, and whose direction has turned by no more than a cosine of 0.7; one is
    *born* that is live now and did not persist, and has *died* that was live and did not persist.

    Args:
        layer: Where activations are read: encoder, decoder, backbone, or the path of a module.
        task: Simulator whose concepts features are held against; none when null.
        n_train_episodes: Training episodes, evenly spread, whose frames it is fitted to.
        n_val_episodes: Held-out episodes: every other one sets the threshold, the rest measure.
        n_latents: Width of the autoencoder.
        k: Active latents of a vector, on average.
        n_steps: Optimiser steps at the first checkpoint; half as many at later ones.
        batch_size: Vectors of a step.
        n_behaviour_frames: Held-out frames on which the policy acts on reconstructions.
        n_features_shown: Rows of the picture.
        every_n_validations: Run at every n-th validation.
        at_start: Also look at the untrained policy.
        strict: Let an error of this diagnostic stop the run.
        max_share: Share of the wall time that it may take; skipped where it would take more.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        layer: str = "encoder",
        task: Task | None = None,
        n_train_episodes: int = 40,
        n_val_episodes: int = 20,
        n_latents: int = 512,
        k: int = 16,
        n_steps: int = 400,
        batch_size: int = 1024,
        n_behaviour_frames: int = 256,
        n_features_shown: int = 8,
        every_n_validations: int = 1,
        at_start: bool = False,
        strict: bool = False,
        max_share: float | None = 0.05,
    ):
        for name, value, least in (
            ("n_train_episodes", n_train_episodes, 1),
            ("n_val_episodes", n_val_episodes, 4),
            ("n_latents", n_latents, 2),
            ("k", k, 1),
            ("n_steps", n_steps, 2),
            ("batch_size", batch_size, 1),
            ("n_behaviour_frames", n_behaviour_frames, 1),
            ("n_features_shown", n_features_shown, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if k > n_latents:
            raise ValueError(f"k is {k}, of {n_latents} latents; give at most as many")
        self.layer = layer
        self.task = task
        self.n_train_episodes = n_train_episodes
        self.n_val_episodes = n_val_episodes
        self.n_latents = n_latents
        self.k = k
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.n_behaviour_frames = n_behaviour_frames
        self.n_features_shown = n_features_shown
        self._seen: _Seen | None = None
        self._is_idle = False
        super().__init__(
            every_n_validations=every_n_validations,
            at_start=at_start,
            strict=strict,
            max_share=max_share,
        )

    @override
    def _keep_state(self) -> None:
        super()._keep_state()
        self._kept = self._seen

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self._kept is not None:
            sae = self._kept.sae
            state["autoencoder"] = {
                "hyper_parameters": sae.hyper_parameters,
                "weights": {name: value.cpu() for name, value in sae.state_dict().items()},
                "is_live": self._kept.is_live,
                "born_at": self._kept.born_at,
            }
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if saved := state_dict.get("autoencoder"):
            sae = BatchTopK(**saved["hyper_parameters"])
            sae.load_state_dict(saved["weights"])
            self._seen = _Seen(sae.eval(), saved["is_live"], saved["born_at"])
        super().load_state_dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say before anything starts if the data hold too little out to look at features."""
        super().setup(trainer, pl_module, stage)
        self._is_idle = len(_split(trainer)["val"]) < N_LEAST_EPISODES
        if self._is_idle:
            rank_zero_warn(
                f"features are left out: they take {N_LEAST_EPISODES} held-out episodes, for the "
                "threshold, to choose and to measure; raise --data.init_args.val_fraction"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the layer, so that a wrong name is said at once.

        Raises:
            TypeError: If the module trains no policy.
            ValueError: If there is no such layer.
        """
        with undisturbed(pl_module):
            find_tap(policy_view(pl_module), self.layer)

    @override
    def diagnose(self, trainer: Trainer, module: LightningModule, folder: Path) -> Findings:
        """Fit, measure, compare with the last checkpoint, and draw."""
        if self._is_idle:
            return Findings()
        view, device = policy_view(module), module.device
        split, data = _split(trainer), trainer.datamodule  # pyright: ignore
        held_out = _spread(split["val"], self.n_val_episodes)

        def activations(episodes: Sequence[int]) -> Iterator[Float[Tensor, "frame token dim"]]:
            for number in episodes:
                yield read_in_parts(view, self.layer, data.episode(number), device)

        train = _spread(split["train"], self.n_train_episodes)
        n_each = N_MOST_VECTORS // len(train)
        vectors = torch.cat([_some(_flat(each), n_each) for each in activations(train)])
        sae = self._fitted(vectors)
        n_each = N_MOST_VECTORS // len(held_out)
        sae.calibrate(_some(_flat(each), n_each) for each in activations(held_out[::2]))

        measured = held_out[1::2]
        read = torch.cat(list(activations(measured)))
        index = _index(data, measured)
        metadata = {"layer": self.layer, "step": trainer.global_step}
        positions = find_tap(view, self.layer).positions
        record = record_features(sae, [(read, *index)], positions, metadata)
        quality = quality_of(sae, read)
        scalars = {f"{PREFIX}/{key}": value for key, value in quality.scalars().items()}
        few = spread_frames(data, measured, self.n_behaviour_frames).to(device)
        behaviour = behaviour_recovered(view, self.layer, sae, vectors.mean(0), few).summary()
        for name in ("action_score", "sae_px", "mean_px", "l1_recovered"):
            unit = getattr(module, "unit", "px")
            scalars[f"{PREFIX}/{in_unit(name, unit)}"] = behaviour[name].value
        now = self._now(sae, quality.density > 0, trainer.global_step)
        if self._seen is not None:
            changes = _changes(self._seen, now)
            scalars |= {f"{PREFIX}/{key}": value for key, value in changes.items()}
        self._seen = now
        titles: dict[int, str] = {}
        concepts = known_concepts(self.task, states_of(data, measured), *index)
        if concepts is not None and record.n_episodes > 1:
            found = find_concepts(record, concepts)
            titles = found.titles
            scalars |= {f"{PREFIX}/{key}": value for key, value in found.scalars.items()}
        save_autoencoder(sae, folder / AUTOENCODER_FOLDER, metadata, quality.density)
        write_atomically(folder / "metrics.json", json_text(scalars))
        strip = draw_features(
            record,
            data,
            view,
            titles,
            self.n_features_shown,
            f"Step {trainer.global_step}. Each row: the frames of held-out episodes where a "
            "feature is strongest, with its activation; colours from 0 to the row's largest. "
            "Concepts: chosen on every other episode, measured on the rest.",
        )
        images = {}
        if strip is not None:
            images[f"{PREFIX}/strip"] = str(write_png(folder / "strip.png", strip))
        tables = {f"{PREFIX}/births": _births(now, quality.density, titles)}
        return Findings(scalars=scalars, images=images, tables=tables)

    def _now(self, sae: SparseAutoencoder, is_live: Bool[Tensor, " latent"], step: int) -> "_Seen":
        """This checkpoint's features, each with the step at which it was first seen."""
        born_at = torch.full((sae.n_latents,), step)
        if self._seen is not None:
            persists = _persisting(self._seen, _Seen(sae, is_live, born_at))
            born_at = torch.where(persists, self._seen.born_at, born_at)
        return _Seen(sae, is_live, born_at)

    def _fitted(self, vectors: Float[Tensor, "row dim"]) -> SparseAutoencoder:
        """Go on from the last checkpoint's autoencoder, or begin."""
        if self._seen is not None:
            sae, n_steps = copy.deepcopy(self._seen.sae), self.n_steps // 2
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                sae = BatchTopK(vectors.shape[1], self.n_latents, k=self.k)
            n_steps = self.n_steps
        return fit_autoencoder(sae.to(vectors.device), vectors, n_steps, self.batch_size)


def _cosines(before: _Seen, now: _Seen) -> Float[Tensor, " latent"]:
    """How far the direction of each latent has turned."""
    return (before.sae.directions.cpu() * now.sae.directions.cpu()).sum(-1).detach()


def _persisting(before: _Seen, now: _Seen) -> Bool[Tensor, " latent"]:
    """Latents that are live in both, and the same feature."""
    return before.is_live & now.is_live & (_cosines(before, now) >= SAME_FEATURE)


def _births(now: _Seen, density: Float[Tensor, " latent"], titles: Mapping[int, str]) -> Table:
    """Every live feature: when it was first seen, how often it fires, what it tells."""
    live = now.is_live.nonzero()[:, 0].tolist()
    return Table(
        columns=("feature", "born_at_step", "density", "tells"),
        rows=tuple(
            (latent, int(now.born_at[latent]), float(density[latent]), titles.get(latent))
            for latent in live
        ),
    )


def _changes(before: _Seen, now: _Seen) -> dict[str, float]:
    """How many features stayed, came and went since the last checkpoint."""
    cosine, both = _cosines(before, now), before.is_live & now.is_live
    persists = _persisting(before, now)
    changes = {
        "persisting": float(persists.sum()),
        "born": float((now.is_live & ~persists).sum()),
        "died": float((before.is_live & ~persists).sum()),
    }
    if both.any():
        changes["mean_cosine"] = float(cosine[both].mean())
    return changes


def _split(trainer: Trainer) -> dict[str, Any]:
    return trainer.datamodule.split  # pyright: ignore[reportAttributeAccessIssue]


def _spread(episodes: Sequence[int], n_wanted: int) -> list[int]:
    """Some of the episodes, evenly; all where there are fewer."""
    places = torch.linspace(0, len(episodes) - 1, min(n_wanted, len(episodes))).round().long()
    return [episodes[place] for place in places.tolist()]


def _index(
    data: DemonstrationDataModule, episodes: Sequence[int]
) -> tuple[Int[Tensor, " frame"], Int[Tensor, " frame"]]:
    """Episode number and step of every frame."""
    lengths = [data.source.episode_lengths[number] for number in episodes]
    steps = [torch.arange(length) for length in lengths]
    return torch.repeat_interleave(torch.tensor(episodes), torch.tensor(lengths)), torch.cat(steps)


def _some(vectors: Float[Tensor, "row dim"], n_most: int) -> Float[Tensor, "kept dim"]:
    """Random vectors, always the same; all where there are fewer."""
    if len(vectors) <= n_most:
        return vectors
    generator = torch.Generator().manual_seed(0)
    return vectors[torch.randperm(len(vectors), generator=generator)[:n_most].to(vectors.device)]


def _flat(activations: Float[Tensor, "frame token dim"]) -> Float[Tensor, "row dim"]:
    return rearrange(activations, "frame token dim -> (frame token) dim")
