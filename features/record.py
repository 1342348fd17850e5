"""What every feature does in every frame: sparse, complete, and on disk in two Parquet files."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int, Int16, Int32, Int64
from torch import Tensor

from autoencoders.sae import SparseAutoencoder
from features.episodes import number_episodes
from features.taps import TokenPosition
from policies.atomic_files import whole_file
from policies.json_files import parse_json

if TYPE_CHECKING:
    import pyarrow

FORMAT_VERSION = 1
ACTIVATIONS_FILE, FRAMES_FILE = "activations.parquet", "frames.parquet"
ENCODE_BYTES = 64 * 2**20
"""Codes of a batch before they are made sparse, at most."""
ROWS_AT_ONCE = 2**20
"""Activations of a row group: what a reader holds at once, 14 MB."""
MAX_LATENTS = 1 << 24
"""Of a record; a header that asks for more is damaged."""
DENSE_ROWS = 1 << 24
"""Above as many rows a table that takes less than a byte for each is no record; reading one takes
20 times the file or 340 MB."""
_HEADER = b"policyscope"
_ACTIVATION_COLUMNS = {
    "episode": "int32",
    "frame": "int32",
    "token": "int16",
    "latent": "int32",
    "value": "float",
}
_FRAME_COLUMNS = {"episode": "int32", "frame": "int32", "n_active": "int32"}

FrameBatch = tuple[Float[Tensor, "batch token dim"], Int[Tensor, " batch"], Int[Tensor, " batch"]]
"""Activations, episode numbers, steps in the episode."""


@dataclass(frozen=True)
class FrameActivity:
    """Each feature's strongest token in the frames where it fires; by feature, then by frame."""

    latent: Int32[Tensor, " active"]
    frame: Int32[Tensor, " active"]
    """Row of the record."""
    value: Float32[Tensor, " active"]
    """Largest over tokens."""
    token: Int16[Tensor, " active"]
    """Where it is the largest; the first of equal ones."""
    start: Int64[Tensor, " latents_and_one"]
    """The entries of latent i are ``start[i]`` to ``start[i + 1] - 1``."""


