"""What each feature is: how often, where and when it fires, and what that goes with.

Concepts are chosen on training episodes and measured on held-out ones: with hundreds of features
and dozens of concepts, the best of many would look good by chance alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from features.concepts import Concepts
from features.memorisation import Memorisation, memorisation
from features.peaks import Peaks, find_peaks
from features.place_fields import DEFAULT_GRID, PlaceFields, place_fields
from features.record import FeatureRecord
from features.statistics import LEVEL, Associations, associate
from features.taps import TokenPosition
from landscapes.grid import Grid
from policies.atomic_files import whole_file, write_atomically
from policies.json_files import json_text

if TYPE_CHECKING:
    import pyarrow

BLOCK_VALUES = 6 * 2**20
"""Entries of a dense block of features; several copies of 24 MB are alive at once."""
TABLE_FILE, SUMMARY_FILE = "features.parquet", "features.json"


@dataclass(frozen=True)
class Activity:
    """How strongly features fire, and at which tokens; NaN where a feature never fires."""

    token_density: Float64[Tensor, " latent"]
    """Share of all tokens at which it fires."""
    frame_density: Float64[Tensor, " latent"]
    """Share of the frames in which it fires at any token."""
    mean_activation: Float64[Tensor, " latent"]
    """Mean of its value at the tokens where it fires."""
    max_activation: Float64[Tensor, " latent"]
    spatial: Float64[Tensor, "latent token"]
    """Mean of its value at each token over all frames, silent ones included."""
    main_token: Int64[Tensor, " latent"]
    """Token at which it fires most often."""
    main_token_share: Float64[Tensor, " latent"]
    """Share of its firing that happens there."""


@dataclass(frozen=True)
class BestConcepts:
    """For each feature, the concept it goes with most closely on training frames."""

    concept: tuple[str | None, ...]
    """None where no concept has a value."""
    train: Float64[Tensor, " latent"]
    """AUROC, or r, on training frames."""
    held_out: Float64[Tensor, " latent"]
    """The same on held-out frames."""
    mutual_information_nats: Float64[Tensor, " latent"]
    """On held-out frames."""
    p: Float64[Tensor, " latent"]
    """On held-out frames, corrected for the number of features."""


@dataclass(frozen=True)
class FeatureDescriptions:
    """All features that fire at all; every tensor has one entry for each, in this order."""

    latents: Int64[Tensor, " latent"]
    """Their numbers in the autoencoder."""
    n_latents: int
    """Width of the autoencoder."""
    positions: tuple[TokenPosition, ...]
    n_frames: tuple[int, int]
    """Training and held-out frames."""
    concepts: Concepts
    """Of the held-out frames."""
    train: Activity
    held_out: Activity
    train_associations: Associations
    held_out_associations: Associations
    """With thresholds and p."""
    memorisation: Memorisation
    """Of all latents of the autoencoder, silent ones too."""
    train_peaks: Peaks
    """Of all latents."""
    held_out_peaks: Peaks
    """Of all latents."""
    places: Mapping[str, PlaceFields] = field(default_factory=dict)
    """Of all latents, on held-out frames, over the places of each object."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of the held-out record."""

    def best(self, is_binary: bool) -> BestConcepts:
        """Choose on training frames, and look up what held-out frames say of the choice."""
        train = self.train_associations.of_kind(is_binary)
        held_out = self.held_out_associations.of_kind(is_binary)
        if not train.names:
            nothing = torch.full((len(self.latents),), torch.nan, dtype=torch.float64)
            return BestConcepts((None,) * len(self.latents), *[nothing] * 4)
        deviation = train.deviation.nan_to_num(-1)
        best = deviation.argmax(1, keepdim=True)
        is_known = deviation.gather(1, best)[:, 0] >= 0

        def chosen(values: Float64[Tensor, "latent concept"] | None) -> Tensor:
            if values is None:
                return torch.full((len(self.latents),), torch.nan, dtype=torch.float64)
            return torch.where(is_known, values.gather(1, best)[:, 0], torch.nan)

        return BestConcepts(
            concept=tuple(
                train.names[place] if known else None
                for place, known in zip(best[:, 0].tolist(), is_known.tolist(), strict=True)
            ),
            train=chosen(train.strength),
            held_out=chosen(held_out.strength),
            mutual_information_nats=chosen(held_out.mutual_information_nats),
            p=chosen(held_out.p),
        )

    def to_table(self) -> "pyarrow.Table":
        """One row for each feature; null where something has no value.

        ``spatial`` has one number for each token; ``top_*`` and ``train_top_*`` list the frames of
        :attr:`held_out_peaks` and :attr:`train_peaks`, the strongest first; ``auroc_<concept>`` and
        ``r_<concept>`` are of held-out frames, with ``p_<concept>``.
        """
        import pyarrow as pa

        latents = self.latents
        columns: dict[str, Any] = {"latent": latents.tolist()}
        train, memory = self.train, self.memorisation
        labels = [position_label(position) for position in self.positions]
        columns |= {
            "token_density": _plain(train.token_density),
            "frame_density": _plain(train.frame_density),
            "frame_density_held_out": _plain(self.held_out.frame_density),
            "mean_activation": _plain(train.mean_activation),
            "max_activation": _plain(train.max_activation),
            "main_token": [labels[place] for place in train.main_token.tolist()],
            "main_token_share": _plain(train.main_token_share),
            "spatial": train.spatial.tolist(),
        }
        for name, is_binary in (("binary", True), ("continuous", False)):
            best = self.best(is_binary)
            measure = "auroc" if is_binary else "r"
            columns |= {
                f"best_{name}": list(best.concept),
                f"best_{name}_{measure}_train": _plain(best.train),
                f"best_{name}_{measure}": _plain(best.held_out),
                f"best_{name}_p": _plain(best.p),
                f"best_{name}_nats": _plain(best.mutual_information_nats),
            }
        columns |= {
            "onset_count": _plain(memory.train.onset_count[latents]),
            "episode_coverage": _plain(memory.train.episode_coverage[latents]),
            "relative_run_length": _plain(memory.train.relative_run_length[latents]),
            "episode_share": _plain(memory.train.episode_share[latents]),
            "episode_share_held_out": _plain(memory.held_out.episode_share[latents]),
            "episode_entropy": _plain(memory.train.episode_entropy[latents]),
            "generalisation_gap": _plain(memory.generalisation_gap[latents]),
            "is_general": memory.is_general[latents].tolist(),
        }
        for prefix, peaks in (("top", self.held_out_peaks), ("train_top", self.train_peaks)):
            columns |= _peak_columns(prefix, peaks, latents)
        for name, fields in self.places.items():
            columns[f"place_{name}_bits"] = _plain(fields.information_bits[latents])
            columns[f"place_{name}_p"] = _plain(fields.p[latents])
        found = self.held_out_associations
        for place, (name, is_binary) in enumerate(zip(found.names, found.is_binary, strict=True)):
            measure = "auroc" if is_binary else "r"
            columns[f"{measure}_{name}"] = _plain(found.strength[:, place])
            if found.p is not None:
                columns[f"p_{name}"] = _plain(found.p[:, place])
        types = {name: pa.string() for name in ("main_token", "best_binary", "best_continuous")}
        return pa.table(
            {name: pa.array(values, types.get(name)) for name, values in columns.items()}
        )

    def summary(self) -> dict[str, Any]:
        """What can be said of all features together, in plain values; None for what has no value.

        ``concepts`` has one entry for each: the feature that goes with it most closely on training
        frames (``latent``), what that is worth there (``train``) and on held-out frames
        (``held_out``, ``p``, ``nats``), the deviation that chance does not reach (``threshold``),
        and how many features pass it.
        """
        memory = self.memorisation
        share = memory.general_share()
        gap = memory.generalisation_gap[self.latents]
        found: dict[str, Any] = {
            "n_latents": self.n_latents,
            "n_live": len(self.latents),
            "n_frames_train": self.n_frames[0],
            "n_frames_held_out": self.n_frames[1],
            "n_episodes_train": len(memory.train.episode_frames),
            "n_episodes_held_out": len(memory.held_out.episode_frames),
            "tokens": [position_label(position) for position in self.positions],
            "general": {
                "rule": memory.rule,
                "share": _number(share.value),
                "low": _number(share.low),
                "high": _number(share.high),
                "median_generalisation_gap": _number(gap[gap.isfinite()].median())
                if gap.isfinite().any()
                else None,
            },
            "concepts": {},
            "places": {
                name: {"significant_share_p_01": _number(fields.significant_share())}
                for name, fields in self.places.items()
            },
            "metadata": dict(self.metadata),
        }
        train, held_out = self.train_associations, self.held_out_associations
        best = train.deviation.nan_to_num(-1).argmax(0).tolist()
        for place, name in enumerate(held_out.names):
            column = self.concepts.column(name)
            known = column[~column.isnan()]
            passed = None if held_out.p is None else int((held_out.p[:, place] <= LEVEL).sum())
            found["concepts"][name] = {
                "measure": "auroc" if held_out.is_binary[place] else "r",
                "unit": self.concepts.units[place],
                "n_known": len(known),
                "mean": _number(known.double().mean()),
                "latent": int(self.latents[best[place]]),
                "train": _number(train.strength[best[place], place]),
                "held_out": _number(held_out.strength[best[place], place]),
                "nats": _entry(held_out.mutual_information_nats, best[place], place),
                "p": _entry(held_out.p, best[place], place),
                "threshold": None
                if held_out.threshold is None
                else _number(held_out.threshold[place]),
                "n_significant": passed,
            }
        return found


