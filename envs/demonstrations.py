"""Demonstrations of PushT by the scripted expert, made once, offline, and kept in one HDF5 file.

Layout (``demos``): root attributes ``num_demos``, ``fps``, ``total_frames``, ``source``,
``settings``; one group per episode, ``demo_{i}``, with attributes ``seed`` and ``num_samples``:

======================  =========  ============  ==================================================
observations/image      uint8      (T, H, W, 3)  RGB
observations/qpos       float32    (T, 2)        agent position, px
observations/state      float32    (T, 5)        agent x, y, block x, y in px, block angle in rad
actions                 float32    (T, 2)        target position of the agent, px
rewards                 float32    (T,)          coverage / 0.95, at most 1, after the action
success                 bool       (T,)          coverage above 0.95 after the action
======================  =========  ============  ==================================================

Row t holds what was seen at t and the action taken then. Images are chunked by frame, because
training reads frames in random order, and deflated at level 1, because flat-coloured drawings
shrink about thirtyfold at that level and inflate faster than most disks read the raw bytes. Every
chunk has a checksum (fletcher32): a flipped bit is an error when it is read, never another picture.
"""

import hashlib
import json
import time
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32

from envs.collecting import alone_with, solved_episodes, worker_count
from envs.expert import EXPERT_VERSION, ExpertConfig, PushTExpert
from envs.push_t import PushT, PushTTask
from policies.atomic_files import whole_file

if TYPE_CHECKING:
    import h5py

FORMAT_VERSION = 1
"""Raise whenever the same settings would give other values: caches depend on it."""
FILE_VERSION = ("v110", "v110")
"""Of HDF5, readable since 1.10 (2016): its own structures have checksums, and small data sets cost
no tree of chunks."""
SOURCE = "scripted PushT expert"


@dataclass(frozen=True)
class Demonstration:
    """One episode of the expert; images are deflated, frame by frame, to travel lightly."""

    seed: int
    deflated_images: list[bytes]
    states: Float32[np.ndarray, "step 5"]
    actions: Float32[np.ndarray, "step 2"]
    rewards: Float32[np.ndarray, " step"]
    success: Bool[np.ndarray, " step"]

    @property
    def solved(self) -> bool:
        """Whether the benchmark counts the episode as solved."""
        return bool(self.success[-1])


@dataclass(frozen=True)
class CollectionReport:
    """What a collection brought home."""

    path: Path
    n_episodes: int
    total_frames: int
    failed_seeds: tuple[int, ...]
    """Seeds that the expert did not solve; the next seeds took their place."""
    wall_s: float


@lru_cache(maxsize=1)
def _stage(image_size: int, config: ExpertConfig) -> tuple[PushT, PushTExpert]:
    return PushT(image_size), PushTExpert(config)


def demonstrate(
    seed: int, image_size: int, config: ExpertConfig, max_steps: int = 300
) -> Demonstration:
    """Let the expert play one episode.

    Args:
        seed: Of the environment's start and the expert's choices.
        image_size: Height and width of the pictures, in px.
        config: How the expert plans and moves.
        max_steps: Control steps after which the episode ends unsolved.
    """
    env, expert = _stage(image_size, config)
    env.reset(seed)
    expert.reset(seed)
    images, states, actions, rewards, success = [], [], [], [], []
    for _ in range(max_steps):
        state = env.state()
        action = expert.act(state, env.agent_velocity())
        images.append(zlib.compress(env.image().tobytes(), level=1))
        outcome = env.step(action)
        states.append(state)
        actions.append(action)
        rewards.append(outcome.reward)
        success.append(outcome.terminated)
        if outcome.terminated:
            break
    return Demonstration(
        seed=seed,
        deflated_images=images,
        states=np.array(states, np.float32),
        actions=np.array(actions, np.float32),
        rewards=np.array(rewards, np.float32),
        success=np.array(success),
    )


