"""Activations of a policy on disk: computed once, read as a memory map ever after.

A folder holds

- ``manifest.json``: what the activations are (:class:`ActivationShapes`), what they were made from
  (*identity*: hash of the policy, layer, token sampling, fingerprint of the data, dtype, version of
  this code), their statistics when all of them are there, and a key: the hash of all that;
- ``index.safetensors``: ``episode_index`` and ``frame_index`` of each frame;
- ``shard_00000.safetensors``, ...: one tensor ``activations`` (frame, token, dim) each, with the
  CRC-32 of its bytes.

Each file appears complete or not at all, under a lock, so a build that was killed goes on at the
first missing shard. A store that was made from something else is never used.
"""

import fcntl
import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from datamodules.frame_store import default_cache_dir
from datamodules.progress import progress_bar
from features.taps import TokenPosition
from policies.atomic_files import whole_file, write_atomically
from policies.json_files import parse_json, read_json
from policies.tensor_files import load_tensors, save_tensors
from policies.workers import Engine, map_over

Dtype = Literal["float16", "bfloat16", "float32"]

CODE_VERSION = 1
"""Part of the identity: raise it when the same policy would be stored differently."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_TAGS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
# NumPy has no bfloat16: its bits are mapped as integers.
_MAPPED = {"float16": np.float16, "bfloat16": np.int16, "float32": np.float32}
_MANIFEST = "manifest.json"
_INDEX = "index.safetensors"
_TENSOR = "activations"
_CHECKED_BYTES = 1 << 24
_HEADER_BYTES = 1 << 16
"""Of a shard's header, at most; it describes one tensor."""


Compute = Callable[[range], Float[Tensor, "frame token dim"]]
"""Makes the activations of a piece."""


@dataclass(frozen=True)
class Workers:
    """Processes that make shards."""

    n_workers: int
    engine: Engine
    source: Callable[[], Compute]
    """What computes, opened anew in each process: it is pickled, hashed and compared."""


