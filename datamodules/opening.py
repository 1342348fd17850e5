"""Demonstrations as a given policy sees them, from any path or name; and those of its own run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from policies.interface import DataSchema, PolicyView

if TYPE_CHECKING:
    from datamodules.base import DemonstrationDataModule
    from datamodules.frame_store import Storage
    from policies.loading import LoadedPolicy


def episode_lengths(dataset_repo_id: str) -> dict[int, int]:
    """Steps of each episode of a data set, by its number; from the hub, only tables are fetched.

    Raises:
        ValueError: If there is no such data set, or it cannot be used.
    """
    from datamodules.hdf5 import HDF5DataModule
    from datamodules.lerobot_files import find_folder, read_folder

    name, is_lerobot = _find_data(dataset_repo_id)
    if not is_lerobot:
        return dict(HDF5DataModule(name).source.episode_lengths)
    entries = read_folder(find_folder(name), name).episodes
    return {number: entry.length for number, entry in entries.items()}


@dataclass(frozen=True)
class DataShape:
    """What decides how demonstrations are read for a policy that is not there yet."""

    data_schema: DataSchema
    chunk_size: int
    n_obs_steps: int = 1


def open_demonstrations(
    dataset_repo_id: str,
    view: PolicyView | DataShape,
    episodes: Sequence[int] | None = None,
    progress: bool = True,
    storage: "Storage" = "ram",
) -> "DemonstrationDataModule":
    """Describe a data set as a policy sees it; ``setup()`` then reads the frames.

    Pictures are resized to the policy's size, and batches get its history and chunk length.

    Args:
        dataset_repo_id: HDF5 file, folder of them, LeRobot folder, or hub id.
        view: The policy, or what it reads.
        episodes: Numbers of the episodes to read; all when None.
        progress: Show a bar while frames are read.
        storage: Where frames lie: ram, memmap (the user's cache folder) or gpu.

    Raises:
        ValueError: If the data lack something that the policy reads, naming it.
    """
    from datamodules.hdf5 import HDF5DataModule
    from datamodules.lerobot import LeRobotDataModule

    schema = view.data_schema
    sizes = set(schema.cameras.values())
    arguments = {
        "chunk_size": view.chunk_size,
        "n_obs_steps": view.n_obs_steps,
        "val_fraction": 0.0,
        "episodes": None if episodes is None else sorted(set(episodes)),
        "image_size": next(iter(sizes)) if len(sizes) == 1 else None,
        "progress": progress,
        "storage": storage,
    }
    name, is_lerobot = _find_data(dataset_repo_id)
    if is_lerobot:
        data = LeRobotDataModule(
            name,
            camera_names=list(schema.cameras),
            use_environment_state=bool(schema.environment_state_dim),
            **arguments,
        )
    else:
        data = HDF5DataModule(name, **arguments)
    differences = schema.differences(data.data_schema)
    if differences:
        raise ValueError(
            f"--dataset_repo_id {dataset_repo_id} does not fit the policy: {'; '.join(differences)}"
            " (policy != data)"
        )
    if episodes is not None:
        # What was asked for is read, also what the data set itself keeps from training.
        data.split = {"by": "command", "train": arguments["episodes"], "val": []}
    return data


@dataclass(frozen=True)
class TrainingData:
    """What a policy's run was trained on, as its checkpoint says."""

    name: str
    """Path or hub id, as the run was given it."""
    fingerprint: str
    """Of all episodes below together, as the run read them."""
    train: tuple[int, ...]
    """Episodes that the policy was trained on."""
    val: tuple[int, ...]
    """Episodes that the run held out."""

    def is_in(self, data: "DemonstrationDataModule") -> bool:
        """Whether demonstrations are these, so that episode numbers mean the same.

        Where they are the same episodes, their content decides; where there are fewer or more, the
        name of file or folder does.

        Args:
            data: After ``setup``.
        """
        loaded, used = {*data.split["train"], *data.split["val"]}, {*self.train, *self.val}
        if loaded == used:
            return data.fingerprint == self.fingerprint
        available = {*data.source.episode_lengths}
        return used <= available and Path(data.source.name).name == Path(self.name).name


def training_data(policy: "LoadedPolicy") -> TrainingData | None:
    """Read what a policy was trained on; None for a folder of LeRobot's, which does not say."""
    from policies.checkpoint_files import read_checkpoint

    if policy.kind != "policyscope":
        return None
    for state in read_checkpoint(policy.source).values():
        if isinstance(state, dict) and {"split", "source", "fingerprint"} <= state.keys():
            split = state["split"]
            return TrainingData(
                str(state["source"]),
                str(state["fingerprint"]),
                tuple(split["train"]),
                tuple(split["val"]),
            )
    return None


def find_training_data(policy: "LoadedPolicy") -> str:
    """Path or hub id of the demonstrations that a policy was trained on.

    Raises:
        ValueError: If it does not say, or they are no longer there.
    """
    mend = "give dataset_repo_id: an HDF5 file, a folder of them, a LeRobot folder, or a hub id"
    trained_on = training_data(policy)
    if trained_on is None:
        raise ValueError(f"{policy.source}: does not say what it was trained on; {mend}")
    try:
        return _find_data(trained_on.name)[0]
    except ValueError as error:
        raise ValueError(
            f"{policy.source}: was trained on {trained_on.name}, which is not there from here; "
            f"{mend}"
        ) from error


def _find_data(dataset_repo_id: str) -> tuple[str, bool]:
    """The path or hub id as data modules take it, and whether it is a LeRobotDataset.

    Raises:
        ValueError: If nothing is there.
    """
    from datamodules import lerobot_files

    path = Path(dataset_repo_id).expanduser()
    if path.exists():
        return str(path), (path / lerobot_files.INFO).is_file()
    if lerobot_files.is_hub_id(dataset_repo_id):
        return dataset_repo_id, True
    raise ValueError(
        f"--dataset_repo_id {dataset_repo_id}: no such file or folder, and no hub id of the form "
        "user/name"
    )
