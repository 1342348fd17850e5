"""Demonstrations in HDF5 files, or made on demand, as batches."""

import warnings
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from datamodules.base import DemonstrationDataModule, Source
from datamodules.errors import problem_lines
from datamodules.frame_store import FrameWriter, Storage
from datamodules.hdf5_frames import fill_store
from datamodules.layouts import HDF5Schema
from datamodules.scan import Scan, scan_hdf5
from policies.interface import DataSchema


@runtime_checkable
class DemonstrationSource(Protocol):
    """Something that makes a file of demonstrations, e.g. a scripted expert."""

    def prepare(self) -> Path:
        """Make the demonstrations unless they exist, and say where they are.

        Called from every process of a run, so a file must appear whole or not at all.
        """
        ...


class HDF5DataModule(DemonstrationDataModule):
    """Demonstrations from HDF5: one file, or a folder of files.

    Args:
        path: File or folder of the demonstrations.
        demonstrations: Makes the demonstrations first, instead of path (class_path, init_args).
        layout: auto, demos, aloha, aloha_pp, robomimic or libero.
        schema: Where everything is in a file of no known layout.
        skip_bad_episodes: Leave out episodes that have a problem, instead of stopping.
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

    Raises:
        ValueError: When not exactly one of path and demonstrations is given, or an argument is
            out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        demonstrations: DemonstrationSource | None = None,
        layout: str = "auto",
        schema: HDF5Schema | None = None,
        skip_bad_episodes: bool = False,
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
        super().__init__(
            batch_size=batch_size,
            chunk_size=chunk_size,
            n_obs_steps=n_obs_steps,
            val_fraction=val_fraction,
            episodes=episodes,
            seed=seed,
            num_workers=num_workers,
            storage=storage,
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
        if (path is None) == (demonstrations is None):
            given = "neither" if path is None else "both"
            raise ValueError(
                f"{given} of path and demonstrations given; give exactly one: a file or folder of "
                "demonstrations (path), or something that makes them (demonstrations)"
            )
        if schema is not None and layout != "auto":
            raise ValueError(
                f"layout is {layout!r} and a schema is given too; leave layout at auto"
            )
        self.path = path
        self.demonstrations = demonstrations
        self.layout = layout
        self.schema = schema
        self.skip_bad_episodes = skip_bad_episodes

    @cached_property
    def scan(self) -> Scan:
        """Everything about the files but the pictures; makes the demonstrations if need be."""
        if self.demonstrations is not None:
            path = self.demonstrations.prepare()
        else:
            assert self.path is not None
            path = Path(self.path)
        scan = scan_hdf5(path, self.layout, self.schema)
        scan.require_usable(self.skip_bad_episodes)
        bad = {problem.episode for problem in scan.problems if problem.episode is not None}
        if bad:
            warnings.warn(
                f"{path}: {len(bad)} of {len(bad) + len(scan.episodes)} episodes are left out "
                f"(skip_bad_episodes): {problem_lines(scan.problems)[0]}",
                stacklevel=2,
            )
        return scan

    def describe(self) -> Source:
        """Describe the scanned files."""
        return describe_scan(self.scan)

    def fill(self, writer: FrameWriter) -> None:
        """Read every frame of the writer's episodes, each file once."""
        fill_store(self.scan, writer)

    def episode_origins(self) -> dict[int, tuple[str, str]]:
        """File and group of each usable episode, by its number."""
        return {
            episode.number: (str(episode.file), episode.group) for episode in self.scan.episodes
        }


def describe_scan(scan: Scan) -> Source:
    """What a scan says about the data set, in the words of the base class."""
    columns = {name: values.shape[1] for name, values in scan.episodes[0].columns.items()}
    files = [file.resolve() for file in scan.files]
    usable = {episode.number for episode in scan.episodes}

    def loadable(mask: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if mask is None else tuple(number for number in mask if number in usable)

    return Source(
        name=str(scan.path),
        schema=DataSchema(
            cameras={name: (camera.height, camera.width) for name, camera in scan.cameras.items()},
            state_dim=columns.get("state", 0),
            action_dim=columns["action"],
            fps=scan.fps,
            environment_state_dim=columns.get("environment_state", 0),
        ),
        columns=columns,
        episode_lengths={episode.number: episode.length for episode in scan.episodes},
        identity={
            "reader": "hdf5",
            "schema": repr(scan.schema),
            "source": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        },
        train_episodes=loadable(scan.train_episodes),
        val_episodes=loadable(scan.val_episodes),
    )