@dataclass(frozen=True)
class ActivationShapes:
    """Which frames there are, and what is kept of each."""

    episode_numbers: tuple[int, ...]
    """Number of each episode in the data set, in the order of the frames."""
    episode_lengths: tuple[int, ...]
    """Frames of each episode."""
    positions: tuple[TokenPosition, ...]
    """Of the kept tokens."""
    dim: int
    """Length of a token's vector."""
    frames_per_batch: int = 128
    """Frames that the policy sees at once, at most."""

    @property
    def n_frames(self) -> int:
        """Frames of all episodes together."""
        return sum(self.episode_lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept of a frame."""
        return len(self.positions)

    def frame_bytes(self, dtype: Dtype) -> int:
        """Bytes of one frame."""
        return self.n_tokens * self.dim * TORCH_DTYPES[dtype].itemsize

    @cached_property
    def episodes(self) -> dict[int, range]:
        """Number of each episode to its frames."""
        ends = np.cumsum(self.episode_lengths).tolist()
        return {
            number: range(end - length, end)
            for number, length, end in zip(
                self.episode_numbers, self.episode_lengths, ends, strict=True
            )
        }

    def pieces(self, episode: int) -> list[range]:
        """Frames of an episode in pieces that the policy sees at once.

        Rounding depends on what else is in a batch of a network, so activations are computed in
        these pieces only: the same whoever asks for them, and in what order.
        """
        frames = self.episodes[episode]
        step = self.frames_per_batch
        return [frames[start : start + step] for start in range(0, len(frames), step)]

    @property
    def all_pieces(self) -> list[range]:
        """Pieces of all episodes, in the order of the frames."""
        return [piece for number in self.episode_numbers for piece in self.pieces(number)]

    def index(self) -> dict[str, Int64[Tensor, " frame"]]:
        """``episode_index`` and ``frame_index`` of each frame."""
        lengths = torch.tensor(self.episode_lengths)
        steps = [torch.arange(length) for length in self.episode_lengths]
        return {
            "episode_index": torch.tensor(self.episode_numbers).repeat_interleave(lengths),
            "frame_index": torch.cat(steps),
        }


@dataclass(frozen=True)
class ActivationStatistics:
    """Moments of all stored vectors, over frames and tokens."""

    n_vectors: int
    mean: Float[Tensor, " dim"]
    variance: Float[Tensor, " dim"]
    """Mean squared distance from the mean."""
    mean_norm: float
    """Mean length of a vector."""


def rounded(
    activations: Float[Tensor, "frame token dim"], dtype: Dtype
) -> Float[Tensor, "frame token dim"]:
    """Activations as they are stored, on the CPU.

    Raises:
        ValueError: If a value is too large for the dtype, or is no number.
    """
    stored = activations.to(TORCH_DTYPES[dtype])
    if not bool(stored.isfinite().all()):
        if bool(activations.isfinite().all()):
            largest = float(activations.abs().max())
            raise ValueError(
                f"an activation of {largest:.4g} is too large for dtype: {dtype} (at most "
                f"{torch.finfo(stored.dtype).max:.5g}); set dtype to bfloat16"
            )
        raise ValueError(
            "the policy's activations are not finite: its weights or its statistics are damaged"
        )
    return stored.cpu()


class ActivationStore:
    """All activations of a data set, mapped from disk. Made by :func:`open_or_build`.

    Args:
        folder: Of the files.
        manifest: Its content.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = dict(manifest["identity"])
        """What the activations were made from, as plain values."""
        self.shapes = _shapes(manifest)
        self.dtype: Dtype = self.identity["dtype"]
        found = manifest["statistics"]
        self.statistics = ActivationStatistics(
            found["n_vectors"],
            torch.tensor(found["mean"], dtype=torch.float64),
            torch.tensor(found["variance"], dtype=torch.float64),
            found["mean_norm"],
        )
        self.key: str = manifest["key"]
        """Hash of identity, shapes and statistics."""
        self.bytes_read = 0
        """Bytes that :meth:`read` has copied so far."""
        self._shards = [range(first, last) for first, last in manifest["shards"]]
        self._starts = np.asarray([frames.start for frames in self._shards])
        self._maps: dict[int, Tensor] = {}

    def read(self, frames: range) -> Float[Tensor, "frame token dim"]:
        """Copy consecutive frames into memory, in the stored dtype."""
        first = int(np.searchsorted(self._starts, frames.start, side="right")) - 1
        parts = []
        for number in range(first, len(self._shards)):
            shard = self._shards[number]
            if shard.start >= frames.stop:
                break
            start, stop = max(frames.start, shard.start), min(frames.stop, shard.stop)
            parts.append(self._map(number)[start - shard.start : stop - shard.start])
        activations = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        self.bytes_read += activations.nbytes
        return activations

    def _map(self, number: int) -> Tensor:
        if number not in self._maps:
            shape = (len(self._shards[number]), self.shapes.n_tokens, self.shapes.dim)
            shard = _map_shard(_shard(self.folder, number), shape, self.dtype)
            if shard is None:
                raise ValueError(
                    f"{_shard(self.folder, number)}: changed while in use; start again, and the "
                    "shard is made anew"
                )
            self._maps[number] = shard[0]
        return self._maps[number]


def default_activation_cache() -> Path:
    """Folder of the stores: ``$XDG_CACHE_HOME/policyscope/activations``."""
    return default_cache_dir().parent / "activations"


def full_identity(identity: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """What activations are made from, with all that this code adds to it."""
    return json.loads(json.dumps({**identity, "dtype": dtype, "code": CODE_VERSION}))


def identity_key(identity: Mapping[str, Any]) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def open_or_build(
    folder: Path,
    shapes: ActivationShapes,
    dtype: Dtype,
    identity: Mapping[str, Any],
    compute: Compute,
    shard_mb: float = 256,
    progress: bool = True,
    workers: Workers | None = None,
) -> ActivationStore:
    """Open a store; make what is missing or damaged of it.

    Every shard is read once to compare its checksum.

    Args:
        folder: Of the store; made when missing.
        shapes: Which frames and tokens. Where a store is there already, the pieces that it was made
            in stay.
        dtype: Of the stored values.
        identity: Plain values that decide the activations; another value makes another store.
        compute: Makes the activations of a piece (:meth:`ActivationShapes.pieces`).
        shard_mb: Size of a file in MiB, at least one piece.
        progress: Show a progress bar when a person is watching.
        workers: Processes that make shards instead of this one.

    Raises:
        ValueError: If a worker died; what the others finished stays.
        ValueError: If the store was made from something else (each difference is named), does not
            fit on the disk, cannot be written, or holds values too large for the dtype.
    """
    asked = full_identity(identity, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"cannot write activations to {folder} ({error.strerror}); choose another cache_dir, "
            "or set storage to stream"
        ) from error
    with _locked(lock, folder):
        for left in folder.glob("*.part"):
            left.unlink()
        manifest = _read_manifest(folder)
        if manifest is not None:
            _refuse_another(folder, manifest, asked, shapes)
        if manifest is None or not _holds_all_pieces(manifest):
            for file in folder.glob("*.safetensors"):
                # Nothing says what it was made from.
                file.unlink()
            manifest = {
                "identity": asked,
                "shapes": json.loads(json.dumps(asdict(shapes))),
                "shards": _divide(shapes, dtype, int(shard_mb * 2**20)),
                "statistics": None,
                "key": None,
            }
            write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))
        _complete(folder, manifest, compute, progress, workers)
        return ActivationStore(folder, manifest)


