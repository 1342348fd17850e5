"""What callbacks say of features: concepts they tell, frames they fire on, how well codes do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from autoencoders.metrics import ReconstructionMetrics, ReconstructionQuality
from autoencoders.sae import SparseAutoencoder
from datamodules.base import DemonstrationDataModule
from envs.replay import recorded_pictures
from features.concepts import Concepts
from features.describe import position_label
from features.peaks import find_peaks
from features.record import FeatureRecord
from features.statistics import Associations, associate
from features.taps import read_activations
from policies.act import ACTPolicy
from policies.interface import Batch, PolicyView
from rendering.feature_scenes import PictureOf, ShownFeature, feature_rows
from rendering.features import feature_strip

FRAMES_AT_ONCE = 256
LATENTS_AT_ONCE = 256
N_STRIP_FRAMES = 6
FPS = 10.0
"""Of data that do not state it; it only decides how far apart the shown frames lie."""


def read_in_parts(
    view: PolicyView, layer: str, batch: Batch, device: torch.device
) -> Float[Tensor, "frame token dim"]:
    """Activations of frames, some at a time."""
    return torch.cat(
        [
            read_activations(
                view, batch.rows(slice(start, start + FRAMES_AT_ONCE)).observation.to(device), layer
            )
            for start in range(0, len(batch), FRAMES_AT_ONCE)
        ]
    )


def states_of(
    data: DemonstrationDataModule, episodes: Sequence[int]
) -> Float[Tensor, "frame simulator"] | None:
    """Simulator states of all frames of some episodes, where the data have them."""
    columns = data.store.columns
    if "simulator_state" not in columns:
        return None
    return torch.cat([columns["simulator_state"][data.store.rows(number)] for number in episodes])


def spread_frames(data: DemonstrationDataModule, episodes: Sequence[int], n_wanted: int) -> Batch:
    """Frames evenly spread over some episodes; all where there are fewer."""
    dataset = data.dataset(episodes)
    rows = torch.linspace(0, len(dataset) - 1, min(n_wanted, len(dataset))).round().long()
    return dataset.__getitems__(rows.tolist())


def quality_of(
    sae: SparseAutoencoder, activations: Float[Tensor, "frame token dim"]
) -> ReconstructionQuality:
    """How well codes stand for activations, over all tokens."""
    metrics = ReconstructionMetrics(sae.d_in, sae.n_latents)
    for part in activations.split(FRAMES_AT_ONCE):
        vectors = rearrange(part, "frame token dim -> (frame token) dim")
        codes = sae.encode(vectors)
        metrics.update(vectors, sae.decode(codes), (codes > 0).sum(0))
    return metrics.compute()


@dataclass(frozen=True)
class ConceptFindings:
    """The best single feature for each concept, chosen and measured on different episodes."""

    scalars: dict[str, float]
    """``auroc_<concept>`` and ``r_<concept>``, of the chosen feature, in the other episodes."""
    titles: dict[int, str]
    """Feature to what it tells best; strongest first."""


def find_concepts(record: FeatureRecord, concepts: Concepts) -> ConceptFindings:
    """Look for features that tell concepts: every other episode chooses, the others measure.

    Args:
        record: Of at least two episodes.
        concepts: Of the same frames.
    """
    chooses = record.episode_place % 2 == 0
    halves = []
    for index in (chooses, ~chooses):
        part = record.rows(index)
        halves.append(associate(_blocks(part), concepts.rows(index), part.episode_index))
    best = best_features(*halves)
    scalars = {f"{'auroc' if each.is_binary else 'r'}_{each.concept}": each.value for each in best}
    return ConceptFindings(scalars, concept_titles(best))


@dataclass(frozen=True)
class BestFeature:
    """The feature that tells one concept best, chosen on some frames and measured on others."""

    row: int
    """Of the associations."""
    concept: str
    is_binary: bool
    value: float
    """AUROC of a binary concept, r of a continuous one, on the frames that measure."""
    size: float
    """Distance from chance, 0 to 1: ``|2 AUROC - 1|`` or ``|r|``."""

    @property
    def title(self) -> str:
        """What the feature tells, in one line."""
        return f"{self.concept} {'AUROC' if self.is_binary else 'r'} {self.value:.2f}"


def best_features(chooses: Associations, measures: Associations) -> list[BestFeature]:
    """Choose a feature for every concept; none where the other frames have no value.

    Args:
        chooses: Of the frames that choose.
        measures: Of the same features and concepts, on the frames that measure.
    """
    found = []
    deviation = chooses.deviation.nan_to_num(-1.0)
    for column, (name, is_binary) in enumerate(zip(chooses.names, chooses.is_binary, strict=True)):
        row = int(deviation[:, column].argmax())
        value = float(measures.strength[row, column])
        if np.isfinite(value):
            size = float(measures.deviation[row, column]) * (2 if is_binary else 1)
            found.append(BestFeature(row, name, is_binary, value, size))
    return found


def concept_titles(best: Sequence[BestFeature]) -> dict[int, str]:
    """Row to the title of the concept that it tells best; the strongest first.

    A feature without any distance from chance has no title.
    """
    titles: dict[int, str] = {}
    for each in sorted(best, key=lambda each: -each.size):
        if each.size > 0:
            titles.setdefault(each.row, each.title)
    return titles


def _blocks(record: FeatureRecord) -> Iterator[Float[Tensor, "frame _"]]:
    for start in range(0, record.n_latents, LATENTS_AT_ONCE):
        yield record.frames_by_latents(range(start, min(start + LATENTS_AT_ONCE, record.n_latents)))


def draw_features(
    record: FeatureRecord,
    data: DemonstrationDataModule,
    view: PolicyView,
    titles: Mapping[int, str],
    n_features: int,
    note: str,
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Draw features on the frames where they are strongest; None for data without a camera.

    Features that tell a concept come first, then those with the largest share of all activity.

    Args:
        record: Of episodes of the data.
        data: Holds the pictures.
        view: The policy; its token stride is the size of a cell.
        titles: Feature to a line of text, those that come first.
        n_features: Rows of the picture.
        note: How to read it.
    """
    camera = next(iter(view.data_schema.cameras), None)
    if camera is None:
        return None
    peaks = find_peaks(record, data.fps or FPS, N_STRIP_FRAMES)
    mass = torch.bincount(record.latent, record.value.double(), minlength=record.n_latents)
    share = mass / mass.sum().clamp_min(1e-12)
    by_mass = [int(latent) for latent in mass.argsort(descending=True) if mass[latent] > 0]
    order = list(dict.fromkeys([*titles, *by_mass]))[:n_features]

    def where(latent: int) -> str:
        return position_label(record.positions[int(peaks.token[latent, 0])])

    shown = [
        ShownFeature(
            latent,
            f"feature {latent}, strongest at {where(latent)}: "
            + titles.get(latent, f"{share[latent]:.1%} of all activity"),
            peaks.row[latent][peaks.is_there[latent]].tolist(),
        )
        for latent in order
    ]
    if not shown:
        return None
    cell_px = view.network.token_stride if isinstance(view, ACTPolicy) else None
    rows = feature_rows(record, shown, _pictures(data, camera), camera, cell_px)
    return feature_strip(rows, note)


def _pictures(data: DemonstrationDataModule, camera: str) -> PictureOf:
    """Pictures of the data, by episode and step."""

    def picture_of(episode: int, step: int) -> UInt8[np.ndarray, "height width 3"]:
        batch = data.dataset([episode]).__getitems__([step])
        return next(recorded_pictures(batch.observation, camera))

    return picture_of