@dataclass(frozen=True)
class FeatureRecord:
    """All activations of all features, also of frames in which none fires.

    Raises:
        ValueError: If parts differ in length, activations are not in the order of frames, or frames
            are not in the order of time, episode by episode, each once.
    """

    frame: Int[Tensor, " active"]
    """Row of the frame among :attr:`frame_index`, never falling."""
    token: Int[Tensor, " active"]
    """Place among :attr:`positions`."""
    latent: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    """Positive, in the units of the activations."""
    episode_index: Int[Tensor, " frame"]
    """Number of each frame's episode in the data set."""
    frame_index: Int[Tensor, " frame"]
    """Its step there."""
    n_latents: int
    positions: tuple[TokenPosition, ...]
    """What each token stands for."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, in plain values: ``layer``, ``sae``, ``policy``, ``code_version``."""

    def __post_init__(self) -> None:
        lengths = {len(self.frame), len(self.token), len(self.latent), len(self.value)}
        if len(lengths) > 1:
            raise ValueError(
                f"parts of activations have lengths {sorted(lengths)}; give equal ones"
            )
        if (self.frame[1:] < self.frame[:-1]).any():
            raise ValueError("activations are not in the order of frames; sort them by frame")
        for name, values, limit in (
            ("frame", self.frame, len(self.episode_index)),
            ("token", self.token, len(self.positions)),
            ("latent", self.latent, self.n_latents),
        ):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise ValueError(
                    f"{name}: {int(values.min())} to {int(values.max())}, there are {limit}"
                )
        number_episodes(self.episode_index, self.frame_index)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.episode_index)

    @cached_property
    def episode_place(self) -> Int[Tensor, " frame"]:
        """Episodes numbered 0, 1, ... as they come."""
        return number_episodes(self.episode_index, self.frame_index)

    @property
    def n_episodes(self) -> int:
        """Episodes with at least one frame."""
        return int(self.episode_place[-1]) + 1 if len(self) else 0

    @cached_property
    def _by_latent(self) -> tuple[Int64[Tensor, " active"], Int64[Tensor, " latents_and_one"]]:
        """Order of activations by feature, then frame; and where each feature begins in it."""
        order = torch.sort(self.latent, stable=True).indices
        counts = torch.bincount(self.latent, minlength=self.n_latents)
        return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def frame_activity(self) -> FrameActivity:
        """Pooled over tokens: what most descriptions are made of."""
        order, _ = self._by_latent
        latent, frame, value = self.latent[order], self.frame[order], self.value[order]
        is_new = torch.ones(len(order), dtype=torch.bool)
        is_new[1:] = (latent[1:] != latent[:-1]) | (frame[1:] != frame[:-1])
        group = is_new.long().cumsum(0) - 1
        n = int(is_new.sum())
        largest = torch.zeros(n).scatter_reduce(0, group, value.float(), "amax", include_self=False)
        is_largest = value.float() == largest[group]
        token = torch.full((n,), len(self.positions), dtype=torch.int16).scatter_reduce(
            0, group[is_largest], self.token[order][is_largest].short(), "amin"
        )
        counts = torch.bincount(latent[is_new], minlength=self.n_latents)
        return FrameActivity(
            latent=latent[is_new].int(),
            frame=frame[is_new].int(),
            value=largest,
            token=token,
            start=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )

    def frames_by_latents(
        self,
        latents: Sequence[int] | None = None,
        pool: Literal["max", "sum"] = "max",
        tokens: Sequence[int] | None = None,
    ) -> Float32[Tensor, "frame latent"]:
        """Lay out some features densely, 0 where they do not fire.

        Args:
            latents: Which features, in this order; all when None, which takes 4 bytes for each
                frame and feature.
            pool: What becomes of a feature's values at several tokens of a frame.
            tokens: Places of the tokens that count; all when None.

        Raises:
            ValueError: If there is no such feature or token.
        """
        chosen = list(range(self.n_latents)) if latents is None else list(latents)
        for name, values, limit in (
            ("latents", chosen, self.n_latents),
            ("tokens", tokens or (), len(self.positions)),
        ):
            if unknown := [place for place in values if not 0 <= place < limit]:
                raise ValueError(f"{name} {unknown}: there are 0 to {limit - 1}")
        order, start = self._by_latent
        counts = [int(start[place + 1] - start[place]) for place in chosen]
        parts = [order[start[place] : start[place + 1]] for place in chosen]
        index = torch.cat(parts) if parts else order[:0]
        column = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(counts).long())
        if tokens is not None:
            counts_here = torch.zeros(len(self.positions), dtype=torch.bool)
            counts_here[list(tokens)] = True
            kept = counts_here[self.token[index].long()]
            index, column = index[kept], column[kept]
        dense = torch.zeros(len(self) * len(chosen))
        dense.scatter_reduce_(
            0,
            self.frame[index].long() * len(chosen) + column,
            self.value[index].float(),
            "amax" if pool == "max" else "sum",
        )
        return dense.view(len(self), len(chosen))

    def spatial(self, latent: int) -> Float[Tensor, " token"]:
        """Mean activation of one feature at each token, over all frames."""
        order, start = self._by_latent
        index = order[start[latent] : start[latent + 1]]
        total = torch.zeros(len(self.positions), dtype=torch.float64)
        total.index_add_(0, self.token[index].long(), self.value[index].double())
        return total / max(len(self), 1)

    def token_totals(
        self,
    ) -> tuple[Float[Tensor, "latent token"], Int64[Tensor, "latent token"]]:
        """Sum of the activations, and number of frames with one, of each feature at each token."""
        n_tokens = len(self.positions)
        place = self.latent.long() * n_tokens + self.token
        size = self.n_latents * n_tokens
        total = torch.bincount(place, self.value.double(), minlength=size)
        count = torch.bincount(place, minlength=size)
        return total.view(self.n_latents, n_tokens), count.view(self.n_latents, n_tokens)

    def rows(self, index: Bool[Tensor, " frame"]) -> "FeatureRecord":
        """Some of the frames, e.g. those of some episodes."""
        kept = index[self.frame.long()]
        new_row = index.long().cumsum(0) - 1
        return FeatureRecord(
            frame=new_row[self.frame[kept].long()].to(self.frame.dtype),
            token=self.token[kept],
            latent=self.latent[kept],
            value=self.value[kept],
            episode_index=self.episode_index[index],
            frame_index=self.frame_index[index],
            n_latents=self.n_latents,
            positions=self.positions,
            metadata=self.metadata,
        )