def _shapes(manifest: Mapping[str, Any]) -> ActivationShapes:
    found = manifest["shapes"]
    return ActivationShapes(
        tuple(found["episode_numbers"]),
        tuple(found["episode_lengths"]),
        tuple(TokenPosition(**position) for position in found["positions"]),
        found["dim"],
        found["frames_per_batch"],
    )


def _divide(shapes: ActivationShapes, dtype: Dtype, shard_bytes: int) -> list[list[int]]:
    """First frame and end of each shard: as many whole pieces as fit."""
    most = max(1, shard_bytes // shapes.frame_bytes(dtype))
    shards: list[list[int]] = []
    for piece in shapes.all_pieces:
        if shards and piece.stop - shards[-1][0] <= most:
            shards[-1][1] = piece.stop
        else:
            shards.append([piece.start, piece.stop])
    return shards


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a manifest says; None where there is none that is whole."""
    try:
        manifest = read_json(folder / _MANIFEST)
        if manifest["statistics"] is not None and manifest["key"] != _content_key(manifest):
            return None
        shapes = _shapes(manifest)
        counts = (*shapes.episode_numbers, *shapes.episode_lengths, shapes.dim)
        is_whole = (
            isinstance(manifest["identity"], dict)
            and isinstance(manifest["shards"], list)
            and all(map(_is_count, counts))
            and _is_count(shapes.frames_per_batch, 1)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return manifest if is_whole else None


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _holds_all_pieces(manifest: Mapping[str, Any]) -> bool:
    """Whether the shards of a manifest are whole pieces, one after the other, of all frames."""
    shapes = _shapes(manifest)
    ends = {piece.stop for piece in shapes.all_pieces}
    expected = 0
    for shard in manifest["shards"]:
        is_pair = isinstance(shard, list) and len(shard) == 2 and all(map(_is_count, shard))
        if not is_pair or shard[0] != expected or shard[1] <= shard[0] or shard[1] not in ends:
            return False
        expected = shard[1]
    return expected == shapes.n_frames


def _content_key(manifest: Mapping[str, Any]) -> str:
    return identity_key({name: manifest[name] for name in ("identity", "shapes", "statistics")})


def _refuse_another(
    folder: Path, manifest: Mapping[str, Any], asked: Mapping[str, Any], shapes: ActivationShapes
) -> None:
    """Compare a store with what is asked for.

    Raises:
        ValueError: Naming each field that differs.
    """
    ours = {**asdict(shapes), **asked}
    theirs = {**asdict(_shapes(manifest)), **manifest["identity"]}
    # Pieces and files of another size hold the same.
    names = sorted({*ours, *theirs} - {"frames_per_batch"})
    differences = [
        f"{name}: {_short(theirs.get(name))} there, {_short(ours.get(name))} asked for"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder}: holds other activations ({'; '.join(differences)}); delete the folder, or "
            "choose another cache_dir"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _complete(
    folder: Path,
    manifest: dict[str, Any],
    compute: Compute,
    progress: bool,
    workers: Workers | None,
) -> None:
    """Make each shard that is missing or damaged, then what is said about all of them."""
    shapes, dtype = _shapes(manifest), manifest["identity"]["dtype"]
    shards = [range(first, last) for first, last in manifest["shards"]]
    tail = (shapes.n_tokens, shapes.dim)
    with progress_bar("Checking activations", shapes.n_frames, progress) as advance:
        missing = []
        for number, frames in enumerate(shards):
            if not _is_intact(_shard(folder, number), (len(frames), *tail), dtype):
                missing.append(number)
            advance(len(frames))
    n_bytes = sum(len(shards[number]) for number in missing) * shapes.frame_bytes(dtype)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise ValueError(
            f"the activations need {n_bytes:,} bytes in {folder} and only {free:,} are free; set "
            "storage to stream, which needs no disk, or sample fewer tokens, or choose another "
            "cache_dir"
        )
    n_frames = sum(len(shards[number]) for number in missing)
    with progress_bar("Computing activations", n_frames, progress) as advance:
        if workers is None:
            for number in missing:
                _write_shard(folder, number, shards[number], shapes, dtype, compute, advance)
        else:
            work = [
                _ShardWork(folder, number, shards[number], shapes, dtype, workers.source)
                for number in missing
            ]
            for n_made in map_over(_make_shard, work, workers.n_workers, workers.engine):
                advance(n_made)
    index = folder / _INDEX
    if not _same_index(index, shapes):
        save_tensors(index, shapes.index())
    if manifest["statistics"] is None:
        maps = (
            _map_shard(_shard(folder, number), (len(frames), *tail), dtype)
            for number, frames in enumerate(shards)
        )
        manifest["statistics"] = _measure(found[0] for found in maps if found is not None)
        manifest["key"] = _content_key(manifest)
        write_atomically(folder / _MANIFEST, json.dumps(manifest, indent=1))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def _write_shard(
    folder: Path,
    number: int,
    frames: range,
    shapes: ActivationShapes,
    dtype: Dtype,
    compute: Compute,
    advance: Callable[[int], object],
) -> None:
    shard = torch.empty(len(frames), shapes.n_tokens, shapes.dim, dtype=TORCH_DTYPES[dtype])
    for piece in shapes.all_pieces:
        if frames.start <= piece.start < frames.stop:
            start, stop = piece.start - frames.start, piece.stop - frames.start
            shard[start:stop] = rounded(compute(piece), dtype)
            advance(len(piece))
    checksum = zlib.crc32(_bits(shard).numpy())
    with whole_file(_shard(folder, number)) as part:
        save_file({_TENSOR: shard}, part, {"crc32": str(checksum)})


@dataclass(frozen=True)
class _ShardWork:
    """A shard, and all that a worker needs to make it."""

    folder: Path
    number: int
    frames: range
    shapes: ActivationShapes
    dtype: Dtype
    source: Callable[[], Compute]


@lru_cache(maxsize=1)
def _opened(source: Callable[[], Compute]) -> Compute:
    return source()


def _make_shard(work: _ShardWork) -> int:
    """Make a shard in a worker, which opens policy and data once; the number of its frames."""
    compute = _opened(work.source)
    _write_shard(
        work.folder, work.number, work.frames, work.shapes, work.dtype, compute, lambda _: None
    )
    return len(work.frames)


def _bits(activations: Tensor) -> Tensor:
    is_bfloat16 = activations.dtype == torch.bfloat16
    return activations.view(torch.int16) if is_bfloat16 else activations


def _map_shard(file: Path, shape: tuple[int, ...], dtype: Dtype) -> tuple[Tensor, str] | None:
    """Map a shard's tensor, and read its checksum; None if it is missing, cut short or foreign."""
    try:
        with file.open("rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
            if header_bytes > _HEADER_BYTES:
                return None
            header = parse_json(handle.read(header_bytes), max_bytes=_HEADER_BYTES)
        entry, checksum = header[_TENSOR], header["__metadata__"]["crc32"]
        start, stop = entry["data_offsets"]
        n_bytes = int(np.prod(shape)) * TORCH_DTYPES[dtype].itemsize
        is_whole = (
            entry["dtype"] == _TAGS[dtype]
            and tuple(entry["shape"]) == shape
            and _is_count(start)
            and stop - start == n_bytes
            and file.stat().st_size == 8 + header_bytes + stop
        )
        if not is_whole:
            return None
        # Copy-on-write: torch wants writable memory, and nothing may reach the file.
        mapped = np.memmap(file, _MAPPED[dtype], "c", 8 + header_bytes + start, shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return torch.from_numpy(mapped).view(TORCH_DTYPES[dtype]), checksum


def _is_intact(file: Path, shape: tuple[int, ...], dtype: Dtype) -> bool:
    found = _map_shard(file, shape, dtype)
    if found is None:
        return False
    mapped, expected = found
    content = _bits(mapped).numpy().reshape(-1).view(np.uint8)
    checksum = 0
    for start in range(0, len(content), _CHECKED_BYTES):
        checksum = zlib.crc32(content[start : start + _CHECKED_BYTES], checksum)
    return str(checksum) == expected


def _same_index(file: Path, shapes: ActivationShapes) -> bool:
    try:
        found = load_tensors(file)
    except ValueError:
        return False
    expected = shapes.index()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def _measure(shards: Iterator[Tensor]) -> dict[str, Any]:
    """Moments of all vectors, shard after shard (Chan et al. 1979), as plain values."""
    n_vectors, norm = 0, 0.0
    mean = scatter = torch.zeros((), dtype=torch.float64)
    for shard in shards:
        for frames in shard.split(1024):
            vectors = frames.flatten(0, 1).double()
            n_new = len(vectors)
            new_mean = vectors.mean(0)
            n_all = n_vectors + n_new
            distance = new_mean - mean
            scatter = (
                scatter
                + (vectors - new_mean).square().sum(0)
                + distance.square() * (n_vectors * n_new / n_all)
            )
            mean = mean + distance * (n_new / n_all)
            norm += float(vectors.norm(dim=-1).sum())
            n_vectors = n_all
    return {
        "n_vectors": n_vectors,
        "mean": mean.tolist(),
        "variance": (scatter / n_vectors).tolist(),
        "mean_norm": norm / n_vectors,
    }


@contextmanager
def _locked(lock: Any, folder: Path) -> Iterator[None]:
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another run is writing activations to {folder}; waiting.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