def collect(
    path: str | Path,
    n_episodes: int,
    seed: int = 0,
    image_size: int = 96,
    config: ExpertConfig | None = None,
    n_workers: int | None = None,
    max_steps: int = 300,
    overwrite: bool = False,
    progress: bool = True,
) -> CollectionReport:
    """Write a file of solved episodes; the same arguments give the same bytes.

    Args:
        path: Of the HDF5 file.
        n_episodes: Solved episodes to keep.
        seed: Of the data set; different seeds share no start.
        image_size: Height and width of the pictures, in px.
        config: How the expert plans and moves.
        n_workers: Processes; one per core when None, this process alone when 0.
        max_steps: Control steps after which an episode counts as unsolved.
        overwrite: Replace a file that is already there.
        progress: Show a progress bar.

    Raises:
        FileExistsError: When ``path`` is there and may not be overwritten.
        ValueError: When a number is out of range, or the expert keeps failing.
    """
    import h5py

    path = Path(path)
    config = config or ExpertConfig()
    workers = worker_count(n_workers)
    if n_episodes < 1 or seed < 0 or workers < 0 or image_size < 1 or max_steps < 1:
        raise ValueError(
            f"n_episodes {n_episodes}, seed {seed}, n_workers {n_workers}, image_size {image_size},"
            f" max_steps {max_steps}: give at least 1 (seed and n_workers: 0)"
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is already there; give another path or overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    failed: list[int] = []
    n_kept = total_frames = 0
    episodes = solved_episodes(
        demonstrate,
        (image_size, config, max_steps),
        n_episodes,
        seed,
        workers,
        failed,
        f"{config} within {max_steps} steps; allow more steps or less plan_noise",
        progress,
    )
    with (
        whole_file(path, overwrite) as temporary,
        closing(episodes),
        h5py.File(temporary, "w", libver=FILE_VERSION) as file,
    ):
        for episode in episodes:
            _write(file.create_group(f"demo_{n_kept}"), episode, image_size)
            n_kept += 1
            total_frames += len(episode.actions)
        file.attrs["num_demos"] = n_kept
        file.attrs["fps"] = PushTTask().fps
        file.attrs["total_frames"] = total_frames
        file.attrs["source"] = SOURCE
        file.attrs["settings"] = json.dumps(
            _settings(n_episodes, seed, image_size, config, max_steps), sort_keys=True
        )
    return CollectionReport(
        path, n_kept, total_frames, tuple(failed), wall_s=time.monotonic() - started
    )


def _write(group: "h5py.Group", episode: Demonstration, image_size: int) -> None:
    """Fill one ``demo_{i}`` group."""
    n_steps = len(episode.actions)
    frame = (image_size, image_size, 3)
    group.attrs["seed"] = episode.seed
    group.attrs["num_samples"] = n_steps
    observations = group.create_group("observations")
    images = observations.create_dataset(
        "image",
        shape=(n_steps, *frame),
        dtype=np.uint8,
        chunks=(1, *frame),
        compression="gzip",
        compression_opts=1,
        fletcher32=True,
    )
    for step, deflated in enumerate(episode.deflated_images):
        images.id.write_direct_chunk((step, 0, 0, 0), deflated + _fletcher32(deflated))
    observations.create_dataset("qpos", data=episode.states[:, :2], fletcher32=True)
    observations.create_dataset("state", data=episode.states, fletcher32=True)
    group.create_dataset("actions", data=episode.actions, fletcher32=True)
    group.create_dataset("rewards", data=episode.rewards, fletcher32=True)
    group.create_dataset("success", data=episode.success, fletcher32=True)


def _fletcher32(data: bytes) -> bytes:
    """The checksum that HDF5 keeps behind a chunk (``H5_checksum_fletcher32`` of its library).

    Two sums modulo 65535 over words of 16 bits, the second of all states of the first; 65535 takes
    the place of 0 unless all words are 0.
    """
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    weights = np.arange(len(words), 0, -1, dtype=np.uint64)
    sums = (int(words.sum()), int((words * weights).sum()))
    first, second = ((total - 1) % 65535 + 1 if total else 0 for total in sums)
    return (second << 16 | first).to_bytes(4, "little")


def _settings(
    n_episodes: int, seed: int, image_size: int, config: ExpertConfig, max_steps: int
) -> dict:
    """Everything that decides the content of a file."""
    return {
        "expert_version": EXPERT_VERSION,
        "format_version": FORMAT_VERSION,
        "n_episodes": n_episodes,
        "seed": seed,
        "image_size": image_size,
        "max_steps": max_steps,
        "expert": asdict(config),
    }


@dataclass(frozen=True)
class ScriptedDemonstrations:
    """A data source that makes its file on first use.

    Args:
        n_episodes: Solved episodes to keep.
        seed: Of the data set.
        image_size: Height and width of the pictures, in px.
        settle_waits: Let the agent stand still before and after every push.
        plan_noise: Softmax temperature of the choice among plans, in env steps: 0 for the best
            plan always, 5 for several modes of behaviour.
        cache_dir: Folder of the file.
        n_workers: Processes; one per core when None, this process alone when 0.
        progress: Show a progress bar.
    """

    n_episodes: int = 200
    seed: int = 0
    image_size: int = 96
    settle_waits: bool = False
    plan_noise: float = 0.0
    cache_dir: str = "data"
    n_workers: int | None = None
    progress: bool = True

    @property
    def config(self) -> ExpertConfig:
        """How the expert plans and moves."""
        return ExpertConfig(settle_waits=self.settle_waits, plan_noise=self.plan_noise)

    @property
    def path(self) -> Path:
        """Of the file: its name holds a hash of every setting and of the code's version."""
        settings = _settings(
            self.n_episodes, self.seed, self.image_size, self.config, PushTTask().max_steps
        )
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        name = f"push_t_scripted_{self.n_episodes}x{self.image_size}_{digest}.hdf5"
        return Path(self.cache_dir) / name

    def prepare(self) -> Path:
        """Return the file, making it first where it is missing; two runs never both make it.

        Raises:
            ValueError: When the cached file cannot be read.
        """
        path = self.path
        with alone_with(path):
            if path.exists():
                self._check(path)
            else:
                collect(
                    path,
                    n_episodes=self.n_episodes,
                    seed=self.seed,
                    image_size=self.image_size,
                    config=self.config,
                    n_workers=self.n_workers,
                    progress=self.progress,
                )
        return path

    def _check(self, path: Path) -> None:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                found = int(np.asarray(file.attrs["num_demos"]))
        except (OSError, KeyError) as error:
            raise ValueError(
                f"{path}: {error}; delete it, and the next run makes it anew"
            ) from error
        if found != self.n_episodes:
            raise ValueError(
                f"{path}: num_demos is {found}, not {self.n_episodes}; delete it, and the next run "
                "makes it anew"
            )