def describe(
    train: FeatureRecord,
    held_out: FeatureRecord,
    train_concepts: Concepts,
    held_out_concepts: Concepts,
    fps: float,
    tokens: Sequence[int] | None = None,
    places: Mapping[str, tuple[str, str]] | None = None,
    grid: Grid = DEFAULT_GRID,
    n_permutations: int = 200,
    seed: int = 0,
    n_top_frames: int = 9,
    n_per_episode: int = 2,
    min_gap_s: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> FeatureDescriptions:
    """Describe every feature that fires.

    Args:
        train: Of episodes that the policy and the autoencoder were trained on.
        held_out: Of other episodes.
        train_concepts: Of the frames of ``train``.
        held_out_concepts: The same concepts of the frames of ``held_out``.
        fps: Steps in a second.
        tokens: Places of the tokens whose strongest activation is held against concepts; all when
            None.
        places: Name of an object to the concepts that are its x and y, for place fields; e.g.
            ``{"agent": ("agent_x_px", "agent_y_px")}``.
        grid: Cells of the place fields.
        n_permutations: Chance pairings of episodes, for thresholds and for place fields.
        seed: Of the pairings.
        n_top_frames: Peaks of each feature, at most.
        n_per_episode: Peaks in an episode, at most.
        min_gap_s: Between peaks of an episode.
        advance: Called with the number of features after each block, twice for each feature.

    Raises:
        ValueError: If records and concepts do not belong together, records share an episode, or no
            feature fires.
    """
    for name, record, concepts in (
        ("train", train, train_concepts),
        ("held_out", held_out, held_out_concepts),
    ):
        if len(record) != len(concepts):
            raise ValueError(f"{name}: {len(record)} frames, concepts of {len(concepts)}")
    if train_concepts.names != held_out_concepts.names:
        raise ValueError(
            f"concepts {train_concepts.names} and {held_out_concepts.names}: give the same of both"
        )
    memory = memorisation(train, held_out)
    fires = memory.train.density + memory.held_out.density > 0
    if not fires.any():
        raise ValueError("no feature fires in any frame; the autoencoder is of other activations")
    latents = fires.nonzero()[:, 0]

    def blocks(record: FeatureRecord) -> Iterator[Float[Tensor, "frame _"]]:
        for part in latents.split(max(1, BLOCK_VALUES // max(len(record), 1))):
            yield record.frames_by_latents(part.tolist(), tokens=tokens)
            if advance is not None:
                advance(len(part))

    return FeatureDescriptions(
        latents=latents,
        n_latents=train.n_latents,
        positions=train.positions,
        n_frames=(len(train), len(held_out)),
        concepts=held_out_concepts,
        train=_activity(train, latents),
        held_out=_activity(held_out, latents),
        train_associations=associate(
            blocks(train), train_concepts, train.episode_index, with_information=False
        ),
        held_out_associations=associate(
            blocks(held_out), held_out_concepts, held_out.episode_index, n_permutations, seed
        ),
        memorisation=memory,
        train_peaks=find_peaks(train, fps, n_top_frames, n_per_episode, min_gap_s),
        held_out_peaks=find_peaks(held_out, fps, n_top_frames, n_per_episode, min_gap_s),
        places={
            name: place_fields(
                held_out,
                torch.stack([held_out_concepts.column(each) for each in xy], dim=-1),
                grid,
                n_permutations,
                seed,
            )
            for name, xy in (places or {}).items()
        },
        metadata=held_out.metadata,
    )


def write_descriptions(
    folder: Path,
    descriptions: FeatureDescriptions,
    columns: Mapping[str, Sequence[Any]] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``features.parquet``, one row for each feature, and ``features.json``, the summary.

    Args:
        folder: Is made; what it holds of the same names is replaced.
        descriptions: Of some features.
        columns: More columns of the table, one value for each feature.
        summary: More entries of the summary, in plain values.

    Returns:
        The folder.
    """
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = descriptions.to_table()
    for name, values in (columns or {}).items():
        table = table.append_column(name, pa.array(values))
    with whole_file(folder / TABLE_FILE) as path:
        parquet.write_table(table, path)
    found = {**descriptions.summary(), **(summary or {})}
    write_atomically(folder / SUMMARY_FILE, json_text(found))
    return folder


def position_label(position: TokenPosition) -> str:
    """A token in words, e.g. ``state``, ``query[3]`` or ``image[0, 2]``."""
    where = [str(place) for place in (position.row, position.column) if place is not None]
    return f"{position.name}[{', '.join(where)}]" if where else position.name


def _activity(record: FeatureRecord, latents: Int64[Tensor, " latent"]) -> Activity:
    total, count = (each[latents] for each in record.token_totals())
    fired = count.sum(1).double()
    n_frames, n_tokens = len(record), len(record.positions)
    activity = record.frame_activity
    largest = torch.full((record.n_latents,), torch.nan).scatter_reduce(
        0, activity.latent.long(), activity.value, "amax", include_self=False
    )
    most = count.max(1)
    return Activity(
        token_density=fired / (n_frames * n_tokens),
        frame_density=activity.start.diff()[latents].double() / n_frames,
        mean_activation=total.sum(1) / fired,
        max_activation=largest[latents].double(),
        spatial=total / n_frames,
        main_token=most.indices,
        main_token_share=most.values / fired,
    )


def _peak_columns(prefix: str, peaks: Peaks, latents: Int64[Tensor, " latent"]) -> dict[str, Any]:
    is_there = peaks.is_there[latents]

    def rows(values: Tensor) -> list[list[Any]]:
        return [row[there].tolist() for row, there in zip(values[latents], is_there, strict=True)]

    return {
        f"{prefix}_episode": rows(peaks.episode_index),
        f"{prefix}_frame": rows(peaks.frame_index),
        f"{prefix}_token": rows(peaks.token),
        f"{prefix}_value": rows(peaks.value),
    }


def _number(value: float | Tensor) -> float | None:
    """A plain number; None for one that JSON cannot say."""
    number = float(value)
    return number if math.isfinite(number) else None


def _entry(values: Tensor | None, row: int, column: int) -> float | None:
    return None if values is None else _number(values[row, column])


def _plain(values: Float[Tensor, " latent"]) -> Sequence[float | None]:
    return [_number(value) for value in values.tolist()]
