"""Activations of a finished policy on its demonstrations, as shuffled batches of vectors."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.activation_store import (
    TORCH_DTYPES,
    ActivationShapes,
    ActivationStatistics,
    ActivationStore,
    Compute,
    Dtype,
    Workers,
    default_activation_cache,
    full_identity,
    identity_key,
    open_or_build,
    rounded,
)
from datamodules.base import DemonstrationDataModule, chosen_episodes
from datamodules.chunking import ChunkDataset
from datamodules.loaders import SharedDataModule
from datamodules.opening import (
    TrainingData,
    find_training_data,
    open_demonstrations,
    training_data,
)
from datamodules.progress import progress_bar
from datamodules.sampling import EvaluationBatchSampler
from datamodules.shuffle_buffer import Per, ShuffleBuffer, VectorDataset, VectorSampler
from features.taps import Tap, find_tap, read_activations
from features.token_sampling import Method, SampledTokens, TokenSampler
from policies.interface import PolicyView
from policies.loading import LoadedPolicy, load_policy
from policies.workers import Engine

Split = Literal["train", "calibration", "val"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "val")

CALIBRATION_SHARE = 1 / 3
"""Of the episodes that a policy's run held out."""
_SAMPLE_FROM = 8
# A sample of n vectors out of few pieces would be of few moments: it is drawn from 8 n.


@dataclass(frozen=True)
class FrameActivations:
    """Activations of whole frames, in order of time."""

    activations: Float[Tensor, "frame token dim"]
    episode_index: Int64[Tensor, " frame"]
    """Number of the episode in the data set."""
    frame_index: Int64[Tensor, " frame"]
    """Step within the episode."""


class PolicyActivations:
    """Activations straight from the policy, piece by piece.

    Args:
        view: The policy.
        layer: Where it is tapped.
        tokens: What is kept of a frame.
        frames: All frames in the order of the pieces.
        dtype: That values are rounded to, as in a store.
        device: Of the policy.
    """

    def __init__(
        self,
        view: PolicyView,
        layer: str,
        tokens: SampledTokens,
        frames: ChunkDataset,
        dtype: Dtype,
        device: torch.device,
    ) -> None:
        self._view = view
        self._layer = layer
        self._tokens = tokens
        self._frames = frames
        self._dtype: Dtype = dtype
        self._device = device
        self.frames_computed = 0
        """Frames that the policy has seen so far."""

    def compute(self, frames: range) -> Float[Tensor, "frame token dim"]:
        """Run the policy on one piece."""
        observation = self._frames.__getitems__(frames).observation.to(self._device)
        self.frames_computed += len(frames)
        return self._tokens.apply(read_activations(self._view, observation, self._layer))

    def read(self, frames: range) -> Float[Tensor, "frame token dim"]:
        """Activations of one piece as a store would hold them."""
        return rounded(self.compute(frames), self._dtype)


