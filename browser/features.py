"""The tab of features: what is known of each, its moments, and what it does when it is turned.

Numbers are those of ``analyze.py features describe``; what depends on a chosen frame is computed
when it is asked for, by the code of ``analyze.py features steer``.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from autoencoders.sae import SparseAutoencoder
from browser.clips import ClipRequest, ClipStudio
from browser.notes import Note, NoteBook, NoteConflictError
from datamodules.activations import ActivationDataModule
from envs.push_t import PushTTask
from features.concepts import Concepts
from features.describe import SUMMARY_FILE, TABLE_FILE, position_label
from features.effects import FeatureProbe, dose_response, random_direction_effects
from features.place_fields import place_fields
from features.record import FeatureRecord
from features.splice import Intervention, random_directions, splice
from features.taps import edit_activations, read_activations
from landscapes.grid import Grid
from policies.act import ACTPolicy
from policies.interface import Batch, Observation, in_unit
from policies.json_files import MAX_BYTES, parse_json, read_json
from rendering.colour import colour_table
from rendering.features import COLORMAP
from rendering.picture import encode_png

FPS = 10.0
"""Of data that do not state it."""
CLIP_HALF_S = 1.5
"""Before and after the moment that a clip is about."""
N_DIRECTIONS = 32
"""Random directions beside a feature on one frame."""
N_MEASURED_DIRECTIONS = 100
"""The same where many frames are measured."""
N_MEASURED_FRAMES = 32
N_EFFECT_FRAMES = 16
"""Of the frames on which a feature is ablated beside directions, at most."""
MOST_DIRECTIONS = 256
MAX_CELLS = 1 << 24
"""Of the table of features; larger ones are not read."""
MOST_SCALE = 1e3
"""Beyond any use, but not beyond numbers."""
IN_ACTION_UNIT = ("ablated_px", "ablated_arrow_px", "doubled_px", "doubled_arrow_px")
"""Columns that the table names after the unit of the actions."""
COLUMNS = (
    "frame_density_held_out",
    "ablated_px",
    "doubled_px",
    "best_binary",
    "best_binary_auroc",
    "best_binary_auroc_train",
    "best_binary_p",
    "best_continuous",
    "best_continuous_r",
    "best_continuous_r_train",
    "best_continuous_p",
    "max_activation",
    "main_token",
    "is_general",
)
"""Of the table, in the list of features."""


@dataclass(frozen=True)
class Descriptions:
    """What ``analyze.py features describe`` wrote."""

    rows: Mapping[int, Mapping[str, Any]]
    """Feature to its row of ``features.parquet``; those that never fire have none."""
    summary: Mapping[str, Any]
    """``features.json``."""


def read_descriptions(folder: Path) -> Descriptions:
    """Read a folder of ``analyze.py features describe``.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    for name in (TABLE_FILE, SUMMARY_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: has no {name}; give the --output_dir of analyze.py features describe"
            )
    try:
        with parquet.ParquetFile(folder / TABLE_FILE) as file:
            footer = file.metadata
            groups = (footer.row_group(index) for index in range(footer.num_row_groups))
            n_bytes = sum(group.total_byte_size for group in groups)
            if footer.num_rows * footer.num_columns > MAX_CELLS or n_bytes > MAX_BYTES:
                raise ValueError(
                    f"{TABLE_FILE} has {footer.num_rows:,} rows of {footer.num_columns} columns, "
                    f"{n_bytes:,} bytes"
                )
            rows = file.read().to_pylist()
        summary = read_json(folder / SUMMARY_FILE)
    except (ValueError, OSError, MemoryError, pa.ArrowException) as error:
        raise ValueError(
            f"{folder}: cannot be read ({error}); describe the features again"
        ) from error
    if not all(type(row.get("latent")) is int for row in rows):
        raise ValueError(f"{folder / TABLE_FILE}: has rows without latent; describe them again")
    if not isinstance(summary.get("action_unit", "px"), str):
        raise ValueError(f"{folder / SUMMARY_FILE}: action_unit is no text; describe them again")
    # The page has one name for each, whatever the unit of the actions.
    names = {in_unit(name, summary.get("action_unit", "px")): name for name in IN_ACTION_UNIT}
    described = {
        int(row["latent"]): {names.get(str(name), str(name)): each for name, each in row.items()}
        for row in rows
    }
    return Descriptions(described, summary)


