"""Demonstrations in a LeRobotDataset v3.x, local or from the hub, as batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from datamodules.base import DemonstrationDataModule, Source, chosen_episodes
from datamodules.chunking import ChunkDataset
from datamodules.errors import DatasetError, Problem
from datamodules.frame_store import FrameWriter, StoreShapes, build_store, resize_into
from datamodules.lerobot_files import (
    ACTION,
    ENVIRONMENT_STATE,
    INFO,
    SIMULATOR_STATE,
    STATE,
    Episode,
    Folder,
    PictureReader,
    fetch_files,
    fill_store,
    find_folder,
    missing_files,
    needed_files,
    read_folder,
    read_tables,
    refusal,
)
from datamodules.sampling import EpochBatchSampler
from datamodules.scan import can_name_camera
from datamodules.statistics import IMAGE_SAMPLE_FRAMES, compute_statistics
from datamodules.streaming import StreamDataset, StreamSampler
from policies.interface import DataSchema, DataStatistics
from policies.lerobot_format import camera_name

READER_VERSION = 1
"""Part of the cache key: raise it when the same folder would be read differently."""


class LeRobotDataModule(DemonstrationDataModule):
    """Demonstrations from a LeRobotDataset v3.x.

    Chunks are those of LeRobot's ``delta_timestamps``, padding included. Films are decoded once
    into the frame store, by default a cache on disk that later runs open without decoding.

    Args:
        repo_id: A folder, or the name of a data set on the hub such as lerobot/pusht.
        root: The folder, when repo_id is only a name; the hub is not asked then.
        revision: Branch, tag or commit on the hub; LeRobot's tag v3.0, else main, when null.
        camera_names: Cameras to load, in this order, by our name or LeRobot's key; all when null.
        use_environment_state: Offer observation.environment_state to policies. It is privileged:
            a policy that has seen it cannot act without it.
        simulator_state: Feature that resets the simulator to an observed instant. auto takes
            observation.simulator_state, else observation.environment_state, where there is one;
            give null when neither resets anything (PushT's keypoints).
        tolerance_s: Largest distance in time between a row and its frame of the film.
        shuffle_buffer: Samples that wait in memory to be shuffled with storage stream.
        batch_size: Samples of a training batch, per process.
        chunk_size: Steps of an action chunk.
        n_obs_steps: Steps of observation history.
        val_fraction: Share of the episodes held out; at least one episode unless 0.
        episodes: Numbers of the episodes to load, or a slice such as "0:50"; all when null.
        seed: Of the split and of the order of samples.
        num_workers: Processes that gather batches; 0 is the fastest with this store.
        storage: Where frames lie: memmap (a cache on disk), ram or gpu; stream decodes them anew
            in every epoch, for data that fit nowhere.
        cache_dir: Folder of the memmap caches; the user's cache folder when null.
        image_size: Height and width in px that pictures are resized to when they are read.
        drop_n_last_frames: Frames at the end of an episode that start no training sample.
        sample_every: Train on every k-th frame of an episode.
        val_sample_every: Validate on every k-th frame of an episode.
        val_batch_size: Samples of a validation batch; as batch_size when null.
        drop_last: Leave out a smaller last training batch.
        action_start: First step of the chunk relative to the observed one.
        progress: Show a progress bar while frames are read.

    Raises:
        ValueError: When an argument is out of range.
    """

    def __init__(
        self,
        repo_id: str,
        root: str | None = None,
        revision: str | None = None,
        camera_names: list[str] | None = None,
        use_environment_state: bool = False,
        simulator_state: str | None = "auto",
        tolerance_s: float = 1e-4,
        shuffle_buffer: int = 2000,
        batch_size: int = 32,
        chunk_size: int = 100,
        n_obs_steps: int = 1,
        val_fraction: float = 0.1,
        episodes: list[int] | str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        storage: Literal["ram", "memmap", "gpu", "stream"] = "memmap",
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
        super().__init__(
            batch_size=batch_size,
            chunk_size=chunk_size,
            n_obs_steps=n_obs_steps,
            val_fraction=val_fraction,
            episodes=episodes,
            seed=seed,
            num_workers=num_workers,
            storage="ram" if storage == "stream" else storage,
            cache_dir=cache_dir,
            image_size=image_size,
            drop_n_last_frames=drop_n_last_frames,
            sample_every=sample_every,
            val_sample_every=val_sample_every,
            val_batch_size=val_batch_size,
            drop_last=drop_last,
            action_start=action_start,
            progress=progress,
        )
        if not tolerance_s > 0:
            raise ValueError(f"tolerance_s is {tolerance_s}; it must be positive")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1")
        self.streamed = storage == "stream"
        if self.streamed and num_workers:
            raise ValueError(
                f"num_workers is {num_workers}, but with storage: stream one process reads the "
                "films from end to end, with the threads of the codec; set num_workers to 0"
            )
        self.repo_id = repo_id
        self.root = root
        self.revision = revision
        self.camera_names = camera_names
        self.use_environment_state = use_environment_state
        self.simulator_state = simulator_state
        self.tolerance_s = tolerance_s
        self.shuffle_buffer = shuffle_buffer

    @cached_property
    def recording(self) -> "Recording":
        """Everything about the data set but the pictures."""
        root = find_folder(self.repo_id, self.root, self.revision)
        folder = read_folder(root, self.repo_id if self.root is None else str(root))
        cameras = name_cameras(folder, self.camera_names)
        keys = self._keys(folder)
        numbers = chosen_episodes(self.episodes, list(folder.episodes))
        fetch_files(folder, self.repo_id, numbers, list(cameras.values()))
        problems = missing_files(folder, numbers, list(cameras.values()))
        tables = read_tables(folder, numbers, sorted(set(keys.values())))
        if problems or tables.problems:
            raise DatasetError(folder.name, [*problems, *tables.problems])
        return Recording(folder, cameras, keys, tables.episodes)

    def _keys(self, folder: Folder) -> dict[str, str]:
        """Name of each column of the store to LeRobot's key."""

        def checked(key: str, mend: str) -> str:
            if key not in folder.vectors:
                held = ", ".join(folder.features)
                what = f"no such feature of numbers; the data set has {held}"
                raise refusal(folder.root / INFO, f"features.{key}", what, mend)
            return key

        keys = {"action": checked(ACTION, "policies learn actions: record them under this key")}
        if STATE in folder.vectors:
            keys["state"] = STATE
        if self.use_environment_state:
            keys["environment_state"] = checked(
                ENVIRONMENT_STATE, "set use_environment_state to false"
            )
        if self.simulator_state == "auto":
            resets = [key for key in (SIMULATOR_STATE, ENVIRONMENT_STATE) if key in folder.vectors]
            if resets:
                keys["simulator_state"] = resets[0]
        elif self.simulator_state is not None:
            keys["simulator_state"] = checked(
                self.simulator_state, "name one of these as simulator_state, or null for none"
            )
        return keys

    def describe(self) -> Source:
        """Describe the folder."""
        recording = self.recording
        folder = recording.folder
        columns = {name: folder.vectors[key] for name, key in recording.columns.items()}
        numbers, keys = list(recording.episodes), list(recording.cameras.values())
        files = [file.absolute() for file in needed_files(folder, numbers, keys)]
        return Source(
            name=folder.name,
            schema=DataSchema(
                cameras={
                    name: (folder.cameras[key].height, folder.cameras[key].width)
                    for name, key in recording.cameras.items()
                },
                state_dim=columns.get("state", 0),
                action_dim=columns["action"],
                fps=folder.fps,
                environment_state_dim=columns.get("environment_state", 0),
            ),
            columns=columns,
            episode_lengths={number: entry.length for number, entry in folder.episodes.items()},
            identity={
                "reader": f"lerobot {READER_VERSION}",
                "revision": self.revision,
                "meta": folder.digest,
                "cameras": dict(recording.cameras),
                "columns": dict(recording.columns),
                "source": [
                    [str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files
                ],
            },
            train_episodes=folder.masks.get("train"),
            val_episodes=folder.masks.get("val"),
        )

    def fill(self, writer: FrameWriter) -> None:
        """Read every frame of the writer's episodes, one pass through each file."""
        recording = self.recording
        fill_store(
            recording.folder,
            recording.episodes,
            {name: recording.cameras[name] for name in writer.shapes.cameras},
            recording.columns,
            writer,
            self.tolerance_s,
        )

    def episode_origins(self) -> dict[int, tuple[str, str]]:
        """Data file and LeRobot's number of each loaded episode, by its number."""
        return {
            number: (str(episode.entry.data_file), f"episode {number}")
            for number, episode in self.recording.episodes.items()
        }

    @property
    def stored_cameras(self) -> dict[str, tuple[int, int]]:
        """Cameras whose pictures the store holds: none with storage stream."""
        return {} if self.streamed else super().stored_cameras

    def dataset(
        self, episodes: Sequence[int], drop_n_last_frames: int = 0, sample_every: int = 1
    ) -> ChunkDataset:
        """Samples of chosen episodes in the shape of this module's batches."""
        if not self.streamed:
            return super().dataset(episodes, drop_n_last_frames, sample_every)
        return StreamDataset(
            self.store,
            self._picture_source(),
            episodes,
            self.chunk_size,
            self.n_obs_steps,
            drop_n_last_frames,
            sample_every,
            self.action_start,
        )

    def train_sampler(self, shuffle: bool, rank: int, world_size: int) -> EpochBatchSampler:
        """Order of the training samples; made once per run."""
        dataset = self.train_dataset
        if not isinstance(dataset, StreamDataset):
            return super().train_sampler(shuffle, rank, world_size)
        dataset.plan = StreamSampler(
            dataset.sample_counts,
            self.batch_size,
            self.shuffle_buffer,
            self.seed,
            shuffle,
            self.drop_last,
            rank,
            world_size,
        )
        return dataset.plan

    @cached_property
    def statistics(self) -> DataStatistics:
        """Statistics of the training episodes; after ``setup``."""
        described = super().statistics
        if not self.streamed:
            return described
        return replace(described, images=self._sampled_pictures_statistics().images)

    def _sampled_pictures_statistics(self) -> DataStatistics:
        """Statistics of the frames that a store with pictures would take them from."""
        recording = self.recording
        train = self.split["train"]
        rows = np.concatenate(
            [np.arange(self.store.rows(n).start, self.store.rows(n).stop) for n in train]
        )
        chosen = np.arange(len(rows))
        if len(rows) > IMAGE_SAMPLE_FRAMES:
            rng = np.random.default_rng(self.seed)
            chosen = np.sort(rng.choice(len(rows), IMAGE_SAMPLE_FRAMES, replace=False))
        lengths = [recording.episodes[number].length for number in train]
        ends = np.cumsum(lengths)
        wanted: dict[int, list[int]] = {}
        for at in chosen.tolist():
            position = int(np.searchsorted(ends, at, side="right"))
            start = int(ends[position]) - lengths[position]
            wanted.setdefault(train[position], []).append(at - start)
        sizes = {name: (size[0], size[1]) for name, size in self.cameras.items()}

        def fill(writer: FrameWriter) -> None:
            source = self._picture_source()
            for camera in writer.shapes.cameras:
                row = 0
                for number, frames in wanted.items():
                    for picture in source.pictures(camera, number, frames):
                        writer.image_rows(camera, row, row + 1)[0] = picture
                        row += 1
            writer.write_column("action", 0, np.arange(len(chosen), dtype=np.float32)[:, None])

        shapes = StoreShapes(sizes, {"action": 1}, (0,), (len(chosen),))
        store = build_store(shapes, fill, "ram", progress=self.progress)
        return compute_statistics(store, [0], 1, seed=self.seed)

    def _picture_source(self) -> "RecordedPictures":
        sizes = {name: (size[0], size[1]) for name, size in self.cameras.items()}
        return RecordedPictures(self.recording, sizes, self.tolerance_s)


@dataclass(frozen=True)
class Recording:
    """Chosen episodes of a folder, and how their features are called here."""

    folder: Folder
    cameras: dict[str, str]
    """Camera name to feature key, in token order."""
    columns: dict[str, str]
    """Column of the store to feature key."""
    episodes: dict[int, Episode]


class RecordedPictures:
    """Pictures of a recording in the size that batches have, decoded on demand.

    Args:
        recording: Where they are.
        sizes: Camera name to (height, width) in px.
        tolerance_s: Largest distance in time between a row and its frame of the film.
    """

    def __init__(
        self, recording: Recording, sizes: Mapping[str, tuple[int, int]], tolerance_s: float
    ) -> None:
        self._episodes = recording.episodes
        self._sizes = dict(sizes)
        self._readers = {
            name: PictureReader(recording.folder.cameras[key], recording.folder.fps, tolerance_s)
            for name, key in recording.cameras.items()
        }

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(self._readers)

    def pictures(
        self, camera: str, episode: int, frames: Sequence[int]
    ) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """Pictures of one episode at ascending steps.

        Raises:
            DatasetError: When one cannot be read.
        """
        size = self._sizes[camera]
        for picture in self._readers[camera].pictures(self._episodes[episode], frames):
            if picture.shape[:2] == size:
                yield picture
                continue
            resized = np.empty((*size, 3), np.uint8)
            resize_into(resized, picture)
            yield resized


def name_cameras(folder: Folder, chosen: Sequence[str] | None = None) -> dict[str, str]:
    """Our names of the cameras, to LeRobot's keys.

    Args:
        folder: The data set.
        chosen: Cameras to take, in this order, by name or key; all when None.

    Raises:
        DatasetError: When a camera that is taken is unknown, or cannot have a name of its own.
    """
    file = folder.root / INFO
    keys_of: dict[str, list[str]] = {}
    for key in folder.cameras:
        keys_of.setdefault(camera_name(key), []).append(key)
    problems = [
        Problem(str(file), "features", f"no camera {name!r}; it has {', '.join(keys_of)}", "choose")
        for name in chosen or ()
        if name not in keys_of and name not in folder.cameras
    ]
    if problems:
        raise DatasetError(folder.name, problems)
    taken: dict[str, str] = {}
    for wanted in folder.cameras if chosen is None else chosen:
        for key in [wanted] if wanted in folder.cameras else keys_of[wanted]:
            name = camera_name(key)
            if not can_name_camera(name):
                what = "cannot name a camera (files are named after it)"
                mend = "rename the feature, or choose others with camera_names:"
                raise refusal(file, f"features.{key}", what, mend)
            if taken.setdefault(name, key) != key:
                what = f"{taken[name]} and {key} would both be called {name!r}"
                raise refusal(file, "features", what, "rename one, or load one with camera_names:")
    return taken