@torch.no_grad()
def record_features(
    sae: SparseAutoencoder,
    batches: Iterable[FrameBatch],
    positions: Sequence[TokenPosition],
    metadata: Mapping[str, Any] | None = None,
) -> FeatureRecord:
    """Encode frames one after the other, and lose none.

    Args:
        sae: The autoencoder; codes are those of inference.
        batches: Activations [batch token dim], episode numbers and steps, episode by episode in the
            order of time; a batch may end within an episode.
        positions: What each token stands for.
        metadata: Plain values to keep with the record.

    Raises:
        ValueError: If there are other tokens than positions, parts of a batch differ in length,
            there is no frame, or frames are not in order.
    """
    positions = tuple(positions)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    episodes: list[Tensor] = []
    steps: list[Tensor] = []
    n_frames = 0
    for activations, episode_index, frame_index in batches:
        if activations.shape[1] != len(positions):
            raise ValueError(
                f"activations of {activations.shape[1]} tokens, {len(positions)} positions; give "
                "one for each token"
            )
        if not len(activations) == len(episode_index) == len(frame_index):
            raise ValueError(
                f"activations of {len(activations)} frames, {len(episode_index)} episode numbers "
                f"and {len(frame_index)} steps; give one of each"
            )
        vectors = rearrange(activations, "batch token dim -> (batch token) dim").to(sae.W_dec)
        at_once = max(1, ENCODE_BYTES // (4 * sae.n_latents))
        for begin in range(0, len(vectors), at_once):
            codes = sae.encode_sparse(vectors[begin : begin + at_once])
            row = codes.row.cpu() + begin
            parts.append(
                (
                    (row // len(positions) + n_frames).int(),
                    (row % len(positions)).short(),
                    codes.latent.cpu().int(),
                    codes.value.cpu().float(),
                )
            )
        episodes.append(episode_index.cpu().long())
        steps.append(frame_index.cpu().long())
        n_frames += len(activations)
    if not parts:
        raise ValueError("there is no frame to record")
    frame, token, latent, value = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return FeatureRecord(
        frame=frame,
        token=token,
        latent=latent,
        value=value,
        episode_index=torch.cat(episodes),
        frame_index=torch.cat(steps),
        n_latents=sae.n_latents,
        positions=positions,
        metadata=dict(metadata or {}),
    )


def write_record(folder: Path, record: FeatureRecord) -> Path:
    """Write a record as two Parquet files, each complete or not there at all.

    ``activations.parquet`` has one row for each activation (``episode``, ``frame``: the step there,
    ``token``, ``latent``, ``value``), ``frames.parquet`` one for each frame (``episode``,
    ``frame``, ``n_active``), both in the order of frames. Both headers hold, under ``policyscope``,
    what the record is of.

    Args:
        folder: Is made; what it holds of the same names is replaced.
        record: Metadata in plain values, as JSON has them.

    Returns:
        The folder.
    """
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "format_version": FORMAT_VERSION,
        # Of both files alike: a pair from two writes would be read as one record.
        "content": _digest(record),
        "n_latents": record.n_latents,
        "positions": [asdict(position) for position in record.positions],
        "metadata": dict(record.metadata),
    }
    keys = {_HEADER: json.dumps(header).encode()}
    episode, step = record.episode_index.int(), record.frame_index.int()

    def activations() -> "Iterable[pyarrow.Table]":
        for start in range(0, len(record.frame), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            frame = record.frame[part].long()
            yield _table(
                episode=episode[frame],
                frame=step[frame],
                token=record.token[part].short(),
                latent=record.latent[part].int(),
                value=record.value[part].float(),
            )

    n_active = torch.bincount(record.frame, minlength=len(record)).int()
    kinds = {"episode": pa.int32(), "frame": pa.int32()}
    _write(
        folder / ACTIVATIONS_FILE,
        pa.schema(
            {**kinds, "token": pa.int16(), "latent": pa.int32(), "value": pa.float32()}, keys
        ),
        activations(),
    )
    _write(
        folder / FRAMES_FILE,
        pa.schema({**kinds, "n_active": pa.int32()}, keys),
        [_table(episode=episode, frame=step, n_active=n_active)],
    )
    return folder


def read_record(folder: Path) -> FeatureRecord:
    """Read what :func:`write_record` wrote, to the bit.

    Raises:
        ValueError: If a file is missing, damaged, has another format, or they are no pair.
    """
    tables, headers = {}, []
    for name, columns in ((ACTIVATIONS_FILE, _ACTIVATION_COLUMNS), (FRAMES_FILE, _FRAME_COLUMNS)):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}; give the folder of a record")
        table, header = _read_table(folder / name, columns)
        if header.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / name}: format_version {header.get('format_version')!a}, this version "
                f"reads {FORMAT_VERSION}; record the features again"
            )
        tables[name] = table
        headers.append(header)
    found, frames = tables[ACTIVATIONS_FILE], tables[FRAMES_FILE]
    if headers[0] != headers[1]:
        raise ValueError(
            f"{folder}: {ACTIVATIONS_FILE} and {FRAMES_FILE} are of different records; record the "
            "features again"
        )
    header, n_active = headers[0], frames["n_active"].long()
    try:
        n_latents, metadata = header["n_latents"], header["metadata"]
        positions = tuple(TokenPosition(**position) for position in header["positions"])
        if type(n_latents) is not int or not 0 < n_latents <= MAX_LATENTS:
            raise ValueError(f"n_latents is {n_latents!a}")
        if not isinstance(metadata, dict):
            raise ValueError(f"metadata is {metadata!a}")
        for position in positions:
            places = (position.row, position.column)
            if not isinstance(position.name, str) or not all(
                place is None or type(place) is int for place in places
            ):
                raise ValueError(f"a position is {position!a}")
        if (n_active < 0).any() or int(n_active.sum()) != len(found["latent"]):
            raise ValueError(
                f"{FRAMES_FILE} counts {int(n_active.sum())} activations, {ACTIVATIONS_FILE} has "
                f"{len(found['latent'])}"
            )
        return FeatureRecord(
            frame=torch.repeat_interleave(torch.arange(len(n_active), dtype=torch.int32), n_active),
            token=found["token"],
            latent=found["latent"],
            value=found["value"],
            episode_index=frames["episode"].long(),
            frame_index=frames["frame"].long(),
            n_latents=n_latents,
            positions=positions,
            metadata=metadata,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: holds no record ({type(error).__name__}: {shorten(str(error), 300)}); "
            "record the features again"
        ) from error