@dataclass(frozen=True)
class Moment:
    """A frame of an episode."""

    episode: int
    frame: int
    """Step in the episode."""


class FeatureLibrary:
    """Everything that the page asks about the features of one policy.

    Args:
        described: What is known of them.
        record: What they did in held-out episodes.
        concepts: What is known of the frames of the record.
        data: The policy, where it is tapped, and demonstrations that hold the record's episodes.
        sae: Its autoencoder, on the policy's device.
        clips: Folder for videos.

    Raises:
        ValueError: If the record is of another autoencoder.
    """

    def __init__(
        self,
        described: Descriptions,
        record: FeatureRecord,
        concepts: Concepts,
        data: ActivationDataModule,
        sae: SparseAutoencoder,
        clips: Path,
    ) -> None:
        if record.n_latents != sae.n_latents:
            raise ValueError(
                f"descriptions of {record.n_latents} features, the autoencoder has "
                f"{sae.n_latents}; describe its features again"
            )
        self.described = described
        self.record = record
        self.concepts = concepts
        self.data = data
        self.sae = sae
        self.view = data.policy
        self.unit = data.loaded_policy.action_unit
        self.fps = data.demonstrations.fps or FPS
        self.studio = ClipStudio(record, data.demonstrations, self.view, self.fps, clips)
        self.episodes: dict[int, tuple[int, int]] = _episode_rows(record)
        """Number to the rows of the record, first and behind the last."""
        self.obstacle = steering_obstacle(data)
        """Why features cannot be turned here; None if they can."""
        self.lock = threading.Lock()
        """Held while the policy predicts: its hooks are not for several threads at once."""
        self._labels = [position_label(position) for position in record.positions]
        self._places = {
            name: place_fields(
                record,
                torch.stack([concepts.column(x_name), concepts.column(y_name)], -1),
                n_permutations=0,
            )
            for name, (x_name, y_name) in concepts.places.items()
        }
        self._probe = lru_cache(maxsize=8)(self._new_probe)

    # What is known

    def listing(self) -> dict[str, Any]:
        """All features in columns, and what is said of them together; plain values."""
        latents = range(self.sae.n_latents)
        rows = self.described.rows
        summary = self.described.summary
        return {
            "n_latents": self.sae.n_latents,
            "n_live": len(rows),
            "columns": {
                "latent": list(latents),
                **{
                    name: [rows[each].get(name) if each in rows else None for each in latents]
                    for name in COLUMNS
                },
            },
            "concepts": list(summary["concepts"]),
            "queries": (summary.get("effects") or {}).get("queries"),
            "n_episodes": {
                "train": summary["n_episodes_train"],
                "held_out": summary["n_episodes_held_out"],
            },
            "n_frames_held_out": summary["n_frames_held_out"],
            "general_rule": summary["general"]["rule"],
            "split": summary.get("split"),
            "layer": self.data.layer,
            "unit": self.unit,
            "fps": self.fps,
            "fps_is_known": self.data.demonstrations.fps is not None,
            "episodes": {str(n): stop - start for n, (start, stop) in self.episodes.items()},
            "cameras": list(self.studio.cameras),
            "chunk_size": self.view.chunk_size,
            "action_dim": self.view.data_schema.action_dim,
            "board": self._board(),
            "obstacle": self.obstacle,
            "can_foretell": self._can_foretell,
            "colours": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in colour_table(COLORMAP).tolist()],
        }

    def detail(self, latent: int) -> dict[str, Any]:
        """Everything that is known of one feature; plain values."""
        self.check(latent)
        row = self.described.rows.get(latent)
        found: dict[str, Any] = {"latent": latent, "is_live": row is not None}
        if row is None:
            return found
        concepts = self.described.summary["concepts"]
        scores = [
            {
                "name": name,
                "measure": facts["measure"],
                "value": row.get(f"{facts['measure']}_{name}"),
                "p": row.get(f"p_{name}"),
                "mean": facts["mean"],
                "unit": facts["unit"],
            }
            for name, facts in concepts.items()
        ]
        kept = ("spatial", "top_token", "train_top_token")
        return {
            **found,
            "numbers": {
                name: value
                for name, value in row.items()
                if name not in kept and not name.startswith(("r_", "auroc_", "p_"))
            },
            "top": self._top(latent),
            "clips": self._moments(row),
            "concepts": sorted(scores, key=_distance_from_chance, reverse=True),
            "tokens": self._tokens(row["spatial"]),
            "places": {name: self._place(name, row, latent) for name in self._places},
        }

    def timeline(self, latent: int, episode: int) -> dict[str, Any]:
        """A feature's strongest token in every frame of an episode, and its best concepts."""
        self.check(latent)
        start, stop = self._rows_of(episode)
        activity = self.record.frame_activity
        entries = slice(int(activity.start[latent]), int(activity.start[latent + 1]))
        frames = activity.frame[entries].long()
        inside = (frames >= start) & (frames < stop)
        values = torch.zeros(stop - start)
        values[frames[inside] - start] = activity.value[entries][inside]
        tokens: list[str | None] = [None] * (stop - start)
        places = activity.token[entries][inside].tolist()
        for place, token in zip((frames[inside] - start).tolist(), places, strict=True):
            tokens[place] = self._labels[token]
        return {
            "episode": episode,
            "values": _rounded(values),
            "tokens": tokens,
            "top": self._top(latent),
            "concepts": [
                {
                    "name": name,
                    "unit": self.concepts.units[self.concepts.names.index(name)],
                    "is_binary": self.concepts.is_binary[self.concepts.names.index(name)],
                    "values": _rounded(self.concepts.column(name)[start:stop]),
                }
                for name in self._best_concepts(latent)
            ],
        }

    # What it looks like

    def clip(
        self, latent: int, moment: Moment, camera: str | None, has_map: bool, whole: bool
    ) -> Path:
        """A video around a moment, or of the whole episode."""
        self.check(latent)
        last = self._check_moment(moment)
        first = 0
        if not whole:
            reach = round(CLIP_HALF_S * self.fps)
            first, last = max(0, moment.frame - reach), min(last, moment.frame + reach)
        asked = ClipRequest(
            latent, moment.episode, first, last, self.studio.check_camera(camera), has_map
        )
        return self.studio.clip(asked, self._top(latent))

    def frame_png(self, moment: Moment, camera: str | None) -> bytes:
        """What the policy saw."""
        self._check_moment(moment)
        name = self.studio.check_camera(camera)
        return encode_png(self.studio.picture(moment.episode, moment.frame, name))

    def map_png(self, latent: int, camera: str | None) -> bytes:
        """Mean activation in each cell of a camera, over its mean picture.

        Colours run to the largest mean of any token: next to a feature of the robot's state, what
        little happens in cells is dark.
        """
        self.check(latent)
        name = self.studio.check_camera(camera)
        row = self.described.rows.get(latent)
        values = None if row is None else self._grid(row["spatial"], name)
        top = 0.0 if row is None else max(row["spatial"])
        return encode_png(self.studio.mean_map(values, top, list(self.episodes), name))

    # What it does

    def steer(
        self,
        latent: int,
        moment: Moment,
        scale: float | None = None,
        clamp: float | None = None,
        n_directions: int = N_DIRECTIONS,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Turn a feature in one frame, and move as far along random directions.

        Args:
            latent: The feature.
            moment: The frame.
            scale: Factor of its codes, or
            clamp: its code on all tokens.
            n_directions: Random directions, each moving every token as far.
            seed: Of the directions.

        Returns:
            ``before`` and ``after``: the chunks; ``change_px`` of each chunk step; ``codes`` of the
            feature by token; ``directions_px``: 5 %, 50 % and 95 % quantile of the changes along
            directions, and ``p``: share of the directions that do at least as much, the feature
            counted in, both by chunk step.

        Raises:
            ValueError: If something is out of range, or features cannot be turned here.
        """
        self.check(latent)
        self._check_moment(moment)
        if self.obstacle is not None:
            raise ValueError(f"steering: {self.obstacle}")
        for name, value in (("scale", scale), ("clamp", clamp)):
            if value is not None and not abs(value) <= MOST_SCALE:
                raise ValueError(f"{name} {value}: give a number of at most {MOST_SCALE:g}")
        if not 0 <= n_directions <= MOST_DIRECTIONS:
            raise ValueError(f"directions {n_directions}: give 0 to {MOST_DIRECTIONS}")
        intervention = Intervention((latent,), scale=scale, clamp=clamp)
        with self.lock, torch.inference_mode():
            probe, before = self._probe(latent, moment)
            codes = self.sae.encode(probe.activations)[0, :, latent]
            displacement = intervention.displacement(self.sae, probe.activations)
            after = splice(self.view, self.data.layer, intervention.edit(self.sae)).predict_chunk(
                probe.observation
            )
            others = self._other_changes(probe, displacement, n_directions, seed)
        change = (after - before)[0].double().cpu()
        return {
            "before": _rounded(before[0].cpu()),
            "after": _rounded(after[0].cpu()),
            "change_px": _rounded(change.norm(dim=-1)),
            "codes": [
                {"token": label, "code": float(code)}
                for label, code in zip(self._layer_labels, codes.tolist(), strict=True)
            ],
            **_beside(change.norm(dim=-1), others.norm(dim=-1)),
        }

    def measure(self, latent: int) -> dict[str, Any]:
        """Doses of a feature on frames where it fires, and its ablation beside random directions.

        Raises:
            ValueError: If it fires in no held-out frame, or features cannot be turned here.
        """
        self.check(latent)
        if self.obstacle is not None:
            raise ValueError(f"effects: {self.obstacle}")
        moments = self._active_moments(latent, N_MEASURED_FRAMES)
        if not moments:
            raise ValueError(f"feature {latent}: fires in no held-out frame")
        queries = (self.described.summary.get("effects") or {}).get("queries") or [0]
        with self.lock:
            observation = self._observe(moments)
            probe = FeatureProbe(
                self.view, self.data.layer, self.sae, observation, [latent], queries[:1]
            )
            directions = random_directions(N_MEASURED_DIRECTIONS, self.sae.d_in)
            # As many frames as the table of effects takes, though not the same ones.
            controls = random_direction_effects(
                probe, directions=directions, n_frames_per_latent=N_EFFECT_FRAMES
            )
            doses = dose_response(probe) if self._can_foretell else None
        own, others = controls.feature_px[0, 0], controls.control_px[0, :, 0]
        found: dict[str, Any] = {
            "query": queries[0],
            "n_frames": int(controls.n_frames[0]),
            "ablated_px": _number(own),
            "n_directions": len(others),
            "median_px": _number(others.median()),
            "high_px": _number(others.quantile(0.95)),
            "p": _number(controls.p_value[0, 0]),
            "doses": None,
        }
        if doses is not None:
            arrow = doses.predicted_px[0, -1, 0]
            along = torch.nn.functional.normalize(arrow, dim=0)
            found["doses"] = {
                "n_frames": int(doses.n_frames[0]),
                "doses": list(doses.doses),
                "unit": _number(doses.unit[0]),
                "measured_px": _rounded(doses.measured_px[0, :, 0] @ along),
                "predicted_px": _rounded(doses.predicted_px[0, :, 0] @ along),
                "length_px": _rounded(doses.measured_px[0, :, 0].norm(dim=-1)),
                "along": _rounded(along),
                "slope": _number(doses.slope[0, 0]),
                "cosine": _number(doses.cosine[0, 0]),
                "spearman": _number(doses.spearman[0, 0]),
            }
        return found

    # Checks and parts

    def check(self, latent: int) -> None:
        """Refuse a feature that there is not.

        Raises:
            ValueError: Naming what there is.
        """
        if not 0 <= latent < self.sae.n_latents:
            raise ValueError(f"feature {latent}: there are 0 to {self.sae.n_latents - 1}")

    def _rows_of(self, episode: int) -> tuple[int, int]:
        if episode not in self.episodes:
            raise ValueError(f"episode {episode}: held out are {sorted(self.episodes)}")
        return self.episodes[episode]

    def _check_moment(self, moment: Moment) -> int:
        """Last step of the moment's episode."""
        start, stop = self._rows_of(moment.episode)
        if not 0 <= moment.frame < stop - start:
            raise ValueError(
                f"frame {moment.frame}: episode {moment.episode} has 0 to {stop - start - 1}"
            )
        return stop - start - 1

    def _top(self, latent: int) -> float:
        """Largest activation on held-out frames."""
        activity = self.record.frame_activity
        values = activity.value[int(activity.start[latent]) : int(activity.start[latent + 1])]
        return float(values.max()) if len(values) else 0.0

    def _moments(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The strongest held-out frames, distinct in time."""
        return [
            {"episode": episode, "frame": frame, "value": value, "token": self._labels[token]}
            for episode, frame, value, token in zip(
                row["top_episode"],
                row["top_frame"],
                row["top_value"],
                row["top_token"],
                strict=True,
            )
        ]

    def _active_moments(self, latent: int, n_wanted: int) -> list[Moment]:
        """Frames where a feature fires, evenly in time."""
        activity = self.record.frame_activity
        frames = activity.frame[int(activity.start[latent]) : int(activity.start[latent + 1])]
        n_there = len(frames)
        n = min(n_wanted, n_there)
        places = [round(place * (n_there - 1) / max(n - 1, 1)) for place in range(n)]
        return [
            Moment(int(self.record.episode_index[row]), int(self.record.frame_index[row]))
            for row in frames[places].long().tolist()
        ]

    def _tokens(self, spatial: Sequence[float]) -> dict[str, Any]:
        """Mean activation by token: of each camera as a grid, of all others as a list."""
        cameras = {}
        for camera in self.studio.cameras:
            grid = self._grid(spatial, camera)
            if grid is not None:
                cameras[camera] = grid.tolist()
        others = [
            {"token": label, "value": value}
            for label, value, position in zip(
                self._labels, spatial, self.record.positions, strict=True
            )
            if position.name not in cameras
        ]
        return {"cameras": cameras, "others": others}

    def _grid(
        self, spatial: Sequence[float], camera: str
    ) -> Float[np.ndarray, "row column"] | None:
        """Values of a camera's cells; None where its tokens do not cover it."""
        cells = {
            (position.row, position.column): value
            for position, value in zip(self.record.positions, spatial, strict=True)
            if position.name == camera and position.row is not None and position.column is not None
        }
        if not cells:
            return None
        n_rows, n_columns = (1 + max(place[axis] for place in cells) for axis in (0, 1))
        if len(cells) < n_rows * n_columns:
            return None
        grid = np.zeros((n_rows, n_columns))
        for place, value in cells.items():
            grid[place] = value
        return grid

    def _place(self, name: str, row: Mapping[str, Any], latent: int) -> dict[str, Any]:
        """Rates of a feature over the places of an object."""
        fields = self._places[name]
        rates = fields.rates[latent]
        return {
            "rates": [_rounded(each) for each in rates],
            "top": _number(rates[rates.isfinite()].max()) if rates.isfinite().any() else None,
            "low": list(fields.grid.low),
            "high": list(fields.grid.high),
            "bits": row.get(f"place_{name}_bits"),
            "p": row.get(f"place_{name}_p"),
        }

    def _best_concepts(self, latent: int) -> list[str]:
        row = self.described.rows.get(latent, {})
        best = [row.get("best_continuous"), row.get("best_binary")]
        return [name for name in best if name in self.concepts.names]

    def _board(self) -> dict[str, Any] | None:
        """Extents of the board where actions are places on it, and the camera that shows it whole.

        That is PushT's own: of another camera nobody says where the board lies in its pictures.
        """
        if self.view.data_schema.action_dim != 2 or self.unit != "px":
            return None
        shown = [name for name in PushTTask().data_schema().cameras if name in self.studio.cameras]
        return {
            "low": list(Grid().low),
            "high": list(Grid().high),
            "camera": shown[0] if shown else None,
        }

    @property
    def _can_foretell(self) -> bool:
        return isinstance(self.view, ACTPolicy) and self.data.layer in ("encoder", "decoder")

    @property
    def _layer_labels(self) -> list[str]:
        return [position_label(position) for position in self.data.tap.positions]

    def _observe(self, moments: Sequence[Moment]) -> Observation:
        frames = [
            self.data.demonstrations.dataset([each.episode]).__getitems__([each.frame])
            for each in moments
        ]
        return Batch.concatenate(frames).observation.to(self.sae.W_dec.device)

    def _new_probe(
        self, latent: int, moment: Moment
    ) -> tuple[FeatureProbe, Float[Tensor, "batch query action"]]:
        """The policy on one frame, and what it does there."""
        observation = self._observe([moment])
        activations = read_activations(self.view, observation, self.data.layer)
        steps = range(self.view.chunk_size)
        probe = FeatureProbe(
            self.view, self.data.layer, self.sae, observation, [latent], steps, activations
        )
        return probe, self.view.predict_chunk(observation)

    def _other_changes(
        self, probe: FeatureProbe, displacement: Tensor, n: int, seed: int
    ) -> Float[Tensor, "direction query action"]:
        """Changes of the chunk where every token moves as far along each of ``n`` directions."""
        distance = displacement.norm(dim=-1)
        if not n or not distance.any():
            shape = (0, self.view.chunk_size, self.view.data_schema.action_dim)
            return torch.empty(shape, dtype=torch.float64)
        directions = random_directions(n, self.sae.d_in, seed).to(distance)
        frame = torch.zeros(n, dtype=torch.long, device=distance.device)
        which = torch.arange(n, device=distance.device)
        return probe.changes(frame, distance.expand(n, -1), directions, which)


def steering_obstacle(data: ActivationDataModule) -> str | None:
    """Why what an autoencoder gives cannot be put back into the policy; None if it can."""
    if data.per == "frame":
        return "the autoencoder is of whole frames; train one of single tokens (per: token)"
    if data.token_sampler.method == "block_average":
        return "the autoencoder is of means of blocks of tokens; choose another token_sampling"
    try:
        with edit_activations(data.policy, data.layer, lambda x: x):
            return None
    except ValueError as error:
        # Several cameras go through such a layer one by one.
        return str(error)


def _episode_rows(record: FeatureRecord) -> dict[int, tuple[int, int]]:
    numbers = record.episode_index.tolist()
    rows: dict[int, tuple[int, int]] = {}
    for row, number in enumerate(numbers):
        start, _ = rows.get(number, (row, row))
        rows[number] = (start, row + 1)
    return rows


def _distance_from_chance(score: Mapping[str, Any]) -> float:
    value = score["value"]
    if value is None:
        return -1.0
    return abs(2 * value - 1) if score["measure"] == "auroc" else abs(value)


def _beside(
    own: Float[Tensor, " query"], others: Float[Tensor, "direction query"]
) -> dict[str, Any]:
    """A change beside those along directions, by chunk step; None where there are none."""
    if not len(others):
        return {"directions_px": None, "p": None, "n_directions": 0}
    quantiles = others.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=others.dtype), dim=0)
    p = (1 + (others >= own).sum(0)).double() / (1 + len(others))
    return {
        "directions_px": [_rounded(each) for each in quantiles],
        "p": _rounded(p),
        "n_directions": len(others),
    }


