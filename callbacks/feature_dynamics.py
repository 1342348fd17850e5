"""Which features a policy has at each checkpoint: an autoencoder follows its activations."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from autoencoders.files import AUTOENCODER_FOLDER, save_autoencoder
from autoencoders.fit import fit_autoencoder
from autoencoders.sae import BatchTopK, SparseAutoencoder
from callbacks.feature_findings import (
    concepts_of,
    draw_features,
    find_concepts,
    quality_of,
    read_in_parts,
)
from callbacks.run_folder import write_atomically
from callbacks.schedule import Diagnostic, undisturbed
from callbacks.views import policy_view
from envs.task import Task
from features.effects import behaviour_recovered
from features.record import record_features
from features.taps import find_tap
from policies.interface import Batch, Findings
from rendering.picture import write_png

PREFIX = "features"
SAME_FEATURE = 0.7
"""Cosine of directions from which a latent counts as the feature that it was."""


@dataclass(frozen=True)
class _Seen:
    """What the last checkpoint had."""

    sae: SparseAutoencoder
    is_live: Bool[Tensor, " latent"]


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
            }
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if saved := state_dict.get("autoencoder"):
            sae = BatchTopK(**saved["hyper_parameters"])
            sae.load_state_dict(saved["weights"])
            self._seen = _Seen(sae.eval(), saved["is_live"])
        super().load_state_dict(state_dict)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data that hold too little out, before anything starts.

        Raises:
            ValueError: If fewer than four episodes are held out.
        """
        super().setup(trainer, pl_module, stage)
        if len(_split(trainer)["val"]) < 4:
            raise ValueError(
                "features need four held-out episodes, for the threshold, to choose and to "
                "measure: raise --data.init_args.val_fraction"
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
        view, device = policy_view(module), module.device
        split, data = _split(trainer), trainer.datamodule  # pyright: ignore
        held_out = _spread(split["val"], self.n_val_episodes)

        def activations(episodes: Sequence[int]) -> Iterator[Float[Tensor, "frame token dim"]]:
            for number in episodes:
                yield read_in_parts(view, self.layer, data.episode(number), device)

        train = _spread(split["train"], self.n_train_episodes)
        vectors = torch.cat([_flat(each) for each in activations(train)])
        sae = self._fitted(vectors)
        sae.calibrate(_flat(each) for each in activations(held_out[::2]))

        batch = Batch.concatenate([data.episode(number) for number in held_out[1::2]])
        read = read_in_parts(view, self.layer, batch, device)
        metadata = {"layer": self.layer, "step": trainer.global_step}
        record = record_features(
            sae,
            [(read, batch.episode_index, batch.frame_index)],
            find_tap(view, self.layer).positions,
            metadata,
        )
        quality = quality_of(sae, read)
        scalars = {f"{PREFIX}/{key}": value for key, value in quality.scalars().items()}
        rows = torch.linspace(0, len(batch) - 1, min(self.n_behaviour_frames, len(batch)))
        few = batch.rows(rows.round().long()).to(device)
        behaviour = behaviour_recovered(view, self.layer, sae, vectors.mean(0), few).summary()
        for name in ("action_score", "sae_px", "mean_px", "l1_recovered"):
            scalars[f"{PREFIX}/{name}"] = behaviour[name].value
        now = _Seen(sae, quality.density > 0)
        if self._seen is not None:
            changes = _changes(self._seen, now)
            scalars |= {f"{PREFIX}/{key}": value for key, value in changes.items()}
        self._seen = now
        titles: dict[int, str] = {}
        concepts = concepts_of(self.task, batch)
        if concepts is not None and record.n_episodes > 1:
            found = find_concepts(record, concepts)
            titles = found.titles
            scalars |= {f"{PREFIX}/{key}": value for key, value in found.scalars.items()}
        save_autoencoder(sae, folder / AUTOENCODER_FOLDER, metadata, quality.density)
        write_atomically(folder / "metrics.json", json.dumps(scalars, indent=1) + "\n")
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
        return Findings(scalars=scalars, images=images)

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


def _changes(before: _Seen, now: _Seen) -> dict[str, float]:
    """How many features stayed, came and went since the last checkpoint."""
    cosine = (before.sae.directions.cpu() * now.sae.directions.cpu()).sum(-1)
    both = before.is_live & now.is_live
    persists = both & (cosine >= SAME_FEATURE)
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


def _flat(activations: Float[Tensor, "frame token dim"]) -> Float[Tensor, "row dim"]:
    return rearrange(activations, "frame token dim -> (frame token) dim")