class ActivationDataModule(SharedDataModule):
    """Vectors that a policy computes while it looks at demonstrations.

    Episodes that the policy was trained on train here, too; of those that its run held out, a third
    calibrates and the others validate. Where the policy does not say (LeRobot's folders), was
    trained on other data, or held out fewer than two, episodes are divided by fractions and seed.

    Training batches pass through a buffer of random pieces of episodes: each byte is read once an
    epoch, whatever the size, and only once if all fits. The order is a function of seed and epoch,
    so a run continues in the middle of an epoch.

    Args:
        policy_path: Checkpoint, run folder, LeRobot policy folder, or hub id.
        dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id; what the policy was
            trained on when null.
        layer: Where the policy is tapped: encoder, decoder, backbone (ACT), or a module's path.
        token_sampling: Tokens that are kept: all, uniform, stride, block_average, random_fixed.
        token_ratio: Tokens per kept token.
        per: What a vector is: one token, or all kept tokens of a frame.
        batch_size: Vectors of a training batch, per process.
        val_batch_size: Vectors of a validation batch; as batch_size when null.
        episodes: Numbers of the episodes to use, or a slice such as "0:50"; all when null.
        dtype: Of stored values: float16, bfloat16, float32.
        batch_dtype: Of the vectors in a batch: float32, or bfloat16 for a model of that type.
        storage: Where activations lie: disk (computed once), or stream (computed in every epoch,
            unless they fit the buffer).
        cache_dir: Folder of the stores on disk; the user's cache folder when null.
        buffer_mb: Memory in MiB for shuffling the training vectors, and as much again for those of
            calibration and of validation, where they are kept if they fit.
        frames_per_batch: Frames that the policy sees at once, all of one episode.
        val_fraction: Share of the episodes that validate, where the policy's own split is not used.
        calibration_fraction: Share of the episodes that calibrate, where it is not used.
        device: Where the policy runs: cpu, cuda, or auto (the trainer's device).
        seed: Of the split, of random_fixed tokens, and of the order of vectors.
        frame_storage: Where the demonstrations' frames lie: ram or memmap (a cache on disk).
        progress: Show progress bars.
        n_workers: Processes of one thread that compute what is stored, each with the policy and the
            demonstrations of its own (frame_storage memmap shares them); 0 computes in this one.
        engine: Where workers run: processes of this machine, or tasks of a ray cluster.
        shard_mb: Size of a stored file in MiB; a worker computes one after the other.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        policy_path: str,
        dataset_repo_id: str | None = None,
        layer: str = "encoder",
        token_sampling: Method = "all",
        token_ratio: int = 8,
        per: Per = "token",
        batch_size: int = 4096,
        val_batch_size: int | None = None,
        episodes: list[int] | str | None = None,
        dtype: Dtype = "float16",
        batch_dtype: Literal["float32", "bfloat16"] = "float32",
        storage: Literal["disk", "stream"] = "disk",
        cache_dir: str | None = None,
        buffer_mb: float = 1024,
        frames_per_batch: int = 128,
        val_fraction: float = 0.1,
        calibration_fraction: float = 0.05,
        device: str = "auto",
        seed: int = 0,
        frame_storage: Literal["ram", "memmap"] = "ram",
        progress: bool = True,
        n_workers: int = 0,
        engine: Engine = "processes",
        shard_mb: float = 256,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", 1 if val_batch_size is None else val_batch_size, 1),
            ("frames_per_batch", frames_per_batch, 1),
            ("seed", seed, 0),
            ("n_workers", n_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name, fraction in (
            ("val_fraction", val_fraction),
            ("calibration_fraction", calibration_fraction),
        ):
            if not 0 < fraction < 1:
                raise ValueError(f"{name} is {fraction}; it must lie between 0 and 1")
        self.policy_path = policy_path
        self.dataset_repo_id = dataset_repo_id
        self.layer = layer
        self.token_sampler = TokenSampler(token_sampling, token_ratio, seed)
        self.per: Per = per
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.episodes = episodes
        self.dtype: Dtype = dtype
        self.batch_dtype = TORCH_DTYPES[batch_dtype]
        self.storage = storage
        self.cache_dir = cache_dir
        self.buffer_mb = buffer_mb
        self.frames_per_batch = frames_per_batch
        self.val_fraction = val_fraction
        self.calibration_fraction = calibration_fraction
        self.device = device
        self.seed = seed
        self.frame_storage: Literal["ram", "memmap"] = frame_storage
        self.progress = progress
        self.n_workers = n_workers
        self.engine: Engine = engine
        self.shard_mb = shard_mb
        self._source: ActivationStore | PolicyActivations | None = None
        self._buffers: dict[str, ShuffleBuffer] = {}
        self._train_sampler: VectorSampler | None = None
        self._resume: tuple[int, int] | None = None

    @cached_property
    def loaded_policy(self) -> LoadedPolicy:
        """The policy, and how it was made."""
        return load_policy(self.policy_path)

    @property
    def policy(self) -> PolicyView:
        """The policy, in eval mode."""
        return self.loaded_policy.view

    @cached_property
    def policy_hash(self) -> str:
        """Hash of everything that the policy computes with."""
        return policy_hash(self.policy)

    @cached_property
    def tap(self) -> Tap:
        """What the policy's layer yields for each frame."""
        return find_tap(self.policy, self.layer)

    @cached_property
    def tokens(self) -> SampledTokens:
        """Which of the layer's tokens are kept."""
        return self.token_sampler.select(self.tap.positions)

    @property
    def d_in(self) -> int:
        """Dimensions of a vector."""
        return self.tap.dim * (1 if self.per == "token" else len(self.tokens.groups))

    @cached_property
    def data_name(self) -> str:
        """Path or hub id of the demonstrations."""
        return self.dataset_repo_id or find_training_data(self.loaded_policy)

    @cached_property
    def demonstrations(self) -> DemonstrationDataModule:
        """The demonstrations as the policy sees them, read."""
        data = open_demonstrations(
            self.data_name, self.policy, progress=self.progress, storage=self.frame_storage
        )
        numbers = chosen_episodes(self.episodes, sorted(data.source.episode_lengths))
        # Who trains and who validates is decided here, not by the data set.
        data.split = {"by": "command", "train": numbers, "val": []}
        data.setup()
        return data

    @cached_property
    def trained_on(self) -> TrainingData | None:
        """What the policy was trained on, if that is these demonstrations."""
        found = training_data(self.loaded_policy)
        if found is None:
            return None
        if not found.is_in(self.demonstrations):
            warnings.warn(
                f"{self.policy_path} was trained on other data ({found.name}) than "
                f"{Path(self.data_name).name} holds: its own split says nothing here, episodes are "
                "divided by fractions and seed",
                stacklevel=2,
            )
            return None
        return found

    @cached_property
    def split(self) -> dict[str, list[int]]:
        """Episodes that ``train``, that fit thresholds (``calibration``), and that ``val``idate."""
        numbers = sorted(self.demonstrations.split["train"])
        order = np.random.default_rng([self.seed, 0]).permutation(np.asarray(numbers)).tolist()
        seen = None if self.trained_on is None else {*self.trained_on.train}
        held_out = [] if seen is None else [number for number in order if number not in seen]
        if seen is not None and len(held_out) > 1:
            train = [number for number in order if number in seen]
            n_calibration = max(1, round(len(held_out) * CALIBRATION_SHARE))
        else:
            n_calibration = max(1, round(len(order) * self.calibration_fraction))
            n_held_out = n_calibration + max(1, round(len(order) * self.val_fraction))
            held_out, train = order[:n_held_out], order[n_held_out:]
        if not train:
            raise ValueError(
                f"{self.data_name}: of {len(numbers)} episode(s) none is left to train on; give "
                "more of them, or smaller val_fraction and calibration_fraction"
            )
        return {
            "train": sorted(train),
            "calibration": sorted(held_out[:n_calibration]),
            "val": sorted(held_out[n_calibration:]),
        }

    @property
    def is_unseen_by_policy(self) -> bool:
        """Whether the policy is known not to have seen calibration and validation episodes."""
        held_out = {*self.split["calibration"], *self.split["val"]}
        return self.trained_on is not None and not held_out & {*self.trained_on.train}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the activations, as plain values."""
        made_from = {
            "policy": self.policy_hash,
            "layer": self.layer,
            "token_sampling": asdict(self.token_sampler),
            "data": self.demonstrations.fingerprint,
        }
        return full_identity(made_from, self.dtype)

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the activations."""
        return identity_key(self.identity)

    @property
    def shapes(self) -> ActivationShapes:
        """Which frames and tokens there are, and in which pieces they are computed."""
        if isinstance(self._source, ActivationStore):
            return self._source.shapes
        frames = self.demonstrations.store.shapes
        return ActivationShapes(
            frames.episode_numbers,
            frames.episode_lengths,
            self.tokens.positions,
            self.tap.dim,
            self.frames_per_batch,
        )

    @property
    def source(self) -> ActivationStore | PolicyActivations:
        """Where activations come from; after ``setup``."""
        if self._source is None:
            raise RuntimeError("there are no activations yet; call setup() first")
        return self._source

    @property
    def statistics(self) -> ActivationStatistics | None:
        """Moments of all stored vectors; None for ``storage: stream``."""
        return self.source.statistics if isinstance(self.source, ActivationStore) else None

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the vectors come from, as plain values to keep with whatever is made of them."""
        return {
            "policy": str(self.loaded_policy.source),
            "policy_hash": self.policy_hash,
            "data": self.data_name,
            "data_fingerprint": self.demonstrations.fingerprint,
            "layer": self.layer,
            "token_sampling": asdict(self.token_sampler),
            "positions": [
                [position.name, position.row, position.column] for position in self.tokens.positions
            ],
            "per": self.per,
            "dtype": self.dtype,
            "split": {name: list(numbers) for name, numbers in self.split.items()},
            "is_unseen_by_policy": self.is_unseen_by_policy,
        }

    def prepare_data(self) -> None:
        """Look at the policy on one process, so that a wrong path or layer stops the run early."""
        self.tap  # noqa: B018  (a cached property)

    def setup(self, stage: str | None = None) -> None:
        """Compute the activations, or open those that are there.

        Args:
            stage: Lightning's stage; all stages need the same.

        Raises:
            ValueError: If the data do not fit the policy, or activations cannot be stored.
        """
        if self._source is not None:
            return
        device = self._device()
        _move(self.policy, device)
        self.split  # noqa: B018  (refuses too few episodes before anything is computed)
        live = self.live(device)
        if self.storage == "stream":
            self._source = live
        else:
            root = default_activation_cache() if self.cache_dir is None else Path(self.cache_dir)
            self._source = open_or_build(
                root.expanduser() / self.fingerprint,
                self.shapes,
                self.dtype,
                self.identity,
                live.compute,
                self.shard_mb,
                self.progress,
                self._workers(device),
            )
        for name in SPLITS:
            self._buffers[name] = self._buffer(self.split[name])

    def live(self, device: torch.device) -> PolicyActivations:
        """Activations straight from the policy, which is on that device."""
        data = self.demonstrations
        frames = data.dataset(data.store.shapes.episode_numbers)
        return PolicyActivations(self.policy, self.layer, self.tokens, frames, self.dtype, device)

    def _workers(self, device: torch.device) -> Workers | None:
        if self.n_workers == 0:
            return None
        episodes = self.episodes
        settings = {
            "policy_path": self.policy_path,
            "dataset_repo_id": self.data_name,
            "layer": self.layer,
            "token_sampling": self.token_sampler.method,
            "token_ratio": self.token_sampler.ratio,
            "seed": self.token_sampler.seed,
            "episodes": tuple(episodes) if isinstance(episodes, list) else episodes,
            "dtype": self.dtype,
            "frames_per_batch": self.frames_per_batch,
            "frame_storage": self.frame_storage,
        }
        source = ActivationSource(tuple(settings.items()), str(device), self.fingerprint)
        return Workers(self.n_workers, self.engine, source)

    def _device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _buffer(self, episodes: Sequence[int]) -> ShuffleBuffer:
        shapes = self.shapes
        return ShuffleBuffer(
            self.source,
            [piece for number in episodes for piece in shapes.pieces(number)],
            shapes.n_tokens,
            shapes.dim,
            TORCH_DTYPES[self.dtype].itemsize,
            self.per,
            int(self.buffer_mb * 2**20),
        )

    def _buffer_of(self, split: str) -> ShuffleBuffer:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {list(SPLITS)}")
        self.source  # noqa: B018  (says what is missing)
        return self._buffers[split]

    def sample(self, n: int, split: str = "train", seed: int = 0) -> Float[Tensor, "row dim"]:
        """Draw vectors of a split without replacement; all of them, shuffled, if they are fewer.

        Of a split that does not fit the buffer, only as many random pieces are read as hold eight
        times the vectors.

        Args:
            n: Vectors to draw.
            split: ``train``, ``calibration`` or ``val``.
            seed: Of the choice.
        """
        buffer = self._buffer_of(split)
        places = torch.arange(min(n, len(buffer)))
        return buffer.take((seed,), places, _SAMPLE_FROM * n).to(self.batch_dtype)

    def vectors(
        self, split: str = "val", batch_size: int | None = None
    ) -> Iterator[Float[Tensor, "row dim"]]:
        """All vectors of a split in order of time.

        Args:
            split: ``train``, ``calibration`` or ``val``.
            batch_size: Vectors at once; that of validation when None.
        """
        buffer = self._buffer_of(split)
        step = self.val_batch_size if batch_size is None else batch_size
        for start in range(0, len(buffer), step):
            places = torch.arange(start, min(start + step, len(buffer)))
            yield buffer.take(None, places).to(self.batch_dtype)

    def frames(self, episodes: Sequence[int]) -> FrameActivations:
        """Activations of whole episodes, one behind the other, each in order of time.

        Args:
            episodes: Numbers of loaded episodes.

        Raises:
            ValueError: If there is none, or one of them is not loaded.
        """
        shapes = self.shapes
        held = shapes.episode_numbers
        if not episodes or {*episodes} - {*held}:
            raise ValueError(
                f"episodes {list(episodes)[:16]}: give some of the {len(held)} that are loaded, "
                f"{held[0]} to {held[-1]}"
            )
        pieces = [piece for number in episodes for piece in shapes.pieces(number)]
        with progress_bar("Reading activations", len(pieces), self.progress) as advance:
            parts = []
            for piece in pieces:
                parts.append(self.source.read(piece).to(self.batch_dtype))
                advance(1)
        rows = torch.cat([torch.tensor(piece) for piece in pieces])
        index = shapes.index()
        return FrameActivations(
            torch.cat(parts), index["episode_index"][rows], index["frame_index"][rows]
        )

    def resume_at(self, epoch: int, batch: int) -> None:
        """Let the next training pass continue an interrupted epoch.

        Args:
            epoch: The interrupted epoch.
            batch: Batches of it that were already used on this rank.
        """
        if self._train_sampler is not None:
            self._train_sampler.resume_at(epoch, batch)
        else:
            self._resume = (epoch, batch)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of vectors; in order of time when Lightning overfits some batches."""
        trainer = self.trainer
        buffer = self._buffer_of("train")
        if self._train_sampler is None:
            self._train_sampler = VectorSampler(
                len(buffer), self.batch_size, self.seed, rank=self._rank, world_size=self._world
            )
            if self._resume is not None:
                self._train_sampler.resume_at(*self._resume)
                self._resume = None
            elif trainer is not None:
                self._train_sampler.set_epoch(trainer.current_epoch)
        shuffle = not getattr(trainer, "overfit_batches", 0)
        dataset = VectorDataset(buffer, self.seed if shuffle else None, self.batch_dtype)
        return self._loader(dataset, self._train_sampler, _whole)

    def val_dataloader(self) -> DataLoader:
        """Vectors of the validation episodes in order of time."""
        buffer = self._buffer_of("val")
        sampler = EvaluationBatchSampler(len(buffer), self.val_batch_size, self._rank, self._world)
        return self._loader(VectorDataset(buffer, dtype=self.batch_dtype), sampler, _whole)

    def test_dataloader(self) -> DataLoader:
        """As :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """This rank's share of the validation vectors; together, ranks predict each once."""
        dataset = VectorDataset(self._buffer_of("val"))
        return self._share_loader(dataset, self.val_batch_size, _whole)

    def _resume_facts(self) -> dict[str, Any]:
        """Everything that decides which vectors a batch holds."""
        return {
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            # How a batch is dealt to processes does not matter.
            "joined_batch_size": self.batch_size * self._world,
            "per": self.per,
            "buffer_mb": self.buffer_mb,
            "frames_per_batch": self.shapes.frames_per_batch,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree with."""
        return {
            **self._resume_facts(),
            "made_from": self.identity,
            "policy": self.policy_path,
            "source": self.data_name,
            "epoch": 0 if self._train_sampler is None else self._train_sampler.epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue a run on other activations or in other batches.

        Args:
            state_dict: What :meth:`state_dict` returned in the interrupted run.

        Raises:
            ValueError: If training would continue with another policy, data set, split or batch.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        facts = {**self._resume_facts(), **self.identity}
        then = {**state_dict, **state_dict["made_from"]}
        changed = [
            name if name in ("split", "fingerprint") else f"{name} was {then[name]}, is {value}"
            for name, value in facts.items()
            if then.get(name, value) != value
        ]
        if changed:
            raise ValueError(
                f"cannot continue the run of this checkpoint, because the activations differ: "
                f"{'; '.join(changed)}. Give --ckpt_path only with the data settings of that run "
                f"(its policy was {state_dict['policy']!r}, its data {state_dict['source']!r}), or "
                "start a new run"
            )


@dataclass(frozen=True)
class ActivationSource:
    """What computes activations, as it is sent to a worker process.

    Args:
        settings: Arguments of an :class:`ActivationDataModule`.
        device: Of the policy.
        fingerprint: Of the activations that are asked for.
    """

    settings: tuple[tuple[str, Any], ...]
    device: str
    fingerprint: str

    def __call__(self) -> Compute:
        """Load the policy, and open the demonstrations.

        Raises:
            ValueError: If policy or data have changed since they were asked for.
        """
        settings = dict(self.settings)
        if isinstance(settings["episodes"], tuple):
            settings["episodes"] = [*settings["episodes"]]
        data = ActivationDataModule(**settings, progress=False)
        if data.fingerprint != self.fingerprint:
            raise ValueError(
                f"{data.policy_path} or {data.data_name} changed while activations were computed; "
                "start again"
            )
        device = torch.device(self.device)
        _move(data.policy, device)
        return data.live(device).compute


def policy_hash(view: PolicyView) -> str:
    """Hash of everything that a policy computes with: weights, scales, settings."""
    digest = hashlib.sha256(repr(getattr(view, "hyper_parameters", None)).encode())
    parts = {"": view} if isinstance(view, nn.Module) else dict(sorted(vars(view).items()))
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            # LeRobot's policies keep their settings there.
            digest.update(repr(getattr(part, "config", None)).encode())
            _hash_tensors(digest, name, part.state_dict())
        for number, step in enumerate(getattr(part, "steps", ())):
            with suppress(AttributeError):
                _hash_tensors(digest, f"{name}.{number}", step.state_dict())
    return digest.hexdigest()[:32]


def _hash_tensors(digest: Any, prefix: str, tensors: Mapping[str, Any]) -> None:
    for name, value in sorted(tensors.items()):
        if isinstance(value, Tensor):
            digest.update(f"{prefix} {name} {value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().tobytes())


def _move(view: PolicyView, device: torch.device) -> None:
    """Bring a policy's modules to a device; LeRobot's processors follow."""
    parts = [view] if isinstance(view, nn.Module) else vars(view).values()
    for part in parts:
        if isinstance(part, nn.Module):
            part.to(device)


def _whole(batch: Any) -> Any:
    """Collate function of a loader whose data set already returns batches."""
    return batch