def _number(value: float | Tensor) -> float | None:
    """A plain number; None for one that JSON cannot say."""
    number = float(value)
    return number if math.isfinite(number) else None


def _rounded(values: Tensor) -> Any:
    """Nested lists with the six digits that a page can show; None for what JSON cannot say."""
    if values.ndim > 1:
        return [_rounded(each) for each in values]
    return [float(f"{each:.6g}") if math.isfinite(each) else None for each in values.tolist()]


# Requests


def routes(library: FeatureLibrary, notes: NoteBook) -> list[Route]:
    """What the page asks, all below ``/api/features``."""

    def answering(work: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            return JSONResponse(await run_in_threadpool(work, request))

        return answer

    def sending(work: Callable[[Request], bytes]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            return Response(await run_in_threadpool(work, request), media_type="image/png")

        return answer

    def listing(request: Request) -> dict[str, Any]:
        return {
            **library.listing(),
            "autoencoder": notes.autoencoder,
            "notes": _plain(notes.read()),
        }

    def detail(request: Request) -> dict[str, Any]:
        return library.detail(_latent(request))

    def timeline(request: Request) -> dict[str, Any]:
        return library.timeline(_latent(request), _whole(request, "episode"))

    def frame(request: Request) -> bytes:
        return library.frame_png(_moment(request), request.query_params.get("camera"))

    def spatial_map(request: Request) -> bytes:
        return library.map_png(_latent(request), request.query_params.get("camera"))

    def steer(request: Request) -> dict[str, Any]:
        return library.steer(
            _latent(request),
            _moment(request),
            _real(request, "scale"),
            _real(request, "clamp"),
            _whole(request, "directions", N_DIRECTIONS),
        )

    def measure(request: Request) -> dict[str, Any]:
        return library.measure(_latent(request))

    async def clip(request: Request) -> Response:
        wants = request.query_params
        path = await run_in_threadpool(
            library.clip,
            _latent(request),
            Moment(_whole(request, "episode"), _whole(request, "frame", 0)),
            wants.get("camera"),
            wants.get("map") == "1",
            "frame" not in wants,
        )
        return FileResponse(path, media_type="video/mp4")

    async def write(request: Request) -> Response:
        body = await _json(request)
        try:
            note = Note(_text(body, "name").strip(), _text(body, "note"), _integer(body, "version"))
            written = await run_in_threadpool(notes.write, _latent(request), note)
        except NoteConflictError as error:
            return JSONResponse(
                {"error": str(error), "current": asdict(error.current)}, status_code=409
            )
        return JSONResponse(asdict(written))

    async def export(request: Request) -> Response:
        document = await run_in_threadpool(notes.export)
        name = f"feature_notes_{notes.autoencoder[:8]}.json"
        return Response(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n",
            media_type="application/json",
            headers={"content-disposition": f'attachment; filename="{name}"'},
        )

    async def take_in(request: Request) -> Response:
        body = await _json(request)
        merge = await run_in_threadpool(notes.merge, body.get("document"), body.get("rule"))
        return JSONResponse(
            {
                "n_written": merge.n_written,
                "conflicts": [asdict(conflict) for conflict in merge.conflicts],
                "notes": _plain(await run_in_threadpool(notes.read)),
            }
        )

    home = "/api/features"
    one = f"{home}/{{latent:int}}"
    return [
        Route(home, answering(listing)),
        Route(f"{home}/frame.png", sending(frame)),
        Route(f"{home}/notes/export", export),
        Route(f"{home}/notes/import", take_in, methods=["POST"]),
        Route(one, answering(detail)),
        Route(f"{one}/timeline", answering(timeline)),
        Route(f"{one}/map.png", sending(spatial_map)),
        Route(f"{one}/clip.mp4", clip),
        Route(f"{one}/steer", answering(steer)),
        Route(f"{one}/effects", answering(measure)),
        Route(f"{one}/note", write, methods=["POST"]),
    ]


def _plain(notes: Mapping[int, Note]) -> dict[str, Any]:
    return {str(latent): asdict(note) for latent, note in notes.items()}


def _latent(request: Request) -> int:
    return request.path_params["latent"]


def _moment(request: Request) -> Moment:
    return Moment(_whole(request, "episode"), _whole(request, "frame"))


def _whole(request: Request, name: str, default: int | None = None) -> int:
    """A whole number of the address.

    Raises:
        ValueError: If it is missing, or none.
    """
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} {text!r}: give a whole number") from None


def _real(request: Request, name: str) -> float | None:
    """A number of the address; None where it is missing.

    Raises:
        ValueError: If it is none, or infinite.
    """
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} {text!r}: give a number")
    return value


async def _json(request: Request) -> dict[str, Any]:
    """The object that was sent.

    Raises:
        ValueError: If it is none.
    """
    return parse_json(await request.body(), lambda problem: ValueError(f"the request {problem}"))


def _text(body: Mapping[str, Any], name: str) -> str:
    if not isinstance(body.get(name), str):
        raise ValueError(f"{name} {body.get(name)!r}: give a text")
    return body[name]


def _integer(body: Mapping[str, Any], name: str) -> int:
    if type(body.get(name)) is not int:
        raise ValueError(f"{name} {body.get(name)!r}: give a whole number")
    return body[name]
