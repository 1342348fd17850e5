"""What every data module of demonstrations shares: split, store, statistics, loaders, resuming.

A subclass says what its source holds (:meth:`DemonstrationDataModule.describe`) and writes the
frames of chosen episodes into a store (:meth:`DemonstrationDataModule.fill`). The rest is here.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from datamodules.chunking import ChunkDataset, whole_batch
from datamodules.frame_store import FrameStore, FrameWriter, Storage, StoreShapes, build_store
from datamodules.loaders import SharedDataModule
from datamodules.sampling import EpochBatchSampler, EvaluationBatchSampler
from datamodules.statistics import compute_statistics
from policies.interface import Batch, DataSchema, DataStatistics


@dataclass(frozen=True)
class Source:
    """What a data set holds, known without reading its pictures."""

    name: str
    """What the user called it, for messages."""
    schema: DataSchema
    """As stored in the source, before any resize."""
    columns: dict[str, int]
    """Dimensions of ``action`` and, where present, ``state``, ``environment_state`` and
    ``simulator_state``."""
    episode_lengths: dict[int, int]
    """Steps of each usable episode, by its number."""
    identity: dict
    """Plain values that change whenever the content may have changed; the entry ``source`` lists
    [path, size, time of change] of each file, where there are files."""
    train_episodes: tuple[int, ...] | None = None
    """Episodes that the data set itself assigns to training."""
    val_episodes: tuple[int, ...] | None = None
    """Episodes that the data set itself assigns to validation."""


class DemonstrationDataModule(SharedDataModule):
    """Batches of demonstrations, whatever file they come from.

    The properties :attr:`data_schema`, :attr:`cameras` and the dimensions are known before
    ``setup``, so that a command line can link a policy's arguments to them. Nothing is normalised
    here: the policy does that on its device.

    Args:
        batch_size: Samples of a training batch, per process.
        chunk_size: Steps of an action chunk.
        n_obs_steps: Steps of observation history.
        val_fraction: Share of the episodes held out; at least one episode unless 0.
        episodes: Numbers of the episodes to load, or a slice such as "0:50"; all when null.
        seed: Of the split and of the order of samples.
        num_workers: Processes that gather batches; 0 is the fastest with this store.
        storage: Where frames lie: ram, memmap (a cache on disk) or gpu.
        cache_dir: Folder of the memmap caches; the user's cache folder when null.
        image_size: Height and width in px that pictures are resized to when the store is filled.
        drop_n_last_frames: Frames at the end of an episode that start no training sample.
        sample_every: Train on every k-th frame of an episode.
        val_sample_every: Validate on every k-th frame of an episode.
        val_batch_size: Samples of a validation batch; as batch_size when null.
        drop_last: Leave out a smaller last training batch.
        action_start: First step of the chunk relative to the observed one.
        progress: Show a progress bar while frames are read.
    """

    def __init__(
        self,
        batch_size: int = 32,
        chunk_size: int = 100,
        n_obs_steps: int = 1,
        val_fraction: float = 0.1,
        episodes: list[int] | str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        storage: Storage = "ram",
        cache_dir: str | None = None,
        image_size: tuple[int, int] | None = None,
        drop_n_last_frames: int = 0,
        sample_every: int = 1,
        val_sample_every: int = 1,
        val_batch_size: int | None = None,
        drop_last: bool = False,
        action_start: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("chunk_size", chunk_size, 1),
            ("n_obs_steps", n_obs_steps, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("drop_n_last_frames", drop_n_last_frames, 0),
            ("sample_every", sample_every, 1),
            ("val_sample_every", val_sample_every, 1),
            ("val_batch_size", 1 if val_batch_size is None else val_batch_size, 1),
            ("image_size", min(image_size or (1,)), 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}; it must lie in [0, 1)")
        if num_workers and storage == "gpu":
            raise ValueError(
                f"num_workers is {num_workers} but worker processes cannot gather from "
                "storage: gpu; set num_workers to 0"
            )
        self.batch_size = batch_size
        self._chunk_size = chunk_size
        self.n_obs_steps = n_obs_steps
        self.val_fraction = val_fraction
        self.episodes = episodes
        self.seed = seed
        self.num_workers = num_workers
        self.storage: Storage = storage
        self.cache_dir = cache_dir
        self.image_size = None if image_size is None else (image_size[0], image_size[1])
        self.drop_n_last_frames = drop_n_last_frames
        self.sample_every = sample_every
        self.val_sample_every = val_sample_every
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.drop_last = drop_last
        self.action_start = action_start
        self.progress = progress
        self._store: FrameStore | None = None
        self._val_dataset: ChunkDataset | None = None
        self._train_sampler: EpochBatchSampler | None = None
        self._resume: tuple[int, int] | None = None

    def describe(self) -> Source:
        """Look at the source; called once.

        Raises:
            DatasetError: When it cannot be used.
        """
        raise NotImplementedError

    def fill(self, writer: FrameWriter) -> None:
        """Write every frame of the writer's episodes.

        Raises:
            DatasetError: When a frame cannot be read.
        """
        raise NotImplementedError

    @cached_property
    def source(self) -> Source:
        """What the data set holds."""
        return self.describe()

    @property
    def data_schema(self) -> DataSchema:
        """Columns of the data, with pictures of the size that batches have."""
        schema = self.source.schema
        if self.image_size is None:
            return schema
        return replace(schema, cameras=dict.fromkeys(schema.cameras, self.image_size))

    @property
    def cameras(self) -> dict[str, list[int]]:
        """Camera name to [height, width] in px."""
        return {name: list(size) for name, size in self.data_schema.cameras.items()}

    @property
    def stored_cameras(self) -> dict[str, tuple[int, int]]:
        """Cameras whose pictures the store holds, to (height, width) in px."""
        return self.data_schema.cameras

    @property
    def state_dim(self) -> int:
        """Dimensions of qpos; 0 for none."""
        return self.data_schema.state_dim

    @property
    def action_dim(self) -> int:
        """Dimensions of one action."""
        return self.data_schema.action_dim

    @property
    def environment_state_dim(self) -> int:
        """Dimensions of the privileged environment state; 0 for none."""
        return self.data_schema.environment_state_dim

    @property
    def fps(self) -> float | None:
        """Control frequency in Hz, when the data set states it."""
        return self.data_schema.fps

    @property
    def chunk_size(self) -> int:
        """Steps of an action chunk."""
        return self._chunk_size

    @cached_property
    def split(self) -> dict[str, Any]:
        """Which episodes train and which validate, as plain values.

        ``by`` is ``seed``, or ``mask`` where the data set itself says.
        """
        loaded = chosen_episodes(self.episodes, sorted(self.source.episode_lengths))
        train, val = self.source.train_episodes, self.source.val_episodes
        if train is not None and val is not None:
            train_loaded = [number for number in loaded if number in set(train)]
            val_loaded = [number for number in loaded if number in set(val)]
            if not train_loaded:
                raise ValueError(
                    f"{self.source.name}: no loaded episode is in the training mask of the data set"
                )
            return {"by": "mask", "train": train_loaded, "val": val_loaded}
        train_loaded, val_loaded = split_episodes(loaded, self.val_fraction, self.seed)
        return {"by": "seed", "train": train_loaded, "val": val_loaded}

    @cached_property
    def statistics(self) -> DataStatistics:
        """Statistics of the training episodes; after ``setup``."""
        return compute_statistics(self.store, self.split["train"], self._chunk_size, seed=self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the loaded demonstrations; after ``setup``."""
        return self.store.fingerprint()

    @property
    def store(self) -> FrameStore:
        """All loaded frames; after ``setup``."""
        if self._store is None:
            raise RuntimeError("the frames are not loaded yet; call setup() first")
        return self._store

    @property
    def train_dataset(self) -> ChunkDataset:
        """Training samples; after ``setup``."""
        self.store  # noqa: B018  (says what is missing)
        return self._train_dataset

    @property
    def val_dataset(self) -> ChunkDataset | None:
        """Validation samples; None when no episode is held out; after ``setup``."""
        self.store  # noqa: B018  (says what is missing)
        return self._val_dataset

    def prepare_data(self) -> None:
        """Look at the source on one process, so that a broken one stops the run early."""
        self.source  # noqa: B018  (a cached property)

    def setup(self, stage: str | None = None) -> None:
        """Read the frames once.

        Args:
            stage: Lightning's stage; all stages need the same.

        Raises:
            DatasetError: When the source cannot be used.
            ValueError: When every episode is shorter than ``chunk_size``.
        """
        if self._store is not None:
            return
        source, split = self.source, self.split
        numbers = sorted(split["train"] + split["val"])
        longest = max(source.episode_lengths[number] for number in numbers)
        if longest < self._chunk_size:
            raise ValueError(
                f"{source.name}: every episode is shorter than chunk_size: the longest has "
                f"{longest} steps and chunk_size is {self._chunk_size}; set chunk_size to "
                f"{longest} or less"
            )
        shapes = StoreShapes(
            cameras=dict(self.stored_cameras),
            columns=dict(source.columns),
            episode_numbers=tuple(numbers),
            episode_lengths=tuple(source.episode_lengths[number] for number in numbers),
        )
        device = self.trainer.strategy.root_device if self.trainer is not None else "cuda"
        self._store = build_store(
            shapes,
            self.fill,
            self.storage,
            cache_dir=self.cache_dir,
            identity=source.identity,
            device=device,
            progress=self.progress,
        )
        self._train_dataset = self.dataset(
            split["train"], self.drop_n_last_frames, self.sample_every
        )
        if split["val"]:
            self._val_dataset = self.dataset(split["val"], 0, self.val_sample_every)

    def dataset(
        self, episodes: Sequence[int], drop_n_last_frames: int = 0, sample_every: int = 1
    ) -> ChunkDataset:
        """Samples of chosen episodes in the shape of this module's batches."""
        return ChunkDataset(
            self.store,
            episodes,
            self._chunk_size,
            self.n_obs_steps,
            drop_n_last_frames,
            sample_every,
            self.action_start,
        )

    def episode(self, number: int) -> Batch:
        """All steps of one episode as a batch, in order of time."""
        dataset = self.dataset([number])
        return dataset.__getitems__(range(len(dataset)))

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
        """Shuffled batches; unshuffled when Lightning overfits some batches."""
        trainer = self.trainer
        if self._train_sampler is None:
            self._train_sampler = self.train_sampler(
                shuffle=not getattr(trainer, "overfit_batches", 0),
                rank=self._rank,
                world_size=self._world,
            )
            if self._resume is not None:
                self._train_sampler.resume_at(*self._resume)
                self._resume = None
            elif trainer is not None:
                # Workers fetch the first batches before Lightning sets the epoch.
                self._train_sampler.set_epoch(trainer.current_epoch)
        return self._loader(self.train_dataset, self._train_sampler, whole_batch, self.num_workers)

    def train_sampler(self, shuffle: bool, rank: int, world_size: int) -> EpochBatchSampler:
        """Order of the training samples; made once per run."""
        return EpochBatchSampler(
            len(self.train_dataset),
            self.batch_size,
            self.seed,
            shuffle=shuffle,
            drop_last=self.drop_last,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> DataLoader | list:
        """Held-out episodes in order of time; an empty list when there are none."""
        if self.val_dataset is None:
            return []
        sampler = EvaluationBatchSampler(
            len(self.val_dataset), self.val_batch_size, self._rank, self._world
        )
        return self._loader(self.val_dataset, sampler, whole_batch, self.num_workers)

    def test_dataloader(self) -> DataLoader | list:
        """As :meth:`val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list:
        """This rank's share of the held-out samples; together, ranks predict each sample once."""
        if self.val_dataset is None:
            return []
        return self._share_loader(
            self.val_dataset, self.val_batch_size, whole_batch, self.num_workers
        )

    def _resume_facts(self) -> dict[str, Any]:
        """Everything that decides which samples a batch holds."""
        return {
            "fingerprint": self.fingerprint,
            "split": self.split,
            "seed": self.seed,
            # How a batch is dealt to processes does not matter.
            "joined_batch_size": self.batch_size * self._world,
            "drop_last": self.drop_last,
            "chunk_size": self._chunk_size,
            "n_obs_steps": self.n_obs_steps,
            "action_start": self.action_start,
            "drop_n_last_frames": self.drop_n_last_frames,
            "sample_every": self.sample_every,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree with."""
        return {
            **self._resume_facts(),
            "source": self.source.name,
            "epoch": 0 if self._train_sampler is None else self._train_sampler.epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue a run on other data or in other batches.

        Args:
            state_dict: What :meth:`state_dict` returned in the interrupted run.

        Raises:
            ValueError: When training would continue with a different data set, split or batch.
        """
        facts = self._resume_facts()
        changed = [name for name in facts if facts[name] != state_dict.get(name, facts[name])]
        if not changed:
            return
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        spelt = "; ".join(_difference(name, state_dict[name], facts[name]) for name in changed)
        if fitting:
            raise ValueError(
                f"cannot continue the run of this checkpoint, because the data differ: {spelt}. "
                f"Give --ckpt_path only with the data settings of that run (its data were "
                f"{state_dict.get('source')!r}), or start a new run"
            )
        if "split" in changed and facts["fingerprint"] == state_dict.get("fingerprint"):
            warnings.warn(
                f"the checkpoint was trained on another split of these episodes ({spelt}); "
                "held-out episodes may be ones it has seen",
                stacklevel=2,
            )


def _difference(name: str, then: Any, now: Any) -> str:
    if name == "fingerprint":
        return "the demonstrations themselves changed (fingerprint)"
    if name == "split":
        sizes = [f"{len(side['train'])} + {len(side['val'])}" for side in (then, now)]
        return f"split (train + val episodes) was {sizes[0]}, is {sizes[1]} with other members"
    return f"{name} was {then}, is {now}"


def chosen_episodes(chosen: Sequence[int] | str | None, available: Sequence[int]) -> list[int]:
    """Numbers of the episodes to load.

    Args:
        chosen: Numbers; or a slice such as "0:50" over the numbers; or None for all.
        available: Numbers of the usable episodes, ascending.

    Raises:
        ValueError: For a malformed slice, an unknown or repeated number, or no episode at all.
    """
    if not available:
        raise ValueError("the data set has no usable episode; inspect it with analyze.py inspect")
    known = f"the data set has {len(available)} episodes, {available[0]} to {available[-1]}"
    if chosen is None:
        numbers = list(available)
    elif isinstance(chosen, str):
        try:
            start, stop, step = (
                ([int(part) if part.strip() else None for part in chosen.split(":")] + [None])[:3]
                if chosen.count(":") in (1, 2)
                else (None, None, 0)
            )
            wanted = set(range(available[-1] + 1)[slice(start, stop, step)])
        except ValueError as error:
            raise ValueError(
                f"episodes is {chosen!r}; write a list or a slice like 0:50"
            ) from error
        numbers = [number for number in available if number in wanted]
    else:
        unknown = sorted(set(chosen) - set(available))
        if unknown:
            raise ValueError(f"episodes names {unknown[:8]}, but {known}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"episodes names a number twice: {list(chosen)[:16]}")
        numbers = sorted(chosen)
    if not numbers:
        raise ValueError(f"episodes is {chosen!r}, which selects none; {known}")
    return numbers


def split_episodes(
    numbers: Sequence[int], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide episodes into training and validation, whole episodes on either side.

    Args:
        numbers: Episodes to divide.
        val_fraction: Share held out, rounded, at least one episode unless 0.
        seed: Of the choice.

    Returns:
        Training and validation episodes, ascending.

    Raises:
        ValueError: When nothing would be left to train on.
    """
    held_out = max(1, round(len(numbers) * val_fraction)) if val_fraction else 0
    if held_out >= len(numbers):
        raise ValueError(
            f"val_fraction {val_fraction} of {len(numbers)} episode(s) leaves none to train on; "
            "record more, or set val_fraction to 0"
        )
    order = np.random.default_rng([seed, 0]).permutation(np.asarray(numbers)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])