def _read_table(path: Path, columns: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a table's columns and what its header says of the record.

    Raises:
        ValueError: If it is damaged, or has other columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def refuse(problem: str) -> ValueError:
        return ValueError(f"{path}: {problem}; record the features again")

    try:
        with parquet.ParquetFile(path) as file:
            kinds = {each.name: str(each.type) for each in file.schema_arrow}
            n_rows = file.metadata.num_rows
            if n_rows > max(DENSE_ROWS, path.stat().st_size):
                raise ValueError(f"{n_rows:,} rows in {path.stat().st_size:,} bytes")
            table = file.read() if kinds == columns else None
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise refuse(f"is damaged ({shorten(str(error), 200)})") from error
    if table is None or any(table[name].null_count for name in columns):
        raise refuse(f"has columns {kinds} instead of {dict(columns)}, all filled")
    header = parse_json((table.schema.metadata or {}).get(_HEADER, b"{}"), refuse)
    return {name: torch.from_numpy(table[name].to_numpy().copy()) for name in columns}, header


def _digest(record: FeatureRecord) -> str:
    """Fingerprint of all that is recorded."""
    found = hashlib.blake2b(digest_size=16)
    for values in (
        record.frame,
        record.token,
        record.latent,
        record.value,
        record.episode_index,
        record.frame_index,
    ):
        found.update(values.contiguous().numpy())
    return found.hexdigest()


def _table(**columns: Tensor) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.table({name: values.numpy() for name, values in columns.items()})


def _write(path: Path, schema: "pyarrow.Schema", tables: "Iterable[pyarrow.Table]") -> None:
    """Write tables below each other; complete, or not at all."""
    from pyarrow import parquet

    with (
        whole_file(path) as temporary,
        parquet.ParquetWriter(
            temporary,
            schema,
            compression="zstd",
            use_dictionary=False,
            # Numbers that hardly change from row to row; floats that share their leading bytes.
            column_encoding={
                each.name: "BYTE_STREAM_SPLIT" if each.name == "value" else "DELTA_BINARY_PACKED"
                for each in schema
            },
        ) as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=ROWS_AT_ONCE)
